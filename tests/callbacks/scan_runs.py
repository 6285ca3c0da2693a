"""Runs with a LossAlongEigvecScanner, and what it found in them."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lyapunov_lightning import HessianConfig, LossAlongEigvecScanner, Schedule
from tests.modules import MemoryLogger, SmallRegressor, regression_loader
from tests.training_runs import train


def fit(tmp_path: Path, *callbacks: Callback, module: Any = None, **options: Any) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    settings = {
        "max_epochs": 2,
        "logger": MemoryLogger(),
        "log_every_n_steps": 1,
        "default_root_dir": tmp_path,
        **options,
    }
    loader = settings.pop("loader", None) or regression_loader(batch_size=16)
    return train(module or SmallRegressor(), *callbacks, loader=loader, **settings)


def every_step(loss_fn: Any = None, **options: Any) -> LossAlongEigvecScanner:
    """A scanner of the whole training set, of which a reference is easily computed."""
    hessian = HessianConfig(fraction=1.0, loss_fn=loss_fn)
    defaults = {
        "schedule": Schedule(every_n_steps=1),
        "tol": 1e-7,
        "hessian": hessian,
        "points": 3,
        "sgd_steps": (1.0,),
    }
    return LossAlongEigvecScanner(**{**defaults, **options})


def curve(scanner: LossAlongEigvecScanner, tag: str) -> dict[int, float]:
    """What was logged or written to the table under one tag, by step."""
    found = {result.step: {**result.scalars(), **result.table()} for result in scanner.results}
    return {step: values[tag] for step, values in found.items() if tag in values}


def tags(scanner: LossAlongEigvecScanner) -> set[str]:
    return {tag for result in scanner.results for tag in (*result.scalars(), *result.table())}


class Saddle(pl.LightningModule):
    """A loss that falls for ever along one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([0.5, -0.25, 0.1], dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (torch.tensor([4.0, 1.0, -2.0], dtype=torch.float64) * self.x.square()).sum() / 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)
