"""Intervals, against SciPy's quantiles and by how often they hold."""

import math

import pytest
import torch
from scipy.stats import t

from lyapunov_lightning.curvature import Estimate
from lyapunov_lightning.curvature.stochastic.estimates import estimate, student_quantile


@pytest.mark.parametrize("freedom", [*range(1, 60), 99, 299, 300, 301, 1000, 10**6])
def test_quantiles_are_those_of_students_t(freedom: int) -> None:
    assert student_quantile(freedom) == pytest.approx(float(t.ppf(0.975, freedom)), rel=1e-6)


@pytest.mark.parametrize("count", [2, 5, 18, 30])
def test_intervals_are_those_of_students_t(count: int) -> None:
    low, high = Estimate(1.0, 0.5, count).interval
    assert (high - low) / 2 == pytest.approx(0.5 * float(t.ppf(0.975, count - 1)), rel=1e-6)


@pytest.mark.parametrize("count", [2, 3, 5, 10, 20, 50])
@pytest.mark.parametrize("is_skewed", [False, True])
def test_intervals_hold_for_the_samples_that_they_are_for(count: int, is_skewed: bool) -> None:
    generator = torch.Generator().manual_seed(count)
    samples = torch.randn(2000, count, generator=generator, dtype=torch.float64)
    samples = samples.square() if is_skewed else samples
    intervals = [estimate(row, is_skewed=is_skewed).interval for row in samples]
    covered = sum(low <= float(is_skewed) <= high for low, high in intervals) / 2000
    assert covered == pytest.approx(0.95, abs=0.015)  # three standard errors


def test_one_sample_has_no_interval() -> None:
    assert all(math.isnan(bound) for bound in Estimate(1.0, math.nan, 1).interval)
    assert math.isnan(estimate(torch.ones(1)).standard_error)
