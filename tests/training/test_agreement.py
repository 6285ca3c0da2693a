"""Ranks that differ in what they measure are refused at the start, each time by real processes with unequal shards."""

import functools
import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lyapunov_lightning import CurvatureProbe, HessianConfig, Schedule, SpectrumTracker
from lyapunov_lightning.training.agreement import announce, check_agreement, described, withdraw
from lyapunov_lightning.training.lightning_names import MisconfigurationException
from tests.distributed.models import Smooth, regression
from tests.training_runs import train

pytestmark = pytest.mark.timeout(func_only=True)


def loss_of(module: Any, batch: Any) -> Any:
    return module.loss(batch)


# What the two ranks have, and what the refusal says; None where they agree.
RUNS: dict[str, tuple[list[Callable[[], list[Any]]], str | None]] = {
    "every_n_steps": (
        [lambda: [CurvatureProbe(1)], lambda: [CurvatureProbe(2)]],
        "`every_n_steps` of `CurvatureProbe` is 1 on rank 0 and 2 on rank 1",
    ),
    "end": (
        [lambda: [CurvatureProbe(1)], lambda: [CurvatureProbe(1, end="both")]],
        "`end` of `CurvatureProbe` is its default on rank 0 and 'both' on rank 1",
    ),
    "the order": (
        [lambda: [CurvatureProbe(1), SpectrumTracker(1)], lambda: [SpectrumTracker(1), CurvatureProbe(1)]],
        "rank 0 has `CurvatureProbe`, `SpectrumTracker`, and rank 1 has `SpectrumTracker`, `CurvatureProbe`",
    ),
    "on one rank only": (
        [lambda: [CurvatureProbe(1)], lambda: []],
        "rank 0 has `CurvatureProbe`, and rank 1 has none",
    ),
    "on the other rank only": (
        [lambda: [], lambda: [CurvatureProbe(1)]],
        "rank 0 has none, and rank 1 has `CurvatureProbe`",
    ),
    "the same": (
        [
            lambda: [CurvatureProbe(1, hessian=HessianConfig(loss_fn=loss_of), log_prefix="a")],
            lambda: [CurvatureProbe(1, hessian=HessianConfig(loss_fn=loss_of), log_prefix="b")],
        ],
        None,
    ),
}


def run(folder: Path, rank: int, names: list[str]) -> None:
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")
    torch.set_num_threads(1)
    patience = timedelta(seconds=300)
    meeting = f"file://{folder / names[0]} meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=patience)
    for name in names:
        own = RUNS[name][0][rank]()
        try:
            train(
                Smooth(),
                *own,
                loader=DataLoader(regression(6 if rank else 4), 2),
                max_steps=2,
                devices=2,
                strategy=DDPStrategy(process_group_backend="gloo", timeout=patience),
                use_distributed_sampler=False,
                default_root_dir=folder,
            )
            said = f"measured {len(own[0].results)}"
        except MisconfigurationException as error:
            said = str(error)
        except Exception:
            said = traceback.format_exc()
        (folder / f"{name}-{rank}").write_text(said)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    folder = tmp_path_factory.mktemp("ranks")
    fork = multiprocessing.get_context("fork")
    # Where a rank has no callbacks it learns of the refusal by the end of the other process, as in any run.
    alone = [name for name in RUNS if "only" in name]
    for names in [[name for name in RUNS if name not in alone], *([name] for name in alone)]:
        processes = [fork.Process(target=run, args=(folder, rank, names)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(600)
            process.kill()
    return lambda name: [(folder / f"{name}-{rank}").read_text() for rank in range(2)]


@pytest.mark.parametrize("name", RUNS)
def test_ranks_that_differ_are_refused_with_the_difference(said, name):
    callbacks, difference = RUNS[name]
    for of_rank, told in zip(callbacks, said(name), strict=True):
        if difference is None:
            assert told == "measured 2"
        elif of_rank():
            assert difference in told, told
            assert "Give all ranks the same callbacks" in told
        else:
            assert "Error" in told  # the other process has ended


def test_a_description_has_no_addresses_and_no_names_of_files():
    class Weight:
        def __call__(self, batch: Any) -> int:
            return 1

    arguments = {
        "hessian": HessianConfig(loss_fn=loss_of, batch_size_fn=Weight()),
        "schedule": Schedule(first_n_steps=3),
        "save_dir": "/tmp/rank1",
        "largest": 3,
        "partial": functools.partial(loss_of, None),
        "object": object(),
    }
    told = described(CurvatureProbe(1), arguments)
    assert told["class"] == "CurvatureProbe"
    assert told["largest"] == "3"
    assert "loss_fn=loss_of" in told["hessian"]
    assert "save_dir" not in told
    assert not any("0x" in words for words in told.values())
    assert told["schedule"] != described(CurvatureProbe(1), {"schedule": Schedule(first_n_steps=4)})["schedule"]


def test_a_single_process_asks_nobody():
    alone = SimpleNamespace(world_size=1, global_rank=0)
    announce(alone, [{"class": "A"}])
    check_agreement(alone)
    withdraw(alone)
