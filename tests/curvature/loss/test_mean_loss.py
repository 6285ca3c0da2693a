"""Values and gradients of the mean loss: weights, random numbers, ranks."""

import random
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lyapunov_lightning.curvature import HessianOperator, MeasurementError
from lyapunov_lightning.curvature.loss.fixed_batches import num_samples
from tests.curvature.helpers import (
    METHODS,
    TOLERANCE,
    Twin,
    every_method,
    every_problem,
    random_vectors,
    reference,
    relative_error,
    rng_state,
    vector,
)
from tests.problems import PROBLEMS, Batch, Problem, mlp, transformer

# Values and gradients.


@pytest.mark.parametrize("how", METHODS)
@every_problem
def test_gradients_and_values_are_those_of_the_mean_loss(name: str, how: str) -> None:
    problem = PROBLEMS[name]()
    flat = problem.flat_parameters
    displacement = 0.1 * vector(len(flat), seed=4)
    operator = problem.operator(**METHODS[how])
    for _ in range(2):  # before a product and after it, when there may be a kept graph
        assert relative_error(operator.gradient(), problem.gradient_at(flat)) <= 1e-12
        assert relative_error(operator.gradient(displacement), problem.gradient_at(flat + displacement)) <= 1e-12
        assert operator.value() == pytest.approx(float(problem.loss_at(flat)), rel=1e-13)
        assert operator.value(displacement) == pytest.approx(float(problem.loss_at(flat + displacement)), rel=1e-13)
        operator.matvec(displacement)


def test_values_of_an_encoder_in_eval_mode_are_those_at_the_displaced_parameters() -> None:
    """Without gradients an encoder in eval mode takes a fused path of its own."""
    problem = transformer()
    problem.model.eval()
    displacement = 0.1 * vector(len(problem.flat_parameters))
    expected = float(problem.loss_at(problem.flat_parameters + displacement))
    assert problem.operator().value(displacement) == pytest.approx(expected, rel=1e-12)


@every_method
def test_gradients_are_right_without_grad_mode_and_in_inference_mode(how: str) -> None:
    problem = mlp()
    operator = problem.operator(**METHODS[how])
    with torch.no_grad():
        assert relative_error(operator.gradient(), problem.gradient_at(problem.flat_parameters)) <= 1e-12
    with torch.inference_mode():
        gradient = operator.gradient()
    assert relative_error(gradient, problem.gradient_at(problem.flat_parameters)) <= 1e-12


@every_method
def test_a_loss_that_is_no_scalar_is_refused_with_a_remedy(how: str) -> None:
    problem = mlp()

    def operator(loss: Callable[[Batch], Any]) -> HessianOperator:
        return HessianOperator(loss, problem.parameters, problem.batches, **METHODS[how])

    for measure in ("matvec", "gradient", "value"):
        vectors = [vector(51)] if measure == "matvec" else []
        with pytest.raises(MeasurementError, match=r"scalar.*shape \(5, 3\).*`\.mean\(\)`"):
            getattr(operator(lambda batch: problem.model(batch[0])), measure)(*vectors)
        with pytest.raises(MeasurementError, match="scalar tensor, got float"):
            getattr(operator(lambda batch: problem.loss(batch).item()), measure)(*vectors)
        with pytest.raises(MeasurementError, match="scalar tensor, got NoneType"):
            getattr(operator(lambda batch: None), measure)(*vectors)


def test_a_loss_of_one_element_is_a_scalar() -> None:
    problem = mlp()
    operator = HessianOperator(lambda batch: problem.loss(batch).reshape(1, 1), problem.parameters, problem.batches)
    direction = vector(operator.size)
    assert relative_error(operator.matvec(direction), reference("mlp") @ direction) <= TOLERANCE["kept"]


# Weights.

Pair = namedtuple("Pair", ["inputs", "labels"])


@dataclass
class Sample:
    inputs: Tensor
    labels: Tensor


class Record:
    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs = inputs
        self.labels = labels


STRUCTURES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Batch]]] = {
    "dict": (lambda x, y: {"x": x, "y": y}, lambda batch: (batch["x"], batch["y"])),
    "list": (lambda x, y: [x, y], lambda batch: (batch[0], batch[1])),
    "namedtuple": (Pair, lambda batch: (batch.inputs, batch.labels)),
    "dataclass": (Sample, lambda batch: (batch.inputs, batch.labels)),
    "object": (Record, lambda batch: (batch.inputs, batch.labels)),
    "nested": (
        lambda x, y: {"id": "a", "data": [None, (x, {"y": y})]},
        lambda b: (b["data"][1][0], b["data"][1][1]["y"]),
    ),
    "scalar_first": (lambda x, y: (torch.tensor(2.0), x, y), lambda batch: (batch[1], batch[2])),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_batches_weigh_by_their_samples_whatever_their_structure(structure: str) -> None:
    pack, unpack = STRUCTURES[structure]
    problem = mlp(sizes=(5, 3, 1))
    batches = [pack(*batch) for batch in problem.batches]
    assert [num_samples(batch) for batch in batches] == [5, 3, 1]
    operator = HessianOperator(lambda batch: problem.loss(unpack(batch)), problem.parameters, batches)
    direction = vector(operator.size)
    assert relative_error(operator.matvec(direction), problem.dense_hessian() @ direction) <= TOLERANCE["kept"]


class Split(Enum):
    TRAIN = "train"


def test_samples_are_counted_past_values_that_hold_no_tensors() -> None:
    labelled = {"split": Split.TRAIN, "names": ["a", "b"], "x": torch.zeros(3, 2)}
    assert num_samples(labelled) == 3
    cyclic = Record(torch.zeros(4, 1), torch.zeros(4))
    cyclic.parent = [cyclic]  # type: ignore[attr-defined]
    assert num_samples([cyclic]) == 4


@pytest.mark.parametrize("batch", [{"x": 1.0}, [torch.tensor(1.0)], (), None, "text", {"split": Split.TRAIN}])
def test_samples_that_cannot_be_counted_are_refused(batch: Any) -> None:
    with pytest.raises(ValueError, match=f"number of samples.*{type(batch).__name__}.*`weights`"):
        num_samples(batch)


def test_explicit_weights_make_a_weighted_mean() -> None:
    problem = mlp()
    hessians = [Problem(problem.model, [batch]).dense_hessian() for batch in problem.batches]
    direction = vector(len(problem.flat_parameters))
    for weights in ([1.0, 1.0], [0.5, 7.0]):
        expected = sum(w * h for w, h in zip(weights, hessians, strict=True)) @ direction / sum(weights)
        for how in METHODS:
            product = problem.operator(weights=weights, **METHODS[how]).matvec(direction)
            assert relative_error(product, expected) <= TOLERANCE[how]


def test_only_several_batches_need_weights() -> None:
    weight = vector(3).requires_grad_()

    def loss(scale: float) -> Tensor:
        return scale * (weight**2).sum()

    assert torch.allclose(HessianOperator(loss, [weight], [2.0]).matvec(torch.ones(3)), torch.full((3,), 4.0).double())
    with pytest.raises(ValueError, match="`weights`"):
        HessianOperator(loss, [weight], [2.0, 1.0])
    operator = HessianOperator(loss, [weight], [2.0, 1.0], weights=[1, 3])
    assert torch.allclose(operator.matvec(torch.ones(3)), torch.full((3,), 2.5).double())


# Random numbers.


def noisy_loss(problem: Problem) -> Callable[[Batch], Tensor]:
    """Draws from the global generators of PyTorch, NumPy and Python."""

    def loss(batch: Batch) -> Tensor:
        inputs, labels = batch
        scale = 1 + 0.1 * float(np.random.rand()) + 0.1 * random.random()
        return problem.loss((scale * inputs + 0.1 * torch.randn_like(inputs), labels))

    return loss


@every_method
def test_all_products_see_the_same_dropout_masks(how: str) -> None:
    problem = mlp(dropout=0.5)
    torch.manual_seed(7)
    operator = problem.operator(**METHODS[how])

    def with_the_same_masks(flat: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return problem.loss_at(flat)

    hessian = torch.autograd.functional.hessian(with_the_same_masks, problem.flat_parameters)
    assert relative_error(hessian, reference("mlp")) > 0.1  # the masks make a difference
    u, v = random_vectors(2, operator.size)
    torch.manual_seed(99)  # the run goes on and draws other numbers between the products
    hu = operator.matvec(u)
    torch.rand(3)
    hv = operator.matvec(v)
    scale = float(hu.norm() * v.norm())
    assert relative_error(hu, hessian @ u) <= TOLERANCE[how]
    assert relative_error(operator.matvec(2 * u - 3 * v), 2 * hu - 3 * hv) <= 10 * TOLERANCE[how]
    assert float(u @ hv) == pytest.approx(float(v @ hu), abs=TOLERANCE[how] * scale)


@every_method
def test_products_of_a_loss_that_draws_from_every_generator_are_linear(how: str) -> None:
    problem = mlp()
    operator = HessianOperator(noisy_loss(problem), problem.parameters, problem.batches, **METHODS[how])
    u, v = random_vectors(2, operator.size)
    hu, hv = operator.matvec(u), operator.matvec(v)
    assert relative_error(operator.matvec(u + v), hu + hv) <= 10 * TOLERANCE[how]
    assert float(u @ hv) == pytest.approx(float(v @ hu), abs=TOLERANCE[how] * float(hu.norm() * v.norm()))


def test_value_gradient_and_products_belong_to_one_function_under_dropout() -> None:
    operator = mlp(dropout=0.5).operator()
    direction = vector(operator.size)
    direction /= direction.norm()
    step = 1e-4
    slope = (operator.value(step * direction) - operator.value(-step * direction)) / (2 * step)
    assert slope == pytest.approx(float(operator.gradient() @ direction), rel=1e-6)
    bend = (operator.gradient(step * direction) - operator.gradient(-step * direction)) / (2 * step)
    assert relative_error(operator.matvec(direction), bend) <= 1e-6  # third derivatives times step**2


def test_each_batch_has_masks_of_its_own() -> None:
    problem = mlp(dropout=0.5)
    batch = problem.batches[0]
    single = HessianOperator(problem.loss, problem.parameters, [batch])
    double = HessianOperator(problem.loss, problem.parameters, [batch, batch])
    direction = vector(single.size)
    assert relative_error(double.matvec(direction), single.matvec(direction)) > 0.01


@every_method
def test_global_generators_are_left_alone(how: str) -> None:
    problem = mlp()
    fail = False

    def loss(batch: Batch) -> Tensor:
        value = noisy_loss(problem)(batch)
        if fail:
            raise KeyError("in the middle")
        return value

    torch.rand(1), np.random.rand(), random.random()
    before = rng_state()
    operator = HessianOperator(loss, problem.parameters, problem.batches, **METHODS[how])
    direction = vector(operator.size)
    for call in (operator.matvec, operator.gradient, operator.value):
        call(direction)
        assert rng_state() == before
    operator.gradient()
    operator.value()
    assert rng_state() == before
    fail = True
    for call in (operator.gradient, operator.value):
        with pytest.raises(KeyError):
            call(direction)
        assert rng_state() == before
    with pytest.raises(KeyError):
        HessianOperator(loss, problem.parameters, problem.batches, **METHODS[how]).matvec(direction)
    assert rng_state() == before


# The mean over ranks.


class OtherRanks:
    """A reduction that adds what another operator, of the same parameters, brought to its own reduction."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []
        self.others: OtherRanks | None = None

    def __call__(self, buffer: Tensor) -> None:
        self.sent.append(buffer.clone())
        if self.others is not None:
            buffer.add_(self.others.sent[len(self.sent) - 1])


def measurements(operator: HessianOperator) -> tuple[Tensor, Tensor, float]:
    return operator.matvec(vector(51)), operator.gradient(), operator.value()


@pytest.mark.parametrize("num_here", [0, 1, 2])
@every_method
def test_each_rank_gets_the_measurement_on_the_union_of_unequal_shards(how: str, num_here: int) -> None:
    problem = mlp(sizes=(5, 3, 2))
    there, here = OtherRanks(), OtherRanks()
    here.others = there
    shards = problem.batches[:num_here], problem.batches[num_here:]
    mine, theirs = (
        HessianOperator(problem.loss, problem.parameters, shard, reduce=reduce, **METHODS[how])
        for shard, reduce in zip(shards, (here, there), strict=True)
    )
    measurements(theirs)
    product, gradient, value = measurements(mine)
    flat = problem.flat_parameters
    assert relative_error(product, problem.dense_hessian() @ vector(51)) <= TOLERANCE[how]
    assert relative_error(gradient, problem.gradient_at(flat)) <= 1e-12
    assert value == pytest.approx(float(problem.loss_at(flat)), rel=1e-13)
    assert (len(here.sent) == 3) == (how != "finite_difference")  # one each, and those that find the step


def test_a_measurement_for_which_no_rank_has_a_batch_is_refused() -> None:
    problem = mlp()
    operator = HessianOperator(problem.loss, problem.parameters, [], reduce=OtherRanks())
    for measure in (lambda: operator.matvec(vector(51)), operator.gradient, operator.value):
        with pytest.raises(MeasurementError, match="No rank has a batch"):
            measure()


@pytest.mark.parametrize("measure", ["matvec", "gradient", "value"])
def test_a_rank_that_fails_still_takes_part_in_the_reduction(measure: str) -> None:
    problem = mlp()
    failing, healthy = OtherRanks(), OtherRanks()
    healthy.others = failing

    def loss(batch: Batch) -> Tensor:
        raise KeyError("only here")

    arguments = [vector(51)] if measure == "matvec" else []
    operator = HessianOperator(loss, problem.parameters, problem.batches, reduce=failing)
    with pytest.raises(KeyError, match="only here"):
        getattr(operator, measure)(*arguments)
    assert len(failing.sent) == 1
    operator = HessianOperator(problem.loss, problem.parameters, problem.batches, reduce=healthy)
    with pytest.raises(MeasurementError, match="failed on 1 other rank"):
        getattr(operator, measure)(*arguments)
    assert len(healthy.sent) == 1
    assert failing.sent[0].shape == healthy.sent[0].shape


def test_the_values_along_a_line_are_one_collective() -> None:
    problem = mlp(sizes=(5, 3, 2))
    there, here = OtherRanks(), OtherRanks()
    here.others = there
    direction, distances = vector(51), [-1.0, 0.5, 3.0]
    for batches, reduce in ((problem.batches[1:], there), (problem.batches[:1], here)):
        operator = HessianOperator(problem.loss, problem.parameters, batches, reduce=reduce)
        values = operator.values_along(direction, distances)
    expected = problem.operator().values_along(direction, distances)
    assert torch.allclose(values, expected, rtol=1e-13)
    assert len(here.sent) == 1


def test_ranks_weigh_as_their_evaluations_tell() -> None:
    problem = mlp(sizes=(5, 3))
    there, here = OtherRanks(), OtherRanks()
    here.others = there
    direction = vector(51)
    for batch, reduce, weight in ((problem.batches[0], there, 2.0), (problem.batches[1], here, 7.0)):
        twin = Twin(problem, samples=lambda batch, weight=weight: weight)
        product = HessianOperator(twin, problem.parameters, [batch], reduce=reduce).matvec(direction)
    assert relative_error(product, problem.operator(weights=[2.0, 7.0]).matvec(direction)) <= 1e-12
