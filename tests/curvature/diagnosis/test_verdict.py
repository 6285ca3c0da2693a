"""What is said of whole runs: made-up ones, and gradient descent on problems of which the answer is known."""

import math
import random
from typing import Any

import pytest
import torch

from lyapunov_lightning.curvature.diagnosis import Reading, diagnose
from lyapunov_lightning.curvature.diagnosis.readings import LIMIT_FACTORS
from lyapunov_lightning.curvature.stability import stability_of
from tests.curvature.diagnosis.made_up import falling, ramp, readings_of, told, with_spikes

# Below the limit.


def test_far_below():
    found = told([0.1 + 0.001 * i for i in range(40)], learning_rate=0.01)
    assert (found.kind, found.met_at) == ("room", None)
    low, high = found.learning_rate_range
    assert (low, high) == tuple(factor * found.learning_rate_limit for factor in LIMIT_FACTORS)
    assert low < 0.01 / 0.139 < 0.01 / 0.1 < high
    assert str(found) == (
        "The sharpness stayed below the stability limit: 0.14 times it at most, at step 390. The run is stable up to a"
        f" learning rate of about {found.learning_rate_limit:.2g} ({low:.2g} to {high:.2g} in four of five runs). A"
        f" larger one is worth trying, such as {low:.2g}."
    )
    assert found.confidence.startswith("high")


def test_stable_up_to_and_worth_trying_are_two_statements():
    """The limit is known roughly: near it nothing larger is recommended without care."""
    found = told([0.6] * 40, learning_rate=0.01)
    assert "stable up to a learning rate of about 0.017" in found.consequence
    assert found.consequence.endswith(
        "A larger one than 0.01 is worth trying in small steps, since it may be at the limit already."
    )


def test_what_is_named_from_far_below_is_said_to_be_the_furthest():
    found = told([0.001] * 40, learning_rate=0.01)
    assert "stable up to a learning rate of 0.12, further than which nothing is said (0.054 to" in found.consequence


def test_noise_limits_a_run_whose_loss_falls_no_further():
    generator = random.Random(0)
    losses = [1 + math.exp(-step / 20) + 0.2 * generator.gauss(0, 1) for step in range(400)]
    found = told([0.1] * 40, losses, learning_rate=0.01, noise_ratio=0.8)
    assert found.kind == "noise_limited"
    assert "stable up to a learning rate of about 0.1" in found.consequence
    assert "noise and not curvature" in found.consequence
    assert told([0.1] * 40, losses, learning_rate=0.01, noise_ratio=0.01).kind == "room"
    assert told([0.1] * 40, learning_rate=0.01, noise_ratio=0.8).kind == "room"  # still falling


def test_far_below_with_spikes_that_build_up_clears_the_learning_rate():
    found = told([0.2] * 40, with_spikes(falling(400), 150, 250, 350))
    assert (found.kind, found.spikes) == ("room", (150, 250, 350))
    assert found.consequence == "The loss spiked 3 times all the same: look for another cause than the learning rate."


def test_not_convex_at_the_start():
    """Where no direction bends upwards the largest eigenvalue is negative, and no learning rate is too large."""
    assert told([-0.2, -0.1, 0.0, *[0.3] * 37]).kind == "room"
    found = told([-0.2] * 40, learning_rate=0.1)
    assert (found.kind, found.learning_rate_limit, found.learning_rate_range) == ("room", None, None)
    assert found.sharpness == "None of 40 measurements found a sharpness above zero."
    assert found.consequence == "The loss did not spike, and no direction of positive curvature was seen."


def test_a_larger_rate_is_named_where_it_is_larger_in_the_two_digits_that_are_shown():
    """The lower end of the range is 0.45 times the rate at the limit."""
    assert "A larger one is worth trying, such as 0.11." in told([0.4] * 40, learning_rate=0.1).consequence
    assert "A larger one than 0.1 is worth trying in small steps" in told([0.43] * 40, learning_rate=0.1).consequence


# At the limit.


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


def test_above_at_first_and_below_in_the_end():
    ratios = [2.0] * 5 + [0.4] * 35
    found = told(ratios)
    assert (found.kind, found.met_at) == ("left", 0)
    assert "from step 0 to step 40, 2.00 times it at most, and 0.40 times it at the end" in found.sharpness
    blamed = told(ratios, with_spikes(falling(400), 25))
    assert blamed.consequence == (
        "The one loss spike came within 20 steps of a measurement at the limit: the learning rate was too large then."
    )


def test_a_run_far_above_the_limit_gets_on_better_at_a_smaller_rate():
    found = told([5.0] * 40, learning_rate=0.1)
    assert found.kind == "above"
    assert found.consequence.endswith("at a smaller learning rate: at that sharpness the limit is met at 0.02.")


def test_a_run_far_above_the_limit_that_does_not_get_on_is_limited_by_its_rate():
    generator = random.Random(0)
    losses = [1 + 0.2 * math.exp(-step / 20) + 0.1 * generator.gauss(0, 1) for step in range(400)]
    found = told([0.8, *[4.0] * 39], losses, learning_rate=0.1)
    assert found.kind == "limited"
    assert found.consequence == (
        "Over the last half the loss has fallen no further than it differs from batch to batch: the"
        " learning rate is what limits this run: at that sharpness the limit is met at 0.025."
    )


# Lost by the learning rate, or not.


def test_crossing_and_diverging():
    losses = [*falling(200), *(0.5 * 1.1**step for step in range(60)), math.inf]
    found = told([0.5 + 0.03 * i for i in range(26)], losses, learning_rate=0.4)
    assert (found.kind, found.crossings) == ("too_fast_later", (170,))
    assert found.sharpness == (
        "The sharpness was 1.07 times the stability limit at step 190, and the loss was lost from step 201 on."
    )
    assert found.consequence == (
        "The learning rate became too large for the curvature: at that sharpness the limit is met at 0.37."
    )


def test_a_divergence_to_a_high_plateau_is_one():
    losses = [
        *falling(190),
        *(0.5 * 1.3**step for step in range(10)),
        *([7.0 + 0.01 * (step % 7) for step in range(100)]),
    ]
    found = told([0.5 + 0.03 * i for i in range(30)], losses)
    assert found.kind == "too_fast_later"
    assert "lost from step 19" in found.sharpness


def test_a_schedule_that_raises_the_rate_is_told_of():
    losses = [*falling(203), *(0.5 * 3**step for step in range(10)), *[math.inf] * 20]
    readings = readings_of([0.3] * 21, learning_rate=0.01)
    found = diagnose(readings, (range(len(losses)), losses), [0.01] * 202 + [0.1] * 31)
    assert found.kind == "too_fast_later"
    assert found.consequence == (
        "The learning rate had been raised to 0.1, which is too large: at that sharpness the limit is met at 0.033."
    )


def test_a_rate_that_was_raised_is_to_blame_and_not_the_limit_that_was_borne_below_it():
    losses = [*falling(203), *(0.5 * 3**step for step in range(10)), *[math.inf] * 20]
    readings = readings_of([1.1] * 21, learning_rate=0.01)
    found = diagnose(readings, (range(len(losses)), losses), [0.01] * 202 + [0.1] * 31)
    assert found.kind == "too_fast_later"
    assert found.consequence.startswith("The learning rate had been raised to 0.1, which is too large")


def test_a_loss_that_rose_at_first_and_came_down_was_not_lost_from_the_start():
    losses = [1.0, *[3.0] * 5, *falling(197), *(0.5 * 3**step for step in range(10)), *[math.inf] * 20]
    readings = readings_of([0.3] * 21, learning_rate=0.01)
    found = diagnose(readings, (range(len(losses)), losses), [0.01] * 202 + [0.1] * 31)
    assert found.kind == "too_fast_later"


def test_a_divergence_near_the_limit_is_the_learning_rates_as_far_as_can_be_told():
    losses = [*falling(200), *(0.5 * 1.1**step for step in range(60)), math.inf]
    found = told([0.6] * 26, losses, learning_rate=0.03)
    assert found.kind == "too_fast_later"
    assert "as far as can be told: at that sharpness the limit is met at 0.05" in found.consequence


def test_a_divergence_that_builds_up_below_the_limit_is_not_the_learning_rates():
    losses = [*falling(200), *(0.5 * 1.1**step for step in range(60)), math.inf]
    found = told([0.3] * 26, losses)
    assert found.kind == "lost_otherwise"
    assert str(found).startswith("The loss was lost from step 201 on, and the sharpness before that was 0.30 times")
    assert "not to blame" in found.consequence


def test_a_loss_that_is_lost_before_any_ratio_is_known_was_most_likely_too_fast():
    losses = [1.1, 1.6, 9.0, 2e3, *[math.nan] * 96]
    found = told([None] * 10, losses)
    assert (found.kind, found.learning_rate_limit) == ("too_fast", None)
    # Before any step was made the learning rate has done nothing.
    assert told([None] * 10, [math.nan] * 100).kind == "unknown"


# Faults of the data.


def test_a_fault_in_the_data_is_called_that_whether_or_not_a_measurement_fell_on_it():
    losses = with_spikes(falling(400), 201, shape=[900.0, 40.0, 20.0, 8.0])
    missed = told([0.2] * 40, losses, learning_rate=0.05)
    assert (missed.kind, missed.spikes, missed.met_at) == ("data_fault", (), None)
    assert str(missed) == (
        "The loss jumped from 0.485 to 420 at step 201 and came back; the sharpness was at most 0.20 times the"
        " stability limit before that. No learning rate does that at once: look for a fault in the data of steps 201 to"
        " 204."
    )
    losses = with_spikes(falling(400), 200, shape=[900.0, 40.0, 20.0, 8.0])
    singles = [130.0 if place == 20 else 0.2 for place in range(40)]
    averages = [130.0 if 20 <= place < 28 else 0.2 for place in range(40)]
    readings = [
        Reading(10 * place, ratio, learning_rate=0.05, step_ratio=single)
        for place, (ratio, single) in enumerate(zip(averages, singles, strict=True))
    ]
    hit = diagnose(readings, (range(400), losses))
    assert hit.kind == "data_fault"
    assert "before that and 1.3e+02 times it on the batch of step 200." in hit.sharpness
    assert missed.learning_rate_limit == hit.learning_rate_limit == pytest.approx(0.25)


def test_a_fault_that_the_run_does_not_survive_is_one_too():
    found = told([0.2] * 40, [*falling(300), 400.0, 1e9, *[math.inf] * 98])
    assert found.kind == "data_fault"
    assert found.sharpness.startswith(
        "The loss jumped from 0.336 to no finite number at step 300 and did not come back"
    )
    assert "from step 300 on" in found.consequence


def test_single_bad_batches_are_named():
    found = told([0.2] * 40, with_spikes(falling(400), 203, 307, shape=[30.0]))
    assert found.kind == "bad_batch"
    assert found.consequence.endswith("look at the batches of steps 203 and 307.")


def test_a_fault_at_the_edge_is_told_from_its_spikes():
    ratios = ramp(1.1)
    losses = with_spikes(falling(400), 200, 260)
    assert told(ratios, losses).kind == "limited"
    found = told(ratios, with_spikes(losses, 330, shape=[200.0] * 4))
    assert (found.kind, found.spikes) == ("data_fault", (200, 260))


# Clipping, and what is not known.


def test_clipping_is_told_of():
    found = told([0.5] * 40, learning_rate=1.5, clipping=0.1)
    assert found.kind == "clipped"
    assert str(found) == (
        "The gradient was clipped at 40 of 40 measured steps, to 0.1 of its length, and the sharpness is 0.50 times the"
        " stability limit for what that leaves. Clipping is what keeps this learning rate stable: without it the limit"
        " is met at a learning rate of 0.3."
    )
    assert "Without clipping it would be below" in told([0.05] * 40, learning_rate=1.5, clipping=0.1).consequence


def test_not_converged():
    readings = [Reading(10 * place, 1.5, converged=place >= 30) for place in range(40)]
    found = diagnose(readings, (range(400), falling(400)))
    assert found.kind == "not_converged"
    assert found.sharpness == "Only 10 of 40 measurements of the sharpness met their tolerance."


def test_what_did_not_converge_does_not_count():
    readings = [Reading(10 * place, 7.0 if place == 20 else 0.2, converged=place != 20) for place in range(40)]
    assert diagnose(readings, (range(400), falling(400))).kind == "room"


@pytest.mark.parametrize("ratios", [[], [None] * 40])
def test_an_unknown_limit_is_told(ratios):
    found = told(ratios)
    assert (found.kind, found.level) == ("unknown", None)


def test_two_measurements_are_too_few():
    found = told([0.2, 1.2])
    assert found.kind == "few"
    assert "measured twice: 1.20 times the stability limit at step 10" in found.sharpness


def test_without_losses_the_ratios_are_judged_alone():
    assert diagnose(readings_of([0.3] * 10)).kind == "room"
    assert diagnose(readings_of(ramp(1.0))).kind == "at_edge"


def test_what_may_not_be_judged_is_no_evidence():
    """An Adam's first steps: ratios of hundreds while its moments settle."""
    readings = [Reading(10 * place, 420.0, learning_rate=1e-3, judged=False) for place in range(5)]
    readings += [Reading(10 * place, 0.5, learning_rate=1e-3) for place in range(5, 40)]
    found = diagnose(readings, (range(400), falling(400)))
    assert (found.kind, found.met_at, found.learning_rate_limit) == ("room", None, pytest.approx(2e-3))


def test_a_run_that_comes_back_to_the_limit_did_not_stay_there():
    found = told([0.5, 1.0, *[0.4] * 30, *[1.6] * 10])
    assert (found.kind, found.met_at) == ("at_edge", 10)
    assert found.sharpness == (
        "The sharpness met the stability limit at step 10, was below it for the most part, and was 1.60 times it at the"
        " end."
    )


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
        losses.append(loss.item())
    return diagnose(readings, (range(num_steps), losses))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("share", "kind"), [(0.3, "room"), (1.2, "too_fast")])
def test_a_quadratic_is_below_or_lost_by_its_learning_rate(momentum, share, kind):
    curvature = 4.0
    edge = (2 + 2 * momentum) / curvature
    found = descent(curvature, share * edge, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=momentum))
    assert found.kind == kind
    assert f"{edge:.2g}" in found.consequence
    assert found.learning_rate_limit == pytest.approx(edge)
