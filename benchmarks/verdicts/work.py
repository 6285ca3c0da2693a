"""The work on the cells, shared among processes of one thread each."""

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from benchmarks.quasi_newton import quiet
from benchmarks.verdicts.readings import FRACTIONS, read
from benchmarks.verdicts.sweeps import Sweep, sweep
from benchmarks.verdicts.training import Cell, Size


@dataclass(frozen=True)
class Task:
    """A cell, and what is known of it already."""

    cell: Cell
    root: str
    size: Size
    sweep: dict[str, Any] | None
    with_readings: bool


@dataclass(frozen=True)
class Finding:
    """What a task has brought."""

    task: Task
    sweep: Sweep
    readings: list[dict[str, Any]] | None
    seconds: float


def sweep_of(kept: dict[str, Any]) -> Sweep:
    """A sweep as it was kept."""
    losses = {int(exponent): math.inf if loss is None else loss for exponent, loss in kept["losses"].items()}
    return Sweep(losses, kept["untrained"])


def kept_sweep(found: Sweep) -> dict[str, Any]:
    """A sweep as it is kept: JSON has no infinity."""
    losses = {str(exponent): loss if math.isfinite(loss) else None for exponent, loss in found.losses.items()}
    return {"largest_usable": found.rate, "untrained": found.untrained, "losses": losses}


def work(task: Task) -> Finding:
    """Find what is not yet known of a cell."""
    started, cell = time.perf_counter(), task.cell
    found = sweep(cell, task.root, task.size) if task.sweep is None else sweep_of(task.sweep)
    readings = None
    if task.with_readings and found.is_inside and found.rate is not None:
        rates = {fraction: found.rate / fraction for fraction in FRACTIONS}
        readings = [
            {"fraction": fraction, "rate": rate, **read(cell, rate, task.root, task.size)}
            for fraction, rate in rates.items()
        ]
    return Finding(task, found, readings, time.perf_counter() - started)


def start_worker() -> None:
    """Be quiet, and end with the process that gives out the work, however that ends."""
    quiet()
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def worked(tasks: list[Task], jobs: int) -> Iterable[Finding]:
    """The findings as they come, from processes of one thread each; with one job all is done in this process."""
    if jobs == 1:
        yield from map(work, tasks)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=start_worker) as pool:
        futures = [pool.submit(work, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # else an interrupted run would first do all that is left
