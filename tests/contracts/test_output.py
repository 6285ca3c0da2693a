"""What the package takes for granted of loggers, progress bars and messages, without its being promised.

When a new version breaks one of these, the message says which part of the package depends on it.
"""

import inspect
import io
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning_utilities.core import rank_zero

from tests.contracts.live import Hooks, Module, needed_by

RECORDING = needed_by("training/recording")
PROGRESS = needed_by("training/progress")

# Scalars, figures and messages.


def test_callback_metrics_is_a_live_dictionary(fit):
    def write(trainer: pl.Trainer, *args: Any) -> None:
        trainer.callback_metrics.update({"mine": torch.tensor(3.0)})
        assert trainer.callback_metrics["mine"] == 3, RECORDING + "Recorder.log writes into it"

    trainer = fit(Module(), Hooks(on_train_batch_start=write), max_epochs=2)
    assert trainer.callback_metrics["mine"] == 3, RECORDING + "EarlyStopping finds the values at the end of an epoch"


def test_figures_are_taken_by_these_methods(tmp_path):
    writer = TensorBoardLogger(tmp_path).experiment
    assert [*inspect.signature(writer.add_figure).parameters][:3] == ["tag", "figure", "global_step"], RECORDING
    assert callable(writer.add_custom_scalars), RECORDING + "curves that belong together are on one chart"
    assert [*inspect.signature(WandbLogger.log_image).parameters][1:4] == ["key", "images", "step"], RECORDING


def test_rank_zero_functions_are_told_by_a_rank_attribute():
    assert rank_zero.rank_zero_only.rank == 0, RECORDING + "warnings come from the first rank only"


def test_both_names_of_the_library_log_through_one_module():
    message = needed_by("training/lightning_names") + "importing one name leaves the messages of the other alone"
    assert {"log", "rank_zero_deprecation_category"} <= vars(rank_zero).keys(), message


# Progress bars.


def test_rich_bar_has_one_display_that_takes_tasks_of_unknown_length(fit):
    terminal = io.StringIO()
    bar = RichProgressBar(console_kwargs={"file": terminal, "force_terminal": True, "width": 160})

    def add(trainer: pl.Trainer, *args: Any) -> None:
        message = PROGRESS + "_RichBar adds a task to the display of the trainer"
        assert trainer.progress_bar_callback is bar, message
        assert bar.is_enabled, message
        before = list(bar.progress.task_ids)
        task = bar.progress.add_task("mine", total=float("inf"))
        bar.progress.update(task, completed=3)
        bar.progress.refresh()
        bar.progress.remove_task(task)
        assert bar.progress.task_ids == before, message

    fit(Module(), bar, Hooks(on_train_batch_start=add), enable_progress_bar=True, limit_train_batches=2)
    assert "mine" in terminal.getvalue()


def test_tqdm_bar_is_drawn_at_twice_its_process_position(fit, capsys):
    bar = TQDMProgressBar(process_position=3)

    def look(trainer: pl.Trainer, *args: Any) -> None:
        assert trainer.progress_bar_callback is bar
        assert bar.process_position == 3, PROGRESS + "_TqdmBar takes the line below that of the trainer"
        assert abs(bar.train_progress_bar.pos) == 6, PROGRESS + "_TqdmBar takes the line below that of the trainer"
        assert isinstance(bar.train_progress_bar, Tqdm), PROGRESS + "_TqdmBar is of the same kind"

    fit(Module(), bar, Hooks(on_train_batch_start=look), enable_progress_bar=True, limit_train_batches=1)
    capsys.readouterr()


def test_a_trainer_without_bar_has_no_bar_callback(fit):
    assert fit(Module()).progress_bar_callback is None, PROGRESS + "_open_bar then shows nothing"
