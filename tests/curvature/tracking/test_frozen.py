"""The curvature along frozen eigenvectors is that of the dense matrices that come later."""

import io

import pytest
import torch
from torch import Tensor

from lyapunov_lightning.curvature import lanczos
from lyapunov_lightning.curvature.tracking.frozen import FrozenDirections
from tests.curvature.helpers import DenseOperator, symmetric_matrix

SPECTRUM = [5.0, 2.0, 1.0, 0.3, -0.5, -2.5]


def frozen_at(**matrices: Tensor) -> FrozenDirections:
    """Directions frozen at steps such as ``step_3``."""
    frozen = FrozenDirections()
    for name, matrix in matrices.items():
        frozen.freeze(int(name.removeprefix("step_")), lanczos(DenseOperator(matrix), largest=2, smallest=2, tol=1e-10))
    return frozen


def test_curvatures_are_those_of_a_dense_matrix_along_the_eigenvectors_of_another_one() -> None:
    matrices = {3: symmetric_matrix(SPECTRUM, seed=1), 8: symmetric_matrix(SPECTRUM, seed=2)}
    later = symmetric_matrix([9.0, 3.0, 1.0, 0.0, -1.0, -4.0], seed=3)
    operator = DenseOperator(later)
    found = frozen_at(step_3=matrices[3], step_8=matrices[8]).curvatures(operator)
    assert list(found) == [3, 8]
    assert operator.num_matvecs == 4
    for step, (top, bottom) in found.items():
        vectors = torch.linalg.eigh(matrices[step]).eigenvectors
        for value, vector in ((top, vectors[:, -1]), (bottom, vectors[:, 0])):
            assert value == pytest.approx(float(vector @ later @ vector), rel=1e-8)


def test_at_their_own_step_they_are_the_ends_of_the_spectrum() -> None:
    matrix = symmetric_matrix(SPECTRUM)
    assert frozen_at(step_0=matrix).curvatures(DenseOperator(matrix))[0] == pytest.approx((5.0, -2.5))


def test_vectors_are_copies() -> None:
    matrix = symmetric_matrix(SPECTRUM)
    pairs = lanczos(DenseOperator(matrix), smallest=1, tol=1e-10)
    frozen = FrozenDirections()
    frozen.freeze(0, pairs)
    pairs.vectors.zero_()
    assert frozen.curvatures(DenseOperator(matrix))[0] == pytest.approx((5.0, -2.5))


def test_vectors_of_another_size_wait_until_they_fit_again() -> None:
    matrix = symmetric_matrix(SPECTRUM)
    frozen = frozen_at(step_2=matrix)
    smaller = DenseOperator(matrix[:4, :4])
    assert frozen.curvatures(smaller) == {}
    assert smaller.num_matvecs == 0
    assert list(frozen.curvatures(DenseOperator(matrix))) == [2]


def test_a_checkpoint_keeps_them_bit_by_bit() -> None:
    frozen, restored = (
        frozen_at(step_2=symmetric_matrix(SPECTRUM), step_5=symmetric_matrix(SPECTRUM, 4)),
        FrozenDirections(),
    )
    buffer = io.BytesIO()
    torch.save(frozen.state_dict(), buffer)
    buffer.seek(0)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    operator = DenseOperator(symmetric_matrix(SPECTRUM, seed=9))
    assert restored.curvatures(operator) == frozen.curvatures(operator)
