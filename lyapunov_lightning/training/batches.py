"""Which data the curvature is measured on.

Either the batch of the present step, or a fixed set of batches that is the same throughout the training, so that only
the parameters change between two measurements. The training dataloader is never iterated: that would draw from the
global random generators and reset its workers.
"""

import math
import random
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Optional

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lyapunov_lightning.curvature.randomness import preserved_randomness
from lyapunov_lightning.training.objective import ProbeBatch

Data = Literal["batch", "fixed"]


class ProbeData:
    """The batches of a measurement.

    A fixed set is drawn from the training dataset without replacement, uniformly and independently of the training
    dataloader's sampler, and is the same in every run with the same `seed`. Each process of a distributed run takes its
    share of it. Where the dataset has no length or cannot be indexed, the first `num_batches` training batches are kept
    as they pass, and measurements begin once they are complete.

    Args:
        data: ``"batch"`` for the step's own batch, ``"fixed"`` for a fixed set.
        num_batches: Size of the fixed set in batches of the training dataloader's size, for each process.
        fraction: Size of the fixed set as a share of the training dataset, if `num_batches` is not given.
        seed: Seed of the choice of samples, and of the augmentation that they go through.

    Raises:
        ValueError: If an argument is out of its range.

    """

    def __init__(
        self, data: Data = "batch", *, num_batches: Optional[int] = None, fraction: float = 0.05, seed: int = 0
    ) -> None:
        if data not in ("batch", "fixed"):
            raise ValueError(f"`data` should be 'batch' or 'fixed', got {data!r}.")
        if num_batches is not None and (type(num_batches) is not int or num_batches < 1):
            raise ValueError(f"`num_batches` should be a positive int, got {num_batches}.")
        if not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise ValueError(f"`fraction` should be in (0, 1], got {fraction}.")
        self._data = data
        self._num_batches = num_batches
        self._fraction = fraction
        self._seed = seed
        self._passing: list[ProbeBatch] = []
        self._fixed: Optional[list[ProbeBatch]] = None

    @property
    def key(self) -> Hashable:
        """Equal for sources of the same batches."""
        if self._data == "batch":
            return ("batch",)
        size = self._fraction if self._num_batches is None else self._num_batches
        return ("fixed", self._num_batches is None, size, self._seed)

    def check(self, owner: str, trainer: "pl.Trainer") -> None:
        """Refuse a fixed set that cannot be had, once the dataloaders are known.

        Raises:
            MisconfigurationException: With the cause and the remedy.

        """
        if self._data == "fixed" and self._num_batches is None and not _can_be_sampled(trainer.train_dataloader):
            raise MisconfigurationException(
                f"`{owner}(data='fixed')` cannot take a fraction of a training dataset without length and indices."
                " Pass `num_batches`: the first batches of the training are then kept and used."
            )

    def observe(self, trainer: "pl.Trainer", batch: Any, batch_idx: int) -> None:
        """Let a training batch pass; called at every step."""
        if self._data == "fixed" and self._fixed is None and not _can_be_sampled(trainer.train_dataloader):
            assert self._num_batches is not None  # by `check`
            self._passing.append(ProbeBatch(apply_to_collection(batch, Tensor, torch.clone), batch_idx, True))
            if len(self._passing) == self._num_batches:
                self._fixed, self._passing = self._passing, []

    def batches(self, trainer: "pl.Trainer", batch: Any, batch_idx: int) -> Optional[list[ProbeBatch]]:
        """This process's batches for a measurement at the present step, or None while the set is not complete."""
        if self._data == "batch":
            return [ProbeBatch(apply_to_collection(batch, Tensor, torch.clone), batch_idx, True)]
        loader = trainer.train_dataloader
        if self._fixed is None and _can_be_sampled(loader):
            self._fixed = self._draw(loader, trainer.global_rank, trainer.world_size)
        return self._fixed

    @contextmanager
    def randomness(self, rank: int) -> Iterator[None]:
        """The random numbers of a measurement: the same every time for a fixed set, those of the moment for a batch.

        With dropout masks and augmentation that stay, only the parameters differ between two measurements.

        """
        if self._data == "batch":
            yield
            return
        with preserved_randomness():
            torch.manual_seed(self._seed + rank)
            random.seed(self._seed + rank)
            np.random.seed((self._seed + rank) % 2**32)
            yield

    def _draw(self, loader: Any, rank: int, world_size: int) -> list[ProbeBatch]:
        dataset = loader.dataset
        batch_size: int = loader.batch_size or loader.batch_sampler.batch_size
        if self._num_batches is None:
            num_samples = math.ceil(self._fraction * len(dataset))
        else:
            num_samples = min(self._num_batches * batch_size * world_size, len(dataset))
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self._seed))
        share = order[:num_samples][rank::world_size].tolist()
        batches = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
        if len(batches) > 1 and len(batches[-1]) == 1:  # BatchNorm refuses a batch of one sample
            batches[-2:] = [batches[-2] + batches[-1]]
        with self.randomness(rank):
            fresh = DataLoader(
                dataset,
                batch_sampler=batches,
                collate_fn=loader.collate_fn,
                generator=torch.Generator().manual_seed(self._seed),
            )
            return [ProbeBatch(batch, index, False) for index, batch in enumerate(fresh)]


def _can_be_sampled(loader: Any) -> bool:
    """Whether samples of the dataset can be fetched by index and collated in the loader's way."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    has_batch_size = loader.batch_size is not None or isinstance(getattr(loader.batch_sampler, "batch_size", None), int)
    return has_batch_size and hasattr(loader.dataset, "__len__")
