"""Train a small network on handwritten digits, and draw its sharpness against the stability limit.

Run by ``make demo``, or ``python -m examples.quickstart``. The training is that of the command
``lyapunov-lightning fit --config examples/configs/quickstart.yaml``; at its end the probe says what it saw.
"""

import sys
from pathlib import Path

from lyapunov_lightning import CurvatureProbe
from lyapunov_lightning.cli import main as run_cli

CONFIG = Path(__file__).parent / "configs" / "quickstart.yaml"
TENSORBOARD = Path(sys.executable).with_name("tensorboard")


def main() -> None:
    trainer = run_cli(["fit", "--config", str(CONFIG)]).trainer
    probe = next(callback for callback in trainer.callbacks if isinstance(callback, CurvatureProbe))
    picture, *_ = probe.plot().save(Path(trainer.log_dir) / "sharpness")
    print(f"\nThe picture: {picture}\nIn TensorBoard: {TENSORBOARD} --logdir logs")


if __name__ == "__main__":
    main()
