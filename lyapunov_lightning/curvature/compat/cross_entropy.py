r"""Cross-entropy that keeps its gradient, and nothing else of the size of the scores.

With probabilities ``p``, the softmax of the scores ``z``, and a distribution ``y`` of the labels whose sum ``a`` is the
weight of a row, the loss of the row, its gradient and the product of its Hessian with ``c`` are

.. math:: -\sum_k y_k \log p_k, \qquad d = a p - y, \qquad q \odot c - q \, \frac{q^\top c}{a} \quad (q = d + y = a p).

So the gradient, which the layer below keeps in any case, says all: it takes the place of the probabilities, and these
that of the scores. PyTorch keeps the logarithms of ``p`` and a matrix of zeros with one number in each row besides, and
each product makes half a dozen matrices of that size, two of them by exponentials. With a vocabulary of 32,000 words
these are most of a language model's memory.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lyapunov_lightning.curvature.compat.plain import is_plain


class _Labels(NamedTuple):
    """What each row is compared with: a label that counts by its share, and each class by its number in `even`.

    Attributes:
        places: The labels, of the shape of the rows.
        share: How much each of them counts.
        smoothed: One where `even` counts, else zero.
        even: A number for each class; None without smoothing.

    """

    places: Tensor
    share: Tensor
    smoothed: Tensor
    even: Tensor | None

    @property
    def mass(self) -> Tensor:
        """The weight of each row."""
        return self.share if self.even is None else self.share + self.smoothed * self.even.sum()

    def add(self, matrix: Tensor, factor: Tensor) -> Tensor:
        """Add the distribution of each row times a factor, in place."""
        matrix = matrix.scatter_add_(-1, self.places.unsqueeze(-1), (factor * self.share).unsqueeze(-1))
        if self.even is None:
            return matrix
        return matrix.addcmul_((factor * self.smoothed).unsqueeze(-1), self.even)

    def times(self, cotangent: Tensor, factor: Tensor, matrix: Tensor) -> Tensor:
        """``(matrix + factor · y) ⊙ cotangent``, as a new matrix."""
        if self.even is not None:
            return self.add(matrix.clone(), factor) * cotangent
        at_labels = cotangent.gather(-1, self.places.unsqueeze(-1)) * (factor * self.share).unsqueeze(-1)
        return (matrix * cotangent).scatter_add_(-1, self.places.unsqueeze(-1), at_labels)


class _Matrix:
    """The probabilities, or the gradient in their place once the last one was taken.

    Attributes:
        tensor: The matrix.
        factor: What each row of the gradient was multiplied by; None for probabilities.
        is_kept: Whether a graph has kept the probabilities.

    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.factor: Tensor | None = None
        self.is_kept = False


class _Softmax(torch.autograd.Function):
    """The probabilities in place of the scores: what is a derivative with respect to them is one to these."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        return torch.softmax(scores, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Probabilities(torch.autograd.Function):
    """The result of `_Softmax` as what it is, with the derivative of a softmax."""

    @staticmethod
    def forward(ctx: Any, softmax: Tensor) -> Tensor:
        ctx.save_for_backward(softmax)
        return softmax.view_as(softmax)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (softmax,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            softmax = _Probabilities.apply(softmax)
        weighted = softmax * grad
        gradient: Tensor = weighted - softmax * weighted.sum(-1, keepdim=True)
        return gradient


class _RowLosses(torch.autograd.Function):
    """The loss of each row.

    `check_twice_differentiable` tells it that the next gradient is the last one, which may take the matrix's place.
    """

    @staticmethod
    def forward(ctx: Any, softmax: Tensor, scores: Tensor, matrix: _Matrix, labels: _Labels) -> Tensor:
        ctx.matrix, ctx.labels, ctx.is_last = matrix, labels, False
        # By the largest probability, which is at least one over their number: that of the label may have underflown.
        log_sum = scores.amax(-1) - softmax.amax(-1).log()
        losses = labels.share * (log_sum - scores.gather(-1, labels.places.unsqueeze(-1)).squeeze(-1))
        if labels.even is None:
            return losses
        return losses + labels.smoothed * (labels.even.sum() * log_sum - scores @ labels.even)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        matrix, labels = ctx.matrix, ctx.labels
        if matrix.factor is not None:
            gradient = matrix.tensor * (grad / matrix.factor).unsqueeze(-1)
        elif not torch.is_grad_enabled():
            gradient = labels.add(matrix.tensor * (grad * labels.mass).unsqueeze(-1), -grad)
        elif ctx.is_last and not grad.requires_grad and not matrix.is_kept:
            # No derivative comes back to this place: the factor depends on nothing.
            gradient = matrix.tensor = _Gradient.apply(matrix.tensor, grad, labels)
            matrix.factor = torch.where(labels.mass == 0, 1, grad)
        else:
            # The loss itself has its gradient in it, or is no sum of these. PyTorch differentiates what is made here.
            matrix.is_kept = True
            softmax: Tensor = _Probabilities.apply(matrix.tensor)
            gradient = labels.add(softmax * (grad * labels.mass).unsqueeze(-1), -grad)
        return gradient, None, None, None


class _Gradient(torch.autograd.Function):
    """The gradient in place of the probabilities, where the factor of each row is a constant."""

    @staticmethod
    def forward(ctx: Any, softmax: Tensor, factor: Tensor, labels: _Labels) -> Tensor:
        ctx.labels = labels
        gradient = labels.add(softmax.mul_((factor * labels.mass).unsqueeze(-1)), -factor)
        ctx.mark_dirty(softmax)
        ctx.save_for_backward(gradient, factor)
        return gradient

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        # Of the gradient alone, which has a derivative itself; so have its products, for losses that have one in them.
        gradient, factor = ctx.saved_tensors
        labels, mass = ctx.labels, factor * ctx.labels.mass
        product = labels.times(cotangent, factor, gradient)
        share = -product.sum(-1) * torch.where(mass == 0, 0, 1 / mass)
        product = product.addcmul_(gradient, share.unsqueeze(-1))
        return labels.add(product, factor * share), None, None


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``torch.nn.functional.cross_entropy``; with targets that are probabilities it is PyTorch's."""
    scores = input.movedim(1, -1) if input.ndim > 1 else input
    if input.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(input.device.type):
        scores = scores.float()  # as autocast would
    is_ours = (
        is_plain(scores)
        and scores.is_contiguous()  # of images PyTorch's kernels need no copy
        and input.numel() > 0
        and target.shape == scores.shape[:-1]
        and not target.is_floating_point()
        and not (weight is not None and weight.requires_grad)
        and size_average is None
        and reduce is None
        and reduction in ("none", "mean", "sum")
    )
    if not is_ours:
        return functional.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    is_counted = target != ignore_index
    places = torch.where(is_counted, target, 0).long()
    counted = is_counted.to(scores.dtype)
    weights = counted if weight is None else counted * weight.to(scores.dtype)[places]
    even = None
    if label_smoothing:
        even = scores.new_ones(scores.shape[-1]) if weight is None else weight.to(scores.dtype)
        even = even * (label_smoothing / scores.shape[-1])
    softmax: Tensor = _Softmax.apply(scores)
    labels = _Labels(places, weights * (1 - label_smoothing), counted, even)
    losses: Tensor = _RowLosses.apply(softmax, scores.detach(), _Matrix(softmax), labels)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / weights.sum()
