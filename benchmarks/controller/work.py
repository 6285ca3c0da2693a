"""What the processes of the benchmark do; in a module of its own, since they cannot import the one that is run."""

import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

from benchmarks.controller.training import Run, train

Known = dict[Run, dict[str, Any]]
"""Results by what was trained."""

Work = Callable[[Any, Known], list[dict[str, Any]]]
"""Makes the results of its first argument that are not known yet."""

MIDDLE = {"SGD": -2, "momentum": -3, "AdamW": -4, "RMSprop": -5}
"""Where the grid of an optimizer begins, as a power of √10."""


def searched(cell: tuple[str, str, str, int, int], known: Known) -> list[dict[str, Any]]:
    """The results of a grid that are not known yet: problem, optimizer, schedule, seed and steps of the cell."""
    problem, optimizer, method, seed, steps = cell
    found: list[dict[str, Any]] = []

    def final(power: int) -> float:
        run = Run(problem, optimizer, method, 10 ** (power / 2), seed, steps)
        if run not in known:
            known[run] = train(run)
            found.append(known[run])
        value = known[run]["final"]
        return math.inf if value is None else float(value)

    middle = MIDDLE[optimizer]
    best = final(middle)
    for direction in (1, -1):
        power, worse = middle, 0
        while worse < 2 and abs(power) < 12:
            power += direction
            value = final(power)
            best, worse = min(best, value), 0 if value < best else worse + 1
    return found


def single(run: Run, known: Known) -> list[dict[str, Any]]:
    """The result of one training, if it is not known yet."""
    return [] if run in known else [train(run)]


def quiet() -> None:
    """Say nothing of single trainings."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def done(task: tuple[Work, Any, Known]) -> list[dict[str, Any]]:
    """The results of a task."""
    function, argument, known = task
    return function(argument, known)
