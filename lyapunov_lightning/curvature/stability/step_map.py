"""What an optimizer's step does along one direction, and up to which curvature that is stable."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.polynomial import Polynomial


@dataclass(frozen=True)
class StepMap:
    """What a step does along one direction, see `lyapunov_lightning.curvature.stability`.

    Attributes:
        now: By how much a gradient of 1 moves the parameter in its own step, the learning rate included.
        later: By how much it moves it in the next step; at most ``memory·now``, as with all of these optimizers: beyond
            that a step may spiral away before it swings from side to side.
        memory: What is left of a momentum after a step.
        kept: What decoupled weight decay leaves of the parameter.

    """

    now: float
    later: float = 0.0
    memory: float = 0.0
    kept: float = 1.0

    @property
    def pace(self) -> float:
        """One over the largest stable curvature where it is the same at every step; negative if it goes uphill."""
        return (self.now - self.later / (1 + self.memory)) / (1 + self.kept)

    @property
    def lasting_pace(self) -> float:
        """How far a gradient of 1 that lasts moves the parameter in each step, once the momentum has built up."""
        return self.now + self.later / (1 - self.memory) if self.memory < 1 else math.inf

    def step(self, x: Any, v: Any, curvature: Any) -> tuple[Any, Any]:
        """Parameter and momentum after a step on a batch of this curvature; each may be a number or an array."""
        gradient = curvature * x
        return self.kept * x - self.now * gradient - v, self.memory * v + self.later * gradient

    def limit(self, agreement: float, decay: float = 0.0) -> float:
        """The largest stable batch sharpness, in the mean square.

        Args:
            agreement: How far the batches agree in their curvature, from 0 (excluded) to 1.
            decay: What weight decay adds to the curvature of every batch, and is not in the batch sharpness.

        """
        return _limit(self, agreement, decay)


@functools.lru_cache(maxsize=256)
def _limit(step: StepMap, agreement: float, decay: float) -> float:
    """The same, remembered: its roots take milliseconds, and it is asked again at every step that is logged."""
    if step.pace <= 0:
        return math.inf
    # In units of the classical limit all coefficients are of order 1, whatever the learning rate: roots of
    # polynomials whose coefficients span 12 decades are lost to rounding.
    unit = 1 / step.pace
    if agreement == 1:  # nothing is random, and at a momentum of 1 the general formula is 0 / 0
        return max(unit - decay, 0.0)
    delta = step.later - step.memory * step.now
    sharpness = Polynomial([0.0, unit])
    mean = agreement * sharpness + decay
    c1, c2 = step.now * mean - step.kept - step.memory, delta * mean + step.kept * step.memory
    impulse = (step.now**2 + delta**2) * (1 + c2) - 2 * step.now * delta * c1
    room = (1 - c2) * ((1 + c2) ** 2 - c1**2) - agreement * (1 - agreement) * sharpness**2 * impulse
    # Without decay a curvature of 0 leaves the parameter where it is: a root that is no limit. Where there is no
    # room on its far side nothing is stable, as with a momentum of 1.
    if room(_NO_CURVATURE) < 0:
        return 0.0
    roots = room.trim(_NO_COEFFICIENT).roots()
    real = roots.real[np.abs(roots.imag) <= _SAME_ROOT * np.abs(roots)]
    # The smallest: stability is lost there, and a room that is positive again beyond is never reached.
    positive = real[real > _NO_CURVATURE]
    return float(positive.min()) * unit if len(positive) else math.inf


_NO_CURVATURE = 1e-9
"""A batch sharpness that counts as none, in units of the classical limit. The smallest limit is about ``(1 - m) / 2``
of that, towards ``p = 0``, so that a momentum of 1 - 1e-8 is still distinguished from 1."""

_NO_COEFFICIENT = 1e-60
"""Up to which a leading coefficient counts as 0: the root that it adds lies beyond all curvatures, and overflows."""

_SAME_ROOT = 1e-6
"""Imaginary part, relative to the root, up to which rounding may have split a double real root."""
