"""What the processes of a distributed run do together."""

from collections.abc import Callable
from typing import Optional

import lightning.pytorch as pl
import torch.distributed as dist
from torch import Tensor


def sum_over_processes(trainer: "pl.Trainer") -> Optional[Callable[[Tensor], None]]:
    """A function that sums a flat buffer over all processes in place, or None where there is a single one."""
    return _all_reduce if trainer.world_size > 1 else None


def _all_reduce(buffer: Tensor) -> None:
    dist.all_reduce(buffer, op=dist.ReduceOp.SUM)
