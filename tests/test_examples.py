"""Every configuration among the examples is understood, and names callbacks of this package."""

import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, DistributedSampler

from examples.data import Digits
from lyapunov_lightning import callbacks
from lyapunov_lightning.training.callback import CurvatureCallback

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configuration_is_understood(config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    arguments = ["--config", str(config), f"--trainer.default_root_dir={tmp_path}"]
    cli = LightningCLI(args=arguments, run=False, save_config_callback=None)
    assert any(isinstance(callback, CurvatureCallback) for callback in cli.trainer.callbacks)


def test_each_of_several_processes_gets_all_digits_for_a_step() -> None:
    data = Digits(steps_per_epoch=4)
    data.setup("fit")
    loader = data.train_dataloader()
    for rank in range(2):
        sampler = DistributedSampler(loader.dataset, num_replicas=2, rank=rank)  # as Lightning puts it in, shuffled
        batches = list(DataLoader(loader.dataset, batch_size=None, sampler=sampler))
        assert len(batches) == 2
        for inputs, labels in batches:
            assert len(inputs) == len(labels) == len(data.train_set)
            assert inputs.equal(next(iter(loader))[0])


def test_every_callback_has_a_configuration() -> None:
    texts = "".join(config.read_text() for config in CONFIGS)
    assert not [name for name in callbacks.__all__ if name not in texts]


def test_command_line_knows_the_callbacks_by_their_short_names() -> None:
    """In a process of its own: here they are imported already."""
    command = [sys.executable, "-W", "ignore", "-m", "lyapunov_lightning", "fit", "--config", str(CONFIGS[0])]
    done = subprocess.run([*command, "--print_config"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CurvatureProbe" in done.stdout
