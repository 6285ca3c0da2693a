"""Convolutions equal PyTorch's in value and in every derivative."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.compat.convolution import convolution

PLAIN = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def tensors(dimensions: int, groups: int, size: int = 6, kernel: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dimensions)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    spatial = [size + i for i in range(dimensions)]
    return draw(2, 2 * groups, *spatial), draw(3 * groups, 2, *[kernel] * dimensions), draw(3 * groups)


def derivatives(function: Any, inputs: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> list[Tensor]:
    """Value, gradients, and the derivatives of the gradients along a direction, for a loss that is not quadratic."""
    points = [inputs, weight, bias]
    output = function(inputs, weight, bias, **options)
    gradient = torch.autograd.grad(output.tanh().square().sum(), points, create_graph=True)
    direction = [torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view_as(p) for p in points]
    along = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
    second = torch.autograd.grad(along, points, create_graph=True)
    third = torch.autograd.grad(sum(s.square().sum() for s in second), points)
    return [output, *gradient, *second, *third]


@settings(max_examples=60, deadline=None)
@given(
    dimensions=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.integers(1, 2),
    kernel=st.integers(1, 3),
)
def test_equals_pytorch_up_to_the_third_derivative(
    dimensions: int, stride: int, padding: int, dilation: int, groups: int, kernel: int
) -> None:
    given_tensors = tensors(dimensions, groups, kernel=kernel)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    ours = derivatives(convolution, *given_tensors, **options)
    theirs = derivatives(PLAIN[dimensions], *given_tensors, **options)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (4, 1), (2, 3), (1, 1)])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_padding_by_name(dimensions: int, padding: str, kernel: int, dilation: int) -> None:
    inputs, weight, bias = tensors(dimensions, 1, kernel=kernel)
    ours = convolution(inputs, weight, bias, padding=padding, dilation=dilation)
    torch.testing.assert_close(ours, PLAIN[dimensions](inputs, weight, bias, padding=padding, dilation=dilation))


def test_a_single_sample_and_no_bias() -> None:
    inputs, weight, _ = tensors(2, 1)
    torch.testing.assert_close(convolution(inputs[0], weight), functional.conv2d(inputs[0], weight))


def test_numbers_may_be_given_for_each_dimension() -> None:
    inputs, weight, bias = tensors(2, 1)
    options: dict[str, Any] = {"stride": (2, 1), "padding": (0, 2), "dilation": [1]}
    torch.testing.assert_close(
        convolution(inputs, weight, bias, **options), functional.conv2d(inputs, weight, bias, **options)
    )


@pytest.mark.parametrize("which", ["inputs", "weight", "both"])
def test_forward_derivative_of_the_gradient(which: str) -> None:
    inputs, weight, bias = tensors(2, 1)
    tangent_of_inputs, tangent_of_weight = torch.ones_like(inputs), torch.ones_like(weight)

    def of_gradient(function: Any) -> tuple[Tensor, ...]:
        with forward_ad.dual_level():
            x, w = inputs.detach().requires_grad_(), weight.detach().requires_grad_()
            dual_x = forward_ad.make_dual(x, tangent_of_inputs) if which != "weight" else x
            dual_w = forward_ad.make_dual(w, tangent_of_weight) if which != "inputs" else w
            gradient = torch.autograd.grad(function(dual_x, dual_w, bias).tanh().sum(), (x, w))
            return tuple(forward_ad.unpack_dual(g).tangent for g in gradient)

    for one, other in zip(of_gradient(convolution), of_gradient(functional.conv2d), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_per_sample_gradients_of_the_users_go_through() -> None:
    inputs, weight, _ = tensors(2, 1)

    def loss(w: Tensor, x: Tensor, conv: Any) -> Tensor:
        return conv(x.unsqueeze(0), w).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, None))
    expected = per_sample(weight.detach(), inputs.detach(), functional.conv2d)
    torch.testing.assert_close(per_sample(weight.detach(), inputs.detach(), convolution), expected)


def test_autocast_reaches_it() -> None:
    inputs, weight, bias = (tensor.float() for tensor in tensors(2, 1))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = convolution(inputs, weight, bias), functional.conv2d(inputs, weight, bias)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_operator_of_a_convolutional_network(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"), nn.Tanh(), nn.Conv2d(3, 2, 2, stride=2, groups=1)
    ).to(torch.float64, memory_format=memory_format)
    batch = torch.randn(4, 2, 5, 5, dtype=torch.float64).to(memory_format=memory_format)
    parameters = dict(net.named_parameters())
    hessian = HessianOperator(lambda x: net(x).square().mean(), parameters.values(), [batch])

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([p.numel() for p in parameters.values()])
        values = {name: piece.view_as(p) for (name, p), piece in zip(parameters.items(), pieces, strict=True)}
        return torch.func.functional_call(net, values, batch).square().mean()

    flat = torch.cat([p.detach().reshape(-1) for p in parameters.values()])
    dense = torch.autograd.functional.hessian(loss, flat)
    products = torch.stack([hessian.matvec(row) for row in torch.eye(len(flat), dtype=torch.float64)])
    torch.testing.assert_close(products, dense, rtol=1e-10, atol=1e-12)
    along = HessianOperator(
        lambda x: net(x).square().mean(), parameters.values(), [batch], method="forward_over_reverse"
    )
    torch.testing.assert_close(along.matvec(flat), dense @ flat, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("how", ["double_backward", "auto"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_complex_convolutions_are_those_of_pytorch(dimensions: int, how: str) -> None:
    """Whose gradients, as functions of their own, have no complex kernel."""
    torch.manual_seed(0)
    shape, image = (2, 1, *[2] * dimensions), (3, 1, *[4] * dimensions)
    weight = torch.randn(*shape, 2, dtype=torch.float64, requires_grad=True)
    batch = torch.randn(image, dtype=torch.complex128)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[dimensions - 1]

    def loss(x: Tensor, real: Tensor) -> Tensor:
        return convolve(x, torch.view_as_complex(real), stride=2).abs().square().tanh().mean()

    dense = torch.autograd.functional.hessian(lambda real: loss(batch, real), weight.detach())
    operator = HessianOperator(lambda x: loss(x, weight), [weight], [batch], method=how)
    direction = torch.randn(operator.size, dtype=torch.float64)
    expected = dense.reshape(operator.size, operator.size) @ direction
    torch.testing.assert_close(operator.matvec(direction), expected, rtol=1e-10, atol=1e-12)
    assert operator.method == "double_backward"


class Calls(TorchDispatchMode):
    """Counts the convolutions and their backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_both_gradients_are_one_call_in_gradient_and_product() -> None:
    """Of a layer in the middle of a network; nothing is copied to make PyTorch compute one from the other."""
    inputs, weight, _ = tensors(2, 1)
    with Calls() as calls:
        output = convolution(inputs, weight).tanh().sum()
        gradient = torch.autograd.grad(output, (inputs, weight), create_graph=True)
    assert (calls.count["convolution"], calls.count["convolution_backward"]) == (1, 1)
    with Calls() as calls:
        torch.autograd.grad(gradient, (inputs, weight), [torch.ones_like(g) for g in gradient], retain_graph=True)
    assert (calls.count["convolution"], calls.count["convolution_backward"]) == (2, 2)


def test_one_gradient_alone_copies_no_numbers_for_what_pytorch_looks_at_by_shape() -> None:
    inputs, weight, _ = tensors(2, 1)
    with Calls() as calls:
        for frozen in (inputs, weight):
            output = convolution(*(x.detach() if x is frozen else x for x in (inputs, weight))).tanh().sum()
            torch.autograd.grad(output, weight if frozen is inputs else inputs, create_graph=True)
    assert calls.count["expand"] == 1 + 1  # of the sum
