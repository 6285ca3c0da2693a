"""Eigenpairs against dense solvers, over many spectra; what is reported about them; what is refused."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lyapunov_lightning.curvature import NonFiniteCurvatureError, lanczos
from tests.curvature.helpers import DenseOperator, both_ends, rng_state, symmetric_matrix
from tests.curvature.spectra import assert_honest, assert_right, normal, rounding, uniform
from tests.problems import PROBLEMS

# Against dense solvers.


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm", "tied"])
def test_eigenvalues_of_hessians_are_those_of_the_dense_one(name: str) -> None:
    problem = PROBLEMS[name]()
    hessian = problem.dense_hessian()
    operator = problem.operator()
    pairs = lanczos(operator, largest=4, smallest=3, tol=1e-6)
    assert_right(pairs, hessian, 1e-6)
    # The error is the square of the residual, 1e-12, over the distance to the next eigenvalue.
    assert torch.allclose(pairs.values, both_ends(hessian, 4, 3), rtol=1e-8, atol=0)
    assert pairs.num_matvecs == operator.num_matvecs


@pytest.mark.parametrize("size", [1, 2, 3, 10, 60, 128, 129, 160, 161, 250])
def test_eigenvalues_of_random_matrices_are_exact(size: int) -> None:
    matrix = symmetric_matrix(normal(size))
    wanted = min(3, size // 2)
    pairs = lanczos(DenseOperator(matrix), largest=size - wanted if size < 4 else 3, smallest=wanted, tol=1e-7)
    assert_right(pairs, matrix, 1e-7)
    expected = both_ends(matrix, len(pairs.largest), len(pairs.smallest))
    assert torch.allclose(pairs.values, expected, rtol=1e-8, atol=0)


LEVELS = [0.0, 1.0, -1.0, 2.0, -3.0, 1 + 1e-3, 1 + 1e-6, 1 + 1e-9, -3 - 1e-5, 0.5, -0.25, 1e-3, -1e-4, 1e-7, 7.0, -7.0]
level = st.one_of(st.sampled_from(LEVELS), st.floats(-10, 10, allow_subnormal=False))


@dataclass(frozen=True)
class Task:
    matrix: Tensor
    largest: int
    smallest: int


@st.composite
def tasks(draw: Any, min_size: int, max_size: int, levels: Any) -> Task:
    """Matrices with repeated, clustered and vanishing eigenvalues of both signs, and what is wanted of each end."""
    spectrum = draw(st.lists(levels, min_size=min_size, max_size=max_size))
    scale = draw(st.sampled_from([1e-6, 1.0, 1e6]))
    largest = draw(st.integers(0, min(5, len(spectrum))))
    smallest = draw(st.integers(0 if largest else 1, min(5, len(spectrum) - largest)))
    matrix = symmetric_matrix(torch.tensor(spectrum, dtype=torch.float64) * scale, seed=draw(st.integers(0, 99)))
    return Task(matrix, largest, smallest)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(task=tasks(2, 60, level), tol=st.sampled_from([1e-3, 1e-6, 1e-10]), seed=st.integers(0, 9))
def test_all_spectra_of_small_matrices_are_resolved(task: Task, tol: float, seed: int) -> None:
    operator = DenseOperator(task.matrix)
    pairs = lanczos(operator, largest=task.largest, smallest=task.smallest, tol=tol, seed=seed)
    assert_right(pairs, task.matrix, tol)
    assert pairs.num_matvecs == operator.num_matvecs


@settings(deadline=None, max_examples=60, derandomize=True)
@given(task=tasks(40, 60, st.integers(-9, 9).map(float)), seed=st.integers(0, 9))
def test_repeated_eigenvalues_are_resolved_in_a_basis_that_is_restarted(task: Task, seed: int) -> None:
    wanted = task.largest + task.smallest
    operator = DenseOperator(task.matrix)
    pairs = lanczos(
        operator,
        largest=task.largest,
        smallest=task.smallest,
        tol=1e-6,
        seed=seed,
        max_basis_vectors=wanted + 16,
        max_matvecs=2000,
    )
    assert_right(pairs, task.matrix, 1e-6)
    assert pairs.num_matvecs < 2000


@settings(deadline=None, max_examples=60, derandomize=True)
@given(task=tasks(10, 40, level), spare=st.integers(2, 12), budget=st.integers(0, 60), seed=st.integers(0, 9))
def test_what_is_reported_holds_for_any_basis_and_any_budget(task: Task, spare: int, budget: int, seed: int) -> None:
    wanted = task.largest + task.smallest
    operator = DenseOperator(task.matrix)
    pairs = lanczos(
        operator,
        largest=task.largest,
        smallest=task.smallest,
        tol=1e-4,
        seed=seed,
        max_basis_vectors=wanted + spare,
        max_matvecs=wanted + budget,
    )
    assert_honest(pairs, task.matrix, 1e-4)
    assert pairs.num_matvecs == operator.num_matvecs <= wanted + budget
    # A Ritz value never lies beyond the eigenvalue of its rank (Cauchy's interlacing), but for what the norms of the
    # vectors drift by at each restart: a few roundings, a tenth of what a dense solver may be off by.
    restarts = pairs.num_matvecs // (spare - spare // 2)
    expected = both_ends(task.matrix, task.largest, task.smallest)
    beyond = torch.cat([pairs.largest - expected[: task.largest], expected[task.largest :] - pairs.smallest])
    assert bool((beyond <= rounding(task.matrix) * (1 + restarts / 10)).all())


FIXED: dict[str, tuple[Sequence[float], int, int]] = {
    "repeated_top_300": ([3.0] * 5 + uniform(295, -1, 1), 5, 2),
    "repeated_top_500": ([3.0] * 5 + uniform(495, -1, 1), 6, 3),
    "repeated_top_below_others": ([5.0, 4.0] + [3.0] * 5 + uniform(293, -1, 2.9), 7, 1),
    "repeated_bottom_500": ([-3.0] * 5 + uniform(495, -1, 1), 1, 5),
    "both_ends_repeated": ([-2.0] * 3 + [2.0] * 3 + uniform(294, -1, 1), 4, 4),
    "everything_twice": (uniform(150, -1, 1) * 2, 4, 4),
    "null_space_below_300": (uniform(10, 1, 5) + [0.0] * 290, 3, 3),
    "null_space_below_500": (uniform(20, 1, 5) + [0.0] * 480, 2, 3),
    "null_space_above": ([-x for x in uniform(10, 1, 5)] + [0.0] * 290, 3, 3),
    "rank_below_what_is_wanted": ([4.0, 2.0] + [0.0] * 298, 4, 0),
    "heavy_tail": ([x**3 for x in normal(500)], 10, 3),
    "geometric": ([0.9**k for k in range(300)], 10, 0),
    "bottom_dominates": ([-100.0, -90.0, *uniform(298, -1, 1), 2.0, 2.5], 2, 1),
    "top_dominates": ([100.0, 90.0, *uniform(298, -1, 1), -2.0, -2.5], 1, 2),
    "zero": ([0.0] * 300, 2, 2),
    "identity": ([1.0] * 300, 3, 2),
    "minus_identity": ([-1.0] * 300, 2, 3),
    "one_pair": ([1.0] + [0.0] * 199, 1, 1),
    "tiny": ([1e-100 * x for x in normal(150)], 2, 2),
    "huge": ([1e100 * x for x in normal(150)], 2, 2),
}


@pytest.mark.parametrize("name", FIXED)
def test_spectra_that_are_hard_for_krylov_spaces_are_resolved(name: str) -> None:
    spectrum, largest, smallest = FIXED[name]
    matrix = symmetric_matrix(spectrum)
    pairs = lanczos(DenseOperator(matrix), largest=largest, smallest=smallest)
    assert_right(pairs, matrix, 1e-3)
    if name.startswith("null_space_below"):
        assert bool((pairs.smallest.abs() <= rounding(matrix)).all())


@pytest.mark.parametrize("seed", range(4))
def test_a_null_space_is_settled_within_the_products_of_a_full_decomposition(seed: int) -> None:
    """Flat losses, such as least squares with more parameters than samples, are common; rounding is all there is."""
    matrix = symmetric_matrix(uniform(10, 1, 5, seed) + [0.0] * 290, seed)
    pairs = lanczos(DenseOperator(matrix), largest=3, smallest=3, seed=seed)
    assert_right(pairs, matrix, 1e-3)
    assert pairs.num_matvecs <= 300


@pytest.mark.parametrize("largest", [1, 2])
@pytest.mark.parametrize("value", [3.0, 0.0, -2.0])
def test_an_operator_of_size_one_or_two_is_solved(value: float, largest: int) -> None:
    operator = DenseOperator(torch.diag(torch.full((largest,), value, dtype=torch.float64)))
    pairs = lanczos(operator, largest=largest)
    assert pairs.values.tolist() == [value] * largest
    assert pairs.residuals.max() <= 1e-14
    assert bool(pairs.converged.all())


@pytest.mark.parametrize(("largest", "smallest"), [(6, 0), (0, 6), (3, 3), (1, 5)])
def test_all_eigenvalues_of_an_operator_may_be_wanted(largest: int, smallest: int) -> None:
    matrix = symmetric_matrix([2.0, 2.0, 0.0, -1.0, -1.0, -5.0])
    pairs = lanczos(DenseOperator(matrix), largest=largest, smallest=smallest)
    expected = both_ends(matrix, largest, smallest)
    assert torch.allclose(pairs.values, expected, rtol=0, atol=1e-12)
    assert bool(pairs.converged.all())
    assert_honest(pairs, matrix, 1e-3)


@pytest.mark.parametrize("size", [20, 128, 129, 150])
def test_a_basis_that_spans_the_whole_space_is_exact(size: int) -> None:
    matrix = symmetric_matrix(uniform(size // 2, -1, 1) + [1.0] * (size - size // 2))
    pairs = lanczos(
        DenseOperator(matrix), largest=3, smallest=3, tol=1e-10, max_basis_vectors=size + 5, max_matvecs=5000
    )
    assert_right(pairs, matrix, 1e-10)
    assert torch.allclose(pairs.values, both_ends(matrix, 3, 3), rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", range(40, 50))
def test_small_operators_are_exact_for_no_more_than_twice_their_size_in_products(seed: int) -> None:
    """Their basis may span the whole space, whatever repetitions and clusters there are."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.tensor(LEVELS)[torch.randint(len(LEVELS), (20 + seed,), generator=generator)]
    matrix = symmetric_matrix(spectrum, seed)
    pairs = lanczos(DenseOperator(matrix), largest=3, smallest=3, tol=1e-10, max_matvecs=1000)
    assert_right(pairs, matrix, 1e-10)
    assert pairs.num_matvecs <= 2 * len(matrix)


@pytest.mark.parametrize("index", [0, 1, 150, 299])
def test_a_start_that_is_an_eigenvector_does_not_end_the_search(index: int) -> None:
    """Its Krylov space has one dimension but for the noise: the search goes on in the rest of the space."""
    spectrum = [9.0, 7.0, *uniform(297, -1, 1), -4.0]
    matrix = torch.diag(torch.tensor(spectrum, dtype=torch.float64))
    start = torch.eye(300, dtype=torch.float64)[index]
    for largest, smallest in ((1, 0), (2, 1), (1, 1), (0, 1)):
        pairs = lanczos(DenseOperator(matrix), largest=largest, smallest=smallest, start=start)
        assert_right(pairs, matrix, 1e-3)


def test_an_invariant_subspace_does_not_end_the_search() -> None:
    """Three distinct eigenvalues: every Krylov space is exhausted after three products."""
    matrix = symmetric_matrix([3.0] * 4 + [1.0] * 290 + [-2.0] * 6)
    pairs = lanczos(DenseOperator(matrix), largest=5, smallest=7)
    assert_right(pairs, matrix, 1e-3)
    assert pairs.values.round(decimals=9).tolist() == [3.0] * 4 + [1.0] + [-2.0] * 6 + [1.0]


@pytest.mark.parametrize("spectrum", [[-50.0, *uniform(298, -1, 1), 1.5], [50.0, *uniform(298, -1, 1), -1.5]])
@pytest.mark.parametrize(("largest", "smallest"), [(1, 0), (0, 1), (1, 1)])
def test_the_wanted_end_is_found_where_the_other_dominates(spectrum: list[float], largest: int, smallest: int) -> None:
    matrix = symmetric_matrix(spectrum)
    assert_right(lanczos(DenseOperator(matrix), largest=largest, smallest=smallest), matrix, 1e-3)


def test_float32_operators_are_resolved_to_their_rounding() -> None:
    matrix = symmetric_matrix([5.0] * 2 + uniform(296, -1, 1) + [-3.0] * 2).float()
    pairs = lanczos(DenseOperator(matrix), largest=3, smallest=3)
    assert pairs.vectors.dtype == torch.float32
    assert_right(pairs, matrix, 1e-3)
    assert torch.allclose(pairs.values, both_ends(matrix, 3, 3), rtol=1e-4)


def test_a_tolerance_below_the_rounding_is_met_at_the_rounding() -> None:
    matrix = symmetric_matrix([5.0, 4.0, 3.0, *uniform(297, -1, 1)]).float()
    pairs = lanczos(DenseOperator(matrix), largest=2, tol=1e-12, max_matvecs=1000)
    assert bool(pairs.converged.all())
    assert pairs.num_matvecs < 1000
    assert_honest(pairs, matrix, 1e-12)


# Determinism.


def test_the_seed_determines_the_result_to_the_last_bit() -> None:
    matrix = symmetric_matrix([9.0, 8.0, 7.0, *uniform(195, -1, 1), -5.0, -6.0])
    first, second, other = (lanczos(DenseOperator(matrix), largest=3, smallest=2, seed=seed) for seed in (1, 1, 2))
    for name in ("values", "vectors", "residuals", "converged"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.num_matvecs == second.num_matvecs
    assert not torch.equal(first.vectors.abs(), other.vectors.abs())
    assert torch.allclose(first.values, other.values, rtol=1e-5)


def test_global_generators_are_neither_read_nor_advanced() -> None:
    matrix = symmetric_matrix([1.0] * 150 + [-1.0] * 150)
    before = rng_state()
    first = lanczos(DenseOperator(matrix), largest=2, smallest=2, start=matrix[0])
    assert rng_state() == before
    torch.manual_seed(123)
    second = lanczos(DenseOperator(matrix), largest=2, smallest=2, start=matrix[0])
    assert torch.equal(first.vectors, second.vectors)


# What cannot be right.


class FailingOperator(DenseOperator):
    """The product number `at` holds one number that is not finite."""

    def __init__(self, matrix: Tensor, at: int, value: float) -> None:
        super().__init__(matrix)
        self._at = at
        self._value = value

    def matvec(self, vector: Tensor) -> Tensor:
        product = super().matvec(vector)
        if self.num_matvecs == self._at:
            product[0] = self._value
        return product


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [1, 2, 9])
def test_products_that_are_not_finite_raise(value: float, at: int) -> None:
    operator = FailingOperator(symmetric_matrix(normal(200)), at, value)
    with pytest.raises(NonFiniteCurvatureError, match="not finite"):
        lanczos(operator, largest=2)
    assert operator.num_matvecs == at


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"largest": 0}, "`largest` and `smallest`.*largest=0 and smallest=0"),
        ({"largest": -1, "smallest": 2}, "non-negative.*largest=-1"),
        ({"largest": 1, "smallest": -1}, "non-negative.*smallest=-1"),
        ({"largest": 15, "smallest": 6}, "at most the operator's size 20.*largest=15 and smallest=6"),
        ({"tol": 0.0}, r"`tol`.*positive.*0\.0"),
        ({"tol": -1.0}, r"`tol`.*positive.*-1\.0"),
        ({"tol": math.nan}, "`tol`.*positive.*nan"),
        ({"largest": 3, "smallest": 2, "max_matvecs": 4}, "`max_matvecs`.*at least.*5.*got 4"),
        ({"largest": 3, "max_basis_vectors": 4}, "`max_basis_vectors`.*at least.*5.*got 4"),
        ({"start": torch.full((20,), math.nan)}, "`start`.*finite"),
        ({"start": torch.ones(19)}, "`start`.*20.*19"),
        ({"start": torch.ones(40)}, "`start`.*20.*40"),
        ({"start": torch.ones(2, 10)}, "`start`.*20.*2, 10"),
    ],
)
def test_bad_arguments_are_named_with_their_values(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lanczos(DenseOperator(symmetric_matrix(normal(20))), **arguments)


@pytest.mark.parametrize("scale", [1e-140, 1e-200, 1e-292])
def test_values_whose_squares_vanish_are_known_to_the_error_that_is_stated(scale: float) -> None:
    matrix = torch.tensor([[2.0, 1.0, 0.3], [1.0, -1.0, 0.2], [0.3, 0.2, 0.5]], dtype=torch.float64)
    pairs = lanczos(DenseOperator(scale * matrix), largest=1, smallest=1)
    error = (pairs.values - scale * torch.linalg.eigvalsh(matrix)[[-1, 0]]).abs()
    assert bool((error <= pairs.value_errors + 1e-12 * scale).all())
