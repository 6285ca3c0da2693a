"""GELU and SiLU whose derivatives are computed once and kept, where PyTorch computes them anew in each product.

An activation ``y = f(x)`` enters a product of a kept graph by two numbers an element, its slope ``f'(x)`` and, with the
gradient ``ẏ`` that came in, its bend ``ẏ·f''(x)``. PyTorch keeps ``x`` and ``ẏ``, and each product calls the error
function or the hyperbolic tangent, and a dozen operations more.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lyapunov_lightning.curvature.compat.plain import is_plain


class _Activation(NamedTuple):
    """A function of one number with its first two derivatives, which are differentiable themselves."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    curvature: Callable[[Tensor], Tensor]


class _Applied(torch.autograd.Function):
    """The activation."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, activation: _Activation) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(inputs, activation.slope(inputs))
        return activation.value(inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        inputs, slope = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return grad * slope, None
        gradient: Tensor = _Gradient.apply(grad, inputs, slope, ctx.activation)
        return gradient, None


class _Gradient(torch.autograd.Function):
    """The outputs' gradient and the inputs to the inputs' gradient, by the slope at these."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, inputs: Tensor, slope: Tensor, activation: _Activation) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(grad, inputs, slope, activation.curvature(inputs).mul_(grad))
        return grad * slope

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad, inputs, slope, bend = ctx.saved_tensors
        # What was kept is constant to autograd. Where the product is to be differentiated itself, as that of a loss
        # which has a product in it, both numbers are computed anew.
        if torch.is_grad_enabled():
            slope, bend = ctx.activation.slope(inputs), ctx.activation.curvature(inputs) * grad
        return cotangent * slope, cotangent * bend, None, None


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """``torch.nn.functional.gelu``."""
    known = {"none": _GELU, "tanh": _TANH_GELU}.get(approximate)
    if known is None or not is_plain(input):
        return functional.gelu(input, approximate=approximate)
    output: Tensor = _Applied.apply(input, known)
    return output


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.silu``."""
    if inplace or not is_plain(input):
        return functional.silu(input, inplace=inplace)
    output: Tensor = _Applied.apply(input, _SILU)
    return output


def _gelu_slope(x: Tensor) -> Tensor:
    slope: Tensor = torch.special.ndtr(x) + x * _normal_density(x)
    return slope


def _gelu_curvature(x: Tensor) -> Tensor:
    return (2 - x * x) * _normal_density(x)


def _normal_density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))


_SCALE, _CUBIC = math.sqrt(2 / math.pi), 0.044715
"""Of the argument of the hyperbolic tangent, ``0.798 (x + 0.0447 x³)``, as in PyTorch."""


def _tanh_gelu_slope(x: Tensor) -> Tensor:
    square = x * x
    tanh = torch.tanh(_SCALE * x * (1 + _CUBIC * square))
    rate = _SCALE * (1 + 3 * _CUBIC * square)
    return 0.5 * (1 + tanh + x * (1 - tanh * tanh) * rate)


def _tanh_gelu_curvature(x: Tensor) -> Tensor:
    square = x * x
    tanh = torch.tanh(_SCALE * x * (1 + _CUBIC * square))
    rate = _SCALE * (1 + 3 * _CUBIC * square)
    return (1 - tanh * tanh) * (rate + x * x * (3 * _CUBIC * _SCALE) - x * tanh * rate * rate)


def _silu_slope(x: Tensor) -> Tensor:
    share = torch.sigmoid(x)
    return share * (1 + x * (1 - share))


def _silu_curvature(x: Tensor) -> Tensor:
    share = torch.sigmoid(x)
    return share * (1 - share) * (2 + x * (1 - 2 * share))


_GELU = _Activation(functional.gelu, _gelu_slope, _gelu_curvature)
_TANH_GELU = _Activation(lambda x: functional.gelu(x, approximate="tanh"), _tanh_gelu_slope, _tanh_gelu_curvature)
_SILU = _Activation(functional.silu, _silu_slope, _silu_curvature)
