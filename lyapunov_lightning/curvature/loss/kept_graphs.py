"""Gradient graphs that are kept from product to product: as many as fit, and only as long as they are up to date."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lyapunov_lightning.curvature.compat.operations import nodes
from lyapunov_lightning.curvature.loss.freshness import Freshness, LossInputs


@dataclass(frozen=True, eq=False)
class GradientGraph:
    """The gradient of a batch with its graph, and what that graph needs alive; not the loss, which may hold more.

    Attributes:
        gradient: One entry for each parameter; None stands for zeros.
        leaves: What the loss was differentiated with respect to.
        owner: What has to live as long as the graph.
        zero: See `MeanLoss.zero_of`.

    """

    gradient: Sequence[Tensor | None]
    leaves: Sequence[Tensor]
    owner: object
    zero: Tensor

    @property
    def tensors(self) -> Sequence[Tensor | None]:
        """The tensors whose graphs are kept."""
        return self.gradient

    def forget_gradient(self) -> None:
        """Let go of the gradient's numbers, before the last product of a graph that is not kept."""
        object.__setattr__(self, "gradient", [])


Graph = TypeVar("Graph", bound=GradientGraph)
"""What is kept of a batch."""


class KeptGraphs(Generic[Graph]):
    """The gradient graphs of some batches.

    Once anything has changed that one of them was computed from, see `freshness`, all are dropped: what changes in a
    training are the parameters, which all of them share.

    Args:
        parameters: What the gradients are taken with respect to.
        max_bytes: The most memory that they may hold.

    Attributes:
        bytes: The memory that they hold.

    """

    def __init__(self, parameters: Sequence[Tensor], max_bytes: int) -> None:
        self._parameters = parameters
        self._max_bytes = max_bytes
        self._freshness = Freshness(parameters)
        self.bytes = 0
        self._graphs: dict[int, Graph] = {}
        self._too_large: set[int] = set()

    def __getitem__(self, index: int) -> Graph | None:
        """The graph of a batch, if it is kept."""
        return self._graphs.get(index)

    def __contains__(self, graph: object) -> bool:
        """Whether a graph is kept."""
        return any(kept is graph for kept in self._graphs.values())

    def has_room(self, index: int) -> bool:
        """Whether the graph of a batch may fit."""
        return self._max_bytes > 0 and index not in self._too_large

    def keep(
        self, index: int, graph: Graph, batch: Sequence[Tensor], found: LossInputs | None = None, more_bytes: int = 0
    ) -> bool:
        """Keep a graph for further products if there is room for it.

        Args:
            index: The batch.
            graph: Its graph.
            batch: The tensors in the batch.
            found: What else it was computed from, if that was watched.
            more_bytes: What it keeps alive besides.

        """
        if not self.has_room(index):
            return False
        # The graphs that are kept are all of one autocast region, with which `is_stale` compares the present one.
        if not self._graphs:
            self._freshness.forget()
        elif not self._freshness.is_in_force():
            return False
        inputs = found.tensors if found is not None else []
        there_before = [*self._parameters, *batch, *inputs]
        num_bytes = graph_bytes([tensor for tensor in graph.tensors if tensor is not None], besides=there_before)
        num_bytes += more_bytes
        if self.bytes + num_bytes > self._max_bytes:
            # Remembered, since another attempt would watch every operation of the loss in vain.
            self._too_large.add(index)
            return False
        self._graphs[index] = graph
        self.bytes += num_bytes
        self._freshness.remember(batch, inputs, found)
        return True

    def refresh(self) -> None:
        """Drop the graphs if they are out of date."""
        if self._graphs and self._freshness.is_stale():
            self.drop()

    def drop(self) -> None:
        """Free the memory of the graphs."""
        self._graphs.clear()
        self._too_large.clear()
        self._freshness.forget()  # which keeps the tensors alive
        self.bytes = 0


def graph_bytes(tensors: Sequence[Tensor], besides: Sequence[Tensor] = ()) -> int:
    """The memory that the graph behind some tensors holds, and the tensors themselves, each byte once.

    Memory is freed as a whole: a small view of what the graph has made holds all that it is a view of. Hooks on saved
    tensors would find these tensors more easily, but under such hooks no transform of ``torch.func`` works.

    Args:
        tensors: The tensors.
        besides: Tensors that were there before. Their memory does not count, nor do other views of it.

    """
    # By the place of the memory and not by tensor: what a node has saved is often a new object at each look.
    not_counted = {tensor.untyped_storage().data_ptr() for tensor in besides if _has_storage(tensor)}
    sizes: dict[int, int] = {}
    for tensor in (*tensors, *_saved_tensors(tensors)):
        if _has_storage(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(size for place, size in sizes.items() if place not in not_counted)


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor._is_zerotensor()  # the zeros of forward derivatives


def _saved_tensors(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """What the nodes of a graph keep for the backward pass."""
    # Once for each type of node: the gradient of a network of 30 layers has 421 nodes of 11 types.
    names: dict[type, list[str]] = {}
    for node in nodes(tensors):
        kind = type(node)
        if kind not in names:
            names[kind] = [name for name in dir(kind) if name.startswith("_saved_")]
        try:
            saved = [getattr(node, name) for name in names[kind]]
            # Where custom functions keep theirs.
            saved.extend(getattr(node, "saved_tensors", ()))
        except RuntimeError:  # freed by a backward pass of the loss's own, or written to since
            continue
        for value in saved:
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, Tensor):
                    yield tensor
