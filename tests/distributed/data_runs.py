"""Trainings whose curvature is measured on fixed data, and one in which these cannot be drawn on one rank."""

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lyapunov_lightning import CurvatureProbe, HessianConfig
from lyapunov_lightning.training.data.kept_batches import kept_batches
from lyapunov_lightning.training.replica.objective import ProbeBatch
from tests.distributed.models import PlannedError, Smooth, fit, observed, regression
from tests.distributed.ranks import check

NUM_SAMPLES, BATCH = 21, 2

FRACTIONS = {"one-batch": 1 / 6, "half": 0.5, "all": 1.0}
"""Of the six batches that each rank gets of the data."""


def probe(every_n_steps: int = 2, **settings: Any) -> CurvatureProbe:
    return CurvatureProbe(every_n_steps, end="both", tol=1e-8, hessian=HessianConfig("fixed", **settings))


@check
def sampled(rank: int) -> dict[str, Any]:
    """The fixed data are drawn by the sampler that Lightning gives to a distributed training."""
    loader = DataLoader(regression(NUM_SAMPLES), BATCH, shuffle=True)
    return {name: observed(probe(fraction=share, seed=5), loader, max_steps=3) for name, share in FRACTIONS.items()}


RAGGED = {"equal counts": ([12, 9], [5, 3]), "unequal counts": ([15, 4], [5, 2])}
"""The number of samples of each rank, and its batch size."""


@check
def ragged(rank: int) -> dict[str, Any]:
    """The fixed data of each rank are a whole epoch of its own data."""
    found = {}
    for name, (samples, sizes) in RAGGED.items():
        loader = DataLoader(regression(samples[rank], seed=rank), sizes[rank])
        found[name] = observed(probe(1, fraction=1.0), loader, max_steps=2, use_distributed_sampler=False)
    return found


class Breakable(Dataset):
    """A dataset that fails while it is told to."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data
        self.is_broken = True

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        if self.is_broken:
            raise PlannedError("planned")
        return self.data[index]


class Stream(IterableDataset):
    """Samples one after the other, of a known number."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return iter(self.data[index] for index in range(len(self.data)))

    def __len__(self) -> int:
        return len(self.data)


class Mended(Smooth):
    """Its dataset is broken until the first batch is to be trained on, so the fixed data cannot be drawn from it."""

    def on_train_epoch_start(self) -> None:
        self.trainer.train_dataloader.dataset.is_broken = False


@check
def not_drawn(rank: int) -> dict[str, Any]:
    """Trainings in which one rank cannot draw the fixed data: its dataset fails, or cannot be copied at all."""
    data = regression(16, seed=rank)
    datasets = {
        "broken on the last": (data, Breakable(data)),
        "broken on the first": (Breakable(data), data),
        "a stream on the last": (data, Stream(data)),
    }
    found = {}
    for name, kinds in datasets.items():
        module = Mended() if isinstance(kinds[rank], Breakable) else Smooth()
        loader = DataLoader(kinds[rank], 4)
        settings = {"max_steps": 4, "use_distributed_sampler": False}
        found[name] = observed(probe(1, num_batches=2), loader, module, **settings)
    module = Smooth()
    fit(module, DataLoader(data, 4), precision="64-true", **settings)
    found["without"] = module.state_dict()
    return found


@check
def kept(rank: int) -> Any:
    """What a checkpoint is to have of batches of which each rank has its own."""
    return kept_batches([ProbeBatch((torch.ones(2), rank), 0, True)])
