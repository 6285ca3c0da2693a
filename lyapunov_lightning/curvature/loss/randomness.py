"""The states of the global random generators that a loss may draw from, kept and put back.

All products of one operator must see the same dropout mask and the same augmentation, or they belong to different
matrices; and a measurement must leave the generators as it found them, or it changes the run that it measures.

The global generators are Python's, NumPy's, and PyTorch's of the CPU and of every accelerator that the process uses:
CUDA and ROCm, XPU, MPS, and whatever registers itself with PyTorch as a device. Generators that a loss holds itself,
objects of `torch.Generator` or `numpy.random.Generator`, are not put back, and give other numbers at each evaluation;
so do the generators of packages outside of PyTorch, such as XLA. `HessianOperator.check` shows how much that matters.
"""

import functools
import pickle
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
        python: The state of `random`.
        numpy: The state of `numpy.random`.
        cpu: The state of `torch` on the CPU.
        accelerators: The states of the devices, by kind of accelerator, for the kinds that are in use.

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
            # The old form of the state exists for NumPy's default generator alone: with another one NumPy warns.
            numpy=np.random.get_state(legacy=False),
            cpu=torch.get_rng_state(),
            accelerators={kind: tuple(map(module.get_rng_state, _devices(module))) for kind, module in _accelerators()},
        )

    def unless_changed(self) -> "RandomState":
        """The present states: this very object where they are the same."""
        present = RandomState.capture()
        return self if present._is(self) else present

    def _is(self, other: "RandomState") -> bool:
        mine, others = (
            [state.cpu, *(tensor for states in state.accelerators.values() for tensor in states)]
            for state in (self, other)
        )
        return (
            self.python == other.python
            and pickle.dumps(self.numpy) == pickle.dumps(other.numpy)  # a nested dictionary with arrays
            and self.accelerators.keys() == other.accelerators.keys()
            and all(map(torch.equal, mine, others))
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

    `torch.accelerator` takes long to answer, and its answer stays true. Whether an accelerator is in use may change, so
    that is asked every time.
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
    # Also where the block fails: a run that continues with other random numbers is another run.
    before = RandomState.capture()
    if start is not None:
        start.restore()
    try:
        yield
    finally:
        before.restore()
