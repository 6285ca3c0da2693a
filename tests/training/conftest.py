"""What the tests of the bridge share: checks that run inside a live Trainer, and a logger that remembers."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader, TensorDataset


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


@pytest.fixture
def remembering_logger() -> RememberingLogger:
    return RememberingLogger()


@pytest.fixture
def fit(tmp_path):
    """Fits a module with a check in every step; returns the trainer and what the check returned, step by step."""

    def run(
        module: pl.LightningModule,
        data: Any,
        check: Callable[..., Any] = lambda *args: None,
        *,
        callbacks: tuple[Callback, ...] = (),
        **settings: Any,
    ) -> tuple[pl.Trainer, list[Any]]:
        inside = InsideTheStep(check)
        settings = {
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": tmp_path,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "logger": False,
            "max_epochs": -1 if "max_steps" in settings else 1,
            **settings,
        }
        trainer = pl.Trainer(callbacks=[*callbacks, inside], **settings)
        trainer.fit(module, data)
        return trainer, inside.results

    return run


@pytest.fixture
def loader():
    """A dataloader of random numbers: `num_samples` inputs of a shape, and targets of another."""

    def build(num_samples: int = 12, inputs: Any = (4,), targets: Any = (3,), batch_size: int = 4, **kwargs: Any):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(num_samples, *inputs, generator=generator)
        y = torch.randn(num_samples, *targets, generator=generator)
        return DataLoader(TensorDataset(x, y), batch_size, **kwargs)

    return build
