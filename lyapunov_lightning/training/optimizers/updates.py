"""How a step moves the parameters: its gradient, the optimizer's update, the learning rates, moves beside it.

Every optimizer of PyTorch with a learning rate moves the parameters by the learning rate times an update that it makes
of gradients, momenta and decay in its own way. So the update is observed instead of computed anew: the parameters are
noted before the step, and the difference after it is the update, whatever the optimizer and whatever clipped its
gradients.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.curvature.vectors.layout import FlatLayout, local_of
from lyapunov_lightning.training.fsdp import num_parts


class ObservedUpdate:
    """One step of an optimizer.

    To be made before the step; `displacement` and what follows it come after.

    Args:
        operator: The Hessian at the parameters whose movement is observed.

    """

    def __init__(self, operator: LossHessian) -> None:
        self._parameters = list(map(local_of, operator.parameters))
        self._layout = operator.layout
        self._before = [parameter.detach().clone() for parameter in self._parameters]
        self._after: list[Tensor] = []

    @torch.no_grad()
    def rewind(self) -> Tensor:
        """Put the parameters back to before the step; returns the displacement that it was, of shape ``(n,)``."""
        self._after = [parameter.detach().clone() for parameter in self._parameters]
        _write(self._parameters, self._before)
        return self._layout.flatten(self._after) - self._layout.flatten(self._before)

    @torch.no_grad()
    def replay(self, displacement: Tensor, factor: float) -> None:
        """Take the step again, `factor` times as long; exactly the same one if that is 1."""
        if factor == 1.0:
            _write(self._parameters, self._after)
            return
        for parameter, before, piece in zip(
            self._parameters, self._before, self._layout.split(displacement * factor), strict=True
        ):
            parameter.copy_(before + piece)


def _write(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


class LastUpdate:
    """The last step of an optimizer, kept until the batch after it has seen it.

    Attributes:
        vector: Shape ``(n,)``: the update at a highest learning rate of 1; None where there is none.
        lr: The highest learning rate of the step.

    """

    def __init__(self) -> None:
        self.vector: Tensor | None = None
        self.lr = 0.0
        self._size = 0
        self._parameters: Sequence[Tensor] = ()
        self._before: Tensor | None = None

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Before the step."""
        self.vector = None
        self._size = _size_of(parameters)
        self._parameters, self._before = parameters, FlatLayout(parameters).flatten(parameters)

    def end(self, lr: float) -> None:
        """After the step."""
        if self._before is not None:
            after = FlatLayout(self._parameters).flatten(self._parameters)
            self.take(after.sub_(self._before).div_(lr), lr, self._parameters)

    def take(self, vector: Tensor, lr: float, parameters: Sequence[Tensor]) -> None:
        """A step of some parameters that was observed elsewhere."""
        self.vector, self.lr, self._size = vector, lr, _size_of(parameters)
        self._parameters, self._before = (), None

    def forget(self) -> None:
        """The parameters are not where the step ended."""
        self.vector, self._before = None, None
        self._parameters = ()

    def seen(self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> Tensor | None:
        """The step as the gradients see it that the parameters hold now, where it ended.

        Weight decay that the optimizer adds to the gradient belongs to it.

        Returns:
            Shape ``(4,)``, on the device, to be averaged over the ranks: the slope ``-gᵀu``, ``uᵀu``, and the sums of
            the moduli of the update and of the parameters. None if there is no step, or the parameters are others.

        """
        if self.vector is None:
            return None
        if self._size != _size_of(parameters):
            return None
        layout = FlatLayout(parameters)
        parts = num_parts(parameters)
        gradient = layout.flatten([parameter.grad for parameter in parameters])
        decay = coupled_decay(optimizer, parameters, layout)
        if decay is not None:
            gradient += decay * layout.flatten(parameters)
        size = torch.stack([local_of(p).detach().abs().sum().to(gradient) for p in parameters]).sum()
        found = [-(gradient @ self.vector), self.vector @ self.vector, self.vector.abs().sum(), size]
        return torch.stack(found) * parts  # each rank has its part of the sums

    def state_dict(self) -> dict[str, Any]:
        """The update, on the CPU, its learning rate, and the size of the model."""
        return {"vector": None if self.vector is None else self.vector.cpu(), "lr": self.lr, "size": self._size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.vector, self.lr, self._size = state["vector"], state["lr"], state["size"]

    def to(self, device: torch.device) -> None:
        """Move what a checkpoint held to where the training is."""
        self.vector = None if self.vector is None else self.vector.to(device)


def _size_of(parameters: Sequence[Tensor]) -> int:
    """Numbers of all ranks, of parameters that are sharded."""
    return sum(parameter.numel() for parameter in parameters)


def coupled_decay(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], layout: FlatLayout) -> Tensor | None:
    """The weight decay that an optimizer adds to the gradient, as a vector of shape ``(n,)``; None if there is none.

    It belongs to the objective that the optimizer descends, and to its curvature.

    """
    if isinstance(optimizer, torch.optim.AdamW) or not any(g.get("weight_decay") for g in optimizer.param_groups):
        return None
    rates = {
        id(parameter): 0.0 if group.get("decoupled_weight_decay") else float(group.get("weight_decay", 0.0))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return layout.flatten([torch.full_like(local_of(p), rates.get(id(p), 0.0)) for p in parameters])


def slope_and_curvature(operator: LossHessian, update: Tensor, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """How the objective that an optimizer descends, its weight decay included, changes along an update.

    Args:
        operator: The Hessian before the update.
        update: Shape ``(n,)``.
        optimizer: The optimizer.

    Returns:
        The slope ``-gᵀu``, positive downhill, and the curvature ``uᵀHu``.

    Raises:
        NonFiniteCurvatureError: If one of them is not finite.

    """
    update = update.to(operator.device)
    product = operator.matvec(update)
    gradient = operator.gradient()  # free where the product has kept its graph
    decay = coupled_decay(optimizer, operator.parameters, operator.layout)
    if decay is not None:
        gradient = gradient + decay * operator.layout.flatten(operator.parameters)
        product = product + decay * update
    space = operator.space
    slope, curvature = -float(space.inner(gradient, update)), float(space.inner(update, product))
    if not (math.isfinite(slope) and math.isfinite(curvature)):
        raise NonFiniteCurvatureError(
            f"The slope ({slope}) or the curvature ({curvature}) along the update is not finite."
        )
    return slope, curvature
