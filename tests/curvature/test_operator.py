"""Products, gradients and values against dense references; randomness, memory, fallbacks and refusals."""

import functools
import gc
import random
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, Optional

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from lyapunov_lightning.curvature import CurvatureWarning, HessianOperator, MeasurementError
from lyapunov_lightning.curvature.operator import num_samples
from tests.curvature.helpers import random_vectors, relative_error, rng_state
from tests.models import PROBLEMS, Batch, Problem, lstm, mlp, transformer

METHODS: dict[str, dict[str, Any]] = {
    "kept": {"method": "double_backward"},
    "rebuilt": {"method": "double_backward", "max_graph_bytes": 0},
    "forward_over_reverse": {"method": "forward_over_reverse"},
    "finite_difference": {"method": "finite_difference"},
}
EXACT = ["kept", "rebuilt", "forward_over_reverse"]
# Exact products are off by rounding, times what cancels in a sum. A central difference over 1e-6 adds its third
# derivatives (1e-12) and the gradients' rounding over the step (1e-10).
TOLERANCE = {"kept": 1e-10, "rebuilt": 1e-10, "forward_over_reverse": 1e-10, "finite_difference": 1e-5}

every_method = pytest.mark.parametrize("how", METHODS)
every_problem = pytest.mark.parametrize("name", PROBLEMS)


def vector(size: int, seed: int = 0) -> Tensor:
    return random_vectors(1, size, seed)[0]


@functools.cache
def reference(name: str) -> Tensor:
    """The dense Hessian, by `torch.func` where that is right.

    In torch 2.15 `torch.func.hessian` is off by some per cent for functions of a LayerNorm's weight; second
    differences of the loss and `torch.autograd.functional.hessian` agree with each other against it.
    """
    problem = PROBLEMS[name]()
    if name == "transformer":
        return problem.dense_hessian()
    return torch.func.hessian(problem.loss_at)(problem.flat_parameters)


def rounded(build: Callable[[], Problem], dtype: torch.dtype) -> tuple[Problem, Problem]:
    """A problem in a narrow dtype, and the very same numbers in float64."""
    narrow, wide = build().to(dtype), build().to(dtype).to(torch.float64)
    return narrow, wide


@contextmanager
def or_refused() -> Iterator[None]:
    """To refuse with a `MeasurementError` is as right as a right number."""
    with suppress(MeasurementError):
        yield


def products(operator: HessianOperator, vectors: Tensor) -> Tensor:
    return torch.stack([operator.matvec(row) for row in vectors])


# Products against dense Hessians.


@every_method
@every_problem
def test_products_are_those_of_the_dense_hessian(name: str, how: str) -> None:
    hessian = reference(name)
    vectors = random_vectors(3, len(hessian))
    operator = PROBLEMS[name]().operator(**METHODS[how])
    assert relative_error(products(operator, vectors), vectors @ hessian) <= TOLERANCE[how]
    assert operator.num_matvecs == 3
    assert operator.size == len(hessian)


@every_problem
def test_auto_is_exact_where_pytorch_differentiates_twice(name: str) -> None:
    hessian = reference(name)
    operator = PROBLEMS[name]().operator()
    direction = vector(len(hessian))
    assert relative_error(operator.matvec(direction), hessian @ direction) <= TOLERANCE["kept"]
    assert operator.method == "double_backward"


def test_products_of_a_transformer_agree_with_second_differences_of_its_loss() -> None:
    """Nothing but loss values: independent of every way to differentiate."""
    problem = transformer()
    flat = problem.flat_parameters
    direction = vector(len(flat))
    direction /= direction.norm()
    step = 1e-2
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        losses = [float(problem.loss_at(flat + shift * step * direction)) for shift in (-2, -1, 0, 1, 2)]
    stencil = [-1 / 12, 4 / 3, -5 / 2, 4 / 3, -1 / 12]
    second_difference = sum(c * value for c, value in zip(stencil, losses, strict=True)) / step**2
    curvature = float(direction @ problem.operator().matvec(direction))
    # Fourth order in the step (1e-8 times the sixth derivative over the second), rounding 1e-16 / step**2 = 1e-12.
    assert curvature == pytest.approx(second_difference, rel=1e-5)


@pytest.mark.parametrize("how", EXACT)
@every_problem
def test_float32_products_are_exact_to_rounding(name: str, how: str) -> None:
    narrow, wide = rounded(PROBLEMS[name], torch.float32)
    direction = vector(len(wide.flat_parameters))
    product = narrow.operator(**METHODS[how]).matvec(direction)
    assert product.dtype == torch.float32
    # Measured 1e-7 to 3e-7, a few units of float32 rounding (6e-8).
    assert relative_error(product, wide.dense_hessian() @ direction) <= 2e-6


def test_float32_finite_differences_resolve_a_smooth_network() -> None:
    narrow, wide = rounded(mlp, torch.float32)
    direction = vector(len(wide.flat_parameters))
    product = narrow.operator(method="finite_difference").matvec(direction)
    # Central over 5e-2: third derivatives of order 1 times 2.5e-3 / 6, rounding 6e-8 / 5e-2.
    assert relative_error(product, wide.dense_hessian() @ direction) <= 2e-3


@pytest.mark.parametrize("how", EXACT)
@pytest.mark.parametrize("name", ["mlp", "lstm", "transformer"])
def test_bfloat16_products_come_in_float32(name: str, how: str) -> None:
    narrow, wide = rounded(PROBLEMS[name], torch.bfloat16)
    direction = vector(len(wide.flat_parameters))
    operator = narrow.operator(**METHODS[how])
    product = operator.matvec(direction)
    assert product.dtype == operator.dtype == torch.float32
    # Measured 0.5 to 1.2 per cent; bfloat16 rounds to 0.4 per cent.
    assert relative_error(product, wide.dense_hessian() @ direction) <= 0.03


@every_method
def test_parameters_of_mixed_dtypes_have_one_hessian(how: str) -> None:
    wide, inputs, labels = vector(12).view(4, 3), vector(15, seed=1).view(5, 3), torch.tensor([0, 1, 1, 0, 1])
    narrow = vector(8, seed=2).view(2, 4).float()

    def loss_of(wide: Tensor, narrow: Tensor) -> Tensor:
        hidden = torch.tanh(functional.linear(inputs, wide)).to(narrow.dtype)
        return functional.cross_entropy(functional.linear(hidden, narrow), labels)

    parameters = [wide.requires_grad_(), narrow.requires_grad_()]
    operator = HessianOperator(lambda batch: loss_of(*parameters), parameters, [inputs], **METHODS[how])
    hessian = torch.autograd.functional.hessian(
        lambda flat: loss_of(flat[:12].view(4, 3), flat[12:].view(2, 4)),
        torch.cat([wide.detach().reshape(-1), narrow.detach().double().reshape(-1)]),
    )
    direction = vector(20, seed=3)
    product = operator.matvec(direction)
    assert product.dtype == torch.float64
    # The narrow half is in float32: its rounding, or the error of a difference over a step fit for it.
    assert relative_error(product, hessian @ direction) <= (2e-3 if how == "finite_difference" else 2e-6)


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
def test_a_linear_loss_has_no_curvature(how: str) -> None:
    weight = vector(4).requires_grad_()
    batches = [vector(20, seed=1).view(5, 4), vector(12, seed=2).view(3, 4)]
    operator = HessianOperator(lambda batch: (batch @ weight).mean(), [weight], batches, **METHODS[how])
    assert torch.equal(operator.matvec(vector(4)), torch.zeros(4, dtype=torch.float64))


@every_method
def test_parameters_that_enter_linearly_do_not_disturb_the_others(how: str) -> None:
    curved, linear = vector(3).requires_grad_(), vector(2, seed=1).requires_grad_()
    operator = HessianOperator(
        lambda batch: (torch.tanh(curved) ** 2).sum() + (batch @ linear).mean(),
        [linear, curved],
        [torch.ones(4, 2, dtype=torch.float64)],
        **METHODS[how],
    )
    hessian = torch.autograd.functional.hessian(lambda x: (torch.tanh(x) ** 2).sum(), curved.detach())
    direction = vector(5, seed=2)
    product = operator.matvec(direction)
    assert not product[:2].any()
    assert relative_error(product[2:], hessian @ direction[2:]) <= TOLERANCE[how]


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


@every_method
def test_products_of_a_weight_normalised_layer_are_those_of_its_formula(how: str) -> None:
    """In torch 2.15 the fused weight norm has a wrong second derivative: `gradgradcheck` fails for it."""
    layer = weight_norm(nn.Linear(3, 2, dtype=torch.float64))
    inputs = vector(15).view(5, 3)
    parameters = dict(layer.named_parameters())
    bias, length, direction = (
        parameters[name] for name in ("bias", "parametrizations.weight.original0", "parametrizations.weight.original1")
    )
    with torch.no_grad():
        for seed, parameter in enumerate((bias, length, direction)):
            parameter.copy_(vector(parameter.numel(), seed + 1).view_as(parameter))

    def by_formula(flat: Tensor) -> Tensor:
        bias, length, direction = flat[:2], flat[2:4].view(2, 1), flat[4:].view(2, 3)
        weight = length * direction / direction.norm(dim=1, keepdim=True)
        return torch.tanh(functional.linear(inputs, weight, bias)).square().mean()

    hessian = torch.autograd.functional.hessian(
        by_formula, torch.cat([parameter.detach().reshape(-1) for parameter in (bias, length, direction)])
    )
    operator = HessianOperator(
        lambda batch: torch.tanh(layer(batch)).square().mean(), [bias, length, direction], [inputs], **METHODS[how]
    )
    v = vector(10, seed=9)
    assert relative_error(operator.matvec(v), hessian @ v) <= TOLERANCE[how]


def test_finite_differences_are_central_ones_over_the_given_step() -> None:
    problem = mlp()
    flat = problem.flat_parameters
    direction = vector(len(flat))
    step = 0.3  # far beyond where it approximates the Hessian: the definition itself is at stake
    unit = direction / direction.norm()
    difference = problem.gradient_at(flat + step * unit) - problem.gradient_at(flat - step * unit)
    product = problem.operator(method="finite_difference", step=step).matvec(direction)
    assert relative_error(product, difference * direction.norm() / (2 * step)) <= 1e-12


def test_finite_differences_do_not_depend_on_the_length_of_the_vector() -> None:
    operator = mlp().operator(method="finite_difference")
    direction = vector(operator.size)
    product = operator.matvec(direction)
    for scale in (1e-8, 1e8):
        # The same points but for rounding, which the small step magnifies to 1e-10.
        assert relative_error(operator.matvec(scale * direction), scale * product) <= 1e-8
    assert not operator.matvec(torch.zeros_like(direction)).any()


@every_method
def test_products_are_right_without_grad_mode_and_in_inference_mode(how: str) -> None:
    """Lightning's validation hooks run in one of the two."""
    hessian = reference("mlp")
    operator = mlp().operator(**METHODS[how])
    direction = vector(operator.size)
    with torch.no_grad():
        assert relative_error(operator.matvec(direction), hessian @ direction) <= TOLERANCE[how]
    operator = mlp().operator(**METHODS[how])
    with torch.inference_mode():
        product = operator.matvec(direction)
    assert relative_error(product, hessian @ direction) <= TOLERANCE[how]


def checkpointed_mlp(**options: Any) -> tuple[HessianOperator, Problem]:
    """`mlp` whose activations are computed again in the backward pass, when `loss` has long returned."""
    problem = mlp()

    def loss(batch: Batch) -> Tensor:
        return functional.cross_entropy(checkpoint(problem.model, batch[0], use_reentrant=False), batch[1])

    return HessianOperator(loss, problem.parameters, problem.batches, **options), problem


@every_method
def test_products_of_a_checkpointed_model_are_those_of_the_plain_one(how: str) -> None:
    operator, _ = checkpointed_mlp(**METHODS[how])
    direction = vector(operator.size)
    with or_refused() if how == "forward_over_reverse" else nullcontext():  # PyTorch finds the recomputation wanting
        assert relative_error(operator.matvec(direction), reference("mlp") @ direction) <= TOLERANCE[how]


def test_gradients_of_a_checkpointed_model_are_those_at_the_displaced_parameters() -> None:
    operator, problem = checkpointed_mlp()
    displacement = 0.1 * vector(operator.size)
    expected = problem.gradient_at(problem.flat_parameters + displacement)
    assert relative_error(operator.gradient(displacement), expected) <= 1e-12


@every_method
def test_parameters_that_moved_between_products_are_not_mixed_with_the_old_ones(how: str) -> None:
    problem = mlp()
    operator = problem.operator(**METHODS[how])
    direction = vector(operator.size)
    operator.matvec(direction)
    with torch.no_grad():
        for parameter in problem.parameters:
            parameter.add_(0.5)
    expected = problem.dense_hessian() @ direction
    with or_refused():
        assert relative_error(operator.matvec(direction), expected) <= TOLERANCE[how]


# Batches and their weights.

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


def test_batches_may_come_from_an_iterator() -> None:
    problem = mlp()
    operator = HessianOperator(problem.loss, iter(problem.parameters), iter(problem.batches))
    direction = vector(operator.size)
    for _ in range(2):
        assert relative_error(operator.matvec(direction), reference("mlp") @ direction) <= TOLERANCE["kept"]


# Gradients and values.


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


@pytest.mark.parametrize("max_batches", [None, 1, 2, 9])
@every_method
def test_statistics_of_the_batch_gradients_count_each_batch_once(how: str, max_batches: Optional[int]) -> None:
    problem = mlp(sizes=(5, 3, 1))
    gradients = [Problem(problem.model, [batch]).gradient_at(problem.flat_parameters) for batch in problem.batches]
    used = gradients[:max_batches]
    operator = problem.operator(**METHODS[how])
    for _ in range(2):  # without and with kept graphs
        statistics = operator.mean_over_batches(lambda g: torch.stack([g @ g, g.sum()]), 2, max_batches)
        expected = torch.stack([torch.stack([g @ g, g.sum()]) for g in used]).mean(dim=0)
        assert torch.allclose(statistics, expected, rtol=1e-12)
        operator.matvec(vector(operator.size))


# Randomness.


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


# What is left behind: nothing.


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


def test_products_are_new_vectors_and_leave_the_given_one_alone() -> None:
    operator = mlp().operator()
    direction = vector(operator.size).requires_grad_()
    copy = direction.detach().clone()
    first, second = operator.matvec(direction), operator.matvec(direction)
    expected = second.clone()
    first.zero_()
    assert torch.equal(second, expected)
    assert torch.equal(direction, copy)
    assert not second.requires_grad


# Memory.


class Watched:
    """A loss that remembers the storages of the tensors created in it, without keeping them alive.

    The output of tanh and exp is saved by the very node that creates it, the reference cycle that is easily left over.
    """

    def __init__(
        self, problem: Problem, fail_at: Optional[int] = None, tanh: Callable[[Tensor], Tensor] = torch.tanh
    ) -> None:
        self._problem = problem
        self._tanh = tanh
        self._fail_at = fail_at
        self.calls = 0
        self.storages: list[StorageWeakRef] = []

    def __call__(self, batch: Batch) -> Tensor:
        self.calls += 1
        hidden = self._tanh(functional.linear(batch[0], *self._problem.parameters[:2]))
        scores = functional.linear(hidden, *self._problem.parameters[2:])
        probabilities = torch.exp(functional.log_softmax(scores, dim=1))
        self.storages += [StorageWeakRef(tensor.untyped_storage()) for tensor in (hidden, probabilities)]
        if self.calls == self._fail_at:
            raise KeyError("in the middle")
        return functional.nll_loss(torch.log(probabilities), batch[1])

    @property
    def num_alive(self) -> int:
        return sum(not storage.expired() for storage in self.storages)


@contextmanager
def without_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@every_method
def test_nothing_outlives_the_operator(how: str) -> None:
    problem = mlp()
    loss = Watched(problem)
    with without_garbage_collector():
        operator = HessianOperator(loss, problem.parameters, problem.batches, **METHODS[how])
        direction = vector(operator.size)
        operator.matvec(direction)
        assert len(loss.storages) >= 4
        assert (loss.num_alive > 0) == (how == "kept")  # it is watched what is meant to be watched
        for call in (operator.matvec, operator.gradient, operator.value):
            call(direction)
        assert (loss.num_alive > 0) == (how == "kept")
        del operator, call
        assert loss.num_alive == 0


@pytest.mark.parametrize("distributed", [False, True])
@every_method
def test_nothing_outlives_an_exception(how: str, distributed: bool) -> None:
    problem = mlp()
    loss = Watched(problem, fail_at=2)  # the graph of the first batch is there
    reduce = (lambda buffer: None) if distributed else None
    with without_garbage_collector():
        operator = HessianOperator(loss, problem.parameters, problem.batches, reduce=reduce, **METHODS[how])
        with pytest.raises(KeyError) as caught:
            operator.matvec(vector(operator.size))
        del caught
        del operator
        assert len(loss.storages) >= 4
        assert loss.num_alive == 0


def test_nothing_outlives_a_fallback() -> None:
    problem = mlp()
    loss = Watched(problem, tanh=OnceDifferentiableTanh.apply)
    with without_garbage_collector():
        operator = HessianOperator(loss, problem.parameters, problem.batches)
        with pytest.warns(CurvatureWarning):
            operator.matvec(vector(operator.size))
        assert operator.graph_bytes == 0
        assert len(loss.storages) >= 4
        assert loss.num_alive == 0


def test_graphs_are_kept_within_their_bound() -> None:
    problem = mlp(sizes=(4, 4, 4))
    hessian = problem.dense_hessian()
    one = HessianOperator(Watched(problem), problem.parameters, problem.batches[:1])
    direction = vector(one.size)
    one.matvec(direction)
    assert one.graph_bytes > 4 * (6 + 3) * 8  # no less than the two layers' outputs
    for room, kept in ((0.5, 0), (1, 1), (1.5, 1), (2.5, 2), (3, 3), (10, 3)):
        loss = Watched(problem)
        bound = int(room * one.graph_bytes)
        operator = HessianOperator(loss, problem.parameters, problem.batches, max_graph_bytes=bound)
        first = operator.matvec(direction)
        assert operator.graph_bytes == kept * one.graph_bytes <= bound
        assert loss.calls == 3
        again = operator.matvec(direction)
        assert loss.calls == 3 + (3 - kept)  # the others are built anew
        for product in (first, again):
            assert relative_error(product, hessian @ direction) <= TOLERANCE["kept"]


class OnceDifferentiableTanh(torch.autograd.Function):
    """Has no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1 - y**2)


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


@pytest.mark.parametrize("where", ["middle", "end"])
@pytest.mark.parametrize("how", EXACT)
def test_an_exact_method_that_cannot_be_had_is_refused_with_the_reason(how: str, where: str) -> None:
    operator = once_differentiable_problem(where).operator(**METHODS[how])
    with pytest.raises(MeasurementError, match=r"(?i)differentiate|\bjvp\b"):
        operator.matvec(vector(operator.size))


def fused_attention_operator(**options: Any) -> HessianOperator:
    """`transformer` with an attention kernel of its own choice, which has no second derivative."""
    problem = transformer()

    def loss(batch: Batch) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return problem.loss(batch)

    return HessianOperator(loss, problem.parameters, problem.batches, **options)


def test_auto_falls_back_where_a_kernel_has_no_second_derivative() -> None:
    operator = fused_attention_operator()
    direction = vector(operator.size)
    with pytest.warns(CurvatureWarning, match="finite differences.*attention") as caught:
        product = operator.matvec(direction)
    assert len(caught) == 1
    assert relative_error(product, reference("transformer") @ direction) <= TOLERANCE["finite_difference"]
    assert operator.method == "finite_difference"
    assert operator.graph_bytes == 0


@pytest.mark.parametrize("how", EXACT)
def test_a_kernel_without_second_derivative_is_refused_by_exact_methods(how: str) -> None:
    operator = fused_attention_operator(**METHODS[how])
    with pytest.raises(MeasurementError, match="attention"):
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


@pytest.mark.parametrize("error", [KeyError, ZeroDivisionError, torch.OutOfMemoryError])
@every_method
def test_errors_that_do_not_concern_derivatives_pass_through(how: str, error: type[Exception]) -> None:
    problem = mlp()

    def loss(batch: Batch) -> Tensor:
        raise error("from the loss")

    operator = HessianOperator(loss, problem.parameters, problem.batches, **METHODS[how])
    with pytest.raises(error, match="from the loss"):
        operator.matvec(vector(operator.size))


@pytest.mark.parametrize("how", EXACT)
def test_fused_recurrent_layers_are_replaced_by_differentiable_ones(how: str) -> None:
    """In float32 a CPU takes oneDNN's LSTM, which has no forward mode."""
    narrow, wide = rounded(lstm, torch.float32)
    direction = vector(len(wide.flat_parameters))
    flag = torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CurvatureWarning)
        operator = narrow.operator(**METHODS[how])
        for _ in range(2):
            assert relative_error(operator.matvec(direction), wide.dense_hessian() @ direction) <= 2e-6
    assert operator.method == METHODS[how]["method"]
    assert (torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()) == flag


def raw_parameter_operator(how: str) -> HessianOperator:
    weight = vector(3).requires_grad_()
    return HessianOperator(lambda batch: Square.apply(weight).sum(), [weight], [torch.ones(1)], **METHODS[how])


@pytest.mark.parametrize("how", ["kept", "rebuilt"])
def test_double_backward_needs_no_substitution(how: str) -> None:
    assert torch.allclose(raw_parameter_operator(how).matvec(vector(3)), 2 * vector(3))


@pytest.mark.parametrize("how", ["forward_over_reverse", "finite_difference"])
def test_parameters_that_cannot_be_substituted_are_noticed_in_products(how: str) -> None:
    with pytest.raises(MeasurementError, match=r"cannot be substituted.*`method='double_backward'`"):
        raw_parameter_operator(how).matvec(vector(3))


@pytest.mark.parametrize("measure", ["gradient", "value"])
def test_parameters_that_cannot_be_substituted_are_noticed_at_a_displacement(measure: str) -> None:
    operator = raw_parameter_operator("kept")
    with pytest.raises(MeasurementError, match="cannot be substituted"):
        getattr(operator, measure)(vector(3))


class FunctionalSquare:
    """A loss that says itself how it is evaluated at other values."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, batch: Any) -> Tensor:
        return self.at([self._weight], batch)

    def at(self, values: Any, batch: Any) -> Tensor:
        return Square.apply(values[0]).sum()


@pytest.mark.parametrize("how", ["kept", "rebuilt", "finite_difference"])
def test_a_loss_with_a_method_at_is_evaluated_by_it(how: str) -> None:
    weight = vector(3).requires_grad_()
    operator = HessianOperator(FunctionalSquare(weight), [weight], [torch.ones(1)], **METHODS[how])
    displacement = vector(3, seed=1)
    assert relative_error(operator.matvec(displacement), 2 * displacement) <= TOLERANCE[how]
    assert torch.allclose(operator.gradient(displacement), 2 * (weight.detach() + displacement), rtol=1e-14)
    assert operator.value(displacement) == pytest.approx(float(((weight.detach() + displacement) ** 2).sum()))


def test_finite_differences_of_half_precision_parameters_are_refused() -> None:
    narrow, _ = rounded(mlp, torch.bfloat16)
    operator = narrow.operator(method="finite_difference")
    direction = vector(operator.size)
    for measure in (operator.matvec, operator.gradient, operator.value):
        with pytest.raises(MeasurementError, match=r"half-precision.*float32"):
            measure(direction)


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


# The sum over processes.


class OtherProcesses:
    """A reduction that adds what another operator, of the same parameters, brought to its own reduction."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []
        self.others: Optional[OtherProcesses] = None

    def __call__(self, buffer: Tensor) -> None:
        self.sent.append(buffer.clone())
        if self.others is not None:
            buffer.add_(self.others.sent[len(self.sent) - 1])


def measurements(operator: HessianOperator) -> tuple[Tensor, Tensor, float]:
    return operator.matvec(vector(51)), operator.gradient(), operator.value()


@pytest.mark.parametrize("num_here", [0, 1, 2])
@every_method
def test_each_process_gets_the_measurement_on_the_union_of_unequal_shards(how: str, num_here: int) -> None:
    problem = mlp(sizes=(5, 3, 2))
    there, here = OtherProcesses(), OtherProcesses()
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
    assert len(here.sent) == 3  # one collective each


def test_a_measurement_for_which_no_process_has_a_batch_is_refused() -> None:
    problem = mlp()
    operator = HessianOperator(problem.loss, problem.parameters, [], reduce=OtherProcesses())
    for measure in (lambda: operator.matvec(vector(51)), operator.gradient, operator.value):
        with pytest.raises(MeasurementError, match="No process has a batch"):
            measure()


@pytest.mark.parametrize("measure", ["matvec", "gradient", "value"])
def test_a_process_that_fails_still_takes_part_in_the_reduction(measure: str) -> None:
    problem = mlp()
    failing, healthy = OtherProcesses(), OtherProcesses()
    healthy.others = failing

    def loss(batch: Batch) -> Tensor:
        raise KeyError("only here")

    arguments = [vector(51)] if measure == "matvec" else []
    operator = HessianOperator(loss, problem.parameters, problem.batches, reduce=failing)
    with pytest.raises(KeyError, match="only here"):
        getattr(operator, measure)(*arguments)
    assert len(failing.sent) == 1
    operator = HessianOperator(problem.loss, problem.parameters, problem.batches, reduce=healthy)
    with pytest.raises(MeasurementError, match="failed in 1 other process"):
        getattr(operator, measure)(*arguments)
    assert len(healthy.sent) == 1
    assert failing.sent[0].shape == healthy.sent[0].shape
