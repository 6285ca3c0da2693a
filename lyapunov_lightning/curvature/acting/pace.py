"""What an estimate may do to a learning rate: slowly, within bounds, and less after it went wrong.

`Pace` stands between an estimate and the optimizer. Two kinds of estimates come to it: how long the steps are as
against the best ones (`Pace.follow`), and what the learning rate should be (`Pace.approach`).
"""

import math
from dataclasses import dataclass
from typing import Any

from lyapunov_lightning.curvature.arguments import check_int

_SHORT, _SHORT_WHILE_FALLING = 1.4, 1.8
"""Lengths below which steps become longer, always or while the loss falls."""

_LONG, _LONG_WHILE_FALLING = 2.0, 4.0
"""Lengths beyond which they become shorter. At 2 the loss along the step is as high at its end as at its beginning."""

_GAIN, _GAIN_OF_MEMORY = 0.15, 5.0
"""Share of the way, in the logarithm, that is made up at every step, and the most of it over a memory."""

_INERTIA = 10.0
"""Steps until a learning rate has shown what it does, up to which it grows as fast as it may."""

_FASTEST_FALL = 1.25
"""The most by which a learning rate falls in a step because of the lengths of the steps."""

_STOPPED = 0.01
"""Share of its learning rate at which a controller stops that has found no way."""

_FLOOR = 0.5
"""Share of the highest learning rate so far below which lengths do not bring it. Seen from one step, what noise there
is asks for ever shorter steps, down to none: the short-horizon bias."""


@dataclass(frozen=True)
class LRBounds:
    """What a learning rate may do, whatever the curvature says.

    Attributes:
        min_lr: The floor.
        max_lr: The ceiling.
        max_growth: The most by which it grows from one step to the next.
        window: Steps over which it may double again after it was halved.

    Raises:
        ValueError: If one of them is out of its range.

    Example::

        >>> from lyapunov_lightning.curvature.acting.pace import LRBounds
        >>> LRBounds(max_lr=0.5)
        LRBounds(min_lr=0.0, max_lr=0.5, max_growth=1.07, window=50)

    """

    min_lr: float = 0.0
    max_lr: float = math.inf
    max_growth: float = 1.07
    window: int = 50

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr < math.inf:
            raise ValueError(f"`min_lr` should be a finite non-negative float, got {self.min_lr}.")
        if not self.min_lr < self.max_lr:
            raise ValueError(f"`min_lr` should be below `max_lr`, got {self.min_lr} and {self.max_lr}.")
        if not self.max_growth > 1:
            raise ValueError(f"`max_growth` should be above 1, got {self.max_growth}.")
        check_int("window", self.window, least=1)


class Pace:
    """A learning rate that follows estimates.

    Args:
        bounds: What it may do.

    Attributes:
        lr: The learning rate; None before the first estimate.
        ceiling: What it does not exceed for now, below infinity after it was too high.
        is_stopped: Whether it stays where it is from now on.

    """

    def __init__(self, bounds: LRBounds = LRBounds()) -> None:
        self.bounds = bounds
        self.lr: float | None = None
        self.ceiling = math.inf
        self.is_stopped = False
        self._highest = 0.0

    def begin(self, lr: float) -> None:
        """The first learning rate."""
        self._set(lr)

    def follow(
        self,
        length: float,
        at_least: float,
        *,
        is_falling: bool,
        may_grow: bool,
        memory: float = 1.0,
        inertia: float = 1.0,
    ) -> None:
        """Make the steps longer or shorter, once a step.

        Where lengths are in between it is the loss that decides: while it falls, steps become longer up to 1.8 times
        the way to the bottom of the parabola, and shorter beyond 4 times only.

        Args:
            length: How long the steps are, with the way to the bottom of the parabola as unit.
            at_least: The least that they may be, in view of what noise there is.
            is_falling: Whether the loss falls, by more than its noise.
            may_grow: Whether nothing speaks against longer steps.
            memory: Steps over which the length was averaged; it is followed no faster than it can change.
            inertia: Steps until a learning rate has shown what it does, such as ``1 / (1 - m)`` with momentum ``m``.

        """
        if self.lr is None or self.is_stopped:
            return
        move, target = 0.0, _SHORT_WHILE_FALLING if is_falling else _SHORT
        gain = min(_GAIN, _GAIN_OF_MEMORY / memory)
        if length < target and may_grow:
            fastest = math.log(self.bounds.max_growth) * min(1.0, _INERTIA / inertia)
            move = min(gain * math.log(target / length), fastest)
        elif at_least > (_LONG_WHILE_FALLING if is_falling else _LONG):
            move = -min(gain * math.log(at_least / _LONG), math.log(_FASTEST_FALL))
        lr = self.lr * math.exp(move)
        if move < 0:
            lr = min(max(lr, _FLOOR * self._highest), self.lr)
        self._set(lr)

    def approach(self, proposal: float) -> None:
        """Fall to what is proposed at once, or rise to it by a bounded factor."""
        if self.is_stopped or not (math.isfinite(proposal) and proposal > 0):
            return
        self._set(proposal if self.lr is None else min(proposal, self.lr * self.bounds.max_growth))

    def pass_step(self) -> None:
        """A step went well: the ceiling rises."""
        self.ceiling *= 2 ** (1 / self.bounds.window)

    def halve(self) -> None:
        """It was too high."""
        if self.lr is not None:
            self.ceiling = self._highest = self.lr / 2
            self._set(self.lr / 2)

    def stop(self) -> None:
        """Go on at a learning rate that is small, and do nothing more."""
        if self.lr is not None:
            self.is_stopped = True
            self.lr = max(_STOPPED * self.lr, self.bounds.min_lr)

    def state_dict(self) -> dict[str, Any]:
        """The learning rate and what bounds it."""
        return {
            "lr": self.lr,
            "ceiling": self.ceiling,
            "is_stopped": self.is_stopped,
            "highest": self._highest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.lr, self.ceiling, self.is_stopped = state["lr"], state["ceiling"], state["is_stopped"]
        self._highest = state["highest"]

    def _set(self, lr: float) -> None:
        self.lr = min(max(min(lr, self.ceiling), self.bounds.min_lr), self.bounds.max_lr)
        self._highest = max(self._highest, self.lr)


def annealing(share: float, step: int, num_steps: float) -> float:
    """The factor by which a learning rate falls linearly over the last part of a training, to zero at its end.

    Args:
        share: How large that part is, in [0, 1].
        step: The step, from 0.
        num_steps: How many there will be; infinite where nobody knows.

    Example::

        >>> from lyapunov_lightning.curvature.acting.pace import annealing
        >>> [annealing(0.4, step, 100) for step in (0, 60, 80)]
        [1.0, 1.0, 0.5]

    """
    if share == 0 or not math.isfinite(num_steps):
        return 1.0
    return min(1.0, max(num_steps - step, 1) / (share * num_steps))
