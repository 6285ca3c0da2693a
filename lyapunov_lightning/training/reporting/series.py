"""Measured series as files: one tidy table, and eigenvectors if they are asked for."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Optional, Union

import torch
from torch import Tensor

_COLUMNS = ("step", "epoch", "name", "value")


class SeriesFile:
    """A CSV file with the columns ``step, epoch, name, value``, one row for each number; ``pandas.read_csv`` reads it.

    Rows are on disk once `append` returns, so an interrupted run leaves all that it measured. A resumed run continues
    the same file, without the rows of the steps that it repeats. A new run renames the file of an earlier one
    (``NAME.1.csv``, ...).

    Args:
        path: The path of the file.

    """

    def __init__(self, path: Union[str, Path]) -> None:
        self._path = Path(path)

    def begin(self, step: int) -> None:
        """Open the file for a run that begins, or is resumed, before this step."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # A resumed run repeats the steps after its checkpoint. With their old rows in the file every curve would double
        # back.
        if step > 0 and self._path.exists():
            with self._path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) < step]
            self._write(rows)
            return
        if self._path.exists():
            self._path.rename(self._free_name())
        self._write([])

    def append(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Add the numbers measured at a step."""
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerows((step, epoch, name, repr(float(value))) for name, value in values.items())

    def _write(self, rows: list[dict[str, str]]) -> None:
        # A run that is killed while it writes leaves the whole old table, and not half of the new one.
        partial = self._path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self._path)

    def _free_name(self) -> Path:
        number = 1
        while (name := self._path.with_suffix(f".{number}{self._path.suffix}")).exists():
            number += 1
        return name


def check_safetensors(owner: str) -> None:
    """Make sure that eigenvectors can be written.

    Raises:
        ModuleNotFoundError: If the package safetensors is not installed.

    """
    try:
        import safetensors.torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"`{owner}(save_vectors=True)` writes safetensors files. Install the package with"
            " `pip install 'lyapunov_lightning[vectors]'`."
        ) from error


def save_vectors(path: Path, values: Tensor, vectors: Tensor, metadata: Optional[Mapping[str, str]] = None) -> None:
    """Write eigenvalues ``(k,)`` and eigenvectors ``(k, n)`` as a safetensors file."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"values": values.to(torch.float64), "vectors": vectors}
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, path, dict(metadata or {}))
