"""Is the training going well? Read off its losses alone."""

import math
from collections.abc import Sequence
from enum import Enum
from typing import Any

_START_LOSSES = 5
"""Losses whose mean is where the training began."""

_FEWEST_CALM = 5
"""Losses before which their noise is not known."""

_NOISE_DEVIATIONS = 5.0
"""Standard deviations of a window of losses above their mean from where on a loss stands out; of fewer losses, which
may not have seen the batches that differ most, in proportion more."""

_SHARE_OF_FALL = 0.2
"""Share of what the loss has fallen so far by which it must stand out besides: near zero the noise of small batches has
long tails, and no part of the training is at stake."""

_IN_A_ROW = 3
"""How many losses that stand out make a spike: one may be a batch."""

_RISE_SHARE_OF_FALL = 0.1
"""Share of what the loss has fallen so far by which a window's mean must lie above the best one to count as a rise."""


_NEAR_ERRORS = 2.0
"""Standard errors by which a window's mean may lie above the best one, both with their own, to count as near it. The
best of many windows is low by chance, by about as much."""


class Verdict(Enum):
    """What `LossWatch` says of a loss."""

    WELL = "well"
    """No reason to do anything."""

    SUSPECT = "suspect"
    """It stands out, which may be the batch."""

    RISING = "rising"
    """A window of losses lies above the best one by more than noise: smaller steps."""

    LOST = "lost"
    """NaN or infinite, a spike, or a loss that keeps rising: back to where it was well."""


class _Best:
    """The lowest mean of so many losses in a row.

    Args:
        length: How many.

    Attributes:
        losses: The last of them.

    """

    def __init__(self, length: int) -> None:
        self._length = length
        self.losses: list[float] = []
        self.forget()

    def forget(self) -> None:
        """Begin to look for it anew."""
        self._mean, self._error = math.inf, 0.0

    @property
    def is_full(self) -> bool:
        """Whether there are enough losses for a mean."""
        return len(self.losses) == self._length

    def append(self, loss: float) -> None:
        """Take in the next loss."""
        self.losses = [*self.losses, loss][-self._length :]

    def is_near(self) -> bool:
        """Whether the present mean is as low as the lowest, up to their noise."""
        mean, error = self._present()
        return mean <= self._mean + _NEAR_ERRORS * (error + self._error)

    def rises(self, start: float) -> bool | None:
        """Whether the present mean lies above the lowest one by more than noise; None where it is the lowest itself.

        Args:
            start: The loss at the beginning of the training.

        """
        mean, error = self._present()
        if mean <= self._mean:
            self._mean, self._error = mean, error
            return None
        # With the error of the best window too, which as the least of many is low by chance: without it 15 plateaus of
        # 600 losses had 88 that were taken for lost in place of none. The share of the fall is for long tails, as in
        # `_stands_out`.
        return mean > self._mean + max(3 * (error + self._error), _RISE_SHARE_OF_FALL * (start - self._mean))

    def falls(self) -> bool:
        """Whether the later half of the losses lies below the earlier one by more than their noise."""
        middle = self._length // 2
        before, after = (math.fsum(half) / len(half) for half in (self.losses[:middle], self.losses[middle:]))
        return after < before - self._present()[1]

    def _present(self) -> tuple[float, float]:
        mean, deviation = _moments(self.losses)
        return mean, deviation / math.sqrt(self._length)

    @property
    def lowest(self) -> list[float]:
        """The lowest mean and its error."""
        return [self._mean, self._error]

    @lowest.setter
    def lowest(self, numbers: Sequence[float]) -> None:
        self._mean, self._error = map(float, numbers)


class LossWatch:
    """Judges each loss of a training by those before it.

    How far above the others a loss has to be is measured by the noise of the latest losses and by how far the loss has
    fallen since the beginning, not by a factor: losses may be negative, and may end near zero.

    `diagnosis.loss_spikes` counts spikes by other rules, for a report on a run that is over. Here the controller acts
    on the verdict: it has to come while the parameters can still be saved, if need be at the first loss, and a false
    one costs the steps since the parameters that are restored.

    Args:
        window: How many losses make a mean and its noise, for comparison with other windows.

    Example::

        >>> from lyapunov_lightning.curvature.acting.loss_watch import LossWatch
        >>> watch = LossWatch()
        >>> for step in range(100):
        ...     verdict = watch.see(1 / (1 + step))
        >>> verdict, watch.see(float("nan"))
        (<Verdict.WELL: 'well'>, <Verdict.LOST: 'lost'>)

    """

    def __init__(self, window: int = 20) -> None:
        self._window = window
        self._first: list[float] = []
        self._losses: list[float] = []
        self._lately = _Best(window)
        self._suspects = 0
        self._rises = 0
        self._since_rise = 0

    @property
    def is_falling(self) -> bool:
        """Whether the last window lies below the one before by more than their noise."""
        before, lately = self._losses[: -self._window], self._losses[-self._window :]
        if len(before) < self._window:
            return False
        (mean_before, noise_before), (mean, noise) = _moments(before), _moments(lately)
        return mean < mean_before - math.hypot(noise_before, noise) / math.sqrt(self._window)

    @property
    def is_near_best(self) -> bool:
        """Whether the last window of losses is as low as the best one, up to their noise."""
        return not self._lately.is_full or self._lately.is_near()

    def see(self, loss: float) -> Verdict:
        """Judge the next loss."""
        # Before it is remembered: a single NaN would make the mean of every window that holds it NaN.
        if not math.isfinite(loss):
            self._suspects = 0
            return Verdict.LOST
        self._losses = [*self._losses, loss][-2 * self._window :]
        if len(self._first) < _START_LOSSES:
            self._first.append(loss)
        if len(self._lately.losses) >= _FEWEST_CALM and (verdict := self._stands_out(loss)) is not None:
            return verdict
        self._suspects = 0
        self._lately.append(loss)
        self._since_rise += 1
        return self._rises_again()

    def go_back(self) -> None:
        """Note that the training continues from an earlier place: losses seen since do not count."""
        # The oldest ones, which were seen before the trouble began; enough of them to judge the very next loss.
        self._lately.losses = self._lately.losses[:_FEWEST_CALM]
        self._suspects, self._rises, self._since_rise = 0, 0, 0
        # Nor do the windows that were better than where it is now: to be back there would count as a rise, and full
        # batches, without noise, would be brought back for ever.
        self._lately.forget()

    def state_dict(self) -> dict[str, Any]:
        """What is remembered of the losses."""
        return {
            "first": list(self._first),
            "losses": list(self._losses),
            "calm": list(self._lately.losses),
            "counts": [self._suspects, self._rises, self._since_rise],
            "best": self._lately.lowest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._first, self._losses = ([*map(float, state[name])] for name in ("first", "losses"))
        self._lately.losses, self._lately.lowest = [*map(float, state["calm"])], state["best"]
        self._suspects, self._rises, self._since_rise = map(int, state["counts"])

    def _stands_out(self, loss: float) -> Verdict | None:
        """Whether a loss is far above the latest ones."""
        calm = self._lately.losses
        (mean, noise), (start, _) = _moments(calm), _moments(self._first)
        # Wider for fewer losses: of losses of which every tenth is high, without reason to act, 416 of 12,000 were
        # taken for lost; with one width for any number of losses 1,043. Besides the noise a share of the fall: of 9,000
        # losses near zero with long tails none was taken for lost, without this share 21.
        far, fallen = _NOISE_DEVIATIONS * noise * self._window / len(calm), max(start - mean, 0.0)
        if loss <= max(mean + far, mean + _SHARE_OF_FALL * fallen, max(calm)):
            return None
        # One that stands out does not join the calm ones: it would raise the noise by which the next ones are judged.
        self._suspects += 1
        if self._suspects < _IN_A_ROW and loss <= start + 2 * max(fallen, far):
            return Verdict.SUSPECT
        self._suspects = 0
        return Verdict.LOST

    def _rises_again(self) -> Verdict:
        """Whether the last window lies above the best one."""
        if not self._lately.is_full:
            return Verdict.WELL
        rises = self._lately.rises(_moments(self._first)[0])
        if rises is None:
            self._rises = 0
        # A whole window has to pass before the next one: neighbouring windows share all but one of their losses, and
        # the smaller steps must have had the time to show.
        if not rises or self._since_rise < self._window:
            return Verdict.WELL
        self._since_rise = 0
        if self._rises and self._lately.falls():
            return Verdict.WELL  # it is on its way down again
        self._rises += 1
        return Verdict.RISING if self._rises == 1 else Verdict.LOST


def _moments(losses: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, at every step: those of `statistics` take a hundred times as long."""
    mean = math.fsum(losses) / len(losses)
    return mean, math.sqrt(math.fsum((loss - mean) ** 2 for loss in losses) / len(losses))
