"""A copy of the state of a training, to go back to when the training goes wrong."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.training.lightning_names import LightningModule


@dataclass(frozen=True, eq=False)
class _Copy:
    step: int
    tensors: list[tuple[Tensor, Tensor]]
    """Each parameter and buffer, and its value."""
    groups: list[list[int]]
    """The identities of the parameters in each of the optimizer's groups."""
    optimizer: dict[str, Any]


class KeptCopy:
    """A copy of the trainable parameters, the buffers and the optimizer's state from a step whose loss was good.

    A copy is taken before it is known whether the training is well there. It replaces the copy before it once that is
    known, so that in between there are two copies.
    """

    def __init__(self) -> None:
        self._candidate: _Copy | None = None
        self._copy: _Copy | None = None

    @property
    def is_confirmed(self) -> bool:
        """Whether there is a copy to go back to."""
        return self._copy is not None

    @torch.no_grad()
    def take(self, step: int, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Copy the present state, of which it is not known yet whether it is good."""
        tensors = [*(p for p in pl_module.parameters() if p.requires_grad), *pl_module.buffers()]
        self._candidate = _Copy(
            step,
            [(tensor, tensor.detach().clone()) for tensor in tensors],
            _identities(optimizer),
            copy.deepcopy(optimizer.state_dict()),
        )

    def confirm(self) -> None:
        """The state that was copied last is good: from now on `restore` goes back to it."""
        if self._candidate is not None:
            self._copy, self._candidate = self._candidate, None

    def reject(self) -> None:
        """The state that was copied last is not good: drop the copy, and keep the one before it."""
        self._candidate = None

    @torch.no_grad()
    def restore(self, optimizer: torch.optim.Optimizer) -> int | None:
        """Put parameters, buffers and the optimizer's state back to the copy, and drop the gradients.

        Returns:
            The step before which the copy was taken. None, and nothing is changed, if there is no copy, or if the
            optimizer has other parameters by now.

        """
        self._candidate = None
        kept = self._copy
        # `load_state_dict` would raise for another number of parameters, and for the same number it would give state
        # to the wrong ones.
        if kept is None or kept.groups != _identities(optimizer):
            return None
        for tensor, value in kept.tensors:
            tensor.copy_(value)
        # A copy of the copy: the optimizer keeps the tensors that it loads and writes to them, and the training may
        # have to come back here a second time.
        optimizer.load_state_dict(copy.deepcopy(kept.optimizer))
        optimizer.zero_grad()  # what was accumulated so far is of the state that is given up
        return kept.step

    def clear(self) -> None:
        """Drop both copies, and their memory."""
        self._candidate, self._copy = None, None


def _identities(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
