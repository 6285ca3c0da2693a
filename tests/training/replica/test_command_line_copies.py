"""A module that a command line has made does not take command line, data and callbacks into its replicas."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from torch import nn

from lyapunov_lightning import CurvatureProbe, SpectrumTracker
from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.training.replica.copier import Copier
from lyapunov_lightning.training.replica.held import discard
from tests.modules import SmallRegressor, regression_loader


class Configured(SmallRegressor):
    def __init__(self, optimizer: OptimizerCallable = torch.optim.SGD) -> None:
        super().__init__(optimizer)
        self.rate = nn.Parameter(torch.zeros(()))


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return regression_loader()


class Mine(SpectrumTracker):
    """A callback of the user's own, made from one of the package's."""


class Watching(SmallRegressor):
    """Holds callbacks, as a module does that reads their results."""

    def __init__(self) -> None:
        super().__init__()
        self.watched = {"probe": CurvatureProbe(1), "mine": Mine(1)}


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LightningCLI:
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1"]
    settings = {
        "accelerator": "cpu",
        "max_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [CurvatureProbe(1), Mine(1)],
    }
    return LightningCLI(Configured, Data, args=arguments, trainer_defaults=settings, save_config_callback=None)


def test_a_replica_leaves_the_command_line_alone(cli):
    copier = Copier()
    twin = copier(cli.model)
    assert copier.memo.has(cli.model.net)
    beside = [cli, cli.parser, cli.config, cli.config_init, cli.datamodule, *cli.trainer.callbacks]
    assert [type(part).__name__ for part in beside if copier.memo.has(part)] == []
    assert isinstance(twin.optimizer([nn.Parameter(torch.zeros(1))]), torch.optim.SGD)


def test_a_replica_leaves_callbacks_alone_that_the_module_holds():
    watching = Watching()
    copier = Copier()
    twin = copier(watching)
    assert twin.watched == watching.watched
    assert not any(copier.memo.has(callback) for callback in watching.watched.values())


def test_replicas_do_not_grow_from_measurement_to_measurement():
    """What the callbacks keep of one measurement is no part of the next one's replicas."""
    copied: list[int] = []

    class Counting(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            copier = Copier()
            copier(pl_module)
            copied.append(len(copier.memo.copies))
            discard(copier.memo)

    watching = Watching()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*watching.watched.values(), Counting()],
    )
    with pytest.warns(CurvatureWarning, match="has no logger"):
        trainer.fit(watching, regression_loader())
    assert len(set(copied)) == 1
