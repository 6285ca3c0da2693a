"""What callbacks need to know of the optimizer."""

from collections.abc import Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException


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
