"""Which data the curvature is measured on.

Either the batch of the present step, or fixed batches that are the same throughout the training, so that only the
parameters change between two measurements.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.training.config import HessianConfig
from lyapunov_lightning.training.data.loaders import LoaderCopy, seeded
from lyapunov_lightning.training.distributed import any_rank, of_first_rank
from lyapunov_lightning.training.lightning_names import MisconfigurationException
from lyapunov_lightning.training.replica.copier import Copier
from lyapunov_lightning.training.replica.objective import ProbeBatch


class StartPosition:
    """Where the training dataloader began, so that a resumed run draws the batches that the first one drew.

    Attributes:
        value: What a loader that can be resumed said before the first step; None for any other.

    """

    def __init__(self) -> None:
        self.value: Any = None

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.value = state["value"]


class ProbeData:
    """The batches of a measurement.

    Fixed batches are the first ones that the training dataloader gives in an epoch, by its own sampler, ``collate_fn``
    and ``__iter__``, with generators of random numbers that are seeded from the configuration; so they are the same in
    every run, also in one that is resumed. They are drawn before the first step from a copy of the dataloader, each
    rank's share by that rank. Where that is not possible without touching the training, each rank keeps its first
    training batches as they pass, and measurements begin once they are complete.

    Args:
        config: Says whether the batches are fixed, and if so how many they are.

    """

    def __init__(self, config: HessianConfig) -> None:
        self._config = config
        self._fixed: list[ProbeBatch] | None = None
        self._passing: list[ProbeBatch] = []
        self._num_to_keep = 0
        self._failure: Exception | None = None

    def start(self, owner: str, trainer: Any, position: StartPosition | None = None) -> str | None:
        """Draw the fixed batches, once the dataloaders are set up; all ranks together.

        Args:
            owner: The class that messages name.
            trainer: The trainer.
            position: Where the dataloader began in the run that this one resumes; is filled in a run that is none.

        Returns:
            A sentence for the log if the first batches of the training are kept instead, else None.

        Raises:
            MisconfigurationException: If a fraction of data without a known length is asked for.

        """
        self._fixed, self._passing, self._num_to_keep, self._failure = None, [], 0, None
        if self._config.data == "batch":
            return None
        num_batches = self._num_batches(owner, trainer)
        cause = self._draw(trainer, num_batches, StartPosition() if position is None else position)
        if cause is None:
            return None
        # Ranks with different numbers of batches would begin to measure at different steps.
        self._num_to_keep = of_first_rank(trainer, num_batches)
        kept = "first batch" if self._num_to_keep == 1 else f"first {self._num_to_keep} batches"
        return f"The fixed data of `{owner}` are the {kept} of this training, kept on the way, since {cause}."

    def observe(self, batch: Any, batch_idx: int) -> None:
        """Let a training batch pass; to be called before every step."""
        if self._num_to_keep == 0:
            return
        try:
            self._passing.append(ProbeBatch(Copier()(batch), batch_idx, True))
        except Exception as error:  # ends the measurements that ask for the batches, and not the training
            self._failure, self._num_to_keep = error, 0
            return
        self._num_to_keep -= 1
        if self._num_to_keep == 0:
            self._fixed, self._passing = self._passing, []

    def batches(self, batch: Any, batch_idx: int) -> list[ProbeBatch] | None:
        """This rank's batches for a measurement at the present step, or None while they are not complete.

        Raises:
            MeasurementError: If a batch that was to be kept could not be copied.

        """
        if self._config.data == "batch":  # copied, since a measurement may end after the step, which may write to it
            return [ProbeBatch(Copier()(batch), batch_idx, True)]
        if self._failure is not None:
            raise MeasurementError(f"A training batch cannot be copied, and so not be kept: {self._failure}")
        return self._fixed

    @contextmanager
    def randomness(self, rank: int) -> Iterator[None]:
        """The random numbers of a measurement: the same every time for fixed batches, else those of the moment.

        With dropout masks and augmentation that stay, only the parameters differ between two measurements.

        """
        if self._config.data == "batch":
            yield
            return
        with seeded(self._config.seed + rank):
            yield

    def _num_batches(self, owner: str, trainer: Any) -> int:
        epoch = trainer.num_training_batches
        if self._config.num_batches is not None:
            return int(min(self._config.num_batches, epoch))
        if any_rank(trainer, math.isinf(epoch)):
            raise MisconfigurationException(
                f"`{owner}` cannot take a fraction of training data without a length as its fixed data. Pass"
                " `HessianConfig(num_batches=...)`, or give the training dataloader a length."
            )
        assert self._config.fraction is not None  # see `HessianConfig.filled`
        return max(1, math.ceil(round(self._config.fraction * int(epoch), 6)))  # 0.07 * 100 is more than 7

    def _draw(self, trainer: Any, num_batches: int, position: StartPosition) -> str | None:
        """Draw from a copy of the training dataloader; returns what is against that, if on one rank only."""
        loader = trainer.train_dataloader
        cause = _what_prevents_a_copy(loader)
        # Whatever a user's dataloader raises, the training can still be measured on batches that it gets.
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
        first = of_first_rank(trainer, fingerprints)

        def offset_of(index: int) -> int:
            """Ranks whose samplers have to agree have generators in the same state."""
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


_ELSEWHERE = "the training dataloader of another rank cannot be read beside the training"


def _what_prevents_a_copy(loader: Any) -> str | None:
    if not isinstance(loader, DataLoader):
        return f"the training data are a {type(loader).__name__}, of which only a single `DataLoader` can be read twice"
    if isinstance(loader.dataset, IterableDataset):
        return f"an IterableDataset, {type(loader.dataset).__name__}, cannot be read beside the training"
    return None


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["without a message"]
    said = lines[-1 if lines[0].startswith("Caught ") else 0].rstrip(".")  # what a worker raised is at the end
    kind = "" if isinstance(error, MeasurementError) else f"{type(error).__name__}: "
    return f"the training dataloader cannot be read beside the training ({kind}{said})"
