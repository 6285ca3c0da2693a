"""The ranks, and what they found."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import ranks

ROOT = Path(__file__).parents[2]
PATIENCE = 600
"""Seconds without news, after which the ranks are taken to hang: twice what one waits for another."""

Outcomes = Callable[[str], list[Any]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Waiting for the ranks, which a busy machine may let take any time, does not count against a test's time."""
    for item in items:
        if "outcomes" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(func_only=True))


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What all ranks returned from a check, which is a reason to fail where one of them did not.

    The checks are those of the modules that the selected tests call ``runs``. Where tests are spread over several
    processes, the first of them that comes here starts the ranks for all. All checks are waited for here, and none in
    a test.

    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "ranks"
    modules = {
        item.module.runs.__name__ for item in request.session.items if "outcomes" in getattr(item, "fixturenames", ())
    }
    process = None
    try:
        folder.mkdir()
    except FileExistsError:
        pass  # another one was first
    else:
        process = _start(folder, sorted(modules))
    try:
        _wait(folder)
    finally:
        if process is not None:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @cache
    def load(name: str) -> list[Any]:
        paths = [ranks.saved(folder, name, rank) for rank in range(ranks.NUM_RANKS[name])]
        if not all(path.exists() for path in paths):
            pytest.fail(f"a rank hung or died in {name} or before:\n{(folder / 'log').read_text()[-3000:]}")
        loaded = [torch.load(path, weights_only=False) for path in paths]
        failures = [f"rank {rank}:\n{o.trace}" for rank, o in enumerate(loaded) if isinstance(o, ranks.Failure)]
        if failures:
            pytest.fail("\n".join(failures))
        return loaded

    return load


def _start(folder: Path, modules: list[str]) -> "subprocess.Popen[bytes]":
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PL_", "PYTEST", "SLURM"))},
        **{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    }
    command = [sys.executable, "-m", "tests.distributed.ranks", str(folder), *modules]
    with open(folder / "log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def _wait(folder: Path) -> None:
    """Wait until no rank runs any more, or nothing has come of them for long."""
    num_files, since = 0, time.monotonic()
    while not (folder / ranks.FINISHED).exists() and time.monotonic() - since < PATIENCE:
        if (found := sum(1 for _ in folder.iterdir())) != num_files:
            num_files, since = found, time.monotonic()
        time.sleep(0.1)
