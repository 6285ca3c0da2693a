r"""Learning rates from curvature at the present parameters.

- `StepLength`: along the optimizer's own update ``u`` the loss falls by the slope ``-gᵀu`` and bends by ``uᵀHu``, so
  that ``(-gᵀu) / |uᵀHu|`` is the learning rate that goes to the bottom of the parabola. It takes one product, whatever
  the optimizer ("Stepping on the edge: curvature aware learning rate tuners", V. Roulet et al., 2024). Slope and
  curvature are measured on the batch after the one that the update was made of.
- `longest_descent`: the same for the very first step, tried on the loss.
- `CheckedSharpness`: the largest eigenvalue by Algorithm 1 of the chaos-theory paper (sec. 3.1); its inverse is the
  learning rate. The vector that the algorithm follows can stay near a wrong eigenvector for long. So every estimate is
  compared with the curvature along the gradient, and where it is smaller the gradient becomes the vector.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lyapunov_lightning.curvature.arguments import check_positive
from lyapunov_lightning.curvature.solvers.lyapunov import LyapunovIteration
from lyapunov_lightning.curvature.vectors.space import VectorSpace, space_like

_SHORTEST_MEMORY, _EARLY_MEMORY = 3.0, 33.0
"""Updates over which slope and curvature are averaged: few at the very start, when they change fast; then half of all
updates so far, up to the second number; and from then on `_LATER_MEMORY_SHARE` of all. The longer a training, the
smaller the slope is compared with its noise, and the more updates it takes to see it."""

_LATER_MEMORY_SHARE = 0.3

_LONGEST_LENGTH = 10.0
"""The length that stands for all longer ones, and for steps along which there is no slope at all."""

_SLOPE_ERRORS = 1.0
"""Standard errors of the slope that are added to it before steps count as too long."""

_MAX_HALVINGS = 60
"""How often the first step is halved: ``2⁻⁶⁰`` of the way to a parabola's bottom changes no loss in float32."""

_PAST_SHARE = 0.9
"""Weight of the past in the running average of the largest eigenvalue."""

_REFUTING_RATIO = 1.05
"""How many times larger than the eigenvalue of the tracked vector the curvature along the gradient must be to replace
the vector. At 1, rounding alone would replace one that lies along the gradient again and again."""

_SETTLED_DISTANCE = 0.01
"""Distance of Algorithm 1's Lyapunov exponent from 1 below which an estimate counts as settled."""


class StepLength:
    """How long an optimizer's steps are, with the way to the bottom of the parabola along them as unit.

    Slope and curvature along an update are measured on the *next* batch: on the batch that the update was made of the
    slope is steeper than on others, since the update goes along the noise of that batch too. The slope is that at the
    end of the step; the slope at its beginning follows from it and from the curvature. The slope is known at every step
    without further cost. The curvature is measured now and then, and kept per squared length, which changes slowly.

    Lengths are ratios of running averages. A step of length 1 goes to the bottom, one of length 2 to the other side,
    where nothing is gained. Late in a training the slope is smaller than its noise, so `at_least` says how long the
    steps are at least.

    Example::

        >>> from lyapunov_lightning.curvature.acting.step_length import StepLength
        >>> length = StepLength()
        >>> length.see_curvature(4.0)  # uᵀHu / uᵀu
        >>> length.see_slope(-2.0, squared_norm=1.0, lr=1.5)  # -gᵀu where the step ended
        True
        >>> length.of(1.5)
        1.5

    """

    def __init__(self) -> None:
        self._rayleigh: float | None = None
        self._is_known = False
        self._slope = 0.0
        self._variance = 0.0
        self._curvature = 0.0
        self._count = 0

    @property
    def memory(self) -> float:
        """The number of updates that the averages are taken over."""
        later = max(_EARLY_MEMORY, _LATER_MEMORY_SHARE * self._count)
        return min(max(_SHORTEST_MEMORY, self._count / 2), later)

    @property
    def best_lr(self) -> float | None:
        """The learning rate of length 1; None if it is not known yet or if there is no slope."""
        return self._slope / self._curvature if self._curvature > 0 and self._slope > 0 else None

    def see_curvature(self, rayleigh: float) -> None:
        """Use the curvature ``uᵀHu / uᵀu`` along the last update; of negative values the absolute value."""
        rayleigh = abs(rayleigh)
        if math.isfinite(rayleigh) and rayleigh > 0:
            past = rayleigh if self._rayleigh is None else self._rayleigh
            # The geometric mean: curvatures of single batches differ by factors, and one that is far too high should
            # not count more than one that is far too low.
            self._rayleigh = math.sqrt(past * rayleigh)
            self._is_known = True

    def lose_curvature(self) -> None:
        """Ignore all slopes until the curvature has been measured again."""
        self._is_known = False

    def see_slope(self, slope: float, *, squared_norm: float, lr: float) -> bool:
        """Use the slope where the last step ended.

        Args:
            slope: ``-gᵀu`` there, for the update at learning rate 1; positive downhill.
            squared_norm: ``uᵀu``.
            lr: The learning rate of the step.

        Returns:
            Whether it was used: not if the curvature is not known, or a number is not finite.

        """
        if self._rayleigh is None or not self._is_known:
            return False
        if not math.isfinite(slope) or not 0 < squared_norm < math.inf:
            return False
        curvature = self._rayleigh * squared_norm
        # Along a parabola the slope falls by lr · uᵀHu within the step, so at its beginning it was larger by that.
        weight, change = 1 / self.memory, slope + lr * curvature - self._slope
        if self._count:
            self._variance += weight * (change**2 - self._variance)
        self._count += 1
        self._slope += weight * change
        self._curvature += weight * (curvature - self._curvature)
        return True

    def of(self, lr: float) -> float | None:
        """The length of steps at a learning rate, at most 10; None if no slope has been used yet."""
        if self._curvature <= 0:
            return None
        return _length(lr, self._slope, self._curvature)

    def at_least(self, lr: float) -> float | None:
        """The same for a slope that is larger by its standard error; None if no slope has been used yet."""
        if self._curvature <= 0:
            return None
        weight = 1 / self.memory
        # The variance of an average in which each new value has this weight, and is independent of the others.
        error = math.sqrt(self._variance * weight / (2 - weight))
        return _length(lr, self._slope + _SLOPE_ERRORS * error, self._curvature)

    def state_dict(self) -> dict[str, Any]:
        """The running averages."""
        return {
            "averages": [self._rayleigh, self._slope, self._variance, self._curvature],
            "count": self._count,
            "is_known": self._is_known,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        rayleigh, *averages = state["averages"]
        self._rayleigh = None if rayleigh is None else float(rayleigh)
        self._slope, self._variance, self._curvature = map(float, averages)
        self._count, self._is_known = state["count"], state["is_known"]


def _length(lr: float, slope: float, curvature: float) -> float:
    """The length of steps whose slope and curvature are known."""
    return min(lr * curvature / slope, _LONGEST_LENGTH) if slope > 0 else _LONGEST_LENGTH


def longest_descent(
    loss: Callable[[float], float], before: float, *, slope: float, curvature: float
) -> tuple[float | None, int]:
    """The learning rate at the bottom of the parabola, halved until the loss does fall there.

    Args:
        loss: Maps a learning rate to the loss after the step.
        before: The loss before the step.
        slope: ``-gᵀu``, for the update at learning rate 1.
        curvature: ``uᵀHu``; of negative values the absolute value is used.

    Returns:
        The learning rate, None if there is none (no curvature, an update uphill), and how often it was halved.

    """
    if not (math.isfinite(slope) and math.isfinite(curvature) and slope > 0 and curvature != 0):
        return None, 0
    lr = slope / abs(curvature)
    for halvings in range(_MAX_HALVINGS):
        if loss(lr) < before:
            return lr, halvings
        lr /= 2
    return None, _MAX_HALVINGS


@dataclass(frozen=True)
class Sharpness:
    """One estimate of `CheckedSharpness`.

    Attributes:
        value: The running average of the largest eigenvalue; the newest estimate where that is larger.
        newest: The estimate of this iteration alone.
        along_gradient: The curvature along the gradient, which is at most the largest eigenvalue.
        exponent: The Lyapunov exponent of this iteration; 1 once settled.
        was_refuted: Whether the tracked vector was near an eigenvector of a smaller eigenvalue.

    """

    value: float
    newest: float
    along_gradient: float
    exponent: float
    was_refuted: bool

    @property
    def is_settled(self) -> bool:
        """Whether the tracked vector is near an eigenvector, and the gradient shows no larger eigenvalue."""
        return abs(self.exponent - 1) < _SETTLED_DISTANCE and not self.was_refuted


class CheckedSharpness:
    """The largest eigenvalue of the Hessian by Algorithm 1, compared with the curvature along the gradient.

    An iteration takes three gradients, with the one at the present parameters.

    Args:
        delta_q: Length of the perturbation, in parameter space.
        seed: Seed of the first perturbation.

    Raises:
        ValueError: If an argument is out of its range.

    """

    def __init__(self, delta_q: float = 5e-2, seed: int = 0) -> None:
        check_positive("delta_q", delta_q)
        self._delta_q = delta_q
        self._iteration = LyapunovIteration(map="ascent", delta_q=delta_q, seed=seed)
        self._average: float | None = None

    def step(
        self, gradient: Callable[[Tensor], Tensor], here: Tensor, space: VectorSpace | None = None
    ) -> Sharpness | None:
        """One iteration at the present parameters.

        If the number of parameters has changed, since some were frozen or unfrozen, a new vector is tracked.

        Args:
            gradient: Maps a displacement of shape ``(n,)`` to the gradient there.
            here: The gradient at the present parameters.
            space: The space of the vectors, if they are not plain tensors of their whole length.

        Returns:
            The estimate, or None if no positive curvature was found.

        Raises:
            NonFiniteCurvatureError: If a gradient is not finite.

        """
        space = space_like(here) if space is None else space
        estimate = self._iteration.step(gradient, here, space=space)
        norm = float(space.norm(here))
        along_gradient = 0.0
        if norm > 0:
            probe = here * (self._delta_q / norm)
            along_gradient = float(space.inner(probe, gradient(probe) - here)) / self._delta_q**2
        tracked = max(estimate.eigenvalue, estimate.curvature)
        # A Rayleigh quotient is at most the largest eigenvalue, so one that is larger than the tracked estimate shows
        # that the tracked vector is not the wanted one. On a LeNet the estimate stayed at 0.29 where the eigenvalue was
        # 717, and the learning rate 3.5 that followed never trained.
        refuted = along_gradient > max(_REFUTING_RATIO * tracked, 0.0)
        if refuted:
            self._iteration.restart(here, space)
        newest = max(tracked, along_gradient)
        if not (math.isfinite(newest) and newest > 0):
            return None
        past = newest if self._average is None else self._average
        self._average = _PAST_SHARE * past + (1 - _PAST_SHARE) * newest
        # The larger of the two: when the eigenvalue rises, a learning rate by the average is too high for some steps.
        return Sharpness(max(self._average, newest), newest, along_gradient, estimate.exponent, refuted)

    def settle(
        self,
        gradient: Callable[[Tensor], Tensor],
        here: Tensor,
        max_iterations: int,
        space: VectorSpace | None = None,
    ) -> Sharpness | None:
        """Iterate at the same parameters until the estimate has settled.

        Args:
            gradient: Maps a displacement of shape ``(n,)`` to the gradient there.
            here: The gradient at the present parameters.
            max_iterations: The most iterations after the first one.
            space: As for `step`.

        Returns:
            The last estimate, or None if no positive curvature was found.

        Raises:
            NonFiniteCurvatureError: If a gradient is not finite.

        """
        sharpness = self.step(gradient, here, space)
        for _ in range(max_iterations):
            if sharpness is not None and sharpness.is_settled:
                break
            sharpness = self.step(gradient, here, space)
        return sharpness

    def state_dict(self) -> dict[str, Any]:
        """The perturbation and the running average."""
        return {"iteration": self._iteration.state_dict(), "average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._iteration.load_state_dict(state["iteration"])
        self._average = None if state["average"] is None else float(state["average"])
