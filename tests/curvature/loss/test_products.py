"""Products by every way against dense Hessians, in every precision; graphs that are kept, and what is left of them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from lyapunov_lightning.curvature import CurvatureWarning, HessianOperator, MeasurementError
from lyapunov_lightning.curvature.loss import kept_graphs
from tests.curvature.helpers import (
    EXACT,
    METHODS,
    TOLERANCE,
    OnceDifferentiableTanh,
    Watched,
    every_method,
    every_problem,
    or_refused,
    random_vectors,
    reference,
    relative_error,
    rounded,
    vector,
    without_garbage_collector,
)
from tests.curvature.memory import PeakMemory
from tests.problems import PROBLEMS, mlp, transformer


def products(operator: HessianOperator, vectors: Tensor) -> Tensor:
    return torch.stack([operator.matvec(row) for row in vectors])


# Against dense Hessians.


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


# Finite differences.


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


@pytest.mark.parametrize("step", [None, 1e-2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_finite_differences_of_a_loss_in_half_precision_are_refused(dtype: torch.dtype, step: float | None) -> None:
    """Also of one that is in half precision in a part only; what is no part of the loss counts for nothing."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    batch = vector(15).view(5, 3)

    def loss(batch: Tensor, is_rounded: bool = True) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype):
            model(batch.float())
        with torch.autocast("cpu", dtype, enabled=is_rounded):
            hidden = model[0](batch.to(dtype).float())
        return model[2](hidden.float().tanh()).square().mean()

    rounded_one = HessianOperator(loss, model.parameters(), [batch], method="finite_difference", step=step)
    with pytest.raises(MeasurementError, match=rf"rounding of half precision.*{dtype}.*autocast.*double_backward"):
        rounded_one.matvec(vector(rounded_one.size))
    wide = HessianOperator(lambda b: loss(b, False), model.parameters(), [batch], method="finite_difference", step=step)
    assert wide.matvec(vector(wide.size)).isfinite().all()


def test_auto_does_not_fall_back_where_the_loss_is_in_half_precision() -> None:
    weight = vector(9).view(3, 3).float().requires_grad_()

    def loss(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return OnceDifferentiableTanh.apply(batch @ weight).float().square().mean()

    operator = HessianOperator(loss, [weight], [vector(15).view(5, 3).float()])
    with pytest.raises(MeasurementError, match="rounding of half precision"):
        operator.matvec(vector(9))
    assert operator.method == "double_backward"


def test_finite_differences_of_half_precision_parameters_are_refused() -> None:
    narrow, _ = rounded(mlp, torch.bfloat16)
    operator = narrow.operator(method="finite_difference")
    direction = vector(operator.size)
    for measure in (operator.matvec, operator.gradient, operator.value):
        with pytest.raises(MeasurementError, match=r"half-precision.*float32"):
            measure(direction)


# Kept graphs, and what is left behind.


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


def test_a_graph_that_does_not_fit_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the parameters change, when there may be room for another one."""
    measured: list[int] = []
    monkeypatch.setattr(kept_graphs, "graph_bytes", lambda *_, **__: measured.append(1) or 100)
    problem = mlp(sizes=(4, 4))
    operator = problem.operator(max_graph_bytes=150)
    for _ in range(3):
        operator.matvec(vector(operator.size))
    assert len(measured) == 2
    with torch.no_grad():
        problem.parameters[0].add_(0.1)
    operator.matvec(vector(operator.size))
    assert len(measured) == 4


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


# Blocks of vectors.


@every_method
@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm"])
def test_blocks_are_multiplied_column_by_column(name: str, how: str) -> None:
    problem = PROBLEMS[name]()
    operator = problem.operator(**METHODS[how])
    block = random_vectors(4, operator.size).T
    before = block.clone()
    for _ in range(2):  # without and with kept graphs
        product = operator.matmat(block)
        assert product.shape == block.shape
        assert relative_error(product, reference(name) @ block) <= TOLERANCE[how]
    assert operator.num_matvecs == 8
    assert torch.equal(block, before)
    assert torch.equal(operator @ block, product)
    assert operator.matmat(block[:, :0]).shape == (operator.size, 0)


def test_a_block_takes_one_evaluation_of_each_batch_and_one_collective() -> None:
    problem = mlp()
    for room in (2**29, 0):
        loss, sums = Watched(problem), []
        operator = HessianOperator(
            loss, problem.parameters, problem.batches, max_graph_bytes=room, reduce=lambda b, sums=sums: sums.append(b)
        )
        operator.matmat(random_vectors(5, operator.size).T)
        assert loss.calls == len(problem.batches)
        assert len(sums) == 1


def test_a_block_that_falls_back_does_so_as_a_whole() -> None:
    problem = mlp()
    operator = HessianOperator(Watched(problem, tanh=OnceDifferentiableTanh.apply), problem.parameters, problem.batches)
    block = random_vectors(3, operator.size).T
    with pytest.warns(CurvatureWarning) as caught:
        product = operator.matmat(block)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert relative_error(product, reference("mlp") @ block) <= TOLERANCE["finite_difference"]


@every_method
@pytest.mark.parametrize("shape", [(51,), (50, 2), (2, 51), (51, 2, 1)])
def test_blocks_of_a_wrong_shape_are_refused(how: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`block` should have shape \(51, k\)"):
        mlp().operator(**METHODS[how]).matmat(torch.ones(shape))


def test_a_product_without_a_kept_graph_takes_no_more_memory_than_plain_double_backward() -> None:
    """Of a model whose parameters take more than what its layers return: with the vector that is multiplied."""
    model = nn.Sequential(nn.Linear(40, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 1))
    parameters, inputs = list(model.parameters()), torch.ones(2, 40)
    operator = HessianOperator(lambda x: model(x).square().mean(), parameters, [inputs], max_graph_bytes=0)
    direction = torch.ones(operator.size)

    def plain() -> Tensor:
        gradient = torch.autograd.grad(model(inputs).square().mean(), parameters, create_graph=True)
        flat = torch.cat([entry.reshape(-1) for entry in gradient])
        return torch.cat([entry.reshape(-1) for entry in torch.autograd.grad(flat, parameters, direction)])

    peaks = []
    for product in (plain, lambda: operator.matvec(direction)):
        with PeakMemory() as memory:
            found = product()
        peaks.append(memory.num_bytes)
    assert peaks[1] <= 1.05 * peaks[0]
    assert relative_error(found, plain().double()) <= 1e-5


# What a product waits for, and in which precision it is.


class Reads(TorchDispatchMode):
    """Counts how often a number is read from the device."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["kept", "rebuilt", "finite_difference"])
def test_products_in_a_solver_wait_for_nothing(how: str) -> None:
    problem = mlp(sizes=(4, 3, 2))
    operator = problem.operator(**METHODS[how])
    direction = vector(operator.size)
    with operator.space.together():
        for _ in range(2):
            operator.matvec(direction)
        with Reads() as reads:
            operator.matvec(direction)
    assert reads.number == 0


@pytest.mark.parametrize("how", EXACT)
def test_an_autocast_region_around_a_product_is_that_of_the_loss_alone(how: str) -> None:
    """The loss is rounded, as the region asks for; what is done with its derivatives is not."""
    weight = (0.1 * vector(64)).view(8, 8).float().requires_grad_()
    inputs = vector(80, seed=1).view(10, 8).float()
    direction = vector(64, seed=2).float()

    def plain(batch: Tensor) -> Tensor:
        return (batch @ weight).float().exp().mean()

    def rounded_itself(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(batch)

    expected = HessianOperator(rounded_itself, [weight], [inputs], **METHODS[how])
    operator = HessianOperator(plain, [weight], [inputs], **METHODS[how])
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            product, gradient, value = operator.matvec(direction), operator.gradient(), operator.value()
        assert product.dtype == gradient.dtype == torch.float32
        assert torch.equal(product, expected.matvec(direction))
        assert torch.equal(gradient, expected.gradient())
        assert value == expected.value()
    exact = HessianOperator(plain, [weight], [inputs], method="double_backward").matvec(direction)
    assert relative_error(product, exact.double()) <= 0.02
