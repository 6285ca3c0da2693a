r"""Learning rates from curvature: what suits the present point.

- `StepLength`: along the optimizer's own update ``u`` the loss falls by the slope ``-gᵀu`` and bends by ``uᵀHu``, so
  that ``(-gᵀu) / |uᵀHu|`` is the learning rate that goes to the bottom of the parabola. One product, whatever the
  optimizer ("Stepping on the edge: curvature aware learning rate tuners", V. Roulet et al., 2024). Slope and curvature
  are seen by the batch after the one that the update was made of.
- `longest_descent`: the same for the very first step, tried on the loss.
- `CheckedSharpness`: the largest eigenvalue by Algorithm 1 of the chaos-theory paper (sec. 3.1), of which the inverse
  is the learning rate. One tracked vector can hang on a wrong eigenvector for long, so every estimate is held against
  the curvature along the gradient, and begins anew from there when it lies below it.
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
"""Updates over which slope and curvature are averaged: at the very start, when they change fast, few; then half of all
updates seen up to the second number, and from then on `_LATER_SHARE` of them. The longer a training, the smaller the
slope is beside its noise, and the more of it there is to average."""

_LATER_SHARE = 0.3

_LONGEST = 10.0
"""The longest length that is told apart: beyond it, or where there is no slope at all, steps are just too long."""

_ERRORS = 1.0
"""Standard errors by which a slope may be larger than it looks before steps count as too long."""

_MAX_HALVINGS = 60
"""How often the first step is halved: from a parabola's bottom to well below what a loss in float32 can tell."""

_AVERAGING = 0.9
"""Weight of the past in the average of the largest eigenvalue."""

_CLEARLY = 1.05
"""By how much the curvature along the gradient must exceed a tracked eigenvalue to refute it: more than rounding, which
would let a vector that tracks the gradient begin anew for ever."""

_SETTLED = 0.01
"""How near to 1 the Lyapunov exponent of Algorithm 1 comes before an estimate counts as settled."""


class StepLength:
    """How long an optimizer's steps are, with the way to the bottom of the parabola along them as unit.

    Slope and curvature along an update are seen by the *next* batch: the one that made the update sees it steeper than
    it is, since the update goes along its noise too. It is taken at the end of the step, and the slope where the step
    began follows from that and from the curvature. The slope costs nothing and is had at every step, the curvature is
    measured now and then; as curvature per squared length it changes slowly.

    Lengths are ratios of running averages. 1 goes to the bottom, 2 to the other side, where nothing is gained. In the
    long run the slope vanishes in the noise, so how far it can be trusted is part of the answer (`at_least`).

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
        """Updates over which is averaged."""
        later = max(_EARLY_MEMORY, _LATER_SHARE * self._count)
        return min(max(_SHORTEST_MEMORY, self._count / 2), later)

    @property
    def best_lr(self) -> float | None:
        """The learning rate of length 1; None before it is known or where there is no slope."""
        return self._slope / self._curvature if self._curvature > 0 and self._slope > 0 else None

    def see_curvature(self, rayleigh: float) -> None:
        """Take note of the curvature ``uᵀHu / uᵀu`` along the last update; negative values count by their modulus."""
        rayleigh = abs(rayleigh)
        if math.isfinite(rayleigh) and rayleigh > 0:
            past = rayleigh if self._rayleigh is None else self._rayleigh
            self._rayleigh = math.sqrt(past * rayleigh)
            self._is_known = True

    def lose_curvature(self) -> None:
        """What is known of the curvature does not hold any more: slopes do not count until it is measured again."""
        self._is_known = False

    def see_slope(self, slope: float, *, squared_norm: float, lr: float) -> bool:
        """Take note of the slope where the last step ended.

        Args:
            slope: ``-gᵀu`` there, for the update at learning rate 1; positive downhill.
            squared_norm: ``uᵀu``.
            lr: The learning rate of the step.

        Returns:
            Whether it counts.

        """
        if self._rayleigh is None or not self._is_known:
            return False
        if not math.isfinite(slope) or not 0 < squared_norm < math.inf:
            return False
        curvature = self._rayleigh * squared_norm
        weight, change = 1 / self.memory, slope + lr * curvature - self._slope
        if self._count:
            self._variance += weight * (change**2 - self._variance)
        self._count += 1
        self._slope += weight * change
        self._curvature += weight * (curvature - self._curvature)
        return True

    def of(self, lr: float) -> float | None:
        """The length of steps at a learning rate, at most 10; None while there is nothing to go by."""
        if self._curvature <= 0:
            return None
        return _length(lr, self._slope, self._curvature)

    def at_least(self, lr: float) -> float | None:
        """The same for a slope that is larger by its standard error; None while there is nothing to go by."""
        if self._curvature <= 0:
            return None
        weight = 1 / self.memory
        error = math.sqrt(self._variance * weight / (2 - weight))
        return _length(lr, self._slope + _ERRORS * error, self._curvature)

    def state_dict(self) -> dict[str, Any]:
        """The running averages."""
        return {
            "averages": [self._rayleigh, self._slope, self._variance, self._curvature],
            "count": self._count,
            "is_known": self._is_known,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._rayleigh, self._slope, self._variance, self._curvature = state["averages"]
        self._count, self._is_known = state["count"], state["is_known"]


def _length(lr: float, slope: float, curvature: float) -> float:
    """The length of steps whose slope and curvature are known."""
    return min(lr * curvature / slope, _LONGEST) if slope > 0 else _LONGEST


def longest_descent(
    loss: Callable[[float], float], before: float, *, slope: float, curvature: float
) -> tuple[float | None, int]:
    """The learning rate at the bottom of the parabola, halved until the loss does fall there.

    Args:
        loss: Maps a learning rate to the loss after the step.
        before: The loss before the step.
        slope: ``-gᵀu``, for the update at learning rate 1.
        curvature: ``uᵀHu``; negative values count by their modulus.

    Returns:
        The learning rate, None where there is none (no curvature, an update uphill), and how often it was halved.

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
        along_gradient: The curvature along the gradient that it was held against: no more than the largest eigenvalue.
        exponent: The Lyapunov exponent of this iteration; 1 once settled.
        was_refuted: Whether the tracked vector had hung on a smaller eigenvalue.

    """

    value: float
    newest: float
    along_gradient: float
    exponent: float
    was_refuted: bool

    @property
    def is_settled(self) -> bool:
        """Whether the tracked vector has found its eigenvector, as far as can be told."""
        return abs(self.exponent - 1) < _SETTLED and not self.was_refuted


class CheckedSharpness:
    """The largest eigenvalue of the Hessian by Algorithm 1, held against the curvature along the gradient.

    Three gradients an iteration, that at the present point among them.

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

        Where the number of parameters is another one than before, since some were frozen or unfrozen, a new vector
        is tracked.

        Args:
            gradient: Maps a displacement of shape ``(n,)`` to the gradient there.
            here: The gradient at the present parameters.
            space: The space of the vectors, if they are not plain tensors of their whole length.

        Returns:
            The estimate, or None where the curvature is nowhere positive.

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
        refuted = along_gradient > max(_CLEARLY * tracked, 0.0)
        if refuted:
            self._iteration.restart(here, space)
        newest = max(tracked, along_gradient)
        if not (math.isfinite(newest) and newest > 0):
            return None
        past = newest if self._average is None else self._average
        self._average = _AVERAGING * past + (1 - _AVERAGING) * newest
        return Sharpness(max(self._average, newest), newest, along_gradient, estimate.exponent, refuted)

    def settle(
        self,
        gradient: Callable[[Tensor], Tensor],
        here: Tensor,
        max_iterations: int,
        space: VectorSpace | None = None,
    ) -> Sharpness | None:
        """Iterations at one and the same point until the estimate has settled, after a first one at most as many.

        Args:
            gradient: Maps a displacement of shape ``(n,)`` to the gradient there.
            here: The gradient at the present parameters.
            max_iterations: How many at most, after the first.
            space: As for `step`.

        Returns:
            The last estimate, or None where the curvature is nowhere positive.

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
        """Go on from a `state_dict`."""
        self._iteration.load_state_dict(state["iteration"])
        self._average = state["average"]
