"""The results of the callbacks: one frozen dataclass for each callback, with the tags of its numbers.

A result holds numbers and knows their tags. It knows neither the callback that made it nor the run. What a callback
decides, keeps or draws is not here.
"""

from lyapunov_lightning.callbacks.results.learning_rate import LearningRateResult
from lyapunov_lightning.callbacks.results.negative import NegativeResult
from lyapunov_lightning.callbacks.results.nudge import NudgeResult
from lyapunov_lightning.callbacks.results.probe import ProbeResult
from lyapunov_lightning.callbacks.results.scan import ScanResult
from lyapunov_lightning.callbacks.results.spectrum import TrackedSpectrum

__all__ = [
    "LearningRateResult",
    "NegativeResult",
    "NudgeResult",
    "ProbeResult",
    "ScanResult",
    "TrackedSpectrum",
]
