"""The callbacks: when to measure, what to change; one file each.

They are policy. Nothing here differentiates a loss, and no callback knows another.
"""

from lyapunov_lightning.callbacks.curvature_probe import CurvatureProbe
from lyapunov_lightning.callbacks.loss_along_eigvec_scanner import LossAlongEigvecScanner
from lyapunov_lightning.callbacks.negative_curvature_tracker import NegativeCurvatureTracker
from lyapunov_lightning.callbacks.nudged_sgd_hook import NudgedSGDHook
from lyapunov_lightning.callbacks.quasi_newton_lr_controller import QuasiNewtonLRController
from lyapunov_lightning.callbacks.spectrum_tracker import SpectrumTracker

__all__ = [
    "CurvatureProbe",
    "LossAlongEigvecScanner",
    "NegativeCurvatureTracker",
    "NudgedSGDHook",
    "QuasiNewtonLRController",
    "SpectrumTracker",
]
