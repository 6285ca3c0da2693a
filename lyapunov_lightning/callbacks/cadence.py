"""At which of its measurements a probe takes the eigenvalue as well, which costs more than all the rest."""

import math
from typing import Any

from lyapunov_lightning.callbacks.results.probe import ProbeResult

_FIRST_EIGENVALUE = 2
"""The measurement, counted from 0, from which on the eigenvalue is measured too, by default: the one at step 20. It
costs what ten to thirty steps do, and that of fresh weights says little."""

_HELD = 4
"""For how many measurements more an eigenvalue counts, by default: sharpness changes, and an old one would bind."""

EIGENVALUE_SHARE = 0.03
"""The share of the steps that it may cost: after one of eight products, it is due again some 600 steps later."""

_GRADIENTS_OF_PRODUCT = 2.3
"""What a product costs, in gradients and so in steps."""


class EigenvalueCadence:
    """Which of the measurements are for the eigenvalue as well.

    Args:
        every: Every how many of them, besides the first two; None for as many as its share of the training allows.

    """

    def __init__(self, every: int | None) -> None:
        self.follow(every)
        self.start()

    def start(self) -> None:
        """Begin a run."""
        self._count = 0
        self._due_at = 0
        self._step = 0
        self.is_full = True

    def follow(self, every: int | None) -> None:
        """Take over the number."""
        self._every = every

    @property
    def held(self) -> int:
        """For how many measurements an eigenvalue stands that is not measured anew."""
        return _HELD if self._every is None else max(1, self._every - 1)

    def begin(self, step: int) -> bool:
        """Begin a measurement; returns whether it is for the eigenvalue as well."""
        if self._every is not None:
            self.is_full = self._count < 2 or self._count % self._every == 0
        else:
            self.is_full = self._count >= _FIRST_EIGENVALUE and step >= self._due_at
        self._count += 1
        self._step = step
        return self.is_full

    def spend(self, found: ProbeResult) -> None:
        """Count what an eigenvalue has cost."""
        self._due_at = self._step + math.ceil(found.matvecs * _GRADIENTS_OF_PRODUCT / EIGENVALUE_SHARE)

    @property
    def goes_by_cost(self) -> bool:
        """Whether an eigenvalue is due once the steps since the last one are worth it."""
        return self._every is None

    def is_over(self, num_steps: float) -> bool:
        """Whether a training of so many steps ends before that."""
        return self._step + 1 < num_steps <= self._due_at and math.isfinite(num_steps)

    def state_dict(self) -> dict[str, Any]:
        """How many measurements there were, and when the next eigenvalue is due."""
        return {"count": self._count, "due_at": self._due_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._count, self._due_at = state["count"], state["due_at"]
