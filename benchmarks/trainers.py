"""A Trainer that has nothing but the callbacks that are tried."""

import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl


def train(
    module: pl.LightningModule, batches: Iterable[Any], callbacks: Sequence[pl.Callback], steps: int
) -> pl.Trainer:
    """Train for some optimizer steps on the CPU; what callbacks write is gone afterwards.

    Returns:
        The trainer.

    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            callbacks=[*callbacks],
            logger=False,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, batches)
    return trainer
