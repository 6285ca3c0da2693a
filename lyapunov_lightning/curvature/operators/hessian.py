"""The Hessian of a mean loss as a linear operator."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from lyapunov_lightning.curvature.loss.compiled import Programs
from lyapunov_lightning.curvature.loss.derivatives import Derivatives
from lyapunov_lightning.curvature.loss.fixed_batches import Objective, ReadBatches, numbers_of_samples
from lyapunov_lightning.curvature.loss.mean_loss import Distances
from lyapunov_lightning.curvature.loss.products import (
    DoubleBackward,
    FiniteDifference,
    ForwardOverReverse,
    Method,
    Product,
)
from lyapunov_lightning.curvature.loss.substitution import SubstitutedLoss
from lyapunov_lightning.curvature.operators.checks import OperatorCheck, check_operator
from lyapunov_lightning.curvature.operators.loss_hessian import Statistic
from lyapunov_lightning.curvature.operators.mean_operator import MeanOperator


class HessianOperator(MeanOperator):
    r"""The Hessian of the mean loss over fixed batches, known by its products ``v -> Hv``.

    The operator is that of ``L(θ) = Σ_b N_b L_b(θ) / Σ_b N_b`` with ``N_b`` samples in batch ``b``: the mean over the
    samples also where the last batch is smaller. Every evaluation of a batch sees the same random numbers, so that
    dropout masks belong to one and the same function, and leaves the global generators as they were. Neither the
    parameters nor their ``.grad`` are touched.

    Parameters that require no gradient, or that the loss does not depend on, are rows and columns of zeros. A parameter
    that is given twice (tied weights) counts once.

    The operator is that of the loss as it is now: gradient graphs that were kept are built anew after a change to the
    parameters, to the tensors and arrays in the batches, to buffers and other tensors that the loss uses, in whatever
    way it was made (optimizer steps, ``.data``, NumPy), after layers were switched between training and evaluation, and
    in another autocast region. It is looked for before each product, and once in a solver, during which nothing should
    be changed. What is not noticed: numbers, lists and other objects of Python that the loss reads, changes of
    attributes of layers other than ``training``, of arrays and files that it reads itself, and writes that PyTorch does
    not count to tensors of more than 64 MiB outside of the batches. After these, call `reset`.

    The loss is evaluated in the autocast region in which a method is called; its derivatives and all sums are taken
    outside of it, so that vectors keep their precision.

    With a loss that holds a part constant (``detach``, ``torch.no_grad``) exact products hold this part constant.
    Finite differences, and `value` and `gradient` at a displacement, move it with the rest.

    Args:
        loss: Maps a batch to its scalar mean loss, as a function of `parameters` at their present values. If it has a
            method ``evaluated(batch, values)``, see `Objective`, that is used; else the parameters are substituted in
            the operations that `loss` performs where other values are needed.
        parameters: The parameters, the coordinates of the vectors in this order; or pairs of a name and a parameter,
            such as ``model.named_parameters()``.
        batches: The batches, in any structure that `loss` understands. They are held, unless they are
            `lyapunov_lightning.curvature.loss.fixed_batches.ReadBatches`.
        method: How products are computed, see `lyapunov_lightning.curvature.loss.products`. ``"auto"`` is double
            backward, and finite differences with one warning where PyTorch cannot differentiate twice. Errors of
            another kind are raised as they are, after a second attempt where a device or the network failed.
        weights: Number of samples ``N_b`` of each batch. By default what an `Objective` says, else the leading
            dimension of the batch's first tensor, with a warning where others have another one.
        step: Length of the finite-difference step in parameter space: the product is that along ``v/‖v‖`` over this
            distance to both sides. By default one that fits the loss, found by 7 to 15 gradients before the first such
            product, and kept. In float32 it is at most 5e-2, where it stays if kinks, such as ReLU has, leave no better
            one, and the shorter the sharper the loss is.
        max_graph_bytes: The most memory that kept gradient graphs may hold. Batches whose graph does not fit any more
            are differentiated anew for every product; 0 keeps none.
        reduce: Sums a flat buffer over all ranks of a distributed measurement, in place. It is called once a product,
            and while the `step` is found. The operator is then that of the union of all ranks' batches, some of which
            may have none.
        on_fallback: Called when ``"auto"`` falls back to finite differences, before the warning; on all ranks, also
            those whose own batches, if any, could be differentiated twice.
        compile: Whether to compile the products of kept graphs by PyTorch's Inductor, which needs a compiler of C++ (a
            GPU: Triton). The second product of each graph waits for it: for a minute or more if it is the first of its
            kind, else for a trace of some hundred milliseconds to seconds. It is held against the plain product of a
            random vector first, and where it fails or differs there is one warning with the reason, and products are
            plain. Give a `lyapunov_lightning.curvature.loss.compiled.Programs` to share what was compiled between
            operators. Only for double backward.

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
        loss: Callable[[Any], Tensor] | Objective,
        parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Mapping[str, Tensor],
        batches: Iterable[Any],
        *,
        method: Method = "auto",
        weights: Sequence[float] | None = None,
        step: float | None = None,
        max_graph_bytes: int = 2**29,
        reduce: Callable[[Tensor], None] | None = None,
        on_fallback: Callable[[], None] | None = None,
        compile: bool | Programs = False,
    ) -> None:
        if method not in get_args(Method):
            raise ValueError(f"`method` should be one of {', '.join(get_args(Method))}, got {method!r}.")
        if step is not None and not step > 0:
            raise ValueError(f"`step` should be a positive float, got {step!r}.")
        super().__init__(parameters, max_graph_bytes, reduce)
        batches = batches if isinstance(batches, ReadBatches) else list(batches)
        if not isinstance(loss, Objective):
            loss = SubstitutedLoss(loss, self.parameters)
            # A single batch of a single rank has no need of its number of samples, which may not be in it.
            if weights is None and (len(batches) > 1 or reduce is not None):
                weights = numbers_of_samples(batches)
        self._loss = self._average_over(loss, batches, weights)
        # Made in any case: `auto` falls back to it, and `check` compares with it.
        difference = FiniteDifference(self._loss, self.layout, step)
        way: Product = difference
        if method == "forward_over_reverse":
            way = ForwardOverReverse(self._loss, self.layout)
        elif method != "finite_difference":
            programs = compile if isinstance(compile, Programs) else Programs() if compile else None
            way = DoubleBackward(self._loss, self.layout, max_graph_bytes, programs)
        self._derivatives = Derivatives(
            self._loss,
            self.space,
            way,
            difference=difference,
            falls_back=method == "auto",
            refusal=(
                f"`method={method!r}` cannot differentiate this loss twice. Use `method='auto'`, or"
                " 'finite_difference', which needs one derivative only."
            ),
            on_fallback=on_fallback,
        )

    @property
    def method(self) -> str:
        """How products are computed at present; `auto` may have fallen back to finite differences."""
        return self._derivatives.way

    @property
    def step(self) -> float | None:
        """Length of the finite-difference step; None as long as none was needed."""
        return self._derivatives.step

    def gradient(self, displacement: Tensor | None = None, *, keep_graph: bool = False) -> Tensor:
        """The gradient of the mean loss, of shape ``(size,)``.

        Args:
            displacement: Where to take it, relative to the present parameters: shape ``(size,)``; at these if None.
            keep_graph: Whether products at the present parameters follow. The graph that they need is then built with
                the gradient, which saves the evaluation of the loss for the first of them.

        """
        if displacement is None:  # the kept graphs have these
            return self._derivatives.gradient(keep_graph)
        with torch.inference_mode(False):
            return self._loss.gradient(displacement)

    def value(self, displacement: Tensor | None = None) -> float:
        """The mean loss.

        Args:
            displacement: Where to take it, relative to the present parameters: shape ``(size,)``; at these if None.

        """
        # Tensors made in inference mode cannot be saved for a backward pass. Validation hooks of Lightning run in it.
        with torch.inference_mode(False):
            return self._loss.value(displacement)

    def values_along(self, direction: Tensor, distances: Distances) -> Tensor:
        """The mean loss at several points of a line, or a plane, through the present parameters.

        One point is evaluated after the other, so that the memory is that of one displaced copy of the parameters, and
        each sees the same random numbers; the ranks of a distributed measurement meet once for all points.

        Args:
            direction: The line's direction, of shape ``(size,)``; or the directions of a plane, ``(k, size)``.
            distances: Where on the line to evaluate the loss, in multiples of `direction`; on a plane the k multiples
                for each point.

        Returns:
            A float64 vector on the CPU, one number for each distance.

        """
        with torch.inference_mode(False):
            return self._loss.values_along(direction, distances)

    def batch_gradients(self, max_batches: int | None = None) -> Iterator[Tensor]:
        """The gradients of this rank's batches, of shape ``(size,)``, one after the other.

        Args:
            max_batches: How many of the batches; all if None.

        """
        # Inference mode is switched off for each gradient by itself: what the caller does in between is the caller's.
        gradients = self._derivatives.batch_gradients(max_batches)
        while True:
            with torch.inference_mode(False):
                gradient = next(gradients, None)
            if gradient is None:
                return
            yield gradient

    def mean_over_batches(
        self, vectors: Tensor, statistic: Statistic, size: int, max_batches: int | None = None
    ) -> Tensor:
        """The mean of a statistic of the mini-batch gradients along some vectors, each batch counted once.

        Where the gradient graphs are kept, the gradients cost nothing more.

        Args:
            vectors: Shape ``(k, length)``: one vector for each row.
            statistic: Maps the components of one batch's gradient along the vectors, of shape ``(k,)``, and its norm to
                a vector.
            size: The length of that vector.
            max_batches: How many of each rank's batches to use; all if None.

        Returns:
            A vector of shape ``(size,)``.

        """
        with self._batches.mean(size) as total:
            for gradient in self.batch_gradients(max_batches):
                norm = torch.linalg.vector_norm(gradient)
                # Whatever its size: the mean is over steps of SGD, and each step is one batch.
                total.add(statistic(self.space.inner(vectors, gradient), norm), 1.0)
        return total.sum

    def raise_at_once(self) -> None:
        """Let errors be raised as they are from now on, with no second attempt and no other way to a product.

        For an operator whose evaluations other ranks take part in: one rank cannot make one more of them.
        """
        self._derivatives.raises_at_once = True

    def drop_graphs(self) -> None:
        """Free the memory of the kept gradient graphs; the next product builds them anew."""
        self._derivatives.drop_graphs()

    def reset(self) -> None:
        """Forget what was found out: gradient graphs, numbers of samples, the lack of a derivative, the step.

        The next call reads everything anew: the parameters, the batches, and whatever else the loss depends on. The
        random numbers stay the same, so the function does. Only needed after changes that are not noticed, see above.
        """
        self._derivatives.reset()
        self._loss.reset()
        # Not the states of the generators: other dropout masks would make it another function.
        self._batches.forget_weights()

    def check(self, *, seed: int = 0, finite_difference: bool = False) -> OperatorCheck:
        """Measure how symmetric and how deterministic the products are, see `OperatorCheck`.

        It costs four products, whose graphs are built anew. The comparison costs two gradients, and what it takes to
        find the `step` where none is known.

        Args:
            seed: Seed of the random vectors.
            finite_difference: Whether to compare a product with a finite difference of gradients as well.

        Example::

            >>> import torch
            >>> from lyapunov_lightning.curvature import HessianOperator
            >>> x = torch.ones(3, requires_grad=True)
            >>> hessian = HessianOperator(lambda batch: (batch * x).tanh().sum(), [x], [torch.arange(3.0)])
            >>> check = hessian.check()
            >>> check.is_symmetric, check.is_deterministic
            (True, True)

        """
        # Graphs are dropped between equal products: two products of one kept graph agree even if the loss is random.
        reference = self._derivatives.difference if finite_difference else None
        return check_operator(self, seed=seed, between=self._derivatives.drop_graphs, reference=reference)
