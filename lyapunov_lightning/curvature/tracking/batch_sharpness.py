"""What decides on stability under mini-batches: the batch sharpness, and how far batches agree in their curvature.

Under mini-batches it is not the largest eigenvalue that settles at the edge of stability but the *batch sharpness*: the
curvature that a batch sees along the step that its own gradient ``g_B`` asks for. In the metric of the optimizer (see
`stability`, whose matrix is ``M = S H S + D``) it is the Rayleigh quotient of the batch's matrix ``M_B`` at
``w_B = S g_B``,

    B = E[w_Bᵀ M_B w_B] / E[w_Bᵀ w_B],

which is ``E[gᵀHg] / E[gᵀg]`` for SGD, and for Adam the curvature along ``P⁻¹g`` over the slope along it. Expectations
are over batches: here over the last few measurements, a ratio of two sums and not a mean of ratios, in which a batch
without a gradient would count as much as any.

Up to which ``B`` a step is stable depends on the *agreement* ``p`` of the batches: how much of the curvature along one
batch's step another batch sees. Two batches at the same parameters give it in two ways,

    p₁ = E[w_Cᵀ M_B w_B] / E[w_Bᵀ M_B w_B],        p₂ = E[w_Bᵀ M_C w_B] / E[w_Bᵀ M_B w_B],

by the other batch's gradient, and by its Hessian. Where all curvature lies in one direction both are
``E[h]² / E[h²]`` (for ``p₁`` as long as the gradient is due to the distance from the minimum, and not to noise). In
many directions the first is too small where the gradients are mostly noise, and the second too large where the
direction of the steps turns with the batch; the geometric mean is nearest to the truth (`docs/verdict.md`). Batches
that hold the same samples have a ``p`` of 1 by either, so that full-batch training need not be recognised.

References:
    A. Andreyev, P. Beneventano, "Edge of stochastic stability: revisiting the edge of stability for SGD", 2024
    (arXiv 2412.20553); the same, with momentum, 2026 (arXiv 2604.14108).

"""

import math
from collections import deque
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.directions.second_difference import curvature_along
from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.linear import LinearOperator, space_of
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.curvature.stability import Stability

_MEASUREMENTS = 8
"""Over how many measurements the batch sharpness is averaged: the standard error of one is about its own size at small
batches, and over many more the curvature changes."""

_COMPARISONS = 8
"""Over how many comparisons with another batch the agreement is averaged. It changes slowly."""

_LEAST_AGREEMENT = 1e-3
"""The agreement that is taken where less was measured, or a negative one: the limit hardly depends on it down there."""


@dataclass(frozen=True)
class StepCurvature:
    """What one mini-batch sees along its own step.

    Attributes:
        slope: ``wᵀw``: by how much the loss of the batch falls for each unit of the learning rate.
        curvature: ``wᵀMw``: its second derivative along the step.

    """

    slope: float
    curvature: float

    @property
    def sharpness(self) -> float:
        """The curvature over the slope; NaN for a batch without a gradient."""
        return self.curvature / self.slope if self.slope else math.nan


@dataclass(frozen=True)
class Comparison:
    """What another mini-batch says of the same step at the same parameters.

    Attributes:
        own: What the batch itself sees.
        slope: ``w_Cᵀw``: by how much the other batch's loss falls.
        curvature: ``wᵀM_Cw``: its second derivative along the step.
        crossed: ``w_CᵀMw``, by the other batch's gradient and this one's Hessian.

    """

    own: StepCurvature
    slope: float
    curvature: float
    crossed: float


def step_direction(gradient: Tensor, scale: Tensor | None) -> Tensor:
    """The step that a gradient asks for, ``w = S g``, in the metric of the optimizer.

    Args:
        gradient: Shape ``(n,)``.
        scale: The diagonal of ``S``, such as `Stability.scale`; ones if None.

    """
    return gradient if scale is None else gradient * scale.to(gradient)


def step_curvature(matrix: LinearOperator, direction: Tensor) -> tuple[StepCurvature, Tensor]:
    """Slope and curvature of a batch along its own step, by one product.

    Args:
        matrix: The batch's ``M``, such as ``stability.matrix(hessian)``.
        direction: The batch's ``w``, such as `step_direction` gives.

    Returns:
        Both, and the product ``Mw`` for `compared`.

    Raises:
        NonFiniteCurvatureError: If one of them is not finite.

    """
    space = space_of(matrix)
    product = matrix.matvec(direction)
    slope, curvature = _numbers(space.inner(direction, direction), space.inner(direction, product))
    return StepCurvature(slope, curvature), product


def glanced_step(
    hessian: LossHessian, gradient: Tensor, stability: Stability, sharpness: float, loss: float | None = None
) -> StepCurvature | None:
    """Slope and curvature of a batch along its own step, by three values of its loss.

    Args:
        hessian: The Hessian of the batch, with its loss.
        gradient: The gradient of the batch, of shape ``(n,)``.
        stability: What the optimizer is about to do.
        sharpness: About what the batch sharpness is expected to be; positive.
        loss: The loss of the batch, which saves one of the three; evaluated if None.

    Returns:
        Both; None where the losses do not tell, see `lyapunov_lightning.curvature.directions.second_difference`.

    Raises:
        NonFiniteCurvatureError: If the loss or the slope is not finite.

    """
    space = hessian.space
    direction = step_direction(gradient, stability.scale)
    step = step_direction(direction, stability.scale)  # of the parameters: S w
    decay = direction * 0 if stability.shift is None else direction * stability.shift.to(direction)
    expected = torch.tensor(sharpness, dtype=torch.float64, device=direction.device)
    found = [space.inner(direction, direction).double(), space.inner(direction, decay).double(), expected]
    # Ranks on which these differ in the last digit would choose other distances, and one of them another attempt.
    slope, shifted, sharpness = _numbers(*space.agreed(torch.stack(found)))
    if not slope:
        return StepCurvature(0.0, 0.0)
    line = curvature_along(
        lambda distances: hessian.values_along(step, distances),
        slope,
        sharpness,
        precision=torch.finfo(hessian.dtype).eps,
        base=loss,
    )
    return None if line is None else StepCurvature(slope, stability.sign * line.value + shifted)


def compared(
    own: StepCurvature, direction: Tensor, product: Tensor, other: LinearOperator, other_direction: Tensor
) -> Comparison:
    """What another batch says of a step, by one product more.

    Args:
        own: What the batch itself sees.
        direction: Its ``w``.
        product: Its ``Mw``.
        other: The other batch's ``M``, in the same metric.
        other_direction: The other batch's ``w``.

    """
    space = space_of(other)
    slope, curvature, crossed = _numbers(
        space.inner(other_direction, direction),
        space.inner(direction, other.matvec(direction)),
        space.inner(other_direction, product),
    )
    return Comparison(own, slope, curvature, crossed)


@dataclass(frozen=True)
class BatchSharpnessEstimate:
    """What the last measurements say of the batch sharpness.

    Attributes:
        value: The batch sharpness, in the metric of the optimizer.
        standard_error: How far it may be off; NaN after a single measurement.
        agreement: How far batches agree in their curvature, in (0, 1]; None before the first comparison.
        progress: The share of a step's slope that another batch sees; None before the first comparison.
        shared: The share of a step's curvature that another batch sees, ``p₂``; None before the first comparison.

    """

    value: float
    standard_error: float
    agreement: float | None = None
    progress: float | None = None
    shared: float | None = None


class BatchSharpness:
    """The batch sharpness of a training, averaged over the last measurements.

    Example::

        >>> from lyapunov_lightning.curvature.tracking.batch_sharpness import BatchSharpness, StepCurvature
        >>> sharpness = BatchSharpness()
        >>> sharpness.see(StepCurvature(slope=1.0, curvature=3.0))
        >>> sharpness.see(StepCurvature(slope=3.0, curvature=5.0))
        >>> sharpness.estimate().value
        2.0

    """

    def __init__(self) -> None:
        self._seen: deque[StepCurvature] = deque(maxlen=_MEASUREMENTS)
        self._compared: deque[Comparison] = deque(maxlen=_COMPARISONS)

    def see(self, step: StepCurvature) -> None:
        """Count a measurement."""
        self._seen.append(step)

    def compare(self, comparison: Comparison) -> None:
        """Count a comparison with another batch."""
        self._compared.append(comparison)

    @property
    def num_comparisons(self) -> int:
        """How many comparisons there are."""
        return len(self._compared)

    def estimate(self) -> BatchSharpnessEstimate | None:
        """The batch sharpness and what is known of the agreement; None before a step with a gradient."""
        slope = sum(step.slope for step in self._seen)
        if not slope:
            return None
        value = sum(step.curvature for step in self._seen) / slope
        count = len(self._seen)
        # Of a ratio of two means, to first order: the spread of what each measurement leaves unexplained.
        left = sum((step.curvature - value * step.slope) ** 2 for step in self._seen)
        error = math.sqrt(count / (count - 1) * left) / slope if count > 1 else math.nan
        own = sum(comparison.own.curvature for comparison in self._compared)
        own_slope = sum(comparison.own.slope for comparison in self._compared)
        if not own or not own_slope:
            return BatchSharpnessEstimate(value, error)
        crossed = sum(comparison.crossed for comparison in self._compared) / own
        shared = sum(comparison.curvature for comparison in self._compared) / own
        floor = _LEAST_AGREEMENT
        agreement = min(1.0, math.sqrt(max(floor, crossed) * max(floor, shared)))
        progress = sum(comparison.slope for comparison in self._compared) / own_slope
        return BatchSharpnessEstimate(value, error, agreement, progress, shared)

    def state_dict(self) -> dict[str, Any]:
        """The last measurements."""
        return {
            "seen": [list(astuple(step)) for step in self._seen],
            "compared": [[*astuple(one.own), one.slope, one.curvature, one.crossed] for one in self._compared],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._seen = deque((StepCurvature(*numbers) for numbers in state["seen"]), maxlen=_MEASUREMENTS)
        self._compared = deque(
            (Comparison(StepCurvature(*numbers[:2]), *numbers[2:]) for numbers in state["compared"]),
            maxlen=_COMPARISONS,
        )


def _numbers(*scalars: Tensor) -> list[float]:
    """Scalars of one device as Python numbers, in one transfer.

    Raises:
        NonFiniteCurvatureError: If one of them is not finite.

    """
    numbers: list[float] = torch.stack([scalar.double() for scalar in scalars]).tolist()
    if not all(map(math.isfinite, numbers)):
        raise NonFiniteCurvatureError("The slope or the curvature of a batch along its own step is not finite.")
    return numbers
