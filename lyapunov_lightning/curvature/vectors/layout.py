"""The order in which parameters form one flat vector."""

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lyapunov_lightning.curvature.vectors.ranks import Ranks
from lyapunov_lightning.curvature.vectors.space import VectorSpace


def local_of(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor that is sharded over ranks, sharing its memory; any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def unique_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors in their order, each object once: a tied parameter is one set of coordinates."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def is_narrow(tensors: Iterable[Tensor]) -> bool:
    """Whether some of them are in half precision, where what is near a number is lost in its rounding."""
    return any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)


def _numbers_of(tensor: Tensor) -> Tensor:
    """The numbers of a tensor in a row, those of this rank if it is sharded."""
    return (local_of(tensor) if tensor.layout is torch.strided else tensor.to_dense()).detach().reshape(-1)


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
        # A rank may hold nothing of a sharded model that is smaller than the number of ranks. A whole model that is
        # empty is a mistake.
        is_whole = all(local_of(parameter) is parameter for parameter in parameters)
        parameters = list(map(local_of, parameters))
        self._shapes = [parameter.shape for parameter in parameters]
        self._dtypes = [parameter.dtype for parameter in parameters]
        self._devices = [parameter.device for parameter in parameters]
        self._sizes = [parameter.numel() for parameter in parameters]
        self.size = sum(self._sizes)
        # Half precision has three digits: orthogonality, and with it Lanczos, would be lost within a few vectors.
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

    def slices(self) -> list[slice]:
        """Where in the vector each parameter is."""
        ends = list(accumulate(self._sizes, initial=0))
        return [slice(start, end) for start, end in pairwise(ends)]

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The flat vector of shape ``(size,)`` of one tensor a parameter; None stands for zeros."""
        pieces = [
            torch.zeros(size, dtype=self.dtype, device=self.device)
            if tensor is None
            else _numbers_of(tensor).to(dtype=self.dtype, device=self.device)
            for size, tensor in zip(self._sizes, tensors, strict=True)
        ]
        return torch.cat(pieces)

    def moved(self, tensors: list[Tensor | None]) -> Tensor:
        """The same as `flatten`; but the list is emptied, so that each tensor is free once it was copied.

        At the peak it takes the memory of the vector and of one tensor, and a call for each of them.
        """
        vector = torch.empty(self.size, dtype=self.dtype, device=self.device)
        for piece in reversed(vector.split(self._sizes)):
            tensor = tensors.pop()
            piece.zero_() if tensor is None else piece.copy_(_numbers_of(tensor))
        return vector

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
