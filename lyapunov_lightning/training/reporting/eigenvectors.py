"""Eigenvectors as files, one for each measurement."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lyapunov_lightning.training.reporting.files import replaced, sweep

_NAME = "eigenvectors-step{step:08d}.safetensors"

_MOST_WAITING = 2**28
"""Bytes of vectors that wait at most while they cannot be written; the newest stay."""


_ROOM_TO_WRITE = 2**22
"""Bytes that have to be free before safetensors writes. Where it finds no memory for its buffer of 1 MB, it raises
nothing: its Rust ends the process."""


class EigenvectorFiles:
    """Safetensors files ``eigenvectors-step00000012.safetensors`` and so on in one folder.

    A resumed run continues the same folder, without the files of the steps that it repeats. A new run moves those of an
    earlier one into a folder ``eigenvectors.1`` (``.2``, ...). Files that cannot be written wait for the next time.

    Args:
        folder: The folder.

    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._waiting: dict[Path, tuple[dict[str, Tensor], dict[str, str]]] = {}
        self._begins_at: int | None = None

    @property
    def pattern(self) -> Path:
        """The name of all of them, in the folder that links lead to."""
        return self._folder.resolve() / "eigenvectors-step*.safetensors"

    @property
    def num_waiting(self) -> int:
        """The number of files that are not written yet."""
        return len(self._waiting)

    def begin(self, step: int) -> None:
        """Make room for a run that begins, or is resumed, before this step.

        Raises:
            OSError: If the folder cannot be written. The files then wait, and the next `flush` begins.

        """
        self._waiting = {}
        self._begins_at = step  # until it has begun
        self._begin(step)

    def add(self, step: int, values: Tensor, vectors: Tensor, metadata: Mapping[str, str]) -> None:
        """Write the eigenvalues ``(k,)`` and eigenvectors ``(k, n)`` of a step.

        Raises:
            OSError: If the file cannot be written. It then waits for the next `add` or `flush`.

        """
        tensors = {"values": values.to(torch.float64).cpu(), "vectors": vectors.cpu().contiguous()}
        self._waiting[self._folder / _NAME.format(step=step)] = (tensors, dict(metadata))
        try:
            self.flush()
        finally:
            sizes = {path: tensors["vectors"].nbytes for path, (tensors, _) in self._waiting.items()}
            while sum(sizes.values()) > _MOST_WAITING:
                del self._waiting[next(iter(sizes))], sizes[next(iter(sizes))]

    def flush(self) -> None:
        """Write the files that wait.

        Raises:
            OSError: If one cannot be written.

        """
        from safetensors.torch import save_file

        if not self._waiting:
            return
        if self._begins_at is not None:
            self._begin(self._begins_at)
        self._folder.mkdir(parents=True, exist_ok=True)
        for path, (tensors, metadata) in [*self._waiting.items()]:
            with replaced(path) as partial:
                bytearray(_ROOM_TO_WRITE)
                save_file(tensors, partial, metadata)
            del self._waiting[path]

    def _begin(self, step: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        sweep(self._folder, self.pattern.name)
        earlier = sorted(self._folder.glob(self.pattern.name))
        if step == 0 and earlier:
            number = 1
            while (aside := self._folder / f"eigenvectors.{number}").exists():
                number += 1
            aside.mkdir()
            for path in earlier:
                path.rename(aside / path.name)
        elif step > 0:
            for path in earlier:
                if path.name >= _NAME.format(step=step):
                    path.unlink()
        self._begins_at = None


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
