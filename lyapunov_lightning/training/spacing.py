"""How far apart measurements have to be to take a given share of the time."""

import math
import time
from collections import deque
from statistics import fmean
from typing import Any

from lyapunov_lightning.training.distributed import of_first_rank

_WARM = 5
"""Steps between the first measurement, which is slower than all others, and the second."""

_MEMORY = 5
"""Measurements over which their cost, and the pace of the training between them, are averaged."""

_SETTLED = 3
"""Measurements after which their distance is worth telling."""


class Spacing:
    """Spreads measurements evenly, so that they take a share of the time.

    The first measurement of a run builds caches and chooses kernels; it is not part of the share. Each of the others is
    paid for by the steps that follow it.

    Args:
        share: The share of the whole time.

    """

    def __init__(self, share: float) -> None:
        self._share = share
        self.start()

    def start(self) -> None:
        """Begin a run."""
        self._costs: deque[float] = deque(maxlen=_MEMORY)
        self._paces: deque[tuple[float, int]] = deque(maxlen=_MEMORY)
        self._measured_at = 0
        self._ended: float | None = None
        self._due_at: int | None = None
        self._note: str | None = None
        self._has_told = False

    def is_due(self, trainer: Any, step: int) -> bool:
        """Whether to measure before a step: the same on every rank, by the clock of the first one."""
        if self._ended is None:
            return True
        if self._due_at is None:
            self._due_at = self._measured_at + self._interval(trainer)
        return step >= self._due_at

    def begin(self, step: int) -> None:
        """A measurement is made before this step, for whatever reason."""
        if self._ended is not None:
            self._paces.append((time.perf_counter() - self._ended, step - self._measured_at))
        self._measured_at = step

    def record(self, seconds: float) -> None:
        """Take note of what the measurement took."""
        if self._ended is not None:
            self._costs.append(seconds)
        self._ended = time.perf_counter()
        self._due_at = None

    def take_note(self) -> str | None:
        """A sentence on how often that comes out, once that is known; None before and afterwards."""
        note, self._note = self._note, None
        return note

    def _interval(self, trainer: Any) -> int:
        """Steps from the last measurement to the next one."""
        if not self._costs:
            return _WARM
        cost = fmean(self._costs)
        pace = max(sum(seconds for seconds, _ in self._paces), 1e-9) / max(sum(steps for _, steps in self._paces), 1)
        own = max(1, math.ceil(round(cost * (1 - self._share) / self._share / pace, 6)))
        interval: int = of_first_rank(trainer, own)
        if len(self._costs) == _SETTLED and not self._has_told:
            self._has_told = True
            self._note = (
                f"`max_overhead={self._share:g}` comes out at one measurement in about {interval} steps: {cost:.2g}"
                f" seconds each, where a step takes {pace:.2g}."
            )
        return interval
