"""What the ranks of a distributed run do together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lyapunov_lightning.curvature.errors import PeerFailureError


def sum_over_ranks(trainer: Any) -> Callable[[Tensor], None] | None:
    """A function that sums a flat buffer over all ranks in place, or None where there is a single one."""
    return _all_reduce if trainer.world_size > 1 else None


def any_rank(trainer: Any, flag: bool) -> bool:
    """Whether a condition holds on one of the ranks at least; all of them have to ask together."""
    return _count(trainer, flag) > 0


@contextmanager
def failing_together(trainer: Any) -> Iterator[None]:
    """Let what fails on one rank fail on all of them: with different outcomes their ways would part.

    Args:
        trainer: The trainer; all of its ranks have to enter together.

    Raises:
        PeerFailureError: If the block failed on another rank; what failed on this one is raised as it is.

    """
    try:
        yield
    except Exception:
        _count(trainer, True)
        raise
    failures = _count(trainer, False)
    if failures:
        raise PeerFailureError(failures)


def _count(trainer: Any, flag: bool) -> int:
    """On how many ranks a condition holds."""
    if trainer.world_size == 1:
        return int(flag)
    flags = torch.tensor([float(flag)], device=trainer.strategy.root_device)
    _all_reduce(flags)
    return int(flags)


def _all_reduce(buffer: Tensor) -> None:
    dist.all_reduce(buffer, op=dist.ReduceOp.SUM)
