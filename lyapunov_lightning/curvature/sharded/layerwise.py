"""The Hessian of a sharded model, by derivatives through the gathering of one layer after the other.

Gathering a tensor from its shards is a linear map. Its transpose sums the ranks' tensors and cuts the sum into shards,
and the transpose of that is gathering again. So a loss that gathers each layer's parameters where it needs them can be
differentiated any number of times with respect to the shards, and the vector, the gradient and the product are shards.
A layer's whole gradient is freed as soon as it is cut, so that the memory needed is that of the whole parameters, which
the graph holds, and not that of several whole vectors in addition.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.curvature.loss.mean_loss import Distances
from lyapunov_lightning.curvature.operators.hessian import HessianOperator
from lyapunov_lightning.curvature.operators.loss_hessian import Statistic
from lyapunov_lightning.curvature.sharded.base import Compute, ShardedHessian
from lyapunov_lightning.curvature.sharded.collectives import Collectives
from lyapunov_lightning.curvature.sharded.sharding import Sharding
from lyapunov_lightning.curvature.vectors.layout import FlatLayout


class _Gather(torch.autograd.Function):
    """Maps shards to whole tensors."""

    @staticmethod
    def forward(ctx: Any, sharding: Sharding, layout: FlatLayout, *shards: Tensor) -> tuple[Tensor, ...]:
        ctx.cut = sharding, layout
        # One collective for all tensors of the layer: each has a cost of its own, whatever its size.
        return tuple(sharding.tensors_of(sharding.gathered(layout.flatten(shards))))

    @staticmethod
    def backward(ctx: Any, *wholes: Tensor) -> tuple[Any, ...]:
        return None, None, *_Scatter.apply(*ctx.cut, *wholes)


class _Scatter(torch.autograd.Function):
    """Maps whole tensors to the shards of their sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, sharding: Sharding, layout: FlatLayout, *wholes: Tensor) -> tuple[Tensor, ...]:
        ctx.cut = sharding, layout
        # PyTorch hands out whole gradients one by one. In one flat buffer they take one collective for the layer.
        flat = torch.cat([whole.detach().reshape(-1).to(sharding.dtype) for whole in wholes])
        return tuple(layout.split(sharding.scattered_sum(flat)[0]))

    @staticmethod
    def backward(ctx: Any, *shards: Tensor) -> tuple[Any, ...]:
        return None, None, *_Gather.apply(*ctx.cut, *shards)


class LayerSharding:
    """The parameters of a layer, gathered together.

    Args:
        parameters: The sharded parameters.
        collectives: Gets every gather and scatter, before it is entered.

    """

    def __init__(self, parameters: Sequence[Tensor], collectives: Collectives) -> None:
        self._sharding, self._layout = Sharding(parameters, collectives), FlatLayout(parameters)

    def gathered(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The whole tensors, any number of times differentiable with respect to the shards."""
        wholes: tuple[Tensor, ...] = _Gather.apply(self._sharding, self._layout, *shards)
        return wholes


class LayerwiseHessian(ShardedHessian):
    """The Hessian of a sharded model by derivatives through the gathering of its layers.

    Every rank has the same number of batches, and takes part in all evaluations. A rank's loss has to be the mean over
    its samples times their number, so that the sums over the ranks, which the derivatives bring along, weight it right.

    """

    way = "through gathering of layers"

    def __init__(
        self, *arguments: Any, samples_of: Callable[[int], float], num_batches: int, collectives: Collectives
    ) -> None:
        super().__init__(*arguments)
        self._samples_of = samples_of
        self._num_batches = num_batches
        self._collectives = collectives
        self._counts: dict[int | None, float] = {}

    @override
    def values_along(self, direction: Tensor, distances: Distances) -> Tensor:
        with self.space.together():
            own = self._needed()
            with self._collectives.followed(("values", len(distances), self._num_batches)):
                # Each batch counts once in a rank's mean, whose parts are sums over samples: times the number of
                # batches it is the sum over this rank's samples.
                values = own.values_along(direction, distances) * self._num_batches
            return self._ranks.summed(values) / self._count()

    @override
    def mean_over_batches(
        self, vectors: Tensor, statistic: Statistic, size: int, max_batches: int | None = None
    ) -> Tensor:
        total = torch.zeros(size, dtype=self.dtype, device=self.device)
        with self.space.together():
            number = 0
            gradients = self._needed().batch_gradients(max_batches)
            while True:
                # By number: a batch whose graph is kept gathers nothing, and another one may be over the memory bound.
                with self._collectives.followed(("gradients", number, self.graph_bytes > 0)):
                    gradient = next(gradients, None)
                if gradient is None:
                    break
                gradient = gradient / self._count(number)
                components = self.space.inner(vectors, gradient)
                total += statistic(components, self.space.norm(gradient).to(components))
                number += 1
        return total / number

    @override
    def _mean(self, vector: Tensor | None, compute: Compute) -> Tensor:
        own = self._needed()
        # A rank that has failed before would be missing in the first gathering, where it could not say so.
        self._ranks.meet()
        # With a kept graph a product has only the collectives of the backward pass, so it is another kind. So it is on
        # another number of batches: a step that accumulates has more than the last one of an epoch may have.
        with self._collectives.followed((compute, vector is None, self.graph_bytes > 0, self._num_batches)):
            found = compute(own, vector)
        # Not summed over the ranks once more: each backward pass through a gathering has done that.
        return found * (self._num_batches / self._count())

    def _needed(self) -> HessianOperator:
        own = self._present()
        assert own is not None  # each rank has its batches
        return own

    def _count(self, index: int | None = None) -> float:
        """The number of samples of all ranks, in one batch of each or in all batches."""
        if index not in self._counts:  # the data do not change, so one message each is enough
            indices = range(self._num_batches) if index is None else [index]
            self._counts[index] = self._ranks.sum_of(sum(map(self._samples_of, indices)))
        return self._counts[index]
