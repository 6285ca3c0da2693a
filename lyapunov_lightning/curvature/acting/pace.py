"""How a learning rate follows estimates: slowly, within bounds, and below a ceiling after it was too high.

There are two kinds of estimates: how long the steps are compared with the best ones (`Pace.follow`), and what the
learning rate should be (`Pace.approach`).
"""

import math
from dataclasses import dataclass
from typing import Any

from lyapunov_lightning.curvature.arguments import check_int

_GROW_BELOW_LENGTH, _GROW_BELOW_LENGTH_WHILE_FALLING = 1.4, 1.8
"""Lengths below which steps become longer, in general and while the loss falls."""

_SHRINK_BEYOND_LENGTH, _SHRINK_BEYOND_LENGTH_WHILE_FALLING = 2.0, 4.0
"""Lengths beyond which steps become shorter. At 2 the loss at the end of a step is as high as at its beginning."""

_NOISY_BAND, _NOISY_BAND_WHILE_FALLING = (0.5, 0.8), (1.0, 2.0)
"""Ratios to the edge of stability below which steps become longer, and beyond which shorter, where batches differ: in
general, and while the loss falls. In the midst of 24 small trainings in batches of 8 to 64, at their best constant
rates, the ratio was 0.04 to 4, in the median 0.4 (`benchmarks/controller`)."""

_EXACT_BAND = (0.8, 0.95)
"""The same where they do not differ, so that the edge is known, and is gone back behind at once: full batches with
momentum are lost within 20 steps at 1.05 times the edge."""

_GROWTH_EXPONENT, _GROWTH_START = 2.0, 10
"""A learning rate grows at most like the number of steps, counted from -10, to this power: to make it twice as large
takes longer the later it is. On a plateau, where nothing is curved, it would else grow without end."""

_WAY_PER_STEP, _WAY_PER_MEMORY = 0.15, 5.0
"""The share of the way to the wanted length, in the logarithm, that the learning rate makes in one step; and how many
times the way it makes at most in as many steps as the length was averaged over: faster, it would run ahead of the
average that it follows."""

_INERTIA_OF_FULL_GROWTH = 10.0
"""Steps until a learning rate shows its effect, up to which it may grow at the full rate; slower beyond."""

_MAX_SHRINKING = 1.25
"""The largest factor by which the learning rate falls in one step because steps are too long."""

_MOST_RISE_OF_ANNEALING = 1.1
"""The largest factor by which annealing is taken back in one step, where a resumed run is to be longer than it was."""

_SHARE_WHEN_STOPPED = 0.01
"""What share of its learning rate is kept for the rest of a training in which every learning rate has failed."""

_LEAST_SHARE_OF_HIGHEST = 0.5
"""Share of the highest learning rate so far below which it does not fall because steps are too long. Judged by single
steps, noise makes ever shorter steps look better, down to none: the short-horizon bias."""


@dataclass(frozen=True)
class LRBounds:
    """The bounds of a learning rate and of its growth, whatever the curvature says.

    Attributes:
        min_lr: The lowest learning rate.
        max_lr: The highest learning rate.
        max_growth: The largest factor by which it grows from one step to the next.
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
            raise ValueError(f"`min_lr` should be a finite non-negative float, got {self.min_lr!r}.")
        if not self.min_lr < self.max_lr:
            raise ValueError(f"`min_lr` should be below `max_lr`, got {self.min_lr!r} and {self.max_lr}.")
        if not self.max_growth > 1:
            raise ValueError(f"`max_growth` should be above 1, got {self.max_growth!r}.")
        check_int("window", self.window, least=1)


class Pace:
    """A learning rate that follows estimates.

    Args:
        bounds: Its bounds.

    Attributes:
        lr: The learning rate; None before the first estimate.
        ceiling: The learning rate does not exceed it. It is infinite until the learning rate was too high, and then
            rises slowly from half of that learning rate.
        is_stopped: Whether the learning rate stays as it is from now on.

    """

    def __init__(self, bounds: LRBounds = LRBounds()) -> None:
        self.bounds = bounds
        self.lr: float | None = None
        self.ceiling = math.inf
        self.is_stopped = False
        self._highest = 0.0

    def begin(self, lr: float) -> None:
        """Start at a learning rate."""
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
        """Make the steps longer or shorter; to be called once for each step.

        Steps shorter than 1.4 times the way to the bottom of the parabola become longer, and those beyond 2 times
        shorter. In between the learning rate stays. While the loss falls the limits are 1.8 and 4.

        Args:
            length: How long the steps are, with the way to the bottom of the parabola as unit.
            at_least: The least that the length may be, in view of the noise.
            is_falling: Whether the loss falls by more than its noise.
            may_grow: Whether longer steps are safe.
            memory: Steps over which the length was averaged.
            inertia: Steps until a learning rate shows its effect, such as ``1 / (1 - m)`` with momentum ``m``.

        """
        if self.lr is None or self.is_stopped:
            return
        move, target = 0.0, _GROW_BELOW_LENGTH_WHILE_FALLING if is_falling else _GROW_BELOW_LENGTH
        gain = min(_WAY_PER_STEP, _WAY_PER_MEMORY / memory)
        if length < target and may_grow:
            fastest = math.log(self.bounds.max_growth) * min(1.0, _INERTIA_OF_FULL_GROWTH / inertia)
            move = min(gain * math.log(target / length), fastest)
        # Shrinking goes by the least that the length may be: a slope that is lost in its noise makes the length itself
        # as large as it gets, and is no evidence against the steps.
        elif at_least > (_SHRINK_BEYOND_LENGTH_WHILE_FALLING if is_falling else _SHRINK_BEYOND_LENGTH):
            move = -min(gain * math.log(at_least / _SHRINK_BEYOND_LENGTH), math.log(_MAX_SHRINKING))
        lr = self.lr * math.exp(move)
        if move < 0:
            # Not above the present learning rate, whatever the highest one was: steps that are too long must not become
            # longer.
            lr = min(max(lr, _LEAST_SHARE_OF_HIGHEST * self._highest), self.lr)
        self._set(lr)

    def keep_off_the_edge(
        self, ratio: float, at_least: float, *, step: int, is_exact: bool, is_falling: bool, may_grow: bool
    ) -> None:
        """Make the steps longer or shorter, by how near they are to the edge of stability; once for each step.

        Args:
            ratio: The curvature that decides on stability, over the limit of the optimizer at this learning rate.
            at_least: The least that the ratio may be, in view of the noise.
            step: The optimizer step.
            is_exact: Whether the ratio has no noise, as with full batches.
            is_falling: Whether the loss falls by more than its noise.
            may_grow: Whether longer steps are wanted.

        """
        if self.lr is None or self.is_stopped or not (math.isfinite(ratio) and math.isfinite(at_least)):
            return
        if is_exact:
            longer, shorter = _EXACT_BAND
        else:
            longer, shorter = _NOISY_BAND_WHILE_FALLING if is_falling else _NOISY_BAND
        if ratio < longer and may_grow:
            fastest = min(math.log(self.bounds.max_growth), _GROWTH_EXPONENT / (step + _GROWTH_START))
            move = fastest if ratio <= 0 else min(_WAY_PER_STEP * math.log(longer / ratio), fastest)
            self._set(self.lr * math.exp(move))
        elif at_least > shorter:
            way, most = (1.0, math.inf) if is_exact else (_WAY_PER_STEP, math.log(_MAX_SHRINKING))
            lr = self.lr * math.exp(-min(way * math.log(at_least / shorter), most))
            self._set(min(max(lr, _LEAST_SHARE_OF_HIGHEST * self._highest), self.lr))

    def approach(self, proposal: float) -> None:
        """Fall to a proposed learning rate at once, or rise towards it by a bounded factor."""
        if self.is_stopped or not (math.isfinite(proposal) and proposal > 0):
            return
        # Down at once, since too high a rate throws the parameters out within a few steps; too low a one costs time
        # only.
        self._set(proposal if self.lr is None else min(proposal, self.lr * self.bounds.max_growth))

    def pass_step(self) -> None:
        """Raise the ceiling after a step whose loss was good."""
        self.ceiling *= 2 ** (1 / self.bounds.window)

    def halve(self) -> None:
        """Halve the learning rate, which was too high, and keep it there for a while."""
        if self.lr is not None:
            # The highest learning rate so far as well: `follow` would otherwise not go below half of one that failed.
            self.ceiling = self._highest = self.lr / 2
            self._set(self.lr / 2)

    def stop(self) -> None:
        """Stay at a hundredth of the learning rate for the rest of the training."""
        if self.lr is not None:
            self.is_stopped = True
            self.lr = max(_SHARE_WHEN_STOPPED * self.lr, self.bounds.min_lr)

    def state_dict(self) -> dict[str, Any]:
        """The learning rate, and what it depends on."""
        return {
            "lr": self.lr,
            "ceiling": self.ceiling,
            "is_stopped": self.is_stopped,
            "highest": self._highest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        # As numbers, or an error: a broken checkpoint is to be noticed here, and not in the midst of a step.
        self.lr = None if state["lr"] is None else float(state["lr"])
        self.ceiling, self._highest = float(state["ceiling"]), float(state["highest"])
        self.is_stopped = bool(state["is_stopped"])

    def _set(self, lr: float) -> None:
        self.lr = min(max(min(lr, self.ceiling), self.bounds.min_lr), self.bounds.max_lr)
        self._highest = max(self._highest, self.lr)


class Annealing:
    """The factor of `annealing` through a training whose length may change where it is resumed.

    Args:
        share: How large the part over which the learning rate falls is, in [0, 1].

    Example::

        >>> from lyapunov_lightning.curvature.acting.pace import Annealing
        >>> falling = Annealing(0.5)
        >>> falling.start(100)
        >>> falling.at(99)
        0.02
        >>> falling.start(1000)  # ten times as long as it was to be
        >>> round(falling.at(100), 6)
        0.022

    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._num_steps = math.inf
        self._factor, self._step = 1.0, -1

    def start(self, num_steps: float) -> None:
        """Begin a run, or go on with one, of so many steps; infinite if that is not known."""
        self._num_steps = num_steps

    @property
    def has_no_end(self) -> bool:
        """Whether the learning rate was to fall at the end, and nobody knows when that is."""
        return self._share > 0 and not math.isfinite(self._num_steps)

    def at(self, step: int) -> float:
        """The factor at a step; to be asked for at every step, as often as one likes."""
        if step != self._step:
            most = _MOST_RISE_OF_ANNEALING * self._factor
            self._factor, self._step = min(annealing(self._share, step, self._num_steps), most), step
        return self._factor

    def state_dict(self) -> dict[str, Any]:
        """The last factor."""
        return {"factor": self._factor, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._factor, self._step = float(state["factor"]), int(state["step"])


def annealing(share: float, step: int, num_steps: float) -> float:
    """The factor by which a learning rate falls linearly over the last part of a training, to zero at its end.

    Args:
        share: How large that part is, in [0, 1].
        step: The step, from 0.
        num_steps: How many steps there will be; infinite if that is not known.

    Example::

        >>> from lyapunov_lightning.curvature.acting.pace import annealing
        >>> [annealing(0.4, step, 100) for step in (0, 60, 80)]
        [1.0, 1.0, 0.5]

    """
    if share == 0 or not math.isfinite(num_steps):
        return 1.0
    # At least one step is left, also where a resumed run or another loop goes beyond the number: never zero or below.
    return min(1.0, max(num_steps - step, 1) / (share * num_steps))
