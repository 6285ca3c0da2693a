"""A trainer for the tests of the probe."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback

from tests.callbacks.probing import Fit
from tests.modules import MemoryLogger, regression_loader


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    """Fits a module, by default for 12 steps with a `MemoryLogger`, and returns the trainer."""

    def run(module: pl.LightningModule, *callbacks: Callback, loader: Any = None, **options: Any) -> pl.Trainer:
        fit_options = {name: options.pop(name) for name in ("ckpt_path", "weights_only") if name in options}
        defaults = {
            "accelerator": "cpu",
            "max_steps": 12,
            "max_epochs": -1,
            "log_every_n_steps": 1,
            "logger": MemoryLogger(),
            "enable_checkpointing": any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        trainer = pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})
        trainer.fit(module, regression_loader() if loader is None else loader, **fit_options)
        return trainer

    pl.seed_everything(5, verbose=False)
    return run
