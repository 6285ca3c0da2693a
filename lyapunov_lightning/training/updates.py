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
from lyapunov_lightning.curvature.loss_hessian import LossHessian
from lyapunov_lightning.curvature.projection import scaled_in_subspace
from lyapunov_lightning.curvature.vectors import FlatLayout, VectorSpace, local_of
from lyapunov_lightning.training.distributed import any_rank, sum_over_ranks
from lyapunov_lightning.training.replay import trainable_parameters
from lyapunov_lightning.training.sharded import is_sharded, num_parts

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


class LearningRates:
    """The learning rates of an optimizer's parameter groups, of which the highest is steered and the others follow.

    A group that is added in mid-run, by a callback that unfreezes layers for example, takes part with the ratio that
    its own learning rate had then. Should it have the highest one, it is the others that follow from then on.
    """

    def __init__(self) -> None:
        self._optimizer: torch.optim.Optimizer | None = None
        self._ratios: list[float] = []
        self._is_restored = False

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        """Begin a run: with the ratios that the learning rates have now, or with those of the checkpoint."""
        if not self._is_restored:
            self._ratios = []
        self._is_restored = False
        self._optimizer = optimizer
        self._admit_new_groups()

    @property
    def highest(self) -> float:
        """The highest one."""
        return max(self._present())

    def set(self, highest: float) -> None:
        """Change all of them, so that the highest is as given."""
        self._admit_new_groups()
        for group, ratio in zip(self._groups(), self._ratios, strict=True):
            if isinstance(group["lr"], Tensor):  # as compiled and captured optimizers have it
                group["lr"].fill_(highest * ratio)
            else:
                group["lr"] = highest * ratio

    def state_dict(self) -> dict[str, Any]:
        """The ratios: what they were at the start cannot be had from the learning rates again to the last digit."""
        return {"ratios": list(self._ratios)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._ratios = list(state["ratios"])
        self._is_restored = True

    def _groups(self) -> list[dict[str, Any]]:
        assert self._optimizer is not None  # by `start`
        return self._optimizer.param_groups

    def _present(self) -> list[float]:
        return [float(group["lr"]) for group in self._groups()]

    def _admit_new_groups(self) -> None:
        rates, known = self._present(), len(self._ratios)
        if len(rates) > known:
            unit = max(rates[:known] or rates)  # the highest known one, to which the ratios are relative
            ratios = [*self._ratios, *(rate / unit for rate in rates[known:])]
            self._ratios = [ratio / max(ratios) for ratio in ratios]


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


@torch.no_grad()
def scale_gradients(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    rows: Tensor,
    space: VectorSpace,
    *,
    inside: float,
    outside: float,
) -> Tensor:
    """Scale the gradient that SGD takes its step from, its weight decay included, within a subspace and across it.

    Parameters whose ``.grad`` is None keep it, and count as zeros. Gradients that are not finite are left alone.

    Args:
        optimizer: The optimizer, about to take its step.
        parameters: The parameters.
        rows: Shape ``(k, n)``: orthonormal rows, which span the subspace.
        space: Their space.
        inside: The factor within.
        outside: The factor across.

    Returns:
        The share of the squared norm that was taken out, a scalar on the device.

    """
    layout = FlatLayout(parameters)
    gradient = layout.flatten([parameter.grad for parameter in parameters])
    changed, removed = scaled_in_subspace(
        gradient,
        rows.to(gradient),
        inside=inside,
        outside=outside,
        shift=_decay_to_come(optimizer, parameters),
        space=space,
    )
    for parameter, piece in zip(parameters, layout.split(changed), strict=True):
        if parameter.grad is not None:
            if parameter.grad.layout is not torch.strided:
                parameter.grad = parameter.grad.to_dense()  # what is projected is not sparse any more
            local_of(parameter.grad).copy_(piece)
    return removed


def _decay_to_come(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Tensor | None:
    """What SGD is about to add to the gradient as weight decay, of shape ``(n,)``; None if there is none.

    It passes over parameters without gradient, and does not decay them.

    """
    factors = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    if not any(factors.values()):
        return None
    pieces = [None if p.grad is None else factors[id(p)] * p.detach() for p in parameters]
    return FlatLayout(parameters).flatten(pieces)


def move_parameters(trainer: Any, pl_module: Any, displacement: Tensor | None) -> bool:
    """Add a displacement to the trainable parameters.

    In a distributed run it is the mean of the ranks' displacements, so that their parameters stay the same bit by bit;
    where the parameters are sharded, each rank moves its part.
    All of them have to call this together. Nothing moves if one of them has none, such as where its measurement failed.

    Args:
        trainer: The trainer.
        pl_module: The module.
        displacement: Shape ``(length,)``, in the order of the trainable parameters; None if there is none.

    Returns:
        Whether the displacement was made.

    """
    parameters = list(trainable_parameters(pl_module).values())
    layout = FlatLayout(parameters)
    reduce = sum_over_ranks(trainer)
    if is_sharded(parameters):
        if any_rank(trainer, displacement is None):
            return False
    elif reduce is not None:
        buffer = torch.zeros(layout.size + 1, dtype=layout.dtype, device=layout.device)
        if displacement is None:
            buffer[-1] = 1
        else:
            buffer[:-1] = displacement
        reduce(buffer)
        displacement = None if bool(buffer[-1]) else buffer[:-1] / trainer.world_size
    if displacement is None:
        return False
    if not bool(displacement.any()):
        return True
    with torch.no_grad():
        for parameter, piece in zip(parameters, layout.split(displacement), strict=True):
            local_of(parameter).add_(piece)
    return True
