"""A warning during the run: the sharpness stays above the limit, and the loss rises."""

from collections.abc import Sequence
from dataclasses import astuple
from statistics import median
from typing import Any

from lyapunov_lightning.curvature.diagnosis.facts import NEAR, is_sudden, readings_before
from lyapunov_lightning.curvature.diagnosis.losses import excursions, is_higher
from lyapunov_lightning.curvature.diagnosis.readings import FEWEST, Reading
from lyapunov_lightning.curvature.diagnosis.sentences import shown, where_the_limit_is

_RECENT = 200
"""How many of the last losses and measurements are looked at for what made the loss rise: all of a long run, at each
measurement, would take seconds."""


class EdgeWatch:
    """Notices, during a run, that the sharpness stays above the limit and that the loss rises meanwhile.

    Both must hold for three measurements and 20 steps at least: the ratio is above 1 at each measurement, and the
    median loss since then is higher than that of as many losses before, by 30 % and by more than their noise. A loss
    that jumped, further at once than the ratios before it explain, is a matter of its batch.

    """

    def __init__(self) -> None:
        self._above: list[tuple[int, float]] = []
        self._recent: list[Reading] = []

    def see(self, reading: Reading, losses: tuple[Sequence[int], Sequence[float]]) -> str | None:
        """Take a measurement into account.

        Args:
            reading: The measurement.
            losses: Steps and values of the training loss so far.

        Returns:
            The text of a warning, if both hold now.

        """
        step, ratio = reading.step, reading.ratio
        # A ratio that is not known to its tolerance may be above 1 by its error alone, and is no reason to warn.
        is_sure = ratio is not None and reading.converged and reading.judged
        if is_sure:
            self._recent = [*self._recent, reading][-_RECENT:]
        # Forgotten at one ratio below: at the edge of stability the ratio swings about 1, which is no reason either.
        if ratio is None or not (is_sure and ratio > 1):
            self._above = []
            return None
        self._above.append((step, ratio))
        # Three measurements and 20 steps both: measured at every step, three are over before a loss can rise; measured
        # every 100 steps, 20 steps hold one.
        since = next((at for at, _ in self._above[-FEWEST::-1] if at <= step - NEAR), None)
        if since is None:
            return None
        lately = [loss for at, loss in zip(*losses, strict=True) if at >= since]
        # As many losses as lately: a loss that has fallen all the way from the beginning would hide a rise at its end.
        before = [loss for at, loss in zip(*losses, strict=True) if at < since][-len(lately) :]
        if not lately or len(before) < FEWEST or not is_higher(lately, before) or self._is_by_a_batch(losses):
            return None
        return (
            f"the sharpness has been above the stability limit since step {self._above[0][0]}, {shown(ratio)} times"
            f" it at step {step}, and the loss has risen from {median(before):.3g} to {median(lately):.3g} since step"
            f" {since}. The learning rate is too large{where_the_limit_is(reading)}."
        )

    def state_dict(self) -> dict[str, Any]:
        """The measurements in a row that were above the limit, and the last ones."""
        return {"above": list(self._above), "recent": [list(astuple(reading)) for reading in self._recent]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._above = [(int(step), float(ratio)) for step, ratio in state["above"]]
        self._recent = [Reading(*fields) for fields in state.get("recent", ())]  # an earlier version did not keep them

    def _is_by_a_batch(self, losses: tuple[Sequence[int], Sequence[float]]) -> bool:
        """Whether what the loss last did was to jump further than the ratios before explain."""
        steps, values = losses
        last = excursions(steps[-_RECENT:], values[-_RECENT:])[-1:]
        return any(is_sudden(one, readings_before(one.start, self._recent, NEAR, None)) for one in last)
