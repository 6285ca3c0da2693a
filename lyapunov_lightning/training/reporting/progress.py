"""A count of Hessian-vector products next to the trainer's own progress bar, for measurements that take a while."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from lyapunov_lightning.curvature.linear import LinearOperator
from lyapunov_lightning.curvature.operators.watched import WatchedOperator
from lyapunov_lightning.training.lightning_names import Trainer, either, in_library_of
from lyapunov_lightning.training.reporting.telling import described, warn

_SHOWN_AFTER_SECONDS = 2.0
"""How long a measurement may take before it shows a progress bar."""

_LONE = "{desc}: {n_fmt}{unit}{postfix}"
"""What a bar with a note shows. It appears late and may begin at the count of an earlier process, so that tqdm's own
time and rate would be wrong."""

_LOOKS_APART_SECONDS = 0.2
"""How long a bar with a note stands as it is: a search through kept graphs has a thousand products a second."""


@contextmanager
def watched(operator: LinearOperator, trainer: Trainer, description: str) -> Iterator[WatchedOperator]:
    """An operator whose products are counted next to the trainer's own progress bar, see `progress`."""
    with _bar_on_demand(trainer, description, False) as show:
        # Around every product, and not a callback of the solver: all solvers, estimates and scans are then counted
        # alike.
        yield WatchedOperator(operator, show, after=_SHOWN_AFTER_SECONDS)


@contextmanager
def lone_bar(trainer: Trainer, description: str, *, unit: str, shown: bool) -> Iterator[Callable[[int, str], None]]:
    """A count with a note, on the error stream, of what runs while the trainer shows no bar of its own.

    Args:
        trainer: The trainer.
        description: The label of the bar.
        unit: What is counted.
        shown: Whether to show it at all. Nothing is where the error stream is no terminal either.

    Yields:
        A function to call with the count and the note, as often as one likes.

    """
    next_look = time.perf_counter() + _SHOWN_AFTER_SECONDS
    with _bar_on_demand(trainer, description, shown, unit) as show:

        def report(count: int, note: str) -> None:
            nonlocal next_look
            if time.perf_counter() >= next_look:
                next_look = time.perf_counter() + _LOOKS_APART_SECONDS
                show(count, note)

        yield report


@contextmanager
def progress(trainer: Trainer, description: str) -> Iterator[Callable[[], None]]:
    """A count of what a measurement evaluates, shown next to the trainer's own progress bar once it takes a while.

    Args:
        trainer: The trainer, whose progress bar callback is joined; without one nothing is shown.
        description: The label of the bar.

    Yields:
        A function to call after each evaluation.

    """
    hidden_until = time.perf_counter() + _SHOWN_AFTER_SECONDS
    count = 0
    with _bar_on_demand(trainer, description, False) as show:

        def report() -> None:
            nonlocal count
            count += 1
            # Most measurements are over in less, and a bar that comes and goes at every step makes the trainer's own
            # flicker.
            if time.perf_counter() > hidden_until:
                show(count)

        yield report


@contextmanager
def _bar_on_demand(
    trainer: Trainer, description: str, alone: bool, unit: str = "products"
) -> Iterator[Callable[..., None]]:
    """A function that shows a count in a bar; the bar appears at the first call and disappears with the block."""
    bar: _Bar | None = None

    def show(count: int, note: str = "") -> None:
        nonlocal bar
        if bar is None:
            bar = _Bar()  # stays if the real one cannot be opened, or each further product would try and warn again
            with _drawing():
                bar = _open_bar(trainer, description, alone, unit)
        with _drawing():
            bar.show(count, note)

    try:
        yield show
    finally:
        if bar is not None:
            with _drawing():
                bar.close()


@contextmanager
def _drawing() -> Iterator[None]:
    """Warn of a bar that cannot be drawn, and continue.

    Only the first rank has a bar. If an error of the bar ended its measurement, the others would wait in the next
    product.
    """
    try:
        yield
    except Exception as error:
        warn(f"The progress bar of a measurement cannot be drawn: {described(error)}")


class _Bar:
    """Shows nothing, for a run without a progress bar."""

    def show(self, count: int, note: str = "") -> None:
        pass

    def close(self) -> None:
        pass


class _RichBar(_Bar):
    """A task in the trainer's own display, since Rich allows one live display at a time."""

    def __init__(self, display: Any, description: str) -> None:
        self._display = display
        # How many products a search takes is not known. Lightning's columns refuse a total of None, and show an
        # infinite one as "--".
        self._task = display.add_task(description, total=float("inf"))

    def show(self, count: int, note: str = "") -> None:
        self._display.update(self._task, completed=count)
        # At once: Lightning's thread redraws the display only when its own bars ask for it, and these stand still while
        # a measurement runs.
        self._display.refresh()

    def close(self) -> None:
        self._display.remove_task(self._task)


class _TqdmBar(_Bar):
    """A line of its own below the trainer's.

    Args:
        kind: The class of the bar.
        process_position: Where the trainer's own bars begin, as for ``TQDMProgressBar``.
        description: The label of the bar.
        file: The stream.
        unit: What is counted.
        form: What is shown; the count, the time and the rate if None.

    """

    def __init__(
        self,
        kind: Any,
        process_position: int,
        description: str,
        file: TextIO,
        unit: str,
        form: str | None = None,
    ) -> None:
        self._is_lone = form is not None
        self._bar = kind(
            bar_format=form,
            desc=description,
            unit=f" {unit}",
            position=2 * process_position + 1,  # Lightning's own bars have the line above it
            leave=False,
            dynamic_ncols=True,
            file=file,
        )

    def show(self, count: int, note: str = "") -> None:
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count - self._bar.n)
        if self._is_lone:
            self._bar.refresh()  # the count may have stayed as it is

    def close(self) -> None:
        self._bar.close()


def _open_bar(trainer: Trainer, description: str, alone: bool, unit: str = "products") -> _Bar:
    # Lightning disables the bars of all ranks but the first, and Rich has no display before the training begins.
    own: Any = trainer.progress_bar_callback
    if isinstance(own, either("callbacks.RichProgressBar")) and own.is_enabled and own.progress is not None:
        return _RichBar(own.progress, description)
    if isinstance(own, either("callbacks.TQDMProgressBar")) and own.is_enabled:
        # Where Lightning writes its own bars: on two streams the positions of the lines would not fit together.
        return _TqdmBar(_kind_of_bar(trainer), own.process_position, description, sys.stdout, unit)
    kind = _kind_of_bar(trainer)
    if alone and own is None and trainer.is_global_zero and (sys.stderr.isatty() or _draws_in_a_notebook(kind)):
        # Beside no other bar: what is printed on the output is then the result alone, and can go to a file. In the log
        # of a job on a cluster a bar would be a thousand lines.
        return _TqdmBar(kind, 0, description, sys.stderr, unit, _LONE)
    return _Bar()


def _draws_in_a_notebook(kind: type) -> bool:
    return any(base.__name__ == "tqdm_notebook" for base in kind.__mro__)


def _kind_of_bar(trainer: Trainer) -> Any:
    return in_library_of(trainer, "callbacks.progress.tqdm_progress.Tqdm")
