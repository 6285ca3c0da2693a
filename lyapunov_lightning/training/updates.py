"""The optimizer's own update as a vector, seen in the midst of its step and made longer or shorter.

Every optimizer of PyTorch with a learning rate moves the parameters by the learning rate times an update that it makes
of gradients, momenta and decay in its own way. So the update is observed instead of computed anew: the parameters are
noted before the step, and the difference after it is the update, whatever the optimizer and whatever clipped its
gradients.
"""

from collections.abc import Sequence
from typing import Optional

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lyapunov_lightning.curvature.vectors import FlatLayout


class ObservedUpdate:
    """One step of an optimizer.

    To be made before the step; `displacement` and what follows it come after.

    Args:
        parameters: The parameters whose movement is observed.

    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._layout = FlatLayout(parameters)
        self._before = [parameter.detach().clone() for parameter in parameters]
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


class LearningRates:
    """The learning rates of an optimizer's parameter groups, of which the highest is steered and the others follow.

    Args:
        optimizer: The optimizer.
        ratios: The groups' learning rates relative to the highest one; those of the optimizer as it is now if None.

    """

    def __init__(self, optimizer: torch.optim.Optimizer, ratios: Optional[Sequence[float]] = None) -> None:
        self._groups = optimizer.param_groups
        rates = [float(group["lr"]) for group in self._groups]
        self.ratios = [rate / max(rates) for rate in rates] if ratios is None else list(ratios)

    @property
    def highest(self) -> float:
        """The highest one."""
        return max(float(group["lr"]) for group in self._groups)

    def set(self, highest: float) -> None:
        """Change all of them, so that the highest is as given."""
        for group, ratio in zip(self._groups, self.ratios, strict=True):
            if isinstance(group["lr"], Tensor):  # as compiled and captured optimizers have it
                group["lr"].fill_(highest * ratio)
            else:
                group["lr"] = highest * ratio


def coupled_decay(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Optional[Tensor]:
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
    layout = FlatLayout(parameters)
    return layout.flatten([torch.full_like(parameter, rates.get(id(parameter), 0.0)) for parameter in parameters])


def check_steerable(owner: str, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> torch.optim.Optimizer:
    """Refuse what keeps a callback from steering the learning rate.

    Returns:
        The optimizer.

    Raises:
        MisconfigurationException: With the cause and the remedy.

    """
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"`{owner}` cannot steer a module with manual optimization, since it does not see its steps. Use automatic"
            " optimization."
        )
    if trainer.lr_scheduler_configs:
        names = ", ".join(type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs)
        raise MisconfigurationException(
            f"`{owner}` sets the learning rate, and so does {names}. Return the optimizer alone from"
            " `configure_optimizers`."
        )
    narrow = {
        str(p.dtype) for p in pl_module.parameters() if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16)
    }
    if narrow:
        raise MisconfigurationException(
            f"`{owner}` measures updates as differences of parameters, which are lost in the rounding of"
            f" {', '.join(narrow)}. Use mixed precision, which keeps the parameters in float32."
        )
    optimizer: torch.optim.Optimizer = trainer.optimizers[0]
    if not optimizer.param_groups:  # what Lightning puts in the place of none
        raise MisconfigurationException(
            f"`{owner}` needs an optimizer to steer, and `configure_optimizers` returned none. Return one, or take the"
            " callback out."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise MisconfigurationException(
            f"`{owner}` cannot steer LBFGS, which evaluates the loss several times in a step and has curvature of its"
            " own. Use SGD, Adam or any other optimizer that moves by learning rate times update."
        )
    if not all(float(group.get("lr", 0.0)) > 0 for group in optimizer.param_groups):
        raise MisconfigurationException(
            f"`{owner}` needs an optimizer with a positive learning rate `lr` in every parameter group; its value does"
            f" not matter, but the ratios do. {type(optimizer).__name__} has"
            f" {[group.get('lr') for group in optimizer.param_groups]}."
        )
    return optimizer
