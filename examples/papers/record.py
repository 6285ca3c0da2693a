"""What a run leaves behind for measures and drawings."""

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from typing_extensions import override

from lyapunov_lightning.training.results import Result

R = TypeVar("R", bound=Result)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was seen of a run.

    Attributes:
        steps: The optimizer steps, counted from 0.
        losses: The training loss before each.
        learning_rates: The learning rate of each.
        validation: For each validation the step before which it was, and the values that the module logged.
        metrics: The last value of everything that was logged.
        distance: From the initial to the last parameters.
        measured: The results of each curvature callback, in the order of the callbacks.
        seconds: How long it kept a core busy.

    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    distance: float = 0.0
    measured: list[list[Result]] = field(default_factory=list)
    seconds: float = 0.0

    def results(self, kind: type[R], index: int = 0) -> list[R]:
        """The results of the callback with this number among those with results of this class."""
        series = [results for results in self.measured if results and isinstance(results[0], kind)]
        return series[index] if index < len(series) else []  # type: ignore[return-value]

    def save(self, path: Path) -> None:
        """Write it to a file, which is whole whenever it is there."""
        part = path.with_suffix(".part")
        part.write_bytes(pickle.dumps(self))
        part.replace(path)

    @staticmethod
    def load(path: Path) -> "Record":
        """Read it again."""
        record = pickle.loads(path.read_bytes())
        assert isinstance(record, Record)
        return record


class KeepRecord(pl.Callback):
    """Keeps the losses, learning rates and validations of a run, as plain numbers.

    A measurement evaluates the training step with a copy of whatever the step can reach, callbacks included: tensors
    here, one for each step, would be copied again and again.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.learning_rates: list[float] = []
        self.validation: list[dict[str, float]] = []

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        self.steps.append(trainer.global_step)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *batch: Any) -> None:
        self.losses.append(float(outputs["loss"]))

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.learning_rates.append(optimizer.param_groups[0]["lr"])  # a scheduler steps before the batch ends

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self.validation.append({"step": float(trainer.global_step), **values})
