r"""The curvature along a direction, from three values of the loss where the gradient is known.

The second difference ``(L(θ + du) - 2 L(θ) + L(θ - du)) / d²`` takes forward passes only, a third of what the Hessian's
product costs. It is the curvature between the two points and not at the one between them: with ReLU it counts the kinks
on the way, which the Hessian of a point does not see, and the training does.

To both sides, though the change of the gradient to one of them would give a curvature as well. Along the gradient of a
batch the kinks of ReLU are not alike on both sides, however near: downhill the units that raise the loss are switched
off on the way, and each makes the loss flatten out; uphill those that lower it, and each makes it bend down. On a small
ResNet in batches of 32 the change of the gradient over a fiftieth of the way to the edge gave 1.3 to 4 times the
Hessian's curvature downhill, and 0.6 to -1.2 times uphill (five of six places).

Two things limit it. Rounding: the difference has to be far above the last places of the losses. And the distance:
beyond the edge of stability of the direction the loss is no parabola any more. What shows whether the three values can
be believed is the first difference, since the slope along the direction is known: noise of whatever kind (TF32, half
precision, a loss that draws its own random numbers, a gradient that was changed on its way) spoils both.
"""

import math
from dataclasses import dataclass

from lyapunov_lightning.curvature.directions.line_search import LossAlong
from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError

_REACH = 0.2
"""The distance, in units of the one over which the slope along the direction changes by its own size. On a LeNet with
ReLU on CIFAR-10, in batches of 8 and 128, the curvature along the gradient was within 12 % of the Hessian's at all of
eight places with a ratio above 0.2, where the loss changes by 3 % over the distance; nearer by kinks count more, and
further out it bends. On a small ResNet in batches of 32 single ones were off by factors of 0.3 to 2.4."""

_FURTHEST = 2.0
"""The largest distance in these units: that of a step of gradient descent at the edge of stability."""

_CLEAR_OF_ROUNDING = 200.0
"""How many last places of the loss the second difference has to be: a mean over a batch is off by a few."""

_SAME_SLOPE = 0.03
"""How far the first difference may be from the slope, as a share of it. Noise that changes the one by 3 % changes the
second difference, at a reach of 0.2, by half."""

_ATTEMPTS = 2
"""How often the distance is chosen: once more where the direction turned out to be more curved than was expected."""


@dataclass(frozen=True)
class LineCurvature:
    """The curvature along a direction.

    Attributes:
        value: The second derivative of the loss along it.
        distance: Between which distances to both sides it was measured.
        num_evaluations: Evaluations of the loss.

    """

    value: float
    distance: float
    num_evaluations: int


def curvature_along(
    losses_along: LossAlong, slope: float, sharpness: float, *, precision: float, base: float | None = None
) -> LineCurvature | None:
    """The curvature along a direction, by a second difference.

    Args:
        losses_along: The loss at multiples of the direction.
        slope: The first derivative of the loss along the direction, from the gradient; positive.
        sharpness: About what the curvature over the slope is expected to be; positive.
        precision: The last place of a loss in relation to it, such as ``torch.finfo(torch.float32).eps``.
        base: The loss where the direction begins, of the same function; evaluated if None.

    Returns:
        The curvature; None where these losses cannot tell it.

    Raises:
        NonFiniteCurvatureError: If the loss is not finite where the direction begins.

    Example::

        >>> import torch
        >>> def losses_along(distances):  # the slope is 2 and the curvature 8
        ...     x = torch.tensor(distances, dtype=torch.float64)
        ...     return 3 + 2 * x + 4 * x**2
        >>> round(curvature_along(losses_along, 2.0, 1.0, precision=2e-16).value, 6)
        8.0

    """
    asked = 0 if base is not None else 1
    base = float(losses_along([0.0])[0]) if base is None else base
    if not math.isfinite(base):
        raise NonFiniteCurvatureError(f"The loss is {base}, which is not finite.")
    clear = _CLEAR_OF_ROUNDING * precision * abs(base)
    for attempt in range(1, _ATTEMPTS + 1):
        distance = max(_REACH / sharpness, math.sqrt(2 * clear / (sharpness * slope)))
        if distance * sharpness > _FURTHEST:
            return None
        below, above = losses_along([-distance, distance]).tolist()
        value = (above - 2 * base + below) / distance**2
        if not math.isfinite(value):
            return None
        is_told = abs((above - below) / (2 * distance) - slope) <= _SAME_SLOPE * slope
        if is_told and abs(value) * distance <= _FURTHEST * slope:
            return LineCurvature(value, distance, asked + 2 * attempt)
        sharpness = max(abs(value) / slope, 2 * sharpness)
    return None
