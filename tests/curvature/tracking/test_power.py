"""One product a step follows the largest eigenvalue, also where the vector starts near another one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.tracking.power import PowerIteration
from tests.curvature.helpers import DenseOperator


def symmetric(seed: int, size: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    values = torch.rand(size, generator=generator, dtype=torch.float64)
    values[0] = 3.0
    return basis @ torch.diag(values) @ basis.T


def gradient(seed: int, size: int = 12) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_eigenvalue_is_found_and_followed(seed: int) -> None:
    matrix, iteration = symmetric(seed), PowerIteration()
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    assert iteration.step(DenseOperator(matrix), gradient(seed)) == pytest.approx(largest, rel=0.02)
    for step in range(30):  # a curvature that doubles
        matrix = matrix * 2 ** (1 / 30)
        found = iteration.step(DenseOperator(matrix), gradient(step))
        assert found == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=0.02)


def test_an_eigenvector_of_a_smaller_eigenvalue_is_left() -> None:
    matrix, iteration = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64)), PowerIteration()
    assert iteration.step(DenseOperator(matrix), torch.tensor([1.0, 0.0], dtype=torch.float64)) == 1.0
    for _ in range(12):
        found = iteration.step(DenseOperator(matrix), torch.tensor([1.0, 0.3], dtype=torch.float64))
    assert found == pytest.approx(2.0, rel=0.02)


def test_no_gradient_and_no_curvature_are_no_eigenvalue() -> None:
    assert PowerIteration().step(DenseOperator(torch.eye(2)), torch.zeros(2)) == 0.0
    assert PowerIteration().step(DenseOperator(torch.zeros(2, 2)), torch.ones(2)) == 0.0


def test_what_is_not_finite_is_refused_and_forgotten() -> None:
    iteration = PowerIteration()
    iteration.step(DenseOperator(torch.eye(2)), torch.ones(2))
    with pytest.raises(NonFiniteCurvatureError):
        iteration.step(DenseOperator(torch.full((2, 2), float("nan"))), torch.ones(2))
    assert iteration.state_dict() == {"vector": None}


@pytest.mark.parametrize("state", [{"vector": torch.tensor([float("nan"), 1.0])}, {"vector": "broken"}])
def test_a_broken_vector_begins_anew(state: dict[str, Any]) -> None:
    iteration = PowerIteration()
    iteration.load_state_dict(state)
    assert iteration.state_dict() == {"vector": None}


def test_it_goes_on_where_it_was() -> None:
    one, other = PowerIteration(), PowerIteration()
    operator = DenseOperator(symmetric(0))
    one.step(operator, gradient(0))
    other.load_state_dict(one.state_dict())
    assert one.step(operator, gradient(1)) == other.step(operator, gradient(1))
    assert len(one.state_dict()["vector"]) == 12
    one.step(DenseOperator(torch.eye(3, dtype=torch.float64)), gradient(0, 3))  # parameters were frozen since
    assert len(one.state_dict()["vector"]) == 3
