"""Dense matrices as operators, relative errors, and the state of the global random generators."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class DenseOperator:
    """A matrix known by its products, which it counts."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix
        self.size = len(matrix)
        self.dtype = matrix.dtype
        self.device = matrix.device
        self.num_matvecs = 0

    def matvec(self, vector: Tensor) -> Tensor:
        self.num_matvecs += 1
        return self._matrix @ vector


def symmetric_matrix(spectrum: Sequence[float] | Tensor, seed: int = 0) -> Tensor:
    """A random symmetric float64 matrix with these eigenvalues."""
    values = torch.as_tensor(spectrum, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(square).Q
    matrix = (vectors * values) @ vectors.T
    return (matrix + matrix.T) / 2


def both_ends(matrix: Tensor, largest: int, smallest: int) -> Tensor:
    """The largest eigenvalues descending, then the smallest ascending, by a dense solver."""
    values = torch.linalg.eigvalsh(matrix.double())
    return torch.cat([values.flip(0)[:largest], values[:smallest]])


def random_vectors(count: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=torch.float64).to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(actual.double() - expected) / torch.linalg.vector_norm(expected))


def rng_state() -> tuple[Any, ...]:
    """The states of the global generators of Python, NumPy and PyTorch, to be compared by ``==``."""
    numpy = np.random.get_state(legacy=False)["state"]
    return random.getstate(), numpy["pos"], numpy["key"].tolist(), torch.get_rng_state().tolist()
