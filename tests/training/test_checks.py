"""What cannot be measured is refused before training, with the cause and the remedy."""

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from lyapunov_lightning import CurvatureProbe, SpectrumTracker
from lyapunov_lightning.training.checks import check_objective, check_parameters
from lyapunov_lightning.training.config import HessianConfig
from lyapunov_lightning.training.replica.objective import TrainingObjective
from tests.modules import MemoryLogger, SmallRegressor
from tests.training.live import Task, hessian_of, mlp
from tests.training_runs import train

# Refusals.


class Manual(Task):
    def __init__(self) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False


class ManualWithLoss(Manual):
    def curvature_loss(self, batch: Any) -> Tensor:
        return self.loss(batch)


class TakesTheIterator(Task):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        return self.loss(next(dataloader_iter)[0])


def trainer_with(strategy: Any, world_size: int = 1) -> Any:
    return SimpleNamespace(strategy=strategy, world_size=world_size)


ONE_DEVICE = trainer_with(SingleDeviceStrategy())


@pytest.mark.parametrize(
    ("trainer", "module", "mode", "message"),
    [
        (trainer_with(FSDPStrategy()), Task(mlp()), "train", "FSDPStrategy \\(FSDP1\\).*`fully_shard`"),
        (ONE_DEVICE, Manual(), "train", "manual optimization.*curvature_loss"),
        (ONE_DEVICE, TakesTheIterator(mlp()), "train", "dataloader_iter.*take `batch`"),
        (trainer_with(DDPStrategy(), 2), Task(nn.SyncBatchNorm(4)), "train", "SyncBatchNorm.*mode=.eval."),
    ],
    ids=["sharded", "manual", "dataloader-iter", "sync-batchnorm"],
)
def test_what_cannot_be_measured_is_refused_with_class_and_remedy(trainer, module, mode, message):
    with pytest.raises(MisconfigurationException, match=f"`Owner`.*{message}"):
        check_objective("Owner", trainer, module, HessianConfig(mode=mode))


@pytest.mark.parametrize(
    ("trainer", "module", "mode", "loss_fn"),
    [
        (ONE_DEVICE, Task(mlp()), "train", None),
        (ONE_DEVICE, Manual(), "train", lambda module, batch: module.loss(batch)),
        (ONE_DEVICE, ManualWithLoss(), "train", None),
        (ONE_DEVICE, TakesTheIterator(mlp()), "train", lambda module, batch: module.loss(batch)),
        (trainer_with(DDPStrategy(), 2), Task(mlp()), "train", None),
        (trainer_with(DDPStrategy(), 2), Task(nn.SyncBatchNorm(4)), "eval", None),
        (trainer_with(SingleDeviceStrategy()), Task(nn.SyncBatchNorm(4)), "train", None),
    ],
    ids=["plain", "manual-loss-fn", "manual-own", "iterator-loss-fn", "ddp", "sync-batchnorm-eval", "one-process"],
)
def test_what_can_be_measured_is_let_pass(trainer, module, mode, loss_fn):
    check_objective("Owner", trainer, module, HessianConfig(mode=mode, loss_fn=loss_fn))


def test_a_module_without_trainable_parameters_is_refused():
    check_parameters("Owner", Task(mlp()))
    with pytest.raises(MisconfigurationException, match=r"`Owner`.*Task has none"):
        check_parameters("Owner", Task(mlp().requires_grad_(False)))


def test_frozen_and_unused_parameters_have_no_curvature(fit, loader):
    class Partly(Task):
        def __init__(self) -> None:
            super().__init__(mlp())
            self.unused = nn.Parameter(torch.ones(2))
            self.net[0].requires_grad_(False)

    def check(trainer: pl.Trainer, module: Task, batch: Any, batch_idx: int) -> None:
        objective = TrainingObjective(trainer, module)
        assert [tuple(p.shape) for p in objective.parameters] == [(2,), (3, 6), (3,)]
        operator = hessian_of(trainer, module, batch, batch_idx)
        product = operator.matvec(torch.ones(operator.size))
        assert not product[:2].any()
        assert product[2:].any()

    _, results = fit(Partly(), loader(num_samples=4), check)
    assert len(results) == 1


def test_callbacks_that_would_write_to_one_file_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "out")

    def trackers(*folders):
        return [SpectrumTracker(1, largest, save_dir=folder) for largest, folder in enumerate(folders, 1)]

    for second in ("out", "link", "other/../out"):
        with pytest.raises(MisconfigurationException, match=r"would write to one file, .*spectrum.csv.*`save_dir`"):
            train(SmallRegressor(), *trackers(str(tmp_path / "out"), str(tmp_path / second)), max_steps=1)
    probe = CurvatureProbe(1, log_prefix="a")
    train(
        SmallRegressor(),
        probe,
        *trackers(str(tmp_path / "out"), str(tmp_path / "other")),
        max_steps=1,
        logger=MemoryLogger(),
    )
