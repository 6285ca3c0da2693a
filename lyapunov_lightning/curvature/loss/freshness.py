"""Whether what a kept graph was computed from is still what it was.

A kept gradient graph multiplies as if nothing had happened since, so a change that is overlooked gives a wrong product
and no error. A graph depends on the parameters, on the tensors and arrays in its batch, on whatever other tensors the
loss uses, on which layers are in training mode, and on the precision of autocast.

PyTorch counts the writes to a tensor that it sees itself. It does not count writes through ``.data`` or through a NumPy
array that shares the memory, nor the exchange of the memory as a whole. So the memory is read, at the speed at which
memory can be read: a small part of what adding two vectors costs.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lyapunov_lightning.curvature.compat.operations import replaced, unwrapped

_INTEGERS_OF_A_SUM = 64
"""Integers of 64 bits, 512 bytes, of which one sum is kept. The sums take 1/64 of the memory; what they miss is an
uncounted exchange of numbers within the same 512 bytes of a tensor of at least `_SUMMED_BYTES`."""

_SUMMED_BYTES = 2**16
"""Bytes from which contents are summed up. Smaller ones are copied into one vector first, since each of the many small
tensors of a network would cost several calls of 5 µs, more than it takes to read them."""

_DATA_SET_BYTES = 2**26
"""Bytes from which a tensor that the loss uses is taken for a whole data set from which a batch was cut: reading it
before each product would take longer than the product, so that only counted writes to it are noticed."""


class Contents:
    """What some tensors hold at the time at which this is made, without a copy of them.

    Args:
        tensors: The tensors. They and their memory are kept alive, or other tensors could take their place.
        unread: Tensors of which only the place of the memory and the counted writes are noted.

    """

    def __init__(self, tensors: Iterable[Tensor], unread: Iterable[Tensor] = ()) -> None:
        read = [inner for tensor in tensors for inner in _inner_tensors(tensor)]
        inner = [*read, *(inner for tensor in unread for inner in _inner_tensors(tensor))]
        self._placed = [tensor for tensor in inner if tensor.layout is torch.strided and not tensor.is_meta]
        self._places = self._present_places()
        self._memory = _memory_by_device(read)
        self._numbers = self._read()

    def is_changed(self) -> bool:
        """Whether a tensor holds something else by now, has other memory, or was frozen or unfrozen.

        Waits for each device that holds some of the tensors.
        """
        # First what is known on the host; to read the memory of an accelerator is to wait for it.
        if self._present_places() != self._places:
            return True
        return not all(map(torch.equal, self._read(), self._numbers))

    def _present_places(self) -> list[tuple[int, int, bool]]:
        """Where memory is, how many writes to it were counted (none in inference mode), and whether it is trained."""
        return [(t.data_ptr(), -1 if t.is_inference() else t._version, t.requires_grad) for t in self._placed]

    def _read(self) -> list[Tensor]:
        return [_numbers(pieces) for pieces in self._memory.values()]


def numbers_of(tensor: Tensor) -> Tensor:
    """Integers on the CPU that tell what a tensor holds, fewer than its bytes where these are many."""
    memory = _memory_by_device(_inner_tensors(tensor))
    return torch.cat(
        [torch.zeros(0, dtype=torch.int64, device="cpu"), *(_numbers(pieces).cpu() for pieces in memory.values())]
    )


class LossInputs(TorchFunctionMode):
    """Finds the tensors and the layers that a loss uses, by watching its operations while it is entered.

    A tensor that no operation of the loss has made was there before, and is an input. What the loss itself writes to,
    such as the running averages of a BatchNorm, is none, since each evaluation leaves it different. PyTorch does not
    count all of these writes, so a tensor is read when it is first met, and again at the end.

    Args:
        known: Tensors that are inputs anyway, and are left out.

    Attributes:
        modes: The layers that were called, by their id, each with whether it was training.

    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = set(map(id, known))
        self._first_node = 0
        self._stack = ExitStack()
        self._met: dict[int, tuple[Tensor, Contents]] = {}
        self._made: dict[int, weakref.ref[Tensor]] = {}
        self.modes: dict[int, tuple[weakref.ref[nn.Module], bool]] = {}

    def __enter__(self) -> "LossInputs":
        self._first_node = torch._C._autograd._get_sequence_nr()
        call: Any = nn.Module._call_impl

        def noted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.modes.setdefault(id(module), (weakref.ref(module), module.training))
            return call(module, *args, **kwargs)

        # `register_module_forward_pre_hook` would do the same, and make PyTorch warn in layers that compile themselves.
        self._stack.enter_context(replaced(nn.Module, "_call_impl", noted))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        self._stack.close()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in map(unwrapped, _tensors_in((args, kwargs))):
            if id(tensor) not in self._met and id(tensor) not in self._known and not self._is_made(tensor):
                self._met[id(tensor)] = tensor, Contents(*_by_size([tensor]))
        result = func(*args, **kwargs)
        # A result with a node in the graph is recognised by the number of that node. The others are noted by their id,
        # weakly: to keep them would keep every intermediate tensor of the loss until its end.
        for tensor in _tensors_in((result,)):
            if tensor.grad_fn is None and id(tensor) not in self._met:
                self._made[id(tensor)] = weakref.ref(tensor)
        return result

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that were there before the loss, but for those that it wrote to."""
        return [tensor for tensor, contents in self._met.values() if not contents.is_changed()]

    def _is_made(self, tensor: Tensor) -> bool:
        # Nodes of the graph are numbered in their order, so one that is older than the loss belongs to an input.
        if tensor.grad_fn is not None:
            return tensor.grad_fn._sequence_nr() >= self._first_node
        # The id of a tensor that is gone may be that of a new one.
        reference = self._made.get(id(tensor))
        return reference is not None and reference() is tensor


class Freshness:
    """Remembers what graphs were computed from, and whether it has changed since.

    Args:
        parameters: What the gradients are taken with respect to.

    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self.forget()

    def forget(self) -> None:
        """Remember nothing."""
        self._read: dict[int, Tensor] = {}
        self._unread: dict[int, Tensor] = {}
        self._contents: list[Contents] = []
        self._modes: dict[int, tuple[weakref.ref[nn.Module], bool]] = {}
        self._precision = self._present_precision()

    def remember(self, batch: Iterable[Tensor], inputs: Sequence[Tensor], found: LossInputs | None) -> None:
        """Remember what one more graph was computed from.

        Args:
            batch: The tensors in its batch, which are read whatever their size.
            inputs: Other tensors.
            found: The layers, where the loss was watched.

        """
        small, large = _by_size(inputs)
        # What several batches share, above all the parameters, is read once and not once a batch.
        read = {id(tensor): tensor for tensor in (*self._parameters, *batch, *small) if id(tensor) not in self._read}
        unread = {id(tensor): tensor for tensor in large if id(tensor) not in self._unread}
        self._contents.append(Contents(read.values(), unread.values()))
        self._read |= read
        self._unread |= unread
        self._modes |= found.modes if found is not None else {}

    def is_stale(self) -> bool:
        """Whether anything has changed since."""
        # A layer that is gone cannot be in another mode. BatchNorm and Dropout in another mode are another function.
        if any((module := layer()) is not None and module.training != mode for layer, mode in self._modes.values()):
            return True
        if not self.is_in_force() or any(contents.is_changed() for contents in self._contents):
            return True
        if len(self._contents) > 1:  # nothing has changed, so all can be read anew in the few calls of one
            self._contents = [Contents(self._read.values(), self._unread.values())]
        return False

    def is_in_force(self) -> bool:
        """Whether operations have the precision that they had: a graph belongs to the autocast region of its loss."""
        return self._precision == self._present_precision()

    def _present_precision(self) -> list[tuple[bool, torch.dtype]]:
        # The CPU's too, whatever holds the parameters: a loss may compute a part there.
        kinds = dict.fromkeys(("cpu", *(parameter.device.type for parameter in self._parameters)))
        return [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]


def _by_size(tensors: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that are small enough to be read, and the others."""
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for tensor in tensors:
        parts[tensor.layout is torch.strided and tensor.nbytes > _DATA_SET_BYTES].append(tensor)
    return parts


def _tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the arguments or the results of an operation."""
    found: list[Tensor] = []
    # No general tree walk: this runs for every operation of the loss, and operations take no other containers.
    pending = [*values]
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()
    return found


def _inner_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the numbers of one, such as this rank's shard of a distributed one."""
    wrapper: Any = tensor
    if is_traceable_wrapper_subclass(wrapper):
        names, _ = wrapper.__tensor_flatten__()
        for name in names:
            yield from _inner_tensors(getattr(wrapper, name))
    elif tensor.is_nested:
        yield from tensor.unbind()  # a strided one has no strides of its own
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
    # Lazy conjugates and negatives cannot be viewed as bytes; the memory beneath them can.
    if tensor.is_conj():
        tensor = tensor.conj()
    if tensor.is_neg():
        tensor = torch._neg_view(tensor)
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, 1)  # one number that is shown several times
    # In the order of the memory a transposed or channels-last tensor is contiguous, and needs no copy.
    tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride().__getitem__, reverse=True))
    yield tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8) if tensor.is_contiguous() else tensor


def _memory_by_device(tensors: Iterable[Tensor]) -> dict[torch.device, list[Tensor]]:
    memory: dict[torch.device, list[Tensor]] = {}
    for piece in (piece for tensor in tensors for piece in _memory(tensor)):
        memory.setdefault(piece.device, []).append(piece)
    return memory


def _numbers(pieces: Sequence[Tensor]) -> Tensor:
    """A vector of integers for the contents of some memory, all of it on one device.

    Integers and not floats: equal bits are equal, NaN among them, and sums are exact modulo 2**64.
    """
    small: list[Tensor] = []
    numbers: list[Tensor] = []
    for piece in pieces:
        flat = piece if piece.is_contiguous() else piece.contiguous().view(-1).view(torch.uint8)
        # A sum for each 512 bytes and not one for the whole: numbers that swap places far apart leave the latter the
        # same.
        if len(flat) >= _SUMMED_BYTES and flat.storage_offset() % 8 == 0:  # or it cannot be viewed as int64
            whole = len(flat) - len(flat) % (8 * _INTEGERS_OF_A_SUM)
            numbers.append(flat[:whole].view(torch.int64).view(-1, _INTEGERS_OF_A_SUM).sum(1))
            flat = flat[whole:]
        small.append(flat)
    # All small ones together are read in a few calls; padded, since eight bytes make an integer.
    missing = -sum(map(len, small)) % 8
    if missing:
        small.append(small[0].new_zeros(missing))
    words = torch.cat(small).view(torch.int64)
    if len(words) > _SUMMED_BYTES // 8:
        whole = len(words) - len(words) % _INTEGERS_OF_A_SUM
        numbers.append(words[:whole].view(-1, _INTEGERS_OF_A_SUM).sum(1))
        words = words[whole:]
    return torch.cat([*numbers, words]) if numbers else words
