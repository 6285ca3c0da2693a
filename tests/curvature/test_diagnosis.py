"""What is said of a run follows from its stability ratios and losses, by rules that are written down."""

import math
import random
from dataclasses import replace
from statistics import median
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyapunov_lightning.curvature.diagnosis import (
    TITLES,
    EdgeWatch,
    Kind,
    Reading,
    classify,
    diagnose,
    diverged_at,
    loss_spikes,
)
from lyapunov_lightning.curvature.diagnosis.facts import RunFacts
from lyapunov_lightning.curvature.diagnosis.readings import LIMIT_FACTORS
from lyapunov_lightning.curvature.diagnosis.sentences import SENTENCES
from lyapunov_lightning.curvature.stability import stability_of


def falling(num_steps: int, noise: float = 0.01, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [math.exp(-step / 200) * (1 + noise * generator.gauss(0, 1)) + 0.1 for step in range(num_steps)]


def with_spikes(losses: list[float], *steps: int, height: float = 3.0, width: int = 4) -> list[float]:
    spiked = list(losses)
    for step in steps:
        for place in range(step, step + width):
            spiked[place] *= height
    return spiked


def told(
    ratios: Any,
    losses: list[float] | None = None,
    every: int = 10,
    *,
    converged: Any = None,
    learning_rate: float | None = None,
) -> Any:
    """The diagnosis of ratios at every tenth step of a run of 400 steps."""
    losses = falling(400) if losses is None else losses
    are_sure = [True] * len(ratios) if converged is None else converged
    readings = [
        Reading(every * place, ratio, learning_rate=learning_rate, converged=is_sure)
        for place, (ratio, is_sure) in enumerate(zip(ratios, are_sure, strict=True))
    ]
    return diagnose(readings, (range(len(losses)), losses))


def ramp(to: float, meets_at: int = 160) -> list[float]:
    """Ratios that rise to a level, where they stay."""
    return [min(to, to * (0.1 + 0.9 * step / meets_at)) for step in range(0, 400, 10)]


# Each kind.


def test_far_below():
    found = told([0.1 + 0.001 * i for i in range(40)], learning_rate=0.01)
    assert found.kind == "below"
    assert found.met_at is None
    assert str(found) == (
        "The sharpness stayed below the stability limit: 0.14 times it at most, at step 390. The learning rate has"
        " room: at that sharpness the limit is met at 0.072."
    )


def test_far_below_with_spikes_clears_the_learning_rate():
    found = told([0.2] * 40, with_spikes(falling(400), 150, 250, 350))
    assert (found.kind, found.spikes) == ("below", (150, 250, 350))
    assert found.consequence == "The loss spiked 3 times all the same: look for another cause than the learning rate."


def test_at_the_edge():
    found = told(ramp(1.02))
    assert (found.kind, found.met_at) == ("at_edge", 150)
    assert found.sharpness == "The sharpness met the stability limit at step 150 and stayed at 1.02 times it."
    assert "did not spike" in found.consequence


def test_spikes_at_the_edge_are_the_learning_rates():
    found = told(ramp(1.04), with_spikes(falling(400), 60, 200, 260, 330))
    assert (found.kind, found.num_near, found.window) == ("limited", 3, 20)
    assert str(found) == (
        "The sharpness met the stability limit at step 150 and stayed at 1.04 times it. 3 of 4 loss spikes came within"
        " 20 steps of a measurement at the limit: the learning rate is what limits this run."
    )


def test_spikes_that_come_anywhere_are_not_blamed_on_the_learning_rate():
    """Half of them near the limit, where two thirds of the run are near it."""
    found = told(ramp(1.04), with_spikes(falling(400), 30, 60, 90, 200, 260, 330))
    assert (found.kind, found.num_near) == ("at_edge", 3)
    assert found.consequence.endswith(
        "3 of 6 loss spikes came within 20 steps of a measurement at the limit, no more than elsewhere."
    )


def test_crossing_and_diverging():
    losses = [*falling(200), *(0.5 * 1.1**step for step in range(60)), math.inf]
    found = told([0.5 + 0.03 * i for i in range(26)], losses, learning_rate=0.4)
    assert (found.kind, found.crossings) == ("diverged", (170,))
    lost = diverged_at(range(len(losses)), losses)
    assert 200 <= lost <= 210  # not the step of the infinity
    assert f"the loss was lost from step {lost} on. The learning rate is too large: at that" in str(found)


def test_a_divergence_to_a_high_plateau_is_one():
    losses = [*falling(200), *([5.0 + 0.01 * (step % 7) for step in range(100)])]
    found = told([0.5 + 0.03 * i for i in range(30)], losses)
    assert found.kind == "diverged"
    assert "lost from step 200 on" in found.sharpness


def test_a_divergence_below_the_limit_is_not_the_learning_rates():
    found = told([0.3] * 40, [*falling(300), math.nan])
    assert found.kind == "diverged_below"
    assert str(found).startswith("The loss was lost from step 300 on, and the sharpness before that was 0.30 times")
    assert "not to blame" in found.consequence


def test_above_at_first_and_below_in_the_end():
    ratios = [2.0] * 5 + [0.4] * 35
    found = told(ratios)
    assert (found.kind, found.met_at) == ("left", 0)
    assert "from step 0 to step 40, 2.00 times it at most, and 0.40 times it at the end" in found.sharpness
    blamed = told(ratios, with_spikes(falling(400), 25))
    assert blamed.consequence == (
        "The one loss spike came within 20 steps of a measurement at the limit: the learning rate was too large then."
    )


def test_not_convex_at_the_start():
    """Where no direction bends upwards the largest eigenvalue is negative, and no learning rate is too large."""
    assert told([-0.2, -0.1, 0.0, *[0.3] * 37]).kind == "below"
    found = told([-0.2] * 40)
    assert found.kind == "below"
    assert found.consequence == "The loss did not spike, and no direction of positive curvature was seen."


def test_above_all_the_time_without_harm_is_told_as_what_it_is():
    found = told([3.0] * 40)
    assert found.kind == "above"
    assert "small batches" in found.consequence


def test_not_converged():
    found = told([1.5] * 40, converged=[False] * 30 + [True] * 10)
    assert found.kind == "not_converged"
    assert found.sharpness == "Only 10 of 40 measurements of the sharpness met their tolerance."


def test_what_did_not_converge_does_not_count():
    found = told([0.2] * 20 + [7.0] + [0.2] * 19, converged=[i != 20 for i in range(40)])
    assert found.kind == "below"


@pytest.mark.parametrize("ratios", [[], [None] * 40])
def test_an_unknown_limit_is_told(ratios):
    found = told(ratios)
    assert (found.kind, found.level) == ("unknown", None)


def test_two_measurements_are_too_few():
    found = told([0.2, 1.2])
    assert found.kind == "few"
    assert "measured twice: 1.20 times the stability limit at step 10" in found.sharpness


def test_near_is_wider_where_measurements_are_far_apart():
    found = told([1.0, 1.0, 1.0, 1.0], with_spikes(falling(400), 160), every=100)
    assert found.window == 100


# The parts: facts, kinds, sentences.


def seen(*ratios: float, **others: Any) -> RunFacts:
    """The facts of a run with these ratios at every tenth step, all converged, and nothing else to see."""
    readings = tuple(Reading(10 * place, ratio, learning_rate=0.1) for place, ratio in enumerate(ratios))
    facts = RunFacts(
        readings=readings,
        spikes=(),
        lost_at=None,
        window=20,
        share_near=0.0,
    )
    return replace(facts, **others)


CASES: list[tuple[Kind, RunFacts]] = [
    ("unknown", seen(lost_at=5)),
    ("diverged", seen(0.5, 1.2, 0.3, 0.2, lost_at=35)),
    ("diverged_below", seen(1.2, 0.3, 0.3, 0.3, lost_at=35)),
    ("not_converged", seen(2.0, 2.0, readings=tuple(Reading(step, 2.0, converged=step < 2) for step in range(5)))),
    ("few", seen(2.0, 2.0)),
    ("below", seen(0.5, 0.6, 0.94)),
    ("left", seen(2.0, 0.5, 0.5)),
    ("limited", seen(0.5, 1.0, 1.0, spikes=(12, 18, 90))),
    ("at_edge", seen(0.5, 1.0, 1.0, spikes=(12, 18, 90), share_near=0.7)),
    ("above", seen(0.5, 1.6, 1.6)),
    ("at_edge", seen(0.5, 1.0, 1.0)),
]


@pytest.mark.parametrize(("kind", "facts"), CASES)
def test_the_kind_follows_from_the_facts_and_has_two_sentences(kind: Kind, facts: RunFacts) -> None:
    assert classify(facts) == kind
    assert all(sentence.endswith(".") for sentence in SENTENCES[kind](facts))


def test_each_kind_has_a_title_sentences_and_a_case_above() -> None:
    assert {*TITLES} == {*SENTENCES} == {kind for kind, _ in CASES} == {*get_args(Kind)}


# The learning rate at the limit.


def test_the_limit_has_the_rate_of_its_own_step():
    """Warm-up and decay over a curvature that stays: each ratio follows the rate of its own step."""
    rates = [0.02 * min(1.0, step / 100) * (1 - step / 400) + 1e-9 for step in range(0, 400, 10)]
    readings = [Reading(10 * place, 5 * rate, learning_rate=rate) for place, rate in enumerate(rates)]
    found = diagnose(readings, (range(400), falling(400)))
    assert found.kind == "below"
    assert found.learning_rate_limit == pytest.approx(0.2)
    low, high = LIMIT_FACTORS
    assert found.learning_rate_range == pytest.approx((low * 0.2, high * 0.2))
    assert found.consequence.endswith("the limit is met at 0.2.")


def test_the_limit_lies_between_where_the_run_mostly_is_and_its_flattest_place():
    ratios = [0.25] * 10 + [1.0] * 30  # a run that sharpens until its rate, 0.1, is at the limit, and began at 0.4
    ratios[35] = 7.0  # a single measurement
    ratios[38:] = [0.01, 0.01]  # and a network that has learned its data
    assert told(ratios, learning_rate=0.1).learning_rate_limit == pytest.approx((0.4 * 0.1) ** 0.5)


@pytest.mark.parametrize("options", [{"learning_rate": None}, {"learning_rate": 0.0}])
def test_without_a_rate_no_limit_is_named(options):
    found = told([0.3] * 40, **options)
    assert (found.learning_rate_limit, found.learning_rate_range, found.confidence) == (None, None, "none")


def test_curvature_that_bends_down_names_no_limit():
    found = told([-0.3] * 40, learning_rate=0.1)
    assert (found.learning_rate_limit, found.learning_rate_range, found.confidence) == (None, None, "none")


@pytest.mark.parametrize(
    ("ratios", "converged", "level"),
    [
        ([0.3 + 0.01 * (i % 3) for i in range(40)], None, "high, by 13 measurements that differ by a factor of 1.05"),
        (
            [0.3 * 2.0 ** (i % 3) for i in range(40)],
            None,
            "moderate, by 13 measurements that differ by a factor of 2.79",
        ),
        ([0.3] * 4, None, "moderate, by 4 measurements"),
        ([0.3 * 4.0 ** (i % 3) for i in range(40)], None, "low, by 13 measurements that differ by a factor of 7.81"),
        ([0.3], None, "low, by one measurement"),
        ([0.3] * 40, [i % 3 == 0 for i in range(40)], "low, by 5 measurements that differ by a factor of 1, 26 others"),
        ([], None, "none"),
    ],
)
def test_confidence_comes_from_number_spread_and_convergence(ratios, converged, level):
    assert told(ratios, converged=converged, learning_rate=0.1).confidence.startswith(level)


def test_what_may_not_be_judged_is_no_evidence():
    """An Adam's first steps: ratios of hundreds while its moments settle."""
    readings = [Reading(10 * place, 420.0, learning_rate=1e-3, judged=False) for place in range(5)]
    readings += [Reading(10 * place, 0.5, learning_rate=1e-3) for place in range(5, 40)]
    found = diagnose(readings, (range(400), falling(400)))
    assert (found.kind, found.met_at, found.learning_rate_limit) == ("below", None, pytest.approx(2e-3))


# Gradient descent on problems of which the answer is known.


def descent(curvature: float, lr: float, optimizer: Any, num_steps: int = 200) -> Any:
    """Train a quadratic with noise in the start; its curvature is what it is."""
    x = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([curvature, 0.1 * curvature], dtype=torch.float64)
    trained = optimizer([x], lr)
    readings, losses = [], []
    for step in range(num_steps):
        loss = (scale * x**2).sum() / 2
        if step % 10 == 0:
            stability = stability_of(trained, [x], None)
            readings.append(Reading(step, curvature / stability.limit, learning_rate=lr))
        trained.zero_grad()
        loss.backward()
        trained.step()
        losses.append(float(loss))
    return diagnose(readings, (range(num_steps), losses))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("share", "kind"), [(0.3, "below"), (1.2, "diverged")])
def test_a_quadratic_is_below_or_lost_by_its_learning_rate(momentum, share, kind):
    curvature = 4.0
    edge = (2 + 2 * momentum) / curvature
    found = descent(curvature, share * edge, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=momentum))
    assert found.kind == kind
    assert f"the limit is met at {edge:.2g}." in found.consequence
    assert found.learning_rate_limit == pytest.approx(edge)


# Spikes.


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.001, 0.05, 0.2]))
def test_noise_is_no_spike(seed, noise):
    assert len(loss_spikes(range(400), falling(400, noise, seed))) <= 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(20, 380), st.integers(2, 15), st.sampled_from([0.001, 0.05]))
def test_a_spike_is_found_where_it_begins(seed, step, width, noise):
    assert step in loss_spikes(range(400), with_spikes(falling(400, noise, seed), step, width=width))


def test_one_batch_is_no_spike():
    assert loss_spikes(range(400), with_spikes(falling(400), 100, 200, width=1)) == ()


def test_another_level_is_one_spike():
    losses = [1.0 + 0.01 * (step % 3) for step in range(100)] + [2.0 + 0.01 * (step % 3) for step in range(100)]
    assert loss_spikes(range(200), losses) == (100,)


def test_losses_below_zero_are_judged_too():
    losses = [-5.0 + 0.1 * (step % 5) for step in range(100)]
    losses[60:64] = [4.0] * 4
    assert loss_spikes(range(100), losses) == (60,)


def test_a_loss_that_only_fluctuates_has_not_diverged():
    generator = random.Random(0)
    losses = [2.3 + 0.1 * generator.gauss(0, 1) for _ in range(500)]
    assert diverged_at(range(500), losses) is None


# While the run goes on.


def warned_at(ratios: list[float | None], losses: list[float], every: int = 10) -> list[int]:
    watch, warned = EdgeWatch(), []
    for index, ratio in enumerate(ratios):
        step = every * index
        if watch.see(Reading(step, ratio), (range(step), losses[:step])) is not None:
            warned.append(step)
    return warned


def test_warns_where_the_ratio_stays_above_one_and_the_loss_rises():
    losses = [*falling(200), *(falling(200)[-1] * 1.05**step for step in range(200))]
    [first, *_] = warned_at([0.5] * 19 + [1.3] * 21, losses)
    assert 210 <= first <= 250


@pytest.mark.parametrize(
    ("ratios", "losses"),
    [
        ([1.3] * 40, falling(400)),
        ([0.9] * 40, [0.1 * 1.01**step for step in range(400)]),
        ([1.3, 0.9] * 20, [0.1 * 1.01**step for step in range(400)]),
        ([1.3, None] * 20, [0.1 * 1.01**step for step in range(400)]),
        ([1.3] * 40, [1.0 + 0.3 * random.Random(step).random() for step in range(400)]),
    ],
    ids=["the loss falls", "below the limit", "above now and then", "not sure", "noise"],
)
def test_does_not_warn_without_both(ratios, losses):
    assert warned_at(ratios, losses) == []


def test_does_not_warn_where_no_loss_has_been_seen_since() -> None:
    watch = EdgeWatch()
    assert [watch.see(Reading(step, 1.5), (range(30), [1.0] * 30)) for step in range(0, 200, 10)] == [None] * 20


def test_the_warning_tells_the_figures():
    watch = EdgeWatch()
    losses = [1.0] * 100 + [2.0] * 60
    readings = [Reading(step, 1.5, learning_rate=0.3) for step in range(0, 160, 10)]
    texts = [watch.see(reading, (range(reading.step), losses[: reading.step])) for reading in readings]
    [text] = [text for text in texts if text is not None][:1]
    assert "above the stability limit since step 0, 1.50 times it at step" in text
    assert "risen from 1 to 1.5" in text
    assert text.endswith("The learning rate is too large: at that sharpness the limit is met at 0.2.")


def test_the_watch_goes_on_in_a_resumed_run():
    losses = [1.0] * 100 + [2.0] * 60
    one, other = EdgeWatch(), EdgeWatch()
    for step in range(0, 120, 10):
        one.see(Reading(step, 1.5), (range(step), losses[:step]))
    other.load_state_dict(one.state_dict())
    text, again = (watch.see(Reading(120, 1.5), (range(120), losses[:120])) for watch in (one, other))
    assert text == again is not None


@pytest.mark.parametrize("excuse", ["converged", "judged"])
def test_does_not_warn_of_ratios_that_do_not_count(excuse):
    losses, watch = [1.0] * 100 + [2.0] * 60, EdgeWatch()
    readings = [replace(Reading(step, 1.5), **{excuse: False}) for step in range(0, 160, 10)]
    assert [watch.see(reading, (range(reading.step), losses[: reading.step])) for reading in readings] == [None] * 16


def test_level_is_the_median_since_the_limit_was_met():
    ratios = ramp(1.1)
    found = told(ratios)
    assert found.level == median(
        ratio for step, ratio in zip(range(0, 400, 10), ratios, strict=True) if step >= found.met_at
    )
