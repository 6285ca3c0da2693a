"""How likely it is that a copy of an eigenvalue was missed: what is said of it, and that it is so."""

import sys

import pytest
import torch
from torch import Tensor

from benchmarks.least import Diagonal, least_products
from benchmarks.peers import Task
from lyapunov_lightning.curvature import Eigenpairs, lanczos
from lyapunov_lightning.curvature.solvers.krylov import KrylovBasis, Target
from tests.curvature.helpers import DenseOperator, symmetric_matrix
from tests.curvature.spectra import uniform

SIZE = 500


def spectrum(kind: str) -> Tensor:
    """Outliers above a bulk, with copies."""
    generator = torch.Generator().manual_seed(0)
    bulk = 0.02 * torch.randn(SIZE, generator=generator, dtype=torch.float64)
    values = torch.cat([10 * 0.9 ** torch.arange(30, dtype=torch.float64), bulk[30:]])
    if kind == "the largest twice":
        values[30] = values[0]
    elif kind == "the fifth five times":
        values[30:34] = values[4]
    elif kind == "two towers":
        values = values[: SIZE // 2].repeat(2)
    elif kind == "tenfold":
        values = values[: SIZE // 10].repeat(10)
    elif kind == "near copies":
        values[30:35] = values[:5] * (1 - 1e-5)
    return values


SEEDS = {"the largest twice": 60, "the fifth five times": 60, "two towers": 30, "tenfold": 10, "near copies": 40}


def is_wrong(pairs: Eigenpairs, values: Tensor) -> bool:
    ends = values.sort().values
    exact = torch.cat([ends.flip(0)[: pairs.num_largest], ends[: len(pairs.values) - pairs.num_largest]])
    return bool(((pairs.values - exact).abs() > pairs.residuals + 1e-3 * exact.abs()).any())


@pytest.mark.parametrize("kind", SEEDS)
def test_copies_are_found(kind: str) -> None:
    """With a chance of 1e-2 two of these 200 searches may be wrong, and none is."""
    values = spectrum(kind)
    for seed in range(SEEDS[kind]):
        pairs = lanczos(Diagonal(values), largest=5, seed=seed)
        assert bool(pairs.converged.all())
        assert bool((pairs.missed_probability <= 1e-2).all())
        assert not is_wrong(pairs, values)


def test_without_a_check_they_are_not() -> None:
    values = spectrum("the largest twice")
    for seed in range(3):
        pairs = lanczos(Diagonal(values), largest=5, seed=seed, max_missed=None)
        assert is_wrong(pairs, values)
        assert pairs.missed_probability.tolist() == [1.0] * 5
        assert bool(pairs.converged.all())
        assert pairs.num_matvecs < lanczos(Diagonal(values), largest=5, seed=seed).num_matvecs


@pytest.mark.parametrize("max_missed", [0.5, 0.2])
def test_they_are_missed_no_more_often_than_is_said(max_missed: float) -> None:
    """The copy of the last wanted value is hidden best: nothing lies beyond it but what is wanted."""
    values = torch.cat([torch.tensor([3.0, 3.0, 2.0], dtype=torch.float64), torch.tensor(uniform(297, -1, 1))])
    found = [lanczos(Diagonal(values), largest=2, seed=seed, max_missed=max_missed) for seed in range(60)]
    assert all(bool((pairs.missed_probability <= max_missed).all()) for pairs in found)
    assert sum(is_wrong(pairs, values) for pairs in found) <= 60 * max_missed


def test_the_chance_rises_from_the_outermost_value_inwards() -> None:
    missed = lanczos(Diagonal(spectrum("simple")), largest=5, smallest=2).missed_probability
    assert missed.dtype == torch.float64
    assert missed[:5].tolist() == sorted(missed[:5].tolist())
    assert missed[5:].tolist() == sorted(missed[5:].tolist())
    assert bool((missed > 0).all())


def test_one_value_of_each_end_has_a_chance_of_its_own_without_a_challenge() -> None:
    values = spectrum("the largest twice")
    operator = Diagonal(values)
    pairs = lanczos(operator, largest=1, smallest=1)
    assert bool((pairs.missed_probability <= 0.1).all())
    assert len(set(pairs.missed_probability.tolist())) == 2
    assert pairs.num_matvecs <= 1.2 * least_products(operator, Task(1, 1))
    assert not is_wrong(pairs, values)


def test_a_search_that_runs_out_of_products_says_what_it_knows() -> None:
    values = spectrum("the largest twice")
    budget = least_products(Diagonal(values), Task(5, 0)) + 1
    pairs = lanczos(Diagonal(values), largest=5, max_matvecs=budget)
    assert pairs.num_matvecs == budget
    assert bool(pairs.converged.all())  # as the residuals say
    assert float(pairs.missed_probability.max()) > 1e-2
    assert is_wrong(pairs, values)


def test_where_the_whole_space_was_searched_nothing_is_missed() -> None:
    pairs = lanczos(DenseOperator(symmetric_matrix(uniform(40, -1, 1))), largest=3, smallest=2)
    assert pairs.missed_probability.tolist() == [0.0] * 5


@pytest.mark.parametrize("ratio", [0.8, 0.96, 0.985])
def test_several_values_end_where_they_are_known(ratio: float) -> None:
    """In 15 of 40 searches all 300 products were spent: the distance to the next Ritz value, which the challenge
    shortens for a while, was asked for again, and what was cut off could not be reduced any more."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        bulk = 0.02 * torch.randn(1985, generator=generator, dtype=torch.float64)
        values = torch.cat([10 * ratio ** torch.arange(15, dtype=torch.float64), bulk])
        pairs = lanczos(Diagonal(values), largest=4, value_tol=2e-2, seed=seed)
        exact = values.sort(descending=True).values[:4]
        assert bool(pairs.converged.all())
        assert pairs.num_matvecs <= 60
        assert bool(((pairs.values - exact).abs() <= 2e-2 * exact).all())


def test_the_residual_is_known_whatever_was_set_aside() -> None:
    matrix = symmetric_matrix([5.0, 5.0, 4.0, *uniform(117, -1, 3)])
    basis = KrylovBasis(DenseOperator(matrix), 40, torch.Generator().manual_seed(0))
    target = Target(3, 2, 1e-12)
    basis.begin()
    for product in range(1, 30):
        basis.expand()
        if product in (8, 17):
            basis.begin()
        elif product in (11, 14, 20, 23):
            basis.turn_to(basis.ritz(target))
        elif product == 25:
            basis.compress(6, 5)
        if basis.length < 5:
            continue
        ritz = basis.ritz(target)
        (vectors,) = basis.combine(ritz.coefficients)
        own = torch.linalg.vector_norm(matrix @ vectors.T - vectors.T * ritz.values, dim=0)
        assert bool((own <= ritz.residuals + 1e-12).all())
        assert bool((ritz.residuals <= 2 * own + 1e-12).all())  # a sum of three parts, not its norm
        assert torch.allclose(vectors @ vectors.T, torch.eye(5, dtype=torch.float64), atol=1e-12)
    assert basis.asymmetry <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_the_basis_takes_in_leaves_no_rounding_that_grows(dtype: torch.dtype) -> None:
    """Divided by a length that was not its own it came to 1e97, or to infinity, and the eigenvalues to NaN."""
    seeds = range(30)
    for seed in seeds:
        matrix = symmetric_matrix([3.0, 2.0, 1e-2, 1e-6, *[0.0] * 10], seed=seed).to(dtype)
        basis = KrylovBasis(DenseOperator(matrix), 13, torch.Generator().manual_seed(seed))
        basis.begin()
        for product in range(13):
            basis.expand()
            if product in (1, 2, 3):
                basis.begin()
        lengths = torch.stack([torch.linalg.vector_norm(vector) for vector in basis._aside])
        assert bool(((lengths == 0) | ((lengths - 1).abs() < 1e-3)).all())
        values = basis.ritz(Target(2, 1, 1e-4)).values
        assert values.tolist() == pytest.approx([3.0, 2.0, 0.0], abs=1e-5)


def test_the_basis_is_larger_where_there_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory decides; a single value never takes more than 32."""
    module = sys.modules[lanczos.__module__]
    values = torch.tensor([9.0, 8.7, *uniform(2998, -1, 8.5)], dtype=torch.float64)
    capacities: list[int] = []

    class Watched(KrylovBasis):
        def __init__(self, operator: Diagonal, capacity: int, *arguments: object, **options: object) -> None:
            capacities.append(capacity)
            super().__init__(operator, capacity, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "KrylovBasis", Watched)
    for free in (1e12, 0.0):
        monkeypatch.setattr(module, "free_bytes", lambda device, free=free: free)
        assert bool(lanczos(Diagonal(values), largest=2).converged.all())
    assert capacities == [128, 32]
    monkeypatch.setattr(module, "free_bytes", lambda device: 1e12)
    lanczos(Diagonal(values), value_tol=2e-2)
    lanczos(Diagonal(values), largest=2, max_basis_bytes=40 * values.nbytes)
    lanczos(Diagonal(values), largest=2, max_basis_vectors=20)
    assert capacities[2:] == [32, 40, 20]
