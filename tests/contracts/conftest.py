"""What the contracts share."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from tests.training_runs import train


@pytest.fixture
def fit(tmp_path):
    def run(
        module: pl.LightningModule, *callbacks: Callback, data: Any = None, ckpt_path: Any = None, **settings: Any
    ) -> pl.Trainer:
        settings = {"max_epochs": 1, "log_every_n_steps": 1, "default_root_dir": tmp_path, **settings}
        data = DataLoader(torch.randn(8, 2), 2) if data is None else data
        return train(module, *callbacks, loader=data, ckpt_path=ckpt_path, **settings)

    return run
