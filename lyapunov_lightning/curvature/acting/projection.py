r"""A vector scaled by one factor within a subspace and by another one in its orthogonal complement.

With orthonormal rows :math:`V` the vector :math:`u` becomes :math:`P(u) = bu + (a - b)V^\top Vu`, which is :math:`a`
times the part of :math:`u` in their span and :math:`b` times the rest ("On the relation between the sharpest directions
of DNN loss and the SGD step length", sec. 4, where the rows are eigenvectors and the vector is a gradient).
"""

import torch
from torch import Tensor

from lyapunov_lightning.curvature.vectors.space import VectorSpace, space_like


def scaled_in_subspace(
    vector: Tensor,
    rows: Tensor,
    *,
    inside: float,
    outside: float,
    shift: Tensor | None = None,
    space: VectorSpace | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale a vector by one factor within a subspace and by another one in its orthogonal complement.

    Args:
        vector: Shape ``(n,)``. One whose part in the subspace is not finite is left as it is.
        rows: Shape ``(k, n)``: orthonormal rows, which span the subspace.
        inside: The factor within.
        outside: The factor in the complement.
        shift: A vector ``s`` of shape ``(n,)`` that is added before and subtracted afterwards, ``P(u + s) − s``: such
            as the weight decay that an optimizer will add to the scaled vector.
        space: The space of the vectors, if they are not plain tensors of their whole length.

    Returns:
        The scaled vector, and the share of the squared norm that was removed, ``‖u − P(u)‖² / ‖u‖²``, a scalar.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature.acting.projection import scaled_in_subspace
        >>> scaled_in_subspace(torch.tensor([3.0, 4.0]), torch.tensor([[1.0, 0.0]]), inside=0.0, outside=1.0)
        (tensor([0., 4.]), tensor(0.3600))

    """
    whole = vector if shift is None else vector + shift
    space = space_like(whole) if space is None else space
    coefficients = space.inner(rows, whole)
    scaled = whole * outside + (inside - outside) * (coefficients @ rows)
    if shift is not None:
        scaled -= shift
    # On the device, without waiting for it: with infinite coefficients 0 · inf would turn all of the vector into NaN.
    scaled = torch.where(coefficients.isfinite().all(), scaled, vector)
    # By Pythagoras, from numbers: the difference of the two vectors would be one more vector of the model's size.
    total, within = space.inner(whole, whole), coefficients.square().sum()
    removed = (1 - inside) ** 2 * within + (1 - outside) ** 2 * (total - within).clamp_min(0)
    return scaled, removed / total.clamp_min(torch.finfo(total.dtype).tiny)
