"""Trainings in which one rank alone fails, or disagrees with the others."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lyapunov_lightning import CurvatureProbe, HessianConfig, LossAlongEigvecScanner, SpectrumTracker
from lyapunov_lightning.training import config, operators, sharing, spacing
from lyapunov_lightning.training.reporting import eigenvectors, recording
from tests.distributed.models import (
    PlannedError,
    Smooth,
    failing_once,
    final,
    fit,
    observed,
    regression,
    said,
    unequal_shards,
)
from tests.distributed.ranks import TIMEOUT, check
from tests.training.live import RememberingLogger

FAILING_STEP = 1


def failing_loss(rank: int, evaluation: int = 1) -> Callable[[Any, Any], Tensor]:
    """A loss that fails on the last rank at one step, from one of its evaluations on."""
    evaluations = 0

    def loss_fn(module: Any, batch: Any) -> Tensor:
        nonlocal evaluations
        if module.trainer.global_step == FAILING_STEP:
            evaluations += 1
            if rank == 1 and evaluations >= evaluation:
                raise PlannedError("planned")
        return module.loss(batch)

    return loss_fn


@check
def failing_measurements(rank: int) -> dict[str, Any]:
    """Trainings in which the last rank once fails in its first evaluation, and in the midst of a scan."""
    estimators: tuple[Any, ...] = ("lanczos", "power", "lyapunov")
    callbacks: dict[str, Any] = {
        name: CurvatureProbe(1, name, tol=0.5, hessian=HessianConfig(loss_fn=failing_loss(rank))) for name in estimators
    }
    scanned = HessianConfig("batch", loss_fn=failing_loss(rank, evaluation=40))
    callbacks["scan"] = LossAlongEigvecScanner(1, hessian=scanned, tol=1e-8)
    found: dict[str, Any] = {
        name: observed(callback, unequal_shards(rank), use_distributed_sampler=False)
        for name, callback in callbacks.items()
    }
    module = Smooth()
    fit(module, unequal_shards(rank), precision="64-true", use_distributed_sampler=False)
    return {**found, "without": final(module)}


@check
def failing_parts(rank: int) -> dict[str, Any]:
    """Trainings in which one rank fails alone before its first product, or after the last one."""
    found = {}
    with failing_once(operators, "HessianOperator", only=rank == 1):
        probe = CurvatureProbe(1, tol=0.5)
        found["objective"] = observed(probe, unequal_shards(rank), use_distributed_sampler=False)
    with tempfile.TemporaryDirectory() as folder, failing_once(eigenvectors, "replaced", only=rank == 0):
        tracker = SpectrumTracker(1, 1, hessian=HessianConfig("batch"), save_dir=folder, save_vectors=True)
        found["files"] = observed(tracker, unequal_shards(rank), use_distributed_sampler=False)
        found["files"]["written"] = len([*Path(folder).glob("*.safetensors")])
    with failing_once(sharing, "_restricted", only=rank == 1):
        tracker = SpectrumTracker(1, 1, hessian=HessianConfig("batch"), groups="modules", random_vectors=2)
        found["after the search"] = observed(tracker, unequal_shards(rank), use_distributed_sampler=False)
    return found


class FakeClock:
    """A clock of one rank that goes on by itself at every look."""

    def __init__(self, pace: float) -> None:
        self.now = 0.0
        self.pace = pace

    def perf_counter(self) -> float:
        self.now += self.pace
        return self.now


PACES = {
    "only-first-can-afford-all": [(1.0, 1e-6), (1e-6, 1.0)],
    "only-second-can-afford-all": [(1e-6, 1.0), (1.0, 1e-6)],
    "first-can-afford-some": [(1.0, 0.5), (1.0, 1e-6)],
}
"""How fast the clocks of the two ranks go during steps and during measurements."""

TIMED_STEPS = 16
SHARE = 0.3


@check
def share_of_the_time(rank: int) -> dict[str, list[int]]:
    """Trainings in which the ranks disagree about how much time measurements take."""
    found = {}
    for name, paces in PACES.items():
        step_pace, cost_pace = paces[rank]
        originals = recording.time, spacing.time
        recording.time, spacing.time = FakeClock(cost_pace), FakeClock(step_pace)
        probe = CurvatureProbe(schedule=config.Schedule(max_overhead=SHARE), tol=0.5)
        try:
            fit(Smooth(), DataLoader(regression(2 * TIMED_STEPS), 1), probe, logger=RememberingLogger())
        finally:
            recording.time, spacing.time = originals
        found[name] = [result.step for result in probe.results]
    return found


class Unwrapped(DDPStrategy):
    """Without the wrapper, which refuses to synchronise BatchNorm on a CPU before anything else could."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return model


class Normalised(Smooth):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(4))


@check
def synchronised_batchnorm(rank: int) -> str:
    """What a Trainer that is to synchronise BatchNorm, which the probe cannot differentiate, says before training."""
    strategy = Unwrapped(process_group_backend="gloo", timeout=TIMEOUT)
    loader = DataLoader(regression(12), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return said(lambda: fit(Normalised(), loader, CurvatureProbe(1), sync_batchnorm=True, strategy=strategy))
