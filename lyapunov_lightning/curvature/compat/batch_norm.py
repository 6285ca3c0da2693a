"""BatchNorm in evaluation mode, whose second derivative costs a few passes over its inputs.

With its running statistics it is an affine map of each channel, whose gradients are bilinear in inputs, gradient and
weight. PyTorch differentiates these by a formula that holds in training mode too, and takes dozens of passes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lyapunov_lightning.curvature.compat.plain import is_plain


class _Applied(torch.autograd.Function):
    """The layer."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(inputs, weight, mean, var)
        return functional.batch_norm(inputs, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_Gradients.apply(grad, inputs, weight, mean, var, ctx.eps), None, None, None
        wanted = ctx.needs_input_grad[:3]
        return *_gradients(grad, inputs, weight, mean, var, ctx.eps, wanted), None, None, None


class _Gradients(torch.autograd.Function):
    """The outputs' gradient, the inputs and the weight to the gradients of inputs, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, inputs: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        ctx.eps = eps
        ctx.save_for_backward(grad, inputs, weight, mean, var)
        return _gradients(grad, inputs, weight, mean, var, eps, (True, True, True))

    @staticmethod
    def backward(ctx: Any, of_inputs: Tensor, of_weight: Tensor, of_bias: Tensor) -> tuple[Tensor | None, ...]:
        grad, inputs, weight, mean, var = ctx.saved_tensors
        shape = (-1, *[1] * (inputs.ndim - 2))
        rate = torch.rsqrt(var + ctx.eps)
        rates = rate.view(shape)
        if torch.is_grad_enabled():
            standard = (inputs - mean.view(shape)) * rates
            for_grad = of_inputs * (weight.view(shape) * rates) + standard * of_weight.view(shape) + of_bias.view(shape)
            for_weight = (of_inputs * grad * rates).sum([0, *range(2, inputs.ndim)])
        else:
            # The same in PyTorch's kernels, each of which is one pass for all that stands in one line here.
            for_grad = functional.batch_norm(inputs, mean, var, of_weight, of_bias, False, 0.0, ctx.eps)
            for_grad.addcmul_(of_inputs, (weight * rate).view(shape))
            zeros = torch.zeros_like(mean)
            _, for_weight, _ = _gradients(of_inputs, grad, weight, zeros, var, ctx.eps, (False, True, False))
        for_inputs = grad * (of_weight * rate).view(shape)
        return for_grad, for_inputs, for_weight, None, None, None


def _gradients(
    grad: Tensor, inputs: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float, wanted: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = torch.ops.aten.native_batch_norm_backward(
        grad, inputs, weight, mean, var, None, None, False, eps, list(wanted)
    )
    return gradients


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.batch_norm``; with statistics of the batch it is PyTorch's."""
    if (
        training
        or running_mean is None
        or running_var is None
        or weight is None
        or bias is None
        or not is_plain(input)
        or any(x.dtype != input.dtype for x in (running_mean, running_var, weight, bias))
        or running_mean.requires_grad
        or running_var.requires_grad
    ):
        return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    output: Tensor = _Applied.apply(input, weight, bias, running_mean, running_var, eps)
    return output
