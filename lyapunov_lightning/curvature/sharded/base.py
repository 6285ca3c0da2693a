"""What the two Hessians of a sharded model by exact products have in common.

Each rank has a `HessianOperator` of its own: over its own samples, or with respect to its shards. It is valid as long
as the parameters stay the same. The ranks agree on whether they did, since a change may show in the shards of one rank
and not in another's.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from lyapunov_lightning.curvature.linear import SymmetricOperator
from lyapunov_lightning.curvature.loss.mean_loss import Distances
from lyapunov_lightning.curvature.operators.checks import OperatorCheck, check_operator
from lyapunov_lightning.curvature.operators.hessian import HessianOperator
from lyapunov_lightning.curvature.operators.loss_hessian import Statistic
from lyapunov_lightning.curvature.sharded.sharding import ShardedSpace, Sharding
from lyapunov_lightning.curvature.vectors.layout import FlatLayout, local_of
from lyapunov_lightning.curvature.vectors.ranks import Ranks

Compute = Callable[[HessianOperator, Tensor | None], Tensor]
"""What a rank computes by itself with a vector, or with None at the present parameters."""


class ShardedHessian(SymmetricOperator):
    """The Hessian of the mean loss of a sharded model over the samples of all ranks, on vectors in parts.

    It is used like a `HessianOperator`. Each rank's own operator is made anew when the parameters have changed on any
    rank.

    Args:
        make: Makes this rank's own operator, on all ranks together; None for a rank without samples.
        parameters: The sharded parameters.
        watched: The tensors whose changes make the operators invalid.
        sharding: How the parameters are cut.
        ranks: All ranks.

    Attributes:
        parameters: The sharded parameters.
        num_matvecs: Products so far.

    """

    layout: FlatLayout
    way: ClassVar[str]
    """How the ranks work together, as a part of `method`."""

    def __init__(
        self,
        make: Callable[[], HessianOperator | None],
        parameters: Sequence[Tensor],
        watched: Sequence[Tensor],
        sharding: Sharding,
        ranks: Ranks,
    ) -> None:
        super().__init__(ShardedSpace(sharding, ranks), FlatLayout(parameters))
        self.parameters = tuple(parameters)
        self.num_matvecs = 0
        self._make = make
        self._watched = list(watched)
        self._sharding = sharding
        self._ranks = ranks
        self._own: HessianOperator | None = None
        self._versions: list[tuple[int, int]] | None = None
        self._trusted: object = None

    @property
    def method(self) -> str:
        """How products are computed at present."""
        return f"{self._own.method if self._own is not None else 'products'} {self.way}"

    @property
    def graph_bytes(self) -> int:
        """The memory of the kept gradient graphs, not counting the gathered parameters."""
        return self._own.graph_bytes if self._own is not None else 0

    def matvec(self, vector: Tensor) -> Tensor:
        """The product.

        Args:
            vector: This rank's part of the vector, of shape ``(length,)``.

        Returns:
            This rank's part of the product.

        """
        if vector.shape != (self.space.length,):
            raise ValueError(f"`vector` should have shape ({self.space.length},), got {tuple(vector.shape)}.")
        self.num_matvecs += 1
        return self._mean(vector, _product)

    def gradient(self, displacement: Tensor | None = None, *, keep_graph: bool = False) -> Tensor:
        """The gradient of the mean loss.

        Args:
            displacement: Where to take it, relative to the present parameters; at these if None.
            keep_graph: As for `HessianOperator.gradient`; here the first product builds its graph by itself, since what
                fails on one rank while a graph is built is that product's to settle with the others.

        """
        return self._mean(displacement, _gradient)

    def value(self, displacement: Tensor | None = None) -> float:
        """The mean loss, at a displacement from the present parameters."""
        distance = 0.0 if displacement is None else 1.0
        return float(self.values_along(self.space.zeros() if displacement is None else displacement, [distance]))

    @abstractmethod
    def values_along(self, direction: Tensor, distances: Distances) -> Tensor:
        """The mean loss at several points of a line or a plane through the parameters, see `HessianOperator`."""

    @abstractmethod
    def mean_over_batches(
        self, vectors: Tensor, statistic: Statistic, size: int, max_batches: int | None = None
    ) -> Tensor:
        """The mean of a statistic of the mini-batch gradients along some vectors, see `HessianOperator`."""

    def drop_graphs(self) -> None:
        """Free the memory of this rank's gradient graphs; the next product builds them anew."""
        if self._own is not None:
            self._own.drop_graphs()

    def reset(self) -> None:
        """Forget everything that evaluations have shown, and gather the parameters anew for the next one."""
        self._own, self._versions, self._trusted = None, None, None

    def check(self, *, seed: int = 0) -> OperatorCheck:
        """Measure how symmetric and how deterministic the products are, see `HessianOperator.check`."""
        return check_operator(self, seed=seed, between=self.reset)

    @abstractmethod
    def _mean(self, vector: Tensor | None, compute: Compute) -> Tensor:
        """The mean over the samples of all ranks of what each rank computes with a vector."""

    def _present(self) -> HessianOperator | None:
        """This rank's own operator at the present parameters; all ranks have to ask together."""
        # Nobody changes a parameter while a solver runs, so the ranks agree once for each solver. At every product it
        # would be one more message.
        solver = self._ranks.solver
        if solver is None or solver is not self._trusted:
            # Of both: what an optimizer writes is counted by the DTensor, what is written to the shard by the shard.
            versions = [(tensor._version, local_of(tensor)._version) for tensor in self._watched]
            if self._ranks.sum_of(versions != self._versions):
                self._own = None  # first: the old and the new one together would hold the whole parameters twice
                self._own = self._make()
                self._versions = versions
            self._trusted = solver
        # Its own look for changes is then once a solver as well, not once a product.
        if self._own is not None:
            self._own.follow(solver)
        return self._own


def _product(own: HessianOperator, vector: Tensor | None) -> Tensor:
    assert vector is not None  # by `matvec`
    return own.matvec(vector)


def _gradient(own: HessianOperator, displacement: Tensor | None) -> Tensor:
    return own.gradient(displacement)
