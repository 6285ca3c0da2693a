"""What the tests of the measured data share: datasets that tell what is drawn, and a stand-in of a Trainer."""

import functools
import math
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lyapunov_lightning.training.config import HessianConfig
from lyapunov_lightning.training.data.batches import ProbeData
from lyapunov_lightning.training.replica.objective import ProbeBatch


class Numbered(Dataset):
    """Samples that tell their own position, augmented with every kind of global random number."""

    def __init__(self, size: int, augmented: bool = False) -> None:
        self.size = size
        self.augmented = augmented

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        noise = [float(torch.rand(())), np.random.rand(), random.random()] if self.augmented else [0.0, 0.0, 0.0]
        return torch.tensor([float(index), *noise])


calls_of_all: list[int] = []


class Scaled(DataLoader):
    """Works on the batches on their way."""

    passed = 0

    def __iter__(self) -> Iterator[Tensor]:
        for batch in super().__iter__():
            self.passed += 1
            yield batch * 100


class ItsOwnIterator(DataLoader):
    """A loader that keeps the iterator that is under way."""

    def __iter__(self) -> "ItsOwnIterator":
        self.inner = super().__iter__()
        return self

    def __next__(self) -> Tensor:
        return next(self.inner)


class Restless(Numbered):
    """Keeps state of every kind, and tells it with the samples."""

    total = 0

    def __init__(self, size: int) -> None:
        super().__init__(size, augmented=True)
        self.numpy = np.random.default_rng(1)
        self.legacy = np.random.RandomState(2)
        self.python = random.Random(3)
        self.torch = torch.Generator().manual_seed(4)
        self.count = 0
        self.cache: dict[int, int] = {}
        self.written = np.zeros(size)
        self.marked = torch.zeros(size)

    def __getitem__(self, index: int) -> Tensor:
        self.count += 1
        Restless.total += 1
        calls_of_all.append(index)
        self.cache[index] = self.cache.get(index, 0) + 1
        self.written[index] += 1
        self.marked[index] += 1
        own = [self.numpy.normal(), self.legacy.normal(), self.python.random()]
        own += [float(torch.rand((), generator=self.torch)), remembered(index), self.looked_up(index)]
        kept = [
            self.count,
            Restless.total,
            len(calls_of_all),
            self.cache[index],
            self.written[index],
            self.marked[index],
        ]
        return torch.cat([super().__getitem__(index), torch.tensor([*own, *map(float, kept)])])

    @property
    def calls(self) -> int:
        return self.count

    @functools.cached_property
    def first(self) -> int:
        return self.calls

    @classmethod
    def of_all(cls) -> int:
        return cls.total

    @staticmethod
    def of_module() -> int:
        return len(calls_of_all)

    @functools.lru_cache  # noqa: B019
    def looked_up(self, index: int) -> float:
        Restless.total += 1
        return float(index)


@functools.lru_cache
def remembered(index: int) -> float:
    calls_of_all.append(-index)
    return float(index)


def reset() -> None:
    """All that `Restless` keeps outside of its instances."""
    Restless.total = 0
    calls_of_all.clear()
    remembered.cache_clear()
    Restless.looked_up.cache_clear()


def trainer_of(loader: Any, rank: int = 0) -> Any:
    """As much of a Trainer as the choice of data looks at."""
    try:
        epoch: float = len(loader)
    except TypeError:
        epoch = math.inf
    return SimpleNamespace(train_dataloader=loader, num_training_batches=epoch, global_rank=rank, world_size=1)


def started(trainer: Any, **settings: Any) -> tuple[ProbeData, str | None]:
    data = ProbeData(HessianConfig("fixed", **settings).filled(data="fixed", fraction=0.05, mode="train"))
    return data, data.start("Owner", trainer)


def drawn(loader: Any, rank: int = 0, **settings: Any) -> list[Any]:
    """The fixed batches of a loader that can be drawn from."""
    data, note = started(trainer_of(loader, rank), **settings)
    assert note is None, note
    probes = data.batches()
    assert all(isinstance(probe, ProbeBatch) and not probe.is_transferred for probe in probes)
    assert [probe.batch_idx for probe in probes] == list(range(len(probes)))
    return [probe.batch for probe in probes]


def cause(loader: Any, **settings: Any) -> str:
    """Why batches of a loader are kept as they pass."""
    data, note = started(trainer_of(loader), **settings)
    assert note is not None
    assert data.batches() is None
    return note


def positions(batches: Any) -> list[int]:
    return [int(sample[0]) for batch in batches for sample in batch]


def first_batches(loader: DataLoader, count: int) -> list[Any]:
    return [batch for batch, _ in zip(loader, range(count), strict=False)]
