"""What a loss is computed from: tensors that were there before it, and layers that are training or not.

A gradient graph that is kept is good for as long as these are what they were. They are found by watching the operations
of the loss: a tensor that no operation has made was there before.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lyapunov_lightning.curvature.compat.operations import replaced, unwrapped
from lyapunov_lightning.curvature.loss.fingerprints import Fingerprint, joined

_LARGE = 2**26
"""Bytes from which a tensor is taken for a data set, of which a batch was cut out: it is not read as a whole."""

Modes = dict[int, tuple["weakref.ref[nn.Module]", bool]]
"""Layers by their id, each with whether it was training."""


class Sources(TorchFunctionMode):
    """Notes the tensors and the layers that a loss uses, while it is entered.

    What the loss itself writes to, such as the running averages of a BatchNorm, is none of its sources: it is another
    one after each evaluation. PyTorch does not count all of these writes either, so that what a tensor holds is read
    when it is first met.

    Args:
        known: Tensors that are sources anyway, and not noted.

    Attributes:
        modes: The layers that were called, with what they were doing.

    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = set(map(id, known))
        self._first_node = 0
        self._stack = ExitStack()
        self._seen: dict[int, Fingerprint] = {}
        self._made: dict[int, weakref.ref[Tensor]] = {}
        self.modes: Modes = {}

    def __enter__(self) -> "Sources":
        self._first_node = torch._C._autograd._get_sequence_nr()
        call: Any = nn.Module._call_impl

        def noted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.modes.setdefault(id(module), (weakref.ref(module), module.training))
            return call(module, *args, **kwargs)

        self._stack.enter_context(replaced(nn.Module, "_call_impl", noted))  # hooks on all modules come with warnings
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
        arguments: list[Tensor] = []
        _collect(args, arguments)
        _collect(kwargs.values(), arguments)
        for tensor in map(unwrapped, arguments):
            if id(tensor) not in self._seen and id(tensor) not in self._known and not self._is_made(tensor):
                self._seen[id(tensor)] = Fingerprint([tensor], _LARGE)
        result = func(*args, **kwargs)
        results: list[Tensor] = []
        _collect((result,), results)
        for tensor in results:
            if tensor.grad_fn is None and id(tensor) not in self._seen:
                self._made[id(tensor)] = weakref.ref(tensor)
        return result

    @property
    def fingerprints(self) -> list[Fingerprint]:
        """Those of the tensors that were there before the loss, but for what it wrote to."""
        unchanged = [fingerprint for fingerprint in self._seen.values() if not fingerprint.is_changed()]
        return [joined(unchanged)] if unchanged else []

    def _is_made(self, tensor: Tensor) -> bool:
        if tensor.grad_fn is not None:
            return tensor.grad_fn._sequence_nr() >= self._first_node
        reference = self._made.get(id(tensor))
        return reference is not None and reference() is tensor


def are_switched(modes: Modes) -> bool:
    """Whether a layer that was training is evaluating by now, or the other way round."""
    return any((module := layer()) is not None and module.training != mode for layer, mode in modes.values())


def _collect(values: Iterable[Any], tensors: list[Tensor]) -> None:
    """Gather the tensors among the arguments or the results of an operation."""
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            _collect(value, tensors)
        elif isinstance(value, dict):
            _collect(value.values(), tensors)
