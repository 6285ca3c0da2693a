"""The gradients of a mean loss and the products with its curvature matrix, by whichever way works.

A loss shows only when it is differentiated whether PyTorch can do so. So the products of all batches are begun by the
way that was asked for, and where that fails for want of a derivative they are begun anew by the next one. All batches
are multiplied by the same way: the mean of exact products and of finite differences would belong to no matrix.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from lyapunov_lightning.curvature.compat.errors import lacks_derivative, may_pass
from lyapunov_lightning.curvature.compat.operations import twice_differentiable_kernels
from lyapunov_lightning.curvature.errors import CurvatureWarning, MeasurementError
from lyapunov_lightning.curvature.loss.difference_step import first_step, fitting_step
from lyapunov_lightning.curvature.loss.fixed_batches import Total
from lyapunov_lightning.curvature.loss.function_check import FunctionCheck
from lyapunov_lightning.curvature.loss.mean_loss import MeanLoss
from lyapunov_lightning.curvature.loss.products import FiniteDifference, Product
from lyapunov_lightning.curvature.vectors.space import VectorSpace


class Derivatives:
    """The gradients of a mean loss and the products with its curvature matrix.

    An error of a library of the device or of the network may not come again, so that batch is tried once more. Where
    PyTorch lacks a derivative, recurrent layers are computed from their parts; then finite differences are taken, with
    a warning, if `falls_back`. All other errors are raised as they are.

    Args:
        loss: The mean loss.
        space: The space of the vectors, which all ranks share.
        way: The way to a product that is asked for.
        difference: Finite differences, for a loss that has no second derivative; None if the matrix has none.
        falls_back: Whether they are taken where `way` fails.
        refusal: Beginning of the error where `way` fails and nothing else may be taken.
        on_fallback: Called when finite differences are taken in place of `way`, before the warning, which is given on
            the ranks that need them.

    Attributes:
        raises_at_once: Whether every error is raised as it is, without a second attempt or another way.

    """

    def __init__(
        self,
        loss: MeanLoss,
        space: VectorSpace,
        way: Product,
        *,
        difference: FiniteDifference | None,
        falls_back: bool,
        refusal: str,
        on_fallback: Callable[[], None] | None = None,
    ) -> None:
        self._loss = loss
        self._space = space
        self._asked = way
        self._way = way
        self._difference = difference
        self._given_step = None if difference is None else difference.step
        self._falls_back = falls_back
        self._refusal = refusal
        self._on_fallback = on_fallback
        self._functions = FunctionCheck(loss, is_movable=difference is not None)
        self.raises_at_once = False
        self.reset()

    @property
    def way(self) -> str:
        """The name of the present way to a product."""
        return self._way.name

    @property
    def graph_bytes(self) -> int:
        """Memory that the kept gradient graphs hold."""
        return self._asked.graph_bytes

    @property
    def step(self) -> float | None:
        """Length of the finite-difference step; None where none was given or needed yet."""
        return None if self._difference is None else self._difference.step

    def reset(self) -> None:
        """Go back to the way that was asked for, without graphs and without a step that was found."""
        self._way = self._asked
        self._is_checked = False
        if self._difference is not None:
            self._difference.step = self._given_step
            self._difference.no_other = None
        self._plain_rnn = False
        # A single derivative needs no special kernels: finite differences measure the loss as it is trained.
        kernels = nullcontext if self._way is self._difference else twice_differentiable_kernels
        self._loss.batches.kernels = kernels
        self.drop_graphs()

    def drop_graphs(self) -> None:
        """Build all graphs anew the next time."""
        self._asked.drop()

    def gradient(self, keep_graph: bool = False) -> Tensor:
        """The gradient of the mean loss at the present parameters, of shape ``(size,)``.

        Args:
            keep_graph: Whether products follow, for which its graph is built and kept where that is possible.

        """
        with torch.inference_mode(False), self._loss.batches.mean(self._space.size) as total:
            self._way.refresh()
            for index in range(len(self._loss.batches)):
                # In this order: the evaluation may be what finds out the weight.
                gradient = self._batch_gradient(index, keep_graph)
                total.add(gradient, self._loss.batches.weight(index))
        return total.sum

    def batch_gradients(self, max_batches: int | None = None) -> Iterator[Tensor]:
        """The gradients of this rank's batches at the present parameters, one after the other."""
        self._way.refresh()
        for index in range(len(self._loss.batches))[:max_batches]:
            yield self._batch_gradient(index)

    def products(self, vectors: Tensor) -> Tensor:
        """The products with the rows of a tensor, as the rows of another.

        Args:
            vectors: Shape ``(k, size)``, of any dtype and on any device.

        """
        with torch.inference_mode(False):
            if self._lacks_step():
                self._find_step()
            total = self._mean_products(vectors)
            if total.is_flagged:
                # Some rank fell back. A rank without batches, or whose own can be differentiated twice, has to follow:
                # the step is chosen by all, and the sum of both kinds of products would belong to no matrix.
                self._take_differences()
                self._find_step()
                total = self._mean_products(vectors)
        return total.sum.view(vectors.shape)

    def _batch_gradient(self, index: int, keep_graph: bool = False) -> Tensor:
        if keep_graph:
            try:
                return self._way.gradient(index, keep_graph=True)
            except RuntimeError:
                # The product that the graph is for will meet this again, and take another way or say that it cannot.
                if self.raises_at_once:
                    raise
                self.drop_graphs()
        return self._way.gradient(index)

    def difference(self, vector: Tensor) -> Tensor:
        """The product with one vector by finite differences, whatever the present way is."""
        with torch.inference_mode(False):
            if self.step is None:
                self._find_step()
            return self._mean_difference(vector)

    def _mean_products(self, vectors: Tensor) -> Total:
        """The mean of the products one after the other, or the flag if a rank has to find a step before."""
        batches = self._loss.batches
        with batches.mean(vectors.numel()) as total:
            # Tensors made in inference mode cannot be saved for a backward pass, their copies can.
            vectors = vectors.detach().to(
                dtype=self._space.dtype, device=self._space.device, copy=vectors.is_inference()
            )
            rows = vectors.contiguous()
            directions = list(map(self._way.prepared, rows))
            num_batches, index = len(batches), 0
            has_retried = False
            while index < num_batches:
                try:
                    found = self._way.products(index, directions)
                    self._check_functions(index)
                except RuntimeError as error:
                    self.drop_graphs()
                    if self.raises_at_once:
                        raise
                    if may_pass(error) and not has_retried:
                        has_retried = True
                        continue
                    self._fall_back(error, index)  # raises if there is no other way
                    # Anew for the batches that did not fail, too: the mean of products of two kinds belongs to no
                    # matrix.
                    total.clear()
                    if self._lacks_step():
                        # It is found by evaluations of all ranks, and the others are in the middle of a product, which
                        # ends in one message: by the flag in it they know that they have to join.
                        total.is_flagged = True
                        break
                    directions = list(map(self._way.prepared, rows))
                    index = 0
                else:
                    total.add(found[0] if len(found) == 1 else torch.cat(found), batches.weight(index))
                    index += 1
        return total

    def _check_functions(self, index: int) -> None:
        """Check the derivatives of functions that are not PyTorch's own, once, before a product is trusted.

        Not where other ranks take part in each evaluation: their number is fixed there.

        Raises:
            RuntimeError: If one has other derivatives than products take it to have.

        """
        if not self._is_checked and self._way is not self._difference and not self.raises_at_once:
            self._functions.check(index)
        self._is_checked = True

    def _mean_difference(self, vector: Tensor, step: float | None = None) -> Tensor:
        """The mean of the finite differences along a vector over a step, or over the present one."""
        assert self._difference is not None
        with self._loss.batches.mean(self._space.size) as total:
            directions = [self._difference.prepared(vector, step)]
            for index in range(len(self._loss.batches)):
                [product] = self._difference.products(index, directions)
                total.add(product, self._loss.batches.weight(index))
        return total.sum

    def _lacks_step(self) -> bool:
        return self._way is self._difference and self._difference.step is None

    def _find_step(self) -> None:
        """Choose the length of the finite-difference step, with all ranks."""
        assert self._difference is not None
        with self._space.together():
            # Within `together`, since a rank may fail in one of up to 15 gradients.
            longest = first_step(self._loss.parameters, self._space)
            self._difference.step = fitting_step(self._mean_difference, self.gradient(), longest, self._space)

    def _take_differences(self) -> None:
        """Multiply by finite differences from now on."""
        assert self._difference is not None
        if self._way is self._difference:
            return
        self._way = self._difference
        self._loss.batches.kernels = nullcontext
        self.drop_graphs()
        if self._on_fallback is not None:
            self._on_fallback()

    def _fall_back(self, error: RuntimeError, index: int) -> None:
        """Take the way that is left after this error of a batch's product, or raise it where there is none.

        Raises:
            MeasurementError: If PyTorch lacks a derivative.

        """
        if self._way is self._difference or not lacks_derivative(error):
            raise error
        # Before finite differences: on the plain kernels the product is exact, if slow.
        if "rnn" in str(error).lower() and not self._plain_rnn:
            self._plain_rnn = True
            self._loss.batches.kernels = partial(twice_differentiable_kernels, plain_rnn=True)
            return
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        self._check_evaluation(index, reason)
        if not self._falls_back:
            raise MeasurementError(f"{self._refusal} The reason: {reason}") from error
        self._take_differences()
        warnings.warn(
            "The loss cannot be differentiated twice, so its curvature is taken from finite differences of the"
            " gradient: as good for smooth losses, while where there are kinks, such as those of ReLU, only a leading"
            f" eigenvalue that stands out is right. The reason: {reason}",
            CurvatureWarning,
            stacklevel=5,
        )

    def _check_evaluation(self, index: int, reason: str) -> None:
        """Raise what a batch raises without a second derivative: then that is the fault, and the user's to see.

        So too where finite differences would only be named: those of half precision are no way. Where forward mode has
        failed, double backward is left before them.
        """
        kernels = self._loss.batches.kernels
        if self._difference is None:
            with self._loss.batches.evaluated(index):
                return
        self._loss.batches.kernels = nullcontext
        try:
            self._difference.gradient(index)
            if self._way.name != "forward_over_reverse":
                self._difference.no_other = reason
                self._difference.check(index)
        finally:
            self._loss.batches.kernels = kernels
