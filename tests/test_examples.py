"""Every configuration among the examples is understood, and names callbacks of this package."""

from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI

from lyapunov_lightning.callbacks.base import CurvatureCallback

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configuration_is_understood(config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    arguments = ["--config", str(config), f"--trainer.default_root_dir={tmp_path}"]
    cli = LightningCLI(args=arguments, run=False, save_config_callback=None)
    assert any(isinstance(callback, CurvatureCallback) for callback in cli.trainer.callbacks)


def test_every_callback_has_a_configuration() -> None:
    texts = "".join(config.read_text() for config in CONFIGS)
    missing = [callback.__name__ for callback in CurvatureCallback.__subclasses__() if callback.__name__ not in texts]
    assert not missing
