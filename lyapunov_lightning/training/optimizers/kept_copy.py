"""A copy of a training, to go back to when it goes wrong."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class _Copy:
    step: int
    tensors: list[tuple[Tensor, Tensor]]
    """Each parameter and buffer, and its value."""
    groups: list[list[int]]
    """The identities of the parameters in the optimizer's groups."""
    optimizer: dict[str, Any]


class KeptCopy:
    """The parameters that train, the buffers and the optimizer's state, as they were where all was well.

    A copy is taken before a step and counts once the loss there was seen to be well, so for one step there are two.
    """

    def __init__(self) -> None:
        self._candidate: _Copy | None = None
        self._copy: _Copy | None = None

    @torch.no_grad()
    def take(self, step: int, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Copy the present state, which is not known yet to be well."""
        tensors = [*(p for p in pl_module.parameters() if p.requires_grad), *pl_module.buffers()]
        self._candidate = _Copy(
            step,
            [(tensor, tensor.detach().clone()) for tensor in tensors],
            _identities(optimizer),
            copy.deepcopy(optimizer.state_dict()),
        )

    def confirm(self) -> None:
        """What was copied last was well."""
        if self._candidate is not None:
            self._copy, self._candidate = self._candidate, None

    def reject(self) -> None:
        """It was not."""
        self._candidate = None

    @torch.no_grad()
    def restore(self, optimizer: torch.optim.Optimizer) -> int | None:
        """Go back, gradients apart, which are dropped.

        Returns:
            The step that it is the state of; None where there is no copy, or parameters have come to the optimizer
            since.

        """
        self._candidate = None
        kept = self._copy
        if kept is None or kept.groups != _identities(optimizer):
            return None
        for tensor, value in kept.tensors:
            tensor.copy_(value)
        optimizer.load_state_dict(copy.deepcopy(kept.optimizer))  # a copy: the optimizer goes on in these tensors
        optimizer.zero_grad()
        return kept.step

    def clear(self) -> None:
        """Free the memory."""
        self._candidate, self._copy = None, None


def _identities(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
