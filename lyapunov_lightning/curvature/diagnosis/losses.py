"""What a series of losses shows by itself: spikes, a divergence, a rise."""

import math
from collections.abc import Sequence
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

_ENDS = 10
"""How many losses are the beginning and the end of a run."""


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
    spikes: list[int] = []
    calm: list[float] = []
    out: list[tuple[int, float]] = []
    for step, loss in zip(steps, losses, strict=True):
        if not math.isfinite(loss):
            continue
        if len(calm) >= _CALM // 2:
            centre = median(calm)
            spread = NORMAL_SPREAD * median(abs(other - centre) for other in calm)
            if loss > centre + max(_SPREADS * spread, _SHARE_OF_MEDIAN * abs(centre)):
                out.append((step, loss))
                if len(out) == _IN_A_ROW:
                    spikes.append(out[0][0])
                # Without this a loss that jumps to another level would stand out from there on, and no later spike of
                # it would be seen.
                if len(out) == _CALM:
                    calm, out = [value for _, value in out], []
                continue
        # A single loss that stood out counts as noise from here on. Left out, the spread would be that of the other
        # batches alone, and every hard batch would stand out again.
        if len(out) < _IN_A_ROW:
            calm += [value for _, value in out]
        out = []
        calm = [*calm, loss][-_CALM:]
    return tuple(spikes)


def diverged_at(steps: Sequence[int], losses: Sequence[float]) -> int | None:
    """The step from which on the loss never came back to where it began, if it is not finite or high at the end.

    Returns:
        The step; None if all losses are finite and not each of the last ten is above each of the first ten.

    """
    end = next((place for place, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if end is not None:
        highest = losses[0]
    elif len(losses) >= 2 * _ENDS and min(losses[-_ENDS:]) > max(losses[:_ENDS]):
        end, highest = len(losses) - 1, max(losses[:_ENDS])
    else:
        return None
    # Back to where the loss left: by the first NaN the parameters may be far out, where the network is flat, and the
    # ratios measured there would acquit the learning rate.
    while end > 0 and losses[end - 1] > highest:
        end -= 1
    return steps[end]


def is_higher(lately: Sequence[float], before: Sequence[float]) -> bool:
    """Whether the median of some losses is above that of as many earlier ones by 30 %, and by five standard errors."""
    if not all(map(math.isfinite, lately)):
        return True
    # The noise from one loss to the next: the spread of the losses themselves would take a trend for noise.
    changes = [later - earlier for earlier, later in pairwise(before)]
    noise = NORMAL_SPREAD * median(abs(change - median(changes)) for change in changes) / math.sqrt(2)
    error = 1.25 * noise * math.sqrt(2 / len(before))  # a median's error is 1.25 times that of a mean
    return median(lately) > median(before) + max(5 * error, _SHARE_OF_MEDIAN * abs(median(before)))
