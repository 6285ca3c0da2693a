"""Short trainings on the CPU that show nothing and write nothing: the one place where tests build a small Trainer."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint

from tests.modules import regression_loader


def train(
    module: pl.LightningModule,
    *callbacks: Callback,
    loader: Any = None,
    ckpt_path: Any = None,
    weights_only: bool | None = None,
    **options: Any,
) -> pl.Trainer:
    """Fit a module.

    Args:
        module: The module.
        callbacks: The trainer's.
        loader: The training data; `regression_loader` if None.
        ckpt_path: The checkpoint to resume from.
        weights_only: How it is loaded.
        options: Any other arguments of the Trainer. Without an end among them the run takes one epoch; there is no
            logger, and checkpoints are written where a callback does.

    Returns:
        The trainer.

    """
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1 if "max_steps" in options else 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **options,
    }
    trainer = pl.Trainer(callbacks=list(callbacks), **settings)
    data = regression_loader() if loader is None else loader
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=weights_only)
    return trainer
