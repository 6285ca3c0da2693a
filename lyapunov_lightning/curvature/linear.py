"""What the eigen-solvers need of a matrix: its size and its products."""

from typing import Protocol

import torch
from torch import Tensor


class LinearOperator(Protocol):
    """A symmetric linear map on flat vectors, known by its products alone."""

    @property
    def size(self) -> int:
        """The length of the vectors."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors."""

    @property
    def device(self) -> torch.device:
        """The device of the vectors."""

    def matvec(self, vector: Tensor) -> Tensor:
        """The product, a new vector of shape ``(size,)``."""


class ScaledOperator:
    """``diag(s) A diag(s)`` for an operator ``A`` and a positive vector ``s``.

    With ``s = P^{-1/2}`` for a diagonal preconditioner ``P`` it is symmetric and has the eigenvalues of ``P^{-1}A``,
    the matrix that decides on the stability of an adaptive optimizer.

    Args:
        operator: The symmetric operator ``A``.
        scale: The vector ``s`` of shape ``(size,)``.

    """

    def __init__(self, operator: LinearOperator, scale: Tensor) -> None:
        if scale.shape != (operator.size,):
            raise ValueError(f"`scale` should have shape ({operator.size},), got {tuple(scale.shape)}.")
        self._operator = operator
        self._scale = scale
        self.size = operator.size
        self.dtype = operator.dtype
        self.device = operator.device

    def matvec(self, vector: Tensor) -> Tensor:
        """The product ``s ⊙ A(s ⊙ v)``."""
        return self._operator.matvec(vector * self._scale).mul_(self._scale)
