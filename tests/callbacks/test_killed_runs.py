"""A run that is killed in mid-epoch and goes on from its last checkpoint ends as if nothing had happened."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

SCRIPT = """
import os
import signal
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from lyapunov_lightning import (
    CurvatureProbe,
    HessianConfig,
    NegativeCurvatureTracker,
    NudgedSGDHook,
    QuasiNewtonLRController,
)
from lyapunov_lightning.callbacks.negative_curvature_tracker import Descent
from lyapunov_lightning.curvature.acting.pace import LRBounds
from lyapunov_lightning.training.reporting.recording import Recorder
from tests.modules import SmallRegressor, regression_data

torch.set_num_threads(1)
Recorder.draw = lambda self, trainer, figures: True  # nobody looks at the pictures
warnings.simplefilter("ignore")

HALF = HessianConfig(fraction=0.5)


class ResumableLoader(DataLoader):
    # Another order in each epoch, and goes on in the midst of one.
    def __init__(self, data, batch_size):
        super().__init__(data, batch_size)
        self.epoch = self.position = 0

    def __iter__(self):
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.epoch))
        for indices in order.split(self.batch_size)[self.position :]:
            self.position += 1
            yield self.collate_fn([self.dataset[int(index)] for index in indices])

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        self.epoch, self.position = state["epoch"], state["position"]


class Killed(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


ACTING = {
    # From step 4, at which it compares with the batch before.
    "batch_sharpness": (5, lambda: [QuasiNewtonLRController(bounds=LRBounds(window=4))]),
    "inverse_sharpness": (
        13,
        lambda: [QuasiNewtonLRController(rule="inverse_sharpness", bounds=LRBounds(window=4))],
    ),
    "nudge, steps": (11, lambda: [NudgedSGDHook(4, 3, gamma=3.0, hessian=HALF)]),
    "nudge, frozen": (9, lambda: [NudgedSGDHook(k=3, variant="no_top", frozen=True, hessian=HALF)]),
    "descent": (
        11,
        lambda: [NegativeCurvatureTracker(4, 1, estimator="online", descent=Descent(), hessian=HALF)],
    ),
    "all": (
        # From step 10, where the probe does not compare with the batch before, which no checkpoint has.
        11,
        lambda: [
            CurvatureProbe(2, end="both"),
            NegativeCurvatureTracker(4, 1, descent=Descent(), hessian=HALF),
            QuasiNewtonLRController(),
            NudgedSGDHook(4, 2, gamma=0.1, hessian=HALF),
        ],
    ),
}


def train(folder, kill_at, callbacks):
    pl.seed_everything(1, verbose=False)
    module = SmallRegressor(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1))
    checkpoint = ModelCheckpoint(
        folder, every_n_train_steps=2, save_last=True, save_top_k=1, enable_version_counter=False
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        gradient_clip_val=0.5,
        callbacks=[*callbacks, Killed(kill_at), checkpoint],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    last = folder / "last.ckpt"
    trainer.fit(module, ResumableLoader(regression_data(), 8), ckpt_path=last if last.exists() else None)
    end = {
        "weights": dict(module.named_parameters()),
        "optimizer": trainer.optimizers[0].state_dict(),
        "callbacks": [callback.state_dict() for callback in callbacks],
        "steps": trainer.global_step,
    }
    torch.save(end, folder / "end.pt")


def in_a_process_of_its_own(*arguments):
    # Forked, so that not each of them has to import everything. Returns the exit status.
    process = os.fork()
    if process == 0:
        try:
            train(*arguments)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


for name, (kill_at, make) in ACTING.items():
    straight, killed = Path(sys.argv[1]) / name / "straight", Path(sys.argv[1]) / name / "killed"
    assert in_a_process_of_its_own(straight, None, make()) == 0
    assert in_a_process_of_its_own(killed, kill_at, make()) == -signal.SIGKILL
    assert not (killed / "end.pt").exists()
    assert in_a_process_of_its_own(killed, None, make()) == 0
"""

ACTING = (
    "batch_sharpness",
    "inverse_sharpness",
    "nudge, steps",
    "nudge, frozen",
    "descent",
    "all",
)

PATIENCE = 3600
"""Seconds for all of them, which take 20 on an idle machine."""

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks"),
    # Other processes do the work, and may take longer on a busy machine than a test may.
    pytest.mark.timeout(func_only=True),
]


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the ends of each run, straight and killed."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "script.py"), str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second) or (first != first and second != second)  # a NaN is what it was


@pytest.mark.parametrize("callbacks", ACTING)
def test_killed_run_goes_on_bit_by_bit(killed_runs: Path, callbacks: str) -> None:
    straight, resumed = (torch.load(killed_runs / callbacks / name / "end.pt") for name in ("straight", "killed"))
    assert straight["steps"] == 18
    assert same(straight, resumed)
