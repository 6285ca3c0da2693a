"""Three ways to a Hessian-vector product.

In the order in which ``method="auto"`` prefers them:

- *double backward*: differentiate ``gᵀv``. The graph of the gradient is built once for fixed batches and kept, so that
  a product costs about two gradients; when it does not fit into the memory bound it is rebuilt for every product, which
  costs about three (B. Pearlmutter, "Fast exact multiplication by the Hessian", 1994).
- *forward over reverse*: the directional derivative of the gradient in forward mode. Exact as well, keeps no graph.
- *finite difference*: ``(g(θ + εv) - g(θ - εv)) / 2ε``. Needs a single backward only, so it works with kernels that
  cannot be differentiated twice; it sees the curvature smoothed over ``ε``, the kinks of a ReLU network among it.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lyapunov_lightning.curvature.mean_loss import MeanLoss
from lyapunov_lightning.curvature.torch_compat import (
    TwiceDifferentiableOperations,
    check_twice_differentiable,
    differentiated,
    graph_bytes,
)
from lyapunov_lightning.curvature.vectors import FlatLayout

Method = Literal["auto", "double_backward", "forward_over_reverse", "finite_difference"]


class Product(Protocol):
    """A way to the product of one batch's Hessian with a vector, and to its gradient."""

    name: str

    def product(self, index: int, vector: Tensor) -> Tensor:
        """The product for one batch, of shape ``(size,)``."""

    def gradient(self, index: int) -> Tensor:
        """The gradient for one batch at the present parameters, of shape ``(size,)``."""


class _Graph(NamedTuple):
    """The gradient of a batch with its graph, and what that graph needs alive; not the loss, which may hold more."""

    gradient: list[Tensor | None]
    leaves: Sequence[Tensor]
    owner: object


class DoubleBackward:
    """Differentiates the gradient along the vector, and keeps the graphs of gradients.

    Args:
        loss: The mean loss.
        parameters: What it is a function of.
        layout: How they form a vector.
        max_graph_bytes: The most memory that kept graphs may hold.

    """

    name = "double_backward"

    def __init__(self, loss: MeanLoss, parameters: Sequence[Tensor], layout: FlatLayout, max_graph_bytes: int) -> None:
        self._loss = loss
        self._parameters = parameters
        self._layout = layout
        self._max_graph_bytes = max_graph_bytes
        self._graphs: dict[int, _Graph] = {}
        self._too_large: set[int] = set()
        self._versions: list[int] = []
        self.graph_bytes = 0

    def product(self, index: int, vector: Tensor) -> Tensor:
        """The product for one batch."""
        kept = self._kept(index)
        if kept is not None:
            return self._second_derivative(kept, vector, retain_graph=True)
        with TwiceDifferentiableOperations(), self._loss.evaluated(index) as evaluation:
            check_twice_differentiable(evaluation.loss)
            gradient = self._loss.gradient_of(evaluation, create_graph=True)
            graph = _Graph(gradient, evaluation.leaves, evaluation.owner)
            if evaluation.is_recomputed:
                return self._second_derivative(graph, vector, retain_graph=False)
        del evaluation
        return self._second_derivative(graph, vector, retain_graph=self._keep(index, graph))

    def gradient(self, index: int) -> Tensor:
        """The gradient for one batch, which a kept graph has already."""
        kept = self._kept(index)
        if kept is not None:
            return self._layout.flatten(kept.gradient)
        return self._loss.batch_gradient(index)

    def drop_graphs(self) -> None:
        """Free the memory of the kept graphs; they are built again when they are needed."""
        self._graphs.clear()
        self._too_large.clear()
        self.graph_bytes = 0

    def _kept(self, index: int) -> _Graph | None:
        """The kept graph of a batch, unless the parameters were changed since."""
        versions = [parameter._version for parameter in self._parameters]
        if versions != self._versions:
            self.drop_graphs()
            self._versions = versions
        return self._graphs.get(index)

    def _keep(self, index: int, graph: _Graph) -> bool:
        """Keep a graph for further products if there is room for it."""
        if index in self._too_large:
            return False
        entries = [entry for entry in graph.gradient if entry is not None]
        num_bytes = graph_bytes(entries, besides=self._parameters)
        if self.graph_bytes + num_bytes > self._max_graph_bytes:
            self._too_large.add(index)
            return False
        self._graphs[index] = graph
        self.graph_bytes += num_bytes
        return True

    def _second_derivative(self, graph: _Graph, vector: Tensor, retain_graph: bool) -> Tensor:
        directions = self._layout.split(vector)
        pairs = zip(graph.gradient, directions, strict=True)
        active = [(entry, direction) for entry, direction in pairs if entry is not None and entry.requires_grad]
        if not active:  # a loss that is linear in the parameters
            return self._layout.zeros()
        outputs, cotangents = zip(*active, strict=True)
        trainable = [leaf for leaf in graph.leaves if leaf.requires_grad]
        entries = iter(differentiated(outputs, cotangents, trainable, retain_graph=retain_graph))
        return self._layout.flatten([next(entries) if leaf.requires_grad else None for leaf in graph.leaves])


class ForwardOverReverse:
    """Differentiates the gradient in forward mode along the vector.

    Args:
        loss: The mean loss.
        parameters: What it is a function of.
        layout: How they form a vector.

    """

    name = "forward_over_reverse"

    def __init__(self, loss: MeanLoss, parameters: Sequence[Tensor], layout: FlatLayout) -> None:
        self._loss = loss
        self._parameters = parameters
        self._layout = layout

    def product(self, index: int, vector: Tensor) -> Tensor:
        """The product for one batch."""
        with forward_ad.dual_level(), TwiceDifferentiableOperations():
            duals = [
                forward_ad.make_dual(parameter.detach(), direction).requires_grad_()
                if parameter.requires_grad
                else parameter.detach()
                for parameter, direction in zip(self._parameters, self._layout.split(vector), strict=True)
            ]
            with self._loss.evaluated(index, duals) as evaluation:
                check_twice_differentiable(evaluation.loss)
                gradient = self._loss.gradient_of(evaluation)
            tangents = [None if entry is None else forward_ad.unpack_dual(entry).tangent for entry in gradient]
            return self._layout.flatten(tangents)

    def gradient(self, index: int) -> Tensor:
        """The gradient for one batch."""
        return self._loss.batch_gradient(index)


class FiniteDifference:
    """Takes the central difference of gradients along the vector.

    Args:
        loss: The mean loss.
        layout: How the parameters form a vector.
        step: The distance to both sides, in parameter space.

    """

    name = "finite_difference"

    def __init__(self, loss: MeanLoss, layout: FlatLayout, step: float) -> None:
        self._loss = loss
        self._layout = layout
        self.step = step

    def product(self, index: int, vector: Tensor) -> Tensor:
        """The product for one batch."""
        norm = torch.linalg.vector_norm(vector)
        if norm == 0:
            return self._layout.zeros()
        displacement = vector * (self.step / norm)
        ahead = self._loss.batch_gradient(index, displacement)
        behind = self._loss.batch_gradient(index, -displacement)
        return (ahead - behind).mul_(norm / (2 * self.step))

    def gradient(self, index: int) -> Tensor:
        """The gradient for one batch."""
        return self._loss.batch_gradient(index)
