r"""A step along a direction of negative curvature, in between the steps of the optimizer.

Along a unit vector :math:`v` with slope :math:`c = g^\top v` and negative curvature, both terms of the second-order
expansion of the loss fall on the side where the slope is negative. A step of gradient descent along :math:`v` has the
length :math:`\eta|c|`. With a bound on that length it is the step that "Negative eigenvalues of the Hessian in deep
neural networks", appendix C, alternates with the steps of the optimizer.
"""

import math
from collections.abc import Callable

from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError


def negative_curvature_step(
    slope: Callable[[], float], value: float, residual: float, *, lr: float, max_step: float
) -> float:
    """The step along the eigenvector of the smallest eigenvalue, if that is certainly negative.

    The Hessian has an eigenvalue within the residual of `value`. So it certainly has a negative one only if `value` is
    below minus the residual.

    Args:
        slope: Computes the slope ``gᵀv`` along the unit vector; called only if it is needed.
        value: The estimate of the eigenvalue.
        residual: ``‖Hv − λv‖`` of the pair.
        lr: Learning rate of the step.
        max_step: The largest length of the step.

    Returns:
        The factor on the unit vector that makes it the step; 0 if a negative eigenvalue is not certain.

    Raises:
        NonFiniteCurvatureError: If the gradient is not finite.

    Example::

        >>> from lyapunov_lightning.curvature.acting.descent import negative_curvature_step
        >>> negative_curvature_step(lambda: 0.5, -2.0, 0.1, lr=0.5, max_step=1.0)
        -0.25
        >>> negative_curvature_step(lambda: 0.5, -2.0, 3.0, lr=0.5, max_step=1.0)
        0.0

    """
    if not value < -residual:
        return 0.0
    # Only here: the slope costs a gradient, which is not needed as long as no negative eigenvalue is certain.
    component = slope()
    if not math.isfinite(component):
        raise NonFiniteCurvatureError("The gradient at the present parameters is not finite.")
    # The bound is on the length and not on the rate: along negative curvature the quadratic model has no minimum to
    # stop at.
    return -math.copysign(min(lr * abs(component), max_step), component)
