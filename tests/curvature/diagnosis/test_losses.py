"""What a series of losses shows by itself."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lyapunov_lightning.curvature.diagnosis import diverged_at, loss_spikes
from lyapunov_lightning.curvature.diagnosis.losses import excursions, has_stalled, is_higher
from tests.curvature.diagnosis.made_up import falling, with_spikes

# Spikes.


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.001, 0.05, 0.2]))
def test_noise_is_no_spike(seed, noise):
    assert len(loss_spikes(range(400), falling(400, noise, seed))) <= 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(20, 380), st.integers(2, 15), st.sampled_from([0.001, 0.05]))
def test_a_spike_is_found_where_it_begins(seed, step, width, noise):
    assert step in loss_spikes(range(400), with_spikes(falling(400, noise, seed), step, shape=[3.0] * width))


def test_one_batch_is_no_spike():
    assert loss_spikes(range(400), with_spikes(falling(400), 100, 200, shape=[3.0])) == ()


def test_another_level_is_one_spike():
    losses = [1.0 + 0.01 * (step % 3) for step in range(100)] + [2.0 + 0.01 * (step % 3) for step in range(100)]
    assert loss_spikes(range(200), losses) == (100,)


def test_losses_below_zero_are_judged_too():
    losses = [-5.0 + 0.1 * (step % 5) for step in range(100)]
    losses[60:64] = [4.0] * 4
    assert loss_spikes(range(100), losses) == (60,)


# Excursions.


def test_an_excursion_has_its_figures():
    [one] = excursions(range(400), with_spikes([1.0] * 20 + [0.5] * 380, 200, shape=[3.0, 5.0, 2.0]))
    assert (one.start, one.end, one.count, one.came_back, one.is_final) == (200, 202, 3, True, False)
    assert (one.level, one.last, one.margin, one.gained) == pytest.approx((0.5, 0.5, 0.15, 0.5))
    assert (one.jump, one.rise, one.undone) == pytest.approx((1.0 / 0.15, 2.0 / 0.15, 4.0))


def test_an_excursion_to_no_finite_number_is_final():
    [one] = excursions(range(300), [*falling(250), *[math.nan] * 50])
    assert (one.start, one.count, one.jump, one.is_final) == (250, 50, math.inf, True)


@pytest.mark.parametrize(("after", "is_final"), [([0.5] * 60, True), ([0.5] * 30 + [0.12] * 30, False)])
def test_an_excursion_that_stays_is_final_unless_it_comes_back_later(after, is_final):
    *_, one = excursions(range(360), [*(1.0 - 0.003 * step for step in range(300)), *after])
    assert (one.start, one.is_final) == (300, is_final)


def test_an_excursion_that_keeps_most_of_the_gain_is_not_final():
    """Late in a training a loss of a hundredth that becomes two hundredths is lost to nobody."""
    found = excursions(range(400), [*(0.99**step for step in range(350)), *[0.09] * 50])
    assert [one.start for one in found] == [350]
    assert not found[0].is_final


# Divergence.


def test_a_loss_that_only_fluctuates_has_not_diverged():
    generator = random.Random(0)
    losses = [2.3 + 0.1 * generator.gauss(0, 1) for _ in range(500)]
    assert diverged_at(range(500), losses) is None


def test_a_divergence_begins_where_the_loss_left():
    losses = [*falling(200), *(0.5 * 1.1**step for step in range(60)), math.inf]
    assert 200 <= diverged_at(range(len(losses)), losses) <= 210  # not the step of the infinity


def test_a_divergence_begins_where_the_loss_was_thrown_out_and_not_at_the_first_nan():
    """Thrown from 0.5 to a flat place of 0.9, below where it began, and lost there for good."""
    generator = random.Random(0)
    losses = [max(0.5, 1.2 - 0.03 * step) + 0.03 * generator.gauss(0, 1) for step in range(100)]
    losses += [2.0, 8.0, 3.0] + [0.9 + 0.05 * generator.gauss(0, 1) for _ in range(60)] + [math.nan] * 20
    assert 98 <= diverged_at(range(len(losses)), losses) <= 102


def test_noise_moves_no_divergence_back():
    for seed in range(20):
        losses = [*(1 + 0.3 * value for value in noise(300, seed)), *[math.nan] * 20]
        assert diverged_at(range(len(losses)), losses) == 300


def test_a_loss_that_is_lost_at_once_has_diverged_though_its_first_ones_are_as_high():
    losses = [1.15, 1.61, 5.98, 20.6, 41.4, 75.0, *[85.0, 16.5, 82.0, 47.0, 62.0] * 20]
    assert diverged_at(range(len(losses)), losses) == 2


# Rise and fall.


def noise(count: int, seed: int) -> list[float]:
    generator = random.Random(seed)
    return [generator.gauss(0, 1) for _ in range(count)]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_a_loss_has_stalled_where_noise_hides_its_fall(seed):
    plateau = [2 - min(1.0, step / 100) + 0.2 * value for step, value in enumerate(noise(800, seed))]
    assert not has_stalled([loss - 0.005 * step for step, loss in enumerate(plateau)])
    assert not has_stalled([*plateau[:-1], math.nan])
    assert not has_stalled(plateau[:20])  # too few to say


def test_a_loss_that_falls_no_further_has_stalled():
    stalled = [has_stalled([1 + 0.2 * value for value in noise(800, seed)]) for seed in range(40)]
    assert sum(stalled) >= 36


def test_a_loss_is_higher_by_more_than_its_noise():
    calm = [1 + 0.01 * value for value in noise(40, 0)]
    assert is_higher([1.5] * 40, calm)
    assert not is_higher([1.2] * 40, calm)  # less than 30 %
    assert not is_higher([1.5] * 40, [1 + value for value in noise(40, 0)])
    assert is_higher([1.0, math.nan], calm)
