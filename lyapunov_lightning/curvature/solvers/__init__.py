"""Eigen-solvers, Lyapunov iterations and inverse products: what can be learnt from products with a symmetric operator.

A solver takes a linear operator and returns a frozen result; it keeps nothing from call to call and knows no loss.
"""

from lyapunov_lightning.curvature.solvers.inverse import InverseProduct, NonPositiveDirection, conjugate_gradient

__all__ = ["InverseProduct", "NonPositiveDirection", "conjugate_gradient"]
