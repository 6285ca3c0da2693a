"""What travels in the wheel: every module of the package, and the examples in their place."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.cfg")


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of a wheel that is built from a copy, since building writes beside the sources."""
    copy, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        shutil.copy(ROOT / name, copy)
    for folder in ("lyapunov_lightning", "examples"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, dist], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = dist.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_every_module_is_in_the_wheel(names: set[str]) -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lyapunov_lightning").rglob("*.py")}
    assert len(modules) > 100
    assert not modules - names
    assert "lyapunov_lightning/py.typed" in names


def test_the_examples_are_in_the_wheel(names: set[str]) -> None:
    kinds = (".md", ".py", ".yaml")
    examples = {path.relative_to(ROOT / "examples") for path in (ROOT / "examples").rglob("*") if path.suffix in kinds}
    assert len(examples) > 50
    assert not {f"lyapunov_lightning/_examples/{path}" for path in examples} - names


def test_nothing_else_is_installed(names: set[str]) -> None:
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lyapunov_lightning"}
