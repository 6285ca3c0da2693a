"""One training of the benchmark: a problem, an optimizer, a way to the learning rate, a seed."""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks import trainers
from benchmarks.controller.problems import PROBLEMS, Batch
from benchmarks.quasi_newton import in_loop
from lyapunov_lightning import QuasiNewtonLRController
from lyapunov_lightning.callbacks.rules import RuleName

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {}),
    "RMSprop": (torch.optim.RMSprop, {}),
}
WINDOW = 40
"""The last steps, whose mean loss counts."""


@dataclass(frozen=True)
class Run:
    """One training.

    The method is ``"constant"``, ``"cosine"`` or a rule of the controller; the optimizer may be one that finds its rate
    itself.

    """

    problem: str
    optimizer: str
    method: str
    rate: float
    seed: int
    steps: int


class Learner(pl.LightningModule):
    """Trains the network of a run, and keeps the loss of every step."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        torch.manual_seed(run.seed)
        self.problem = PROBLEMS[run.problem]
        self.network = self.problem.network()
        self.run = run
        self.losses: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean loss."""
        return self.problem.loss(self.network, batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the loss."""
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The one that the run asks for."""
        return make_optimizer(self.run, self.parameters())


def make_optimizer(run: Run, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a run."""
    if run.optimizer in OPTIMIZERS:
        kind, options = OPTIMIZERS[run.optimizer]
        return kind(parameters, lr=run.rate, **options)
    if run.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(parameters, lr=run.rate)
    if run.optimizer == "dadapt":
        from dadaptation import DAdaptAdam

        return DAdaptAdam(parameters, lr=run.rate)
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(parameters, lr=run.rate, warmup_steps=run.steps // 20)
    optimizer.train()
    return optimizer


class Sized:
    """Batches of a number of steps, an epoch long."""

    def __init__(self, batches: Iterator[Batch], steps: int) -> None:
        self._batches, self._steps = batches, steps

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(self._batches, self._steps)

    def __len__(self) -> int:
        return self._steps


def train(run: Run) -> dict[str, Any]:
    """What is written down of a run: the loss at its beginning and at its end, the worst one, the last rate."""
    torch.set_num_threads(1)
    learner = Learner(run)
    batches = learner.problem.batches(run.seed)
    optimizer = (_in_trainer if run.method in get_args(RuleName) else in_loop)(learner, batches)
    losses = learner.losses
    is_complete = len(losses) == run.steps and math.isfinite(sum(losses[-WINDOW:]))
    return {
        **asdict(run),
        "final": fmean(losses[-WINDOW:]) if is_complete else None,
        "first": fmean(losses[:5]) if math.isfinite(sum(losses[:5])) else None,
        "worst": max(losses) if math.isfinite(max(losses)) else None,
        "last_rate": float(optimizer.param_groups[0]["lr"]),
    }


def _in_trainer(learner: Learner, batches: Iterator[Batch]) -> torch.optim.Optimizer:
    controller = QuasiNewtonLRController(rule=learner.run.method)
    trainer = trainers.train(learner, Sized(batches, learner.run.steps), [controller], learner.run.steps)
    return trainer.optimizers[0]
