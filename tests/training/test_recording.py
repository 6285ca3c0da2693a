"""Results reach every logger at Lightning's step, failures reach the user once, long measurements show a bar."""

import io
import math
import re
import sys
import warnings
from typing import Any, Optional

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lyapunov_lightning import Schedule, SpectrumTracker
from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.training import recording
from lyapunov_lightning.training.recording import Recorder, WatchedOperator, progress
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


def batches(num: int = 4) -> DataLoader:
    return DataLoader(torch.randn(num, 2), 1)


# Scalars.


@pytest.mark.parametrize("accumulate", [1, 3])
def test_scalars_have_the_step_of_what_the_module_logs_in_the_same_step(fit, accumulate):
    recorder, logger = Recorder("Owner"), RememberingLogger()

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
    recorder, loggers = Recorder("Owner"), [RememberingLogger(), RememberingLogger()]

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
    recorder = Recorder("Owner")

    def check(trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            recorder.log(trainer, {"curvature/a": 7.0})

    loaders = {"train_dataloaders": batches(2), "val_dataloaders": batches(2)}
    data = pl.LightningDataModule.from_datasets(loaders["train_dataloaders"].dataset, batches(2).dataset, batch_size=1)
    trainer, _ = fit(Learner(), data, check, max_epochs=3)
    assert trainer.callback_metrics["curvature/a"] == 7
    assert "val_loss" in trainer.callback_metrics


def test_a_scalar_can_stop_the_training(fit):
    recorder = Recorder("Owner")

    def check(trainer: pl.Trainer, *args: Any) -> None:
        recorder.log(trainer, {"curvature/a": trainer.global_step})

    stopping = EarlyStopping("curvature/a", mode="min", patience=1, check_on_train_epoch_end=True)
    trainer, _ = fit(Learner(), batches(2), check, callbacks=(stopping,), max_epochs=9)
    assert trainer.current_epoch == 2


def test_prefix_goes_in_front_of_every_tag(fit, remembering_logger):
    recorder = Recorder("Owner", "run_a")

    def check(trainer: pl.Trainer, *args: Any) -> None:
        with recorder.measurement(trainer, "curvature") as scalars:
            scalars["curvature/a"] = 1.0

    trainer, _ = fit(Learner(), batches(1), check, logger=remembering_logger)
    tags = {tag for _, metrics in remembering_logger.entries for tag in metrics if "loss" not in tag and tag != "epoch"}
    assert tags == {"run_a/curvature/a", "run_a/curvature/seconds"}
    assert tags <= trainer.callback_metrics.keys()


def test_without_loggers_scalars_are_in_callback_metrics(fit):
    trainer, _ = fit(Learner(), batches(1), lambda trainer, *args: Recorder("Owner").log(trainer, {"a": math.nan}))
    assert trainer.callback_metrics["a"].isnan()


def test_a_figure_is_shown_at_the_step_of_the_scalars(fit, tmp_path):
    logger, recorder = TensorBoardLogger(tmp_path), Recorder("Owner", "run_a")

    def check(trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        figure = Figure()
        figure.subplots().plot([1, 2])
        recorder.figure(trainer, "curvature/figure", figure)
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

    def log_image(self, key: str, images: list[Any], step: Optional[int] = None, **kwargs: Any) -> None:
        self.images.append((key, step, images))

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def finalize(self, *args: Any) -> None:
        pass


def test_weights_and_biases_gets_the_figures_of_a_tracker():
    logger = RecordingWandb()
    tracker = SpectrumTracker(2, 1, Schedule(every_n_steps=1), data="batch", tol=0.1)
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
    assert tags == [(f"spectrum/{name}", step) for step in (4, 8) for name in ("eigenvalues", "gradient_alignment")]
    assert all(isinstance(image, Figure) for _, _, [image] in logger.images)


def test_a_run_without_loggers_is_told_of_once(fit, remembering_logger):
    recorder = Recorder("Owner")

    def check(trainer: pl.Trainer, *args: Any) -> None:
        recorder.start(trainer)

    with pytest.warns(CurvatureWarning, match=r"`Owner`: the Trainer has no logger.*callback_metrics") as caught:
        fit(Learner(), batches(3), check)
    assert sum(issubclass(warning.category, CurvatureWarning) for warning in caught) == 1
    fit(
        Learner(),
        batches(3),
        lambda trainer, *args: Recorder("Owner").start(trainer),
        logger=remembering_logger,
    )


# Measurements.


def test_a_measurement_is_logged_with_its_time(fit, remembering_logger):
    def check(trainer: pl.Trainer, *args: Any) -> None:
        with Recorder("Owner").measurement(trainer, "group") as scalars:
            scalars["group/a"] = 1.0
        assert scalars["group/seconds"] >= 0

    fit(Learner(), batches(1), check, logger=remembering_logger)
    assert remembering_logger.values_of("group/a") == [1.0]
    assert len(remembering_logger.values_of("group/seconds")) == 1
    assert not remembering_logger.values_of("group/converged")


def test_a_measurement_without_result_is_not_logged(fit, remembering_logger):
    def check(trainer: pl.Trainer, *args: Any) -> None:
        with Recorder("Owner").measurement(trainer, "group"):
            pass

    fit(Learner(), batches(1), check, logger=remembering_logger)
    assert not any("group" in tag for _, metrics in remembering_logger.entries for tag in metrics)


def test_a_failed_measurement_is_logged_as_not_converged_and_warned_of_once_a_kind(fit, remembering_logger):
    recorder = Recorder("Owner")
    errors = [ValueError("one"), ValueError("two"), torch.OutOfMemoryError("three"), ValueError("four")]

    def check(trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with recorder.measurement(trainer, "group") as scalars:
                scalars["group/a"] = 1.0
                raise errors[batch_idx]
        assert trainer.callback_metrics["group/converged"] == 0
        return [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)]

    trainer, told = fit(Learner(), batches(4), check, logger=remembering_logger)
    assert [len(messages) for messages in told] == [1, 0, 1, 0]
    assert re.match(r"`Owner`: the measurement at step 0 failed.*ValueError.*: one", told[0][0])
    assert re.match(r"`Owner`: the measurement at step 2 failed.*OutOfMemoryError.*: three", told[2][0])
    assert remembering_logger.values_of("group/converged") == [0.0] * 4
    assert len(remembering_logger.values_of("group/seconds")) == 4
    assert not remembering_logger.values_of("group/a")  # a number of unknown worth
    assert trainer.global_step == 4


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interruption_is_not_taken_for_a_failure(fit, remembering_logger, interruption):
    def check(trainer: pl.Trainer, *args: Any) -> None:
        with pytest.raises(interruption), Recorder("Owner").measurement(trainer, "group"):
            raise interruption

    fit(Learner(), batches(1), check, logger=remembering_logger)
    assert not remembering_logger.values_of("group/converged")


def test_warnings_name_the_owner_and_come_once_a_kind_and_recorder():
    recorder = Recorder("Owner")
    with pytest.warns(CurvatureWarning, match="^`Owner`: first$"):
        recorder.warn_once("kind", "first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorder.warn_once("kind", "second")
    with pytest.warns(CurvatureWarning, match="third"):
        recorder.warn_once("other kind", "third")
    with pytest.warns(CurvatureWarning, match="first"):
        Recorder("Owner").warn_once("kind", "first")


def test_a_watched_operator_reports_every_product():
    class Twice:
        size, dtype, device = 3, torch.float64, torch.device("cpu")

        def matvec(self, vector: Tensor) -> Tensor:
            return 2 * vector

    reports = []
    watched = WatchedOperator(Twice(), lambda: reports.append(1))
    assert (watched.size, watched.dtype, watched.device) == (3, torch.float64, torch.device("cpu"))
    for _ in range(4):
        assert torch.equal(watched.matvec(torch.ones(3)), torch.full((3,), 2.0))
    assert len(reports) == 4


# Progress.


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(recording, "_PATIENCE", -1.0)


def interrupted(trainer: pl.Trainer) -> None:
    """A measurement that fails after its bar has come up."""
    with progress(trainer, "CurvatureProbe") as report:
        report()
        raise ArithmeticError


def rich_bar() -> tuple[RichProgressBar, io.StringIO]:
    terminal = io.StringIO()
    console = {"file": terminal, "force_terminal": True, "width": 160, "height": 20}
    return RichProgressBar(refresh_rate=10, console_kwargs=console), terminal


@pytest.mark.usefixtures("impatient")
def test_rich_bar_is_a_task_in_the_display_of_the_trainer(fit):
    bar, terminal = rich_bar()

    def described() -> list[str]:
        return [task.description for task in bar.progress.tasks]

    def check(trainer: pl.Trainer, *args: Any) -> None:
        before = described()
        with progress(trainer, "CurvatureProbe") as report:
            assert described() == before
            for count in (1, 2, 3):
                report()
                task = bar.progress.tasks[-1]
                assert task.description == "CurvatureProbe"
                assert task.completed == count
        assert described() == before

    fit(Learner(), batches(3), check, callbacks=(bar,), enable_progress_bar=True, max_epochs=2)
    assert "CurvatureProbe" in terminal.getvalue()


@pytest.mark.usefixtures("impatient")
def test_rich_bars_of_the_trainer_go_on_after_ours(fit):
    bar, terminal = rich_bar()

    def check(trainer: pl.Trainer, *args: Any) -> None:
        with progress(trainer, "CurvatureProbe") as report:
            report()

    data = pl.LightningDataModule.from_datasets(torch.randn(3, 2), torch.randn(3, 2))
    fit(Learner(), data, check, callbacks=(bar,), enable_progress_bar=True, max_epochs=2)
    for text in ("Epoch 0/1", "Epoch 1/1", "3/3", "CurvatureProbe"):
        assert text in terminal.getvalue()


@pytest.mark.usefixtures("impatient")
def test_rich_task_is_removed_when_the_measurement_fails(fit):
    bar, _ = rich_bar()

    def check(trainer: pl.Trainer, *args: Any) -> None:
        before = len(bar.progress.tasks)
        with pytest.raises(ArithmeticError):
            interrupted(trainer)
        assert len(bar.progress.tasks) == before

    fit(Learner(), batches(2), check, callbacks=(bar,), enable_progress_bar=True)


class Bars:
    """The tqdm bars that are open at a moment, with what they show."""

    @staticmethod
    def open() -> list[Any]:
        return sorted((bar for bar in Tqdm._instances if not bar.disable), key=lambda bar: abs(bar.pos))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("process_position", [0, 2])
def test_tqdm_bar_is_the_line_below_that_of_the_trainer(fit, capsys, process_position):
    def check(trainer: pl.Trainer, *args: Any) -> None:
        [own] = Bars.open()
        with progress(trainer, "CurvatureProbe") as report:
            assert Bars.open() == [own]
            for count in (1, 2, 3):
                report()
                first, second = Bars.open()
                assert first is own
                assert second.n == count
                assert second.desc.startswith("CurvatureProbe")
                assert abs(second.pos) == 2 * process_position + 1
        assert Bars.open() == [own]

    fit(
        Learner(),
        batches(2),
        check,
        callbacks=(TQDMProgressBar(process_position=process_position),),
        enable_progress_bar=True,
    )
    captured = capsys.readouterr()
    assert "CurvatureProbe" in captured.out
    assert "CurvatureProbe" not in captured.err


@pytest.mark.usefixtures("impatient")
def test_tqdm_bar_is_closed_when_the_measurement_fails(fit):
    def check(trainer: pl.Trainer, *args: Any) -> None:
        with pytest.raises(ArithmeticError):
            interrupted(trainer)
        assert len(Bars.open()) == 1

    fit(Learner(), batches(2), check, callbacks=(TQDMProgressBar(),), enable_progress_bar=True)


class BrokenBar:
    """A bar on a terminal that goes away: at its opening, while it counts, or when it is closed."""

    def __init__(self, *broken: str) -> None:
        self._broken = broken
        self._does("open")

    def _does(self, what: str) -> None:
        if what in self._broken:
            raise BrokenPipeError(what)

    def show(self, count: int) -> None:
        self._does("show")

    def close(self) -> None:
        self._does("close")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("broken", ["open", "show", "close"])
def test_a_bar_that_cannot_be_drawn_does_not_end_the_measurement(fit, monkeypatch, broken):
    """There is a bar in the first process only: if it gave up, the others would wait for it in their next product."""
    monkeypatch.setattr(recording, "_open_bar", lambda trainer, description: BrokenBar(broken))

    def check(trainer: pl.Trainer, *args: Any) -> None:
        with progress(trainer, "CurvatureProbe") as report:
            report()
            report()

    with pytest.warns(CurvatureWarning, match=f"progress bar .* cannot be drawn: BrokenPipeError: {broken}"):
        _, results = fit(Learner(), batches(1), check)
    assert results == [None]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("callbacks", [(), (TQDMProgressBar(refresh_rate=0),)], ids=["no-bar", "disabled"])
def test_nothing_is_shown_where_the_trainer_shows_nothing(fit, capsys, callbacks):
    def check(trainer: pl.Trainer, *args: Any) -> None:
        with progress(trainer, "CurvatureProbe") as report:
            report()
            assert not Bars.open()

    fit(Learner(), batches(1), check, callbacks=callbacks, enable_progress_bar=bool(callbacks))
    captured = capsys.readouterr()
    assert "CurvatureProbe" not in captured.out + captured.err


@pytest.mark.parametrize("kind", ["rich", "tqdm"])
def test_nothing_is_shown_before_the_patience_is_over(fit, monkeypatch, capsys, kind):
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(recording, "time", clock)
    bar, _ = rich_bar() if kind == "rich" else (TQDMProgressBar(), None)

    def count() -> int:
        return len(bar.progress.tasks) if kind == "rich" else len(Bars.open())

    def check(trainer: pl.Trainer, *args: Any) -> None:
        with progress(trainer, "CurvatureProbe") as report:
            for clock.now, expected in ((0.0, 1), (1.0, 1), (2.0, 1), (2.1, 2), (9.0, 2)):
                report()
                assert count() == expected

    fit(Learner(), batches(1), check, callbacks=(bar,), enable_progress_bar=True)
    capsys.readouterr()


def test_standard_output_is_looked_up_when_the_bar_opens(monkeypatch):
    """A bar that is bound to the output of import time would escape redirection."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    bar = recording._TqdmBar(0, "CurvatureProbe")
    bar.show(1)
    bar.close()
    assert "CurvatureProbe" in stream.getvalue()
