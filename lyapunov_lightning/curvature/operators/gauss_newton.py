"""Curvature matrices of the form ``JᵀMJ``: generalised Gauss–Newton and empirical Fisher, known by their products.

``J`` is the derivative of what a model puts out for a batch, and ``M`` a small matrix for each batch:

- *generalised Gauss–Newton*: ``M`` is the Hessian of the loss as a function of the outputs. Of the whole Hessian it
  leaves out the curvature of the model itself (N. Schraudolph, "Fast curvature matrix-vector products for second-order
  gradient descent", 2002; J. Martens, "New insights and perspectives on the natural gradient method", 2020, sections 8
  and 9).
- *empirical Fisher*: the outputs are the losses of the samples, and ``M = I/n`` (F. Kunstner, L. Balles, P. Hennig,
  "Limitations of the empirical Fisher approximation for natural gradient descent", 2019).

``Jᵀu`` is what one backward pass computes. It is linear in ``u``, so a second backward pass, along ``v`` and towards
``u``, computes ``Jv`` (J. Townsend, "A new trick for calculating Jacobian vector products", 2017). That asks for less
than a second derivative of the model: a layer's backward pass has to be differentiable in what comes in from above, not
in the parameters. Whether all of them are is checked by ``⟨Jv, u⟩ = ⟨v, Jᵀu⟩``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lyapunov_lightning.curvature.compat.errors import lacks_derivative, may_pass, of_a_second_derivative
from lyapunov_lightning.curvature.compat.operations import (
    check_twice_differentiable,
    differentiated,
    nodes,
    twice_differentiable_kernels,
)
from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.curvature.loss.fixed_batches import Evaluation, Total, num_samples
from lyapunov_lightning.curvature.loss.kept_graphs import GradientGraph
from lyapunov_lightning.curvature.loss.mean_loss import MeanLoss
from lyapunov_lightning.curvature.loss.products import DoubleBackward
from lyapunov_lightning.curvature.operators.checks import OperatorCheck, check_operator
from lyapunov_lightning.curvature.operators.mean_operator import MeanOperator
from lyapunov_lightning.curvature.vectors.layout import FlatLayout

_Tensors = Sequence[Tensor | None]
"""One tensor for each parameter or output; None stands for zeros."""

_ADJOINT_TOLERANCE = 0.05
"""How far ``⟨Jv, u⟩`` may be from ``⟨v, Jᵀu⟩``, relative to it. What is beyond the rounding of half precision is a
layer whose backward pass leaves out a part."""


class _Outputs(NamedTuple):
    """What a model puts out for a batch: as a function of the parameters, and as variables of their own."""

    of_parameters: list[Tensor]
    variables: list[Tensor]


class _Tip(Protocol):
    """What comes after the outputs. An `Objective` whose evaluations own `_Outputs`."""

    def weights(self, batches: Sequence[Any]) -> list[float] | None:
        """The number of samples of each batch, if it is known before the batches are evaluated."""

    @contextmanager
    def evaluated(self, batch: Any, values: Sequence[Tensor] | None = None) -> Iterator[Evaluation]:
        """Evaluate the outputs, and the loss as a function of them alone."""

    def differentiated(self, evaluation: Evaluation) -> tuple[_Tensors, Callable[[_Tensors], _Tensors]]:
        """The loss's gradient in the outputs, and the product ``w -> Mw``."""


class _Linearised(NamedTuple):
    """The outputs of a batch, linearised at the parameters."""

    outputs: _Outputs
    cotangents: Sequence[Tensor]  # u
    pulled_back: _Tensors  # Jᵀu, as a function of u
    slopes: _Tensors  # the loss's gradient in the outputs
    inner: Callable[[_Tensors], _Tensors]  # w -> Mw
    leaves: Sequence[Tensor]


class _LossOfOutputs:
    """The loss as a function of the outputs: ``M`` is its Hessian."""

    def __init__(
        self, outputs: Callable[[Any], Any], loss: Callable[[Any, Any], Tensor], parameters: Sequence[Tensor]
    ) -> None:
        self._outputs = outputs
        self._loss = loss
        self._parameters = parameters

    def weights(self, batches: Sequence[Any]) -> list[float] | None:
        """The number of samples of each batch."""
        return [float(num_samples(batch)) for batch in batches]

    @contextmanager
    def evaluated(self, batch: Any, values: Sequence[Tensor] | None = None) -> Iterator[Evaluation]:
        """Evaluate the outputs, and the loss as a function of them alone.

        Raises:
            MeasurementError: If an output is complex.

        """
        members, structure = pytree.tree_flatten(self._outputs(batch))
        parts = _Outputs([], [])
        for place, member in enumerate(members):
            if isinstance(member, Tensor) and member.requires_grad:
                if member.is_complex():
                    raise MeasurementError(
                        "The outputs should be real, got a complex tensor. Use `torch.view_as_real`."
                    )
                parts.of_parameters.append(member)
                parts.variables.append(member.detach().requires_grad_())
                members[place] = parts.variables[-1]
        loss = self._loss(pytree.tree_unflatten(members, structure), batch)
        yield Evaluation(loss, self._parameters, lambda: num_samples(batch), owner=parts)

    def differentiated(self, evaluation: Evaluation) -> tuple[_Tensors, Callable[[_Tensors], _Tensors]]:
        """The loss's gradient in the outputs, and the product with its Hessian in the outputs.

        Raises:
            MeasurementError: If the loss depends on the parameters beside the outputs.

        """
        parts = cast(_Outputs, evaluation.owner)
        loss, variables = evaluation.loss, parts.variables
        parameters = {id(parameter) for parameter in self._parameters}
        if any(id(getattr(node, "variable", None)) in parameters for node in nodes([loss])):
            raise MeasurementError(
                "The loss depends on the parameters beside the outputs, so that Gauss–Newton is not defined. Let"
                " `outputs` return all that the loss takes of the parameters, or these themselves, as tensors in lists,"
                " tuples and dictionaries, not in other objects."
            )
        if not variables or not loss.requires_grad:
            return [None] * len(variables), lambda tangents: [None] * len(tangents)
        one = torch.ones_like(loss).requires_grad_(check_twice_differentiable(loss))
        slopes = differentiated((loss,), (one,), variables, retain_graph=True, create_graph=True)

        def inner(tangents: _Tensors) -> _Tensors:
            pairs = [
                (slope, tangent)
                for slope, tangent in zip(slopes, tangents, strict=True)
                if slope is not None and slope.requires_grad and tangent is not None
            ]
            if not pairs:  # a loss that is linear in the outputs
                return [None] * len(variables)
            functions, along = zip(*pairs, strict=True)
            return differentiated(functions, along, variables, retain_graph=True)

        return slopes, inner


class _LossesOfSamples:
    """The losses of the samples are the outputs: ``M = I/n``."""

    def __init__(self, losses: Callable[[Any], Tensor], parameters: Sequence[Tensor]) -> None:
        self._losses = losses
        self._parameters = parameters

    def weights(self, batches: Sequence[Any]) -> list[float] | None:
        """The number of losses, which is not known yet."""
        return None

    @contextmanager
    def evaluated(self, batch: Any, values: Sequence[Tensor] | None = None) -> Iterator[Evaluation]:
        """Evaluate the losses, and their mean.

        Raises:
            MeasurementError: If they are not a vector.

        """
        losses = self._losses(batch)
        if not isinstance(losses, Tensor) or losses.ndim != 1 or not len(losses):
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise MeasurementError(
                f"`losses` should return one number for each sample, a tensor of shape (n,), got {got}. Most losses of"
                " PyTorch do so with `reduction='none'`."
            )
        detached = losses.detach()
        parts = _Outputs([losses], [detached]) if losses.requires_grad else _Outputs([], [])
        yield Evaluation(detached.mean(), self._parameters, lambda: len(detached), owner=parts)

    def differentiated(self, evaluation: Evaluation) -> tuple[_Tensors, Callable[[_Tensors], _Tensors]]:
        """The mean's gradient in the losses, and the product with ``I/n``."""
        parts = cast(_Outputs, evaluation.owner)
        slopes = [torch.full_like(losses, 1 / len(losses)) for losses in parts.variables]
        return slopes, lambda tangents: [None if t is None else t / len(t) for t in tangents]


class _ThroughOutputs(DoubleBackward):
    """Multiplies by ``Jᵀ``, ``M`` and ``J``, and keeps the graphs of ``J``.

    Args:
        tip: What comes after the outputs.
        loss: The mean loss.
        parameters: What it is a function of.
        layout: How they form a vector.
        max_graph_bytes: The most memory that kept graphs may hold.

    """

    name = "through_outputs"

    def __init__(
        self, tip: _Tip, loss: MeanLoss, parameters: Sequence[Tensor], layout: FlatLayout, max_graph_bytes: int
    ) -> None:
        super().__init__(loss, parameters, layout, max_graph_bytes)
        self._tip = tip
        self.num_to_check = len(loss.batches)

    def gradient(self, index: int) -> Tensor:
        """The gradient of the loss for one batch."""
        kept = self.graphs[index]
        if kept is not None:
            linearised = cast(_Linearised, kept.owner)
            return self._pulled_back(linearised, linearised.slopes, retain_graph=True)
        with self._loss.batches.evaluated(index) as evaluation:
            parts = cast(_Outputs, evaluation.owner)
            slopes, _ = self._tip.differentiated(evaluation)
            paired = replace(evaluation, loss=_paired(parts.of_parameters, slopes))
            return self._layout.flatten(self._loss.gradient_of(paired))

    def _graph(self, evaluation: Evaluation) -> GradientGraph:
        """The linearised outputs, with all tensors whose graphs are kept."""
        parts = cast(_Outputs, evaluation.owner)
        with of_a_second_derivative():
            slopes, inner = self._tip.differentiated(evaluation)
            cotangents = [torch.randn_like(output).requires_grad_() for output in parts.of_parameters]
            paired = replace(evaluation, loss=_paired(parts.of_parameters, cotangents))
            pulled_back = self._loss.gradient_of(paired, create_graph=True)
            linearised = _Linearised(parts, cotangents, pulled_back, slopes, inner, evaluation.leaves)
            if self.num_to_check:  # of each batch the first one
                self._check_adjoint(linearised)
                self.num_to_check -= 1
        tensors = [*parts.of_parameters, *cotangents, *pulled_back, *slopes]
        return GradientGraph(tensors, evaluation.leaves, linearised)

    def _multiplied(self, graph: GradientGraph, direction: list[Tensor], retain_graph: bool) -> Tensor:
        """The product that is to be had of linearised outputs."""
        linearised = cast(_Linearised, graph.owner)
        with of_a_second_derivative():
            tangents = self._pushed_forward(linearised, direction, retain_graph)
            return self._pulled_back(linearised, linearised.inner(tangents), retain_graph)

    def _pushed_forward(self, linearised: _Linearised, direction: Sequence[Tensor], retain_graph: bool) -> _Tensors:
        """``Jv``."""
        pairs = zip(linearised.pulled_back, direction, strict=True)
        active = [(entry, piece) for entry, piece in pairs if entry is not None and entry.requires_grad]
        if not active:
            return [None] * len(linearised.cotangents)
        functions, along = zip(*active, strict=True)
        return differentiated(functions, along, linearised.cotangents, retain_graph=retain_graph)

    def _pulled_back(self, linearised: _Linearised, cotangents: _Tensors, retain_graph: bool) -> Tensor:
        """``Jᵀu``."""
        pairs = zip(linearised.outputs.of_parameters, cotangents, strict=True)
        active = [(output, cotangent) for output, cotangent in pairs if cotangent is not None]
        if not active:
            return self._layout.zeros()
        trainable = [leaf for leaf in linearised.leaves if leaf.requires_grad]
        functions, along = zip(*active, strict=True)
        entries = iter(differentiated(functions, along, trainable, retain_graph=retain_graph))
        return self._layout.flatten([next(entries) if leaf.requires_grad else None for leaf in linearised.leaves])

    def _check_adjoint(self, linearised: _Linearised) -> None:
        """Make sure that ``⟨Jv, u⟩ = ⟨v, Jᵀu⟩``, with ``v`` along ``Jᵀu``, where a missing part shows most.

        Raises:
            MeasurementError: If a layer's backward pass leaves something out when it is differentiated.

        """
        pulled_back = self._layout.flatten(linearised.pulled_back)
        length = float(torch.linalg.vector_norm(pulled_back))
        if length == 0:
            return
        tangents = self._pushed_forward(linearised, self._layout.split(pulled_back / length), retain_graph=True)
        found = sum(
            float((tangent.float() * cotangent.detach().float()).sum())
            for tangent, cotangent in zip(tangents, linearised.cotangents, strict=True)
            if tangent is not None
        )
        if abs(found - length) > _ADJOINT_TOLERANCE * length:  # not so for NaN, which is the solvers' to tell
            raise MeasurementError(
                "A layer's backward pass cannot be differentiated in the gradient that comes in from above: it detaches"
                " it, or is not linear in it. Use a layer whose backward pass consists of differentiable operations."
            )


class _OutputOperator(MeanOperator):
    """``JᵀMJ``, weighted over batches like the Hessian."""

    def __init__(
        self,
        tip: Callable[[Sequence[Tensor]], _Tip],
        parameters: Any,
        batches: Iterable[Any],
        weights: Sequence[float] | None,
        max_graph_bytes: int,
        reduce: Callable[[Tensor], None] | None,
    ) -> None:
        super().__init__(parameters, max_graph_bytes, reduce)
        batches = list(batches)
        objective = tip(self.parameters)
        if weights is None and (len(batches) > 1 or reduce is not None):
            weights = objective.weights(batches)
        self._average_over(objective, batches, weights)
        loss = MeanLoss(self._batches, self.parameters, self.layout)
        self._way = _ThroughOutputs(objective, loss, self.parameters, self.layout, max_graph_bytes)
        self.reset()

    @property
    def graph_bytes(self) -> int:
        """Memory that the kept graphs hold."""
        return self._way.graphs.bytes

    def gradient(self) -> Tensor:
        """The gradient of the mean loss, of shape ``(size,)``."""
        with torch.inference_mode(False), self._batches.mean(self.size) as total:
            self._way.refresh()
            for index in range(len(self._batches)):
                total.add(self._way.gradient(index), self._batches.weight(index))
        return total.sum

    def reset(self) -> None:
        """Forget what was found out by evaluations, see `HessianOperator.reset`."""
        self._plain_rnn = False
        self._batches.kernels = twice_differentiable_kernels
        self._batches.forget_weights()
        self._way.num_to_check = len(self._batches)
        self._way.graphs.drop()

    def check(self, *, seed: int = 0) -> OperatorCheck:
        """Measure how symmetric and how deterministic the products are, by four of them, see `OperatorCheck`.

        Args:
            seed: Seed of the random vectors.

        """
        return check_operator(self, seed=seed, between=self.reset)

    def _add_products(self, total: Total, vectors: Tensor) -> None:
        directions = [self._way.prepared(vector) for vector in vectors]
        index = 0
        has_retried = False
        while index < len(self._batches):
            try:
                products = torch.cat([self._way.product(index, direction) for direction in directions])
            except RuntimeError as error:
                self._way.graphs.drop()
                if may_pass(error) and not has_retried:
                    has_retried = True
                    continue
                self._fall_back(error, index)  # raises if there is no other way
                index = 0
                total.clear()
            else:
                total.add(products, self._batches.weight(index))
                index += 1

    def _fall_back(self, error: RuntimeError, index: int) -> None:
        """Compute recurrent layers from their parts from now on if it is these that failed, or raise the error.

        Raises:
            MeasurementError: If PyTorch lacks a derivative.

        """
        if not lacks_derivative(error):
            raise error
        if "rnn" in str(error).lower() and not self._plain_rnn:
            self._plain_rnn = True
            self._batches.kernels = partial(twice_differentiable_kernels, plain_rnn=True)
            return
        with self._batches.evaluated(index):  # raises if it is the model itself that fails
            pass
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MeasurementError(
            "The backward pass of this model or loss cannot be differentiated, which Gauss–Newton and the empirical"
            f" Fisher need. `HessianOperator` with `method='finite_difference'` does without. PyTorch says: {reason}"
        ) from error


class GaussNewtonOperator(_OutputOperator):
    r"""The generalised Gauss–Newton matrix of the mean loss over fixed batches, known by its products.

    With the outputs ``z = f(θ)`` of a batch, their derivative ``J`` and the loss ``ℓ(z)``, it is ``Jᵀ ∇²ℓ(z) J``, and
    over several batches the mean weighted by ``N_b``, as for `HessianOperator`. Where ``ℓ`` is convex in the outputs
    (cross-entropy of logits, squares) it has no negative eigenvalue; where it is the negative logarithm of an
    exponential family's density in its natural parameters, as these two, it is the Fisher information matrix. It is the
    Hessian itself where ``f`` is linear, or fits all samples exactly under a squared error.

    What else holds of `HessianOperator` holds here: random numbers, unused and tied parameters, what is left alone.
    Products are exact also where ``f`` cannot be differentiated twice, as long as every layer's backward pass can be
    differentiated in the gradient that comes in from above. They cost what those with the Hessian do.

    Args:
        outputs: Maps a batch to what the model puts out: a tensor, or tensors in lists, tuples and dictionaries.
        loss: Maps these outputs and the batch to the scalar mean loss. It has to depend on the parameters through the
            outputs alone.
        parameters: The parameters, the coordinates of the vectors in this order: tensors, ``named_parameters()``, or a
            dictionary.
        batches: The batches, in any structure that `outputs` and `loss` understand.
        weights: Number of samples ``N_b`` of each batch; by default the leading dimension of its first tensor.
        max_graph_bytes: The most memory that kept graphs may hold. Batches whose graph does not fit any more are
            evaluated anew for every product; 0 keeps none.
        reduce: Sums a flat buffer over all ranks of a distributed measurement, in place, as for `HessianOperator`.

    Raises:
        ValueError: If an argument is out of its range.
        MeasurementError: If the loss depends on the parameters beside the outputs, or a backward pass cannot be
            differentiated; in products and `gradient`.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature import GaussNewtonOperator
        >>> x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> batches = [torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)]
        >>> matrix = GaussNewtonOperator(lambda batch: batch @ x, lambda z, batch: z.square().mean() / 2, [x], batches)
        >>> matrix.matvec(torch.ones(2, dtype=torch.float64))
        tensor([0.5000, 2.0000], dtype=torch.float64)

    """

    def __init__(
        self,
        outputs: Callable[[Any], Any],
        loss: Callable[[Any, Any], Tensor],
        parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Mapping[str, Tensor],
        batches: Iterable[Any],
        *,
        weights: Sequence[float] | None = None,
        max_graph_bytes: int = 2**29,
        reduce: Callable[[Tensor], None] | None = None,
    ) -> None:
        tip = partial(_LossOfOutputs, outputs, loss)
        super().__init__(tip, parameters, batches, weights, max_graph_bytes, reduce)


class EmpiricalFisherOperator(_OutputOperator):
    r"""The empirical Fisher matrix ``(1/N) Σ_i g_i g_iᵀ`` of fixed batches, known by its products.

    ``g_i`` is the gradient of the loss of sample ``i`` with its own label, so it is the uncentered covariance of the
    gradients and not the Fisher information matrix, which takes labels drawn from the model (see
    `GaussNewtonOperator`). It has no negative eigenvalue, and at most ``N`` others than zero. Samples that a layer
    couples, as BatchNorm does in training, are differentiated as they are coupled.

    What else holds of `HessianOperator` holds here, see `GaussNewtonOperator`.

    Args:
        losses: Maps a batch to the losses of its samples, a tensor of shape ``(n,)``.
        parameters: The parameters, the coordinates of the vectors in this order: tensors, ``named_parameters()``, or a
            dictionary.
        batches: The batches, in any structure that `losses` understands.
        weights: Number of samples ``N_b`` of each batch, over which the mean ``(1/n) Σ g gᵀ`` of the batch's ``n``
            losses is averaged; by default ``n``.
        max_graph_bytes: The most memory that kept graphs may hold. Batches whose graph does not fit any more are
            evaluated anew for every product; 0 keeps none.
        reduce: Sums a flat buffer over all ranks of a distributed measurement, in place, as for `HessianOperator`.

    Raises:
        ValueError: If an argument is out of its range.
        MeasurementError: If `losses` does not return a vector, or a backward pass cannot be differentiated; in products
            and `gradient`.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature import EmpiricalFisherOperator
        >>> x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> batches = [torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)]
        >>> EmpiricalFisherOperator(lambda batch: (batch @ x) ** 2 / 2, [x], batches).to_dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 8.0000]], dtype=torch.float64)

    """

    def __init__(
        self,
        losses: Callable[[Any], Tensor],
        parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Mapping[str, Tensor],
        batches: Iterable[Any],
        *,
        weights: Sequence[float] | None = None,
        max_graph_bytes: int = 2**29,
        reduce: Callable[[Tensor], None] | None = None,
    ) -> None:
        super().__init__(partial(_LossesOfSamples, losses), parameters, batches, weights, max_graph_bytes, reduce)


def _paired(outputs: Sequence[Tensor], cotangents: _Tensors) -> Tensor:
    """``⟨z, u⟩``, whose gradient in the parameters is ``Jᵀu``."""
    pairs = [(z, u) for z, u in zip(outputs, cotangents, strict=True) if u is not None]
    device = pairs[0][0].device if pairs else None
    return torch.stack([torch.zeros((), device=device), *((z * u).sum().to(device) for z, u in pairs)]).sum()
