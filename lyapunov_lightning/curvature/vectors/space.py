"""The vectors of the eigen-solvers: what is computed with them, and how parameters form them.

A `VectorSpace` is the one place that knows how vectors are stored. Solvers take inner products, norms, random vectors
and combinations from it, so that they are the same for a vector that is whole on every rank as for one in pieces.

Eigen-solvers work on flat vectors and autograd on lists of tensors. A `FlatLayout` is the fixed correspondence between
the two: parameters in the order given, each one once, row-major.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import cast

import torch
from torch import Tensor

from lyapunov_lightning.curvature.vectors.ranks import Ranks

_NUMBERS_AT_ONCE = 2**18
"""Numbers that are multiplied, or converted to float64, at a time: 2 MiB in float64, which stay in the cache of a core.
The memory of a whole vector in float64 is never needed."""

_SUMMED_AT_ONCE = 2**9
"""Squares that are summed up in float32 where a few digits will do; these sums are added in float64."""

_SMALL = 1e-12
"""A norm above it, and below its inverse, is of numbers whose squares float32 can hold, or that do not count."""

_FELT = 1e-5
"""Component, relative to all of them, that float32 tells from rounding. The first vectors of a Krylov basis have none
of a product."""

_DRAWN_AT_ONCE = 2**20
"""Random numbers that are drawn at a time. It is part of what a seed means: PyTorch draws other numbers if it is asked
for as many in pieces of another length."""


class VectorSpace:
    """Flat vectors of one length, dtype and device, each of them whole on every rank.

    What it computes is exact to the rounding of the dtype, whatever autocast and reduced-precision matrix products are
    in force around it. Squares are summed in float64, so that neither the length nor the unit of a vector matters, and
    inner products pairwise, so that the length does not.

    Args:
        size: The length of the vectors.
        dtype: Their dtype.
        device: Their device.
        ranks: The ranks that compute with them; a single one if None.

    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device, ranks: Ranks | None = None) -> None:
        self.size = size
        self.dtype = dtype
        self.device = device
        self._ranks = Ranks() if ranks is None else ranks

    def on(self, device: torch.device) -> "VectorSpace":
        """The space of the same vectors on another device."""
        return VectorSpace(self.size, self.dtype, device, self._ranks)

    @property
    def length(self) -> int:
        """How many of a vector's numbers this rank holds: the length of the tensors that stand for vectors."""
        return self.size

    @property
    def vector_bytes(self) -> int:
        """The memory of a vector, on the rank that has most of it."""
        return self.size * self.dtype.itemsize

    def empty(self, count: int) -> Tensor:
        """Room for some vectors, one row each."""
        return torch.empty(count, self.length, dtype=self.dtype, device=self.device)

    def zeros(self) -> Tensor:
        """A zero vector of shape ``(length,)``."""
        return torch.zeros(self.length, dtype=self.dtype, device=self.device)

    def random(self, generator: torch.Generator) -> Tensor:
        """A vector of independent standard normal numbers, the same on every device and for any number of ranks.

        Args:
            generator: Their source, on the CPU.

        """

        def draw(count: int) -> Tensor:
            return torch.randn(count, generator=generator, dtype=self.dtype, device="cpu")

        return self._own(RandomNumbers(draw, self.size))

    def random_signs(self, generator: torch.Generator) -> Tensor:
        """A vector of independent signs, 1 or -1 with equal probability, the same on every device.

        Args:
            generator: Their source, on the CPU.

        """

        def draw(count: int) -> Tensor:
            return torch.randint(0, 2, (count,), generator=generator, dtype=torch.int8, device="cpu")

        return self._own(RandomNumbers(draw, self.size)).to(self.dtype).mul_(2).sub_(1)

    def _own(self, numbers: "RandomNumbers") -> Tensor:
        """This rank's part of a vector whose numbers are drawn in their order."""
        return numbers.take(self.size).to(self.device)

    def adopt(self, vectors: Tensor, name: str) -> Tensor:
        """One vector, or one for each row, of any dtype and on any device, as vectors of this space.

        Args:
            vectors: Shape ``(length,)`` or ``(k, length)``.
            name: What to call them in an error.

        Returns:
            Shape ``(k, length)``, possibly the same memory.

        Raises:
            ValueError: If they have another shape, or are not finite.

        """
        if vectors.ndim not in (1, 2) or vectors.shape[-1] != self.length:
            raise ValueError(f"`{name}` should have rows of length {self.length}, got shape {tuple(vectors.shape)}.")
        rows = vectors.detach().to(dtype=self.dtype, device=self.device)
        rows = rows[None] if rows.ndim == 1 else rows
        # The sum needs no memory of the size of the vectors. It may overflow where no number does, so only where it is
        # not finite are the numbers looked at one by one.
        if not bool(torch.isfinite(rows.sum())) and not bool(torch.isfinite(rows).all()):
            raise ValueError(f"`{name}` should be finite.")
        return rows

    def inner(self, rows: Tensor, vector: Tensor, *, roughly: bool = False) -> Tensor:
        """Inner products.

        Args:
            rows: Shape ``(k, length)``, or ``(length,)`` for a single one.
            vector: Shape ``(length,)``.
            roughly: Whether one matrix product will do, which takes half the time, because what it leaves of a
                component is taken out once more.

        Returns:
            Shape ``(k,)``, or a scalar, on the device.

        """
        with self._exactly():
            return rows @ vector if roughly else self._own_inner(rows, vector)

    def _own_inner(self, rows: Tensor, vector: Tensor) -> Tensor:
        """Those of this rank's part of the vectors.

        A matrix product adds thousands of numbers to one float32 sum. Where vectors have a few large numbers and many
        tiny ones, as in the Krylov space of an operator with a large null space, the tiny ones are lost in it: unit
        vectors of 100,000 numbers stayed 4e-5 from orthogonal in every pass, and residuals of 1e-5 of the norm were out
        of reach. So the products are summed pairwise, in pieces that need little room, and few of them.
        """
        if vector.dtype is torch.float64:
            return rows @ vector
        count = len(rows) if rows.ndim == 2 else 1
        length = max(_NUMBERS_AT_ONCE // max(count, 1), len(vector) // 64, 1)
        if length >= len(vector):
            return (rows * vector).sum(dim=-1)
        pieces = zip(rows.split(length, dim=-1), vector.split(length), strict=True)
        return torch.stack([(row * part).sum(dim=-1) for row, part in pieces]).sum(dim=0)

    def inner_of_parts(self, first: Tensor, second: Tensor, parts: Sequence[Sequence[slice]]) -> Tensor:
        """The shares of some parts of the coordinates in an inner product.

        Args:
            first: Shape ``(length,)``.
            second: Shape ``(length,)``.
            parts: For each part where in these tensors its coordinates are.

        Returns:
            Shape ``(len(parts),)``, on the device.

        """
        found = first.new_zeros(len(parts))
        with self._exactly():
            for place, part in enumerate(parts):
                for where in part:
                    found[place] += self._own_inner(first[where], second[where])
        return found

    def norm(self, vector: Tensor) -> Tensor:
        """The Euclidean norm, a float64 scalar on the device."""
        return self._own_norm(vector)

    def _own_norm(self, vector: Tensor) -> Tensor:
        """The norm of this rank's part of the vector."""
        if self.device.type == "mps":  # which has no float64
            return cast(Tensor, torch.linalg.vector_norm(vector))
        # In float32 the square of 1e-23 is zero and that of 1e20 infinite, and a sum over 1e8 parameters, one by one,
        # would stop to grow where a square is less than 6e-8 of it.
        pieces = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in vector.split(_NUMBERS_AT_ONCE)]
        norm: Tensor = pieces[0] if len(pieces) == 1 else torch.linalg.vector_norm(torch.stack(pieces))
        return norm

    def _rough_norm(self, vector: Tensor) -> Tensor:
        """The norm to a few digits, in a tenth of the time where the other takes a conversion to float64."""
        whole = len(vector) // _SUMMED_AT_ONCE * _SUMMED_AT_ONCE
        if self.device.type != "cpu" or not whole:
            return self.norm(vector)
        parts = torch.linalg.vector_norm(vector[:whole].view(-1, _SUMMED_AT_ONCE), dim=1).double()
        rest = torch.linalg.vector_norm(vector[whole:]).double()
        norm = torch.hypot(torch.linalg.vector_norm(parts), rest)
        return norm if _SMALL < float(norm) < 1 / _SMALL else self.norm(vector)

    def subtract(self, vector: Tensor, coefficients: Tensor, rows: Tensor) -> None:
        """Take a combination of rows from a vector, in place.

        Args:
            vector: Shape ``(length,)``.
            coefficients: Shape ``(k,)``.
            rows: Shape ``(k, length)``.

        """
        with self._exactly():
            vector.addmv_(rows.T, coefficients.to(vector), alpha=-1)

    def orthogonalise(self, vector: Tensor, blocks: Sequence[Tensor], *, once: bool = False) -> tuple[Tensor, Tensor]:
        """Take the components along orthonormal vectors out of another one, twice, in place.

        The second time takes out what the rounding of the first has left. Twice is enough (W. Kahan, in B. Parlett,
        "The symmetric eigenvalue problem", 1980, section 6.9). Where orthogonality is lost, Lanczos finds copies
        of eigenvalues that are not there.

        Args:
            vector: Shape ``(length,)``.
            blocks: The orthonormal vectors, in blocks of some rows each.
            once: Whether the first time may do: among a few vectors, where much is left of this one.

        Returns:
            The components, one for each row, and the norm of what is left of the vector.

        """
        # The components are what both passes took out: the coefficients of the vector as it was given. The first pass
        # may be rough, since its errors are themselves components that the second one takes out.
        if once:
            return self._take_out_what_counts(vector, blocks), self._rough_norm(vector)
        components = self.take_out(vector, blocks, roughly=True) + self.take_out(vector, blocks)
        return components, self.norm(vector)

    def _take_out_what_counts(self, vector: Tensor, blocks: Sequence[Tensor]) -> Tensor:
        """The same, once, and from the first component on that is more than rounding; returns all of them."""
        parts = [self.inner(block, vector, roughly=True) for block in blocks]
        components = torch.cat(parts)
        first = 0
        if self.device.type == "cpu":  # elsewhere a look at the numbers would wait for them
            counts = components.abs() > _FELT * torch.linalg.vector_norm(components)
            first = int(counts.int().argmax()) if bool(counts.any()) else len(components)
        for block, part in zip(blocks, parts, strict=True):
            skipped = min(first, len(block))
            first -= skipped
            if skipped < len(block):
                self.subtract(vector, part[skipped:], block[skipped:])
        return components

    def orthonormalise(self, vector: Tensor, *groups: Sequence[Tensor]) -> Tensor:
        """Make a vector a unit vector that is orthogonal to others, in place, by Gram and Schmidt.

        Args:
            vector: Shape ``(length,)``.
            *groups: Orthonormal vectors, each group in blocks of some rows. The components along one group are taken
                out at once, and before those along the next one.

        Returns:
            The length of what was left of the vector, a scalar on the device; 0 only for a vector that vanishes.

        """
        tiny = torch.finfo(vector.dtype).tiny
        norms = []
        held = [[block for block in blocks if len(block)] for blocks in groups]
        # Rounding is relative to the length before. In float32 the first pass takes a vector that is 1e-4 away from
        # the span to components of 6e-4 of its new length; the second pass takes these out to rounding.
        for roughly in (True, False):
            for blocks in held:
                self.take_out(vector, blocks, roughly=roughly)
            norms.append(self.norm(vector))
            vector.div_(norms[-1].clamp_min(tiny))  # what vanishes stays zero, and does not become NaN
        return norms[0] * norms[1]

    def take_out(self, vector: Tensor, blocks: Sequence[Tensor], *, roughly: bool = False) -> Tensor:
        """Take the components along orthonormal vectors out of another one, once, in place; returns them."""
        parts = [self.inner(block, vector, roughly=roughly) for block in blocks]
        for block, part in zip(blocks, parts, strict=True):
            self.subtract(vector, part, block)
        return torch.cat(parts) if parts else vector.new_zeros(0)

    def combine(self, coefficients: Tensor, blocks: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Combine vectors, a piece at a time, so that the result may take the memory of what is combined.

        Args:
            coefficients: Shape ``(k, m)``: the coefficients of one combination in each row.
            blocks: The m vectors, in blocks of some rows each.
            out: Where the k combinations are written, in blocks of some rows each; the memory may be that of `blocks`.

        """
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        coefficients = coefficients.to(self.device, wide)
        # At least 2048 numbers a piece, or the calls would take longer than the arithmetic; at most what stays in the
        # cache, and at most 1/256 of a vector, or the float64 copies would be memory that counts.
        length = max(1, min(_NUMBERS_AT_ONCE // len(coefficients.T), max(2048, blocks[0].shape[1] // 256)))
        with self._exactly():
            for start in range(0, blocks[0].shape[1], length):
                piece = torch.cat([block[:, start : start + length] for block in blocks]).to(wide)
                combined = coefficients @ piece[: coefficients.shape[1]]
                for block, part in zip(out, combined.split([len(block) for block in out]), strict=True):
                    block[:, start : start + length] = part

    def combine_roughly(self, coefficients: Tensor, blocks: Sequence[Tensor], out: Tensor) -> None:
        """Combine vectors in their own dtype, in a quarter of the time; the result has memory of its own.

        Args:
            coefficients: Shape ``(k, m)``: the coefficients of one combination in each row.
            blocks: The m vectors, in blocks of some rows each.
            out: Shape ``(k, length)``: where the combinations are written.

        """
        with self._exactly():
            for row, numbers in zip(out, coefficients.to(out), strict=True):
                row.zero_()
                for block, part in zip(blocks, numbers.split([len(block) for block in blocks]), strict=True):
                    row.addmv_(block.T, part)

    def is_like(self, other: "VectorSpace") -> bool:
        """Whether the vectors of another space are laid out alike."""
        return self.size == other.size

    def whole(self, vector: Tensor) -> Tensor:
        """A vector with the numbers of all ranks, of shape ``(size,)``; to be asked for by all of them together."""
        return vector

    def cut(self, vector: Tensor) -> Tensor:
        """This rank's part of a whole vector of shape ``(size,)``, as a tensor of shape ``(length,)``."""
        return vector

    def together(self) -> AbstractContextManager[None]:
        """Let what fails on one rank within a block end the block on all of them, see `Ranks.together`."""
        return self._ranks.together()

    def agreed(self, numbers: Tensor) -> Tensor:
        """Numbers that all ranks agree on, in float64 on the CPU, see `Ranks.agreed`."""
        return self._ranks.agreed(numbers)

    def all_say(self, yes: bool) -> bool:
        """Whether all ranks say yes, see `Ranks.all_say`."""
        return self._ranks.all_say(yes)

    @contextmanager
    def _exactly(self) -> Iterator[None]:
        """Keep autocast off: it would round both factors to half precision, and the inner products to three digits."""
        with torch.autocast(self.device.type, enabled=False):
            yield


def space_like(vector: Tensor) -> VectorSpace:
    """The space of plain vectors like this one, of shape ``(size,)``."""
    return VectorSpace(len(vector), vector.dtype, vector.device)


class RandomNumbers:
    """A sequence of random numbers, of which a part can be had without keeping all that come before.

    Args:
        draw: Draws so many further numbers.
        total: How many there are in the whole sequence.

    """

    def __init__(self, draw: Callable[[int], Tensor], total: int) -> None:
        self._draw = draw
        self._not_drawn = total
        self._left = draw(0)

    def take(self, count: int) -> Tensor:
        """The next numbers."""
        pieces = [self._left[:count]]
        self._left = self._left[count:]
        while (missing := count - sum(map(len, pieces))) > 0:
            drawn = self._draw(min(_DRAWN_AT_ONCE, self._not_drawn))
            self._not_drawn -= len(drawn)
            pieces.append(drawn[:missing])
            self._left = drawn[missing:]
        return pieces[-1] if len(pieces[-1]) == count else torch.cat(pieces)
