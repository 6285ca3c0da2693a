"""The mean loss over fixed batches: its value, its gradient, its values along a line."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import compress

import torch
from torch import Tensor

from lyapunov_lightning.curvature.compat.errors import of_a_second_derivative
from lyapunov_lightning.curvature.compat.functions import check_twice_differentiable, own_functions
from lyapunov_lightning.curvature.compat.operations import differentiated, nodes
from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.curvature.loss.fixed_batches import Evaluation, FixedBatches, Total
from lyapunov_lightning.curvature.vectors.layout import FlatLayout, is_narrow

Distances = Sequence[float] | Sequence[Sequence[float]]
"""Where on a line to evaluate a loss, or on a plane: a number for each of its directions."""


def displacements(direction: Tensor, distances: Distances) -> Iterator[Tensor]:
    """The points of a line, or of a plane, one after the other, see `MeanLoss.values_along`."""
    for distance in distances:
        if isinstance(distance, Sequence):
            displacement = distance[0] * direction[0]
            for multiple, row in zip(distance[1:], direction[1:], strict=True):
                displacement.add_(row, alpha=multiple)
            yield displacement
        else:
            yield distance * direction


class MeanLoss:
    """The mean of a loss over all samples of fixed batches, on all ranks.

    Args:
        batches: The loss with its batches.
        parameters: What it is a function of.
        layout: How they form a vector.

    Attributes:
        batches: The loss with its batches.
        parameters: What it is a function of.
        layout: How they form a vector.
        functions: The functions in it that are not PyTorch's own, None standing for those in C++; None as long as
            nobody has looked for them.

    """

    def __init__(self, batches: FixedBatches, parameters: Sequence[Tensor], layout: FlatLayout) -> None:
        self.batches = batches
        self.parameters = parameters
        self.layout = layout
        self.reset()

    def reset(self) -> None:
        """Forget how the loss has to be evaluated, to find it out again."""
        self._is_substituted = False
        self._needs_graph = False
        self.functions: frozenset[type | None] | None = None

    def look_for_functions(self, evaluation: Evaluation) -> None:
        """Look for functions that are not PyTorch's own in a loss that was evaluated, once."""
        if self.functions is None:
            twice, once = evaluation.differentiated
            found = own_functions([*twice, *once])
            self.functions = frozenset(getattr(node, "_forward_cls", None) for node in found)

    def value(self, displacement: Tensor | None = None) -> float:
        """The mean loss.

        Args:
            displacement: Where to take it, relative to the present parameters: shape ``(size,)``; at these if None.

        """
        with self.batches.mean(1, self._sum_dtype) as total:
            self._add_values(total, [displacement])
        return float(total.sum)

    def values_along(self, direction: Tensor, distances: Distances) -> Tensor:
        """The mean loss at several points of a line, or a plane, through the present parameters.

        Args:
            direction: The line's direction, of shape ``(size,)``; or the directions of a plane, ``(k, size)``.
            distances: Where on the line to evaluate the loss, in multiples of `direction`; on a plane the k multiples
                for each point.

        Returns:
            A float64 vector on the CPU, one number for each distance.

        """
        if not distances:
            return torch.zeros(0, dtype=torch.float64)
        # One message for all points, so that the ranks do not wait for each other at each of them.
        with self.batches.mean(len(distances), self._sum_dtype) as total:
            self._add_values(total, displacements(direction, distances))
        return total.sum.to("cpu", torch.float64)

    def gradient(self, displacement: Tensor | None = None) -> Tensor:
        """The gradient of the mean loss, of shape ``(size,)``.

        Args:
            displacement: Where to take it, relative to the present parameters: shape ``(size,)``; at these if None.

        """
        with self.batches.mean(self.layout.size) as total:
            for index in range(len(self.batches)):
                # In this order: the evaluation may be what finds out the weight.
                total.add(self.batch_gradient(index, displacement), self.batches.weight(index))
        return total.sum

    def batch_gradient(self, index: int, displacement: Tensor | None = None) -> Tensor:
        """The gradient of one batch's loss, of shape ``(size,)``."""
        with self.batches.evaluated(index, self.displaced(displacement)) as evaluation:
            gradient = self.gradient_of(evaluation)
            return self.layout.flatten(gradient) + self.zero_of(evaluation.loss)

    def zero_of(self, loss: Tensor) -> Tensor:
        """A zero, or NaN where the loss of a batch is not finite.

        Added to the batch's gradients and products it makes them NaN, and so the mean of all batches on all ranks,
        which the solvers refuse. By itself a gradient may well be finite where the loss is not: the mean over no labels
        is NaN, and its gradient zero. To look at the number would be to wait for the device.
        """
        return (loss.detach() * 0).to(device=self.layout.device, dtype=self.layout.dtype)

    def gradient_of(self, evaluation: Evaluation, create_graph: bool = False) -> list[Tensor | None]:
        """The gradient of a loss that was evaluated, one entry for each parameter; None stands for zeros.

        Raises:
            MeasurementError: If the loss depends on the parameters themselves where it should on other values, or if
                a layer writes to ``.grad`` instead of returning its gradient.
            RuntimeError: If the gradient with its graph cannot be differentiated once more.

        """
        loss, leaves = evaluation.loss, evaluation.leaves
        if not loss.requires_grad:
            return [None] * len(leaves)
        with torch._C.DisableTorchFunction():  # the modes of the loss would see each look at a parameter
            one = torch.ones_like(loss)
            if create_graph:
                # PyTorch takes for a constant what a function computes without it from the incoming gradient. With a
                # one that requires a gradient itself, what comes out of such a function shows that it lost its graph.
                one.requires_grad_(check_twice_differentiable(loss))
            is_trained = [leaf.requires_grad for leaf in leaves]
            trainable = list(compress(leaves, is_trained))
            own = set(map(id, leaves))
            # Where others stand in their place, the gradient with respect to the parameters themselves has to be zero.
            # It is asked for in the same backward pass, which costs nothing.
            present = [p for p in self.parameters if id(p) not in own and p.requires_grad]
        marked = of_a_second_derivative() if create_graph else nullcontext()
        with _unwritten_gradients(trainable + present), marked:
            gradient = differentiated(
                (loss,),
                (one,),
                trainable + present,
                retain_graph=create_graph,
                create_graph=create_graph,
            )
        # For parameters that the graph does not reach the engine gives None. A zero shows that one was reached, too.
        if any(entry is not None for entry in gradient[len(trainable) :]):
            raise MeasurementError(_NOT_SUBSTITUTED)
        entries = iter(gradient)
        return [next(entries) if trained else None for trained in is_trained]

    def displaced(self, displacement: Tensor | None, otherwise: str = ".") -> list[Tensor] | None:
        """The parameters at a distance from where they are.

        Args:
            displacement: The distance, of shape ``(size,)``; None if there is none.
            otherwise: End of the sentence that says what to do where distances are lost.

        Raises:
            MeasurementError: If the distance would be lost in the rounding of half-precision parameters.

        """
        if displacement is None:
            return None
        if is_narrow(self.parameters):
            raise MeasurementError(
                "Finite differences, and the loss at nearby parameters, are lost in the rounding of half-precision"
                f" parameters. Keep the parameters in float32 (mixed precision does){otherwise}"
            )
        pieces = self.layout.split(displacement.detach().to(dtype=self.layout.dtype, device=self.layout.device))
        is_trained = [parameter.requires_grad for parameter in self.parameters]
        values = [parameter.detach() for parameter in self.parameters]
        if any(is_trained):  # one call for all, since models may have thousands
            moved = iter(torch._foreach_add(list(compress(values, is_trained)), list(compress(pieces, is_trained))))
            values = [
                next(moved).requires_grad_() if trained else value
                for value, trained in zip(values, is_trained, strict=True)
            ]
        return values

    def _add_values(self, total: Total, displacements: Iterable[Tensor | None]) -> None:
        """Add the losses at several points, one point after the other to need the memory of one displaced copy."""
        for place, displacement in enumerate(displacements):
            values = self.displaced(displacement)
            total.weight = 0.0  # that of one pass over the batches, whatever the number of points
            for index in range(len(self.batches)):
                value = self._batch_value(index, values)  # before the weight, which this may find out
                total.sum[place] += self.batches.weight(index) * value.to(total.sum)
                total.weight += self.batches.weight(index)

    def _batch_value(self, index: int, values: Sequence[Tensor] | None) -> Tensor:
        """The loss of one batch, evaluated without a graph where that is possible.

        A graph is needed once, to see whether the loss depends on the parameters in ways that cannot be substituted.
        And a loss that differentiates by itself, such as a penalty on gradients, fails without one.
        """
        is_checked = values is None or self._is_substituted
        if is_checked and not self._needs_graph:
            try:
                with self.batches.evaluated(index, values, with_graph=False) as evaluation:
                    return evaluation.loss
            except (MeasurementError, torch.OutOfMemoryError):
                raise
            except Exception:  # raised again below unless it is for the lack of a graph
                pass
        with self.batches.evaluated(index, values) as evaluation:
            if not is_checked:
                self._check_substituted(evaluation)
                self._is_substituted = True
            else:
                self._needs_graph = True
            return evaluation.loss.detach()

    def _check_substituted(self, evaluation: Evaluation) -> None:
        """Make sure that a loss at other values of the parameters does not depend on the present ones."""
        own = {id(leaf) for leaf in evaluation.leaves}
        present = {id(parameter) for parameter in self.parameters} - own
        # Of PyTorch's nodes only those that accumulate a gradient have a `variable`, their leaf.
        if any(id(getattr(node, "variable", None)) in present for node in nodes([evaluation.loss])):
            raise MeasurementError(_NOT_SUBSTITUTED)

    @property
    def _sum_dtype(self) -> torch.dtype:
        """In which losses are summed: differences of losses are small, so rounding should not add to that of each."""
        is_mps = self.layout.device.type == "mps"  # which has no float64
        return self.layout.dtype if is_mps else torch.float64


@contextmanager
def _unwritten_gradients(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put aside what tensors hold in ``.grad``, and refuse a layer that writes there while a gradient is taken.

    Raises:
        MeasurementError: If there is such a layer; what it wrote is gone.

    """
    unobserved = torch._C.DisableTorchFunction  # a mode would take this for the loss's own look at `.grad`
    with unobserved():
        leaves = [tensor for tensor in tensors if tensor.is_leaf]
        before = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
    # Put aside and not compared afterwards: what a layer adds to a gradient in place leaves the tensor the same object.
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
    " reference kept outside the module. Use `method='double_backward'`; where that refuses the loss as well, compute"
    " it without that function, such as an ODE without the adjoint method, or give a loss with a method"
    " `evaluated(batch, values)`."
)
