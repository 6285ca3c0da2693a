"""The Hessian of a sharded model by finite differences, for models that no rank can hold as a whole.

The gradient of a sharded model comes in shards, from a forward and a backward pass in which each layer is gathered only
while it is computed. So the central difference of gradients along a vector in shards is a product in shards, and no
rank ever holds more than a layer. Like all finite differences these blur kinks, and are lost in the rounding of half
precision.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lyapunov_lightning.curvature.linear import SymmetricOperator
from lyapunov_lightning.curvature.loss.difference_step import first_step, fitting_step
from lyapunov_lightning.curvature.loss.mean_loss import Distances
from lyapunov_lightning.curvature.operators.checks import OperatorCheck, check_operator
from lyapunov_lightning.curvature.operators.loss_hessian import Statistic
from lyapunov_lightning.curvature.sharded.sharding import ShardedSpace
from lyapunov_lightning.curvature.vectors.layout import FlatLayout, local_of


class ShardedMeanLoss(Protocol):
    """The mean loss over the samples of all ranks, evaluated by all of them together."""

    num_batches: int
    """The number of batches of each rank. The n-th ones of all ranks together are one batch of the training."""

    def gradient(self, displacement: Tensor | None, batches: Sequence[int] | None = None) -> Tensor:
        """This rank's part of the gradient at a displacement from the present parameters, over some or all batches."""

    def values_along(self, direction: Tensor, distances: Distances) -> Tensor:
        """The loss at some points of a line, or a plane, through the present parameters."""


class ShardDifferences(SymmetricOperator):
    """The Hessian of the mean loss of a sharded model, by central differences of its gradient.

    It is used like a `HessianOperator`, on vectors of which each rank holds its part.

    Args:
        loss: The mean loss.
        parameters: The sharded parameters.
        space: The space of the vectors.

    Attributes:
        parameters: The sharded parameters.
        num_matvecs: Products so far, of two gradients each.
        step: Length of the step; None before the first product.

    """

    layout: FlatLayout
    method = "finite_difference on shards"
    graph_bytes = 0

    def __init__(self, loss: ShardedMeanLoss, parameters: Sequence[Tensor], space: ShardedSpace) -> None:
        super().__init__(space, FlatLayout(parameters))
        self.parameters = tuple(parameters)
        self.num_matvecs = 0
        self.step: float | None = None
        self._loss = loss

    def matvec(self, vector: Tensor) -> Tensor:
        """The product: two gradients, and some more for the first product, to find a suitable step.

        Args:
            vector: This rank's part of the vector, of shape ``(length,)``.

        """
        if vector.shape != (self.space.length,):
            raise ValueError(f"`vector` should have shape ({self.space.length},), got {tuple(vector.shape)}.")
        self.num_matvecs += 1
        with self.space.together():
            # Found once, and by all ranks together: each of its gradients gathers every layer.
            if self.step is None:
                longest = first_step(map(_detached_shard, self.parameters), self.space)
                self.step = fitting_step(self._difference, self._loss.gradient(None), longest, self.space)
            return self._difference(vector, self.step)

    def gradient(self, displacement: Tensor | None = None, *, keep_graph: bool = False) -> Tensor:
        """The gradient of the mean loss, at a displacement from the present parameters; there are no graphs to keep."""
        with self.space.together():
            return self._loss.gradient(displacement)

    def value(self, displacement: Tensor | None = None) -> float:
        """The mean loss, at a displacement from the present parameters."""
        distance = 0.0 if displacement is None else 1.0
        return float(self.values_along(self.space.zeros() if displacement is None else displacement, [distance]))

    def values_along(self, direction: Tensor, distances: Distances) -> Tensor:
        """The mean loss at several points of a line or a plane through the parameters, see `HessianOperator`."""
        with self.space.together():
            return self._loss.values_along(direction, distances)

    def mean_over_batches(
        self, vectors: Tensor, statistic: Statistic, size: int, max_batches: int | None = None
    ) -> Tensor:
        """The mean of a statistic of the mini-batch gradients along some vectors, see `HessianOperator`.

        A mini-batch is here what all ranks train on in one step: FSDP sums over the ranks within the backward pass, so
        that there is no gradient of one rank's part.

        """
        total = torch.zeros(size, dtype=self.dtype, device=self.device)
        indices = range(self._loss.num_batches)[:max_batches]
        with self.space.together():
            for index in indices:
                gradient = self._loss.gradient(None, [index])
                components = self.space.inner(vectors, gradient)
                total += statistic(components, self.space.norm(gradient).to(components))
        return total / len(indices)

    def drop_graphs(self) -> None:
        """There are none."""

    def reset(self) -> None:
        """Find the step anew at the next product."""
        self.step = None

    def check(self, *, seed: int = 0) -> OperatorCheck:
        """Measure how symmetric and how deterministic the products are, see `HessianOperator.check`."""
        return check_operator(self, seed=seed)

    def _difference(self, vector: Tensor, step: float) -> Tensor:
        norm = float(self.space.norm(vector))
        if not norm > 0:
            return torch.zeros_like(vector)
        # Scaled to the norm of the vector: with a fixed multiple a long vector would leave the region in which the
        # gradient is linear, and a short one be lost in the rounding of the parameters.
        displacement = vector * (step / norm)
        # Central: for one gradient more the error goes with the square of the step, and not with the step.
        ahead = self._loss.gradient(displacement)
        return ahead.sub_(self._loss.gradient(displacement.neg_())).mul_(norm / (2 * step))


def _detached_shard(parameter: Tensor) -> Tensor:
    return local_of(parameter).detach().requires_grad_()
