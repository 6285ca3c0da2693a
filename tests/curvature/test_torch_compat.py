"""What PyTorch does without each repair, and what the repair makes of it.

The tests named ``test_pytorch_...`` speak of PyTorch alone: where one fails, its repair has become superfluous.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from lyapunov_lightning.curvature import CurvatureWarning, HessianOperator, MeasurementError
from lyapunov_lightning.curvature.torch_compat import (
    TwiceDifferentiableOperations,
    differentiated,
    graph_bytes,
    twice_differentiable_kernels,
)
from tests.curvature.helpers import (
    EXACT,
    METHODS,
    TOLERANCE,
    OnceDifferentiableTanh,
    every_method,
    or_refused,
    reference,
    relative_error,
    rounded,
    twice,
    vector,
)
from tests.problems import PROBLEMS, Batch, Problem, lstm, mlp, transformer


@contextmanager
def ones_as_tangents(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    with forward_ad.dual_level():
        yield [forward_ad.make_dual(p.detach(), torch.ones_like(p)).requires_grad_() for p in parameters]


# Kernels and operations.


def test_pytorch_has_no_second_derivative_of_fused_attention() -> None:
    problem = transformer()
    with pytest.raises(RuntimeError, match=r"attention.* is not implemented"):
        twice(problem.loss(problem.batches[0]), problem.parameters)


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


def test_pytorch_has_no_forward_derivative_of_fused_recurrent_layers() -> None:
    """In float32 a CPU takes oneDNN's LSTM; a GPU takes cuDNN's, which has no second derivative either."""
    problem = lstm().to(torch.float32)
    names = [name for name, _ in problem.model.named_parameters()]
    with ones_as_tangents(problem.parameters) as duals, pytest.raises(RuntimeError, match="rnn"):
        torch.func.functional_call(problem.model, dict(zip(names, duals, strict=True)), problem.batches[0][0])


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


def test_pytorch_takes_the_norm_of_a_normalised_weight_for_a_constant_in_its_second_derivative() -> None:
    direction, length = (vector(n, n).view(2, -1).requires_grad_() for n in (6, 2))
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        gradgradcheck(lambda v, g: torch._weight_norm(v, g, 0), (direction, length))


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


def test_pytorch_has_no_forward_derivative_of_the_gradient_of_squared_errors() -> None:
    with ones_as_tangents([torch.zeros(3)]) as (dual,), pytest.raises(RuntimeError, match="ZeroTensors"):
        torch.autograd.grad(functional.mse_loss(dual, torch.ones(3)), dual)


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"reduction": "none"}, {"size_average": False}])
@pytest.mark.parametrize("how", EXACT)
def test_products_of_squared_errors_are_those_of_their_formula(how: str, options: dict[str, Any]) -> None:
    weight, inputs, targets = vector(3).requires_grad_(), vector(15, 1).view(5, 3), vector(5, 2)

    def loss(batch: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the old arguments
            return functional.mse_loss(torch.tanh(batch @ weight), targets, **options).mean()

    hessian = torch.autograd.functional.hessian(
        lambda w: (torch.tanh(inputs @ w) - targets).square().sum(), weight.detach()
    )
    if options.get("reduction", "mean") != "sum" and "size_average" not in options:
        hessian /= 5
    product = HessianOperator(loss, [weight], [inputs], **METHODS[how])
    with or_refused() if how == "forward_over_reverse" and "size_average" in options else nullcontext():
        assert relative_error(product.matvec(vector(3, 3)), hessian @ vector(3, 3)) <= TOLERANCE[how]


class Kernels(TorchDispatchMode):
    """The sizes of the kernels of all convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.sizes.append(max(args[1].shape[2:]))
        return func(*args, **(kwargs or {}))


def largest_kernel_of_second_derivative() -> int:
    layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 3))
    parameters = list(layers.parameters())
    loss = torch.tanh(layers(torch.ones(4, 2, 12, 12))).sum()
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    with Kernels() as kernels:
        torch.autograd.grad(gradient, parameters, [torch.ones_like(entry) for entry in gradient])
    return max(kernels.sizes)


def test_pytorch_differentiates_the_gradient_of_a_convolution_by_kernels_as_large_as_the_image() -> None:
    """For which processors have no fast code."""
    assert largest_kernel_of_second_derivative() == 8


def test_the_gradient_of_a_convolution_is_differentiated_by_convolutions_like_itself() -> None:
    with TwiceDifferentiableOperations():
        assert largest_kernel_of_second_derivative() == 3


def test_pytorch_differentiates_a_function_twice_that_is_marked_as_differentiable_once() -> None:
    """At the end of a network, where the gradient that comes in depends on no parameter; wrongly."""
    x = vector(3).requires_grad_()
    (second,) = twice(OnceDifferentiableTanh.apply(x).sum() + x.square().sum(), [x])
    assert torch.equal(second, torch.full((3,), 2.0, dtype=torch.float64))


def test_pytorch_shows_gradients_to_hooks_on_the_parameters() -> None:
    x = vector(3).requires_grad_()
    x.register_hook(lambda gradient: 100 * gradient)
    assert torch.equal(torch.autograd.grad(x.sum(), x)[0], torch.full((3,), 100.0, dtype=torch.float64))
    (gradient,) = differentiated((x.sum(),), (torch.ones_like(x.sum()),), [x], retain_graph=False)
    assert torch.equal(gradient, torch.ones(3, dtype=torch.float64))


# Compiled code.


@pytest.fixture
def dynamo() -> Any:
    """The compiler's front end, which knows no later versions of Python than its own."""
    dynamo = pytest.importorskip("torch._dynamo")
    if not dynamo.is_dynamo_supported():
        pytest.skip("this Python is not known to torch.compile")
    dynamo.reset()
    dynamo.utils.counters.clear()
    return dynamo


def test_pytorch_differentiates_compiled_code_once(dynamo: Any) -> None:
    problem = mlp()
    compiled = torch.compile(problem.model, backend="aot_eager")
    with pytest.raises(RuntimeError, match="double backward"):
        twice(functional.cross_entropy(compiled(problem.batches[0][0]), problem.batches[0][1]), problem.parameters)


@every_method
def test_compiled_code_is_run_as_it_was_written(dynamo: Any, how: str) -> None:
    problem = mlp()
    compiled = torch.compile(problem.model, backend="aot_eager")
    operator = HessianOperator(
        lambda batch: functional.cross_entropy(compiled(batch[0]), batch[1]),
        problem.parameters,
        problem.batches,
        **METHODS[how],
    )
    direction = vector(operator.size)
    for _ in range(2):
        assert relative_error(operator.matvec(direction), reference("mlp") @ direction) <= TOLERANCE[how]
    assert operator.method == METHODS[how]["method"]
    assert not dynamo.utils.counters["stats"]  # nothing was compiled


# Transforms of torch.func inside of a loss.


def test_pytorch_has_no_transforms_under_hooks_on_saved_tensors() -> None:
    with saved_tensors_hooks(lambda x: x, lambda x: x), pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.jacrev(torch.sin)(torch.ones(3))


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "jacrev": lambda f, x: torch.func.vmap(torch.func.jacrev(f))(x),
    "hessian": lambda f, x: torch.func.vmap(torch.func.hessian(f))(x),
    "grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(x),
    "jacfwd": lambda f, x: torch.func.vmap(torch.func.jacfwd(f))(x),
    "jvp": lambda f, x: torch.func.jvp(torch.func.vmap(f), (x,), (torch.ones_like(x),))[1],
}


@pytest.mark.parametrize("how", ["kept", "rebuilt", "finite_difference"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_products_of_losses_with_transforms_are_exact(name: str, how: str) -> None:
    """Such as the residual of a differential equation."""
    problem = mlp()

    def residual(model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        return TRANSFORMS[name](lambda x: model(x).square().sum(), batch[0]).square().sum()

    def by_flat(flat: Tensor) -> Tensor:
        pieces = flat.split([parameter.numel() for parameter in problem.parameters])
        named = zip(problem.model.named_parameters(), pieces, strict=True)
        values = {name: piece.view(parameter.shape) for (name, parameter), piece in named}
        losses = [residual(lambda x: torch.func.functional_call(problem.model, values, x), b) for b in problem.batches]
        return torch.stack(losses).sum() / sum(len(labels) for _, labels in problem.batches)

    def loss(batch: Batch) -> Tensor:
        return residual(problem.model, batch) / len(batch[0])

    operator = HessianOperator(loss, problem.parameters, problem.batches, **METHODS[how])
    direction = vector(operator.size)
    hessian = torch.func.hessian(by_flat)(problem.flat_parameters)
    for _ in range(2):
        assert relative_error(operator.matvec(direction), hessian @ direction) <= TOLERANCE[how]
    assert (operator.graph_bytes > 0) == (how == "kept")


def test_auto_is_exact_for_losses_with_transforms() -> None:
    problem = mlp()
    operator = HessianOperator(
        lambda batch: torch.func.vmap(torch.func.jacrev(problem.model))(batch[0]).square().sum(),
        problem.parameters,
        problem.batches,
    )
    operator.matvec(vector(operator.size))
    assert operator.method == "double_backward"


# The memory of graphs.


class Cube(torch.autograd.Function):
    """Saves tensors that are neither its input nor its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        square = x**2
        ctx.save_for_backward(x, square)
        return x * square

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        _, square = ctx.saved_tensors
        return 3 * square * gradient


def cubed() -> Problem:
    class Cubed(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return Cube.apply(inputs)

    problem = mlp()
    return Problem(nn.Sequential(problem.model[0], Cubed(), problem.model[3]), problem.batches)


def num_bytes(tensors: Sequence[Tensor], besides: Sequence[Tensor]) -> int:
    """The memory behind some tensors, each byte once."""
    spans: dict[int, set[int]] = {}
    for tensor in tensors:
        first = tensor.storage_offset()
        index = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
        entries = index.as_strided(tensor.shape, tensor.stride(), first).reshape(-1).unique().tolist()
        size = tensor.element_size()
        spans.setdefault(tensor.untyped_storage().data_ptr(), set()).update(
            size * entry + place for entry in entries for place in range(size)
        )
    for tensor in besides:
        spans.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(map(len, spans.values()))


@pytest.mark.parametrize("name", [*PROBLEMS, "cubed"])
def test_the_memory_of_a_graph_is_what_hooks_would_count(name: str) -> None:
    problem = cubed() if name == "cubed" else PROBLEMS[name]()
    saved: list[Tensor] = []

    def gradient() -> list[Tensor]:
        with twice_differentiable_kernels(), TwiceDifferentiableOperations():
            loss = problem.loss(problem.batches[0])
            return [loss, *torch.autograd.grad(loss, problem.parameters, create_graph=True)]

    def count(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())  # alive, so that no place in memory is used twice
        return tensor.detach()

    with saved_tensors_hooks(count, lambda tensor: tensor):
        entries = gradient()
    expected = num_bytes([*saved, *entries], besides=problem.parameters)
    del entries, saved[:]
    assert graph_bytes(gradient(), besides=problem.parameters) == expected > 0


def test_views_count_as_what_they_show() -> None:
    """Such as a batch that was cut out of a data set in memory."""
    data, weight = torch.zeros(1000, 3), torch.zeros(3, requires_grad=True)
    output = data[:4] @ weight + (data[4:6] @ weight).sum() + data[0] @ weight
    assert graph_bytes([output]) == 4 * (7 * 3 + 4)  # and the output itself
    assert graph_bytes([output], besides=[data]) == 4 * 4


def test_what_a_backward_pass_of_the_loss_has_freed_does_not_count() -> None:
    """As an attack on the inputs leaves it behind, in what the loss goes on to use."""
    weight, noise = (vector(3, seed).requires_grad_() for seed in (1, 2))
    noisy = noise.sin()
    noisy.sum().backward()

    def loss(batch: Tensor) -> Tensor:
        return (noisy * batch * weight).exp().sum()

    operator = HessianOperator(loss, [weight], [torch.ones(1, dtype=torch.float64)])
    direction = vector(3)
    for _ in range(2):
        product = operator.matvec(direction)
        factor = noisy.detach()
        assert relative_error(product, factor**2 * (factor * weight.detach()).exp() * direction) <= 1e-12
    assert operator.method == "double_backward"
    assert operator.graph_bytes > 0
