"""The same runs in a Trainer, with a probe."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.known_runs.training import Run
from benchmarks.quasi_newton import Samples
from lyapunov_lightning import CurvatureProbe


class Learner(pl.LightningModule):
    """Trains a run's network."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run, self.network = run, run.network()

    def training_step(self, batch: Samples, batch_idx: int) -> Tensor:
        """The mean loss."""
        return self.run.loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """The run's optimizer, with its learning rate of each step."""
        optimizer = self.run.optimizer_of(self.network)
        factors = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.run.rate_at(step) / self.run.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factors, "interval": "step"}}


def watch(run: Run) -> CurvatureProbe:
    """Train with a probe that measures at every fifth step, an eigenvalue at every 25th."""
    if run.resumed is None:
        return _fit(run, run.steps)[1]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "half.ckpt"
        _fit(run, run.resumed)[0].save_checkpoint(checkpoint)
        return _fit(run, run.steps, checkpoint)[1]


def _fit(run: Run, steps: int, checkpoint: Path | None = None) -> tuple[pl.Trainer, CurvatureProbe]:
    probe = CurvatureProbe(every_n_steps=5, eigenvalue_every=5)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            logger=False,
            callbacks=[probe],
            gradient_clip_val=run.clip,
            accumulate_grad_batches=run.accumulate,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(Learner(run), DataLoader(run.batches(), batch_size=None), ckpt_path=checkpoint)
    return trainer, probe
