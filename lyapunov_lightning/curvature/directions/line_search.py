"""The first minimum of a loss along a line, by Brent's method on values that may be noisy."""

import math
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

LossAlong = Callable[[Sequence[float]], Tensor]
"""The loss at some distances along a line, as a float64 vector."""


_GROWTH = 2.0
"""By which factor a step grows until the loss rises."""


_MOST_EVALUATIONS = 100
"""At the end of which a search gives up; with the factor above it has then covered all that float64 can hold apart."""


_NEAR_MODEL = 0.1
"""By how much of what the slope brings the loss may be off slope and curvature for a first step to be short enough."""


_NEAR = 0.1
"""By how much of its own variation the loss may be off what its neighbours let expect for a search not to look between.
Of 831 random lines whose first dip has a tenth of the fall before it, 0.3 passes 11 by, 0.1 and 0.05 none; of the
shallower dips 0.1 passes a third more than 0.05, which takes a sixth more evaluations."""


_NARROWEST = 1e-2
"""A stretch of the line, in relation to the distance, that is not looked into further."""


_SHORTEST = 1e-12
"""In relation to where the search begins, a distance below which it does not look."""


_GOLDEN = (3 - math.sqrt(5)) / 2


@dataclass(frozen=True)
class LineSearch:
    """The first minimum that was seen along a line, see `first_minimum`.

    Attributes:
        bracketed: Whether a minimum lies inside the range: the losses that were evaluated fall on the way to it and
            rise behind it.
        step: Its distance if it does, else the distance of the least loss that was seen.
        improvement: How far the loss there is below that at distance 0.
        num_evaluations: Evaluations of the loss.

    """

    bracketed: bool
    step: float
    improvement: float
    num_evaluations: int


def first_minimum(
    loss_along: LossAlong,
    start_loss: float,
    guess: float,
    *,
    max_step: float,
    slope: float | None = None,
    curvature: float = 0.0,
    tol: float = 1e-5,
    noise: float = 0.0,
) -> LineSearch:
    """The first minimum of the loss in the positive direction, as far as the losses that are looked at tell.

    From a step over which the loss is what slope and curvature promise, or else a parabola, the search walks on by
    doubling. Wherever the loss is not as the points before let expect, it looks between, until it is; so the points lie
    as near to each other as the line bends. Between the two neighbours of the lowest point before the first rise the
    minimum is then refined by parabolas and golden sections. A loss that is not finite counts as one that is too far.

    So none of the losses that were evaluated on the way to the minimum is higher than one before it. A dip that lies
    between two points and shows in neither is passed by: of 1,000 random lines, sums of sines of frequencies and
    amplitudes over two decades and a parabola, 66 had a shallower dip before the minimum that was found, but none of
    them one behind which the loss rises by a tenth of what it had fallen (with the slope; 6 without it).

    Args:
        loss_along: The loss at distances along the line.
        start_loss: The loss at distance 0.
        guess: Where to begin.
        max_step: How far to go.
        slope: The modulus of the slope at distance 0, from where the loss falls. With it the first step is checked
            without further evaluations.
        curvature: The second derivative there; of no use without the slope.
        tol: Relative accuracy of the step, as far as the noise allows.
        noise: Losses that differ by less than this are taken for equal.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature.directions.line_search import first_minimum
        >>> wave = lambda distances: 1 - torch.tensor(distances, dtype=torch.float64).sin()
        >>> round(first_minimum(wave, 1.0, guess=0.1, max_step=100.0).step, 4)
        1.5708
        >>> fall = lambda distances: -torch.tensor(distances, dtype=torch.float64)
        >>> first_minimum(fall, 0.0, guess=0.1, max_step=100.0).bracketed
        False

    """
    search = _Search(loss_along, start_loss, noise)
    if not (0 < guess < math.inf and 0 < max_step < math.inf):
        return search.result(None)
    if slope:
        search.begin_on_model(min(guess, max_step), slope, curvature)
    else:
        search.begin_on_parabola(min(guess, max_step))
    search.walk(max_step)
    return search.result(search.refined(tol))


_Point = tuple[float, float]
"""A distance and the loss there."""


class _Search:
    """The points of a line search, and where it goes next.

    `_seen` are all points in the order of their distances, `_path` those among them between which the loss is known as
    well as it is going to be, and `_ahead` those further on, the nearest one last.
    """

    def __init__(self, loss_along: LossAlong, start_loss: float, noise: float) -> None:
        self._loss_along = loss_along
        self._noise = noise
        self._start: _Point = (0.0, start_loss)
        self._seen = [self._start]
        self._path = [self._start]
        self._ahead: list[_Point] = []

    @property
    def _count(self) -> int:
        return len(self._seen) - 1

    @property
    def _is_exhausted(self) -> bool:
        return self._count >= _MOST_EVALUATIONS

    def result(self, minimum: _Point | None) -> LineSearch:
        step, loss = min(self._seen, key=lambda point: point[1]) if minimum is None else minimum
        return LineSearch(minimum is not None, step, self._start[1] - loss, self._count)

    def begin_on_model(self, step: float, slope: float, curvature: float) -> None:
        """Go as far as the loss is what its derivatives promise, by a fraction of what the slope brings."""
        step = min(step, slope / abs(curvature)) if curvature else step
        shortest = _SHORTEST * step
        points: list[_Point] = []
        while len(points) < 2:
            if step < shortest:  # the start does not belong to the line
                self._path, self._ahead = list(self._seen), []
                return
            point = self._at(step)
            promised = self._start[1] - slope * step + curvature / 2 * step**2
            allowed = _NEAR_MODEL * slope * step
            error = abs(point[1] - promised)
            if error <= allowed + self._noise:
                points.append(point)
                step /= 2  # one point that is where it should be may be chance
                continue
            self._ahead += [*points, point]
            points = []
            # The error of a model of second order grows with the third power of the step, and the slope's part with it.
            shorter = 0.9 * math.sqrt(allowed / error) if error < math.inf else 0.0
            step *= min(max(shorter, 0.1), 0.5)
        # Behind the start the model takes the place of the points that a parabola needs.
        self._path = [(-step, self._start[1] + slope * step + curvature / 2 * step**2), self._start, *points[::-1]]

    def begin_on_parabola(self, step: float) -> None:
        """Go as far as the loss is a parabola, and where that rises at once, only to its vertex."""
        shortest = _SHORTEST * step
        while step >= shortest:
            quarter, half, whole = (self._at(part * step) for part in (0.25, 0.5, 1.0))
            if not self._is_near(quarter[1], [self._start, half, whole], quarter[0]):
                self._ahead += [whole, half, quarter]
                step /= 8
            elif self._is_above(quarter, self._start):
                vertex = _vertex(self._start, quarter, half)
                if not 0 < vertex < quarter[0]:
                    return
                self._ahead += [whole, half, quarter]
                step = vertex
            else:
                self._path += [quarter, half, whole]
                return
        self._path, self._ahead = list(self._seen), []

    def walk(self, max_step: float) -> None:
        """Go on to the first loss that is higher than a loss before."""
        while len(self._path) > 2 and not self._is_exhausted:
            last = self._path[-1]
            if _first_rise(self._path, self._noise) is not None or last[0] >= max_step:
                return
            while self._ahead and self._ahead[-1][0] <= last[0]:
                self._ahead.pop()
            near = self._ahead and self._ahead[-1][0] <= 1.3 * _GROWTH * last[0]
            self._reach(self._ahead.pop() if near else self._at(min(_GROWTH * last[0], max_step)))

    def refined(self, tol: float) -> _Point | None:
        """The minimum before the first rise of all that was seen; None if there is none."""
        minimum: _Point | None = None
        while True:
            rise = _first_rise(self._seen, self._noise)
            if rise is None or (minimum is not None and rise[1][0] >= minimum[0]):
                return minimum
            if rise[1] == self._start:
                nearest = self._seen[1]
                is_lost = not self._is_above(nearest, self._start) or nearest[0] <= _SHORTEST * self._seen[-1][0]
                if is_lost or self._is_exhausted:
                    return None
                self._at(nearest[0] / _GROWTH)
            elif not self._is_above(self._start, rise[1]):
                return None
            else:
                minimum = self._refine(*rise, tol)
                if self._is_exhausted:
                    return minimum

    def _reach(self, goal: _Point) -> None:
        """Take a point into the path, with those between that it takes to know the loss up to it."""
        while True:
            before, last = self._path[-2:]
            if self._is_near(goal[1], self._path[-3:], goal[0]):
                self._path.append(goal)
                return
            if self._is_exhausted or goal[0] - last[0] < _NARROWEST * last[0]:
                self._path.append(goal)
                return
            middle = self._at((last[0] + goal[0]) / 2)
            if self._is_near(middle[1], [before, last, goal], middle[0]):
                self._path.append(middle)
                if not self._is_above(middle, last):
                    self._path.append(goal)
                return
            self._ahead.append(goal)
            goal = middle

    def _refine(self, left: _Point, middle: _Point, right: _Point, tol: float) -> _Point:
        """Brent's method: the vertex of the parabola through the best three points, or else a golden section."""
        low, high = left[0], right[0]
        best, second, third = middle, *sorted((left, right), key=lambda point: point[1])
        move = before = high - low
        while not self._is_exhausted:
            x, least = best[0], tol * best[0] / 2
            centre = (low + high) / 2
            if abs(x - centre) <= 2 * least - (high - low) / 2:
                break
            if second[0] != third[0] and max(second[1], third[1]) - best[1] <= self._noise:
                break
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
        return best

    def _at(self, distance: float) -> _Point:
        loss = float(self._loss_along([distance])[0])
        point = distance, loss if math.isfinite(loss) else math.inf
        insort(self._seen, point)
        return point

    def _is_above(self, point: _Point, other: _Point) -> bool:
        return point[1] > other[1] + self._noise

    def _is_near(self, loss: float, points: Sequence[_Point], distance: float) -> bool:
        """Whether a loss is the one that points promise, but for a share of what the loss varies among them."""
        losses = [loss, *(point[1] for point in points)]
        extent = max(losses) - min(losses)
        return extent < math.inf and abs(loss - _interpolated(points, distance)) <= _NEAR * extent + self._noise


def _first_rise(points: Sequence[_Point], noise: float) -> tuple[_Point, _Point, _Point] | None:
    """The lowest point before the first one that is higher, between its neighbours; None if no point is higher.

    The lowest one is the first point itself where that has nothing before it.
    """
    lowest = 0
    for index, point in enumerate(points):
        if point[1] > points[lowest][1] + noise:
            return points[max(lowest - 1, 0)], points[lowest], point
        if point[1] < points[lowest][1]:
            lowest = index
    return None


def _interpolated(points: Sequence[_Point], distance: float) -> float:
    """The value of the polynomial through some points."""
    return sum(
        loss * math.prod((distance - other) / (where - other) for other, _ in points if other != where)
        for where, loss in points
    )


def _vertex(first: _Point, second: _Point, third: _Point) -> float:
    """Where the parabola through three points has its vertex; NaN if there is none."""
    (x, f), (y, g), (z, h) = first, second, third
    rise, other_rise = (x - y) * (f - h), (x - z) * (f - g)
    twice = 2 * (rise - other_rise)
    return x - ((x - y) * rise - (x - z) * other_rise) / twice if twice and math.isfinite(twice) else math.nan
