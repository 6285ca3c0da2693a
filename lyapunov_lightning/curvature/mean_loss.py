"""The mean loss over fixed batches: its value, its gradient, its values along a line.

A loss is evaluated inside of a context, ``with objective.evaluated(batch, values) as evaluation:``, since it has to be
differentiated where it was evaluated: checkpointed layers are evaluated again then, and have to find the same values
and the same surroundings. Random numbers are the same every time, so that all evaluations belong to one function. Sums
over batches are turned into means over the samples of all ranks by one collective.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lyapunov_lightning.curvature.errors import MeasurementError, PeerFailureError
from lyapunov_lightning.curvature.randomness import RandomState, preserved_randomness
from lyapunov_lightning.curvature.torch_compat import differentiated, eager, nodes, watched_checkpointing
from lyapunov_lightning.curvature.vectors import FlatLayout


@dataclass(frozen=True)
class Evaluation:
    """A loss that was evaluated, ready to be differentiated.

    Attributes:
        loss: The loss of one batch, a scalar.
        leaves: What it is to be differentiated with respect to, in the order of the parameters.
        num_samples: Tells the number of samples that the loss is the mean of.
        owner: What has to live as long as the graph of the loss.
        is_recomputed: Whether layers are evaluated again when the loss is differentiated, which can happen only where
            the loss was evaluated.

    """

    loss: Tensor
    leaves: Sequence[Tensor]
    num_samples: Callable[[], float]
    owner: object = None
    is_recomputed: bool = False


@runtime_checkable
class Objective(Protocol):
    """A mean loss of a batch that can be evaluated at other values of its parameters."""

    def evaluated(self, batch: Any, values: Sequence[Tensor] | None = None) -> AbstractContextManager[Evaluation]:
        """Evaluate the loss of a batch, with `values`, if any, in place of the parameters also while it lasts."""


class Total:
    """A weighted sum over this rank's batches.

    Args:
        buffer: What it is summed up in.

    """

    def __init__(self, buffer: Tensor) -> None:
        self.sum = buffer
        self.weight = 0.0

    def add(self, part: Tensor, weight: float) -> None:
        """Add one batch's part."""
        self.sum.add_(part, alpha=weight)
        self.weight += weight

    def clear(self) -> None:
        """Begin anew."""
        self.sum.zero_()
        self.weight = 0.0


class MeanLoss:
    """The mean of a loss over all samples of fixed batches, those of all ranks.

    Args:
        objective: The loss.
        parameters: What it is a function of.
        layout: How they form a vector.
        batches: This rank's batches.
        weights: Number of samples of each of them; as their evaluation tells if None.
        reduce: Sums a flat buffer over all ranks, in place.

    Attributes:
        kernels: The context in which the loss is evaluated, to choose PyTorch's kernels. Dropout in attention draws its
            mask in the kernel, so that values and derivatives with different kernels are not those of one function.

    """

    def __init__(
        self,
        objective: Objective,
        parameters: Sequence[Tensor],
        layout: FlatLayout,
        batches: Iterable[Any],
        weights: Sequence[float] | None = None,
        reduce: Callable[[Tensor], None] | None = None,
    ) -> None:
        self._objective = objective
        self._parameters = parameters
        self._layout = layout
        self._batches = list(batches)
        self._reduce = reduce
        self.kernels: Callable[[], AbstractContextManager[None]] = nullcontext
        if not self._batches and reduce is None:
            raise ValueError("`batches` should hold at least one batch, got none.")
        self._weights = _checked_weights(weights, len(self._batches))
        if len(self._batches) == 1 and weights is None and reduce is None:
            self._weights = [1.0]  # the mean over one batch asks for no number of samples
        self._random_states = [RandomState.capture()]

    def __len__(self) -> int:
        """The number of this rank's batches."""
        return len(self._batches)

    def weight(self, index: int) -> float:
        """The number of samples of a batch, known once it was evaluated."""
        weight = self._weights[index]
        assert weight is not None
        return weight

    @contextmanager
    def evaluated(self, index: int, values: Sequence[Tensor] | None = None) -> Iterator[Evaluation]:
        """Evaluate the loss of one batch, with the same random numbers every time.

        Args:
            index: Which batch.
            values: Other values of the parameters, if any.

        Raises:
            MeasurementError: If the loss is not a scalar tensor.

        """
        with (
            preserved_randomness(self._random_states[index]),
            torch.enable_grad(),
            eager(),
            self.kernels(),
            watched_checkpointing() as hooks,
            self._objective.evaluated(self._batches[index], values) as evaluation,
        ):
            if index + 1 == len(self._random_states):
                self._random_states.append(RandomState.capture())
            if self._weights[index] is None:
                self._weights[index] = float(evaluation.num_samples())
            yield replace(evaluation, loss=_checked_scalar(evaluation.loss), is_recomputed=hooks.used)

    @contextmanager
    def mean(self, size: int, dtype: torch.dtype | None = None) -> Iterator[Total]:
        """Turn a sum over this rank's samples into the mean over those of all ranks: one collective.

        A rank whose own part fails still enters the collective and says so there; the others would wait for ever.

        Args:
            size: The length of what is summed.
            dtype: Its dtype; that of the vectors if None.

        Yields:
            The sum to add to; its ``sum`` is the mean once the block is left.

        Raises:
            PeerFailureError: If another rank failed.

        """
        buffer = torch.zeros(size + 2, dtype=dtype or self._layout.dtype, device=self._layout.device)
        total = Total(buffer[:-2])
        failure: Exception | None = None
        try:
            yield total
        except Exception as error:
            if self._reduce is None:
                raise
            failure = error  # handed on below, once the other ranks know of it
        if self._reduce is None:
            total.sum.div_(total.weight)
            return
        if failure is not None:
            buffer.zero_()
            buffer[-1] = 1
        else:
            buffer[-2] = total.weight
        self._reduce(buffer)
        count, failures = buffer[-2:].tolist()
        if failure is not None:
            try:
                raise failure
            finally:
                failure = None  # or this frame and the traceback keep each other, and the graph, alive
        if failures:
            raise PeerFailureError(int(failures))
        if count == 0:
            raise MeasurementError("No rank has a batch to measure the curvature on.")
        total.sum.div_(count)

    def value(self, displacement: Tensor | None = None) -> float:
        """The mean loss.

        Args:
            displacement: Where to take it, relative to the present parameters: shape ``(size,)``; at these if None.

        """
        with self.mean(1, self._sum_dtype) as total:
            self._add_values(total, [displacement])
        return float(total.sum)

    def values_along(self, direction: Tensor, distances: Sequence[float]) -> Tensor:
        """The mean loss at several points of a line through the present parameters.

        Args:
            direction: The line's direction, of shape ``(size,)``.
            distances: Where on the line to evaluate the loss, in multiples of `direction`.

        Returns:
            A float64 vector on the CPU, one number for each distance.

        """
        if not distances:
            return torch.zeros(0, dtype=torch.float64)
        with self.mean(len(distances), self._sum_dtype) as total:
            self._add_values(total, (distance * direction for distance in distances))
        return total.sum.to("cpu", torch.float64)

    def gradient(self, displacement: Tensor | None = None) -> Tensor:
        """The gradient of the mean loss, of shape ``(size,)``.

        Args:
            displacement: Where to take it, relative to the present parameters: shape ``(size,)``; at these if None.

        """
        with self.mean(self._layout.size) as total:
            for index in range(len(self)):
                total.add(self.batch_gradient(index, displacement), self.weight(index))
        return total.sum

    def batch_gradient(self, index: int, displacement: Tensor | None = None) -> Tensor:
        """The gradient of one batch's loss, of shape ``(size,)``."""
        with self.evaluated(index, self.displaced(displacement)) as evaluation:
            gradient = self.gradient_of(evaluation)
        return self._layout.flatten(gradient)

    def gradient_of(self, evaluation: Evaluation, create_graph: bool = False) -> list[Tensor | None]:
        """The gradient of a loss that was evaluated, one entry for each parameter; None stands for zeros.

        Raises:
            MeasurementError: If the loss depends on the parameters themselves where it should on other values, or if
                a layer writes to ``.grad`` instead of returning its gradient.

        """
        loss, leaves = evaluation.loss, evaluation.leaves
        if not loss.requires_grad:
            return [None] * len(leaves)
        trainable = [leaf for leaf in leaves if leaf.requires_grad]
        own = {id(leaf) for leaf in leaves}
        present = [p for p in self._parameters if p.requires_grad and id(p) not in own]
        with _unwritten_gradients(trainable + present):
            gradient = differentiated(
                (loss,),
                (torch.ones_like(loss),),
                trainable + present,
                retain_graph=create_graph,
                create_graph=create_graph,
            )
        if any(entry is not None for entry in gradient[len(trainable) :]):
            raise MeasurementError(_NOT_SUBSTITUTED)
        entries = iter(gradient)
        return [next(entries) if leaf.requires_grad else None for leaf in leaves]

    def displaced(self, displacement: Tensor | None) -> list[Tensor] | None:
        """The parameters at a distance from where they are.

        Raises:
            MeasurementError: If the distance would be lost in the rounding of half-precision parameters.

        """
        if displacement is None:
            return None
        if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in self._parameters):
            raise MeasurementError(
                "Finite differences are lost in the rounding of half-precision parameters. Keep the parameters in"
                " float32 (mixed precision does), or use `method='double_backward'`."
            )
        pieces = self._layout.split(displacement.detach().to(dtype=self._layout.dtype, device=self._layout.device))
        return [
            (parameter.detach() + piece).requires_grad_() if parameter.requires_grad else parameter.detach()
            for parameter, piece in zip(self._parameters, pieces, strict=True)
        ]

    def _add_values(self, total: Total, displacements: Iterable[Tensor | None]) -> None:
        """Add the losses at several points, one point after the other to need the memory of one displaced copy."""
        for place, displacement in enumerate(displacements):
            values = self.displaced(displacement)
            total.weight = 0.0
            for index in range(len(self)):
                with self.evaluated(index, values) as evaluation:
                    if displacement is not None:
                        self._check_substituted(evaluation)
                    total.sum[place] += self.weight(index) * evaluation.loss.detach().to(total.sum)
                    total.weight += self.weight(index)

    def _check_substituted(self, evaluation: Evaluation) -> None:
        """Make sure that a loss at other values of the parameters does not depend on the present ones."""
        own = {id(leaf) for leaf in evaluation.leaves}
        present = {id(parameter) for parameter in self._parameters} - own
        if any(id(getattr(node, "variable", None)) in present for node in nodes([evaluation.loss])):
            raise MeasurementError(_NOT_SUBSTITUTED)

    @property
    def _sum_dtype(self) -> torch.dtype:
        """In which losses are summed: differences of losses are small, so rounding should not add to that of each."""
        is_mps = self._layout.device.type == "mps"  # which has no float64
        return self._layout.dtype if is_mps else torch.float64


@contextmanager
def _unwritten_gradients(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put aside what tensors hold in ``.grad``, and refuse a layer that writes there while others are differentiated.

    Raises:
        MeasurementError: If there is such a layer; what it wrote is gone.

    """
    unobserved = torch._C.DisableTorchFunction  # a mode would take this for the loss's own look at `.grad`
    with unobserved():
        leaves = [tensor for tensor in tensors if tensor.is_leaf]
        before = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
    written = False
    try:
        yield
        with unobserved():
            written = any(leaf.grad is not None for leaf in leaves)
    finally:
        with unobserved():
            for leaf, gradient in zip(leaves, before, strict=True):
                leaf.grad = gradient
    if written:
        raise MeasurementError(
            "A layer of the model runs a backward pass of its own while its gradient is taken, and writes to `.grad`"
            " in place of returning a gradient. Use a layer that returns it, such as checkpointing by"
            " `torch.utils.checkpoint`."
        )


_NOT_SUBSTITUTED = (
    "The loss reaches a parameter in a way that cannot be substituted, such as a custom autograd function or a"
    " reference kept outside the module. Use `method='double_backward'`, or a loss with a method"
    " `evaluated(batch, values)`."
)


def _checked_scalar(loss: object) -> Tensor:
    if not isinstance(loss, Tensor):
        raise MeasurementError(f"The loss should be a scalar tensor, got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise MeasurementError(
            f"The loss should be a scalar, got a tensor of shape {tuple(loss.shape)}. Reduce it, for example with"
            " `.mean()`."
        )
    return loss.reshape(())


def _checked_weights(weights: Sequence[float] | None, num_batches: int) -> list[float | None]:
    if weights is None:
        return [None] * num_batches
    if len(weights) != num_batches:
        raise ValueError(f"`weights` should hold one number for each of {num_batches} batches, got {len(weights)}.")
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


def _tensors(batch: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
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
