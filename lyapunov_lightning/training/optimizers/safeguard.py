"""Keeps a training whose learning rate is changed from being lost: it is watched, copied, and brought back."""

import math
from typing import Any

import torch

from lyapunov_lightning.curvature.acting.loss_watch import LossWatch, Verdict
from lyapunov_lightning.training.lightning_names import LightningModule, Trainer
from lyapunov_lightning.training.optimizers.kept_copy import KeptCopy

_PROVEN_AFTER = 20
"""Steps that a copy waits until the losses since have proven it. A loss that is well says little of the state before it
where losses are noisy: a matrix factorisation in batches of 32, whose rate was too high, had half of its losses well
while its parameters went astray, and came back to such a state 15 times in 300 steps and ended at 500 times the best
loss; with proven copies it came back twice, and ended near the best."""

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
        self._copied_at: int | None = None  # of the copy that waits
        self._is_proven_next = False
        self._times_lost = 0

    def start(self) -> None:
        """Begin a run, without the copies of an earlier one."""
        self._copy.clear()
        self._copied_at = None

    def before_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the training, where no other copy is waiting to be proven."""
        step = trainer.global_step
        # With gradient accumulation there are several batches before one step: one copy is enough.
        if self._keeps_copies and self._copied_at is None:
            self._copied_at = step
            self._copy.take(step, pl_module, trainer.optimizers[0])
        self._is_proven_next = self._copied_at is not None and step + 1 - self._copied_at >= _PROVEN_AFTER

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
            self._copied_at = None
            restored = self._copy.restore(optimizer)
            self.num_restored += restored is not None
            return verdict, restored
        if verdict is Verdict.WELL:
            self._times_lost = 0
        if self._copied_at is None:
            return verdict, None
        if not self._copy.is_confirmed and verdict is Verdict.WELL:
            # The first one of a run, which is better than none.
            self._copied_at = None
            self._copy.confirm()
        elif self._is_proven_next:
            self._copied_at = None
            if verdict is Verdict.WELL and self.watch.is_near_best:
                self._copy.confirm()
            else:
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
