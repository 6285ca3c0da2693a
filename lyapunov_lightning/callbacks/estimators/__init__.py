"""How `CurvatureProbe` comes to its numbers: one file for each way, and the table of all.

An estimator says what it needs of a step, measures, keeps what the next measurement starts from, and returns a
`ProbeResult`. It knows neither the callback nor when it is called: schedules, logging, figures and the order of
Lightning's hooks are not here, and numerical methods are in `curvature`.
"""

from typing import Literal

from lyapunov_lightning.callbacks.estimators.base import Estimator, EstimatorSettings, MeasuredStep, Moment
from lyapunov_lightning.callbacks.estimators.critical import CriticalLearningRate
from lyapunov_lightning.callbacks.estimators.eigenvalues import LanczosEigenvalues, PowerEigenvalues
from lyapunov_lightning.callbacks.estimators.exponents import LyapunovExponents

EstimatorName = Literal["lanczos", "lyapunov", "power", "critical"]
"""The names in `ESTIMATORS`, in words that type checkers and command lines read."""

ESTIMATORS: dict[EstimatorName, type[Estimator]] = {
    "lanczos": LanczosEigenvalues,
    "lyapunov": LyapunovExponents,
    "power": PowerEigenvalues,
    "critical": CriticalLearningRate,
}
"""What the argument ``estimator`` of `CurvatureProbe` may be."""

__all__ = [
    "ESTIMATORS",
    "CriticalLearningRate",
    "Estimator",
    "EstimatorName",
    "EstimatorSettings",
    "LanczosEigenvalues",
    "LyapunovExponents",
    "MeasuredStep",
    "Moment",
    "PowerEigenvalues",
]
