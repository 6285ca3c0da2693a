"""PyTorch Lightning callbacks that measure the curvature of the loss while a network trains, and act on it."""

from lyapunov_lightning.callbacks.curvature_probe import CurvatureProbe
from lyapunov_lightning.callbacks.spectrum_tracker import SpectrumTracker
from lyapunov_lightning.training.schedule import Schedule

__version__ = "0.1.0"

__all__ = ["CurvatureProbe", "Schedule", "SpectrumTracker"]
