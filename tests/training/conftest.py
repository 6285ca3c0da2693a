"""What the tests of the bridge share."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset

from tests.training.live import InsideTheStep, RememberingLogger
from tests.training_runs import train


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
        trainer = train(module, *callbacks, inside, loader=data, **{"default_root_dir": tmp_path, **settings})
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
