"""A Krylov basis that can be compressed: what every eigen-solver here grows.

The basis is an orthonormal one of ``span(v, Av, A²v, ...)``. It grows by one product a step, every new vector being
orthogonalised twice against the whole basis, and its Ritz pairs, the eigenpairs of ``A`` projected on it, come nearer
to the extreme eigenpairs of ``A``.

Where ``A`` is symmetric, each entry of the projection is computed twice: ``u·Av`` from the product of ``v``, and
``v·Au`` from the product of ``u``. Where the two differ, the products are noisy, or the matrix is not symmetric.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.linear import LinearOperator, space_of
from lyapunov_lightning.curvature.solvers.hidden import Projected, chance_of_less, largest_component

_ROWS_AT_ONCE = 8
"""Vectors that are allocated at a time: the basis takes the memory that it needs, and is never copied to grow."""

_NEGLIGIBLE_RESIDUAL = 1e-8
"""Residual, relative to the operator's norm, below which a pair has converged whatever its value: the error of the
eigenvalue goes with the square of the residual, so it is then known to the rounding error of double precision."""

_CHANCE = 0.1
"""The chance, at most, that the start of a search hides an eigenvalue beyond the tolerance of an outermost one: for the
worst place of that eigenvalue. Of 560 searches from random starts for ends of clustered, repeated, huge-ranged and
indefinite spectra and of ones like a network's none was wrong with 0.1, in 11.1 products each; 3 with 0.2, in 10.4; 5
with 0.3, in 10.1; and 15 where the distance to the next Ritz value was believed, in 9.1."""

_CHANCE_OF_MORE = 0.01
"""The chance that it hides one beyond the error that is stated, where that is less than the tolerance."""

_EXCESSES = torch.logspace(-4, 4, 97, dtype=torch.float64, device="cpu")
"""How far beyond a value an eigenvalue is looked for, in units of its tolerance."""


@dataclass(frozen=True)
class Target:
    """Which eigenpairs are wanted, and how exactly.

    Attributes:
        largest: How many of the upper end.
        smallest: How many of the lower end.
        tol: Relative tolerance of the residuals.
        value_tol: Relative tolerance of the errors of the eigenvalues, in addition to `tol`; none if None.

    """

    largest: int
    smallest: int
    tol: float
    value_tol: float | None = None

    @property
    def count(self) -> int:
        """How many in all."""
        return self.largest + self.smallest

    @property
    def ends_alone(self) -> bool:
        """Whether no more is wanted than the outermost eigenvalues."""
        return self.largest <= 1 and self.smallest <= 1

    @property
    def values_alone(self) -> bool:
        """Whether no more is wanted than the values of the ends, which are right whatever their multiplicity."""
        return self.ends_alone and self.value_tol is not None

    def is_met(self, values: Tensor, residuals: Tensor, value_errors: Tensor, negligible: float) -> Tensor:
        """Which pairs meet the tolerances. A residual below `negligible` meets them whatever the eigenvalue."""
        converged = residuals <= (self.tol * values.abs()).clamp_min(negligible)
        if self.value_tol is not None:
            converged &= value_errors <= (self.value_tol * values.abs()).clamp_min(negligible)
        return converged


@dataclass(frozen=True)
class RitzPairs:
    """The wanted Ritz pairs of a basis, and how near the next ones come to them.

    Attributes:
        values: The Ritz values, the upper end descending, then the lower end ascending.
        coefficients: The Ritz vectors' coefficients in the basis, one column each.
        residuals: Bounds on the residuals.
        value_errors: Estimates of how far the values are from eigenvalues, at most the residuals; where the values of
            the ends alone are wanted, from the outermost ones.
        growing: The part of the residuals that further products can reduce: all but what was cut off.
        converged: Which of them meet the tolerance, not counting the noise of the products, which further products do
            not reduce.
        negligible: Residual below which a pair counts as converged whatever its value.
        next_largest: Upper bound on the largest Ritz value that is not wanted, its residual included.
        next_smallest: Lower bound on the smallest Ritz value that is not wanted, its residual included.
        extent: The smallest and the largest Ritz value of all.

    """

    values: Tensor
    coefficients: Tensor
    residuals: Tensor
    value_errors: Tensor
    growing: Tensor
    converged: Tensor
    negligible: float
    next_largest: float
    next_smallest: float
    extent: tuple[float, float]

    def may_be_overtaken(self, target: Target, margin: float = 0.0) -> bool:
        """Whether a Ritz pair that is not wanted may yet come to lie beyond the wanted ones.

        Args:
            target: What is wanted.
            margin: By how much less also counts, relative to the wanted value.

        """
        # Both may be off by their residuals. Only if the intervals do not overlap is the order of the two certain.
        reach = self.residuals - margin * self.values.abs()
        last = target.largest - 1
        beyond_largest = target.largest > 0 and self.next_largest > float(self.values[last] + reach[last])
        beyond_smallest = target.smallest > 0 and self.next_smallest < float(self.values[-1] - reach[-1])
        return beyond_largest or beyond_smallest


class KrylovBasis:
    """An orthonormal basis ``V`` with the projection ``G = V A Vᵀ`` and what is known of ``A Vᵀ - Vᵀ G``.

    The first `length` rows of the storage are the basis; the next row is the direction in which it grows. The residual
    of the basis has one column in that direction (`_coupling` times it, for the newest vector alone, or for all kept
    Ritz vectors just after a restart), and what was cut off when a new direction was begun (`_leaks`).

    Args:
        operator: The operator ``A``.
        capacity: The most vectors that the basis may hold.
        generator: Source of random directions, on the CPU.

    Attributes:
        asymmetry: By how much the two sides of the projection differ at most, in the unit of the eigenvalues.
        capacity: The most vectors that the basis may hold.
        length: How many it holds.
        is_full: Whether it must be compressed before it can grow.
        is_complete: Whether it spans the whole space, so that the Ritz pairs are the eigenpairs.

    """

    def __init__(self, operator: LinearOperator, capacity: int, generator: torch.Generator) -> None:
        self.space = space_of(operator)
        self._operator = operator
        self._generator = generator
        self._blocks: list[Tensor] = []
        self._projection = torch.zeros(capacity, capacity, dtype=torch.float64, device="cpu")
        self._coupling = torch.zeros(0, dtype=torch.float64, device="cpu")
        self._leaks = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
        self._norm = 0.0
        self._familiarity = 1.0
        self._restarts: list[tuple[Projected, Tensor]] = []
        self.asymmetry = 0.0
        self.capacity = capacity
        self._resize(0)

    @property
    def rounding(self) -> float:
        """What the rounding of a product may amount to: no residual is known better than this."""
        # Norms are roots of sums of squares, and below 1.5e-154 a square is 0 in float64: what is left of a product of
        # an operator of norm 1e-200 would count as nothing, and a value that is wrong by a third as exact.
        return max(10 * torch.finfo(self.space.dtype).eps * self._norm, math.sqrt(torch.finfo(torch.float64).tiny))

    def begin(self, direction: Tensor | None = None, familiarity: float = 1.0) -> None:
        """Grow in a new direction, a random one if none is given, and give up the present one.

        Args:
            direction: The direction.
            familiarity: How much more than a random vector it has of an eigenvector that may have been missed.

        """
        # Without the old direction A V is no longer known exactly: what pointed along it is missing from the
        # projection, and counts for the residuals from now on.
        if bool(self._coupling.any()):
            self._leaks = torch.cat([self._leaks.reshape(-1, self.length), self._coupling[None]])
        self._coupling = torch.zeros(self.length, dtype=torch.float64, device="cpu")
        if self.length == 0:
            self._familiarity = familiarity
        row = self._room(self.length)
        row.copy_(self.space.random(self._generator) if direction is None else direction)
        row.div_(self.space.norm(row))
        self.space.orthonormalise(row, self._rows(self.length))

    def expand(self) -> None:
        """Take the growing direction into the basis: one product, and one read of the numbers that come of it."""
        length, space = self.length, self.space
        row = self._room(length + 1)
        row.copy_(self._operator.matvec(self._room(length)))
        # Against the whole basis, although exact arithmetic would ask for the last two vectors alone: rounding brings
        # the converged ones back, as copies of eigenvalues that are not there (C. Paige, 1972).
        found, norm = space.orthogonalise(row, self._rows(length + 1))
        numbers = space.agreed(torch.cat([found, norm.reshape(1)]))
        if not bool(torch.isfinite(numbers).all()):
            raise NonFiniteCurvatureError
        column, remainder = numbers[:-1], float(numbers[-1])
        # `_coupling` is what the products of the basis say of this vector. Of a part that was cut off they say nothing,
        # so there the vector's own product has to do for both sides.
        known = column[:-1] if len(self._leaks) else self._coupling
        self.asymmetry = max(self.asymmetry, float(torch.linalg.vector_norm(column[:-1] - known)))
        self._projection[: length + 1, length] = column
        self._projection[length, :length] = known
        self._norm = max(self._norm, float(torch.linalg.vector_norm(column)), remainder)
        self._leaks = torch.nn.functional.pad(self._leaks, (0, 1)) if len(self._leaks) else self._leaks
        self._coupling = torch.zeros(length + 1, dtype=torch.float64, device="cpu")
        self._resize(length + 1)
        if self.is_complete:
            return
        if remainder > self.rounding:
            self._coupling[-1] = remainder
            row.div_(remainder)
        else:
            # The basis spans an invariant subspace. What is left of the product is rounding, whose direction means
            # nothing, and the rest of the space is not reached from here.
            self.begin()

    def ritz(self, target: Target) -> RitzPairs:
        """The wanted Ritz pairs."""
        values, vectors = self.eigh()
        projection = self._projection[: self.length, : self.length]
        # ‖A V y − θ V y‖ = |coupling · y| for a Ritz vector y: the residual needs no product of its own.
        growing = (vectors.T @ self._coupling).abs().clamp_min(self.rounding)
        bounds = growing + (self._leaks @ vectors).abs().sum(dim=0) if len(self._leaks) else growing
        wanted = both_ends(self.length, target.largest, target.smallest)
        below, above = target.smallest, self.length - target.largest
        errors = _value_errors(values, bounds)[wanted]
        # An eigenvalue that is zero to rounding has no digits to be relative to.
        negligible = max(
            2 * self.rounding * (1 + len(self._leaks)), min(_NEGLIGIBLE_RESIDUAL, target.tol / 100) * self._norm
        )
        # After a part was cut off, the components along the start are not known any more.
        is_hiding = target.values_alone and not self.is_complete and not len(self._leaks)
        if is_hiding:
            errors = torch.maximum(errors, self._hidden(target, values[wanted], negligible))
        # What no further product can reduce is not waited for, but counts for the bounds.
        converged = target.is_met(values[wanted], bounds[wanted], errors, max(negligible, self.asymmetry))
        # The Ritz pairs are of the symmetric part; the antisymmetric part of the projection is orthogonal to the rest
        # of the residual.
        bounds = torch.hypot(bounds, torch.linalg.vector_norm((projection - projection.T) / 2 @ vectors, dim=0))
        errors = errors.clamp_min(max(self.rounding, self.asymmetry))
        errors = errors if is_hiding else torch.minimum(errors, bounds[wanted])
        return RitzPairs(
            values=values[wanted],
            coefficients=vectors[:, wanted],
            residuals=bounds[wanted],
            value_errors=errors,
            growing=growing[wanted],
            converged=converged,
            negligible=negligible,
            next_largest=float((values + bounds)[above - 1]) if below < above else -math.inf,
            next_smallest=float((values - bounds)[below]) if below < above else math.inf,
            extent=(float(values[0]), float(values[-1])),
        )

    def _hidden(self, target: Target, values: Tensor, negligible: float) -> Tensor:
        """How far beyond each of the outermost values an eigenvalue may lie that the start hides."""
        assert target.value_tol is not None
        allowed = (target.value_tol * values.abs()).clamp_min(negligible)
        signs = torch.tensor([1.0] * target.largest + [-1.0] * target.smallest, dtype=torch.float64, device="cpu")
        found = []
        for value, unit, sign in zip(values, allowed, signs, strict=True):
            beyond = value + sign * unit * _EXCESSES
            component = largest_component(beyond, self.projected(), self._restarts)
            chance = chance_of_less(component / self._familiarity, self.space.size)
            likely, possible = (
                float(unit * _EXCESSES[min(int((chance > limit).sum()), len(_EXCESSES) - 1)])
                for limit in (_CHANCE, _CHANCE_OF_MORE)
            )
            found.append(possible if possible <= unit else max(likely, float(unit)))
        return torch.tensor(found, dtype=torch.float64, device="cpu")

    def projected(self) -> Projected:
        """The basis in its Ritz vectors."""
        values, vectors = self.eigh()
        return Projected(values, vectors, vectors.T @ self._coupling)

    def eigh(self) -> tuple[Tensor, Tensor]:
        """All Ritz values, ascending, and the Ritz vectors' coefficients in the basis, one column each."""
        projection = self._projection[: self.length, : self.length]
        values, vectors = torch.linalg.eigh((projection + projection.T) / 2)
        return values, vectors

    def compress(self, largest: int, smallest: int) -> None:
        """Keep the Ritz vectors of both ends as the basis, and the direction in which it grows."""
        projected = self.projected()
        kept = both_ends(self.length, largest, smallest)
        self._restarts.append((projected, kept))
        rotation = projected.vectors[:, kept]
        before, length = rotation.shape
        self.space.combine(rotation.T, self._rows(before), self._rows(length))
        self._room(length).copy_(self._room(before))
        # Rotated and not set to the Ritz values, which it would be for a symmetric matrix: what is antisymmetric in it
        # has to count after a restart as before.
        projection = rotation.T @ self._projection[:before, :before] @ rotation
        self._projection.zero_()
        self._projection[:length, :length] = projection
        self._coupling = rotation.T @ self._coupling
        self._leaks = self._leaks @ rotation if len(self._leaks) else self._leaks
        self._resize(length)

    def combine(self, *coefficients: Tensor) -> list[Tensor]:
        """The vectors with these coefficients in the basis, one row for each column, in one tensor for each argument.

        All in one pass through the basis, which for a few vectors is what takes the time.
        """
        vectors = [self.space.empty(columns.shape[1]) for columns in coefficients]
        self.space.combine(torch.cat(coefficients, dim=1).T, self._rows(self.length), vectors)
        return vectors

    def _resize(self, length: int) -> None:
        self.length = length
        self.is_full = length == self.capacity
        self.is_complete = length == self.space.size

    def _room(self, index: int) -> Tensor:
        """The row of this index; the storage grows by a block of rows where it needs to."""
        if index == len(self._blocks) * _ROWS_AT_ONCE:
            self._blocks.append(self.space.empty(min(_ROWS_AT_ONCE, self.capacity + 1 - index)))
        return self._blocks[index // _ROWS_AT_ONCE][index % _ROWS_AT_ONCE]

    def _rows(self, count: int) -> list[Tensor]:
        """The first rows, in blocks."""
        starts = range(0, count, _ROWS_AT_ONCE)
        return [block[: count - start] for start, block in zip(starts, self._blocks, strict=False)]


def both_ends(length: int, largest: int, smallest: int) -> Tensor:
    """Positions in an ascending list: the last ones from the top down, then the first ones from the bottom up."""
    top = torch.arange(length - 1, length - 1 - largest, -1, device="cpu")
    return torch.cat([top, torch.arange(smallest, device="cpu")])


def _value_errors(values: Tensor, bounds: Tensor) -> Tensor:
    """The residual, or where that is less its square over the distance to the next eigenvalue (T. Kato, G. Temple).

    Of that eigenvalue no more is known than that it lies within the residual of the next Ritz value.
    """
    nearest = torch.full_like(values, math.inf)
    nearest[:-1] = values.diff() - bounds[1:]
    nearest[1:] = torch.minimum(nearest[1:], values.diff() - bounds[:-1])
    return torch.where(nearest > bounds, bounds.square() / nearest, bounds)
