"""What the ranks of a distributed run do together."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lyapunov_lightning.curvature.vectors.ranks import Ranks

if TYPE_CHECKING:
    from lyapunov_lightning.training.lightning_names import Trainer

T = TypeVar("T")


def sum_over_ranks(trainer: "Trainer") -> Callable[[Tensor], None] | None:
    """A function that sums a flat buffer over all ranks in place, or None where there is a single rank."""
    return _all_reduce if trainer.world_size > 1 else None


def mean_over_ranks(trainer: "Trainer", values: Tensor) -> Tensor:
    """The means of some numbers over all ranks, which have to ask together."""
    reduce = sum_over_ranks(trainer)
    if reduce is None:
        return values
    # A new tensor, which the sum may then overwrite; the caller's keeps its own values.
    means: Tensor = values / trainer.world_size
    reduce(means)
    return means


def of_first_rank(trainer: "Trainer", value: T) -> T:
    """A value as the first rank has it; all ranks have to ask together."""
    return trainer.strategy.broadcast(value) if trainer.world_size > 1 else value


def any_rank(trainer: "Trainer", flag: bool) -> bool:
    """Whether a condition holds on at least one rank; all ranks have to ask together."""
    # By the same exchange as solvers use: a rank that has failed says so in it, where in a plain reduction of a flag
    # the others would wait for it.
    return bool(ranks_of(trainer).agreed(torch.tensor([float(flag)], device="cpu")) > 0)


def failing_together(trainer: "Trainer") -> AbstractContextManager[None]:
    """Let a block that fails on one rank fail on all of them.

    Otherwise the rank that failed would leave the block, and the others wait in the next collective for a rank that
    never comes. Solvers, products and further such blocks may stand in the block: the first failure of a rank ends all.

    Args:
        trainer: The trainer; all of its ranks have to enter together.

    Raises:
        PeerFailureError: If the block failed on another rank; an error of this rank is raised as it is.

    """
    return ranks_of(trainer).together()


def ranks_of(trainer: "Trainer") -> Ranks:
    """The ranks of a trainer."""
    reduce = sum_over_ranks(trainer)
    return Ranks() if reduce is None else Ranks(reduce, trainer.strategy.root_device)


def _all_reduce(buffer: Tensor) -> None:
    # Not `trainer.strategy.reduce`: Lightning puts a barrier in front of every reduction, a second round over the
    # network for each Hessian-vector product.
    dist.all_reduce(buffer, op=dist.ReduceOp.SUM)
