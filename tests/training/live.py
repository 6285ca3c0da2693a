"""Watching a live Trainer: checks inside its steps, a logger that remembers, a task to train and its twin."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.loss.randomness import RandomState, preserved_randomness
from lyapunov_lightning.training.replica.objective import ProbeBatch, TrainingObjective
from tests.modules import Watcher


class InsideTheStep(Watcher):
    """Runs a check where the package measures, in ``on_train_batch_start``, and keeps what it returned."""

    def __init__(self, check: Callable[..., Any]) -> None:
        self.check = check
        self.results: list[Any] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int):
        self.results.append(self.check(trainer, pl_module, batch, batch_idx))


class Experiment:
    """Counts whatever is called on it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.append(name)


class RememberingLogger(Logger):
    """Keeps every scalar with its step, in every process."""

    name = "remembering"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int, dict[str, float]]] = []
        self.experiment = Experiment()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.entries.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def steps_of(self, tag: str) -> list[int]:
        return [step for step, metrics in self.entries if tag in metrics]

    def values_of(self, tag: str) -> list[float]:
        return [metrics[tag] for _, metrics in self.entries if tag in metrics]


class Task(pl.LightningModule):
    """Regression with any network; remembers the loss of the last step."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.seen = torch.tensor(torch.nan)

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.seen = loss.detach()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))


def loss_at(objective: TrainingObjective, probe: ProbeBatch, values: Sequence[Tensor] | None = None) -> Tensor:
    """The replayed loss, at other values of the parameters if given."""
    with objective.evaluated(probe, values) as evaluation:
        return evaluation.loss.detach()


def replay(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int, **kwargs: Any) -> Tensor:
    """The loss of a step, replayed."""
    with preserved_randomness():
        return loss_at(TrainingObjective(trainer, module, **kwargs), ProbeBatch(batch, batch_idx, True))


def hessian_of(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int, **kwargs: Any) -> Any:
    """The Hessian of a step's loss."""
    objective = TrainingObjective(trainer, module)
    return HessianOperator(objective, objective.parameters, [ProbeBatch(batch, batch_idx, True)], **kwargs)


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def pieces(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    return [piece.view_as(t) for piece, t in zip(vector.split([t.numel() for t in like]), like, strict=True)]


def twin_of(net: nn.Module, build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A network of its own with the same parameters and buffers, which no Trainer and no replay has touched."""
    with preserved_randomness():
        twin = build().to(dtype)
    with torch.no_grad():
        for mine, other in zip([*twin.parameters(), *twin.buffers()], [*net.parameters(), *net.buffers()], strict=True):
            mine.copy_(other)
    return twin


def twin_loss(twin: nn.Module, batch: Any, state: RandomState) -> Tensor:
    inputs, targets = batch
    dtype = next(twin.parameters()).dtype
    with preserved_randomness(state):
        return nn.functional.mse_loss(twin(inputs.to(dtype)), targets.to(dtype))


def twin_product(twin: nn.Module, batch: Any, state: RandomState, vector: Tensor) -> Tensor:
    parameters = list(twin.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        loss = twin_loss(twin, batch, state)
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    directions = pieces(vector, parameters)
    return flat(torch.autograd.grad(gradient, parameters, directions, materialize_grads=True))


def same(first: Any, second: Any) -> bool:
    """Equality of nested structures, bit by bit in their tensors and exact in their types."""
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple, deque)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second
