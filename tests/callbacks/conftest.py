"""A trainer for the tests of the probe."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback

from tests.callbacks.probing import Fit
from tests.modules import MemoryLogger
from tests.training_runs import train


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    """Fits a module, by default for 12 steps with a `MemoryLogger`, and returns the trainer."""

    def run(module: pl.LightningModule, *callbacks: Callback, loader: Any = None, **options: Any) -> pl.Trainer:
        defaults = {"max_steps": 12, "log_every_n_steps": 1, "logger": MemoryLogger(), "default_root_dir": tmp_path}
        return train(module, *callbacks, loader=loader, **{**defaults, "max_epochs": -1, **options})

    pl.seed_everything(5, verbose=False)
    return run
