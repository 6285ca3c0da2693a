"""The loss along lines: values, fits and noise, against closed forms and NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lyapunov_lightning.curvature import Eigenpairs, HessianOperator, lanczos
from lyapunov_lightning.curvature.directions.landscape import NoisyLoss, noisy_loss, quadratic_fit, scan_line
from tests.curvature.helpers import Counted, rng_state, symmetric_matrix
from tests.problems import PROBLEMS, mlp

# Evaluations along a line.


@pytest.mark.parametrize("name", PROBLEMS)
def test_values_along_a_line_are_those_of_the_reference(name: str) -> None:
    problem = PROBLEMS[name]()
    direction = torch.randn(
        problem.flat_parameters.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    distances = [-0.3, 0.0, 1e-3, 0.5]
    before, generators = problem.flat_parameters, rng_state()
    found = problem.operator().values_along(direction, distances)
    expected = [float(problem.loss_at(before + distance * direction)) for distance in distances]
    assert found.tolist() == pytest.approx(expected, rel=1e-13)
    assert torch.equal(problem.flat_parameters, before)
    assert rng_state() == generators


def test_values_along_a_line_see_the_same_dropout_masks() -> None:
    operator = mlp(dropout=0.5).operator()
    direction = torch.ones(operator.size, dtype=torch.float64)
    first, other, again = operator.values_along(direction, [0.1, 0.2, 0.1]).tolist()
    assert first == again == operator.value(0.1 * direction)
    assert first != other


def test_losses_in_float32_are_summed_in_float64() -> None:
    problem = mlp().to(torch.float32)
    losses = torch.stack([problem.loss(batch).detach().double() for batch in problem.batches])
    weights = torch.tensor([len(labels) for _, labels in problem.batches], dtype=torch.float64)
    found = problem.operator().values_along(torch.zeros(problem.flat_parameters.numel()), [0.0])
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(float((losses * weights).sum() / weights.sum()), rel=1e-15)


def test_no_distances_are_no_evaluation() -> None:
    assert mlp().operator().values_along(torch.zeros(51), []).shape == (0,)


# Quadratics, of which everything is known.

SPECTRUM = [50.0, 3.0, 0.7, -0.4, -6.0]


@pytest.fixture(scope="module")
def bowl() -> tuple[HessianOperator, Tensor]:
    """A quadratic loss in five dimensions, and the gradient at the present parameters."""
    matrix = symmetric_matrix(SPECTRUM)
    slope = torch.linspace(-1, 2, 5, dtype=torch.float64)
    x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    loss = lambda batch: 2 + slope @ x + (x @ matrix @ x) / 2  # noqa: E731
    return HessianOperator(loss, [x], [torch.zeros(1)]), slope


@pytest.mark.parametrize("rank", range(len(SPECTRUM)))
@pytest.mark.parametrize("in_gradient_units", [True, False])
def test_a_quadratic_is_its_model_at_every_scale(
    bowl: tuple[HessianOperator, Tensor], rank: int, in_gradient_units: bool
) -> None:
    operator, gradient = bowl
    pairs = lanczos(operator, largest=5, tol=1e-12)
    curvature, vector = float(pairs.values[rank]), pairs.vectors[rank]
    slope = float(gradient @ vector)
    scan = scan_line(
        lambda distances: operator.values_along(vector, [-math.copysign(1, slope) * t for t in distances]),
        NoisyLoss(2.0, 2e-16, 1),
        abs(slope),
        curvature,
        scales=(0.1, 1.0, 7.0),
        unit=abs(slope) if in_gradient_units else 1.0,
    )
    assert curvature == pytest.approx(SPECTRUM[rank], rel=1e-12)
    assert [window.scale for window in scan.windows] == [0.1, 1.0, 7.0]
    for window in scan.windows:
        assert window.fit.curvature == pytest.approx(curvature, rel=1e-6)
        assert window.gap <= 1e-12 * float(window.losses.abs().max())
    if curvature > 0:
        assert scan.search.bracketed
        assert scan.search.step / abs(slope) == pytest.approx(1 / curvature, rel=1e-4)
        assert scan.search.improvement == pytest.approx(slope**2 / (2 * curvature), rel=1e-6)
    else:
        assert not scan.search.bracketed
        assert scan.search.step / abs(slope) == pytest.approx(1000 / abs(curvature))
    assert scan.num_evaluations == 33 + scan.search.num_evaluations


# The fit.


@given(
    coefficients=st.lists(st.floats(-5, 5), min_size=5, max_size=5),
    width=st.floats(1e-3, 1e3),
    count=st.integers(3, 15),
)
def test_the_fit_is_that_of_numpy(coefficients: list[float], width: float, count: int) -> None:
    scaled = torch.linspace(-1, 1, count, dtype=torch.float64)
    losses = sum(c * scaled**power for power, c in enumerate(coefficients))
    expected = 2 * np.polyfit(scaled.numpy(), losses.numpy(), 2)[0] / width**2
    assert quadratic_fit(scaled * width, losses).curvature == pytest.approx(expected, rel=1e-9, abs=1e-12 / width**2)


def test_the_error_of_the_fit_is_that_of_repeated_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    where = torch.linspace(-0.2, 0.2, 11, dtype=torch.float64)
    smooth = 1 - where + 2 * where**2
    rows = smooth + 1e-3 * torch.randn(2000, 11, generator=generator, dtype=torch.float64)
    fits = [quadratic_fit(where, row, noise=1e-3) for row in rows]
    curvatures = torch.tensor([fit.curvature for fit in fits], dtype=torch.float64)
    assert float(curvatures.std()) == pytest.approx(fits[0].error, rel=0.1)  # 2000 samples know it to 2 %
    assert float(curvatures.mean()) == pytest.approx(4, abs=4 * fits[0].error / math.sqrt(2000))


# The noise.


@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_the_noise_is_measured_beside_a_loss_that_bends(size: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def loss(t: Tensor) -> Tensor:
        noise = size * torch.randn(t.shape, generator=generator, dtype=torch.float64)
        return 3 + (5 * t).sin() + 100 * t**2 + noise

    found = [noisy_loss(Counted(loss), 1e-3, precision=1e-16).noise for _ in range(50)]
    assert math.sqrt(sum(noise**2 for noise in found) / 50) == pytest.approx(size, rel=0.2)


def test_the_noise_of_a_smooth_loss_is_its_last_place() -> None:
    found = noisy_loss(Counted(lambda t: 3 + (5 * t).sin()), 1e-4, precision=1e-7)
    assert found == NoisyLoss(3.0, pytest.approx(3e-7), 9)


def test_float32_noise_of_a_network_is_that_of_float32() -> None:
    exact, rounded = mlp(), mlp().to(torch.float32)
    direction = torch.ones(51, dtype=torch.float64) / math.sqrt(51)
    operator = rounded.operator()
    found = noisy_loss(lambda t: operator.values_along(direction.float(), t), 1e-4, precision=1e-9)
    points = [1e-4 * index for index in range(60)]
    error = operator.values_along(direction.float(), points) - exact.operator().values_along(direction, points)
    spread = float((error - error.mean()).std())  # the parameters differ by rounding too, which shifts them all
    assert spread / 4 < found.noise < 4 * spread
    assert 1e-9 < found.noise < 1e-6


# What the eigenvectors cost.


def test_the_lower_end_alone_costs_as_much_as_both_ends_together() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 10, generator=generator, dtype=torch.float64)
    labels = (inputs @ torch.randn(10, 5, generator=generator, dtype=torch.float64)).argmax(dim=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 5)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(net(batch[0]), batch[1])

    def solved(largest: int, smallest: int) -> Eigenpairs:
        operator = HessianOperator(loss, net.parameters(), [(inputs, labels)])
        pairs = lanczos(operator, largest=largest, smallest=smallest)
        assert bool(pairs.converged.all())
        return pairs

    top, bottom, both = solved(20, 0), solved(0, 3), solved(20, 3)
    assert float(bottom.smallest[-1]) < 0 < float(top.largest[-1])
    assert both.largest.tolist() == pytest.approx(top.largest.tolist(), rel=1e-3)
    assert both.smallest.tolist() == pytest.approx(bottom.smallest.tolist(), rel=1e-3)
    assert both.num_matvecs <= top.num_matvecs + bottom.num_matvecs
    assert bottom.num_matvecs <= 1.1 * both.num_matvecs  # the upper end lies in its way and is found on it
