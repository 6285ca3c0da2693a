"""Trainings with callbacks that read, on shards of unequal size."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lyapunov_lightning import (
    CurvatureProbe,
    HessianConfig,
    LossAlongEigvecScanner,
    NegativeCurvatureTracker,
    SpectrumTracker,
    measure,
)
from tests.distributed.models import Smooth, final, fit, observed, regression, trainer_of, unequal_shards
from tests.distributed.ranks import check

ON_THE_STEP = HessianConfig("batch")

PROBES: dict[str, dict[str, Any]] = {
    "lanczos": {"end": "both", "tol": 1e-8},
    "power": {"end": "both", "tol": 1e-4},
    "lyapunov": {"end": "largest"},
}


@check
def probes(rank: int) -> dict[str, Any]:
    return {
        estimator: observed(
            CurvatureProbe(2, estimator, **options), unequal_shards(rank), use_distributed_sampler=False
        )
        for estimator, options in PROBES.items()
    }


@check
def tracker(rank: int) -> dict[str, Any]:
    estimates: dict[str, Any] = {"random_vectors": 4, "density_steps": 5, "groups": "layers"}
    callback = SpectrumTracker(2, 3, 2, hessian=ON_THE_STEP, tol=1e-8, **estimates)
    return observed(callback, unequal_shards(rank), use_distributed_sampler=False)


FROZEN_AT = 1


@check
def negative_tracker(rank: int) -> dict[str, Any]:
    callback = NegativeCurvatureTracker(2, 2, hessian=ON_THE_STEP, freeze_at=[FROZEN_AT], estimator="online", tol=1e-8)
    return observed(callback, unequal_shards(rank), use_distributed_sampler=False)


@check
def scanner(rank: int) -> dict[str, Any]:
    callback = LossAlongEigvecScanner(2, random=1, hessian=ON_THE_STEP, tol=1e-8, units="norm")
    return observed(callback, unequal_shards(rank), use_distributed_sampler=False)


# Weights.


class Padded(Smooth):
    """Some samples of a batch are padding, so that its length does not tell how many the loss is the mean of."""

    def __init__(self, tells: bool) -> None:
        super().__init__()
        self.tells = tells

    def loss(self, batch: Any) -> Tensor:
        inputs, targets, is_sample = batch
        return nn.functional.mse_loss(self.net(inputs[is_sample]), targets[is_sample])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if self.tells:
            self.log("loss", loss, batch_size=num_real(batch))
        return loss


def num_real(batch: Any) -> int:
    """How many of the samples are not padding: 5 of 6 on the first rank, 2 of 6 on the other."""
    return int(batch[2].sum())


def padded(rank: int) -> DataLoader:
    is_sample = torch.arange(6).repeat(2) < [5, 2][rank]
    return DataLoader(TensorDataset(*regression(12, seed=rank).tensors, is_sample), 6)


@check
def weights(rank: int) -> dict[str, Any]:
    """Trainings in which the length of a batch is not its weight."""
    ways: dict[str, tuple[bool, Callable[[Any], int] | None]] = {
        "self.log": (True, None),
        "batch_size_fn": (False, num_real),
        "batch_size_fn before self.log": (True, lambda batch: 7 - num_real(batch)),
        "length": (False, None),
    }
    return {
        way: observed(
            CurvatureProbe(1, tol=1e-8, hessian=HessianConfig(batch_size_fn=function)),
            padded(rank),
            Padded(tells),
            use_distributed_sampler=False,
        )
        for way, (tells, function) in ways.items()
    }


# Steps with collectives of their own.


class Centred(Smooth):
    """Takes the mean of the inputs of all ranks off each rank's."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        mean = self.all_gather(inputs).flatten(0, 1).mean(0)
        return self.loss((inputs - mean, targets))


class Contrasting(Smooth):
    """Its loss on each rank is one of the outputs on all ranks, and so depends on their gradients, too."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        outputs = self.net(inputs)
        everyone = self.all_gather(outputs, sync_grads=True).flatten(0, 1)
        return contrast(outputs, everyone) + nn.functional.mse_loss(outputs, targets)


def contrast(own: Tensor, everyone: Tensor) -> Tensor:
    """How near some outputs are to all of them."""
    return torch.logsumexp(own @ everyone.T, dim=1).mean()


@check
def gathering(rank: int) -> dict[str, Any]:
    """Trainings whose step gathers from all ranks, with and without a probe."""
    loader = DataLoader(regression(6, seed=rank), 3)
    found = {}
    for kind in (Centred, Contrasting):
        probe = CurvatureProbe(1, end="both", tol=1e-8)
        with_probe = observed(probe, loader, kind(), use_distributed_sampler=False)
        module = kind()
        fit(module, loader, precision="64-true", use_distributed_sampler=False)
        found[kind.__name__] = {**with_probe, "without": final(module)}
    return found


ONE_SHOT_SAMPLES = 19
"""Five batches of four, the last one of three: the ranks have different numbers of batches and of samples."""


@check
def one_shot(rank: int) -> dict[str, Any]:
    """`measure` with a shuffled loader, whose batches the ranks share among them."""
    torch.manual_seed(rank)  # which the ranks do not have to agree on
    loader = DataLoader(regression(ONE_SHOT_SAMPLES), 4, shuffle=True)
    return vars(measure(Smooth(), loader, largest=2, smallest=1, density=True, lines=1, trainer=trainer_of()))
