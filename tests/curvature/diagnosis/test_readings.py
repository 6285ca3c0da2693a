"""The learning rate at the limit, and how sure it is."""

import pytest

from lyapunov_lightning.curvature.diagnosis import Reading
from lyapunov_lightning.curvature.diagnosis.readings import confidence, last_part, learning_rate_limit
from tests.curvature.diagnosis.made_up import readings_of


def named(ratios: list[float | None], rate: float | None = 0.1) -> float | None:
    return learning_rate_limit(readings_of(ratios, learning_rate=rate))


def test_a_reading_names_the_rate_at_which_its_curvature_is_at_the_limit():
    assert Reading(0, 0.5, learning_rate=0.1).learning_rate_limit == pytest.approx(0.2)


@pytest.mark.parametrize(("ratio", "rate"), [(None, 0.1), (-0.3, 0.1), (0.0, 0.1), (0.3, None), (0.3, 0.0)])
def test_without_a_positive_ratio_and_rate_none_is_named(ratio, rate):
    assert Reading(0, ratio, learning_rate=rate).learning_rate_limit is None
    assert named([ratio] * 40, rate) is None


def test_the_limit_lies_between_where_the_run_mostly_is_and_where_it_was_at_first():
    ratios = [0.25] * 15 + [1.0] * 25  # a run that sharpens until its rate, 0.1, is at the limit, and began at 0.4
    ratios[35] = 7.0  # a single measurement
    ratios[38:] = [0.01, 0.01]  # and a network that has learned its data
    assert named(ratios) == pytest.approx((0.4 * 0.1) ** 0.5)


def test_of_a_run_that_suffers_its_first_half_does_not_count():
    readings = readings_of([0.25] * 15 + [1.0] * 25, learning_rate=0.1)
    assert learning_rate_limit(readings, is_suffering=True) == pytest.approx(0.1)


def test_a_run_that_gets_on_bears_its_learning_rate_whatever_was_measured():
    readings = readings_of([0.9] * 10 + [3.0] * 30, learning_rate=0.1)
    assert learning_rate_limit(readings) == pytest.approx(0.15)
    assert learning_rate_limit(readings, is_suffering=True) == pytest.approx(0.1 / 3)


def test_a_limit_far_above_the_learning_rate_is_bounded():
    assert named([0.2] * 40) == pytest.approx(0.5)
    assert named([0.002] * 40) == pytest.approx(1.2)


def test_the_bound_follows_the_highest_learning_rate():
    """In a warm-up the rate of the last step is not what the run was trained at."""
    readings = [Reading(step, 0.001, learning_rate=rate) for step, rate in enumerate([0.01, 0.1, 0.001])]
    assert learning_rate_limit(readings) == pytest.approx(1.2)


def test_the_spread_is_that_of_the_last_part():
    assert [reading.value for reading in last_part(readings_of([0.1, 0.2, 0.3, 0.4, 0.5]))] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert len(last_part(readings_of([0.1] * 30))) == 10


def test_each_ratio_counts_with_the_rate_of_its_own_step():
    """Warm-up and decay over a curvature that stays."""
    rates = [0.03 * min(1.0, step / 100) * (1 - step / 400) + 1e-9 for step in range(0, 400, 10)]
    readings = [Reading(10 * place, 5 * rate, learning_rate=rate) for place, rate in enumerate(rates)]
    assert learning_rate_limit(readings) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("ratios", "num_unsure", "told"),
    [
        ([0.3 + 0.01 * (i % 3) for i in range(40)], 0, "high, by 13 measurements that differ by a factor of 1.05"),
        ([0.3 * 2.0 ** (i % 3) for i in range(40)], 0, "moderate, by 13 measurements that differ by a factor of 2.79"),
        ([0.3] * 4, 0, "moderate, by 4 measurements that differ by a factor of 1"),
        ([0.3 * 4.0 ** (i % 3) for i in range(40)], 0, "low, by 13 measurements that differ by a factor of 7.81"),
        ([0.3], 0, "low, by one measurement"),
        ([0.3] * 14, 26, "low, by 5 measurements that differ by a factor of 1, 26 others did not converge"),
        ([], 0, "none"),
        ([-0.3] * 40, 0, "none"),
    ],
)
def test_confidence_comes_from_number_spread_and_convergence(ratios, num_unsure, told):
    assert confidence(readings_of(ratios, learning_rate=0.1), num_unsure) == told
