"""How right the readings are: their limits over the largest usable rates, in tables."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report import Figure, Table
from benchmarks.timing import Sample
from benchmarks.verdicts.training import Cell

HEADER = ["readings", "median", "within × 2", "within × 3", "> 3 times too high", "> 3 times too low", "none"]


@dataclass(frozen=True)
class Reading:
    """What a run at a part of the largest usable rate says of it.

    Attributes:
        cell: What was trained.
        usable: The largest usable rate.
        fraction: That rate over the one that was read.
        limit: The rate that was called the limit; None if none was.
        range: The rates between which it was said to lie.
        error: Why the run failed.

    """

    cell: Cell
    usable: float
    fraction: int
    limit: float | None = None
    range: tuple[float, float] | None = None
    error: str = ""

    @property
    def ratio(self) -> float | None:
        """The limit over the largest usable rate: above 1 it is too high."""
        return None if self.limit is None else self.limit / self.usable

    def is_within(self, times: float) -> bool:
        """Whether the limit is right to a factor; one that was not given is not."""
        return self.ratio is not None and 1 / times <= self.ratio <= times


@dataclass(frozen=True)
class Score:
    """How right some readings are: shares of all of them, and the median of those that name a limit."""

    readings: Sequence[Reading]

    @property
    def ratios(self) -> list[float]:
        """Those that are known."""
        return [reading.ratio for reading in self.readings if reading.ratio is not None]

    @property
    def median(self) -> float | None:
        """Of the ratios; None without any."""
        return statistics.median(self.ratios) if self.ratios else None

    def within(self, times: float) -> float:
        """The share that is right to a factor."""
        return self._share(reading.is_within(times) for reading in self.readings)

    @property
    def too_high(self) -> float:
        """The share that is more than 3 times too high, which is the dangerous side."""
        return self._share(ratio > 3 for ratio in self.ratios)

    @property
    def too_low(self) -> float:
        """The share that is more than 3 times too low."""
        return self._share(ratio < 1 / 3 for ratio in self.ratios)

    @property
    def covered(self) -> float | None:
        """How often the largest usable rate lies in the range that was named; None if none was."""
        ranges = [(reading.usable, reading.range) for reading in self.readings if reading.range is not None]
        return sum(low <= usable <= high for usable, (low, high) in ranges) / len(ranges) if ranges else None

    def row(self) -> list[str]:
        """Its cells under `HEADER`."""
        shares = [self.within(2), self.within(3), self.too_high, self.too_low]
        median = "" if self.median is None else f"{self.median:.2f}"
        missing = len(self.readings) - len(self.ratios)
        return [str(len(self.readings)), median, *(f"{share:.0%}" for share in shares), str(missing or "")]

    def _share(self, facts: Iterable[bool]) -> float:
        return sum(facts) / len(self.readings)


def batch_name(batch: int | None) -> str:
    """As the tables call a batch size."""
    return "full" if batch is None else str(batch)


def pair(reading: Reading) -> tuple[str, str]:
    """Optimizer and batch size."""
    return reading.cell.optimizer, batch_name(reading.cell.batch)


BREAKDOWNS: dict[str, tuple[list[str], Callable[[Reading], tuple[str, ...]]]] = {
    "Every pair of optimizer and batch size": (["optimizer", "batch"], pair),
    "By problem": (["problem"], lambda reading: (reading.cell.problem,)),
    "By the rate of the run, as a part of the largest usable one": (
        ["rate"],
        lambda reading: ("1" if reading.fraction == 1 else f"1/{reading.fraction}",),
    ),
    "By schedule": (["schedule"], lambda reading: (reading.cell.schedule,)),
    "By seed": (["seed"], lambda reading: (str(reading.cell.seed),)),
}


def scores(readings: Sequence[Reading], key: Callable[[Reading], tuple[str, ...]]) -> dict[tuple[str, ...], Score]:
    """The readings by what they have in common, in the order in which that comes."""
    groups: dict[tuple[str, ...], list[Reading]] = {}
    for reading in readings:
        groups.setdefault(key(reading), []).append(reading)
    return {name: Score(group) for name, group in groups.items()}


def targets(readings: Sequence[Reading]) -> list[Figure]:
    """What is to be reached."""
    whole = Score(readings)
    worst, low = min(((" at batch ".join(name), found.within(3)) for name, found in scores(readings, pair).items()),
                     key=lambda item: item[1])  # fmt: skip
    median = Sample(() if whole.median is None else (whole.median,))
    return [
        Figure("within a factor of 3", Sample((whole.within(3),)), 0.85, at_least=True),
        Figure(f"within a factor of 3, the worst pair ({worst})", Sample((low,)), 0.7, at_least=True),
        Figure("median of limit over largest usable rate, from below", median, 0.6, at_least=True),
        Figure("median of limit over largest usable rate, from above", median, 1.6),
        Figure("more than 3 times too high", Sample((whole.too_high,)), 0.05),
    ]


def markdown(about: str, readings: Sequence[Reading], notes: Sequence[str]) -> str:
    """The targets first, then everything in detail."""
    parts = [about]
    if readings:
        rows = [[row[0], row[1], *row[3:]] for row in (figure.row for figure in targets(readings))]
        whole = Score(readings)
        parts += [
            Table("", ["figure", "found", "target", ""], rows).markdown(),
            Table("All readings", HEADER, [whole.row()]).markdown(),
        ]
        if whole.covered is not None:
            parts.append(f"The largest usable rate lies within the range that is named in {whole.covered:.0%}.")
        for title, (names, key) in BREAKDOWNS.items():
            found = [[*name, *score.row()] for name, score in scores(readings, key).items()]
            parts.append(Table(title, names + HEADER, found).markdown())
    return "\n\n".join([*parts, *notes]) + "\n"


def notes(
    missing: Sequence[str],
    outside: Sequence[Cell],
    vague: Sequence[Cell],
    readings: Sequence[Reading],
    unfinished: int,
) -> list[str]:
    """What a reader has to know beside the tables.

    Args:
        missing: Problems whose data are not there.
        outside: Cells whose largest usable rate is not inside the grid, and has no readings.
        vague: Cells whose best run has hardly learned.
        readings: All readings.
        unfinished: How many cells were not run.

    """
    found: list[str] = []
    if missing:
        found.append(f"Left out, as their data are not there: {'; '.join(missing)}.")
    if outside:
        found.append("No largest usable rate inside the grid: " + "; ".join(map(describe, outside)) + ".")
    if vague:
        said = (
            "In these cells the best run has hardly learned, and a rate at which nothing is learned counts as usable: "
        )
        found.append(said + "; ".join(map(describe, vague)) + ".")
    failed = [reading for reading in readings if reading.error]
    if failed:
        lines = [f"{describe(reading.cell)} at 1/{reading.fraction}: {reading.error}" for reading in failed]
        found.append("Runs that failed:\n\n" + "\n".join(f"- {line}" for line in lines))
    if unfinished:
        found.append(f"{unfinished} cells are still to be run.")
    return found


def describe(cell: Cell) -> str:
    """A cell in words."""
    return f"{cell.problem}, {cell.optimizer}, batch {batch_name(cell.batch)}, {cell.schedule}, seed {cell.seed}"


def readings_of(cell: Cell, usable: float, lines: Sequence[dict[str, Any]]) -> list[Reading]:
    """What was kept of a cell, as readings."""
    fields = ("fraction", "limit", "range", "error")
    return [Reading(cell, usable, **{name: line[name] for name in fields if name in line}) for line in lines]
