"""How far apart measurements have to be to take a given share of the time."""

import math
import time
from collections import deque
from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING

from lyapunov_lightning.training.distributed import of_first_rank

if TYPE_CHECKING:
    from lyapunov_lightning.training.lightning_names import Trainer

_STEPS_TO_SECOND = 5
"""Steps between the first measurement, which is slower than all others and so says nothing of the cost, and the second,
which is the first to say something."""

_AVERAGED = 5
"""Measurements over which their cost, and the pace of the training between them, are averaged."""

_SETTLED = 3
"""Measurements after which their distance is reported to the user."""


class Spacing:
    """Spreads measurements evenly, so that they take a share of the time.

    The first measurement of a run builds caches and chooses kernels, and is not part of the share: with one of 0.2 s
    where the others take 5 ms, the second one would come after 2,000 steps instead of 5. Each of the others is paid for
    by the steps that follow it.

    Args:
        share: The share of the whole time.
        say: Gets a sentence for the user on how often that comes out, once in a run.

    """

    def __init__(self, share: float, say: Callable[[str], None]) -> None:
        self._share = share
        self._say = say
        self.start()

    def start(self) -> None:
        """Begin a run."""
        self._costs: deque[float] = deque(maxlen=_AVERAGED)
        self._paces: deque[tuple[float, int]] = deque(maxlen=_AVERAGED)
        self._measured_at = 0
        self._ended: float | None = None
        self._due_at: int | None = None
        self._has_said = False

    def is_due(self, trainer: "Trainer", step: int) -> bool:
        """Whether to measure before a step: the same on every rank, by the clock of the first one."""
        if self._ended is None:
            return True
        if self._due_at is None:
            self._due_at = self._measured_at + self._interval(trainer)
        return step >= self._due_at

    def begin(self, step: int) -> None:
        """Note that a measurement is made before this step, by this rule or by another one of the schedule."""
        if self._ended is not None:
            self._paces.append((time.perf_counter() - self._ended, step - self._measured_at))
        self._measured_at = step

    def record(self, seconds: float) -> None:
        """Count the time of the measurement that has ended."""
        if self._ended is not None:
            self._costs.append(seconds)
        self._ended = time.perf_counter()
        self._due_at = None

    def _interval(self, trainer: "Trainer") -> int:
        """Steps from the last measurement to the next one."""
        if not self._costs:
            return _STEPS_TO_SECOND
        cost = fmean(self._costs)
        pace = max(sum(seconds for seconds, _ in self._paces), 1e-9) / max(sum(steps for _, steps in self._paces), 1)
        # A measurement of c seconds has the share s of itself and n steps of p seconds where c = s (c + n p), so that
        # n = c (1 - s) / (s p).
        # Rounded first: a quotient of 19 that comes out as 19.000000000000004 is not to become 20 steps.
        own = max(1, math.ceil(round(cost * (1 - self._share) / self._share / pace, 6)))
        # Each rank's clock says something else, and ranks that measure at different steps wait for each other forever.
        interval = of_first_rank(trainer, own)
        if len(self._costs) == _SETTLED and not self._has_said:
            self._has_said = True
            self._say(
                f"`max_overhead={self._share:g}` comes out at one measurement in about {interval} steps: {cost:.2g}"
                f" seconds each, where a step takes {pace:.2g}."
            )
        return interval
