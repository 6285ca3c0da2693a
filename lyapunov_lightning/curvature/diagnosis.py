"""Is the learning rate to blame? Read off the stability ratios and the losses of a run.

The stability ratio is the eigenvalue that counts for the optimizer over the one at which its learning rate turns
unstable. A direction whose curvature is beyond the limit throws the parameters further out with every step, so that the
loss rises soon after; one below it does not, whatever else makes the loss rise. What follows from that is said here in
words, by these rules, the first that fits:

1. ``unknown``: there is no ratio, since the limit of the optimizer is not known or nothing was measured.
2. ``diverged``: the loss became NaN or infinite, or each of its last values lies above each of its first ones; and one
   of the last three ratios before that was at the limit. ``diverged_below`` if none was.
3. ``not_converged``: fewer than half of the measurements met their tolerance. ``few``: fewer than three did.
4. ``below``: no ratio was at the limit.
5. ``left``: one was, but over the last third the median was below 0.8.
6. ``limited``: the loss spiked, and at least half of the spikes came near a measurement at the limit, in a share at
   least as large as that of all steps that are near one.
7. ``above``: since the limit was met the median is above 1.5. ``at_edge`` otherwise.

A ratio is *at the limit* from 0.95 on. *Near* is within 20 steps, or within the usual distance of two measurements
where that is larger. A *spike* are two or more losses in a row that stand out of the 20 before them: above their median
by six times their spread (that of a normal distribution with their median absolute deviation) and by 30 % of it.

Two things these rules cannot know. The ratio of a mini-batch is as a rule above that of all data, most of all for small
batches, whose sharpest direction is another one at the next step; there ``above`` is common and harmless. And a ratio
is known only where it was measured: what rises and falls between two measurements is not seen.

References:
    J. Cohen et al., "Gradient descent on neural networks typically occurs at the edge of stability", 2021, for the edge
    and for what the loss does there; J. Cohen et al., "Adaptive gradient methods at the edge of stability", 2022.

"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Literal

Kind = Literal[
    "unknown",
    "diverged",
    "diverged_below",
    "not_converged",
    "few",
    "below",
    "left",
    "limited",
    "above",
    "at_edge",
]

TITLES: dict[Kind, str] = {
    "unknown": "stability limit unknown",
    "diverged": "diverged above the stability limit",
    "diverged_below": "diverged below the stability limit",
    "not_converged": "measurements did not converge",
    "few": "too few measurements to tell",
    "below": "below the stability limit",
    "left": "above the stability limit for a while",
    "limited": "limited by the learning rate",
    "above": "above the stability limit",
    "at_edge": "at the edge of stability",
}
"""The kinds as titles."""

AT_LIMIT = 0.95
"""The stability ratio from which on the limit counts as met."""

_LEAST = 3
"""Measurements with which a run can be judged."""

_LEFT = 0.8
_FAR_ABOVE = 1.5

_NEAR = 20
"""Steps within which a spike belongs to a measurement, if these lie closer than that."""

_CALM = 20
"""Losses out of which the next one may stand."""

_SPREADS, _SHARE = 6.0, 0.3
"""How far it must stand out, in spreads of these and as a share of their median."""

_IN_A_ROW = 2
"""How many that stand out make a spike: a single one may be its batch."""

_ENDS = 10
"""Losses of which the beginning and the end of a run consist."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What the stability ratios and the losses of a run tell. As a string: two sentences, with the figures.

    Attributes:
        kind: Which of the rules fits, see the module.
        sharpness: The sentence on the sharpness.
        consequence: What follows from it.
        met_at: The first measured step at which the ratio was at the limit, if there is one.
        level: The median ratio since then; that of the last half where the limit was not met.
        crossings: The measured steps at which the ratio went above 1.
        spikes: The steps at which the loss began to spike.
        num_near: How many of these came near a measurement at the limit.
        window: What near means, in steps.

    """

    kind: Kind
    sharpness: str
    consequence: str
    met_at: int | None = None
    level: float | None = None
    crossings: tuple[int, ...] = ()
    spikes: tuple[int, ...] = ()
    num_near: int = 0
    window: int = _NEAR

    @property
    def title(self) -> str:
        """The kind in a few words."""
        return TITLES[self.kind]

    def __str__(self) -> str:
        return f"{self.sharpness} {self.consequence}"


def diagnose(
    steps: Sequence[int],
    ratios: Sequence[float | None],
    losses: tuple[Sequence[int], Sequence[float]] = ((), ()),
    *,
    converged: Sequence[bool] | None = None,
    learning_rate: float | None = None,
) -> Diagnosis:
    """Say what the stability ratios and the losses of a run tell about its learning rate.

    Args:
        steps: The optimizer steps of the measurements, ascending.
        ratios: The stability ratios at these; None where there is none.
        losses: Steps and values of the training loss.
        converged: Whether each measurement met its tolerance; all did if None.
        learning_rate: The present one, to say which one would meet the limit.

    Returns:
        The diagnosis, by the rules at the head of the module.

    Example::

        >>> from lyapunov_lightning.curvature.diagnosis import diagnose
        >>> found = diagnose([0, 10, 20, 30], [0.2, 0.6, 1.01, 0.99], (range(40), [1 / (1 + t) for t in range(40)]))
        >>> found.kind, found.met_at
        ('at_edge', 20)
        >>> print(found.sharpness)
        The sharpness met the stability limit at step 20 and stayed at 1.00 times it.

    """
    converged = [True] * len(steps) if converged is None else converged
    known = [(step, ratio) for step, ratio in zip(steps, ratios, strict=True) if ratio is not None]
    if not known:
        return Diagnosis(
            kind="unknown",
            sharpness="No sharpness was measured against a stability limit.",
            consequence="Whether the learning rate is to blame for anything cannot be said.",
        )
    sure = [
        (step, ratio)
        for step, ratio, is_sure in zip(steps, ratios, converged, strict=True)
        if is_sure and ratio is not None
    ]
    window = max([_NEAR, *([round(median(_gaps(steps)))] if len(steps) > 1 else [])])
    crossings = tuple(
        step
        for (step, ratio), before in zip(sure, [None, *(ratio for _, ratio in sure)], strict=False)
        if ratio >= 1 and (before is None or before < 1)
    )
    at_limit = [step for step, ratio in sure if ratio >= AT_LIMIT]
    spikes = loss_spikes(*losses)
    near = [spike for spike in spikes if _is_near(spike, at_limit, window)]
    met_at = at_limit[0] if at_limit else None
    since = [ratio for step, ratio in sure if met_at is not None and step >= met_at]
    level = median(since or [ratio for _, ratio in sure[len(sure) // 2 :]] or [math.nan])

    def found(kind: Kind, sharpness: str, consequence: str) -> Diagnosis:
        return Diagnosis(
            kind=kind,
            sharpness=sharpness,
            consequence=consequence,
            met_at=met_at,
            level=None if math.isnan(level) else level,
            crossings=crossings,
            spikes=spikes,
            num_near=len(near),
            window=window,
        )

    end = diverged_at(*losses)
    if end is not None:
        before = [(step, ratio) for step, ratio in known if step <= end][-3:]
        if any(ratio >= AT_LIMIT for _, ratio in before):
            step, ratio = next(pair for pair in before if pair[1] >= AT_LIMIT)  # later ones are of what it threw about
            return found(
                "diverged",
                f"The sharpness was {_shown(ratio)} times the stability limit at step {step}, and the loss was lost"
                f" from step {end} on.",
                f"The learning rate is too large{_where_the_limit_is(learning_rate, ratio)}.",
            )
        seen = "not measured"
        if before:
            seen = f"{_shown(before[-1][1])} times the stability limit at step {before[-1][0]}"
        return found(
            "diverged_below",
            f"The loss was lost from step {end} on, and the sharpness before that was {seen}.",
            "As far as was measured, the learning rate is not to blame: look for what else is wrong, such as numbers"
            " that are not finite, or measure more often.",
        )
    if 2 * len(sure) < len(known):
        return found(
            "not_converged",
            f"Only {len(sure)} of {len(known)} measurements of the sharpness met their tolerance.",
            "That is too few to blame the learning rate or to clear it: raise `tol`, or measure on more data.",
        )
    if len(sure) < _LEAST:
        return found(
            "few",
            f"The sharpness was measured {_times(len(sure))}: {_shown(sure[-1][1])} times the stability limit at step"
            f" {sure[-1][0]}.",
            "That is too few to tell more: measure more often.",
        )
    if met_at is None:
        step, highest = max(sure, key=lambda pair: pair[1])
        last = f", {_shown(sure[-1][1])} times it at the end" if step != sure[-1][0] else ""
        return found(
            "below",
            f"The sharpness stayed below the stability limit: {_shown(highest)} times it at most, at step"
            f" {step}{last}.",
            _below(spikes, highest, learning_rate),
        )
    others = _spiked(len(spikes), len(near), window)
    tail = [ratio for _, ratio in sure[-max(1, len(sure) // 3) :]]
    if median(tail) < _LEFT:
        step, highest = max(sure, key=lambda pair: pair[1])
        return found(
            "left",
            f"The sharpness was at the stability limit from step {met_at} to step {at_limit[-1]}, {_shown(highest)}"
            f" times it at most, and {_shown(median(tail))} times it at the end.",
            f"{_came_near(len(spikes), len(near), window)}: the learning rate was too large then."
            if 2 * len(near) >= len(spikes) > 0
            else others or "The loss did not spike, and the learning rate does not limit the run any more.",
        )
    stayed = f"The sharpness met the stability limit at step {met_at} and stayed at {_shown(level)} times it."
    covered = [_is_near(step, at_limit, window) for step in losses[0]]
    if spikes and len(near) >= max(0.5, sum(covered) / len(covered)) * len(spikes):
        return found(
            "limited",
            stayed,
            f"{_came_near(len(spikes), len(near), window)}: the learning rate is what limits this run.",
        )
    if level > _FAR_ABOVE:
        return found(
            "above",
            stayed,
            others
            or "The loss did not spike all the same, which is common on small batches: measure on fixed data to"
            " see what the training follows.",
        )
    return found(
        "at_edge",
        stayed,
        others
        or "The loss did not spike: the learning rate is as large as the curvature lets it be, and the run bears it.",
    )


def loss_spikes(steps: Sequence[int], losses: Sequence[float]) -> tuple[int, ...]:
    """The steps at which the loss began to stand out of those before it, for two steps at least.

    A loss that stays where it jumped to is one spike; what is not finite is left out.

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
            spread = 1.4826 * median(abs(other - centre) for other in calm)
            if loss > centre + max(_SPREADS * spread, _SHARE * abs(centre)):
                out.append((step, loss))
                if len(out) == _IN_A_ROW:
                    spikes.append(out[0][0])
                if len(out) == _CALM:  # not a spike but another level
                    calm, out = [value for _, value in out], []
                continue
        if len(out) < _IN_A_ROW:
            calm += [value for _, value in out]  # a single batch
        out = []
        calm = [*calm, loss][-_CALM:]
    return tuple(spikes)


def diverged_at(steps: Sequence[int], losses: Sequence[float]) -> int | None:
    """The step from which on the loss is lost: never back to where it began, and not finite or high at the end.

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
    while end > 0 and losses[end - 1] > highest:
        end -= 1
    return steps[end]


class EdgeWatch:
    """Notices, while a run goes on, that the sharpness stays above the limit and that the loss rises meanwhile.

    Both have to be so for a while, three measurements and 20 steps at least: the ratio above 1 at each measurement, and
    the losses higher than as many losses before, in the median, by 30 % and by more than their noise.

    """

    def __init__(self) -> None:
        self._above: list[tuple[int, float]] = []

    def see(
        self,
        step: int,
        ratio: float | None,
        losses: tuple[Sequence[int], Sequence[float]],
        *,
        learning_rate: float | None = None,
    ) -> str | None:
        """Take note of a measurement.

        Args:
            step: The optimizer step before which it was made.
            ratio: The stability ratio; None if there is none to go by.
            losses: Steps and values of the training loss so far.
            learning_rate: The present one.

        Returns:
            What there is to warn of, if both is so now.

        """
        if ratio is None or not ratio > 1:
            self._above = []
            return None
        self._above.append((step, ratio))
        since = next((at for at, _ in self._above[-_LEAST::-1] if at <= step - _NEAR), None)
        if since is None:
            return None
        lately = [loss for at, loss in zip(*losses, strict=True) if at >= since]
        before = [loss for at, loss in zip(*losses, strict=True) if at < since][-len(lately) :]
        if len(before) < _LEAST or not _is_higher(lately, before):
            return None
        return (
            f"the sharpness has been above the stability limit since step {self._above[0][0]}, {_shown(ratio)} times"
            f" it at step {step}, and the loss has risen from {median(before):.3g} to {median(lately):.3g} since step"
            f" {since}. The learning rate is too large{_where_the_limit_is(learning_rate, ratio)}."
        )

    def state_dict(self) -> dict[str, Any]:
        """The measurements in a row that were above the limit."""
        return {"above": list(self._above)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._above = [(int(step), float(ratio)) for step, ratio in state["above"]]


def _is_higher(lately: Sequence[float], before: Sequence[float]) -> bool:
    """Whether the median of losses is above that of as many others by 30 %, and by five standard errors.

    The noise is that of the others, from one loss to the next, so that a trend is not taken for noise.

    """
    if not all(map(math.isfinite, lately)):
        return True
    changes = [later - earlier for earlier, later in pairwise(before)]
    noise = 1.4826 * median(abs(change - median(changes)) for change in changes) / math.sqrt(2)
    error = 1.25 * noise * math.sqrt(2 / len(before))
    return median(lately) > median(before) + max(5 * error, _SHARE * abs(median(before)))


def _gaps(steps: Sequence[int]) -> list[int]:
    return [after - before for before, after in pairwise(steps)]


def _is_near(step: int, others: Sequence[int], window: int) -> bool:
    """Whether one of the other steps, which ascend, is within the window."""
    index = bisect_left(others, step - window)
    return index < len(others) and others[index] <= step + window


def _below(spikes: Sequence[int], highest: float, learning_rate: float | None) -> str:
    if spikes:
        return f"The loss spiked {_times(len(spikes))} all the same: look for another cause than the learning rate."
    if highest <= 0:
        return "The loss did not spike, and no direction of positive curvature was seen."
    return f"The learning rate has room{_where_the_limit_is(learning_rate, highest)}."


def _where_the_limit_is(learning_rate: float | None, ratio: float) -> str:
    """The limit is in inverse proportion to the learning rate, whatever the optimizer."""
    if learning_rate is None or not learning_rate > 0:
        return ""
    return f": at that sharpness the limit is met at {learning_rate / ratio:.2g}"


def _spiked(num_spikes: int, num_near: int, window: int) -> str:
    """What is to be said of spikes that the limit does not explain; nothing if there are none."""
    if not num_spikes:
        return ""
    if not num_near:
        return f"The loss spiked {_times(num_spikes)}, but not near a measurement at the limit."
    return f"{_came_near(num_spikes, num_near, window)}, no more than elsewhere."


def _came_near(num_spikes: int, num_near: int, window: int) -> str:
    which = "The one loss spike" if num_spikes == 1 else f"{num_near} of {num_spikes} loss spikes"
    return f"{which} came within {window} steps of a measurement at the limit"


def _shown(ratio: float) -> str:
    return f"{ratio:.2f}" if 0.1 <= abs(ratio) < 100 else f"{ratio:.2g}"


def _times(count: int) -> str:
    return "once" if count == 1 else "twice" if count == 2 else f"{count} times"
