"""Keeps a training whose learning rate is changed from being lost: it is watched, copied, and brought back."""

import math
from typing import Any

import torch

from lyapunov_lightning.curvature.acting.loss_watch import LossWatch, Verdict
from lyapunov_lightning.training.lightning_names import LightningModule, Trainer
from lyapunov_lightning.training.optimizers.kept_copy import KeptCopy

_STEPS_BETWEEN_COPIES = 10
"""Steps between two copies of the training: at most so many are lost when it is brought back."""

_HOPELESS_AFTER = 10
"""How often a training is lost without a good loss in between before it counts as hopeless."""


class Safeguard:
    """Judges every loss, keeps a copy of the training while its losses are good, and goes back when it is lost.

    Args:
        keeps_copies: Whether to keep copies. Without them the losses are judged only.

    Attributes:
        watch: Judges the losses.
        num_restored: How often the training was brought back so far.

    """

    def __init__(self, keeps_copies: bool = True) -> None:
        self.watch = LossWatch()
        self.num_restored = 0
        self._keeps_copies = keeps_copies
        self._copy = KeptCopy()
        self._copied_at: int | None = None
        self._times_lost = 0

    def start(self) -> None:
        """Begin a run, without the copies of an earlier one."""
        self._copy.clear()
        self._copied_at = None

    def before_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the training at every tenth step; `after_batch` keeps the copy if the loss of its batch is good."""
        step = trainer.global_step
        # With gradient accumulation there are several batches before one step: one copy is enough.
        if self._keeps_copies and step % _STEPS_BETWEEN_COPIES == 0 and step != self._copied_at:
            self._copied_at = step
            self._copy.take(step, pl_module, trainer.optimizers[0])

    def after_batch(self, loss: float, optimizer: torch.optim.Optimizer) -> tuple[Verdict, int | None]:
        """Judge the loss of a batch, after its step, and go back if the training is lost.

        Returns:
            The verdict, and the step whose state the training has been brought back to, if it was.

        """
        verdict = self.watch.see(loss)
        if verdict is Verdict.LOST:
            # Whether or not there is a copy to go back to: the losses that went up are no measure for those to come.
            self.watch.go_back()
            self._times_lost += 1
            restored = self._copy.restore(optimizer)
            self.num_restored += restored is not None
            return verdict, restored
        if verdict is Verdict.WELL:
            self._times_lost = 0
            self._copy.confirm()
        else:
            # A loss that is neither good nor lost yet may be the first of a divergence: a copy of it would be gone back
            # to again and again.
            self._copy.reject()
        return verdict, None

    def is_hopeless(self, loss: float, restored: int | None) -> bool:
        """Whether going back has not helped often enough to give up, or is impossible after NaN or infinity."""
        return self._times_lost >= _HOPELESS_AFTER or (restored is None and not math.isfinite(loss))

    def state_dict(self) -> dict[str, Any]:
        """What is known of the losses, without the copy, which would be as large as the whole checkpoint."""
        return {"watch": self.watch.state_dict(), "restored": self.num_restored, "attempts": self._times_lost}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`, without a copy until the next one is taken."""
        self.watch.load_state_dict(state["watch"])
        self.num_restored, self._times_lost = state["restored"], state["attempts"]
