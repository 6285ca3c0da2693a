r"""How far an end of the spectrum may lie beyond the outermost Ritz value: what a Krylov space can hide.

The residual of a Ritz pair says that an eigenvalue is near, not that it is the outermost one; and the distance to the
next Ritz value says nothing of an eigenvalue that has not come up yet. What does is the start. An eigenvector ``u`` of
the eigenvalue ``μ`` has, of a basis ``V`` with ``A V = V G + v bᵀ``, the coefficients ``(μ - G)⁻¹ b`` times its
component along the growing direction ``v``: all of it is fixed up to a factor, and at unit length it cannot have more
than ``h(μ)`` of its square along the start. The further ``μ`` lies beyond the Ritz values, the smaller ``h`` is: in
terms of the Lanczos polynomials, ``1/h = Σ p_i(μ)²``. In a random start of ``n`` numbers a component as small as that
comes with a chance of ``√(2n h / π)`` at most (J. Kuczyński and H. Woźniakowski, "Estimating the largest eigenvalue by
the power and Lanczos algorithms with a random start", SIAM J. Matrix Anal. Appl. 13, 1992, bound it for the worst
spectrum; here it is that of the spectrum seen).

A copy of an eigenvalue that is known already is orthogonal to its eigenvector and to the whole Krylov space in which
that one was found, whatever the start. So a second start is drawn at random orthogonal to all that is known, and in its
Krylov space the same holds of the copy: from the direction in which that grows all of its components follow, but for
those along the known eigenvectors, which are zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projected:
    """A basis in its Ritz vectors: one entry for each of them, ascending.

    Attributes:
        values: The Ritz values.
        vectors: Their coefficients in the basis, one column each.
        coupling: What of their residuals points along the growing direction.

    """

    values: Tensor
    vectors: Tensor
    coupling: Tensor

    def shares(self, of_basis: Tensor) -> Tensor:
        """Coefficients in the Ritz vectors, from rows of coefficients in the first vectors of the basis."""
        return of_basis @ self.vectors[: of_basis.shape[1]]

    def amplified(self, beyond: Tensor) -> Tensor:
        """Rows of what eigenvectors of these values have of each Ritz vector, for 1 along the growing direction."""
        return self.coupling / (beyond[:, None] - self.values)


def largest_component(
    beyond: Tensor,
    now: Projected,
    restarts: Sequence[tuple[Projected, Tensor]],
    origin: int = 0,
    known: Tensor | None = None,
    rounding: float = 0.0,
) -> Tensor:
    """The most that an eigenvector may have along the start of the search, if its eigenvalue is this.

    Args:
        beyond: Possible eigenvalues, beyond all Ritz values but the known ones.
        now: The basis at present.
        restarts: The basis before each restart, and the positions of the Ritz vectors that it kept.
        origin: The position of the start in the basis, as it was before the first restart.
        known: Positions of the Ritz vectors that are eigenvectors already, to which a further one is orthogonal. Beyond
            the others the eigenvalue has to lie.
        rounding: What the rounding of a product amounts to.

    """
    start = torch.zeros(len(beyond), origin + 1, dtype=torch.float64, device="cpu")
    start[:, origin] = 1
    for before, kept in restarts:
        shares = before.shares(start)
        is_dropped = torch.ones(len(before.values), dtype=torch.bool, device="cpu")
        is_dropped[kept] = False
        # What was dropped can be told from the direction in which the basis grew, its next vector.
        dropped = (shares * before.amplified(beyond))[:, is_dropped].sum(dim=1, keepdim=True)
        start = torch.cat([shares[:, kept], dropped], dim=1)
    length = len(now.values)
    shares = now.shares(start[:, :length])
    inverse = 1 / (beyond[:, None] - now.values)
    if known is not None:
        inverse[:, known] = 0
    coefficients = now.coupling * inverse
    along = (shares * coefficients).sum(dim=1) + start[:, length:].sum(dim=1)
    # What the rounding of the products swallows, they do not show.
    lost = rounding * torch.linalg.vector_norm(shares * inverse, dim=1)
    component: Tensor = along.abs() / (1 + coefficients.square().sum(dim=1)).sqrt() + lost
    return component


def chance_of_less(component: Tensor, size: int) -> Tensor:
    """The chance, at most, that a random unit vector of this many numbers has less along a given direction."""
    return component * math.sqrt(2 * size / math.pi)
