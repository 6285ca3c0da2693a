"""What `auto` makes of PyTorch's errors: the lack of a derivative, a failure for the moment, and all the others."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lyapunov_lightning.curvature import CurvatureWarning, HessianOperator, MeasurementError
from lyapunov_lightning.curvature.compat.errors import lacks_derivative, may_pass, of_a_second_derivative
from tests.curvature.helpers import EXACT, METHODS, TOLERANCE, or_refused, relative_error, vector
from tests.problems import Batch, mlp

NO_DERIVATIVE = [
    "derivative for aten::_scaled_dot_product_flash_attention_backward is not implemented",
    "the derivative for '_embedding_bag_backward' is not implemented.",
    "trying to differentiate twice a function that was marked with @once_differentiable",
    "torch.compile with aot_autograd does not currently support double backward",
    "Double backwards is not supported for CuDNN RNNs due to limitations in the CuDNN API. To run double backwards,"
    " please disable the CuDNN backend temporarily while running the forward pass of your RNN.",
    "retain_graph=True / double backward are not supported.",
    "the derivative of 'other' is not differentiable",
    "Trying to use forward AD with huber_loss_backward that does not support it because it has not been implemented",
    "You must implement the jvp function for custom autograd.Function to use it with forward mode AD.",
    "Nested forward mode AD is not supported at the moment",
    "ZeroTensors are immutable. Please use the materialized zero tensor obtained using .clone()",
    "element 0 of tensors does not require grad and does not have a grad_fn",
    "One of the differentiated Tensors does not require grad",
    "Trying to backward through the graph a second time (or directly access saved tensors after they were freed)",
    "Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.",
    "In order to use an autograd.Function with functorch transforms, it must override the setup_context staticmethod.",
    "\"baddbmm_with_gemm\" not implemented for 'Half'",
]
TRANSIENT = [
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb, m, n, k, &alpha, a, lda)`",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "CUDA error: unspecified launch failure",
    "NCCL Error 1: unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
    "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
    "HIP error: the operation cannot be performed in the present state",
]
OTHERS = [
    "The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 1",
    "mat1 and mat2 shapes cannot be multiplied (5x3 and 4x2)",
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "shapes do not match",
]


def test_words_of_pytorch_are_told_apart() -> None:
    for message in NO_DERIVATIVE:
        assert lacks_derivative(RuntimeError(message)), message
        assert not may_pass(RuntimeError(message)), message
    for message in TRANSIENT:
        assert may_pass(RuntimeError(message)), message
        assert not lacks_derivative(RuntimeError(message)), message
    for message in OTHERS:
        assert not may_pass(RuntimeError(message)), message
        assert not lacks_derivative(RuntimeError(message)), message
    for error in (torch.OutOfMemoryError("not implemented for"), MeasurementError("double backward")):
        assert not may_pass(error)
        assert not lacks_derivative(error)
    assert lacks_derivative(NotImplementedError("whatever"))


def test_what_fails_in_a_second_derivative_may_pass_and_is_a_lack_of_one_if_it_does_not() -> None:
    for message in ("Expected a proper Tensor but got None", *TRANSIENT, *OTHERS):
        with pytest.raises(RuntimeError) as caught, of_a_second_derivative():
            raise RuntimeError(message)
        is_memory = "memory" in message or "ALLOC" in message
        assert may_pass(caught.value) == (not is_memory), message
        assert lacks_derivative(caught.value) == (not is_memory and message not in TRANSIENT), message


class Failing(torch.autograd.Function):
    """Cosine, whose second derivative fails with an error each time that a list of them is not exhausted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, errors: list[Exception]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.errors = errors
        return x.cos()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled() and ctx.errors:
            raise ctx.errors.pop()
        return -x.sin() * gradient, None


def operator(errors: list[Exception], **options: Any) -> tuple[HessianOperator, Tensor]:
    x = vector(3).requires_grad_()
    hessian = HessianOperator(
        lambda batch: (Failing.apply(1 * x, errors) * batch).sum() + Failing.apply(x.exp(), []).sum(),
        [x],
        [torch.ones(3, dtype=torch.float64)],
        **options,
    )
    with torch.no_grad():
        diagonal = -x.cos() - x.exp() * (x.exp().sin() + x.exp() * x.exp().cos())
    return hessian, diagonal * vector(3, seed=1)


@pytest.mark.parametrize("message", TRANSIENT)
@pytest.mark.parametrize("method", ["auto", "double_backward"])
def test_a_failure_for_the_moment_is_tried_once_more(method: str, message: str) -> None:
    hessian, expected = operator([RuntimeError(message)], method=method)
    for _ in range(2):
        assert relative_error(hessian.matvec(vector(3, seed=1)), expected) <= 1e-12
    assert hessian.method == "double_backward"


@pytest.mark.parametrize("message", TRANSIENT)
def test_a_failure_that_lasts_is_raised_and_no_reason_to_fall_back(message: str) -> None:
    fallen: list[int] = []
    hessian, expected = operator([RuntimeError(message), RuntimeError(message)], on_fallback=lambda: fallen.append(1))
    with pytest.raises(RuntimeError, match=message[:10]) as caught:
        hessian.matvec(vector(3, seed=1))
    assert type(caught.value) is RuntimeError
    assert not fallen
    assert relative_error(hessian.matvec(vector(3, seed=1)), expected) <= 1e-12  # once it has passed
    assert hessian.method == "double_backward"


@pytest.mark.parametrize("message", [*NO_DERIVATIVE, "Expected a proper Tensor but got None"])
def test_the_lack_of_a_derivative_is_a_reason_to_fall_back(message: str) -> None:
    fallen: list[int] = []
    hessian, expected = operator([RuntimeError(message)] * 2, on_fallback=lambda: fallen.append(1))
    with pytest.warns(CurvatureWarning, match="cannot be differentiated twice"):
        product = hessian.matvec(vector(3, seed=1))
    assert relative_error(product, expected) <= 1e-8
    assert hessian.method == "finite_difference"
    assert fallen == [1]


def test_an_operator_that_fell_back_tries_again_after_a_reset() -> None:
    hessian, expected = operator([RuntimeError(NO_DERIVATIVE[0])])
    with pytest.warns(CurvatureWarning):
        hessian.matvec(vector(3, seed=1))
    hessian.reset()
    assert relative_error(hessian.matvec(vector(3, seed=1)), expected) <= 1e-12
    assert hessian.method == "double_backward"


@pytest.mark.parametrize("message", [message for message in OTHERS if "memory" not in message])
def test_errors_of_the_loss_itself_are_raised_as_they_are(message: str) -> None:
    def loss(batch: Tensor) -> Tensor:
        raise RuntimeError(message)

    hessian = HessianOperator(loss, [vector(3).requires_grad_()], [torch.ones(3)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError) as caught:
            hessian.matvec(vector(3))
    assert str(caught.value) == message
    assert hessian.method == "double_backward"


@pytest.mark.parametrize("how", EXACT)
@pytest.mark.parametrize("message", NO_DERIVATIVE[:3])
def test_exact_methods_say_what_is_missing(how: str, message: str) -> None:
    hessian, _ = operator([RuntimeError(message)] * 2, **METHODS[how])
    with pytest.raises(MeasurementError, match=r"differentiate this loss twice.*The reason"):
        hessian.matvec(vector(3))


# Compiled code.


def compiled_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def compiled_whole(model: nn.Module) -> Callable[[Batch], Tensor]:
    compiled = torch.compile(model, backend="aot_eager")
    return lambda batch: functional.cross_entropy(compiled(batch[0]), batch[1])


def compiled_in_place(model: nn.Module) -> Callable[[Batch], Tensor]:
    model.compile(backend="aot_eager")
    return lambda batch: functional.cross_entropy(model(batch[0]), batch[1])


def compiled_submodule(model: Any) -> Callable[[Batch], Tensor]:
    model[1] = torch.compile(nn.Sequential(nn.ReLU()), backend="aot_eager")
    return lambda batch: functional.cross_entropy(model(batch[0]), batch[1])


def compiled_function(model: nn.Module) -> Callable[[Batch], Tensor]:
    return torch.compile(lambda batch: functional.cross_entropy(model(batch[0]), batch[1]), backend="aot_eager")


@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize("how", [*METHODS, "auto"])
@pytest.mark.parametrize("of", [compiled_whole, compiled_in_place, compiled_submodule, compiled_function])
def test_compiled_relu_networks_are_exact(of: Callable[[nn.Module], Any], how: str, is_warm: bool) -> None:
    dynamo = pytest.importorskip("torch._dynamo")
    if not dynamo.is_dynamo_supported():
        pytest.skip("this Python is not known to torch.compile")
    dynamo.reset()
    torch.manual_seed(0)
    plain, batches = compiled_model(), mlp().batches
    model = compiled_model()
    model.load_state_dict(plain.state_dict())

    def plain_loss(batch: Batch) -> Tensor:
        return functional.cross_entropy(plain(batch[0]), batch[1])

    loss = of(model)
    if is_warm:
        loss(batches[0])  # compiled before, as in training
    hessian = HessianOperator(loss, model.parameters(), batches, **METHODS.get(how, {}))
    direction = vector(hessian.size)
    expected = HessianOperator(plain_loss, plain.parameters(), batches, method="double_backward").matvec(direction)
    assert relative_error(hessian.matvec(direction), expected) <= TOLERANCE.get(how, 1e-10)
    assert hessian.method == METHODS.get(how, {"method": "double_backward"})["method"]


# Transforms.


@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize("transform", ["grad", "vmap", "hessian", "jacrev", "jvp", "jacfwd"])
def test_transforms_in_a_loss_are_right_or_refused_by_every_method(transform: str, how: str) -> None:
    x = vector(4).requires_grad_()

    def function(y: Tensor) -> Tensor:
        return (y.sin() * y.exp()).sum()

    transforms: dict[str, Callable[[Tensor], Tensor]] = {
        "grad": torch.func.grad(function),
        "vmap": torch.func.vmap(lambda y: (y.sin() * y.exp()).expand(2)),
        "hessian": lambda y: torch.func.hessian(function)(y).sum(0),
        "jacrev": torch.func.jacrev(lambda y: y.sin() * y.sum()),
        "jvp": lambda y: torch.func.jvp(torch.sin, (y,), (y**2,))[1],
        "jacfwd": torch.func.jacfwd(lambda y: y.sin() * y.sum()),
    }

    def loss(values: Tensor) -> Tensor:
        return transforms[transform](values).square().sum()

    hessian = HessianOperator(lambda batch: loss(x), [x], [torch.ones(1)], **METHODS[how])
    direction = vector(4, seed=1)
    expected = torch.func.hessian(loss)(x.detach()) @ direction
    if how == "forward_over_reverse" and transform in ("jvp", "jacfwd", "hessian"):
        with pytest.raises(MeasurementError, match=r"[Nn]ested forward mode"):
            hessian.matvec(direction)
        return
    # Of a parameter that a transform wraps itself nothing can be substituted.
    with or_refused() if how in ("forward_over_reverse", "finite_difference") else nullcontext():
        assert relative_error(hessian.matvec(direction), expected) <= TOLERANCE[how]
