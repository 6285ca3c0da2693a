"""What was found, one line of JSON for each cell, so that a run that was interrupted goes on where it ended.

Every line has a mark of what it was found with; lines of another mark are as if they were not there. Sweeps are marked
by the sources of the trainings, readings by those of the package as well: after a change of the gauge the truth is not
looked for again.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import lyapunov_lightning
from benchmarks.verdicts.training import Cell, Size

HERE = Path(__file__).parent
TRAININGS = ("problems", "held_out", "training", "sweeps")


def truth_mark(size: Size) -> str:
    """What a sweep depends on."""
    return _mark((HERE / f"{name}.py" for name in TRAININGS), size)


def reading_mark(size: Size) -> str:
    """What a reading depends on: a sweep, and everything in the package."""
    package = Path(lyapunov_lightning.__file__).parent
    return _mark([HERE / "readings.py", *package.rglob("*.py")], truth_mark(size))


def _mark(sources: Iterable[Path], *others: object) -> str:
    found = hashlib.sha256(repr((torch.__version__, others)).encode())
    for source in sorted(sources):
        found.update(source.read_bytes())
    return found.hexdigest()[:12]


class Kept:
    """The lines of a file that have a mark.

    Args:
        path: The file; made when the first line is added.
        mark: The mark.
    """

    def __init__(self, path: Path, mark: str) -> None:
        self._path, self._mark = path, mark
        lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
        self._found = {Cell(**line["cell"]): line["found"] for line in lines if line["mark"] == mark}

    def get(self, cell: Cell) -> Any:
        """What was found; None if the cell is not there."""
        return self._found.get(cell)

    def add(self, cell: Cell, found: Any) -> None:
        """Write a line."""
        self._found[cell] = found
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            print(json.dumps({"mark": self._mark, "cell": asdict(cell), "found": found}), file=file)
