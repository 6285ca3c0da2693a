"""What a user installs: the sdist and the wheel are built, each is installed in a fresh environment, and tried.

``make dist-check``, or ``python tests/dist_check.py [--download]``. The wheel is built from the sdist. PyTorch,
Lightning and the rest are lent by the environment that runs this, which saves gigabytes; with ``--download`` they are
installed as for a user, so that the list of dependencies is tried as well.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ("tests/test_cli.py", "tests/test_examples.py", "tests/curvature/solvers/test_lanczos.py")

OF_BOTH = {"lyapunov_lightning/__init__.py", "lyapunov_lightning/py.typed"}
OF_WHEEL = {f"lyapunov_lightning/_examples/{name}" for name in ("__init__.py", "data.py", "configs/quickstart.yaml")}
OF_SDIST = {
    *("CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "Makefile", "docs/index.md", "tests/conftest.py"),
    *("examples/configs/quickstart.yaml", "docs/images/edge_of_stability.png", "benchmarks/__init__.py"),
}


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command and show it; its output. What it prints is shown if it fails."""
    print("$", *command, flush=True)
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    if done.returncode:
        sys.exit(f"{done.stdout}\n{done.stderr}\nThis failed with status {done.returncode}.")
    return done.stdout


def environment(folder: Path, package: Path, extra: str, download: bool) -> Path:
    """A fresh environment with the package in it; its folder of programs."""
    venv.create(folder, with_pip=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    python = programs / "python"
    if download:
        run(python, "-m", "pip", "install", "--quiet", f"{package}[{extra}]", cwd=folder)
        return programs
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (own / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", package, cwd=folder)
    return programs


def check_installed(programs: Path, folder: Path) -> None:
    """The package comes from this environment, not from the one that lends the rest."""
    code = "import lyapunov_lightning as package; print(package.__file__)"
    place = Path(run(programs / "python", "-c", code, cwd=folder).strip())
    assert place.resolve().is_relative_to(programs.parent.resolve()), place


def try_wheel(programs: Path, folder: Path) -> None:
    """As a new user would: the version, the examples, a short training, its spectrum."""
    program = programs / "lyapunov-lightning"
    config = ("--config", "examples/configs/quickstart.yaml")
    print(run(program, "--version", cwd=folder), end="")
    run(program, "examples", cwd=folder)
    run(program, "fit", *config, "--trainer.max_steps=20", cwd=folder)
    (checkpoint,) = folder.glob("logs/quickstart/version_0/checkpoints/*.ckpt")
    once = "--data.steps_per_epoch=1"
    print(run(program, "measure", *config, "--ckpt_path", checkpoint, once, "--largest=2", cwd=folder), end="")
    assert (folder / "spectrum.png").is_file()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--download", action="store_true", help="install the dependencies, instead of lending them")
    download = parser.parse_args().download
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        venv.create(folder / "build", with_pip=True)
        python = folder / "build" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", "build", cwd=folder)
        run(python, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
        (sdist,) = (folder / "dist").glob("*.tar.gz")
        (wheel,) = (folder / "dist").glob("*.whl")

        names = set(zipfile.ZipFile(wheel).namelist())
        assert not (OF_BOTH | OF_WHEEL) - names, (OF_BOTH | OF_WHEEL) - names
        assert not [name for name in names if name.startswith(("tests/", "examples/", "benchmarks/"))]
        with tarfile.open(sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
            assert not (OF_BOTH | OF_SDIST) - names, (OF_BOTH | OF_SDIST) - names
            archive.extractall(folder / "source", filter="data")
        (source,) = (folder / "source").iterdir()

        work = folder / "work"
        work.mkdir()
        programs = environment(folder / "from_wheel", wheel, "examples", download)
        check_installed(programs, work)
        try_wheel(programs, work)

        programs = environment(folder / "from_sdist", sdist, "test", download)
        check_installed(programs, work)
        options = ("-q", "-p", "no:xdist", "--override-ini", "addopts=")
        print(run(programs / "python", "-m", "pytest", *options, *TESTS, cwd=source), end="")
    print("The wheel and the sdist are as they should be.")


if __name__ == "__main__":
    main()
