"""Scans in units of the gradient and of SGD's steps find what closed forms and the batches' own gradients say."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lyapunov_lightning.curvature import HessianOperator, NonFiniteCurvatureError, lanczos
from lyapunov_lightning.curvature.directions.landscape import NoisyLoss
from lyapunov_lightning.curvature.directions.scanning import (
    SURFACE,
    Direction,
    batch_components,
    noisy_start,
    random_directions,
    scan_direction,
    scan_steps,
)
from tests.curvature.helpers import DenseOperator, rng_state, symmetric_matrix
from tests.problems import PROBLEMS

SPECTRUM = [6.0, 2.0, 0.5, -0.3, -1.5]
EXACT = NoisyLoss(0.0, 0.0, 0)


@pytest.fixture
def bowl() -> tuple[HessianOperator, Tensor]:
    """A quadratic of both signs with its matrix; the batches pull at it in different directions."""
    matrix = symmetric_matrix(SPECTRUM)
    x = torch.linspace(0.5, -1, 5, dtype=torch.float64).requires_grad_()
    pulls = torch.randn(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return HessianOperator(lambda pull: x @ matrix @ x / 2 + pull[0] @ x, [x], [p[None] for p in pulls]), matrix


def eigenvector(matrix: Tensor, rank: int) -> Direction:
    values, vectors = torch.linalg.eigh(matrix)
    return Direction(float(values[rank]), vectors[:, rank])


@pytest.mark.parametrize("rank", range(5))
@pytest.mark.parametrize("units", ["gradient", "norm"])
def test_windows_are_in_their_unit_and_the_line_goes_downhill(bowl: Any, rank: int, units: Any) -> None:
    operator, matrix = bowl
    direction, gradient = eigenvector(matrix, rank), operator.gradient()
    start = noisy_start(operator, gradient)
    scan = scan_direction(operator, direction, gradient, start, scales=(0.1, 2.0), units=units, points=5)
    slope = float(gradient @ direction.vector)
    assert scan.slope == pytest.approx(abs(slope), rel=1e-12)
    assert scan.curvature == direction.curvature
    for scale, window in zip((0.1, 2.0), scan.line.windows, strict=True):
        width = scale * (scan.slope if units == "gradient" else 1)
        assert window.distances.tolist() == pytest.approx([-width, -width / 2, 0, width / 2, width])
        downhill = -math.copysign(1, slope) * direction.vector
        expected = [operator.value(t * downhill) for t in window.distances.tolist()]
        assert window.losses.tolist() == pytest.approx(expected, rel=1e-12)
        assert window.fit.curvature == pytest.approx(direction.curvature, rel=1e-6)
    search = scan.line.search
    assert search.bracketed is (direction.curvature > 0)
    if search.bracketed:
        assert search.step / scan.slope == pytest.approx(1 / direction.curvature, rel=1e-4)
        assert search.improvement == pytest.approx(slope**2 / (2 * direction.curvature), rel=1e-6)
    else:
        assert search.step / scan.slope == pytest.approx(1000 / abs(direction.curvature))


def test_the_search_reaches_as_far_as_it_is_told(bowl: Any) -> None:
    operator, matrix = bowl
    scan = scan_direction(
        operator, eigenvector(matrix, 0), operator.gradient(), EXACT, scales=(), points=3, max_bracket=7.0
    )
    assert scan.line.search.step / scan.slope == pytest.approx(7 / 1.5)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_start_is_the_loss_with_the_rounding_of_its_precision(name: str) -> None:
    problem = PROBLEMS[name]()
    operator, before = problem.operator(), rng_state()
    start = noisy_start(operator, operator.gradient())
    assert start.value == pytest.approx(float(problem.loss_at(problem.flat_parameters)), rel=1e-13)
    assert start.noise < 1e-12 * abs(start.value)
    assert rng_state() == before


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_start_that_is_not_finite_is_an_error(broken: str) -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    losses = {"loss": lambda _: (x - 1).square().sum() + math.inf, "gradient": lambda _: x.abs().sqrt().sum()}
    operator = HessianOperator(losses[broken], [x], [torch.zeros(1)])
    with pytest.raises(NonFiniteCurvatureError, match="loss or its gradient"):
        noisy_start(operator, operator.gradient())


def test_at_a_stationary_point_nothing_is_downhill() -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    operator = HessianOperator(lambda _: 3 + x.square().sum(), [x], [torch.zeros(1)])
    start = noisy_start(operator, operator.gradient())
    assert start.value == 3
    axis = Direction(2.0, torch.tensor([1.0, 0.0], dtype=torch.float64))
    scan = scan_direction(operator, axis, operator.gradient(), start, scales=(0.1, 1.0))
    assert scan.slope == 0
    assert scan.line.windows == ()
    assert not scan.line.search.bracketed


# In steps of SGD.


def test_changes_are_means_over_the_steps_of_the_batches(bowl: Any) -> None:
    operator, matrix = bowl
    vector, start = eigenvector(matrix, -1).vector, operator.value()
    components, lr, multiples = [0.5, -2.0, 1.0], 0.3, (0.5, 4.0)
    scan = scan_steps(operator, vector, start, components, lr=lr, multiples=multiples)
    for multiple, change in zip(multiples, scan.changes, strict=True):
        expected = sum(operator.value(-multiple * lr * c * vector) - start for c in components) / 3
        assert change == pytest.approx(expected, rel=1e-12)
    assert scan.mean_length == pytest.approx(lr * 3.5 / 3)
    expected = [operator.value(k * scan.mean_length * vector) for k in SURFACE]
    assert scan.surface == pytest.approx(expected, rel=1e-12)
    assert scan.num_evaluations == 2 * 3 + 11


@pytest.mark.parametrize("most", [1, 3, 4, 9])
def test_components_are_those_of_the_first_batches(bowl: Any, most: int) -> None:
    operator, matrix = bowl
    vector = eigenvector(matrix, -1).vector
    expected = [float(gradient @ vector) for gradient in operator.batch_gradients()]
    assert len(set(expected)) == 4
    assert batch_components(operator, vector, most) == pytest.approx(expected[:most], rel=1e-12)


@pytest.mark.parametrize("most", [2, 3, 10])
def test_components_of_several_ranks_are_taken_in_turn(most: int) -> None:
    """Two ranks, of which the second has fewer batches, played one after the other."""
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    shards = [[1.0, 2.0, 3.0], [10.0]]
    vector = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def operator(rank: int, buffers: list[Tensor]) -> HessianOperator:
        def reduce(buffer: Tensor) -> None:
            buffers.append(buffer.clone())
            if len(buffers) == 3:  # the others' have been noted
                buffer.copy_(buffers[0] + buffers[1])

        batches = [torch.tensor([[pull, 0.0]], dtype=torch.float64) for pull in shards[rank]]
        return HessianOperator(lambda batch: batch[0] @ x, [x], batches, reduce=reduce)

    noted: list[Tensor] = []
    for rank in (0, 1):
        batch_components(operator(rank, noted), vector, most, rank=rank, world_size=2)
    in_turn = [1.0, 10.0, 2.0, 3.0]
    for rank in (0, 1):
        found = batch_components(operator(rank, list(noted)), vector, most, rank=rank, world_size=2)
        assert found == pytest.approx(in_turn[:most], rel=1e-12)


# Random directions.


def test_random_directions_are_unit_vectors_of_a_seed_with_their_curvature() -> None:
    operator, before = DenseOperator(symmetric_matrix(SPECTRUM)), rng_state()
    first, again, other = (list(random_directions(operator, 3, seed)) for seed in (0, 0, 1))
    assert operator.num_matvecs == 9
    assert rng_state() == before
    for one, same, different in zip(first, again, other, strict=True):
        assert float(one.vector.norm()) == pytest.approx(1)
        assert one.curvature == pytest.approx(float(one.vector @ symmetric_matrix(SPECTRUM) @ one.vector), rel=1e-12)
        assert torch.equal(one.vector, same.vector)
        assert not torch.equal(one.vector, different.vector)
    assert not torch.equal(first[0].vector, first[1].vector)


def test_a_random_direction_without_finite_curvature_is_an_error() -> None:
    operator = DenseOperator(torch.full((3, 3), math.nan, dtype=torch.float64))
    with pytest.raises(NonFiniteCurvatureError, match="random direction"):
        list(random_directions(operator, 1))


def test_eigenvectors_of_lanczos_can_be_scanned(bowl: Any) -> None:
    operator, _ = bowl
    pairs = lanczos(operator, largest=1, smallest=1, tol=1e-10)
    gradient = operator.gradient()
    start = noisy_start(operator, gradient)
    for value, vector in zip(pairs.values.tolist(), pairs.vectors, strict=True):
        scan = scan_direction(operator, Direction(value, vector), gradient, start, scales=(1.0,))
        assert scan.line.windows[0].gap < 1e-10
