"""A small training to look at Lightning in, and the parts of the package that depend on what is seen there."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn


def needed_by(*modules: str) -> str:
    """The beginning of a message."""
    verb = "depends" if len(modules) == 1 else "depend"
    return f"{' and '.join(f'lyapunov_lightning/{module}.py' for module in modules)} {verb} on it: "


class Curves(Logger):
    """Keeps the steps at which a tag was logged."""

    name, version = "curves", 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[str, list[int]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for tag in metrics:
            self.steps.setdefault(tag, []).append(step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Module(pl.LightningModule):
    """Notes the order in which its hooks are called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.calls: list[str] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.calls.append("training_step")
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.calls.append("own on_train_batch_start")

    def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        self.calls.append("on_before_batch_transfer")
        return batch

    def transfer_batch_to_device(self, batch: Tensor, device: torch.device, dataloader_idx: int) -> Tensor:
        self.calls.append("transfer_batch_to_device")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        self.calls.append("on_after_batch_transfer")
        return batch

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Hooks(Callback):
    """Calls the given functions in the hooks of their names."""

    def __init__(self, **functions: Callable[..., Any]) -> None:
        for name, function in functions.items():
            setattr(self, name, function)
