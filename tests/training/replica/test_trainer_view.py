"""What a replayed step says to the trainer and its loggers reaches nobody."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanSquaredError

from tests.training.live import RememberingLogger, Task, mlp, replay, same

# Logging.


class Child(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        output = self.net(x)
        self.trainer.lightning_module.log("child", output.mean(), on_step=True, on_epoch=True)
        return output


class Talkative(Task):
    """Logs in every way that a step can."""

    def __init__(self) -> None:
        super().__init__(Child())
        self.metric = MeanSquaredError()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        predictions = self.net(inputs)
        loss = nn.functional.mse_loss(predictions, targets)
        self.metric(predictions, targets)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("metric", self.metric, on_step=True, on_epoch=True)
        self.log_dict({"a": loss + 1, "b": loss + 2}, on_step=False, on_epoch=True)
        self.logger.log_metrics({"direct": float(loss.detach())}, step=self.global_step)
        self.logger.experiment.add_text("tag", "text")
        self.loggers[1].experiment.add_image("tag", inputs)
        self.trainer.logger.experiment.add_scalar("tag", 1.0)
        self.print("said", batch_idx)
        return loss


def test_what_a_replay_logs_reaches_nobody(fit, loader, capsys):
    def run(check: Callable[..., Any]) -> tuple[Any, ...]:
        torch.manual_seed(0)
        loggers = [RememberingLogger(), RememberingLogger()]
        trainer, _ = fit(Talkative(), loader(), check, logger=loggers, log_every_n_steps=1, max_epochs=2)
        return (
            [logger.entries for logger in loggers],
            [logger.experiment.calls for logger in loggers],
            dict(trainer.callback_metrics),
            dict(trainer.logged_metrics),
            capsys.readouterr().out,
        )

    def check(trainer: pl.Trainer, module: Task, batch: Any, batch_idx: int) -> None:
        loggers, items = trainer.loggers, list(trainer.loggers)
        replay(trainer, module, batch, batch_idx)
        assert trainer.loggers is loggers
        assert loggers == items
        assert not {"log", "log_dict", "print"} & {*vars(module), *vars(module.net)}

    with_replay, without = run(check), run(lambda *args: None)
    assert with_replay[1] == [["add_text", "add_scalar"] * 6, ["add_image"] * 6]
    assert with_replay[-1].count("said") == 6
    assert same(with_replay, without)


def test_a_step_that_fails_leaves_the_loggers(fit, loader, remembering_logger):
    class Failing(Talkative):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("loss", 1.0)
            if self.trainer.is_being_checked:
                raise ValueError("planned")
            return self.loss(batch)

    def check(trainer: pl.Trainer, module: Task, batch: Any, batch_idx: int) -> None:
        loggers = trainer.loggers
        trainer.is_being_checked = True
        with pytest.raises(ValueError, match="planned"):
            replay(trainer, module, batch, batch_idx)
        trainer.is_being_checked = False
        assert trainer.loggers is loggers
        assert not {"log", "log_dict", "print"} & {*vars(module), *vars(module.net)}

    fit(Failing(), loader(num_samples=8), check, logger=remembering_logger, log_every_n_steps=1)
    assert remembering_logger.values_of("loss") == [1.0, 1.0]


def test_a_module_may_have_its_own_log_method_on_the_instance(fit, loader):
    said = []

    class Own(Task):
        def __init__(self) -> None:
            super().__init__(mlp())
            self.print = said.append

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.print("step")
            return self.loss(batch)

    fit(Own(), loader(num_samples=8), replay)
    assert said == ["step", "step"]
