"""The batch sharpness and the agreement of batches, against dense matrices and against what real optimizers bear."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.linear import ScaledOperator
from lyapunov_lightning.curvature.stability import stability_of
from lyapunov_lightning.curvature.tracking.batch_sharpness import (
    BatchSharpness,
    Comparison,
    StepCurvature,
    compared,
    glanced_step,
    step_curvature,
    step_direction,
)
from tests.curvature.helpers import DenseOperator, symmetric_matrix

SIZE = 5


def vector(seed: int, size: int = SIZE) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_numbers_are_those_of_the_dense_matrices(preconditioned):
    own, other = symmetric_matrix([5.0, 2.0, 1.0, 0.5, -1.0], 0), symmetric_matrix([4.0, 3.0, 1.0, 0.1, -2.0], 1)
    gradient, other_gradient = vector(2), vector(3)
    scale = vector(4).abs() + 0.1 if preconditioned else None
    # For Adam the direction is P⁻¹g, and curvature and slope are taken along it.
    along = gradient if scale is None else scale**2 * gradient
    along_other = other_gradient if scale is None else scale**2 * other_gradient

    def matrix(dense: Tensor) -> Any:
        return DenseOperator(dense) if scale is None else ScaledOperator(DenseOperator(dense), scale)

    direction = step_direction(gradient, scale)
    seen, product = step_curvature(matrix(own), direction)
    assert seen.slope == pytest.approx(float(gradient @ along))
    assert seen.curvature == pytest.approx(float(along @ own @ along))
    found = compared(seen, direction, product, matrix(other), step_direction(other_gradient, scale))
    assert found.slope == pytest.approx(float(other_gradient @ along))
    assert found.curvature == pytest.approx(float(along @ other @ along))
    assert found.crossed == pytest.approx(float(along_other @ own @ along))


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3, maximize=True),
        lambda p: torch.optim.SGD([{"params": p[:1]}, {"params": p[1:], "lr": 0.02, "weight_decay": 0.5}], lr=0.1),
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.2),
    ],
    ids=["momentum", "decay, maximize", "groups", "adam"],
)
def test_three_losses_give_what_a_product_does(optimizer):
    # A quadratic, so that the second difference is exact; decay is no part of the loss.
    dense = symmetric_matrix([5.0, 2.0, 1.0, 0.5, -1.0], 0)
    first, second = (part.clone().requires_grad_() for part in vector(1).split([2, 3]))
    parameters = [first, second]
    made = optimizer(parameters)

    def loss(batch: Tensor) -> Tensor:
        x = torch.cat(parameters)
        return x @ batch @ x / 2

    loss(dense).backward()
    made.step()
    hessian = HessianOperator(loss, parameters, [dense])
    gradient = hessian.gradient()
    stability = stability_of(made, parameters, hessian.layout, gradient)
    assert stability is not None
    exact, _ = step_curvature(stability.matrix(hessian), step_direction(gradient, stability.scale))
    found = glanced_step(hessian, gradient, stability, stability.limit)
    assert found is not None
    assert found.slope == pytest.approx(exact.slope, rel=1e-12)
    assert found.curvature == pytest.approx(exact.curvature, rel=1e-7)


def test_a_batch_without_a_gradient_is_not_looked_at():
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    hessian = HessianOperator(lambda batch: (batch * x**2).sum(), [x], [torch.ones(2)])
    stability = stability_of(torch.optim.SGD([x], lr=0.1), [x])
    assert stability is not None
    assert glanced_step(hessian, hessian.gradient(), stability, 1.0) == StepCurvature(0.0, 0.0)


def test_equal_batches_agree_wholly():
    sharpness = BatchSharpness()
    for seed in range(4):
        dense, gradient = symmetric_matrix([3.0, 1.0, 0.5, 0.2, 0.1], seed), vector(seed)
        seen, product = step_curvature(DenseOperator(dense), gradient)
        sharpness.see(seen)
        sharpness.compare(compared(seen, gradient, product, DenseOperator(dense), gradient))
    found = sharpness.estimate()
    assert found is not None
    assert found.agreement == pytest.approx(1.0, abs=1e-12)
    assert found.progress == pytest.approx(1.0)


@given(st.lists(st.tuples(st.floats(0.1, 10.0), st.floats(-10.0, 10.0)), min_size=2, max_size=8))
def test_value_and_error_are_those_of_a_ratio_of_means(pairs):
    sharpness = BatchSharpness()
    for slope, curvature in pairs:
        sharpness.see(StepCurvature(slope, curvature))
    found = sharpness.estimate()
    slopes, curvatures = np.array(pairs).T
    assert found is not None
    assert found.value == pytest.approx(curvatures.mean() / slopes.mean(), abs=1e-9)
    spread = np.std(curvatures - found.value * slopes, ddof=1)
    assert found.standard_error == pytest.approx(spread / slopes.mean() / math.sqrt(len(pairs)), abs=1e-9)
    assert found.agreement is None


def test_standard_error_covers_the_truth():
    """Of 300 averages of eight batches two thirds are within one standard error of the ratio of the expectations."""
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        sharpness = BatchSharpness()
        for slope, noise in zip(generator.uniform(0.5, 1.5, 8), generator.normal(0, 0.3, 8), strict=True):
            sharpness.see(StepCurvature(slope, slope * (2 + noise)))
        found = sharpness.estimate()
        assert found is not None
        inside += abs(found.value - 2) <= found.standard_error
    assert 0.55 < inside / 300 < 0.75


def test_without_a_gradient_there_is_nothing_to_say():
    sharpness = BatchSharpness()
    assert sharpness.estimate() is None
    sharpness.see(StepCurvature(0.0, 0.0))
    assert sharpness.estimate() is None
    assert math.isnan(StepCurvature(0.0, 0.0).sharpness)


def test_batches_that_contradict_each_other_agree_least():
    sharpness = BatchSharpness()
    own = StepCurvature(1.0, 2.0)
    sharpness.see(own)
    sharpness.compare(Comparison(own, slope=-1.0, curvature=-1.0, crossed=-1.0))
    found = sharpness.estimate()
    assert found is not None
    assert 0 < found.agreement <= 1e-3
    assert found.progress == -1


def test_curvature_that_is_not_finite_is_an_error():
    with pytest.raises(NonFiniteCurvatureError, match="along its own step"):
        step_curvature(DenseOperator(torch.full((2, 2), math.nan, dtype=torch.float64)), vector(0, 2))


def test_continues_from_its_state():
    sharpness, twin = BatchSharpness(), BatchSharpness()
    for seed in range(12):
        own = StepCurvature(1.0 + seed, 2.0)
        sharpness.see(own)
        sharpness.compare(Comparison(own, 1.0, 0.5 * seed, 0.25))
    twin.load_state_dict(sharpness.state_dict())
    assert twin.estimate() == sharpness.estimate()
    for each in (sharpness, twin):
        each.see(StepCurvature(1.0, 7.0))
    assert twin.estimate() == sharpness.estimate()


# The gauge as a whole: with batches that each see one of two directions, what it measures is exact, and so is the limit
# at the measured agreement.

CURVATURE = 3.0

MAKERS: dict[str, Callable[[list[Tensor], float], torch.optim.Optimizer]] = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "nesterov": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.8, nesterov=True),
    "dampened": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.6, dampening=0.5),
}


def mean_square_after(make: Any, lr: float, steps: int = 300) -> float:
    """The mean of ``|x|²`` over many independent runs of the real optimizer, after some steps from 1."""
    runs = 4000
    x = torch.full((runs, 2), 0.5**0.5, dtype=torch.float64, requires_grad=True)
    optimizer = make([x], lr)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        seen = torch.nn.functional.one_hot(torch.randint(2, (runs,), generator=generator), 2)
        x.grad = CURVATURE * seen * x.detach()
        optimizer.step()
    return float(x.detach().square().sum(dim=1).mean())


@pytest.mark.parametrize("kind", MAKERS)
def test_measured_limit_is_where_the_real_optimizer_turns_unstable(kind):
    point = torch.ones(2, dtype=torch.float64)
    batches = [torch.diag(CURVATURE * torch.eye(2, dtype=torch.float64)[place]) for place in range(2)]
    sharpness = BatchSharpness()
    for own in batches:
        for other in batches:
            seen, product = step_curvature(DenseOperator(own), own @ point)
            sharpness.see(seen)
            sharpness.compare(compared(seen, own @ point, product, DenseOperator(other), other @ point))
    found = sharpness.estimate()
    assert found is not None
    assert found.value == pytest.approx(CURVATURE)
    assert found.agreement == pytest.approx(0.5)
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    stability = stability_of(MAKERS[kind]([x], 1.0), [x])
    assert stability is not None
    edge = stability.limit_at(found.agreement) / found.value
    assert mean_square_after(MAKERS[kind], 0.9 * edge) < 0.1
    # Well beyond: near the edge the mean is carried by runs too rare to be among these.
    assert mean_square_after(MAKERS[kind], 2.5 * edge) > 10
