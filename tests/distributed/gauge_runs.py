"""Trainings whose edge of stability is gauged by their own steps, on shards of unequal size."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lyapunov_lightning import CurvatureProbe, HessianConfig
from lyapunov_lightning.callbacks import gauges as gauges_module
from lyapunov_lightning.callbacks.pending import PendingResult
from tests.distributed.models import (
    PlannedError,
    Saving,
    Smooth,
    failing_once,
    final,
    fit,
    observed,
    shared_folder,
    unequal_shards,
)
from tests.distributed.ranks import check, check_on

Optimizers = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class Lookahead(torch.optim.SGD):
    """An optimizer of the user's own, of which no limit is known."""


class Stepped(Smooth):
    """The regression with an optimizer of one's choice."""

    def __init__(self, optimizer: Optimizers) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.double()  # before a checkpoint is read, whose parameters would be rounded

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


LR, MOMENTUM, BETAS, CLIP = 0.05, 0.9, (0.8, 0.95), 0.8

OPTIMIZERS: dict[str, Optimizers] = {
    "momentum": partial(torch.optim.SGD, lr=LR, momentum=MOMENTUM),
    "adamw": partial(torch.optim.AdamW, lr=LR, betas=BETAS, weight_decay=0.0),
    "unknown": partial(Lookahead, lr=LR, momentum=MOMENTUM),
}

CLIPPED: dict[str, Any] = {"gradient_clip_val": CLIP}
ACCUMULATED: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 3, "limit_train_batches": 4}

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


def gauged(
    rank: int,
    optimizer: str,
    *beside: Callback,
    hessian: HessianConfig = STEP,
    eigenvalue_every: int = EIGENVALUE_EVERY,
    **settings: Any,
) -> dict[str, Any]:
    """A few optimizer steps, each measured."""
    tol = 1e-6 if optimizer != "unknown" else 0.5
    probe = CurvatureProbe(1, tol=tol, eigenvalue_every=eigenvalue_every, hessian=hessian)
    settings = {"max_epochs": 2, "limit_train_batches": 3, "use_distributed_sampler": False, **settings}
    return observed(probe, unequal_shards(rank), Stepped(OPTIMIZERS[optimizer]), *beside, **settings)


@check
def gauges(rank: int) -> dict[str, Any]:
    """Trainings, and how those go on that are interrupted after an epoch."""
    folder, found = shared_folder(), {}
    for name, (optimizer, settings) in GAUGED.items():
        path = folder / f"{name}.ckpt"
        found[name] = gauged(rank, optimizer, Saving(path), **settings)
        if name in RESUMED:
            found[f"{name}, resumed"] = gauged(rank, optimizer, ckpt_path=path, **settings)
            found[f"{name}, kept"] = kept_in(path)
    fixed = HessianConfig("fixed", num_batches=2)
    return {**found, "fixed": gauged(rank, "momentum", hessian=fixed, **CLIPPED)}


RESUMED = ("momentum", "unknown")


def kept_in(path: Path) -> dict[str, Any]:
    """What the probe has put into a checkpoint."""
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    [state] = [state for key, state in checkpoint["callbacks"].items() if "CurvatureProbe" in key]
    return dict(state)


@check_on(3)
def gauges_of_three(rank: int) -> dict[str, Any]:
    return {name: gauged(rank, optimizer, **settings) for name, (optimizer, settings) in OF_THREE.items()}


@check_on(1)
def gauges_of_one(rank: int) -> dict[str, Any]:
    """A training of a single process, without and with an interruption after its first epoch."""
    path = shared_folder() / "saved.ckpt"
    optimizer, settings = OF_ONE
    straight = gauged(rank, optimizer, Saving(path), strategy="auto", **settings)
    resumed = gauged(rank, optimizer, strategy="auto", ckpt_path=path, **settings)
    return {"straight": straight, "resumed": resumed, "kept": kept_in(path)}


OF_ONE: tuple[str, dict[str, Any]] = ("adamw", CLIPPED)


# What goes wrong.

FAILING_STEP = 2

EVALUATIONS = {"momentum": {"batch": 1, "other batch": 2}, "unknown": {"batch": 1, "after the step": 3}}
"""Which evaluation of the loss fails at that step, by the optimizer and what is evaluated."""

CALLS: dict[str, tuple[Any, str, int]] = {
    "after all sums": (gauges_module, "_limit", FAILING_STEP),
    "before clipping": (PendingResult, "norm_of_gradient", 2 * FAILING_STEP),
    "after clipping": (PendingResult, "norm_of_gradient", 2 * FAILING_STEP + 1),
}
"""Functions that fail by themselves, and in which call."""


def failing_loss(rank: int, evaluation: int) -> Callable[[Any, Any], Tensor]:
    """A loss that fails on the last rank at one step, from one of its evaluations on."""
    evaluations = count(1)

    def loss_fn(module: Any, batch: Any) -> Tensor:
        if module.trainer.global_step == FAILING_STEP and next(evaluations) >= evaluation and rank == 1:
            raise PlannedError("planned")
        return module.loss(batch)

    return loss_fn


@check
def failing_gauges(rank: int) -> dict[str, Any]:
    """Trainings in which the last rank once fails to gauge the step."""

    found: dict[str, Any] = {}
    for optimizer, evaluations in EVALUATIONS.items():
        for what, evaluation in evaluations.items():
            config = HessianConfig("batch", loss_fn=failing_loss(rank, evaluation))
            found[f"{optimizer}, {what}"] = gauged(rank, optimizer, hessian=config, eigenvalue_every=9, **SHORT)
        module = Stepped(OPTIMIZERS[optimizer])
        fit(module, unequal_shards(rank), precision="64-true", use_distributed_sampler=False, **SHORT)
        found[f"{optimizer}, without"] = final(module)
    for what, (place, name, call) in CALLS.items():
        with failing_once(place, name, rank == 1, call):
            found[f"momentum, {what}"] = gauged(rank, "momentum", eigenvalue_every=9, **SHORT)
    return found


SHORT = {**CLIPPED, "max_epochs": 1, "limit_train_batches": 4}
