"""Which kind of run it is: the rules, in the order in which they are tried."""

from typing import Literal

from lyapunov_lightning.curvature.diagnosis.facts import RunFacts, is_at_limit
from lyapunov_lightning.curvature.diagnosis.readings import FEWEST

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

_LEFT_BELOW = 0.8
"""The median of the last third of the ratios below which the run has left the limit."""

_FAR_ABOVE = 1.5
"""The median ratio above which a run is not at the limit but above it."""


def classify(facts: RunFacts) -> Kind:
    """The first of the kinds at the head of the room that fits."""
    if not facts.readings:
        return "unknown"
    if facts.lost_at is not None:
        return "diverged" if any(map(is_at_limit, facts.before_lost)) else "diverged_below"
    # After the divergence, for which a ratio that did not converge is evidence enough, and before all that needs
    # levels.
    if facts.num_unsure > len(facts.counted):
        return "not_converged"
    if len(facts.counted) < FEWEST:
        return "few"
    if facts.level is None or not facts.at_limit:
        return "below"
    if facts.last_level < _LEFT_BELOW:
        return "left"
    # Where most of a run is near the limit most spikes are near it too, whatever causes them.
    if facts.spikes and facts.num_near >= max(0.5, facts.share_near) * len(facts.spikes):
        return "limited"
    return "above" if facts.level > _FAR_ABOVE else "at_edge"
