"""Learning rates from curvature: exact on quadratics, blind to noise, and checked against a second estimate."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lyapunov_lightning.curvature.acting.step_length import CheckedSharpness, StepLength, longest_descent
from lyapunov_lightning.curvature.solvers.lyapunov import LyapunovIteration


def symmetric(values: list[float], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return rotation @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ rotation.T


# Along the update.


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    lr=st.floats(1e-6, 1e3),
    seed=st.integers(0, 100),
)
def test_length_one_goes_to_the_bottom_of_a_parabola(values: list[float], lr: float, seed: int) -> None:
    """Slope at the end of a step of any length, and curvature: the bottom is where the derivative vanishes."""
    hessian = symmetric(values)
    theta = torch.randn(len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    update = -(hessian @ theta)
    length = StepLength()
    length.see_curvature(float(update @ hessian @ update) / float(update @ update))
    end = theta + lr * update
    length.see_slope(-float(hessian @ end @ update), squared_norm=float(update @ update), lr=lr)
    best = float(update @ update) / float(update @ hessian @ update)
    assert length.best_lr == pytest.approx(best, rel=1e-6)
    assert length.of(lr) == pytest.approx(min(lr / best, 10), rel=1e-6)


def test_at_length_two_nothing_is_gained() -> None:
    length = StepLength()
    length.see_curvature(3.0)
    slope_where_it_began = 5.0
    lr = 2 * slope_where_it_began / 3.0
    length.see_slope(slope_where_it_began - lr * 3.0, squared_norm=1.0, lr=lr)
    assert length.of(lr) == pytest.approx(2.0)
    assert -lr * slope_where_it_began + lr**2 * 3.0 / 2 == pytest.approx(0.0)


def test_noise_of_the_batch_that_made_the_update_does_not_lengthen_the_steps() -> None:
    """On a noisy parabola the length at rest is known; the batch that made the update sees far shorter steps."""
    generator = torch.Generator().manual_seed(0)
    curvature, noise, lr, theta = 2.0, 1.0, 0.1, torch.tensor(3.0, dtype=torch.float64)
    length, slopes, curvatures, own_slopes = StepLength(), [], [], []
    for step in range(6000):
        update = -(curvature * theta + noise * torch.randn((), generator=generator, dtype=torch.float64))
        theta = theta + lr * update
        seen = curvature * theta + noise * torch.randn((), generator=generator, dtype=torch.float64)
        length.see_curvature(curvature)
        length.see_slope(-float(seen * update), squared_norm=float(update**2), lr=lr)
        if step >= 1000:
            slopes.append(length._slope)
            curvatures.append(length._curvature)
            own_slopes.append(float(update**2))
    # At rest the loss neither falls nor rises in the mean, which makes the length 2.
    assert lr * sum(curvatures) / sum(slopes) == pytest.approx(2, rel=0.2)
    assert lr * sum(curvatures) / sum(own_slopes) < 0.3


def test_averages_are_those_of_slope_and_curvature_apart() -> None:
    length = StepLength()
    length.see_curvature(2.0)
    length.see_slope(1.0, squared_norm=1.0, lr=0.0)
    length.see_slope(3.0, squared_norm=4.0, lr=0.0)
    first, later = 2 / 3 * 1 / 3, 1 / 3
    assert length.best_lr == pytest.approx((first * 1 + later * 3) / (first * 2 + later * 8))


def test_the_error_of_a_length_is_that_of_its_averages() -> None:
    """Independent slopes of a known spread: their weighted mean has a known standard error."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(200):
        length = StepLength()
        length.see_curvature(1.0)
        for sample in torch.randn(100, generator=generator, dtype=torch.float64).tolist():
            length.see_slope(5 + sample, squared_norm=1.0, lr=0.0)
        assert length.memory == pytest.approx(33)
        least, middle = length.at_least(1.0), length.of(1.0)
        assert least is not None
        assert middle is not None
        found.append((1 / least - 1 / middle, 1 / middle))
    errors, means = (torch.tensor(column, dtype=torch.float64) for column in zip(*found, strict=True))
    assert float(errors.mean()) == pytest.approx(float(means.std()), rel=0.25)


def test_negative_curvature_counts_by_its_modulus() -> None:
    length = StepLength()
    length.see_curvature(-4.0)
    length.see_slope(2.0, squared_norm=1.0, lr=0.0)
    assert length.best_lr == pytest.approx(0.5)


@pytest.mark.parametrize("slope", [0.0, -1.0])
def test_steps_without_slope_are_too_long(slope: float) -> None:
    length = StepLength()
    length.see_curvature(1.0)
    length.see_slope(slope, squared_norm=1.0, lr=0.0)
    assert length.best_lr is None
    assert length.of(1e-9) == 10


def test_there_is_no_length_without_slope_and_curvature() -> None:
    length = StepLength()
    length.see_slope(1.0, squared_norm=1.0, lr=0.1)
    assert length.of(0.1) is None
    for nothing in (0.0, math.nan, math.inf):
        length.see_curvature(nothing)
    length.see_slope(1.0, squared_norm=1.0, lr=0.1)
    assert length.of(0.1) is None
    length.see_curvature(1.0)
    for slope, squared_norm in ((math.nan, 1.0), (math.inf, 1.0), (1.0, 0.0), (1.0, math.nan)):
        length.see_slope(slope, squared_norm=squared_norm, lr=0.1)
    assert length.of(0.1) is None


# The first step.


@pytest.mark.parametrize(
    ("curvature", "expected"),
    [(2.0, (1.0, 0)), (-2.0, (1.0, 0)), (1.01, (2 / 1.01, 0)), (0.5, (1.0, 2)), (0.01, (200 / 128, 7))],
)
def test_the_first_step_is_halved_until_the_loss_falls(curvature: float, expected: tuple[float, int]) -> None:
    """The loss is (lr - 1)², whose curvature is 2: what is said of it instead leads beyond the other side."""
    assert longest_descent(lambda lr: (lr - 1) ** 2, 1.0, slope=2.0, curvature=curvature) == pytest.approx(expected)


def test_a_first_step_to_a_loss_that_is_not_a_number_is_halved() -> None:
    found = longest_descent(lambda lr: math.nan if lr > 1 else 0.0, 1.0, slope=4.0, curvature=1.0)
    assert found == (1.0, 2)


@pytest.mark.parametrize(
    ("slope", "curvature"), [(math.nan, 1.0), (1.0, math.inf), (0.0, 1.0), (-1.0, 1.0), (1.0, 0.0)]
)
def test_there_is_no_first_step_without_slope_and_curvature(slope: float, curvature: float) -> None:
    assert longest_descent(lambda lr: 0.0, 1.0, slope=slope, curvature=curvature) == (None, 0)


def test_a_loss_that_falls_nowhere_gives_no_first_step() -> None:
    assert longest_descent(lambda lr: 1.0, 1.0, slope=1.0, curvature=1.0)[0] is None


# The sharpness.


@settings(max_examples=20, deadline=None)
@given(top=st.floats(1.0, 1000.0), gap=st.floats(0.1, 0.8), seed=st.integers(0, 100))
def test_sharpness_settles_on_the_largest_eigenvalue(top: float, gap: float, seed: int) -> None:
    hessian = symmetric([top, gap * top, 0.1 * top, -0.2 * top], seed)
    gradient_here = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sharpness = CheckedSharpness(seed=seed)
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
    sharpness = CheckedSharpness()

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
    sharpness = CheckedSharpness()
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


# Resuming.


def test_lengths_go_on_where_they_were() -> None:
    one, other = StepLength(), StepLength()
    for part in (1.0, 2.0):
        one.see_curvature(part)
        one.see_slope(part, squared_norm=part, lr=0.1)
    other.load_state_dict(one.state_dict())
    for length in (one, other):
        length.see_curvature(5.0)
        length.see_slope(0.5, squared_norm=2.0, lr=0.3)
    assert one.state_dict() == other.state_dict()


def test_sharpness_goes_on_where_it_was() -> None:
    hessian = symmetric([5.0, 1.0, -1.0])
    here = torch.ones(3, dtype=torch.float64)
    one, other = CheckedSharpness(), CheckedSharpness()
    for _ in range(3):
        one.step(lambda q: here + hessian @ q, here)
    other.load_state_dict(one.state_dict())
    assert one.step(lambda q: here + hessian @ q, here) == other.step(lambda q: here + hessian @ q, here)
