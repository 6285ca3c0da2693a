r"""The loss along a line, beside the quadratic that its derivatives promise.

Along a unit vector :math:`u` that points downhill, the loss :math:`t \mapsto L(\theta + tu)` begins with the slope
:math:`-|g^\top u|` and the curvature :math:`u^\top Hu`. How long that lasts is seen in two ways: the curvature of a
quadratic fitted to the loss over a wider window, and the distance at which the loss is least, which a quadratic puts
at slope over curvature and, where the curvature is negative, nowhere ("Negative eigenvalues of the Hessian in deep
neural networks", secs. 2.3 and 2.4).

Losses carry rounding errors, in float32 one of about 1e-7 of the loss, and the differences that matter here are often
smaller. So the fit comes with its standard error, and the search for a minimum takes two losses for equal that are
nearer to each other than the noise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LossAlong = Callable[[Sequence[float]], Tensor]
"""The loss at some distances along a line, as a float64 vector."""

_GROWTH = 2.0
"""By which factor a step grows until the loss rises, or shrinks until it falls."""

_MOST_EVALUATIONS = 100
"""At the end of which a search gives up; with the factor above it has then covered all that float64 can hold apart."""

_DISTINCT = 4.0
"""How many standard deviations of the noise apart two losses are taken to differ: a search makes many comparisons."""

_NOISE_POINTS = 9
"""Evaluations that it takes to measure the noise: five fourth differences."""

_GOLDEN = (3 - math.sqrt(5)) / 2


@dataclass(frozen=True)
class NoisyLoss:
    """A loss and how exactly it is known.

    Attributes:
        value: The loss.
        noise: The standard deviation of its rounding errors.
        num_evaluations: Evaluations of the loss that it took.

    """

    value: float
    noise: float
    num_evaluations: int


@dataclass(frozen=True)
class QuadraticFit:
    """A quadratic fitted to the loss along a line.

    Attributes:
        curvature: Its second derivative, in the unit of the eigenvalues.
        error: The standard error of the curvature that the noise of the losses causes.

    """

    curvature: float
    error: float


@dataclass(frozen=True)
class Window:
    """The loss over a piece of a line.

    Attributes:
        scale: The window's half width in the unit in which it was asked for.
        distances: Shape ``(m,)``: where the loss was evaluated.
        losses: Shape ``(m,)``: the loss there.
        model: Shape ``(m,)``: the quadratic with the slope and the curvature of the loss at distance 0.
        fit: The quadratic fitted to the losses.

    """

    scale: float
    distances: Tensor
    losses: Tensor
    model: Tensor
    fit: QuadraticFit

    @property
    def gap(self) -> float:
        """The largest distance between the loss and the model."""
        return float((self.losses - self.model).abs().max())


@dataclass(frozen=True)
class LineSearch:
    """The first minimum along a line.

    Attributes:
        bracketed: Whether a minimum lies inside the range, with higher losses at both sides of it.
        step: Its distance if it does, else the distance of the least loss that was seen.
        improvement: How far the loss there is below that at distance 0.
        num_evaluations: Evaluations of the loss.

    """

    bracketed: bool
    step: float
    improvement: float
    num_evaluations: int


@dataclass(frozen=True)
class LineScan:
    """All that is looked at along one line.

    Attributes:
        windows: The loss over each of the windows.
        search: The first minimum.

    """

    windows: tuple[Window, ...]
    search: LineSearch

    @property
    def num_evaluations(self) -> int:
        """Evaluations of the loss."""
        return self.search.num_evaluations + sum(len(window.distances) for window in self.windows)


def scan_line(
    loss_along: LossAlong,
    start: NoisyLoss,
    slope: float,
    curvature: float,
    *,
    scales: Sequence[float],
    unit: float = 1.0,
    points: int = 11,
    max_bracket: float = 1000.0,
) -> LineScan:
    """Look at the loss along a line that goes downhill.

    Args:
        loss_along: The loss at distances along the line.
        start: The loss at distance 0.
        slope: The modulus of the slope at distance 0; the loss falls in the positive direction.
        curvature: The second derivative at distance 0.
        scales: Half widths of the windows, in multiples of `unit`.
        unit: A distance; windows of no width are left out.
        points: Evaluations in each window, from one end to the other.
        max_bracket: How far to search for a minimum, in multiples of slope over modulus of the curvature: where a
            quadratic of positive curvature has its minimum.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature.landscape import NoisyLoss, scan_line
        >>> def loss_along(distances):
        ...     t = torch.tensor(distances, dtype=torch.float64)
        ...     return 3 - t + 2 * t**2
        >>> scan = scan_line(loss_along, NoisyLoss(3.0, 0.0, 1), slope=1.0, curvature=4.0, scales=[0.1])
        >>> round(scan.search.step, 6), round(scan.windows[0].fit.curvature, 6)
        (0.25, 4.0)

    """
    widths = [(scale, scale * unit) for scale in scales if scale * unit > 0]
    distances = [torch.linspace(-width, width, points, dtype=torch.float64) for _, width in widths]
    flat = loss_along(torch.cat(distances).tolist()) if widths else torch.zeros(0, dtype=torch.float64)
    losses = flat.split(points) if widths else ()
    windows = tuple(
        Window(
            scale=scale,
            distances=where,
            losses=values,
            model=start.value - slope * where + curvature / 2 * where.square(),
            fit=quadratic_fit(where, values, noise=start.noise),
        )
        for (scale, _), where, values in zip(widths, distances, losses, strict=True)
    )
    natural = slope / abs(curvature) if curvature else slope
    search = first_minimum(
        loss_along, start.value, natural, max_step=max_bracket * natural, noise=_DISTINCT * start.noise
    )
    return LineScan(windows, search)


def quadratic_fit(distances: Tensor, losses: Tensor, *, noise: float = 0.0) -> QuadraticFit:
    """The curvature of the quadratic that is nearest to the losses in least squares.

    Args:
        distances: Shape ``(m,)``, with at least 3 different ones.
        losses: Shape ``(m,)``.
        noise: Standard deviation of the losses.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature.landscape import quadratic_fit
        >>> t = torch.linspace(-1, 1, 5, dtype=torch.float64)
        >>> round(quadratic_fit(t, 1 - t + 3 * t**2).curvature, 6)
        6.0

    """
    unit = float(distances.abs().max())
    powers = torch.stack([torch.ones_like(distances), distances / unit, (distances / unit).square()], dim=1)
    row = torch.linalg.pinv(powers)[2] * (2 / unit**2)
    middle = losses[distances.abs().argmin()]  # the row is orthogonal to constants, but for rounding
    return QuadraticFit(float(row @ (losses - middle)), noise * float(row.norm()))


def noisy_loss(loss_along: LossAlong, spacing: float, *, precision: float) -> NoisyLoss:
    """The loss at distance 0 with the size of its rounding errors, from differences of its values at nearby points.

    Over short distances the fourth differences of the loss itself all but vanish, and those of its errors stay (J. Moré
    and S. Wild, "Estimating computational noise", SIAM J. Sci. Comput. 33, 2011). Errors that happen to be the same at
    all points do not show, so the noise is at least one unit in the last place of the loss.

    Args:
        loss_along: The loss at distances along a line.
        spacing: The distance between two points, small beside those over which the loss bends.
        precision: The last place in relation to the loss, such as ``torch.finfo(torch.float32).eps``.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature.landscape import noisy_loss
        >>> rough = lambda distances: (torch.tensor(distances, dtype=torch.float64) * 5e3).round() / 1e3
        >>> 1e-4 < noisy_loss(rough, 1.1e-4, precision=1e-16).noise < 1e-3
        True

    """
    losses = loss_along([spacing * index for index in range(_NOISE_POINTS)])
    fourth = losses.diff(n=4).square().mean() / 70  # the sum of the squares of 1, -4, 6, -4, 1
    value = float(losses[0])
    return NoisyLoss(value, max(float(fourth.sqrt()), precision * abs(value)), len(losses))


def first_minimum(
    loss_along: LossAlong, start_loss: float, guess: float, *, max_step: float, tol: float = 1e-5, noise: float = 0.0
) -> LineSearch:
    """The first minimum of the loss in the positive direction, by a greedy search.

    From the guess the step doubles while the loss falls, until it rises; if it is higher there than at the start, the
    step is halved until it is not. Between the two neighbours of the lowest point the minimum is then refined by
    parabolas and golden sections. A loss that is not finite counts as one that is too far.

    Args:
        loss_along: The loss at distances along the line.
        start_loss: The loss at distance 0.
        guess: Where to begin.
        max_step: How far to go.
        tol: Relative accuracy of the step, as far as the noise allows.
        noise: Losses that differ by less than this are taken for equal.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature.landscape import first_minimum
        >>> wave = lambda distances: 1 - torch.tensor(distances, dtype=torch.float64).sin()
        >>> round(first_minimum(wave, 1.0, guess=0.1, max_step=100.0).step, 4)
        1.5708
        >>> fall = lambda distances: -torch.tensor(distances, dtype=torch.float64)
        >>> first_minimum(fall, 0.0, guess=0.1, max_step=100.0).bracketed
        False

    """
    search = _Search(loss_along, start_loss, noise)
    if not (0 < guess < math.inf and 0 < max_step < math.inf):
        return search.result(bracketed=False)
    bracket = search.bracket(min(guess, max_step), max_step)
    if bracket is not None:
        search.refine(*bracket, tol)
    return search.result(bracketed=bracket is not None)


_Point = tuple[float, float]
"""A distance and the loss there."""


class _Search:
    def __init__(self, loss_along: LossAlong, start_loss: float, noise: float) -> None:
        self._loss_along = loss_along
        self._start: _Point = (0.0, start_loss)
        self._noise = noise
        self._best = self._start
        self._count = 0

    def result(self, *, bracketed: bool) -> LineSearch:
        step, loss = self._best
        return LineSearch(bracketed, step, self._start[1] - loss, self._count)

    def bracket(self, step: float, max_step: float) -> tuple[_Point, _Point, _Point] | None:
        """Three points of which the middle one is the lowest, by more than the noise; None if there are none."""
        point = self._at(step)
        while self._is_above(point, self._start):
            outer, point = point, self._at(point[0] / _GROWTH)
            if self._is_above(self._start, point):
                return self._start, point, outer
            if self._count == _MOST_EVALUATIONS:
                return None
        left, middle = self._start, point
        while middle[0] < max_step and point[0] < max_step and self._count < _MOST_EVALUATIONS:
            point = self._at(min(point[0] * _GROWTH, max_step))
            if self._is_above(point, middle):
                return (left, middle, point) if self._is_above(self._start, middle) else None
            if point[1] < middle[1]:
                left, middle = middle, point
        return None

    def refine(self, left: _Point, middle: _Point, right: _Point, tol: float) -> None:
        """Brent's method: the vertex of the parabola through the best three points, or else a golden section."""
        low, high = left[0], right[0]
        best, second, third = middle, *sorted((left, right), key=lambda point: point[1])
        move = before = high - low
        while self._count < _MOST_EVALUATIONS:
            x, least = best[0], tol * best[0] / 2
            centre = (low + high) / 2
            if abs(x - centre) <= 2 * least - (high - low) / 2:
                return
            if second[0] != third[0] and max(second[1], third[1]) - best[1] <= self._noise:
                return
            vertex = _vertex(best, second, third)
            if low < vertex < high and abs(vertex - x) < abs(before) / 2:
                before, move = move, vertex - x
                if min(vertex - low, high - vertex) < 2 * least:
                    move = math.copysign(least, centre - x)
            else:
                before = (high if x < centre else low) - x
                move = _GOLDEN * before
            point = self._at(x + (move if abs(move) >= least else math.copysign(least, move)))
            if point[1] <= best[1]:
                low, high = (x, high) if point[0] >= x else (low, x)
                best, second, third = point, best, second
            else:
                low, high = (point[0], high) if point[0] < x else (low, point[0])
                if point[1] <= second[1] or second[0] == x:
                    second, third = point, second
                elif point[1] <= third[1] or third[0] in (x, second[0]):
                    third = point

    def _at(self, distance: float) -> _Point:
        self._count += 1
        loss = float(self._loss_along([distance])[0])
        point = distance, loss if math.isfinite(loss) else math.inf
        self._best = min(self._best, point, key=lambda point: point[1])
        return point

    def _is_above(self, point: _Point, other: _Point) -> bool:
        return point[1] > other[1] + self._noise


def _vertex(first: _Point, second: _Point, third: _Point) -> float:
    """Where the parabola through three points has its vertex; NaN if there is none."""
    (x, f), (y, g), (z, h) = first, second, third
    rise, other_rise = (x - y) * (f - h), (x - z) * (f - g)
    twice = 2 * (rise - other_rise)
    return x - ((x - y) * rise - (x - z) * other_rise) / twice if twice and math.isfinite(twice) else math.nan
