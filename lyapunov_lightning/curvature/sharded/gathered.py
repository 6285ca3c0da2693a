"""The Hessian of a sharded model, by products on parameters that are gathered for a measurement.

The parameters are gathered once for a measurement and the vector once for a product. Each rank then multiplies by the
Hessian of its own samples as if it were alone, and gets its part of the sum over the ranks. So a product has one gather
at its beginning and one scatter at its end, and between these a rank can do anything, even fail.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.curvature.loss.mean_loss import Distances
from lyapunov_lightning.curvature.operators.loss_hessian import Statistic
from lyapunov_lightning.curvature.sharded.base import Compute, ShardedHessian


class GatheredHessian(ShardedHessian):
    """The Hessian of a sharded model by products on gathered parameters.

    Each rank needs the memory of two to three whole models during a measurement, and of five to six more during a
    product.

    """

    way = "on gathered parameters"

    @override
    def values_along(self, direction: Tensor, distances: Distances) -> Tensor:
        if not distances:
            return torch.zeros(0, dtype=torch.float64, device="cpu")
        with self.space.together():
            own = self._present()
            rows = [self.space.whole(row) for row in direction.view(-1, self.space.length)]
            whole = rows[0] if direction.ndim == 1 else torch.stack(rows)
            # Sums over samples with their number, since ranks may have unequal shares; a rank without any adds zeros.
            sums = torch.zeros(len(distances) + 1, dtype=torch.float64, device="cpu")
            if own is not None:
                sums[:-1] = own.values_along(whole, distances) * own.num_samples
                sums[-1] = own.num_samples
            sums = self._ranks.summed(sums)
        return _divided(sums[:-1], float(sums[-1]))

    @override
    def mean_over_batches(
        self, vectors: Tensor, statistic: Statistic, size: int, max_batches: int | None = None
    ) -> Tensor:
        with self.space.together():
            own = self._present()
            gradients: Iterator[Tensor] = iter(()) if own is None else own.batch_gradients(max_batches)
            total = torch.zeros(size + 1, dtype=torch.float64, device="cpu")
            while True:
                gradient = next(gradients, None)
                # The ranks may have different numbers of batches. One that has no more takes part until all are done.
                if not self._ranks.sum_of(gradient is not None):
                    break
                components = self._components_of_own(gradient, vectors)
                if gradient is not None:
                    norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
                    total[:-1] += statistic(components.to(gradient), norm.to(gradient)).cpu().double()
                    total[-1] += 1
            total = self._ranks.summed(total)
        return _divided(total[:-1], float(total[-1])).to(self.device, self.dtype)

    @override
    def _mean(self, vector: Tensor | None, compute: Compute) -> Tensor:
        """One gather at the beginning and one scatter at the end of what the ranks compute by themselves."""
        own = self._present()
        # Before anything else, since a rank that runs out of memory in between still has to take part in the sum.
        room = self._sharding.room()
        if vector is None:  # else the gathering of the vector is where the ranks meet
            self._ranks.meet()
        whole = None if vector is None else self.space.whole(vector)
        found: list[Tensor] = []
        result: list[Tensor] = []
        count = 0.0

        def compute_own() -> None:
            nonlocal count
            if own is not None:
                found.append(compute(own, whole))
                count = own.num_samples
                found[0].mul_(count)

        # Whether a rank has failed travels in the same message as the sum, so that no product has a further one.
        def scatter(has_failed: bool) -> int:
            nonlocal count
            # A part that was computed before the failure must not reach the sum without its samples.
            mine = None if has_failed or not found else found[0]
            numbers = (float(has_failed), 0.0 if has_failed else count)
            part, (num_failed, count) = self._sharding.scattered_sum(mine, numbers, room)
            result.append(part)
            return int(num_failed)

        self._ranks.joining(compute_own, scatter)
        return _divided(result[0], count)

    def _components_of_own(self, gradient: Tensor | None, vectors: Tensor) -> Tensor:
        """The components of this rank's gradient along vectors of which it holds a part only.

        Gathering the vectors would take their whole memory. Instead each rank gets its part of every rank's gradient
        and multiplies it by its parts of the vectors, and the sums over the ranks are the components.
        """
        num_parts, count = self._sharding.num_parts, len(vectors)
        self._ranks.meet()
        mine = gradient if gradient is not None else torch.zeros(self.size, dtype=self.dtype, device=self.device)
        rows = self._sharding.exchanged(mine)
        products = (rows @ vectors.T.to(rows)).double()
        # Summed over all ranks, of all copies of the model: each copy has seen other samples, so each has a slot of its
        # own.
        spread = torch.zeros(self._sharding.num_copies, num_parts, count, dtype=torch.float64, device="cpu")
        spread[self._sharding.copy] = products.cpu()
        sums = self._ranks.summed(spread.reshape(-1)).view(spread.shape)
        return sums[self._sharding.copy, self._sharding.part]


def _divided(sums: Tensor, count: float) -> Tensor:
    if count == 0:
        raise MeasurementError("No rank has a batch to measure the curvature on.")
    return sums / count
