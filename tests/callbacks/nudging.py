"""What the tests of the nudged SGD share: modules, optimizers, a hook that measures exactly, short trainings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lyapunov_lightning import HessianConfig, NudgedSGDHook
from tests.modules import MemoryLogger, SmallRegressor, Watcher
from tests.training_runs import train

VARIANTS = {"nudge": (0.1, 1.0), "top_only": (1.0, 0.0), "no_top": (0.0, 1.0)}
"""The factors of the gradient inside and outside of the top subspace, with `gamma` 0.1."""


def hook(k: int = 3, gamma: float = 0.1, *, loss_fn: Any = None, method: Any = "auto", **options: Any) -> NudgedSGDHook:
    """Measures on the whole training set, exactly."""
    hessian = HessianConfig(fraction=1.0, loss_fn=loss_fn, method=method)
    return NudgedSGDHook(k=k, gamma=gamma, hessian=hessian, **{"tol": 1e-9, **options})


def sgd(**options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, **{"lr": 0.1, **options})


def fit(tmp_path: Path, module: Any = None, *callbacks: Callback, **options: Any) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    settings = {
        "max_epochs": -1 if "max_steps" in options else 2,
        "logger": MemoryLogger(),
        "log_every_n_steps": 1,
        "default_root_dir": tmp_path,
        **options,
    }
    module = module if isinstance(module, pl.LightningModule) else (module or SmallRegressor)()
    return train(module, *callbacks, **settings)


def weights(trainer: pl.Trainer) -> Tensor:
    return nn.utils.parameters_to_vector(trainer.lightning_module.parameters()).detach().clone()


def seeded(module: Callable[[], pl.LightningModule] = SmallRegressor) -> pl.LightningModule:
    """The module as `fit` makes it."""
    pl.seed_everything(0, verbose=False)
    return module()


class Gradients(Watcher):
    """The gradient in ``on_before_optimizer_step``, as it is where this callback stands in the list."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in pl_module.parameters()]
        self.seen.append(torch.cat([part.reshape(-1) for part in parts]))


class Quadratic(pl.LightningModule):
    """Half the sum of d·θ², over two tensors."""

    def __init__(self, curvatures: list[float], optimizer: Any = None) -> None:
        super().__init__()
        self.curvatures = torch.tensor(curvatures, dtype=torch.float64)
        values = torch.linspace(1, 2, len(curvatures), dtype=torch.float64)
        self.first, self.second = nn.Parameter(values[:3].clone()), nn.Parameter(values[3:].clone())
        self.optimizer = optimizer or sgd()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.curvatures * torch.cat([self.first, self.second]).square()).sum() / 2 + 0 * batch[0].sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def two_groups(parameters: Any) -> torch.optim.Optimizer:
    """The later half of the parameters first, and with another weight decay."""
    parameters = list(parameters)
    groups = [{"params": parameters[2:], "weight_decay": 0.3}, {"params": parameters[:2], "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.5)
