"""Trainings whose edge of stability is gauged by their own steps, on shards of unequal size."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning import CurvatureProbe, HessianConfig
from tests.distributed.models import Smooth, observed, unequal_shards
from tests.distributed.ranks import check, check_on

Optimizers = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class Lookahead(torch.optim.SGD):
    """An optimizer of the user's own, of which no limit is known."""


class Stepped(Smooth):
    """The regression with an optimizer of one's choice."""

    def __init__(self, optimizer: Optimizers) -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


LR, MOMENTUM, BETAS, CLIP = 0.05, 0.9, (0.8, 0.95), 0.8

OPTIMIZERS: dict[str, Optimizers] = {
    "momentum": partial(torch.optim.SGD, lr=LR, momentum=MOMENTUM),
    "adamw": partial(torch.optim.AdamW, lr=LR, betas=BETAS, weight_decay=0.0),
    "unknown": partial(Lookahead, lr=LR, momentum=MOMENTUM),
}

CLIPPED: dict[str, Any] = {"gradient_clip_val": CLIP}
ACCUMULATED: dict[str, Any] = {"accumulate_grad_batches": 2}

GAUGED: dict[str, tuple[str, dict[str, Any]]] = {
    "momentum": ("momentum", CLIPPED),
    "adamw": ("adamw", {**CLIPPED, **ACCUMULATED}),
    "unknown": ("unknown", {**CLIPPED, **ACCUMULATED}),
}
"""The optimizer, and the settings of the Trainer."""

OF_THREE: dict[str, tuple[str, dict[str, Any]]] = {
    "momentum": ("momentum", ACCUMULATED),
    "adamw": ("adamw", CLIPPED),
    "unknown": ("unknown", {}),
}
"""The same on three ranks."""

STEP = HessianConfig("batch")

NUM_STEPS, EIGENVALUE_EVERY = 6, 3


def gauged(rank: int, optimizer: str, hessian: HessianConfig = STEP, **settings: Any) -> dict[str, Any]:
    """A few optimizer steps, each measured, the eigenvalue at every third of them."""
    probe = CurvatureProbe(1, tol=1e-10, eigenvalue_every=EIGENVALUE_EVERY, hessian=hessian)
    settings = {"max_steps": NUM_STEPS, "use_distributed_sampler": False, **settings}
    return observed(probe, unequal_shards(rank), Stepped(OPTIMIZERS[optimizer]), **settings)


@check
def gauges(rank: int) -> dict[str, Any]:
    found = {name: gauged(rank, optimizer, **settings) for name, (optimizer, settings) in GAUGED.items()}
    fixed = HessianConfig("fixed", num_batches=2)
    return {**found, "fixed": gauged(rank, "momentum", fixed, **CLIPPED)}


@check_on(3)
def gauges_of_three(rank: int) -> dict[str, Any]:
    return {name: gauged(rank, optimizer, **settings) for name, (optimizer, settings) in OF_THREE.items()}
