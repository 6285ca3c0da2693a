"""Exact products for losses, layers and functions of all kinds: right, or refused."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lyapunov_lightning.curvature import HessianOperator, MeasurementError
from tests.curvature.helpers import relative_error, vector
from tests.curvature.zoo import CASES, CONSTANTS, NOT_FORWARD, NOT_TWICE, WRONG_IN_PYTORCH


def gradients_along(case: nn.Module, direction: Tensor) -> Callable[[float], Tensor]:
    """The gradient at a distance from the parameters, by PyTorch alone."""
    names = [name for name, _ in case.named_parameters()]
    parameters = list(case.parameters())
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])

    def gradient(distance: float) -> Tensor:
        moved = (flat + distance * direction).requires_grad_()
        pieces = moved.split([parameter.numel() for parameter in parameters])
        values = {n: piece.view(p.shape) for n, piece, p in zip(names, pieces, parameters, strict=True)}
        with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
            torch.manual_seed(7)
            return torch.autograd.grad(functional_call(case, values, ()), moved)[0]

    return gradient


def difference(gradient: Callable[[float], Tensor], step: float = 1e-3) -> Tensor:
    """Of sixth order: off by 1e-9 of the gradient or so."""

    def fourth(h: float) -> Tensor:
        return (8 * (gradient(h) - gradient(-h)) - (gradient(2 * h) - gradient(-2 * h))) / (12 * h)

    return (16 * fourth(step / 2) - fourth(step)) / 15


def by_double_backward(case: nn.Module, direction: Tensor) -> Tensor:
    """The product by PyTorch alone."""
    parameters = list(case.parameters())
    pieces = direction.split([parameter.numel() for parameter in parameters])
    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(7)
        gradient = torch.autograd.grad(case(), parameters, create_graph=True)
        products = torch.autograd.grad(
            gradient,
            parameters,
            [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)],
            materialize_grads=True,
        )
    return torch.cat([product.reshape(-1) for product in products])


@pytest.mark.parametrize("name", CASES)
def test_exact_products_are_right_or_refused(name: str) -> None:
    case = CASES[name]()
    direction = vector(sum(parameter.numel() for parameter in case.parameters()), seed=3)
    direction /= direction.norm()
    short = name.partition("-")[2]
    expected = None if name in CONSTANTS else difference(gradients_along(case, direction))
    exact = None
    if name not in WRONG_IN_PYTORCH and short not in NOT_TWICE:
        exact = by_double_backward(case, direction)
    for method, cannot in (("double_backward", NOT_TWICE), ("forward_over_reverse", NOT_FORWARD)):
        torch.manual_seed(7)
        operator = HessianOperator(lambda _: case(), case.parameters(), [torch.ones(1)], method=method)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of old functions
            try:
                products = [operator.matvec(direction) for _ in range(2)]
            except MeasurementError:
                assert short in cannot
                continue
        for product in products:
            if exact is not None:
                assert relative_error(product, exact) <= 1e-10
            if expected is not None:
                assert relative_error(product, expected) <= 1e-6


def test_the_losses_and_layers_are_as_many_as_they_should_be() -> None:
    assert len(CASES) >= 340
