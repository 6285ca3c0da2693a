"""One measurement as the diagnosis sees it, and the learning rate at the limit that several of them name together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

LIMIT_FACTORS = (0.45, 5.0)
"""Between these, in units of the one that is named, the learning rate at the limit lies in four of five runs. They come
from the sweeps in `benchmarks/verdicts`, where the largest usable learning rate is known, as do the two that follow."""

FURTHEST = 12.0
"""How many times its own learning rate a run may name at most. From further below the curvature to come is not seen:
without a bound one in nine was named more than three times too high, with it one in thirty."""

_BORNE = 1.5
"""How many times its own learning rate is named for a run that gets on though its curvature is beyond the limit: the
measured limit is refuted, and as a rule such runs bore 2.3 times as much."""

NORMAL_SPREAD = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""

FEWEST = 3
"""How many measurements it takes to judge a run."""

_LAST_PART, _FEWEST_OF_PART = 1 / 3, 5
"""The share of the measurements that name the limit, since curvature moves, and how many it takes not to take all."""

_MANY, _CLOSE, _FAR_APART = 10, 1.5, 3.0
"""How many measurements make a limit sure, up to what factor they agree, and from what factor on they do not."""


@dataclass(frozen=True)
class Reading:
    """A measurement of the stability ratio, at the learning rate of its own step.

    Attributes:
        step: The optimizer step before which it was made.
        ratio: The stability ratio, 1 at the edge; None if it is not known.
        learning_rate: The one of this step, the highest of the parameter groups.
        converged: Whether the measurement met its tolerance.
        step_ratio: The ratio of this one measurement by itself, where `ratio` is averaged over several.
        eigenvalue_ratio: That of the eigenvalue, where it was measured.
        noise_ratio: What noise does to the progress of a step: the rise of the loss by second order over the fall by
            first order, expected of fresh data. At 1 a step makes no progress; at 0.5 a single step makes the most.
        clipping: The share of the gradient's length that clipping left; 1 if nothing was clipped.
        judged: Whether the ratio may be judged; not while the moments of an Adam have not settled.

    """

    step: int
    ratio: float | None
    learning_rate: float | None = None
    converged: bool = True
    step_ratio: float | None = None
    eigenvalue_ratio: float | None = None
    noise_ratio: float | None = None
    clipping: float | None = None
    judged: bool = True

    @property
    def value(self) -> float:
        """The ratio of a reading that has one."""
        assert self.ratio is not None
        return self.ratio

    @property
    def single(self) -> float:
        """The ratio of this measurement by itself, of a reading that has one."""
        return self.value if self.step_ratio is None else self.step_ratio

    @property
    def learning_rate_limit(self) -> float | None:
        """The learning rate at which this curvature would be at the limit; None if no positive one would be."""
        # For every optimizer of `stability` the limit on the curvature is in inverse proportion to the learning rate.
        if self.ratio is None or self.learning_rate is None or not (self.ratio > 0 and self.learning_rate > 0):
            return None
        return self.learning_rate / self.ratio


def last_part(readings: Sequence[Reading]) -> Sequence[Reading]:
    """The last third of the readings, or all if they are few."""
    count = round(_LAST_PART * len(readings))
    return readings[-count:] if count >= _FEWEST_OF_PART else readings


def learning_rate_limit(readings: Sequence[Reading], *, is_suffering: bool = False) -> float | None:
    """The learning rate at the limit, from what each of the readings names.

    The geometric mean of the median of the first half of them and the median of all. Networks come to places whose
    curvature fits their rate: trained at an eighth of the largest usable rate they sharpen until that eighth is at the
    limit, so that what most readings name is the present rate, whatever it is. The flatter places that a run has seen
    on its way show what a larger rate could have met, and alone would be too hopeful; not those of the second half,
    where a network that has learned its data is flat. Of the sweeps in `benchmarks/verdicts` this mean came nearest to
    the largest usable rates; that of the flattest early place and the lower quartile named one in eleven more than
    three times too high.

    A run that gets on bears its own learning rate, whatever was measured, and what it says of one that is far larger is
    not believed.

    Args:
        readings: The readings.
        is_suffering: Whether the run shows that its rate is too large. Then it has not come to where the curvature fits
            its rate, and the median alone is named.

    """
    found = _limits(readings)
    if not found:
        return None
    middle = median(found)
    if is_suffering:
        return middle
    limit = math.sqrt(median(found[: (len(found) + 1) // 2]) * middle)
    own = highest_rate(readings)
    return _BORNE * own if limit < own else min(limit, FURTHEST * own)


def highest_rate(readings: Sequence[Reading]) -> float:
    """The highest learning rate of readings that know theirs."""
    return max(reading.learning_rate for reading in readings if reading.learning_rate is not None)


def confidence(readings: Sequence[Reading], num_unsure: int = 0) -> str:
    """How sure the learning rate at the limit is, in words.

    Args:
        readings: Those that count, which name the limit.
        num_unsure: How many others there are, which did not meet their tolerance.

    Returns:
        ``"none"``, or ``"low"``, ``"moderate"`` or ``"high"`` and why.

    """
    found = _limits(last_part(readings))
    if not found:
        return "none"
    logarithms = [math.log(limit) for limit in found]
    spread = math.exp(NORMAL_SPREAD * median(abs(value - median(logarithms)) for value in logarithms))
    share = len(readings) / (len(readings) + num_unsure)
    if len(found) < FEWEST or spread > _FAR_APART or share < 0.5:
        level = "low"
    elif len(readings) >= _MANY and spread <= _CLOSE and share >= 0.8:
        level = "high"
    else:
        level = "moderate"
    why = f"by {len(found)} measurements" if len(found) > 1 else "by one measurement"
    if len(found) > 1:
        why += f" that differ by a factor of {spread:.3g}"
    return f"{level}, {why}" + (f", {num_unsure} others did not converge" if num_unsure else "")


def _limits(readings: Sequence[Reading]) -> list[float]:
    limits = [reading.learning_rate_limit for reading in readings]
    return [limit for limit in limits if limit is not None]
