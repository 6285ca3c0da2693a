"""What keeps a training that is acted upon from being lost."""

import math
from typing import Any

import torch

from lyapunov_lightning.curvature.acting.loss_watch import LossWatch, Verdict
from lyapunov_lightning.training.optimizers.kept_copy import KeptCopy

_COPY_EVERY = 10
"""Steps between two copies of the training."""

_PATIENCE = 10
"""How often a training is brought back before it counts as hopeless."""


class Safeguard:
    """Judges every loss, keeps a copy of the training while all is well, and goes back to it when it is not.

    Args:
        keeps_copies: Whether there is to be anything to go back to; else losses are judged only.

    Attributes:
        watch: What judges the losses.
        num_restored: How often the training was brought back.

    """

    def __init__(self, keeps_copies: bool = True) -> None:
        self.watch = LossWatch()
        self.num_restored = 0
        self._keeps_copies = keeps_copies
        self._copy = KeptCopy()
        self._copied_at: int | None = None
        self._attempts = 0

    def start(self) -> None:
        """Begin a run: what an earlier one has left is not to go back to."""
        self._copy.clear()
        self._copied_at = None

    def before_batch(self, trainer: Any, pl_module: Any) -> None:
        """Copy the training now and then; whether the copy is good, the loss will tell."""
        step = trainer.global_step
        if self._keeps_copies and step % _COPY_EVERY == 0 and step != self._copied_at:
            self._copied_at = step
            self._copy.take(step, pl_module, trainer.optimizers[0])

    def after_batch(self, loss: float, optimizer: torch.optim.Optimizer) -> tuple[Verdict, int | None]:
        """Judge the loss of a batch, after its step, and go back if the training is lost.

        Returns:
            The verdict, and the step whose state the training has again, if it was brought back.

        """
        verdict = self.watch.see(loss)
        if verdict is Verdict.LOST:
            self.watch.go_back()
            self._attempts += 1
            restored = self._copy.restore(optimizer)
            self.num_restored += restored is not None
            return verdict, restored
        if verdict is Verdict.WELL:
            self._attempts = 0
            self._copy.confirm()
        else:
            self._copy.reject()
        return verdict, None

    def is_hopeless(self, loss: float, restored: int | None) -> bool:
        """Whether going back does not help, or cannot."""
        return self._attempts >= _PATIENCE or (restored is None and not math.isfinite(loss))

    def state_dict(self) -> dict[str, Any]:
        """What is known of the losses; the copy itself would be as large as the checkpoint."""
        return {"watch": self.watch.state_dict(), "restored": self.num_restored, "attempts": self._attempts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`; there is no copy until the next one is taken."""
        self.watch.load_state_dict(state["watch"])
        self.num_restored, self._attempts = state["restored"], state["attempts"]
