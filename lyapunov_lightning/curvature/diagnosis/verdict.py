"""The diagnosis of a run: what `diagnose` returns."""

from collections.abc import Sequence
from dataclasses import dataclass

from lyapunov_lightning.curvature.diagnosis.facts import NEAR, facts_of
from lyapunov_lightning.curvature.diagnosis.kinds import SUFFERING, Kind, classify
from lyapunov_lightning.curvature.diagnosis.readings import LIMIT_FACTORS, Reading, confidence, learning_rate_limit
from lyapunov_lightning.curvature.diagnosis.sentences import SENTENCES, TITLES


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
        learning_rate_limit: The learning rate at which the run would be at the limit, from what the measurements name,
            each with the learning rate of its own step (see `readings.learning_rate_limit`); at most twelve times that
            of the run. None if none names one.
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


def diagnose(
    readings: Sequence[Reading],
    losses: tuple[Sequence[int], Sequence[float]] = ((), ()),
    learning_rates: Sequence[float] = (),
) -> Diagnosis:
    """Say what the stability ratios and the losses of a run mean for its learning rate.

    Args:
        readings: The measurements, in the order of their steps.
        losses: Steps and values of the training loss.
        learning_rates: Those of these steps, if they are known: where a schedule raises the learning rate between two
            measurements, the last ratio before counts as what it comes to.

    Returns:
        The diagnosis, by the rules in `lyapunov_lightning.curvature.diagnosis`.

    Example::

        >>> from lyapunov_lightning.curvature.diagnosis import Reading, diagnose
        >>> ratios = {0: 0.2, 10: 0.6, 20: 1.01, 30: 0.99}
        >>> readings = [Reading(step, ratio, learning_rate=0.1) for step, ratio in ratios.items()]
        >>> found = diagnose(readings, (range(40), [1 / (1 + t) for t in range(40)]))
        >>> found.kind, found.met_at, round(found.learning_rate_limit, 2)
        ('at_edge', 20, 0.21)
        >>> print(found.sharpness)
        The sharpness met the stability limit at step 20 and stayed at 1.00 times it.

    """
    facts = facts_of(readings, losses, learning_rates)
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
        learning_rate_limit=learning_rate_limit(facts.naming, is_suffering=kind in SUFFERING),
        confidence=confidence(facts.naming, facts.num_unsure),
    )
