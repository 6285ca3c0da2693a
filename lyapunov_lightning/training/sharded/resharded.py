"""The training loss of a sharded model, evaluated on replicas that are sharded like it.

The parameters of a replica have no memory at first. ``fully_shard`` cuts them as it has cut the module's own, and
each rank fills in its own shards, at any displacement. So FSDP gathers and drops layer after layer in the replica's own
forward and backward pass. The module in training stays as it is, with its shards, its gradients and what it has
gathered.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.curvature.loss.fixed_batches import Evaluation, FixedBatches
from lyapunov_lightning.curvature.loss.mean_loss import Distances, displacements
from lyapunov_lightning.curvature.sharded.collectives import Collectives
from lyapunov_lightning.curvature.sharded.sharding import ShardedSpace, Sharding
from lyapunov_lightning.curvature.vectors.layout import FlatLayout, local_of
from lyapunov_lightning.curvature.vectors.ranks import Ranks
from lyapunov_lightning.training.fsdp import discard, shard_again
from lyapunov_lightning.training.replica.objective import ProbeBatch, TrainingObjective
from lyapunov_lightning.training.replica.replica import replica


class ReshardedObjective(TrainingObjective):
    """The training loss on a replica that is sharded like the module, as a function of the shards.

    Args:
        arguments: As for `TrainingObjective`, `options` too.
        collectives: Gets every gather and scatter, before it is entered.

    """

    def __init__(self, *arguments: Any, collectives: Collectives, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._collectives = collectives

    @contextmanager
    def evaluated(self, probe: ProbeBatch, values: Sequence[Tensor] | None = None) -> Iterator[Evaluation]:
        """Evaluate the loss of a batch, on all ranks together.

        Args:
            probe: The batch.
            values: This rank's shards of the parameters, in their order; the present ones if None.

        Yields:
            The loss of this rank's samples. Its backward pass leaves the mean of the gradients over the ranks in
            ``.grad`` of the leaves, as it does in training.

        """
        sharded = [p for p in self._pl_module.parameters() if local_of(p) is not p]
        # On "meta" a replica of a model that fits on no device takes no memory until it is sharded.
        empty: dict[Tensor, Tensor] = {p: torch.empty(p.shape, dtype=p.dtype, device="meta") for p in sharded}
        others = {} if values is None else dict(zip(self.parameters, values, strict=True))
        with replica(self._trainer, self._pl_module, self._mode, empty, self._elsewhere) as twin:
            # Sharded before anything is written to it: at no time a rank holds a whole parameter.
            leaves = shard_again(self._pl_module, twin.module, twin.copier.memo, self._collectives)
            try:
                with torch.no_grad():
                    for parameter in sharded:
                        shard = others.get(parameter)
                        local_of(leaves[parameter]).copy_(local_of(parameter) if shard is None else shard)
                loss = self._evaluated_on(twin, probe)
                own = [leaves[parameter] for parameter in self.parameters]
                yield Evaluation(loss, own, lambda: self._num_samples(probe.batch, twin.logged_sizes), twin)
            finally:
                # FSDP's states hold each other in cycles: a copy of the model for each evaluation would stay until
                # Python collects garbage.
                discard(twin.module)


class ReshardedMeanLoss:
    """The mean of the training loss over the samples of all ranks, evaluated by all ranks at the same time.

    Args:
        objective: The loss.
        batches: This rank's batches.
        sharding: How the parameters are cut.
        ranks: All ranks.
        collectives: Gets all that the ranks do together in an evaluation, before they do it.

    Attributes:
        num_batches: The number of batches of the rank that has most. A rank with fewer evaluates its last one again
            meanwhile, with weight 0, since FSDP's gathers need all ranks.

    Raises:
        MeasurementError: If a rank has no batch.

    """

    def __init__(
        self,
        objective: ReshardedObjective,
        batches: Sequence[ProbeBatch],
        sharding: Sharding,
        ranks: Ranks,
        collectives: Collectives,
    ) -> None:
        self._collectives = collectives
        self._layout = FlatLayout(objective.parameters)
        self._parameters = objective.parameters
        self._space = ShardedSpace(sharding, ranks)
        self._ranks = ranks
        self._num_ranks = sharding.num_parts * sharding.num_copies
        # A rank without a batch has to say so before the first gather, in which the others would wait for it.
        with ranks.together():
            self.num_batches = _largest(len(batches), ranks)
            if not batches:
                raise MeasurementError("This rank has no batch, without which no rank can evaluate a sharded model.")
        self._own = len(batches)
        counted = Ranks(lambda _: None)  # sums over this rank alone; with ranks to sum over, samples are counted
        self._batches = FixedBatches(objective, batches, self._layout.space(), None, counted)

    def gradient(self, displacement: Tensor | None, batches: Sequence[int] | None = None) -> Tensor:
        """This rank's part of the gradient of the mean loss, see `ShardedMeanLoss`."""
        shards = self._displaced(displacement)
        total, count = self._space.zeros(), 0.0
        for index in range(self.num_batches) if batches is None else batches:
            self._ranks.meet()  # a rank that failed before has to say so here, and not in one of FSDP's gathers
            with (
                self._collectives.followed("gradient"),
                self._batches.evaluated(min(index, self._own - 1), shards) as evaluation,
            ):
                own = self._weight(index)
                # Noted before it is entered, like FSDP's gathers: a rank that fails before this sum still has to take
                # part in it.
                self._collectives.note(lambda: self._ranks.sum_of(0.0))
                weight = self._ranks.sum_of(own)
                if evaluation.loss.requires_grad:
                    # FSDP takes the plain mean over the ranks. The factor makes the mean over the samples of it.
                    (evaluation.loss * (own * self._num_ranks / weight)).backward()
                gradients = [leaf.grad for leaf in evaluation.leaves]
                total.add_(self._layout.flatten(gradients), alpha=weight)
                count += weight
        return total / count

    def values_along(self, direction: Tensor, distances: Distances) -> Tensor:
        """The mean loss at several points of a line, or a plane, through the present parameters."""
        sums = torch.zeros(len(distances) + 1, dtype=torch.float64, device="cpu")
        # Sums over all distances and one exchange at the end. The count is that of one pass over the batches, so it
        # begins anew with each distance.
        for place, displacement in enumerate(displacements(direction, distances)):
            shards = self._displaced(displacement)
            sums[-1] = 0.0
            for index in range(self.num_batches):
                self._ranks.meet()
                with (
                    self._collectives.followed("value"),
                    self._batches.evaluated(min(index, self._own - 1), shards, with_graph=False) as evaluation,
                ):
                    own = self._weight(index)
                    sums[place] += own * float(evaluation.loss)
                    sums[-1] += own
        sums = self._ranks.summed(sums)
        return sums[:-1] / sums[-1]

    def _weight(self, index: int) -> float:
        """The number of samples of this rank's batch; 0 for one that it evaluates only to take part."""
        return self._batches.weight(index) if index < self._own else 0.0

    def _displaced(self, displacement: Tensor | None) -> list[Tensor] | None:
        if displacement is None:
            return None
        pieces = self._layout.split(displacement)
        return [local_of(p).detach() + piece for p, piece in zip(self._parameters, pieces, strict=True)]


def _largest(count: int, ranks: Ranks) -> int:
    """The largest of the ranks' numbers."""
    # Sums are all that `Ranks` exchanges, and the numbers of batches are small.
    number = 0
    while ranks.sum_of(count > number):
        number += 1
    return number
