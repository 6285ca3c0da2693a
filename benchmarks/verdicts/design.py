"""Which of all cells are run: every problem with every pair of optimizer and batch size, in one of four ways."""

from collections.abc import Sequence
from itertools import product

from benchmarks.verdicts.training import SCHEDULES, Cell

BATCHES = (4, 32, 256, None)


def every_pair(problems: Sequence[str], optimizers: Sequence[str], batches: Sequence[int | None]) -> list[Cell]:
    """Each problem with each pair, schedules and seeds taking turns along problems, optimizers and batches.

    Args:
        problems: Their names.
        optimizers: Their names.
        batches: Sizes of batches, None for all data.

    """
    return [
        _cell(problems[p], optimizers[o], batches[b], p + o + b, p // 2 + o // 2 + b // 2)
        for p, o, b in product(range(len(problems)), range(len(optimizers)), range(len(batches)))
    ]


def half_of_the_pairs(problems: Sequence[str], optimizers: Sequence[str], batches: Sequence[int | None]) -> list[Cell]:
    """Each problem with each optimizer at every other batch size, so that every pair has half of the problems."""
    return [
        _cell(problems[p], optimizers[o], batches[b], p // 2 + o + b // 2, p // 4 + o // 2)
        for p, o, b in product(range(len(problems)), range(len(optimizers)), range(len(batches)))
        if (p + o + b) % 2 == 0
    ]


def _cell(problem: str, optimizer: str, batch: int | None, schedule: int, seed: int) -> Cell:
    return Cell(problem, optimizer, batch, SCHEDULES[schedule % 2], seed % 2)
