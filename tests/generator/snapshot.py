"""All that can be reached from a user's objects, as plain values that `==` compares bit by bit.

Unlike a state dict or a pickle it goes wherever a step can write to: slots, closures, default arguments, class
attributes, the progress of iterators, the counts of caches, `.grad`, what is shared among several names.
"""

import array
import contextvars
import functools
import io
import itertools
import random
import re
import types
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.callbacks.identity import _bytes

_ATOMS = (type(None), bool, int, str, bytes, complex, range, slice, torch.dtype, torch.device, torch.Size)

_FRAMEWORK = re.compile(
    r"_trainer|_fabric|_jit.*|_compiler_ctx|_lightning_optimizers|_metric_attributes|_torchdynamo_wrapper_id|prepare_data_per_node"
)
"""Attributes of modules that are Lightning's, not the user's."""

_ITERATORS = tuple(
    type(example)
    for example in (
        iter([]), iter(()), iter(range(0)), iter({}), iter("", ), zip(), enumerate([]), map(abs, []), reversed([]),
        itertools.count(), itertools.cycle([]), itertools.chain(), itertools.islice([], 0),
    )
)  # fmt: skip

_LEAST_ID = 2**32
"""Integers above are the ids of objects, and another number in every run."""

_CLASS_ENTRIES = frozenset(
    {"__dict__", "__weakref__", "__doc__", "__module__", "_abc_impl", "__abstractmethods__", "__slotnames__"}
)
"""Entries of classes that are Python's; it keeps the last one there whenever an object is copied."""


class Snapshot:
    """Takes one coherent snapshot: of an object met before it gives the place in the order of first meetings.

    Args:
        user: Name of the module that holds the user's code. Objects of its classes are looked into, and its classes
            and functions too.

    """

    def __init__(self, user: str) -> None:
        self._user = user
        self._met: dict[int, int] = {}
        self._alive: list[Any] = []  # an id is good only as long as its object lives

    def __call__(self, value: Any) -> Any:
        """The value as numbers, strings, bytes, lists and dictionaries."""
        if isinstance(value, float):
            return value.hex()
        if type(value) in weakref.ProxyTypes:
            return "<proxy>"
        if isinstance(value, _ATOMS):
            return value if type(value) in (type(None), bool, int, str, bytes) else repr(value)
        if isinstance(value, (tuple, frozenset)):
            return self._items(value)
        if id(value) in self._met:
            return f"<met before: {self._met[id(value)]}>"
        self._met[id(value)] = len(self._met)
        self._alive.append(value)
        return self._look(value)

    def _look(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (np.ndarray, np.generic)):
            return [str(value.dtype), list(value.shape), value.tobytes()]
        if isinstance(value, np.random.Generator):
            return self(value.bit_generator.state)
        if isinstance(value, np.random.RandomState):
            return self(value.get_state(legacy=False))
        if isinstance(value, torch.Generator):
            return _bytes(value.get_state())
        if isinstance(value, random.Random):
            return repr(value.getstate())
        if isinstance(value, (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)):
            return [type(value).__name__, self(value.state_dict()), self(self._attributes(value))]
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, (dict, Mapping)):
            return self._mapping(value)
        if isinstance(value, (list, deque, set)):
            return self._items(value)
        if isinstance(value, io.StringIO):
            return value.getvalue()
        if isinstance(value, (bytearray, array.array, memoryview)):
            return bytes(value)
        if isinstance(value, contextvars.ContextVar):
            return self(value.get())
        if isinstance(value, types.ModuleType):
            return {name: self(kept) for name, kept in vars(value).items() if not name.startswith("__")}
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, _ITERATORS):
            return [type(value).__name__, self(value.__reduce__()[1:])]
        return self._code(value) or self._object(value)

    def _tensor(self, value: Tensor) -> Any:
        kept = value.detach()
        described: dict[str, Any] = {
            "type": type(value).__name__,
            "dtype": str(value.dtype),
            "shape": [int(size) if isinstance(size, int) else "?" for size in value.shape],
            "requires_grad": value.requires_grad,
        }
        if value.layout is torch.strided:
            described["data"] = _bytes(kept)
        else:
            described["data"] = _bytes(kept.values() if value.is_nested else kept.to_dense())
        if value.is_leaf:
            described["grad"] = self(value.grad)
        else:
            described["graph"] = type(value.grad_fn).__name__
        for registry in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            described[registry] = len(getattr(value, registry, None) or ())
        if attributes := {name: kept for name, kept in vars(value).items() if not name.startswith("_dynamo")}:
            described["attributes"] = self(attributes)
        return described

    def _module(self, value: nn.Module) -> Any:
        described: dict[str, Any] = {"type": type(value).__name__}
        for name, attribute in vars(value).items():
            if (
                isinstance(attribute, dict)
                and "hooks" in name
                and name.startswith(("_backward", "_forward", "_state", "_load", "_is_full"))
            ):
                described[name] = [self(hook) for hook in attribute.values()]  # the keys count hooks of the process
            elif not _FRAMEWORK.fullmatch(name):
                described[name] = self(attribute)
        return described

    def _mapping(self, value: Any) -> Any:
        if all(isinstance(key, str) for key in value):
            entries: Any = {"order": list(value), **{key: self(inner) for key, inner in value.items()}}
        else:
            keys = ["<id>" if isinstance(key, int) and key > _LEAST_ID else self(key) for key in value]
            entries = [[key, self(inner)] for key, inner in zip(keys, value.values(), strict=True)]
        return self._with_attributes(value, entries)

    def _items(self, value: Any) -> Any:
        if isinstance(value, (set, frozenset)):
            return sorted(repr(self(item)) for item in value)
        return self._with_attributes(value, [self(item) for item in value])

    def _with_attributes(self, value: Any, entries: Any) -> Any:
        attributes = self._attributes(value)
        return {"type": type(value).__name__, "entries": entries, **self(attributes)} if attributes else entries

    def _class(self, value: type) -> Any:
        if value.__module__ != self._user:
            return f"<class {value.__name__}>"
        entries = {
            name: self(entry)
            for name, entry in vars(value).items()
            if name not in _CLASS_ENTRIES and not isinstance(entry, types.MemberDescriptorType)
        }
        return {"class": value.__name__, "bases": [self(base) for base in value.__bases__], **entries}

    def _code(self, value: Any) -> Any:
        """Functions and what wraps them."""
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return [self(value.__func__), self(value.__self__)]
        if isinstance(value, types.BuiltinMethodType):
            return [value.__name__, None if isinstance(value.__self__, types.ModuleType) else self(value.__self__)]
        if isinstance(value, functools.partial):
            return ["partial", self(value.func), self(value.args), self(value.keywords)]
        if isinstance(value, functools._lru_cache_wrapper):
            return [self(value.cache_info()), self(value.__wrapped__)]
        if isinstance(value, (classmethod, staticmethod)):
            return [type(value).__name__, self(value.__func__)]
        if isinstance(value, property):
            return ["property", self(value.fget), self(value.fset)]
        if isinstance(value, types.GeneratorType):
            frame = value.gi_frame
            return ["generator", None if frame is None else [frame.f_lineno, self(dict(frame.f_locals))]]
        if isinstance(value, weakref.ref):
            return ["weakref", self(value())]
        return None

    def _function(self, value: types.FunctionType) -> Any:
        if value.__module__ != self._user:
            return f"<function {value.__qualname__}>"
        cells = []
        for cell in value.__closure__ or ():
            try:
                cells.append(self(cell.cell_contents))
            except ValueError:  # an empty cell
                cells.append(None)
        return {
            "function": value.__qualname__,
            "closure": cells,
            "defaults": self(value.__defaults__),
            "keyword defaults": self(value.__kwdefaults__),
            "attributes": self(vars(value)),
        }

    def _object(self, value: Any) -> Any:
        name = f"<{type(value).__name__}>"
        if isinstance(value, (pl.Trainer, Logger)):
            return name
        kind = type(value).__module__
        known = kind in (self._user, "types", "_thread") or kind.startswith(
            ("torch.utils.data", "torchmetrics", "functools", "weakref")
        )
        attributes = self._attributes(value) if known or isinstance(value, (DataLoader, pl.LightningDataModule)) else {}
        return {"type": name, **self(attributes)} if attributes else name

    def _attributes(self, value: Any) -> dict[str, Any]:
        """What an object keeps in its ``__dict__`` and in slots."""
        if isinstance(value, torch.optim.Optimizer) and type(value).__module__ != self._user:
            return {}
        found = {
            name: attribute
            for name, attribute in getattr(value, "__dict__", {}).items()
            if not _FRAMEWORK.fullmatch(name) and not (isinstance(value, torch.optim.Optimizer) and _is_own(name))
        }
        if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
            return {}
        if isinstance(value, DataLoader):
            found.pop("_iterator", None)
        for kind in type(value).__mro__:
            slots = kind.__dict__.get("__slots__", ()) if kind.__module__ == self._user else ()
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(value, name):
                    found[name] = getattr(value, name)
        return found


def _is_own(name: str) -> bool:
    """Whether an attribute of an optimizer is PyTorch's: in its state dict, or hooks."""
    return name in ("state", "param_groups", "defaults", "step") or name.startswith("_")
