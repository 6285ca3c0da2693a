r"""The loss over a plane through the present parameters, and where a training lies on it.

Two axes span the plane: eigenvectors of the Hessian, the gradient with an eigenvector, or random directions in the
scale of the network. A random direction of a network with ReLU layers has no scale of its own, since layers can be
rescaled against each other without a change of the function. So it is given that of the weights, filter by filter:
each filter ``d`` of the direction becomes ``d/‖d‖ · ‖w‖`` with the filter ``w`` in its place (H. Li et al.,
"Visualizing the loss landscape of neural nets", NeurIPS 2018, sec. 4). A filter is what makes one output: a slice
``w[i]`` of a convolution's weight, a row of a linear layer's. Biases and the parameters of norms, which are vectors,
stay where they are.

Every axis has about the norm of all parameters, so that coordinates are shares of it whatever the directions. Nothing
but two coordinates is kept of parameters that are left: their components along the axes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lyapunov_lightning.curvature.arguments import check_choice, check_positive
from lyapunov_lightning.curvature.directions.scanning import parameter_norm
from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.curvature.solvers.eigenpairs import Eigenpairs

PlaneDirections = Literal["eigenvectors", "gradient", "random"]

_NEEDED = {"eigenvectors": 2, "gradient": 1, "random": 0}
"""How many eigenvectors each kind of plane takes."""

_REACH = {"eigenvectors": 0.05, "gradient": 0.05, "random": 1.0}
"""How far a plane reaches by default. Along an eigenvector 5 % of the norm of the parameters are what `measure` scans;
random directions are drawn out to the norm of each filter, as in the paper."""

_LEAST_ANGLE = 1e-3
"""Sine of the angle to an eigenvector below which what is left of the gradient is rounding in float32."""


@dataclass(frozen=True)
class Plane:
    """Which plane to evaluate the loss on, and how finely.

    Attributes:
        directions: What spans it: ``"eigenvectors"``, the first two of those that are asked for; ``"gradient"``, the
            first of them and what of the gradient is orthogonal to it; ``"random"``, two random directions with
            filter-wise normalisation.
        points: Points on each axis, an odd number, so that the present parameters are one of them. The loss is
            evaluated at the square of it.
        reach: How far the plane reaches to each side, as a share of the norm of the parameters; 0.05 by default, and 1
            for random directions.

    Raises:
        ValueError: If one of them is out of its range.

    """

    directions: PlaneDirections = "eigenvectors"
    points: int = 21
    reach: float | None = None

    def __post_init__(self) -> None:
        check_choice("plane.directions", self.directions, PlaneDirections)
        if isinstance(self.points, bool) or not isinstance(self.points, int) or self.points < 3 or self.points % 2 == 0:
            raise ValueError(f"`plane.points` should be an odd int of at least 3, got {self.points}.")
        if self.reach is not None:
            check_positive("plane.reach", self.reach)

    @property
    def coordinates(self) -> tuple[float, ...]:
        """Where on each axis the loss is evaluated, ascending."""
        reach = _REACH[self.directions] if self.reach is None else self.reach
        half = self.points // 2
        return tuple(reach * place / half for place in range(-half, half + 1))

    def check_eigenvectors(self, count: int) -> None:
        """Make sure that as many eigenvectors are asked for as the plane takes.

        Raises:
            ValueError: If they are fewer.

        """
        needed = _NEEDED[self.directions]
        if count < needed:
            raise ValueError(
                f"`plane={self.directions!r}` takes {needed} eigenvector{'s' * (needed > 1)}, and `largest + smallest`"
                f" is {count}. Ask for more, or use `plane='random'`."
            )


def as_plane(plane: "Plane | PlaneDirections | None") -> Plane | None:
    """A plane, from itself or from its directions alone.

    Raises:
        ValueError: If it is neither.

    """
    return plane if plane is None or isinstance(plane, Plane) else Plane(directions=plane)


@dataclass(frozen=True, eq=False)
class PlaneAxes:
    """The two directions that span a plane.

    Attributes:
        names: Their names: ``1``, ``min_1`` ... for eigenvectors, ``gradient``, ``random_1`` and ``random_2``.
        vectors: Shape ``(2, size)``.

    """

    names: tuple[str, str]
    vectors: Tensor

    def position(self, operator: LossHessian) -> tuple[float, float]:
        """The coordinates of the present parameters, projected on the plane through the origin."""
        space, parameters = operator.space, operator.layout.flatten(operator.parameters)
        first, second = self.vectors
        # Random axes are not quite orthogonal.
        gram = torch.stack([space.inner(self.vectors, axis) for axis in (first, second)]).cpu().double()
        components = space.inner(self.vectors, parameters).cpu().double()
        x, y = torch.linalg.solve(gram, components).tolist()
        return x, y


@dataclass(frozen=True, eq=False)
class ScannedPlane:
    """The loss over a plane.

    Attributes:
        names: The names of the axes, see `PlaneAxes`.
        coordinates: Shape ``(m,)``: the coordinates on each axis, as shares of the norm of the parameters; 0 is where
            they are.
        losses: Shape ``(m, m)``: the loss, the row being the coordinate on the first axis. Infinite or NaN where it
            overflows.
        lengths: The norms of the axes in parameter space.

    """

    names: tuple[str, str]
    coordinates: Tensor
    losses: Tensor
    lengths: tuple[float, float]

    @property
    def improvement(self) -> float:
        """How far the lowest loss on the plane lies below the present one."""
        middle = len(self.coordinates) // 2
        known = self.losses[self.losses.isfinite()]
        return float(self.losses[middle, middle] - known.min()) if len(known) else 0.0


def plane_axes(
    operator: LossHessian,
    directions: PlaneDirections,
    *,
    pairs: Eigenpairs | None = None,
    names: Sequence[str] = (),
    gradient: Tensor | None = None,
    seed: int = 0,
) -> PlaneAxes:
    """The axes of a plane at the present parameters.

    Args:
        operator: The Hessian there.
        directions: What spans the plane.
        pairs: Eigenpairs, for planes that take any.
        names: Their names.
        gradient: The gradient, for a plane that takes it.
        seed: Seed of random directions.

    Raises:
        MeasurementError: If the two directions are one, or there is no filter to normalise by.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature import HessianOperator, lanczos
        >>> from lyapunov_lightning.curvature.directions.plane import Plane, plane_axes, scan_plane
        >>> x = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
        >>> scale = torch.tensor([4.0, 1.0], dtype=torch.float64)
        >>> hessian = HessianOperator(lambda batch: (batch * x**2).sum() / 2, [x], [scale])
        >>> axes = plane_axes(hessian, "eigenvectors", pairs=lanczos(hessian, largest=2), names=["1", "2"])
        >>> scanned = scan_plane(hessian, axes, Plane(points=3, reach=0.2))
        >>> [round(length, 6) for length in scanned.lengths], round(float(scanned.losses[1, 1]), 6)
        ([5.0, 5.0], 26.0)

    """
    space = operator.space
    if directions == "random":
        generator = torch.Generator().manual_seed(seed)
        rows = torch.stack([filter_normalised(operator, generator) for _ in range(2)])
        return PlaneAxes(("random_1", "random_2"), rows)
    assert pairs is not None  # of which `Plane.check_eigenvectors` makes sure
    length = parameter_norm(operator) or 1.0
    first = pairs.vectors[0]
    if directions == "eigenvectors":
        return PlaneAxes((names[0], names[1]), length * pairs.vectors[:2])
    assert gradient is not None
    second = gradient.clone()
    before, left = space.norm(gradient), space.orthonormalise(second, [first[None]])
    if not float(left) > _LEAST_ANGLE * float(before):
        raise MeasurementError(
            "The gradient lies along the first eigenvector, and the two span no plane. Use `plane='eigenvectors'`,"
            " which takes two of them."
        )
    return PlaneAxes((names[0], "gradient"), length * torch.stack([first, second]))


def filter_normalised(operator: LossHessian, generator: torch.Generator) -> Tensor:
    """A random direction in which every filter has the norm of the weights in its place, and vectors are zero.

    Of sharded parameters the whole vectors are gathered for it, since a filter may be spread over ranks.

    Args:
        operator: The Hessian at the present parameters.
        generator: The source of the direction, on the CPU.

    Returns:
        Shape ``(size,)``.

    Raises:
        MeasurementError: If all parameters are vectors, so that nothing is left.

    """
    space = operator.space
    direction = space.whole(space.random(generator))
    weights = space.whole(operator.layout.flatten(operator.parameters))
    shapes = [parameter.shape for parameter in operator.parameters]
    if all(len(shape) < 2 for shape in shapes):
        raise MeasurementError(
            "`plane='random'` scales random directions filter by filter, and no parameter here has filters: all are"
            " vectors. Use `plane='eigenvectors'`, which takes two of them."
        )
    sizes = [shape.numel() for shape in shapes]
    tiny = torch.finfo(direction.dtype).tiny
    for piece, values, shape in zip(direction.split(sizes), weights.split(sizes), shapes, strict=True):
        if len(shape) < 2:
            piece.zero_()
            continue
        filters, own = piece.view(shape[0], -1), values.view(shape[0], -1)
        filters.mul_((own.norm(dim=1) / filters.norm(dim=1).clamp_min(tiny))[:, None])
    return space.cut(direction)


def scan_plane(operator: LossHessian, axes: PlaneAxes, plane: Plane) -> ScannedPlane:
    """Evaluate the loss over a plane, at all of its points in one call.

    Args:
        operator: The Hessian at the present parameters.
        axes: What spans the plane.
        plane: Where on it to evaluate the loss.

    """
    where = plane.coordinates
    losses = operator.values_along(axes.vectors, [(x, y) for x in where for y in where])
    first, second = (float(operator.space.norm(axis)) for axis in axes.vectors)
    return ScannedPlane(
        names=axes.names,
        coordinates=torch.tensor(where, dtype=torch.float64),
        losses=losses.view(len(where), len(where)),
        lengths=(first, second),
    )
