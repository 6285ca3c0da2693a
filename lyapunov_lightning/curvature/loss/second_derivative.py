"""The way by which Hessian-vector products are computed at present, and what is done where it fails."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from lyapunov_lightning.curvature.compat.errors import lacks_derivative, may_pass
from lyapunov_lightning.curvature.compat.operations import twice_differentiable_kernels
from lyapunov_lightning.curvature.errors import CurvatureWarning, MeasurementError
from lyapunov_lightning.curvature.loss.fixed_batches import Total
from lyapunov_lightning.curvature.loss.mean_loss import MeanLoss
from lyapunov_lightning.curvature.loss.products import (
    DoubleBackward,
    FiniteDifference,
    ForwardOverReverse,
    Method,
    Product,
)
from lyapunov_lightning.curvature.vectors.layout import FlatLayout


class SecondDerivative:
    """The second derivative of a loss, by one of the ways of `lyapunov_lightning.curvature.loss.products`.

    What fails for the moment, in a library of a device or of the network, is tried once more. Where PyTorch lacks a
    derivative, recurrent layers are computed from their parts, and then ``"auto"`` takes finite differences, with a
    warning. Everything else is raised as it is.

    Args:
        loss: The mean loss.
        parameters: What it is a function of.
        layout: How they form a vector.
        method: The way that is asked for.
        step: Length of the finite-difference step; to be set where `lacks_step` if None.
        max_graph_bytes: The most memory that kept gradient graphs may hold.
        on_fallback: Called when ``"auto"`` falls back to finite differences, before the warning, which is given on the
            ranks that have to.

    """

    def __init__(
        self,
        loss: MeanLoss,
        parameters: Sequence[Tensor],
        layout: FlatLayout,
        *,
        method: Method,
        step: float | None,
        max_graph_bytes: int,
        on_fallback: Callable[[], None] | None = None,
    ) -> None:
        self._loss = loss
        self._given_step = step
        self._finite_difference = FiniteDifference(loss, layout, step)
        self._double_backward = DoubleBackward(loss, parameters, layout, max_graph_bytes)
        ways: dict[str, Product] = {
            "forward_over_reverse": ForwardOverReverse(loss, parameters, layout),
            "finite_difference": self._finite_difference,
        }
        self._asked: Product = ways.get(method, self._double_backward)
        self._way: Product = self._asked
        self._auto = method == "auto"
        self._on_fallback = on_fallback
        self.raises_at_once = False
        self.reset()

    @property
    def method(self) -> str:
        """The present way."""
        return self._way.name

    @property
    def step(self) -> float | None:
        """Length of the finite-difference step, if it is known yet."""
        return self._finite_difference.step

    @step.setter
    def step(self, step: float) -> None:
        self._finite_difference.step = step

    @property
    def lacks_step(self) -> bool:
        """Whether products are finite differences over a step that has to be set first."""
        return self._way is self._finite_difference and self.step is None

    @property
    def may_fall_back(self) -> bool:
        """Whether this rank, or another one, may come to need a step that is not known yet."""
        return self._auto and self.step is None

    def fall_back(self) -> None:
        """Take finite differences, as another rank has to, unless this one has gone over to them itself."""
        if self._way is self._finite_difference:
            return
        self._way = self._finite_difference
        self._loss.batches.kernels = nullcontext
        self.drop_graphs()
        if self._on_fallback is not None:
            self._on_fallback()

    @property
    def graph_bytes(self) -> int:
        """Memory that the kept gradient graphs hold."""
        return self._double_backward.graphs.bytes

    def reset(self) -> None:
        """Go back to the way that was asked for, with no graphs."""
        self._way = self._asked
        self._finite_difference.step = self._given_step
        self._plain_rnn = False
        kernels = nullcontext if self._way is self._finite_difference else twice_differentiable_kernels
        self._loss.batches.kernels = kernels
        self.drop_graphs()

    def drop_graphs(self) -> None:
        """Let all graphs be built anew."""
        self._double_backward.graphs.drop()

    def add_gradients(self, total: Total) -> None:
        """Add the gradients of all batches at the present parameters."""
        for index, gradient in enumerate(self.gradients()):
            total.add(gradient, self._loss.batches.weight(index))

    def gradients(self, max_batches: int | None = None) -> Iterator[Tensor]:
        """The gradients of the batches at the present parameters, one after the other."""
        self._way.refresh()
        for index in range(len(self._loss.batches))[:max_batches]:
            yield self._way.gradient(index)

    def add_differences(self, total: Total, vector: Tensor, step: float | None = None) -> None:
        """Add the products of all batches with a vector by finite differences, of the function that is multiplied.

        Args:
            total: What to add to.
            vector: Shape ``(size,)``.
            step: The length of the step; `step` if None.

        """
        directions = [self._finite_difference.prepared(vector, step)]
        for index in range(len(self._loss.batches)):
            [product] = self._finite_difference.products(index, directions)
            total.add(product, self._loss.batches.weight(index))

    def add_products(self, total: Total, vectors: Tensor) -> None:
        """Add the products of all batches with the rows of a tensor, by the one way or the other, not some of each.

        Where they turn out to be finite differences over a step that is not known, what is added is not a number.

        Args:
            total: What to add to, the products one after the other.
            vectors: Shape ``(k, size)``.

        """
        directions = list(map(self._way.prepared, vectors.contiguous()))
        index = 0
        has_retried = False
        while index < len(self._loss.batches):
            try:
                products = self._way.products(index, directions)
            except RuntimeError as error:
                self.drop_graphs()
                if self.raises_at_once:
                    raise
                if may_pass(error) and not has_retried:
                    has_retried = True
                    continue
                self._fall_back(error, index)  # raises if there is no other way
                if self.lacks_step:  # which all ranks have to find out together
                    total.sum.fill_(float("nan"))
                    total.weight = 1.0
                    return
                directions = list(map(self._way.prepared, vectors.contiguous()))
                index = 0
                total.clear()
            else:
                total.add(products[0] if len(products) == 1 else torch.cat(products), self._loss.batches.weight(index))
                index += 1

    def _fall_back(self, error: RuntimeError, index: int) -> None:
        """Take the way that is left after this error of a batch's product, or raise it where there is none."""
        if self._way is self._finite_difference or not lacks_derivative(error):
            raise error
        if "rnn" in str(error).lower() and not self._plain_rnn:
            self._plain_rnn = True
            self._loss.batches.kernels = partial(twice_differentiable_kernels, plain_rnn=True)
            return
        kernels, self._loss.batches.kernels = self._loss.batches.kernels, nullcontext
        try:
            self._finite_difference.gradient(index)
            if self._auto:
                self._finite_difference.check(index)
        except Exception:  # it is the loss itself that fails, or is too coarse
            self._loss.batches.kernels = kernels
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not self._auto:
            self._loss.batches.kernels = kernels
            raise MeasurementError(
                f"`method={self.method!r}` cannot differentiate this loss twice. Use `method='auto'`, or"
                f" 'finite_difference', which needs one derivative only. PyTorch says: {reason}"
            ) from error
        self._way = self._finite_difference
        if self._on_fallback is not None:
            self._on_fallback()
        warnings.warn(
            "The loss cannot be differentiated twice, so its curvature is taken from finite differences of the"
            f" gradient, which blur the kinks of ReLU networks. PyTorch says: {reason}",
            CurvatureWarning,
            stacklevel=7,
        )
