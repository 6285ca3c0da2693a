"""A step along a direction of negative curvature is the documented one, made only where the curvature is certain."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyapunov_lightning.curvature import NonFiniteCurvatureError
from lyapunov_lightning.curvature.acting.descent import negative_curvature_step
from tests.curvature.helpers import symmetric_matrix


def step(slope: float, value: float = -1.0, residual: float = 0.0, lr: float = 1.0, max_step: float = 0.1) -> float:
    return negative_curvature_step(lambda: slope, value, residual, lr=lr, max_step=max_step)


@given(
    slope=st.floats(-1e3, 1e3).filter(lambda slope: abs(slope) > 1e-9),
    lr=st.floats(1e-3, 1e3),
    most=st.floats(1e-3, 1e3),
)
def test_its_length_is_that_of_gradient_descent_up_to_the_bound(slope: float, lr: float, most: float) -> None:
    length = step(slope, lr=lr, max_step=most)
    assert abs(length) == pytest.approx(min(lr * abs(slope), most), rel=1e-9)
    assert math.copysign(1, length) == -math.copysign(1, slope)


@pytest.mark.parametrize(("value", "residual"), [(0.5, 0.0), (0.0, 0.0), (-0.5, 0.5), (-0.5, 2.0), (math.nan, 0.0)])
def test_there_is_none_and_no_gradient_where_the_curvature_may_not_be_negative(value: float, residual: float) -> None:
    def slope() -> float:
        raise AssertionError("not needed")

    assert negative_curvature_step(slope, value, residual, lr=1.0, max_step=1.0) == 0


def test_it_is_made_just_beyond_the_residual() -> None:
    assert step(0.05, value=-0.5, residual=0.499) == pytest.approx(-0.05)


@pytest.mark.parametrize("slope", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_an_error(slope: float) -> None:
    with pytest.raises(NonFiniteCurvatureError, match="gradient"):
        step(slope)


@pytest.mark.parametrize("seed", range(10))
def test_it_lowers_a_quadratic_by_both_orders(seed: int) -> None:
    matrix = symmetric_matrix([3.0, 1.0, 0.1, -0.4], seed)
    gradient = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix)
    slope = float(gradient @ vectors[:, 0])
    length = negative_curvature_step(lambda: slope, float(values[0]), 1e-12, lr=7.0, max_step=2.0)
    move = length * vectors[:, 0]
    assert float(gradient @ move) < 0
    assert float(move @ matrix @ move) < 0
