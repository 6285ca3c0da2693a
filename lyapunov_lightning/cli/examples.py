"""Writes the example configurations, which come with the package, to where they can be run and changed."""

from pathlib import Path

import lyapunov_lightning
from lyapunov_lightning.cli.errors import PROGRAM

_SUFFIXES = (".md", ".py", ".yaml")

CONFIGS = (
    "quickstart",
    "simplecnn_spectrum",
    "negative_curvature_tracker",
    "mnist_negative",
    "quasi_newton",
    "nudged_sgd",
)
"""The configurations that are written if not all are asked for: one for each callback."""

_NEEDED = ("__init__.py", "data.py", "models.py")
"""What these name."""


def write_examples(dest: str | Path, *, everything: bool = False) -> None:
    """Write the folder ``examples``: configurations, and the models and data that they name.

    The configurations name them as ``examples.models.…``, so commands are run in `dest`.

    Args:
        dest: Where to make the folder.
        everything: Whether to write all examples, those of the papers among them.

    Raises:
        FileExistsError: If one of the files is there already and differs. Nothing is written then.

    """
    source = _source()
    few = [*_NEEDED, *(f"configs/{name}.yaml" for name in CONFIGS)]
    paths = [path for path in sorted(source.rglob("*")) if path.suffix in _SUFFIXES]
    texts = {
        path.relative_to(source): path.read_text(encoding="utf-8")
        for path in (paths if everything else [source / name for name in few])
    }
    folder = Path(dest) / "examples"
    # Looked for before the first file is written: a user's changed configuration is never overwritten, and no half of
    # the examples is left next to it.
    there = next((folder / path for path, text in texts.items() if _differs(folder / path, text)), None)
    if there is not None:
        raise FileExistsError(f"{there} is there already, and differs. Remove it, or name another folder to write to.")
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    change = "" if Path(dest).resolve() == Path.cwd() else f"cd {dest} && "
    print(f"Wrote {len(texts)} files to {folder}. Every configuration says at its head what it needs. Begin with\n")
    print("  pip install 'lyapunov_lightning[examples]'")
    print(f"  {change}{PROGRAM} fit --config examples/configs/quickstart.yaml")
    if not everything:
        print(f"\nAll others, with the figures of three papers: {PROGRAM} examples --all")


def _differs(path: Path, text: str) -> bool:
    """Whether something else is there already."""
    return path.exists() and (not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text)


def _source() -> Path:
    """Where the examples are: inside the package if it was installed from a wheel, next to it in a clone."""
    package = Path(lyapunov_lightning.__file__).parent
    inside = package / "_examples"
    return inside if (inside / "configs").is_dir() else package.parent / "examples"
