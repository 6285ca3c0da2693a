"""What a message says to do, done on the case that brings it up."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lyapunov_lightning.curvature import HessianOperator, MeasurementError, NonFiniteCurvatureError, lanczos
from lyapunov_lightning.curvature.loss.fixed_batches import Evaluation


class Adjoint(torch.autograd.Function):
    """Takes a parameter in directly and has one derivative only, as the adjoint method of an ODE solver."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(weight, x)
        return (weight * x).sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight, x = ctx.saved_tensors
        return gradient * x * (weight * x).cos(), None


class Kept:
    """A loss that puts the values into the parameter itself."""

    def __init__(self, weight: nn.Parameter) -> None:
        self._weight = weight

    @contextmanager
    def evaluated(self, batch: Tensor, values: Sequence[Tensor] | None = None) -> Iterator[Evaluation]:
        weight = self._weight.detach().clone() if values is None else values[0].detach().clone()
        leaf = weight.requires_grad_()
        yield Evaluation(Adjoint.apply(leaf, batch).square().sum(), [leaf], lambda: 1.0, owner=self)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_function_of_a_parameter_with_one_derivative_is_measured_by_each_way_that_is_named() -> None:
    weight = nn.Parameter(torch.tensor([0.3, 0.8, 1.1], dtype=torch.float64))
    x = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    expected = float((2 * x.square() * (2 * weight * x).cos()).max())
    direct = HessianOperator(lambda batch: Adjoint.apply(weight, batch).square().sum(), [weight], [x])
    assert float(lanczos(direct).values) == pytest.approx(expected, rel=1e-4)
    twice = HessianOperator(
        lambda batch: Adjoint.apply(weight, batch).square().sum(), [weight], [x], method="double_backward"
    )
    with pytest.raises(MeasurementError, match="'finite_difference', which needs one derivative only"):
        lanczos(twice)
    plain = HessianOperator(lambda batch: (weight * batch).sin().square().sum(), [weight], [x])
    assert float(lanczos(plain).values) == pytest.approx(expected, rel=1e-9)
    given = HessianOperator(Kept(weight), [weight], [x], method="finite_difference")
    assert float(lanczos(given).values) == pytest.approx(expected, rel=1e-4)


def of_sinc(weight: Tensor) -> Tensor:
    return torch.sinc(weight).sum() + weight.square().sum()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("loss", "expected"),
    [(of_sinc, 2 - torch.pi**2 / 3)],
)
def test_a_second_derivative_that_is_nan_is_had_from_differences(
    loss: Callable[[Tensor], Tensor], expected: float
) -> None:
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    assert bool(torch.isfinite(torch.autograd.grad(loss(weight), weight)[0]).all())
    exact = HessianOperator(lambda batch: loss(weight), [weight], [weight.detach()])
    with pytest.raises(NonFiniteCurvatureError):
        lanczos(exact)
    differences = HessianOperator(lambda batch: loss(weight), [weight], [weight.detach()], method="finite_difference")
    assert float(lanczos(differences).values) == pytest.approx(expected, rel=2e-3)


def test_grid_sample_has_a_second_derivative() -> None:
    grid = nn.Parameter(torch.full((1, 2, 2, 2), 0.2, dtype=torch.float64))
    image = torch.arange(9.0, dtype=torch.float64).view(1, 1, 3, 3).sin()
    operator = HessianOperator(
        lambda batch: functional.grid_sample(batch, grid, align_corners=True).square().sum(), [grid], [image]
    )
    check = operator.check(finite_difference=True)
    assert operator.method == "double_backward"
    assert check.inexactness is not None
    assert check.inexactness < 1e-5
