"""What the ranks of a distributed run do together."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lyapunov_lightning.curvature.vectors.ranks import Ranks


def sum_over_ranks(trainer: Any) -> Callable[[Tensor], None] | None:
    """A function that sums a flat buffer over all ranks in place, or None where there is a single one."""
    return _all_reduce if trainer.world_size > 1 else None


def mean_over_ranks(trainer: Any, values: Tensor) -> Tensor:
    """The means of some numbers over all ranks, which have to ask together."""
    reduce = sum_over_ranks(trainer)
    if reduce is None:
        return values
    means: Tensor = values / trainer.world_size
    reduce(means)
    return means


def of_first_rank(trainer: Any, value: Any) -> Any:
    """A value as the first rank has it; all of them have to ask together."""
    return trainer.strategy.broadcast(value) if trainer.world_size > 1 else value


def any_rank(trainer: Any, flag: bool) -> bool:
    """Whether a condition holds on one of the ranks at least; all of them have to ask together."""
    return bool(ranks_of(trainer).agreed(torch.tensor([float(flag)], device="cpu")) > 0)


def failing_together(trainer: Any) -> AbstractContextManager[None]:
    """Let what fails on one rank in a block fail on all of them: with different outcomes their ways would part.

    Solvers, products and further such blocks may be within it: the first failure of a rank ends them all.

    Args:
        trainer: The trainer; all of its ranks have to enter together.

    Raises:
        PeerFailureError: If the block failed on another rank; what failed on this one is raised as it is.

    """
    return ranks_of(trainer).together()


def ranks_of(trainer: Any) -> Ranks:
    """The ranks of a trainer."""
    reduce = sum_over_ranks(trainer)
    return Ranks() if reduce is None else Ranks(reduce, trainer.strategy.root_device)


def _all_reduce(buffer: Tensor) -> None:
    dist.all_reduce(buffer, op=dist.ReduceOp.SUM)
