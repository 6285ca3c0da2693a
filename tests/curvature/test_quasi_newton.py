"""Learning rates from curvature: exact on quadratics, checked against a second estimate, and governed."""

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lyapunov_lightning.curvature.lyapunov import LyapunovIteration
from lyapunov_lightning.curvature.quasi_newton import CheckedSharpness, CurvatureAlongUpdate, Governor, LRBounds, tried


def symmetric(values: list[float], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return rotation @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ rotation.T


# Along the update.


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    sigma=st.floats(0.1, 2.0),
    seed=st.integers(0, 100),
)
def test_sigma_one_goes_to_the_bottom_of_a_parabola(values: list[float], sigma: float, seed: int) -> None:
    hessian = symmetric(values)
    theta = torch.randn(len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    update = -(hessian @ theta)
    proposal = CurvatureAlongUpdate(sigma, averaging=0.0).propose(
        float(update @ update), float(update @ hessian @ update)
    )
    assert proposal is not None
    bottom = theta + proposal / sigma * update
    assert abs(float(update @ hessian @ bottom)) <= 1e-9 * float(update @ update)  # no slope is left along the update


def test_averages_are_those_of_slope_and_curvature_apart() -> None:
    rule = CurvatureAlongUpdate(sigma=1.0, averaging=0.5)
    rule.propose(1.0, 10.0)
    assert rule.propose(3.0, 2.0) == pytest.approx((0.25 * 1 + 0.5 * 3) / (0.25 * 10 + 0.5 * 2))


def test_no_step_goes_beyond_its_own_parabola() -> None:
    rule = CurvatureAlongUpdate(sigma=1.5, averaging=0.9)
    rule.propose(10.0, 1.0)
    assert rule.propose(1.0, 10.0) == pytest.approx(1.5 * 0.1)
    assert rule.propose(-1.0, 10.0) is None


def test_negative_curvature_counts_by_its_modulus() -> None:
    assert CurvatureAlongUpdate(1.0, 0.0).propose(2.0, -4.0) == 0.5


@pytest.mark.parametrize(
    ("slope", "curvature"), [(math.nan, 1.0), (1.0, math.inf), (0.0, 1.0), (-1.0, 1.0), (1.0, 0.0)]
)
def test_there_is_no_proposal_without_slope_and_curvature(slope: float, curvature: float) -> None:
    assert CurvatureAlongUpdate(1.0, 0.0).propose(slope, curvature) is None


def test_numbers_that_are_not_finite_leave_the_averages_alone() -> None:
    rule, other = CurvatureAlongUpdate(), CurvatureAlongUpdate()
    for one in (rule, other):
        one.propose(1.0, 2.0)
    assert rule.propose(math.nan, 1.0) is None
    assert rule.propose(1.0, 1.0) == other.propose(1.0, 1.0)


# The sharpness.


@settings(max_examples=20, deadline=None)
@given(top=st.floats(1.0, 1000.0), gap=st.floats(0.1, 0.8), seed=st.integers(0, 100))
def test_sharpness_settles_on_the_largest_eigenvalue(top: float, gap: float, seed: int) -> None:
    hessian = symmetric([top, gap * top, 0.1 * top, -0.2 * top], seed)
    gradient_here = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sharpness = CheckedSharpness(averaging=0.0, seed=seed)
    for _ in range(80):
        estimate = sharpness.step(lambda q: gradient_here + hessian @ q, gradient_here)
    assert estimate is not None
    assert estimate.newest == pytest.approx(top, rel=1e-3)
    assert estimate.exponent == pytest.approx(1.0, abs=1e-3)


def test_a_vector_that_hangs_on_a_wrong_eigenvector_is_refuted() -> None:
    """What Algorithm 1 alone does not notice: it is settled, on an eigenvalue 2,500 times too small."""
    hessian = torch.diag(torch.tensor([717.0, 0.29], dtype=torch.float64))
    here = torch.tensor([1.0, 1.0], dtype=torch.float64)
    wrong = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def gradient(q: Tensor) -> Tensor:
        return here + hessian @ q

    alone = LyapunovIteration()
    alone.restart(wrong)
    for _ in range(30):
        estimate = alone.step(gradient, here)
    assert estimate.exponent == pytest.approx(1.0, abs=1e-6)
    assert estimate.eigenvalue == pytest.approx(0.29, rel=1e-6)

    checked = CheckedSharpness()
    checked._iteration.restart(wrong)
    first = checked.step(gradient, here)
    assert first is not None
    assert first.was_refuted
    assert first.value >= 717 / 2  # the gradient's own curvature
    for _ in range(30):
        last = checked.step(gradient, here)
    assert last is not None
    assert not last.was_refuted
    assert last.newest == pytest.approx(717.0, rel=1e-6)


def test_average_follows_a_rise_at_once_and_a_fall_slowly() -> None:
    here = torch.tensor([1.0], dtype=torch.float64)
    sharpness = CheckedSharpness(averaging=0.9)

    def at(curvature: float) -> float:
        estimate = sharpness.step(lambda q: here + curvature * q, here)
        assert estimate is not None
        return estimate.value

    assert at(2.0) == pytest.approx(2.0)
    assert at(50.0) == pytest.approx(50.0)
    assert at(2.0) == pytest.approx(0.9 * (0.9 * 2 + 0.1 * 50) + 0.1 * 2)


def test_there_is_no_sharpness_where_nothing_curves_upwards() -> None:
    here = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert CheckedSharpness().step(lambda q: here - 3 * q, here) is None


def test_a_vector_is_tracked_anew_where_the_number_of_parameters_is_another_one() -> None:
    small, large = symmetric([3.0, 1.0]), symmetric([20.0, 5.0, 1.0, -1.0])
    sharpness = CheckedSharpness(averaging=0.0)
    for hessian, top in ((small, 3.0), (large, 20.0), (small, 3.0)):
        here = torch.ones(len(hessian), dtype=torch.float64)
        estimate = sharpness.settle(lambda q: here + hessian @ q, here, 100)  # noqa: B023
        assert estimate is not None
        assert estimate.is_settled
        assert estimate.newest == pytest.approx(top, rel=0.05)


def test_settling_takes_as_many_iterations_as_it_needs_or_may() -> None:
    hessian, here = symmetric([5.0, 1.0, -1.0]), torch.ones(3, dtype=torch.float64)

    def spent(max_iterations: int) -> tuple[int, bool]:
        count = 0

        def gradient(q: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return here + hessian @ q

        estimate = CheckedSharpness().settle(gradient, here, max_iterations)
        assert estimate is not None
        return count // 2, estimate.is_settled

    needed, is_settled = spent(1000)
    assert is_settled
    assert 3 < needed < 50
    assert spent(needed - 1) == (needed, True)
    assert spent(needed - 2) == (needed - 1, False)
    assert spent(0) == (1, False)


# A step that is tried.


@pytest.mark.parametrize(
    ("bottom", "lr", "least", "expected"),
    [
        (1.0, 2.0, 0.0, (2.0, 0)),
        (1.0, 2.1, 0.0, (1.05, 1)),
        (1.0, 8.1, 0.0, (1.0125, 3)),
        (1.0, 100.0, 0.0, (6.25, 4)),
        (1.0, 8.0, 5.0, (5.0, 1)),
        (1.0, 16.0, 5.0, (5.0, 2)),
    ],
)
def test_a_step_is_halved_until_the_loss_falls(
    bottom: float, lr: float, least: float, expected: tuple[float, int]
) -> None:
    assert tried(lambda rate: (rate - bottom) ** 2, bottom**2, lr, least) == expected


def test_a_step_to_a_loss_that_is_not_a_number_is_halved() -> None:
    assert tried(lambda rate: math.nan if rate > 1 else 0.0, 1.0, 4.0, 0.0) == (1.0, 2)


# The governor.


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"max_growth": 1.0}, "`max_growth` should be above 1, got 1.0."),
        ({"min_lr": 0.0}, "`min_lr` should be a positive float, got 0.0."),
        ({"max_lr": math.nan}, "`max_lr` should be a positive float, got nan."),
        ({"min_lr": 1.0, "max_lr": 0.5}, "`min_lr` should be below `max_lr`, got 1.0 and 0.5."),
        ({"window": -1}, "`window` should be a non-negative int, got -1."),
    ],
    ids=str,
)
def test_bad_bound_is_named_with_its_value(bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LRBounds(**bounds)


def test_learning_rate_falls_at_once_and_rises_bounded() -> None:
    governor = Governor(LRBounds(max_growth=1.5, window=0))
    lrs = []
    for proposal in (0.1, 10.0, 10.0, 0.01, 1.0):
        lr = governor.limit(proposal)
        assert lr is not None
        governor.use(lr)
        lrs.append(lr)
    assert lrs == pytest.approx([0.1, 0.15, 0.225, 0.01, 0.015])


@pytest.mark.parametrize("proposal", [None, math.nan, math.inf, 0.0, -1.0])
def test_no_usable_proposal_holds_the_learning_rate(proposal: float | None) -> None:
    governor = Governor()
    assert governor.limit(proposal) is None
    governor.use(0.3)
    assert governor.limit(proposal) == 0.3


def test_floor_and_ceiling() -> None:
    governor = Governor(LRBounds(min_lr=0.1, max_lr=0.5))
    assert governor.limit(1e-9) == 0.1
    assert governor.limit(1e9) == 0.5


def test_a_rising_loss_halves_the_learning_rate_and_it_comes_back() -> None:
    governor = Governor(LRBounds(window=10))
    governor.use(1.0)
    assert not any(governor.observe(1.0 + 0.01 * (i % 2)) for i in range(10))
    rising = [governor.observe(2.0 + 0.01 * (i % 2)) for i in range(10)]
    assert rising.count(True) == 1
    assert governor.back_off == 0.5
    assert governor.limit(1.0) == 0.5
    for _ in range(10):
        governor.use(0.5)
    assert governor.back_off == pytest.approx(1.0)


def test_noise_about_a_falling_loss_is_no_rise() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(1000, generator=generator)
    governor = Governor(LRBounds(window=50))
    assert not any(governor.observe(float(2.0 - 1e-3 * i + noise[i])) for i in range(1000))


def test_a_loss_that_is_not_finite_counts_as_a_rise_at_once() -> None:
    governor = Governor()
    assert governor.observe(math.nan)
    assert governor.back_off == 0.5


@pytest.mark.parametrize("make", [CurvatureAlongUpdate, Governor], ids=["rule", "governor"])
def test_state_goes_on_where_it_was(make: type) -> None:
    one, other = make(), make()
    for part in (1.0, 2.0):
        one.propose(part, 3.0) if make is CurvatureAlongUpdate else (one.use(part), one.observe(part))
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict()
    if make is CurvatureAlongUpdate:
        assert one.propose(1.0, 1.0) == other.propose(1.0, 1.0)
    else:
        assert one.limit(5.0) == other.limit(5.0)


def test_sharpness_goes_on_where_it_was() -> None:
    hessian = symmetric([5.0, 1.0, -1.0])
    here = torch.ones(3, dtype=torch.float64)
    one, other = CheckedSharpness(), CheckedSharpness()
    for _ in range(3):
        one.step(lambda q: here + hessian @ q, here)
    other.load_state_dict(one.state_dict())
    assert one.step(lambda q: here + hessian @ q, here) == other.step(lambda q: here + hessian @ q, here)
