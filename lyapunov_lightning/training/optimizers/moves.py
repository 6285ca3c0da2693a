"""Moving the parameters in an optimizer's place, and scaling the gradients that it is about to see."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lyapunov_lightning.curvature.acting.projection import scaled_in_subspace
from lyapunov_lightning.curvature.vectors.layout import FlatLayout, local_of
from lyapunov_lightning.curvature.vectors.space import VectorSpace
from lyapunov_lightning.training.distributed import any_rank, sum_over_ranks
from lyapunov_lightning.training.fsdp import is_sharded
from lyapunov_lightning.training.lightning_names import LightningModule, Trainer
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
    """Scale the gradient that SGD steps along, weight decay included, within a subspace and in its complement.

    A ``.grad`` of None stays, and counts as zeros. Gradients that are not finite are left alone.

    Args:
        optimizer: The optimizer, about to take its step.
        parameters: The parameters.
        rows: Shape ``(k, n)``: orthonormal rows, which span the subspace.
        space: The space of the rows.
        inside: The factor within.
        outside: The factor in the complement.

    Returns:
        The share of the squared norm that was removed, a scalar on the device.

    """
    layout = FlatLayout(parameters)
    gradient = layout.flatten([parameter.grad for parameter in parameters])
    changed, removed = scaled_in_subspace(
        gradient,
        rows.to(gradient),
        inside=inside,
        outside=outside,
        # SGD steps along u = g + wθ, and the projection P is of u. So ``.grad`` becomes P(u) − wθ, to which SGD adds
        # wθ. With the projection of g alone, decay would go on moving the parameters along the sharpest directions.
        shift=_decay_to_come(optimizer, parameters),
        space=space,
    )
    for parameter, piece in zip(parameters, layout.split(changed), strict=True):
        # SGD skips a parameter without a gradient. With one of zeros it would apply decay and momentum to it.
        if parameter.grad is not None:
            if parameter.grad.layout is not torch.strided:
                parameter.grad = parameter.grad.to_dense()  # the projection has entries everywhere
            local_of(parameter.grad).copy_(piece)
    return removed


def _decay_to_come(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Tensor | None:
    """The weight decay that SGD is about to add to the gradient, of shape ``(n,)``; None if there is none.

    SGD skips parameters without gradient, so they do not decay either.

    """
    factors = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    if not any(factors.values()):
        return None
    pieces = [None if p.grad is None else factors[id(p)] * p.detach() for p in parameters]
    return FlatLayout(parameters).flatten(pieces)


def move_parameters(trainer: Trainer, pl_module: LightningModule, displacement: Tensor | None) -> bool:
    """Add a displacement to the trainable parameters.

    All ranks have to call this together. They move by the mean of their displacements, so that their parameters stay
    the same bit by bit; of sharded parameters each rank moves its own part. Nothing moves if a rank has no
    displacement, because its measurement failed.

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
        # Each rank moves its own part, which has nothing to do with the other ranks' parts: there is no mean to take.
        if any_rank(trainer, displacement is None):
            return False
    elif reduce is not None:
        # The last number counts the ranks without displacement, so that one reduction answers both questions.
        buffer = torch.zeros(layout.size + 1, dtype=layout.dtype, device=layout.device)
        if displacement is None:
            buffer[-1] = 1
        else:
            buffer[:-1] = displacement
        # The mean, although all ranks have computed the same: they round differently, and DDP never compares parameters
        # again after the start. A difference in the last digit of one move would grow through the rest of the run.
        reduce(buffer)
        displacement = None if bool(buffer[-1]) else buffer[:-1] / trainer.world_size
    if displacement is None:
        return False
    if not bool(displacement.any()):
        return True  # without a write: a graph that autograd keeps of the parameters survives none, not even of zeros
    with torch.no_grad():
        for parameter, piece in zip(parameters, layout.split(displacement), strict=True):
            # In place: the optimizer's groups and DDP's buckets refer to these very tensors.
            local_of(parameter).add_(piece)
    return True
