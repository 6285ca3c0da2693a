"""What is said of a run: two sentences for each kind, with the figures from the facts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

from lyapunov_lightning.curvature.diagnosis.facts import AT_LIMIT, NEAR, SUSPECT, RunFacts, is_at_limit
from lyapunov_lightning.curvature.diagnosis.kinds import LEFT_BELOW, Kind
from lyapunov_lightning.curvature.diagnosis.losses import Excursion
from lyapunov_lightning.curvature.diagnosis.readings import (
    FURTHEST,
    LIMIT_FACTORS,
    Reading,
    highest_rate,
    learning_rate_limit,
)

TITLES: dict[Kind, str] = {
    "unknown": "stability limit unknown",
    "too_fast": "learning rate too large from the start",
    "too_fast_later": "learning rate too large later on",
    "data_fault": "a fault in the data",
    "lost_otherwise": "lost below the stability limit",
    "not_converged": "measurements did not converge",
    "few": "too few measurements to judge",
    "bad_batch": "a bad batch",
    "clipped": "clipped gradients",
    "noise_limited": "below the stability limit, limited by noise",
    "room": "below the stability limit",
    "left": "above the stability limit for a while",
    "limited": "limited by the learning rate",
    "above": "above the stability limit",
    "at_edge": "at the edge of stability",
}
"""Each kind in a few words."""


_LARGER = 1.1
"""How many times the present rate one has to be that is named as a larger one: two digits of it are shown."""


def _unknown(facts: RunFacts) -> tuple[str, str]:
    return (
        "No sharpness was compared with a stability limit.",
        "Whether the learning rate is to blame for anything cannot be said.",
    )


def _too_fast(facts: RunFacts) -> tuple[str, str]:
    decisive = facts.decisive
    if decisive is None or not decisive.judged:
        lost = "The loss rose in the first steps and was no lower at the end than at first"
        if facts.lost_at is not None:
            lost = f"The loss was lost from step {facts.lost_at} on"
        return (
            f"{lost}, and there was no stability ratio before to judge by.",
            "So early it is as a rule the learning rate that is too large: warm it up, or lower it.",
        )
    return _met(facts, decisive), _too_large(decisive, "The learning rate is too large")


def _too_fast_later(facts: RunFacts) -> tuple[str, str]:
    decisive = facts.decisive
    assert decisive is not None  # by the rule for the kind
    if facts.is_raised:
        raised = f"The learning rate had been raised to {decisive.learning_rate:.2g}, which is too large"
        return _met(facts, decisive), _too_large(decisive, raised)
    return _met(facts, decisive), _too_large(decisive, "The learning rate became too large for the curvature")


def _met(facts: RunFacts, decisive: Reading) -> str:
    """Where the limit was met, and what became of the loss."""
    lost = "was no lower at the end than at first"
    if facts.lost_at is not None:
        lost = f"was lost from step {facts.lost_at} on"
    return (
        f"The sharpness was {shown(decisive.value)} times the stability limit at step {decisive.step}, and the loss"
        f" {lost}."
    )


def _too_large(decisive: Reading, told: str) -> str:
    """That the learning rate is to blame, as sure as the ratio makes it."""
    if is_at_limit(decisive):
        return f"{told}{where_the_limit_is(decisive)}."
    return (
        f"{told}, as far as can be told{where_the_limit_is(decisive)}, which is known roughly, and nothing"
        " else is to be seen."
    )


def _data_fault(facts: RunFacts) -> tuple[str, str]:
    fault = facts.fault
    assert fault is not None  # by the rule for the kind
    is_short = fault.came_back and fault.start < fault.end < fault.start + NEAR
    steps = f"of steps {fault.start} to {fault.end}" if is_short else f"from step {fault.start} on"
    cause = (
        "for a fault in the data, or for a number that is not finite," if _is_lost(fault) else "for a fault in the data"
    )
    return _jumped(facts, fault), f"No learning rate does that at once: look {cause} {steps}."


def _bad_batch(facts: RunFacts) -> tuple[str, str]:
    fault = facts.faults[0]
    steps = " and ".join(str(one.start) for one in facts.faults)
    return _jumped(facts, fault), (
        f"No learning rate does that at once: look at the batch{'es' * (len(facts.faults) > 1)} of step"
        f"{'s' * (len(facts.faults) > 1)} {steps}."
    )


def _jumped(facts: RunFacts, fault: Excursion) -> str:
    """How the loss jumped, what was measured before, and what on the batch."""
    to = "no finite number" if _is_lost(fault) else f"{max(fault.values):.3g}"
    outcome = "came back" if fault.came_back else "did not come back"
    measured = []
    if facts.before:
        highest = max(facts.before, key=lambda reading: reading.value)
        measured.append(f"at most {shown(highest.value)} times the stability limit before that")
    if facts.on_batch is not None:
        measured.append(f"{shown(facts.on_batch.single)} times it on the batch of step {facts.on_batch.step}")
    sharpness = f"; the sharpness was {' and '.join(measured)}" if measured else ""
    return f"The loss jumped from {fault.level:.3g} to {to} at step {fault.start} and {outcome}{sharpness}."


def _is_lost(fault: Excursion) -> bool:
    return not math.isfinite(max(fault.values))


def _lost_otherwise(facts: RunFacts) -> tuple[str, str]:
    seen = "not measured"
    if facts.before:
        highest = max(facts.before, key=lambda reading: reading.value)
        seen = f"{shown(highest.value)} times the stability limit at most"
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
    if not facts.counted:
        return (
            "All measurements were made before the moments of the optimizer had settled.",
            "They cannot be judged: train for longer.",
        )
    last = facts.counted[-1]
    return (
        f"The sharpness was measured {_times(len(facts.counted))}: {shown(last.value)} times the stability limit at"
        f" step {last.step}.",
        "That is too few to say more: measure more often.",
    )


def _clipped(facts: RunFacts) -> tuple[str, str]:
    left = median(reading.clipping for reading in facts.clipped if reading.clipping is not None)
    level = facts.last_level
    sharpness = (
        f"The gradient was clipped at {len(facts.clipped)} of {len(facts.readings)} measured steps, to {left:.2g} of"
        f" its length, and the sharpness is {shown(level)} times the stability limit for what that leaves."
    )
    if level < left * AT_LIMIT:
        return sharpness, f"Without clipping it would be below the limit too. {_room_at(facts)}."
    unclipped = [replace(reading, ratio=reading.value / left) for reading in facts.counted]
    limit = learning_rate_limit(unclipped, is_suffering=True)
    named = "" if limit is None else f": without it the limit is met at a learning rate of {limit:.2g}"
    return sharpness, f"Clipping is what keeps this learning rate stable{named}."


def _below(facts: RunFacts) -> str:
    highest, last = facts.highest, facts.counted[-1]
    if highest.value <= 0:
        return f"None of {len(facts.counted)} measurements found a sharpness above zero."
    at_the_end = f", {shown(last.value)} times it at the end" if highest.step != last.step else ""
    return (
        f"The sharpness stayed below the stability limit: {shown(highest.value)} times it at most, at step"
        f" {highest.step}{at_the_end}."
    )


def _noise_limited(facts: RunFacts) -> tuple[str, str]:
    return _below(facts), (
        f"{_room_at(facts)}, but what limits it is noise and not curvature: over the last half the loss has fallen no"
        " further than it differs from batch to batch, and a larger learning rate brings more of that."
    )


def _room(facts: RunFacts) -> tuple[str, str]:
    if facts.spikes and facts.highest.value >= SUSPECT:
        return _below(facts), (
            f"The loss spiked {_times(len(facts.spikes))}: the limit is known roughly, and the learning rate may be the"
            " cause."
        )
    if facts.spikes:
        return _below(facts), (
            f"The loss spiked {_times(len(facts.spikes))} all the same: look for another cause than the learning rate."
        )
    limit = learning_rate_limit(facts.counted)
    # The rate at the limit would be negative or infinite.
    if facts.highest.value <= 0:
        return _below(facts), "The loss did not spike, and no direction of positive curvature was seen."
    if limit is None:
        return _below(facts), "The learning rate has room."
    return _below(facts), f"{_room_at(facts)}. {_worth_trying(facts, limit)}"


def _room_at(facts: RunFacts) -> str:
    """Up to which learning rate the run is stable."""
    limit = learning_rate_limit(facts.counted)
    if limit is None:
        return "The learning rate has room"
    low, high = (factor * limit for factor in LIMIT_FACTORS)
    is_furthest = limit >= FURTHEST * highest_rate(facts.counted)
    how_far = f"{limit:.2g}, further than which nothing is said" if is_furthest else f"about {limit:.2g}"
    return f"The run is stable up to a learning rate of {how_far} ({low:.2g} to {high:.2g} in four of five runs)"


def _worth_trying(facts: RunFacts, limit: float) -> str:
    """Which larger learning rate is worth trying, as far as noise lets it bring something."""
    low, highest = LIMIT_FACTORS[0] * limit, highest_rate(facts.counted)
    if low > _LARGER * highest:
        return f"A larger one is worth trying, such as {low:.2g}."
    return f"A larger one than {highest:.2g} is worth trying in small steps, since it may be at the limit already."


def _left(facts: RunFacts) -> tuple[str, str]:
    sharpness = (
        f"The sharpness was at the stability limit {_span(facts.at_limit)},"
        f" {shown(facts.highest.value)} times it at most, and {shown(facts.last_level)} times it at the end."
    )
    if 2 * facts.num_near >= len(facts.spikes) > 0:
        return sharpness, f"{_came_near(facts)}: the learning rate was too large then."
    calm = "The loss did not spike, and the learning rate does not limit the run any more."
    return sharpness, _unexplained_spikes(facts) or calm


def _limited(facts: RunFacts) -> tuple[str, str]:
    if not facts.num_near:
        return _stayed(facts), (
            "Over the last half the loss has fallen no further than it differs from batch to batch:"
            f" the learning rate is what limits this run{_where_it_stays(facts)}."
        )
    return _stayed(facts), f"{_came_near(facts)}: the learning rate is what limits this run."


def _above(facts: RunFacts) -> tuple[str, str]:
    calm = (
        "The loss did not spike all the same, but as a rule a run so far above the limit gets on better at a smaller"
        f" learning rate{_where_it_stays(facts)}."
    )
    return _stayed(facts), _unexplained_spikes(facts) or calm


def _at_edge(facts: RunFacts) -> tuple[str, str]:
    calm = (
        "The loss did not spike: the run bears this learning rate, to which its curvature has adapted, and how much"
        " more it bears can only be tried."
    )
    return _stayed(facts), _unexplained_spikes(facts) or calm


SENTENCES: dict[Kind, Callable[[RunFacts], tuple[str, str]]] = {
    "unknown": _unknown,
    "too_fast": _too_fast,
    "too_fast_later": _too_fast_later,
    "data_fault": _data_fault,
    "lost_otherwise": _lost_otherwise,
    "not_converged": _not_converged,
    "few": _few,
    "bad_batch": _bad_batch,
    "clipped": _clipped,
    "noise_limited": _noise_limited,
    "room": _room,
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


def _where_it_stays(facts: RunFacts) -> str:
    """The learning rate that would be at the limit where the run has stayed since it met it."""
    limits = [limit for limit in (reading.learning_rate_limit for reading in facts.since_met) if limit is not None]
    return f": at that sharpness the limit is met at {median(limits):.2g}" if limits else ""


def shown(ratio: float) -> str:
    """A stability ratio as it stands in the sentences."""
    return f"{ratio:.2f}" if 0.1 <= abs(ratio) < 100 else f"{ratio:.2g}"


def _stayed(facts: RunFacts) -> str:
    assert facts.level is not None  # the limit was met
    if facts.level < LEFT_BELOW:  # it came back at the end
        return (
            f"The sharpness met the stability limit at step {facts.met_at}, was below it for the most part, and was"
            f" {shown(facts.last_level)} times it at the end."
        )
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


def _span(readings: Sequence[Reading]) -> str:
    first, last = readings[0].step, readings[-1].step
    return f"at step {first}" if first == last else f"from step {first} to step {last}"


def _times(count: int) -> str:
    return "once" if count == 1 else "twice" if count == 2 else f"{count} times"
