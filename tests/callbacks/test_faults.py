"""Whatever goes wrong after a measurement, or while its failure is told: the training goes on, with one warning."""

import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lyapunov_lightning import CurvatureProbe, HessianConfig, NudgedSGDHook, SpectrumTracker
from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.training.reporting import outlets
from tests.modules import MemoryLogger, SmallRegressor
from tests.training_runs import train

STEPS = 6


def told(run: Callable[[], Any]) -> list[str]:
    """Our warnings during a run, which has to reach its end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run().global_step == STEPS
    return [str(warning.message) for warning in caught if issubclass(warning.category, CurvatureWarning)]


class Unreliable(MemoryLogger):
    """Raises at some of the calls for our tags."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        super().__init__()
        self.fails = fails

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        assert step is not None
        if any("/" in tag for tag in metrics) and self.fails(step):
            raise ConnectionError("out of reach")
        super().log_metrics(metrics, step)


def run(tmp_path: Path, *callbacks: Any, **options: Any) -> Any:
    options = {"logger": MemoryLogger(), "max_steps": STEPS, "log_every_n_steps": 1, **options}
    return train(SmallRegressor(), *callbacks, default_root_dir=tmp_path, **options)


def test_a_logger_that_is_away_for_a_while_gets_all_in_the_end(tmp_path):
    now = {"step": 0}

    def is_away(step: int) -> bool:
        now["step"] = max(now["step"], step)
        return 1 <= now["step"] <= 3

    logger, probe = Unreliable(is_away), CurvatureProbe(1)
    [message] = told(lambda: run(tmp_path, probe, logger=logger))
    assert "`Unreliable` does not take what was measured" in message
    assert "ConnectionError: out of reach" in message
    curve = logger.curve("curvature/lambda_max")
    assert curve == {result.step: result.lambda_max for result in probe.results}
    assert len(curve) == STEPS


def test_a_logger_that_never_takes_anything_leaves_the_others_alone(tmp_path):
    broken, well, probe = Unreliable(lambda step: True), MemoryLogger(), CurvatureProbe(1)
    assert len(told(lambda: run(tmp_path, probe, logger=[broken, well]))) == 1
    assert len(well.curve("curvature/lambda_max")) == len(probe.results) == STEPS


def test_an_acting_callback_acts_where_nothing_can_be_logged(tmp_path):
    parameters = []
    for fails in (False, True):
        torch.manual_seed(0)
        module = SmallRegressor()
        hook = NudgedSGDHook(2, 2, hessian=HessianConfig(fraction=0.5))
        logger = Unreliable(lambda step, fails=fails: fails)
        options = {"max_steps": STEPS, "log_every_n_steps": 1, "default_root_dir": tmp_path}
        assert len(told(lambda h=hook, m=module, o=options, lo=logger: train(m, h, logger=lo, **o))) == fails
        parameters.append([parameter.detach() for parameter in module.parameters()])
    assert all(map(torch.equal, *parameters))


def test_a_layout_of_charts_that_is_refused_ends_nothing(tmp_path, monkeypatch):
    def refuse(*args: Any) -> None:
        raise ValueError("no charts")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_custom_scalars", refuse)
    messages = told(lambda: run(tmp_path, CurvatureProbe(1), SpectrumTracker(1, 1), logger=TensorBoardLogger(tmp_path)))
    assert len(messages) == 1
    assert "the layout of charts could not be logged" in messages[0]


class Moved:
    """A `save_dir` that is a file from one step to another."""

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self.folder, self.first, self.last = folder, first, last

    def loss(self, module: Any, batch: Any) -> torch.Tensor:
        step, is_away = module.trainer.global_step, self.folder.is_file()
        if self.first <= step <= self.last and not is_away:
            if self.folder.exists():
                self.folder.rename(self.folder.with_name("moved"))
            self.folder.touch()
        if step > self.last and is_away:
            self.folder.unlink()
            if self.folder.with_name("moved").exists():
                self.folder.with_name("moved").rename(self.folder)
        return module.training_step(batch, 0)


@pytest.mark.parametrize("first", [0, 2])
def test_a_folder_that_is_away_for_a_while_has_all_in_the_end(tmp_path, first):
    folder = tmp_path / "out"
    if first == 0:  # from before the beginning on
        folder.touch()
    hessian = HessianConfig("batch", loss_fn=Moved(folder, first, 3).loss)
    tracker = SpectrumTracker(1, 2, hessian=hessian, save_dir=str(folder), save_vectors=True)
    messages = told(lambda: run(tmp_path, tracker))
    assert len(messages) == 1, messages
    message = messages[0]
    assert "cannot be written to `save_dir`" in message
    table = pd.read_csv(folder / "spectrum.csv", float_precision="round_trip")
    largest = table[table.name == "spectrum/lambda_1"]
    assert dict(zip(largest.step, largest.value, strict=True)) == {r.step: r.largest[0] for r in tracker.results}
    assert len(largest) == STEPS
    assert len([*folder.glob("*.safetensors")]) == STEPS


def test_a_folder_that_never_comes_is_told_of_once_and_costs_no_measurement(tmp_path, caplog):
    (tmp_path / "out").touch()
    tracker = SpectrumTracker(1, 2, save_dir=str(tmp_path / "out"), save_vectors=True)
    assert len(told(lambda: run(tmp_path, tracker))) == 1
    assert len(tracker.results) == STEPS


@pytest.mark.pictures
def test_a_figure_that_a_logger_refuses_is_a_file(tmp_path, monkeypatch):
    def refuse(*args: Any) -> None:
        raise ValueError("no figures")

    monkeypatch.setitem(outlets._FIGURES, "TensorBoardLogger", refuse)
    messages = told(lambda: run(tmp_path, CurvatureProbe(1), logger=TensorBoardLogger(tmp_path)))
    assert len(messages) == 1
    assert "a figure could not be shown. ValueError: no figures" in messages[0]
    assert [path.name for path in tmp_path.rglob("*.png")] == ["curvature-at_a_glance.png"]


class BrokenError(Exception):
    def __str__(self) -> str:
        raise ValueError("not even this")


def failing_with(error: BaseException) -> HessianConfig:
    def loss(module: Any, batch: Any) -> torch.Tensor:
        raise error

    return HessianConfig("batch", loss_fn=loss)


@pytest.mark.parametrize("error", [BrokenError(), MemoryError(), ValueError("in words"), RecursionError("too deep")])
@pytest.mark.parametrize("filters", ["always", "error"])
def test_the_guard_cannot_be_broken(tmp_path, monkeypatch, said_in_place_of_warnings, error, filters):
    def no_memory(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(traceback, "extract_tb", no_memory)
    probe = CurvatureProbe(1, hessian=failing_with(error))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(filters, CurvatureWarning)
        assert run(tmp_path, probe).global_step == STEPS
    messages = [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)] + said_in_place_of_warnings
    said_in_place_of_warnings.clear()
    [message] = messages
    assert f"the measurement at step 0 failed, and training goes on without it. {type(error).__name__} at" in message
