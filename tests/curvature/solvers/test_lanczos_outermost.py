"""The outermost value of an end, in operators where another one looks like it: the right one, for a few products."""

import statistics
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lyapunov_lightning.curvature import Eigenpairs, OnlineEigenpair, lanczos, power_iteration
from lyapunov_lightning.curvature.tracking.extremes import End, ExtremeTracker
from tests.curvature.helpers import DenseOperator, symmetric_matrix
from tests.curvature.spectra import uniform

TOL = 0.02


class Diagonal(DenseOperator):
    """A diagonal matrix."""

    def matvec(self, vector: Tensor) -> Tensor:
        self.num_matvecs += 1
        return self._matrix * vector


def bulk(size: int, seed: int = 0) -> Tensor:
    """Float32 values between -0.05 and 0.05."""
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 0.1 - 0.05


def overtaking(size: int, seed: int) -> Iterator[Tensor]:
    """An eigenvalue that grows from 0.9 through another one, of 1, by 0.05 a measurement."""
    values = bulk(size, seed)
    for step in range(30):
        values[0], values[1] = 0.9 + 0.05 * step, 1.0
        yield values


def rising(size: int, seed: int) -> Iterator[Tensor]:
    """An eigenvalue that comes out of the bulk, above the one of 1, from one measurement to the next."""
    values = bulk(size, seed)
    for step in range(30):
        values[0], values[1] = 0.0 if step < 10 else 1.5, 1.0
        yield values


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("end", ["largest", "smallest"])
@pytest.mark.parametrize("series", [overtaking, rising])
def test_an_eigenvalue_that_overtakes_is_seen(series: object, end: End, seed: int) -> None:
    sign = 1.0 if end == "largest" else -1.0
    tracker = ExtremeTracker("lanczos", end, TOL, seed=100 * seed)
    wrong, costs = 0, []
    for values in series(10_000, seed):  # type: ignore[operator]
        pairs = tracker.measure(Diagonal(sign * values))
        error = abs(sign * float(pairs.values) / float(values.max()) - 1)
        wrong += bool(pairs.converged) and error > TOL
        costs.append(pairs.num_matvecs)
    assert wrong <= 1
    assert statistics.median(costs[1:]) <= 5


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1_000, 100_000])
def test_a_start_at_the_second_eigenvector_does_not_end_the_search(size: int, seed: int) -> None:
    values = torch.cat([torch.tensor([1.5, 1.0]), bulk(size, seed)])
    start = torch.zeros_like(values)
    start[1] = 1
    pairs = lanczos(Diagonal(values), tol=1e-2, start=start, seed=seed)
    assert float(pairs.values) == pytest.approx(1.5, rel=1e-3)
    assert bool(pairs.converged)


class IdentityPlusOne(DenseOperator):
    """``I + 4uuᵀ``, such as an L2 term with one direction of curvature; the product of ``u⊥`` is the vector itself."""

    def matvec(self, vector: Tensor) -> Tensor:
        self.num_matvecs += 1
        return vector.add_(0).add(self._matrix * (4 * (self._matrix @ vector)))


@pytest.mark.parametrize("solver", [lanczos, power_iteration])
@pytest.mark.parametrize("seed", range(3))
def test_one_direction_above_a_multiple_of_the_identity_is_found(seed: int, solver: object) -> None:
    size = 100_000
    operator = IdentityPlusOne(torch.full((size,), size**-0.5))
    pairs: Eigenpairs = solver(operator, tol=1e-2, seed=seed)  # type: ignore[operator]
    assert float(pairs.values) == pytest.approx(5.0, rel=1e-3)


@pytest.mark.parametrize("where", ["first", "last", "spread"])
@pytest.mark.parametrize("seed", range(4))
def test_negative_values_in_a_large_null_space_are_found(seed: int, where: str) -> None:
    values = torch.zeros(100_000)
    places = {"first": range(40), "last": range(-40, 0), "spread": range(0, 100_000, 2_500)}[where]
    values[list(places)] = torch.cat([torch.linspace(1, 5, 20), -torch.logspace(-2, -4, 20)])
    pairs = lanczos(Diagonal(values), largest=1, smallest=1, seed=seed)
    assert pairs.values.tolist() == pytest.approx([5.0, -0.01], rel=1e-3)
    assert bool(pairs.converged.all())
    vectors = pairs.vectors.double()
    residuals = torch.linalg.vector_norm(values * vectors - pairs.values[:, None] * vectors, dim=1)
    assert bool((residuals <= 1.001 * pairs.residuals).all())  # which are measured in float32


@pytest.mark.parametrize("index", range(1, 8))
def test_a_start_at_any_eigenvector_ends_at_the_outermost_one(index: int) -> None:
    spectrum = [0.224, 0.22, 0.215, 0.21, 0.2, 0.19, 0.18, 0.175, *uniform(492, -0.02, 0.15)]
    matrix = symmetric_matrix(spectrum)
    start = torch.linalg.eigh(matrix).eigenvectors[:, -1 - index]
    pairs = lanczos(DenseOperator(matrix), tol=1e-3, start=start)
    assert float(pairs.values) == pytest.approx(0.224, rel=1e-3)


# How exact a value is.


@pytest.mark.parametrize(("largest", "smallest"), [(1, 0), (0, 1), (1, 1)])
def test_a_value_is_had_for_no_more_products_than_its_vector(largest: int, smallest: int) -> None:
    matrix = symmetric_matrix([9.0, 6.0, *uniform(496, -1, 4), -3.0, -5.0])
    whole = lanczos(DenseOperator(matrix), largest=largest, smallest=smallest, tol=1e-4)
    values = lanczos(DenseOperator(matrix), largest=largest, smallest=smallest, value_tol=1e-4)
    expected = torch.tensor([9.0] * largest + [-5.0] * smallest, dtype=torch.float64)
    assert values.num_matvecs <= whole.num_matvecs
    for pairs in (whole, values):
        assert bool(((pairs.values - expected).abs() <= pairs.value_errors).all())
        assert bool((pairs.value_errors <= 1e-4 * expected.abs()).all())


def test_the_errors_of_values_are_as_they_are_estimated() -> None:
    right = estimated = 0
    for seed in range(20):
        spectrum = torch.randn(300, generator=torch.Generator().manual_seed(seed)).double() ** 3
        pairs = lanczos(DenseOperator(symmetric_matrix(spectrum, seed)), smallest=1, value_tol=1e-2, seed=seed)
        errors = (pairs.values - torch.stack([spectrum.max(), spectrum.min()])).abs()
        right += int((errors <= 1e-2 * pairs.values.abs()).sum())
        estimated += int((errors <= pairs.value_errors).sum())
    assert right >= 39
    assert estimated >= 39


def test_the_unit_of_the_eigenvalues_does_not_matter() -> None:
    matrix = symmetric_matrix([5.0, 4.0, *uniform(296, -1, 1), -2.0, -3.0]).float()
    plain = lanczos(DenseOperator(matrix), largest=2, smallest=1)
    for scale in (2.0**-90, 2.0**80):
        scaled = lanczos(DenseOperator(matrix * scale), largest=2, smallest=1)
        assert scaled.num_matvecs == plain.num_matvecs
        assert torch.allclose(scaled.values / scale, plain.values, rtol=1e-5)
        assert bool(scaled.converged.all())


def test_an_operator_may_return_the_vector_itself_or_one_that_it_keeps() -> None:
    class Keeping(DenseOperator):
        def matvec(self, vector: Tensor) -> Tensor:
            self.kept = super().matvec(vector) if self.num_matvecs % 2 else vector.mul(2)
            self.before = self.kept.clone()
            return self.kept

    class Identity(DenseOperator):
        def matvec(self, vector: Tensor) -> Tensor:
            return vector

    for solver in (lanczos, power_iteration):
        identity = Identity(torch.eye(300, dtype=torch.float64))
        assert float(solver(identity).values) == pytest.approx(1.0)  # type: ignore[operator]
        keeping = Keeping(2 * torch.eye(300, dtype=torch.float64))
        assert float(solver(keeping).values) == pytest.approx(2.0)  # type: ignore[operator]
        assert torch.equal(keeping.kept, keeping.before)


def test_power_iteration_settles_where_both_ends_are_alike() -> None:
    values = torch.cat([torch.tensor([1.0, -1.0], dtype=torch.float64), bulk(500).double()])
    pairs = power_iteration(Diagonal(values), tol=1e-3, max_matvecs=500)
    assert bool(pairs.converged)
    assert float(pairs.values) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("solver", [lanczos, power_iteration, lambda operator: OnlineEigenpair().step(operator)])
def test_a_default_device_for_new_tensors_is_not_that_of_the_numbers(solver: object) -> None:
    operator = DenseOperator(symmetric_matrix(uniform(200, -1, 1)))
    with torch.device("meta"):
        solver(operator)  # type: ignore[operator]
