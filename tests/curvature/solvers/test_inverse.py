"""Inverse products against dense solves, with the residual, the count of products and negative curvature told truly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lyapunov_lightning.curvature import GaussNewtonOperator, NonFiniteCurvatureError
from lyapunov_lightning.curvature.solvers import InverseProduct, conjugate_gradient
from tests.curvature.helpers import DenseOperator, random_vectors, rng_state, symmetric_matrix
from tests.problems import mlp

SPECTRA: dict[str, list[float]] = {
    "spread": torch.logspace(-2, 2, 30, dtype=torch.float64).tolist(),
    "repeated": [3.0, 3.0, 3.0, 1.0, 1.0, 0.5],
    "identity": [1.0] * 6,
    "single": [3.0],
}


def assert_honest(found: InverseProduct, matrix: Tensor, b: Tensor, tol: float) -> None:
    """The residual is that of the solution which is returned, and the rest says what it should."""
    residual = float((b - matrix @ found.solution.double()).norm())
    slack = 1e-13 * float(matrix.norm() * found.solution.norm() + b.norm())
    assert residual == pytest.approx(found.residual, abs=slack)
    assert found.relative_residual == pytest.approx(found.residual / float(b.norm()))
    assert found.converged == (found.residual <= tol * float(b.norm()))
    if found.non_positive is not None:
        vector = found.non_positive.vector
        assert float(vector.norm()) == pytest.approx(1, abs=1e-12)
        assert float(vector @ matrix @ vector) == pytest.approx(found.non_positive.curvature, abs=slack)
        assert found.non_positive.curvature <= slack


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_solution_is_that_of_a_dense_solve(name: str, damping: float) -> None:
    matrix = symmetric_matrix(SPECTRA[name])
    operator, b = DenseOperator(matrix), random_vectors(1, len(matrix), 1)[0]
    damped = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    found = conjugate_gradient(operator, b, damping=damping, tol=1e-10)
    assert found.converged
    assert found.non_positive is None
    assert_honest(found, damped, b, 1e-10)
    error, least = found.solution - torch.linalg.solve(damped, b), min(SPECTRA[name]) + damping
    assert float(error.norm()) <= found.residual / least + 1e-13 * float(found.solution.norm())
    assert found.num_matvecs == operator.num_matvecs


def test_there_are_as_many_products_as_different_eigenvalues_and_one_for_the_residual() -> None:
    operator = DenseOperator(symmetric_matrix([5.0] * 4 + [2.0] * 4 + [1.0] * 4))
    assert conjugate_gradient(operator, random_vectors(1, 12)[0], tol=1e-10).num_matvecs == 4


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    values=st.lists(st.floats(-2, 5, allow_subnormal=False), min_size=1, max_size=12),
    damping=st.sampled_from([0.0, 0.3, 3.0]),
    tol=st.sampled_from([1e-8, 1e-2]),
    budget=st.integers(2, 30),
    seed=st.integers(0, 5),
)
def test_whatever_the_spectrum_what_is_said_is_true(
    values: list[float], damping: float, tol: float, budget: int, seed: int
) -> None:
    matrix = symmetric_matrix(values, seed)
    operator, b = DenseOperator(matrix), random_vectors(1, len(values), seed)[0]
    damped = matrix + damping * torch.eye(len(values), dtype=torch.float64)
    found = conjugate_gradient(operator, b, damping=damping, tol=tol, max_matvecs=budget)
    assert_honest(found, damped, b, tol)
    assert found.num_matvecs == operator.num_matvecs <= budget
    least = min(values) + damping
    if least > 1e-3:
        assert found.non_positive is None
        exact = torch.linalg.solve(damped, b)
        assert float((found.solution - exact).norm()) <= found.residual / least * (1 + 1e-6) + 1e-10
        # Each step descends: the iterate is nearer to the solution in the norm of the operator than 0 is.
        error = found.solution - exact
        assert float(error @ damped @ error) <= float(exact @ damped @ exact) * (1 + 1e-9)
        assert found.converged or found.num_matvecs == budget


def test_negative_curvature_ends_the_search_with_its_direction() -> None:
    matrix = symmetric_matrix([10.0, 4.0, 2.0, 1.0, -3.0])
    b = random_vectors(1, 5)[0]
    found = conjugate_gradient(DenseOperator(matrix), b, tol=1e-12)
    assert not found.converged
    assert found.non_positive is not None
    assert found.non_positive.curvature < -0.1
    assert_honest(found, matrix, b, 1e-12)
    # What had been reached is below the start: it lies on the way down.
    assert float(found.solution @ matrix @ found.solution / 2 - b @ found.solution) < 0
    # Damping that lifts the spectrum above zero makes it a system with one answer.
    assert conjugate_gradient(DenseOperator(matrix), b, damping=3.5, tol=1e-12).converged


def test_a_singular_operator_is_solved_where_it_can_be_and_else_its_null_space_is_shown() -> None:
    matrix = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    inside = conjugate_gradient(DenseOperator(matrix), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64), tol=1e-12)
    assert inside.converged
    assert inside.solution.tolist() == pytest.approx([0.5, 1.0, 0.0])
    outside = conjugate_gradient(DenseOperator(matrix), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    assert not outside.converged
    assert outside.residual == 1
    assert outside.non_positive is not None
    assert outside.non_positive.vector.tolist() == [0, 0, 1]


def test_in_float32_the_residual_is_the_true_one_and_begun_again_from() -> None:
    """The updated residual falls below any tolerance; the true one of the float32 solution does not."""
    matrix = symmetric_matrix(torch.logspace(-3, 0, 60, dtype=torch.float64)).float()
    b = random_vectors(1, 60, dtype=torch.float32)[0]
    for tol in (1e-4, 1e-9):
        operator = DenseOperator(matrix)
        found = conjugate_gradient(operator, b, tol=tol, max_matvecs=2000)
        residual = float((b.double() - matrix.double() @ found.solution.double()).norm())
        # The product that measures it rounds, too.
        assert residual == pytest.approx(found.residual, abs=1e-6 * float(found.solution.norm()))
        assert found.converged == (tol == 1e-4)
        assert operator.num_matvecs < 1000  # where rounding stops the residual, the search ends


def test_vectors_that_need_no_search_take_no_product() -> None:
    operator = DenseOperator(symmetric_matrix([1.0, 2.0]))
    found = conjugate_gradient(operator, torch.zeros(2, dtype=torch.float64))
    assert found.converged
    assert found.residual == found.relative_residual == 0
    assert found.solution.tolist() == [0, 0]
    assert operator.num_matvecs == found.num_matvecs == 0


def test_nothing_that_was_given_is_written_to_and_no_generator_moves() -> None:
    b = random_vectors(1, 4)[0]
    before, numbers = rng_state(), b.clone()
    conjugate_gradient(DenseOperator(symmetric_matrix([1.0, 2.0, 3.0, 4.0])), b)
    assert rng_state() == before
    assert torch.equal(b, numbers)


def test_products_that_are_not_finite_are_refused() -> None:
    matrix = torch.full((3, 3), math.nan, dtype=torch.float64)
    with pytest.raises(NonFiniteCurvatureError):
        conjugate_gradient(DenseOperator(matrix), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": -1.0}, "`damping` should be a non-negative float, got -1.0."),
        ({"damping": math.nan}, "`damping` should be a non-negative float, got nan."),
        ({"tol": 0.0}, "`tol` should be a positive float, got 0.0."),
        ({"max_matvecs": 1}, "`max_matvecs` should be at least 2"),
        ({"b": torch.ones(2, 3)}, "`b` should be one vector"),
        ({"b": torch.ones(2)}, "`b` should have rows of length 3"),
        ({"b": torch.tensor([1.0, math.inf, 0.0])}, "`b` should be finite."),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    arguments = {"b": torch.ones(3), **arguments}
    with pytest.raises(ValueError, match=message):
        conjugate_gradient(DenseOperator(torch.eye(3)), **arguments)  # type: ignore[arg-type]


def test_the_damped_gauss_newton_matrix_of_a_network_has_an_inverse_within_residual_over_damping() -> None:
    problem = mlp()
    model, parameters = problem.model, list(problem.model.parameters())
    operator = GaussNewtonOperator(
        lambda batch: model(batch[0]),
        lambda outputs, batch: torch.nn.functional.cross_entropy(outputs, batch[1]),
        parameters,
        problem.batches,
    )
    b, damping = random_vectors(1, operator.size)[0], 0.01
    exact = torch.linalg.solve(operator.to_dense() + damping * torch.eye(operator.size, dtype=torch.float64), b)
    found = conjugate_gradient(operator, b, damping=damping, tol=1e-6)
    assert found.converged
    assert float((found.solution - exact).norm()) <= found.residual / damping
