"""The reading callbacks under test, and which of the values that they log are eigenvalues of the step's own loss."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from lightning.pytorch.callbacks import Callback

from lyapunov_lightning import (
    CurvatureProbe,
    HessianConfig,
    LossAlongEigvecScanner,
    NegativeCurvatureTracker,
    SpectrumTracker,
)

BATCH = HessianConfig(data="batch")
FIXED = HessianConfig(data="fixed", num_batches=2)
ONE_FIXED = HessianConfig(data="fixed", num_batches=1)
FIRST = 2
"""As many batches as the fixed data have at most."""

DIFFERENCES = HessianConfig(method="finite_difference")

_TOLERANCE = {"float64": 1e-6, "float32": 1e-4}
"""Of the searches whose eigenvalues are compared."""


@dataclass(frozen=True)
class Reader:
    """A callback that must not show.

    Attributes:
        name: How a case's description calls it.
        make: Makes one, given how many steps lie between two measurements.
        every: So many.
        eigenvalues: Tags of eigenvalues of the loss on the step's own batch, with their places in ascending order.
        counts: The tag that every measurement logs, whether it converged or not.
        first: The first step at which it must measure. Fixed data that cannot be read twice are kept as they pass.

    """

    name: str
    make: Callable[[int], Callback]
    every: int = 1
    eigenvalues: dict[str, int] = field(default_factory=dict, hash=False)
    counts: str = "curvature_details/converged"
    first: int = 0

    def __str__(self) -> str:
        return f"{self.name} every {self.every}"


def readers_of(rng: random.Random, dtype: str) -> tuple[Reader, ...]:
    """An exact probe of both ends, and usually another callback beside it."""
    probe = replace(exact_probe(dtype), every=rng.choice([1, 2, 2, 3]))
    other = rng.choice(others(dtype))
    return (probe, replace(other, every=rng.choice([2, 3])))[: rng.choice([1, 2, 2])]


def readers_in_turn(number: int, dtype: str) -> tuple[Reader, ...]:
    """An exact probe and another callback, for each of several cases by its number another one."""
    beside = others(dtype)
    return replace(exact_probe(dtype), every=1 + number % 2), replace(beside[number % len(beside)], every=2)


def exact_probe(dtype: str) -> Reader:
    return Reader(
        "CurvatureProbe(end='both')",
        lambda every: CurvatureProbe(every, end="both", tol=_TOLERANCE[dtype], hessian=BATCH, log_prefix="exact"),
        eigenvalues={"exact/curvature/lambda_max": -1, "exact/curvature/lambda_min": 0},
        counts="exact/curvature_details/converged",
    )


def others(dtype: str) -> list[Reader]:
    tol = _TOLERANCE[dtype]
    return [
        Reader("CurvatureProbe('lyapunov')", lambda every: CurvatureProbe(every, "lyapunov", hessian=BATCH)),
        Reader("CurvatureProbe(data='fixed')", lambda every: CurvatureProbe(every, hessian=FIXED), first=FIRST),
        Reader("CurvatureProbe(mode='eval')", lambda every: CurvatureProbe(every, hessian=HessianConfig(mode="eval"))),
        Reader("CurvatureProbe(finite differences)", lambda every: CurvatureProbe(every, hessian=DIFFERENCES)),
        Reader(
            "SpectrumTracker(data='batch')",
            lambda every: SpectrumTracker(every, 2, 1, hessian=BATCH, tol=tol),
            eigenvalues={"spectrum/lambda_1": -1, "spectrum/lambda_2": -2, "spectrum/lambda_min_1": 0},
            counts="spectrum_details/converged",
        ),
        Reader(
            "SpectrumTracker(data='fixed')",
            lambda every: SpectrumTracker(every, 2, hessian=ONE_FIXED, random_vectors=2),
            counts="spectrum_details/converged",
            first=FIRST,
        ),
        Reader(
            "NegativeCurvatureTracker(data='fixed')",
            lambda every: NegativeCurvatureTracker(every, 2, hessian=ONE_FIXED),
            counts="negative_details/converged",
            first=FIRST,
        ),
        Reader(
            "LossAlongEigvecScanner(data='fixed')",
            lambda every: LossAlongEigvecScanner(
                every, 1, 0, hessian=ONE_FIXED, scales=(1.0,), points=5, sgd_steps=(1.0,)
            ),
            counts="scan_details/converged",
            first=FIRST,
        ),
        Reader(
            "LossAlongEigvecScanner(data='batch')",
            lambda every: LossAlongEigvecScanner(every, hessian=BATCH, scales=(1.0,), points=5, sgd_steps=(1.0,)),
            counts="scan_details/converged",
        ),
    ]
