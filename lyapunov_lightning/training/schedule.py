"""When a callback measures: the rules that a user writes, and where a run stands in them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lyapunov_lightning.curvature.arguments import check_int
from lyapunov_lightning.training.spacing import Spacing

if TYPE_CHECKING:
    from lyapunov_lightning.training.lightning_names import Trainer

_THINNED = 20
"""Where the distance grows it is the steps so far over this: measurements then differ by 5 % in their step."""


@dataclass(frozen=True)
class Schedule:
    """The steps at which a callback measures; every rule that is given adds some.

    Args:
        every_n_steps: Measure at the first opportunity after every n optimizer steps, beginning with the first.
        every_n_epochs: Measure before the first step of every n-th epoch.
        first_n_steps: Measure before each of the first n optimizer steps of the training.
        max_overhead: Measure as often as measurements take this share of the whole time, such as 0.05, at even
            distances; one line says how often that comes out. The first measurement, which is slower than all others,
            is made at once and is not part of the share.
        at_steps: Measure before these optimizer steps, counted from 0.
        thin_to: Let the distance of `every_n_steps` grow with the run, to about a twentieth of the steps so far and at
            most this: long runs change slowly, and would be measured for nothing.

    Raises:
        ValueError: If an argument is out of its range, or no rule is given.

    Example::

        >>> from lyapunov_lightning import Schedule
        >>> Schedule(first_n_steps=100, every_n_epochs=1)  # as in the papers: every step early on, then every epoch
        Schedule(every_n_steps=None, every_n_epochs=1, first_n_steps=100, max_overhead=None, at_steps=(), thin_to=None)

    """

    every_n_steps: int | None = None
    every_n_epochs: int | None = None
    first_n_steps: int = 0
    max_overhead: float | None = None
    at_steps: Sequence[int] = ()
    thin_to: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("every_n_steps", 1), ("every_n_epochs", 1), ("first_n_steps", 0), ("thin_to", 1)):
            value = getattr(self, name)
            if value is not None:
                check_int(name, value, least)
        if self.max_overhead is not None and not 0 < self.max_overhead < 1:
            raise ValueError(f"`max_overhead` should be in (0, 1), got {self.max_overhead!r}.")
        object.__setattr__(self, "at_steps", checked_steps("at_steps", self.at_steps))
        if self.thin_to is not None and not (self.every_n_steps and self.thin_to >= self.every_n_steps):
            raise ValueError(
                f"`thin_to` should be at least `every_n_steps`, the distance that it lets grow, got"
                f" thin_to={self.thin_to} and every_n_steps={self.every_n_steps}."
            )
        if not (self.every_n_steps or self.every_n_epochs or self.first_n_steps or self.max_overhead or self.at_steps):
            raise ValueError(
                "A schedule should have at least one of `every_n_steps`, `every_n_epochs`, `first_n_steps`,"
                " `max_overhead` and `at_steps`, got none."
            )


def checked_steps(name: str, steps: Sequence[int]) -> tuple[int, ...]:
    """Optimizer steps in their order.

    Raises:
        ValueError: If they are not distinct non-negative ints.

    """
    if not isinstance(steps, (list, tuple)):
        raise ValueError(f"`{name}` should be a list of steps, got {steps!r}.")
    for step in steps:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"`{name}` should hold non-negative ints, got {steps!r}.")
    if len(set(steps)) < len(steps):
        raise ValueError(f"`{name}` should hold each step once, got {steps!r}.")
    return tuple(sorted(steps))


def _distance(every: int, thin_to: int | None, step: int) -> int:
    """Steps from one measurement to the next: a multiple of `every`, so that it depends on the step alone."""
    return every if thin_to is None else every * max(1, min(thin_to, step // _THINNED) // every)


class ScheduleState:
    """Where one run stands in a schedule.

    The answers are the same on every rank: times are those of the first rank.

    Args:
        schedule: The rules; None never measures.
        say: Gets a sentence for the user on what `Schedule.max_overhead` comes out at, once in a run.

    """

    def __init__(self, schedule: Schedule | None, say: Callable[[str], None] = lambda _: None) -> None:
        self._say = say
        self._restored: tuple[int | None, int | None] = (None, None)
        self.follow(schedule)
        self.start()

    def start(self) -> None:
        """Begin a run: no step has passed yet, except before the checkpoint that it resumes from."""
        self._passed, self._measured = self._restored
        self._restored = (None, None)
        if self._spacing is not None:
            self._spacing.start()

    def follow(self, schedule: Schedule | None) -> None:
        """Take over the rules, where there were none."""
        share = None if schedule is None else schedule.max_overhead
        self._schedule = schedule
        self._spacing = None if share is None else Spacing(share, self._say)

    def advance(self, trainer: "Trainer", batch_idx: int) -> bool:
        """Move on to the present batch; returns whether to measure before it.

        To be called once before every batch. A step that accumulates gradients is measured before its first batch, and
        no step is measured twice.

        """
        step, passed = trainer.global_step, self._passed
        self._passed = step
        # The first batch of an epoch is an opportunity in any case, since `every_n_epochs` asks for nothing else.
        if step == self._measured or (step == passed and batch_idx > 0) or self._schedule is None:
            return False
        # With several optimizers in manual optimization the step moves on by more than one a batch. There was no
        # opportunity in between, so a rule that asks for a step there is due now. A step lower than the last one is of
        # another run.
        earlier = step - 1 if passed is None or passed > step else passed
        is_due = self._fits(self._schedule, trainer, batch_idx, earlier)
        if is_due:
            self._measured = step
            if self._spacing is not None:
                self._spacing.begin(step)
        return is_due

    def record(self, seconds: float) -> None:
        """Count the time of a measurement."""
        if self._spacing is not None:
            self._spacing.record(seconds)

    def state_dict(self) -> dict[str, Any]:
        """The last step that was passed and the last that was measured; the clock starts anew in a resumed run."""
        return {"passed": self._passed, "measured": self._measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        # Kept for `start` too, which begins every run and would forget what the checkpoint has brought.
        for name in ("passed", "measured"):
            if not isinstance(state[name], int | None):
                raise ValueError(f"{name} should be a step, got {state[name]!r}")
        self._passed, self._measured = self._restored = (state["passed"], state["measured"])

    def _fits(self, rules: Schedule, trainer: "Trainer", batch_idx: int, earlier: int) -> bool:
        """Whether one of the rules asks for the present step, the step at the last opportunity being `earlier`."""
        step = trainer.global_step
        if any(earlier < fixed <= step for fixed in rules.at_steps):
            return True
        if step < rules.first_n_steps:
            return True
        # Whether a multiple lies in between, and not whether the step is one: with several optimizers in manual
        # optimization the step may jump over all multiples of 10.
        if rules.every_n_steps is not None:
            distance = _distance(rules.every_n_steps, rules.thin_to, step)
            if step // distance != earlier // distance:
                return True
        if rules.every_n_epochs is not None and batch_idx == 0 and trainer.current_epoch % rules.every_n_epochs == 0:
            return True
        return self._spacing is not None and self._spacing.is_due(trainer, step)
