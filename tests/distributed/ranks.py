"""The real processes of the tests in this folder: one process imports everything once, and forks the ranks.

Every check runs on all ranks, one after the other in one process group, and what it returns is saved as
``{check}-{rank}.pt``. A check that raises is saved as a `Failure`, so that one fault does not hide the other results.
"""

import logging
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lyapunov_lightning.training.reporting import outlets
from lyapunov_lightning.training.reporting.recording import Recorder

WORLD_SIZE = 2
"""Ranks of a check, if it does not say how many it wants."""

TIMEOUT = timedelta(seconds=300)
"""How long a rank waits for another one before it gives up, which on a busy machine may be slow and not hang."""

FINISHED = "finished"
"""The file that is there once no rank runs any more."""

CHECKS: dict[str, Callable[[int], Any]] = {}
"""By name; each takes the rank."""

NUM_RANKS: dict[str, int] = {}
"""On how many ranks each check runs."""


_draw = Recorder.draw


@contextmanager
def drawing() -> Iterator[None]:
    """The first rank draws figures, as it does in any training, and writes none."""
    without = Recorder.draw
    Recorder.draw = _draw
    try:
        yield
    finally:
        Recorder.draw = without


@dataclass
class Failure:
    """A check that raised."""

    trace: str


def check(function: Callable[[int], Any]) -> Callable[[int], Any]:
    return check_on(WORLD_SIZE)(function)


def check_on(num_ranks: int) -> Callable[[Callable[[int], Any]], Callable[[int], Any]]:
    """A check on another number of ranks."""

    def registered(function: Callable[[int], Any]) -> Callable[[int], Any]:
        assert function.__name__ not in CHECKS, function
        CHECKS[function.__name__], NUM_RANKS[function.__name__] = function, num_ranks
        return function

    return registered


def saved(folder: Path, name: str, rank: int) -> Path:
    """Where the outcome of a check is."""
    return folder / f"{name}-{rank}.pt"


def main(folder: Path, modules: list[str]) -> None:
    """Run the checks of some modules on all ranks."""
    try:
        for module in modules:
            import_module(module)
        fork = multiprocessing.get_context("fork")
        for num_ranks in sorted(set(NUM_RANKS.values())):
            processes = [fork.Process(target=_run, args=(folder, rank, num_ranks)) for rank in range(num_ranks)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
    finally:
        (folder / FINISHED).touch()


def _run(folder: Path, rank: int, num_ranks: int) -> None:
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")
    torch.set_num_threads(1)
    outlets.write_figure = lambda figure, path: None
    Recorder.draw = lambda self, trainer, figures: True  # nobody looks at them, and the others would wait
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    meeting = f"file://{folder / 'rendezvous'}-{num_ranks}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks, timeout=TIMEOUT)
    for name, function in CHECKS.items():
        if NUM_RANKS[name] != num_ranks:
            continue
        outcome: Any
        started = time.process_time(), time.perf_counter()
        try:
            outcome = function(rank)
        except Exception:
            outcome = Failure(traceback.format_exc())
        busy, passed = time.process_time() - started[0], time.perf_counter() - started[1]
        print(f"rank {rank}: {passed:6.2f} s, of which {busy:6.2f} s busy, for {name}", flush=True)
        path = saved(folder, name, rank)
        torch.save(outcome, path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)
    dist.destroy_process_group()


if __name__ == "__main__":
    from tests.distributed import ranks  # not this module, which the checks' own do not know

    ranks.main(Path(sys.argv[1]), sys.argv[2:])
