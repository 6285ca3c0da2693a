"""Losses through every kind of checkpointing: what PyTorch does with them, and what is made of it.

The tests named ``test_pytorch_...`` speak of PyTorch alone: where one fails, its repair has become superfluous.
"""

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.compat.operations import differentiated, watched_checkpointing
from tests.curvature.helpers import (
    METHODS,
    TOLERANCE,
    every_method,
    or_refused,
    reference,
    relative_error,
    twice,
    vector,
)
from tests.problems import Batch, Problem, mlp


def two_layers() -> tuple[nn.Linear, nn.Linear, Tensor]:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    return first, second, torch.ones(4, 3)


def test_pytorch_takes_reentrant_checkpoints_for_constants_where_nothing_before_them_is_trained() -> None:
    first, second, inputs = two_layers()
    output = checkpoint(second, inputs.requires_grad_(), use_reentrant=True).sum() + first(inputs).sum()
    gradient = torch.autograd.grad(output, [*first.parameters(), *second.parameters()], allow_unused=True)
    assert [entry is None for entry in gradient] == [False, False, True, True]


def test_pytorch_refuses_gradients_through_reentrant_checkpoints() -> None:
    first, second, inputs = two_layers()
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        torch.autograd.grad(checkpoint(second, first(inputs), use_reentrant=True).sum(), [first.weight])


def selective(*operations: Any) -> Callable[[], Any]:
    return functools.partial(create_selective_checkpoint_contexts, list(operations))


def test_pytorch_differentiates_selective_checkpoints_once() -> None:
    problem = mlp()
    inputs, labels = problem.batches[0]
    context_fn = selective(torch.ops.aten.addmm.default)
    scores = checkpoint(problem.model, inputs, use_reentrant=False, context_fn=context_fn)
    with pytest.raises(RuntimeError, match="selective activation checkpoint"):
        twice(functional.cross_entropy(scores, labels), problem.parameters)


def test_pytorch_hides_modes_from_layers_that_are_evaluated_again() -> None:
    """The engine itself does not."""
    seen: list[bool] = []

    class Mode(TorchFunctionMode):
        entered = False

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.entered = True
            return func(*args, **(kwargs or {}))

    def layer(x: Tensor) -> Tensor:
        mode.entered = False
        y = x.sin()
        seen.append(mode.entered)
        return y.cos()

    x = vector(3).requires_grad_()
    for differentiate in (torch.autograd.grad, lambda y, x: differentiated((y,), (y,), [x], retain_graph=False)):
        with Mode() as mode:
            differentiate(checkpoint(layer, x, use_reentrant=False).sum(), x)
    assert seen == [True, False, True, True]


def every_layer(layers: nn.Sequential, inputs: Tensor, **options: Any) -> Tensor:
    for layer in layers:
        inputs = checkpoint(layer, inputs, **options)
    return inputs


def saved_on_cpu(model: nn.Module, inputs: Tensor) -> Tensor:
    with save_on_cpu():
        return model(inputs)


REENTRANT = {
    "after_a_layer": lambda model, x: checkpoint(model[1:], model[0](x), use_reentrant=True),
    "of_inputs_with_gradients": lambda model, x: checkpoint(model, x.detach().requires_grad_(), use_reentrant=True),
    "nested": lambda model, x: checkpoint(
        lambda y: every_layer(model, y, use_reentrant=True), x.detach().requires_grad_(), use_reentrant=True
    ),
    "sequential": lambda model, x: checkpoint_sequential(model, 2, x.detach().requires_grad_(), use_reentrant=True),
    "without_random_state": lambda model, x: checkpoint(
        model, x.detach().requires_grad_(), use_reentrant=True, preserve_rng_state=False
    ),
}
CHECKPOINTED: dict[str, Callable[[nn.Sequential, Tensor], Tensor]] = {
    "module": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "lambda": lambda model, x: checkpoint(lambda y: model(y), x, use_reentrant=False),
    "function": lambda model, x: model[3](checkpoint(torch.tanh, model[0](x), use_reentrant=False)),
    "each_layer": lambda model, x: every_layer(model, x, use_reentrant=False),
    "nested": lambda model, x: checkpoint(lambda y: every_layer(model, y, use_reentrant=False), x, use_reentrant=False),
    "selective": lambda model, x: checkpoint(
        model, x, use_reentrant=False, context_fn=selective(torch.ops.aten.addmm.default)
    ),
    "selective_by_rule": lambda model, x: checkpoint(
        model,
        x,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, lambda ctx, op, *_, **__: "tanh" in str(op)),
    ),
    "saved_on_cpu": saved_on_cpu,
    **{f"reentrant_{name}": function for name, function in REENTRANT.items()},
}


def checkpointed(name: str, **options: Any) -> tuple[HessianOperator, Problem]:
    problem = mlp()

    def loss(batch: Batch) -> Tensor:
        return functional.cross_entropy(CHECKPOINTED[name](problem.model, batch[0]), batch[1])

    return HessianOperator(loss, problem.parameters, problem.batches, **options), problem


@every_method
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_products_through_checkpoints_are_those_of_the_plain_model(name: str, how: str) -> None:
    operator, _ = checkpointed(name, **METHODS[how])
    direction = vector(operator.size)
    expected = reference("mlp") @ direction
    with or_refused() if how == "forward_over_reverse" else nullcontext():  # PyTorch may find a recomputation wanting
        for _ in range(2):
            assert relative_error(operator.matvec(direction), expected) <= TOLERANCE[how]
    assert operator.graph_bytes == 0  # nothing is kept that would have to be evaluated elsewhere


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradients_through_checkpoints_are_those_at_the_displaced_parameters(name: str) -> None:
    operator, problem = checkpointed(name)
    displacement = 0.1 * vector(operator.size)
    expected = problem.gradient_at(problem.flat_parameters + displacement)
    assert relative_error(operator.gradient(displacement), expected) <= 1e-12
    assert all(parameter.grad is None for parameter in problem.parameters)


def test_reentrant_checkpoints_of_inputs_without_gradients_are_not_trained_and_have_no_curvature() -> None:
    """As in training, where PyTorch warns that their gradients will be None."""
    problem = mlp()
    first, *others = problem.model

    def loss(batch: Batch) -> Tensor:
        hidden = checkpoint(first, batch[0], use_reentrant=True)
        return functional.cross_entropy(nn.Sequential(*others)(hidden), batch[1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        operator = HessianOperator(loss, problem.parameters, problem.batches)
        direction = vector(operator.size)
        product = operator.matvec(direction)
        gradient = operator.gradient()
    num_first = sum(parameter.numel() for parameter in first.parameters())
    direction[:num_first] = 0
    expected = reference("mlp") @ direction
    assert not product[:num_first].any()
    assert not gradient[:num_first].any()
    assert relative_error(product[num_first:], expected[num_first:]) <= TOLERANCE["kept"]


def test_nothing_stays_replaced_also_where_evaluations_are_nested() -> None:
    """Such as a loss with a Hessian in it."""
    hooks, function = saved_tensors_hooks.__enter__, torch.utils.checkpoint.CheckpointFunction
    with watched_checkpointing():
        with pytest.raises(KeyError), watched_checkpointing():
            raise KeyError
        assert "apply" in vars(function)
    assert saved_tensors_hooks.__enter__ is hooks
    assert "apply" not in vars(function)
