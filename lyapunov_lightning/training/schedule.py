"""When to measure: dense at first, sparse later, or within a share of the time."""

import math
import time
from dataclasses import dataclass
from typing import Any, Optional

import lightning.pytorch as pl


@dataclass(frozen=True)
class Schedule:
    """The steps at which a callback measures; every rule that is given adds some.

    Args:
        every_n_steps: Measure before every n-th optimizer step.
        every_n_epochs: Measure before the first step of every n-th epoch.
        first_n_steps: Measure before each of the first n optimizer steps of the training.
        max_overhead: Measure as often as measurements take at most this share of the whole time, such as 0.05. The
            first measurement is made at once and paid back before the next.

    Raises:
        ValueError: If an argument is out of its range, or no rule is given.

    Example::

        >>> from lyapunov_lightning import Schedule
        >>> Schedule(first_n_steps=100, every_n_epochs=1)  # as in the papers: every step early on, then every epoch
        Schedule(every_n_steps=None, every_n_epochs=1, first_n_steps=100, max_overhead=None)

    """

    every_n_steps: Optional[int] = None
    every_n_epochs: Optional[int] = None
    first_n_steps: int = 0
    max_overhead: Optional[float] = None

    def __post_init__(self) -> None:
        for name, least in (("every_n_steps", 1), ("every_n_epochs", 1), ("first_n_steps", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"`{name}` should be a {'positive' if least else 'non-negative'} int, got {value}.")
        if self.max_overhead is not None and not 0 < self.max_overhead < 1:
            raise ValueError(f"`max_overhead` should be in (0, 1), got {self.max_overhead}.")
        if not (self.every_n_steps or self.every_n_epochs or self.first_n_steps or self.max_overhead):
            raise ValueError(
                "A schedule should have at least one of `every_n_steps`, `every_n_epochs`, `first_n_steps` and"
                " `max_overhead`, got none."
            )


class Timetable:
    """A schedule as it is kept in one run.

    The answers are the same in every process: where time decides, it is that of the first process.

    Args:
        schedule: The rules.

    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._restored_step: Optional[int] = None
        self.start()

    def start(self) -> None:
        """Begin a run: nothing has been measured yet, except before the checkpoint that it goes on from."""
        self._batch: Optional[tuple[int, int]] = None
        self._batch_is_due = False
        self._last_step, self._restored_step = self._restored_step, None
        self._first_step: Optional[int] = None
        self._next_step = 0
        self._started = 0.0
        self._spent = 0.0
        self._last_cost = 0.0

    def is_due(self, trainer: "pl.Trainer", batch_idx: int) -> bool:
        """Whether to measure before the present batch: at most once an optimizer step, on the first of its batches.

        Asked again at the same batch, the answer is the same.

        """
        batch = (trainer.current_epoch, batch_idx)
        if batch != self._batch:
            self._batch = batch
            self._batch_is_due = trainer.global_step != self._last_step and self._fits(trainer, batch_idx)
            if self._batch_is_due:
                self._last_step = trainer.global_step
        return self._batch_is_due

    def record(self, seconds: float) -> None:
        """Take note of what a measurement took."""
        self._spent += seconds
        self._last_cost = seconds

    def state_dict(self) -> dict[str, Any]:
        """The step of the last measurement; the clock starts anew in a resumed run."""
        return {"last_step": self._last_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._last_step = self._restored_step = state["last_step"]

    def _fits(self, trainer: "pl.Trainer", batch_idx: int) -> bool:
        rules, step = self._schedule, trainer.global_step
        if step < rules.first_n_steps:
            return True
        if rules.every_n_steps is not None and step % rules.every_n_steps == 0:
            return True
        if rules.every_n_epochs is not None and batch_idx == 0 and trainer.current_epoch % rules.every_n_epochs == 0:
            return True
        return rules.max_overhead is not None and self._is_affordable(trainer, step, rules.max_overhead)

    def _is_affordable(self, trainer: "pl.Trainer", step: int, share: float) -> bool:
        now = time.perf_counter()
        if self._first_step is None:
            self._first_step, self._started = step, now
        if step < self._next_step:
            return False
        elapsed = now - self._started
        shortfall = (self._spent + self._last_cost) / share - (elapsed + self._last_cost)
        wait = 0
        if shortfall > 0:  # as many steps as training needs to bring the share of all measurements down again
            done = step - self._first_step
            seconds_a_step = max(elapsed - self._spent, 1e-9) / max(done, 1)
            wait = min(math.ceil(shortfall / seconds_a_step), max(2 * done, 10))
        wait = trainer.strategy.broadcast(wait) if trainer.world_size > 1 else wait
        self._next_step = step + wait
        return wait == 0
