"""The loss along lines: fits, minima and noise, against closed forms, NumPy and SciPy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor, nn

from lyapunov_lightning.curvature import Eigenpairs, HessianOperator, lanczos
from lyapunov_lightning.curvature.directions.landscape import NoisyLoss, noisy_loss, quadratic_fit, scan_line
from lyapunov_lightning.curvature.directions.line_search import first_minimum
from tests.curvature.helpers import rng_state, symmetric_matrix
from tests.problems import PROBLEMS, mlp


class Counted:
    """A function of one distance, as the scans want it, that keeps where it was evaluated."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.seen: list[float] = []

    def __call__(self, distances: Sequence[float]) -> Tensor:
        self.seen += distances
        return self.function(torch.tensor(distances, dtype=torch.float64))


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


# The search for a minimum.


@settings(max_examples=100)
@given(
    bend=st.floats(0.05, 20),
    skew=st.floats(-0.9, 3),
    where=st.floats(1e-3, 1e3),
    off=st.floats(1e-2, 1e2),
)
def test_the_minimum_is_that_of_scipy_from_any_guess(bend: float, skew: float, where: float, off: float) -> None:
    def valley(t: Tensor) -> Tensor:  # one minimum, of different slopes to both sides
        x = t / where - 1
        return bend * (x.square() + skew * (1 + x.square()).sqrt() + 0.3 * x.sin())

    loss = Counted(valley)
    start = float(valley(torch.zeros((), dtype=torch.float64)))
    reference = minimize_scalar(lambda t: float(valley(torch.tensor(t))), bracket=(0, where), tol=1e-12)
    found = first_minimum(loss, start, where * off, max_step=1e5 * where)
    if reference.x <= 1e-2 * where:  # the valley goes uphill from the start, or nearly so
        return
    assert found.bracketed
    assert found.step == pytest.approx(reference.x, rel=1e-4)
    assert found.improvement == pytest.approx(start - reference.fun, rel=1e-6, abs=1e-12 * abs(start))
    assert found.num_evaluations == len(loss.seen)
    assert found.num_evaluations <= 60


def test_the_search_stops_at_the_first_minimum() -> None:
    wells = Counted(lambda t: 1 - t.sin() - 0.1 * t)  # a lower minimum in every further period
    found = first_minimum(wells, 1.0, 0.2, max_step=1000.0)
    assert found.step == pytest.approx(math.pi / 2 + math.asin(0.1), rel=1e-4)
    assert max(wells.seen) < 2 * math.pi


@dataclass(frozen=True)
class RandomLine:
    """A sum of sines and a parabola, which falls at distance 0."""

    amplitudes: np.ndarray
    frequencies: np.ndarray
    phases: np.ndarray
    parabola: float
    tilt: float

    @classmethod
    def draw(cls, seed: int) -> "RandomLine":
        rng = np.random.default_rng(seed)
        count = rng.integers(1, 7)
        frequencies = 10 ** rng.uniform(-1, 1, count)
        amplitudes = 10 ** rng.uniform(-1.5, 0.5, count) / frequencies ** rng.choice([0, 1, 2])
        parabola = 10 ** rng.uniform(-3, 0.5) * rng.choice([0, 1, 1])
        line = cls(
            amplitudes, frequencies, rng.uniform(0, 2 * np.pi, count), parabola, rng.normal() * rng.choice([0, 1])
        )
        return line if line.slope(0.0) < 0 else cls(-amplitudes, frequencies, line.phases, parabola, -line.tilt)

    def __call__(self, t: Tensor) -> Tensor:
        where = t.numpy().reshape(-1, 1)
        waves = self.amplitudes * np.sin(self.frequencies * where + self.phases)
        return torch.from_numpy(waves.sum(axis=1) + self.parabola / 2 * where[:, 0] ** 2 + self.tilt * where[:, 0])

    def slope(self, t: Any) -> Any:
        waves = self.amplitudes * self.frequencies * np.cos(self.frequencies * np.reshape(t, (-1, 1)) + self.phases)
        return waves.sum(axis=1) + self.parabola * np.reshape(t, -1) + self.tilt

    @property
    def curvature(self) -> float:
        return float(self.parabola - (self.amplitudes * self.frequencies**2 * np.sin(self.phases)).sum())

    def turns(self, reach: float) -> tuple[float, float]:
        """Where the loss first turns up and where down again, by the slope on a dense grid; else `reach`."""
        found, start = [], 0.0
        for _ in range(4000):
            grid = start + np.arange(4001) / (100 * self.frequencies.max())
            rising = self.slope(grid) >= 0
            for index in np.flatnonzero(rising[1:] != rising[:-1])[: 2 - len(found)]:
                found.append(brentq(lambda t: float(self.slope(t)[0]), grid[index], grid[index + 1], xtol=1e-12))
            start = float(grid[-1])
            if len(found) == 2 or start > reach:
                break
        first, second = [*found, reach, reach][:2]
        return min(first, reach), min(second, reach)


def falls_all_the_way(line: RandomLine, seen: Sequence[float], minimum: float) -> bool:
    before = line(torch.tensor(sorted([0.0, *(t for t in seen if t <= minimum)]), dtype=torch.float64))
    return bool((before.diff() <= 0).all())


def test_no_random_line_has_an_earlier_minimum_that_shows() -> None:
    """What is claimed of the first minimum, in all of 300 lines."""
    counts: list[int] = []
    shallow = deep = 0
    for seed in range(300):
        line = RandomLine.draw(seed)
        slope, curvature = -float(line.slope(0.0)[0]), line.curvature
        natural = slope / abs(curvature)
        start = float(line(torch.zeros(1, dtype=torch.float64))[0])
        counted = Counted(line)
        scan = scan_line(counted, NoisyLoss(start, 0.0, 1), slope, curvature, scales=())
        counts.append(scan.search.num_evaluations)
        first, behind = line.turns(1000 * natural)
        is_first = scan.search.bracketed and scan.search.step == pytest.approx(first, rel=1e-3)
        if scan.search.bracketed:
            assert falls_all_the_way(line, counted.seen, scan.search.step), seed
        if first < 1000 * natural:
            bottom, top = line(torch.tensor([first, behind], dtype=torch.float64)).tolist()
            if top - bottom >= 0.1 * (start - bottom):
                deep += 1
                assert is_first, seed
            else:
                shallow += not is_first
    assert deep > 200
    assert shallow <= 30
    assert sum(counts) <= 16 * len(counts)


@pytest.mark.parametrize("guess", [1e-3, 1.0, 30.0])
def test_without_the_slope_the_losses_before_the_minimum_fall_as_well(guess: float) -> None:
    for seed in range(100):
        line = RandomLine.draw(seed)
        start = float(line(torch.zeros(1, dtype=torch.float64))[0])
        counted = Counted(line)
        found = first_minimum(counted, start, guess, max_step=1000.0)
        assert not found.bracketed or falls_all_the_way(line, counted.seen, found.step)
        assert found.improvement >= 0


@pytest.mark.parametrize(
    ("line", "slope", "curvature", "most"),
    [
        (lambda t: -t + t**2 / 2, 1.0, 1.0, 5),
        (lambda t: (-t).exp() + 0.01 * t, 0.99, 1.0, 20),
        (lambda t: -t + t**2 / 2 + t**4 / 4, 1.0, 1.0, 12),
        (lambda t: (t - 2).cosh(), math.sinh(2), math.cosh(2), 13),
        (lambda t: -t - t**2 / 2 + 31 / 30**3 / 4 * t**4, 1.0, -1.0, 17),
        (lambda t: -t - t**2 / 2, 1.0, -1.0, 12),
        (lambda t: (1 + (t - 10) ** 2).log(), 20 / 101, -198 / 101**2, 17),
    ],
    ids=["quadratic", "decay", "quartic", "cosh", "double-well", "concave", "logarithm"],
)
def test_a_plain_line_takes_few_evaluations(
    line: Callable[[Tensor], Tensor], slope: float, curvature: float, most: int
) -> None:
    start = NoisyLoss(float(line(torch.zeros((), dtype=torch.float64))), 0.0, 1)
    assert scan_line(Counted(line), start, slope, curvature, scales=()).search.num_evaluations <= most


@pytest.mark.parametrize(("limit", "inside"), [(460.0, True), (1000.0, True), (459.0, False)])
def test_a_minimum_far_away_is_found_within_the_range_and_never_beyond(limit: float, inside: bool) -> None:
    slope, curvature = 1e-3, -1.0
    far = 459.5 * slope / abs(curvature)
    quartic = -(curvature * far - slope) / far**3  # puts the minimum there
    loss = Counted(lambda t: -slope * t + curvature / 2 * t**2 + quartic / 4 * t**4)
    natural = slope / abs(curvature)
    found = first_minimum(loss, 0.0, natural, max_step=limit * natural)
    assert found.bracketed is inside or limit == 460.0
    assert max(loss.seen) <= limit * natural * (1 + 1e-12)
    if limit == 1000.0:
        assert found.step == pytest.approx(far, rel=1e-4)
    if not inside:
        assert found.step == pytest.approx(limit * natural)


@pytest.mark.parametrize(
    "fall", [lambda t: -t, lambda t: -t - t**2, lambda t: (-t).exp() - 1], ids=["line", "concave", "decay"]
)
def test_a_loss_that_only_falls_has_no_minimum(fall: Callable[[Tensor], Tensor]) -> None:
    found = first_minimum(Counted(fall), 0.0, 0.01, max_step=10.0)
    assert not found.bracketed
    assert found.step == pytest.approx(10)
    assert found.improvement > 0


def test_a_loss_that_only_rises_has_no_minimum() -> None:
    found = first_minimum(Counted(lambda t: t), 0.0, 1.0, max_step=10.0, noise=1e-9)
    assert not found.bracketed
    assert found.step == 0
    assert found.improvement == 0
    assert found.num_evaluations < 40


@pytest.mark.parametrize("hole", [math.nan, math.inf])
@pytest.mark.parametrize("guess", [0.1, 100.0])
def test_what_is_not_finite_is_too_far(hole: float, guess: float) -> None:
    loss = Counted(lambda t: torch.where(t > 1.5, hole, (t - 1).square()))
    found = first_minimum(loss, 1.0, guess, max_step=1e4)
    assert found.bracketed
    assert found.step == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("guess", [0.0, math.inf, math.nan])
def test_nowhere_to_begin_is_no_minimum(guess: float) -> None:
    loss = Counted(lambda t: t)
    assert not first_minimum(loss, 0.0, guess, max_step=1000 * guess).bracketed
    assert loss.seen == []


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_minimum(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise = 1e-7
    flat = Counted(lambda t: 1 + noise / 6 * torch.randn(t.shape, generator=generator, dtype=torch.float64))
    assert not first_minimum(flat, 1.0, 0.1, max_step=100.0, noise=noise).bracketed


@pytest.mark.parametrize("seed", range(20))
def test_a_minimum_deeper_than_the_noise_is_found_as_exactly_as_that_allows(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise, slope, curvature = 1e-7, 0.02, 2.0
    improvement = slope**2 / (2 * curvature)  # a thousand times the noise

    def loss(t: Tensor) -> Tensor:
        rounding = noise / 2 * (2 * torch.rand(t.shape, generator=generator, dtype=torch.float64) - 1)
        return 1 - slope * t + curvature / 2 * t**2 + rounding

    found = first_minimum(Counted(loss), 1.0, 0.3 * slope / curvature, max_step=10.0, noise=noise)
    assert found.bracketed
    # where the loss is within two noises of its minimum
    assert found.step * curvature / slope == pytest.approx(1, abs=math.sqrt(3 * noise / improvement))
    assert found.num_evaluations < 25


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
