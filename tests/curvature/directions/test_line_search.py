"""The first minimum along a line, against closed forms and SciPy."""

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
from torch import Tensor

from lyapunov_lightning.curvature.directions.landscape import NoisyLoss, scan_line
from lyapunov_lightning.curvature.directions.line_search import first_minimum
from tests.curvature.helpers import Counted


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
            grid = start + np.arange(4001) / (25 * self.frequencies.max())
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
