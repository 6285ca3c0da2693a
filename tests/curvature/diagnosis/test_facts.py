"""What was seen in a run, in numbers."""

import math
from dataclasses import replace
from statistics import median
from typing import Any

import pytest

from lyapunov_lightning.curvature.diagnosis import Reading
from lyapunov_lightning.curvature.diagnosis.facts import RunFacts, facts_of, is_sudden, readings_before
from lyapunov_lightning.curvature.diagnosis.losses import excursions
from tests.curvature.diagnosis.made_up import falling, ramp, readings_of, with_spikes


def facts(ratios: list[float | None], losses: list[float] | None = None, rates: Any = (), **options: Any) -> RunFacts:
    losses = falling(400) if losses is None else losses
    return facts_of(readings_of(ratios, **options), (range(len(losses)), losses), rates)


# What counts.


def test_what_has_no_ratio_or_may_not_be_judged_does_not_count():
    readings = [Reading(0, None), Reading(10, math.nan), Reading(20, 420.0, judged=False), Reading(30, 0.5)]
    found = facts_of(readings, ((), ()))
    assert (found.readings, found.settling) == ((readings[3],), (readings[2],))


def test_what_did_not_converge_is_counted_apart():
    found = facts_of([Reading(0, 0.5), Reading(10, 7.0, converged=False)], ((), ()))
    assert ([reading.value for reading in found.counted], found.num_unsure) == ([0.5], 1)


def test_an_average_is_at_the_limit_by_no_single_measurement():
    single = [0.2] * 10 + [60.0] + [0.2] * 29
    averages = [0.2] * 10 + [12.0] * 8 + [0.2] * 22
    readings = [
        Reading(10 * place, ratio, step_ratio=own, eigenvalue_ratio=0.3)
        for place, (ratio, own) in enumerate(zip(averages, single, strict=True))
    ]
    losses = (range(400), falling(400))
    assert facts_of(readings, losses).met_at is None
    several = [replace(reading, step_ratio=4.0 if 10 <= place < 18 else 0.2) for place, reading in enumerate(readings)]
    assert facts_of(several, losses).met_at == 110  # by the second of them
    by_eigenvalue = [replace(reading, eigenvalue_ratio=reading.ratio) for reading in readings]
    assert facts_of(by_eigenvalue, losses).met_at == 100


def test_level_is_the_median_since_the_limit_was_met():
    found = facts(ramp(1.1))
    assert found.level == median(
        ratio for step, ratio in zip(range(0, 400, 10), ramp(1.1), strict=True) if step >= found.met_at
    )


def test_crossings_are_the_steps_at_which_the_ratio_went_above_one():
    assert facts([0.5, 1.2, 1.1, 0.8, 1.3]).crossings == (10, 40)
    assert facts([1.2, 1.1]).crossings == (0,)


def test_noise_that_leaves_no_progress_at_all_counts_as_all():
    ratios = [None, None, 0.4, 0.5, None, None, None]
    readings = [Reading(10 * place, 0.3, noise_ratio=ratio) for place, ratio in enumerate(ratios)]
    assert facts_of(readings, ((), ())).noise_level == math.inf
    assert facts_of(readings[:4], ((), ())).noise_level == 0.5
    assert facts_of(readings[:2], ((), ())).noise_level is None


def test_clipped_is_what_was_shortened_by_more_than_rounding():
    readings = [Reading(0, 0.3, clipping=0.2), Reading(10, 0.3, clipping=1 - 1e-7), Reading(20, 0.3)]
    assert facts_of(readings, ((), ())).clipped == (readings[0],)


# Spikes, and what came near them.


def test_spikes_near_a_measurement_at_the_limit_are_counted():
    found = facts(ramp(1.04), with_spikes(falling(400), 60, 200, 260, 330))
    assert (found.spikes, found.num_near, found.window) == ((60, 200, 260, 330), 3, 20)
    assert found.share_near == pytest.approx(0.67, abs=0.02)


def test_near_is_wider_where_measurements_are_far_apart():
    assert facts_of(readings_of([1.0] * 4, every=100), (range(400), falling(400))).window == 100


# Jumps.


def test_what_builds_up_is_not_sudden_and_what_jumps_is():
    [built_up] = excursions(range(400), with_spikes(falling(400), 200))
    [jumped] = excursions(range(400), with_spikes(falling(400), 200, shape=[30.0, 20.0]))
    low = [Reading(190, 0.3)]
    assert not is_sudden(built_up, low)
    assert is_sudden(jumped, low)
    assert is_sudden(jumped, [])


def test_a_jump_that_the_ratio_explains_is_not_sudden():
    [one] = excursions(range(400), with_spikes(falling(400), 200, shape=[30.0, 20.0]))  # 97 margins
    assert not is_sudden(one, [Reading(190, 2.5)])  # sixteenfold in a step, by a quadratic alone
    assert is_sudden(one, [Reading(190, 1.2)])
    assert is_sudden(one, [Reading(190, 2.5)], usual=2.4)  # borne all along


def test_a_fault_undoes_what_was_gained():
    late = [*falling(300), *(0.01 for _ in range(100))]
    assert [one.start for one in facts([0.3] * 40, with_spikes(late, 350, shape=[200.0])).faults] == [350]
    assert facts([0.3] * 40, with_spikes(late, 350, shape=[20.0])).faults == ()


def test_no_fault_is_told_of_where_the_worst_spike_built_up():
    losses = with_spikes(falling(400), 200, shape=[8.0])
    assert [one.start for one in facts([0.3] * 40, losses).faults] == [200]
    assert facts([0.3] * 40, with_spikes(losses, 100, shape=[1.5, 3.0, 9.0, 20.0])).faults == ()


def test_measurements_on_the_data_of_a_fault_do_not_count_nor_do_averages_that_hold_it():
    losses = with_spikes(falling(400), 200, shape=[900.0] * 4)
    ratios = [0.2] * 20 + [130.0] * 8 + [0.2] * 12
    readings = [
        Reading(10 * place, ratio, step_ratio=130.0 if place == 20 else 0.2) for place, ratio in enumerate(ratios)
    ]
    found = facts_of(readings, (range(400), losses))
    assert [one.start for one in found.faults] == [200]
    assert (found.met_at, len(found.counted), found.on_batch) == (None, 32, readings[20])
    assert max(reading.value for reading in found.before) == 0.2


# Why the loss was lost.


def test_the_measurements_before_a_loss_left_are_those_of_a_window():
    readings = readings_of([0.1, 0.2, 0.3, 0.4, 0.5])
    assert readings_before(35, readings, 20, None) == tuple(readings[2:4])
    assert readings_before(400, readings, 20, None) == (readings[4],)  # the last one, if there are none
    assert readings_before(0, readings, 20, None) == ()


def test_a_rate_that_was_raised_after_the_last_measurement_raises_its_ratio():
    readings = readings_of([0.3] * 5, learning_rate=0.01)
    *_, expected = readings_before(47, readings, 20, 0.05)
    assert (expected.step, expected.learning_rate, expected.ratio) == (46, 0.05, pytest.approx(1.5))
    assert readings_before(47, readings, 20, 0.005) == tuple(readings[3:])


def test_the_rate_of_each_step_is_looked_at():
    losses = [*falling(203), *(0.5 * 3**step for step in range(10)), *[math.inf] * 20]
    rates = [0.01] * 202 + [0.1] * 31
    assert [round(reading.value, 6) for reading in facts([0.3] * 21, losses, rates, learning_rate=0.01).evidence] == [
        3.0
    ]
    assert facts([0.3] * 21, losses, [math.nan] * 233, learning_rate=0.01).evidence == ()


def test_a_run_that_was_thrown_into_a_flat_place_is_judged_by_what_was_before():
    losses = [max(0.5, 1.2 - 0.03 * step) + 0.01 * (step % 3) for step in range(100)]
    losses += [2.0, 8.0, 3.0] + [0.9 + 0.02 * (step % 3) for step in range(60)] + [math.nan] * 20
    ratios = [0.6] * 8 + [1.35, 1.93] + [0.05] * 6
    found = facts(ratios, losses)
    assert 95 <= found.lost_at <= 100
    assert [reading.value for reading in found.evidence] == [1.93]
    assert found.naming == found.evidence


def test_a_loss_that_rose_at_first_and_never_fell_is_noticed():
    found = facts([0.3] * 20, [1.0, 4.0, 9.0, 3.0, *[1.0] * 196])
    assert (found.rose_at_first, found.has_improved) == (True, False)
    noisy = [0.3, 1.4, 0.6, 0.9] * 50
    assert not facts([0.3] * 20, noisy).rose_at_first
