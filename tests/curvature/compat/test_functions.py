"""What is PyTorch's own in a graph and what is not, and the calls of the latter."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lyapunov_lightning.curvature.compat.convolution import convolution
from lyapunov_lightning.curvature.compat.functions import name_of, own_functions, recorded_calls, used_outputs
from tests.curvature.helpers import vector


class Square(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, power: int) -> Tensor:
        return x**power

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return 2 * gradient * ctx.saved_tensors[0], None


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


square = Square.apply  # as many write it: whoever replaces `apply` on the class does not see this


def test_the_functions_of_pytorch_and_of_this_package_are_not_looked_for() -> None:
    x = vector(6).view(1, 2, 3).requires_grad_()
    layer = nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2), nn.ReLU()).double()
    hidden = convolution(layer(x), torch.ones(2, 2, 1, dtype=torch.float64))
    assert own_functions([checkpoint(torch.sin, hidden, use_reentrant=False).sum()]) == []
    assert [name_of(node) for node in own_functions([square(hidden, 2).sum()])] == ["Square"]


def test_what_pytorch_makes_of_a_function_for_its_transforms_is_not_pytorchs_own() -> None:
    x = vector(3).requires_grad_()
    (node,) = own_functions([torch.func.vmap(square, (0, None))(x, 2).sum()])
    assert name_of(node) == "Square"
    assert used_outputs(node, [torch.func.vmap(square, (0, None))(x, 2).sum()]) == []


def test_calls_are_recorded_with_their_nodes_whatever_name_they_go_by() -> None:
    x = vector(3).requires_grad_()
    with recorded_calls([Square, InPlace]) as calls:
        first, second = square(x, 2), square(x.sin(), 3)
        third = InPlace.apply(x.clone())
    square(x, 2)
    assert [call.node for call in calls] == [first.grad_fn, second.grad_fn, third.grad_fn]
    assert calls[0].arguments == (x, 2)
    assert [call.is_repeatable for call in calls] == [True, True, False]
    assert calls[0].kind != calls[1].kind


@pytest.mark.parametrize("function", [Square, InPlace])
def test_functions_are_what_they_were_afterwards(function: Any) -> None:
    before = dict(vars(function))
    with pytest.raises(KeyError), recorded_calls([function]):
        raise KeyError
    assert dict(vars(function)) == before
