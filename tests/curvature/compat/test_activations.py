"""Activations equal PyTorch's in value and in every derivative, and a product computes neither of these anew."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.compat.activations import gelu, silu
from lyapunov_lightning.curvature.compat.operations import TwiceDifferentiableOperations
from tests.curvature.helpers import relative_error, vector

ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any]]] = {
    "gelu": (gelu, functional.gelu, {}),
    "gelu by tanh": (gelu, functional.gelu, {"approximate": "tanh"}),
    "silu": (silu, functional.silu, {}),
}
every_activation = pytest.mark.parametrize("name", ACTIVATIONS)


def up_to_the_third(function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Value, gradient, and what a product and the gradient of a product are, of a loss that is not quadratic."""
    x = x.clone().requires_grad_()
    value = function(x)
    along = torch.linspace(-1, 1, len(x), dtype=x.dtype)
    (first,) = torch.autograd.grad(value.sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first @ along, x, create_graph=True)
    (kept,) = torch.autograd.grad(first @ along, x, retain_graph=True)
    (third,) = torch.autograd.grad(second @ along, x)
    return [tensor.detach() for tensor in (value, first, second, kept, third)]


@every_activation
def test_equals_pytorch_up_to_the_third_derivative(name: str) -> None:
    ours, theirs, options = ACTIVATIONS[name]
    x = torch.linspace(-8, 8, 161, dtype=torch.float64)
    found = up_to_the_third(lambda x: ours(x, **options), x)
    for one, other in zip(found, up_to_the_third(lambda x: theirs(x, **options), x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[0], theirs(x, **options))


@every_activation
def test_float32_is_as_near_to_float64_as_pytorchs(name: str) -> None:
    ours, theirs, options = ACTIVATIONS[name]
    x = torch.linspace(-8, 8, 161)
    exact = up_to_the_third(lambda x: theirs(x, **options), x.double())
    found = up_to_the_third(lambda x: ours(x, **options), x)
    for one, other in zip(found[:4], exact[:4], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_activation
def test_half_precision_is_pytorchs(name: str, dtype: torch.dtype) -> None:
    ours, theirs, options = ACTIVATIONS[name]
    x = vector(5).to(dtype).requires_grad_()
    assert type(ours(x, **options).grad_fn) is type(theirs(x, **options).grad_fn)


@every_activation
def test_transforms_and_forward_mode_go_through(name: str) -> None:
    ours, theirs, options = ACTIVATIONS[name]
    x = vector(5).requires_grad_()
    found, expected = (torch.func.jacrev(torch.func.jacfwd(lambda x, f=f: f(x, **options)))(x) for f in (ours, theirs))
    assert torch.equal(found, expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangents = [forward_ad.unpack_dual(f(dual, **options)).tangent for f in (ours, theirs)]
    assert torch.equal(*tangents)


def test_in_place_is_pytorchs() -> None:
    x = vector(3)
    given_tensor = x.clone()
    with TwiceDifferentiableOperations():
        assert nn.SiLU(inplace=True)(given_tensor) is given_tensor
    assert torch.equal(given_tensor, functional.silu(x))
    with TwiceDifferentiableOperations(), pytest.raises(RuntimeError, match="approximate"):
        functional.gelu(x, approximate="sine")


class Expensive(TorchDispatchMode):
    """Counts exponentials, error functions and their kin."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__.split("_")[0] in ("exp", "erf", "erfc", "tanh", "sigmoid", "special")
        return func(*args, **(kwargs or {}))


def product_of(loss: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    return lambda: torch.autograd.grad(gradient, x, torch.ones_like(x), retain_graph=True)[0]


@every_activation
def test_pytorch_computes_both_derivatives_anew_in_each_product_and_the_repair_none(name: str) -> None:
    ours, theirs, options = ACTIVATIONS[name]
    counts = []
    for function in (theirs, ours):
        product = product_of(lambda x, f=function: f(x, **options).square().sum(), vector(4))
        with Expensive() as expensive:
            product()
        counts.append(expensive.count)
    assert counts[0] > 0
    assert counts[1] == 0


@every_activation
def test_products_of_a_network_are_exact(name: str) -> None:
    _, theirs, options = ACTIVATIONS[name]
    inputs = vector(12).view(4, 3)

    def loss(weight: Tensor) -> Tensor:
        return theirs(theirs(inputs @ weight.view(3, 2), **options).cumsum(1), **options).square().mean()

    weight = vector(6, 1).requires_grad_()
    operator = HessianOperator(lambda _: loss(weight), [weight], [inputs], method="double_backward")
    expected = torch.autograd.functional.hessian(loss, weight.detach()) @ vector(6, 2)
    for _ in range(2):
        assert relative_error(operator.matvec(vector(6, 2)), expected) <= 1e-12
