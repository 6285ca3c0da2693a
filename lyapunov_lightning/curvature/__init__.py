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
from lyapunov_lightning.curvature.lanczos import lanczos
from lyapunov_lightning.curvature.linear import LinearOperator, ScaledOperator
from lyapunov_lightning.curvature.lyapunov import (
    LyapunovEstimate,
    LyapunovIteration,
    LyapunovSpectrum,
    LyapunovSpectrumEstimate,
)
from lyapunov_lightning.curvature.operator import HessianOperator
from lyapunov_lightning.curvature.power import power_iteration

__all__ = [
    "CurvatureWarning",
    "Eigenpairs",
    "Estimate",
    "HessianOperator",
    "LinearOperator",
    "LyapunovEstimate",
    "LyapunovIteration",
    "LyapunovSpectrum",
    "LyapunovSpectrumEstimate",
    "MeasurementError",
    "Moments",
    "NonFiniteCurvatureError",
    "ScaledOperator",
    "SpectralDensity",
    "lanczos",
    "power_iteration",
    "spectral_density",
    "stochastic_moments",
]
