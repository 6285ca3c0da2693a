"""How far along an update the loss goes before it is back where it began."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.directions.critical import CriticalEstimate, CriticalSharpness
from lyapunov_lightning.curvature.directions.line_search import LossAlong
from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError

SINGLE = torch.finfo(torch.float32).eps


class Counted:
    """Losses along a line, with the places at which they were asked for."""

    def __init__(self, loss: Callable[[float], float], dtype: torch.dtype = torch.float64) -> None:
        self.loss = loss
        self.dtype = dtype
        self.places: list[float] = []

    def __call__(self, distances: Sequence[float]) -> Tensor:
        self.places.extend(distances)
        return torch.tensor([self.loss(distance) for distance in distances], dtype=self.dtype).double()


def found(losses_along: LossAlong, start: float = 1.0, precision: float = 0.0) -> CriticalEstimate:
    return CriticalSharpness().measure(losses_along, start, precision=precision)


def parabola(slope: float, curvature: float, base: float = 3.0) -> Callable[[float], float]:
    return lambda eta: base - slope * eta + curvature / 2 * eta**2


# What it is.


def test_gradient_descent_on_a_quadratic_has_the_curvature_along_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix = matrix @ matrix.T
    x = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    hessian = HessianOperator(lambda batch: x @ batch @ x / 2, [x], [matrix], weights=[1])
    gradient = hessian.gradient()
    estimate = found(lambda etas: hessian.values_along(-gradient, etas), 1e-2, 1e-16)
    curvature = float(gradient @ matrix @ gradient / (gradient @ gradient))
    assert estimate.sharpness == pytest.approx(curvature, rel=0.02)
    assert estimate.converged
    assert abs(estimate.sharpness / curvature - 1) <= estimate.error <= 0.02
    assert estimate.num_evaluations <= 10


@given(slope=st.floats(1e-3, 1e3), curvature=st.floats(1e-3, 1e3), offset=st.floats(-5, 5), base=st.floats(-10, 10))
def test_every_parabola_is_found_from_afar(slope: float, curvature: float, offset: float, base: float) -> None:
    eta = 2 * slope / curvature
    losses = Counted(parabola(slope, curvature, base * slope * eta))
    estimate = found(losses, eta * math.exp(offset))
    assert estimate.converged
    assert estimate.eta == pytest.approx(eta, rel=0.0201)
    assert estimate.error <= 0.02
    assert estimate.num_evaluations == len(losses.places) <= 13


@given(cubic=st.floats(-1.5, 3.0), quartic=st.floats(0.6, 5.0), offset=st.floats(-3, 3))
def test_what_it_finds_lies_between_a_loss_that_fell_and_one_that_rose(
    cubic: float, quartic: float, offset: float
) -> None:
    losses = Counted(lambda eta: 2 - eta + eta**2 + cubic * eta**3 + quartic * eta**4)
    estimate = found(losses, math.exp(offset))
    assert estimate.converged
    assert estimate.eta is not None
    assert losses.loss(estimate.eta * 0.979) < losses.loss(0.0) < losses.loss(estimate.eta * 1.021)
    assert len(losses.places) <= 15


@pytest.mark.parametrize("tol", [1e-1, 2e-2, 1e-3])
def test_the_tolerance_is_met(tol: float) -> None:
    estimate = CriticalSharpness(tol).measure(Counted(lambda eta: 1 - eta + eta**4), 0.3)
    assert estimate.eta == pytest.approx(1.0, rel=tol)
    assert estimate.error <= tol
    assert estimate.converged


@pytest.mark.parametrize("tol", [0.0, -1.0, math.nan])
def test_a_tolerance_that_is_not_positive_is_refused(tol: float) -> None:
    with pytest.raises(ValueError, match="`tol` should be a positive float"):
        CriticalSharpness(tol)


# What it costs.


def test_first_searches_take_up_to_15_evaluations_and_later_ones_up_to_10() -> None:
    generator = torch.Generator().manual_seed(1)
    first, later = [], []
    for start in (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0):
        tracked = CriticalSharpness()
        for step in range(30):
            drift, bend = (0.1 * torch.randn(2, generator=generator)).tolist()
            eta = math.exp(drift)
            losses = Counted(lambda x, eta=eta, bend=bend: 2 - x + x**2 / eta + x**2 * (x - eta) * (bend + 0.1 * x))
            estimate = tracked.measure(losses, start, precision=1e-16)
            assert estimate.eta == pytest.approx(eta, rel=0.021)
            (later if step else first).append(len(losses.places))
    assert max(first) <= 15
    assert max(later) <= 10
    assert sum(later) / len(later) <= 7


def test_state_goes_on_where_it_was() -> None:
    tracked, resumed = CriticalSharpness(), CriticalSharpness()
    assert tracked.measure(Counted(parabola(1.0, 2e-3)), 1.0).eta == pytest.approx(1e3, rel=0.02)
    resumed.load_state_dict(tracked.state_dict())
    places = [Counted(parabola(1.0, 2.1e-3)) for _ in range(2)]
    assert tracked.measure(places[0], 1.0) == resumed.measure(places[1], 1.0)
    assert places[0].places == places[1].places
    assert places[0].places[:2] == [0.0, pytest.approx(1e3, rel=0.02)]


def test_a_search_without_result_leaves_the_place_where_the_next_one_begins() -> None:
    tracked = CriticalSharpness()
    tracked.measure(Counted(parabola(1.0, 2.0)), 0.1)
    before = tracked.state_dict()
    assert tracked.measure(Counted(lambda eta: 1 - eta), 0.1).eta is None
    assert tracked.state_dict() == before


# Where there is nothing, or not much to be seen.


@pytest.mark.parametrize("start", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize(
    "loss",
    [
        lambda eta: 3 - eta,
        lambda eta: math.exp(-eta),
        lambda eta: 3.0,
        lambda eta: 3 + eta + eta**2,
        lambda eta: 3 + 1e-3 * eta,
        lambda eta: 3 - eta if eta == 0 else math.nan,
    ],
    ids=["falls", "falls_ever_less", "flat", "rises", "rises_slowly", "nan"],
)
def test_without_a_fall_and_a_rise_there_is_no_value(loss: Callable[[float], float], start: float) -> None:
    estimate = found(Counted(loss), start, SINGLE)
    assert (estimate.eta, estimate.sharpness, estimate.converged) == (None, None, False)
    assert estimate.error == math.inf
    assert estimate.num_evaluations <= 25


def test_a_loss_that_rises_from_the_very_beginning_is_seen_soon() -> None:
    assert found(Counted(lambda eta: 3 + eta + eta**2), 1.0, SINGLE).num_evaluations <= 8


def test_a_loss_that_rises_in_proportion_far_out_is_not_taken_for_one_that_rises_at_once() -> None:
    # As a cross entropy does: (1 + eta²)^½ grows like eta beyond a dip of width 0.2.
    estimate = found(Counted(lambda eta: 0.5 + math.sqrt(0.01 + (eta - 0.1) ** 2)), 100.0, SINGLE)
    assert estimate.eta == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize("beyond", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_counts_as_risen(beyond: float) -> None:
    estimate = found(Counted(lambda eta: 3 - eta if eta < 0.3 else beyond))
    assert estimate.eta == pytest.approx(0.3, rel=0.02)
    assert estimate.converged


@pytest.mark.parametrize("base", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_at_the_start_is_an_error(base: float) -> None:
    with pytest.raises(NonFiniteCurvatureError, match="not finite, where the update begins"):
        found(Counted(lambda eta: base))


# Rounding.


def test_rounding_of_single_precision_does_not_matter_where_the_loss_falls_by_more() -> None:
    estimate = found(Counted(parabola(1e-3, 8e-3), torch.float32), 1e-2, SINGLE)
    assert estimate.eta == pytest.approx(0.25, rel=0.02)
    assert estimate.converged


@pytest.mark.parametrize("start", [1e-3, 0.1, 0.25, 1.0])
def test_a_fall_that_is_lost_in_rounding_is_none(start: float) -> None:
    estimate = found(Counted(parabola(1e-7, 8e-7), torch.float32), start, SINGLE)
    assert estimate.eta is None
    assert not estimate.converged


def test_noise_shows_in_the_error() -> None:
    generator = torch.Generator().manual_seed(3)

    def noisy(eta: float) -> float:
        return parabola(1.0, 8.0)(eta) + 1e-2 * float(torch.randn((), generator=generator))

    estimates = [found(Counted(noisy), 0.3) for _ in range(50)]
    errors = [abs(estimate.eta / 0.25 - 1) for estimate in estimates if estimate.eta is not None]
    assert len(errors) >= 45
    # 0.01 of noise at a slope of 1 are 4 % of the critical learning rate.
    assert sum(errors) / len(errors) == pytest.approx(0.04, abs=0.02)
    assert sum(estimate.error for estimate in estimates if estimate.eta) / len(errors) > 0.03
    assert sum(estimate.converged for estimate in estimates) <= 15
