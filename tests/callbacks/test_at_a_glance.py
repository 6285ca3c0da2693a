"""What the user sees of a run without looking for it: the figure, the sentences, the progress bar, the warning."""

import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_utilities.core import rank_zero
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from lyapunov_lightning import (
    CurvatureProbe,
    HessianConfig,
    LossAlongEigvecScanner,
    NegativeCurvatureTracker,
    NudgedSGDHook,
    QuasiNewtonLRController,
    Schedule,
    SpectrumTracker,
)
from lyapunov_lightning.curvature.errors import CurvatureWarning, MeasurementError
from lyapunov_lightning.training.reporting import recording
from tests.modules import SmallRegressor, regression_data, regression_loader
from tests.training_runs import train


def trained(*callbacks: Any, lr: float = 0.1, optimizer: Any = None, full_batch: bool = False, **options: Any) -> Any:
    """A run of 24 steps, and its trainer."""
    torch.manual_seed(0)
    module = SmallRegressor(optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=lr)))
    data = DataLoader(regression_data(), 48) if full_batch else regression_loader()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no logger.*")
        return train(module, *callbacks, loader=data, **{"max_steps": 24, "max_epochs": -1, **options})


# The summary.


@pytest.fixture
def console(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What Lightning says on the console, through a logger that passes nothing on."""
    logger = rank_zero.log
    level = logger.level
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("lr", "kind", "sentence"),
    [
        (0.005, "room", "The sharpness stayed below the stability limit"),
        (5.0, "too_fast", "The learning rate is too large"),
    ],
)
def test_the_summary_is_said_and_shown_at_the_end(console, tmp_path, lr, kind, sentence):
    probe, logger = CurvatureProbe(2), TensorBoardLogger(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*above the stability limit.*")
        trained(probe, lr=lr, full_batch=True, logger=logger, max_steps=60)
    assert probe.diagnosis().kind == kind
    assert {record.getMessage() for record in console.records if sentence in record.getMessage()} == {
        f"CurvatureProbe: {probe.diagnosis()}"
    }
    events = EventAccumulator(logger.log_dir, {"tensors": 0, "images": 0, "scalars": 0}).Reload()
    [text] = events.Tensors("curvature/summary/text_summary")
    assert sentence in text.tensor_proto.string_val[0].decode()
    assert events.Tags()["images"] == ["curvature/at_a_glance"]
    assert events.Images("curvature/at_a_glance")[-1].width == 880  # the size for cards


def test_the_summary_is_said_though_the_figure_was_drawn_before(console):
    """The last measurement is in an earlier epoch than the last step."""
    probe = CurvatureProbe(schedule=Schedule(first_n_steps=4))
    trained(probe, lr=0.005)
    assert f"CurvatureProbe: {probe.diagnosis()}" in {record.getMessage() for record in console.records}


def test_adam_is_judged_by_its_own_limit():
    probe = CurvatureProbe(1)
    trained(probe, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-5), full_batch=True)
    assert probe.diagnosis().kind == "room"
    assert probe.diagnosis().level == pytest.approx(probe.results[-1].stability_ratio, rel=0.2)
    upper = probe.plot().axes[0]
    labels = [
        text.get_text()
        for legend in [upper.get_legend(), *probe.plot().legends]
        if legend
        for text in legend.get_texts()
    ]
    assert any("preconditioned" in label for label in labels)


def test_what_did_not_converge_is_told(console):
    probe = CurvatureProbe(1, "power", tol=1e-14, eigenvalue_every=1)
    trained(probe, max_steps=6)
    assert probe.diagnosis().kind == "not_converged"


def test_a_probe_of_the_lower_end_has_a_figure_and_a_verdict_by_the_batch_sharpness(console):
    probe = CurvatureProbe(4, end="smallest")
    trained(probe)
    assert probe.diagnosis().kind == "room"
    assert [result.stability_ratio for result in probe.results] == pytest.approx(
        [result.batch_sharpness * 0.1 / 2 for result in probe.results]
    )
    assert {result.eigenvalue_ratio for result in probe.results} == {None}
    assert probe.plot().axes[0].lines
    assert str(probe.diagnosis()) in console.text


def test_a_probe_that_knows_no_limit_has_no_verdict(console):
    probe = CurvatureProbe(4)
    trained(probe, lr=0.0)
    assert len(probe.results) == 6
    assert probe.diagnosis().kind == "unknown"
    assert probe.plot().axes[0].lines
    assert "sharpness" not in console.text


def test_the_losses_of_the_figure_are_those_of_the_training():
    seen: list[float] = []

    class Noting(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            seen.append(float(outputs["loss"]))

    probe = CurvatureProbe(5)
    trained(probe, Noting())
    drawn = [line.get_ydata() for line in probe.plot().axes[-1].lines if len(line.get_ydata()) == len(seen)]
    assert drawn[0].tolist() == pytest.approx(seen, rel=1e-6)


class Interrupting(pl.Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 10:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("of the user's")], ids=["Ctrl-C", "error"])
@pytest.mark.pictures
def test_a_run_that_breaks_off_shows_what_it_measured(console, tmp_path, error):
    probe = CurvatureProbe(1)
    with pytest.raises((KeyboardInterrupt, SystemExit, ValueError)):
        trained(probe, Interrupting(error), lr=0.005, logger=CSVLogger(tmp_path, version=0))
    assert "The sharpness stayed below" in console.text
    assert (tmp_path / "lightning_logs" / "version_0" / "curvature-at_a_glance.png").is_file()


@pytest.mark.pictures
def test_a_run_without_logger_leaves_a_picture_and_says_where(console, tmp_path):
    trained(CurvatureProbe(4, log_prefix="mine"), default_root_dir=tmp_path)
    assert (tmp_path / "mine-curvature-at_a_glance.png").is_file()
    assert f"CurvatureProbe (mine): drawn in {tmp_path}" in console.text


@pytest.mark.pictures
def test_a_further_run_leaves_the_picture_of_an_earlier_one_as_it_was(console, tmp_path, monkeypatch):
    monkeypatch.setattr(
        recording, "_DRAWING_SHARE", math.inf
    )  # after each epoch: the pictures of a run replace another
    trained(CurvatureProbe(4), default_root_dir=tmp_path)
    first = (tmp_path / "curvature-at_a_glance.png").read_bytes()
    probe = CurvatureProbe(8)
    for number in (1, 2):
        trained(probe, default_root_dir=tmp_path)
        assert f"drawn in {tmp_path / f'curvature-at_a_glance.{number}.png'}" in console.text
    assert (tmp_path / "curvature-at_a_glance.png").read_bytes() == first
    assert len([*tmp_path.glob("*.png")]) == 3


def test_an_outlet_that_fails_is_warned_of_and_the_run_goes_on(tmp_path):
    class Broken(TensorBoardLogger):
        @property
        def experiment(self) -> Any:
            class Experiment:
                def __getattr__(self, name: str) -> Any:
                    def call(*args: Any, **kwargs: Any) -> None:
                        if name in ("add_figure", "add_text"):
                            raise ConnectionError("the service is away")

                    return call

            return Experiment()

    with pytest.warns(CurvatureWarning, match="the service is away") as caught:
        trainer = trained(CurvatureProbe(4), logger=Broken(tmp_path))
    assert trainer.global_step == 24
    assert len([warning for warning in caught if warning.category is CurvatureWarning]) == 2


def test_figures_are_drawn_in_between_as_far_as_they_are_cheap(monkeypatch, tmp_path):
    drawn: list[int] = []

    class Noted(TensorBoardLogger):
        pass

    def show(trainer: Any, tag: str, figure: Figure, step: int, folder: Any, guard: Any) -> None:
        drawn.append(step)

    monkeypatch.setattr(recording, "show_figure", show)
    # Before the first one its cost is a guess, afterwards that of the last one.
    for share, guess, steps in ((math.inf, 0.3, [6, 12, 18, 24]), (0.0, 0.3, [24]), (0.0, 0.0, [6, 24])):
        drawn.clear()
        monkeypatch.setattr(recording, "_DRAWING_SHARE", share)
        monkeypatch.setattr(recording, "_FIRST_DRAWING_SECONDS", guess)
        trained(CurvatureProbe(1), logger=Noted(tmp_path))
        assert drawn == steps


# The progress bar.


def test_the_progress_bar_shows_the_last_ratio():
    shown: list[Any] = []

    class Looking(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            shown.append(trainer.progress_bar_metrics.get("sharpness/limit"))

    probe = CurvatureProbe(5, prog_bar=True)
    trained(probe, Looking())
    assert shown == [probe.results[step // 5].stability_ratio for step in range(24)]
    assert all(value is not None for value in shown)


def test_the_progress_bar_is_left_alone_by_default():
    trainer = trained(CurvatureProbe(5))
    assert set(trainer.progress_bar_metrics) == set(trained().progress_bar_metrics)


# The warning.


def test_a_learning_rate_that_is_too_large_is_warned_of_once_while_training():
    """Beyond the edge of a quadratic the loss rises at every step; the ratio stays where it is."""

    class Quadratic(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.tensor([1.0, 1e-6]))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (torch.tensor([1.0, 10.0]) * self.x**2).sum() / 2

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.25)  # 2.5 / 10

    probe = CurvatureProbe(2)
    trainer = pl.Trainer(
        max_steps=80,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[probe],
        accelerator="cpu",
    )
    with pytest.warns(CurvatureWarning) as caught:
        trainer.fit(Quadratic(), DataLoader(torch.zeros(100, 1)))
    told = [str(warning.message) for warning in caught if "above the stability limit" in str(warning.message)]
    assert len(told) == 1
    assert "1.25 times it at step" in told[0]
    assert told[0].endswith("The learning rate is too large: at that sharpness the limit is met at 0.2.")


# Results, plots, repr.

CALLBACKS = {
    "probe": lambda: CurvatureProbe(6, end="both"),
    "spectrum": lambda: SpectrumTracker(6, 2, 1, random_vectors=2, density_steps=4),
    "negative": lambda: NegativeCurvatureTracker(6, 2, freeze_at=[6]),
    "scanner": lambda: LossAlongEigvecScanner(6),
    "controller": lambda: QuasiNewtonLRController(),
    "nudge": lambda: NudgedSGDHook(6, k=2, tol=0.1),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_every_callback_has_results_plots_and_says_what_it_is(name):
    callback = CALLBACKS[name]()
    made = repr(callback).partition("):")[0]
    assert repr(callback).endswith("): nothing measured yet")
    assert callback._repr_png_() is None
    with pytest.raises(MeasurementError, match=r"has measured nothing yet that could be drawn. Fit a module"):
        callback.plot()
    trained(callback)
    results = callback.results
    assert [result.step for result in results] == sorted(result.step for result in results)
    assert repr(callback) == f"{made}): {len(results)} measurements up to step {results[-1].step}"
    for figure_name in callback.figures():
        figure = callback.plot(figure_name)
        assert isinstance(figure, Figure)
        assert any(panel.lines or panel.collections or panel.patches for panel in figure.axes), figure_name
        own = Figure().subplots(1, 2)[1]
        assert callback.plot(figure_name, ax=own) is own
        assert own.get_ylabel() == figure.axes[0].get_ylabel()
        assert [len(line.get_xdata()) for line in own.lines] == [len(line.get_xdata()) for line in figure.axes[0].lines]
        assert own.lines or own.collections
    table = results.to_pandas()
    assert [*table.index] == [result.step for result in results]
    assert table["epoch"].tolist() == [result.epoch for result in results]
    assert table.iloc[-1].dropna().drop("epoch").to_dict() == {**results[-1].scalars(), **results[-1].table()}
    with pytest.raises(ValueError, match=r"`name` should be one of .*, got 'nonsense'"):
        callback.plot("nonsense")
    assert callback._repr_png_().startswith(b"\x89PNG")


def test_repr_tells_the_arguments_that_are_not_the_defaults():
    probe = CurvatureProbe(end="both", schedule=Schedule(max_overhead=0.1), hessian=HessianConfig(mode="eval"))
    assert repr(probe).startswith("CurvatureProbe(end='both', schedule=Schedule(every_n_steps=None, ")
    assert "hessian=HessianConfig(data=None, num_batches=None, fraction=None, mode='eval'" in repr(probe)
    assert repr(CurvatureProbe()) == "CurvatureProbe(): nothing measured yet"


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_than_fit_say_where_to_turn(stage):
    class Evaluated(SmallRegressor):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

        test_step = predict_step = validation_step

    probe = CurvatureProbe()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[probe],
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    with pytest.warns(CurvatureWarning, match=rf"nothing during `trainer.{stage}`.*`lyapunov_lightning.measure"):
        getattr(trainer, stage)(Evaluated(), DataLoader(torch.zeros(2, 3).double()))
    assert probe.results == []
