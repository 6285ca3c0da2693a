"""Writes the example configurations, which come with the package, to where they can be run and changed."""

from pathlib import Path

import lyapunov_lightning
from lyapunov_lightning.cli.errors import PROGRAM

_SUFFIXES = (".md", ".py", ".yaml")


def write_examples(dest: str | Path) -> None:
    """Write the folder ``examples``: configurations, and the models and data that they name.

    The configurations name them as ``examples.models.…``, so commands are run in `dest`.

    Args:
        dest: Where to make the folder.

    Raises:
        FileExistsError: If one of the files is there already. Nothing is written then.

    """
    source = _source()
    texts = {
        path.relative_to(source): path.read_text(encoding="utf-8")
        for path in sorted(source.rglob("*"))
        if path.suffix in _SUFFIXES
    }
    folder = Path(dest) / "examples"
    # Looked for before the first file is written: a user's changed configuration is never overwritten, and no half of
    # the examples is left next to it.
    there = next((folder / path for path in texts if (folder / path).exists()), None)
    if there is not None:
        raise FileExistsError(f"{there} is there already. Remove it, or name another folder to write to.")
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    change = "" if Path(dest).resolve() == Path.cwd() else f"cd {dest} && "
    print(f"Wrote {len(texts)} files to {folder}. Every configuration says at its head what it needs. Begin with\n")
    print(f"  {change}{PROGRAM} fit --config examples/configs/quickstart.yaml")


def _source() -> Path:
    """Where the examples are: inside the package if it was installed from a wheel, next to it in a clone."""
    package = Path(lyapunov_lightning.__file__).parent
    inside = package / "_examples"
    return inside if (inside / "configs").is_dir() else package.parent / "examples"
