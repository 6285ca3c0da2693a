"""The operator: its parameters, its fallback, what it refuses, and what it leaves alone."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lyapunov_lightning.curvature import CurvatureWarning, HessianOperator, MeasurementError
from tests.curvature.helpers import (
    EXACT,
    METHODS,
    TOLERANCE,
    OnceDifferentiableTanh,
    every_method,
    reference,
    relative_error,
    vector,
)
from tests.problems import PROBLEMS, Batch, Problem, mlp

# Which parameters.


@every_method
def test_frozen_parameters_are_rows_and_columns_of_zeros(how: str) -> None:
    problem = mlp()
    hessian = reference("mlp").clone()
    frozen = torch.zeros(len(hessian), dtype=torch.bool)
    frozen[:24] = True  # the first weight, ahead of trained ones
    hessian[frozen] = 0
    hessian[:, frozen] = 0
    problem.parameters[0].requires_grad_(False)
    direction = vector(len(hessian))
    product = problem.operator(**METHODS[how]).matvec(direction)
    assert not product[frozen].any()
    assert relative_error(product, hessian @ direction) <= TOLERANCE[how]


@every_method
def test_a_model_that_is_all_frozen_has_no_curvature(how: str) -> None:
    problem = mlp()
    problem.model.requires_grad_(False)
    operator = problem.operator(**METHODS[how])
    assert not operator.matvec(vector(operator.size)).any()
    assert not operator.gradient().any()


@every_method
def test_unused_parameters_are_rows_and_columns_of_zeros(how: str) -> None:
    problem = mlp()
    hessian = reference("mlp")
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    operator = HessianOperator(problem.loss, [unused, *problem.parameters], problem.batches, **METHODS[how])
    direction = vector(2 + len(hessian))
    product = operator.matvec(direction)
    assert not product[:2].any()
    assert relative_error(product[2:], hessian @ direction[2:]) <= TOLERANCE[how]
    assert not operator.gradient()[:2].any()


@every_method
def test_a_tied_parameter_that_is_given_twice_counts_once(how: str) -> None:
    problem = PROBLEMS["tied"]()
    model: Any = problem.model
    once = problem.operator(**METHODS[how])
    twice = HessianOperator(
        problem.loss,
        [model.embedding.weight, *model.hidden.parameters(), model.output.weight],
        problem.batches,
        **METHODS[how],
    )
    assert twice.size == once.size == len(reference("tied"))
    direction = vector(once.size)
    assert torch.equal(twice.matvec(direction), once.matvec(direction))


# Batches.


def test_batches_may_come_from_an_iterator() -> None:
    problem = mlp()
    operator = HessianOperator(problem.loss, iter(problem.parameters), iter(problem.batches))
    direction = vector(operator.size)
    for _ in range(2):
        assert relative_error(operator.matvec(direction), reference("mlp") @ direction) <= TOLERANCE["kept"]


@pytest.mark.parametrize("max_batches", [None, 1, 2, 9])
@every_method
def test_statistics_of_the_batch_gradients_count_each_batch_once(how: str, max_batches: int | None) -> None:
    problem = mlp(sizes=(5, 3, 1))
    gradients = [Problem(problem.model, [batch]).gradient_at(problem.flat_parameters) for batch in problem.batches]
    used = gradients[:max_batches]
    operator = problem.operator(**METHODS[how])
    for _ in range(2):  # without and with kept graphs
        rows = torch.stack([vector(operator.size), torch.ones(operator.size, dtype=torch.float64)])
        statistics = operator.mean_over_batches(
            rows, lambda components, norm: torch.cat([components.square(), norm[None]]), 3, max_batches
        )
        expected = torch.stack([torch.cat([(rows @ g).square(), g.norm()[None]]) for g in used]).mean(dim=0)
        assert torch.allclose(statistics, expected, rtol=1e-12)
        operator.matvec(vector(operator.size))


# Where PyTorch cannot differentiate twice.


def once_differentiable_problem(where: str) -> Problem:
    """`mlp` with tanh again at its end, where one of both cannot be differentiated twice.

    In the middle of a network the gradient that comes in from above requires a gradient itself; PyTorch then puts a
    node into the graph that raises when it is reached. At the end nothing in the gradient tells of what is missing.
    """

    class OnceDifferentiable(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return OnceDifferentiableTanh.apply(inputs)

    problem = mlp()
    first, activation, *_, last = problem.model.children()
    layers = {
        "nowhere": [first, activation, last, nn.Tanh()],
        "middle": [first, OnceDifferentiable(), last, nn.Tanh()],
        "end": [first, activation, last, OnceDifferentiable()],
    }

    class Summed(Problem):
        def loss(self, batch: Batch) -> Tensor:
            return self.model(batch[0]).sum() / len(batch[0])

    return Summed(nn.Sequential(*layers[where]), problem.batches)


def once_differentiable_product(direction: Tensor) -> Tensor:
    return once_differentiable_problem("nowhere").operator(max_graph_bytes=0).matvec(direction)


@pytest.mark.parametrize("where", ["middle", "end"])
def test_auto_falls_back_to_finite_differences_with_one_warning(where: str) -> None:
    operator = once_differentiable_problem(where).operator()
    direction = vector(operator.size)
    expected = once_differentiable_product(direction)
    with pytest.warns(CurvatureWarning, match="differentiate") as caught:
        product = operator.matvec(direction)
    assert len(caught) == 1
    assert relative_error(product, expected) <= TOLERANCE["finite_difference"]
    assert operator.method == "finite_difference"
    assert operator.num_matvecs == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = operator.matvec(2 * direction)
    assert relative_error(again, 2 * expected) <= TOLERANCE["finite_difference"]
    assert caught[0].filename == __file__


def test_a_fallback_in_the_middle_of_several_batches_takes_all_of_them_by_finite_differences() -> None:
    """A step of 0.3 sets the two kinds of products apart: a sum of both would be neither."""
    exact, falling = (once_differentiable_problem(where) for where in ("nowhere", "middle"))
    first = exact.batches[0]

    def loss(batch: Batch) -> Tensor:
        return (exact if batch is first else falling).loss(batch)

    falling.model.load_state_dict(exact.model.state_dict())
    for other, parameter in zip(falling.model.children(), exact.model.children(), strict=True):
        other._parameters = parameter._parameters  # one set of parameters in both
    operator = HessianOperator(loss, exact.parameters, exact.batches, step=0.3)
    direction = vector(operator.size)
    with pytest.warns(CurvatureWarning):
        product = operator.matvec(direction)
    expected = exact.operator(method="finite_difference", step=0.3).matvec(direction)
    assert relative_error(product, expected) <= 1e-12
    assert relative_error(product, once_differentiable_product(direction)) > 1e-3
    assert operator.graph_bytes == 0
    assert relative_error(operator.matvec(direction), expected) <= 1e-12


@pytest.mark.parametrize("where", ["middle", "end"])
@pytest.mark.parametrize("how", EXACT)
def test_an_exact_method_that_cannot_be_had_is_refused_with_the_reason(how: str, where: str) -> None:
    operator = once_differentiable_problem(where).operator(**METHODS[how])
    with pytest.raises(MeasurementError, match=r"(?i)differentiate|\bjvp\b"):
        operator.matvec(vector(operator.size))


def test_an_error_of_the_loss_is_raised_as_it_is_and_is_no_reason_to_fall_back() -> None:
    problem = mlp()
    broken = True

    def loss(batch: Batch) -> Tensor:
        if broken:
            raise RuntimeError("shapes do not match")
        return problem.loss(batch)

    operator = HessianOperator(loss, problem.parameters, problem.batches)
    direction = vector(operator.size)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes do not match"):
            operator.matvec(direction)
    broken = False
    assert relative_error(operator.matvec(direction), reference("mlp") @ direction) <= TOLERANCE["kept"]
    assert operator.method == "double_backward"


def test_an_error_of_a_later_batch_is_no_reason_to_fall_back_either() -> None:
    problem = mlp()

    def loss(batch: Batch) -> Tensor:
        if batch is problem.batches[1]:
            raise RuntimeError("shapes do not match")
        return problem.loss(batch)

    operator = HessianOperator(loss, problem.parameters, problem.batches)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="shapes do not match"):
            operator.matvec(vector(operator.size))
    assert operator.method == "double_backward"


@pytest.mark.parametrize("error", [KeyError, ZeroDivisionError, torch.OutOfMemoryError])
@every_method
def test_errors_that_do_not_concern_derivatives_pass_through(how: str, error: type[Exception]) -> None:
    problem = mlp()

    def loss(batch: Batch) -> Tensor:
        raise error("from the loss")

    operator = HessianOperator(loss, problem.parameters, problem.batches, **METHODS[how])
    with pytest.raises(error, match="from the loss"):
        operator.matvec(vector(operator.size))


@every_method
def test_values_and_gradients_are_evaluated_with_the_kernels_of_the_products(how: str) -> None:
    """Dropout in attention draws its mask in the kernel: another kernel would be another function."""
    problem = mlp()
    seen: list[bool] = []

    def loss(batch: Batch) -> Tensor:
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        return problem.loss(batch)

    operator = HessianOperator(loss, problem.parameters, problem.batches[:1], **METHODS[how])
    direction = vector(operator.size)
    operator.matvec(direction)
    for measure in (operator.gradient, operator.value):
        measure()
        measure(direction)
    operator.values_along(direction, [1.0])
    operator.mean_over_batches(direction[None], lambda components, _: components, 1)
    assert set(seen) == {how == "finite_difference"}


def test_graphs_that_are_dropped_are_built_anew() -> None:
    problem = mlp()
    operator = HessianOperator(problem.loss, problem.parameters, problem.batches)
    direction = vector(operator.size)
    product = operator.matvec(direction)
    assert operator.graph_bytes > 0
    operator.drop_graphs()
    assert operator.graph_bytes == 0
    assert torch.equal(operator.matvec(direction), product)
    assert operator.graph_bytes > 0


# What is left alone.


@every_method
def test_parameters_and_their_gradients_are_left_alone(how: str) -> None:
    problem = mlp()
    parameters = problem.parameters
    parameters[0].grad = torch.ones_like(parameters[0])
    given = parameters[0].grad
    values = [parameter.detach().clone() for parameter in parameters]
    versions = [parameter._version for parameter in parameters]
    fail = False

    def loss(batch: Batch) -> Tensor:
        value = problem.loss(batch)
        if fail:
            raise KeyError("in the middle")
        return value

    operator = HessianOperator(loss, parameters, problem.batches, **METHODS[how])
    direction = vector(operator.size)
    calls = [operator.matvec, operator.gradient, operator.value]
    for call in calls:
        call(direction)
    operator.gradient(), operator.value()
    fail = True
    for call in calls[1:]:
        with pytest.raises(KeyError):
            call(direction)
    with pytest.raises(KeyError):
        HessianOperator(loss, parameters, problem.batches, **METHODS[how]).matvec(direction)
    assert [parameter._version for parameter in parameters] == versions
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, values, strict=True))
    assert parameters[0].grad is given
    assert given._version == 0
    assert all(parameter.grad is None for parameter in parameters[1:])
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in parameters)


@every_method
def test_hooks_on_the_parameters_neither_see_nor_change_a_measurement(how: str) -> None:
    """Such as gradient clipping by hooks, or counters; `post_accumulate` ones are for `.backward()` alone."""
    problem = mlp()
    seen = []

    def hook(gradient: Tensor) -> Tensor:
        seen.append(gradient)
        return 100 * gradient

    for parameter in problem.parameters:
        parameter.register_hook(hook)
        parameter.register_post_accumulate_grad_hook(seen.append)
    operator = problem.operator(**METHODS[how])
    direction = vector(operator.size)
    for _ in range(2):
        assert relative_error(operator.matvec(direction), reference("mlp") @ direction) <= TOLERANCE[how]
        assert relative_error(operator.gradient(), problem.gradient_at(problem.flat_parameters)) <= 1e-12
    assert not seen
    problem.loss(problem.batches[0]).backward()
    assert len(seen) == 2 * len(problem.parameters)  # they are still there


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "pearlmutter"}, r"`method`.*double_backward.*'pearlmutter'"),
        ({"step": 0.0}, r"`step`.*positive.*0\.0"),
        ({"step": -1e-3}, r"`step`.*positive.*-0\.001"),
        ({"step": float("nan")}, "`step`.*positive.*nan"),
        ({"max_graph_bytes": -1}, "`max_graph_bytes`.*non-negative.*-1"),
        ({"weights": [1.0]}, "`weights`.*2 batches.*1"),
        ({"weights": [1.0, 0.0]}, r"`weights`.*positive.*\[1\.0, 0\.0\]"),
        ({"weights": [1.0, float("nan")]}, r"`weights`.*positive.*nan"),
        ({"parameters": []}, "`parameters`.*at least one"),
        ({"parameters": [torch.zeros(0)]}, "`parameters`.*empty"),
        ({"parameters": [torch.zeros(2, dtype=torch.int64)]}, "`parameters`.*floating-point.*int64"),
        ({"parameters": [torch.zeros(2, dtype=torch.complex64)]}, "`parameters`.*real.*complex64"),
        ({"batches": []}, "`batches`.*at least one"),
    ],
)
def test_bad_arguments_are_named_with_their_values(arguments: dict[str, Any], message: str) -> None:
    problem = mlp()
    given = {"loss": problem.loss, "parameters": problem.parameters, "batches": problem.batches, **arguments}
    with pytest.raises(ValueError, match=message):
        HessianOperator(**given)


@every_method
@pytest.mark.parametrize("shape", [(50,), (1, 51), ()])
def test_vectors_of_a_wrong_shape_are_refused(how: str, shape: tuple[int, ...]) -> None:
    operator = mlp().operator(**METHODS[how])
    for measure in (operator.matvec, operator.gradient, operator.value):
        with pytest.raises(ValueError, match=r"\(51,\)"):
            measure(torch.ones(shape))
