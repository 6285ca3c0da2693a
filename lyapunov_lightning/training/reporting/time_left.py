"""How long a search for eigenvalues may still take.

When a search ends is not known before it does. Two things are: the most products that it may spend, and how its
residuals have fallen so far. The one is a bound, which most searches end far below; the other a guess, which an
eigenvalue that comes up late makes wrong. So both are told, and each is called what it is.
"""

import math
import time
from collections.abc import Callable, Sequence

_POINTS = 6
"""Looks at the residuals whose trend counts. In the middle of 64 searches, for 1 to 10 + 3 pairs of small networks,
there was a trend in 54. What it said was left lay between 0.4 and 5 times what was, in four of five, and was 0.9 times
that in the median; the bound on all products was 7 times what they took."""


def products_by_trend(excess: Sequence[tuple[int, float]]) -> int | None:
    """After how many products in all the worst residual meets its tolerance, if it goes on to fall as it has.

    Args:
        excess: For some numbers of products how many times its tolerance the worst residual was.

    Returns:
        The number of products; None where there is no trend yet, or the tolerance is met already.

    """
    points = [(count, math.log(times)) for count, times in excess[-_POINTS:] if times > 0]
    if len(points) < 3 or points[-1][1] <= 0:
        return None
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    if slope >= 0:
        return None
    last, height = points[-1]
    return last + math.ceil(round(height / -slope, 6))  # or rounding would be a product more


class Clock:
    """The time that products take, batch by batch, and what it says of those to come.

    Args:
        num_batches: How many batches each product goes through.
        now: The clock.

    """

    def __init__(self, num_batches: int, now: Callable[[], float] = time.perf_counter) -> None:
        self._num_batches = num_batches
        self._now = now
        self._started = now()
        self._products = 0
        self._batch = 0

    def begin_product(self) -> None:
        """A product begins; the one before it is done."""
        self._products += 1
        self._batch = 0

    def at_batch(self, place: int) -> None:
        """The product has got to this batch."""
        self._batch = place

    def told(self, most: int, trend: int | None = None) -> str:
        """Where the present product is, and how many more there may be.

        Args:
            most: How many products are left at most, the present one among them.
            trend: How many are left by the trend, if there is one; as many as `most` where the number is known.

        """
        done = max(self._products - 1, 0) + self._batch / self._num_batches
        each = (self._now() - self._started) / done if done else math.inf
        part = self._batch / self._num_batches
        where = f"batch {self._batch + 1} of {self._num_batches}; " if self._num_batches > 1 else ""
        longest = _span((most - part) * each)
        if trend == most:
            return f"{where}{most} more{_after(longest)}"
        if trend is None or not 0 < trend < most:
            return f"{where}at most {most} more{_after(longest, 'up to ')}"
        shortest = _span((trend - part) * each)
        both = "" if shortest is None else f": about {shortest}, at most {longest} left"
        return f"{where}about {trend} more by the trend, at most {most}{both}"


def _after(span: str | None, how: str = "") -> str:
    return "" if span is None else f": {how}{span} left"


def _span(seconds: float) -> str | None:
    """A time in the unit that suits it; None for one that is not known."""
    if not math.isfinite(seconds):
        return None
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 9.95 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
