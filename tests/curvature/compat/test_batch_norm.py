"""BatchNorm in evaluation mode equals PyTorch's in value and in every derivative, for fewer passes over its inputs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.compat.batch_norm import batch_norm
from tests.curvature.helpers import relative_error, vector

SHAPES = [(5, 3), (2, 3, 4), (2, 3, 4, 2), (2, 3, 2, 2, 2)]
MEAN, VAR = vector(3, 7), vector(3, 8).square()


def derivatives(function: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Value, gradients, a product, the gradients of a product, and a product of the kept graph once more."""
    inputs = vector(int(torch.tensor(shape).prod())).view(shape)
    points = [x.to(dtype).requires_grad_() for x in (inputs, vector(3, 1), vector(3, 2))]
    output = function(points[0], MEAN.to(dtype), VAR.to(dtype), *points[1:], False, 0.1, 1e-3)
    gradient = torch.autograd.grad(output.sin().sum(), points, create_graph=True)
    along = [torch.linspace(-1, 1, p.numel(), dtype=dtype).view_as(p) for p in points]
    second = torch.autograd.grad(gradient, points, along, create_graph=True)
    again = torch.autograd.grad(gradient, points, along, retain_graph=True)
    third = torch.autograd.grad(sum(s.square().sum() for s in second), points)
    return [tensor.detach() for tensor in (output, *gradient, *second, *again, *third)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_pytorch_up_to_the_third_derivative(shape: tuple[int, ...]) -> None:
    ours, theirs = derivatives(batch_norm, shape), derivatives(functional.batch_norm, shape)
    assert torch.equal(ours[0], theirs[0])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_float32_is_as_near_to_float64_as_pytorchs() -> None:
    exact = derivatives(functional.batch_norm, SHAPES[2])
    for one, other in zip(derivatives(batch_norm, SHAPES[2], torch.float32), exact, strict=True):
        assert relative_error(one, other) <= 1e-5


def test_what_is_left_to_pytorch() -> None:
    x, ones = vector(15).view(5, 3).requires_grad_(), torch.ones(3, dtype=torch.float64)
    affine = {"weight": ones.clone().requires_grad_(), "bias": ones.clone().requires_grad_()}
    theirs = type(functional.batch_norm(x, MEAN, VAR, **affine).grad_fn)
    assert not isinstance(batch_norm(x, MEAN, VAR, **affine).grad_fn, theirs)
    mean, var = MEAN.clone(), VAR.clone()
    assert isinstance(batch_norm(x, mean, var, **affine, training=True).grad_fn, theirs)
    assert not torch.equal(mean, MEAN)
    assert isinstance(batch_norm(x, MEAN, VAR).grad_fn, theirs)
    assert isinstance(batch_norm(x, None, None, **affine, training=True).grad_fn, theirs)
    found, expected = (
        torch.func.jacrev(torch.func.jacfwd(lambda x, f=f: f(x, MEAN, VAR, ones, ones).sin()))(x.detach())
        for f in (batch_norm, functional.batch_norm)
    )
    assert torch.equal(found, expected)


class Passes(TorchDispatchMode):
    """Counts the operations on tensors of a size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, result) if isinstance(x, Tensor)]
        is_view = func.overloadpacket.__name__ in ("view", "expand", "detach", "t", "alias")
        self.count += not is_view and any(x.numel() == self.size for x in tensors)
        return result


def test_a_product_takes_a_third_of_the_passes() -> None:
    counts = []
    for function in (functional.batch_norm, batch_norm):
        points = [x.requires_grad_() for x in (vector(48).view(4, 3, 2, 2), vector(3, 1), vector(3, 2))]
        output = function(points[0], MEAN, VAR, *points[1:])
        gradient = torch.autograd.grad(output, points, torch.ones_like(output), create_graph=True)
        cotangents = [torch.ones_like(entry) for entry in gradient]
        with Passes(48) as passes:
            torch.autograd.grad(
                [g for g in gradient if g.requires_grad],
                points[:2],
                [c for g, c in zip(gradient, cotangents, strict=True) if g.requires_grad],
            )
        counts.append(passes.count)
    assert counts[1] <= counts[0] / 3


@pytest.mark.parametrize("training", [False, True])
def test_products_of_a_network_are_exact(training: bool) -> None:
    """Also in training mode, where it is PyTorch's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 2, bias=False), nn.BatchNorm1d(2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 1))
    model = model.double()
    inputs = vector(20).view(5, 1, 4)
    model(inputs)
    model.train(training)
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(model(inputs).square().mean(), parameters, create_graph=True)
    flat = torch.cat([entry.reshape(-1) for entry in gradient])
    operator = HessianOperator(lambda x: model(x).square().mean(), parameters, [inputs], method="double_backward")
    direction = vector(operator.size, 3)
    product = torch.autograd.grad(flat @ direction, parameters)
    expected = torch.cat([entry.reshape(-1) for entry in product])
    for _ in range(2):
        assert relative_error(operator.matvec(direction), expected) <= 1e-12
