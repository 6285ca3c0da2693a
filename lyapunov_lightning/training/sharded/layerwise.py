"""The training loss of a sharded model as a function of its shards, for derivatives of any order."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lyapunov_lightning.curvature.loss.fixed_batches import Evaluation
from lyapunov_lightning.curvature.sharded.collectives import Collectives
from lyapunov_lightning.curvature.sharded.layerwise import LayerSharding
from lyapunov_lightning.curvature.vectors.layout import local_of
from lyapunov_lightning.training.fsdp import layers_of
from lyapunov_lightning.training.replica.objective import ProbeBatch, TrainingObjective
from lyapunov_lightning.training.replica.replica import replica


class LayerwiseObjective(TrainingObjective):
    """The training loss on a replica whose parameters are gathered from shards, layer by layer, within the graph.

    The loss is the mean over this rank's samples times their number: the derivatives of the ranks are summed, and a
    rank with more samples has to count for more.

    Args:
        arguments: As for `TrainingObjective`, `options` too.
        collectives: Gets every gather and scatter, before it is entered.

    Attributes:
        samples: The number of samples of each evaluated batch, by ``batch_idx``.

    """

    def __init__(self, *arguments: Any, collectives: Collectives, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.samples: dict[int, float] = {}
        self._layers = [(layer, LayerSharding(layer, collectives)) for layer in layers_of(self._pl_module)]

    @contextmanager
    def evaluated(self, probe: ProbeBatch, values: Sequence[Tensor] | None = None) -> Iterator[Evaluation]:
        """Evaluate the loss of a batch, on all ranks together.

        Args:
            probe: The batch.
            values: This rank's shards of the parameters, in their order; the present ones if None.

        Yields:
            The mean loss of this rank's samples times their number, as a function of the shards.

        """
        # Detached, since these are the training's own shards: gradients are to end in the leaves that are made of them.
        shards = {parameter: local_of(parameter).detach() for layer, _ in self._layers for parameter in layer}
        own = [shards[p].requires_grad_() for p in self.parameters] if values is None else list(values)
        shards.update(zip(self.parameters, own, strict=True))
        whole: dict[Tensor, Tensor] = {}
        for layer, sharding in self._layers:
            whole.update(zip(layer, sharding.gathered([shards[p] for p in layer]), strict=True))
        with replica(self._trainer, self._pl_module, self._mode, whole, self._elsewhere) as twin:
            loss = self._evaluated_on(twin, probe)
            samples = float(self._num_samples(probe.batch, twin.logged_sizes))
            # Kept, since all ranks divide by the sum of these numbers, which none of them knows during its own
            # evaluation.
            self.samples[probe.batch_idx] = samples
            yield Evaluation(loss * samples, own, lambda: 1.0, twin)
