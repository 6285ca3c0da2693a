"""A Krylov basis that can be compressed: what every eigen-solver here grows.

The basis is an orthonormal one of ``span(v, Av, A²v, ...)``. It grows by one product a step, every new vector being
orthogonalised twice against the whole basis, and its Ritz pairs, the eigenpairs of ``A`` projected on it, come nearer
to the extreme eigenpairs of ``A``.

Where ``A`` is symmetric, each entry of the projection is computed twice: ``u·Av`` from the product of ``v``, and
``v·Au`` from the product of ``u``. Where the two differ, the products are noisy, or the matrix is not symmetric.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.linear import LinearOperator, space_of
from lyapunov_lightning.curvature.solvers.hidden import Projected, chance_of_less, largest_component

_ROWS_AT_ONCE = 8
"""Vectors that are allocated at a time: the basis takes the memory that it needs, and is never copied to grow."""

_ONCE_AMONG = 8
"""Vectors among which a product is orthogonalised once, where a few digits are wanted. In float32 and a large null
space they are orthogonal to 5e-6 then; among 12 it is 3e-4, among 20 nothing is left of it."""

_ROUGH_ERROR = 1e-5
"""Error of the values that comes of it, relative to the operator's norm."""

_MUCH_LEFT = 0.1
"""Share of a product that has to be left where the basis is taken out of it once, or that is done again: what rounding
leaves of the basis is 1e-5 of the product in float32, and ten times that of what is left."""

_LITTLE_LEFT = 0.1
"""What is left of a direction, once its share of a new vector is taken out, from which on its length is measured: in
float32 Pythagoras tells 0.1 to five digits, and 1e-4 to none."""

_NEGLIGIBLE_RESIDUAL = 1e-8
"""Residual, relative to the operator's norm, below which a pair has converged whatever its value: the error of the
eigenvalue goes with the square of the residual, so it is then known to the rounding error of double precision."""

_SHARE_OF_ENDS = 10.0
"""How many times the chance that was asked for is allowed where no more is wanted than the outermost values. It is that
for the worst place of an eigenvalue, and most of what was missed shows by where it is. Of 560 searches from random
starts for values of ends of clustered, repeated, huge-ranged and indefinite spectra and of ones like a network's none
was wrong with a chance of 0.1, in 11.1 products each; 3 with 0.2, in 10.4; 5 with 0.3, in 10.1; and 15 where the
distance to the next Ritz value was believed, in 9.1."""

_ROUNDINGS = 10.0
"""Nearer to a value than so many roundings of a product nothing is looked for."""

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
        max_missed: The chance, at most, that an eigenvalue beyond a wanted one was missed; any if None.

    """

    largest: int
    smallest: int
    tol: float
    value_tol: float | None = None
    max_missed: float | None = None

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

    @property
    def allowed_chance(self) -> float:
        """The chance of a missed eigenvalue with which a search may end."""
        if self.max_missed is None:
            return math.inf
        return self.max_missed * (_SHARE_OF_ENDS if self.ends_alone else 1.0)

    @property
    def signs(self) -> Tensor:
        """For each wanted pair, in which direction lies what is beyond it: 1 for the upper end, -1 for the lower."""
        return torch.tensor([1.0] * self.largest + [-1.0] * self.smallest, dtype=torch.float64, device="cpu")

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
    Ritz vectors just after a restart), and one in each direction that was set aside when a new one was begun (`_aside`,
    with what the products have of them in the rows of `_leaks`). All of these are orthogonal to the basis, since each
    new vector is taken out of them, and one that was set aside may be taken up again.

    Args:
        operator: The operator ``A``.
        capacity: The most vectors that the basis may hold.
        generator: Source of random directions, on the CPU.
        roughly: Whether a few digits of the Ritz values and vectors will do, for a third of the arithmetic.

    Attributes:
        asymmetry: By how much the two sides of the projection differ at most, in the unit of the eigenvalues.
        capacity: The most vectors that the basis may hold.
        length: How many it holds.
        is_full: Whether it must be compressed before it can grow.
        is_complete: Whether it spans the whole space, so that the Ritz pairs are the eigenpairs.

    """

    def __init__(
        self, operator: LinearOperator, capacity: int, generator: torch.Generator, *, roughly: bool = False
    ) -> None:
        self.space = space_of(operator)
        self._operator = operator
        self._generator = generator
        self._roughly = roughly
        self._blocks: list[Tensor] = []
        self._projection = torch.zeros(capacity, capacity, dtype=torch.float64, device="cpu")
        self._coupling = torch.zeros(0, dtype=torch.float64, device="cpu")
        self._aside: list[Tensor] = []
        self._leaks = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
        self._norm = 0.0
        self._familiarity = 1.0
        self._origin = 0
        self._restarts: list[tuple[Projected, Tensor]] = []
        self._eigh: tuple[Tensor, Tensor] | None = None
        self.asymmetry = 0.0
        self.capacity = capacity
        self._resize(0)

    def state_dict(self) -> dict[str, Any]:
        """All that the basis is, in tensors and plain values; the tensors are not copied."""
        for place, block in enumerate(self._blocks):
            # Memory that nothing was written to yet: what is in it is nobody's business.
            block[max(0, self.length + 1 - place * _ROWS_AT_ONCE) :].zero_()
        return {
            "blocks": list(self._blocks),
            "projection": self._projection,
            "coupling": self._coupling,
            "aside": list(self._aside),
            "leaks": self._leaks,
            "norm": self._norm,
            "familiarity": self._familiarity,
            "origin": self._origin,
            "restarts": [[*vars(before).values(), kept] for before, kept in self._restarts],
            "asymmetry": self.asymmetry,
            "length": self.length,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be the basis that `state_dict` was taken from, which had the same operator and the same capacity."""
        self._blocks = [self.space.adopt(block, "blocks") for block in state["blocks"]]
        self._projection = state["projection"]
        self._coupling = state["coupling"]
        self._aside = [self.space.adopt(vector, "aside")[0] for vector in state["aside"]]
        self._leaks = state["leaks"]
        self._norm = state["norm"]
        self._familiarity = state["familiarity"]
        self._origin = state["origin"]
        self._restarts = [(Projected(*before), kept) for *before, kept in state["restarts"]]
        self.asymmetry = state["asymmetry"]
        self._generator.set_state(state["generator"])
        self._resize(state["length"])

    @property
    def rounding(self) -> float:
        """What the rounding of a product may amount to: no residual is known better than this."""
        # Norms are roots of sums of squares, and below 1.5e-154 a square is 0 in float64: what is left of a product of
        # an operator of norm 1e-200 would count as nothing, and a value that is wrong by a third as exact.
        return max(10 * torch.finfo(self.space.dtype).eps * self._norm, math.sqrt(torch.finfo(torch.float64).tiny))

    def begin(self, direction: Tensor | None = None, familiarity: float = 1.0) -> None:
        """Grow in a new direction, a random one if none is given, and set the present one aside.

        Args:
            direction: The direction.
            familiarity: How much more than a random vector it has of an eigenvector that may have been missed.

        """
        if bool(self._coupling.any()):
            self._aside.append(self._room(self.length).clone())
            self._leaks = torch.cat([self._leaks, self._coupling[None]])
        self._familiarity = familiarity
        self._origin = self.length
        self._restarts = []
        self._turn(direction)

    def _turn(self, direction: Tensor | None = None) -> None:
        """Grow in a new direction."""
        self._coupling = torch.zeros(self.length, dtype=torch.float64, device="cpu")
        row = self._room(self.length)
        row.copy_(self.space.random(self._generator) if direction is None else direction)
        row.div_(self.space.norm(row))
        if self.length:
            self.space.orthonormalise(row, self._rows(self.length))

    def turn_to(self, ritz: RitzPairs) -> None:
        """Grow in the direction that has most of the residuals of the pairs that have not converged."""
        open_pairs = ritz.coefficients[:, ~ritz.converged]
        if not self._aside or not open_pairs.shape[1]:
            return
        size = ritz.values[~ritz.converged].abs().clamp_min(ritz.negligible)
        heaviest = int(((self._away() @ open_pairs).abs() / size).amax(dim=1).argmax())
        if heaviest:
            row, aside = self._room(self.length), self._aside[heaviest - 1]
            present = row.clone()
            row.copy_(aside)
            aside.copy_(present)
            away = self._away()
            self._coupling, self._leaks[heaviest - 1] = away[heaviest], away[0]

    def expand(self) -> None:
        """Take the growing direction into the basis: one product, and one read of the numbers that come of it."""
        length = self.length
        row = self._room(length + 1)
        row.copy_(self._operator.matvec(self._room(length)))
        once = self._roughly and length < _ONCE_AMONG
        beside = [self.space.inner(self._room(length), aside).double().reshape(1) for aside in self._aside]
        numbers = self._taken_out(row, *beside, once=once)
        shares, numbers = numbers[: len(beside)].tolist(), numbers[len(beside) :]
        if once and float(numbers[-1]) < _MUCH_LEFT * float(torch.linalg.vector_norm(numbers)):
            again = self._taken_out(row, once=False)
            numbers = torch.cat([numbers[:-1] + again[:-1], again[-1:]])
        if not bool(torch.isfinite(numbers).all()):
            raise NonFiniteCurvatureError
        column, remainder = numbers[:-1], float(numbers[-1])
        # What the products of the basis say of this vector.
        known = self._coupling + self._taken_in(shares)
        self.asymmetry = max(self.asymmetry, float(torch.linalg.vector_norm(column[:-1] - known)))
        self._projection[: length + 1, length] = column
        self._projection[length, :length] = known
        self._norm = max(self._norm, float(torch.linalg.vector_norm(column)), remainder)
        self._leaks = torch.nn.functional.pad(self._leaks, (0, 1))
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
            self._turn()

    def _taken_in(self, shares: Sequence[float]) -> Tensor:
        """Take the newest vector out of what was set aside; returns what the products had of it in there."""
        known = torch.zeros(self.length, dtype=torch.float64, device="cpu")
        row = self._room(self.length)
        for aside, leak, share in zip(self._aside, self._leaks, shares, strict=True):
            known += share * leak
            aside.sub_(row, alpha=share)
            left = math.sqrt(max(0.0, 1 - share**2))  # by Pythagoras, without a message of its own
            if left < _LITTLE_LEFT:
                # Much of it is rounding, which has a length of its own and lies along the basis, too. Divided by what
                # Pythagoras says it would grow from product to product, and in the end beyond all numbers.
                left = float(self.space.orthonormalise(aside, self._rows(self.length)))
                if left < 10 * torch.finfo(self.space.dtype).eps:
                    aside.zero_()
                    left = 0.0
            else:
                aside.div_(left)
            leak *= left
        return known

    def _taken_out(self, row: Tensor, *beside: Tensor, once: bool) -> Tensor:
        """Take the basis out of a product; returns other numbers, the components, and the norm of what is left."""
        # Against the whole basis, although exact arithmetic would ask for the last two vectors alone: rounding brings
        # the converged ones back, as copies of eigenvalues that are not there (C. Paige, 1972).
        found, norm = self.space.orthogonalise(row, self._rows(self.length + 1), once=once)
        return self.space.agreed(torch.cat([*beside, found, norm.reshape(1)]))

    def ritz(self, target: Target) -> RitzPairs:
        """The wanted Ritz pairs."""
        values, vectors = self.eigh()
        projection = self._projection[: self.length, : self.length]
        # This is what A V y − θ V y is made of for a Ritz vector y, so that the residual needs no product of its own.
        parts = self._away() @ vectors
        bounds = parts.abs().sum(dim=0).clamp_min(self.rounding)
        wanted = both_ends(self.length, target.largest, target.smallest)
        below, above = target.smallest, self.length - target.largest
        errors = _value_errors(values, bounds)[wanted]
        # An eigenvalue that is zero to rounding has no digits to be relative to.
        negligible = max(
            2 * self.rounding * (1 + len(self._leaks)), min(_NEGLIGIBLE_RESIDUAL, target.tol / 100) * self._norm
        )
        # What a direction that was set aside has of an eigenvector is not known, nor is then its component along the
        # start.
        is_hiding = target.values_alone and not self.is_complete and not len(self._leaks)
        is_hiding &= target.max_missed is not None
        if is_hiding:
            # Before the residuals are small enough, it would be computed for nothing.
            is_near = bool((bounds[wanted] <= (target.tol * values[wanted].abs()).clamp_min(negligible)).all())
            hidden = self._hidden(target, values[wanted], negligible) if is_near else bounds[wanted]
            errors = torch.maximum(errors, hidden)
        # What no further product can reduce is not waited for, but counts for the bounds.
        noise = max(self.asymmetry, _ROUGH_ERROR * self._norm if self._roughly else 0.0)
        converged = target.is_met(values[wanted], bounds[wanted], errors, max(negligible, noise))
        # The Ritz pairs are of the symmetric part; the antisymmetric part of the projection is orthogonal to the rest
        # of the residual.
        bounds = torch.hypot(bounds, torch.linalg.vector_norm((projection - projection.T) / 2 @ vectors, dim=0))
        errors = errors.clamp_min(max(self.rounding, noise))
        errors = errors if is_hiding else torch.minimum(errors, bounds[wanted])
        return RitzPairs(
            values=values[wanted],
            coefficients=vectors[:, wanted],
            residuals=bounds[wanted],
            value_errors=errors,
            converged=converged,
            negligible=negligible,
            next_largest=float((values + bounds)[above - 1]) if below < above else -math.inf,
            next_smallest=float((values - bounds)[below]) if below < above else math.inf,
            extent=(float(values[0]), float(values[-1])),
        )

    def _hidden(self, target: Target, values: Tensor, negligible: float) -> Tensor:
        """How far beyond each of the outermost values an eigenvalue may lie that the start hides."""
        assert target.value_tol is not None
        assert target.max_missed is not None
        allowed = (target.value_tol * values.abs()).clamp_min(negligible)
        found = []
        for value, unit, sign in zip(values, allowed, target.signs, strict=True):
            chance = self._chance(value + sign * unit * _EXCESSES)
            likely, possible = (
                float(unit * _EXCESSES[min(int((chance > limit).sum()), len(_EXCESSES) - 1)])
                for limit in (target.allowed_chance, target.max_missed)
            )
            found.append(possible if possible <= unit else max(likely, float(unit)))
        return torch.tensor(found, dtype=torch.float64, device="cpu")

    def missed_probability(self, target: Target, ritz: RitzPairs, *, exactly: bool = False) -> Tensor:
        """The chance, at most, that an eigenvalue beyond each of the wanted ones was missed.

        Beyond is what lies further out than the tolerance lets a value be. Where several pairs are wanted, they have to
        have been known before the present direction was begun.

        Args:
            target: What is wanted.
            ritz: The wanted pairs.
            exactly: Whether to leave out what the rounding of the products may hide, which no further ones lower.

        """
        if self.is_complete:
            return torch.zeros(target.count, dtype=torch.float64, device="cpu")
        tol = target.tol if target.value_tol is None else target.value_tol
        excess = (tol * ritz.values.abs()).clamp_min(ritz.negligible)
        if not target.values_alone:
            # What is no further out than the residual may be the value itself.
            excess = excess + ritz.residuals
        beyond = ritz.values + target.signs * excess.clamp_min(_ROUNDINGS * self.rounding)
        known = None if target.ends_alone else both_ends(self.length, target.largest, target.smallest)
        return self._chance(beyond, known, 0.0 if exactly else self.rounding)

    def _chance(self, beyond: Tensor, known: Tensor | None = None, rounding: float = 0.0) -> Tensor:
        """The chance, at most, that the present start hides eigenvectors of these eigenvalues."""
        component = largest_component(beyond, self.projected(), self._restarts, self._origin, known, rounding)
        return chance_of_less(component / self._familiarity, self.space.size).clamp_max(1)

    def projected(self) -> Projected:
        """The basis in its Ritz vectors."""
        values, vectors = self.eigh()
        return Projected(values, vectors, vectors.T @ self._coupling)

    def eigh(self) -> tuple[Tensor, Tensor]:
        """All Ritz values, ascending, and the Ritz vectors' coefficients in the basis, one column each."""
        if self._eigh is None:
            projection = self._projection[: self.length, : self.length]
            values, vectors = torch.linalg.eigh((projection + projection.T) / 2)
            self._eigh = values, vectors
        return self._eigh

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
        self._leaks = self._leaks @ rotation
        self._resize(length)

    def combine(self, *coefficients: Tensor) -> list[Tensor]:
        """The vectors with these coefficients in the basis, one row for each column, in one tensor for each argument.

        All in one pass through the basis, which for a few vectors is what takes the time.
        """
        vectors = [self.space.empty(columns.shape[1]) for columns in coefficients]
        if self._roughly:
            for columns, rows in zip(coefficients, vectors, strict=True):
                self.space.combine_roughly(columns.T, self._rows(self.length), rows)
            return vectors
        self.space.combine(torch.cat(coefficients, dim=1).T, self._rows(self.length), vectors)
        return vectors

    def _away(self) -> Tensor:
        """What the products of the basis have along each direction beside it, one row each: first the growing one."""
        return torch.cat([self._coupling[None], self._leaks])

    def _resize(self, length: int) -> None:
        self._eigh = None
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
