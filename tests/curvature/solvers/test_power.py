"""Power iteration at both ends, also where the other one dominates, against dense solvers."""

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lyapunov_lightning.curvature import Eigenpairs, NonFiniteCurvatureError, power_iteration
from tests.curvature.helpers import DenseOperator, random_vectors, rng_state, symmetric_matrix
from tests.problems import mlp

End = Literal["largest", "smallest"]
both_ends = pytest.mark.parametrize("end", ["largest", "smallest"])


def outermost(matrix: Tensor, end: End) -> float:
    values = torch.linalg.eigvalsh(matrix)
    return float(values[-1 if end == "largest" else 0])


def assert_honest(pairs: Eigenpairs, matrix: Tensor, tol: float) -> None:
    """The residual is that of the vector which is returned, and `converged` says what it should."""
    (vector,) = pairs.vectors
    assert float(vector.norm()) == pytest.approx(1, abs=1e-14)
    residual = float((matrix @ vector - pairs.values * vector).norm())
    slack = 1e-13 * float(matrix.norm())
    assert residual <= float(pairs.residuals) + slack
    assert not bool(pairs.converged) or residual <= tol * float(pairs.values.abs()) + slack


SPECTRA: dict[str, list[float]] = {
    "top_dominates": [10.0, 6.0, 1.0, 0.0, -0.5, -2.0],
    "bottom_dominates": [2.0, 1.0, 0.0, -0.5, -6.0, -10.0],
    "bottom_just_dominates": [9.9, 1.0, 0.0, -0.5, -2.0, -10.0],
    "both_alike": [10.0, 5.0, 0.0, -0.5, -5.0, -10.0],
    "all_positive": [10.0, 8.0, 5.0, 3.0, 2.0, 1.0],
    "all_negative": [-1.0, -2.0, -3.0, -5.0, -8.0, -10.0],
    "repeated": [3.0, 3.0, 1.0, -1.0, -4.0, -4.0],
    "one_positive": [0.1, -1.0, -1.0, -1.0, -1.0, -3.0],
    "identity": [1.0] * 6,
    "zero": [0.0] * 6,
    "single": [-3.0],
}


@both_ends
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SPECTRA)
def test_the_wanted_end_is_found_whichever_dominates(name: str, seed: int, end: End) -> None:
    matrix = symmetric_matrix(SPECTRA[name], seed)
    operator = DenseOperator(matrix)
    pairs = power_iteration(operator, end=end, tol=1e-4, max_matvecs=20_000, seed=seed)
    assert bool(pairs.converged)
    assert_honest(pairs, matrix, 1e-4)
    # The error of a Rayleigh quotient is the square of the residual over the distance to the next eigenvalue.
    assert float(pairs.values) == pytest.approx(outermost(matrix, end), rel=1e-5, abs=1e-12)
    assert pairs.num_matvecs == operator.num_matvecs
    assert pairs.num_largest == (end == "largest")
    assert (pairs.largest if end == "largest" else pairs.smallest).tolist() == pairs.values.tolist()


@both_ends
def test_hessians_of_models_are_solved(end: End) -> None:
    problem = mlp()
    hessian = problem.dense_hessian()
    pairs = power_iteration(problem.operator(), end=end, tol=1e-4, max_matvecs=5000)
    assert bool(pairs.converged)
    assert float(pairs.values) == pytest.approx(outermost(hessian, end), rel=1e-6)
    assert_honest(pairs, hessian, 1e-4)


@both_ends
@pytest.mark.parametrize("budget", [1, 2, 10])
@pytest.mark.parametrize("name", ["top_dominates", "bottom_dominates", "all_negative"])
def test_what_is_unfinished_says_so(name: str, budget: int, end: End) -> None:
    matrix = symmetric_matrix(SPECTRA[name])
    operator = DenseOperator(matrix)
    pairs = power_iteration(operator, end=end, tol=1e-12, max_matvecs=budget)
    assert pairs.num_matvecs == operator.num_matvecs == budget
    assert not bool(pairs.converged)
    assert_honest(pairs, matrix, 1e-12)


@both_ends
@pytest.mark.parametrize("budget", [1, 3])
def test_the_residual_is_that_of_the_vector_also_where_the_wrong_end_shows_last(budget: int, end: End) -> None:
    matrix = symmetric_matrix(SPECTRA["both_alike"])
    wrong = torch.linalg.eigh(matrix).eigenvectors[:, 0 if end == "largest" else -1]
    start = wrong + 1e-3 * random_vectors(1, 6)[0]
    pairs = power_iteration(DenseOperator(matrix), end=end, max_matvecs=budget, start=start)
    assert not bool(pairs.converged)
    assert_honest(pairs, matrix, 1e-2)


@both_ends
def test_a_start_at_the_wrong_end_is_left(end: End) -> None:
    matrix = symmetric_matrix(SPECTRA["both_alike"])
    wrong = torch.linalg.eigh(matrix).eigenvectors[:, 0 if end == "largest" else -1]
    pairs = power_iteration(DenseOperator(matrix), end=end, tol=1e-4, max_matvecs=2000, start=wrong)
    assert float(pairs.values) == pytest.approx(outermost(matrix, end), rel=1e-5)
    assert bool(pairs.converged)


def test_a_warm_start_needs_fewer_products() -> None:
    matrix = symmetric_matrix([10.0, 9.0, *range(-5, 8)])
    cold = power_iteration(DenseOperator(matrix), tol=1e-3)
    start = 7 * cold.vectors[0] + 0.01
    warm = power_iteration(DenseOperator(matrix), tol=1e-3, start=start)
    assert 2 * warm.num_matvecs <= cold.num_matvecs
    zero = power_iteration(DenseOperator(matrix), tol=1e-3, start=torch.zeros(15))
    assert torch.equal(zero.vectors, cold.vectors)


def test_the_seed_determines_the_result_and_the_global_generators_are_left_alone() -> None:
    matrix = symmetric_matrix(range(-10, 12))
    before = rng_state()
    first, second, other = (power_iteration(DenseOperator(matrix), seed=seed) for seed in (1, 1, 2))
    assert rng_state() == before
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(first.values, second.values)
    assert not torch.equal(first.vectors.abs(), other.vectors.abs())


def test_float32_operators_keep_their_dtype() -> None:
    matrix = symmetric_matrix([10.0, 6.0, *range(-5, 5)])
    pairs = power_iteration(DenseOperator(matrix.float()), tol=1e-4)
    assert pairs.vectors.dtype == torch.float32
    assert pairs.values.dtype == torch.float64
    assert float(pairs.values) == pytest.approx(10.0, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_products_that_are_not_finite_raise(value: float) -> None:
    matrix = symmetric_matrix(range(5))
    matrix[2, 3] = value
    with pytest.raises(NonFiniteCurvatureError, match="not finite"):
        power_iteration(DenseOperator(matrix))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"end": "top"}, "`end`.*'largest' or 'smallest'.*'top'"),
        ({"tol": 0.0}, r"`tol`.*positive.*0\.0"),
        ({"tol": math.nan}, "`tol`.*positive.*nan"),
        ({"max_matvecs": 0}, "`max_matvecs`.*positive.*0"),
        ({"start": torch.ones(4)}, "`start`.*5.*4"),
        ({"start": torch.ones(10)}, "`start`.*5.*10"),
        ({"start": torch.full((5,), math.nan)}, "`start`.*finite"),
    ],
)
def test_bad_arguments_are_named_with_their_values(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        power_iteration(DenseOperator(symmetric_matrix(range(5))), **arguments)
