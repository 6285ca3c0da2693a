"""The Hessian of a training loss as an operator, of whole and of sharded models."""

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lyapunov_lightning.curvature.collectives import Collectives
from lyapunov_lightning.curvature.derivative_errors import lacks_derivative
from lyapunov_lightning.curvature.errors import MeasurementError, NonFiniteCurvatureError
from lyapunov_lightning.curvature.gathered import GatheredHessian
from lyapunov_lightning.curvature.hessian import HessianOperator
from lyapunov_lightning.curvature.layerwise import LayerwiseHessian
from lyapunov_lightning.curvature.loss_hessian import LossHessian
from lyapunov_lightning.curvature.offloading import OffloadedHessian
from lyapunov_lightning.curvature.products import Method
from lyapunov_lightning.curvature.randomness import RandomState, preserved_randomness
from lyapunov_lightning.curvature.ranks import Ranks
from lyapunov_lightning.curvature.shard_differences import ShardDifferences
from lyapunov_lightning.curvature.sharding import ShardedSpace, Sharding
from lyapunov_lightning.curvature.vectors import local_of
from lyapunov_lightning.training.config import HessianConfig
from lyapunov_lightning.training.distributed import any_rank, ranks_of, sum_over_ranks
from lyapunov_lightning.training.layerwise import LayerwiseObjective
from lyapunov_lightning.training.replay import ProbeBatch, TrainingObjective, trainable_parameters
from lyapunov_lightning.training.resharded import ReshardedMeanLoss, ReshardedObjective
from lyapunov_lightning.training.sharded import is_sharded, whole_parameters

Way = Literal["gathered", "layerwise", "shards"]
"""How products of a sharded model are computed: with all parameters gathered for a measurement, with those of each
layer gathered in the derivatives, or by finite differences of sharded gradients."""

_GATHERED, _LAYERWISE = 8, 5
"""Vectors of the whole model that a product holds at a time, the parameters among them."""

_SHARE_OF_FREE = 0.5
"""Share of the free memory that gathered parameters may take where nobody says how much."""


@dataclass(frozen=True)
class Problem:
    """Of what the Hessian is wanted.

    Attributes:
        trainer: The trainer.
        pl_module: The module.
        config: Which Hessian.
        batches: This rank's batches.
        names: The parameters whose block is meant; all trainable ones if None.

    """

    trainer: Any
    pl_module: Any
    config: HessianConfig
    batches: Sequence[ProbeBatch]
    names: Collection[str] | None = None

    def objective(self, kind: type[TrainingObjective] = TrainingObjective, **options: Any) -> Any:
        """The training loss, evaluated in some way."""
        assert self.config.mode is not None  # see `HessianConfig.filled`
        return kind(
            self.trainer,
            self.pl_module,
            mode=self.config.mode,
            loss_fn=self.config.loss_fn,
            batch_size_fn=self.config.batch_size_fn,
            names=self.names,
            **options,
        )


class Operators:
    """Makes the operators of one trainer, in the way that was found out to be right the first time.

    Attributes:
        note: What the user is to know of the way that was taken, until it was taken note of.

    """

    def __init__(self) -> None:
        self._fell_back: set[HessianConfig] = set()
        self._ways: dict[HessianConfig, Way] = {}
        self._collectives: dict[Any, Collectives] = {}
        self.note: str | None = None

    def make(self, problem: Problem) -> LossHessian:
        """The Hessian of the mean over the batches of all ranks; all of them have to ask together.

        Raises:
            MeasurementError: If the parameters are sharded and no way to a product is right, or has room.
            NonFiniteCurvatureError: If products are not finite where a way is to be found.

        """
        hessian = self._sharded(problem) if is_sharded(list(problem.pl_module.parameters())) else self._whole(problem)
        return OffloadedHessian(hessian) if problem.config.offload else hessian

    def _method(self, config: HessianConfig) -> Method:
        """What fails at one step fails at the next."""
        return "finite_difference" if config in self._fell_back else config.method

    def _whole(self, problem: Problem) -> LossHessian:
        objective = problem.objective()
        return HessianOperator(
            objective,
            objective.parameters,
            problem.batches,
            method=self._method(problem.config),
            reduce=sum_over_ranks(problem.trainer),
            on_fallback=lambda: self._fell_back.add(problem.config),
        )

    def _sharded(self, problem: Problem) -> LossHessian:
        config = problem.config
        if config in self._ways:
            return self._in_way(problem, self._ways[config])
        ways, room = _ways(problem)
        if config.method != "auto":
            self._take(problem, ways[0], room, "")
            return self._in_way(problem, ways[0])
        reasons: list[str] = []
        for way in ways:
            try:
                hessian = self._in_way(problem, way)
                check = hessian.check(seed=config.seed)
            except NonFiniteCurvatureError:
                raise
            except RuntimeError as error:  # on all ranks, as `check` lets them fail together
                if not (isinstance(error, MeasurementError) or lacks_derivative(error)):
                    raise
                reasons.append(f"{way}: {error}")
                continue
            if not math.isfinite(check.asymmetry):
                raise NonFiniteCurvatureError("A Hessian-vector product is not finite.")
            differs = "finite_difference" in hessian.method  # which is symmetric up to the kinks of the loss
            if check.is_deterministic and (check.is_symmetric or differs):
                self._take(problem, way, room, f", symmetric to {check.asymmetry:.0e} on a pair of random vectors")
                return hessian
            reasons.append(f"{way}: products differ by {max(check.asymmetry, check.nondeterminism):.1e}")
        raise MeasurementError(f"No way to a product of this sharded model is right ({'; '.join(reasons)}).")

    def _take(self, problem: Problem, way: Way, room: str, how_good: str) -> None:
        is_known = way in self._ways.values()
        self._ways[problem.config] = way
        if is_known:
            return
        kind = {
            "gathered": "on parameters that are gathered for each measurement",
            "layerwise": "through layers that are gathered one after the other",
            "shards": "by finite differences of sharded gradients",
        }[way]
        self.note = f"the model is sharded, and products are computed {kind} ({room}){how_good}."

    def _in_way(self, problem: Problem, way: Way) -> LossHessian:
        if way == "gathered":
            return self._gathered(problem)
        # What the ranks do together in an evaluation is the same at every measurement.
        names = None if problem.names is None else tuple(problem.names)
        collectives = self._collectives.setdefault((problem.config, names, way), Collectives())
        return _layerwise(problem, collectives) if way == "layerwise" else _on_shards(problem, collectives)

    def _gathered(self, problem: Problem) -> LossHessian:
        objective, ranks, random = problem.objective(), ranks_of(problem.trainer), RandomState.capture()

        def make() -> HessianOperator | None:
            objective.whole = whole_parameters(problem.pl_module, ranks)
            if not problem.batches:
                return None
            own = [objective.whole[parameter].detach().requires_grad_() for parameter in objective.parameters]
            with preserved_randomness(random):  # every time the numbers of the first one
                return HessianOperator(
                    objective,
                    own,
                    problem.batches,
                    method=self._method(problem.config),
                    reduce=_count_samples,
                    on_fallback=lambda: self._fell_back.add(problem.config),
                )

        return GatheredHessian(make, *_parts(problem, objective.parameters, ranks))


def _layerwise(problem: Problem, collectives: Collectives) -> LossHessian:
    ranks, random = ranks_of(problem.trainer), RandomState.capture()
    objective: LayerwiseObjective = problem.objective(LayerwiseObjective, collectives=collectives)
    count = len(problem.batches)
    mean = float(ranks.agreed(torch.tensor([float(count)], dtype=torch.float64)))
    if any_rank(problem.trainer, count != mean or not count):
        raise MeasurementError("The ranks have different numbers of batches, or none.")

    def make() -> HessianOperator:
        own = [local_of(parameter).detach().requires_grad_() for parameter in objective.parameters]
        with preserved_randomness(random):
            hessian = HessianOperator(
                objective,
                own,
                problem.batches,
                method="double_backward",
                weights=[1.0] * count,
                # Which graphs are kept has to be the same on all ranks: one that holds all parameters, or none.
                max_graph_bytes=2**62 if count == 1 else 0,
            )
        hessian.raise_at_once()
        return hessian

    parts = _parts(problem, objective.parameters, ranks)
    places = [batch.batch_idx for batch in problem.batches]
    return LayerwiseHessian(
        make,
        *parts,
        samples_of=lambda index: objective.samples[places[index]],
        num_batches=count,
        collectives=collectives,
    )


def _on_shards(problem: Problem, collectives: Collectives) -> LossHessian:
    ranks = ranks_of(problem.trainer)
    objective: ReshardedObjective = problem.objective(ReshardedObjective, collectives=collectives)
    sharding = Sharding(objective.parameters)
    loss = ReshardedMeanLoss(objective, problem.batches, sharding, ranks, collectives)
    return ShardDifferences(loss, objective.parameters, ShardedSpace(sharding, ranks))


def _parts(problem: Problem, parameters: Sequence[Tensor], ranks: Ranks) -> tuple[Any, ...]:
    return parameters, list(problem.pl_module.parameters()), Sharding(parameters), ranks


def _ways(problem: Problem) -> tuple[list[Way], str]:
    """The ways to try, in their order, and why."""
    config, trainer = problem.config, problem.trainer
    parameters = list(trainable_parameters(problem.pl_module).values())
    whole = sum(p.numel() for p in parameters) * Sharding(parameters).dtype.itemsize
    frozen = sum(p.numel() * p.dtype.itemsize for p in problem.pl_module.parameters() if not p.requires_grad)
    room = config.max_gather_bytes
    if room is None:
        room = int(_SHARE_OF_FREE * _free_bytes(trainer.strategy.root_device, trainer))

    def fits(vectors: int) -> bool:
        return not any_rank(trainer, vectors * whole + frozen > room)

    # Differences of half-precision parameters are lost in their rounding.
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
    if config.method == "finite_difference" and way:
        on_shards = []
    return way + on_shards, needed


def _free_bytes(device: torch.device, trainer: Any) -> float:
    """The memory that is free on a device, for each of the processes that share it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "cpu" and hasattr(os, "sysconf"):
        free_pages, page = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return free_pages * page / max(1, int(trainer.num_devices))
    return math.inf


def _count_samples(_: Tensor) -> None:
    """What sums over the ranks for a rank by itself: with it an operator asks for the numbers of samples."""
