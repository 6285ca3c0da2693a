"""Planes: their axes, the loss on them beside closed forms, and the scale of random directions filter by filter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lyapunov_lightning.curvature import HessianOperator, MeasurementError, lanczos
from lyapunov_lightning.curvature.directions.plane import (
    Plane,
    PlaneAxes,
    as_plane,
    filter_normalised,
    plane_axes,
    scan_plane,
)
from tests.problems import cnn, mlp

SCALE = torch.tensor([5.0, 3.0, 1.0, -2.0], dtype=torch.float64)


def quadratic(*place: float) -> HessianOperator:
    x = torch.tensor(place, dtype=torch.float64, requires_grad=True)
    return HessianOperator(lambda scale: (scale * x**2).sum() / 2, [x], [SCALE], weights=[1])


def value_of(place: Tensor) -> float:
    return float((SCALE * place**2).sum() / 2)


def test_the_loss_on_a_plane_of_eigenvectors_is_that_at_its_points() -> None:
    hessian = quadratic(1.0, -2.0, 0.5, 4.0)
    place = hessian.parameters[0].detach()
    pairs = lanczos(hessian, largest=1, smallest=1, tol=1e-10)
    axes = plane_axes(hessian, "eigenvectors", pairs=pairs, names=["1", "min_1"])
    scanned = scan_plane(hessian, axes, Plane(points=5, reach=0.4))
    assert scanned.names == ("1", "min_1")
    assert scanned.lengths == pytest.approx((float(place.norm()),) * 2)
    assert scanned.coordinates.tolist() == pytest.approx([-0.4, -0.2, 0.0, 0.2, 0.4])
    for i, x in enumerate(scanned.coordinates):
        for j, y in enumerate(scanned.coordinates):
            assert float(scanned.losses[i, j]) == pytest.approx(
                value_of(place + x * axes.vectors[0] + y * axes.vectors[1]), rel=1e-9
            )
    assert scanned.improvement == pytest.approx(float(scanned.losses[2, 2] - scanned.losses.min()))


def test_a_plane_takes_one_pass_over_the_batches_for_each_point() -> None:
    problem, calls = mlp(), 0

    def counting(batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return problem.loss(batch)

    hessian = HessianOperator(counting, problem.parameters, problem.batches)
    axes = plane_axes(hessian, "random")
    hessian.values_along(axes.vectors[0], [0.0])  # the first evaluation finds out how to evaluate
    calls = 0
    scan_plane(hessian, axes, Plane("random", points=3))
    assert calls == 9 * len(problem.batches)


def test_the_gradient_stands_upright_on_the_first_eigenvector() -> None:
    hessian = quadratic(1.0, -2.0, 0.5, 4.0)
    gradient = hessian.gradient()
    pairs = lanczos(hessian, largest=1, tol=1e-10)
    axes = plane_axes(hessian, "gradient", pairs=pairs, names=["1"], gradient=gradient)
    first, second = axes.vectors
    assert axes.names == ("1", "gradient")
    assert float(first @ second) == pytest.approx(0, abs=1e-8)
    # The gradient lies in the plane, on the side to which the second axis points.
    rest = gradient - axes.vectors.T @ torch.linalg.lstsq(axes.vectors.T, gradient[:, None]).solution[:, 0]
    assert float(rest.norm()) < 1e-8 * float(gradient.norm())
    assert float(second @ gradient) > 0


def test_a_gradient_along_the_eigenvector_spans_no_plane() -> None:
    hessian = quadratic(1.0, 0.0, 0.0, 0.0)
    pairs = lanczos(hessian, largest=1, tol=1e-12)
    with pytest.raises(MeasurementError, match="span no plane"):
        plane_axes(hessian, "gradient", pairs=pairs, names=["1"], gradient=hessian.gradient())


class Layers(nn.Module):
    """A layer of each kind of which the definition says something."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 3, 2)
        self.norm = nn.BatchNorm2d(3)
        self.linear = nn.Linear(12, 4)


def test_random_directions_have_the_norm_of_each_filter_and_leave_vectors_alone() -> None:
    torch.manual_seed(0)
    model = Layers().double()
    with torch.no_grad():
        model.linear.weight[2] = 0  # a filter of zeros has a direction of zeros
    hessian = HessianOperator(lambda batch: sum(p.square().sum() for p in model.parameters()), model.parameters(), [1])
    direction = filter_normalised(hessian, torch.Generator().manual_seed(1))
    drawn = torch.randn(hessian.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pieces, numbers = hessian.layout.split(direction), hessian.layout.split(drawn)
    for (name, weight), piece, number in zip(model.named_parameters(), pieces, numbers, strict=True):
        if weight.ndim == 1:
            assert not piece.any(), name
            continue
        for d, random, w in zip(piece, number, weight, strict=True):
            # d/‖d‖ · ‖w‖, of all numbers of one output of a convolution, or of one row of a linear layer
            assert torch.allclose(d, random / random.norm() * w.norm(), rtol=1e-12, atol=0)


def test_without_filters_there_is_no_random_plane() -> None:
    with pytest.raises(MeasurementError, match="no parameter here has filters"):
        plane_axes(quadratic(1.0, 2.0, 3.0, 4.0), "random")


def test_the_two_random_directions_are_two_and_the_same_for_a_seed() -> None:
    hessian = cnn().operator()
    first, again, other = (plane_axes(hessian, "random", seed=seed).vectors for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    cosine = float(first[0] @ first[1] / (first[0].norm() * first[1].norm()))
    assert abs(cosine) < 0.5


@settings(deadline=None, max_examples=50, derandomize=True)
@given(seed=st.integers(0, 1000), x=st.floats(-2, 2), y=st.floats(-2, 2))
def test_the_position_moves_by_what_the_parameters_move_on_the_plane(seed: int, x: float, y: float) -> None:
    """Also where the axes are not orthogonal, and whatever else the parameters do."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    orthogonal = torch.linalg.qr(vectors.T, mode="complete").Q[:, 2:] @ torch.ones(2, dtype=torch.float64)
    axes, hessian = PlaneAxes(("1", "2"), vectors), quadratic(1.0, 2.0, 3.0, 4.0)
    before = axes.position(hessian)
    with torch.no_grad():
        hessian.parameters[0].add_(x * vectors[0] + y * vectors[1] + 3 * orthogonal)
    after = axes.position(hessian)
    assert (after[0] - before[0], after[1] - before[1]) == pytest.approx((x, y), abs=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"directions": "top"}, "`plane.directions` should be one of eigenvectors, gradient, random, got 'top'."),
        ({"points": 4}, "`plane.points` should be an odd int of at least 3, got 4."),
        ({"points": 1}, "`plane.points` should be an odd int of at least 3, got 1."),
        ({"reach": 0.0}, "`plane.reach` should be a positive float, got 0.0."),
    ],
)
def test_bad_planes_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plane(**arguments)  # type: ignore[arg-type]


def test_a_plane_says_how_many_eigenvectors_it_takes() -> None:
    for plane, count in (("eigenvectors", 2), ("gradient", 1), ("random", 0)):
        made = as_plane(plane)  # type: ignore[arg-type]
        made.check_eigenvectors(count)
        if count:
            with pytest.raises(ValueError, match=f"takes {count} eigenvector"):
                made.check_eigenvectors(count - 1)
    assert as_plane(None) is None


@pytest.mark.parametrize("direction", ["random", "eigenvectors"])
def test_planes_reach_as_far_as_is_sensible_for_their_directions(direction) -> None:
    where = Plane(direction, points=3).coordinates
    assert where == ((-1.0, 0.0, 1.0) if direction == "random" else (-0.05, 0.0, 0.05))
