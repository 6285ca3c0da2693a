"""Repairs of PyTorch: what it differentiates wrongly, slowly or not at all the second time, and how that is avoided.

Each repair has a test that says what PyTorch does without it, in ``tests/curvature/test_torch_compat.py``.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from lyapunov_lightning.curvature.convolution import convolution


@contextmanager
def eager() -> Iterator[None]:
    """Run what was compiled as it was written: compiled code has one derivative, and is compiled anew for a copy."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def twice_differentiable_kernels(plain_rnn: bool = False) -> Iterator[None]:
    """Choose kernels that have a second derivative, of attention and of recurrent layers.

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


class TwiceDifferentiableOperations(TorchFunctionMode):
    """Computes from their parts what PyTorch cannot differentiate twice, or not rightly, or slowly."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        function: Callable[..., Any] = _UNFUSED.get(func, func)
        return function(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    norm: Tensor = torch.norm_except_dim(v, 2, dim)
    return v * (g / norm)


def _mse_loss(inputs: Tensor, target: Tensor, reduction: str = "mean", **legacy: Any) -> Tensor:
    if any(value is not None for value in legacy.values()):
        return functional.mse_loss(inputs, target, reduction=reduction, **legacy)
    squares = (inputs - target).square()
    return {"none": squares, "mean": squares.mean(), "sum": squares.sum()}[reduction]


_UNFUSED: dict[Any, Callable[..., Tensor]] = {
    torch._weight_norm: _weight_norm,  # its second derivative takes the norm for a constant
    functional.mse_loss: _mse_loss,  # its gradient has no forward derivative
    torch.conv1d: convolution,  # its gradient is differentiated by convolutions with kernels as large as the image
    torch.conv2d: convolution,
    torch.conv3d: convolution,
}


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
        stack.enter_context(_replaced(hooks, "__enter__", noticed))
        stack.enter_context(_replaced(checkpoint.CheckpointFunction, "apply", _checkpointed_without_reentry))
        for name in ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode"):  # of selective checkpointing
            stack.enter_context(_replaced(getattr(checkpoint, name), "__torch_dispatch__", _dispatched))
        yield seen


@contextmanager
def _replaced(owner: type, name: str, value: Any) -> Iterator[None]:
    """Replace a class's attribute meanwhile, an inherited one too."""
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


def differentiated(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    retain_graph: bool,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad``, but for hooks on the inputs and under the substitution of parameters.

    The public function counts as an operation that a mode may override, and what it calls no longer sees the mode: a
    checkpointed layer that is evaluated again would find the parameters in place of their substitutes.
    """
    with _without_hooks(inputs):
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
    """Keep hooks on the parameters' gradients, the user's own, from seeing and changing those of a measurement."""
    registered = [parameter._backward_hooks for parameter in parameters if parameter.is_leaf]
    kept = [(hooks, dict(hooks)) for hooks in registered if hooks]
    try:
        for hooks, _ in kept:
            hooks.clear()
        yield
    finally:
        for hooks, before in kept:
            hooks.update(before)


def check_twice_differentiable(loss: Tensor) -> None:
    """Refuse a loss with functions in its graph that are marked as differentiable once.

    PyTorch itself only raises where the way from the gradient to the parameters leads through such a function.

    Raises:
        RuntimeError: If there is one.

    """
    for node in nodes([loss]):
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        if getattr(backward, "__code__", None) is _ONCE_DIFFERENTIABLE:
            raise RuntimeError(f"{node.name()} is marked with @once_differentiable: it cannot be differentiated twice.")


_ONCE_DIFFERENTIABLE = once_differentiable(lambda ctx: None).__code__


def nodes(tensors: Sequence[Tensor]) -> Iterator[Any]:
    """The nodes of the graph behind some tensors, each once."""
    pending: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending.extend(following for following, _ in node.next_functions)


def graph_bytes(tensors: Sequence[Tensor], besides: Sequence[Tensor] = ()) -> int:
    """The memory that the graph behind some tensors holds, and the tensors themselves.

    Hooks on saved tensors would count it more easily, but with them no transform of ``torch.func`` works.

    Args:
        tensors: The tensors.
        besides: Tensors whose memory is not counted, since it is there anyway.

    """
    not_counted = {tensor.untyped_storage().data_ptr() for tensor in besides}
    views: dict[int, dict[tuple[int, int], int]] = {}
    whole: dict[int, int] = {}
    for tensor in (*tensors, *_saved_tensors(tensors)):
        if tensor.layout is not torch.strided or tensor._is_zerotensor():  # the zeros of forward derivatives
            continue
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in not_counted:
            whole[key] = storage.nbytes()
            views.setdefault(key, {})[tensor.data_ptr(), tensor.numel()] = tensor.numel() * tensor.element_size()
    return sum(min(whole[key], sum(parts.values())) for key, parts in views.items())


def _saved_tensors(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """What the nodes of a graph keep for the backward pass."""
    names: dict[type, list[str]] = {}
    for node in nodes(tensors):
        kind = type(node)
        if kind not in names:
            names[kind] = [name for name in dir(kind) if name.startswith("_saved_")]
        try:
            saved = [getattr(node, name) for name in names[kind]]
            saved.extend(getattr(node, "saved_tensors", ()))
        except RuntimeError:  # freed by a backward pass of the loss's own, or written to since
            continue
        for value in saved:
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, Tensor):
                    yield tensor
