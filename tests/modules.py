"""LightningModules, datasets, a logger and a callback that tests share; importable in spawned processes.

`BusyModule` does in its training step whatever real modules do beside computing a loss. `SmallRegressor` is small,
smooth and in float64, so that its dense Hessian is at hand.
"""

import random
from collections.abc import Callable
from typing import Any, Literal, Optional

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

from tests.problems import whole_hessian

NUM_FEATURES = 6
NUM_CLASSES = 3


class Watcher(Callback):
    """A test's callback that notes things about a run.

    It stands for itself in replicas. Else every evaluation of the loss would copy all that was noted so far.

    """

    def __deepcopy__(self, memo: Any) -> "Watcher":
        return self


class MemoryLogger(Logger):
    """Keeps what is logged: `history` holds one pair of step and metrics for each call, `events` the experiment's."""

    def __init__(self, name: str = "memory") -> None:
        super().__init__()
        self._name = name
        self.history: list[tuple[Optional[int], dict[str, float]]] = []
        self.events: list[tuple[str, float]] = []

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> int:
        return 0

    @property
    def experiment(self) -> "MemoryLogger":
        return self

    def add_scalar(self, tag: str, value: float) -> None:
        """What users call on an experiment, past the logger's interface."""
        self.events.append((tag, value))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: Optional[int] = None) -> None:
        self.history.append((step, {name: float(value) for name, value in metrics.items()}))

    def curve(self, tag: str) -> dict[int, float]:
        """The values of one tag by step."""
        return {step: metrics[tag] for step, metrics in self.history if tag in metrics}

    @property
    def tags(self) -> set[str]:
        return {tag for _, metrics in self.history for tag in metrics}


class AugmentedClusters(Dataset):
    """Points in clusters, augmented with PyTorch's, NumPy's and Python's global generators; with their index."""

    def __init__(self, size: int = 220) -> None:
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(NUM_CLASSES, NUM_FEATURES, generator=generator)
        self.labels = torch.arange(size) % NUM_CLASSES
        self.inputs = centres[self.labels] + 0.7 * torch.randn(size, NUM_FEATURES, generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        inputs = self.inputs[index] + 0.1 * torch.randn(NUM_FEATURES)
        if random.random() < 0.5:
            inputs = -inputs
        return inputs * float(np.random.uniform(0.8, 1.2)), self.labels[index], index


class BusyModule(pl.LightningModule):
    """BatchNorm, dropout, metrics of all kinds, logging of all kinds, and state outside of parameters and buffers.

    Args:
        optimizer: Which one trains it.
        use_metrics: Whether its training step holds the metrics, which take most of its time.

    """

    def __init__(self, optimizer: Literal["sgd", "adam"] = "sgd", use_metrics: bool = True) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.use_metrics = use_metrics
        self.net = nn.Sequential(
            nn.Linear(NUM_FEATURES, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, NUM_CLASSES)
        )
        self.accuracy = MulticlassAccuracy(NUM_CLASSES)
        self.forward_called = MeanMetric()
        self.collection = MetricCollection(
            [MulticlassPrecision(NUM_CLASSES), MulticlassRecall(NUM_CLASSES)], prefix="train_"
        )
        self.val_accuracy = MulticlassAccuracy(NUM_CLASSES)
        self.register_buffer("centre", torch.zeros(NUM_CLASSES))
        self.losses: list[Tensor] = []
        self.running = torch.zeros(())
        self.count = 0

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def loss(self, batch: Any) -> Tensor:
        inputs, labels, _ = batch
        return nn.functional.cross_entropy(self(inputs).float(), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels, _ = batch
        logits = self(inputs)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        value = loss.detach()
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        if self.use_metrics:
            self.accuracy(logits, labels)
            self.log("train_accuracy", self.accuracy, on_step=True, on_epoch=True)
            self.log("train_mean", self.forward_called(value))
            self.collection.update(logits, labels)
            self.log_dict(self.collection, on_step=False, on_epoch=True)
        self.losses.append(value)
        self.running.mul_(0.9).add_(value.cpu(), alpha=0.1)
        self.count += 1
        self.centre = 0.9 * self.centre + 0.1 * logits.detach().float().mean(dim=0)  # a buffer that is replaced
        for logger in self.loggers:
            logger.log_metrics({"by_hand": float(value)}, step=self.global_step)
            logger.experiment.add_scalar("by_hand", float(value))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels, _ = batch
        logits = self(inputs)
        self.val_accuracy.update(logits, labels)
        self.log("val_accuracy", self.val_accuracy)
        self.log("val_loss", nn.functional.cross_entropy(logits.float(), labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.AdamW(self.parameters(), lr=1e-2)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class BusyModuleWithOwnLoss(BusyModule):
    """Says itself which loss's curvature is meant."""

    def curvature_loss(self, batch: Any) -> Tensor:
        self.count += 1
        return self.loss(batch)


class SmallRegressor(pl.LightningModule):
    """Two layers with tanh and squared error: 26 parameters with a Hessian of both signs.

    Args:
        optimizer: Maps the parameters to an optimizer; plain SGD by default.
        dropout: Share of the hidden units that are dropped.
        linear: Leave out the hidden layer: a convex quadratic loss.

    """

    def __init__(self, optimizer: Any = None, dropout: float = 0.0, linear: bool = False) -> None:
        super().__init__()
        self.optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        hidden = [nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 2)]
        self.net = nn.Sequential(*([nn.Linear(3, 2)] if linear else hidden)).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch[:2]
        loss = nn.functional.mse_loss(self(inputs), targets)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def regression_data(size: int = 48) -> TensorDataset:
    """Samples of a smooth function in float64, with their index as the third part."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(size, 2, generator=generator, dtype=torch.float64)
    targets = torch.stack([inputs.prod(dim=1), (2 * inputs[:, 0]).sin()], dim=1) + 0.3 * noise
    return TensorDataset(inputs, targets, torch.arange(size))


def regression_loader(size: int = 48, batch_size: int = 8, shuffle: bool = False) -> DataLoader:
    return DataLoader(regression_data(size), batch_size, shuffle=shuffle)


def dense_hessian(
    module: pl.LightningModule, batch: Any, loss: Optional[Callable[[Any, Any], Tensor]] = None
) -> tuple[float, Tensor]:
    """The mean squared error of a `SmallRegressor` on a batch, and its Hessian over all trainable parameters.

    Computed from the module's forward alone, by nothing of the package's. Random numbers are drawn as they would be by
    the next call of the module, and the generator is left as it was.

    Args:
        module: The module.
        batch: Inputs and targets first.
        loss: Maps predictions and targets to the loss, in place of the mean squared error.

    """
    names, values = zip(*((n, p.detach()) for n, p in module.named_parameters() if p.requires_grad), strict=True)
    sizes = [value.numel() for value in values]

    def of_flat(flat: Tensor) -> Tensor:
        pieces = [piece.view_as(value) for piece, value in zip(flat.split(sizes), values, strict=True)]
        predictions = torch.func.functional_call(module, dict(zip(names, pieces, strict=True)), (batch[0],))
        return (loss or nn.functional.mse_loss)(predictions, batch[1])

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        flat = torch.cat([value.reshape(-1) for value in values]).requires_grad_()
        return whole_hessian(of_flat(flat), flat)
