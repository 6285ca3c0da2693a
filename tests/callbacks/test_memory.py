"""Memory stays where it is over thousands of probes: measured in fresh processes, whose heaps nothing else touches."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
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
import traceback
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


def train(kind, first, last):
    hessian = HessianConfig("fixed", num_batches=1)
    callbacks = {
        "probes": lambda: [CurvatureProbe(1, tol=0.1), CurvatureProbe(1, "lyapunov", log_prefix="other")],
        "spectra": lambda: [SpectrumTracker(1, 1, 1, hessian=hessian, tol=0.5)],
        "moves": lambda: [
            NegativeCurvatureTracker(
                50, 1, hessian=hessian, freeze_at=[5], estimator="online", descent=Descent(), tol=0.5
            )
        ],
        "leak": lambda: [KeepsGraphs()],
    }[kind]()
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
    return {"probes": logger.probes, "before": meter.seen[first], "after": meter.seen[last]}


folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
for kind, (first, last) in runs.items():
    # Forked for each run, so that not each of them has to import everything. Nothing else was done before.
    process = os.fork()
    if process == 0:
        try:
            result = train(kind, first, last)
        except BaseException:
            result = {"failure": traceback.format_exc()}
        (folder / f"{kind}.json").write_text(json.dumps(result))
        os._exit(0)
    os.waitpid(process, 0)
"""


RUNS = {"probes": (50, 550), "spectra": (50, 450), "moves": (50, 1050), "leak": (50, 450)}
"""Between which steps the growth of each is taken: the leak over no more steps than any other."""


@dataclass(frozen=True)
class Growth:
    """From one step of a run to another: of the resident memory as a share, and of the number of live tensors."""

    memory: float
    tensors: int
    probes: int


@pytest.fixture(scope="module")
def growth_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Growth]:
    """What grew in each of the runs."""
    folder = tmp_path_factory.mktemp("memory")
    (folder / "script.py").write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, str(folder / "script.py"), str(folder), json.dumps(RUNS)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr

    def growth(kind: str) -> Growth:
        result = json.loads((folder / f"{kind}.json").read_text())
        assert "failure" not in result, result["failure"]
        before, after = result["before"], result["after"]
        return Growth(after["bytes"] / before["bytes"] - 1, after["tensors"] - before["tensors"], result["probes"])

    return growth


def test_a_thousand_probes_leave_the_memory_where_it_was(growth_of: Callable[[str], Growth]) -> None:
    growth = growth_of("probes")
    assert growth.probes == 1100
    assert growth.memory < 0.05
    assert growth.tensors <= 5


def test_four_hundred_spectra_leave_the_memory_where_it_was(growth_of: Callable[[str], Growth]) -> None:
    growth = growth_of("spectra")
    assert growth.probes == 450
    assert growth.memory < 0.05
    assert growth.tensors <= 4


def test_a_thousand_running_estimates_with_moves_leave_the_memory_where_it_was(
    growth_of: Callable[[str], Growth],
) -> None:
    growth = growth_of("moves")
    assert growth.probes == 1050
    assert growth.memory < 0.05
    assert growth.tensors <= 5


def test_a_leak_would_be_seen(growth_of: Callable[[str], Growth]) -> None:
    growth = growth_of("leak")
    assert growth.memory > 0.05
    assert growth.tensors > 400
