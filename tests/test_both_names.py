"""Runs with `lightning.pytorch` and with `pytorch_lightning` are the same bit by bit, callbacks, figures and all."""

import functools
import io
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import lightning.pytorch
import lightning.pytorch.cli
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lyapunov_lightning import CurvatureProbe, HessianConfig, QuasiNewtonLRController, SpectrumTracker
from lyapunov_lightning.training.reporting import progress

pytorch_lightning = pytest.importorskip("pytorch_lightning", reason="the second name is not installed")
pytest.importorskip("pytorch_lightning.cli")

LIBRARIES = [lightning.pytorch, pytorch_lightning]

both_names = pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.__name__)

OWN_TAGS = re.compile(r"(^|/)(curvature|spectrum|negative|scan|quasi_newton|nudge)(_details)?/")

TAGS_WITH_TIMES = re.compile(r"_details/seconds$")

# Four steps make an epoch: in the second one a measurement comes after the first step, whose logging it could undo.
READING: dict[str, Callable[[], Any]] = {
    "probe": lambda: CurvatureProbe(3),
    "tracker": lambda: SpectrumTracker(3, largest=2, smallest=1, hessian=HessianConfig(fraction=0.5)),
}

CALLBACKS: dict[str, Callable[[], Any]] = {**READING, "controller": lambda: QuasiNewtonLRController(1)}


class Body:
    """What a LightningModule of either library is to hold: state, dropout, a metric and logging."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
        self.mean = MeanMetric()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.layers(inputs), targets)
        self.mean.update(loss.detach())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("mean_loss", self.mean)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.layers(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)


class LightningLearner(Body, lightning.pytorch.LightningModule):
    pass


class PytorchLightningLearner(Body, pytorch_lightning.LightningModule):
    pass


LEARNERS = {lightning.pytorch: LightningLearner, pytorch_lightning: PytorchLightningLearner}


@dataclass
class Outcome:
    """What a run leaves behind, in values that `==` compares bit by bit."""

    tensors: dict[str, bytes]
    momentum: list[bytes]
    generators: tuple[bytes, Any, str]
    scalars: dict[str, list[tuple[int, float]]]
    """All curves in TensorBoard but the times, by tag."""
    figures: dict[str, list[tuple[int, bytes]]]
    layout: list[bytes]

    @property
    def of_the_user(self) -> "Outcome":
        """Without what this package's callbacks wrote."""
        scalars = {tag: curve for tag, curve in self.scalars.items() if not OWN_TAGS.search(tag)}
        return Outcome(self.tensors, self.momentum, self.generators, scalars, {}, [])


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def run(library: ModuleType, *callbacks: Any, **settings: Any) -> Outcome:
    """Trains for two epochs of four steps from a fixed seed, and notes the outcome."""
    library.seed_everything(3, verbose=False)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(62, 3, generator=generator)
    data = TensorDataset(inputs, inputs.prod(dim=1, keepdim=True))
    with tempfile.TemporaryDirectory() as folder:
        logger = library.loggers.TensorBoardLogger(folder, name=library.__name__)
        trainer = library.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=2,
            log_every_n_steps=1,
            logger=logger,
            callbacks=list(callbacks),
            **{
                "enable_checkpointing": False,
                "enable_model_summary": False,
                "enable_progress_bar": False,
                **settings,
            },
        )
        module = LEARNERS[library]()
        trainer.fit(module, DataLoader(data, 16, shuffle=True), DataLoader(data, 31))
        assert trainer.global_step == 8
        generators = (bits(torch.get_rng_state()), random.getstate(), repr(np.random.get_state()))
        state = trainer.optimizers[0].state
        events = EventAccumulator(logger.log_dir, {"images": 0, "scalars": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    return Outcome(
        {name: bits(tensor) for name, tensor in module.state_dict().items()},
        [bits(state[parameter]["momentum_buffer"]) for parameter in module.parameters()],
        generators,
        {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in tags["scalars"]
            if not TAGS_WITH_TIMES.search(tag)
        },
        {tag: [(image.step, image.encoded_image_string) for image in events.Images(tag)] for tag in tags["images"]},
        [event.tensor_proto.SerializeToString() for tag in tags["tensors"] for event in events.Tensors(tag)],
    )


@functools.cache
def plain_run(library: ModuleType) -> Outcome:
    """Without a callback of ours, once for all tests."""
    return run(library)


@functools.cache
def run_with(library: ModuleType, name: str) -> tuple[Outcome, list[dict[str, float]]]:
    """With one of the callbacks, once for all tests, and what it keeps of its measurements."""
    callback = CALLBACKS[name]()
    return run(library, callback), results_of(callback)


@functools.cache
def run_without_a_bar(library: ModuleType) -> Outcome:
    """What a probe leaves behind where no progress is shown."""
    return run(library, CurvatureProbe(2))


@pytest.fixture
def process_group() -> Iterator[None]:
    """Leaves the process as it was, after a strategy that joins a group of ranks."""
    environment = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


def results_of(callback: Any) -> list[dict[str, float]]:
    """What a callback keeps of its measurements, without the times."""
    return [
        {tag: value for tag, value in result.scalars().items() if not TAGS_WITH_TIMES.search(tag)}
        for result in callback.results
    ]


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_measures_and_acts_the_same_under_both_names(name):
    (one, found), (other, others) = (run_with(library, name) for library in LIBRARIES)
    assert one == other
    assert any(OWN_TAGS.search(tag) for tag in one.scalars)
    assert found == others != []


@both_names
@pytest.mark.parametrize("name", READING)
def test_a_reading_callback_changes_nothing_under_either_name(library, name):
    outcome, _ = run_with(library, name)
    assert outcome.of_the_user == plain_run(library)


@both_names
def test_the_controller_acts_under_either_name(library):
    acted, _ = run_with(library, "controller")
    assert acted.scalars["quasi_newton/learning_rate"]
    assert acted.tensors != plain_run(library).tensors


@both_names
def test_the_figures_of_the_tracker_are_in_tensorboard_under_either_name(library):
    outcome, _ = run_with(library, "tracker")
    assert outcome.figures
    assert all(tag.startswith("spectrum/") and images for tag, images in outcome.figures.items())


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_distributed_strategy_is_recognised_under_both_names(name):
    def with_ddp(library: ModuleType) -> Outcome:
        return run(library, CALLBACKS[name](), strategy=library.strategies.DDPStrategy(process_group_backend="gloo"))

    one, other = map(with_ddp, LIBRARIES)
    assert one == other
    assert any(OWN_TAGS.search(tag) for tag in one.scalars)


@both_names
def test_a_trainer_takes_a_callback_without_a_list(library):
    probe = CurvatureProbe()
    trainer = library.Trainer(accelerator="cpu", logger=False, callbacks=probe)
    assert probe in trainer.callbacks


# Progress bars.


@both_names
def test_a_measurement_is_a_task_in_the_display_of_a_rich_bar(library, monkeypatch):
    monkeypatch.setattr(progress, "_SHOWN_AFTER_SECONDS", -1.0)
    terminal = io.StringIO()
    console = {"file": terminal, "force_terminal": True, "width": 160}
    bar = library.callbacks.RichProgressBar(console_kwargs=console)
    outcome = run(library, CurvatureProbe(2), bar, enable_progress_bar=True)
    assert "CurvatureProbe" in terminal.getvalue()
    assert outcome == run_without_a_bar(library)


@both_names
def test_a_measurement_has_a_line_beside_a_tqdm_bar(library, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SHOWN_AFTER_SECONDS", -1.0)
    outcome = run(library, CurvatureProbe(2), library.callbacks.TQDMProgressBar(), enable_progress_bar=True)
    assert "CurvatureProbe" in capsys.readouterr().out
    assert outcome == run_without_a_bar(library)


# Refusals.


@both_names
@pytest.mark.parametrize("caught_as", LIBRARIES, ids=lambda library: f"as-{library.__name__}")
def test_a_refusal_is_caught_as_the_exception_of_either_name(library, caught_as):
    module = LEARNERS[library]()
    module.automatic_optimization = False
    trainer = library.Trainer(accelerator="cpu", max_epochs=1, logger=False, callbacks=[CurvatureProbe()])
    loader = DataLoader(TensorDataset(torch.randn(4, 3), torch.randn(4, 1)), 2)
    with pytest.raises(caught_as.utilities.exceptions.MisconfigurationException, match=r"`CurvatureProbe`.*manual"):
        trainer.fit(module, loader)


# The command line.


@both_names
def test_a_command_line_takes_a_callback_by_its_class_path(library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(
        """
trainer:
  accelerator: cpu
  logger: false
  callbacks:
    - class_path: lyapunov_lightning.CurvatureProbe
      init_args:
        every_n_steps: 5
        hessian:
          data: fixed
          fraction: 0.5
"""
    )
    cli = library.cli.LightningCLI(
        LEARNERS[library], args=["--config", "config.yaml"], run=False, save_config_callback=None
    )
    [probe] = [callback for callback in cli.trainer.callbacks if isinstance(callback, CurvatureProbe)]
    assert isinstance(probe, library.Callback)
