"""PyTorch Lightning callbacks that measure the curvature of the loss while a network trains, and act on it."""

from lyapunov_lightning.callbacks.curvature_probe import CurvatureProbe
from lyapunov_lightning.callbacks.loss_along_eigvec_scanner import LossAlongEigvecScanner
from lyapunov_lightning.callbacks.negative_curvature_tracker import NegativeCurvatureTracker
from lyapunov_lightning.callbacks.nudged_sgd_hook import NudgedSGDHook
from lyapunov_lightning.callbacks.quasi_newton_lr_controller import QuasiNewtonLRController
from lyapunov_lightning.callbacks.spectrum_tracker import SpectrumTracker
from lyapunov_lightning.training.schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "CurvatureProbe",
    "LossAlongEigvecScanner",
    "NegativeCurvatureTracker",
    "NudgedSGDHook",
    "QuasiNewtonLRController",
    "Schedule",
    "SpectrumTracker",
]
