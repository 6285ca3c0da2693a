"""When to measure."""

import math
import time
from typing import Any, Optional

import lightning.pytorch as pl


class Schedule:
    """Every `every_n_steps` optimizer steps, or as often as a share of the training time allows.

    The answer is the same in every process: with a budget of time, that of the first process decides for all.

    Args:
        every_n_steps: Distance of two measurements in optimizer steps. Not used if `max_overhead` is given.
        max_overhead: The most that measurements may take of the whole time, as a fraction. The first measurement is
            made at once and paid back before the next.

    Raises:
        ValueError: If an argument is out of its range.

    """

    def __init__(self, every_n_steps: int = 10, max_overhead: Optional[float] = None) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"`every_n_steps` should be a positive int, got {every_n_steps}.")
        if max_overhead is not None and not 0 < max_overhead < 1:
            raise ValueError(f"`max_overhead` should be in (0, 1), got {max_overhead}.")
        self._every_n_steps = every_n_steps
        self._max_overhead = max_overhead
        self._last_step: Optional[int] = None
        self._next_step = 0
        self._first_step: Optional[int] = None
        self._started = 0.0
        self._spent = 0.0
        self._last_cost = 0.0

    def is_due(self, trainer: "pl.Trainer") -> bool:
        """Whether to measure before the present optimizer step; true once a step, on the first of its batches."""
        step = trainer.global_step
        if step == self._last_step:
            return False
        if self._max_overhead is None:
            due = step % self._every_n_steps == 0
        else:
            due = step >= self._next_step and self._is_affordable(trainer, step, self._max_overhead)
        if due:
            self._last_step = step
        return due

    def record(self, seconds: float) -> None:
        """Take note of what a measurement took."""
        self._spent += seconds
        self._last_cost = seconds

    def state_dict(self) -> dict[str, Any]:
        """The step of the last measurement; the clock starts anew in a resumed run."""
        return {"last_step": self._last_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._last_step = state["last_step"]

    def _is_affordable(self, trainer: "pl.Trainer", step: int, share: float) -> bool:
        now = time.perf_counter()
        if self._first_step is None:
            self._first_step, self._started = step, now
        elapsed = now - self._started
        shortfall = (self._spent + self._last_cost) / share - (elapsed + self._last_cost)
        wait = 0
        if shortfall > 0:  # as many steps as training needs to bring the share of all measurements down again
            seconds_a_step = max(elapsed - self._spent, 1e-9) / max(step - self._first_step, 1)
            wait = min(math.ceil(shortfall / seconds_a_step), max(2 * (step - self._first_step), 10))
        wait = trainer.strategy.broadcast(wait) if trainer.world_size > 1 else wait
        self._next_step = step + wait
        return wait == 0
