"""The file from which an interrupted `measure` goes on."""

import hashlib
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lyapunov_lightning.curvature.loss.freshness import numbers_of
from lyapunov_lightning.curvature.solvers.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.solvers.lanczos import Search
from lyapunov_lightning.training.reporting.files import read_tensors, replaced, sweep
from lyapunov_lightning.training.reporting.telling import described, warn

_VERSION = 1
"""Of what is in the file."""

_EVERY_SECONDS = 60.0
"""A search is written down at most so often: what a kill costs is a minute, or the product that was under way. A basis
of 33 vectors of 5 million float32 numbers, 629 MiB, took 1.8 s to write to a local disk."""

_SHARE_OF_TIME = 0.05
"""Share of the time that writing may take."""

_SAME_LOSS = 1e-4
"""Relative difference of two losses from which on they are not of one function. Another device, other kernels and
float32 change it by 1e-7 to 1e-6; a step that was edited, by more."""


class KeptSearch:
    """The search of a measurement, in a file while it is under way.

    The file is there as a whole or not at all, is written now and then, and is gone once the measurement is finished.

    Args:
        path: The file. If it is there, the search in it is gone on with.

    Attributes:
        path: The file.
        seconds: The time that was spent before this process began.

    Raises:
        ValueError: If it is another file, or its folder is not there.

    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._search: weakref.ref[Search] | None = None
        self._identity: dict[str, str] = {}
        self._loss = 0.0
        self._started = time.perf_counter()
        self._next = self._started + _EVERY_SECONDS
        self._state: dict[str, Any] | None = None
        if not self.path.parent.is_dir():
            raise ValueError(f"`resume` should be a file in a folder that is there, got {str(path)!r}.")
        if self.path.exists():
            self._state = self._read()
        self.seconds = float(self._state["seconds"]) if self._state else 0.0

    @property
    def search(self) -> Mapping[str, Any] | None:
        """The state of the search with which to go on; None for one that is to begin, or has ended."""
        return None if self._state is None else self._state["search"]

    @property
    def pairs(self) -> Eigenpairs | None:
        """What the search has found, if it has ended and what comes after it was interrupted."""
        found = None if self._state is None else self._state["pairs"]
        return None if found is None else Eigenpairs(**found)

    @property
    def num_matvecs(self) -> int:
        """Products that were spent before this process began."""
        found = self.search if self.pairs is None else vars(self.pairs)
        return 0 if found is None else int(found["num_matvecs"])

    def belongs_to(self, identity: Mapping[str, str], loss: float) -> None:
        """Make sure that the file is of this measurement.

        Args:
            identity: What the measurement is of, by what a user calls it.
            loss: The loss that is measured.

        Raises:
            ValueError: If it is of another one.

        """
        self._identity, self._loss = dict(identity), loss
        if self._state is None:
            return
        before: Mapping[str, str] = self._state["identity"]
        differing = [name for name, value in identity.items() if before.get(name) != value]
        if not differing and abs(self._state["loss"] - loss) > _SAME_LOSS * abs(loss):
            differing = [f"the loss ({self._state['loss']:.6g} in the file, {loss:.6g} now)"]
        if differing:
            raise ValueError(
                f"`resume`: {self.path} keeps the search of another measurement, which differs in"
                f" {', '.join(differing)}. Measure what it was begun with, name another file, or remove this one."
            )

    def note(self, search: Search) -> None:
        """See a search before each product, and write it down if the time has come."""
        # Weakly: the basis in it is let go of as soon as the search is over.
        self._search = weakref.ref(search)
        if time.perf_counter() >= self._next:
            self.write()

    def write(self) -> None:
        """Write the present state of the search, if there is one."""
        search = None if self._search is None else self._search()
        if search is not None:
            self._write(search=search.state_dict(), pairs=None)

    def end(self, pairs: Eigenpairs) -> None:
        """Write what the search has found, for what comes after it."""
        self._search = None
        self._write(search=None, pairs=dict(vars(pairs)))

    def remove(self) -> None:
        """The measurement is finished."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            warn(f"`measure` is finished and cannot remove {self.path}: {described(error)}")

    def _write(self, **what: Any) -> None:
        begun = time.perf_counter()
        seconds = self.seconds + begun - self._started
        state = {"version": _VERSION, "identity": self._identity, "loss": self._loss, "seconds": seconds, **what}
        try:
            sweep(self.path.parent, self.path.name)
            with replaced(self.path) as partial:
                torch.save(state, partial)
        except OSError as error:  # a disk that is full is no reason to lose the search in memory
            warn(f"`measure` cannot keep its search in {self.path}, and goes on without: {described(error)}")
        ended = time.perf_counter()
        self._next = ended + max(_EVERY_SECONDS, (ended - begun) / _SHARE_OF_TIME)

    def _read(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = read_tensors(self.path)
            if state["version"] != _VERSION or {"identity", "loss", "seconds", "search", "pairs"} - set(state):
                raise ValueError("it is of another version")
        except OSError:
            raise
        except Exception as error:
            raise ValueError(
                f"`resume` should be a file that `measure` keeps a search in, or the name of one to be. {self.path} is"
                f" none that this version wrote ({described(error)})."
            ) from error
        return state


def digest_of(module: nn.Module) -> str:
    """Tells the parameters and the buffers of a module from any others."""
    digest = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        digest.update(numbers_of(tensor.detach()).numpy().tobytes())
    return digest.hexdigest()
