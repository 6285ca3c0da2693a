"""A plane keeps the axes of its first step, through a checkpoint too; other parameters begin another one."""

from typing import Any

import torch

from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.directions.plane import PlaneAxes
from lyapunov_lightning.curvature.tracking.fixed_plane import FixedPlane


def operator(size: int) -> HessianOperator:
    x = torch.ones(size, dtype=torch.float64, requires_grad=True)
    return HessianOperator(lambda batch: x.square().sum(), [x], [1])


def axes(size: int, number: float) -> Any:
    return lambda: PlaneAxes(("1", "min_1"), torch.full((2, size), number, dtype=torch.float64))


def test_the_axes_are_those_of_the_first_step_until_the_parameters_are_others() -> None:
    plane = FixedPlane()
    assert float(plane.axes(operator(3), 5, axes(3, 1.0)).vectors[0, 0]) == 1
    assert float(plane.axes(operator(3), 9, axes(3, 2.0)).vectors[0, 0]) == 1
    assert plane.step == 5
    assert plane.axes(operator(4), 12, axes(4, 3.0)).vectors.shape == (2, 4)
    assert plane.step == 12


def test_the_axes_go_through_a_checkpoint() -> None:
    plane, other = FixedPlane(), FixedPlane()
    before = plane.axes(operator(3), 5, axes(3, 1.0))
    other.load_state_dict(plane.state_dict())
    after = other.axes(operator(3), 9, axes(3, 2.0))
    assert (after.names, other.step) == (before.names, 5)
    assert torch.equal(after.vectors, before.vectors)
    other.load_state_dict(FixedPlane().state_dict())
    assert float(other.axes(operator(3), 9, axes(3, 2.0)).vectors[0, 0]) == 2
