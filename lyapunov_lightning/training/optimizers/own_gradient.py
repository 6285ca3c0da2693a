"""The gradient that the training itself has computed, used in place of a second computation."""

from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.training.lightning_names import Trainer

_ROUNDING_DISTANCE = 1e-5
"""Relative distance up to which two gradients count as the same one, summed in another order."""


class OwnGradient:
    """Lets a measurement use the gradient of the step's own backward pass, where it is the same.

    ``.grad`` after the backward pass need not be the gradient of the measured loss: dropout masks may differ, a loss
    scaler may have scaled it, hooks may have changed it. So the first one is compared with a gradient that is computed
    for the purpose, and ``.grad`` is used from then on only if the two were the same. Where several batches are
    accumulated they may be the same at one step and not at the next: with a smaller batch among them, or fewer of them.
    """

    def __init__(self) -> None:
        self._fits: bool | None = None

    def may_fit(self, trainer: Trainer) -> bool:
        """Whether to wait for the backward pass: not after a mismatch, nor where ``.grad`` is of several batches."""
        return trainer.world_size == 1 and trainer.accumulate_grad_batches == 1 and self._fits is not False

    def take(self, operator: LossHessian) -> Tensor:
        """The gradient at the present parameters, right after the step's backward pass."""
        own = operator.layout.flatten([parameter.grad for parameter in operator.parameters])
        if self._fits:
            return own
        # Compared in the first probe only: two evaluations of the same function on the same batch differ by the order
        # of sums, up to 1e-5, while another dropout mask or a loss scale changes the gradient as a whole.
        computed = operator.gradient()
        distance, norm = torch.linalg.vector_norm(own - computed), torch.linalg.vector_norm(computed)
        # Of a gradient that is not finite nothing can be told: the next one is compared.
        if bool((distance + norm).isfinite()):
            self._fits = bool(distance <= _ROUNDING_DISTANCE * norm)
        return computed

    def state_dict(self) -> dict[str, Any]:
        """Whether the gradients were the same; None before the comparison."""
        return {"fits": self._fits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._fits = state["fits"]
