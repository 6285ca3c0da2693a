"""Which kind of run it is: the rules, in the order in which they are tried."""

from typing import Literal

from lyapunov_lightning.curvature.diagnosis.facts import RunFacts
from lyapunov_lightning.curvature.diagnosis.readings import FEWEST

Kind = Literal[
    "unknown",
    "too_fast",
    "too_fast_later",
    "data_fault",
    "lost_otherwise",
    "not_converged",
    "few",
    "bad_batch",
    "clipped",
    "noise_limited",
    "room",
    "left",
    "limited",
    "above",
    "at_edge",
]

SUFFERING: tuple[Kind, ...] = ("too_fast", "too_fast_later", "limited")
"""The kinds of runs whose learning rate is too large by what the run shows."""

LEFT_BELOW = 0.8
"""The median of the last third of the ratios below which the run has left the limit."""

_FAR_ABOVE = 3.0
"""The median ratio above which a run is not at the limit but above it: batches of some hundred train well at 0.9 to 1.6
(`docs/verdict.md`), and single ones at 2.5."""

_ABOVE_IF_STALLED = 1.2
"""The same where the loss does not fall any more. Of 334 runs of 55 sweeps at the largest usable learning rate and at a
half to a thirtieth of it none was at the limit with a loss that had stalled, so that this could be as low as 1; but a
network that has learned its data on all of them may rest at the edge."""

_NOISY = 0.25
"""The share of a step's progress that noise takes from which on it may be what keeps a loss from falling: at 0.5 one
step makes the most, and a measured share is off by a factor of two."""

_BAD_BATCH = 2
"""How many losses in a row are at most a bad batch and no fault in the data."""


def classify(facts: RunFacts) -> Kind:
    """The first of the kinds at the head of the room that fits."""
    if not facts.readings and not facts.settling and not facts.is_lost_at_once:
        return "unknown"
    if facts.rose_at_first and not facts.has_improved:
        return "too_fast"
    if facts.lost_at is not None:
        if facts.fault is not None:
            return "data_fault"
        if not facts.evidence and not (facts.is_unmeasured and facts.is_lost_at_once):
            return "lost_otherwise"
        return "too_fast" if facts.is_from_start else "too_fast_later"
    # After the divergence, for which a ratio that did not converge is evidence enough, and before all that needs
    # levels.
    if facts.num_unsure > len(facts.counted):
        return "not_converged"
    if len(facts.counted) < FEWEST:
        return "few"
    if not facts.has_improved and facts.evidence:
        return "too_fast" if facts.is_from_start else "too_fast_later"
    if facts.faults:
        return "bad_batch" if all(fault.count <= _BAD_BATCH for fault in facts.faults) else "data_fault"
    if 2 * len(facts.clipped) > len(facts.readings):
        return "clipped"
    if facts.level is None or not facts.at_limit:
        is_noisy = facts.noise_level is not None and facts.noise_level >= _NOISY
        return "noise_limited" if facts.has_stalled and facts.has_improved and is_noisy else "room"
    if facts.last_level < LEFT_BELOW and facts.at_limit[-1] not in facts.last_third:
        return "left"
    # Where most of a run is near the limit most spikes are near it too, whatever causes them.
    if facts.spikes and facts.num_near >= max(0.5, facts.share_near) * len(facts.spikes):
        return "limited"
    if facts.has_stalled and facts.level > _ABOVE_IF_STALLED:
        return "limited"
    return "above" if facts.level > _FAR_ABOVE else "at_edge"
