"""What the product says: where `CurvatureProbe` sees the limit of the learning rate, from runs at smaller rates."""

import statistics
from typing import Any

from typing_extensions import override

from benchmarks.verdicts.training import Cell, Learner, Size, in_trainer, loader
from lyapunov_lightning import CurvatureProbe

FRACTIONS = (1, 2, 4, 8, 16, 30)
"""The rates that are read are the largest usable one over these."""


class UndrawnProbe(CurvatureProbe):
    """The probe without its figure, which takes longer than the run."""

    @override
    def figures(self) -> dict[str, Any]:
        return {}


def limit_of(probe: CurvatureProbe) -> float | None:
    """The learning rate that the probe holds for the limit; None if it does not say.

    Until `Diagnosis` has that number itself, it is the median over the second half of the run.
    """
    found = probe.diagnosis()
    if hasattr(found, "learning_rate_limit"):
        return found.learning_rate_limit
    late = probe.results[len(probe.results) // 2 :]
    limits = [result.learning_rate / result.stability_ratio for result in late if result.stability_ratio]
    return statistics.median(limits) if limits else None


def read(cell: Cell, rate: float, root: str, size: Size) -> dict[str, Any]:
    """The limit by a run at a rate; a run that fails is a reading that says why."""
    probe = UndrawnProbe()
    try:
        in_trainer(Learner(cell, rate, size.steps), loader(cell, root, size), [probe])
        diagnosis = probe.diagnosis()
        return {
            "limit": limit_of(probe),
            "range": getattr(diagnosis, "learning_rate_range", None),
            "kind": diagnosis.kind,
            "ratios": sum(result.stability_ratio is not None for result in probe.results),
        }
    except Exception as error:
        return {"limit": None, "error": f"{type(error).__name__}: {error}"}
