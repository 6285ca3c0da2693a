"""Convolutions whose second derivative costs what their first does.

A convolution is bilinear in inputs and weight, and so are its two gradients: each of the three maps, taken with the
other two, is closed under differentiation. PyTorch differentiates the gradient with respect to the weight as a
convolution whose kernel is as large as the image, for which processors have no fast code. Here every derivative of
every order is one of the three maps that training itself runs, and both gradients are one call, as in training.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Ints = int | Sequence[int]


class _Geometry(NamedTuple):
    """All that describes a convolution except its tensors, as the functions below pass it on."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]

    def gradients(
        self, grad: Tensor, inputs: Tensor, weight: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """PyTorch's gradients of a convolution with respect to its inputs and its weight, in one call."""
        geometry = (self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups)
        mask = [wanted[0], wanted[1], False]
        of_inputs, of_weight, _ = torch.ops.aten.convolution_backward(grad, inputs, weight, None, *geometry, mask)
        return of_inputs, of_weight

    def output(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """PyTorch's convolution."""
        geometry = (self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups)
        output: Tensor = torch.ops.aten.convolution(inputs, weight, None, *geometry)
        return output


class _Bilinear(torch.autograd.Function):
    """A map of two tensors that is linear in each."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, _Geometry], output: Tensor) -> None:
        first, second, ctx.geometry = inputs
        ctx.save_for_backward(first, second)
        ctx.save_for_forward(first, second)

    @classmethod
    def jvp(cls, ctx: Any, first_tangent: Tensor | None, second_tangent: Tensor | None, _: None) -> Any:
        first, second = ctx.saved_tensors
        parts = []
        # By the product rule, again by the map itself: forward over reverse has convolutions of the same kind.
        if first_tangent is not None:
            parts.append(cls.apply(first_tangent, second, ctx.geometry))
        if second_tangent is not None:
            parts.append(cls.apply(first, second_tangent, ctx.geometry))
        return sum(parts[1:], parts[0])


class _Output(_Bilinear):
    """Inputs and weight to outputs."""

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
        return geometry.output(inputs, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        inputs, weight = ctx.saved_tensors
        # A product needs no graph of itself, and most of its convolutions are here: without the calls in between.
        if not torch.is_grad_enabled():
            return *ctx.geometry.gradients(grad, inputs, weight, ctx.needs_input_grad), None
        if ctx.needs_input_grad[0] and ctx.needs_input_grad[1]:
            return *_Gradients.apply(grad, inputs, weight, ctx.geometry), None
        of_inputs = _InputGradient.apply(grad, weight, ctx.geometry) if ctx.needs_input_grad[0] else None
        of_weight = _WeightGradient.apply(inputs, grad, ctx.geometry) if ctx.needs_input_grad[1] else None
        return of_inputs, of_weight, None


class _InputGradient(_Bilinear):
    """The outputs' gradient and the weight to the inputs' gradient."""

    @staticmethod
    def forward(grad: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
        # The gradient with respect to the inputs does not depend on them: PyTorch looks at their shape alone.
        # Not one number that is expanded: PyTorch would copy it to every place.
        inputs = grad.new_empty(geometry.input_shape)
        of_inputs, _ = geometry.gradients(grad, inputs, weight, (True, False))
        assert of_inputs is not None
        return of_inputs

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad, weight = ctx.saved_tensors
        of_grad = _Output.apply(cotangent, weight, ctx.geometry) if ctx.needs_input_grad[0] else None
        of_weight = _WeightGradient.apply(cotangent, grad, ctx.geometry) if ctx.needs_input_grad[1] else None
        return of_grad, of_weight, None


class _WeightGradient(_Bilinear):
    """The inputs and the outputs' gradient to the weight's gradient."""

    @staticmethod
    def forward(inputs: Tensor, grad: Tensor, geometry: _Geometry) -> Tensor:
        weight = grad.new_empty(geometry.weight_shape)  # likewise
        _, of_weight = geometry.gradients(grad, inputs, weight, (False, True))
        assert of_weight is not None
        return of_weight

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        inputs, grad = ctx.saved_tensors
        of_inputs = _InputGradient.apply(grad, cotangent, ctx.geometry) if ctx.needs_input_grad[0] else None
        of_grad = _Output.apply(inputs, cotangent, ctx.geometry) if ctx.needs_input_grad[1] else None
        return of_inputs, of_grad, None


class _Gradients(torch.autograd.Function):
    """The outputs' gradient, the inputs and the weight to the gradients of both, which share most of a pass.

    Its derivative has two such gradients again, those at its cotangents.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, inputs: Tensor, weight: Tensor, geometry: _Geometry) -> tuple[Tensor | None, ...]:
        return geometry.gradients(grad, inputs, weight, (True, True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, _Geometry], output: Any) -> None:
        *tensors, ctx.geometry = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, of_inputs: Tensor, of_weight: Tensor) -> tuple[Tensor | None, ...]:
        grad, inputs, weight = ctx.saved_tensors
        geometry: _Geometry = ctx.geometry
        wants_grad, *wanted = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled():
            output = None
            if wants_grad:
                output = geometry.output(of_inputs, weight) + geometry.output(inputs, of_weight)
            return output, *geometry.gradients(grad, of_inputs, of_weight, wanted), None
        output = _Output.apply(of_inputs, weight, geometry) + _Output.apply(inputs, of_weight, geometry)
        return output, *_Gradients.apply(grad, of_inputs, of_weight, geometry), None

    @staticmethod
    def jvp(ctx: Any, of_grad: Tensor | None, of_inputs: Tensor | None, of_weight: Tensor | None, _: None) -> Any:
        grad, inputs, weight = ctx.saved_tensors
        for_inputs, for_weight = torch.zeros_like(inputs), torch.zeros_like(weight)
        if of_grad is not None:
            for_inputs, for_weight = _Gradients.apply(of_grad, inputs, weight, ctx.geometry)
        if of_weight is not None:
            for_inputs = for_inputs + _InputGradient.apply(grad, of_weight, ctx.geometry)
        if of_inputs is not None:
            for_weight = for_weight + _WeightGradient.apply(of_inputs, grad, ctx.geometry)
        return for_inputs, for_weight


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.conv1d``, ``conv2d`` and ``conv3d`` in one, by the number of dimensions of the weight.

    Complex ones are PyTorch's.

    Args:
        input: Shape ``(N, C, ...)``, or ``(C, ...)`` for a single sample.
        weight: Shape ``(outputs, C / groups, ...)``.
        bias: Shape ``(outputs,)``.
        stride: One number, or one for each dimension of the image; likewise the next two.
        padding: On both sides, or ``"same"`` or ``"valid"``.
        dilation: Distance between the kernel's points.
        groups: Number of groups of channels.

    """
    dimensions = weight.ndim - 2
    if weight.is_complex():
        # PyTorch computes these from real ones, each with all derivatives; their own backward has no complex kernel.
        of_pytorch = (torch.conv1d, torch.conv2d, torch.conv3d)[dimensions - 1]
        return of_pytorch(input, weight, bias, stride, padding, dilation, groups)
    if input.ndim == dimensions + 1:
        return convolution(input.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0)
    # Autocast knows PyTorch's own convolutions and not this one, so it does here what autocast would have done.
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    strides, dilations = _for_each(stride, dimensions), _for_each(dilation, dimensions)
    if padding == "same":
        # An even kernel needs one row more on one side, which PyTorch puts at the end. The kernels below pad both sides
        # alike, so that row is added to the image.
        total = [d * (size - 1) for d, size in zip(dilations, weight.shape[2:], strict=True)]
        input = functional.pad(input, [side for t in reversed(total) for side in (0, t % 2)])
        paddings: Sequence[int] = [t // 2 for t in total]
    else:
        paddings = [0] * dimensions if isinstance(padding, str) else _for_each(padding, dimensions)
    geometry = _Geometry(strides, paddings, dilations, groups, tuple(input.shape), tuple(weight.shape))
    output: Tensor = _Output.apply(input, weight, geometry)
    # Added outside: with a bias the map would not be bilinear.
    return output if bias is None else output + bias.reshape(-1, *[1] * dimensions)


def _for_each(value: Ints, dimensions: int) -> Sequence[int]:
    if isinstance(value, int):
        return [value] * dimensions
    return list(value) * dimensions if len(value) == 1 else list(value)
