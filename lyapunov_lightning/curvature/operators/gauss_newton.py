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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lyapunov_lightning.curvature.compat.errors import of_a_second_derivative
from lyapunov_lightning.curvature.compat.functions import check_twice_differentiable
from lyapunov_lightning.curvature.compat.operations import differentiated, nodes
from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.curvature.loss.derivatives import Derivatives
from lyapunov_lightning.curvature.loss.fixed_batches import Evaluation, num_samples, numbers_of_samples
from lyapunov_lightning.curvature.loss.kept_graphs import GradientGraph
from lyapunov_lightning.curvature.loss.mean_loss import MeanLoss
from lyapunov_lightning.curvature.loss.products import GraphProduct
from lyapunov_lightning.curvature.operators.checks import OperatorCheck, check_operator
from lyapunov_lightning.curvature.operators.mean_operator import MeanOperator
from lyapunov_lightning.curvature.vectors.layout import FlatLayout

_Tensors = Sequence[Tensor | None]
"""One tensor for each parameter or output; None stands for zeros."""

_ADJOINT_TOLERANCE = 0.05
"""How far ``⟨Jv, u⟩`` may be from ``⟨v, Jᵀu⟩``, relative to it. More than the rounding of half precision means that a
layer's backward pass leaves out a part."""


@dataclass(frozen=True, kw_only=True)
class _SplitEvaluation(Evaluation):
    """A loss that was evaluated in two parts: from the parameters to the outputs, and from the outputs to the loss.

    Attributes:
        outputs: What the model puts out for the batch, as a function of the parameters.
        variables: The same numbers as variables of their own, of which the loss is a function.

    """

    outputs: Sequence[Tensor]
    variables: Sequence[Tensor]

    @property
    def differentiated(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The loss is differentiated twice in the outputs, and these once in the parameters."""
        return [self.loss], self.outputs


class _LossAfterOutputs(Protocol):
    """The part of a loss that comes after the outputs; an `Objective`."""

    def weights(self, batches: Sequence[Any]) -> list[float] | None:
        """The number of samples of each batch, if it is known before the batches are evaluated."""

    @contextmanager
    def evaluated(self, batch: Any, values: Sequence[Tensor] | None = None) -> Iterator[_SplitEvaluation]:
        """Evaluate the outputs, and the loss as a function of them alone."""

    def differentiated(self, evaluation: _SplitEvaluation) -> tuple[_Tensors, Callable[[_Tensors], _Tensors]]:
        """The loss's gradient in the outputs, and the product ``w -> Mw``."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Linearised(GradientGraph):
    """The outputs of a batch, linearised at the parameters. Its `gradient` is ``Jᵀu`` as a function of ``u``.

    Attributes:
        outputs: The outputs as a function of the parameters.
        cotangents: ``u``.
        slopes: The loss's gradient in the outputs.
        inner: The product ``w -> Mw``.

    """

    outputs: Sequence[Tensor]
    cotangents: Sequence[Tensor]
    slopes: _Tensors
    inner: Callable[[_Tensors], _Tensors]

    @property
    def tensors(self) -> _Tensors:
        """The tensors whose graphs are kept."""
        return [*self.outputs, *self.cotangents, *self.gradient, *self.slopes]


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
        return numbers_of_samples(batches)

    @contextmanager
    def evaluated(self, batch: Any, values: Sequence[Tensor] | None = None) -> Iterator[_SplitEvaluation]:
        """Evaluate the outputs, and the loss as a function of them alone.

        Raises:
            MeasurementError: If an output is complex.

        """
        members, structure = pytree.tree_flatten(self._outputs(batch))
        outputs: list[Tensor] = []
        variables: list[Tensor] = []
        for place, member in enumerate(members):
            if isinstance(member, Tensor) and member.requires_grad:
                if member.is_complex():
                    raise MeasurementError(
                        "The outputs should be real, got a complex tensor. Use `torch.view_as_real`."
                    )
                outputs.append(member)
                # Leaves of their own: the loss is differentiated in these alone, and its graph ends here.
                variables.append(member.detach().requires_grad_())
                members[place] = variables[-1]
        loss = self._loss(pytree.tree_unflatten(members, structure), batch)
        yield _SplitEvaluation(loss, self._parameters, lambda: num_samples(batch), outputs=outputs, variables=variables)

    def differentiated(self, evaluation: _SplitEvaluation) -> tuple[_Tensors, Callable[[_Tensors], _Tensors]]:
        """The loss's gradient in the outputs, and the product with its Hessian in the outputs.

        Raises:
            MeasurementError: If the loss depends on the parameters in another way than through the outputs.

        """
        loss, variables = evaluation.loss, evaluation.variables
        # A weight decay in the loss, for example: without its curvature the products would be wrong and look right.
        parameters = {id(parameter) for parameter in self._parameters}
        if any(id(getattr(node, "variable", None)) in parameters for node in nodes([loss])):
            raise MeasurementError(
                "The loss depends on the parameters in other ways than through the outputs, so that Gauss–Newton is not"
                " defined. Let"
                " `outputs` return all that the loss takes of the parameters, or these themselves, as tensors in lists,"
                " tuples and dictionaries, not in other objects."
            )
        if not variables or not loss.requires_grad:
            return [None] * len(variables), lambda tangents: [None] * len(tangents)
        one = torch.ones_like(loss).requires_grad_(check_twice_differentiable(loss))
        # With its graph, from which `inner` takes the second derivative in the outputs.
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
    def evaluated(self, batch: Any, values: Sequence[Tensor] | None = None) -> Iterator[_SplitEvaluation]:
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
        yield _SplitEvaluation(
            detached.mean(),
            self._parameters,
            lambda: len(detached),
            outputs=[losses] if losses.requires_grad else [],
            variables=[detached] if losses.requires_grad else [],
        )

    def differentiated(self, evaluation: _SplitEvaluation) -> tuple[_Tensors, Callable[[_Tensors], _Tensors]]:
        """The mean's gradient in the losses, and the product with ``I/n``."""
        slopes = [torch.full_like(losses, 1 / len(losses)) for losses in evaluation.variables]
        return slopes, lambda tangents: [None if t is None else t / len(t) for t in tangents]


class _ThroughOutputs(GraphProduct[_Linearised]):
    """Multiplies by ``Jᵀ``, ``M`` and ``J``, and keeps the graphs of ``J``.

    Args:
        after_outputs: What comes after the outputs.
        loss: The mean loss, of evaluations by `after_outputs`.
        layout: How its parameters form a vector.
        max_graph_bytes: The most memory that kept graphs may hold.

    """

    name = "through_outputs"

    def __init__(
        self, after_outputs: _LossAfterOutputs, loss: MeanLoss, layout: FlatLayout, max_graph_bytes: int
    ) -> None:
        super().__init__(loss, layout, max_graph_bytes)
        self._after_outputs = after_outputs
        self._num_to_check = len(loss.batches)

    def gradient(self, index: int, keep_graph: bool = False) -> Tensor:
        """The gradient of the loss for one batch."""
        kept = self.graphs[index]
        # The graph of J has been kept with the loss's slopes in the outputs, and Jᵀ of these is the gradient.
        if kept is not None:
            return self._pulled_back(kept, kept.slopes, retain_graph=True) + kept.zero
        with self._loss.batches.evaluated(index) as evaluation:
            assert isinstance(evaluation, _SplitEvaluation)  # what the objective yields
            slopes, _ = self._after_outputs.differentiated(evaluation)
            paired = replace(evaluation, loss=_paired(evaluation.outputs, slopes))
            return self._layout.flatten(self._loss.gradient_of(paired)) + self._loss.zero_of(evaluation.loss)

    def forget_checks(self) -> None:
        """Check each batch's derivative anew."""
        self._num_to_check = len(self._loss.batches)

    def _graph(self, evaluation: Evaluation) -> _Linearised:
        """The linearised outputs."""
        assert isinstance(evaluation, _SplitEvaluation)  # what the objective yields
        with of_a_second_derivative():
            slopes, inner = self._after_outputs.differentiated(evaluation)
            # Jᵀu is linear in u, so its derivative does not depend on where u is; a random u serves the check below, in
            # which zeros would agree with anything. The random numbers are those of the evaluation, and put back.
            cotangents = [torch.randn_like(output).requires_grad_() for output in evaluation.outputs]
            paired = replace(evaluation, loss=_paired(evaluation.outputs, cotangents))
            pulled_back = self._loss.gradient_of(paired, create_graph=True)
            linearised = _Linearised(
                pulled_back,
                evaluation.leaves,
                evaluation.owner,
                self._loss.zero_of(evaluation.loss),
                outputs=evaluation.outputs,
                cotangents=cotangents,
                slopes=slopes,
                inner=inner,
            )
            if self._num_to_check:  # the first graph of each batch
                self._check_adjoint(linearised)
                self._num_to_check -= 1
        return linearised

    def _multiplied(self, graph: _Linearised, direction: list[Tensor], retain_graph: bool) -> Tensor:
        """The product ``JᵀMJv``."""
        with of_a_second_derivative():
            tangents = self._pushed_forward(graph, direction, retain_graph)
            return self._pulled_back(graph, graph.inner(tangents), retain_graph)

    def _pushed_forward(self, linearised: _Linearised, direction: Sequence[Tensor], retain_graph: bool) -> _Tensors:
        """``Jv``."""
        pairs = zip(linearised.gradient, direction, strict=True)
        active = [(entry, piece) for entry, piece in pairs if entry is not None and entry.requires_grad]
        if not active:
            return [None] * len(linearised.cotangents)
        functions, along = zip(*active, strict=True)
        return differentiated(functions, along, linearised.cotangents, retain_graph=retain_graph)

    def _pulled_back(self, linearised: _Linearised, cotangents: _Tensors, retain_graph: bool) -> Tensor:
        """``Jᵀu``."""
        pairs = zip(linearised.outputs, cotangents, strict=True)
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
        pulled_back = self._layout.flatten(linearised.gradient)
        length = float(torch.linalg.vector_norm(pulled_back))
        if length == 0:
            return
        tangents = self._pushed_forward(linearised, self._layout.split(pulled_back / length), retain_graph=True)
        # In float32: a sum beyond 65,504 is infinite in float16, which would pass for a fault of the layer.
        found = sum(
            float((tangent.float() * cotangent.detach().float()).sum())
            for tangent, cotangent in zip(tangents, linearised.cotangents, strict=True)
            if tangent is not None
        )
        # NaN compares false: that the loss is not finite is for the solvers to say, and no fault of the layer.
        if abs(found - length) > _ADJOINT_TOLERANCE * length:
            raise MeasurementError(
                "A layer's backward pass cannot be differentiated in the gradient that comes in from above: it detaches"
                " it, or is not linear in it. Use a layer whose backward pass consists of differentiable operations."
            )


class _OutputOperator(MeanOperator):
    """``JᵀMJ``, weighted over batches like the Hessian."""

    def __init__(
        self,
        loss_after_outputs: Callable[[Sequence[Tensor]], _LossAfterOutputs],
        parameters: Any,
        batches: Iterable[Any],
        weights: Sequence[float] | None,
        max_graph_bytes: int,
        reduce: Callable[[Tensor], None] | None,
    ) -> None:
        super().__init__(parameters, max_graph_bytes, reduce)
        batches = list(batches)
        objective = loss_after_outputs(self.parameters)
        if weights is None and (len(batches) > 1 or reduce is not None):
            weights = objective.weights(batches)
        loss = self._average_over(objective, batches, weights)
        self._way = _ThroughOutputs(objective, loss, self.layout, max_graph_bytes)
        self._derivatives = Derivatives(
            loss,
            self.space,
            self._way,
            difference=None,
            falls_back=False,
            refusal=(
                "The backward pass of this model or loss cannot be differentiated, which Gauss–Newton and the empirical"
                " Fisher need. `HessianOperator` with `method='finite_difference'` does without."
            ),
        )
        self.reset()

    def gradient(self) -> Tensor:
        """The gradient of the mean loss, of shape ``(size,)``."""
        return self._derivatives.gradient()

    def reset(self) -> None:
        """Forget what was found out by evaluations, see `HessianOperator.reset`."""
        self._derivatives.reset()
        self._batches.forget_weights()
        self._way.forget_checks()

    def check(self, *, seed: int = 0) -> OperatorCheck:
        """Measure how symmetric and how deterministic the products are, by four of them, see `OperatorCheck`.

        Args:
            seed: Seed of the random vectors.

        """
        return check_operator(self, seed=seed, between=self.reset)


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
        MeasurementError: If the loss depends on the parameters in other ways than through the outputs, or a backward
            pass cannot be differentiated; in products and `gradient`.

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
        after_outputs = partial(_LossOfOutputs, outputs, loss)
        super().__init__(after_outputs, parameters, batches, weights, max_graph_bytes, reduce)


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
    # The outputs may be on several devices, and of no outputs at all there has to be a zero.
    device = pairs[0][0].device if pairs else None
    return torch.stack([torch.zeros((), device=device), *((z * u).sum().to(device) for z, u in pairs)]).sum()
