"""Evaluations at other values of the parameters: substituted, or on parameters of their own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lyapunov_lightning.curvature import HessianOperator, MeasurementError
from lyapunov_lightning.curvature.loss.fixed_batches import Evaluation
from tests.curvature.helpers import (
    METHODS,
    TOLERANCE,
    Twin,
    every_method,
    or_refused,
    reference,
    relative_error,
    vector,
)
from tests.problems import PROBLEMS, Batch, mlp


class Square(torch.autograd.Function):
    """Differentiable as often as one likes, and given a parameter itself, which cannot be substituted there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def raw_parameter_operator(how: str) -> HessianOperator:
    weight = vector(3).requires_grad_()
    return HessianOperator(lambda batch: Square.apply(weight).sum(), [weight], [torch.ones(1)], **METHODS[how])


@pytest.mark.parametrize("how", ["kept", "rebuilt"])
def test_double_backward_needs_no_substitution(how: str) -> None:
    assert torch.allclose(raw_parameter_operator(how).matvec(vector(3)), 2 * vector(3))


def test_parameters_that_cannot_be_substituted_are_noticed_in_forward_mode() -> None:
    with pytest.raises(MeasurementError, match=r"cannot be substituted.*`method='double_backward'`"):
        raw_parameter_operator("forward_over_reverse").matvec(vector(3))


def test_functions_may_be_handed_parameters_themselves() -> None:
    """Which show the memory of other values meanwhile, and are what they were afterwards."""
    operator = raw_parameter_operator("finite_difference")
    (weight,) = operator.parameters
    memory, version = weight.data_ptr(), weight._version
    there = vector(3) + vector(3, seed=1)
    assert torch.allclose(operator.matvec(vector(3)), 2 * vector(3), rtol=1e-6)
    assert torch.allclose(operator.gradient(vector(3, seed=1)), 2 * there)
    assert operator.value(vector(3, seed=1)) == pytest.approx(float(there.square().sum()))
    along = operator.values_along(vector(3, seed=1), [0.0, 1.0])
    assert torch.allclose(along, torch.stack([vector(3).square().sum(), there.square().sum()]))
    assert (weight.data_ptr(), weight._version) == (memory, version)
    assert torch.equal(weight, vector(3))
    assert weight.grad is None


def test_parameters_are_shown_again_where_the_loss_fails() -> None:
    weight = vector(3).requires_grad_()

    def loss(batch: Tensor) -> Tensor:
        if not torch.equal(weight, vector(3)):
            raise KeyError("elsewhere")
        return Square.apply(weight).sum()

    operator = HessianOperator(loss, [weight], [torch.ones(1)])
    for measure in (operator.gradient, operator.value):
        with pytest.raises(KeyError):
            measure(vector(3))
        assert torch.equal(weight, vector(3))


def test_random_numbers_are_the_same_where_parameters_are_handed_over() -> None:
    weight = vector(50).requires_grad_()
    operator = HessianOperator(lambda batch: functional.dropout(Square.apply(weight)).sum(), [weight], [torch.ones(1)])
    assert torch.equal(operator.gradient(torch.zeros(50, dtype=torch.float64)), operator.gradient())


@every_method
@pytest.mark.parametrize("name", ["mlp", "lstm", "transformer", "tied"])
def test_a_loss_may_be_evaluated_on_parameters_of_its_own(name: str, how: str) -> None:
    problem = PROBLEMS[name]()
    flat = problem.flat_parameters
    operator = Twin(problem).operator(**METHODS[how])
    displacement = 0.1 * vector(len(flat))
    versions = [parameter._version for parameter in problem.parameters]
    for _ in range(2):
        product = operator.matvec(displacement)
        assert relative_error(product, reference(name) @ displacement) <= TOLERANCE[how]
    assert relative_error(operator.gradient(), problem.gradient_at(flat)) <= 1e-12
    assert relative_error(operator.gradient(displacement), problem.gradient_at(flat + displacement)) <= 1e-12
    assert operator.value(displacement) == pytest.approx(float(problem.loss_at(flat + displacement)), rel=1e-13)
    along = operator.values_along(displacement, [-2.0, 0.0, 1.0])
    expected = torch.stack([problem.loss_at(flat + distance * displacement) for distance in (-2.0, 0.0, 1.0)])
    assert torch.allclose(along, expected, rtol=1e-13)
    assert [parameter._version for parameter in problem.parameters] == versions
    assert all(parameter.grad is None for parameter in problem.parameters)


@every_method
def test_batches_weigh_as_their_evaluation_tells(how: str) -> None:
    """Which is known only once the loss was evaluated, and asked for once."""
    problem = mlp(sizes=(5, 3))
    twin = Twin(problem, samples=lambda batch: 2.0 if len(batch[1]) == 5 else 7.0)
    operator = twin.operator(**METHODS[how])
    explicit = problem.operator(weights=[2.0, 7.0], method="double_backward")
    direction = vector(operator.size)
    for _ in range(2):
        assert relative_error(operator.matvec(direction), explicit.matvec(direction)) <= TOLERANCE[how]
        assert relative_error(operator.gradient(), explicit.gradient()) <= 1e-12
        assert operator.value(direction) == pytest.approx(explicit.value(direction), rel=1e-13)
    assert twin.num_asked == 2


def test_the_mean_over_a_single_batch_asks_for_no_number_of_samples() -> None:
    problem = mlp(sizes=(5,))
    twin = Twin(problem)
    operator = twin.operator()
    operator.matvec(vector(operator.size))
    assert twin.num_asked == 0


def test_weights_that_are_given_come_before_those_that_an_evaluation_tells() -> None:
    problem = mlp()
    twin = Twin(problem)
    assert twin.operator(weights=[1.0, 4.0]).value() == pytest.approx(problem.operator(weights=[1.0, 4.0]).value())
    assert twin.num_asked == 0


@every_method
def test_a_loss_on_a_copy_that_reaches_a_parameter_of_the_original_is_refused(how: str) -> None:
    problem = mlp()
    operator = Twin(problem, extra=lambda model: problem.parameters[0].square().sum()).operator(**METHODS[how])
    direction = vector(operator.size)
    for measure in (operator.matvec, operator.gradient, operator.value):
        with pytest.raises(MeasurementError, match="cannot be substituted"):
            measure(direction)


@every_method
def test_what_cannot_be_substituted_may_be_given_parameters_of_its_own(how: str) -> None:
    problem = mlp()
    squared = Twin(problem, extra=lambda model: Square.apply(next(model.parameters())).sum())
    direction = vector(len(problem.flat_parameters))
    expected = reference("mlp") @ direction
    num_squared = problem.parameters[0].numel()
    expected[:num_squared] += 2 * direction[:num_squared]
    with or_refused() if how == "forward_over_reverse" else nullcontext():  # it has no forward derivative
        assert relative_error(squared.operator(**METHODS[how]).matvec(direction), expected) <= TOLERANCE[how]


class OwnBackward(torch.autograd.Function):
    """Checkpointing as other libraries write it: a backward pass within the backward pass, which fills ``.grad``."""

    @staticmethod
    def forward(ctx: Any, model: nn.Module, inputs: Tensor) -> Tensor:
        ctx.model = model
        ctx.save_for_backward(inputs)
        with torch.no_grad():
            return model(inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        inputs = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.model(inputs), gradient)
        return None, inputs.grad


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("is_copied", [False, True])
@every_method
def test_a_layer_that_runs_a_backward_pass_of_its_own_is_refused(
    how: str, is_copied: bool, with_gradients: bool
) -> None:
    """Its gradients would count as zeros."""
    problem = mlp()
    parameters: list[nn.Parameter] = problem.parameters
    if with_gradients:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        first, *others = model.children()
        return functional.cross_entropy(OwnBackward.apply(nn.Sequential(*others), first(batch[0])), batch[1])

    class OwnTwin(Twin):
        @contextmanager
        def evaluated(self, batch: Batch, values: Sequence[Tensor] | None = None) -> Iterator[Evaluation]:
            with super().evaluated(batch, values) as evaluation:
                yield replace(evaluation, loss=loss(evaluation.owner, batch))

    of_batch = OwnTwin(problem) if is_copied else lambda batch: loss(problem.model, batch)
    operator = HessianOperator(of_batch, parameters, problem.batches, **METHODS[how])
    direction = vector(operator.size)
    for measure in (operator.matvec, operator.gradient):
        with pytest.raises(MeasurementError, match=r"backward pass of its own.*writes to `\.grad`.*checkpoint"):
            measure(direction)
    for parameter in parameters:
        if with_gradients:
            assert torch.equal(parameter.grad, torch.ones_like(parameter))
        else:
            assert parameter.grad is None
