"""Vectors whose numbers are spread over the ranks, as the parameters of a sharded model are.

Under fully sharded data parallelism each rank holds a part of every parameter, and so of every vector: eigenvectors,
Krylov bases and running estimates take as much less memory a rank as there are ranks. A `Sharding` is the
correspondence between whole vectors and these parts, a `ShardedSpace` computes with the parts: what is linear each rank
does by itself, and the inner products of one vector with a whole basis are one short message.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.curvature.collectives import Collectives
from lyapunov_lightning.curvature.ranks import Ranks
from lyapunov_lightning.curvature.vectors import FlatLayout, RandomNumbers, VectorSpace

_NUMBERS = 2
"""Numbers that go along with a scattered sum."""


class Sharding:
    """How tensors are cut into the parts of the ranks.

    Of a tensor that is sharded along one dimension each rank has a contiguous part, as ``torch.chunk`` cuts it, so that
    the last ones may have less or nothing. Where there are several copies of the whole model (hybrid sharding), the
    ranks of each copy share one whole.

    Args:
        tensors: DTensors that are sharded along one dimension over the ranks of one mesh, all alike; with a mesh of two
            dimensions replicated along the first one.
        collectives: Is told of every gather and scatter, if they are part of an evaluation.

    Attributes:
        shapes: The shapes of the whole tensors.
        size: Numbers of all tensors together, of all ranks.
        longest: Numbers of the rank that has most.
        num_copies: How many copies of the whole there are.
        num_parts: Into how many parts each of them is cut.
        part: Which of the parts this rank has.
        copy: Of which of the copies.

    Raises:
        ValueError: If they are spread in another way.

    """

    def __init__(self, tensors: Sequence[Tensor], collectives: Collectives | None = None) -> None:
        self._collectives = collectives
        sharded: list[Any] = list(tensors)
        meshes = {id(tensor.device_mesh): tensor.device_mesh for tensor in sharded}
        mesh, *others = meshes.values()
        if any(other != mesh for other in others):
            raise ValueError("The parameters are spread otherwise (over several device meshes).")
        placements = {tensor.placements for tensor in sharded}
        if not all(_is_sharded(placement) for placement in placements):
            raise ValueError(f"The parameters are spread otherwise ({', '.join(map(str, placements))}).")
        self._shards = mesh.get_group(mesh.ndim - 1)
        self._copies = mesh.get_group(0) if mesh.ndim == 2 else None
        self.num_parts = mesh.size(mesh.ndim - 1)
        self.num_copies = mesh.size(0) if mesh.ndim == 2 else 1
        self.part = mesh.get_local_rank(mesh.ndim - 1)
        self.copy = mesh.get_local_rank(0) if mesh.ndim == 2 else 0
        self.shapes = [tuple(tensor.shape) for tensor in sharded]
        self._dims = [tensor.placements[-1].dim for tensor in sharded]
        self._sizes = [tensor.numel() for tensor in sharded]
        self._dtypes = [tensor.dtype for tensor in sharded]
        self.size = sum(self._sizes)
        self._layout = FlatLayout(sharded)
        self._lengths = [self._lengths_of(shape[dim]) for shape, dim in zip(self.shapes, self._dims, strict=True)]
        self._parts = [self._parts_of(rank) for rank in range(self.num_parts)]
        self._counts = [list(map(math.prod, shapes)) for shapes in self._parts]
        self.longest = max(map(sum, self._counts))

    @property
    def length(self) -> int:
        """Numbers of this rank."""
        return self._layout.size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors."""
        return self._layout.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._layout.device

    def tensors_of(self, whole: Tensor) -> list[Tensor]:
        """One tensor for each that is sharded, in its whole shape and dtype; views of `whole` where that agrees."""
        pieces = zip(whole.split(self._sizes), self.shapes, self._dtypes, strict=True)
        return [piece.view(shape).to(dtype) for piece, shape, dtype in pieces]

    def gathered(self, vector: Tensor) -> Tensor:
        """The whole vector of which each rank has a part: one collective.

        Args:
            vector: Shape ``(length,)``.

        Returns:
            Shape ``(size,)``: the tensors one after the other, each row by row.

        """
        own = vector.new_zeros(self.longest)
        own[: len(vector)] = vector
        every = vector.new_empty(self.num_parts * self.longest)
        if self._collectives is not None:
            self._collectives.note(lambda: self.gathered(torch.zeros(0, dtype=self.dtype, device=self.device)))
        dist.all_gather_into_tensor(every, own, group=self._shards)
        whole = vector.new_empty(self.size)
        outs = [out.view(shape) for out, shape in zip(whole.split(self._sizes), self.shapes, strict=True)]
        for rank, row in enumerate(every.split(self.longest)):
            pieces = row[: sum(self._counts[rank])].split(self._counts[rank])
            for index, (out, piece) in enumerate(zip(outs, pieces, strict=True)):
                self._part(out, index, rank).copy_(piece.view(self._parts[rank][index]))
        return whole

    def room(self) -> Tensor:
        """Room for `scattered_sum`, for those who have to have it before they begin."""
        return torch.empty(self.num_parts + 1, self.longest + _NUMBERS, dtype=self.dtype, device=self.device)

    def scattered_sum(
        self, whole: Tensor | None, numbers: Sequence[float] = (0.0, 0.0), room: Tensor | None = None
    ) -> tuple[Tensor, list[float]]:
        """The sum over all ranks of whole vectors, of which each rank gets its part: one collective.

        Args:
            whole: Shape ``(size,)``; zeros if None.
            numbers: Two more numbers.
            room: What `room` gave.

        Returns:
            Shape ``(length,)``, and the sums of the numbers.

        """
        room = self.room() if room is None else room
        every, own = room[:-1].zero_(), room[-1]
        for column, number in enumerate(numbers):
            every[:, self.longest + column] = number
        if whole is not None:
            self._fill(every, whole)
        if self._collectives is not None:
            self._collectives.note(lambda: self.scattered_sum(None))
        dist.reduce_scatter_tensor(own, every.view(-1), group=self._shards)
        if self._copies is not None:
            dist.all_reduce(own, group=self._copies)
        return own[: self.length].clone(), own[self.longest :].tolist()

    def exchanged(self, whole: Tensor) -> Tensor:
        """Of the vectors that the ranks of one copy of the model hold as a whole, this rank's part of each.

        Args:
            whole: Shape ``(size,)``, another one on each rank.

        Returns:
            Shape ``(num_parts, length)``: one row for each rank.

        """
        every = torch.zeros(self.num_parts, self.longest, dtype=self.dtype, device=self.device)
        self._fill(every, whole)
        received = torch.empty_like(every)
        dist.all_to_all_single(received, every, group=self._shards)
        return received[:, : self.length]

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole vector, of shape ``(length,)``."""
        return torch.cat([piece.reshape(-1) for piece in self._cut_for(self.part, whole)])

    def drawn(self, numbers: RandomNumbers) -> Tensor:
        """This rank's part of random numbers, drawn in the order of a whole vector."""
        parts = []
        for index, (size, shape) in enumerate(zip(self._sizes, self.shapes, strict=True)):
            parts.append(self._part(numbers.take(size).view(shape), index, self.part).reshape(-1))
        return torch.cat(parts)

    def _fill(self, every: Tensor, whole: Tensor) -> None:
        for rank, row in enumerate(every):
            end = 0
            for piece in self._cut_for(rank, whole):
                start, end = end, end + piece.numel()
                row[start:end].view(piece.shape).copy_(piece)

    def _cut_for(self, rank: int, whole: Tensor) -> list[Tensor]:
        pieces = zip(whole.split(self._sizes), self.shapes, strict=True)
        return [self._part(piece.view(shape), index, rank) for index, (piece, shape) in enumerate(pieces)]

    def _part(self, tensor: Tensor, index: int, rank: int) -> Tensor:
        """What a rank has of a whole tensor."""
        lengths = self._lengths[index]
        return tensor.narrow(self._dims[index], sum(lengths[:rank]), lengths[rank])

    def _parts_of(self, rank: int) -> list[tuple[int, ...]]:
        """The shapes of what a rank has."""
        cuts = zip(self.shapes, self._dims, self._lengths, strict=True)
        return [(*shape[:dim], lengths[rank], *shape[dim + 1 :]) for shape, dim, lengths in cuts]

    def _lengths_of(self, length: int) -> list[int]:
        """How much of a dimension each rank has."""
        chunk = -(-length // self.num_parts)
        ends = [min(chunk * rank, length) for rank in range(self.num_parts + 1)]
        return [end - start for start, end in itertools.pairwise(ends)]


class ShardedSpace(VectorSpace):
    """Vectors of which each rank holds its part.

    Args:
        sharding: Who holds what.
        ranks: All ranks that compute with them, those of all copies of the model.
        device: Where they are; with the model if None.

    """

    def __init__(self, sharding: Sharding, ranks: Ranks, device: torch.device | None = None) -> None:
        super().__init__(sharding.size, sharding.dtype, sharding.device if device is None else device, ranks)
        self._sharding = sharding

    @override
    def on(self, device: torch.device) -> "ShardedSpace":
        return ShardedSpace(self._sharding, self._ranks, device)

    @property
    @override
    def length(self) -> int:
        return self._sharding.length

    @property
    @override
    def vector_bytes(self) -> int:
        return self._sharding.longest * self.dtype.itemsize

    @override
    def is_like(self, other: VectorSpace) -> bool:
        return isinstance(other, ShardedSpace) and other._sharding.shapes == self._sharding.shapes

    @override
    def inner(self, rows: Tensor, vector: Tensor, *, roughly: bool = False) -> Tensor:
        own = super().inner(rows, vector, roughly=roughly)
        return self._summed(own.reshape(-1)).view(own.shape).to(own)

    @override
    def norm(self, vector: Tensor) -> Tensor:
        square = self._own_norm(vector).square()
        return self._summed(square.reshape(1))[0].sqrt().to(square)

    @override
    def orthogonalise(self, vector: Tensor, blocks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        first = self.take_out(vector, blocks, roughly=True)
        # What is taken out the second time is next to nothing, so that the norm before tells the norm after.
        square = self._own_norm(vector).square()
        numbers = self._summed(torch.cat([*self._own_parts(vector, blocks), square.reshape(1)]))
        second = numbers[:-1].to(first)
        self._subtract_all(vector, blocks, second)
        norm = (numbers[-1] - numbers[:-1].square().sum()).clamp_min(0).sqrt()
        return first + second, norm.to(square)

    @override
    def whole(self, vector: Tensor) -> Tensor:
        self._ranks.meet()
        return self._sharding.gathered(vector.to(self._sharding.device)).to(vector.device)

    @override
    def cut(self, vector: Tensor) -> Tensor:
        return self._sharding.cut(vector)

    @override
    def agreed(self, numbers: Tensor) -> Tensor:
        return numbers.to("cpu", torch.float64)  # sums over the ranks already

    @override
    def _own(self, numbers: RandomNumbers) -> Tensor:
        return self._sharding.drawn(numbers).to(self.device)

    @override
    def take_out(self, vector: Tensor, blocks: Sequence[Tensor], *, roughly: bool = False) -> Tensor:
        if not blocks:
            return vector.new_zeros(0)
        components = self._summed(torch.cat(self._own_parts(vector, blocks, roughly))).to(vector)
        self._subtract_all(vector, blocks, components)
        return components

    def _own_parts(self, vector: Tensor, blocks: Sequence[Tensor], roughly: bool = False) -> list[Tensor]:
        return [super(ShardedSpace, self).inner(block, vector, roughly=roughly).double() for block in blocks]

    def _subtract_all(self, vector: Tensor, blocks: Sequence[Tensor], components: Tensor) -> None:
        for block, part in zip(blocks, components.split([len(block) for block in blocks]), strict=True):
            self.subtract(vector, part, block)

    def _summed(self, numbers: Tensor) -> Tensor:
        """Sums over the ranks of one copy of the model: each copy has them all."""
        return self._ranks.summed(numbers) / self._sharding.num_copies


def _is_sharded(placements: Sequence[Any]) -> bool:
    """Whether these are one plain shard, with copies of the whole at most."""
    *copies, last = placements
    return type(last).__name__ == "Shard" and len(copies) <= 1 and all(copy.is_replicate() for copy in copies)
