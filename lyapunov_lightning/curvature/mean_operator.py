"""An operator that is a mean over fixed batches, known by its products with several vectors at a time."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lyapunov_lightning.curvature.fixed_batches import FixedBatches, Total
from lyapunov_lightning.curvature.linear import SymmetricOperator
from lyapunov_lightning.curvature.vectors import FlatLayout, VectorSpace


class MeanOperator(SymmetricOperator):
    """The mean of a symmetric operator over all samples of fixed batches, those of all ranks.

    Args:
        space: The space of the vectors.
        layout: How the parameters form a vector.
        names: The names of the parameters, if they have any.
        batches: The batches.

    Attributes:
        num_matvecs: Products so far; a block counts as many as it has columns.

    """

    def __init__(self, space: VectorSpace, layout: FlatLayout, names: Sequence[str], batches: FixedBatches) -> None:
        super().__init__(space, layout, names)
        self._batches = batches
        self.num_matvecs = 0

    def matvec(self, vector: Tensor) -> Tensor:
        """The product.

        Args:
            vector: Shape ``(size,)``.

        Returns:
            A new vector of shape ``(size,)``.

        """
        if vector.shape != (self.size,):
            raise ValueError(f"`vector` should have shape ({self.size},), got {tuple(vector.shape)}.")
        return self._products(vector[None])[0]

    def matmat(self, block: Tensor) -> Tensor:
        """The products with several vectors, for which each batch is evaluated once and the ranks meet once.

        Args:
            block: Shape ``(size, k)``: the vectors as columns.

        Returns:
            A new tensor of shape ``(size, k)``.

        """
        if block.ndim != 2 or len(block) != self.size:
            raise ValueError(f"`block` should have shape ({self.size}, k), got {tuple(block.shape)}.")
        return self._products(block.T).T

    @abstractmethod
    def _add_products(self, total: Total, vectors: Tensor) -> None:
        """Add the products of all this rank's batches with the rows of a tensor, one after the other."""

    def _products(self, vectors: Tensor) -> Tensor:
        """The products with the rows of a tensor, as the rows of another."""
        self.num_matvecs += len(vectors)
        if not len(vectors):
            return torch.zeros_like(vectors, dtype=self.dtype, device=self.device)
        with torch.inference_mode(False), self._batches.mean(vectors.numel()) as total:
            vectors = vectors.detach().to(dtype=self.dtype, device=self.device, copy=vectors.is_inference())
            self._add_products(total, vectors)
        return total.sum.view(vectors.shape)
