"""What a callback tells: scalars to the loggers, warnings to the user, a progress bar to the terminal.

Lightning's private names that this needs are each used in one place, and `tests/test_lightning_contract.py` holds them.
"""

import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_only
from matplotlib.figure import Figure

from lyapunov_lightning.curvature.errors import CurvatureWarning, PeerFailureError
from lyapunov_lightning.curvature.linear import LinearOperator
from lyapunov_lightning.training.series import SeriesFile

_PATIENCE = 2.0
"""Seconds that a measurement may take before it shows a progress bar."""


class Recorder:
    """Logs the results of one callback.

    Scalars go to every logger of the trainer, at Lightning's own step, and into ``trainer.callback_metrics``, where
    EarlyStopping and ModelCheckpoint find them. They do not go through ``self.log``, which repeats the last value of a
    scalar that is logged now and then.

    Args:
        owner: The callback's class, named in warnings.
        prefix: Put in front of every tag, with a slash, if given.
        table: A file that gets the scalars too, without prefix.

    """

    def __init__(self, owner: str, prefix: Optional[str] = None, table: Optional[SeriesFile] = None) -> None:
        self._owner = owner
        self._table = table
        self._prefix = f"{prefix}/" if prefix else ""
        self._warned: set[str] = set()

    def log(self, trainer: "pl.Trainer", scalars: Mapping[str, float]) -> None:
        """Log the scalars at the present step."""
        tagged = {f"{self._prefix}{name}": float(value) for name, value in scalars.items()}
        device = trainer.strategy.root_device
        trainer.callback_metrics.update({name: torch.tensor(value, device=device) for name, value in tagged.items()})
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics(tagged, step=step)
        if self._table is not None and trainer.is_global_zero:
            self._table.append(trainer.global_step, trainer.current_epoch, scalars)

    def start(self, trainer: "pl.Trainer") -> None:
        """Begin a run: open the file, and tell the user of a run without logger where its values are to be found."""
        if self._table is not None and trainer.is_global_zero:
            self._table.begin(trainer.global_step)
        if not trainer.loggers and self._table is None:
            self.warn_once(
                "no logger",
                "the Trainer has no logger, so what is measured is found in `trainer.callback_metrics` only. Pass a"
                " logger to the Trainer to get curves.",
            )

    def patterns(self, tags: Sequence[str]) -> list[str]:
        """Regular expressions for tags, given as such without prefix."""
        return [f"^{re.escape(self._prefix)}{tag}" for tag in tags]

    def figure(self, trainer: "pl.Trainer", tag: str, figure: Figure) -> None:
        """Show a figure in those loggers that can: TensorBoard and Weights & Biases."""
        tag, step = f"{self._prefix}{tag}", trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            if trainer.is_global_zero and isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(tag, figure, step)
            elif isinstance(logger, WandbLogger):
                logger.log_image(tag, [figure], step=step)

    def layout(self, trainer: "pl.Trainer", callback: "pl.Callback") -> None:
        """Put curves that belong together on one chart of TensorBoard's tab "Custom scalars".

        The layout is one for the whole run, so the first callback that has one logs those of all.

        """
        owners = [callback for callback in trainer.callbacks if hasattr(callback, "charts")]  # type: ignore[attr-defined]
        if owners[0] is not callback or not trainer.is_global_zero:
            return
        charts: dict[str, dict[str, list[Any]]] = {}
        for owner in owners:
            for group, members in owner.charts().items():
                charts.setdefault(group, {}).update(
                    {name: ["Multiline", patterns] for name, patterns in members.items()}
                )
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(charts)

    @contextmanager
    def measurement(self, trainer: "pl.Trainer", group: str) -> Iterator[dict[str, float]]:
        """Log what a block puts into the yielded mapping, with the time that it took.

        An exception in the block ends the measurement and not the training: it is warned of once for each kind, and
        logged as not converged.

        Args:
            trainer: The trainer.
            group: The group of the tags ``{group}/converged`` and ``{group}/seconds``.

        """
        scalars: dict[str, float] = {}
        device = trainer.strategy.root_device
        started = _clock(device)
        try:
            yield scalars
        except Exception as error:
            scalars.clear()
            scalars[f"{group}/converged"] = 0.0
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.warn_once(
                type(error).__name__,
                f"the measurement at step {trainer.global_step} failed, and training goes on without it."
                f" {type(error).__name__} at {place.filename}:{place.lineno}: {error}",
                everywhere=not isinstance(error, PeerFailureError),
            )
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()  # the training needs what the measurement took
        if scalars:
            scalars[f"{group}/seconds"] = _clock(device) - started
            self.log(trainer, scalars)

    def warn_once(self, kind: str, message: str, *, everywhere: bool = False) -> None:
        """Warn the user, the first time for each kind of cause: on the first process, or on every one that says so."""
        if kind not in self._warned:
            self._warned.add(kind)
            warn = _warn if everywhere else rank_zero_only(_warn)
            warn(f"`{self._owner}`: {message}")


def _clock(device: torch.device) -> float:
    """The time, once the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _warn(message: str) -> None:
    warnings.warn(message, CurvatureWarning, stacklevel=4)


class WatchedOperator:
    """An operator that reports each of its products.

    Args:
        operator: The operator.
        report: Called after each product.

    """

    def __init__(self, operator: LinearOperator, report: Callable[[], None]) -> None:
        self._operator = operator
        self._report = report
        self.size = operator.size
        self.dtype = operator.dtype
        self.device = operator.device

    def matvec(self, vector: torch.Tensor) -> torch.Tensor:
        """The operator's product."""
        product = self._operator.matvec(vector)
        self._report()
        return product


@contextmanager
def progress(trainer: "pl.Trainer", description: str) -> Iterator[Callable[[], None]]:
    """A counter of products beside the trainer's own progress bar, for measurements of over about two seconds.

    Args:
        trainer: The trainer, whose progress bar callback is joined; without one nothing is shown.
        description: What is measured.

    Yields:
        A function to call after each product.

    """
    started = time.perf_counter()
    bar: Optional[_Bar] = None
    count = 0

    def report() -> None:
        nonlocal bar, count
        count += 1
        if bar is None and time.perf_counter() - started > _PATIENCE:
            bar = _Bar()
            with _drawing():
                bar = _open_bar(trainer, description)
        if bar is not None:
            with _drawing():
                bar.show(count)

    try:
        yield report
    finally:
        if bar is not None:
            with _drawing():
                bar.close()


@contextmanager
def _drawing() -> Iterator[None]:
    """A bar that cannot be drawn is told of, and does not end what it was to show: in other processes that goes on."""
    try:
        yield
    except Exception as error:
        _warn(f"The progress bar of a measurement cannot be drawn: {type(error).__name__}: {error}")


class _Bar:
    """Shows nothing; the bar of a run without progress bar."""

    def show(self, count: int) -> None:
        pass

    def close(self) -> None:
        pass


class _RichBar(_Bar):
    """A task in the trainer's own display: there can be one display only."""

    def __init__(self, display: Any, description: str) -> None:
        self._display = display
        self._task = display.add_task(description, total=float("inf"))

    def show(self, count: int) -> None:
        self._display.update(self._task, completed=count)
        self._display.refresh()

    def close(self) -> None:
        self._display.remove_task(self._task)


class _TqdmBar(_Bar):
    """A line of its own below the trainer's."""

    def __init__(self, process_position: int, description: str) -> None:
        self._bar = Tqdm(
            desc=description,
            unit=" products",
            position=2 * process_position + 1,
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
        )

    def show(self, count: int) -> None:
        self._bar.update(count - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def _open_bar(trainer: "pl.Trainer", description: str) -> _Bar:
    own = trainer.progress_bar_callback
    if isinstance(own, RichProgressBar) and own.is_enabled and own.progress is not None:
        return _RichBar(own.progress, description)
    if isinstance(own, TQDMProgressBar) and own.is_enabled:
        return _TqdmBar(own.process_position, description)
    return _Bar()
