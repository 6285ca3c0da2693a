r"""The loss along a line, compared with the quadratic that its derivatives predict.

Along a unit vector :math:`u` that points downhill, the loss :math:`t \mapsto L(\theta + tu)` begins with the slope
:math:`-|g^\top u|` and the curvature :math:`u^\top Hu`. How long that lasts is seen in two ways: the curvature of a
quadratic fitted to the loss over a wider window, and the distance at which the loss is least, which a quadratic puts
at slope over curvature and, where the curvature is negative, nowhere ("Negative eigenvalues of the Hessian in deep
neural networks", secs. 2.3 and 2.4).

Losses carry rounding errors, in float32 one of about 1e-7 of the loss, and the differences that matter here are often
smaller. So the fit comes with its standard error, and the search for a minimum treats two losses as equal that differ
by less than the noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lyapunov_lightning.curvature.directions.line_search import LineSearch, LossAlong, first_minimum

_DISTINCT_DEVIATIONS = 4.0
"""The number of standard deviations of the noise by which two losses have to differ to count as different. A search
makes many comparisons, and a single wrong one ends it at a minimum that is none."""

_NOISE_POINTS = 9
"""Evaluations to measure the noise: they give five fourth differences."""


@dataclass(frozen=True)
class NoisyLoss:
    """A loss and how exactly it is known.

    Attributes:
        value: The loss.
        noise: The standard deviation of its rounding errors.
        num_evaluations: Evaluations of the loss that this took.

    """

    value: float
    noise: float
    num_evaluations: int


@dataclass(frozen=True)
class QuadraticFit:
    """A quadratic fitted to the loss along a line.

    Attributes:
        curvature: Its second derivative, in the unit of the eigenvalues.
        error: The standard error of the curvature, as far as it comes from the noise of the losses.

    """

    curvature: float
    error: float


@dataclass(frozen=True)
class Window:
    """The loss over a piece of a line.

    Attributes:
        scale: The window's half width in the unit in which it was asked for.
        distances: Shape ``(m,)``: where the loss was evaluated.
        losses: Shape ``(m,)``: the loss there.
        model: Shape ``(m,)``: the quadratic with the slope and the curvature of the loss at distance 0.
        fit: The quadratic fitted to the losses.

    """

    scale: float
    distances: Tensor
    losses: Tensor
    model: Tensor
    fit: QuadraticFit

    @property
    def gap(self) -> float:
        """The largest distance between the loss and the model."""
        return float((self.losses - self.model).abs().max())


@dataclass(frozen=True)
class LineScan:
    """What was measured along one line.

    Attributes:
        windows: The loss over each of the windows.
        search: The first minimum.

    """

    windows: tuple[Window, ...]
    search: LineSearch

    @property
    def num_evaluations(self) -> int:
        """Evaluations of the loss."""
        return self.search.num_evaluations + sum(len(window.distances) for window in self.windows)


def scan_line(
    loss_along: LossAlong,
    start: NoisyLoss,
    slope: float,
    curvature: float,
    *,
    scales: Sequence[float],
    unit: float = 1.0,
    points: int = 11,
    max_bracket: float = 1000.0,
) -> LineScan:
    """Evaluate the loss along a line that begins downhill.

    Args:
        loss_along: The loss at distances along the line.
        start: The loss at distance 0.
        slope: The modulus of the slope at distance 0; the loss falls in the positive direction.
        curvature: The second derivative at distance 0.
        scales: Half widths of the windows, in multiples of `unit`.
        unit: A distance; windows of no width are left out.
        points: Evaluations in each window, from one end to the other.
        max_bracket: How far to search for a minimum, in multiples of the slope over the modulus of the curvature,
            which is where a quadratic of positive curvature has its minimum.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature.directions.landscape import NoisyLoss, scan_line
        >>> def loss_along(distances):
        ...     t = torch.tensor(distances, dtype=torch.float64)
        ...     return 3 - t + 2 * t**2
        >>> scan = scan_line(loss_along, NoisyLoss(3.0, 0.0, 1), slope=1.0, curvature=4.0, scales=[0.1])
        >>> round(scan.search.step, 6), round(scan.windows[0].fit.curvature, 6)
        (0.25, 4.0)

    """
    widths = [(scale, scale * unit) for scale in scales if scale * unit > 0]
    distances = [torch.linspace(-width, width, points, dtype=torch.float64) for _, width in widths]
    # In one call, so that the operator goes through the data once for all windows.
    flat = loss_along(torch.cat(distances).tolist()) if widths else torch.zeros(0, dtype=torch.float64)
    losses = flat.split(points) if widths else ()
    windows = tuple(
        Window(
            scale=scale,
            distances=where,
            losses=values,
            model=start.value - slope * where + curvature / 2 * where.square(),
            fit=quadratic_fit(where, values, noise=start.noise),
        )
        for (scale, _), where, values in zip(widths, distances, losses, strict=True)
    )
    # For negative curvature too: no minimum is there, but the quadratic term is half of what the slope brings, so that
    # the scale on which the line bends is the same.
    natural = slope / abs(curvature) if curvature else slope
    search = first_minimum(
        loss_along,
        start.value,
        natural,
        max_step=max_bracket * natural,
        slope=slope,
        curvature=curvature,
        noise=_DISTINCT_DEVIATIONS * start.noise,
    )
    return LineScan(windows, search)


def quadratic_fit(distances: Tensor, losses: Tensor, *, noise: float = 0.0) -> QuadraticFit:
    """The curvature of the quadratic that fits the losses best in least squares.

    Args:
        distances: Shape ``(m,)``, with at least 3 different ones.
        losses: Shape ``(m,)``.
        noise: Standard deviation of the losses.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature.directions.landscape import quadratic_fit
        >>> t = torch.linspace(-1, 1, 5, dtype=torch.float64)
        >>> round(quadratic_fit(t, 1 - t + 3 * t**2).curvature, 6)
        6.0

    """
    unit = float(distances.abs().max())  # or the columns differ by orders of magnitude, and their rounding counts
    powers = torch.stack([torch.ones_like(distances), distances / unit, (distances / unit).square()], dim=1)
    # The fit is linear in the losses, so that independent errors of them add up to `noise` times the norm of this row.
    row = torch.linalg.pinv(powers)[2] * (2 / unit**2)
    # The row is orthogonal to constants up to rounding, which a large loss would multiply.
    middle = losses[distances.abs().argmin()]
    return QuadraticFit(float(row @ (losses - middle)), noise * float(row.norm()))


def noisy_loss(loss_along: LossAlong, spacing: float, *, precision: float) -> NoisyLoss:
    """The loss at distance 0 with the size of its rounding errors, from differences of its values at nearby points.

    Over short distances the fourth differences of the loss itself all but vanish, and those that stay are of its errors
    (J. Moré and S. Wild, "Estimating computational noise", SIAM J. Sci. Comput. 33, 2011). Errors that happen to be the
    same at all points do not show, so the noise is taken to be at least one unit in the last place of the loss.

    Args:
        loss_along: The loss at distances along a line.
        spacing: The distance between two points, small compared with distances over which the loss bends.
        precision: The relative size of one unit in the last place, such as ``torch.finfo(torch.float32).eps``.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature.directions.landscape import noisy_loss
        >>> rough = lambda distances: (torch.tensor(distances, dtype=torch.float64) * 5e3).round() / 1e3
        >>> 1e-4 < noisy_loss(rough, 1.1e-4, precision=1e-16).noise < 1e-3
        True

    """
    losses = loss_along([spacing * index for index in range(_NOISE_POINTS)])
    # Independent errors of variance s² have fourth differences of variance 70 s²: 1 + 16 + 36 + 16 + 1.
    fourth = losses.diff(n=4).square().mean() / 70
    value = float(losses[0])
    return NoisyLoss(value, max(float(fourth.sqrt()), precision * abs(value)), len(losses))
