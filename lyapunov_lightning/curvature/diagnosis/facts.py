"""What was seen in a run, in numbers: nothing here judges."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from lyapunov_lightning.curvature.diagnosis.losses import diverged_at, loss_spikes
from lyapunov_lightning.curvature.diagnosis.readings import Reading

AT_LIMIT = 0.95
"""The stability ratio from which on the limit counts as met."""

NEAR = 20
"""The steps within which a spike counts as near a measurement, unless measurements are usually further apart."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the measurements and the losses of a run show.

    Attributes:
        readings: All measurements whose stability ratio is known and may be judged, in the order of their steps.
        spikes: The steps at which the loss began to spike.
        lost_at: The step from which on the loss was lost, see `diverged_at`; None if it was not.
        window: Within how many steps of a measurement a spike counts as *near*.
        share_near: The share of the steps with a known loss that are near a measurement at the limit.

    """

    readings: tuple[Reading, ...]
    spikes: tuple[int, ...]
    lost_at: int | None
    window: int
    share_near: float

    @property
    def counted(self) -> tuple[Reading, ...]:
        """The measurements that met their tolerance."""
        return tuple(reading for reading in self.readings if reading.converged)

    @property
    def num_unsure(self) -> int:
        """How many did not meet it."""
        return len(self.readings) - len(self.counted)

    @property
    def at_limit(self) -> tuple[Reading, ...]:
        """The counted measurements at the limit."""
        return tuple(filter(is_at_limit, self.counted))

    @property
    def met_at(self) -> int | None:
        """The first measured step at which the ratio was at the limit."""
        return self.at_limit[0].step if self.at_limit else None

    @property
    def highest(self) -> Reading:
        """The counted measurement of the largest ratio."""
        return max(self.counted, key=lambda reading: reading.value)

    @property
    def level(self) -> float | None:
        """The median ratio since the limit was met, or over the last half of the measurements where it was not."""
        met_at = math.inf if self.met_at is None else self.met_at
        since = [reading.value for reading in self.counted if reading.step >= met_at]
        since = since or [reading.value for reading in self.counted[len(self.counted) // 2 :]]
        return median(since) if since else None

    @property
    def last_level(self) -> float:
        """The median of the last third of the counted ratios."""
        # A median, and not the last ratio: on mini-batches single ratios differ by factors.
        return median(reading.value for reading in self.counted[-max(1, len(self.counted) // 3) :])

    @property
    def crossings(self) -> tuple[int, ...]:
        """The measured steps at which the ratio went above 1."""
        # A run that is above 1 when it is first measured has crossed before that, which counts for its first step.
        before = [-math.inf, *(reading.value for reading in self.counted)]
        pairs = zip(before, self.counted, strict=False)
        return tuple(reading.step for last, reading in pairs if last < 1 <= reading.value)

    @property
    def before_lost(self) -> tuple[Reading, ...]:
        """The last three measurements before the loss was lost, whether they converged or not."""
        end = math.inf if self.lost_at is None else self.lost_at
        return tuple(reading for reading in self.readings if reading.step <= end)[-3:]

    @property
    def num_near(self) -> int:
        """How many spikes came near a measurement at the limit."""
        at_limit = [reading.step for reading in self.at_limit]
        return sum(_is_near(spike, at_limit, self.window) for spike in self.spikes)


def facts_of(readings: Sequence[Reading], losses: tuple[Sequence[int], Sequence[float]]) -> RunFacts:
    """The facts about a run, from the arguments of `diagnose`."""
    known = tuple(reading for reading in readings if reading.ratio is not None and reading.judged)
    gaps = [later.step - earlier.step for earlier, later in pairwise(readings)]
    # With measurements 100 steps apart, 20 steps around each would call most spikes far from all of them.
    window = max(NEAR, round(median(gaps)) if gaps else 0)
    at_limit = [reading.step for reading in known if reading.converged and is_at_limit(reading)]
    return RunFacts(
        readings=known,
        spikes=loss_spikes(*losses),
        lost_at=diverged_at(*losses),
        window=window,
        # What chance alone would give: spikes that fall anywhere come near a measurement in this share.
        share_near=sum(_is_near(step, at_limit, window) for step in losses[0]) / max(1, len(losses[0])),
    )


def is_at_limit(reading: Reading) -> bool:
    """Whether the ratio of a measurement counts as at the limit."""
    return reading.value >= AT_LIMIT


def _is_near(step: int, others: Sequence[int], window: int) -> bool:
    """Whether one of the other steps, which ascend, is within the window."""
    index = bisect_left(others, step - window)
    return index < len(others) and others[index] <= step + window
