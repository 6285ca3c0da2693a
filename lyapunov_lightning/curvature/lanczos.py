r"""Extreme eigenpairs of a symmetric operator, both ends from one Krylov space.

Thick-restart Lanczos: a Krylov basis grows by one product a step; when it is full it is compressed to the Ritz vectors
nearest to both ends of the spectrum and grows on from there (K. Wu and H. Simon, "Thick-restart Lanczos method for
large symmetric eigenvalue problems", SIAM J. Matrix Anal. Appl. 22, 2000). Every new vector is orthogonalised twice
against the whole basis ("twice is enough", B. Parlett, "The symmetric eigenvalue problem", sec. 6.9), so that no ghost
copy of a converged eigenvalue comes up.

The Krylov space of one vector holds one direction of each eigenspace, so a repeated eigenvalue looks like a simple one
to it. When more than one eigenvalue of an end is wanted, the accepted ones are therefore *challenged*: they are kept,
the rest of the basis is given up for a fresh random vector, and the copies that were missed come out of its Krylov
space.
"""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from lyapunov_lightning.curvature.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.linear import LinearOperator

_START_NOISE = 0.1
"""Norm of the random part of a warm start, relative to the given vector."""

_SMALL = 128
"""Operators up to this size get a basis that may span the whole space: the result is exact."""

_MIN_CHALLENGE = 8
"""Products that a challenge spends at least before it lets the eigenvalues stand."""


def lanczos(
    operator: LinearOperator,
    *,
    largest: int = 1,
    smallest: int = 0,
    tol: float = 1e-3,
    max_matvecs: Optional[int] = None,
    start: Optional[Tensor] = None,
    seed: int = 0,
    max_basis_vectors: Optional[int] = None,
) -> Eigenpairs:
    """The largest and the smallest eigenvalues of a symmetric operator, with vectors and residuals.

    A pair ``(θ, v)`` has converged when ``‖Av − θv‖ <= tol·|θ|``, or when the residual is down at the rounding error of
    the products. The residual is a true error bound: an eigenvalue lies within it of ``θ``, and by the symmetry of
    ``A`` the error is usually nearer to its square over the distance to the next eigenvalue.

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
        max_basis_vectors: The size of the Krylov basis. By default ``max(32, 2 * (largest + smallest) + 16)``, and the
            whole space for operators of up to 128 numbers.

    Returns:
        The eigenpairs, of the upper end descending, then of the lower end ascending.

    Raises:
        ValueError: If an argument is out of its range, or more eigenvalues are wanted than there are.
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
        max_basis_vectors = size if size <= _SMALL else max(32, 2 * wanted + 16)
    elif max_basis_vectors < wanted + 2:
        raise ValueError(
            f"`max_basis_vectors` should be at least `largest + smallest + 2` = {wanted + 2}, got {max_basis_vectors}."
        )

    basis = _KrylovBasis(operator, capacity=min(max_basis_vectors, size), seed=seed)
    basis.begin(start)
    challenge = _Challenge(largest, smallest)
    num_matvecs = 0
    while True:
        basis.expand()
        num_matvecs += 1
        last = basis.length == size or num_matvecs == max_matvecs
        if basis.length < wanted or not (last or basis.is_full or basis.is_worth_checking):
            continue
        ritz = basis.ritz(largest, smallest, tol)
        if last or challenge.is_met(basis, ritz):
            break
        if challenge.is_due(ritz, tol):
            basis.compress(largest, smallest)
            basis.begin()
            challenge.start(basis, ritz)
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


@dataclass(frozen=True)
class _Ritz:
    """The wanted Ritz pairs of the present basis, and how near the next ones come to them."""

    values: Tensor
    coefficients: Tensor
    residuals: Tensor
    growing: Tensor
    """The part of the residuals that further products can reduce: all but what challenges cut off."""
    converged: Tensor
    rounding: float
    next_largest: float
    """Upper bound on the largest Ritz value that is not wanted, its residual included."""
    next_smallest: float
    """Lower bound on the smallest Ritz value that is not wanted, its residual included."""


class _KrylovBasis:
    """An orthonormal basis ``V`` with the projection ``T = V A Vᵀ`` and what is known of ``A Vᵀ - Vᵀ T``.

    The first `length` rows of the storage are the basis; the next row is the direction in which it grows. The residual
    of the basis has one column in that direction (`_coupling` times it, for the newest vector alone, or for all kept
    Ritz vectors just after a restart), and what earlier challenges cut off (`_leaks`).
    """

    def __init__(self, operator: LinearOperator, capacity: int, seed: int) -> None:
        self._operator = operator
        self._generator = torch.Generator().manual_seed(seed)
        self._vectors = torch.empty(0, operator.size, dtype=operator.dtype, device=operator.device)
        self._projection = torch.zeros(capacity, capacity, dtype=torch.float64)
        self._coupling = torch.zeros(0, dtype=torch.float64)
        self._leaks = torch.zeros(0, 0, dtype=torch.float64)
        self._norm = 0.0
        self._next_check = 0
        self.capacity = capacity
        self.length = 0

    @property
    def is_full(self) -> bool:
        return self.length == self.capacity

    @property
    def may_span_the_space(self) -> bool:
        return self.capacity == self._operator.size

    @property
    def rounding(self) -> float:
        """What the rounding of a product may amount to: no residual is known better than this."""
        return 10 * torch.finfo(self._operator.dtype).eps * self._norm

    def begin(self, start: Optional[Tensor] = None) -> None:
        """Grow in a new direction, giving up the present one: near `start` if given, else random."""
        if bool(self._coupling.any()):
            leak = torch.zeros(1, self.length, dtype=torch.float64)
            leak[0] = self._coupling
            self._leaks = torch.cat([self._leaks.reshape(-1, self.length), leak])
        self._coupling = torch.zeros(self.length, dtype=torch.float64)
        direction = self._random_vector()
        if start is not None:
            direction = self._blend(start, direction)
        self._grow_along(self._orthonormalised(direction))

    def expand(self) -> None:
        """Take the growing direction into the basis: one product."""
        operator, length = self._operator, self.length
        product = operator.matvec(self._vectors[length])
        basis = self._vectors[: length + 1]
        coefficients = basis @ product
        product = product.addmv(basis.T, coefficients, alpha=-1)
        correction = basis @ product
        product.addmv_(basis.T, correction, alpha=-1)
        column = (coefficients + correction).to("cpu", torch.float64)
        remainder = float(torch.linalg.vector_norm(product))
        if not (torch.isfinite(column).all() and remainder < float("inf")):
            raise NonFiniteCurvatureError(
                "A Hessian-vector product is not finite: the loss or its derivatives overflow or are NaN here."
            )
        self._projection[: length + 1, length] = column
        self._projection[length, : length + 1] = column
        self._norm = max(self._norm, float(torch.linalg.vector_norm(column)), remainder)
        self._leaks = torch.nn.functional.pad(self._leaks, (0, 1))
        self._coupling = torch.zeros(length + 1, dtype=torch.float64)
        self.length += 1
        if self.length == operator.size:
            return
        if remainder > self.rounding:
            self._coupling[-1] = remainder
            self._grow_along(product.div_(remainder))
        else:  # an invariant subspace: what is left of the space is not reached from here
            self._grow_along(self._orthonormalised(self._random_vector()))

    @property
    def is_worth_checking(self) -> bool:
        """Whether the basis has grown enough since the Ritz values were last looked at."""
        return self.length >= self._next_check

    def ritz(self, largest: int, smallest: int, tol: float) -> _Ritz:
        """The wanted Ritz pairs."""
        self._next_check = self.length + max(1, self.length // 8)
        values, vectors = self._eigh()
        growing = (vectors.T @ self._coupling).abs().clamp_min(self.rounding)
        bounds = growing + (self._leaks @ vectors).abs().sum(dim=0)
        wanted = _both_ends(self.length, largest, smallest)
        below, above = smallest, self.length - largest
        tolerance = (tol * values[wanted].abs()).clamp_min(self.rounding * (1 + len(self._leaks)))
        return _Ritz(
            values=values[wanted],
            coefficients=vectors[:, wanted],
            residuals=bounds[wanted],
            growing=growing[wanted],
            converged=bounds[wanted] <= tolerance,
            rounding=self.rounding,
            next_largest=float((values + bounds)[above - 1]) if below < above else -float("inf"),
            next_smallest=float((values - bounds)[below]) if below < above else float("inf"),
        )

    def kept_at_restart(self, ritz: _Ritz, largest: int, smallest: int) -> tuple[int, int]:
        """How many Ritz vectors of each end a restart keeps: the wanted ones, and half of the room beside them.

        The vectors next to the wanted ones hasten the convergence of their end, so they are kept for ends that still
        have some way to go.
        """
        spare = (self.capacity - largest - smallest) // 2
        top = largest > 0 and not bool(ritz.converged[:largest].all())
        bottom = smallest > 0 and not bool(ritz.converged[largest:].all())
        if top == bottom:
            top = largest > 0
            bottom = smallest > 0
        top_share = spare * top // (top + bottom)
        return largest + top_share, smallest + spare - top_share

    def compress(self, largest: int, smallest: int) -> None:
        """Keep the Ritz vectors of both ends as the basis, and the direction in which it grows."""
        values, vectors = self._eigh()
        kept = _both_ends(self.length, largest, smallest)
        rotation = vectors[:, kept]
        growing = self._vectors[self.length].clone()
        self._coupling = rotation.T @ self._coupling
        self._leaks = self._leaks @ rotation
        self._rotate(rotation)
        self.length = len(kept)
        self._vectors[self.length] = growing
        self._projection.zero_()
        self._projection[: self.length, : self.length] = torch.diag(values[kept])
        self._next_check = self.length + 1

    def combine(self, coefficients: Tensor) -> Tensor:
        """The vectors with these coefficients in the basis, one row for each column; ends the use of the basis."""
        self._rotate(coefficients)
        return self._vectors[: coefficients.shape[1]].clone()

    def _grow_along(self, direction: Tensor) -> None:
        """Put the direction behind the basis; the storage doubles where needed, up to ``capacity + 1`` vectors."""
        rows = self._vectors.shape[0]
        if self.length == rows:
            grown = self._vectors.new_empty(min(max(2 * rows, 8), self.capacity + 1), self._vectors.shape[1])
            grown[:rows] = self._vectors
            self._vectors = grown
        self._vectors[self.length] = direction

    def _eigh(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self._projection[: self.length, : self.length])
        return values, vectors

    def _rotate(self, rotation: Tensor) -> None:
        """Replace the basis by combinations of it, in slices of the long dimension to need no second basis."""
        rotation = rotation.T.to(self._vectors)
        kept, length = rotation.shape
        width = max(1, self._vectors.shape[1] // 16)
        for piece in self._vectors.split(width, dim=1):
            piece[:kept] = rotation @ piece[:length]

    def _random_vector(self) -> Tensor:
        operator = self._operator
        vector = torch.randn(operator.size, generator=self._generator, dtype=operator.dtype)
        return vector.to(operator.device)

    def _blend(self, start: Tensor, noise: Tensor) -> Tensor:
        """A combination of the rows of `start` in which each has its share, and a little of everything else."""
        rows = start.detach().to(noise).reshape(-1, noise.shape[0])
        weights = torch.randn(rows.shape[0], generator=self._generator, dtype=torch.float64).sign().to(rows)
        direction = weights @ rows
        norm = torch.linalg.vector_norm(direction)
        if not bool(torch.isfinite(norm)):
            raise ValueError("`start` should be finite.")
        return direction + noise * (_START_NOISE * norm / torch.linalg.vector_norm(noise)) if norm > 0 else noise

    def _orthonormalised(self, vector: Tensor) -> Tensor:
        basis = self._vectors[: self.length]
        for _ in range(2):
            vector = vector.addmv(basis.T, basis @ vector, alpha=-1)
            vector = vector / torch.linalg.vector_norm(vector)
        return vector


class _Challenge:
    """The search for copies of repeated eigenvalues that one Krylov space cannot hold.

    It starts when every wanted pair has converged, in the Krylov space of a random vector orthogonal to them, and is
    met when nothing in that space reaches beyond the least of the accepted values. A copy that comes up ends it: the
    solver then goes on, and challenges the new set in its turn.
    """

    def __init__(self, largest: int, smallest: int) -> None:
        self._largest = largest
        self._smallest = smallest
        self._accepted: Optional[_Ritz] = None
        self._started_at = 0
        self._number = 0

    def is_due(self, ritz: _Ritz, tol: float) -> bool:
        """Whether the pairs are good enough to be challenged.

        A challenge cuts off the direction in which they could still be improved. The first one asks for a quarter of
        the tolerance and each further one for half as much, so that all that they cut off stays below it.
        """
        share = tol * 0.5 ** (self._number + 2)
        needed = self._largest > 1 or self._smallest > 1
        good = ritz.growing <= (share * ritz.values.abs()).clamp_min(ritz.rounding)
        return needed and self._accepted is None and bool((ritz.converged & good).all())

    def start(self, basis: _KrylovBasis, accepted: _Ritz) -> None:
        self._accepted = accepted
        self._started_at = basis.length
        self._number += 1

    def is_met(self, basis: _KrylovBasis, ritz: _Ritz) -> bool:
        """Whether the converged pairs may stand."""
        if self._largest <= 1 and self._smallest <= 1:
            return bool(ritz.converged.all())  # the outermost value of an end is right whatever its multiplicity
        if self._accepted is None:
            return False
        moved = (ritz.values - self._accepted.values).abs() > ritz.residuals + self._accepted.residuals
        if bool(moved.any()) or not bool(ritz.converged.all()):
            self._accepted = None
            return False
        if basis.length - self._started_at < _MIN_CHALLENGE or basis.may_span_the_space:
            return False
        last = self._largest - 1
        beyond_largest = self._largest > 0 and ritz.next_largest > float(ritz.values[last] + ritz.residuals[last])
        beyond_smallest = self._smallest > 0 and ritz.next_smallest < float(ritz.values[-1] - ritz.residuals[-1])
        return basis.is_full or not (beyond_largest or beyond_smallest)


def _both_ends(length: int, largest: int, smallest: int) -> Tensor:
    """Positions in an ascending list: the last ones from the top down, then the first ones from the bottom up."""
    top = torch.arange(length - 1, length - 1 - largest, -1)
    return torch.cat([top, torch.arange(smallest)])
