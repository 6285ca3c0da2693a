"""A warning during the run: the sharpness stays above the limit, and the loss rises."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from lyapunov_lightning.curvature.diagnosis.facts import NEAR
from lyapunov_lightning.curvature.diagnosis.losses import is_higher
from lyapunov_lightning.curvature.diagnosis.readings import FEWEST, Reading
from lyapunov_lightning.curvature.diagnosis.sentences import shown, where_the_limit_is


class EdgeWatch:
    """Notices, during a run, that the sharpness stays above the limit and that the loss rises meanwhile.

    Both must hold for three measurements and 20 steps at least: the ratio is above 1 at each measurement, and the
    median loss since then is higher than that of as many losses before, by 30 % and by more than their noise.

    """

    def __init__(self) -> None:
        self._above: list[tuple[int, float]] = []

    def see(self, reading: Reading, losses: tuple[Sequence[int], Sequence[float]]) -> str | None:
        """Take a measurement into account.

        Args:
            reading: The measurement.
            losses: Steps and values of the training loss so far.

        Returns:
            The text of a warning, if both hold now.

        """
        # Forgotten at one ratio below: at the edge of stability the ratio swings about 1, which is no reason to warn.
        # A ratio that is not known to its tolerance may be above 1 by its error alone, and is no reason either.
        step, ratio = reading.step, reading.ratio
        if ratio is None or not (ratio > 1 and reading.converged and reading.judged):
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
        if not lately or len(before) < FEWEST or not is_higher(lately, before):
            return None
        return (
            f"the sharpness has been above the stability limit since step {self._above[0][0]}, {shown(ratio)} times"
            f" it at step {step}, and the loss has risen from {median(before):.3g} to {median(lately):.3g} since step"
            f" {since}. The learning rate is too large{where_the_limit_is(reading)}."
        )

    def state_dict(self) -> dict[str, Any]:
        """The measurements in a row that were above the limit."""
        return {"above": list(self._above)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._above = [(int(step), float(ratio)) for step, ratio in state["above"]]
