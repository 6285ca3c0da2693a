"""PyTorch Lightning callbacks that measure the curvature of the loss while a network trains, and act on it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lyapunov_lightning.callbacks import (
        CurvatureProbe,
        LossAlongEigvecScanner,
        NegativeCurvatureTracker,
        NudgedSGDHook,
        QuasiNewtonLRController,
        SpectrumTracker,
    )
    from lyapunov_lightning.callbacks.negative_curvature_tracker import Descent
    from lyapunov_lightning.curvature.acting.pace import LRBounds
    from lyapunov_lightning.one_shot import measure
    from lyapunov_lightning.spectrum_result import SpectrumResult
    from lyapunov_lightning.training.config import HessianConfig
    from lyapunov_lightning.training.schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "CurvatureProbe",
    "Descent",
    "HessianConfig",
    "LRBounds",
    "LossAlongEigvecScanner",
    "NegativeCurvatureTracker",
    "NudgedSGDHook",
    "QuasiNewtonLRController",
    "Schedule",
    "SpectrumResult",
    "SpectrumTracker",
    "measure",
]


_PLACES = {
    "Descent": "callbacks.negative_curvature_tracker",
    "HessianConfig": "training.config",
    "LRBounds": "curvature.acting.pace",
    "Schedule": "training.schedule",
    "SpectrumResult": "spectrum_result",
    "measure": "one_shot",
}


def __getattr__(name: str) -> Any:
    """Load a name when it is first asked for: whoever uses the numerical core alone needs no Lightning."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = _PLACES.get(name, "callbacks")
    value = globals()[name] = getattr(import_module(f"{__name__}.{place}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
