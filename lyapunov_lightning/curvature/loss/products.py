"""Three ways to a Hessian-vector product.

In the order in which ``method="auto"`` prefers them:

- *double backward*: differentiate ``gᵀv``. The graph of the gradient is built once for fixed batches and kept, so that
  a product costs about two gradients; when it does not fit into the memory bound it is rebuilt for every product, which
  costs about three (B. Pearlmutter, "Fast exact multiplication by the Hessian", 1994).
- *forward over reverse*: the directional derivative of the gradient in forward mode. Exact as well, keeps no graph.
- *finite difference*: ``(g(θ + εv) - g(θ - εv)) / 2ε``. Needs a single backward only, so it works with kernels that
  cannot be differentiated twice; it sees the curvature smoothed over ``ε``, the kinks of a ReLU network among it. How
  long ``ε`` should be is found out by `lyapunov_lightning.curvature.loss.difference_step`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lyapunov_lightning.curvature.compat.errors import of_a_second_derivative
from lyapunov_lightning.curvature.compat.operations import (
    TwiceDifferentiableOperations,
    beginning,
    differentiated,
    dtypes_behind,
)
from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.curvature.loss.compiled import Programs
from lyapunov_lightning.curvature.loss.fixed_batches import Evaluation
from lyapunov_lightning.curvature.loss.freshness import LossInputs
from lyapunov_lightning.curvature.loss.kept_graphs import GradientGraph, Graph, KeptGraphs
from lyapunov_lightning.curvature.loss.mean_loss import MeanLoss
from lyapunov_lightning.curvature.vectors.layout import FlatLayout

Result = TypeVar("Result")

Method = Literal["auto", "double_backward", "forward_over_reverse", "finite_difference"]


class Product(Protocol):
    """A way to the product of one batch's curvature matrix with a vector, and to its gradient."""

    @property
    def name(self) -> str:
        """What the way is called."""

    @property
    def graph_bytes(self) -> int:
        """Memory that kept gradient graphs hold."""

    def refresh(self) -> None:
        """Drop what is out of date; to be called before the gradients of all batches."""

    def prepared(self, vector: Tensor) -> Any:
        """What the products of all batches with a vector have in common; to be called immediately before them."""

    def products(self, index: int, directions: Sequence[Any]) -> list[Tensor]:
        """The products of one batch's Hessian with prepared vectors, each of shape ``(size,)``."""

    def gradient(self, index: int, keep_graph: bool = False) -> Tensor:
        """The gradient for one batch at the present parameters, of shape ``(size,)``.

        Args:
            index: The batch.
            keep_graph: Whether to build what products with this batch need as well, and keep it.

        """

    def drop(self) -> None:
        """Drop all that is kept."""


class GraphProduct(ABC, Generic[Graph]):
    """Multiplies by differentiating a graph of each batch, and keeps these graphs.

    Args:
        loss: The mean loss.
        layout: How the parameters form a vector.
        max_graph_bytes: The most memory that kept graphs may hold.

    Attributes:
        graphs: The graphs that are kept.

    """

    name: ClassVar[str]

    def __init__(self, loss: MeanLoss, layout: FlatLayout, max_graph_bytes: int) -> None:
        self._loss = loss
        self._layout = layout
        self.graphs: KeptGraphs[Graph] = KeptGraphs(loss.parameters, max_graph_bytes)
        self._trusted: object = None

    @property
    def graph_bytes(self) -> int:
        """Memory that the kept graphs hold."""
        return self.graphs.bytes

    def prepared(self, vector: Tensor) -> list[Tensor]:
        """The vector in pieces, one for each parameter; drops graphs that are out of date."""
        self.refresh()
        return self._layout.split(vector)

    def products(self, index: int, directions: Sequence[list[Tensor]]) -> list[Tensor]:
        """The products for one batch, by one graph."""
        return self._computed(index, lambda graph, is_kept: self._all_multiplied(graph, directions, is_kept))

    def _computed(self, index: int, compute: Callable[[Graph, bool], Result]) -> Result:
        """What is computed from the graph of a batch, which is built and kept where there is room for it.

        Args:
            index: The batch.
            compute: Takes the graph, and whether it is kept.

        """
        kept = self.graphs[index]
        if kept is not None:
            return compute(kept, True)
        with ExitStack() as stack:
            stack.enter_context(TwiceDifferentiableOperations())
            batch = self._loss.batches.tensors(index)
            inputs = None
            if self.graphs.has_room(index) and not self._loss.batches.is_copied:
                inputs = stack.enter_context(LossInputs([*self._loss.parameters, *batch]))
            evaluation = stack.enter_context(self._loss.batches.evaluated(index))
            with torch._C.DisableTorchFunction():
                self._loss.look_for_functions(evaluation)
            graph = self._graph(evaluation)
            # Checkpointed layers are evaluated again in each backward pass, which is possible only within this block:
            # the graph cannot be kept.
            if evaluation.is_recomputed:
                return compute(graph, False)
            if not {id(leaf) for leaf in graph.leaves} & set(map(id, self._loss.parameters)):
                inputs = None  # a copy that does not say so: what it was computed from is gone, or its own
            with torch._C.DisableTorchFunction():  # what follows is no part of the loss
                more_bytes = self._loss.batches.bytes_kept_with(index) if self.graphs.has_room(index) else 0
                is_kept = self.graphs.keep(index, graph, batch, inputs, more_bytes)
            # The scalar loss and what only it needs may be freed now; a kept graph has what the products need.
            del evaluation
        return compute(graph, is_kept)

    @abstractmethod
    def gradient(self, index: int, keep_graph: bool = False) -> Tensor:
        """The gradient for one batch, from its graph where that is kept."""

    def drop(self) -> None:
        """Drop all graphs."""
        self.graphs.drop()

    def refresh(self) -> None:
        """Drop graphs that are out of date; looked at once in a solver, in which nobody can change anything."""
        solver = self._loss.batches.solver
        if solver is None or solver is not self._trusted:
            self.graphs.refresh()
            self._trusted = solver

    @abstractmethod
    def _graph(self, evaluation: Evaluation) -> Graph:
        """What is kept of an evaluation."""

    @abstractmethod
    def _multiplied(self, graph: Graph, direction: list[Tensor], retain_graph: bool) -> Tensor:
        """The product by a graph."""

    def _all_multiplied(self, graph: Graph, directions: Sequence[list[Tensor]], retain_graph: bool) -> list[Tensor]:
        products = []
        for place, direction in enumerate(directions):
            is_retained = retain_graph or place < len(directions) - 1
            products.append(self._multiplied(graph, direction, is_retained).add_(graph.zero))
        return products


class DoubleBackward(GraphProduct[GradientGraph]):
    """Differentiates the gradient along the vector, and keeps the graphs of gradients.

    Args:
        loss: The mean loss.
        layout: How the parameters form a vector.
        max_graph_bytes: The most memory that kept graphs may hold.
        programs: Compiles the products of kept graphs; None for none.

    """

    name = "double_backward"

    def __init__(
        self, loss: MeanLoss, layout: FlatLayout, max_graph_bytes: int, programs: Programs | None = None
    ) -> None:
        super().__init__(loss, layout, max_graph_bytes)
        self._programs = programs

    def gradient(self, index: int, keep_graph: bool = False) -> Tensor:
        """The gradient for one batch, which a kept graph has already."""
        if keep_graph or self.graphs[index] is not None:
            return self._computed(index, lambda graph, _: self._layout.flatten(graph.gradient) + graph.zero)
        return self._loss.batch_gradient(index)

    def _graph(self, evaluation: Evaluation) -> GradientGraph:
        """The gradient with its graph."""
        gradient = self._loss.gradient_of(evaluation, create_graph=True)
        return GradientGraph(gradient, evaluation.leaves, evaluation.owner, self._loss.zero_of(evaluation.loss))

    def _multiplied(self, graph: GradientGraph, direction: list[Tensor], retain_graph: bool) -> Tensor:
        """The derivative of ``gᵀv``."""
        active = [place for place, entry in enumerate(graph.gradient) if entry is not None and entry.requires_grad]
        if not active:  # the loss is linear in the parameters
            return self._layout.zeros()
        # Where the graph begins is all that is needed of the gradient: its numbers are as many as the parameters.
        outputs = [beginning(entry) for entry in graph.gradient if entry is not None and entry.requires_grad]
        cotangents = [direction[place] for place in active]
        trained = [place for place, leaf in enumerate(graph.leaves) if leaf.requires_grad]
        trainable = [graph.leaves[place] for place in trained]
        product: list[Tensor | None] = [None] * len(graph.leaves)
        if not retain_graph:
            graph.forget_gradient()
        with of_a_second_derivative():
            if self._programs is not None and graph in self.graphs:

                def plain(cotangents: list[Tensor]) -> list[Tensor]:
                    found = differentiated(outputs, cotangents, trainable, retain_graph=True)
                    return [torch.zeros_like(x) if y is None else y for x, y in zip(trainable, found, strict=True)]

                found: Sequence[Tensor | None] = self._programs.derivative(graph, plain, cotangents)
            else:
                found = differentiated(outputs, cotangents, trainable, retain_graph=retain_graph)
        for place, entry in zip(trained, found, strict=True):
            product[place] = entry
        if retain_graph:
            return self._layout.flatten(product)
        del found, entry
        return self._layout.moved(product)


class ForwardOverReverse:
    """Differentiates the gradient in forward mode along the vector.

    Args:
        loss: The mean loss.
        layout: How the parameters form a vector.

    """

    name = "forward_over_reverse"
    graph_bytes = 0

    def __init__(self, loss: MeanLoss, layout: FlatLayout) -> None:
        self._loss = loss
        self._layout = layout

    def prepared(self, vector: Tensor) -> list[Tensor]:
        """The vector in pieces, one for each parameter."""
        return self._layout.split(vector)

    def products(self, index: int, directions: Sequence[list[Tensor]]) -> list[Tensor]:
        """The products for one batch, each by an evaluation of its own."""
        return [self._product(index, direction) for direction in directions]

    def _product(self, index: int, direction: list[Tensor]) -> Tensor:
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(parameter.detach(), piece).requires_grad_()
                if parameter.requires_grad
                else parameter.detach()
                for parameter, piece in zip(self._loss.parameters, direction, strict=True)
            ]
            with TwiceDifferentiableOperations(duals), self._loss.batches.evaluated(index, duals) as evaluation:
                with torch._C.DisableTorchFunction():
                    self._loss.look_for_functions(evaluation)
                # Some of PyTorch's formulas, such as that of a determinant, lose the tangents where no graph is
                # recorded; with `create_graph` it takes others.
                gradient = self._loss.gradient_of(evaluation, create_graph=True)
            pairs = [None if entry is None else forward_ad.unpack_dual(entry) for entry in gradient]
            product = self._layout.flatten([None if pair is None else pair.tangent for pair in pairs])
            primal = self._layout.flatten([None if pair is None else pair.primal for pair in pairs])
            self._check_slope(evaluation.loss, primal, self._layout.flatten(direction))
            return product + self._loss.zero_of(forward_ad.unpack_dual(evaluation.loss).primal)

    def gradient(self, index: int, keep_graph: bool = False) -> Tensor:
        """The gradient for one batch."""
        return self._loss.batch_gradient(index)

    def refresh(self) -> None:
        """Nothing is kept."""

    def drop(self) -> None:
        """Nothing is kept."""

    def _check_slope(self, loss: Tensor, gradient: Tensor, direction: Tensor) -> None:
        """Make sure that the forward derivative of the loss is its gradient times the direction.

        Raises:
            RuntimeError: If a function in the loss has a wrong forward derivative, or none and does not say so.

        """
        value, tangent = forward_ad.unpack_dual(loss)
        slope = gradient.new_zeros(()) if tangent is None else tangent
        error = (slope - gradient @ direction).abs()
        # The narrowest dtype in the graph limits both numbers. Wrong forward derivatives are off by the size of the
        # slope, so a bound far above rounding, eps to the power of 0.4 (5e-7 in float64, 2e-3 in float32) of what a
        # random direction gives, sees them and raises no false alarm.
        rounding = max(torch.finfo(dtype).eps for dtype in dtypes_behind(loss))
        length = torch.linalg.vector_norm(direction)
        usual = torch.linalg.vector_norm(gradient) * length / len(gradient) ** 0.5
        if bool(error > rounding**0.4 * usual + 1e3 * rounding * (1 + value.abs()) * length):
            raise RuntimeError(
                f"The loss has a forward derivative of {float(slope):g} where its gradient says"
                f" {float(gradient @ direction):g}: a function in it has a wrong one in forward mode AD."
            )


class FiniteDifference:
    """Takes the central difference of gradients along the vector.

    Args:
        loss: The mean loss.
        layout: How the parameters form a vector.
        step: The distance to both sides, in parameter space; to be set before there are products if None.

    Attributes:
        step: This distance.
        no_other: Why the loss cannot be differentiated twice; None as long as nobody has seen that it cannot.

    """

    name = "finite_difference"
    graph_bytes = 0

    def __init__(self, loss: MeanLoss, layout: FlatLayout, step: float | None) -> None:
        self._loss = loss
        self._layout = layout
        self._space = layout.space()
        self.step = step
        self.no_other: str | None = None

    @property
    def _otherwise(self) -> str:
        """End of the sentence that says what to do where differences are lost in rounding."""
        if self.no_other is None:
            return ", or use `method='double_backward'`."
        return f", since the loss cannot be differentiated twice. The reason: {self.no_other}"

    def prepared(self, vector: Tensor, step: float | None = None) -> tuple[Tensor, Tensor]:
        """The displacement to one side, and what the difference is to be multiplied by; both stay on the device."""
        step = step or self.step
        assert step is not None
        self._layout.split(vector)  # it refuses vectors of another shape
        norm = self._space.norm(vector)
        # Of a zero vector the product is zero, and 0/0 would make it NaN; a branch in Python would wait for the device.
        displacement = vector * (step / torch.where(norm > 0, norm, 1))
        return displacement, norm / (2 * step)

    def products(self, index: int, directions: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The products for one batch, each by two gradients."""
        return [self._product(index, *direction) for direction in directions]

    def _product(self, index: int, displacement: Tensor, factor: Tensor) -> Tensor:
        # Central and not one-sided: the error of h²·g'''/6 in place of h·g''/2, for one gradient more.
        ahead = self._displaced_gradient(index, displacement)
        behind = self._displaced_gradient(index, -displacement)
        return ahead.sub_(behind).mul_(factor)

    def gradient(self, index: int, keep_graph: bool = False) -> Tensor:
        """The gradient for one batch."""
        return self._loss.batch_gradient(index)

    def refresh(self) -> None:
        """Nothing is kept."""

    def drop(self) -> None:
        """Nothing is kept."""

    def check(self, index: int) -> None:
        """Make sure that one batch has what is needed: a gradient that is precise enough.

        Raises:
            MeasurementError: If it is rounded to half precision.

        """
        self._displaced_gradient(index, self._layout.zeros())

    def _displaced_gradient(self, index: int, displacement: Tensor) -> Tensor:
        values = self._loss.displaced(displacement, self._otherwise)
        with self._loss.batches.evaluated(index, values) as evaluation:
            with torch._C.DisableTorchFunction():  # this is no part of the loss
                narrow = dtypes_behind(evaluation.loss) & {torch.float16, torch.bfloat16}
            if narrow:
                raise MeasurementError(
                    "Finite differences are lost in the rounding of half precision: the loss, or a part of it, is"
                    f" computed in {' and '.join(sorted(map(str, narrow)))}. Compute it in float32, without"
                    f" autocast{self._otherwise}"
                )
            gradient = self._loss.gradient_of(evaluation)
            return self._layout.flatten(gradient) + self._loss.zero_of(evaluation.loss)
