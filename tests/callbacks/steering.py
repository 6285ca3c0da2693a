"""What the tests of the learning rate controller share: small trainings with all that they log."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from tests.callbacks.identity import Outcome, assert_identical
from tests.modules import MemoryLogger, SmallRegressor
from tests.training_runs import train

RULES = ("batch_sharpness", "along_update", "inverse_sharpness")

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5),
}


def fit(
    callbacks: Callback | Sequence[Callback],
    module: pl.LightningModule | None = None,
    loader: Any = None,
    *,
    steps: int = 12,
    **options: Any,
) -> tuple[pl.Trainer, MemoryLogger]:
    """Train a small module; the trainer, and all that was logged."""
    logger = MemoryLogger()
    callbacks = [callbacks] if isinstance(callbacks, Callback) else callbacks
    settings = {"max_steps": steps, "max_epochs": -1, "logger": logger, **options}
    trainer = train(SmallRegressor() if module is None else module, *callbacks, loader=loader, **settings)
    return trainer, logger


def assert_identical_but_for_writes(expected: Outcome, actual: Outcome) -> None:
    """The same run, but for the count of writes to the parameters: they are put back and forth."""
    assert_identical(expected, dataclasses.replace(actual, versions=expected.versions))


def seeded(**options: Any) -> SmallRegressor:
    torch.manual_seed(3)
    return SmallRegressor(**options)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])
