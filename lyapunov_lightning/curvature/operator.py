"""The Hessian of a mean loss as a linear operator.

Three ways to a product ``Hv``, in the order in which `auto` prefers them:

- *double backward*: differentiate ``gᵀv``. The graph of the gradient is built once for fixed batches and kept, so that
  a product costs about two gradients; when it does not fit into the memory bound it is rebuilt for every product, which
  costs about three (B. Pearlmutter, "Fast exact multiplication by the Hessian", 1994).
- *forward over reverse*: the directional derivative of the gradient in forward mode. Exact as well, keeps no graph.
- *finite difference*: ``(g(θ + εv) - g(θ - εv)) / 2ε``. Needs a single backward only, so it works with kernels that
  cannot be differentiated twice; it sees the curvature smoothed over ``ε``, the kinks of a ReLU network among it.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Optional, TypeVar, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from lyapunov_lightning.curvature.convolution import convolution
from lyapunov_lightning.curvature.errors import CurvatureWarning, MeasurementError, PeerFailureError
from lyapunov_lightning.curvature.randomness import RandomState, preserved_randomness
from lyapunov_lightning.curvature.substitution import ScopedLoss, SubstitutedLoss
from lyapunov_lightning.curvature.vectors import FlatLayout, unique_tensors

Result = TypeVar("Result")

Method = Literal["auto", "double_backward", "forward_over_reverse", "finite_difference"]

_STEPS = {torch.float32: 5e-2, torch.float64: 1e-6}
"""Length of the finite-difference step: in float32 the papers' Δq, below which rounding takes over."""


class HessianOperator:
    r"""The Hessian of the mean loss over fixed batches, known by its products ``v -> Hv``.

    The operator is that of ``L(θ) = Σ_b N_b L_b(θ) / Σ_b N_b`` with ``N_b`` samples in batch ``b``: the mean over the
    samples also where the last batch is smaller. Every evaluation of a batch sees the same random numbers, so that
    dropout masks are those of one and the same function, and leaves the global generators as they were. Neither the
    parameters nor their ``.grad`` are touched.

    Parameters that require no gradient, or that the loss does not depend on, are rows and columns of zeros. A parameter
    that is given twice (tied weights) counts once.

    Args:
        loss: Maps a batch to its scalar mean loss, as a function of `parameters` at their present values. If it has a
            method ``at(values, batch)`` that evaluates the loss at other values of the parameters, that is used where
            other values are needed; else the parameters are substituted in the operations that `loss` performs.
        parameters: The parameters, the coordinates of the vectors in this order.
        batches: The batches, in any structure that `loss` understands.
        method: How products are computed, see the module's docstring. ``"auto"`` is double backward, and finite
            differences with one warning where PyTorch cannot differentiate twice.
        weights: Number of samples ``N_b`` of each batch. By default the leading dimension of its first tensor.
        step: Length of the finite-difference step in parameter space: the product is that along ``v/‖v‖`` over this
            distance to both sides. By default 1e-6 for float64 parameters and 5e-2 for float32.
        max_graph_bytes: The most memory that kept gradient graphs may hold. Batches whose graph does not fit any more
            are differentiated anew for every product; 0 keeps none.
        reduce: Sums a flat buffer over all processes of a distributed measurement, in place. It is called once a
            product. The operator is then that of the union of all processes' batches, some of which may have none.
        on_fallback: Called when ``"auto"`` falls back to finite differences, before the warning.

    Raises:
        ValueError: If an argument is out of its range.
        MeasurementError: If PyTorch cannot compute what was asked for, with the reason; in `matvec`, `gradient` and
            `value`.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature import HessianOperator
        >>> x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> batches = [torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)]
        >>> hessian = HessianOperator(lambda batch: (batch @ x).square().mean() / 2, [x], batches)
        >>> hessian.matvec(torch.ones(2, dtype=torch.float64))
        tensor([0.5000, 2.0000], dtype=torch.float64)

    """

    def __init__(
        self,
        loss: Callable[[Any], Tensor],
        parameters: Iterable[Tensor],
        batches: Iterable[Any],
        *,
        method: Method = "auto",
        weights: Optional[Sequence[float]] = None,
        step: Optional[float] = None,
        max_graph_bytes: int = 2**29,
        reduce: Optional[Callable[[Tensor], None]] = None,
        on_fallback: Optional[Callable[[], None]] = None,
    ) -> None:
        if method not in get_args(Method):
            raise ValueError(f"`method` should be one of {', '.join(get_args(Method))}, got {method!r}.")
        if step is not None and not step > 0:
            raise ValueError(f"`step` should be a positive float, got {step}.")
        if max_graph_bytes < 0:
            raise ValueError(f"`max_graph_bytes` should be a non-negative int, got {max_graph_bytes}.")
        self._parameters = unique_tensors(parameters)
        self._layout = FlatLayout(self._parameters)
        self._trainable = [parameter for parameter in self._parameters if parameter.requires_grad]
        self._batches = list(batches)
        if not self._batches and reduce is None:
            raise ValueError("`batches` should hold at least one batch, got none.")
        self._weights = _checked_weights(weights, self._batches, needed=len(self._batches) > 1 or reduce is not None)
        self._loss = loss if isinstance(loss, ScopedLoss) else SubstitutedLoss(loss, self._parameters)
        self._auto = method == "auto"
        self._method = "double_backward" if method == "auto" else method
        narrow = any(parameter.dtype == torch.float32 for parameter in self._trainable)
        self._step = step if step is not None else _STEPS[torch.float32 if narrow else self._layout.dtype]
        self._max_graph_bytes = max_graph_bytes
        self._reduce = reduce
        self._on_fallback = on_fallback
        self._plain_rnn = False
        self._random_states = [RandomState.capture()]
        self._graphs: dict[int, list[Optional[Tensor]]] = {}
        self._graph_bytes = 0
        self._versions: list[int] = []
        self._recomputes = False
        self.num_matvecs = 0

    @property
    def size(self) -> int:
        """The number of coordinates, that is of parameters."""
        return self._layout.size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors."""
        return self._layout.dtype

    @property
    def device(self) -> torch.device:
        """The device of the vectors."""
        return self._layout.device

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The parameters, each once, in the order of the coordinates."""
        return tuple(self._parameters)

    @property
    def method(self) -> str:
        """How products are computed at present; `auto` may have fallen back to finite differences."""
        return self._method

    @property
    def graph_bytes(self) -> int:
        """Memory that the kept gradient graphs hold."""
        return self._graph_bytes

    def matvec(self, vector: Tensor) -> Tensor:
        """The product ``Hv``.

        Args:
            vector: Shape ``(size,)``.

        Returns:
            A new vector of shape ``(size,)``.

        """
        self.num_matvecs += 1
        with torch.inference_mode(False):
            vector = vector.detach().clone().to(dtype=self.dtype, device=self.device)
            return self._mean(lambda: self._with_fallback(lambda: self._local_product(vector)))

    def gradient(self, displacement: Optional[Tensor] = None) -> Tensor:
        """The gradient of the mean loss, of shape ``(size,)``.

        Args:
            displacement: Where to take it, relative to the present parameters: shape ``(size,)``; at these if None.

        """
        with torch.inference_mode(False):
            return self._mean(lambda: self._local_gradient(displacement))

    def value(self, displacement: Optional[Tensor] = None) -> float:
        """The mean loss.

        Args:
            displacement: Where to take it, relative to the present parameters: shape ``(size,)``; at these if None.

        """
        return float(self._mean(lambda: self._local_value(displacement), size=1, dtype=self._sum_dtype))

    def values_along(self, direction: Tensor, distances: Sequence[float]) -> Tensor:
        """The mean loss at several points of a line through the present parameters.

        One point is evaluated after the other, so that the memory is that of one displaced copy of the parameters, and
        each sees the same random numbers; the processes of a distributed measurement meet once for all points.

        Args:
            direction: The line's direction, of shape ``(size,)``.
            distances: Where on the line to evaluate the loss, in multiples of `direction`.

        Returns:
            A float64 vector on the CPU, one number for each distance.

        """
        if not distances:
            return torch.zeros(0, dtype=torch.float64)

        def local() -> Tensor:
            return torch.cat([self._local_value(distance * direction) for distance in distances])

        return self._mean(local, size=len(distances), dtype=self._sum_dtype).to("cpu", torch.float64)

    def mean_over_batches(
        self, statistic: Callable[[Tensor], Tensor], size: int, max_batches: Optional[int] = None
    ) -> Tensor:
        """The mean of a statistic of the mini-batch gradients, each batch counted once.

        Where the gradient graphs are kept, the gradients cost nothing more.

        Args:
            statistic: Maps the gradient of one batch, of shape ``(size_of_operator,)``, to a vector.
            size: The length of that vector.
            max_batches: How many of each process's batches to use; all if None.

        Returns:
            A vector of shape ``(size,)``.

        """
        indices = range(len(self._batches))[:max_batches]

        def local() -> Tensor:
            total = torch.zeros(size, dtype=self.dtype, device=self.device)
            for index in indices:
                total += statistic(self._batch_gradient(index))
            return total

        return self._mean(local, size, count=len(indices))

    # The mean over all samples of all processes.

    def _mean(
        self,
        local_sum: Callable[[], Tensor],
        size: Optional[int] = None,
        count: Optional[float] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> Tensor:
        """A sum over this process's samples, turned into the mean over those of all processes: one collective.

        A process whose own part fails still enters the collective and says so there; the others would wait for ever.
        """
        if count is None:
            count = sum(self._weights)
        if self._reduce is None:
            return local_sum().div_(count)
        buffer = torch.zeros((size or self.size) + 2, dtype=dtype or self.dtype, device=self.device)
        failure: Optional[Exception] = None
        try:
            buffer[:-2] = local_sum()
            buffer[-2] = count
        except Exception as error:  # handed on below, once the other processes know of it
            failure = error
            buffer.zero_()
            buffer[-1] = 1
        self._reduce(buffer)
        total_count, failures = buffer[-2:].tolist()
        if failure is not None:
            try:
                raise failure
            finally:
                failure = None  # or this frame and the traceback keep each other, and the graph, alive
        if failures:
            raise PeerFailureError(int(failures))
        if total_count == 0:
            raise MeasurementError("No process has a batch to measure the curvature on.")
        return buffer[:-2].div_(total_count)

    @property
    def _sum_dtype(self) -> torch.dtype:
        """In which losses are summed: differences of losses are small, so rounding should not add to that of each."""
        return self.dtype if self.device.type == "mps" else torch.float64  # which has no float64

    # One process's part.

    def _local_value(self, displacement: Optional[Tensor]) -> Tensor:
        values = self._displaced(displacement)
        total = torch.zeros(1, dtype=self._sum_dtype, device=self.device)
        for index, weight in enumerate(self._weights):
            loss = self._evaluate(index, values, self._checked_value if values else torch.detach)
            total += weight * loss.to(total)
        return total

    def _local_product(self, vector: Tensor) -> Tensor:
        total = self._layout.zeros()
        if not self._trainable:
            return total
        product = {
            "double_backward": self._double_backward,
            "forward_over_reverse": self._forward_over_reverse,
            "finite_difference": self._finite_difference,
        }[self._method]
        for index, weight in enumerate(self._weights):
            total.add_(product(index, vector), alpha=weight)
        return total

    def _local_gradient(self, displacement: Optional[Tensor]) -> Tensor:
        values = self._displaced(displacement)
        total = self._layout.zeros()
        for index, weight in enumerate(self._weights):
            total.add_(self._batch_gradient(index, values), alpha=weight)
        return total

    @torch.enable_grad()
    def _batch_gradient(self, index: int, values: Optional[list[Tensor]] = None) -> Tensor:
        graph = self._kept_graph(index) if values is None else None
        return self._layout.flatten(self._differentiate(index, values) if graph is None else graph)

    def _double_backward(self, index: int, vector: Tensor) -> Tensor:
        graph = self._kept_graph(index)
        if graph is not None:
            return self._second_derivative(graph, vector, retain_graph=True)
        if not self._recomputes:
            graph, kept = self._gradient_graph(index)
            if not self._recomputes:
                return self._second_derivative(graph, vector, retain_graph=kept)

        def product(loss: Tensor) -> Tensor:
            gradient = self._gradient_of(loss, self._parameters, create_graph=True)
            return self._second_derivative(gradient, vector, retain_graph=False)

        return self._evaluate(index, None, product)

    def _second_derivative(self, gradient: Sequence[Optional[Tensor]], vector: Tensor, retain_graph: bool) -> Tensor:
        directions = self._layout.split(vector)
        active = [(g, d) for g, d in zip(gradient, directions, strict=True) if g is not None and g.requires_grad]
        if not active:  # a loss that is linear in the parameters
            return self._layout.zeros()
        outputs, cotangents = zip(*active, strict=True)
        product = _differentiated(outputs, cotangents, self._trainable, retain_graph=retain_graph)
        return self._layout.flatten(self._with_frozen(product))

    def _forward_over_reverse(self, index: int, vector: Tensor) -> Tensor:
        with forward_ad.dual_level():
            leaves = [parameter.detach().requires_grad_(parameter.requires_grad) for parameter in self._parameters]
            duals = [
                forward_ad.make_dual(leaf, direction) if leaf.requires_grad else leaf
                for leaf, direction in zip(leaves, self._layout.split(vector), strict=True)
            ]
            gradient = self._evaluate(index, duals, lambda loss: self._gradient_of(loss, leaves))
            tangents = [None if g is None else forward_ad.unpack_dual(g).tangent for g in gradient]
            return self._layout.flatten(tangents)

    def _finite_difference(self, index: int, vector: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(vector)
        if norm == 0:
            return self._layout.zeros()
        displacement = vector * (self._step / norm)
        ahead = self._layout.flatten(self._differentiate(index, self._displaced(displacement)))
        behind = self._layout.flatten(self._differentiate(index, self._displaced(-displacement)))
        return (ahead - behind).mul_(norm / (2 * self._step))

    def _kept_graph(self, index: int) -> Optional[list[Optional[Tensor]]]:
        """The kept gradient of a batch, unless the parameters were changed since."""
        versions = [parameter._version for parameter in self._parameters]
        if versions != self._versions:
            self._drop_graphs()
            self._versions = versions
        return self._graphs.get(index)

    def _drop_graphs(self) -> None:
        self._graphs.clear()
        self._graph_bytes = 0

    def _gradient_graph(self, index: int) -> tuple[list[Optional[Tensor]], bool]:
        """The gradient of one batch with its graph, and whether the graph is kept for further products."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self._parameters}
        saved: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            if tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in own:
                    saved[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # the tensor itself may hold the very node that saves it: a cycle, never freed

        with torch.autograd.graph.saved_tensors_hooks(count, _unchanged), _recomputation() as recomputed:
            graph = self._differentiate(index, create_graph=True, differentiating=recomputed.watch)
        if recomputed.seen:  # checkpointed layers, which are evaluated again in every product
            self._recomputes = True
            return graph, False
        num_bytes = sum(saved.values()) + sum(g.numel() * g.element_size() for g in graph if g is not None)
        keep = self._graph_bytes + num_bytes <= self._max_graph_bytes
        if keep:
            self._graphs[index] = graph
            self._graph_bytes += num_bytes
        return graph, keep

    def _differentiate(
        self,
        index: int,
        values: Optional[list[Tensor]] = None,
        create_graph: bool = False,
        differentiating: Optional[Callable[[], None]] = None,
    ) -> list[Optional[Tensor]]:
        """The gradient of one batch's loss, at the parameters or at other values of them."""
        points = self._parameters if values is None else values

        def gradient(loss: Tensor) -> list[Optional[Tensor]]:
            if differentiating is not None:
                differentiating()
            return self._gradient_of(loss, points, create_graph)

        return self._evaluate(index, values, gradient)

    def _gradient_of(
        self, loss: Tensor, points: Sequence[Tensor], create_graph: bool = False
    ) -> list[Optional[Tensor]]:
        if not loss.requires_grad:
            return [None] * len(points)
        if self._method != "finite_difference":
            _check_twice_differentiable(loss)
        trainable = [point for point in points if point.requires_grad]
        substituted = points is not self._parameters
        inputs = trainable + self._trainable if substituted else trainable
        seed = torch.ones_like(loss)
        gradient = _differentiated((loss,), (seed,), inputs, retain_graph=create_graph, create_graph=create_graph)
        if substituted and any(g is not None for g in gradient[len(trainable) :]):
            raise MeasurementError(_NOT_SUBSTITUTED)
        return self._with_frozen(gradient[: len(trainable)])

    def _checked_value(self, loss: Tensor) -> Tensor:
        """The value of a loss at other values of the parameters, of which it may not depend on the present ones."""
        own = {id(parameter) for parameter in self._trainable}
        if any(id(getattr(node, "variable", None)) in own for node in _nodes(loss)):
            raise MeasurementError(_NOT_SUBSTITUTED)
        return loss.detach()

    def _with_frozen(self, gradient: Sequence[Optional[Tensor]]) -> list[Optional[Tensor]]:
        """One entry for every parameter from one for every trainable parameter."""
        entries = iter(gradient)
        return [next(entries) if parameter.requires_grad else None for parameter in self._parameters]

    def _displaced(self, displacement: Optional[Tensor]) -> Optional[list[Tensor]]:
        if displacement is None:
            return None
        if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in self._parameters):
            raise MeasurementError(
                "Finite differences are lost in the rounding of half-precision parameters. Keep the parameters in"
                " float32 (mixed precision does), or use `method='double_backward'`."
            )
        pieces = self._layout.split(displacement.detach().to(dtype=self.dtype, device=self.device))
        return [
            (parameter.detach() + piece).requires_grad_() if parameter.requires_grad else parameter.detach()
            for parameter, piece in zip(self._parameters, pieces, strict=True)
        ]

    def _evaluate(self, index: int, values: Optional[Sequence[Tensor]], consume: Callable[[Tensor], Result]) -> Result:
        """What `consume` makes of the loss of one batch, with the same random numbers every time."""

        def checked(loss: object) -> Result:
            if index + 1 == len(self._random_states):
                self._random_states.append(RandomState.capture())
            return consume(_checked_scalar(loss))

        with ExitStack() as stack:
            stack.enter_context(preserved_randomness(self._random_states[index]))
            if self._method != "finite_difference":
                stack.enter_context(_twice_differentiable(self._plain_rnn))
            return self._loss.within(values, self._batches[index], checked)

    # What to do where PyTorch cannot differentiate twice.

    def _with_fallback(self, compute: Callable[[], Tensor]) -> Tensor:
        while True:
            try:
                with torch.enable_grad():
                    return compute()
            except RuntimeError as error:
                unrelated = isinstance(error, (torch.OutOfMemoryError, MeasurementError))
                if unrelated or self._method == "finite_difference":
                    raise
                self._fall_back(error)

    def _fall_back(self, error: RuntimeError) -> None:
        """Take the way that is left after this error, or say that there is none."""
        self._drop_graphs()
        if "rnn" in str(error).lower() and not self._plain_rnn:
            self._plain_rnn = True
            return
        exact, self._method = self._method, "finite_difference"
        try:
            self._local_gradient(None)  # an error of the loss itself is not one of the second derivative
        except Exception:
            self._method = exact
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not self._auto:
            self._method = exact
            raise MeasurementError(
                f"`method={exact!r}` cannot differentiate this loss twice. Use `method='auto'`, or"
                f" 'finite_difference', which needs one derivative only. PyTorch says: {reason}"
            ) from error
        if self._on_fallback is not None:
            self._on_fallback()
        warnings.warn(
            "The loss cannot be differentiated twice, so its curvature is taken from finite differences of the"
            f" gradient, which blur the kinks of ReLU networks over a distance of {self._step:g}. PyTorch says:"
            f" {reason}",
            CurvatureWarning,
            stacklevel=6,
        )


_NOT_SUBSTITUTED = (
    "The loss reaches a parameter in a way that cannot be substituted, such as a custom autograd function or a"
    " reference kept outside the module. Use `method='double_backward'`, or a loss with a method `at(values, batch)`."
)

_ONCE_DIFFERENTIABLE = once_differentiable(lambda ctx: None).__code__


def _differentiated(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    retain_graph: bool,
    create_graph: bool = False,
) -> tuple[Optional[Tensor], ...]:
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


def _nodes(loss: Tensor) -> Iterator[Any]:
    """The nodes of the graph of a loss."""
    pending, seen = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending.extend(following for following, _ in node.next_functions)


def _check_twice_differentiable(loss: Tensor) -> None:
    """PyTorch itself only raises where the way from the gradient to the parameters leads through such a function."""
    for node in _nodes(loss):
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        if getattr(backward, "__code__", None) is _ONCE_DIFFERENTIABLE:
            raise RuntimeError(f"{node.name()} is marked with @once_differentiable: it cannot be differentiated twice.")


class _Recomputation:
    """Whether modules were called since `watch` was."""

    def __init__(self) -> None:
        self._watching = False
        self.seen = False

    def watch(self) -> None:
        self._watching = True

    def called(self, *args: Any) -> None:
        self.seen = self.seen or self._watching


@contextmanager
def _recomputation() -> Iterator[_Recomputation]:
    """Notices layers that are evaluated again while a loss is differentiated, in whichever thread."""
    recomputation = _Recomputation()
    handle = register_module_forward_pre_hook(recomputation.called)
    try:
        yield recomputation
    finally:
        handle.remove()


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


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def _twice_differentiable(plain_rnn: bool) -> Iterator[None]:
    """Choose operations with second derivatives that are right: unfused attention, weight norm, and RNNs if asked."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_Unfused())
        if plain_rnn:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the next line warns of TF32 on Intel GPUs, whatever the device
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        yield


class _Unfused(TorchFunctionMode):
    """Computes from their parts what PyTorch cannot differentiate twice, or not rightly."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Optional[Mapping[str, Any]] = None,
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
    torch.conv1d: convolution,  # the derivative of the gradient is many times slower than the gradient
    torch.conv2d: convolution,
    torch.conv3d: convolution,
}


def _checked_scalar(loss: object) -> Tensor:
    if not isinstance(loss, Tensor):
        raise MeasurementError(f"The loss should be a scalar tensor, got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise MeasurementError(
            f"The loss should be a scalar, got a tensor of shape {tuple(loss.shape)}. Reduce it, for example with"
            " `.mean()`."
        )
    return loss.reshape(())


def _checked_weights(weights: Optional[Sequence[float]], batches: list[Any], needed: bool) -> list[float]:
    if weights is None:
        return [float(num_samples(batch)) for batch in batches] if needed else [1.0] * len(batches)
    if len(weights) != len(batches):
        raise ValueError(f"`weights` should hold one number for each of {len(batches)} batches, got {len(weights)}.")
    if not all(weight > 0 for weight in weights):
        raise ValueError(f"`weights` should be positive, got {list(weights)}.")
    return [float(weight) for weight in weights]


def num_samples(batch: Any) -> int:
    """The number of samples of a batch: the leading dimension of the first tensor in it that has one.

    Raises:
        ValueError: If there is no such tensor.

    """
    for tensor in _tensors(batch):
        if tensor.ndim:
            return tensor.shape[0]
    raise ValueError(
        f"The number of samples of a batch of type {type(batch).__name__} is not known, since it holds no tensor with a"
        " leading dimension. Give `weights`."
    )


def _tensors(batch: Any, seen: Optional[set[int]] = None) -> Iterator[Tensor]:
    """The tensors of a nested structure, in order; objects that hold each other are looked into once."""
    seen = set() if seen is None else seen
    if isinstance(batch, type) or id(batch) in seen:
        return
    seen.add(id(batch))
    if isinstance(batch, Tensor):
        yield batch
        return
    members: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        members = batch.values()
    elif isinstance(batch, (list, tuple)):
        members = batch
    elif is_dataclass(batch):
        members = [getattr(batch, field.name) for field in fields(batch)]
    elif hasattr(batch, "__dict__"):
        members = vars(batch).values()
    for member in members:
        yield from _tensors(member, seen)
