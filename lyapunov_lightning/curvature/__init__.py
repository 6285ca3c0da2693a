"""Curvature of a loss in pure PyTorch: products with its Hessian and what can be learnt from them.

Nothing here knows of Lightning; it works with any function of tensors.
"""

from lyapunov_lightning.curvature.density import (
    Estimate,
    Moments,
    SpectralDensity,
    spectral_density,
    stochastic_moments,
)
from lyapunov_lightning.curvature.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.errors import CurvatureWarning, MeasurementError, NonFiniteCurvatureError
from lyapunov_lightning.curvature.hessian import HessianOperator
from lyapunov_lightning.curvature.lanczos import lanczos
from lyapunov_lightning.curvature.landscape import (
    LineScan,
    LineSearch,
    QuadraticFit,
    Window,
    first_minimum,
    quadratic_fit,
    scan_line,
)
from lyapunov_lightning.curvature.linear import LinearOperator, ScaledOperator
from lyapunov_lightning.curvature.lyapunov import (
    LyapunovEstimate,
    LyapunovIteration,
    LyapunovSpectrum,
    LyapunovSpectrumEstimate,
)
from lyapunov_lightning.curvature.online import OnlineEigenpair, OnlineEstimate
from lyapunov_lightning.curvature.power import power_iteration

__all__ = [
    "CurvatureWarning",
    "Eigenpairs",
    "Estimate",
    "HessianOperator",
    "LineScan",
    "LineSearch",
    "LinearOperator",
    "LyapunovEstimate",
    "LyapunovIteration",
    "LyapunovSpectrum",
    "LyapunovSpectrumEstimate",
    "MeasurementError",
    "Moments",
    "NonFiniteCurvatureError",
    "OnlineEigenpair",
    "OnlineEstimate",
    "QuadraticFit",
    "ScaledOperator",
    "SpectralDensity",
    "Window",
    "first_minimum",
    "lanczos",
    "power_iteration",
    "quadratic_fit",
    "scan_line",
    "spectral_density",
    "stochastic_moments",
]
