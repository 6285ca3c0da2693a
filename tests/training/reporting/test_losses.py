"""The losses that are kept are those of the training, step by step."""

import math
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lyapunov_lightning.training.reporting import losses
from lyapunov_lightning.training.reporting.losses import LossSeries


class Telling(pl.LightningModule):
    """A module whose losses are known: it keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.told: list[tuple[int, float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.layer(batch).square().mean()
        self.told.append((self.trainer.global_step, loss.item()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class InMapping(Telling):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "more": batch}


class ByHand(Telling):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


class Skipping(Telling):
    """Every third batch has no loss."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if batch_idx % 3 == 2:
            return None
        return super().training_step(batch, batch_idx)


class Keeping(pl.Callback):
    def __init__(self, collect_every: int = 4) -> None:
        self.series = LossSeries()
        self.collect_every = collect_every

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.series.start(trainer)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.series.stepping(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.series.see(trainer, outputs)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.collect_every == 0:
            self.series.collect(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.series.collect(trainer)


def kept(module: Telling, keeping: Keeping, **options: Any) -> LossSeries:
    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", enable_model_summary=False, **{**settings, **options})
    trainer.fit(module, DataLoader(torch.randn(22, 2, generator=torch.Generator().manual_seed(0)), 1))
    return keeping.series


@pytest.mark.parametrize("kind", [Telling, InMapping, ByHand, Skipping])
def test_the_losses_are_those_of_the_steps(kind):
    module, keeping = kind(), Keeping()
    series = kept(module, keeping, callbacks=[keeping])
    assert series.steps == [step for step, _ in module.told]
    assert series.values == pytest.approx([loss for _, loss in module.told], rel=1e-6)


@pytest.mark.parametrize("collect_every", [1, 3, 100])
def test_a_step_of_several_batches_has_their_mean(collect_every):
    module, keeping = Telling(), Keeping(collect_every)
    series = kept(module, keeping, callbacks=[keeping], accumulate_grad_batches=4)
    by_step: dict[int, list[float]] = {}
    for step, loss in module.told:
        by_step.setdefault(step, []).append(loss)
    means = {step: sum(values) / len(values) for step, values in by_step.items()}
    assert dict(zip(series.steps, series.values, strict=True)) == pytest.approx(means, rel=1e-5)


def test_of_a_long_run_every_second_loss_is_kept_and_so_on(monkeypatch):
    monkeypatch.setattr(losses, "_MOST_KEPT", 8)
    module, keeping = Telling(), Keeping(1)
    series = kept(module, keeping, callbacks=[keeping])
    assert series.steps == [0, 4, 8, 12, 16, 20]
    assert series.values == pytest.approx([module.told[step][1] for step in series.steps], rel=1e-6)


def test_losses_are_fetched_before_they_become_many(monkeypatch):
    monkeypatch.setattr(losses, "_PENDING", 5)
    keeping = Keeping(10_000)
    kept(Telling(), keeping, callbacks=[keeping], max_steps=7)
    assert keeping.series.steps == list(range(7))


class Scheduled(Telling):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_each_loss_has_the_learning_rate_of_its_own_step(accumulate):
    keeping = Keeping(3)
    series = kept(Scheduled(), keeping, callbacks=[keeping], accumulate_grad_batches=accumulate)
    assert len(series.steps) == math.ceil(22 / accumulate)
    assert series.learning_rates == pytest.approx([0.1 * 0.5**step for step in series.steps])


def test_a_learning_rate_that_nobody_told_is_not_a_number():
    keeping = Keeping()
    keeping.on_before_optimizer_step = lambda *_: None
    series = kept(Telling(), keeping, callbacks=[keeping], max_steps=5)
    assert all(map(math.isnan, series.learning_rates))
    assert len(series.learning_rates) == 5


def test_nan_is_kept_as_what_it_is():
    class Broken(Telling):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (math.nan if batch_idx == 3 else 1)

    keeping = Keeping()
    series = kept(Broken(), keeping, callbacks=[keeping], max_steps=5)
    assert [math.isnan(value) for value in series.values] == [False, False, False, True, True]


def test_a_checkpoint_holds_what_was_not_collected_yet():
    keeping = Keeping(10_000)
    module = Telling()
    kept(module, keeping, callbacks=[keeping], max_steps=6)
    trainer = SimpleNamespace(accumulate_grad_batches=1, lightning_module=module, global_step=7)
    keeping.series.see(trainer, torch.tensor(5.0))
    resumed = LossSeries()
    resumed.load_state_dict(keeping.series.state_dict())
    assert (resumed.steps, resumed.values[-1]) == ([*range(6), 6], 5.0)
    assert resumed.learning_rates[:6] == [0.1] * 6
