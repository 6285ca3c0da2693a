"""Memory stays where it is over thousands of probes: measured in a fresh process, whose heap nothing else touches."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="reads the resident size from /proc, which is Linux's"
)

SCRIPT = """
import gc
import json
import logging
import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from lyapunov_lightning import CurvatureProbe, HessianConfig, NegativeCurvatureTracker, SpectrumTracker
from lyapunov_lightning.callbacks.negative_curvature_tracker import Descent

torch.set_num_threads(1)
warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Small(pl.LightningModule):
    # The gradient's graph of one batch takes about 150 kB: one that is left in ten probes would show.
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 4))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)


class Meter(pl.Callback):
    # The resident memory and the number of live tensors after some steps; the garbage collector runs as it likes.
    def __init__(self, *steps):
        self.steps = steps
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in self.steps:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
            self.seen[trainer.global_step] = {"bytes": pages * os.sysconf("SC_PAGE_SIZE"), "tensors": tensors}


class KeepsGraphs(pl.Callback):
    # What a probe that leaks would do.
    def __init__(self):
        self.kept = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        loss = nn.functional.cross_entropy(pl_module.net(batch[0]), batch[1])
        self.kept.append(torch.autograd.grad(loss, list(pl_module.parameters()), create_graph=True))


_MEASURED = ("curvature/lambda_max", "spectrum/lambda_1", "negative/online_lambda_min")


class Counter(pl.loggers.logger.DummyLogger):
    # How many probes there were, which is not more than one number.
    probes = 0

    def log_metrics(self, metrics, step=None):
        self.probes += any(name.endswith(_MEASURED) for name in metrics)


kind, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
hessian = HessianConfig("fixed", num_batches=1)
callbacks = {
    "probes": [CurvatureProbe(1, tol=0.1), CurvatureProbe(1, "lyapunov", log_prefix="other")],
    "spectra": [SpectrumTracker(1, 1, 1, hessian=hessian, tol=0.5)],
    "moves": [
        NegativeCurvatureTracker(
            50, 1, hessian=hessian, freeze_at=[5], estimator="online", descent=Descent(), tol=0.5
        )
    ],
    "leak": [KeepsGraphs()],
}[kind]
generator = torch.Generator().manual_seed(0)
data = [(torch.randn(8, generator=generator), index % 4) for index in range(1024)]
logger, meter = Counter(), Meter(first, last)
trainer = pl.Trainer(
    accelerator="cpu",
    max_steps=last,
    max_epochs=-1,
    logger=logger,
    callbacks=[*callbacks, meter],
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Small(), DataLoader(data, 64))
print(json.dumps({"probes": logger.probes, "before": meter.seen[first], "after": meter.seen[last]}))
"""


@dataclass(frozen=True)
class Growth:
    """From one step of a run to another: of the resident memory as a share, and of the number of live tensors."""

    memory: float
    tensors: int
    probes: int


def growth_of(kind: str, tmp_path: Path, *, first: int, last: int) -> Growth:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, str(script), kind, str(first), str(last)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    before, after = result["before"], result["after"]
    return Growth(after["bytes"] / before["bytes"] - 1, after["tensors"] - before["tensors"], result["probes"])


def test_a_thousand_probes_leave_the_memory_where_it_was(tmp_path: Path) -> None:
    growth = growth_of("probes", tmp_path, first=100, last=600)
    assert growth.probes == 1200
    assert growth.memory < 0.05
    assert growth.tensors <= 5


def test_five_hundred_spectra_leave_the_memory_where_it_was(tmp_path: Path) -> None:
    growth = growth_of("spectra", tmp_path, first=100, last=600)
    assert growth.probes == 600
    assert growth.memory < 0.05
    assert growth.tensors <= 5


def test_a_thousand_running_estimates_with_moves_leave_the_memory_where_it_was(tmp_path: Path) -> None:
    growth = growth_of("moves", tmp_path, first=100, last=1100)
    assert growth.probes == 1100
    assert growth.memory < 0.05
    assert growth.tensors <= 5


def test_a_leak_would_be_seen(tmp_path: Path) -> None:
    growth = growth_of("leak", tmp_path, first=100, last=800)
    assert growth.memory > 0.05
    assert growth.tensors > 700
