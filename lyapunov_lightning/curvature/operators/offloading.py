"""Vectors in the CPU's memory, for a model on an accelerator.

A Krylov basis of 33 vectors takes 33 times the memory of the parameters, where a training with Adam takes four times.
The CPU has more of it. Work on vectors there takes a few passes over the basis for each product. So it pays for large
models, whose products take long and which need the room.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lyapunov_lightning.curvature.linear import SymmetricOperator
from lyapunov_lightning.curvature.loss.mean_loss import Distances
from lyapunov_lightning.curvature.operators.checks import OperatorCheck
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian, Statistic
from lyapunov_lightning.curvature.vectors.layout import FlatLayout

_CPU = torch.device("cpu")


class OffloadedHessian(SymmetricOperator):
    """A Hessian whose vectors are in the CPU's memory.

    Every product moves one vector to the device of the model and one back.

    Args:
        hessian: The Hessian, on the device of its parameters.

    """

    layout: FlatLayout

    def __init__(self, hessian: LossHessian) -> None:
        # Both on the CPU: solvers take basis, random vectors and sums from the space, and results are split by the
        # layout.
        super().__init__(hessian.space.on(_CPU), FlatLayout(hessian.parameters, device=_CPU))
        self._hessian = hessian

    @property
    def parameters(self) -> Sequence[Tensor]:
        """What the loss is a function of."""
        return self._hessian.parameters

    @property
    def method(self) -> str:
        """How products are computed at present."""
        return self._hessian.method

    @property
    def num_matvecs(self) -> int:
        """Products so far."""
        return self._hessian.num_matvecs

    @num_matvecs.setter
    def num_matvecs(self, count: int) -> None:
        self._hessian.num_matvecs = count

    # The Krylov basis, up to a hundred vectors, stays in the CPU's memory; the device holds one vector and one product.
    def matvec(self, vector: Tensor) -> Tensor:
        """The product with a vector of shape ``(length,)``."""
        return self._hessian.matvec(self._there(vector)).cpu()

    def gradient(self, displacement: Tensor | None = None, *, keep_graph: bool = False) -> Tensor:
        """The gradient, at a displacement from the present parameters; with what products need that follow."""
        there = None if displacement is None else self._there(displacement)
        return self._hessian.gradient(there, keep_graph=keep_graph).cpu()

    def value(self, displacement: Tensor | None = None) -> float:
        """The loss, at a displacement from the present parameters."""
        return self._hessian.value(None if displacement is None else self._there(displacement))

    def values_along(self, direction: Tensor, distances: Distances) -> Tensor:
        """The loss at several points of a line, or a plane, through the present parameters."""
        return self._hessian.values_along(self._there(direction), distances)

    def mean_over_batches(
        self, vectors: Tensor, statistic: Statistic, size: int, max_batches: int | None = None
    ) -> Tensor:
        """The mean of a statistic of the mini-batch gradients along some vectors, which are moved to the device."""
        return self._hessian.mean_over_batches(self._there(vectors), statistic, size, max_batches).cpu()

    def check(self, *, seed: int = 0) -> OperatorCheck:
        """How symmetric and how deterministic the products are."""
        return self._hessian.check(seed=seed)

    def drop_graphs(self) -> None:
        """Free the memory of what is kept for further products; the next one builds it anew."""
        self._hessian.drop_graphs()

    def reset(self) -> None:
        """Forget what was found out by evaluations."""
        self._hessian.reset()

    def _there(self, vector: Tensor) -> Tensor:
        return vector.to(self._hessian.space.device)
