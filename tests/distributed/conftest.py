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

_STARTED = pytest.StashKey["subprocess.Popen[bytes]"]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Waiting for the ranks, which a busy machine may let take any time, does not count against a test's time."""
    for item in filter(_looks_at_ranks, items):
        item.add_marker(pytest.mark.timeout(func_only=True))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the ranks, which run beside the other tests: by themselves they mostly wait for each other.

    The checks are those of the modules that the selected tests call ``runs``. Where tests are spread over several
    processes, the first of them that comes here starts the ranks for all.

    """
    modules = {item.module.runs.__name__ for item in session.items if _looks_at_ranks(item)}
    if not modules or session.config.option.collectonly:
        return
    folder = _folder(session.config)
    try:
        folder.mkdir()
    except FileExistsError:
        return  # another one was first
    session.config.stash[_STARTED] = _start(folder, sorted(modules))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Wait for the ranks, at which other processes of the tests may look yet; end them where the tests broke off."""
    process = session.config.stash.get(_STARTED, None)
    if process is None:
        return
    if not (session.shouldstop or session.shouldfail or exitstatus == pytest.ExitCode.INTERRUPTED):
        _wait(_folder(session.config))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _looks_at_ranks(item: pytest.Item) -> bool:
    return "outcomes" in getattr(item, "fixturenames", ())


def _folder(config: pytest.Config) -> Path:
    """What all processes of the tests have in common."""
    folder: Path = config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "ranks"


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    """What all ranks returned from a check, which is a reason to fail where one of them did not.

    All checks are waited for here, and none in a test.

    """
    folder = _folder(request.config)
    _wait(folder)

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
