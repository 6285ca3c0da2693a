"""The vectors of the eigen-solvers: what is computed with them, and how parameters form them.

A `VectorSpace` is the one place that knows how vectors are stored. Solvers take inner products, norms, random vectors
and combinations from it, so that they are the same for a vector that is whole on every rank as for one in pieces.

Eigen-solvers work on flat vectors and autograd on lists of tensors. A `FlatLayout` is the fixed correspondence between
the two: parameters in the order given, each one once, row-major.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import reduce
from typing import cast

import torch
from torch import Tensor

from lyapunov_lightning.curvature.ranks import Ranks

_CHUNK = 2**18
"""Numbers that are converted to float64 at a time."""


class VectorSpace:
    """Flat vectors of one length, dtype and device, each of them whole on every rank.

    What it computes is exact to the rounding of the dtype, whatever autocast and reduced-precision matrix products are
    in force around it; squares are summed in float64, so that neither the length nor the unit of a vector matters.

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

    def empty(self, count: int) -> Tensor:
        """Room for some vectors, one row each."""
        return torch.empty(count, self.size, dtype=self.dtype, device=self.device)

    def zeros(self) -> Tensor:
        """A zero vector of shape ``(size,)``."""
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)

    def random(self, generator: torch.Generator) -> Tensor:
        """A vector of independent standard normal numbers, the same on every device.

        Args:
            generator: Their source, on the CPU.

        """
        return torch.randn(self.size, generator=generator, dtype=self.dtype, device="cpu").to(self.device)

    def random_signs(self, generator: torch.Generator) -> Tensor:
        """A vector of independent signs, 1 or -1 with equal probability, the same on every device.

        Args:
            generator: Their source, on the CPU.

        """
        signs = torch.randint(0, 2, (self.size,), generator=generator, dtype=torch.int8, device="cpu")
        return signs.to(self.device, self.dtype).mul_(2).sub_(1)

    def adopt(self, vectors: Tensor, name: str) -> Tensor:
        """One vector, or one for each row, of any dtype and on any device, as vectors of this space.

        Args:
            vectors: Shape ``(size,)`` or ``(k, size)``.
            name: What to call them in an error.

        Returns:
            Shape ``(k, size)``, possibly the same memory.

        Raises:
            ValueError: If they have another shape, or are not finite.

        """
        if vectors.ndim not in (1, 2) or vectors.shape[-1] != self.size:
            raise ValueError(f"`{name}` should have rows of length {self.size}, got shape {tuple(vectors.shape)}.")
        rows = vectors.detach().to(dtype=self.dtype, device=self.device).reshape(-1, self.size)
        if not bool(torch.isfinite(rows.sum())) and not bool(torch.isfinite(rows).all()):
            raise ValueError(f"`{name}` should be finite.")
        return rows

    def inner(self, rows: Tensor, vector: Tensor) -> Tensor:
        """Inner products.

        Args:
            rows: Shape ``(k, size)``, or ``(size,)`` for a single one.
            vector: Shape ``(size,)``.

        Returns:
            Shape ``(k,)``, or a scalar, on the device.

        """
        with self._exactly():
            return rows @ vector

    def norm(self, vector: Tensor) -> Tensor:
        """The Euclidean norm, a float64 scalar on the device."""
        if self.device.type == "mps":  # which has no float64
            return cast(Tensor, torch.linalg.vector_norm(vector))
        parts = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in vector.split(_CHUNK)]
        norm: Tensor = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts))
        return norm

    def subtract(self, vector: Tensor, coefficients: Tensor, rows: Tensor) -> None:
        """Take a combination of rows from a vector, in place.

        Args:
            vector: Shape ``(size,)``.
            coefficients: Shape ``(k,)``.
            rows: Shape ``(k, size)``.

        """
        with self._exactly():
            vector.addmv_(rows.T, coefficients.to(vector), alpha=-1)

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


def unique_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors in their order, each object once: a tied parameter is one set of coordinates."""
    return list({id(tensor): tensor for tensor in tensors}.values())


class FlatLayout:
    """The order, shapes and dtypes by which parameters form one flat vector.

    The vector's dtype is the widest one among the parameters, and at least float32: products of half-precision
    parameters are computed in their own precision and accumulated in float32. It lives on the first parameter's device.

    Args:
        parameters: The parameters, tied ones once.

    Raises:
        ValueError: If there is no parameter, or one of them is not a real floating-point tensor.

    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        if not parameters:
            raise ValueError("`parameters` should hold at least one tensor, got none.")
        for parameter in parameters:
            if not parameter.is_floating_point():
                raise ValueError(f"`parameters` should be real floating-point tensors, got {parameter.dtype}.")
        self._shapes = [parameter.shape for parameter in parameters]
        self._dtypes = [parameter.dtype for parameter in parameters]
        self._devices = [parameter.device for parameter in parameters]
        self._sizes = [parameter.numel() for parameter in parameters]
        self.size = sum(self._sizes)
        self.dtype = reduce(torch.promote_types, self._dtypes, torch.float32)
        self.device = parameters[0].device
        if self.size == 0:
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
            else (tensor if tensor.layout is torch.strided else tensor.to_dense())
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
