"""The curvature along a direction from three losses, against closed forms."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lyapunov_lightning.curvature.directions.second_difference import LineCurvature, curvature_along
from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError

DOUBLE, SINGLE = torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps


class Losses:
    """A function of the distance, and where it was asked for."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function
        self.asked: list[float] = []

    def __call__(self, distances: Sequence[float]) -> Tensor:
        self.asked += distances
        return self._function(torch.tensor(distances, dtype=torch.float64))


def parabola(slope: float, curvature: float, base: float = 3.0) -> Losses:
    return Losses(lambda x: base + slope * x + curvature / 2 * x**2)


@given(
    slope=st.floats(1e-6, 1e6),
    sharpness=st.floats(-1.0, 1e4),
    guess=st.floats(1e-2, 1e2),
    base=st.floats(-1e3, 1e3),
)
def test_it_is_exact_on_a_parabola_or_says_that_it_cannot_tell(
    slope: float, sharpness: float, guess: float, base: float
) -> None:
    losses = parabola(slope, sharpness * slope, base)
    found = curvature_along(losses, slope, guess, precision=DOUBLE)
    if found is None:
        return
    # A last place of the loss on each of three values; 200 of them were asked for, of the curvature that was expected.
    rounding = 8 * DOUBLE * (abs(base) + abs(slope * found.distance) * 3) / found.distance**2
    assert found.value == pytest.approx(sharpness * slope, rel=1e-9, abs=rounding)
    assert found.num_evaluations == len(losses.asked)


@pytest.mark.parametrize("curvature", [5.0, -5.0, 0.0])
def test_it_takes_three_losses_where_the_expectation_was_right(curvature: float) -> None:
    losses = parabola(1.0, curvature)
    found = curvature_along(losses, 1.0, 5.0, precision=SINGLE)
    assert found == LineCurvature(pytest.approx(curvature, abs=1e-9), pytest.approx(0.04), 3)
    assert losses.asked == [0.0, -found.distance, found.distance]


def test_it_takes_two_where_one_is_known() -> None:
    losses = parabola(1.0, 5.0)
    found = curvature_along(losses, 1.0, 5.0, precision=SINGLE, base=3.0)
    assert found == LineCurvature(pytest.approx(5.0, abs=1e-9), pytest.approx(0.04), 2)
    assert losses.asked == [-found.distance, found.distance]
    with pytest.raises(NonFiniteCurvatureError, match="is nan"):
        curvature_along(losses, 1.0, 5.0, precision=SINGLE, base=float("nan"))


def test_a_direction_that_is_more_curved_than_expected_is_looked_at_once_more_from_nearer() -> None:
    losses = parabola(1.0, 5000.0)
    found = curvature_along(losses, 1.0, 5.0, precision=DOUBLE)
    assert found == LineCurvature(pytest.approx(5000.0), pytest.approx(0.2 / 5000), 5)


def test_higher_orders_count_as_the_distance_lets_them() -> None:
    # ½·4·x² + x³/5 + x⁴: the second difference is 4 + 2·d², and the first one is off by d²/5.
    losses = Losses(lambda x: 1 + 2 * x + 2 * x**2 + 0.2 * x**3 + x**4)
    found = curvature_along(losses, 2.0, 2.0, precision=DOUBLE)
    assert found == LineCurvature(pytest.approx(4 + 2 * 0.1**2), pytest.approx(0.1), 3)


def test_kinks_between_the_points_count() -> None:
    # The slope rises by 0.1 at -0.03 and at 0.03; the second derivative is 0 almost everywhere.
    losses = Losses(lambda x: 1 + x + ((x - 0.03).clamp_min(0) + (-x - 0.03).clamp_min(0)) * 0.1)
    found = curvature_along(losses, 1.0, 2.0, precision=DOUBLE)
    assert found is not None
    assert found.value == pytest.approx(2 * 0.1 * 0.07 / 0.1**2)


@pytest.mark.parametrize(("base", "is_told"), [(1.0, True), (1e3, True), (1e5, False)])
def test_it_goes_as_far_as_rounding_asks_for_and_not_beyond_the_edge(base: float, is_told: bool) -> None:
    # 200 last places of the loss for the second difference: at a base of 1e3 that takes a distance of 0.22 and at 1e5
    # one of 2.2, where the edge is at 2.
    losses = parabola(1.0, 1.0, base)
    found = curvature_along(losses, 1.0, 1.0, precision=SINGLE)
    assert (found is not None) == is_told
    if found is not None:
        assert found.value == pytest.approx(1.0, rel=1e-3)
        assert found.distance == pytest.approx(max(0.2, (400 * SINGLE * base) ** 0.5))
        assert (found.value * found.distance**2) / (SINGLE * base) >= 200
    else:
        assert losses.asked == [0.0]


def test_noise_is_seldom_believed() -> None:
    # Of the size of the second difference itself, as half precision makes it: it takes the first difference off by
    # seven times the 3 % that are let pass, and a Gaussian one would pass in a third of the two attempts.
    noise = torch.Generator().manual_seed(0)
    losses = Losses(lambda x: 1 + x + x**2 / 2 + 0.02 * torch.randn(len(x), generator=noise, dtype=torch.float64))
    told = [curvature_along(losses, 1.0, 1.0, precision=SINGLE) is not None for _ in range(200)]
    assert sum(told) <= 0.6 * len(told)


@pytest.mark.parametrize("factor", [0.9, 1.1, 2.0, 65536.0])
def test_a_slope_that_is_not_that_of_the_losses_is_noticed(factor: float) -> None:
    assert curvature_along(parabola(1.0, 1.0), factor, 1.0, precision=DOUBLE) is None


def test_a_loss_that_is_not_finite_where_it_begins_is_an_error() -> None:
    with pytest.raises(NonFiniteCurvatureError, match="The loss is nan"):
        curvature_along(Losses(lambda x: x * float("nan")), 1.0, 1.0, precision=DOUBLE)


def test_a_loss_that_is_not_finite_further_on_cannot_tell() -> None:
    losses = Losses(lambda x: torch.where(x > 0, float("inf"), 1 + x))
    assert curvature_along(losses, 1.0, 1.0, precision=DOUBLE) is None
