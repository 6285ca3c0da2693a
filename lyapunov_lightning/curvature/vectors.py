"""The vectors of the eigen-solvers: what is computed with them, and how parameters form them.

A `VectorSpace` is the one place that knows how vectors are stored. Solvers take inner products, norms, random vectors
and combinations from it, so that they are the same for a vector that is whole on every rank as for one in pieces.

Eigen-solvers work on flat vectors and autograd on lists of tensors. A `FlatLayout` is the fixed correspondence between
the two: parameters in the order given, each one once, row-major.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import reduce
from typing import cast

import torch
from torch import Tensor

from lyapunov_lightning.curvature.ranks import Ranks

_CHUNK = 2**18
"""Numbers that are multiplied, or converted to float64, at a time."""

_DRAWN = 2**20
"""Random numbers that are drawn at a time. It is part of what a seed means: the same ones come out in fewer or more
pieces only where each piece is drawn like this."""


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
        length = max(_CHUNK // max(count, 1), len(vector) // 64, 1)
        if length >= len(vector):
            return (rows * vector).sum(dim=-1)
        pieces = zip(rows.split(length, dim=-1), vector.split(length), strict=True)
        return torch.stack([(row * part).sum(dim=-1) for row, part in pieces]).sum(dim=0)

    def norm(self, vector: Tensor) -> Tensor:
        """The Euclidean norm, a float64 scalar on the device."""
        return self._own_norm(vector)

    def _own_norm(self, vector: Tensor) -> Tensor:
        """That of this rank's part of the vector."""
        if self.device.type == "mps":  # which has no float64
            return cast(Tensor, torch.linalg.vector_norm(vector))
        parts = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in vector.split(_CHUNK)]
        norm: Tensor = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts))
        return norm

    def subtract(self, vector: Tensor, coefficients: Tensor, rows: Tensor) -> None:
        """Take a combination of rows from a vector, in place.

        Args:
            vector: Shape ``(length,)``.
            coefficients: Shape ``(k,)``.
            rows: Shape ``(k, length)``.

        """
        with self._exactly():
            vector.addmv_(rows.T, coefficients.to(vector), alpha=-1)

    def orthogonalise(self, vector: Tensor, blocks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Take the components along orthonormal vectors out of another one, twice, in place.

        The second time takes out what the rounding of the first has left (W. Kahan: twice is enough), so that the first
        may be rough.

        Args:
            vector: Shape ``(length,)``.
            blocks: The orthonormal vectors, in blocks of some rows each.

        Returns:
            The components, one for each row, and the norm of what is left of the vector.

        """
        components = self.take_out(vector, blocks, roughly=True) + self.take_out(vector, blocks)
        return components, self.norm(vector)

    def take_out(self, vector: Tensor, blocks: Sequence[Tensor], *, roughly: bool = False) -> Tensor:
        """Take the components along orthonormal vectors out of another one, once, in place; returns them."""
        parts = [self.inner(block, vector, roughly=roughly) for block in blocks]
        for block, part in zip(blocks, parts, strict=True):
            self.subtract(vector, part, block)
        return torch.cat(parts) if parts else vector.new_zeros(0)

    def combine(self, coefficients: Tensor, blocks: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Combine vectors, a piece at a time to need no room beside.

        Args:
            coefficients: Shape ``(k, m)``: those of one combination in each row.
            blocks: The m vectors, in blocks of some rows each.
            out: Where the k combinations are written, in blocks of some rows each; the memory may be that of `blocks`.

        """
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        coefficients = coefficients.to(self.device, wide)
        # Not so many pieces that the calls take the time, nor so large ones that they leave the cache or count beside
        # the vectors themselves.
        length = max(1, min(_CHUNK // len(coefficients.T), max(2048, blocks[0].shape[1] // 256)))
        with self._exactly():
            for start in range(0, blocks[0].shape[1], length):
                piece = torch.cat([block[:, start : start + length] for block in blocks]).to(wide)
                combined = coefficients @ piece[: coefficients.shape[1]]
                for block, part in zip(out, combined.split([len(block) for block in out]), strict=True):
                    block[:, start : start + length] = part

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

    @contextmanager
    def _exactly(self) -> Iterator[None]:
        """Keep autocast off: it would round to half precision."""
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
            drawn = self._draw(min(_DRAWN, self._not_drawn))
            self._not_drawn -= len(drawn)
            pieces.append(drawn[:missing])
            self._left = drawn[missing:]
        return pieces[-1] if len(pieces[-1]) == count else torch.cat(pieces)


def local_of(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor that is sharded over ranks, sharing its memory; any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def unique_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors in their order, each object once: a tied parameter is one set of coordinates."""
    return list({id(tensor): tensor for tensor in tensors}.values())


class FlatLayout:
    """The order, shapes and dtypes by which parameters form one flat vector.

    The vector's dtype is the widest one among the parameters, and at least float32: products of half-precision
    parameters are computed in their own precision and accumulated in float32. It lives on the first parameter's device.
    Of parameters that are sharded over ranks (DTensors) it is this rank's shards that form the vector.

    Args:
        parameters: The parameters, tied ones once.
        device: Where the vector is; with the first parameter if None.

    Raises:
        ValueError: If there is no parameter, or one of them is not a real floating-point tensor.

    """

    def __init__(self, parameters: Sequence[Tensor], device: torch.device | None = None) -> None:
        if not parameters:
            raise ValueError("`parameters` should hold at least one tensor, got none.")
        for parameter in parameters:
            if not parameter.is_floating_point():
                raise ValueError(f"`parameters` should be real floating-point tensors, got {parameter.dtype}.")
        is_whole = all(local_of(parameter) is parameter for parameter in parameters)
        parameters = list(map(local_of, parameters))
        self._shapes = [parameter.shape for parameter in parameters]
        self._dtypes = [parameter.dtype for parameter in parameters]
        self._devices = [parameter.device for parameter in parameters]
        self._sizes = [parameter.numel() for parameter in parameters]
        self.size = sum(self._sizes)
        self.dtype = reduce(torch.promote_types, self._dtypes, torch.float32)
        self.device = parameters[0].device if device is None else device
        if self.size == 0 and is_whole:
            raise ValueError("`parameters` should hold at least one number, got only empty tensors.")

    def space(self, ranks: Ranks | None = None) -> VectorSpace:
        """The space of the flat vectors."""
        return VectorSpace(self.size, self.dtype, self.device, ranks)

    def zeros(self) -> Tensor:
        """A zero vector of shape ``(size,)``."""
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The flat vector of shape ``(size,)`` of one tensor a parameter; None stands for zeros."""
        pieces = [
            torch.zeros(size, dtype=self.dtype, device=self.device)
            if tensor is None
            else (local_of(tensor) if tensor.layout is torch.strided else tensor.to_dense())
            .detach()
            .reshape(-1)
            .to(dtype=self.dtype, device=self.device)
            for size, tensor in zip(self._sizes, tensors, strict=True)
        ]
        return torch.cat(pieces)

    def split(self, vector: Tensor) -> list[Tensor]:
        """One tensor a parameter, in that parameter's shape, dtype and device; views of `vector` where these agree.

        Raises:
            ValueError: If the vector's shape is not ``(size,)``.

        """
        if vector.shape != (self.size,):
            raise ValueError(f"`vector` should have shape ({self.size},), got {tuple(vector.shape)}.")
        return [
            piece.view(shape).to(device=device, dtype=dtype)
            for piece, shape, dtype, device in zip(
                vector.split(self._sizes), self._shapes, self._dtypes, self._devices, strict=True
            )
        ]
