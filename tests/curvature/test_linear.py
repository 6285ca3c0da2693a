"""The scaled operator against dense matrices."""

import pytest
import torch

from lyapunov_lightning.curvature import ScaledOperator, lanczos
from tests.curvature.helpers import DenseOperator, random_vectors, relative_error, symmetric_matrix
from tests.problems import mlp


def test_products_are_those_of_the_scaled_matrix() -> None:
    matrix = symmetric_matrix(range(-5, 15))
    scale = random_vectors(1, 20)[0].exp()
    direction = random_vectors(1, 20, seed=1)[0]
    given = direction.clone()
    operator = ScaledOperator(DenseOperator(matrix), scale)
    assert (
        relative_error(operator.matvec(direction), torch.diag(scale) @ matrix @ torch.diag(scale) @ direction) < 1e-14
    )
    assert torch.equal(direction, given)
    assert (operator.size, operator.dtype, operator.device) == (20, torch.float64, matrix.device)


def test_it_has_the_eigenvalues_of_the_preconditioned_hessian() -> None:
    """Those of ``P^{-1}H``, which is not symmetric, by a general dense solver."""
    problem = mlp()
    divisor = random_vectors(1, 51)[0].exp()
    preconditioned = problem.dense_hessian() / divisor[:, None]
    expected = torch.linalg.eigvals(preconditioned).real.sort(descending=True).values
    operator = ScaledOperator(problem.operator(), divisor.rsqrt())
    pairs = lanczos(operator, largest=3, smallest=2, tol=1e-8)
    assert torch.allclose(pairs.largest, expected[:3], rtol=1e-8)
    assert torch.allclose(pairs.smallest, expected.flip(0)[:2], rtol=1e-8)


@pytest.mark.parametrize("shape", [(19,), (21,), (1, 20), ()])
def test_a_scale_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`scale` should have shape \(20,\), got \("):
        ScaledOperator(DenseOperator(symmetric_matrix(range(20))), torch.ones(shape, dtype=torch.float64))
