"""What was seen in a run, in numbers: nothing here judges."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from lyapunov_lightning.curvature.diagnosis.losses import diverged_at, loss_spikes

AT_LIMIT = 0.95
"""The stability ratio from which on the limit counts as met."""

NEAR = 20
"""The steps within which a spike counts as near a measurement, unless measurements are usually further apart."""


class Reading(NamedTuple):
    """A stability ratio, and the step before which it was measured."""

    step: int
    ratio: float


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the measurements and the losses of a run show.

    Attributes:
        readings: All stability ratios that are known, in the order of their steps.
        converged: Those whose measurement met its tolerance.
        spikes: The steps at which the loss began to spike.
        lost_at: The step from which on the loss was lost, see `diverged_at`; None if it was not.
        window: Within how many steps of a measurement a spike counts as *near*.
        share_near: The share of the steps with a known loss that are near a measurement at the limit.
        learning_rate: The present one, if it is known.

    """

    readings: tuple[Reading, ...]
    converged: tuple[Reading, ...]
    spikes: tuple[int, ...]
    lost_at: int | None
    window: int
    share_near: float
    learning_rate: float | None

    @property
    def at_limit(self) -> tuple[Reading, ...]:
        """The converged measurements at the limit."""
        return tuple(reading for reading in self.converged if reading.ratio >= AT_LIMIT)

    @property
    def met_at(self) -> int | None:
        """The first measured step at which the ratio was at the limit."""
        return self.at_limit[0].step if self.at_limit else None

    @property
    def highest(self) -> Reading:
        """The largest of the converged ratios."""
        return max(self.converged, key=lambda reading: reading.ratio)

    @property
    def level(self) -> float | None:
        """The median ratio since the limit was met, or over the last half of the measurements where it was not."""
        met_at = math.inf if self.met_at is None else self.met_at
        since = [ratio for step, ratio in self.converged if step >= met_at]
        since = since or [ratio for _, ratio in self.converged[len(self.converged) // 2 :]]
        return median(since) if since else None

    @property
    def last_level(self) -> float:
        """The median of the last third of the converged ratios."""
        # A median, and not the last ratio: on mini-batches single ratios differ by factors.
        return median(ratio for _, ratio in self.converged[-max(1, len(self.converged) // 3) :])

    @property
    def crossings(self) -> tuple[int, ...]:
        """The measured steps at which the ratio went above 1."""
        # A run that is above 1 when it is first measured has crossed before that, which counts for its first step.
        before = [-math.inf, *(ratio for _, ratio in self.converged)]
        return tuple(step for (step, ratio), last in zip(self.converged, before, strict=False) if last < 1 <= ratio)

    @property
    def before_lost(self) -> tuple[Reading, ...]:
        """The last three measurements before the loss was lost, whether they converged or not."""
        end = math.inf if self.lost_at is None else self.lost_at
        return tuple(reading for reading in self.readings if reading.step <= end)[-3:]

    @property
    def num_near(self) -> int:
        """How many spikes came near a measurement at the limit."""
        at_limit = [step for step, _ in self.at_limit]
        return sum(_is_near(spike, at_limit, self.window) for spike in self.spikes)


def facts_of(
    steps: Sequence[int],
    ratios: Sequence[float | None],
    losses: tuple[Sequence[int], Sequence[float]],
    *,
    converged: Sequence[bool] | None = None,
    learning_rate: float | None = None,
) -> RunFacts:
    """The facts about a run, from the arguments of `diagnose`."""
    converged = [True] * len(steps) if converged is None else converged
    known = [
        (Reading(step, ratio), is_converged)
        for step, ratio, is_converged in zip(steps, ratios, converged, strict=True)
        if ratio is not None
    ]
    sure = tuple(reading for reading, is_converged in known if is_converged)
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    # With measurements 100 steps apart, 20 steps around each would call most spikes far from all of them.
    window = max(NEAR, round(median(gaps)) if gaps else 0)
    at_limit = [step for step, ratio in sure if ratio >= AT_LIMIT]
    return RunFacts(
        readings=tuple(reading for reading, _ in known),
        converged=sure,
        spikes=loss_spikes(*losses),
        lost_at=diverged_at(*losses),
        window=window,
        # What chance alone would give: spikes that fall anywhere come near a measurement in this share.
        share_near=sum(_is_near(step, at_limit, window) for step in losses[0]) / max(1, len(losses[0])),
        learning_rate=learning_rate,
    )


def _is_near(step: int, others: Sequence[int], window: int) -> bool:
    """Whether one of the other steps, which ascend, is within the window."""
    index = bisect_left(others, step - window)
    return index < len(others) and others[index] <= step + window
