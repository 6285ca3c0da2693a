"""What an error of PyTorch means for a derivative: that there is none, or that a device failed for the moment.

PyTorch raises the same `RuntimeError` for both, so its words are read. An error whose words say neither means that
there is no second derivative if it comes while a gradient is differentiated, comes again at a second attempt, and does
not come while the gradient itself is taken.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lyapunov_lightning.curvature.errors import MeasurementError

_NO_DERIVATIVE = re.compile(
    r"derivative for .* is not implemented"  # a kernel's backward pass
    r"|double.?backward|differentiate(d)? twice|not differentiable"
    r"|forward (mode )?AD\b|the jvp function|jvp is not implemented|ZeroTensors? .*immutable|zero tensor"
    r"|does not require grad|trying to backward through the graph a second time"  # a function that cut its graph
    r"|can't call numpy\(\) on tensor that requires grad|hides its backward pass"
    r"|autograd\.Function with functorch|setup_context|generate_vmap_rule"
    r"|rnn.*(backward|forward).*(train|eval)|backward can only be called in training mode"
    r"|not implemented for|not currently implemented|could not run 'aten::",  # a kernel for this dtype or device
    re.IGNORECASE,
)

_DEVICE_FAILURE = re.compile(
    r"\b(CUDA|cuDNN|cuBLAS(Lt)?|cuSOLVER|cuSPARSE|cuFFT|NCCL|HIP|MIOpen|rocBLAS|XPU|MPS|SYCL|oneDNN|mkldnn)\b[^.]*"
    r"\b(error|failure|failed)\b"
    r"|\b(CUDNN|CUBLAS|CUSOLVER|CUSPARSE|CUFFT|HIPBLAS|MIOPEN|NVRTC|NCCL)_(STATUS|ERROR|INTERNAL|EXEC)\w*"
    r"|could not create a primitive|unable to find (a valid|an engine)|launch (failure|failed|timed out)"
    r"|connection (reset|closed)",
    re.IGNORECASE,
)

_OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)


_MARK = "_is_of_a_second_derivative"


@contextmanager
def of_a_second_derivative() -> Iterator[None]:
    """Mark the errors of a block in which a gradient is differentiated, or made ready to be."""
    try:
        yield
    except RuntimeError as error:
        # A mark and no error of its own: type, words and traceback stay those that the user can look up.
        setattr(error, _MARK, True)
        raise


def may_pass(error: RuntimeError) -> bool:
    """Whether a second attempt may succeed: a library of a device or of the network failed, or nobody knows what."""
    return _is_of_a_library(error) or (_is_of_interest(error) and hasattr(error, _MARK) and not _says_so(error))


def lacks_derivative(error: RuntimeError) -> bool:
    """Whether there is no second derivative, given that the error comes every time and there is a first one."""
    return _is_of_interest(error) and (_says_so(error) or hasattr(error, _MARK)) and not _is_of_a_library(error)


def _is_of_interest(error: RuntimeError) -> bool:
    # Finite differences do not help against a lack of memory. They would hide it, and give another number.
    is_own = isinstance(error, (MeasurementError, torch.OutOfMemoryError))
    return not is_own and _OUT_OF_MEMORY.search(str(error)) is None


def _is_of_a_library(error: RuntimeError) -> bool:
    # The words on a derivative count first: what cuDNN says is "not implemented for" a dtype comes again every time.
    return _is_of_interest(error) and not _says_so(error) and _DEVICE_FAILURE.search(str(error)) is not None


def _says_so(error: RuntimeError) -> bool:
    return isinstance(error, NotImplementedError) or _NO_DERIVATIVE.search(str(error)) is not None
