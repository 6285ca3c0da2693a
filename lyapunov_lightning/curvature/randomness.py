"""The state of every random generator that a loss may draw from, kept and put back.

All products of one operator must see the same dropout mask and the same augmentation, or they belong to different
matrices; and a measurement must leave the generators as it found them, or it changes the run that it measures.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The states of Python's, NumPy's and PyTorch's global generators (CPU and every initialised accelerator)."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    cpu: Tensor
    cuda: tuple[Tensor, ...]
    mps: Tensor | None

    @classmethod
    def capture(cls) -> "RandomState":
        """The present states. Never initialises an accelerator that the process does not use."""
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(legacy=False),
            cpu=torch.get_rng_state(),
            cuda=tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else (),
            mps=torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
        )

    def restore(self) -> None:
        """Put every generator back to these states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        if self.mps is not None:
            torch.mps.set_rng_state(self.mps)


@contextmanager
def preserved_randomness(start: RandomState | None = None) -> Iterator[None]:
    """Run a block from the given random state and leave every generator as it was before, also on an exception.

    Args:
        start: The state to run the block from; the present one if None.

    """
    before = RandomState.capture()
    if start is not None:
        start.restore()
    try:
        yield
    finally:
        before.restore()
