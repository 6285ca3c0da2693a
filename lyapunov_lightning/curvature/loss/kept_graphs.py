"""Gradient graphs that are kept from product to product: as many as fit, and only as long as they are up to date."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lyapunov_lightning.curvature.compat.operations import nodes
from lyapunov_lightning.curvature.loss.fingerprints import Fingerprint, joined
from lyapunov_lightning.curvature.loss.sources import Modes, Sources, are_switched


class GradientGraph(NamedTuple):
    """The gradient of a batch with its graph, and what that graph needs alive; not the loss, which may hold more.

    Attributes:
        gradient: One entry for each parameter; None stands for zeros.
        leaves: What the loss was differentiated with respect to.
        owner: What has to live as long as the graph.

    """

    gradient: list[Tensor | None]
    leaves: Sequence[Tensor]
    owner: object


class KeptGraphs:
    """The gradient graphs of some batches.

    A graph is out of date once a tensor that it was computed from holds something else, a layer was switched between
    training and evaluation, or another precision is in force. Then all are dropped.

    Args:
        parameters: What the gradients are those of.
        max_bytes: The most memory that they may hold.

    Attributes:
        bytes: The memory that they hold.

    """

    def __init__(self, parameters: Sequence[Tensor], max_bytes: int) -> None:
        self._parameters = parameters
        self._max_bytes = max_bytes
        self.bytes = 0
        self._graphs: dict[int, GradientGraph] = {}
        self._too_large: set[int] = set()
        self._fingerprints: list[Fingerprint] = []
        self._modes: Modes = {}
        self._precision: list[tuple[bool, torch.dtype]] = []

    def __getitem__(self, index: int) -> GradientGraph | None:
        """The graph of a batch, if it is kept."""
        return self._graphs.get(index)

    def has_room(self, index: int) -> bool:
        """Whether the graph of a batch may fit."""
        return self._max_bytes > 0 and index not in self._too_large

    def keep(self, index: int, graph: GradientGraph, batch: Sequence[Tensor], sources: Sources | None = None) -> bool:
        """Keep a graph for further products if there is room for it.

        Args:
            index: The batch.
            graph: Its graph.
            batch: The tensors in the batch.
            sources: What else it was computed from, if that was watched.

        """
        if not self.has_room(index):
            return False
        precision = self._present_precision()
        if self._graphs and precision != self._precision:
            return False
        self._precision = precision
        fingerprints = [Fingerprint([*self._parameters, *batch]), *(sources.fingerprints if sources else [])]
        there_before = [tensor for fingerprint in fingerprints for tensor in fingerprint.tensors]
        num_bytes = graph_bytes([entry for entry in graph.gradient if entry is not None], besides=there_before)
        if self.bytes + num_bytes > self._max_bytes:
            self._too_large.add(index)
            return False
        self._graphs[index] = graph
        self.bytes += num_bytes
        self._fingerprints += fingerprints
        self._modes.update(sources.modes if sources else {})
        return True

    def refresh(self) -> None:
        """Drop the graphs if they are out of date."""
        if not self._graphs:
            return
        if self._is_outdated():
            self.drop()
            return
        limits = {fingerprint.max_bytes for fingerprint in self._fingerprints}
        if len(limits) < len(self._fingerprints):  # those of several batches
            alike = [[f for f in self._fingerprints if f.max_bytes == limit] for limit in limits]
            self._fingerprints = list(map(joined, alike))

    def drop(self) -> None:
        """Free the memory of the graphs."""
        self._graphs.clear()
        self._too_large.clear()
        self._fingerprints.clear()
        self._modes.clear()
        self.bytes = 0

    def _is_outdated(self) -> bool:
        if are_switched(self._modes) or self._precision != self._present_precision():
            return True
        return any(fingerprint.is_changed() for fingerprint in self._fingerprints)

    def _present_precision(self) -> list[tuple[bool, torch.dtype]]:
        """In which dtypes the operations of a loss are performed at present."""
        kinds = dict.fromkeys(("cpu", *(parameter.device.type for parameter in self._parameters)))
        return [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]


def graph_bytes(tensors: Sequence[Tensor], besides: Sequence[Tensor] = ()) -> int:
    """The memory that the graph behind some tensors holds, and the tensors themselves, each byte once.

    Memory is freed as a whole: of what the graph has made itself a small view holds all that it is a view of. Hooks on
    saved tensors would tell of them more easily, but with those no transform of ``torch.func`` works.

    Args:
        tensors: The tensors.
        besides: Tensors that were there before, whose memory and that of other views of it does not count.

    """
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
