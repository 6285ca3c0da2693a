"""The states of the global random generators that a loss may draw from, kept and put back.

All products of one operator must see the same dropout mask and the same augmentation, or they belong to different
matrices; and a measurement must leave the generators as it found them, or it changes the run that it measures.

The global generators are Python's, NumPy's, and PyTorch's of the CPU and of every accelerator that the process uses:
CUDA and ROCm, XPU, MPS, and whatever registers itself with PyTorch as a device. Generators that a loss holds itself,
objects of `torch.Generator` or `numpy.random.Generator`, go on from one evaluation to the next; so do those of packages
beside PyTorch, XLA among them. `HessianOperator.check` shows what comes of that.
"""

import functools
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
    """The states of the global generators.

    Attributes:
        python: That of `random`.
        numpy: That of `numpy.random`.
        cpu: That of `torch`.
        accelerators: By kind of device those of its devices; of the kinds that are in use.

    """

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    cpu: Tensor
    accelerators: dict[str, tuple[Tensor, ...]]

    @classmethod
    def capture(cls) -> "RandomState":
        """The present states. Never initialises an accelerator that the process does not use."""
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(legacy=False),
            cpu=torch.get_rng_state(),
            accelerators={kind: tuple(map(module.get_rng_state, _devices(module))) for kind, module in _accelerators()},
        )

    def restore(self) -> None:
        """Put every generator back to these states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for kind, states in self.accelerators.items():
            module = getattr(torch, kind)
            for device, state in zip(_devices(module), states, strict=True):
                module.set_rng_state(state, device)


def _accelerators() -> Iterator[tuple[str, Any]]:
    """The kinds of accelerators that are in use, with the modules of PyTorch that are named after them."""
    for kind in _kinds(torch._C._get_privateuse1_backend_name()):
        module: Any = getattr(torch, kind, None)
        if hasattr(module, "get_rng_state") and (not hasattr(module, "is_initialized") or module.is_initialized()):
            yield kind, module


@functools.lru_cache
def _kinds(registered: str) -> tuple[str, ...]:
    """The kinds of accelerators that there may be, by the name of the one that a package registers itself.

    To find out takes long, and stays true but for that one; which of them are in use does not, and is asked every time.
    """
    kinds = dict.fromkeys(("cuda", "xpu", "mps", registered))
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        kinds[accelerator.type] = None
    return tuple(kinds)


def _devices(module: Any) -> range:
    return range(module.device_count())


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
