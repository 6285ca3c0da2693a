"""What the product says: where `CurvatureProbe` sees the limit of the learning rate, from runs at smaller rates."""

from typing import Any

from typing_extensions import override

from benchmarks.verdicts.training import Cell, Learner, Size, in_trainer, loader
from lyapunov_lightning import CurvatureProbe

FRACTIONS = (1, 2, 4, 8, 16, 30)
"""The rates that are read are the largest usable one over these."""
MEASURED = (
    *("step", "learning_rate", "stability_ratio", "stability_limit", "batch_sharpness", "step_sharpness"),
    *("decisive_eigenvalue", "batch_agreement", "noise_ratio", "lost_decrease"),
)
"""What is kept of every measurement, to see why a reading is wrong."""


class UndrawnProbe(CurvatureProbe):
    """The probe without its figure, which takes longer than the run."""

    @override
    def figures(self) -> dict[str, Any]:
        return {}


def read(cell: Cell, rate: float, root: str, size: Size) -> dict[str, Any]:
    """What the probe says of a run at a rate; a run that fails is a reading that says why."""
    probe = UndrawnProbe()
    try:
        in_trainer(Learner(cell, rate, size.steps), loader(cell, root, size), [probe])
        diagnosis = probe.diagnosis()
    except Exception as error:
        return {"limit": None, "error": f"{type(error).__name__}: {error}"}
    return {
        "limit": diagnosis.learning_rate_limit,
        "range": diagnosis.learning_rate_range,
        "kind": diagnosis.kind,
        "measured": [[getattr(result, name) for name in MEASURED] for result in probe.results],
    }
