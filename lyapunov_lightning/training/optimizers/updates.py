"""The update of an optimizer, observed on the parameters, and what the loss does along it.

Every optimizer of PyTorch with a learning rate moves the parameters by the learning rate times an update that it makes
of gradients, momenta and decay in its own way. So the update is observed instead of computed a second time: the
parameters are copied before the step, and the difference after it is the update, whatever the optimizer and whatever
clipped its gradients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.curvature.vectors.layout import FlatLayout, local_of
from lyapunov_lightning.training.fsdp import num_parts


class ObservedUpdate:
    """One step of an optimizer, which can be taken back and taken again.

    To be made before the step. `rewind` and `replay` come after it, in this order.

    Args:
        operator: The Hessian at the parameters that the step moves.

    """

    def __init__(self, operator: LossHessian) -> None:
        self._parameters = list(map(local_of, operator.parameters))
        self._layout = operator.layout
        self._before = [parameter.detach().clone() for parameter in self._parameters]
        self._after: list[Tensor] = []

    @torch.no_grad()
    def rewind(self) -> Tensor:
        """Put the parameters back to before the step; returns the displacement that it made, of shape ``(n,)``."""
        self._after = [parameter.detach().clone() for parameter in self._parameters]
        _write(self._parameters, self._before)
        return self._layout.flatten(self._after) - self._layout.flatten(self._before)

    @torch.no_grad()
    def replay(self, displacement: Tensor, factor: float) -> None:
        """Take the step again, `factor` times as long; exactly the same step if that is 1."""
        if factor == 1.0:
            # The copies, because before + (after - before) differs from after in the last digits: a measurement that
            # failed would then change the training.
            _write(self._parameters, self._after)
            return
        for parameter, before, piece in zip(
            self._parameters, self._before, self._layout.split(displacement * factor), strict=True
        ):
            parameter.copy_(before + piece)


def _write(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


@dataclass(frozen=True, eq=False)
class Update:
    """An update that an optimizer has made.

    Attributes:
        vector: Shape ``(n,)``: the displacement of the parameters, divided by the highest learning rate.
        lr: The highest learning rate of the step.

    """

    vector: Tensor
    lr: float


@dataclass(frozen=True, eq=False)
class _Known:
    """An update, and how many numbers the parameters held that it moved, on all ranks together."""

    update: Update
    size: int


@dataclass(frozen=True, eq=False)
class _UnderWay:
    """The parameters of a step that the optimizer is about to take, and their values before it."""

    parameters: Sequence[Tensor]
    before: Tensor


class SeenOnDevice(NamedTuple):
    """`SeenUpdate` before it is fetched from the device.

    Four scalars of this rank alone, whose means over the ranks are the fields of `SeenUpdate`.
    """

    slope: Tensor
    squared_norm: Tensor
    change: Tensor
    size: Tensor


class SeenUpdate(NamedTuple):
    """Slope and size of an update at learning rate 1, measured where its step ended.

    Attributes:
        slope: ``-gᵀu`` by the gradient there, positive downhill.
        squared_norm: ``uᵀu``.
        change: The sum of the absolute values of the update.
        size: The sum of the absolute values of the parameters.

    """

    slope: float
    squared_norm: float
    change: float
    size: float


class LastUpdate:
    """The last update of an optimizer, kept until the gradient of the next batch has been computed."""

    def __init__(self) -> None:
        self._last: _Known | _UnderWay | None = None

    @property
    def known(self) -> Update | None:
        """The update; None before the first one, during a step, and after `forget`."""
        return self._last.update if isinstance(self._last, _Known) else None

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Before the step."""
        self._last = _UnderWay(parameters, FlatLayout(parameters).flatten(parameters))

    def end(self, lr: float) -> None:
        """After the step; without a `begin` before it nothing is kept."""
        if isinstance(self._last, _UnderWay):
            parameters, before = self._last.parameters, self._last.before
            # In place in what follows: this is done at every step, and each further vector is as large as the model.
            after = FlatLayout(parameters).flatten(parameters)
            self.take(after.sub_(before).div_(lr), lr, parameters)

    def take(self, vector: Tensor, lr: float, parameters: Sequence[Tensor]) -> None:
        """Keep the update of some parameters that was observed elsewhere."""
        self._last = _Known(Update(vector, lr), _size_of(parameters))

    def forget(self) -> None:
        """Drop the update: the parameters have left the place where its step ended, so no gradient comes from there."""
        self._last = None

    def seen(
        self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, loss_scale: float = 1.0
    ) -> SeenOnDevice | None:
        """Slope and size of the last update, by the gradient in ``.grad`` that was computed where its step ended.

        Weight decay that the optimizer adds to the gradient is part of the gradient.

        Args:
            parameters: The parameters.
            optimizer: The optimizer.
            loss_scale: The factor that a loss scaler has put on ``.grad``.

        Returns:
            None if no update is known, or if other parameters are trained than when it was made.

        """
        # By the size on all ranks and not by the length of this rank's vector: frozen parameters may be another rank's
        # alone, and ranks that answer differently here would wait for each other in the mean over them.
        if not isinstance(self._last, _Known) or self._last.size != _size_of(parameters):
            return None
        vector = self._last.update.vector
        layout = FlatLayout(parameters)
        gradient = layout.flatten([parameter.grad for parameter in parameters])
        if loss_scale != 1:
            gradient /= loss_scale  # before the decay, which the optimizer adds to the gradient without the scale
        decay = coupled_decay(optimizer, parameters, layout)
        if decay is not None:
            gradient += decay * layout.flatten(parameters)
        size = torch.stack([local_of(p).detach().abs().sum().to(gradient) for p in parameters]).sum()
        # Scalars on the device: this is done at every step, and reading one of them would wait for the backward pass.
        found = (-(gradient @ vector), vector @ vector, vector.abs().sum(), size)
        # Of sharded parameters each rank has a part of every sum, and the mean over the ranks, which is taken later, is
        # too small by the number of parts.
        parts = num_parts(parameters)
        return SeenOnDevice(*(number * parts for number in found))

    def state_dict(self) -> dict[str, Any]:
        """The update, with its vector on the CPU."""
        if not isinstance(self._last, _Known):
            return {"vector": None, "lr": 0.0, "size": 0}
        update = self._last.update
        return {"vector": update.vector.cpu(), "lr": update.lr, "size": self._last.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        vector = state["vector"]
        self._last = None if vector is None else _Known(Update(vector, state["lr"]), state["size"])

    def to(self, device: torch.device, parameters: Sequence[Tensor]) -> None:
        """Move an update that came from a checkpoint to the device of the training, unless it is broken."""
        if isinstance(self._last, _Known):
            update = self._last.update
            if self._last.size == _size_of(parameters) and len(update.vector) != FlatLayout(parameters).size:
                self._last = None
                return
            self._last = _Known(replace(update, vector=update.vector.to(device)), self._last.size)


def _size_of(parameters: Sequence[Tensor]) -> int:
    """How many numbers the parameters hold; of sharded parameters on all ranks together."""
    return sum(parameter.numel() for parameter in parameters)


def coupled_decay(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], layout: FlatLayout) -> Tensor | None:
    """The weight decay that an optimizer adds to the gradient, as a vector of shape ``(n,)``; None if there is none.

    It is part of the objective that the optimizer descends, and of the curvature of this objective.

    """
    # AdamW shortens the parameters and leaves the gradient alone.
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
