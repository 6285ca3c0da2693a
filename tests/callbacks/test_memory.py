"""Memory stays where it is over hundreds of probes: measured in fresh processes, whose heaps nothing else touches."""

import ctypes
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
        reason="asks malloc what is allocated, which glibc tells since 2.33",
    ),
    # Another process does the work, and may take longer on a busy machine than a test may.
    pytest.mark.timeout(func_only=True),
]

SCRIPT = """
import ctypes
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


class MallInfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = MallInfo


class Meter(pl.Callback):
    # What is allocated after each stretch of steps: bytes by malloc, among them the numbers of tensors and the graphs
    # that no Python object shows; objects by Python; and tensors. The resident size is no measure: how much of what was
    # freed goes back to the system depends on what lies beside it.
    def __init__(self, stretch):
        self.stretch = stretch
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % self.stretch == 0:
            gc.collect()
            found = mallinfo()
            tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
            self.seen.append((found.uordblks + found.hblkhd, sys.getallocatedblocks(), tensors))


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


def train(kind, num_steps, stretch):
    hessian = HessianConfig("fixed", num_batches=1)
    callbacks = {
        "probes": lambda: [CurvatureProbe(1, tol=0.1), CurvatureProbe(1, "lyapunov", log_prefix="other")],
        "spectra": lambda: [SpectrumTracker(1, 1, 1, hessian=hessian, tol=0.5)],
        "moves": lambda: [
            NegativeCurvatureTracker(
                25, 1, hessian=hessian, freeze_at=[5], estimator="online", descent=Descent(), tol=0.5
            )
        ],
        "leak": lambda: [KeepsGraphs()],
    }[kind]()
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, generator=generator), index % 4) for index in range(1024)]
    logger, meter = Counter(), Meter(stretch)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=num_steps,
        max_epochs=-1,
        logger=logger,
        callbacks=[*callbacks, meter],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Small(), DataLoader(data, 64))
    return {"probes": logger.probes, "seen": meter.seen}


folder, runs, stretch = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
for kind, num_steps in runs.items():
    # Forked for each run, so that not each of them has to import everything. Nothing else was done before.
    process = os.fork()
    if process == 0:
        try:
            result = train(kind, num_steps, stretch)
        except BaseException:
            result = {"failure": traceback.format_exc()}
        (folder / f"{kind}.json").write_text(json.dumps(result))
        os._exit(0)
    os.waitpid(process, 0)
"""


RUNS = {"probes": 125, "spectra": 100, "moves": 150, "leak": 75}
"""How many steps each of them takes."""

STRETCH = 25
"""Steps between two looks. The first ones, and some later one, may leave what is made when it is first needed, such as
what a figure takes; a leak is in all of them."""

PATIENCE = 3600
"""Seconds for all of them, which take 30 on an idle machine."""

BYTES, OBJECTS = 1_000, 50
"""What a step may leave behind: its results and losses, which take less than half of that."""


@dataclass(frozen=True)
class Growth:
    """Bytes and objects that a step leaves in the best stretch of a run, and the live tensors that came in all."""

    bytes: float
    objects: float
    tensors: int
    probes: int


@pytest.fixture(scope="module")
def growth_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Growth]:
    """What grew in each of the runs."""
    folder = tmp_path_factory.mktemp("memory")
    (folder / "script.py").write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, str(folder / "script.py"), str(folder), json.dumps(RUNS), str(STRETCH)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert run.returncode == 0, run.stderr

    def growth(kind: str) -> Growth:
        result = json.loads((folder / f"{kind}.json").read_text())
        assert "failure" not in result, result["failure"]
        looks = list(itertools.pairwise(result["seen"]))
        num_bytes, objects = (min(after[i] - before[i] for before, after in looks) / STRETCH for i in (0, 1))
        return Growth(num_bytes, objects, result["seen"][-1][2] - result["seen"][0][2], result["probes"])

    return growth


@pytest.mark.parametrize(("kind", "probes"), [("probes", 250), ("spectra", 100), ("moves", 150)])
def test_hundreds_of_measurements_leave_the_memory_where_it_was(
    growth_of: Callable[[str], Growth], kind: str, probes: int
) -> None:
    growth = growth_of(kind)
    assert growth.probes == probes
    assert growth.bytes < BYTES
    assert growth.objects < OBJECTS
    assert growth.tensors <= 4


def test_a_leak_in_one_of_twenty_probes_would_be_seen(growth_of: Callable[[str], Growth]) -> None:
    growth = growth_of("leak")
    assert growth.bytes > 20 * BYTES
    assert growth.tensors > 20 * 4
