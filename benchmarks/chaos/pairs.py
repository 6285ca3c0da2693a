"""Two ranks, of which one raises, is killed, is slow, or has nothing to measure on."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.chaos.faults import Tried
from benchmarks.chaos.training import fork, wait
from lyapunov_lightning import CurvatureProbe, HessianConfig, SpectrumTracker
from tests.distributed.models import Smooth, fit, unequal_shards
from tests.distributed.sharded_models import Decoder, texts

PATIENCE = timedelta(seconds=30)
"""The time-out of the collectives: nothing may take longer than that."""


class Normalised(Smooth):
    """With BatchNorm, whose buffers DDP sends from rank to rank."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(4))


def _raise(module: Any) -> None:
    raise RuntimeError("planned")


FAULTS: dict[str, Callable[[Any], None]] = {
    "raises": _raise,
    "is killed": lambda module: os.kill(os.getpid(), signal.SIGKILL),
    "is slow": lambda module: time.sleep(1),
    "runs out of memory": lambda module: (_ for _ in ()).throw(MemoryError()),
}


def _run(folder: Path, rank: int, sharded: bool, act: Callable[[Any], None] | None, options: dict[str, Any]) -> None:
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2, timeout=PATIENCE
    )
    first = options.pop("at", 1)

    def loss(module: Any, batch: Any) -> Any:
        if act is not None and rank == 1 and module.trainer.global_step == first:
            act(module)
        return module.loss(batch)

    hessian = HessianConfig("batch", loss_fn=loss)
    module = options.pop("module", Decoder if sharded else Smooth)()
    callbacks = [CurvatureProbe(1, hessian=hessian), SpectrumTracker(1, 1, hessian=hessian)]
    same = {"process_group_backend": "gloo", "timeout": PATIENCE}
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    kind = ModelParallelStrategy(**sizes, **same) if sharded else DDPStrategy(**same)
    loader = DataLoader(texts(16, seed=rank), 4) if sharded else unequal_shards(rank)
    settings = {"strategy": kind, "use_distributed_sampler": False, "default_root_dir": folder, **options}
    trainer = fit(module, loader, *callbacks, **settings)
    assert trainer.global_step > 0
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters()]
    torch.save([weight.detach() for weight in weights], folder / f"end-{rank}.pt")


def pairs(folder: Path) -> Iterator[tuple[str, Tried]]:
    """All pairs, by strategy and fault."""
    for sharded in (False, True):
        strategy_name = "FSDP2" if sharded else "DDP"
        set_ups: dict[str, dict[str, Any]] = {"": {}, ", accumulating": {"accumulate_grad_batches": 2}}
        if not sharded:
            set_ups[", BatchNorm"] = {"module": Normalised}
        for how, options in set_ups.items():
            bare = _pair(folder / f"{strategy_name}{how}-bare", sharded, None, options)
            for fault, act in FAULTS.items():
                tried = Tried()
                for at in (0, 1):
                    there = folder / f"{strategy_name}{how}-{fault}-{at}"
                    statuses, seconds, ends = _pair(there, sharded, act, {**options, "at": at})
                    if fault == "is killed":  # the other ends as it would if it were killed in a step
                        well = statuses[1] == -signal.SIGKILL and statuses[0] not in (None, 0)
                        well = well and seconds < PATIENCE.total_seconds() + 15
                    else:
                        well = statuses == [0, 0] and ends is not None and bare[2] is not None
                        well = well and all(map(torch.equal, ends or [], bare[2] or []))
                    log = (there / "log-0").read_text()[-200:] + (there / "log-1").read_text()[-200:]
                    tried.see(well, f"at step {at}: {statuses} after {seconds:.0f} s, {log!r}")
                    tried.seconds += seconds
                yield f"{strategy_name}{how}: a rank {fault}", tried


def _pair(
    folder: Path, sharded: bool, act: Callable[[Any], None] | None, options: dict[str, Any]
) -> tuple[list[int | None], float, list[torch.Tensor] | None]:
    folder.mkdir(parents=True)
    began = time.monotonic()
    run = [
        fork(lambda rank=rank: _run(folder, rank, sharded, act, dict(options)), folder / f"log-{rank}")  # type: ignore[misc]
        for rank in range(2)
    ]
    statuses = [wait(process, 2 * PATIENCE.total_seconds() + 30) for process in run]
    path = folder / "end-0.pt"
    return statuses, time.monotonic() - began, torch.load(path, weights_only=True) if path.exists() else None
