"""Is the training going well? Read off its losses alone."""

import math
from enum import Enum
from statistics import fmean, pstdev
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
        self._calm: list[float] = []
        self._suspects = 0
        self._best = math.inf
        self._best_error = 0.0
        self._rises = 0
        self._since_rise = 0

    @property
    def is_falling(self) -> bool:
        """Whether the last window lies below the one before by more than their noise."""
        before, lately = self._losses[: -self._window], self._losses[-self._window :]
        if len(before) < self._window:
            return False
        error = math.hypot(pstdev(before), pstdev(lately)) / math.sqrt(self._window)
        return fmean(lately) < fmean(before) - error

    def see(self, loss: float) -> Verdict:
        """Judge the next loss."""
        # Before it is remembered: a single NaN would make the mean of every window that holds it NaN.
        if not math.isfinite(loss):
            self._suspects = 0
            return Verdict.LOST
        self._losses = [*self._losses, loss][-2 * self._window :]
        if len(self._first) < _START_LOSSES:
            self._first.append(loss)
        if len(self._calm) >= _FEWEST_CALM and (verdict := self._stands_out(loss)) is not None:
            return verdict
        self._suspects = 0
        self._calm = [*self._calm, loss][-self._window :]
        self._since_rise += 1
        return self._rises_again() if len(self._calm) == self._window else Verdict.WELL

    def go_back(self) -> None:
        """Note that the training continues from an earlier place: losses seen since do not count."""
        # The oldest ones, which were seen before the trouble began; enough of them to judge the very next loss.
        self._calm = self._calm[:_FEWEST_CALM]
        self._suspects, self._rises, self._since_rise = 0, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """What is remembered of the losses."""
        return {
            "first": list(self._first),
            "losses": list(self._losses),
            "calm": list(self._calm),
            "counts": [self._suspects, self._rises, self._since_rise],
            "best": [self._best, self._best_error],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._first, self._losses, self._calm = ([*map(float, state[name])] for name in ("first", "losses", "calm"))
        self._suspects, self._rises, self._since_rise = map(int, state["counts"])
        self._best, self._best_error = map(float, state["best"])

    def _stands_out(self, loss: float) -> Verdict | None:
        """Whether a loss is far above the latest ones."""
        mean, start = fmean(self._calm), fmean(self._first)
        # Wider for fewer losses: of losses of which every tenth is high, without reason to act, 416 of 12,000 were
        # taken for lost; with one width for any number of losses 1,043. Besides the noise a share of the fall: of 9,000
        # losses near zero with long tails none was taken for lost, without this share 21.
        far, fallen = _NOISE_DEVIATIONS * pstdev(self._calm) * self._window / len(self._calm), max(start - mean, 0.0)
        if loss <= max(mean + far, mean + _SHARE_OF_FALL * fallen, max(self._calm)):
            return None
        # One that stands out does not join `_calm`: it would raise the noise by which the next ones are judged.
        self._suspects += 1
        if self._suspects < _IN_A_ROW and loss <= start + 2 * max(fallen, far):
            return Verdict.SUSPECT
        self._suspects = 0
        return Verdict.LOST

    def _rises_again(self) -> Verdict:
        """Whether the last window lies above the best one."""
        mean, error = fmean(self._calm), pstdev(self._calm) / math.sqrt(self._window)
        if mean <= self._best:
            self._best, self._best_error, self._rises = mean, error, 0
            return Verdict.WELL
        # With the error of the best window too, which as the least of many is low by chance: without it 15 plateaus of
        # 600 losses had 88 that were taken for lost in place of none. The share of the fall is for long tails, as in
        # `_stands_out`.
        far = max(3 * (error + self._best_error), _RISE_SHARE_OF_FALL * (fmean(self._first) - self._best))
        if mean <= self._best + far or self._since_rise < self._window:
            return Verdict.WELL
        # A whole window has to pass before the next one: neighbouring windows share all but one of their losses, and
        # the smaller steps must have had the time to show.
        self._since_rise = 0
        self._rises += 1
        return Verdict.RISING if self._rises == 1 else Verdict.LOST
