"""A Krylov basis that can be compressed: what every eigen-solver here grows.

The basis is an orthonormal one of ``span(v, Av, A²v, ...)``. It grows by one product a step, every new vector being
orthogonalised twice against the whole basis, and its Ritz pairs, the eigenpairs of ``A`` projected on it, come nearer
to the extreme eigenpairs of ``A``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.linear import LinearOperator

_BLOCK = 8
"""Vectors that are allocated at a time: the basis takes the memory that it needs, and is never copied to grow."""

_SHARE_OF_THE_OTHER = 0.85
"""What the other end gets of the room beside the wanted Ritz vectors where it dominates: from 0.33 to 0.85 the products
that the lower end of a network's Hessian takes fell by up to 10 %."""

_NEGLIGIBLE = 1e-8
"""Residual, relative to the operator's norm, below which a pair has converged whatever its value: the eigenvalue is
then known to the rounding error of double precision."""


@dataclass(frozen=True)
class RitzPairs:
    """The wanted Ritz pairs of a basis, and how near the next ones come to them.

    Attributes:
        values: The Ritz values, the upper end descending, then the lower end ascending.
        coefficients: The Ritz vectors' coefficients in the basis, one column each.
        residuals: Bounds on the residuals.
        growing: The part of these that further products can reduce: all but what was cut off.
        converged: Which of them meet the tolerance.
        negligible: Residual below which a pair counts as converged whatever its value.
        next_largest: Upper bound on the largest Ritz value that is not wanted, its residual included.
        next_smallest: Lower bound on the smallest Ritz value that is not wanted, its residual included.
        extent: The smallest and the largest Ritz value of all.

    """

    values: Tensor
    coefficients: Tensor
    residuals: Tensor
    growing: Tensor
    converged: Tensor
    negligible: float
    next_largest: float
    next_smallest: float
    extent: tuple[float, float]


class KrylovBasis:
    """An orthonormal basis ``V`` with the projection ``T = V A Vᵀ`` and what is known of ``A Vᵀ - Vᵀ T``.

    The first `length` rows of the storage are the basis; the next row is the direction in which it grows. The residual
    of the basis has one column in that direction (`_coupling` times it, for the newest vector alone, or for all kept
    Ritz vectors just after a restart), and what was cut off when a new direction was begun (`_leaks`).

    Args:
        operator: The operator ``A``.
        capacity: The most vectors that the basis may hold.
        generator: Source of random directions, on the CPU.

    """

    def __init__(self, operator: LinearOperator, capacity: int, generator: torch.Generator) -> None:
        self._operator = operator
        self._generator = generator
        self._blocks: list[Tensor] = []
        self._projection = torch.zeros(capacity, capacity, dtype=torch.float64)
        self._coupling = torch.zeros(0, dtype=torch.float64)
        self._leaks = torch.zeros(0, 0, dtype=torch.float64)
        self._norm = 0.0
        self._next_check = 0
        self.capacity = capacity
        self.length = 0

    @property
    def is_full(self) -> bool:
        """Whether it must be compressed before it can grow."""
        return self.length == self.capacity

    @property
    def may_span_the_space(self) -> bool:
        """Whether it can grow until the Ritz pairs are the eigenpairs."""
        return self.capacity == self._operator.size

    @property
    def rounding(self) -> float:
        """What the rounding of a product may amount to: no residual is known better than this."""
        return 10 * torch.finfo(self._operator.dtype).eps * self._norm

    def begin(self, direction: Tensor | None = None) -> None:
        """Grow in a new direction, a random one if none is given, and give up the present one."""
        if bool(self._coupling.any()):
            leak = torch.zeros(1, self.length, dtype=torch.float64)
            leak[0] = self._coupling
            self._leaks = torch.cat([self._leaks.reshape(-1, self.length), leak])
        self._coupling = torch.zeros(self.length, dtype=torch.float64)
        if direction is None:
            direction = random_vector(self._operator, self._generator)
        self._grow_along(self._orthonormalised(direction))

    def expand(self) -> None:
        """Take the growing direction into the basis: one product."""
        operator, length = self._operator, self.length
        product = operator.matvec(self._row(length))
        product, coefficients = self._orthogonalised(product, length + 1)
        product, correction = self._orthogonalised(product, length + 1)
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
            self._grow_along(self._orthonormalised(random_vector(operator, self._generator)))

    @property
    def is_worth_checking(self) -> bool:
        """Whether the basis has grown enough since the Ritz values were last looked at."""
        return self.length >= self._next_check

    def ritz(self, largest: int, smallest: int, tol: float) -> RitzPairs:
        """The wanted Ritz pairs."""
        self._next_check = self.length + max(1, self.length // 16)
        values, vectors = self.eigh()
        growing = (vectors.T @ self._coupling).abs().clamp_min(self.rounding)
        bounds = growing + (self._leaks @ vectors).abs().sum(dim=0)
        wanted = both_ends(self.length, largest, smallest)
        below, above = smallest, self.length - largest
        # An eigenvalue that is zero beside the norm has no digits to be relative to.
        negligible = max(2 * self.rounding * (1 + len(self._leaks)), min(_NEGLIGIBLE, tol / 100) * self._norm)
        tolerance = (tol * values[wanted].abs()).clamp_min(negligible)
        return RitzPairs(
            values=values[wanted],
            coefficients=vectors[:, wanted],
            residuals=bounds[wanted],
            growing=growing[wanted],
            converged=bounds[wanted] <= tolerance,
            negligible=negligible,
            next_largest=float((values + bounds)[above - 1]) if below < above else -float("inf"),
            next_smallest=float((values - bounds)[below]) if below < above else float("inf"),
            extent=(float(values[0]), float(values[-1])),
        )

    def kept_at_restart(self, ritz: RitzPairs, largest: int, smallest: int) -> tuple[int, int]:
        """How many Ritz vectors of each end a restart keeps: the wanted ones, and half of the room beside them.

        The vectors next to the wanted ones hasten the convergence of their end, so they are kept for ends that still
        have some way to go. An end that is not wanted but reaches further than the wanted one is what the basis would
        turn to again after every restart, so most of the room is for that one's vectors.
        """
        spare = (self.capacity - largest - smallest) // 2
        of_the_other = int(_SHARE_OF_THE_OTHER * spare)
        if largest == 0 and ritz.extent[1] > -float(ritz.values[0]):
            return of_the_other, smallest + spare - of_the_other
        if smallest == 0 and -ritz.extent[0] > float(ritz.values[0]):
            return largest + spare - of_the_other, of_the_other
        top = largest > 0 and not bool(ritz.converged[:largest].all())
        bottom = smallest > 0 and not bool(ritz.converged[largest:].all())
        if top == bottom:
            top = largest > 0
            bottom = smallest > 0
        top_share = spare * top // (top + bottom)
        return largest + top_share, smallest + spare - top_share

    def compress(self, largest: int, smallest: int) -> None:
        """Keep the Ritz vectors of both ends as the basis, and the direction in which it grows."""
        values, vectors = self.eigh()
        kept = both_ends(self.length, largest, smallest)
        rotation = vectors[:, kept]
        growing = self._row(self.length).clone()
        self._coupling = rotation.T @ self._coupling
        self._leaks = self._leaks @ rotation
        self._rotate(rotation)
        self.length = len(kept)
        self._grow_along(growing)
        self._projection.zero_()
        self._projection[: self.length, : self.length] = torch.diag(values[kept])
        self._next_check = self.length + 1

    def combine(self, coefficients: Tensor) -> Tensor:
        """The vectors with these coefficients in the basis, one row for each column; ends the use of the basis."""
        self._rotate(coefficients)
        count = coefficients.shape[1]
        needed = -(-count // _BLOCK)
        del self._blocks[needed:]
        # Copied, so that who keeps the vectors does not keep the rest of a block.
        return torch.cat(
            [block[: count - start] for start, block in zip(range(0, count, _BLOCK), self._blocks, strict=True)]
        )

    def _row(self, index: int) -> Tensor:
        return self._blocks[index // _BLOCK][index % _BLOCK]

    def _grow_along(self, direction: Tensor) -> None:
        """Put the direction behind the basis."""
        if self.length == len(self._blocks) * _BLOCK:
            rows = min(_BLOCK, self.capacity + 1 - self.length)
            self._blocks.append(direction.new_empty(rows, len(direction)))
        self._row(self.length).copy_(direction)

    def _orthogonalised(self, vector: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The vector without its components along the first rows, and these components."""
        rows = [block[: length - start] for start, block in zip(range(0, length, _BLOCK), self._blocks, strict=False)]
        coefficients = torch.cat([block @ vector for block in rows])
        for block, part in zip(rows, coefficients.split(_BLOCK), strict=True):
            vector = vector.addmv(block.T, part, alpha=-1)
        return vector, coefficients

    def eigh(self) -> tuple[Tensor, Tensor]:
        """All Ritz values, ascending, and the Ritz vectors' coefficients in the basis, one column each."""
        values, vectors = torch.linalg.eigh(self._projection[: self.length, : self.length])
        return values, vectors

    def _rotate(self, rotation: Tensor) -> None:
        """Replace the basis by combinations of it, in slices of the long dimension to need no second basis."""
        size = self._operator.size
        kept, length = rotation.shape[1], rotation.shape[0]
        rotation = rotation.T.to(self._blocks[0])
        for start in range(0, size, max(1, size // 16)):
            columns = slice(start, start + max(1, size // 16))
            pieces = torch.cat([block[:, columns] for block in self._blocks])[:length]
            for first, rotated in zip(range(0, kept, _BLOCK), (rotation @ pieces).split(_BLOCK), strict=True):
                self._blocks[first // _BLOCK][: len(rotated), columns] = rotated

    def _orthonormalised(self, vector: Tensor) -> Tensor:
        for _ in range(2):
            if self.length:
                vector, _ = self._orthogonalised(vector, self.length)
            vector = vector / torch.linalg.vector_norm(vector)
        return vector


def both_ends(length: int, largest: int, smallest: int) -> Tensor:
    """Positions in an ascending list: the last ones from the top down, then the first ones from the bottom up."""
    top = torch.arange(length - 1, length - 1 - largest, -1)
    return torch.cat([top, torch.arange(smallest)])


def random_vector(operator: LinearOperator, generator: torch.Generator) -> Tensor:
    """A vector of independent standard normal numbers for the operator, the same on every device."""
    return torch.randn(operator.size, generator=generator, dtype=operator.dtype).to(operator.device)
