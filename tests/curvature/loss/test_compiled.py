"""Compiled products are those of the dense Hessian at the present parameters, and plain ones where compiling fails."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor
from torch import Tensor, nn
from torch.nn import functional

from lyapunov_lightning.curvature import CurvatureWarning, HessianOperator
from lyapunov_lightning.curvature.loss import compiled
from lyapunov_lightning.curvature.loss.compiled import Programs
from tests.curvature.helpers import reference, relative_error, vector
from tests.problems import PROBLEMS, mlp


class Interpreted:
    """In place of Inductor, which takes seconds: runs the operations one by one, and counts what it is given."""

    def __init__(self) -> None:
        self.count = 0
        self.change: Callable[[Tensor], Tensor] = lambda entry: entry

    def __call__(self, traced: Any, inputs: list[Tensor]) -> Callable[..., list[Tensor]]:
        self.count += 1
        return lambda *inputs: [self.change(entry) for entry in traced(*inputs)]


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> Interpreted:
    stand_in = Interpreted()
    monkeypatch.setattr(torch._inductor, "compile", stand_in)
    return stand_in


@pytest.mark.parametrize("name", ["mlp", "relu_cnn"])
def test_traced_products_are_those_of_the_dense_hessian(name: str, inductor: Interpreted) -> None:
    problem = PROBLEMS[name]()
    operator = problem.operator(method="double_backward", compile=True)
    for seed in range(3):
        direction = vector(operator.size, seed)
        assert relative_error(operator.matvec(direction), reference(name) @ direction) <= 1e-10
    assert 1 <= inductor.count <= len(problem.batches)


@pytest.fixture
def small() -> tuple[nn.Module, Tensor, Callable[..., Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3)).double()
    inputs = vector(15).view(5, 3)
    return model, inputs, lambda x: functional.cross_entropy(model(x), torch.arange(len(x)) % 3)


def dense(model: nn.Module, loss: Callable[..., Tensor], inputs: Tensor) -> Tensor:
    parameters = list(model.parameters())
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(inputs), parameters, create_graph=True)])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True) for entry in gradient]
    return torch.stack([torch.cat([piece.reshape(-1) for piece in row]) for row in rows])


def test_inductor_compiles_a_network(small: Any) -> None:
    """The one test that compiles."""
    model, inputs, loss = small
    programs = Programs()
    operator = HessianOperator(loss, model.parameters(), [inputs], compile=programs)
    hessian = dense(model, loss, inputs)
    for seed in range(3):
        direction = vector(operator.size, seed)
        assert relative_error(operator.matvec(direction), hessian @ direction) <= 1e-12
    assert programs.num_compiled == 1, programs.reason
    assert programs.seconds > 0


def test_one_program_serves_changed_parameters_and_later_operators(small: Any, inductor: Interpreted) -> None:
    model, inputs, loss = small
    programs = Programs()
    operator = HessianOperator(loss, model.parameters(), [inputs], compile=programs)
    for _ in range(2):
        for one in (operator, HessianOperator(loss, model.parameters(), [inputs], compile=programs)):
            hessian, direction = dense(model, loss, inputs), vector(operator.size)
            for _ in range(3):
                assert relative_error(one.matvec(direction), hessian @ direction) <= 1e-12
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
    assert inductor.count == programs.num_compiled == 1
    # Another shape is another program; another factor of the loss is another number in the same one.
    longer = HessianOperator(loss, model.parameters(), [inputs.repeat(2, 1)], compile=programs)
    twice = HessianOperator(lambda x: 2 * loss(x), model.parameters(), [inputs], compile=programs)
    expected = 2 * dense(model, loss, inputs) @ direction
    for _ in range(2):
        longer.matvec(direction)
        assert relative_error(twice.matvec(direction), expected) <= 1e-12
    assert programs.num_compiled == 2


def test_a_graph_for_one_product_is_not_compiled(small: Any, inductor: Interpreted) -> None:
    model, inputs, loss = small
    for options in ({}, {"max_graph_bytes": 0}):
        operator = HessianOperator(loss, model.parameters(), [inputs], compile=True, **options)
        for _ in range(3 if options else 1):
            operator.matvec(vector(operator.size))
    operator.matmat(torch.ones(operator.size, 4, dtype=torch.float64))
    assert inductor.count == 0


def test_what_is_compiled_goes_with_its_graph(small: Any, inductor: Interpreted) -> None:
    model, inputs, loss = small
    programs = Programs()
    operator = HessianOperator(loss, model.parameters(), [inputs], compile=programs)
    for _ in range(2):
        operator.matvec(vector(operator.size))
    graph = weakref.ref(operator._derivatives._way.graphs[0])
    operator.reset()
    gc.collect()
    assert graph() is None
    assert not programs._derivatives
    assert not [t for t in vars(programs)["_known"].values() if isinstance(t, Tensor)]


def fails(error: Exception) -> Callable[..., Any]:
    def compile(*_: Any) -> Any:
        raise error

    return compile


@pytest.mark.parametrize("error", [RuntimeError("No compiler of C++ was found\nby anybody"), OSError("no space")])
def test_where_compiling_fails_one_warning_says_why(
    error: Exception, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._inductor, "compile", fails(error))
    model, inputs, loss = small
    programs = Programs()
    hessian, direction = dense(model, loss, inputs), vector(31)
    operators = [HessianOperator(loss, model.parameters(), [inputs], compile=programs) for _ in range(2)]
    with pytest.warns(CurvatureWarning, match="could not be compiled.*(No compiler of C|no space)") as caught:
        products = [one.matvec(direction) for one in operators for _ in range(3)]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert programs.reason == f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert all(relative_error(product, hessian @ direction) <= 1e-12 for product in products)
    assert operators[0].method == "double_backward"


def test_a_compiled_product_that_is_not_the_plain_one_is_not_trusted(small: Any, inductor: Interpreted) -> None:
    model, inputs, loss = small
    inductor.change = lambda entry: entry * (1 + 1e-6)
    operator = HessianOperator(loss, model.parameters(), [inputs], compile=True)
    hessian, direction = dense(model, loss, inputs), vector(31)
    with pytest.warns(CurvatureWarning, match="off by 1e-06 of its size"):
        products = [operator.matvec(direction) for _ in range(3)]
    assert all(relative_error(product, hessian @ direction) <= 1e-12 for product in products)


def test_a_loss_of_many_shapes_is_not_compiled_forever(
    small: Any, inductor: Interpreted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_MOST", 2)
    model, inputs, loss = small
    operator = HessianOperator(loss, model.parameters(), [inputs[:count] for count in range(2, 6)], compile=True)
    with pytest.warns(CurvatureWarning, match="more than 2 kinds"):
        operator.matmat(torch.stack([vector(31), vector(31, 1)], dim=1))
    assert inductor.count == 2


def test_blocks_and_losses_without_a_second_derivative(inductor: Interpreted) -> None:
    problem = mlp()
    block = torch.stack([vector(51, seed) for seed in range(3)], dim=1)
    assert relative_error(problem.operator(compile=True).matmat(block), reference("mlp") @ block) <= 1e-10
    linear = [vector(3).requires_grad_()]
    operator = HessianOperator(lambda x: (linear[0] * x).sum(), linear, [torch.ones(3)], compile=True)
    assert not [product for product in (operator.matvec(vector(3)) for _ in range(3)) if product.any()]
