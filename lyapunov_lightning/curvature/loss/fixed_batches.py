"""A loss over fixed batches: each batch evaluated with the same random numbers every time, and means over all samples.

A loss is evaluated inside of a context, ``with objective.evaluated(batch, values) as evaluation:``, since it has to be
differentiated where it was evaluated: checkpointed layers are evaluated again then, and have to find the same values
and the same surroundings. Random numbers are the same every time, so that all evaluations belong to one function. Sums
over batches are turned into means over the samples of all ranks by one collective.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from lyapunov_lightning.curvature.compat.operations import eager, watched_checkpointing, without_graph
from lyapunov_lightning.curvature.errors import CurvatureWarning, MeasurementError
from lyapunov_lightning.curvature.loss.randomness import RandomState, preserved_randomness
from lyapunov_lightning.curvature.vectors.ranks import Ranks
from lyapunov_lightning.curvature.vectors.space import VectorSpace


@dataclass(frozen=True)
class Evaluation:
    """A loss that was evaluated, ready to be differentiated.

    Attributes:
        loss: The loss of one batch, a scalar.
        leaves: What it is to be differentiated with respect to, in the order of the parameters.
        num_samples: Returns the number of samples that the loss is the mean of. A function, to be called only where the
            number is needed: Lightning warns where it has to guess it.
        owner: What has to live as long as the graph of the loss.
        is_recomputed: Whether layers are evaluated again when the loss is differentiated, which can happen only where
            the loss was evaluated.

    """

    loss: Tensor
    leaves: Sequence[Tensor]
    num_samples: Callable[[], float]
    owner: object = None
    is_recomputed: bool = False

    @property
    def differentiated(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """What products differentiate twice, and what they differentiate only once."""
        return [self.loss], []


@runtime_checkable
class Objective(Protocol):
    """A mean loss of a batch that can be evaluated at other values of its parameters.

    An objective that evaluates a copy of the model may say so in an attribute ``is_copied = True``. Nothing of a copy
    can be changed from outside, so it is not watched.
    """

    def evaluated(self, batch: Any, values: Sequence[Tensor] | None = None) -> AbstractContextManager[Evaluation]:
        """Evaluate the loss of a batch, with `values`, if any, in place of the parameters while the block lasts."""


class Total:
    """A weighted sum over this rank's batches, and over all ranks' batches once they have met.

    Args:
        buffer: The memory of the sum.

    Attributes:
        sum: The sum, and the mean in its place once the ranks have met.
        weight: The sum of the weights.
        is_flagged: A message to the other ranks: something has to be done together before there can be a mean. Any rank
            may set it, and all see it once they have met. There is no mean then.

    """

    def __init__(self, buffer: Tensor) -> None:
        self.sum = buffer
        self.weight = 0.0
        self.is_flagged = False

    def add(self, part: Tensor, weight: float) -> None:
        """Add one batch's part."""
        self.sum.add_(part, alpha=weight)
        self.weight += weight

    def clear(self) -> None:
        """Begin anew."""
        self.sum.zero_()
        self.weight = 0.0


class ReadBatches(Sequence[Any]):
    """Batches that are read when they are asked for, where a list would hold all of them.

    They are asked for by their index, in their order and again from the first one; each time one has to be the same.

    """


class FixedBatches:
    """A loss, the batches on which it is evaluated, and how much each of them counts.

    Args:
        objective: The loss.
        batches: This rank's batches; all of them are held, unless they are `ReadBatches`.
        space: The space of the vectors in which sums are taken.
        weights: Number of samples of each batch; if None, each batch's evaluation says it.
        ranks: The ranks of which each has its batches; a single one if None.

    Attributes:
        kernels: The context in which the loss is evaluated, to choose PyTorch's kernels. Dropout in attention draws its
            mask in the kernel, so that the value by one kernel and the derivative by another belong to two functions.

    """

    def __init__(
        self,
        objective: Objective,
        batches: Iterable[Any],
        space: VectorSpace,
        weights: Sequence[float] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._objective = objective
        self._batches = batches if isinstance(batches, ReadBatches) else list(batches)
        self._space = space
        self._ranks = Ranks() if ranks is None else ranks
        self.kernels: Callable[[], AbstractContextManager[None]] = nullcontext
        if not self._batches and self._ranks.is_single:
            raise ValueError("`batches` should hold at least one batch, got none.")
        self._weights = _checked_weights(weights, len(self._batches))
        if len(self._batches) == 1 and weights is None and self._ranks.is_single:
            self._weights = [1.0]  # the mean over one batch asks for no number of samples
        self._given_weights = tuple(self._weights)
        self._random_states = [RandomState.capture()]

    def __len__(self) -> int:
        """The number of this rank's batches."""
        return len(self._batches)

    def weight(self, index: int) -> float:
        """The number of samples of a batch, known once it was evaluated."""
        weight = self._weights[index]
        assert weight is not None
        return weight

    @property
    def is_alone(self) -> bool:
        """Whether there are no other ranks."""
        return self._ranks.is_single

    @property
    def is_copied(self) -> bool:
        """Whether the loss says that it is evaluated on a copy of the model, which nobody can change afterwards."""
        return bool(getattr(self._objective, "is_copied", False))

    @property
    def solver(self) -> object:
        """An object that stands for the solver that is at work, if one is that lets nothing change meanwhile."""
        return self._ranks.solver

    def tensors(self, index: int) -> list[Tensor]:
        """The tensors in a batch, and views of the NumPy arrays in it: what others may write to.

        None of one that is read: nobody else has it, and it is not to be held.

        """
        if isinstance(self._batches, ReadBatches):
            return []
        return [tensor for member in members(self._batches[index]) if (tensor := as_tensor(member)) is not None]

    def bytes_kept_with(self, index: int) -> int:
        """The memory that a graph of a batch keeps alive besides its own: the batch, unless that is held anyway."""
        return num_bytes(self._batches[index]) if isinstance(self._batches, ReadBatches) else 0

    def forget_weights(self) -> None:
        """Ask the next evaluation of each batch for its number of samples again, unless that was given."""
        self._weights = list(self._given_weights)

    @contextmanager
    def evaluated(
        self, index: int, values: Sequence[Tensor] | None = None, with_graph: bool = True
    ) -> Iterator[Evaluation]:
        """Evaluate the loss of one batch, with the same random numbers every time.

        Args:
            index: Which batch.
            values: Other values of the parameters, if any.
            with_graph: Whether it is to be differentiated.

        Raises:
            MeasurementError: If the loss is not a scalar tensor.

        """
        # Before all else: what reads a batch is no part of the loss.
        batch = self._batches[index]
        # The derivative is taken within the block, where checkpointed layers are evaluated again: so the generators are
        # put back last, and until then kernels and modes stay as they were for the loss.
        with (
            preserved_randomness(self._random_states[index]),
            torch.enable_grad() if with_graph else without_graph(),
            eager(),
            self.kernels(),
            watched_checkpointing() as hooks,
            self._objective.evaluated(batch, values) as evaluation,
        ):
            # Each batch begins where the one before it ended, as in a training step over all of them; with one state
            # for all, every batch would have the same dropout mask, and their mean a larger variance.
            if index + 1 == len(self._random_states) < len(self):
                # One object for all where the loss draws no numbers: a state has 25 KB, and a data set many batches.
                self._random_states.append(self._random_states[index].unless_changed())
            if self._weights[index] is None:
                self._weights[index] = float(evaluation.num_samples())
            yield replace(evaluation, loss=_checked_scalar(evaluation.loss), is_recomputed=hooks.used)

    @contextmanager
    def mean(self, size: int, dtype: torch.dtype | None = None) -> Iterator[Total]:
        """Turn a sum over this rank's samples into the mean over the samples of all ranks: one collective.

        Args:
            size: The length of what is summed.
            dtype: Its dtype; that of the vectors if None.

        Yields:
            The sum to add to; its ``sum`` is the mean once the block is left, unless a rank raised the flag.

        Raises:
            PeerFailureError: If another rank failed.
            MeasurementError: If no rank has a batch.

        """
        # One message a product: the sum, its weight, the flag, and the number of ranks that failed.
        buffer = torch.zeros(size + 3, dtype=dtype or self._space.dtype, device=self._space.device)
        total = Total(buffer[:size])
        with self._ranks.summing(buffer):
            yield total
            # Within the block: the caller finds out the weight while it evaluates.
            buffer[size] = total.weight
            buffer[size + 1] = total.is_flagged
        if not self._ranks.is_single:
            total.weight, num_flagged = buffer[size : size + 2].tolist()
            total.is_flagged = num_flagged > 0
        # Without a word where the flag is up: all ranks see it, and all of them make the sum again.
        if total.is_flagged:
            return
        if total.weight == 0:
            raise MeasurementError("No rank has a batch to measure the curvature on.")
        # One batch of a single rank has the weight 1, and needs no pass over a vector of the model's size.
        if total.weight != 1:
            total.sum.div_(total.weight)


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


def numbers_of_samples(batches: Sequence[Any]) -> list[float]:
    """The numbers of samples of several batches, with a warning where their tensors contradict each other.

    A contradiction does not matter where it is the same in all batches, which then weigh the same by any reading.
    """
    numbers = [float(num_samples(batch)) for batch in batches]
    readings = [sorted(_readings(batch)) for batch in batches]
    contradicting = next((place for place, reading in enumerate(readings) if len(reading) > 1), None)
    if contradicting is not None and (len(batches) == 1 or any(reading != readings[0] for reading in readings)):
        warnings.warn(
            f"The tensors of batch {contradicting} contradict each other on its number of samples: the leading"
            f" dimensions are {', '.join(map(str, readings[contradicting]))}. That of the first one,"
            f" {numbers[contradicting]:g}, is taken, and weighs the batch in the mean. Give `weights`, the number of"
            " samples of each batch.",
            CurvatureWarning,
            stacklevel=4,
        )
    return numbers


def _readings(batch: Any) -> set[int]:
    """What the number of samples may be: leading dimensions, and the length of a list of samples that are mappings."""
    lengths = [member.shape[0] for member in members(batch) if isinstance(member, Tensor) and member.ndim]
    # A single number for all samples, as a temperature, contradicts nothing.
    readings = {length for length in lengths if length != 1 or lengths[0] == 1}
    is_list = isinstance(batch, (list, tuple)) and bool(batch)
    return readings | {len(batch)} if is_list and all(isinstance(sample, Mapping) for sample in batch) else readings


def num_samples(batch: Any) -> int:
    """The number of samples of a batch: the leading dimension of the first tensor in it that has one.

    Raises:
        ValueError: If there is no such tensor.

    """
    for member in members(batch):
        if isinstance(member, Tensor) and member.ndim:
            return member.size(0)  # of a nested tensor there is no shape
    raise ValueError(
        f"The number of samples of a batch of type {type(batch).__name__} is not known, since it holds no tensor with a"
        " leading dimension. Give `weights`."
    )


def num_bytes(batch: Any) -> int:
    """The memory of the tensors, the arrays and the texts of a batch."""
    return sum(map(_bytes_of, members(batch, plain=(str, bytes))))


def _bytes_of(member: Any) -> int:
    if not isinstance(member, Tensor):
        return member.nbytes if isinstance(member, np.ndarray) else len(member)
    # Of a sparse or a nested tensor this is more than it takes, and never less.
    return member.numel() * member.element_size()


def members(batch: Any, seen: set[int] | None = None, *, plain: tuple[type, ...] = ()) -> Iterator[Any]:
    """The tensors and the arrays of a nested structure, in order; objects that hold each other are visited once.

    Args:
        batch: The structure.
        seen: The objects that were visited.
        plain: What else is a member, such as texts and numbers.

    """
    if isinstance(batch, plain):
        yield batch
        return
    seen = set() if seen is None else seen
    # A class has a `__dict__` too, but the tensors in it are no data of this batch.
    if isinstance(batch, type) or id(batch) in seen:
        return
    seen.add(id(batch))
    if isinstance(batch, (Tensor, np.ndarray)):
        yield batch
        return
    inner: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        inner = batch.values()
    elif isinstance(batch, (list, tuple)):
        inner = batch
    elif is_dataclass(batch):
        inner = [getattr(batch, field.name) for field in fields(batch)]
    elif hasattr(batch, "__dict__"):
        inner = vars(batch).values()
    for member in inner:
        yield from members(member, seen, plain=plain)


def as_tensor(member: Any) -> Tensor | None:
    """A tensor, or an array as a tensor that shares its memory, if there can be such a one."""
    if isinstance(member, Tensor):
        return member
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of arrays that are read-only
            # Not a copy: a later write to the array has to be seen in its memory.
            return torch.from_numpy(member)
    except (TypeError, ValueError):  # an array of strings, or one that is reversed
        return None
