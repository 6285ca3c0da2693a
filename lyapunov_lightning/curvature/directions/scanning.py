r"""The loss along directions in parameter space, in two units: the gradient's component, and steps of SGD.

Along an eigenvector :math:`v` a step of length :math:`\alpha|g^\top v|` against the gradient's component is a step of
gradient descent with learning rate :math:`\alpha`, so that a quadratic loss has its minimum at
:math:`\alpha = 1/\lambda` in every direction ("Negative eigenvalues of the Hessian in deep neural networks", secs. 2.3
and 2.4). What SGD itself does along :math:`v` is measured with the gradients of its mini-batches and its own learning
rate ("On the relation between the sharpest directions of DNN loss and the SGD step length", sec. 3.2).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lyapunov_lightning.curvature.directions.landscape import LineScan, NoisyLoss, noisy_loss, scan_line
from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.linear import LinearOperator, space_of
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian

Units = Literal["gradient", "norm"]

SURFACE = range(-5, 6)
"""The multiples of an SGD step at which the loss is evaluated, to both sides."""

_NOISE_SPACING = 1e-5
"""The distance between the points at which the rounding is measured, in relation to the norm of the parameters. It has
to be long enough for each evaluation to round differently, and short enough for the loss itself to stay smooth."""


@dataclass(frozen=True)
class Direction:
    """A unit vector and the curvature along it.

    Attributes:
        curvature: ``vᵀHv``.
        vector: The vector, of shape ``(size,)``.

    """

    curvature: float
    vector: Tensor


@dataclass(frozen=True)
class DirectionScan:
    """The loss along a direction.

    Attributes:
        curvature: The curvature along the direction.
        slope: The modulus of the gradient's component along it.
        line: The loss on the line through the parameters, with positive distances where the loss falls.

    """

    curvature: float
    slope: float
    line: LineScan


@dataclass(frozen=True)
class StepScan:
    """The loss along a direction, in steps of SGD.

    Attributes:
        mean_length: The mean length of the steps' components along the direction.
        changes: For each multiple of a step, the mean change of the loss.
        surface: The loss at the multiples `SURFACE` of the mean length.
        num_evaluations: Evaluations of the loss.

    """

    mean_length: float
    changes: tuple[float, ...]
    surface: tuple[float, ...]
    num_evaluations: int


def random_directions(operator: LinearOperator, count: int, seed: int = 0) -> Iterator[Direction]:
    """Random directions, the same for the same seed; one at a time, to spare memory.

    Args:
        operator: The Hessian; each direction takes one product.
        count: The number of directions.
        seed: Seed of the vectors.

    Raises:
        NonFiniteCurvatureError: If the curvature along one of them is not finite.

    """
    generator = torch.Generator().manual_seed(seed)
    space = space_of(operator)
    for _ in range(count):
        vector = space.random(generator)
        vector /= space.norm(vector)
        curvature = float(space.inner(vector, operator.matvec(vector)))
        if not math.isfinite(curvature):
            raise NonFiniteCurvatureError("The curvature along a random direction is not finite.")
        yield Direction(curvature, vector)


def parameter_norm(operator: LossHessian) -> float:
    """The norm of all parameters together."""
    return float(operator.space.norm(operator.layout.flatten(operator.parameters)))


def noisy_start(operator: LossHessian, gradient: Tensor) -> NoisyLoss:
    """The loss at the present parameters and the size of its rounding errors.

    Raises:
        NonFiniteCurvatureError: If the loss or the gradient is not finite.

    """
    norm = float(operator.space.norm(gradient))
    # In relation to the parameters: it is their rounding, and that of what is computed with them, that is measured.
    size = parameter_norm(operator)
    start = noisy_loss(
        lambda distances: operator.values_along(gradient, distances),
        _NOISE_SPACING * size / norm if norm else 0.0,
        precision=torch.finfo(operator.dtype).eps,
    )
    if not math.isfinite(start.value + norm):
        raise NonFiniteCurvatureError("The loss or its gradient is not finite at the present parameters.")
    return start


def scan_direction(
    operator: LossHessian,
    direction: Direction,
    gradient: Tensor,
    start: NoisyLoss,
    *,
    scales: Sequence[float],
    units: Units = "gradient",
    points: int = 11,
    max_bracket: float = 1000.0,
) -> DirectionScan:
    """Evaluate the loss along a direction, and look for the first minimum on the side on which it falls.

    Args:
        operator: The Hessian at the present parameters.
        direction: The direction.
        gradient: The gradient at the present parameters.
        start: The loss there.
        scales: Half widths of the windows over which loss and model are compared.
        units: What a scale is a multiple of: the gradient's component, or 1 in parameter space.
        points: Evaluations in each window.
        max_bracket: How far to search for a minimum, see `scan_line`.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature import HessianOperator
        >>> from lyapunov_lightning.curvature.directions.scanning import Direction, noisy_start, scan_direction
        >>> x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> scale = torch.tensor([4.0, 1.0], dtype=torch.float64)
        >>> hessian = HessianOperator(lambda batch: (batch * x**2).sum() / 2, [x], [scale])
        >>> axis = Direction(4.0, torch.tensor([1.0, 0.0], dtype=torch.float64))
        >>> gradient = hessian.gradient()
        >>> scan = scan_direction(hessian, axis, gradient, noisy_start(hessian, gradient), scales=[0.1])
        >>> scan.slope, round(scan.line.search.step / scan.slope, 4)
        (4.0, 0.25)

    """
    component = float(operator.space.inner(gradient, direction.vector))
    # An eigenvector's sign is arbitrary: the solver may give either.
    slope, downhill = abs(component), -1.0 if component > 0 else 1.0

    def loss_along(distances: Sequence[float]) -> Tensor:
        return operator.values_along(direction.vector, [downhill * distance for distance in distances])

    # The curvature is the same in both directions of the line, so only the slope has been turned.
    line = scan_line(
        loss_along,
        start,
        slope,
        direction.curvature,
        scales=scales,
        unit=slope if units == "gradient" else 1.0,
        points=points,
        max_bracket=max_bracket,
    )
    return DirectionScan(direction.curvature, slope, line)


def scan_steps(
    operator: LossHessian,
    vector: Tensor,
    start_loss: float,
    components: Sequence[float],
    *,
    lr: float,
    multiples: Sequence[float],
) -> StepScan:
    """Evaluate the loss along a direction at multiples of the steps that SGD would take.

    Args:
        operator: The Hessian at the present parameters.
        vector: The direction, a unit vector.
        start_loss: The loss at the present parameters.
        components: The components of mini-batch gradients along the direction.
        lr: The learning rate.
        multiples: The multiples of each step at which the change of the loss is averaged over the mini-batches.

    """
    # All distances in one call: the operator goes through the data once for all of them.
    steps = [-lr * component for component in components]
    # Of the moduli: steps to both sides cancel in a plain mean, which would be a distance of nearly 0.
    mean_length = sum(map(abs, steps)) / len(steps)
    distances = [multiple * step for multiple in multiples for step in steps]
    distances += [tick * mean_length for tick in SURFACE]
    losses = operator.values_along(vector, distances)
    changes = losses[: -len(SURFACE)].view(len(multiples), -1).mean(dim=1) - start_loss
    return StepScan(mean_length, tuple(changes.tolist()), tuple(losses[-len(SURFACE) :].tolist()), len(distances))


def batch_components(
    operator: LossHessian, vector: Tensor, max_batches: int, *, rank: int = 0, world_size: int = 1
) -> list[float]:
    """The components of mini-batch gradients along a vector, the ranks in turn.

    Args:
        operator: The Hessian, whose batches are used.
        vector: The vector, of shape ``(size,)``.
        max_batches: The largest number of components.
        rank: The rank of a distributed measurement.
        world_size: How many ranks there are; all of them have to call this together.

    """
    # `mean_over_batches` gives one mean to all ranks. For single values each batch of each rank has a slot to itself,
    # in which all others have zeros.
    slots = max_batches * world_size
    number = 0

    def in_own_slot(components: Tensor, _: Tensor) -> Tensor:
        nonlocal number
        entries = components.new_zeros(2, slots)
        slot = number * world_size + rank
        entries[0, slot], entries[1, slot] = components[0], 1.0
        number += 1
        return entries.view(-1)

    means = operator.mean_over_batches(vector[None], in_own_slot, 2 * slots, max_batches)
    means = means.view(2, slots).cpu().double()
    taken = means[1] > 0  # a slot's mean is its entry divided by the number of all batches, and so is its 1
    components: list[float] = (means[0, taken] / means[1, taken]).tolist()
    return components[:max_batches]
