"""What the contracts share."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader


@pytest.fixture
def fit(tmp_path):
    def run(
        module: pl.LightningModule, *callbacks: Callback, data: Any = None, ckpt_path: Any = None, **settings: Any
    ) -> pl.Trainer:
        settings = {
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": tmp_path,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "logger": False,
            "max_epochs": 1,
            "log_every_n_steps": 1,
            **settings,
        }
        trainer = pl.Trainer(callbacks=list(callbacks), **settings)
        trainer.fit(module, DataLoader(torch.randn(8, 2), 2) if data is None else data, ckpt_path=ckpt_path)
        return trainer

    return run
