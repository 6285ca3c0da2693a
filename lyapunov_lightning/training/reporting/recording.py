"""What a callback reports: scalars and figures to the loggers, sentences and warnings to the user.

Each of Lightning's private names that this needs is used in one place, and tested in `tests/contracts`.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lyapunov_lightning.curvature.errors import PeerFailureError
from lyapunov_lightning.training.lightning_names import Trainer, either, rank_zero_info, rank_zero_only
from lyapunov_lightning.training.reporting.backlog import Backlog
from lyapunov_lightning.training.reporting.files import RunFiles, unused
from lyapunov_lightning.training.reporting.outlets import show_figure, show_text, takes_figures
from lyapunov_lightning.training.reporting.series import SeriesFile
from lyapunov_lightning.training.reporting.telling import described, warn
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

    Whatever goes wrong while something is written, shown or said is warned of once, and the training goes on. What
    could not be logged or written waits for the next measurement, and once more for the end of the run. Nothing here
    waits for other ranks, so a logger or a disk that fails on the first rank leaves no other waiting.

    Args:
        owner: The callback's class, named in warnings.
        group: The group of its tags.
        prefix: Put in front of every tag, with a slash, if given.
        table: A file that gets the scalars too, without the prefix.
        files: Further files that the callback writes.

    """

    def __init__(
        self,
        owner: str,
        group: str,
        prefix: str | None = None,
        table: SeriesFile | None = None,
        files: Sequence[RunFiles] = (),
    ) -> None:
        self._owner = owner
        self._group = group
        self._table = table
        self.files: list[RunFiles] = [*([] if table is None else [table]), *files]
        self._prefix = f"{prefix}/" if prefix else ""
        self._failed_tag = f"{group}_details/converged"
        self._warned: set[str] = set()
        self._folder = Path()
        self._backlogs: defaultdict[int, Backlog[tuple[dict[str, float], int]]] = defaultdict(Backlog)
        self._started, self._drawing_seconds, self._next_seconds = 0.0, 0.0, _FIRST_DRAWING_SECONDS
        self._pictures: dict[str, Path] = {}  # by their tags

    def start(self, trainer: Trainer, *, is_first: bool = True) -> None:
        """Begin a run: open the files, and warn of a run that has no logger.

        Args:
            trainer: The trainer.
            is_first: Whether this is the first of several callbacks; only that one warns.

        """
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # all ranks have to ask together
        self._started, self._drawing_seconds, self._pictures = time.perf_counter(), 0.0, {}
        self._backlogs.clear()
        for files in self.files if trainer.is_global_zero else []:
            with self._writing():
                note = files.begin(trainer.global_step)
                if note is not None:
                    self.warn_once("broken files", note)
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
        scalars: Mapping[str, float] = {}
        further: Mapping[str, float] = {}
        try:
            yield record
            result = record.result
            if result is not None:
                scalars, further = result.scalars(), result.table()  # in the guard: a result computes when it is read
        except Exception as error:
            # `Exception`, and not KeyboardInterrupt: Ctrl+C ends the run, also while it measures.
            record.result, record.has_failed = None, True
            scalars, further = {self._failed_tag: 0.0}, {}
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
        with self.guarded("scalars", "what was measured cannot be logged, and training goes on."):
            tagged = {f"{self._prefix}{name}": float(value) for name, value in scalars.items()}
            device = trainer.strategy.root_device
            # Not by `self.log`, which keeps the last value and logs it again at every interval, measured or not: the
            # curve would be a staircase of stale values. LearningRateMonitor goes the same way.
            numbers = {name: torch.tensor(value, device=device) for name, value in tagged.items()}
            trainer.callback_metrics.update(numbers)
            step = _logged_step(trainer)
            for logger in trainer.loggers:  # which write on the first rank only
                with self._logging(logger):
                    self._backlogs[id(logger)].deliver(partial(_log, logger), (tagged, step))
            if self._table is not None and trainer.is_global_zero:
                with self._writing():
                    rows = {**scalars, **(further or {})}
                    self._table.append(trainer.global_step, trainer.current_epoch, rows)

    def write(self, trainer: Trainer, write: Callable[[], None]) -> None:
        """Write to a file on the first rank."""
        if trainer.is_global_zero:
            with self._writing():
                write()

    def may_draw(self, trainer: Trainer) -> bool:
        """Whether this rank draws, and drawing once more keeps within the share of the time."""
        elapsed = time.perf_counter() - self._started
        afterwards = self._drawing_seconds + self._next_seconds
        return bool(trainer.is_global_zero) and afterwards <= _DRAWING_SHARE * elapsed

    def draw(self, trainer: Trainer, figures: "Callable[[], Mapping[str, Callable[[], Figure]]]") -> bool:
        """Draw figures and show them in all loggers that take figures, or write them to files in the log folder.

        An error is warned of, and the training continues.

        Args:
            trainer: The trainer.
            figures: Returns the functions that draw the figures, by name.

        Returns:
            Whether all of them were shown.

        """
        if not trainer.is_global_zero:
            return True
        started = time.perf_counter()
        num_shown = 0
        functions: Mapping[str, Callable[[], Figure]] | None = None
        # The figures one by one: a full disk or a logger that is out of reach, after hours of training, or a figure
        # that cannot be drawn, costs no other.
        with self._showing():
            functions = figures()
        for name, drawn in (functions or {}).items():
            with self._showing(), _size(trainer):
                tag = f"{self._prefix}{self._group}/{name}"
                # That of this run, if it has one: the picture of an earlier run stays.
                path = self._pictures.get(tag) or unused(self._folder / f"{tag.replace('/', '-')}.png")
                if show_figure(trainer, tag, drawn(), _logged_step(trainer), path, self._showing):
                    self._pictures[tag] = path
                num_shown += 1
        self._next_seconds = time.perf_counter() - started  # about what the next one takes
        self._drawing_seconds += self._next_seconds
        return functions is not None and num_shown == len(functions)

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
        with self._telling():
            said = text()
            if said is not None:
                self.say(said)
                tag = f"{self._prefix}{self._group}/{name}"
                show_text(trainer, tag, said, _logged_step(trainer), self._telling)

    def conclude(self, trainer: Trainer) -> None:
        """Log and write what still waits, and say in which files the figures are that no logger took."""
        for logger in trainer.loggers:
            with self._logging(logger):
                self._backlogs[id(logger)].retry(partial(_log, logger))
        missing = sum(backlog.num_waiting for backlog in self._backlogs.values())
        for files in self.files if trainer.is_global_zero else []:
            with self._writing():
                files.flush()
            missing += files.num_waiting
        if missing and trainer.is_global_zero:
            self.say(
                f"{missing} entries could not be logged or written until the end of the run. What was measured is in"
                " the callback's `results`."
            )
        if self._pictures:
            self.say(f"drawn in {', '.join(map(str, self._pictures.values()))}")

    def say(self, text: str) -> None:
        """Say something on the console of the first rank."""
        prefix = f" ({self._prefix.rstrip('/')})" if self._prefix else ""
        with suppress(Exception):  # the console is the last place where anything could be said
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

    def show_charts(self, trainer: Trainer, charts: Iterable[tuple[str, dict[str, list[Any]]]]) -> None:
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
                with self.guarded("charts", "the layout of charts could not be logged, and training goes on."):
                    logger.experiment.add_custom_scalars(layout)

    def warn_once(self, kind: str, message: str, *, everywhere: bool = False) -> None:
        """Warn the user, once for each kind of cause.

        Args:
            kind: The kind.
            message: The message, without the callback's name.
            everywhere: Whether each rank warns that comes here, and not the first rank alone.

        """
        if kind not in self._warned:
            self._warned.add(kind)
            (warn if everywhere else rank_zero_only(warn))(f"`{self._owner}`: {message}")

    @contextmanager
    def guarded(self, kind: str, consequence: str) -> Iterator[None]:
        """Let a block fail without ending the run: its exception is warned of, once for each kind.

        Args:
            kind: The kind.
            consequence: What the failure means, as a sentence.

        """
        try:
            yield
        except Exception as error:
            with suppress(Exception):  # no memory for a sentence; the training goes on without it
                self.warn_once(kind, f"{consequence} {described(error)}")

    def _logging(self, logger: Any) -> AbstractContextManager[None]:
        name = type(logger).__name__
        return self.guarded(
            f"logger {name}",
            f"`{name}` does not take what was measured, and training goes on. It waits and is logged later, where that"
            " is possible.",
        )

    def _writing(self) -> AbstractContextManager[None]:
        return self.guarded(
            "files",
            "what was measured cannot be written to `save_dir`, and training goes on. It waits and is written later,"
            " where that is possible: make room there, or the folder writable.",
        )

    def _showing(self) -> AbstractContextManager[None]:
        return self.guarded("figure", "a figure could not be shown.")

    def _telling(self) -> AbstractContextManager[None]:
        return self.guarded("text", "a text could not be logged.")

    def _warn_of_failure(self, step: int, error: Exception) -> None:
        try:
            self.warn_once(
                type(error).__name__,
                # With the place, most often in the user's own step: a message alone ("expected scalar type Float")
                # would send the user searching in ours.
                f"the measurement at step {step} failed, and training goes on without it."
                f" {described(error, with_place=True)}",
                # The rank that failed knows the cause; all others only know that some rank failed.
                everywhere=not isinstance(error, PeerFailureError),
            )
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()  # or blocks of its sizes would stay reserved, and the training fail
        except Exception:  # memory has run out, even for the sentence
            warn("A measurement failed, and training goes on without it. There was no memory to say why.")


def _size(trainer: Trainer) -> AbstractContextManager[None]:
    """For the small cards of loggers where one takes figures, and for a file where none does."""
    if not takes_figures(trainer):
        return nullcontext()
    # Here: Matplotlib takes long to import, and a run may draw nothing.
    from lyapunov_lightning.figures.style import sized_for_cards

    return sized_for_cards()


def _log(logger: Any, entry: tuple[dict[str, float], int]) -> None:
    scalars, step = entry
    logger.log_metrics(scalars, step=step)


def _logged_step(trainer: Trainer) -> int:
    """The step at which Lightning itself logs; `global_step` counts each optimizer of a manual optimization."""
    step: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return step


def _clock(device: torch.device) -> float:
    """The time, once the device has done all that was asked of it."""
    if device.type == "cuda":  # whose kernels run on while Python goes ahead: a product would seem to take no time
        with suppress(RuntimeError):  # of an earlier kernel, which the training itself will meet
            torch.cuda.synchronize(device)
    return time.perf_counter()
