"""The Hessian of a mean loss as a linear operator."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from lyapunov_lightning.curvature.errors import CurvatureWarning, MeasurementError
from lyapunov_lightning.curvature.mean_loss import MeanLoss, Objective, num_samples
from lyapunov_lightning.curvature.products import DoubleBackward, FiniteDifference, ForwardOverReverse, Method, Product
from lyapunov_lightning.curvature.substitution import SubstitutedLoss
from lyapunov_lightning.curvature.torch_compat import twice_differentiable_kernels
from lyapunov_lightning.curvature.vectors import FlatLayout, unique_tensors

_STEPS = {torch.float32: 5e-2, torch.float64: 1e-6}
"""Length of the finite-difference step: in float32 the papers' Δq, below which rounding takes over."""


class HessianOperator:
    r"""The Hessian of the mean loss over fixed batches, known by its products ``v -> Hv``.

    The operator is that of ``L(θ) = Σ_b N_b L_b(θ) / Σ_b N_b`` with ``N_b`` samples in batch ``b``: the mean over the
    samples also where the last batch is smaller. Every evaluation of a batch sees the same random numbers, so that
    dropout masks are those of one and the same function, and leaves the global generators as they were. Neither the
    parameters nor their ``.grad`` are touched.

    Parameters that require no gradient, or that the loss does not depend on, are rows and columns of zeros. A parameter
    that is given twice (tied weights) counts once.

    Args:
        loss: Maps a batch to its scalar mean loss, as a function of `parameters` at their present values. If it has a
            method ``evaluated(batch, values)``, see `Objective`, that is used; else the parameters are substituted in
            the operations that `loss` performs where other values are needed.
        parameters: The parameters, the coordinates of the vectors in this order.
        batches: The batches, in any structure that `loss` understands.
        method: How products are computed, see `lyapunov_lightning.curvature.products`. ``"auto"`` is double backward,
            and finite differences with one warning where PyTorch cannot differentiate twice.
        weights: Number of samples ``N_b`` of each batch. By default what an `Objective` says, else the leading
            dimension of the batch's first tensor.
        step: Length of the finite-difference step in parameter space: the product is that along ``v/‖v‖`` over this
            distance to both sides. By default 1e-6 for float64 parameters and 5e-2 for float32.
        max_graph_bytes: The most memory that kept gradient graphs may hold. Batches whose graph does not fit any more
            are differentiated anew for every product; 0 keeps none.
        reduce: Sums a flat buffer over all ranks of a distributed measurement, in place. It is called once a product.
            The operator is then that of the union of all ranks' batches, some of which may have none.
        on_fallback: Called when ``"auto"`` falls back to finite differences, before the warning.

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
        parameters: Iterable[Tensor],
        batches: Iterable[Any],
        *,
        method: Method = "auto",
        weights: Sequence[float] | None = None,
        step: float | None = None,
        max_graph_bytes: int = 2**29,
        reduce: Callable[[Tensor], None] | None = None,
        on_fallback: Callable[[], None] | None = None,
    ) -> None:
        if method not in get_args(Method):
            raise ValueError(f"`method` should be one of {', '.join(get_args(Method))}, got {method!r}.")
        if step is not None and not step > 0:
            raise ValueError(f"`step` should be a positive float, got {step}.")
        if max_graph_bytes < 0:
            raise ValueError(f"`max_graph_bytes` should be a non-negative int, got {max_graph_bytes}.")
        self.parameters: Sequence[Tensor] = tuple(unique_tensors(parameters))
        self.layout = layout = FlatLayout(self.parameters)
        self.size, self.dtype, self.device = layout.size, layout.dtype, layout.device
        batches = list(batches)
        if not isinstance(loss, Objective):
            loss = SubstitutedLoss(loss, self.parameters)
            if weights is None and (len(batches) > 1 or reduce is not None):
                weights = [float(num_samples(batch)) for batch in batches]
        self._loss = MeanLoss(loss, self.parameters, layout, batches, weights, reduce)
        narrow = any(p.dtype == torch.float32 for p in self.parameters if p.requires_grad)
        step = step if step is not None else _STEPS[torch.float32 if narrow else layout.dtype]
        self._finite_difference = FiniteDifference(self._loss, layout, step)
        self._double_backward = DoubleBackward(self._loss, self.parameters, layout, max_graph_bytes)
        ways: dict[str, Product] = {
            "forward_over_reverse": ForwardOverReverse(self._loss, self.parameters, layout),
            "finite_difference": self._finite_difference,
        }
        self._way: Product = ways.get(method, self._double_backward)
        if self._way is not self._finite_difference:
            self._loss.kernels = twice_differentiable_kernels
        self._plain_rnn = False
        self._auto = method == "auto"
        self._on_fallback = on_fallback
        self.num_matvecs = 0

    @property
    def method(self) -> str:
        """How products are computed at present; `auto` may have fallen back to finite differences."""
        return self._way.name

    @property
    def graph_bytes(self) -> int:
        """Memory that the kept gradient graphs hold."""
        return self._double_backward.graph_bytes

    def matvec(self, vector: Tensor) -> Tensor:
        """The product ``Hv``.

        Args:
            vector: Shape ``(size,)``.

        Returns:
            A new vector of shape ``(size,)``.

        """
        self.num_matvecs += 1
        with torch.inference_mode(False), self._loss.mean(self.size) as total:
            vector = vector.detach().clone().to(dtype=self.dtype, device=self.device)
            index = 0
            while index < len(self._loss):
                try:
                    product = self._way.product(index, vector)
                except RuntimeError as error:
                    self._fall_back(error, index)  # raises if there is no other way
                    index = 0  # the sum should not be of two kinds of products
                    total.clear()
                else:
                    total.add(product, self._loss.weight(index))
                    index += 1
        return total.sum

    def gradient(self, displacement: Tensor | None = None) -> Tensor:
        """The gradient of the mean loss, of shape ``(size,)``.

        Args:
            displacement: Where to take it, relative to the present parameters: shape ``(size,)``; at these if None.

        """
        with torch.inference_mode(False):
            if displacement is not None:
                return self._loss.gradient(displacement)
            with self._loss.mean(self.size) as total:
                for index in range(len(self._loss)):
                    total.add(self._way.gradient(index), self._loss.weight(index))
            return total.sum

    def value(self, displacement: Tensor | None = None) -> float:
        """The mean loss.

        Args:
            displacement: Where to take it, relative to the present parameters: shape ``(size,)``; at these if None.

        """
        with torch.inference_mode(False):
            return self._loss.value(displacement)

    def values_along(self, direction: Tensor, distances: Sequence[float]) -> Tensor:
        """The mean loss at several points of a line through the present parameters.

        One point is evaluated after the other, so that the memory is that of one displaced copy of the parameters, and
        each sees the same random numbers; the ranks of a distributed measurement meet once for all points.

        Args:
            direction: The line's direction, of shape ``(size,)``.
            distances: Where on the line to evaluate the loss, in multiples of `direction`.

        Returns:
            A float64 vector on the CPU, one number for each distance.

        """
        with torch.inference_mode(False):
            return self._loss.values_along(direction, distances)

    def mean_over_batches(
        self, statistic: Callable[[Tensor], Tensor], size: int, max_batches: int | None = None
    ) -> Tensor:
        """The mean of a statistic of the mini-batch gradients, each batch counted once.

        Where the gradient graphs are kept, the gradients cost nothing more.

        Args:
            statistic: Maps the gradient of one batch, of shape ``(size_of_operator,)``, to a vector.
            size: The length of that vector.
            max_batches: How many of each rank's batches to use; all if None.

        Returns:
            A vector of shape ``(size,)``.

        """
        with torch.inference_mode(False), self._loss.mean(size) as total:
            for index in range(len(self._loss))[:max_batches]:
                total.add(statistic(self._way.gradient(index)), 1.0)
        return total.sum

    def _fall_back(self, error: RuntimeError, index: int) -> None:
        """Take the way that is left after this error of a batch's product, or raise it where there is none."""
        if isinstance(error, (torch.OutOfMemoryError, MeasurementError)) or self._way is self._finite_difference:
            raise error
        self._double_backward.drop_graphs()
        if "rnn" in str(error).lower() and not self._plain_rnn:
            self._plain_rnn = True
            self._loss.kernels = partial(twice_differentiable_kernels, plain_rnn=True)
            return
        kernels, self._loss.kernels = self._loss.kernels, nullcontext
        try:
            self._finite_difference.gradient(index)
        except Exception:  # it is the loss itself that fails
            self._loss.kernels = kernels
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not self._auto:
            self._loss.kernels = kernels
            raise MeasurementError(
                f"`method={self.method!r}` cannot differentiate this loss twice. Use `method='auto'`, or"
                f" 'finite_difference', which needs one derivative only. PyTorch says: {reason}"
            ) from error
        self._way = self._finite_difference
        if self._on_fallback is not None:
            self._on_fallback()
        warnings.warn(
            "The loss cannot be differentiated twice, so its curvature is taken from finite differences of the"
            f" gradient, which blur the kinks of ReLU networks over a distance of {self._finite_difference.step:g}."
            f" PyTorch says: {reason}",
            CurvatureWarning,
            stacklevel=3,
        )
