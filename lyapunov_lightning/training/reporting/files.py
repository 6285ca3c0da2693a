"""Files that are there as a whole or not at all, and that are read without trust."""

import secrets
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class RunFiles(Protocol):
    """Files that a run writes as it goes on, of which some may have to wait until they can be written."""

    @property
    def pattern(self) -> Path:
        """Where they are, the same for two that would write to one file."""

    @property
    def num_waiting(self) -> int:
        """How much could not be written yet."""

    def begin(self, step: int) -> str | None:
        """Begin a run, or resume it before this step.

        Returns:
            What is wrong with the files of the run that is resumed.

        Raises:
            OSError: If they cannot be written now. The next `flush` begins again.

        """

    def flush(self) -> None:
        """Write what waits.

        Raises:
            OSError: If that is not possible yet. It goes on waiting.

        """


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of a file once all is written.

    A run that is killed meanwhile, or a disk that is full, leaves the file as it was. The name cannot be guessed, so
    that nobody can have put a link there that would lead the writing elsewhere.

    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sweep(folder: Path, pattern: str) -> None:
    """Remove what `replaced` has left of files of this pattern in a run that was killed while it wrote."""
    for left in folder.glob(f"{pattern}.*.partial"):
        left.unlink(missing_ok=True)


def unused(path: Path) -> Path:
    """The path itself where nothing is there yet, else its `free_name`."""
    return free_name(path) if path.exists() or path.is_symlink() else path


def free_name(path: Path) -> Path:
    """The first of ``NAME.1.csv``, ``NAME.2.csv``, ... that is not taken."""
    number = 1
    while (name := path.with_suffix(f".{number}{path.suffix}")).exists() or name.is_symlink():
        number += 1
    return name


def read_tensors(path: str | Path) -> Any:
    """Read tensors and plain values that ``torch.save`` wrote, from a file that may come from anywhere.

    Nothing in it is run, and it takes no more memory than its size.

    Raises:
        ValueError: If it would take more. Of what is no such file at all PyTorch raises errors of many kinds.

    """
    if zipfile.is_zipfile(path):  # which is no larger inside than outside where PyTorch wrote it
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed")
    state = torch.load(path, map_location="cpu", weights_only=True)
    _check_tensors(state)
    return state


def _check_tensors(state: Any) -> None:
    """Make sure that every tensor holds as many numbers as it says: one of a stride of 0 has any number of them."""
    if isinstance(state, Tensor):
        if state.layout != torch.strided or not _is_held(state):
            raise ValueError(f"a tensor of the shape {tuple(state.shape)} is not in it")
    elif isinstance(state, (dict, list, tuple)):
        for entry in state.values() if isinstance(state, dict) else state:
            _check_tensors(entry)


def _is_held(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.nbytes <= tensor.untyped_storage().nbytes()
