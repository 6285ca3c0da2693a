"""How near a training is to its edge of stability: what `CurvatureProbe` measures of the steps themselves.

Two gauges. `SharpnessGauge` measures the batch sharpness and the agreement of batches, for the optimizers whose limit
is known. `DecreaseGauge` knows no optimizer: it observes how much of the decrease that a step promises the curvature
along it eats. Neither knows the callback, or when it is called.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from torch import Tensor

from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.curvature.stability import Stability
from lyapunov_lightning.curvature.tracking.batch_sharpness import (
    BatchSharpness,
    BatchSharpnessEstimate,
    StepCurvature,
    compared,
    glanced_step,
    step_curvature,
    step_direction,
)
from lyapunov_lightning.training.replica.objective import ProbeBatch

_COMPARED_FIRST, _COMPARED_EVERY = 3, 8
"""The first measurements are all compared with another batch, since without the agreement there is no limit; later
every eighth, since it changes slowly and a comparison costs as much again."""

_LEAST_SHARPNESS = 0.1
"""The batch sharpness, as a share of the limit, that sets the distance of a glance where less was measured."""

_GIVEN_UP = 3
"""After how many glances in a row that did not tell none is tried again."""

_OBSERVED = 8
"""Steps over which the share of the decrease that is lost is averaged."""

_SAME_LIMIT = 1e-9
"""Relative difference up to which limits at different agreements are the same: where there is no momentum."""


class Gauged(TypedDict, total=False):
    """The fields of `ProbeResult` that come from a gauge."""

    batch_sharpness: float
    batch_sharpness_error: float | None
    step_sharpness: float
    batch_agreement: float | None
    stability_limit: float | None
    noise_ratio: float | None
    is_settled: bool
    lost_decrease: float | None


class SharpnessGauge:
    """The batch sharpness of the training's own steps, and the limit at the measured agreement of its batches.

    A measurement takes the gradient and one product. A comparison with another batch, the one that was measured last
    or the fixed data, takes the same again. A glance takes the gradient and three values of the loss, one of which the
    training may have.

    Attributes:
        others: The batches that the next measurement is to be compared with. They are not part of the state.

    """

    def __init__(self) -> None:
        self._sharpness = BatchSharpness()
        self._count = 0
        self._is_settled = True
        self.others: Sequence[ProbeBatch] | None = None
        self._failures = 0

    def start(self) -> None:
        """Begin a run: the batches of another one are not to be compared with."""
        self.others = None
        self._failures = 0

    @property
    def may_glance(self) -> bool:
        """Whether a glance is enough for the next measurement: if it is not to be compared with another batch."""
        return not self._is_compared_next and self._failures < _GIVEN_UP

    @property
    def awaits_another(self) -> bool:
        """Whether a batch is kept for the next measurement to be compared with."""
        return self._is_compared_next and self.others is not None

    @property
    def _is_compared_next(self) -> bool:
        return self._sharpness.num_comparisons < _COMPARED_FIRST or self._count % _COMPARED_EVERY == 0

    def measure(
        self,
        own: LossHessian,
        gradient: Tensor,
        batches: Sequence[ProbeBatch],
        stability: Stability,
        hessian_on: Callable[[Sequence[ProbeBatch]], LossHessian] | None = None,
        fixed: LossHessian | None = None,
    ) -> Gauged:
        """Measure the batch of the step.

        Args:
            own: The Hessian on the step's own batch.
            gradient: The gradient there.
            batches: This batch, to compare the next one with.
            stability: What the optimizer is about to do.
            hessian_on: Makes the Hessian on other batches, at the same parameters; None to compare with none.
            fixed: The Hessian on data to compare with in place of the batch that was measured last.

        Raises:
            NonFiniteCurvatureError: If slope or curvature of the batch are not finite.

        """
        self._settle(stability)
        direction = step_direction(gradient, stability.scale)
        curvature, product = step_curvature(stability.matrix(own), direction)
        self._sharpness.see(curvature)
        other = None
        if self._is_compared_next:
            other = fixed
            if fixed is None and self.others is not None and hessian_on is not None:
                other = hessian_on(self.others)
        if other is not None:
            own.drop_graphs()  # the other batch's graphs take as much memory, and all products with this one are made
            there = step_direction(other.gradient(keep_graph=True), stability.scale)
            self._sharpness.compare(compared(curvature, direction, product, stability.matrix(other), there))
        return self._gauged(curvature, stability, batches if fixed is None else None)

    def glance(
        self,
        own: LossHessian,
        gradient: Tensor,
        batches: Sequence[ProbeBatch],
        stability: Stability,
        loss: float | None = None,
    ) -> Gauged | None:
        """Measure the batch of the step by three values of its loss, where `may_glance` says that it is enough.

        Args:
            own: The Hessian on the step's own batch.
            gradient: The gradient there.
            batches: This batch, to compare a later one with.
            stability: What the optimizer is about to do.
            loss: The loss there, if it is known.

        Returns:
            What was found; None if the losses do not tell.

        Raises:
            NonFiniteCurvatureError: If the loss or the slope of the batch is not finite.

        """
        self._settle(stability)
        limit = stability.limit_at(1.0)
        seen = self._sharpness.estimate()
        expected = max(_LEAST_SHARPNESS * limit, 0.0 if seen is None else seen.value)
        if not 0 < expected < math.inf:
            return None
        curvature = glanced_step(own, gradient, stability, expected, loss)
        if curvature is None:
            self._failures += 1
            return None
        self._failures = 0
        self._sharpness.see(curvature)
        return self._gauged(curvature, stability, batches)

    def _settle(self, stability: Stability) -> None:
        """Forget what was measured while the moments of an adaptive optimizer had not settled, once they have."""
        if stability.is_settled and not self._is_settled:
            # In the metric of moments that have not settled a ratio can be a thousand times too high, which an average
            # over measurements, weighted with their slopes, would keep for as many as it is one over.
            self._sharpness = BatchSharpness()
        self._is_settled = stability.is_settled

    def _gauged(self, curvature: StepCurvature, stability: Stability, batches: Sequence[ProbeBatch] | None) -> Gauged:
        """What the last measurements say together, with the batches that the next one may be compared with."""
        self._count += 1
        # Once the moments of an adaptive optimizer have settled, comparisons begin anew.
        self.others = batches if self._is_compared_next or not stability.is_settled else None
        found = self._standing(stability)
        if "batch_sharpness" in found:
            found["step_sharpness"] = curvature.sharpness
        return found

    def standing(self, stability: Stability) -> Gauged:
        """What the last measurements say of a step that is not measured itself.

        Args:
            stability: What the optimizer is about to do.

        """
        self._settle(stability)
        return self._standing(stability)

    def _standing(self, stability: Stability) -> Gauged:
        estimate = self._sharpness.estimate()
        if estimate is None:  # none of the batches had a gradient
            return {"stability_limit": _limit(stability, None), "is_settled": stability.is_settled}
        return {
            "batch_sharpness": estimate.value,
            "batch_sharpness_error": None if math.isnan(estimate.standard_error) else estimate.standard_error,
            "batch_agreement": estimate.agreement,
            "stability_limit": _limit(stability, estimate.agreement),
            "noise_ratio": _noise_ratio(stability, estimate),
            "is_settled": stability.is_settled,
        }

    def state_dict(self) -> dict[str, Any]:
        """The last measurements, without the batches."""
        state = {"sharpness": self._sharpness.state_dict(), "count": self._count}
        return {**state, "is_settled": self._is_settled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._sharpness.load_state_dict(state["sharpness"])
        self._count, self._is_settled = state["count"], state["is_settled"]


def _limit(stability: Stability, agreement: float | None) -> float | None:
    """The limit at an agreement; None where it is infinite, or depends on an agreement that is not known yet."""
    if agreement is None:
        least, most = stability.limit_at(1e-3), stability.limit_at(1.0)
        limit = most if abs(most - least) <= _SAME_LIMIT * most else math.inf
    else:
        limit = stability.limit_at(agreement)
    return limit if 0 < limit < math.inf else None


def _noise_ratio(stability: Stability, estimate: BatchSharpnessEstimate) -> float | None:
    """How much of the expected decrease of fresh data the second order of the steps takes away.

    With the pace ``R`` at which a lasting gradient moves the parameters, a step lowers the loss of other batches by
    ``R·w_Cᵀw`` and raises it by ``R²/2·wᵀM_Cw``.
    """
    if estimate.progress is None or estimate.shared is None or not estimate.progress > 0:
        return None
    return stability.lasting_pace * estimate.shared * estimate.value / (2 * estimate.progress)


@dataclass(frozen=True, eq=False)
class _Promised:
    """A step that the optimizer is about to take.

    Attributes:
        hessian: The Hessian of the step's own data, with its loss.
        parameters: The parameters before it.
        gradient: The gradient there.
        loss: The loss there.

    """

    hessian: LossHessian
    parameters: Tensor
    gradient: Tensor
    loss: float


class DecreaseGauge:
    """The share of the decrease that a step promises to first order and its own curvature eats.

    ``ρ = 1 - Σ(L_B(θ + u) - L_B(θ)) / Σ g_Bᵀu`` over the last measured steps ``u``, each on its own batch: for gradient
    descent on a quadratic ``η B / 2``. It asks nothing of the optimizer, and its edge is known less well: 1 without
    momentum, between that and ``1 / (1 + m)`` with it.

    """

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=_OBSERVED)
        self._promised: _Promised | None = None

    @property
    def is_observing(self) -> bool:
        """Whether a step was begun and has not been measured yet."""
        return self._promised is not None

    def begin(self, own: LossHessian) -> None:
        """Note before a step what is gone after it.

        Args:
            own: The Hessian of the step's own data.

        """
        self._promised = _Promised(own, own.layout.flatten(own.parameters), own.gradient(), own.value())
        own.drop_graphs()  # they would take their memory from the step

    def measure(self) -> Gauged:
        """Observe the step, once it is made; nothing is said while the last steps together have not gone downhill.

        Raises:
            NonFiniteCurvatureError: If loss or slope are not finite.

        """
        promised, self._promised = self._promised, None
        assert promised is not None  # noted by `begin`
        hessian = promised.hessian
        update = hessian.layout.flatten(hessian.parameters).sub_(promised.parameters)
        slope, change = float(hessian.space.inner(promised.gradient, update)), hessian.value() - promised.loss
        if not (math.isfinite(slope) and math.isfinite(change)):
            raise NonFiniteCurvatureError("The loss or its slope along the step is not finite.")
        if slope:  # else the step was skipped, or the batch has no gradient
            self._steps.append((slope, change))
        total = sum(slope for slope, _ in self._steps)
        if not total < 0:  # uphill, as single steps with momentum are, so that they promised nothing
            return {}
        return {"lost_decrease": 1 - sum(change for _, change in self._steps) / total}

    def forget(self) -> None:
        """Drop what was noted of a step that was not made."""
        self._promised = None

    def state_dict(self) -> dict[str, Any]:
        """The last steps."""
        return {"steps": [list(step) for step in self._steps]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._steps = deque(((slope, change) for slope, change in state["steps"]), maxlen=_OBSERVED)
