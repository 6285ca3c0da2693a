"""Moving the parameters beside the optimizer, alike in all processes."""

from typing import Optional

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lyapunov_lightning.curvature.vectors import FlatLayout
from lyapunov_lightning.training.distributed import sum_over_processes
from lyapunov_lightning.training.objective import trainable_parameters


def check_optimizer(owner: str, trainer: "pl.Trainer") -> None:
    """Refuse to move parameters under an optimizer that takes every move for its own.

    Raises:
        MisconfigurationException: With the cause and the remedy.

    """
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
        raise MisconfigurationException(
            f"`{owner}` moves the parameters beside the optimizer, which LBFGS would take for a change of the gradient"
            " along its own step. Use another optimizer, or do not ask for the descent."
        )


def move_parameters(trainer: "pl.Trainer", pl_module: "pl.LightningModule", displacement: Optional[Tensor]) -> bool:
    """Add a displacement to the trainable parameters.

    In a distributed run it is the mean of the processes' displacements, so that their parameters stay the same bit by
    bit. All of them have to call this together. Nothing moves if one of them has none, such as where its measurement
    failed.

    Args:
        trainer: The trainer.
        pl_module: The module.
        displacement: Shape ``(size,)``, in the order of the trainable parameters; None if there is none.

    Returns:
        Whether the displacement was made.

    """
    parameters = list(trainable_parameters(pl_module).values())
    layout = FlatLayout(parameters)
    reduce = sum_over_processes(trainer)
    if reduce is not None:
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
            parameter.add_(piece)
    return True
