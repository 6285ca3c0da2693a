"""One flat vector for a list of parameters, and back.

Eigen-solvers work on flat vectors and autograd on lists of tensors. A `FlatLayout` is the fixed correspondence between
the two: parameters in the order given, each one once, row-major.
"""

from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor


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

    def zeros(self) -> Tensor:
        """A zero vector of shape ``(size,)``."""
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The flat vector of shape ``(size,)`` of one tensor a parameter; None stands for zeros."""
        flat = self.zeros()
        for target, tensor in zip(flat.split(self._sizes), tensors, strict=True):
            if tensor is not None:
                dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
                target.copy_(dense.detach().reshape(-1))
        return flat

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
