"""The Hessian of a training loss as an operator, of whole and of sharded models."""

import math
from collections.abc import Callable
from typing import Any

from lyapunov_lightning.curvature.compat.errors import lacks_derivative
from lyapunov_lightning.curvature.errors import MeasurementError, NonFiniteCurvatureError, PeerFailureError
from lyapunov_lightning.curvature.loss.compiled import Programs
from lyapunov_lightning.curvature.loss.products import Method
from lyapunov_lightning.curvature.loss.randomness import RandomState, preserved_randomness
from lyapunov_lightning.curvature.operators.hessian import HessianOperator
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.curvature.operators.offloading import OffloadedHessian
from lyapunov_lightning.curvature.sharded.collectives import Collectives
from lyapunov_lightning.curvature.sharded.gathered import GatheredHessian
from lyapunov_lightning.training.config import HessianConfig
from lyapunov_lightning.training.distributed import any_rank, failing_together, ranks_of, sum_over_ranks
from lyapunov_lightning.training.fsdp import is_sharded, whole_parameters
from lyapunov_lightning.training.replica.objective import Problem
from lyapunov_lightning.training.sharded.ways import (
    UnfitWayError,
    Way,
    count_samples,
    layerwise_hessian,
    parts_of,
    shard_differences,
    ways_of,
)


class Operators:
    """Makes the operators of one trainer.

    Which way to a product is right is found out by the first operator of a configuration, and kept for all later ones.

    """

    def __init__(self) -> None:
        self._fell_back: set[HessianConfig] = set()
        self._ways: dict[HessianConfig, Way] = {}
        self._collectives: dict[Any, Collectives] = {}
        # A loss is compiled once: the operators of later measurements have the same graphs, of other numbers.
        self._programs = Programs()

    def make(self, problem: Problem, say: Callable[[str], None] | None = None) -> LossHessian:
        """The Hessian of the mean loss over the batches of all ranks; all of them have to ask together.

        Args:
            problem: The loss, and on which batches.
            say: Gets a sentence for the user when a way to the products of a sharded model was found.

        Raises:
            MeasurementError: If the parameters are sharded and no way to a product is right, or no memory suffices.
            NonFiniteCurvatureError: If products are not finite while a way is looked for.

        """
        if is_sharded(list(problem.pl_module.parameters())):
            hessian = self._sharded(problem, say or _say_nothing)
        else:
            hessian = self._whole(problem)
        # Around the finished operator: products are computed on the device in any case, only the vectors between them
        # are kept elsewhere.
        return OffloadedHessian(hessian) if problem.config.offload else hessian

    def _method(self, config: HessianConfig) -> Method:
        """How products are computed; what could not be differentiated twice at one step cannot be at the next."""
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
            compile=problem.config.compile and self._programs,
        )

    def _sharded(self, problem: Problem, say: Callable[[str], None]) -> LossHessian:
        config = problem.config
        if config in self._ways:
            return self._in_way(problem, self._ways[config])
        ways, room = ways_of(problem)
        # What the user has chosen is taken as it is, without the products of a check and without another way.
        if config.method != "auto":
            self._take(problem, ways[0], room, "", say)
            return self._in_way(problem, ways[0])
        reasons: list[str] = []
        for way in ways:
            try:
                with failing_together(problem.trainer):
                    hessian = self._in_way(problem, way)
                    check = hessian.check(seed=config.seed)
            except Exception as error:
                # The next way is for what this one cannot do. A step that returned nothing, a loss that is not finite,
                # a lack of memory (where the next way would hide that `max_gather_bytes` is too high) are events, after
                # which the next measurement looks for a way again. No rank knows what has failed on another.
                if any_rank(problem.trainer, not _is_of_the_way(error)):
                    raise
                reasons.append(f"{way}: {error}")
                continue
            if not math.isfinite(check.asymmetry):
                raise NonFiniteCurvatureError
            # A finite difference across the kinks of a ReLU network is not symmetric, and is no less right for it.
            differs = "finite_difference" in hessian.method
            if check.is_deterministic and (check.is_symmetric or differs):
                how_good = f", symmetric to {check.asymmetry:.0e} on a pair of random vectors"
                self._take(problem, way, room, how_good, say)
                return hessian
            reasons.append(f"{way}: products differ by {max(check.asymmetry, check.nondeterminism):.1e}")
        raise MeasurementError(f"No way to a product of this sharded model is right ({'; '.join(reasons)}).")

    def _take(self, problem: Problem, way: Way, room: str, how_good: str, say: Callable[[str], None]) -> None:
        """Keep a way for all measurements to come, and say so unless another configuration has said the same."""
        is_known = way in self._ways.values()
        self._ways[problem.config] = way
        if is_known:
            return
        kind = {
            "gathered": "on parameters that are gathered for each measurement",
            "layerwise": "through layers that are gathered one after the other",
            "shards": "by finite differences of sharded gradients",
        }[way]
        say(f"the model is sharded, and products are computed {kind} ({room}){how_good}.")

    def _in_way(self, problem: Problem, way: Way) -> LossHessian:
        if way == "gathered":
            return self._gathered(problem)
        # Kept from measurement to measurement: a rank that fails in the first evaluation of a measurement can only take
        # part in the collectives that remain if an earlier measurement has shown which these are.
        names = None if problem.names is None else tuple(problem.names)
        collectives = self._collectives.setdefault((problem.config, names, way), Collectives())
        return (
            layerwise_hessian(problem, collectives) if way == "layerwise" else shard_differences(problem, collectives)
        )

    def _gathered(self, problem: Problem) -> LossHessian:
        objective, ranks, random = problem.objective(), ranks_of(problem.trainer), RandomState.capture()

        def make() -> HessianOperator | None:
            objective.whole = whole_parameters(problem.pl_module, ranks)
            if not problem.batches:
                return None
            own = [objective.whole[parameter].detach().requires_grad_() for parameter in objective.parameters]
            # It is made anew when a parameter changes, and has to be the same function of the parameters then: with the
            # same dropout masks.
            with preserved_randomness(random):
                return HessianOperator(
                    objective,
                    own,
                    problem.batches,
                    method=self._method(problem.config),
                    reduce=count_samples,
                    on_fallback=lambda: self._fell_back.add(problem.config),
                    compile=problem.config.compile and self._programs,
                )

        return GatheredHessian(make, *parts_of(problem, objective.parameters, ranks))


def _is_of_the_way(error: Exception) -> bool:
    """Whether an error, as far as this rank knows, says that a way to a product is none, now and later."""
    if isinstance(error, (PeerFailureError, UnfitWayError)):
        return True
    return isinstance(error, RuntimeError) and lacks_derivative(error)


def _say_nothing(_: str) -> None:
    """A `say` for a caller that does not report how products are computed."""
