"""Moving the parameters in an optimizer's place, and scaling the gradients that it is about to see."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.acting.projection import scaled_in_subspace
from lyapunov_lightning.curvature.vectors.layout import FlatLayout, local_of
from lyapunov_lightning.curvature.vectors.space import VectorSpace
from lyapunov_lightning.training.distributed import any_rank, sum_over_ranks
from lyapunov_lightning.training.fsdp import is_sharded
from lyapunov_lightning.training.replica.replica import trainable_parameters


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
