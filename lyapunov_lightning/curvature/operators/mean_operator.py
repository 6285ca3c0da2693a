"""An operator that is a mean over fixed batches: what the Hessian and its kin have in common."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.linear import SymmetricOperator, parameters_of
from lyapunov_lightning.curvature.loss.derivatives import Derivatives
from lyapunov_lightning.curvature.loss.fixed_batches import FixedBatches, Objective
from lyapunov_lightning.curvature.loss.mean_loss import MeanLoss
from lyapunov_lightning.curvature.vectors.layout import FlatLayout
from lyapunov_lightning.curvature.vectors.ranks import Ranks


class MeanOperator(SymmetricOperator):
    """The mean of a symmetric operator over all samples of fixed batches, on all ranks.

    It counts products and checks what is multiplied; the products themselves are computed by its `Derivatives`, which a
    subclass chooses.

    Args:
        parameters: The parameters, the coordinates of the vectors in this order: tensors, ``named_parameters()``, or a
            dictionary.
        max_graph_bytes: The most memory that kept graphs may hold.
        reduce: Sums a flat buffer over all ranks of a distributed measurement, in place.

    Attributes:
        parameters: The parameters, each object once.
        num_matvecs: Products so far; a block counts as many as it has columns.

    """

    layout: FlatLayout
    _derivatives: Derivatives
    """The gradients and the products. To be set by the subclass."""

    def __init__(self, parameters: Any, max_graph_bytes: int, reduce: Callable[[Tensor], None] | None) -> None:
        if max_graph_bytes < 0:
            raise ValueError(f"`max_graph_bytes` should be a non-negative int, got {max_graph_bytes!r}.")
        self.parameters, names = parameters_of(parameters)
        layout = FlatLayout(self.parameters)
        # On the device of the parameters: NCCL sums tensors on its own devices only.
        self._ranks = Ranks(reduce, layout.device)
        super().__init__(layout.space(self._ranks), layout, names)
        self.num_matvecs = 0

    def _average_over(self, objective: Objective, batches: Sequence[Any], weights: Sequence[float] | None) -> MeanLoss:
        """The mean of an objective over batches with their weights."""
        self._batches = FixedBatches(objective, batches, self.space, weights, self._ranks)
        return MeanLoss(self._batches, self.parameters, self.layout)

    @property
    def graph_bytes(self) -> int:
        """Memory that the kept gradient graphs hold."""
        return self._derivatives.graph_bytes

    @property
    def num_samples(self) -> float:
        """Samples of this rank's batches, the sum of their weights; known once they were evaluated."""
        return sum(map(self._batches.weight, range(len(self._batches))))

    def follow(self, solver: object) -> None:
        """Be part of the operator for which this solver works, if any; see `Ranks.solver`."""
        self._ranks.solver = solver

    def matvec(self, vector: Tensor) -> Tensor:
        """The product.

        Args:
            vector: Shape ``(size,)``.

        Returns:
            A new vector of shape ``(size,)``.

        """
        if vector.shape != (self.size,):
            raise ValueError(f"`vector` should have shape ({self.size},), got {tuple(vector.shape)}.")
        self.num_matvecs += 1
        return self._derivatives.products(vector[None])[0]

    def matmat(self, block: Tensor) -> Tensor:
        """The products with several vectors, for which each batch is evaluated once and the ranks meet once.

        Args:
            block: Shape ``(size, k)``: the vectors as columns.

        Returns:
            A new tensor of shape ``(size, k)``.

        """
        if block.ndim != 2 or len(block) != self.size:
            raise ValueError(f"`block` should have shape ({self.size}, k), got {tuple(block.shape)}.")
        # An empty sum over the ranks is one message for nothing, and `torch.cat` refuses an empty list.
        if not block.shape[1]:
            return torch.zeros_like(block, dtype=self.dtype, device=self.device)
        # Each column is a backward pass of its own; only the evaluation of the batches is shared.
        self.num_matvecs += block.shape[1]
        return self._derivatives.products(block.T).T
