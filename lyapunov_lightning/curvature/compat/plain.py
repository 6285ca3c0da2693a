"""Whether a tensor is one that functions of this package may differentiate in PyTorch's place."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is differentiated by backward passes alone, and in a precision that may round once more.

    Half precision is left to PyTorch, whose kernels compute in float32 and round once. So are the transforms of
    ``torch.func`` and forward mode, which ask of a function that all it keeps is among its inputs and outputs.
    """
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype in (torch.float32, torch.float64)
        and tensor.layout is torch.strided
        and tensor.requires_grad
        and torch.is_grad_enabled()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and forward_ad.unpack_dual(tensor).tangent is None
    )
