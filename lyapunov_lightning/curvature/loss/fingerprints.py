"""Whether tensors still hold what they held, found out without a copy of them.

PyTorch counts the writes to a tensor that it sees itself. Writes through ``.data``, writes through a NumPy array that
shares the memory, and the exchange of the memory as a whole it does not count. So the memory is read as integers of 64
bits, and large memory summed up 512 bytes at a time: a pass at the speed at which memory can be read, which costs a
small part of what adding two vectors does. What is missed is an exchange of numbers within the same 512 bytes of a
large tensor that PyTorch did not count.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_ROW = 64
"""Integers of large memory that are summed up to one."""

_LARGE = 2**16
"""Bytes from which memory is large. What is smaller is collected first, to be few calls."""


class Fingerprint:
    """What some tensors hold at the time at which this is made.

    Args:
        tensors: The tensors; they and their memory are kept alive.
        max_bytes: Of a tensor that is larger, only what PyTorch counts and where its memory is are looked at.

    """

    def __init__(self, tensors: Iterable[Tensor], max_bytes: int = sys.maxsize) -> None:
        self.tensors = list(tensors)
        self.max_bytes = max_bytes
        self._inner = [inner for tensor in self.tensors for inner in _inner_tensors(tensor)]
        self._placed = [tensor for tensor in self._inner if tensor.layout is torch.strided and not tensor.is_meta]
        self._places = self._present_places()
        self._memory: dict[torch.device, list[Tensor]] = {}
        read = [tensor for tensor in self._inner if tensor.layout is torch.strided and tensor.nbytes <= max_bytes]
        for piece in (piece for tensor in read for piece in _memory(tensor)):
            self._memory.setdefault(piece.device, []).append(piece)
        self._numbers = self._read()

    def is_changed(self) -> bool:
        """Whether a tensor holds something else by now, has other memory, or was frozen or unfrozen.

        Waits for each device that holds some of the tensors.
        """
        if self._present_places() != self._places:
            return True
        return not all(map(torch.equal, self._read(), self._numbers))

    def _present_places(self) -> list[tuple[int, int, bool]]:
        """Where memory is, how many writes to it were counted (none in inference mode), and whether it is trained."""
        return [(t.data_ptr(), -1 if t.is_inference() else t._version, t.requires_grad) for t in self._placed]

    def _read(self) -> list[Tensor]:
        return [_numbers(pieces) for pieces in self._memory.values()]


def joined(fingerprints: Iterable[Fingerprint]) -> Fingerprint:
    """One fingerprint of the tensors of several, which costs less to look at; of what they hold at present."""
    parts = list(fingerprints)
    tensors = {id(tensor): tensor for part in parts for tensor in part.tensors}
    return Fingerprint(tensors.values(), max(part.max_bytes for part in parts))


def _inner_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the numbers of one, such as this rank's shard of a distributed one."""
    wrapper: Any = tensor
    if is_traceable_wrapper_subclass(wrapper):
        names, _ = wrapper.__tensor_flatten__()
        for name in names:
            yield from _inner_tensors(getattr(wrapper, name))
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    else:
        yield tensor


def _memory(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor; one with gaps between its numbers stays as it is, to be copied when it is read."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or not tensor.numel():
        return
    tensor = tensor.detach()
    if tensor.is_conj():
        tensor = tensor.conj()
    if tensor.is_neg():
        tensor = torch._neg_view(tensor)
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, 1)  # one number that is shown several times
    tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride().__getitem__, reverse=True))
    yield tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8) if tensor.is_contiguous() else tensor


def _numbers(pieces: Sequence[Tensor]) -> Tensor:
    """A vector of integers for the contents of some memory, all of it on one device."""
    small: list[Tensor] = []
    numbers: list[Tensor] = []
    for piece in pieces:
        flat = piece if piece.is_contiguous() else piece.contiguous().view(-1).view(torch.uint8)
        if len(flat) >= _LARGE and flat.storage_offset() % 8 == 0:
            whole = len(flat) - len(flat) % (8 * _ROW)
            numbers.append(flat[:whole].view(torch.int64).view(-1, _ROW).sum(1))
            flat = flat[whole:]
        small.append(flat)
    missing = -sum(map(len, small)) % 8
    if missing:
        small.append(small[0].new_zeros(missing))
    words = torch.cat(small).view(torch.int64)
    if len(words) > _LARGE // 8:
        whole = len(words) - len(words) % _ROW
        numbers.append(words[:whole].view(-1, _ROW).sum(1))
        words = words[whole:]
    return torch.cat([*numbers, words]) if numbers else words
