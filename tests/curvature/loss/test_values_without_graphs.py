"""Values are evaluated without a graph where the loss can do without one, and are the same as with one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lyapunov_lightning.curvature import HessianOperator
from tests.curvature.helpers import METHODS, every_method, every_problem, random_vectors, vector
from tests.problems import PROBLEMS, Batch, mlp, transformer


class GradModes:
    """A loss that notes whether a graph is recorded."""

    def __init__(self, loss: Any) -> None:
        self._loss = loss
        self.modes: list[bool] = []

    def __call__(self, batch: Any) -> Tensor:
        self.modes.append(torch.is_grad_enabled())
        return self._loss(batch)


@every_method
def test_a_graph_is_recorded_at_most_once(how: str) -> None:
    problem = mlp()
    loss = GradModes(problem.loss)
    operator = HessianOperator(loss, problem.parameters, problem.batches, **METHODS[how])
    operator.value()
    assert loss.modes == [False] * 2
    loss.modes.clear()
    operator.values_along(vector(operator.size), [-1.0, 1.0, 2.0])
    assert loss.modes == [True] + [False] * 5  # the first one shows that nothing but the substitutes is used
    loss.modes.clear()
    operator.value(vector(operator.size))
    assert loss.modes == [False] * 2


@pytest.mark.parametrize("is_training", [False, True])
@every_problem
def test_values_are_those_of_the_loss_that_is_differentiated(name: str, is_training: bool) -> None:
    """Encoders in eval mode have a fast path for what is not differentiated."""
    problem = PROBLEMS[name]()
    problem.model.train(is_training and name not in ("cnn", "relu_cnn"))
    operator = problem.operator()
    displacement = 0.1 * vector(operator.size)
    losses = [float(problem.loss_at(problem.flat_parameters + d * displacement)) for d in (0, 1)]
    for _ in range(2):
        assert operator.value() == pytest.approx(losses[0], rel=1e-13)
        assert operator.value(displacement) == pytest.approx(losses[1], rel=1e-13)


def test_the_fast_path_of_attention_is_left_as_it_was() -> None:
    problem = transformer()
    before = torch.backends.mha.get_fastpath_enabled()
    problem.operator().value()
    assert torch.backends.mha.get_fastpath_enabled() == before


def penalised(model: nn.Module, batch: Batch) -> Tensor:
    inputs = batch[0].clone().requires_grad_()
    outputs = model(inputs)
    (slopes,) = torch.autograd.grad(outputs.square().sum(), inputs, create_graph=True)
    return functional.cross_entropy(outputs, batch[1]) + slopes.square().mean()


@every_method
def test_losses_that_differentiate_on_their_own_account_have_values(how: str) -> None:
    problem = mlp()
    loss = GradModes(lambda batch: penalised(problem.model, batch))
    operator = HessianOperator(loss, problem.parameters, problem.batches, **METHODS[how])
    expected = sum(len(b[1]) * float(penalised(problem.model, b)) for b in problem.batches) / 8
    for _ in range(2):
        assert operator.value() == pytest.approx(expected, rel=1e-13)
    assert loss.modes == [False] + [True] * 4  # found out once
    displacement = 0.1 * vector(operator.size)
    values = operator.values_along(displacement, [0.0, 1.0])
    assert float(values[0]) == pytest.approx(expected, rel=1e-13)
    slope = (operator.value(1e-5 * displacement) - operator.value(-1e-5 * displacement)) / 2e-5
    assert slope == pytest.approx(float(operator.gradient() @ displacement), rel=1e-6)


def test_an_error_of_the_loss_is_raised_as_it_is() -> None:
    def loss(batch: Batch) -> Tensor:
        raise ValueError("from the loss")

    operator = HessianOperator(loss, [vector(3).requires_grad_()], [torch.ones(1)])
    for _ in range(2):
        with pytest.raises(ValueError, match="from the loss"):
            operator.value()


def test_a_graph_is_built_once_to_see_whether_functions_are_handed_parameters() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x**2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    weight = vector(3).requires_grad_()
    operator = HessianOperator(lambda batch: Square.apply(weight).sum(), [weight], [torch.ones(1)])
    operator.value()
    expected = torch.stack([((1 + distance) * vector(3)).square().sum() for distance in (1.0, 2.0)])
    for _ in range(2):
        assert torch.allclose(operator.values_along(vector(3), [1.0, 2.0]), expected)


def test_values_take_no_more_memory_than_the_largest_layer() -> None:
    """Where a graph holds all of them."""
    from tests.curvature.compat.test_operations import Allocated

    layers = [layer for _ in range(10) for layer in (nn.Linear(8, 8), nn.Tanh())]
    model = nn.Sequential(*layers)
    inputs = random_vectors(2000, 8).float()

    class Peak(Allocated):
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            self.most = max(self.most, self.bytes)
            return result

    operator = HessianOperator(lambda batch: model(batch).square().mean(), model.parameters(), [inputs])
    direction = vector(operator.size).float()
    operator.value(direction)
    for measure in (operator.value, lambda: operator.value(direction)):
        with Peak() as peak:
            measure()
        assert peak.most <= 4 * inputs.nbytes
