"""The first minimum of a loss along a line, by Brent's method on values that may be noisy.

Two things differ from a textbook's line search. It is the *first* minimum that is wanted, so the way there has to be
sampled as densely as the line bends. And losses carry rounding errors, so two values count as different only if they
differ by more than the noise: within it a parabola through three points has its vertex anywhere.
"""

import math
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

LossAlong = Callable[[Sequence[float]], Tensor]
"""The loss at some distances along a line, as a float64 vector."""


_GROWTH = 2.0
"""The factor by which a step grows until the loss rises."""


_MOST_EVALUATIONS = 100
"""The number of evaluations after which a search gives up: as many doublings span 30 orders of magnitude, more than
float64 resolves."""


_MODEL_ERROR = 0.1
"""How far the loss at the first step may be from the model of slope and curvature, in units of the fall that the slope
alone would bring."""


_DEVIATION = 0.1
"""How far a loss may be from the one that its neighbours let expect, in units of how much the loss varies among them.
If it is farther, the search looks in between. Of 831 random lines whose first dip is a tenth of the fall before it or
deeper, 0.3 misses the dip in 11, 0.1 and 0.05 in none; of shallower dips 0.1 misses a third more than 0.05, which takes
a sixth more evaluations."""


_NARROWEST = 1e-2
"""The width of an interval, in relation to its distance, below which the search does not look into it further."""


_SHORTEST = 1e-12
"""The distance, in relation to the one at which the search begins, below which it does not look."""


_GOLDEN = (3 - math.sqrt(5)) / 2
"""The smaller part of an interval that is divided in the golden ratio."""


@dataclass(frozen=True)
class LineSearch:
    """The first minimum that was found along a line, see `first_minimum`.

    Attributes:
        bracketed: Whether a minimum lies inside the range: the losses that were evaluated fall on the way to it and
            rise after it.
        step: The distance of the minimum if there is one, else that of the least loss that was evaluated.
        improvement: How far the loss there is below the loss at distance 0.
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
    """The first minimum of the loss in the positive direction, as far as the evaluated losses show.

    The search begins with a step over which the loss is what slope and curvature predict, or, without these, a
    parabola. From there it doubles the distance. Wherever a loss is not what the points before it let expect, the
    search looks in between, so that the points are as dense as the line bends. Between the two neighbours of the lowest
    point before the first rise, parabolas and golden sections then refine the minimum. A loss that is not finite counts
    as infinitely high.

    So none of the losses that were evaluated on the way to the minimum is higher than one before it. A dip between two
    points that shows in neither of them is missed: of 1,000 random lines, each a sum of a parabola and of sines whose
    frequencies and amplitudes span two decades, 66 had a shallower dip before the minimum that was found, but in none
    of them did the loss rise after that dip by a tenth of what it had fallen before (6 without the slope).

    Args:
        loss_along: The loss at distances along the line.
        start_loss: The loss at distance 0.
        guess: The first distance to look at.
        max_step: The largest distance to look at.
        slope: The modulus of the slope at distance 0, in the direction in which the loss falls. With it the first step
            is checked without further evaluations.
        curvature: The second derivative at distance 0; not used without the slope.
        tol: Relative accuracy of the step, as far as the noise allows.
        noise: Losses that differ by less than this count as equal.

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

    `_seen` holds all points in the order of their distances, `_path` those between which no further points are needed,
    and `_ahead` those beyond the path, the nearest one last.
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
        """Find a first step over which the loss is what its derivatives predict."""
        step = min(step, slope / abs(curvature)) if curvature else step
        shortest = _SHORTEST * step
        points: list[_Point] = []
        while len(points) < 2:
            if step < shortest:
                # However short the step, the loss is not near the one that was given for distance 0. No first step is
                # right then, and `refined` goes by the points alone.
                self._path, self._ahead = list(self._seen), []
                return
            point = self._at(step)
            predicted = self._start[1] - slope * step + curvature / 2 * step**2
            allowed = _MODEL_ERROR * slope * step
            error = abs(point[1] - predicted)
            if error <= allowed + self._noise:
                points.append(point)
                step /= 2  # a second point has to agree: an oscillating loss may pass through the first by chance
                continue
            self._ahead += [*points, point]
            points = []
            # The error of a second-order model grows with the cube of the step and the allowed error with the step
            # itself, so their ratio grows with its square. The bounds are for losses that are not smooth at this scale,
            # of which this says nothing.
            shorter = 0.9 * math.sqrt(allowed / error) if error < math.inf else 0.0
            step *= min(max(shorter, 0.1), 0.5)
        # `_reach` extrapolates from the last three points. At the start there are too few, so the model gives one on
        # the other side of it.
        self._path = [(-step, self._start[1] + slope * step + curvature / 2 * step**2), self._start, *points[::-1]]

    def begin_on_parabola(self, step: float) -> None:
        """Find a first step over which the loss is a parabola, and if that rises at once, go to its vertex only."""
        shortest = _SHORTEST * step
        while step >= shortest:
            quarter, half, whole = (self._at(part * step) for part in (0.25, 0.5, 1.0))
            if not self._is_near(quarter[1], [self._start, half, whole], quarter[0]):
                self._ahead += [whole, half, quarter]
                step /= 8  # so that all of the next three points are nearer than the nearest of these
            elif self._is_above(quarter, self._start):
                # The minimum, if there is one, is before the first point.
                vertex = _vertex(self._start, quarter, half)
                if not 0 < vertex < quarter[0]:
                    return  # the loss rises from the start on
                self._ahead += [whole, half, quarter]
                step = vertex
            else:
                self._path += [quarter, half, whole]
                return
        self._path, self._ahead = list(self._seen), []

    def walk(self, max_step: float) -> None:
        """Move on until a loss is higher than one before it."""
        while len(self._path) > 2 and not self._is_exhausted:
            last = self._path[-1]
            if _first_rise(self._path, self._noise) is not None or last[0] >= max_step:
                return
            while self._ahead and self._ahead[-1][0] <= last[0]:
                self._ahead.pop()
            # A point that the beginning has already paid for is taken instead of a new one, if it is not much farther.
            near = self._ahead and self._ahead[-1][0] <= 1.3 * _GROWTH * last[0]
            self._reach(self._ahead.pop() if near else self._at(min(_GROWTH * last[0], max_step)))

    def refined(self, tol: float) -> _Point | None:
        """The minimum before the first rise among all points; None if there is none."""
        minimum: _Point | None = None
        while True:
            # Refining evaluates new points, among which there may be an earlier rise, with the true first minimum.
            rise = _first_rise(self._seen, self._noise)
            if rise is None or (minimum is not None and rise[1][0] >= minimum[0]):
                return minimum
            if rise[1] == self._start:
                # The loss falls at the start and is higher at the nearest point, so the minimum is in between. If the
                # nearest point is higher by no more than the noise, no point before it could show a minimum.
                nearest = self._seen[1]
                is_lost = not self._is_above(nearest, self._start) or nearest[0] <= _SHORTEST * self._seen[-1][0]
                if is_lost or self._is_exhausted:
                    return None
                self._at(nearest[0] / _GROWTH)
            elif not self._is_above(self._start, rise[1]):
                return None  # a dip that is no deeper than the noise is one of the noise
            else:
                minimum = self._refine(*rise, tol)
                if self._is_exhausted:
                    return minimum

    def _reach(self, goal: _Point) -> None:
        """Extend the path to a point, through as many points in between as the bends of the line require."""
        while True:
            before, last = self._path[-2:]
            if self._is_near(goal[1], self._path[-3:], goal[0]):
                self._path.append(goal)
                return
            # A jump, as in the losses of half precision, stays a jump at every width, and would use up all evaluations.
            if self._is_exhausted or goal[0] - last[0] < _NARROWEST * last[0]:
                self._path.append(goal)
                return
            middle = self._at((last[0] + goal[0]) / 2)
            if self._is_near(middle[1], [before, last, goal], middle[0]):
                self._path.append(middle)
                if not self._is_above(middle, last):  # else the rise is found, and the goal lies beyond it
                    self._path.append(goal)
                return
            self._ahead.append(goal)
            goal = middle

    def _refine(self, left: _Point, middle: _Point, right: _Point, tol: float) -> _Point:
        """Brent's method: the vertex of the parabola through the best three points, or else a golden section.

        R. Brent, "Algorithms for minimization without derivatives", 1973, chapter 5. It differs in two things. The
        search begins with three points that enclose a minimum, so that the first step can already be a parabola's. And
        it ends where the noise does not let it go on.
        """
        low, high = left[0], right[0]
        best, second, third = middle, *sorted((left, right), key=lambda point: point[1])
        move = before = high - low
        while not self._is_exhausted:
            x, least = best[0], tol * best[0] / 2
            centre = (low + high) / 2
            # Both ends of the bracket are within twice `least` of the best point.
            if abs(x - centre) <= 2 * least - (high - low) / 2:
                break
            # The three best losses differ by noise alone, so that the parabola through them would be one of rounding
            # errors, and all further evaluations would be spent on moving the minimum at random.
            if second[0] != third[0] and max(second[1], third[1]) - best[1] <= self._noise:
                break
            vertex = _vertex(best, second, third)
            # A parabola is trusted if it stays in the bracket and its move is less than half the one before the last.
            # The second is what bounds the number of evaluations: moves that do not shrink, as on a loss that is not
            # smooth, give way to a golden section, which shrinks the bracket for certain.
            if low < vertex < high and abs(vertex - x) < abs(before) / 2:
                before, move = move, vertex - x
                # Next to an end of the bracket, whose loss is known, an evaluation would show nothing new.
                if min(vertex - low, high - vertex) < 2 * least:
                    move = math.copysign(least, centre - x)
            else:
                # Into the longer side, of which the golden ratio keeps the same part whichever end is dropped next.
                before = (high if x < centre else low) - x
                move = _GOLDEN * before
            # Over less than `least` the losses would differ by rounding only.
            point = self._at(x + (move if abs(move) >= least else math.copysign(least, move)))
            if point[1] <= best[1]:
                # The best point so far becomes the end of the bracket on the side that the minimum is not on.
                low, high = (x, high) if point[0] >= x else (low, x)
                best, second, third = point, best, second
            else:
                low, high = (point[0], high) if point[0] < x else (low, point[0])
                # A point that is worse than the best one still has its place in the next parabola, if it is better than
                # one of the other two, or these are not three different points.
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
        """Whether a loss is the one that points let expect, up to a share of how much the loss varies among them."""
        losses = [loss, *(point[1] for point in points)]
        extent = max(losses) - min(losses)
        return extent < math.inf and abs(loss - _interpolated(points, distance)) <= _DEVIATION * extent + self._noise


def _first_rise(points: Sequence[_Point], noise: float) -> tuple[_Point, _Point, _Point] | None:
    """The lowest point before the first rise, with the point before it and the one that is higher; None if none is.

    If the lowest point is the first one, it stands for the point before it too.
    """
    lowest = 0
    for index, point in enumerate(points):
        # Compared with the lowest so far and not with the last one: a slow rise, of less than the noise from each point
        # to the next, would else never be one.
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
    """The distance of the vertex of the parabola through three points; NaN if they are on a straight line."""
    (x, f), (y, g), (z, h) = first, second, third
    rise, other_rise = (x - y) * (f - h), (x - z) * (f - g)
    twice = 2 * (rise - other_rise)
    return x - ((x - y) * rise - (x - z) * other_rise) / twice if twice and math.isfinite(twice) else math.nan
