"""Runs, several at a time in processes of their own, each kept so that it is never made twice."""

import copy
import importlib
import inspect
import multiprocessing
import os
import shutil
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from examples.papers.experiments import Run
from examples.papers.record import KeepRecord, Record
from lyapunov_lightning.cli.errors import explained

RECORD = "record.pkl"
CONFIG = "config.yaml"
LOG = "log.txt"

_downloaded: set[type] = set()
"""The data sets that this process has found or downloaded."""


@dataclass(frozen=True)
class Failed:
    """A run that broke off.

    Attributes:
        reason: The error, in short.
        log: Where all of it is.

    """

    reason: str
    log: Path


class Runs:
    """Makes runs in worker processes, or finds them made.

    Args:
        out: Where they are kept, a folder each, with the configuration, what was printed, and the record.
        root: The folder of the data sets.
        jobs: How many at a time; the cores are shared out among them.

    """

    def __init__(self, out: Path, root: str, jobs: int) -> None:
        self.out = out
        self.root = root
        self.jobs = jobs
        self._futures: dict[str, Future[Failed | None]] = {}

    def folder(self, run: Run) -> Path:
        """Where a run is kept."""
        return self.out / run.key

    def forget(self, runs: Iterable[Run]) -> None:
        """Make these anew."""
        for run in runs:
            shutil.rmtree(self.folder(run), ignore_errors=True)

    def __enter__(self) -> "Runs":
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        self._pool = ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn"), _begin_worker, (threads,))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What is left after Ctrl-C is not begun, and what is going on gets the signal too.
        self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def submit(self, runs: Iterable[Run], done: Callable[[], object]) -> None:
        """Have runs made that were not made before.

        Args:
            runs: Which; the same one may come several times.
            done: Called when one of them is there, in whatever thread.

        """
        for run in runs:
            if run.key in self._futures:
                continue
            if (self.folder(run) / RECORD).exists():
                future: Future[Failed | None] = Future()
                future.set_result(None)
            else:
                future = self._pool.submit(_make, run, self.folder(run), self.root)
            self._futures[run.key] = future
            future.add_done_callback(lambda _: done())

    def result(self, run: Run) -> Record | Failed:
        """What came of a run that was submitted, once it is there."""
        failed = self._futures[run.key].result()
        return Record.load(self.folder(run) / RECORD) if failed is None else failed


def make(run: Run, folder: Path, root: str) -> Record:
    """Train once, as ``lyapunov-lightning fit --config`` does with the configuration that is written to the folder."""
    import torch
    from lightning.pytorch.cli import LightningCLI

    from lyapunov_lightning import callbacks  # noqa: F401  # known by their short names once they are imported
    from lyapunov_lightning.training.callback import CurvatureCallback

    config = copy.deepcopy(run.config)
    config["seed_everything"] = run.seed
    config["trainer"]["default_root_dir"] = str(folder)
    data = _class_of(config["data"])
    arguments = config["data"].setdefault("init_args", {})
    if "root" in inspect.signature(data).parameters:  # what comes with a package has none
        arguments["root"] = root
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    if "download" in inspect.signature(data).parameters:
        arguments["download"] = data not in _downloaded  # torchvision reads all of it to see that it is there
    started = time.process_time()
    # Without `run` no commands are set up, which would take longer than many a run.
    cli = LightningCLI(args=config, run=False, save_config_callback=None)
    trainer, seen = cli.trainer, KeepRecord()
    trainer.callbacks.append(seen)
    start = [parameter.detach().clone() for parameter in cli.model.parameters()]
    trainer.fit(cli.model, cli.datamodule)
    moves = [now.detach().cpu() - then for now, then in zip(cli.model.parameters(), start, strict=True)]
    _downloaded.add(data)
    return Record(
        steps=seen.steps,
        losses=seen.losses,
        learning_rates=seen.learning_rates,
        validation=seen.validation,
        metrics={name: float(value) for name, value in trainer.callback_metrics.items()},
        distance=float(torch.stack([move.norm() for move in moves]).norm()),
        measured=[list(each.results) for each in trainer.callbacks if isinstance(each, CurvatureCallback)],
        seconds=time.process_time() - started,
    )


def _make(run: Run, folder: Path, root: str) -> Failed | None:
    """In a worker: `make`, with what it prints in a file."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / LOG
    with log.open("w") as file:
        _print_to(file.fileno())
        try:
            make(run, folder, root).save(folder / RECORD)
        except (Exception, SystemExit) as error:  # of the command line, which ends so where it refuses
            traceback.print_exc()
            return Failed(textwrap.shorten(f"{type(error).__name__}: {explained(str(error))}", 300), log)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    return None


def _class_of(part: dict[str, Any]) -> type:
    """What a ``class_path`` names."""
    module, _, name = part["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def _print_to(descriptor: int) -> None:
    """Send both streams there, also what libraries write that took hold of them earlier."""
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _begin_worker(threads: int) -> None:
    """Take a share of the cores, and end with the program even where that is killed."""
    import torch

    torch.set_num_threads(min(threads, torch.get_num_threads()))  # fewer where OMP_NUM_THREADS says so
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
