"""The run that faults are tried on: all six callbacks on a small network, with checkpoints to go on from."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader, Dataset

from lyapunov_lightning import (
    CurvatureProbe,
    HessianConfig,
    LossAlongEigvecScanner,
    NegativeCurvatureTracker,
    NudgedSGDHook,
    QuasiNewtonLRController,
    SpectrumTracker,
)
from lyapunov_lightning.training.reporting import outlets
from tests.modules import SmallRegressor, regression_data

STEPS = 24
HALF = HessianConfig(fraction=0.5)


class ResumableLoader(DataLoader):
    """Another order in each epoch, which goes on in the midst of one."""

    def __init__(self, data: Dataset[Any], batch_size: int) -> None:
        super().__init__(data, batch_size)
        self.epoch = self.position = 0

    def __iter__(self) -> Any:
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.epoch))  # type: ignore[arg-type]
        for indices in order.split(self.batch_size or 1)[self.position :]:
            self.position += 1
            yield self.collate_fn([self.dataset[int(index)] for index in indices])

    def state_dict(self) -> dict[str, int]:
        """Where it is."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.epoch, self.position = state["epoch"], state["position"]


class Faulty(Logger):
    """Raises or hangs at our tags."""

    name, version = "faulty", 0

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self.act = act

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Act where a tag is ours."""
        if any("/" in tag for tag in metrics):
            self.act()


def reading(folder: Path, hessian: HessianConfig = HALF) -> list[Callback]:
    """The four that read."""
    return [
        CurvatureProbe(2, end="both", hessian=HessianConfig("batch", loss_fn=hessian.loss_fn)),
        SpectrumTracker(3, 2, 1, hessian=hessian, save_dir=str(folder / "out"), save_vectors=True),
        NegativeCurvatureTracker(4, 1, hessian=hessian, save_dir=str(folder / "out")),
        LossAlongEigvecScanner(6, 1, hessian=hessian, points=5, save_dir=str(folder / "out")),
    ]


def all_six(folder: Path) -> list[Callback]:
    """All of them."""
    return [*reading(folder), QuasiNewtonLRController(), NudgedSGDHook(4, 2, gamma=0.5, hessian=HALF)]


def train(
    folder: Path,
    callbacks: list[Callback],
    *,
    steps: int = STEPS,
    checkpoints: bool = True,
    pictures: bool = False,
    **options: Any,
) -> pl.Trainer:
    """Train, from the last checkpoint on if there is one, and leave the end in ``end.pt``.

    Without `pictures` the figures are drawn and not written, which takes longer than all of the training.
    """
    if not pictures:
        outlets.write_figure = lambda figure, path: None
    pl.seed_everything(1, verbose=False)
    module = SmallRegressor(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    last = folder / "last.ckpt"
    if checkpoints:
        callbacks = [*callbacks, ModelCheckpoint(folder, every_n_train_steps=2, save_last=True, save_top_k=1)]
        callbacks[-1]._enable_version_counter = False  # type: ignore[attr-defined]
    trainer = pl.Trainer(
        **{
            **{"accelerator": "cpu", "devices": 1, "max_steps": steps, "max_epochs": -1, "logger": False},
            **{"enable_checkpointing": checkpoints, "enable_progress_bar": False, "enable_model_summary": False},
            **{"default_root_dir": folder, "callbacks": callbacks, "log_every_n_steps": 1, **options},
        }
    )
    trainer.fit(module, ResumableLoader(regression_data(), 8), ckpt_path=last if last.exists() else None)
    if checkpoints:
        torch.save(
            {"weights": [p.detach() for p in module.parameters()], "steps": trainer.global_step}, folder / "end.pt"
        )
    return trainer


def fork(run: Callable[[], Any], log: Path) -> int:
    """Run something in a process of its own, which has imported everything already; returns its id."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            warnings.simplefilter("always")
            torch.set_num_threads(1)
            for name in ("lightning.pytorch", "lightning.fabric"):
                logging.getLogger(name).setLevel(logging.ERROR)
            run()
            status = 0
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    return process


def wait(process: int, seconds: float = 300.0) -> int | None:
    """The exit status of a process, negative for a signal; None if it hangs, after which it is killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(process, 9)
    os.waitpid(process, 0)
    return None
