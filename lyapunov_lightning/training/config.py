"""What is measured and when: values that can be compared, shared and written in YAML."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lyapunov_lightning.curvature.arguments import check_choice, check_int
from lyapunov_lightning.curvature.products import Method
from lyapunov_lightning.training.replay import LossFn, Mode
from lyapunov_lightning.training.spacing import Spacing

Data = Literal["batch", "fixed"]


@dataclass(frozen=True)
class HessianConfig:
    """Which Hessian a callback measures: of what loss, on what data, computed how.

    Callbacks with equal configurations share one operator at a step.

    Args:
        data: ``"batch"`` for the step's own batch (with gradient accumulation the first of it), ``"fixed"`` for the
            first batches of an epoch as the training dataloader gives them, the same throughout. None is the
            callback's own: ``"batch"`` for `CurvatureProbe` and `QuasiNewtonLRController`, ``"fixed"`` for the others.
        num_batches: Size of the fixed data in batches, for each rank.
        fraction: Size of the fixed data as a share of an epoch's batches, if `num_batches` is not given. None is 0.05
            for the callbacks and 1, all of the data, for `lyapunov_lightning.measure`.
        mode: ``"train"`` or ``"eval"``: how dropout and BatchNorm act in the measured loss. None is ``"train"`` for the
            callbacks and ``"eval"`` for `lyapunov_lightning.measure`.
        method: How Hessian-vector products are computed: ``"double_backward"`` and ``"forward_over_reverse"`` are
            exact, ``"finite_difference"`` works with any model, ``"auto"`` is double backward, and finite differences
            with a warning where PyTorch cannot differentiate twice.
        loss_fn: Maps the module and a batch to the scalar loss to measure, in place of what ``training_step`` returns.
            A module can define a method ``curvature_loss(batch)`` to the same end.
        batch_size_fn: Maps a batch to the number of its samples, by which batches and ranks are weighted. By default
            the ``batch_size`` that the step passes to ``self.log``, else the batch as Lightning reads it.
        seed: Seed of everything random in the measurement.
        max_gather_bytes: Of a model that is sharded over the ranks (FSDP2), how much memory each rank may spend on
            parameters and vectors that are gathered for a product: eight times the parameters for products on gathered
            parameters, five times for those through one layer after the other; with less there are finite differences
            of sharded gradients. By default half of what is free when the first measurement is made.
        offload: Whether Krylov bases and eigenvectors are kept in the CPU's memory, for models beside which the device
            has no room for them. Every product then moves a vector there and back.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> from lyapunov_lightning import HessianConfig
        >>> HessianConfig(data="fixed", num_batches=4, mode="eval") == HessianConfig("fixed", 4, mode="eval")
        True

    """

    data: Data | None = None
    num_batches: int | None = None
    fraction: float | None = None
    mode: Mode | None = None
    method: Method = "auto"
    loss_fn: LossFn | None = None
    batch_size_fn: Callable[[Any], int] | None = None
    seed: int = 0
    max_gather_bytes: int | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        if self.data is not None:
            check_choice("data", self.data, Data)
        if self.mode is not None:
            check_choice("mode", self.mode, Mode)
        check_choice("method", self.method, Method)
        if self.num_batches is not None:
            check_int("num_batches", self.num_batches, least=1)
        if self.fraction is not None and (
            isinstance(self.fraction, bool) or not isinstance(self.fraction, (int, float)) or not 0 < self.fraction <= 1
        ):
            raise ValueError(f"`fraction` should be in (0, 1], got {self.fraction}.")
        for name in ("loss_fn", "batch_size_fn"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise ValueError(f"`{name}` should be a function, got {function!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"`seed` should be an int, got {self.seed!r}.")
        if self.max_gather_bytes is not None:
            check_int("max_gather_bytes", self.max_gather_bytes, least=0)
        if not isinstance(self.offload, bool):
            raise ValueError(f"`offload` should be a bool, got {self.offload!r}.")

    def filled(self, *, data: Data, fraction: float, mode: Mode, method: Method | None = None) -> "HessianConfig":
        """The same with the user's own choices for what is left open.

        Args:
            data: Where it does not say on which data.
            fraction: Where it does not say on how much of them.
            mode: Where it does not say in which mode.
            method: In place of its own, if given.

        """
        return replace(
            self,
            data=self.data or data,
            fraction=self.fraction if self.fraction is not None else fraction,
            mode=self.mode or mode,
            method=method or self.method,
        )


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

    Raises:
        ValueError: If an argument is out of its range, or no rule is given.

    Example::

        >>> from lyapunov_lightning import Schedule
        >>> Schedule(first_n_steps=100, every_n_epochs=1)  # as in the papers: every step early on, then every epoch
        Schedule(every_n_steps=None, every_n_epochs=1, first_n_steps=100, max_overhead=None, at_steps=())

    """

    every_n_steps: int | None = None
    every_n_epochs: int | None = None
    first_n_steps: int = 0
    max_overhead: float | None = None
    at_steps: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name, least in (("every_n_steps", 1), ("every_n_epochs", 1), ("first_n_steps", 0)):
            value = getattr(self, name)
            if value is not None:
                check_int(name, value, least)
        if self.max_overhead is not None and not 0 < self.max_overhead < 1:
            raise ValueError(f"`max_overhead` should be in (0, 1), got {self.max_overhead}.")
        object.__setattr__(self, "at_steps", checked_steps("at_steps", self.at_steps))
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
            raise ValueError(f"`{name}` should hold non-negative ints, got {steps}.")
    if len(set(steps)) < len(steps):
        raise ValueError(f"`{name}` should hold each step once, got {steps}.")
    return tuple(sorted(steps))


class ScheduleState:
    """A schedule as it is kept in one run.

    The answers are the same on every rank: where time decides, it is that of the first rank.

    Args:
        schedule: The rules; None never measures.

    """

    def __init__(self, schedule: Schedule | None) -> None:
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
        self._spacing = None if share is None else Spacing(share)

    def advance(self, trainer: Any, batch_idx: int) -> bool:
        """Pass on to the present batch; returns whether to measure before it.

        To be called once before every batch. A step that accumulates gradients is measured before its first batch, and
        no step is measured twice.

        """
        step, passed = trainer.global_step, self._passed
        self._passed = step
        if step == self._measured or (step == passed and batch_idx > 0) or self._schedule is None:
            return False
        earlier = step - 1 if passed is None or passed > step else passed  # in between there was no opportunity
        is_due = self._fits(self._schedule, trainer, batch_idx, earlier)
        if is_due:
            self._measured = step
            if self._spacing is not None:
                self._spacing.begin(step)
        return is_due

    def record(self, seconds: float) -> str | None:
        """Take note of what a measurement took; returns what there is to tell the user of it."""
        if self._spacing is None:
            return None
        self._spacing.record(seconds)
        return self._spacing.take_note()

    def state_dict(self) -> dict[str, Any]:
        """The steps that were passed and measured last; the clock starts anew in a resumed run."""
        return {"passed": self._passed, "measured": self._measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._passed, self._measured = self._restored = (state["passed"], state["measured"])

    def _fits(self, rules: Schedule, trainer: Any, batch_idx: int, earlier: int) -> bool:
        """Whether one of the rules asks for the present step, the step at the last opportunity being `earlier`."""
        step = trainer.global_step
        if any(earlier < fixed <= step for fixed in rules.at_steps):
            return True
        if step < rules.first_n_steps:
            return True
        if rules.every_n_steps is not None and step // rules.every_n_steps != earlier // rules.every_n_steps:
            return True
        if rules.every_n_epochs is not None and batch_idx == 0 and trainer.current_epoch % rules.every_n_epochs == 0:
            return True
        return self._spacing is not None and self._spacing.is_due(trainer, step)
