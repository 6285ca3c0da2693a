r"""How far the gradient lies along the sharpest directions, and how far these turn.

- *Gradient alignment*: the cosines of the mini-batch gradients with single eigenvectors, and the share of their squared
  norm inside the span of the upper end's eigenvectors. Of a random vector that share is ``k/n``.
- *Subspace overlap*: the mean squared cosine of the principal angles between two spans, ``‖V_old V_newᵀ‖²_F`` over the
  smaller dimension. It is 1 where one span holds the other, and about ``k/n`` for random ones (G. Gur-Ari, D. Roberts
  and E. Dyer, "Gradient descent happens in a tiny subspace", 2018).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.curvature.solvers.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.vectors.space import VectorSpace, space_like


@dataclass(frozen=True)
class GradientAlignment:
    """How far the mini-batch gradients lie along eigenvectors: means over the mini-batches.

    Attributes:
        largest: The absolute cosine with each eigenvector of the upper end.
        smallest: The same for the lower end.
        in_top_subspace: The share of the squared norm inside the span of the upper end's eigenvectors; None if there
            are none.
        in_random_subspace: The same share for a random subspace of that dimension, to compare with.

    """

    largest: tuple[float, ...]
    smallest: tuple[float, ...]
    in_top_subspace: float | None
    in_random_subspace: float | None


def gradient_alignment(operator: LossHessian, pairs: Eigenpairs, max_batches: int | None = None) -> GradientAlignment:
    """How far the mini-batch gradients lie along eigenvectors.

    Args:
        operator: The Hessian, with the batches.
        pairs: Its eigenpairs.
        max_batches: How many of each rank's batches to use; all if None.

    Returns:
        The means over the batches, each of which counts once. A gradient of zero has cosines of zero.

    """
    vectors, count = pairs.vectors, pairs.num_largest

    def statistic(components: Tensor, norm: Tensor) -> Tensor:
        # Moduli and squares, since gradients that point both ways along an eigenvector in turn would cancel, although
        # all of them lie along it.
        cosines = components / norm if norm > 0 else torch.zeros_like(components)
        return torch.cat([cosines.abs(), cosines[:count].square().sum().reshape(1)])

    *cosines, inside = operator.mean_over_batches(vectors, statistic, len(vectors) + 1, max_batches).tolist()
    return GradientAlignment(
        largest=tuple(cosines[:count]),
        smallest=tuple(cosines[count:]),
        in_top_subspace=inside if count else None,
        in_random_subspace=count / operator.size if count else None,
    )


def subspace_overlap(old: Tensor, new: Tensor, space: VectorSpace | None = None) -> float:
    """The overlap of the spans of two sets of orthonormal vectors.

    Args:
        old: Shape ``(k, n)``: one vector for each row, of any dtype and on any device.
        new: Shape ``(j, n)``.
        space: Their space, if they are not plain tensors of their whole length.

    Returns:
        Between 0 and 1, up to the rounding of the vectors.

    Raises:
        ValueError: If one of them holds no vector, or the vectors differ in length.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature.directions.alignment import subspace_overlap
        >>> subspace_overlap(torch.eye(4)[:2], torch.eye(4)[1:3])
        0.5

    """
    if not len(old) or not len(new) or old.shape[1] != new.shape[1]:
        raise ValueError(
            "`old` and `new` should each hold at least one vector, all of one length, got the shapes"
            f" {tuple(old.shape)} and {tuple(new.shape)}."
        )
    # Row by row: of old vectors in bfloat16 a whole converted copy would take as much memory as the new ones.
    space = space_like(new[0]) if space is None else space
    cosines = [space.inner(new, row.to(new)) for row in old]
    return float(torch.stack(cosines).square().sum()) / min(len(old), len(new))
