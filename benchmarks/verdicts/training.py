"""One training of a problem: in a plain loop, or in a Trainer with callbacks; step by step the same."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler, TensorDataset

from benchmarks import trainers
from benchmarks.quasi_newton import Samples
from benchmarks.verdicts.held_out import HELD_OUT
from benchmarks.verdicts.problems import PROBLEMS, Problem

EVERY_PROBLEM: dict[str, Problem] = {**PROBLEMS, **HELD_OUT}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "momentum": functools.partial(torch.optim.SGD, momentum=0.9),
    "Nesterov": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
}
MORE_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": torch.optim.Adam,
    "NAdam": torch.optim.NAdam,
    "Adagrad": torch.optim.Adagrad,
}
"""Met with the held-out problems alone."""

SCHEDULES = ("constant", "cosine")
WARM_UP = 0.1
"""The part of a run with ``"cosine"`` in which the rate rises, before it falls to 0."""
LAST = 0.1
"""The part of a run whose losses count, each of all data."""
EVALUATIONS = 10
"""How many of them are computed."""
LOST = 1e6
"""A run whose loss is that many times the first one is not continued."""


@dataclass(frozen=True)
class Size:
    """How long the trainings are, and how many samples they may have."""

    steps: int = 300
    samples: int = 10**6


@dataclass(frozen=True)
class Cell:
    """What is trained, but for the learning rate; without a `batch` each step sees all data."""

    problem: str
    optimizer: str
    batch: int | None
    schedule: str
    seed: int


def factor(step: int, schedule: str, steps: int) -> float:
    """What the learning rate is multiplied by at a step."""
    if schedule == "constant":
        return 1.0
    rising = max(round(WARM_UP * steps), 1)
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


@functools.cache
def samples(name: str, root: str, most: int) -> Samples:
    """The data of a problem."""
    inputs, targets = EVERY_PROBLEM[name].data(root)
    return inputs[:most], targets[:most]


class Rows(TensorDataset):
    """Samples of which a DataLoader gets a whole batch at once, which takes a fraction of the time."""

    def __getitems__(self, indices: list[int]) -> Samples:
        """The batch."""
        inputs, targets = self.tensors
        return inputs[indices], targets[indices]


class Order(Sampler[int]):
    """A random order for each epoch.

    That of `DataLoader` depends on who asks: an iterator that is asked for and not used, as Lightning does, or one that
    is used up, as a loop does, takes random numbers.

    Args:
        count: How many samples there are.
        seed: What the orders depend on.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._generator = count, torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self._count, generator=self._generator).tolist()

    def __len__(self) -> int:
        return self._count


def _whole(batch: Samples) -> Samples:
    return batch


def loader(cell: Cell, root: str, size: Size) -> DataLoader:
    """Shuffled batches of one size, in an order that the seed fixes."""
    data = Rows(*samples(cell.problem, root, size.samples))
    batch = min(cell.batch or len(data), len(data))
    order = Order(len(data), cell.seed)
    return DataLoader(data, batch, sampler=order, drop_last=True, collate_fn=_whole)


class Learner(pl.LightningModule):
    """Trains a problem at a learning rate, the highest one where there is a schedule."""

    def __init__(self, cell: Cell, rate: float, steps: int) -> None:
        super().__init__()
        self.problem = EVERY_PROBLEM[cell.problem]
        torch.manual_seed(100 + cell.seed)
        self.network = self.problem.network()
        self.cell, self.rate, self.steps = cell, rate, steps

    def training_step(self, batch: Samples, batch_idx: int) -> Tensor:
        """The mean loss."""
        return self.problem.loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer with its schedule."""
        optimizer = {**OPTIMIZERS, **MORE_OPTIMIZERS}[self.cell.optimizer](self.network.parameters(), lr=self.rate)
        if self.cell.schedule == "constant":
            return {"optimizer": optimizer}
        scheduler = LambdaLR(optimizer, functools.partial(factor, schedule=self.cell.schedule, steps=self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @torch.no_grad()
    def loss_of_all(self, data: Samples) -> float:
        """The loss of all data as one batch, without dropout."""
        forgetful = [module for module in self.network.modules() if isinstance(module, nn.Dropout)]
        for module in forgetful:
            module.eval()
        loss = float(self.training_step(data, 0))
        for module in forgetful:
            module.train()
        return loss


def in_loop(learner: Learner, batches: DataLoader, evaluate: Callable[[], float]) -> float:
    """Train in a plain loop; the mean of what is evaluated in the last part, infinite where the run was lost."""
    chosen = learner.configure_optimizers()
    optimizer, scheduler = chosen["optimizer"], chosen.get("lr_scheduler", {}).get("scheduler")
    steps, evaluated, first = learner.steps, [], math.inf
    spacing = max(round(LAST * steps / EVALUATIONS), 1)
    for step, batch in enumerate(itertools.islice(_without_end(batches), steps)):
        loss = learner.training_step(batch, step)
        value = loss.item()
        first = value if step == 0 else first
        if not math.isfinite(value) or value > LOST * first:
            return math.inf
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        remaining = steps - 1 - step
        if remaining < LAST * steps and remaining % spacing == 0:
            evaluated.append(evaluate())
    mean = sum(evaluated) / len(evaluated)
    return mean if math.isfinite(mean) else math.inf


def _without_end(batches: DataLoader) -> Iterator[Samples]:
    while True:
        yield from batches


def in_trainer(learner: Learner, batches: DataLoader, callbacks: list[pl.Callback]) -> None:
    """Train in a Trainer that has nothing but the callbacks."""
    trainers.train(learner, batches, callbacks, learner.steps)


def final_loss(cell: Cell, rate: float, root: str, size: Size) -> float:
    """How well a rate does."""
    learner = Learner(cell, rate, size.steps)
    data = samples(cell.problem, root, size.samples)
    return in_loop(learner, loader(cell, root, size), functools.partial(learner.loss_of_all, data))


def untrained_loss(cell: Cell, root: str, size: Size) -> float:
    """The loss of all data before the first step."""
    return Learner(cell, 0.0, size.steps).loss_of_all(samples(cell.problem, root, size.samples))
