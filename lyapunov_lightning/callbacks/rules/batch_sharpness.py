"""The learning rate from how near the steps are to the edge of stability, with and without noise."""

from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.callbacks.gauges import SharpnessGauge
from lyapunov_lightning.callbacks.results.probe import WHOLE_AGREEMENT
from lyapunov_lightning.callbacks.rules.base import Proposal, Rule, Situation
from lyapunov_lightning.callbacks.rules.first_rate import first_rate
from lyapunov_lightning.curvature.stability import Stability, is_adaptive, is_known, stability_of
from lyapunov_lightning.curvature.tracking.batch_sharpness import step_direction
from lyapunov_lightning.curvature.tracking.power import PowerIteration
from lyapunov_lightning.training.data.kept_batches import batches_of, kept_batches
from lyapunov_lightning.training.lightning_names import MisconfigurationException
from lyapunov_lightning.training.optimizers.steering import EdgeRatio

_FIRST_LR_SHARE = 0.2
"""The first learning rate, as a share of the longest step along the first update at which the loss falls. From 0.1 to
0.3 it makes little difference over the 48 trainings of `benchmarks/controller` on which the rule was made."""

_NO_AGREEMENT = 1e-3
"""The agreement that is taken before the first comparison: the limit hardly depends on it down there."""

_GAUGED_EVERY = 8
"""Measurements after which batches that agree are compared again."""


class FollowBatchSharpness(Rule):
    """The batch sharpness over its limit; where all batches agree, the largest eigenvalue over its own.

    "Edge of stochastic stability" (A. Andreyev, P. Beneventano, 2024) for the curvature that counts under noise, and
    "A chaos theory approach to understand neural network optimization", sec. 3.1, for a learning rate from curvature.
    """

    every_n_steps: ClassVar[int] = 10
    first_n_steps: ClassVar[int] = 20  # most changes in these
    annealing: ClassVar[float] = 0.4
    begins_with_update: ClassVar[bool] = True

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._ratio: EdgeRatio | None = None
        self.forget()

    @override
    def check(self, owner: str, optimizer: Any) -> None:
        if not is_known(optimizer):
            raise MisconfigurationException(
                f"`{owner}` does not know the stability limit of {type(optimizer).__name__}. Use"
                " `rule='along_update'`, which asks nothing of the optimizer."
            )

    @override
    def forget(self) -> None:
        self._gauge = SharpnessGauge()
        self._largest = PowerIteration()
        self._is_whole, self._count = False, 0
        self._ratio = None

    @override
    def edge_ratio(self) -> EdgeRatio | None:
        return self._ratio

    @override
    def measure(self, given: Situation) -> Proposal:
        if given.is_first:
            return first_rate(given, _FIRST_LR_SHARE)
        self._ratio = None  # before anything can fail: without a ratio the learning rate stays
        hessian = given.own
        gradient = hessian.gradient(keep_graph=True)
        counted = gradient if is_adaptive(given.optimizer) else None
        stability = stability_of(given.optimizer, hessian.parameters, hessian.layout, counted)
        if stability is None:
            return Proposal(None, {"converged": False})
        is_compared, self._count = self._count % _GAUGED_EVERY == 0, self._count + 1
        found: dict[str, Any] = {}
        if not self._is_whole or is_compared:
            found = self._gauged(given, stability, gradient)
        if self._is_whole:
            found |= self._of_largest(given, stability, gradient)
        ratio = self.edge_ratio()
        if ratio is None:  # no batch had a gradient so far
            return Proposal(None, {"converged": False, **found})
        return Proposal(None, {"stability_ratio": ratio.value * stability.lr, **found})

    def _gauged(self, given: Situation, stability: Stability, gradient: Tensor) -> dict[str, Any]:
        """Measure what the batch sees along its own step."""
        gauged = self._gauge.measure(given.own, gradient, given.batches, stability, given.hessian_on)
        sharpness, agreement = gauged.get("batch_sharpness"), gauged.get("batch_agreement")
        self._is_whole = agreement is not None and agreement >= WHOLE_AGREEMENT
        if sharpness is None:
            return {}
        if not self._is_whole:
            # Without a comparison the limit is that of batches that do not agree: the smaller one.
            limit = gauged.get("stability_limit") or stability.limit_at(_NO_AGREEMENT)
            error = gauged.get("batch_sharpness_error") or 0.0
            self._see(sharpness / limit, (sharpness - error) / limit, stability)
        return {"batch_sharpness": sharpness, "batch_agreement": agreement}

    def _of_largest(self, given: Situation, stability: Stability, gradient: Tensor) -> dict[str, Any]:
        """Measure the largest eigenvalue, which counts where there is no noise."""
        largest = self._largest.step(stability.matrix(given.own), step_direction(gradient, stability.scale))
        self._see(largest / stability.limit, largest / stability.limit, stability)
        return {"lambda_max": largest}

    def _see(self, value: float, at_least: float, stability: Stability) -> None:
        self._ratio = EdgeRatio(max(value, 0.0) / stability.lr, max(at_least, 0.0) / stability.lr, self._is_whole)

    @override
    def state_dict(self) -> dict[str, Any]:
        ratio = None if self._ratio is None else list(self._ratio)
        counts = {"count": self._count, "is_whole": self._is_whole}
        # The training goes by what is measured, so that it has to be the same in a run that goes on.
        others = kept_batches(self._gauge.others)
        gauge = {"gauge": self._gauge.state_dict(), "others": others}
        return {**gauge, "largest": self._largest.state_dict(), "ratio": ratio, **counts}

    @override
    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self._gauge.load_state_dict(state["gauge"])
        self._gauge.others = batches_of(state["others"])
        self._largest.load_state_dict(state["largest"])
        self._ratio = None
        if state["ratio"] is not None:
            value, at_least, is_exact = state["ratio"]
            self._ratio = EdgeRatio(float(value), float(at_least), bool(is_exact))
        self._count, self._is_whole = int(state["count"]), bool(state["is_whole"])
