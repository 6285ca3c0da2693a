"""What is said of a run: two sentences for each kind, with the figures from the facts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lyapunov_lightning.curvature.diagnosis.facts import NEAR, RunFacts, facts_of, is_at_limit
from lyapunov_lightning.curvature.diagnosis.kinds import Kind, classify
from lyapunov_lightning.curvature.diagnosis.readings import LIMIT_FACTORS, Reading, confidence, learning_rate_limit

TITLES: dict[Kind, str] = {
    "unknown": "stability limit unknown",
    "diverged": "diverged above the stability limit",
    "diverged_below": "diverged below the stability limit",
    "not_converged": "measurements did not converge",
    "few": "too few measurements to judge",
    "below": "below the stability limit",
    "left": "above the stability limit for a while",
    "limited": "limited by the learning rate",
    "above": "above the stability limit",
    "at_edge": "at the edge of stability",
}
"""Each kind in a few words."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What the stability ratios and the losses of a run say. As a string: two sentences, with the figures.

    Attributes:
        kind: Which of the rules fits, see `lyapunov_lightning.curvature.diagnosis`.
        sharpness: The sentence on the sharpness.
        consequence: The sentence on what follows from it.
        met_at: The first measured step at which the ratio was at the limit, if there is one.
        level: The median ratio since then, or over the last half of the measurements where the limit was not met.
        crossings: The measured steps at which the ratio went above 1.
        spikes: The steps at which the loss began to spike.
        num_near: How many of these came near a measurement at the limit.
        window: Within how many steps of a measurement a spike counts as near.
        learning_rate_limit: The learning rate at which the run would be at the limit: the median of what the last third
            of the measurements name, each with the learning rate of its own step. None if none names one.
        confidence: How sure that is, in words.

    """

    kind: Kind
    sharpness: str
    consequence: str
    met_at: int | None = None
    level: float | None = None
    crossings: tuple[int, ...] = ()
    spikes: tuple[int, ...] = ()
    num_near: int = 0
    window: int = NEAR
    learning_rate_limit: float | None = None
    confidence: str = "none"

    @property
    def learning_rate_range(self) -> tuple[float, float] | None:
        """Where the learning rate at the limit lies in four of five runs; None if none is named."""
        if self.learning_rate_limit is None:
            return None
        low, high = LIMIT_FACTORS
        return low * self.learning_rate_limit, high * self.learning_rate_limit

    @property
    def title(self) -> str:
        """The kind in a few words."""
        return TITLES[self.kind]

    def __str__(self) -> str:
        return f"{self.sharpness} {self.consequence}"


def diagnose(readings: Sequence[Reading], losses: tuple[Sequence[int], Sequence[float]] = ((), ())) -> Diagnosis:
    """Say what the stability ratios and the losses of a run mean for its learning rate.

    Args:
        readings: The measurements, in the order of their steps.
        losses: Steps and values of the training loss.

    Returns:
        The diagnosis, by the rules in `lyapunov_lightning.curvature.diagnosis`.

    Example::

        >>> from lyapunov_lightning.curvature.diagnosis import Reading, diagnose
        >>> ratios = {0: 0.2, 10: 0.6, 20: 1.01, 30: 0.99}
        >>> readings = [Reading(step, ratio, learning_rate=0.1) for step, ratio in ratios.items()]
        >>> found = diagnose(readings, (range(40), [1 / (1 + t) for t in range(40)]))
        >>> found.kind, found.met_at, round(found.learning_rate_limit, 2)
        ('at_edge', 20, 0.13)
        >>> print(found.sharpness)
        The sharpness met the stability limit at step 20 and stayed at 1.00 times it.

    """
    facts = facts_of(readings, losses)
    kind = classify(facts)
    sharpness, consequence = SENTENCES[kind](facts)
    if kind == "unknown":  # spikes without a ratio would say nothing of the learning rate
        return Diagnosis(kind=kind, sharpness=sharpness, consequence=consequence)
    return Diagnosis(
        kind=kind,
        sharpness=sharpness,
        consequence=consequence,
        met_at=facts.met_at,
        level=facts.level,
        crossings=facts.crossings,
        spikes=facts.spikes,
        num_near=facts.num_near,
        window=facts.window,
        learning_rate_limit=learning_rate_limit(facts.counted),
        confidence=confidence(facts.counted, facts.num_unsure),
    )


def _unknown(facts: RunFacts) -> tuple[str, str]:
    return (
        "No sharpness was compared with a stability limit.",
        "Whether the learning rate is to blame for anything cannot be said.",
    )


def _diverged(facts: RunFacts) -> tuple[str, str]:
    # The first of the ratios at the limit: the later ones were measured on parameters that were already thrown about.
    first = next(filter(is_at_limit, facts.before_lost))
    return (
        f"The sharpness was {shown(first.value)} times the stability limit at step {first.step}, and the loss was lost"
        f" from step {facts.lost_at} on.",
        f"The learning rate is too large{where_the_limit_is(first)}.",
    )


def _diverged_below(facts: RunFacts) -> tuple[str, str]:
    seen = "not measured"
    if facts.before_lost:
        last = facts.before_lost[-1]
        seen = f"{shown(last.value)} times the stability limit at step {last.step}"
    return (
        f"The loss was lost from step {facts.lost_at} on, and the sharpness before that was {seen}.",
        "As far as was measured, the learning rate is not to blame: look for what else is wrong, such as numbers that"
        " are not finite, or measure more often.",
    )


def _not_converged(facts: RunFacts) -> tuple[str, str]:
    return (
        f"Only {len(facts.counted)} of {len(facts.readings)} measurements of the sharpness met their tolerance.",
        "That is too few to blame the learning rate or to clear it: raise `tol`, or measure on more data.",
    )


def _few(facts: RunFacts) -> tuple[str, str]:
    last = facts.counted[-1]
    return (
        f"The sharpness was measured {_times(len(facts.counted))}: {shown(last.value)} times the stability limit at"
        f" step {last.step}.",
        "That is too few to say more: measure more often.",
    )


def _below(facts: RunFacts) -> tuple[str, str]:
    highest, last = facts.highest, facts.counted[-1]
    at_the_end = f", {shown(last.value)} times it at the end" if highest.step != last.step else ""
    return (
        f"The sharpness stayed below the stability limit: {shown(highest.value)} times it at most, at step"
        f" {highest.step}{at_the_end}.",
        _room(facts, highest),
    )


def _room(facts: RunFacts, highest: Reading) -> str:
    """What follows for a run that stayed below the limit."""
    if facts.spikes:
        return (
            f"The loss spiked {_times(len(facts.spikes))} all the same: look for another cause than the learning rate."
        )
    # The rate at the limit would be negative or infinite.
    if highest.value <= 0:
        return "The loss did not spike, and no direction of positive curvature was seen."
    return f"The learning rate has room{where_the_limit_is(highest)}."


def _left(facts: RunFacts) -> tuple[str, str]:
    sharpness = (
        f"The sharpness was at the stability limit from step {facts.met_at} to step {facts.at_limit[-1].step},"
        f" {shown(facts.highest.value)} times it at most, and {shown(facts.last_level)} times it at the end."
    )
    if 2 * facts.num_near >= len(facts.spikes) > 0:
        return sharpness, f"{_came_near(facts)}: the learning rate was too large then."
    calm = "The loss did not spike, and the learning rate does not limit the run any more."
    return sharpness, _unexplained_spikes(facts) or calm


def _limited(facts: RunFacts) -> tuple[str, str]:
    return _stayed(facts), f"{_came_near(facts)}: the learning rate is what limits this run."


def _above(facts: RunFacts) -> tuple[str, str]:
    calm = (
        "The loss did not spike all the same, which is common on small batches: measure on fixed data to see what the"
        " training follows."
    )
    return _stayed(facts), _unexplained_spikes(facts) or calm


def _at_edge(facts: RunFacts) -> tuple[str, str]:
    calm = "The loss did not spike: the learning rate is as large as the curvature lets it be, and the run bears it."
    return _stayed(facts), _unexplained_spikes(facts) or calm


SENTENCES: dict[Kind, Callable[[RunFacts], tuple[str, str]]] = {
    "unknown": _unknown,
    "diverged": _diverged,
    "diverged_below": _diverged_below,
    "not_converged": _not_converged,
    "few": _few,
    "below": _below,
    "left": _left,
    "limited": _limited,
    "above": _above,
    "at_edge": _at_edge,
}
"""For each kind what is said of the sharpness, and what follows from it."""


def where_the_limit_is(reading: Reading) -> str:
    """The learning rate at the limit, in words; nothing if that of the measurement is not known."""
    limit = reading.learning_rate_limit
    return "" if limit is None else f": at that sharpness the limit is met at {limit:.2g}"


def shown(ratio: float) -> str:
    """A stability ratio as it stands in the sentences."""
    return f"{ratio:.2f}" if 0.1 <= abs(ratio) < 100 else f"{ratio:.2g}"


def _stayed(facts: RunFacts) -> str:
    assert facts.level is not None  # the limit was met
    return f"The sharpness met the stability limit at step {facts.met_at} and stayed at {shown(facts.level)} times it."


def _unexplained_spikes(facts: RunFacts) -> str:
    """What is said of spikes that the limit does not explain; nothing if there are none."""
    if not facts.spikes:
        return ""
    # If some did come near, they are no more than chance brings: else the kind would be `limited`.
    if not facts.num_near:
        return f"The loss spiked {_times(len(facts.spikes))}, but not near a measurement at the limit."
    return f"{_came_near(facts)}, no more than elsewhere."


def _came_near(facts: RunFacts) -> str:
    num_spikes = len(facts.spikes)
    which = "The one loss spike" if num_spikes == 1 else f"{facts.num_near} of {num_spikes} loss spikes"
    return f"{which} came within {facts.window} steps of a measurement at the limit"


def _times(count: int) -> str:
    return "once" if count == 1 else "twice" if count == 2 else f"{count} times"
