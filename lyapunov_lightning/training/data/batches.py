"""Which data the curvature is measured on.

Either the batch of the present step, or fixed batches, the same throughout the training, so that two measurements
differ by the parameters alone: of the training data, or of a DataLoader of the user's own.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.training.config import HessianConfig
from lyapunov_lightning.training.data.loaders import LoaderCopy, seeded
from lyapunov_lightning.training.distributed import any_rank, of_first_rank
from lyapunov_lightning.training.lightning_names import MisconfigurationException, Trainer
from lyapunov_lightning.training.replica.copier import Copier
from lyapunov_lightning.training.replica.objective import ProbeBatch


class StartPosition:
    """Where in its data the training dataloader began.

    A dataloader that can be resumed (one with a `state_dict`) is set by Lightning to where the interrupted run stopped.
    A copy of it would give the batches from there on, and not those that the first run measured on. So the place before
    the first step is kept in the callback's checkpoint.

    Attributes:
        value: The loader's `state_dict` before the first step; None for a loader that has none.

    """

    def __init__(self) -> None:
        self.value: Any = None

    def state_dict(self) -> dict[str, Any]:
        """The position, for a checkpoint."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the position from a checkpoint."""
        self.value = state["value"]


class ProbeData:
    """The batches of a measurement.

    Fixed batches are the first that the training dataloader gives in an epoch, by its own sampler, ``collate_fn`` and
    ``__iter__``, with generators of random numbers that are seeded from the configuration. So they are the same in
    every run, also in one that is resumed. They are drawn before the first step from a copy of the dataloader, and each
    rank draws its own share. Where that is not possible without touching the training, each rank keeps its first
    training batches as they pass, and measurements begin once all of them have passed. A DataLoader of the user's own
    is read in the same way, and refused where that is not possible.

    Args:
        config: Whether the batches are fixed, and if so how many they are.

    """

    def __init__(self, config: HessianConfig) -> None:
        self._config = config
        self._fixed: list[ProbeBatch] | None = None
        self._passing: list[ProbeBatch] = []
        self._num_to_keep = 0
        self._failure: Exception | None = None

    def start(self, owner: str, trainer: Trainer, position: StartPosition | None = None) -> str | None:
        """Draw the fixed batches, once the dataloaders are set up; all ranks together.

        Args:
            owner: The class that messages name.
            trainer: The trainer.
            position: Where the dataloader began in the run that this one resumes. Is set in a run that resumes none.

        Returns:
            A sentence for the log if the first batches of the training are kept instead, else None.

        Raises:
            MisconfigurationException: If a fraction of data without a known length is asked for, or a DataLoader of the
                user's own cannot be read.

        """
        self._fixed, self._passing, self._num_to_keep, self._failure = None, [], 0, None
        if self._config.data == "batch":
            return None
        own = None if self._config.data == "fixed" else self._config.data
        epoch = trainer.num_training_batches if own is None else _length_of(own)
        # Asked for once the loader can be read: where it cannot, that is what is to be said, and not that its length is
        # unknown.
        count = partial(self._num_batches, owner, trainer, epoch)
        # The position that a checkpoint keeps is that of the training data.
        position = StartPosition() if position is None or own is not None else position
        cause = self._draw(trainer, trainer.train_dataloader if own is None else own, count, position)
        if cause is None:
            return None
        if own is not None:
            cause = cause.replace("the training dataloader", "that DataLoader")
            raise MisconfigurationException(
                f"`{owner}` cannot take its data from the DataLoader in `HessianConfig(data=...)`, since {cause}. Give"
                " a `DataLoader` over a dataset with indices, such as a `Subset` or a `TensorDataset`."
            )
        # Ranks that wait for different numbers of batches would begin to measure at different steps, and the first of
        # them would wait in its first collective for ever.
        self._num_to_keep = of_first_rank(trainer, count())
        kept = "first batch" if self._num_to_keep == 1 else f"first {self._num_to_keep} batches"
        return f"The fixed data of `{owner}` are the {kept} of this training, kept on the way, since {cause}."

    def observe(self, batch: Any, batch_idx: int) -> None:
        """See a training batch, and keep it if it is one of the fixed ones; to be called before every step."""
        if self._num_to_keep == 0:
            return
        try:
            self._passing.append(ProbeBatch(Copier()(batch), batch_idx, True))
        except Exception as error:  # raised again by `batches`, where it ends a measurement and not the training
            self._failure, self._num_to_keep = error, 0
            return
        self._num_to_keep -= 1
        if self._num_to_keep == 0:
            self._fixed, self._passing = self._passing, []

    def batches(self) -> list[ProbeBatch] | None:
        """This rank's fixed batches, or None while they are not complete.

        Raises:
            MeasurementError: If a batch that was to be kept could not be copied.

        """
        if self._failure is not None:
            raise MeasurementError(f"A training batch cannot be copied, and so not be kept: {self._failure}")
        return self._fixed

    @contextmanager
    def randomness(self, rank: int) -> Iterator[None]:
        """Seed the global generators of random numbers for a measurement on fixed batches; else leave them as they are.

        The dropout masks and the augmentation are then the same at every measurement, like the batches. On the step's
        own batch they are those that the step is going to draw.

        """
        if self._config.data == "batch":
            yield
            return
        with seeded(self._config.seed + rank):
            yield

    def _num_batches(self, owner: str, trainer: Trainer, epoch: float) -> int:
        """How many batches of this rank are wanted, of so many."""
        if self._config.num_batches is not None:
            return int(min(self._config.num_batches, epoch))
        if any_rank(trainer, math.isinf(epoch)):
            raise MisconfigurationException(
                f"`{owner}` cannot take a fraction of data without a length as its fixed data. Pass"
                " `HessianConfig(num_batches=...)` in place of a fraction, or give the dataloader a length."
            )
        assert self._config.fraction is not None  # see `HessianConfig.filled`
        # Rounded first: in floating point 0.07 * 100 is a little more than 7, and would be 8 batches.
        return max(1, math.ceil(round(self._config.fraction * int(epoch), 6)))

    def _draw(self, trainer: Trainer, loader: Any, count: Callable[[], int], position: StartPosition) -> str | None:
        """Draw from a copy of a dataloader, all ranks or none.

        Returns:
            Why that is not possible, on all ranks even if for one of them only; None if the batches were drawn.

        """
        cause = _what_prevents_a_copy(loader)
        # Whatever the user's dataloader or dataset raises is no reason not to measure: the batches that the training
        # gets can still be kept.
        if cause is None:
            try:
                copied = LoaderCopy(loader)
                fingerprints = copied.fingerprints()
                if position.value is None:
                    position.value = copied.position()
                else:
                    copied.move_to(position.value)
            except Exception as error:
                cause = _said(error)
        if any_rank(trainer, cause is not None):
            return cause or _ELSEWHERE
        num_batches = count()
        first = of_first_rank(trainer, fingerprints)

        def offset_of(index: int) -> int:
            """What a rank adds to the seed of one of its generators: nothing where it is to draw the others' numbers.

            Lightning gives each rank a share of what the sampler says on that rank, so samplers have to shuffle alike
            on all ranks, while augmentation should differ. Which generators are meant to agree shows in their states
            now.

            """
            return 0 if fingerprints[index : index + 1] == first[index : index + 1] else trainer.global_rank

        try:
            batches = copied.draw(num_batches, self._config.seed, offset_of)
        except Exception as error:
            cause = _said(error)
        else:
            cause = None if batches else "a copy of the training dataloader gives no batch"
        if any_rank(trainer, cause is not None):
            return cause or _ELSEWHERE
        self._fixed = [ProbeBatch(batch, index, False) for index, batch in enumerate(batches)]
        return None


_ELSEWHERE = "the training dataloader of another rank cannot be read a second time"


def _length_of(loader: "DataLoader[Any]") -> float:
    """How many batches a loader has; infinite where it does not know."""
    try:
        return len(loader)
    except TypeError:
        return math.inf


def _what_prevents_a_copy(loader: Any) -> str | None:
    """Why a copy of the loader would not do, as far as its type shows."""
    if not isinstance(loader, DataLoader):
        return f"the training data are a {type(loader).__name__}, of which only a single `DataLoader` can be read twice"
    if isinstance(loader.dataset, IterableDataset):
        # It may read from a stream, which gives each sample once: a copy would take them from the training.
        return f"an IterableDataset, {type(loader.dataset).__name__}, cannot be read a second time"
    return None


def _said(error: Exception) -> str:
    """The cause in one clause, from an error that the user's code or the copy has raised."""
    lines = str(error).strip().splitlines() or ["without a message"]
    # PyTorch puts "Caught KeyError in DataLoader worker process 0." and the traceback before what a worker has raised.
    said = lines[-1 if lines[0].startswith("Caught ") else 0].rstrip(".")
    kind = "" if isinstance(error, MeasurementError) else f"{type(error).__name__}: "
    return f"the training dataloader cannot be read a second time ({kind}{said})"
