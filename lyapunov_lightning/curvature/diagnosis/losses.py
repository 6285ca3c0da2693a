"""What a series of losses shows by itself: spikes, a divergence, a rise."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from lyapunov_lightning.curvature.diagnosis.readings import NORMAL_SPREAD

_CALM = 20
"""How many losses the next one is compared with."""

_SPREADS, _SHARE_OF_MEDIAN = 6.0, 0.3
"""How far a loss stands out: in spreads of the calm losses, and as a share of their median. The share is for smooth
losses, whose spread is so small that any bend would be a spike."""

_IN_A_ROW = 2
"""How many losses that stand out make a spike: a single one may be due to its batch."""

_FEW = 5
"""How many losses together are back in line."""

_AT_FIRST = 3
"""How many losses a jump may take: a bad batch is often seen best in the losses of the steps after its own."""

_KEPT = 0.2
"""The share of what was gained that a loss may give up and has come back all the same."""

_ENDS = 10
"""How many losses are the beginning and the end of a run."""


@dataclass(frozen=True)
class Excursion:
    """Losses in a row that stand out from those before them.

    Attributes:
        start: The step of the first one.
        end: The step of the last one.
        count: How many they are; not finite ones count.
        level: The median of the losses before.
        last: The highest of the last three before.
        margin: How far above that a loss stands out.
        gained: By how much the loss had fallen by then, in medians.
        values: The first of them; infinite ones in place of those that are not finite.
        came_back: Whether the loss was in line again afterwards, or kept most of what had been gained.

    """

    start: int
    end: int
    count: int
    level: float
    last: float
    margin: float
    gained: float
    values: tuple[float, ...]
    came_back: bool

    @property
    def jump(self) -> float:
        """How far the first loss was above the last ones before, in margins."""
        return (self.values[0] - self.last) / self.margin

    @property
    def rise(self) -> float:
        """How far the first three losses were above those, in margins."""
        return (max(self.values[:_AT_FIRST]) - self.last) / self.margin

    @property
    def undone(self) -> float:
        """What of the gain the first three losses undid at most; infinite where nothing had been gained."""
        return (max(self.values[:_AT_FIRST]) - self.level) / self.gained if self.gained > 0 else math.inf

    @property
    def is_final(self) -> bool:
        """Whether the loss was lost by it: it was not finite any more, or stayed out for long."""
        return not self.came_back and (self.count >= _CALM or not math.isfinite(max(self.values)))


def excursions(steps: Sequence[int], losses: Sequence[float]) -> tuple[Excursion, ...]:
    """Where losses stood out from the 20 before them, once there are ten.

    A loss that stays where it jumped to for 20 steps has another level from there on.

    """
    found: list[Excursion] = []
    calm: list[float] = []
    out: list[float] = []
    start = end = 0
    level = margin = last = 0.0
    lowest = math.inf

    def excursion(came_back: bool) -> Excursion:
        gained = max(0.0, beginning(losses) - lowest)
        return Excursion(start, end, len(out), level, last, margin, gained, tuple(out[:_CALM]), came_back)

    for place, (step, loss) in enumerate(zip(steps, losses, strict=True)):
        loss = loss if math.isfinite(loss) else math.inf
        if len(calm) >= _CALM // 2:
            if not out:
                start, (level, margin), last = step, level_and_margin(calm), max(calm[-_AT_FIRST:])
                lowest = min(lowest, level)
            if loss > level + margin:
                end, out = step, [*out, loss]
                # Without this a loss that jumps to another level would stand out from there on, and no later spike of
                # it would be seen.
                if len(out) == _CALM and math.isfinite(max(out)):
                    kept = level + max(margin, _KEPT * (beginning(losses) - lowest))
                    found.append(excursion(_comes_down([*out, *losses[place + 1 :]], kept)))
                    calm, out = out, []
                continue
        if out:
            found.append(excursion(came_back=True))
        # A single loss that stood out counts as noise from here on. Left out, the spread would be that of the other
        # batches alone, and every hard batch would stand out again.
        if len(out) < _IN_A_ROW:
            calm += out
        out = []
        calm = [value for value in [*calm, loss] if math.isfinite(value)][-_CALM:]
    if out:
        found.append(excursion(came_back=False))
    return tuple(found)


def beginning(losses: Sequence[float]) -> float:
    """Where the loss began: the first one, or the median of the first ten if that is lower."""
    return min(losses[0], median(losses[:_ENDS]))


def level_and_margin(calm: Sequence[float], spreads: float = _SPREADS) -> tuple[float, float]:
    """The level of calm losses, and how far above it a loss stands out."""
    centre = median(calm)
    spread = NORMAL_SPREAD * median(abs(other - centre) for other in calm)
    return centre, max(spreads * spread, _SHARE_OF_MEDIAN * abs(centre), sys.float_info.min)


def _comes_down(losses: Sequence[float], height: float) -> bool:
    """Whether the loss comes back to some height or below, a few losses together."""
    windows = (losses[place : place + _FEW] for place in range(len(losses) - _FEW + 1))
    return any(median(window) <= height for window in windows)


def loss_spikes(steps: Sequence[int], losses: Sequence[float]) -> tuple[int, ...]:
    """The steps at which the loss began to stand out from those before it, for two steps at least.

    A loss that stays where it jumped to is one spike; values that are not finite are left out.

    `LossWatch`, by which the controller decides to go back to earlier parameters, has other rules, since a mistake
    costs something else there. It must act at once and must not act without need: it takes a single loss if that is
    beyond where the training began, and three otherwise, and compares with the fall of the loss so far. Here the run is
    over, nothing is done, and spikes are counted: medians are not moved by the spikes that came before.

    Example::

        >>> from lyapunov_lightning.curvature.diagnosis import loss_spikes
        >>> losses = [1.0 + 0.01 * (step % 3) for step in range(60)]
        >>> losses[40:43] = [1.8, 2.2, 1.5]
        >>> loss_spikes(range(60), losses)
        (40,)

    """
    return tuple(spike.start for spike in excursions(steps, losses) if is_spike(spike))


def is_spike(excursion: Excursion) -> bool:
    """Whether losses that stand out are a spike: two at least, since a single one may be due to its batch."""
    return excursion.count >= _IN_A_ROW and math.isfinite(excursion.values[0])


def diverged_at(steps: Sequence[int], losses: Sequence[float]) -> int | None:
    """The step from which on the loss never came back to where it began, if it is not finite or high at the end.

    Returns:
        The step; None if all losses are finite and the last ten are neither all above each of the first ten, nor all
        more than twice as high as the first two: within the first ten, a loss that is lost at once has risen.

    """
    end = next((place for place, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if end is not None:
        return steps[_left_at(losses[:end], *_before_it_left(losses[:end]))]
    if len(losses) < 2 * _ENDS:
        return None
    # Within ten steps a loss that is lost at once has been so high that the last ones are not above it.
    for first, more in ((losses[:_ENDS], 0.0), (losses[:2], 1.0)):
        if min(losses[-_ENDS:]) > max(first) + more * max(map(abs, first)):
            return steps[_left_at(losses[:-1], max(first))]
    return None


def _before_it_left(losses: Sequence[float]) -> tuple[float, int]:
    """How high losses were before they left, and since when they can have done so."""
    if len(losses) < 2 * _CALM:
        return losses[0] if losses else math.inf, 0
    places = range(len(losses) - _CALM + 1)
    lowest = min(places, key=lambda place: median(losses[place : place + _CALM]))
    calm = losses[lowest : lowest + _CALM]
    if is_higher(losses[-_CALM:], calm):
        return max(calm), lowest + _CALM
    return max(losses[-2 * _CALM : -_CALM]), 0


def _left_at(losses: Sequence[float], height: float, since: int = 0) -> int:
    """The place from which on the losses stayed above some height until their end, single ones excepted."""
    # Back from the end: by the first NaN the parameters may have been thrown far out long before, to where the network
    # is flat, and the ratios measured there would acquit the learning rate.
    end = len(losses)
    while end > since and (losses[end - 1] > height or (since and median(losses[max(0, end - _FEW) : end]) > height)):
        end -= 1
    return end


def has_stalled(losses: Sequence[float]) -> bool:
    """Whether the loss falls no further over the last half than it differs from batch to batch."""
    half = losses[len(losses) // 2 :]
    before, lately = half[: len(half) // 2], half[len(half) // 2 :]
    if len(before) < _ENDS or not all(map(math.isfinite, half)):
        return False
    return median(before) - median(lately) < 2 * _error_of_difference(before)


def is_higher(lately: Sequence[float], before: Sequence[float]) -> bool:
    """Whether the median of some losses is above that of as many earlier ones by 30 %, and by five standard errors."""
    if not all(map(math.isfinite, lately)):
        return True
    margin = max(5 * _error_of_difference(before), _SHARE_OF_MEDIAN * abs(median(before)))
    return median(lately) > median(before) + margin


def _error_of_difference(losses: Sequence[float]) -> float:
    """The standard error of the difference of two medians, of as many losses as these and as noisy."""
    # The noise from one loss to the next: the spread of the losses themselves would take a trend for noise.
    changes = [later - earlier for earlier, later in pairwise(losses)]
    noise = NORMAL_SPREAD * median(abs(change - median(changes)) for change in changes) / math.sqrt(2)
    return 1.25 * noise * math.sqrt(2 / len(losses))  # a median's error is 1.25 times that of a mean
