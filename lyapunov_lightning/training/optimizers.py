"""What callbacks need to know of the optimizer."""

from collections.abc import Mapping, Sequence
from typing import Optional

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor


def check_training_map(owner: str, optimizers: Sequence[torch.optim.Optimizer], *, momentum: bool = True) -> None:
    """Refuse to follow the training map of an optimizer that is not plain or heavy-ball SGD.

    Args:
        owner: The callback, as the error is to name it.
        optimizers: The trainer's optimizers.
        momentum: Whether heavy-ball momentum can be followed.

    Raises:
        MisconfigurationException: With the cause and the remedy.

    """

    def is_followed(optimizer: torch.optim.Optimizer) -> bool:
        if type(optimizer) is not torch.optim.SGD or len(optimizer.param_groups) != 1:
            return False
        group = optimizer.param_groups[0]
        return not (group["nesterov"] or group["dampening"] or (group["momentum"] and not momentum))

    if not optimizers or not all(map(is_followed, optimizers)):
        kind = "plain or heavy-ball momentum" if momentum else "no momentum"
        raise MisconfigurationException(
            f"`{owner}` follows the map of SGD with one parameter group and {kind} at the lower end of the spectrum,"
            " which is not the optimizer here. Use `estimator='lanczos'`, or ask for the upper end only."
        )


def check_uniform_sgd(
    owner: str, optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, Tensor]
) -> None:
    """Refuse an optimizer whose step along a direction is not that direction times one learning rate.

    Weight decay may differ between parameter groups, since it enters the gradient before anything else.

    Args:
        owner: The callback, as the error is to name it.
        optimizers: The trainer's optimizers.
        parameters: The trainable parameters by name.

    Raises:
        MisconfigurationException: With the cause and the remedy.

    """
    cause = _not_uniform_sgd(optimizers, parameters)
    if cause is not None:
        raise MisconfigurationException(
            f"`{owner}` gives directions that cut across all parameters a learning rate of their own, which takes one"
            f" `torch.optim.SGD` with the same learning rate for all of them, but {cause}. Use such an optimizer, or"
            " remove the callback."
        )


def _not_uniform_sgd(optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, Tensor]) -> Optional[str]:
    """Why the optimizer is not one SGD for all parameters alike; None if it is."""
    if len(optimizers) != 1:
        return f"there are {len(optimizers)} optimizers"
    optimizer = optimizers[0]
    if type(optimizer) is not torch.optim.SGD:
        return f"the optimizer is {type(optimizer).__name__}"
    groups = optimizer.param_groups
    if any(group["maximize"] for group in groups):
        return "`maximize` is set"
    for name in ("lr", "momentum", "dampening", "nesterov"):
        values = {float(group[name]) for group in groups}
        if len(values) > 1:
            return f"the parameter groups have different `{name}`: {', '.join(map(str, sorted(values)))}"
    held = {id(parameter) for group in groups for parameter in group["params"]}
    left_out = [name for name, parameter in parameters.items() if id(parameter) not in held]
    if left_out:
        return f"it does not train {', '.join(left_out)}, which should then not require a gradient"
    return None
