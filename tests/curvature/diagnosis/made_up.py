"""Runs that are made up: losses that fall, with what can happen to them, and readings at every tenth step."""

import math
import random
from collections.abc import Sequence
from typing import Any

from lyapunov_lightning.curvature.diagnosis import Diagnosis, Reading, diagnose

BUILT_UP = (1.5, 2.2, 3.0, 2.0)
"""A spike as a learning rate makes it, in multiples of the loss without it: it grows from step to step."""


def falling(num_steps: int, noise: float = 0.01, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [math.exp(-step / 200) * (1 + noise * generator.gauss(0, 1)) + 0.1 for step in range(num_steps)]


def with_spikes(losses: list[float], *steps: int, shape: Sequence[float] = BUILT_UP) -> list[float]:
    spiked = list(losses)
    for step in steps:
        for place, height in enumerate(shape):
            spiked[step + place] *= height
    return spiked


def readings_of(ratios: Sequence[float | None], every: int = 10, **options: Any) -> list[Reading]:
    return [Reading(every * place, ratio, **options) for place, ratio in enumerate(ratios)]


def told(
    ratios: Sequence[float | None], losses: list[float] | None = None, every: int = 10, **options: Any
) -> Diagnosis:
    """The diagnosis of ratios at every tenth step of a run of 400 steps."""
    losses = falling(400) if losses is None else losses
    return diagnose(readings_of(ratios, every, **options), (range(len(losses)), losses))


def ramp(to: float, meets_at: int = 160) -> list[float]:
    """Ratios that rise to a level, where they stay."""
    return [min(to, to * (0.1 + 0.9 * step / meets_at)) for step in range(0, 400, 10)]
