"""The gradient and the loss that the training itself has computed, used in place of a second computation."""

import math
from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.training.lightning_names import Trainer

_ROUNDING_DISTANCE = 1e-5
"""Relative distance up to which two gradients count as the same one, summed in another order."""

_SAME_LOSS = 4
"""Last places by which two losses may differ and count as the same one: a product on a replica may take another kernel.
A second difference has to be 200 of them, see `lyapunov_lightning.curvature.directions.second_difference`."""


class _OnceCompared:
    """Something of the step's own, which is used once a replay of the step has turned out to have the same."""

    def __init__(self) -> None:
        self._fits: bool | None = None

    def state_dict(self) -> dict[str, Any]:
        """Whether the two were the same; None before the comparison."""
        return {"fits": self._fits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._fits = state["fits"]


class OwnGradient(_OnceCompared):
    """Lets a measurement use the gradient of the step's own backward pass, where it is the same.

    ``.grad`` after the backward pass need not be the gradient of the measured loss: dropout masks may differ, a loss
    scaler may have scaled it, hooks may have changed it. So the first one is compared with a gradient that is computed
    for the purpose, and ``.grad`` is used from then on only if the two were the same. Where several batches are
    accumulated they may be the same at one step and not at the next: with a smaller batch among them, or fewer of them.
    """

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


class OwnLoss(_OnceCompared):
    """Lets a measurement use the loss of the training step, where a replay of the step has the same.

    As with `OwnGradient` the first one is compared: a step that counts its calls, or a loss scaler, makes it another.

    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: Tensor | None = None

    def see(self, loss: Tensor) -> None:
        """Note the loss of the step, right before its backward pass."""
        if self._fits is not False:
            self._seen = loss.detach().clone()

    def take(self, operator: LossHessian) -> float | None:
        """The loss at the present parameters, right after the step's backward pass; None if it is not known."""
        seen, self._seen = self._seen, None
        if seen is None:
            return None
        own = float(seen)
        if self._fits:
            return own
        computed = operator.value()
        if math.isfinite(own - computed):
            self._fits = abs(own - computed) <= _SAME_LOSS * torch.finfo(operator.dtype).eps * abs(computed)
        return computed
