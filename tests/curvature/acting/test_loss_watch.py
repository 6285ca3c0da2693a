"""Noise is no reason to act; NaN, spikes and losses that rise are, whatever their sign and scale."""

import math
from collections.abc import Iterable

import pytest
import torch

from lyapunov_lightning.curvature.acting.loss_watch import LossWatch, Verdict


def noise(count: int, seed: int = 0) -> list[float]:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()


def falling(count: int, scale: float = 1.0, shift: float = 0.0, seed: int = 0) -> list[float]:
    """From 3 to 1, with noise of a tenth."""
    return [
        scale * (1 + 2 * math.exp(-step / 30) + 0.1 * sample) + shift for step, sample in enumerate(noise(count, seed))
    ]


def seen(watch: LossWatch, losses: Iterable[float]) -> list[Verdict]:
    return [watch.see(loss) for loss in losses]


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e6, 0.0), (1e-6, 0.0), (1.0, -100.0)])
def test_noise_about_a_falling_loss_is_well(scale: float, shift: float) -> None:
    for seed in range(10):
        verdicts = seen(LossWatch(), falling(1000, scale, shift, seed))
        assert verdicts.count(Verdict.WELL) >= 998
        assert Verdict.LOST not in verdicts
        assert Verdict.RISING not in verdicts


def test_long_tails_near_zero_are_well() -> None:
    """Losses of small batches that are almost learned: most of them tiny, one in ten not."""
    losses = [math.exp(-step / 10) for step in range(60)]
    losses += [1e-3 * math.exp(2 * sample) for sample in noise(500)]
    assert set(seen(LossWatch(), losses)) <= {Verdict.WELL, Verdict.SUSPECT}


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("before", [0, 3, 100])
def test_a_loss_that_is_not_finite_is_lost_at_once(loss: float, before: int) -> None:
    watch = LossWatch()
    seen(watch, falling(before))
    assert watch.see(loss) is Verdict.LOST


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e-6, 0.0), (1.0, -100.0)])
def test_a_loss_far_above_the_beginning_is_lost_at_once(scale: float, shift: float) -> None:
    watch = LossWatch()
    seen(watch, falling(100, scale, shift))
    assert watch.see(8 * scale + shift) is Verdict.LOST


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e-6, 0.0), (1.0, -100.0)])
def test_one_loss_that_stands_out_is_a_batch_and_three_are_a_spike(scale: float, shift: float) -> None:
    watch = LossWatch()
    seen(watch, falling(100, scale, shift))
    assert watch.see(2.5 * scale + shift) is Verdict.SUSPECT
    assert watch.see(1.0 * scale + shift) is Verdict.WELL
    assert seen(watch, [2.5 * scale + shift] * 3) == [Verdict.SUSPECT, Verdict.SUSPECT, Verdict.LOST]


def test_a_loss_that_creeps_up_rises_within_a_window_or_two_and_is_lost_if_it_goes_on() -> None:
    watch = LossWatch()
    seen(watch, falling(200))
    creeping = seen(watch, [1 + 0.02 * step + 0.1 * sample for step, sample in enumerate(noise(80, 1))])
    acted = [(step, verdict) for step, verdict in enumerate(creeping) if verdict in (Verdict.RISING, Verdict.LOST)]
    assert [verdict for _, verdict in acted[:2]] == [Verdict.RISING, Verdict.LOST]
    assert acted[0][0] <= 40
    assert acted[1][0] <= 80


def test_after_a_rise_losses_on_their_way_down_are_no_second_one() -> None:
    watch = LossWatch()
    seen(watch, falling(200))
    verdicts: list[Verdict] = []
    while Verdict.RISING not in verdicts:
        verdicts += seen(watch, [1.3 + 0.02 * (-1) ** len(verdicts)])
    # The window fills with higher losses at first, and then they fall, more slowly than a window takes.
    recovering = [1 + 0.3 * math.exp(-step / 30) + 0.1 * sample for step, sample in enumerate(noise(60, 1))]
    assert Verdict.LOST not in seen(watch, recovering)


def test_where_it_was_brought_back_to_is_no_rise() -> None:
    """Without noise every loss above the best one stands out: where the training goes on is above it."""
    watch = LossWatch()
    losses = [1 - 0.001 * step for step in range(100)]
    assert set(seen(watch, losses)) == {Verdict.WELL}
    watch.go_back()
    assert set(seen(watch, losses[60:])) == {Verdict.WELL}


def test_falling_is_told_from_standing_still() -> None:
    watch = LossWatch()
    seen(watch, falling(39))
    assert not watch.is_falling  # not known yet
    seen(watch, falling(60)[39:])
    assert watch.is_falling
    fell = []
    for loss in [1 + 0.1 * sample for sample in noise(400, 2)]:
        watch.see(loss)
        fell.append(watch.is_falling)
    assert sum(fell[60:]) <= 0.3 * len(fell[60:])  # one standard error: it speaks for longer steps, no more


def test_after_going_back_the_losses_since_do_not_count() -> None:
    watch = LossWatch()
    seen(watch, falling(100))
    seen(watch, [2.5, 2.5])
    watch.go_back()
    assert watch.see(1.05) is Verdict.WELL
    assert seen(watch, [2.5, 2.5, 2.5])[-1] is Verdict.LOST


def test_it_goes_on_where_it_was() -> None:
    one, other = LossWatch(), LossWatch()
    seen(one, falling(77))
    other.load_state_dict(one.state_dict())
    rest = [*falling(50, seed=3), 2.5, 2.5, 2.5, math.nan]
    assert seen(one, rest) == seen(other, rest)
    assert one.state_dict() == other.state_dict()
