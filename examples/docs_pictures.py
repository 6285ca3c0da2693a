"""Draw the pictures of the page "Reading the curves", and print what the probe said of each run.

``python -m examples.docs_pictures`` trains the quick start's network on handwritten digits at three learning rates:
well below the edge of stability, at it, and beyond it. About half a minute on two cores.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch

from examples.data import Digits
from examples.models import MLP, Classifier
from lyapunov_lightning import CurvatureProbe

PICTURES = Path(__file__).parents[1] / "docs" / "images"
RUNS = {"below": (0.1, 5), "edge": (0.4, 5), "fast": (1.7, 1)}
"""For each picture the learning rate, and every how many steps is measured: what diverges does so within a few."""


def descend(callback: pl.Callback, widths: Sequence[int], learning_rate: float, num_steps: int, log_dir: Path) -> None:
    """One run of gradient descent on all digits, with a callback that watches it."""
    pl.seed_everything(0)
    module = Classifier(
        MLP(64, widths, activation="tanh"),
        loss="squared_error",
        optimizer=partial(torch.optim.SGD, lr=learning_rate),
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=num_steps,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=pl.loggers.CSVLogger(log_dir),
        callbacks=[callback],
    )
    trainer.fit(module, Digits())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="length of each run")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="where to draw")
    parser.add_argument("--log-dir", type=Path, default=Path("logs/docs_pictures"), help="where to log")
    options = parser.parse_args()

    for name, (learning_rate, every_n_steps) in RUNS.items():
        probe = CurvatureProbe(every_n_steps)
        descend(probe, [64, 64], learning_rate, options.steps, options.log_dir)
        picture = options.pictures / f"reading_{name}.png"
        probe.plot().savefig(picture, dpi=130)  # `save` would write a larger one, and an SVG
        print(f"\nLearning rate {learning_rate}, {picture}:\n{probe.diagnosis()}")


if __name__ == "__main__":
    main()
