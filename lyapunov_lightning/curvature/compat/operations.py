"""Repairs of PyTorch: what it differentiates wrongly, slowly or not at all the second time, and how that is avoided.

Each repair has a test that says what PyTorch does without it, in ``tests/curvature/compat/test_operations.py``.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from lyapunov_lightning.curvature.compat.activations import gelu, silu
from lyapunov_lightning.curvature.compat.batch_norm import batch_norm
from lyapunov_lightning.curvature.compat.convolution import convolution
from lyapunov_lightning.curvature.compat.cross_entropy import cross_entropy


@contextmanager
def eager() -> Iterator[None]:
    """Run what was compiled as it was written: compiled code has one derivative, and is compiled anew for a copy."""
    # `set_stance` imports the compiler, which takes seconds; where nobody has imported it, nothing is compiled.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def twice_differentiable_kernels(plain_rnn: bool = False) -> Iterator[None]:
    """Choose kernels of attention and of recurrent layers that have a second derivative.

    Args:
        plain_rnn: Whether recurrent layers are computed from their parts, slowly; the fused ones have one derivative.

    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if plain_rnn:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the next line warns of TF32 on Intel GPUs, whatever the device
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        yield


@contextmanager
def without_graph() -> Iterator[None]:
    """Record no graph, and compute otherwise as if one was recorded.

    Without a graph `nn.MultiheadAttention` takes a fused path in evaluation mode. Its rounding differs, so the loss
    along a line would not fit the derivatives at its origin.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class TwiceDifferentiableOperations(TorchFunctionMode):
    """Computes from their parts what PyTorch cannot differentiate twice, or not rightly, or slowly.

    Args:
        duals: The dual tensors of a derivative in forward mode. PyTorch carries tangents through ``torch.no_grad`` as
            well; here what is computed there is a constant in forward mode too, unless it is a mere copy of these.

    """

    def __init__(self, duals: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._duals = set(map(id, duals))

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        function: Callable[..., Any] = _UNFUSED.get(func, func)
        kwargs = kwargs or {}
        # An exception are parameters that are copied into a replica's under `no_grad`: their tangents are the point.
        if self._duals and not torch.is_grad_enabled():
            is_copy = func is Tensor.copy_ and len(args) > 1 and id(args[1]) in self._duals
            with forward_ad._set_fwd_grad_enabled(is_copy):
                return function(*args, **kwargs)
        return function(*args, **kwargs)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    norm: Tensor = torch.norm_except_dim(v, 2, dim)
    return v * (g / norm)


def _mse_loss(inputs: Tensor, target: Tensor, reduction: str = "mean", **legacy: Any) -> Tensor:
    # Deprecated arguments and weights: PyTorch's own code has them, and warns of what it should.
    if any(value is not None for value in legacy.values()):
        return functional.mse_loss(inputs, target, reduction=reduction, **legacy)
    squares = (inputs - target).square()
    return {"none": squares, "mean": squares.mean(), "sum": squares.sum()}[reduction]


def _hardsigmoid(inputs: Tensor, inplace: bool = False) -> Tensor:
    result = functional.relu6(inputs + 3) / 6
    return inputs.copy_(result) if inplace else result


def _triangular_solve(
    b: Tensor,
    A: Tensor,  # noqa: N803
    upper: bool = True,
    transpose: bool = False,
    unitriangular: bool = False,
) -> Any:
    # The transpose of an upper triangular matrix is a lower one, so `upper` turns round with `transpose`.
    matrix = A.mT if transpose else A
    solution = torch.linalg.solve_triangular(matrix, b, upper=upper != transpose, unitriangular=unitriangular)
    return torch.return_types.triangular_solve((solution, A.clone()))


def _cholesky_inverse(L: Tensor, upper: bool = False) -> Tensor:  # noqa: N803
    # (L Lᵀ)⁻¹ is the solution for the identity, and solving has right derivatives in both modes.
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
    return torch.cholesky_solve(identity, L, upper=upper)


def _linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
    # Without `options`, which is where the chunks are asked for.
    loss: Tensor = functional.linear_cross_entropy(*args, **kwargs)
    return loss


_UNFUSED: dict[Any, Callable[..., Tensor]] = {
    torch._weight_norm: _weight_norm,  # its second derivative takes the norm for a constant
    functional.mse_loss: _mse_loss,  # its gradient has no forward derivative
    torch.cholesky_inverse: _cholesky_inverse,  # its forward derivative is wrong
    Tensor.cholesky_inverse: _cholesky_inverse,
    torch.triangular_solve: _triangular_solve,  # the forward derivative of its gradient is wrong
    Tensor.triangular_solve: _triangular_solve,
    functional.hardsigmoid: _hardsigmoid,  # it has one derivative
    torch.conv1d: convolution,  # its gradient is differentiated by convolutions with kernels as large as the image
    torch.conv2d: convolution,
    torch.conv3d: convolution,
    functional.gelu: gelu,  # each product computes its two derivatives anew
    functional.silu: silu,
    functional.batch_norm: batch_norm,  # in evaluation its gradient is differentiated by dozens of passes
    functional.cross_entropy: cross_entropy,  # likewise, and it keeps three numbers for each class of each sample
}
if hasattr(functional, "linear_cross_entropy"):  # in chunks its gradient is taken for a constant
    _UNFUSED[functional.linear_cross_entropy] = _linear_cross_entropy


class SavedTensorHooks:
    """Whether a loss was computed under hooks on its saved tensors.

    Attributes:
        used: True if so. Checkpointed layers are the common case: whoever reads what they saved evaluates them again,
            which has to happen where the loss was evaluated.

    """

    def __init__(self) -> None:
        self.used = False


@contextmanager
def watched_checkpointing() -> Iterator[SavedTensorHooks]:
    """Let all checkpointing be plain and non-reentrant meanwhile, and notice hooks on saved tensors.

    Reentrant checkpointing runs a backward pass of its own within the backward pass: it writes to ``.grad`` in place of
    returning a gradient, so that derivatives taken by ``autograd.grad`` are zero. Selective checkpointing keeps some
    results for one backward pass only.
    """
    seen = SavedTensorHooks()
    hooks: Any = torch.autograd.graph.saved_tensors_hooks
    enter = hooks.__enter__

    def noticed(self: Any) -> Any:
        seen.used = True
        return enter(self)

    with ExitStack() as stack:
        stack.enter_context(replaced(hooks, "__enter__", noticed))
        stack.enter_context(replaced(checkpoint.CheckpointFunction, "apply", _checkpointed_without_reentry))
        for name in ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode"):  # of selective checkpointing
            stack.enter_context(replaced(getattr(checkpoint, name), "__torch_dispatch__", _dispatched))
        yield seen


@contextmanager
def replaced(owner: type, name: str, value: Any) -> Iterator[None]:
    """Replace a class's attribute meanwhile, an inherited one too."""
    # From `vars`, and deleted afterwards where it was inherited: `getattr` would bind it, or leave a copy on the
    # subclass.
    before = {name: vars(owner)[name]} if name in vars(owner) else {}
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        for own in before:
            setattr(owner, own, before[own])


def _dispatched(self: Any, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
    return func(*args, **(kwargs or {}))


def _checkpointed_without_reentry(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    if not any(isinstance(argument, Tensor) and argument.requires_grad for argument in args):
        with torch.no_grad():  # reentrant checkpointing gives no gradients then, whatever is inside
            return function(*args)
    return checkpoint.checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, determinism_check="none"
    )


def beginning(tensor: Tensor) -> Tensor | GradientEdge:
    """Where the graph behind a tensor begins, to be differentiated without the tensor; a leaf is its own graph."""
    return tensor if tensor.is_leaf else get_gradient_edge(tensor)


def differentiated(
    outputs: Sequence[Tensor | GradientEdge],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    retain_graph: bool,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad``, but for hooks on the inputs and under the substitution of parameters.

    The public function counts as an operation that a mode may override, and what it calls no longer sees the mode: a
    checkpointed layer that is evaluated again would find the parameters in place of their substitutes. Autocast is for
    the evaluation alone: the backward pass of each operation has the dtype that was chosen for the operation itself.
    """
    with _without_hooks(inputs), ExitStack() as stack:
        for kind in {"cpu", *(cotangent.device.type for cotangent in cotangents)}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        engine: Any = torch.autograd.Variable._execution_engine
        return engine.run_backward(  # type: ignore[no-any-return]
            tuple(outputs),
            tuple(cotangents),
            retain_graph,
            create_graph,
            tuple(inputs),
            allow_unreachable=True,
            accumulate_grad=False,
        )


@contextmanager
def _without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Keep the user's hooks on the parameters from seeing and changing the gradients of a measurement."""
    with torch._C.DisableTorchFunction():  # a mode would see each look at a parameter
        registered = [parameter._backward_hooks for parameter in parameters if parameter.is_leaf]
    # Emptied and filled again, and not replaced: a user's handle removes its hook from this very dictionary.
    kept = [(hooks, dict(hooks)) for hooks in registered if hooks]
    try:
        for hooks, _ in kept:
            hooks.clear()
        yield
    finally:
        for hooks, before in kept:
            hooks.update(before)


def dtypes_behind(tensor: Tensor) -> set[torch.dtype]:
    """The floating-point dtypes in the graph behind a tensor, its own among them: the narrowest limits its accuracy."""
    found = {metadata.dtype for node in nodes([tensor]) for metadata in node._input_metadata}
    return {dtype for dtype in found if dtype.is_floating_point} | {tensor.dtype}


def nodes(tensors: Sequence[Tensor]) -> list[Any]:
    """The nodes of the graph behind some tensors, each once."""
    # With a list of what is still to be visited: graphs of recurrent layers are deeper than Python may recurse.
    pending: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen: dict[Any, None] = {}
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen[node] = None
            pending += [following for following, _ in node.next_functions]
    return list(seen)


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor behind what the transforms of ``torch.func`` show in its place."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
