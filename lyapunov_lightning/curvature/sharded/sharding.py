"""Vectors whose numbers are spread over the ranks, like the parameters of a sharded model.

Under fully sharded data parallelism each rank holds a part of every parameter, and so of every vector: on n ranks,
eigenvectors, Krylov bases and running estimates take an n-th of their memory on each. A `Sharding` is the
correspondence between whole vectors and these parts, and a `ShardedSpace` computes with the parts. Linear combinations
need no communication, and the inner products of one vector with a whole basis need one short message.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.curvature.sharded.collectives import Collectives
from lyapunov_lightning.curvature.vectors.layout import FlatLayout
from lyapunov_lightning.curvature.vectors.ranks import Ranks
from lyapunov_lightning.curvature.vectors.space import RandomNumbers, VectorSpace

_EXTRA_NUMBERS = 2
"""Further numbers that are summed in the same message as a vector: whether a rank has failed, and its samples."""


class Sharding:
    """How tensors are cut into the parts of the ranks.

    A tensor is cut along one dimension into contiguous parts, as by ``torch.chunk``, so that the last ranks may have
    less or nothing. Where there are several copies of the model (hybrid sharding), the ranks of each copy hold one
    whole together.

    Args:
        tensors: DTensors that are sharded along one dimension over the ranks of one mesh, all alike; with a mesh of two
            dimensions replicated along the first one.
        collectives: Gets every gather and scatter, before it is entered, if they are part of an evaluation.

    Attributes:
        shapes: The shapes of the whole tensors.
        size: The number of elements of all whole tensors together.
        longest: The number of elements of the rank that has most.
        num_copies: The number of copies of the model.
        num_parts: The number of parts into which each copy is cut.
        part: Which of the parts this rank holds.
        copy: Which of the copies that part belongs to.

    Raises:
        ValueError: If the tensors are spread in another way.

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
        # With hybrid sharding the mesh has the copies along its first dimension and the shards along its last one.
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
        """The number of elements that this rank holds."""
        return self._layout.size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors."""
        return self._layout.dtype

    @property
    def device(self) -> torch.device:
        """The device of the vectors."""
        return self._layout.device

    def tensors_of(self, whole: Tensor) -> list[Tensor]:
        """The whole tensors that make a whole vector, in their own dtypes; views of `whole` if it has the same."""
        pieces = zip(whole.split(self._sizes), self.shapes, self._dtypes, strict=True)
        return [piece.view(shape).to(dtype) for piece, shape, dtype in pieces]

    def gathered(self, vector: Tensor) -> Tensor:
        """The whole vector of which each rank holds a part, in one collective.

        Args:
            vector: Shape ``(length,)``.

        Returns:
            Shape ``(size,)``: the tensors one after the other, each row by row.

        """
        # All parts are padded to the longest one, as the collective requires equal sizes.
        own = vector.new_zeros(self.longest)
        own[: len(vector)] = vector
        every = vector.new_empty(self.num_parts * self.longest)
        if self._collectives is not None:
            # A rank that has failed enters with no numbers of its own, which the padding fills up with zeros.
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
        """The memory for `scattered_sum`, for a caller that has to reserve it in time."""
        return torch.empty(self.num_parts + 1, self.longest + _EXTRA_NUMBERS, dtype=self.dtype, device=self.device)

    def scattered_sum(
        self, whole: Tensor | None, numbers: Sequence[float] = (0.0, 0.0), room: Tensor | None = None
    ) -> tuple[Tensor, list[float]]:
        """This rank's part of the sum of whole vectors over all ranks, in one collective.

        Args:
            whole: Shape ``(size,)``; zeros if None.
            numbers: Two more numbers to be summed.
            room: The memory from `room`.

        Returns:
            The part, of shape ``(length,)``, and the sums of the numbers.

        """
        room = self.room() if room is None else room
        every, own = room[:-1].zero_(), room[-1]
        for column, number in enumerate(numbers):
            every[:, self.longest + column] = number
        if whole is not None:
            self._fill(every, whole)
        if self._collectives is not None:
            # Before it is entered: one that fails in the middle has been entered by the others.
            self._collectives.note(lambda: self.scattered_sum(None))
        dist.reduce_scatter_tensor(own, every.view(-1), group=self._shards)
        if self._copies is not None:  # the copies of the model have seen different samples
            dist.all_reduce(own, group=self._copies)
        return own[: self.length].clone(), own[self.longest :].tolist()

    def exchanged(self, whole: Tensor) -> Tensor:
        """This rank's part of the vector of every rank of its copy of the model.

        Args:
            whole: Shape ``(size,)``: this rank's vector.

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
        """This rank's part of random numbers, drawn in the order of a whole vector.

        So the numbers are the same for any number of ranks, and a search takes the same course.
        """
        parts = []
        # Every rank draws all numbers, one tensor at a time, and keeps its part: a start that depended on the number of
        # ranks would lead to other results.
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
        """The part of a whole tensor that a rank holds."""
        lengths = self._lengths[index]
        return tensor.narrow(self._dims[index], sum(lengths[:rank]), lengths[rank])

    def _parts_of(self, rank: int) -> list[tuple[int, ...]]:
        """The shapes of the parts that a rank holds."""
        cuts = zip(self.shapes, self._dims, self._lengths, strict=True)
        return [(*shape[:dim], lengths[rank], *shape[dim + 1 :]) for shape, dim, lengths in cuts]

    def _lengths_of(self, length: int) -> list[int]:
        """How much of a dimension each rank holds, as ``torch.chunk`` cuts it."""
        # Rounded up, so that the last ranks get less or nothing: five rows on four ranks are 2, 2, 1 and 0.
        chunk = -(-length // self.num_parts)
        ends = [min(chunk * rank, length) for rank in range(self.num_parts + 1)]
        return [end - start for start, end in itertools.pairwise(ends)]


class ShardedSpace(VectorSpace):
    """Vectors of which each rank holds its part.

    Args:
        sharding: Which rank holds what.
        ranks: All ranks, of all copies of the model.
        device: The device of the vectors; that of the model if None.

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
    def inner_of_parts(self, first: Tensor, second: Tensor, parts: Sequence[Sequence[slice]]) -> Tensor:
        own = super().inner_of_parts(first, second, parts)
        return self._summed(own).to(own)  # all parts in one message

    @override
    def norm(self, vector: Tensor) -> Tensor:
        # Squares add up over the ranks, norms do not; in float64, in which the square of no float32 norm overflows.
        square = self._own_norm(vector).square()
        return self._summed(square.reshape(1))[0].sqrt().to(square)

    @override
    def orthogonalise(self, vector: Tensor, blocks: Sequence[Tensor], *, once: bool = False) -> tuple[Tensor, Tensor]:
        # Twice in any case: the norm takes a second message, which brings the second pass along.
        first = self.take_out(vector, blocks, roughly=True)
        # The norm afterwards would need a second message. It follows from the norm before and from the components by
        # Pythagoras, without loss of digits: the first pass has left next to nothing for the second one to take out.
        # The second pass is needed as anywhere: the first one leaves its rounding errors along the blocks.
        square = self._own_norm(vector).square()
        numbers = self._summed(torch.cat([*self._own_parts(vector, blocks), square.reshape(1)]))
        second = numbers[:-1].to(first)
        self._subtract_all(vector, blocks, second)
        norm = (numbers[-1] - numbers[:-1].square().sum()).clamp_min(0).sqrt()
        return first + second, norm.to(square)

    @override
    def whole(self, vector: Tensor) -> Tensor:
        # A gathering has no place for a failure, so that has to be known before.
        self._ranks.meet()
        return self._sharding.gathered(vector.to(self._sharding.device)).to(vector.device)

    @override
    def cut(self, vector: Tensor) -> Tensor:
        return self._sharding.cut(vector)

    @override
    def agreed(self, numbers: Tensor) -> Tensor:
        return numbers.to("cpu", torch.float64)  # they are sums over the ranks, and so the same on all of them

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
        """Sums over the ranks of one copy of the model, of which a sum over all ranks counts every copy."""
        return self._ranks.summed(numbers) / self._sharding.num_copies


def _is_sharded(placements: Sequence[Any]) -> bool:
    """Whether a tensor is cut along one dimension and otherwise at most replicated."""
    *copies, last = placements
    return type(last).__name__ == "Shard" and len(copies) <= 1 and all(copy.is_replicate() for copy in copies)
