"""Batches in a checkpoint, so that a run that goes on measures on those that it would have measured on.

A checkpoint that is loaded with ``weights_only`` holds tensors, numbers, texts, lists, tuples and dicts, and so do most
batches. Of others nothing is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lyapunov_lightning.training.replica.objective import ProbeBatch

_PLAIN = (int, float, bool, str, bytes, type(None))


class _NotPlainError(Exception):
    """Something in a batch that no checkpoint takes."""


def kept_batches(batches: Sequence[ProbeBatch] | None) -> list[Any] | None:
    """Batches as the state of a callback may hold them.

    Args:
        batches: The batches of this process.

    Returns:
        The state; None if there are no batches, if they hold objects of other kinds, or where several processes train:
        the state of the first of them is all that a checkpoint takes.

    """
    if batches is None or (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    devices: list[str] = []

    def keep(tensor: Tensor) -> Tensor:
        if type(tensor) is not Tensor or tensor.layout is not torch.strided:
            raise _NotPlainError
        devices.append(str(tensor.device))
        return tensor.detach().cpu()

    try:
        plain = [[_mapped(one.batch, keep), one.batch_idx, one.is_transferred] for one in batches]
    except _NotPlainError:
        return None
    return [plain, devices]


def batches_of(state: list[Any] | None) -> list[ProbeBatch] | None:
    """The batches of a state, on the devices that they were on; None where there are none, or no such devices."""
    if state is None:
        return None
    plain, names = state
    devices = list(map(torch.device, names))
    if not all(map(_is_there, devices)):
        return None
    places: Iterator[torch.device] = iter(devices)
    return [ProbeBatch(_mapped(batch, lambda t: t.to(next(places))), *rest) for batch, *rest in plain]


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A batch with its tensors changed, in their order."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) is dict:
        if not all(type(key) in _PLAIN for key in value):
            raise _NotPlainError
        return {key: _mapped(item, change) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, change) for item in value)
    if type(value) not in _PLAIN:
        raise _NotPlainError
    return value


def _is_there(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    kind = torch.accelerator.current_accelerator()
    return kind is not None and kind.type == device.type and (device.index or 0) < torch.accelerator.device_count()
