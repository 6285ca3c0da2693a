"""Problems shared among processes of one thread each, one for each core that may be used."""

import multiprocessing
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def quiet() -> None:
    """One thread, and nothing said beside the tables."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def shared(work: Callable[..., Result], items: Sequence[Item], jobs: int, *arguments: object) -> list[Result]:
    """The results of `work(item, *arguments)`; each process has one item at a time.

    Args:
        work: A function of a module.
        items: What to work on.
        jobs: How many processes; with one all is done in this process.
        arguments: The same for all items.

    """
    if jobs == 1:
        return [work(item, *arguments) for item in items]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=quiet) as pool:
        futures = [pool.submit(work, item, *arguments) for item in items]
        return [future.result() for future in futures]
