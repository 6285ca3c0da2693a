"""What is told of the time left: a bound that holds, and a trend that says so."""

import math

import pytest

from lyapunov_lightning.training.reporting.time_left import Clock, products_by_trend


def test_the_trend_of_a_residual_that_falls_by_a_factor_each_product_is_exact():
    points = [(count, 1e4 * 10 ** (-count / 5)) for count in (3, 6, 8, 9)]
    assert products_by_trend(points) == 20
    # Only what was seen last counts: the first products are no part of the trend.
    assert products_by_trend([(1, 1e9), (2, 1e9), *[(2 + n, 100 / 2**n) for n in range(6)]]) == 9


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(3, 1e3), (5, 1e2)],  # two points have any trend
        [(3, 1e3), (5, 1e2), (6, 0.5)],  # met already
        [(3, 1e3), (5, 1e3), (6, 1e4)],  # not falling
    ],
)
def test_where_there_is_no_trend_none_is_told(points):
    assert products_by_trend(points) is None


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_the_time_left_is_that_of_the_products_and_batches_so_far():
    hand = Hand()
    clock = Clock(4, hand)
    clock.begin_product()
    assert clock.told(30) == "batch 1 of 4; at most 30 more"  # of which nothing is known yet
    hand.time += 20
    clock.at_batch(2)  # half of a product in 20 s
    assert clock.told(30) == "batch 3 of 4; at most 30 more: up to 20 min left"
    assert (
        clock.told(30, 10) == "batch 3 of 4; about 10 more by the trend, at most 30: about 6.3 min, at most 20 min left"
    )
    hand.time += 20
    clock.begin_product()
    assert clock.told(29, 29) == "batch 1 of 4; 29 more: 19 min left"
    for trend in (0, -3, 40):  # a trend that was passed, or is beyond the bound
        assert clock.told(30, trend) == clock.told(30)


def test_one_batch_is_not_named_and_times_have_their_units():
    hand = Hand()
    clock = Clock(1, hand)
    clock.begin_product()
    clock.begin_product()
    for seconds, told in ((1.0, "60 s"), (3.0, "3.0 min"), (90.0, "1.5 h"), (3600.0, "2.5 d"), (36000.0, "25 d")):
        hand.time = 100.0 + seconds
        assert clock.told(60, 60) == f"60 more: {told} left"
    assert math.isfinite(hand.time)
