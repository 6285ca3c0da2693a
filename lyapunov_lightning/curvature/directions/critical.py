r"""The critical sharpness: how far along an update the loss goes before it is back where it began.

With :math:`u` the update that an optimizer makes at learning rate 1, the critical learning rate :math:`\eta_c` is the
smallest one with :math:`L(\theta + \eta_c u) > L(\theta)`, and the critical sharpness is
:math:`\lambda_c = 2/\eta_c` ("A scalable measure of loss landscape curvature for analyzing the training dynamics of
LLMs", 2026). On a quadratic, :math:`\lambda_c = u^\top Hu / (-g^\top u)`: for gradient descent the curvature
:math:`g^\top Hg/g^\top g` along the gradient. It takes values of the loss and no derivative.

The rise of the loss over :math:`\eta` is a straight line in :math:`\eta` as long as the loss is a parabola. So the
search interpolates that line, and bisects only where the loss is none.
"""

import math
from bisect import insort
from dataclasses import dataclass
from typing import Any

from lyapunov_lightning.curvature.arguments import check_positive
from lyapunov_lightning.curvature.directions.line_search import LossAlong
from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError

_FARTHEST = 2.0**20
"""The largest factor, up and down, between where a search begins and where it looks."""

_LEAP, _LEAP_IN_NOISE = 4.0, 16.0
"""The factor to the next point where the losses do not show how far the crossing is, and where all are rounding."""

_DISTINCT_LAST_PLACES = 4.0
"""How many units in the last place make a loss higher than another: a mean over batches is rounded several times."""

_LINEAR, _NEARBY = 0.03, 0.1
"""By which share two rises may differ from being proportional to the distance, and what share of the loss the nearer
one may be, for the loss to rise from the very beginning. Far out, losses rise in proportion too."""

_SLOPE_FROM = 1.1
"""How far from the crossing, as a factor, a point has to be to show the slope there and not the noise."""

_MOST_EVALUATIONS = 40
"""A search gives up after this many."""


@dataclass(frozen=True)
class CriticalEstimate:
    """What one search has found.

    Attributes:
        eta: The critical learning rate; None where the loss does not rise within 2^20 times the distance at which the
            search began, where it rises from the very beginning, and where it falls by no more than its rounding.
        error: The relative error of `eta`, and to first order of `sharpness`: half the width of the bracket, and what
            the rounding of the losses makes; infinite without `eta`.
        converged: Whether the error is within the tolerance.
        num_evaluations: Evaluations of the loss.

    """

    eta: float | None
    error: float
    converged: bool
    num_evaluations: int

    @property
    def sharpness(self) -> float | None:
        """The critical sharpness ``2 / eta``."""
        return None if self.eta is None else 2 / self.eta


class CriticalSharpness:
    """The critical sharpness, followed through a training: each search begins where the last one ended.

    Where the loss rises, falls and rises again along the update, the crossing is one between two points that were
    looked at, and not always the first one.

    Args:
        tol: Relative accuracy.

    Raises:
        ValueError: If `tol` is not positive.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature.directions.critical import CriticalSharpness
        >>> def losses_along(distances):  # the slope is -1 and the curvature 8
        ...     eta = torch.tensor(distances, dtype=torch.float64)
        ...     return 3 - eta + 4 * eta**2
        >>> found = CriticalSharpness().measure(losses_along, 1e-2)
        >>> abs(found.sharpness / 8 - 1) < 0.02, found.converged
        (True, True)

    """

    def __init__(self, tol: float = 2e-2) -> None:
        check_positive("tol", tol)
        self._tol = tol
        self._eta: float | None = None

    def measure(self, losses_along: LossAlong, start: float, *, precision: float = 0.0) -> CriticalEstimate:
        """Search along an update.

        Args:
            losses_along: The loss at multiples of the update at learning rate 1.
            start: Where the first search begins, such as the learning rate. The later ones begin at the last result.
            precision: The last place of a loss in relation to it, such as ``torch.finfo(torch.float32).eps``.

        Raises:
            NonFiniteCurvatureError: If the loss is not finite where the update begins.

        """
        search = _Search(losses_along, start if self._eta is None else self._eta, precision, self._tol)
        found = search.run()
        if found.eta is not None:
            self._eta = found.eta
        return found

    def state_dict(self) -> dict[str, Any]:
        """The last critical learning rate."""
        return {"eta": self._eta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`."""
        self._eta = None if state["eta"] is None else float(state["eta"])


_Point = tuple[float, float]
"""A learning rate, and the loss there above that at the start; infinite where the loss is not finite."""


class _Search:
    """The points of a search, in the order of their learning rates, and where it goes next."""

    def __init__(self, losses_along: LossAlong, start: float, precision: float, tol: float) -> None:
        self._losses_along = losses_along
        self._start = start
        self._tol = tol
        base, first = map(float, losses_along([0.0, start]))
        if not math.isfinite(base):
            raise NonFiniteCurvatureError(f"The loss is {base}, which is not finite, where the update begins.")
        self._base = base
        self._noise = _DISTINCT_LAST_PLACES * precision * abs(base)
        self._points: list[_Point] = []
        self._count = 2
        self._keep(start, first)

    def run(self) -> CriticalEstimate:
        wide = (1 + 1.5 * self._tol) ** 2  # what one more point in the middle makes narrow enough, with room for noise
        before: float | None = None
        while self._count < _MOST_EVALUATIONS:
            low, high = self._bracket()
            if high is None:
                assert low is not None  # there is at least one point
                eta = self._further_up(low)
            elif low is None:
                if self._is_uphill():
                    break
                eta = self._further_down(high)
            elif high[0] / low[0] > wide:
                width = math.log(high[0] / low[0])
                # Interpolation may cut off a sliver of the bracket at every point, where the loss is no parabola
                # (ReLU, a spike): then bisect once, so that the width halves with every two points at least.
                is_slow = before is not None and width > before / 2
                eta = math.sqrt(low[0] * high[0]) if is_slow else self._between(low, high)
                before = None if is_slow else width
            elif self._has_fallen(low):
                return self._refined(low, high)
            else:
                eta = low[0] / 2  # the middle of the dip, where the loss is least
                if self._points[0][0] <= eta:
                    break  # what there is of a dip is lost in the rounding
            if not self._start / _FARTHEST <= eta <= self._start * _FARTHEST:
                break
            self._see(eta)
        return CriticalEstimate(None, math.inf, False, self._count)

    def _keep(self, eta: float, loss: float) -> _Point:
        point = eta, loss - self._base if math.isfinite(loss) else math.inf
        insort(self._points, point)
        return point

    def _see(self, eta: float) -> _Point:
        self._count += 1
        return self._keep(eta, float(self._losses_along([eta])[0]))

    def _is_risen(self, point: _Point) -> bool:
        return point[1] > self._noise

    def _has_fallen(self, low: _Point) -> bool:
        """Whether the loss was clearly lower before it rose."""
        return any(point[1] < -self._noise for point in self._points if point[0] <= low[0])

    def _bracket(self) -> tuple[_Point | None, _Point | None]:
        """The first point at which the loss has risen, and the one before it."""
        for place, point in enumerate(self._points):
            if self._is_risen(point):
                return (self._points[place - 1] if place else None), point
        return self._points[-1], None

    def _is_uphill(self) -> bool:
        """Whether the loss rises from the very beginning."""
        if len(self._points) < 2:
            return False
        (near, rise), (far, higher) = self._points[:2]
        is_linear = abs(higher / far - rise / near) <= _LINEAR * rise / near
        return is_linear and rise <= _NEARBY * abs(self._base)

    def _further_up(self, low: _Point) -> float:
        if len(self._points) == 1:
            return low[0] * 2  # also in noise, which is at the crossing too, where the last one was
        # Where all is rounding, the losses show nothing, and the crossing may be many orders of magnitude away.
        if all(abs(rise) <= self._noise for _, rise in self._points):
            return low[0] * _LEAP_IN_NOISE
        if abs(low[1]) <= self._noise:
            return low[0] * 2
        crossing = self._expected(*self._points[-2:])
        if crossing is None or crossing <= low[0]:
            return low[0] * _LEAP
        return min(crossing * (1 + self._tol), low[0] * _LEAP)

    def _further_down(self, high: _Point) -> float:
        if len(self._points) == 1:
            return high[0] / 2
        crossing = self._expected(*self._points[:2])
        if crossing is None or crossing >= high[0]:
            return high[0] / _LEAP
        return max(crossing / (1 + self._tol), high[0] / _LEAP)

    def _expected(self, first: _Point, second: _Point) -> float | None:
        """The crossing beyond two points; None where they are so near each other that they failed to reach one."""
        # Points on a search's way out are a factor of 2 or more apart, unless a step to an expected crossing fell short
        # of it: extrapolated from two such neighbours, the next one could fall short again and again.
        return _crossing(first, second) if second[0] > 1.9 * first[0] else None

    def _between(self, low: _Point, high: _Point) -> float:
        """A point next to the expected crossing, on the side on which more of the bracket is cut off."""
        middle = math.sqrt(low[0] * high[0])
        crossing = self._interpolated(low, high)
        if crossing is None:
            return middle
        # Not at the crossing itself, where rounding would decide which end of the bracket the point replaces: beyond it
        # by the tolerance it replaces the far one, and one more evaluation closes the bracket.
        return crossing * (1 + self._tol) if crossing < middle else crossing / (1 + self._tol)

    def _interpolated(self, low: _Point, high: _Point) -> float | None:
        """The crossing by inverse interpolation of the rise over the distance; None if it is not in the bracket."""
        others = [point for point in self._points if point not in (low, high) and math.isfinite(point[1])]
        if others and math.isfinite(high[1]):
            third = min(others, key=lambda point: abs(math.log(point[0] * point[0] / (low[0] * high[0]))))
            etas = [low[0], high[0], third[0]]
            # η as a quadratic function of rise/η, at 0: exact for a parabola, and one order better for what is nearly
            # one.
            ratios = [rise / eta for eta, rise in (low, high, third)]
            if len(set(ratios)) == 3:
                inverse = sum(
                    eta * math.prod(-other / (ratio - other) for other in ratios if other != ratio)
                    for eta, ratio in zip(etas, ratios, strict=True)
                )
                if low[0] < inverse < high[0]:
                    return inverse
        crossing = _crossing(low, high)
        return crossing if crossing is not None and low[0] < crossing < high[0] else None

    def _refined(self, low: _Point, high: _Point) -> CriticalEstimate:
        """The middle of the bracket, once a point there has halved it and shown what noise there is."""
        middle = self._see(math.sqrt(low[0] * high[0]))
        noise = self._noise
        # Over a bracket of a few per cent the rise is a straight line, so what the middle is off it by is noise: more
        # than a few last places where kernels sum in another order at each call.
        if math.isfinite(high[1]):
            share = (middle[0] - low[0]) / (high[0] - low[0])
            noise = max(noise, abs(middle[1] - low[1] - share * (high[1] - low[1])))
        low, high = (low, middle) if self._is_risen(middle) else (middle, high)
        eta = math.sqrt(low[0] * high[0])
        error = math.sqrt(high[0] / low[0]) - 1 + noise / self._steepness(eta, low, high)
        return CriticalEstimate(eta, error, error <= self._tol, self._count)

    def _steepness(self, eta: float, low: _Point, high: _Point) -> float:
        """How much the loss changes at the crossing for a relative change of the learning rate by 1."""
        far = [
            point
            for point in self._points
            if math.isfinite(point[1])
            and not eta / _SLOPE_FROM < point[0] < eta * _SLOPE_FROM
            and abs(point[1]) > self._noise
        ]
        if far:
            other, rise = min(far, key=lambda point: abs(math.log(point[0] / eta)))
            steepness = rise / other * eta**2 / (other - eta)
            return max(steepness, 0.0) or math.nan
        return (high[1] - low[1]) / (high[0] - low[0]) * eta


def _crossing(first: _Point, second: _Point) -> float | None:
    """Where the parabola through the start and two points is as high as at the start; None if it does not turn up."""
    (near, rise), (far, higher) = first, second
    if not (math.isfinite(rise) and math.isfinite(higher)):
        return None
    # The rise over the distance is -s + b·η/2 on a parabola: a straight line in η, whose zero is the crossing.
    slope, bend = rise / near, (higher / far - rise / near) / (far - near)
    crossing = near - slope / bend if bend > 0 else math.nan
    return crossing if crossing > 0 else None
