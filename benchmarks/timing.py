"""Repeats that are interleaved, and what to say of them: medians and quartiles."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Sample:
    """Repeats of one number: seconds, bytes, or ratios of these.

    Attributes:
        values: One number for each repeat, in the order of the repeats.

    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper one, between the values next to them where there are few."""
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    def over(self, other: "Sample") -> "Sample":
        """The ratios, repeat by repeat: what slows the machine down for a while slows down both."""
        return Sample(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def times(self, factor: float) -> "Sample":
        """All of them in another unit."""
        return Sample(tuple(factor * value for value in self.values))


def timed(task: Callable[[], Result]) -> tuple[float, Result]:
    """Wall-clock seconds of one call, with what it returned."""
    gc.collect()
    started = time.perf_counter()
    result = task()
    return time.perf_counter() - started, result


def cpu_seconds(task: Callable[[], object]) -> float:
    """CPU time of one call in this process."""
    gc.collect()
    started = time.process_time()
    task()
    return time.process_time() - started


def interleaved(tasks: Mapping[str, Callable[[], object]], repeats: int, calls: int = 1) -> dict[str, Sample]:
    """Seconds of each task, all of them once in each of the repeats, after one call of each that is not counted.

    Args:
        tasks: What to time, by name.
        repeats: How many times to time each.
        calls: How many calls to time as one, for tasks that are too short for the clock.

    """
    for task in tasks.values():
        task()

    def several(task: Callable[[], object]) -> None:
        for _ in range(calls):
            task()

    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            seconds[name].append(timed(lambda task=task: several(task))[0] / calls)
    return {name: Sample(tuple(values)) for name, values in seconds.items()}


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of a straight line through the logarithms: ``cost ∝ size**exponent``."""
    slope, _ = statistics.linear_regression([math.log(size) for size in sizes], [math.log(cost) for cost in costs])
    return slope
