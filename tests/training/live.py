"""Watching a live Trainer: checks inside its steps, and a logger that remembers."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger


class InsideTheStep(Callback):
    """Runs a check where the package measures, in ``on_train_batch_start``, and keeps what it returned."""

    def __init__(self, check: Callable[..., Any]) -> None:
        self.check = check
        self.results: list[Any] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int):
        self.results.append(self.check(trainer, pl_module, batch, batch_idx))


class Experiment:
    """Counts whatever is called on it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.append(name)


class RememberingLogger(Logger):
    """Keeps every scalar with its step, in every process."""

    name = "remembering"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int, dict[str, float]]] = []
        self.experiment = Experiment()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.entries.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def steps_of(self, tag: str) -> list[int]:
        return [step for step, metrics in self.entries if tag in metrics]

    def values_of(self, tag: str) -> list[float]:
        return [metrics[tag] for _, metrics in self.entries if tag in metrics]
