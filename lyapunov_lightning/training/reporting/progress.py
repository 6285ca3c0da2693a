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


@contextmanager
def watched(
    operator: LinearOperator, trainer: Trainer, description: str, *, alone: bool = False
) -> Iterator[WatchedOperator]:
    """An operator whose products are counted next to the trainer's own progress bar, see `progress`."""
    with _bar_on_demand(trainer, description, alone) as show:
        # Around every product, and not a callback of the solver: all solvers, estimates and scans are then counted
        # alike.
        yield WatchedOperator(operator, show, after=_SHOWN_AFTER_SECONDS)


@contextmanager
def progress(trainer: Trainer, description: str, *, alone: bool = False) -> Iterator[Callable[[], None]]:
    """A count of what a measurement evaluates, shown next to the trainer's own progress bar once it takes a while.

    Args:
        trainer: The trainer, whose progress bar callback is joined; without one nothing is shown.
        description: The label of the bar.
        alone: Whether to show a bar even if the trainer has none.

    Yields:
        A function to call after each evaluation.

    """
    hidden_until = time.perf_counter() + _SHOWN_AFTER_SECONDS
    count = 0
    with _bar_on_demand(trainer, description, alone) as show:

        def report() -> None:
            nonlocal count
            count += 1
            # Most measurements are over in less, and a bar that comes and goes at every step makes the trainer's own
            # flicker.
            if time.perf_counter() > hidden_until:
                show(count)

        yield report


@contextmanager
def _bar_on_demand(trainer: Trainer, description: str, alone: bool) -> Iterator[Callable[[int], None]]:
    """A function that shows a count in a bar; the bar appears at the first call and disappears with the block."""
    bar: _Bar | None = None

    def show(count: int) -> None:
        nonlocal bar
        if bar is None:
            bar = _Bar()  # stays if the real one cannot be opened, or each further product would try and warn again
            with _drawing():
                bar = _open_bar(trainer, description, alone)
        with _drawing():
            bar.show(count)

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

    def show(self, count: int) -> None:
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

    def show(self, count: int) -> None:
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

    """

    def __init__(self, kind: Any, process_position: int, description: str, file: TextIO) -> None:
        self._bar = kind(
            desc=description,
            unit=" products",
            position=2 * process_position + 1,  # Lightning's own bars have the line above it
            leave=False,
            dynamic_ncols=True,
            file=file,
        )

    def show(self, count: int) -> None:
        self._bar.update(count - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def _open_bar(trainer: Trainer, description: str, alone: bool) -> _Bar:
    # Lightning disables the bars of all ranks but the first, and Rich has no display before the training begins.
    own: Any = trainer.progress_bar_callback
    if isinstance(own, either("callbacks.RichProgressBar")) and own.is_enabled and own.progress is not None:
        return _RichBar(own.progress, description)
    if isinstance(own, either("callbacks.TQDMProgressBar")) and own.is_enabled:
        # Where Lightning writes its own bars: on two streams the positions of the lines would not fit together.
        return _TqdmBar(_kind_of_bar(trainer), own.process_position, description, sys.stdout)
    if alone and own is None and trainer.is_global_zero:
        # Beside no other bar: what is printed on the output is then the result alone, and can go to a file.
        return _TqdmBar(_kind_of_bar(trainer), 0, description, sys.stderr)
    return _Bar()


def _kind_of_bar(trainer: Trainer) -> Any:
    return in_library_of(trainer, "callbacks.progress.tqdm_progress.Tqdm")
