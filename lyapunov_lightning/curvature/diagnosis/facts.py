"""What was seen in a run, in numbers: nothing here judges."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from lyapunov_lightning.curvature.diagnosis.losses import (
    Excursion,
    beginning,
    diverged_at,
    excursions,
    has_stalled,
    is_spike,
    level_and_margin,
)
from lyapunov_lightning.curvature.diagnosis.readings import FEWEST, Reading

AT_LIMIT = 0.95
"""The stability ratio from which on the limit counts as met."""

SUSPECT = 0.5
"""The stability ratio from which on the learning rate is the likely cause where a loss was lost: the limit is known
roughly (`LIMIT_FACTORS`), and hardly anything else makes a loss leave step by step."""

NEAR = 20
"""The steps within which a spike counts as near a measurement, unless measurements are usually further apart."""

_JUMP, _JUMP_AND_RISE = 5.0, (2.0, 8.0)
"""How many margins a loss has to be out at once for its batch to be the cause, below the limit; or at once, and within
three steps. What the learning rate does builds up, and would have stood out the step before."""

_JUMP_AT_LIMIT = 10.0
"""The same at the limit, in units of the growth that a quadratic has there in one step."""

_UNDONE = 0.8
"""What of the gain of a training a fault undoes at least: late in one, single batches stand out all the time."""

_RAISED = 1.5
"""How many times the learning rate of the measurements below the limit is one that a schedule has raised."""

_IMPROVED = 0.1
"""The share of the first loss by which a loss has to be lower to have improved."""

_MEMORY = 8
"""How many measurements the ratio is averaged over at most."""

_CLIPPED = 0.99
"""The share of the gradient's length below which it was clipped, and not only rounded."""

_CONTAMINATED = 3.0
"""How many times the ratio before a fault, and the single ones since, an average is that still holds the fault."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the measurements and the losses of a run show.

    Attributes:
        readings: The measurements whose stability ratio is known and may be judged, in the order of their steps.
        settling: Those with a ratio that may not be judged.
        before: The ones of both that tell why the loss was lost, or why the first fault: those in the window before,
            and what the last of them comes to at the learning rate of the step at which it was.
        on_batch: The measurement on the data of the first fault, if one was made.
        faults: Losses that jumped from one step to the next, and further than the ratio before them explains.
        spikes: The steps at which the loss began to spike otherwise.
        start: The step of the first loss.
        lost_at: The step from which on the loss was lost; None if it was not.
        is_unmeasured: Whether no ratio was known before that.
        rose_at_first: Whether one of the first losses was more than twice the first one, and not by noise.
        has_improved: Whether the loss was lower at the end, or until it was lost, than at first.
        has_stalled: Whether it has not fallen any more over its last half, and the learning rate has not either.
        window: Within how many steps of a measurement a spike counts as *near*.
        share_near: The share of the steps with a known loss that are near a measurement at the limit.

    """

    readings: tuple[Reading, ...]
    settling: tuple[Reading, ...] = ()
    before: tuple[Reading, ...] = ()
    on_batch: Reading | None = None
    faults: tuple[Excursion, ...] = ()
    spikes: tuple[int, ...] = ()
    start: int = 0
    lost_at: int | None = None
    is_unmeasured: bool = False
    rose_at_first: bool = False
    has_improved: bool = True
    has_stalled: bool = False
    window: int = NEAR
    share_near: float = 0.0

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
    def since_met(self) -> tuple[Reading, ...]:
        """The counted measurements since the limit was met; none if it was not."""
        met_at = math.inf if self.met_at is None else self.met_at
        return tuple(reading for reading in self.counted if reading.step >= met_at)

    @property
    def highest(self) -> Reading:
        """The counted measurement of the largest ratio."""
        return max(self.counted, key=lambda reading: reading.value)

    @property
    def level(self) -> float | None:
        """The median ratio since the limit was met, or over the last half of the measurements where it was not."""
        since = self.since_met or self.counted[len(self.counted) // 2 :]
        return median(reading.value for reading in since) if since else None

    @property
    def last_third(self) -> tuple[Reading, ...]:
        """The last third of the counted measurements."""
        return self.counted[-max(1, len(self.counted) // 3) :]

    @property
    def last_level(self) -> float:
        """The median of the last third of the ratios."""
        # A median, and not the last ratio: on mini-batches single ratios differ by factors.
        return median(reading.value for reading in self.last_third)

    @property
    def fault(self) -> Excursion | None:
        """The fault by which the loss was lost, or the first one if it was not."""
        found = (fault for fault in self.faults if self.lost_at in (None, fault.start))
        return next(found, None)

    @property
    def evidence(self) -> tuple[Reading, ...]:
        """The measurements near the limit before the loss was lost; those at the limit if it was not."""
        if self.lost_at is None:
            return self.at_limit
        return tuple(reading for reading in self.before if reading.value >= SUSPECT)

    @property
    def decisive(self) -> Reading | None:
        """The first of these at the limit, or the highest: the later ones were made where a run had been thrown to.

        Where the learning rate was raised meanwhile it is the first one at about the rate at which the run was lost:
        the limit at a lower rate was borne.
        """
        at_limit = [reading for reading in self.evidence if is_at_limit(reading)]
        highest = max((reading.learning_rate or 0.0 for reading in at_limit), default=0.0)
        raised = (reading for reading in at_limit if _RAISED * (reading.learning_rate or 0.0) >= highest)
        return next(raised, max(self.evidence, key=lambda reading: reading.value, default=None))

    @property
    def is_from_start(self) -> bool:
        """Whether the loss was lost at the beginning, or the ratio was near the limit from there on."""
        if self.is_lost_at_once or (self.rose_at_first and not self.has_improved):
            return True
        is_met = self.met_at is not None and self.met_at <= self.start + NEAR
        return is_met and not self.is_raised and median(reading.value for reading in self.counted) >= SUSPECT

    @property
    def is_raised(self) -> bool:
        """Whether the run was lost at a learning rate far above those before, as where a schedule has raised it."""
        below = [one for one in self.counted if not is_at_limit(one)] or self.counted
        rates = [one.learning_rate for one in below if one.learning_rate is not None]
        rate = None if self.decisive is None else self.decisive.learning_rate
        return bool(rates) and rate is not None and rate > _RAISED * median(rates)

    @property
    def is_lost_at_once(self) -> bool:
        """Whether the loss was lost in the first steps, but not before any of them was made."""
        return self.lost_at is not None and self.start < self.lost_at <= self.start + NEAR

    @property
    def noise_level(self) -> float | None:
        """The median of what noise takes of the progress, over the last half of the measurements; None if unknown."""
        ratios = [reading.noise_ratio for reading in self.counted]
        # Later on it is not known where a step does not lower the loss of fresh data at all, not even to first order.
        since = next((place for place, ratio in enumerate(ratios) if ratio is not None), len(ratios))
        known = [math.inf if ratio is None else ratio for ratio in ratios[since:]]
        return median(known[len(known) // 2 :]) if known else None

    @property
    def naming(self) -> tuple[Reading, ...]:
        """The measurements that name the learning rate at the limit."""
        # Of a run that the learning rate has thrown about: afterwards it is somewhere else, where the network is flat.
        is_thrown = self.lost_at is not None or not self.has_improved
        if is_thrown and self.evidence:
            return tuple(reading for reading in self.evidence if reading.judged)
        # Nor of one that does not get on since it met the limit: before that the network was somewhere else.
        return self.since_met if self.has_stalled and self.at_limit else self.counted

    @property
    def clipped(self) -> tuple[Reading, ...]:
        """The measured steps of which the gradient was clipped."""
        return tuple(
            reading for reading in self.readings if reading.clipping is not None and reading.clipping < _CLIPPED
        )

    @property
    def crossings(self) -> tuple[int, ...]:
        """The measured steps at which the ratio went above 1."""
        # A run that is above 1 when it is first measured has crossed before that, which counts for its first step.
        before = [-math.inf, *(reading.value for reading in self.counted)]
        pairs = zip(before, self.counted, strict=False)
        return tuple(reading.step for last, reading in pairs if last < 1 <= reading.value)

    @property
    def num_near(self) -> int:
        """How many spikes came near a measurement at the limit."""
        at_limit = [reading.step for reading in self.at_limit]
        return sum(_is_near(spike, at_limit, self.window) for spike in self.spikes)


def facts_of(
    readings: Sequence[Reading],
    losses: tuple[Sequence[int], Sequence[float]],
    learning_rates: Sequence[float] = (),
) -> RunFacts:
    """The facts about a run, from the arguments of `diagnose`."""
    steps, values = losses
    known = [reading for reading in readings if reading.ratio is not None and not math.isnan(reading.ratio)]
    gaps = [later.step - earlier.step for earlier, later in pairwise(readings)]
    # With measurements 100 steps apart, 20 steps around each would call most spikes far from all of them.
    window = max(NEAR, round(median(gaps)) if gaps else 0)
    found = excursions(steps, values)

    def before(step: int, readings: Sequence[Reading]) -> tuple[Reading, ...]:
        place = bisect_left(steps, step)
        lately = [rate for rate in learning_rates[max(0, place - NEAR) : place] if not math.isnan(rate)]
        return readings_before(step, readings, window, max(lately, default=None))

    def jumped(excursion: Excursion) -> bool:
        if excursion.jump < _JUMP_AND_RISE[0]:  # most of them, and what follows takes time
            return False
        ratios = [reading.value for reading in known if reading.step < excursion.start - NEAR]
        usual = median(ratios[-_MEMORY:]) if ratios else 0.0
        return is_sudden(excursion, before(excursion.start, known), usual)

    diverged = diverged_at(steps, values)
    lost_at = min([one.start for one in found if one.is_final] + ([] if diverged is None else [diverged]), default=None)
    lost_from = math.inf if lost_at is None else lost_at
    found = tuple(one for one in found if one.start <= lost_from)
    faults = tuple(one for one in found if jumped(one) and (one.undone >= _UNDONE or one.start == lost_at))
    others = max((max(one.values) for one in found if one not in faults), default=-math.inf)
    faults = tuple(one for one in faults if max(one.values) > others or one.start == lost_at)
    fault = next((one for one in faults if lost_at in (None, one.start)), None)
    # At the step itself too, if it built up: where it begins to leave is not known to the step.
    left_at = fault.start if fault is not None else None if lost_at is None else lost_at + 1
    on_batch = (one for one in known if fault is not None and fault.start <= one.step <= fault.end)
    clean = [one for one in known if not any(_is_off_by(other, one, known) for other in faults if other is not fault)]
    left = () if left_at is None else before(left_at, clean)
    counting = [
        reading
        for reading in clean
        if reading.step < lost_from
        and not _is_alone(reading, known)
        and not (fault is not None and _is_off_by(fault, reading, known))
    ]
    until_lost = values[: bisect_left(steps, lost_from)]
    judged = tuple(reading for reading in counting if reading.judged)
    at_limit = [reading.step for reading in judged if reading.converged and is_at_limit(reading)]
    return RunFacts(
        readings=judged,
        settling=tuple(reading for reading in counting if not reading.judged),
        before=left,
        on_batch=next(on_batch, None),
        faults=faults,
        spikes=tuple(one.start for one in found if is_spike(one) and one not in faults and one.start != lost_at),
        start=steps[0] if steps else 0,
        lost_at=lost_at,
        is_unmeasured=left_at is not None and not left,
        rose_at_first=_rose_at_first(values),
        has_improved=_has_improved(until_lost),
        has_stalled=not _is_decayed(learning_rates) and has_stalled(values),
        window=window,
        # What chance alone would give: spikes that fall anywhere come near a measurement in this share.
        share_near=sum(_is_near(step, at_limit, window) for step in steps) / max(1, len(steps)),
    )


def is_at_limit(reading: Reading) -> bool:
    """Whether the ratio of a measurement counts as at the limit."""
    return reading.value >= AT_LIMIT


def readings_before(
    step: int, known: Sequence[Reading], window: int, learning_rate: float | None
) -> tuple[Reading, ...]:
    """The measurements that tell why a loss left at a step.

    Args:
        step: The step.
        known: All measurements.
        window: How many steps before it count.
        learning_rate: The highest one of the last steps before it, if it is known.

    Returns:
        Those in the window, or the last one before it; and what the last one comes to at that learning rate, where a
        schedule has raised it since.

    """
    earlier = [reading for reading in known if reading.step < step]
    found = [reading for reading in earlier if reading.step >= step - window] or earlier[-1:]
    if not found or learning_rate is None or not found[-1].learning_rate:
        return tuple(found)
    last, raised = found[-1], learning_rate / found[-1].learning_rate
    if raised <= 1:
        return tuple(found)
    return (*found, replace(last, step=step - 1, ratio=last.value * raised, learning_rate=learning_rate))


def is_sudden(excursion: Excursion, before: Sequence[Reading], usual: float = 0.0) -> bool:
    """Whether a loss jumped further at once than the ratios before it explain.

    Args:
        excursion: The jump.
        before: The measurements in the window before it.
        usual: The ratio that the run has borne before.

    """
    if excursion.last > excursion.level + excursion.margin:  # it was on its way already, as at the very beginning
        return False
    ratio = max((reading.value for reading in before[-2:]), default=0.0)
    if ratio < AT_LIMIT:
        jump, rise = _JUMP_AND_RISE
        return excursion.jump >= _JUMP or (excursion.jump >= jump and excursion.rise >= rise)
    # Along a direction at `ratio` times its limit a step of gradient descent multiplies the loss by this; one of
    # momentum, by up to four times as much. A ratio that was borne all along is not what lets the loss jump now.
    return excursion.jump >= _JUMP_AT_LIMIT * (2 * ratio / max(1.0, usual) - 1) ** 2


def _is_alone(reading: Reading, known: Sequence[Reading]) -> bool:
    """Whether an average is at the limit by one of its measurements alone."""
    if not is_at_limit(reading) or reading.step_ratio is None or reading.eigenvalue_ratio is None:
        return False
    lately = [other.single for other in known if other.step <= reading.step and other.judged][-_MEMORY:]
    return reading.eigenvalue_ratio < SUSPECT and len(lately) >= FEWEST and sorted(lately)[-2] < SUSPECT


def _is_off_by(fault: Excursion, reading: Reading, known: Sequence[Reading]) -> bool:
    """Whether a measurement was made on the data of a fault, or still has it in its average."""
    if reading.step < fault.start:
        return False
    if reading.step <= fault.end + 1:
        return True
    since = [other for other in known if fault.end + 1 < other.step <= reading.step]
    usual = median(other.single for other in since)
    earlier = [other.value for other in known if other.step < fault.start]
    return reading.value > _CONTAMINATED * max(usual, 0.0, *earlier[-1:])


def _rose_at_first(losses: Sequence[float]) -> bool:
    """Whether one of the first losses is more than twice the first one, and stands out from those at the end."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return False
    usual = sum(level_and_margin(finite[-NEAR:])) if len(finite) > 2 * NEAR else -math.inf
    return max(finite[:NEAR]) > max(usual, finite[0] + abs(finite[0]))


def _has_improved(losses: Sequence[float]) -> bool:
    """Whether the loss is lower at the end than it was at first."""
    if not losses:
        return True
    first, last = beginning(losses), median(losses[-max(10, len(losses) // 10) :])
    return first - last > _IMPROVED * abs(first)


def _is_decayed(learning_rates: Sequence[float]) -> bool:
    """Whether the learning rate was lowered over the last half of a run, which takes noise and progress away."""
    known = [rate for rate in learning_rates[len(learning_rates) // 2 :] if not math.isnan(rate)]
    return bool(known) and known[-1] < max(known) / 2


def _is_near(step: int, others: Sequence[int], window: int) -> bool:
    """Whether one of the other steps, which ascend, is within the window."""
    index = bisect_left(others, step - window)
    return index < len(others) and others[index] <= step + window
