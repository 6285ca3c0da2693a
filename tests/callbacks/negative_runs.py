"""Runs with a NegativeCurvatureTracker, and what they should find, computed densely beside them."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lyapunov_lightning import HessianConfig, NegativeCurvatureTracker, Schedule
from tests.modules import MemoryLogger, SmallRegressor, Watcher, dense_hessian, regression_data, regression_loader
from tests.training_runs import train

EVERY_STEP = Schedule(every_n_steps=1)
WHOLE = HessianConfig(fraction=1.0)


def flat_parameters(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


class Dense(Watcher):
    """The parameters, the dense Hessian and the gradient of the whole training set before every step.

    Beside it the parameters after each step as the optimizer leaves them, if it goes before the tracker.
    """

    def __init__(self) -> None:
        self.before: dict[int, Tensor] = {}
        self.after: dict[int, Tensor] = {}
        self.hessians: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step, data = trainer.global_step, regression_data()
        if step in self.hessians:
            return
        self.before[step] = flat_parameters(pl_module)
        self.hessians[step] = dense_hessian(pl_module, data.tensors)[1]
        loss = nn.functional.mse_loss(pl_module(data.tensors[0]), data.tensors[1])
        self.gradients[step] = nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(pl_module.parameters())))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after[trainer.global_step - 1] = flat_parameters(pl_module)


def fit(
    tmp_path: Path, *callbacks: Callback, module: Any = SmallRegressor, loader: Any = None, **options: Any
) -> pl.Trainer:
    """Train what `module` makes, from a fixed seed, for 12 steps."""
    pl.seed_everything(0, verbose=False)
    settings = {
        "max_epochs": 4,
        "logger": MemoryLogger(),
        "log_every_n_steps": 1,
        "default_root_dir": tmp_path,
        **options,
    }
    loader = regression_loader(batch_size=16) if loader is None else loader
    return train(module(), *callbacks, loader=loader, **settings)


def tracker(hessian: HessianConfig = WHOLE, **options: Any) -> NegativeCurvatureTracker:
    """On the whole training set, of which a reference is easily computed, at every step."""
    return NegativeCurvatureTracker(**{"schedule": EVERY_STEP, "hessian": hessian, "tol": 1e-7, **options})
