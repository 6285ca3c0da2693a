"""The same training without and with all reading callbacks, of a module that keeps state wherever it can."""

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lyapunov_lightning import (
    CurvatureProbe,
    HessianConfig,
    LossAlongEigvecScanner,
    NegativeCurvatureTracker,
    NudgedSGDHook,
    Schedule,
    SpectrumTracker,
)
from tests.distributed.models import final, fit, is_own, own_entries, strategy
from tests.distributed.ranks import check, drawing
from tests.training.live import RememberingLogger

losses_of_all: list[Tensor] = []


def counter() -> Callable[[], int]:
    """A function whose state is in its closure."""
    count = 0

    def next_number() -> int:
        nonlocal count
        count += 1
        return count

    return next_number


class Swing:
    """A weight that goes up and down, with a generator of random numbers and a cycle of its own."""

    def __init__(self) -> None:
        self.noise = np.random.default_rng(3)
        self.cycle = iter([1.0, 1.1, 0.9] * 100)
        self.past: dict[int, float] = {}

    def weight(self, number: int) -> float:
        self.past[number] = next(self.cycle) + 0.01 * float(self.noise.normal())
        return self.past[number]


class Busy(pl.LightningModule):
    """BatchNorm, dropout, metrics and numbers that are synchronised, logging, and state of every kind."""

    steps = 0

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Dropout(0.3), nn.Linear(6, 3))
        self.accuracy = MulticlassAccuracy(3)
        self.synced = MeanMetric(dist_sync_on_step=True)
        self.order: list[Tensor] = []
        self.average = torch.zeros(())
        self.unused = nn.Parameter(torch.ones(2))
        self.count = counter()
        self.swing = Swing()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels, indices = batch
        type(self).steps += 1
        logits = self.net(inputs + 0.1 * torch.randn_like(inputs))
        loss = nn.functional.cross_entropy(logits, labels) * self.swing.weight(self.count())
        mean = self.all_gather(loss.detach()).mean()
        self.average.mul_(0.9).add_(0.1 * mean)
        self.accuracy(logits, labels)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("synced", self.synced(loss.detach()), on_step=True)
        losses_of_all.append(loss.detach())
        self.order.append(indices)
        return loss + 0.1 * self.average * logits.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


class Unknown(torch.optim.SGD):
    """An optimizer of the user's own, of which no limit is known."""


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "fp32": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "static-graph": partial(torch.optim.AdamW, lr=0.03),
    "bf16-accumulate-4": partial(Unknown, lr=0.1, momentum=0.9, weight_decay=1e-3),
}


def classification() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(88, 4, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(1), torch.arange(88))


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp32": ({"find_unused_parameters": True}, {"precision": "32-true", "max_steps": 10}),
    "static-graph": ({"static_graph": True}, {"precision": "32-true", "max_steps": 6}),
    "bf16-accumulate-4": (
        {"find_unused_parameters": True},
        {"precision": "bf16-mixed", "accumulate_grad_batches": 4, "max_steps": 6},
    ),
}
"""The options of the strategy, and those of the Trainer."""


def trained(name: str, *callbacks: Callback) -> dict[str, Any]:
    """Everything that a callback which reads must leave alone."""
    options, settings = SETTINGS[name]
    pl.seed_everything(11, verbose=False)
    Busy.steps = 0
    losses_of_all.clear()
    logger, module = RememberingLogger(), Busy(OPTIMIZERS[name])
    loader = DataLoader(classification(), 8, shuffle=True)
    settings = {"strategy": strategy(**options), "gradient_clip_val": 0.5, **settings}
    trainer = fit(module, loader, *callbacks, logger=logger, **settings)
    return {
        "measurements": len(own_entries(logger)),
        "parameters": final(module),
        "gradients": [parameter.grad for parameter in module.parameters()],
        "buffers": dict(module.named_buffers()),
        "optimizer": trainer.optimizers[0].state_dict(),
        "logged": [
            (step, {tag: value for tag, value in metrics.items() if not is_own(tag)})
            for step, metrics in logger.entries
            if not any(map(is_own, metrics))
        ],
        "callback metrics": {tag: v for tag, v in trainer.callback_metrics.items() if not is_own(tag)},
        "metrics": [module.accuracy.metric_state, module.synced.metric_state],
        "losses": list(losses_of_all),
        "hidden state": hidden_state(module),
        "generators": (torch.rand(2), torch.tensor([random.random(), np.random.rand()])),
        "steps": trainer.global_step,
    }


def hidden_state(module: Busy) -> list[Any]:
    """What the module keeps outside of parameters and buffers."""
    swing = module.swing
    noise, cycle = swing.noise.normal(size=2).tolist(), [next(swing.cycle) for _ in range(3)]
    return [Busy.steps, module.count(), module.order, module.average, swing.past, noise, cycle]


def reading_callbacks(settings: str) -> Iterator[Callback]:
    """All that reads, and a nudge that changes nothing, on all kinds of data."""
    one = HessianConfig(num_batches=1)
    yield CurvatureProbe(1, end="both", tol=0.3, eigenvalue_every=3)
    yield CurvatureProbe(3, "lyapunov", hessian=HessianConfig("fixed", fraction=0.2, mode="eval"))
    yield CurvatureProbe(4, "power", tol=0.3, log_prefix="second")
    yield SpectrumTracker(8, 1, 1, hessian=one, tol=0.3, random_vectors=2, groups="modules")
    yield SpectrumTracker(5, 1, estimator="benettin", log_prefix="third")
    yield NegativeCurvatureTracker(9, 1, hessian=one, tol=0.3, freeze_at=[2], estimator="online", log_prefix="fourth")
    if settings == "fp32":  # the others' optimizers are not for nudges
        yield NudgedSGDHook(9, 1, gamma=1.0, hessian=one, tol=0.3)
    scanned = Schedule(at_steps=[5])
    yield LossAlongEigvecScanner(
        schedule=scanned, largest=0, hessian=one, tol=0.3, scales=[1.0], points=3, sgd_steps=[1.0], log_prefix="fifth"
    )


@check
def identity(rank: int) -> dict[str, Any]:
    found = {}
    for name in SETTINGS:
        with drawing() if name == "static-graph" else nullcontext():
            found[name] = {"without": trained(name), "with": trained(name, *reading_callbacks(name))}
    return found
