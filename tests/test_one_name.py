"""With one name of Lightning installed and the other not, a run is measured, a refusal caught, a module measured."""

import ast
from pathlib import Path

import pytest

import lyapunov_lightning
from tests.processes import outputs

SCRIPT = """
import sys

for package in {missing}:
    sys.modules[package] = None  # what an import of a package that is not there meets

import torch
from {library} import LightningModule, Trainer
from {library}.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lyapunov_lightning
from lyapunov_lightning import CurvatureProbe, HessianConfig, measure
from lyapunov_lightning.training.lightning_names import either, in_library_of


class Learner(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.layer(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
data = TensorDataset(torch.randn(8, 3), torch.randn(8, 1))
probe = CurvatureProbe(1, hessian=HessianConfig(data="batch"))
trainer = Trainer(accelerator="cpu", devices=1, max_epochs=1, callbacks=probe, **off)
trainer.fit(Learner(), DataLoader(data, 4))
print([result.converged for result in probe.results], "curvature/lambda_max" in trainer.callback_metrics)

by_hand = Learner()
by_hand.automatic_optimization = False
try:
    Trainer(accelerator="cpu", devices=1, max_epochs=1, callbacks=CurvatureProbe(1), **off).fit(
        by_hand, DataLoader(data, 4)
    )
except MisconfigurationException as error:
    print(type(error).__name__)

print(bool(measure(Learner(), data, trainer=trainer).converged.all()))
print([kind.__module__.partition(".")[0] for kind in either("Trainer")], in_library_of(object(), "Trainer") is Trainer)
"""

NAMES = {
    "lightning.pytorch": ["pytorch_lightning", "lightning_fabric"],
    "pytorch_lightning": ["lightning"],
}


def test_a_run_is_measured_with_one_name_alone(tmp_path):
    for library in NAMES:
        pytest.importorskip(library)
    scripts = [SCRIPT.format(library=library, missing=missing) for library, missing in NAMES.items()]
    for library, printed in zip(NAMES, outputs(tmp_path, *scripts), strict=True):
        assert printed[-4:] == [
            "[True, True] True",
            "MisconfigurationException",
            "True",
            f"['{library.partition('.')[0]}'] True",
        ]


def test_one_module_knows_the_names():
    """All others of the package take classes from it, so that none is recognised under one name only."""
    package = Path(lyapunov_lightning.__file__).parent
    found = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            imported = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if {name.partition(".")[0] for name in imported} & {"lightning", "lightning_fabric", "pytorch_lightning"}:
                found.add(file.relative_to(package).parts)
    # The command line is a LightningCLI.
    assert {parts for parts in found if parts[0] != "cli"} == {("training", "lightning_names.py")}
