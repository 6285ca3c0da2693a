"""The ways to the Hessian-vector products of a sharded model, which of them to try, and the operator of each."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.curvature.loss.randomness import RandomState, preserved_randomness
from lyapunov_lightning.curvature.operators.hessian import HessianOperator
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.curvature.sharded.collectives import Collectives
from lyapunov_lightning.curvature.sharded.differences import ShardDifferences
from lyapunov_lightning.curvature.sharded.layerwise import LayerwiseHessian
from lyapunov_lightning.curvature.sharded.sharding import ShardedSpace, Sharding
from lyapunov_lightning.curvature.vectors.layout import local_of
from lyapunov_lightning.curvature.vectors.memory import free_bytes
from lyapunov_lightning.curvature.vectors.ranks import Ranks
from lyapunov_lightning.training.distributed import any_rank, ranks_of
from lyapunov_lightning.training.lightning_names import Trainer
from lyapunov_lightning.training.replica.objective import Problem
from lyapunov_lightning.training.replica.replica import trainable_parameters
from lyapunov_lightning.training.sharded.layerwise import LayerwiseObjective
from lyapunov_lightning.training.sharded.resharded import ReshardedMeanLoss, ReshardedObjective

Way = Literal["gathered", "layerwise", "shards"]
"""How products of a sharded model are computed: with all parameters gathered for a measurement, with one layer's
gathered at a time within the derivatives, or by finite differences of sharded gradients."""


_GATHERED, _LAYERWISE = 8, 5
"""The memory that a product takes on each rank in the first two ways, in vectors of the whole model's size, with the
gathered parameters."""


_SHARE_OF_FREE = 0.5
"""The share of the free memory that gathered parameters may take, where `HessianConfig.max_gather_bytes` is None."""


class UnfitWayError(MeasurementError):
    """A way to a product is none for these data, where another one may be."""


def layerwise_hessian(problem: Problem, collectives: Collectives) -> LossHessian:
    """Exact products through derivatives in which each layer is gathered on its own.

    Raises:
        UnfitWayError: If the ranks have different numbers of batches, or none.

    """
    ranks, random = ranks_of(problem.trainer), RandomState.capture()
    objective: LayerwiseObjective = problem.objective(LayerwiseObjective, collectives=collectives)
    # A rank with fewer batches than the others would leave them waiting in the gathers of an evaluation more.
    count = len(problem.batches)
    mean = float(ranks.agreed(torch.tensor([float(count)], dtype=torch.float64)))
    if any_rank(problem.trainer, count != mean or not count):
        raise UnfitWayError("The ranks have different numbers of batches, or none.")

    def make() -> HessianOperator:
        own = [local_of(parameter).detach().requires_grad_() for parameter in objective.parameters]
        with preserved_randomness(random):
            hessian = HessianOperator(
                objective,
                own,
                problem.batches,
                method="double_backward",
                weights=[1.0] * count,
                # A rank that keeps a graph skips the forward pass, and all gathers in it, so all ranks have to keep the
                # same graphs. The memory for one, which holds all parameters, is counted in `_LAYERWISE`.
                max_graph_bytes=2**62 if count == 1 else 0,
            )
        hessian.raise_at_once()  # a second attempt on one rank would be an evaluation that the others take no part in
        return hessian

    parts = parts_of(problem, objective.parameters, ranks)
    places = [batch.batch_idx for batch in problem.batches]
    return LayerwiseHessian(
        make,
        *parts,
        samples_of=lambda index: objective.samples[places[index]],
        num_batches=count,
        collectives=collectives,
    )


def shard_differences(problem: Problem, collectives: Collectives) -> LossHessian:
    """Products by finite differences of the sharded model's gradients."""
    ranks = ranks_of(problem.trainer)
    objective: ReshardedObjective = problem.objective(ReshardedObjective, collectives=collectives)
    sharding = Sharding(objective.parameters)
    loss = ReshardedMeanLoss(objective, problem.batches, sharding, ranks, collectives)
    return ShardDifferences(loss, objective.parameters, ShardedSpace(sharding, ranks))


def parts_of(problem: Problem, parameters: Sequence[Tensor], ranks: Ranks) -> tuple[Any, ...]:
    """The arguments of a `ShardedHessian`: trained parameters, all parameters, sharding of the first, and ranks."""
    return parameters, list(problem.pl_module.parameters()), Sharding(parameters), ranks


def ways_of(problem: Problem) -> tuple[list[Way], str]:
    """The ways to try, in their order, and the reason in words: the memory that they need and have."""
    config, trainer = problem.config, problem.trainer
    parameters = list(trainable_parameters(problem.pl_module).values())
    # In the dtype that vectors have, which is the widest of the parameters'; frozen ones are gathered in their own.
    whole = sum(p.numel() for p in parameters) * Sharding(parameters).dtype.itemsize
    frozen = sum(p.numel() * p.dtype.itemsize for p in problem.pl_module.parameters() if not p.requires_grad)
    room = config.max_gather_bytes
    if room is None:
        room = int(_SHARE_OF_FREE * _free_bytes(trainer.strategy.root_device, trainer))

    def fits(vectors: int) -> bool:
        # All ranks take one way: where one has no room, its gathers would be missing in the others' products.
        return not any_rank(trainer, vectors * whole + frozen > room)

    # A step that crosses few kinks is smaller than the rounding of half-precision parameters.
    may_differ = config.method in ("auto", "finite_difference") and all(p.dtype.itemsize > 2 for p in parameters)
    on_shards: list[Way] = ["shards"] if may_differ else []
    if fits(_GATHERED):
        way: list[Way] = ["gathered"]
    elif config.method in ("auto", "double_backward") and fits(_LAYERWISE):
        way = ["layerwise"]
    else:
        way = []
    needed = f"gathered parameters take {_GATHERED * whole / 2**20:,.1f} MiB of {room / 2**20:,.0f} MiB to be had"
    if not way and not on_shards:
        raise MeasurementError(
            f"`method={config.method!r}` has no room on this rank: {needed}. Raise"
            " `HessianConfig(max_gather_bytes=...)`, or use `method='auto'`."
        )
    # With room for gathered parameters differences of these are the faster ones: they gather once, and not in every
    # gradient.
    if config.method == "finite_difference" and way:
        on_shards = []
    return way + on_shards, needed


def _free_bytes(device: torch.device, trainer: Trainer) -> float:
    """The memory that is free on a device, for each of the processes that share it."""
    # Each process sees all of the machine's memory as free.
    return free_bytes(device) / (max(1, int(trainer.num_devices)) if device.type == "cpu" else 1)


def count_samples(_: Tensor) -> None:
    """A `reduce` for the operator of one rank alone: it sums nothing, and makes the operator count its samples."""
