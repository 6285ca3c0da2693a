"""The gradient of the training's own backward pass, caught on its way to the optimizer."""

from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian

_ROUNDING = 1e-5
"""Relative distance up to which two gradients are the same but for rounding."""


class OwnGradient:
    """Lets a measurement use the step's own gradient in place of one that it would have to compute.

    Whether ``.grad`` after the backward pass is the gradient of the measured loss, with the same dropout masks,
    unscaled and unchanged by hooks, cannot be told from outside. So it is compared with a computed one once, and used
    from then on only if it was the same.
    """

    def __init__(self) -> None:
        self._fits: bool | None = None

    def may_fit(self, trainer: Any) -> bool:
        """Whether to wait for the backward pass: a single rank (no average over ranks) and no mismatch so far."""
        return trainer.world_size == 1 and self._fits is not False

    def take(self, trainer: Any, operator: LossHessian) -> Tensor:
        """The gradient at the present parameters, right after the backward pass of a step's first batch."""
        own = operator.layout.flatten([parameter.grad for parameter in operator.parameters])
        if trainer.accumulate_grad_batches > 1:
            own *= trainer.accumulate_grad_batches
        if self._fits:
            return own
        computed = operator.gradient()
        distance, norm = torch.linalg.vector_norm(own - computed), torch.linalg.vector_norm(computed)
        self._fits = bool(distance <= _ROUNDING * norm)
        return computed

    def state_dict(self) -> dict[str, Any]:
        """What is known so far."""
        return {"fits": self._fits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._fits = state["fits"]
