"""What each measurement of a probe consists of: the eigenvalue costs more than all the rest, and the rest adds up."""

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

_GAUGED_EVERY = 10
"""Steps from one batch sharpness to the next, at least, where eigenvalues are asked for at steps that are nearer: it
costs up to three steps, and what counts is the mean over eight of them."""

_PLAIN_EVERY = 5
"""With every how many eigenvalues of a preconditioned Hessian that of the Hessian itself is measured too: it costs as
much again, and nothing depends on it. With the first one; where they go by their cost, with the second one."""


class Cadence:
    """What is due at the present measurement.

    Args:
        asked: At every how many measurements the user asks for the eigenvalue, besides the first two; None for all.

    Attributes:
        is_full: Whether the eigenvalue is measured.
        is_gauged: Whether the batch sharpness is.
        is_plain: Whether the largest eigenvalue of the Hessian is, where the optimizer's limit is one on that of
            another matrix. Who asks for eigenvalues at every so many measurements has both at all of these.

    """

    def __init__(self, asked: int | None) -> None:
        self._asked = asked
        self._goes_by_cost = False
        self.start()

    def start(self) -> None:
        """Begin a run."""
        self._count = self._eigenvalues = 0
        self._due_at = self._gauged_from = 0
        self._step = 0
        self.is_full = self.is_gauged = self.is_plain = True

    def follow_the_cost(self) -> None:
        """Measure as many eigenvalues as their share of the training allows, where the user has not said how many."""
        self._goes_by_cost = self._asked is None

    @property
    def held(self) -> int:
        """For how many measurements an eigenvalue stands that is not measured anew."""
        if self._goes_by_cost:
            return _HELD
        return 1 if self._asked is None else max(1, self._asked - 1)

    def begin(self, step: int, is_awaited: bool = False) -> None:
        """Begin a measurement.

        Args:
            step: The step.
            is_awaited: Whether a batch waits for the next one to be compared with.

        """
        if self._goes_by_cost:
            self.is_full = self._count >= _FIRST_EIGENVALUE and step >= self._due_at
        else:
            self.is_full = self._asked is None or self._count < 2 or self._count % self._asked == 0
        is_each_gauged = self._goes_by_cost or self._asked is not None
        self.is_gauged = is_each_gauged or is_awaited or step >= self._gauged_from
        first = 1 if self._goes_by_cost else 0
        self.is_plain = self._asked is not None or self._eigenvalues % _PLAIN_EVERY == first
        self._count += 1
        self._eigenvalues += self.is_full
        self._step = step

    def note_gauge(self) -> None:
        """Count a batch sharpness that was measured: a step whose limit nobody knows has none."""
        self._gauged_from = self._step + _GAUGED_EVERY

    def spend(self, found: ProbeResult) -> None:
        """Count what an eigenvalue has cost."""
        self._due_at = self._step + math.ceil(found.matvecs * _GRADIENTS_OF_PRODUCT / EIGENVALUE_SHARE)

    def is_over(self, num_steps: float) -> bool:
        """Whether a training of so many steps ends before another eigenvalue is due that goes by its cost."""
        return self._goes_by_cost and self._step + 1 < num_steps <= self._due_at and math.isfinite(num_steps)

    def state_dict(self) -> dict[str, Any]:
        """How many measurements there were, and when the next ones are due."""
        counts = {"count": self._count, "eigenvalues": self._eigenvalues}
        return {**counts, "due_at": self._due_at, "gauged_from": self._gauged_from}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._count, self._due_at = state["count"], state["due_at"]
        self._eigenvalues, self._gauged_from = state["eigenvalues"], state["gauged_from"]
