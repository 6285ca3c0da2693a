"""What is asked of the Hessian of a mean loss, however its products are computed and its vectors are stored."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from lyapunov_lightning.curvature.linear import LinearOperator
from lyapunov_lightning.curvature.loss.mean_loss import Distances
from lyapunov_lightning.curvature.operators.checks import OperatorCheck
from lyapunov_lightning.curvature.vectors.layout import FlatLayout, is_narrow
from lyapunov_lightning.curvature.vectors.space import VectorSpace

Statistic = Callable[[Tensor, Tensor], Tensor]
"""Maps the components of a gradient along some vectors, of shape ``(k,)``, and its norm to a vector."""


class LossHessian(LinearOperator, Protocol):
    """The Hessian of a mean loss, with the loss and its gradient: a `HessianOperator`, or one of a sharded model.

    Vectors are tensors of shape ``(space.length,)``: the whole vector, or this rank's part of it. Inner products and
    norms are taken by the space.

    """

    num_matvecs: int

    @property
    def parameters(self) -> Sequence[Tensor]:
        """What the loss is a function of."""

    @property
    def layout(self) -> FlatLayout:
        """How they form a vector."""

    @property
    def space(self) -> VectorSpace:
        """The space of the vectors."""

    @property
    def method(self) -> str:
        """How products are computed at present."""

    def gradient(self, displacement: Tensor | None = None, *, keep_graph: bool = False) -> Tensor:
        """The gradient, at a displacement from the present parameters; with what products need that follow."""

    def value(self, displacement: Tensor | None = None) -> float:
        """The loss, at a displacement from the present parameters."""

    def values_along(self, direction: Tensor, distances: Distances) -> Tensor:
        """The loss at several points of a line, or a plane, through the present parameters."""

    def mean_over_batches(
        self, vectors: Tensor, statistic: Statistic, size: int, max_batches: int | None = None
    ) -> Tensor:
        """The mean of a statistic of the mini-batch gradients along some vectors."""

    def check(self, *, seed: int = 0) -> OperatorCheck:
        """How symmetric and how deterministic the products are."""

    def drop_graphs(self) -> None:
        """Free the memory of what is kept for further products; the next one builds it anew."""

    def reset(self) -> None:
        """Forget what was found out by evaluations."""


def fault_of(hessian: LossHessian, *, seed: int = 0) -> str | None:
    """What keeps a search for eigenvalues from ending; None where nothing does, or where the parameters are too coarse.

    Args:
        hessian: The Hessian.
        seed: Seed of the random vectors.

    """
    # By the rounding of half-precision parameters alone products are not symmetric, to a percent.
    if is_narrow(hessian.parameters):
        return None
    return hessian.check(seed=seed).fault
