"""The kind follows from the facts, by the first rule that fits."""

from dataclasses import replace
from typing import Any, get_args

import pytest

from lyapunov_lightning.curvature.diagnosis import TITLES, Kind, Reading, classify
from lyapunov_lightning.curvature.diagnosis.facts import RunFacts
from lyapunov_lightning.curvature.diagnosis.losses import Excursion
from lyapunov_lightning.curvature.diagnosis.sentences import SENTENCES
from tests.curvature.diagnosis.made_up import readings_of

FAULT = Excursion(
    start=60, end=63, count=4, level=0.5, last=0.5, margin=0.2, gained=0.5, values=(300.0, 20.0), came_back=True
)


def seen(*ratios: float, **others: Any) -> RunFacts:
    """The facts of a run with these ratios at every tenth step, all converged, and nothing else to see."""
    return replace(RunFacts(readings=tuple(readings_of(ratios, learning_rate=0.1))), **others)


def before(*ratios: float, **options: Any) -> dict[str, Any]:
    """A loss that was lost at step 100, after these ratios."""
    return {"before": tuple(readings_of(ratios, **{"learning_rate": 0.1, **options})), "lost_at": 100}


CASES: list[tuple[Kind, RunFacts]] = [
    ("unknown", seen()),
    ("unknown", seen(lost_at=100)),
    ("too_fast", seen(0.5, 1.2, 0.3, lost_at=15, before=tuple(readings_of([0.5, 1.2])))),
    ("too_fast", seen(lost_at=3, is_unmeasured=True)),
    ("too_fast", seen(0.3, 0.3, 0.3, rose_at_first=True, has_improved=False)),
    ("too_fast", seen(1.2, 1.2, 1.2, has_improved=False)),
    ("too_fast", seen(1.2, 1.2, 0.9, **before(1.2, 1.2, 0.9))),
    ("too_fast_later", seen(1.2, *[0.3] * 8, **before(0.3, 1.2))),
    ("too_fast_later", seen(1.2, 0.9, **before(0.9, 3.0, learning_rate=0.4))),
    ("too_fast_later", seen(0.5, 0.5, **before(0.5, 0.5, 1.2, 0.3))),
    ("too_fast_later", seen(0.5, 0.5, **before(0.3, 0.6))),
    ("too_fast_later", seen(0.3, 0.3, 0.3, 0.3, 1.2, 1.2, has_improved=False)),
    ("data_fault", seen(0.3, 0.3, faults=(replace(FAULT, start=100, came_back=False),), **before(0.3, 0.3))),
    ("data_fault", seen(0.3, 0.3, 0.3, faults=(FAULT,))),
    ("bad_batch", seen(0.3, 0.3, 0.3, faults=(replace(FAULT, count=1, end=60),))),
    ("lost_otherwise", seen(0.3, 0.3, **before(0.3, 0.3))),
    ("lost_otherwise", seen(0.3, 0.3, lost_at=100, is_unmeasured=True)),
    ("lost_otherwise", seen(lost_at=0, is_unmeasured=True, settling=(Reading(10, 0.5, judged=False),))),
    ("not_converged", seen(readings=tuple(Reading(step, 2.0, converged=step < 2) for step in range(5)))),
    ("few", seen(2.0, 2.0)),
    ("few", seen(settling=(Reading(0, 400.0, judged=False),))),
    ("clipped", seen(readings=tuple(readings_of([0.5] * 5, clipping=0.1, learning_rate=0.1)))),
    ("clipped", seen(readings=tuple(readings_of([0.05] * 5, clipping=0.9, learning_rate=0.1)))),
    ("room", seen(0.5, 0.6, 0.94)),
    ("room", seen(0.1, 0.1, 0.1, has_stalled=True)),
    ("room", seen(readings=tuple(readings_of([0.1] * 5, noise_ratio=0.1)), has_stalled=True)),
    ("noise_limited", seen(readings=tuple(readings_of([0.1] * 5, noise_ratio=0.6)), has_stalled=True)),
    ("left", seen(2.0, *[0.5] * 12)),
    ("limited", seen(0.5, 1.0, 1.0, spikes=(12, 18, 90))),
    ("at_edge", seen(0.5, 1.0, 1.0, spikes=(12, 18, 90), share_near=0.7)),
    ("above", seen(0.5, 3.6, 3.6)),
    ("limited", seen(0.5, 3.6, 3.6, has_stalled=True)),
    ("limited", seen(0.5, 1.6, 1.6, has_stalled=True)),
    ("at_edge", seen(0.5, 1.1, 1.1, has_stalled=True)),
    ("at_edge", seen(0.5, 1.6, 1.6)),
    ("at_edge", seen(0.5, 1.0, 1.0)),
    ("at_edge", seen(*[0.5] * 12, 1.0)),
]


@pytest.mark.parametrize(("kind", "facts"), CASES)
def test_the_kind_follows_from_the_facts_and_has_two_sentences(kind: Kind, facts: RunFacts) -> None:
    assert classify(facts) == kind
    sharpness, consequence = SENTENCES[kind](facts)
    assert sharpness.endswith(".")
    assert consequence.endswith(".")
    assert "None" not in sharpness + consequence


def test_each_kind_has_a_title_sentences_and_a_case_above() -> None:
    assert {*TITLES} == {*SENTENCES} == {kind for kind, _ in CASES} == {*get_args(Kind)}
