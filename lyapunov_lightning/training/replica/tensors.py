"""How tensors and arrays are copied: with memory of their own, which the copies share as the originals share theirs."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lyapunov_lightning.training.replica.memo import Memo
from lyapunov_lightning.training.replica.walk import Copy

_WHOLE_BLOCK = 2**24
"""Bytes up to which the memory behind a small view is copied as a whole, so that other views of it still share it.

Beyond, a view of some rows of a large table, as of an embedding on a shared server, would cost the table.
"""


def copy_tensor(tensor: Tensor, copy: Copy, memo: Memo) -> Tensor:
    """A leaf with memory of its own, shared with the copies of those tensors that share the original's."""
    base = tensor._base
    if tensor.requires_grad and not tensor.is_leaf and base is not None and base.is_leaf and _is_plain(tensor):
        # A view of a parameter, such as the heads that a module has cut out of one large weight. As a leaf it would be
        # cut off from the parameter, whose gradient would lack what comes through the view.
        with torch.enable_grad():
            place = tensor.size(), tensor.stride(), tensor.storage_offset()
            return memo.note(tensor, copy(base).as_strided(*place))  # type: ignore[no-any-return]
    requires_grad = tensor.requires_grad and tensor.is_leaf
    cls = type(tensor)
    # Without the original's graph: by way of a loss that was kept, `self.last = loss`, the derivatives would reach into
    # the last step.
    with torch.no_grad():
        data = _in_own_memory(tensor, memo) if _is_plain(tensor) else tensor.detach().clone()
    if isinstance(tensor, nn.Parameter) and not isinstance(data, nn.Parameter):
        # `_make_subclass` calls no `__new__` of a subclass of Parameter, but refuses subclasses with a dispatch of
        # their own: quantized weights, and the shards of `fully_shard`, whose copy is an ordinary parameter.
        is_standard = cls.__torch_dispatch__ is Tensor.__torch_dispatch__
        copied = Tensor._make_subclass(cls, data, requires_grad) if is_standard else nn.Parameter(data, requires_grad)
    else:
        copied = data if type(data) is cls else data.as_subclass(cls)
        if requires_grad:
            copied.requires_grad_()
    memo.note(tensor, copied)
    if tensor.__dict__:
        copied.__dict__.update((name, copy(value)) for name, value in tensor.__dict__.items())
    if requires_grad:
        _copy_hooks(tensor, copied, copy)
    return copied


def _copy_hooks(tensor: Tensor, copied: Tensor, copy: Copy) -> None:
    """Copy the hooks of a leaf, which are called where the step runs a backward pass of its own."""
    hooks: Any = tensor._backward_hooks
    for hook in list((hooks or {}).values()):
        copied.register_hook(copy(hook))
    hooks = tensor._post_accumulate_grad_hooks
    for hook in list((hooks or {}).values()):
        copied.register_post_accumulate_grad_hook(copy(hook))


def _in_own_memory(tensor: Tensor, memo: Memo) -> Tensor:
    """The same numbers in the copy of the block of memory that they lie in, or where they are if that is too large."""
    block = tensor.untyped_storage()
    address = block.data_ptr()
    if not address or address not in memo.blocks:  # all empty blocks have the address 0
        if memo.limits is not None and not memo.limits.affords(block.nbytes()):
            memo.limits.shared.append((address, address + block.nbytes()))
            return tensor.detach()
        if block.nbytes() > max(_WHOLE_BLOCK, 2 * tensor.nbytes):
            return tensor.detach().clone()
        memo.blocks[address] = block.clone()
        memo.originals.append(block)  # else its address could be that of another block before the copy is complete
    data = tensor.detach().new_empty(0)
    return data.set_(memo.blocks[address], tensor.storage_offset(), tensor.size(), tensor.stride())


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a view of a block of memory, and nothing else.

    What is not, sparse or quantized tensors, conjugate views, subclasses that keep their numbers in other tensors, is
    cloned by its own rules, and shares its memory with no other copy.

    """
    return (
        tensor.layout is torch.strided
        and tensor.device.type != "meta"
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.is_nested)
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    )


def copy_array(array: "np.ndarray[Any, Any]", copy: Copy, memo: Memo) -> Any:
    """An array with memory of its own, shared as `copy_tensor` says, also with tensors (``torch.from_numpy``)."""
    if not array.flags.writeable:
        return array  # a file that is mapped into memory, a view that `np.broadcast_to` has made
    if memo.limits is not None and not array.dtype.hasobject and not memo.limits.affords(array.nbytes):
        return _read_only(array, memo.limits.shared)
    base = array.base
    if isinstance(base, np.ndarray) and base.flags.c_contiguous and base.flags.writeable and not array.dtype.hasobject:
        place = array.ctypes.data - base.ctypes.data  # in the memory that it shares with other views
        return np.ndarray(array.shape, array.dtype, copy(base), place, array.strides).view(type(array))
    address = array.ctypes.data
    if address in memo.blocks and array.flags.c_contiguous:  # the memory of a tensor that was copied
        whole = torch.empty(0, dtype=torch.uint8).set_(memo.blocks[address]).numpy()
        return whole[: array.nbytes].view(array.dtype).reshape(array.shape).view(type(array))
    copied = memo.note(array, array.copy())  # before its objects, one of which may be the array
    if array.dtype.hasobject:
        copied.reshape(-1)[:] = [copy(entry) for entry in array.reshape(-1)]
    elif array.nbytes and array.flags.c_contiguous:
        memo.blocks[address] = torch.from_numpy(copied.reshape(-1).view(np.uint8)).untyped_storage()
    return copied


def _read_only(array: "np.ndarray[Any, Any]", shared: list[tuple[int, int]]) -> Any:
    """A view of a large array that NumPy does not let anybody write to, and whose memory is noted for PyTorch."""
    view = array.view()
    view.flags.writeable = False
    # Strides can be negative, as those of ``array[::-1]``, whose first entry is the last one in memory.
    reaches = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    first = array.ctypes.data + sum(reach for reach in reaches if reach < 0)
    last = array.ctypes.data + sum(reach for reach in reaches if reach > 0)
    shared.append((first, last + array.itemsize))
    return view
