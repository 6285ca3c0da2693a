"""Curvature of a loss in pure PyTorch: products with its Hessian and what can be learnt from them.

Nothing here knows of Lightning; it works with any function of tensors.
"""

from lyapunov_lightning.curvature.directions.landscape import LineScan, QuadraticFit, Window, quadratic_fit, scan_line
from lyapunov_lightning.curvature.directions.line_search import LineSearch, first_minimum
from lyapunov_lightning.curvature.errors import (
    CurvatureWarning,
    MeasurementError,
    NonFiniteCurvatureError,
    PeerFailureError,
)
from lyapunov_lightning.curvature.linear import LinearOperator, ScaledOperator, SymmetricOperator
from lyapunov_lightning.curvature.operators.checks import OperatorCheck, check_operator
from lyapunov_lightning.curvature.operators.gauss_newton import EmpiricalFisherOperator, GaussNewtonOperator
from lyapunov_lightning.curvature.operators.hessian import HessianOperator
from lyapunov_lightning.curvature.solvers.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.solvers.inverse import InverseProduct, NonPositiveDirection, conjugate_gradient
from lyapunov_lightning.curvature.solvers.lanczos import lanczos
from lyapunov_lightning.curvature.solvers.lyapunov import (
    LyapunovEstimate,
    LyapunovIteration,
    LyapunovSpectrum,
    LyapunovSpectrumEstimate,
)
from lyapunov_lightning.curvature.solvers.power import power_iteration
from lyapunov_lightning.curvature.stochastic.density import SpectralDensity, spectral_density
from lyapunov_lightning.curvature.stochastic.estimates import Estimate
from lyapunov_lightning.curvature.stochastic.trace import (
    DiagonalEstimate,
    Moments,
    stochastic_diagonal,
    stochastic_moments,
)
from lyapunov_lightning.curvature.tracking.online import OnlineEigenpair, OnlineEstimate

__all__ = [
    "CurvatureWarning",
    "DiagonalEstimate",
    "Eigenpairs",
    "EmpiricalFisherOperator",
    "Estimate",
    "GaussNewtonOperator",
    "HessianOperator",
    "InverseProduct",
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
    "NonPositiveDirection",
    "OnlineEigenpair",
    "OnlineEstimate",
    "OperatorCheck",
    "PeerFailureError",
    "QuadraticFit",
    "ScaledOperator",
    "SpectralDensity",
    "SymmetricOperator",
    "Window",
    "check_operator",
    "conjugate_gradient",
    "first_minimum",
    "lanczos",
    "power_iteration",
    "quadratic_fit",
    "scan_line",
    "spectral_density",
    "stochastic_diagonal",
    "stochastic_moments",
]
