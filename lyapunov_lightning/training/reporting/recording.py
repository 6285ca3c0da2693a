"""What a callback reports: scalars and figures to the loggers, sentences and warnings to the user.

Each of Lightning's private names that this needs is used in one place, and tested in `tests/contracts`.
"""

import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lyapunov_lightning.curvature.errors import CurvatureWarning, PeerFailureError
from lyapunov_lightning.training.lightning_names import Trainer, either, rank_zero_info, rank_zero_only
from lyapunov_lightning.training.reporting.outlets import show_figure, show_text
from lyapunov_lightning.training.reporting.series import SeriesFile
from lyapunov_lightning.training.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Charts = dict[str, Sequence[str]]
"""Titles of charts, each with regular expressions of the tags whose curves are on it."""

_DRAWING_SHARE = 0.02
"""Share of a run's time that may be spent on drawing before the run ends."""

_FIRST_DRAWING_SECONDS = 0.3
"""Seconds that the first drawing is expected to take, in which fonts and a backend are loaded."""


@dataclass
class Record:
    """The outcome of a measurement.

    Attributes:
        result: The result, to be set within the measurement; None if there is nothing to log now.
        seconds: Wall-clock time spent, once the measurement is over.
        has_failed: Whether it ended in an exception.

    """

    result: Result | None = None
    seconds: float = 0.0
    has_failed: bool = False


class Recorder:
    """Logs the results of one callback.

    Scalars go to every logger of the trainer, at Lightning's own step, and into ``trainer.callback_metrics``, where
    EarlyStopping and ModelCheckpoint find them. They do not go through ``self.log``, which repeats the last value of a
    scalar that is logged now and then.

    Args:
        owner: The callback's class, named in warnings.
        group: The group of its tags.
        prefix: Put in front of every tag, with a slash, if given.
        table: A file that gets the scalars too, without the prefix.

    """

    def __init__(self, owner: str, group: str, prefix: str | None = None, table: SeriesFile | None = None) -> None:
        self._owner = owner
        self._group = group
        self._table = table
        self._prefix = f"{prefix}/" if prefix else ""
        self._warned: set[str] = set()
        self._folder = Path()
        self._started, self._drawing_seconds, self._next_seconds = 0.0, 0.0, _FIRST_DRAWING_SECONDS
        self._files: list[Path] = []

    def start(self, trainer: Trainer, *, is_first: bool = True) -> None:
        """Begin a run: open the file, and warn of a run that has no logger.

        Args:
            trainer: The trainer.
            is_first: Whether this is the first of several callbacks; only that one warns.

        """
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # all ranks have to ask together
        self._started, self._drawing_seconds, self._files = time.perf_counter(), 0.0, []
        if self._table is not None and trainer.is_global_zero:
            self._table.begin(trainer.global_step)
        if is_first and not trainer.loggers and self._table is None:
            self.warn_once(
                "no logger",
                "the Trainer has no logger, so what is measured is found in `trainer.callback_metrics`, in the"
                " callback's `results` and in the pictures that are written at the end. Pass a logger to the Trainer to"
                " get curves.",
            )

    @contextmanager
    def measurement(self, trainer: Trainer, step: int | None = None) -> Iterator[Record]:
        """Log the result that a block puts into the yielded record, with the time that it took.

        An exception in the block ends the measurement and not the training: it is warned of once for each kind, and
        logged as not converged.

        Args:
            trainer: The trainer.
            step: The optimizer step that is measured; ``trainer.global_step`` if None, which is one too high at the end
                of a batch.

        """
        record = Record()
        step = trainer.global_step if step is None else step
        device = trainer.strategy.root_device
        started = _clock(device)
        try:
            yield record
            result = record.result
            scalars = {} if result is None else result.scalars()
            further = {} if result is None else result.table()  # within the guard: a result computes when it is read
        except Exception as error:
            # `Exception`, and not KeyboardInterrupt: Ctrl+C ends the run, also while it measures.
            record.result, record.has_failed = None, True
            scalars, further = {f"{self._group}_details/converged": 0.0}, {}
            self._warn_of_failure(step, error)
        # Of a failure too: a schedule that bounds the overhead has to count what failing took.
        record.seconds = _clock(device) - started
        if scalars:
            self.log(trainer, {**scalars, f"{self._group}_details/seconds": record.seconds}, further)

    def log(self, trainer: Trainer, scalars: Mapping[str, float], further: Mapping[str, float] | None = None) -> None:
        """Log scalars at the present step.

        Args:
            trainer: The trainer.
            scalars: The numbers, by tag.
            further: Numbers for the table only.

        """
        tagged = {f"{self._prefix}{name}": float(value) for name, value in scalars.items()}
        device = trainer.strategy.root_device
        # Not by `self.log`, which keeps the last value and logs it again at every interval, measured or not: the curve
        # would be a staircase of stale values. LearningRateMonitor goes the same way.
        trainer.callback_metrics.update({name: torch.tensor(value, device=device) for name, value in tagged.items()})
        for logger in trainer.loggers:  # which write on the first rank only
            logger.log_metrics(tagged, step=_logged_step(trainer))
        if self._table is not None and trainer.is_global_zero:
            self._table.append(trainer.global_step, trainer.current_epoch, {**scalars, **(further or {})})

    def may_draw(self, trainer: Trainer) -> bool:
        """Whether this rank draws, and drawing once more keeps within the share of the time."""
        elapsed = time.perf_counter() - self._started
        afterwards = self._drawing_seconds + self._next_seconds
        return bool(trainer.is_global_zero) and afterwards <= _DRAWING_SHARE * elapsed

    def draw(self, trainer: Trainer, figures: "Callable[[], Mapping[str, Callable[[], Figure]]]") -> None:
        """Draw figures and show them in all loggers that take figures, or write them to files in the log folder.

        An error is warned of, and the training continues.

        Args:
            trainer: The trainer.
            figures: Returns the functions that draw the figures, by name.

        """
        if not trainer.is_global_zero:
            return
        started = time.perf_counter()
        try:
            for name, drawn in figures().items():
                tag = f"{self._prefix}{self._group}/{name}"
                path = show_figure(trainer, tag, drawn(), _logged_step(trainer), self._folder)
                if path is not None and path not in self._files:
                    self._files.append(path)
        except Exception as error:  # a full disk or a logger that is out of reach, after hours of training
            self.warn_once("figure", f"a figure could not be shown. {type(error).__name__}: {error}")
        self._next_seconds = time.perf_counter() - started  # about what the next one takes
        self._drawing_seconds += self._next_seconds

    def tell(self, trainer: Trainer, name: str, text: Callable[[], str | None]) -> None:
        """Say something about the run, on the console and in all loggers that take texts.

        An error is warned of, and the training continues.

        Args:
            trainer: The trainer.
            name: The name of the text.
            text: Returns the text; None if there is nothing to say.

        """
        if not trainer.is_global_zero:
            return
        try:
            said = text()
            if said is not None:
                self.say(said)
                show_text(trainer, f"{self._prefix}{self._group}/{name}", said, _logged_step(trainer))
        except Exception as error:
            self.warn_once("text", f"a text could not be logged. {type(error).__name__}: {error}")

    def say_where(self) -> None:
        """Say in which files the figures are that no logger took."""
        if self._files:
            self.say(f"drawn in {', '.join(map(str, self._files))}")

    def say(self, text: str) -> None:
        """Say something on the console of the first rank."""
        prefix = f" ({self._prefix.rstrip('/')})" if self._prefix else ""
        rank_zero_info(f"{self._owner}{prefix}: {text}")

    def show_in_progress_bar(self, trainer: Trainer, name: str, value: float) -> None:
        """Show a number in the progress bar, until the next number of this name."""
        # Lightning has no public way to the progress bar but `self.log`, which would log the value to every logger as
        # well.
        trainer._logger_connector._progress_bar_metrics[name] = value

    def charts(self, charts: Charts) -> dict[str, list[Any]]:
        """Charts in the form that TensorBoard's custom scalars require."""
        return {
            # TensorBoard reads tags as regular expressions: a prefix such as "run.1" is to match itself only.
            title: ["Multiline", [f"^{re.escape(self._prefix)}{tag}" for tag in tags]]
            for title, tags in charts.items()
        }

    def warn_once(self, kind: str, message: str, *, everywhere: bool = False) -> None:
        """Warn the user, once for each kind of cause.

        Args:
            kind: The kind.
            message: The message, without the callback's name.
            everywhere: Whether each rank warns that comes here, and not the first rank alone.

        """
        if kind not in self._warned:
            self._warned.add(kind)
            warn = _warn if everywhere else rank_zero_only(_warn)
            warn(f"`{self._owner}`: {message}")

    def _warn_of_failure(self, step: int, error: Exception) -> None:
        # The last frame is where it happened, most often in the user's own step: a message alone ("expected scalar type
        # Float") would send the user searching in ours.
        place = traceback.extract_tb(error.__traceback__)[-1]
        self.warn_once(
            type(error).__name__,
            f"the measurement at step {step} failed, and training goes on without it."
            f" {type(error).__name__} at {place.filename}:{place.lineno}: {error}",
            # The rank that failed knows the cause; all others only know that some rank failed.
            everywhere=not isinstance(error, PeerFailureError),
        )
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()  # or blocks of the measurement's sizes would stay reserved, and the training fail


def show_charts(trainer: Trainer, charts: Iterable[tuple[str, dict[str, list[Any]]]]) -> None:
    """Put curves that belong together on one chart of TensorBoard's tab "Custom scalars".

    A run has one layout, and the last one that is logged counts, so it is logged once for all callbacks.

    Args:
        trainer: The trainer.
        charts: The group and the charts of each callback.

    """
    layout: dict[str, dict[str, list[Any]]] = {}
    for group, members in charts:
        for title, (kind, tags) in members.items():
            shown = layout.setdefault(group, {}).setdefault(title, [kind, []])
            shown[1].extend(tags)
    for logger in trainer.loggers:
        if trainer.is_global_zero and isinstance(logger, either("loggers.TensorBoardLogger")):
            logger.experiment.add_custom_scalars(layout)


def _logged_step(trainer: Trainer) -> int:
    """The step at which Lightning itself logs; `global_step` counts each optimizer of a manual optimization."""
    step: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return step


def _clock(device: torch.device) -> float:
    """The time, once the device has done all that was asked of it."""
    if device.type == "cuda":  # whose kernels run on while Python goes ahead: a product would seem to take no time
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _warn(message: str) -> None:
    warnings.warn(message, CurvatureWarning, stacklevel=4)
