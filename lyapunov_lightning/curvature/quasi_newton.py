r"""Learning rates from curvature.

Two estimates of the learning rate that suits the present point, and the prudence that stands between an estimate and
what is done:

- `CurvatureAlongUpdate`: along the optimizer's own update ``u`` the loss falls by the slope ``-gᵀu`` and bends by
  ``uᵀHu``, so that ``η = σ(-gᵀu) / |uᵀHu|`` is ``σ`` times the step to the bottom of the parabola. One product,
  whatever the optimizer ("Stepping on the edge: curvature aware learning rate tuners", V. Roulet et al., 2024).
- `CheckedSharpness`: the largest eigenvalue by Algorithm 1 of the chaos-theory paper (sec. 3.1), of which the inverse
  is the learning rate. One tracked vector can hang on a wrong eigenvector for long, so every estimate is held against
  the curvature along the gradient, and begins anew from there when it lies below it.
- `Governor`: what an estimate may do to the learning rate, within `LRBounds`; and `tried`, which asks the loss itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.arguments import check_int, check_positive
from lyapunov_lightning.curvature.lyapunov import LyapunovIteration

_CLEARLY = 1.05
"""By how much the curvature along the gradient must exceed a tracked eigenvalue to refute it: more than rounding, which
would let a vector that tracks the gradient begin anew for ever."""

_SETTLED = 0.01
"""How near to 1 the Lyapunov exponent of Algorithm 1 comes before an estimate counts as settled."""

_MAX_TRIALS = 4
"""How often a growing learning rate is halved because the loss says that it is too long."""


class CurvatureAlongUpdate:
    """The learning rate ``σ(-gᵀu) / |uᵀHu|``: of running averages of both, or of this step alone if that is less.

    The averages take the noise of the batches out. But no step is to go further than ``σ`` times to the bottom of its
    own parabola, which for ``σ < 2`` is where it gains.

    Args:
        sigma: The factor ``σ``: 1 goes to the bottom of the parabola along the update, 2 to its other side.
        averaging: Weight of the past in the running averages; 0 for none.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> from lyapunov_lightning.curvature.quasi_newton import CurvatureAlongUpdate
        >>> rule = CurvatureAlongUpdate(sigma=1.0, averaging=0.0)
        >>> rule.propose(slope=4.0, curvature=16.0)
        0.25

    """

    def __init__(self, sigma: float = 1.5, averaging: float = 0.9) -> None:
        check_positive("sigma", sigma)
        _check_averaging(averaging)
        self._sigma = sigma
        self._averaging = averaging
        self._slope = 0.0
        self._curvature = 0.0

    def propose(self, slope: float, curvature: float) -> float | None:
        """The learning rate, or None where there is none: no curvature, an update uphill, numbers that are not finite.

        Args:
            slope: ``-gᵀu``, for the update at learning rate 1.
            curvature: ``uᵀHu``; negative values count by their modulus.

        """
        if not (math.isfinite(slope) and math.isfinite(curvature)):
            return None
        self._slope = self._averaging * self._slope + (1 - self._averaging) * slope
        self._curvature = self._averaging * self._curvature + (1 - self._averaging) * abs(curvature)
        if not (slope > 0 and curvature != 0 and self._slope > 0):
            return None
        return self._sigma * min(self._slope / self._curvature, slope / abs(curvature))

    def state_dict(self) -> dict[str, Any]:
        """The running averages."""
        return {"slope": self._slope, "curvature": self._curvature}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._slope, self._curvature = state["slope"], state["curvature"]


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
        averaging: Weight of the past in the running average.
        delta_q: Length of the perturbation, in parameter space.
        seed: Seed of the first perturbation.

    Raises:
        ValueError: If an argument is out of its range.

    """

    def __init__(self, averaging: float = 0.9, delta_q: float = 5e-2, seed: int = 0) -> None:
        _check_averaging(averaging)
        self._averaging = averaging
        self._delta_q = delta_q
        self._iteration = LyapunovIteration(map="ascent", delta_q=delta_q, seed=seed)
        self._average: float | None = None

    def step(self, gradient: Callable[[Tensor], Tensor], here: Tensor) -> Sharpness | None:
        """One iteration at the present parameters.

        Where the number of parameters is another one than before, since some were frozen or unfrozen, a new vector
        is tracked.

        Args:
            gradient: Maps a displacement of shape ``(n,)`` to the gradient there.
            here: The gradient at the present parameters.

        Returns:
            The estimate, or None where the curvature is nowhere positive.

        Raises:
            NonFiniteCurvatureError: If a gradient is not finite.

        """
        estimate = self._iteration.step(gradient, here)
        norm = float(torch.linalg.vector_norm(here))
        along_gradient = 0.0
        if norm > 0:
            probe = here * (self._delta_q / norm)
            along_gradient = float(probe @ (gradient(probe) - here)) / self._delta_q**2
        tracked = max(estimate.eigenvalue, estimate.curvature)
        refuted = along_gradient > max(_CLEARLY * tracked, 0.0)
        if refuted:
            self._iteration.restart(here)
        newest = max(tracked, along_gradient)
        if not (math.isfinite(newest) and newest > 0):
            return None
        past = newest if self._average is None else self._average
        self._average = self._averaging * past + (1 - self._averaging) * newest
        return Sharpness(max(self._average, newest), newest, along_gradient, estimate.exponent, refuted)

    def settle(self, gradient: Callable[[Tensor], Tensor], here: Tensor, max_iterations: int) -> Sharpness | None:
        """Iterations at one and the same point until the estimate has settled, after a first one at most as many.

        Args:
            gradient: Maps a displacement of shape ``(n,)`` to the gradient there.
            here: The gradient at the present parameters.
            max_iterations: How many at most, after the first.

        Returns:
            The last estimate, or None where the curvature is nowhere positive.

        Raises:
            NonFiniteCurvatureError: If a gradient is not finite.

        """
        sharpness = self.step(gradient, here)
        for _ in range(max_iterations):
            if sharpness is not None and sharpness.is_settled:
                break
            sharpness = self.step(gradient, here)
        return sharpness

    def state_dict(self) -> dict[str, Any]:
        """The perturbation and the running average."""
        return {"iteration": self._iteration.state_dict(), "average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._iteration.load_state_dict(state["iteration"])
        self._average = state["average"]


@dataclass(frozen=True)
class LRBounds:
    """What a learning rate may do, whatever is proposed.

    Attributes:
        min_lr: The floor.
        max_lr: The ceiling.
        max_growth: The most by which it grows from one measurement to the next.
        window: Steps over which the loss is averaged to see whether it rises, and after which a learning rate that was
            halved for that is back; 0 not to look at the loss.

    Raises:
        ValueError: If one of them is out of its range.

    Example::

        >>> from lyapunov_lightning.curvature.quasi_newton import LRBounds
        >>> LRBounds(max_lr=0.5)
        LRBounds(min_lr=1e-06, max_lr=0.5, max_growth=1.25, window=50)

    """

    min_lr: float = 1e-6
    max_lr: float = 10.0
    max_growth: float = 1.25
    window: int = 50

    def __post_init__(self) -> None:
        check_positive("min_lr", self.min_lr)
        check_positive("max_lr", self.max_lr)
        if not self.min_lr < self.max_lr:
            raise ValueError(f"`min_lr` should be below `max_lr`, got {self.min_lr} and {self.max_lr}.")
        if not self.max_growth > 1:
            raise ValueError(f"`max_growth` should be above 1, got {self.max_growth}.")
        check_int("window", self.window, least=0)


class Governor:
    """Turns proposed learning rates into those that are used.

    The learning rate falls at once and rises by a bounded factor; it stays between a floor and a ceiling; without a
    usable proposal it stays as it is; and when the loss has risen over a window it is halved, to come back to what is
    proposed over the next window.

    Args:
        bounds: What the learning rate may do.

    """

    def __init__(self, bounds: LRBounds = LRBounds()) -> None:
        self._bounds = bounds
        self._losses: list[float] = []
        self.lr: float | None = None
        self.back_off = 1.0
        """The factor on what is proposed, below 1 after the loss has risen."""

    def limit(self, proposal: float | None) -> float | None:
        """The learning rate that a proposal comes to, without using it; None where nothing was proposed yet."""
        if proposal is None or not (math.isfinite(proposal) and proposal > 0):
            return self.lr
        ceiling = math.inf if self.lr is None else self.lr * self._bounds.max_growth
        return min(max(min(proposal * self.back_off, ceiling), self._bounds.min_lr), self._bounds.max_lr)

    def use(self, lr: float) -> None:
        """Take note of the learning rate of a step."""
        self.lr = lr
        if self._bounds.window:
            self.back_off = min(1.0, self.back_off * 2 ** (1 / self._bounds.window))

    def observe(self, loss: float) -> bool:
        """Take note of the loss of a step, and back off if it has risen; whether it has."""
        window = self._bounds.window
        if not window:
            return False
        self._losses.append(loss)
        del self._losses[: -2 * window]
        if math.isfinite(loss) and len(self._losses) < 2 * window:
            return False
        before, lately = (torch.tensor(part) for part in (self._losses[:-window], self._losses[-window:]))
        if math.isfinite(loss):
            noise = math.sqrt(float(before.var() + lately.var()) / window)
            if float(lately.mean() - before.mean()) <= 2 * noise:
                return False
        self.back_off *= 0.5
        self._losses = []
        return True

    def state_dict(self) -> dict[str, Any]:
        """The learning rate, the factor on what is proposed, and the latest losses."""
        return {"lr": self.lr, "back_off": self.back_off, "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.lr, self.back_off, self._losses = state["lr"], state["back_off"], list(state["losses"])


def tried(loss: Callable[[float], float], before: float, lr: float, least: float) -> tuple[float, int]:
    """A learning rate that is halved while the loss rises along the step.

    Args:
        loss: Maps a learning rate to the loss after the step.
        before: The loss before the step.
        lr: The learning rate to try.
        least: What needs no trial, such as the learning rate so far.

    Returns:
        The learning rate, at least `least`, and how often it was halved.

    """
    for trials in range(_MAX_TRIALS):
        if loss(lr) <= before:
            return lr, trials
        lr = max(lr / 2, least)
        if lr == least:
            return lr, trials + 1
    return lr, _MAX_TRIALS


def _check_averaging(averaging: float) -> None:
    if not 0 <= averaging < 1:
        raise ValueError(f"`averaging` should be in [0, 1), got {averaging}.")
