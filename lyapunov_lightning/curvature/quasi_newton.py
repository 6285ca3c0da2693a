r"""Learning rates from curvature.

Two estimates of the learning rate that suits the present point, and the prudence that stands between an estimate and
what is done:

- `CurvatureAlongUpdate`: along the optimizer's own update ``u`` the loss falls by the slope ``-gᵀu`` and bends by
  ``uᵀHu``, so that ``η = σ(-gᵀu) / |uᵀHu|`` is ``σ`` times the step to the bottom of the parabola. One product,
  whatever the optimizer ("Stepping on the edge: curvature aware learning rate tuners", V. Roulet et al., 2024).
- `CheckedSharpness`: the largest eigenvalue by Algorithm 1 of the chaos-theory paper (sec. 3.1), of which the inverse
  is the learning rate. One tracked vector can hang on a wrong eigenvector for long, so every estimate is held against
  the curvature along the gradient, and begins anew from there when it lies below it.
- `Governor`: what an estimate may do to the learning rate.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from lyapunov_lightning.curvature.lyapunov import LyapunovIteration

_CLEARLY = 1.05
"""By how much the curvature along the gradient must exceed a tracked eigenvalue to refute it: more than rounding, which
would let a vector that tracks the gradient begin anew for ever."""


class CurvatureAlongUpdate:
    """The learning rate ``σ(-gᵀu) / |uᵀHu|``: of running averages of both, or of this step alone if that is less.

    The averages take the noise of the batches out. But no step is to go further than ``σ`` times to the bottom of its
    own parabola, which for ``σ < 2`` is where it gains.

    Args:
        sigma: The factor ``σ``: 1 goes to the bottom of the parabola along the update, 2 to its other side.
        averaging: Weight of the past in the running averages; 0 for none.

    Example::

        >>> from lyapunov_lightning.curvature.quasi_newton import CurvatureAlongUpdate
        >>> rule = CurvatureAlongUpdate(sigma=1.0, averaging=0.0)
        >>> rule.propose(slope=4.0, curvature=16.0)
        0.25

    """

    def __init__(self, sigma: float = 1.5, averaging: float = 0.9) -> None:
        self._sigma = sigma
        self._averaging = averaging
        self._slope = 0.0
        self._curvature = 0.0

    def propose(self, slope: float, curvature: float) -> Optional[float]:
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


class CheckedSharpness:
    """The largest eigenvalue of the Hessian by Algorithm 1, held against the curvature along the gradient.

    Three gradients an iteration, that at the present point among them.

    Args:
        averaging: Weight of the past in the running average.
        delta_q: Length of the perturbation, in parameter space.
        seed: Seed of the first perturbation.

    """

    def __init__(self, averaging: float = 0.9, delta_q: float = 5e-2, seed: int = 0) -> None:
        self._averaging = averaging
        self._delta_q = delta_q
        self._iteration = LyapunovIteration(map="ascent", delta_q=delta_q, seed=seed)
        self._average: Optional[float] = None

    def step(self, gradient: Callable[[Tensor], Tensor], here: Tensor) -> Optional[Sharpness]:
        """One iteration at the present parameters.

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

    def state_dict(self) -> dict[str, Any]:
        """The perturbation and the running average."""
        return {"iteration": self._iteration.state_dict(), "average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._iteration.load_state_dict(state["iteration"])
        self._average = state["average"]


class Governor:
    """Turns proposed learning rates into those that are used.

    The learning rate falls at once and rises by a bounded factor; it stays between a floor and a ceiling; without a
    usable proposal it stays as it is; and when the loss has risen over a window it is halved, to come back to what is
    proposed over the next window.

    Args:
        max_growth: The most by which the learning rate grows from one step to the next.
        min_lr: The floor.
        max_lr: The ceiling.
        window: Steps over which the loss is averaged to see whether it rises; 0 not to look at it.

    """

    def __init__(self, max_growth: float = 1.25, min_lr: float = 1e-6, max_lr: float = 10.0, window: int = 50) -> None:
        self._max_growth = max_growth
        self._min_lr, self._max_lr = min_lr, max_lr
        self._window = window
        self._losses: list[float] = []
        self.lr: Optional[float] = None
        self.caution = 1.0
        """The factor on what is proposed, below 1 after the loss has risen."""

    def admitted(self, proposal: Optional[float]) -> Optional[float]:
        """The learning rate that a proposal comes to, without using it; None where nothing was proposed yet."""
        if proposal is None or not (math.isfinite(proposal) and proposal > 0):
            return self.lr
        ceiling = math.inf if self.lr is None else self.lr * self._max_growth
        return min(max(min(proposal * self.caution, ceiling), self._min_lr), self._max_lr)

    def use(self, lr: float) -> None:
        """Take note of the learning rate of a step."""
        self.lr = lr
        if self._window:
            self.caution = min(1.0, self.caution * 2 ** (1 / self._window))

    def observe(self, loss: float) -> bool:
        """Take note of the loss of a step, and be careful if it has risen; whether it has."""
        if not self._window:
            return False
        self._losses.append(loss)
        del self._losses[: -2 * self._window]
        if math.isfinite(loss) and len(self._losses) < 2 * self._window:
            return False
        before, lately = (torch.tensor(part) for part in (self._losses[: -self._window], self._losses[-self._window :]))
        if math.isfinite(loss):
            noise = math.sqrt(float(before.var() + lately.var()) / self._window)
            if float(lately.mean() - before.mean()) <= 2 * noise:
                return False
        self.caution *= 0.5
        self._losses = []
        return True

    def state_dict(self) -> dict[str, Any]:
        """The learning rate, the caution, and the latest losses."""
        return {"lr": self.lr, "caution": self.caution, "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.lr, self.caution, self._losses = state["lr"], state["caution"], list(state["losses"])
