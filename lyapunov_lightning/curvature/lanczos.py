r"""Extreme eigenpairs of a symmetric operator, both ends from one Krylov space.

Thick-restart Lanczos: a Krylov basis grows by one product a step; when it is full it is compressed to the Ritz vectors
nearest to both ends of the spectrum and grows on from there (K. Wu and H. Simon, "Thick-restart Lanczos method for
large symmetric eigenvalue problems", SIAM J. Matrix Anal. Appl. 22, 2000).

The Krylov space of one vector holds one direction of each eigenspace, so a repeated eigenvalue looks like a simple one
to it. When more than one eigenvalue of an end is wanted, the accepted ones are therefore *challenged*: the direction in
which the basis grows is given up for a fresh random one, and the copies that were missed come out of its Krylov space.
A small operator's basis may span the whole space, and then does.
"""

import torch
from torch import Tensor

from lyapunov_lightning.curvature.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.krylov import KrylovBasis, RitzPairs, random_vector
from lyapunov_lightning.curvature.linear import LinearOperator

_START_NOISE = 0.1
"""Norm of the random part of a warm start, relative to the given vector."""

_SMALL = 160
"""Operators up to this size get a basis that may span the whole space: the result is exact."""

_LOWER_END_ALONE = 64
"""The least basis for the lower end alone: in the Hessian of a network the upper end lies in its way, and a basis that
holds that too takes a half to two thirds of the products of one that finds it anew after every restart."""

_MIN_CHALLENGE = 8
"""Products that a challenge spends at least before it lets the eigenvalues stand."""

_MAX_CHALLENGE = 32
"""Products that it spends at most while something may still come up, such as where the bulk of the spectrum begins."""


def lanczos(
    operator: LinearOperator,
    *,
    largest: int = 1,
    smallest: int = 0,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    max_basis_vectors: int | None = None,
) -> Eigenpairs:
    """The largest and the smallest eigenvalues of a symmetric operator, with vectors and residuals.

    A pair ``(θ, v)`` has converged when ``‖Av − θv‖ <= tol·|θ|``, or when the residual is negligible beside the norm of
    ``A``: down at the rounding error of the products, or at 1e-8 of the norm. The residual is a true error bound: an
    eigenvalue lies within it of ``θ``, and by the symmetry of ``A`` the error is usually nearer to its square over the
    distance to the next eigenvalue.

    The result is a function of the arguments alone: the seed determines every random number, and the global generators
    are neither read nor advanced. The memory is that of the Krylov basis, which grows as it is needed to at most
    ``max_basis_vectors + 1`` vectors.

    Args:
        operator: The symmetric operator, known by ``matvec``, ``size``, ``dtype`` and ``device``.
        largest: How many eigenvalues of the upper end.
        smallest: How many eigenvalues of the lower end (the most negative ones).
        tol: Relative tolerance of the residuals.
        max_matvecs: The most products to spend; ``100 + 50 * (largest + smallest)`` if None. What has not converged by
            then is returned as such.
        start: A vector ``(size,)``, or rows ``(j, size)``, in whose direction the wanted eigenvectors are expected,
            such as those of an earlier, similar operator. A little noise is added, so that a direction that `start`
            lacks is not missed.
        seed: Seed of the start vector, or of the noise added to it.
        max_basis_vectors: The size of the Krylov basis. By default ``max(32, 2 * (largest + smallest) + 16)``, at
            least 64 for the lower end alone, and the whole space for operators of up to 160 numbers.

    Returns:
        The eigenpairs, of the upper end descending, then of the lower end ascending.

    Raises:
        ValueError: If an argument is out of its range, more eigenvalues are wanted than there are, or `start` does not
            fit the operator.
        NonFiniteCurvatureError: If a product is not finite.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature import HessianOperator, lanczos
        >>> x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        >>> scale = torch.tensor([4.0, 1.0, -2.0], dtype=torch.float64)
        >>> hessian = HessianOperator(lambda batch: (batch * x**2).sum() / 2, [x], [scale])
        >>> lanczos(hessian, largest=1, smallest=1).values
        tensor([ 4.0000, -2.0000], dtype=torch.float64)

    """
    size = operator.size
    wanted = largest + smallest
    if largest < 0 or smallest < 0 or wanted == 0:
        raise ValueError(
            "`largest` and `smallest` should be non-negative ints, not both 0,"
            f" got largest={largest} and smallest={smallest}."
        )
    if wanted > size:
        raise ValueError(
            f"`largest + smallest` should be at most the operator's size {size},"
            f" got largest={largest} and smallest={smallest}."
        )
    if not tol > 0:
        raise ValueError(f"`tol` should be a positive float, got {tol}.")
    if max_matvecs is None:
        max_matvecs = 100 + 50 * wanted
    elif max_matvecs < wanted:
        raise ValueError(f"`max_matvecs` should be at least `largest + smallest` = {wanted}, got {max_matvecs}.")
    if max_basis_vectors is None:
        least = 32 if largest else _LOWER_END_ALONE
        max_basis_vectors = size if size <= _SMALL else max(least, 2 * wanted + 16)
    elif max_basis_vectors < wanted + 2:
        raise ValueError(
            f"`max_basis_vectors` should be at least `largest + smallest + 2` = {wanted + 2}, got {max_basis_vectors}."
        )

    generator = torch.Generator().manual_seed(seed)
    basis = KrylovBasis(operator, min(max_basis_vectors, size), generator)
    basis.begin(None if start is None else _blended(start, random_vector(operator, generator), generator))
    challenge = _Challenge(largest, smallest, needed=max(largest, smallest) > 1 and not basis.may_span_the_space)
    num_matvecs = 0
    while True:
        basis.expand()
        num_matvecs += 1
        last = basis.length == size or num_matvecs == max_matvecs
        if basis.length < wanted or not (last or basis.is_full or basis.is_worth_checking):
            continue
        ritz = basis.ritz(largest, smallest, tol)
        if last or challenge.is_met(ritz, num_matvecs):
            break
        if challenge.is_due(ritz, tol):
            if basis.capacity - basis.length < _MAX_CHALLENGE:
                basis.compress(largest, smallest)
            basis.begin()
            challenge.start(ritz, num_matvecs)
        elif basis.is_full:
            basis.compress(*basis.kept_at_restart(ritz, largest, smallest))
    return Eigenpairs(
        values=ritz.values,
        vectors=basis.combine(ritz.coefficients),
        residuals=ritz.residuals,
        converged=ritz.converged,
        num_matvecs=num_matvecs,
        num_largest=largest,
    )


def _blended(start: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    """A combination of the rows of `start` in which each has its share, and a little of everything else."""
    if start.shape[-1:] != noise.shape or start.ndim > 2:
        raise ValueError(f"`start` should have rows of length {len(noise)}, got shape {tuple(start.shape)}.")
    rows = start.detach().to(noise).reshape(-1, len(noise))
    signs = torch.randn(len(rows), generator=generator, dtype=torch.float64).sign().to(rows)
    direction = signs @ rows
    norm = torch.linalg.vector_norm(direction)
    if not bool(torch.isfinite(norm)):
        raise ValueError("`start` should be finite.")
    return direction + noise * (_START_NOISE * norm / torch.linalg.vector_norm(noise)) if norm > 0 else noise


class _Challenge:
    """The search for copies of repeated eigenvalues that one Krylov space cannot hold.

    It starts when every wanted pair has converged, in the Krylov space of a random vector orthogonal to them, and is
    met when nothing in that space reaches beyond the least of the accepted values. A copy that comes up ends it: the
    solver then goes on, and challenges the new set in its turn.
    """

    def __init__(self, largest: int, smallest: int, *, needed: bool) -> None:
        self._largest = largest
        self._smallest = smallest
        self._needed = needed
        self._accepted: RitzPairs | None = None
        self._started_at = 0
        self._number = 0

    def is_due(self, ritz: RitzPairs, tol: float) -> bool:
        """Whether the pairs are good enough to be challenged.

        A challenge cuts off the direction in which they could still be improved. The first one asks for half of
        the tolerance and each further one for half as much, so that all that they cut off stays below it.
        """
        share = tol * 0.5 ** (self._number + 1)
        good = ritz.growing <= (share * ritz.values.abs()).clamp_min(ritz.negligible / 2)
        return self._needed and self._accepted is None and bool((ritz.converged & good).all())

    def start(self, accepted: RitzPairs, num_matvecs: int) -> None:
        """Begin, with the pairs that are to stand."""
        self._accepted = accepted
        self._started_at = num_matvecs
        self._number += 1

    def is_met(self, ritz: RitzPairs, num_matvecs: int) -> bool:
        """Whether the converged pairs may stand."""
        if not self._needed:
            return self._outermost_only() and bool(ritz.converged.all())
        if self._accepted is None:
            return False
        moved = (ritz.values - self._accepted.values).abs() > ritz.residuals + self._accepted.residuals
        if bool(moved.any()) or not bool(ritz.converged.all()):
            self._accepted = None
            return False
        spent = num_matvecs - self._started_at
        last = self._largest - 1
        beyond_largest = self._largest > 0 and ritz.next_largest > float(ritz.values[last] + ritz.residuals[last])
        beyond_smallest = self._smallest > 0 and ritz.next_smallest < float(ritz.values[-1] - ritz.residuals[-1])
        return spent >= (_MAX_CHALLENGE if beyond_largest or beyond_smallest else _MIN_CHALLENGE)

    def _outermost_only(self) -> bool:
        """Whether one value of an end is wanted, which is right whatever its multiplicity."""
        return self._largest <= 1 and self._smallest <= 1
