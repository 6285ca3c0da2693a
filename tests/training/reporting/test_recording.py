"""Results reach every logger at Lightning's step, failures reach the user once."""

import io
import math
import re
import warnings
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from PIL.Image import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lyapunov_lightning import CurvatureProbe, HessianConfig, SpectrumTracker
from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.training.reporting.recording import Recorder
from lyapunov_lightning.training.results import Result, Results, ranked
from tests.training.live import RememberingLogger


class Learner(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@dataclass(frozen=True, kw_only=True)
class Found(Result):
    numbers: dict[str, float]

    def scalars(self) -> dict[str, float]:
        return self.numbers


def found(**numbers: float) -> Found:
    return Found(step=0, epoch=0.0, numbers=numbers)


def batches(num: int = 4) -> DataLoader:
    return DataLoader(torch.randn(num, 2), 1)


# Scalars.


@pytest.mark.parametrize("accumulate", [1, 3])
def test_scalars_have_the_step_of_what_the_module_logs_in_the_same_step(fit, accumulate):
    recorder, logger = Recorder("Owner", "group"), RememberingLogger()

    def check(trainer: pl.Trainer, *args: Any) -> None:
        recorder.log(trainer, {"curvature/value": trainer.fit_loop.epoch_loop.total_batch_idx})

    fit(
        Learner(),
        batches(6),
        check,
        logger=logger,
        log_every_n_steps=1,
        max_epochs=2,
        accumulate_grad_batches=accumulate,
    )
    own = [step for step in logger.steps_of("loss") for _ in range(accumulate)]
    assert logger.steps_of("curvature/value") == own
    assert len(own) == 12


def test_every_logger_and_callback_metrics_get_every_scalar(fit):
    recorder, loggers = Recorder("Owner", "group"), [RememberingLogger(), RememberingLogger()]

    def check(trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        recorder.log(trainer, {"curvature/a": batch_idx, "curvature/b": torch.tensor(2.0)})
        value = trainer.callback_metrics["curvature/a"]
        assert isinstance(value, Tensor)
        assert value == batch_idx

    trainer, _ = fit(Learner(), batches(3), check, logger=loggers)
    for logger in loggers:
        assert logger.values_of("curvature/a") == [0.0, 1.0, 2.0]
        assert logger.values_of("curvature/b") == [2.0, 2.0, 2.0]
        assert all(type(value) is float for value in logger.values_of("curvature/b"))
    assert trainer.callback_metrics["curvature/b"] == 2


def test_scalars_outlive_validation_and_epochs_in_callback_metrics(fit):
    recorder = Recorder("Owner", "group")

    def check(trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            recorder.log(trainer, {"curvature/a": 7.0})

    loaders = {"train_dataloaders": batches(2), "val_dataloaders": batches(2)}
    data = pl.LightningDataModule.from_datasets(loaders["train_dataloaders"].dataset, batches(2).dataset, batch_size=1)
    trainer, _ = fit(Learner(), data, check, max_epochs=3)
    assert trainer.callback_metrics["curvature/a"] == 7
    assert "val_loss" in trainer.callback_metrics


def test_a_scalar_can_stop_the_training(fit):
    recorder = Recorder("Owner", "group")

    def check(trainer: pl.Trainer, *args: Any) -> None:
        recorder.log(trainer, {"curvature/a": trainer.global_step})

    stopping = EarlyStopping("curvature/a", mode="min", patience=1, check_on_train_epoch_end=True)
    trainer, _ = fit(Learner(), batches(2), check, callbacks=(stopping,), max_epochs=9)
    assert trainer.current_epoch == 2


def test_prefix_goes_in_front_of_every_tag(fit, remembering_logger):
    recorder = Recorder("Owner", "curvature", "run_a")

    def check(trainer: pl.Trainer, *args: Any) -> None:
        with recorder.measurement(trainer) as record:
            record.result = found(**{"curvature/a": 1.0})

    trainer, _ = fit(Learner(), batches(1), check, logger=remembering_logger)
    tags = {tag for _, metrics in remembering_logger.entries for tag in metrics if "loss" not in tag and tag != "epoch"}
    assert tags == {"run_a/curvature/a", "run_a/curvature_details/seconds"}
    assert tags <= trainer.callback_metrics.keys()


def test_without_loggers_scalars_are_in_callback_metrics(fit):
    trainer, _ = fit(
        Learner(), batches(1), lambda trainer, *args: Recorder("Owner", "group").log(trainer, {"a": math.nan})
    )
    assert trainer.callback_metrics["a"].isnan()


def test_a_figure_is_shown_at_the_step_of_the_scalars(fit, tmp_path):
    logger, recorder = TensorBoardLogger(tmp_path), Recorder("Owner", "curvature", "run_a")

    def check(trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        figure = Figure()
        figure.subplots().plot([1, 2])
        recorder.draw(trainer, lambda: {"figure": lambda: figure})
        recorder.log(trainer, {"curvature/a": 1.0})

    fit(Learner(), batches(6), check, logger=[logger, RememberingLogger()], accumulate_grad_batches=2, max_epochs=2)
    events = EventAccumulator(logger.log_dir, {"images": 0, "scalars": 0}).Reload()
    figures, scalars = events.Images("run_a/curvature/figure"), events.Scalars("run_a/curvature/a")
    assert {event.step for event in figures} == {event.step for event in scalars} == set(range(6))


class RecordingWandb(WandbLogger):
    """Weights & Biases without the service: keeps the images that it is given."""

    def __init__(self) -> None:
        self.images: list[tuple[str, int, list[Figure]]] = []

    @property
    def name(self) -> str:
        return "recording"

    @property
    def version(self) -> int:
        return 0

    @property
    def save_dir(self) -> None:
        return None

    @property
    def experiment(self) -> None:
        return None

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.images.append((key, step, images))

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def finalize(self, *args: Any) -> None:
        pass


def test_weights_and_biases_gets_the_figures_of_a_tracker():
    logger = RecordingWandb()
    tracker = SpectrumTracker(1, 2, 1, hessian=HessianConfig("batch"), tol=0.1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=logger,
        callbacks=[tracker],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Learner(), batches(4))
    tags = [(key, step) for key, step, _ in logger.images]
    assert tags == [(f"spectrum/{name}", 8) for name in ("eigenvalues", "gradient_alignment")]
    assert all(isinstance(image, Image) for _, _, [image] in logger.images)


def test_a_run_without_loggers_is_told_of_once(fit, remembering_logger):
    recorder = Recorder("Owner", "group")

    def check(trainer: pl.Trainer, *args: Any) -> None:
        recorder.start(trainer)

    with pytest.warns(CurvatureWarning, match=r"`Owner`: the Trainer has no logger.*callback_metrics") as caught:
        fit(Learner(), batches(3), check)
    assert sum(issubclass(warning.category, CurvatureWarning) for warning in caught) == 1
    fit(
        Learner(),
        batches(3),
        lambda trainer, *args: Recorder("Owner", "group").start(trainer),
        logger=remembering_logger,
    )


# Measurements.


def test_a_measurement_is_logged_with_its_time(fit, remembering_logger):
    def check(trainer: pl.Trainer, *args: Any) -> None:
        with Recorder("Owner", "group").measurement(trainer) as record:
            record.result = found(**{"group/a": 1.0})
        assert record.seconds >= 0

    fit(Learner(), batches(1), check, logger=remembering_logger)
    assert remembering_logger.values_of("group/a") == [1.0]
    assert len(remembering_logger.values_of("group_details/seconds")) == 1
    assert not remembering_logger.values_of("group_details/converged")


def test_a_measurement_without_result_is_not_logged(fit, remembering_logger):
    def check(trainer: pl.Trainer, *args: Any) -> None:
        with Recorder("Owner", "group").measurement(trainer):
            pass

    fit(Learner(), batches(1), check, logger=remembering_logger)
    assert not any("group" in tag for _, metrics in remembering_logger.entries for tag in metrics)


def test_a_failure_at_the_end_of_a_batch_names_the_step_that_was_measured(fit, remembering_logger):
    """There `trainer.global_step` has moved on already."""

    class WithoutThird(pl.plugins.precision.Precision):
        """Takes no third step, as a loss scaler does that finds an overflow."""

        count = 0

        def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count != 3:
                return super().optimizer_step(optimizer, model, closure, **kwargs)
            result = closure()
            self._after_closure(model, optimizer)
            return result

    probe = CurvatureProbe(1, estimator="critical", hessian=HessianConfig(data="batch"))
    with pytest.warns(CurvatureWarning, match="did not move the parameters") as caught:
        fit(Learner(), batches(4), callbacks=(probe,), logger=remembering_logger, plugins=[WithoutThird()])
    [said] = [str(warning.message) for warning in caught if "did not move" in str(warning.message)]
    assert "the measurement at step 2 failed" in said


def test_a_failed_measurement_is_logged_as_not_converged_and_warned_of_once_a_kind(fit, remembering_logger):
    recorder = Recorder("Owner", "group")
    errors = [ValueError("one"), ValueError("two"), torch.OutOfMemoryError("three"), ValueError("four")]

    def check(trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with recorder.measurement(trainer) as record:
                record.result = found(**{"group/a": 1.0})
                raise errors[batch_idx]
        assert record.result is None
        assert trainer.callback_metrics["group_details/converged"] == 0
        return [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)]

    trainer, told = fit(Learner(), batches(4), check, logger=remembering_logger)
    assert [len(messages) for messages in told] == [1, 0, 1, 0]
    assert re.match(r"`Owner`: the measurement at step 0 failed.*ValueError.*: one", told[0][0])
    assert re.match(r"`Owner`: the measurement at step 2 failed.*OutOfMemoryError.*: three", told[2][0])
    assert remembering_logger.values_of("group_details/converged") == [0.0] * 4
    assert len(remembering_logger.values_of("group_details/seconds")) == 4
    assert not remembering_logger.values_of("group/a")  # a number of unknown worth
    assert trainer.global_step == 4


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interruption_is_not_taken_for_a_failure(fit, remembering_logger, interruption):
    def check(trainer: pl.Trainer, *args: Any) -> None:
        with pytest.raises(interruption), Recorder("Owner", "group").measurement(trainer):
            raise interruption

    fit(Learner(), batches(1), check, logger=remembering_logger)
    assert not remembering_logger.values_of("group_details/converged")


def test_warnings_name_the_owner_and_come_once_a_kind_and_recorder():
    recorder = Recorder("Owner", "group")
    with pytest.warns(CurvatureWarning, match="^`Owner`: first$"):
        recorder.warn_once("kind", "first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorder.warn_once("kind", "second")
    with pytest.warns(CurvatureWarning, match="third"):
        recorder.warn_once("other kind", "third")
    with pytest.warns(CurvatureWarning, match="first"):
        Recorder("Owner", "group").warn_once("kind", "first")


# Results.


def test_results_come_back_from_what_a_checkpoint_may_hold():
    results = Results(Found)
    results.add(found(a=1.0))
    results.add(found(a=2.0, b=3.0))
    buffer = io.BytesIO()
    torch.save(results.state_dict(), buffer)
    buffer.seek(0)
    restored = Results(Found)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    assert restored.items == results.items


def test_of_a_very_long_run_the_whole_stays_in_view(monkeypatch):
    monkeypatch.setattr("lyapunov_lightning.training.results._MOST_KEPT", 8)
    results = Results(Found)
    for step in range(100):
        results.add(Found(step=step, epoch=0.0, numbers={}))
        assert len(results.items) <= 8
        assert (results.items[0].step, results.items[-1].step) == (0, step)
    steps = [result.step for result in results.items]
    assert steps == sorted(set(steps))


def test_ranks_are_counted_from_one():
    assert ranked("a", torch.tensor([3.0, 2.0])) == {"a_1": 3.0, "a_2": 2.0}
