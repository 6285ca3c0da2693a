"""The truth: the largest learning rate that can be used, found by trying rates a factor of 2 apart."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.verdicts.training import Cell, Size, final_loss, untrained_loss

USABLE = 1.25
"""A rate is usable whose final loss is at most that many times the best one."""
LOWEST, HIGHEST = -20, 6
"""The grid reaches from 2 to the power of the one to 2 to the power of the other."""
STARTS = {"SGD": -2, "momentum": -4, "Nesterov": -4, "AdamW": -7, "RMSprop": -8, "Adam": -7, "NAdam": -8, "Adagrad": -5}
"""Where a search begins: about where it ends, as a power of 2."""
PATIENCE = 3
"""A search goes up until so many rates in a row are not usable, and down until so many have not brought the best loss
down. Losses need not have one minimum in the rate."""


@dataclass(frozen=True)
class Sweep:
    """What a search has found.

    Attributes:
        losses: The final losses by the power of 2 that was the rate; infinite for a run that was lost.
        untrained: The loss before the first step; None if it was not looked at.

    """

    losses: dict[int, float]
    untrained: float | None = None

    @property
    def best(self) -> float:
        """The lowest final loss."""
        return min(self.losses.values())

    @property
    def exponent(self) -> int | None:
        """The power of 2 that is the largest usable rate; None if all runs were lost."""
        usable = [exponent for exponent, loss in self.losses.items() if loss <= USABLE * self.best < math.inf]
        return max(usable, default=None)

    @property
    def rate(self) -> float | None:
        """The largest usable rate."""
        return None if self.exponent is None else 2.0**self.exponent

    @property
    def tells_little(self) -> bool:
        """Whether a run that learns nothing is about usable: the best one has hardly learned."""
        return self.untrained is not None and self.untrained <= USABLE * self.best

    @property
    def is_inside(self) -> bool:
        """Whether the grid has a larger rate, which is not usable."""
        return self.exponent is not None and self.exponent < HIGHEST


def search(final: Callable[[float], float], start: int) -> Sweep:
    """Try rates upwards and then downwards, until none that follows is likely to change what is the largest usable one.

    Args:
        final: The final loss at a rate.
        start: The power of 2 of the rate to begin with.

    """
    losses: dict[int, float] = {}

    def seek(exponents: range, is_hit: Callable[[float, float], bool]) -> None:
        missed = 0
        for exponent in exponents:
            losses[exponent] = final(2.0**exponent)
            missed = 0 if is_hit(losses[exponent], min(losses.values())) else missed + 1
            if missed == PATIENCE:
                break

    seek(range(start, HIGHEST + 1), lambda loss, best: loss <= USABLE * best < math.inf)
    # As long as every run was lost, each is as good as the best: the search goes on.
    seek(range(start - 1, LOWEST - 1, -1), lambda loss, best: loss == best)
    return Sweep(dict(sorted(losses.items())))


def sweep(cell: Cell, root: str, size: Size) -> Sweep:
    """The search for the largest usable rate of a cell."""
    found = search(lambda rate: final_loss(cell, rate, root, size), STARTS[cell.optimizer])
    return replace(found, untrained=untrained_loss(cell, root, size))
