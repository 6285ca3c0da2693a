"""How values of Python's own types are copied: containers, functions, references, locks, views, files.

Each function makes the copy for a `Copier`, which it calls for everything that the value refers to.
"""

import _thread
import functools
import gc
import io
import os
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from lyapunov_lightning.curvature.errors import MeasurementError

if TYPE_CHECKING:
    from lyapunov_lightning.training.replica.copier import Copier

COMPILERS = ("torch._dynamo", "torch._inductor")
"""Packages whose functions keep state of their own, which is nobody's business."""

_LOCK, _RLOCK = type(threading.Lock()), type(threading.RLock())


class Exhausted:
    """Stands in the place of an iterator that cannot be copied, and refuses to be drawn from.

    Args:
        kind: The iterator's type, named in the error.

    """

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __iter__(self) -> "Exhausted":
        return self

    def __next__(self, *_: Any) -> NoReturn:
        raise MeasurementError(
            f"The training step draws from a {self._kind}, which cannot be copied, so a replay would take its items"
            " away from the training. Keep a list, or a DataLoader that is iterated anew, in its place, or define"
            " `curvature_loss(self, batch)` on the module."
        )

    send = throw = __next__


def _copy_list(copier: "Copier", value: list[Any]) -> list[Any]:
    copied: list[Any] = copier.note(value, [])
    copied.extend(map(copier, value))
    return copied


def _copy_dict(copier: "Copier", value: dict[Any, Any]) -> dict[Any, Any]:
    copied: dict[Any, Any] = copier.note(value, type(value)())
    for key, entry in value.items():
        copied[copier(key)] = copier(entry)
    return copied


def _copy_set(copier: "Copier", value: set[Any]) -> set[Any]:
    copied: set[Any] = copier.note(value, set())
    copied.update(map(copier, value))
    return copied


def _copy_tuple(copier: "Copier", value: Any) -> Any:
    """A tuple or a frozenset, itself where all its entries are themselves."""
    copied = [copier(entry) for entry in value]
    if copier.has(value):  # it holds itself, by way of an entry
        return copier.copy_of(value)
    return value if all(one is other for one, other in zip(copied, value, strict=True)) else type(value)(copied)


def _copy_cell(copier: "Copier", cell: types.CellType) -> types.CellType:
    copied: types.CellType = copier.note(cell, types.CellType())
    with suppress(ValueError):  # of an empty cell
        copied.cell_contents = copier(cell.cell_contents)
    return copied


def _copy_function(copier: "Copier", function: types.FunctionType) -> Any:
    copier.functions[function] = None
    if "_torchdynamo_orig_callable" in function.__dict__:  # compiled: what it was compiled from
        return copier(function._torchdynamo_orig_callable)  # type: ignore[attr-defined]
    is_method = function.__code__.co_freevars == ("__class__",)
    cells = None if is_method or not function.__closure__ else tuple(map(copier, function.__closure__))
    defaults, keywords = copier(function.__defaults__), copier(function.__kwdefaults__)
    if cells is None and defaults is function.__defaults__ and not keywords and not function.__dict__:
        copier.stateless.append(function)
        return function
    if function.__module__ and function.__module__.startswith(COMPILERS):
        return function
    copied = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, defaults, cells or function.__closure__
    )
    copier.note(function, copied)
    copied.__kwdefaults__ = keywords
    copied.__qualname__, copied.__module__, copied.__doc__ = (
        function.__qualname__,
        function.__module__,
        function.__doc__,
    )
    copied.__dict__.update((name, copier(value)) for name, value in function.__dict__.items())
    return copied


def _copy_method(copier: "Copier", method: types.MethodType) -> Any:
    if method.__func__ in copier.replaced:
        return copier.replaced[method.__func__]
    return types.MethodType(copier(method.__func__), copier(method.__self__))


def _copy_builtin(copier: "Copier", function: types.BuiltinMethodType) -> Any:
    """A method of an object in C, such as the ``append`` of a list."""
    owner = function.__self__
    if owner is None or isinstance(owner, (types.ModuleType, type)):
        return function
    return getattr(copier(owner), function.__name__)


def _copy_weak_reference(copier: "Copier", reference: "weakref.ref[Any]") -> Any:
    target = reference()
    return reference if target is None else weakref.ref(copier(target))


def _copy_keyed_reference(copier: "Copier", reference: "weakref.KeyedRef[Any, Any]") -> Any:
    target = reference()
    if target is None:
        return reference
    return weakref.KeyedRef(copier(target), copier(reference.__callback__), copier(reference.key))


def _copy_cached_function(copier: "Copier", function: Any) -> Any:
    """With a cache of its own, which does not keep copies alive."""
    fresh = functools.lru_cache(**function.cache_parameters())(copier(function.__wrapped__))
    functools.update_wrapper(fresh, function)
    return fresh


def _copy_dict_view(copier: "Copier", view: Any) -> Any:
    (owner,) = gc.get_referents(view)
    return getattr(copier(owner), type(view).__name__.removeprefix("dict_"))()


def _copy_memory_view(copier: "Copier", view: memoryview) -> memoryview:
    """A view of the copy of what it is a view of, if that is all of it; else of a copy of what it shows."""
    if view.readonly:
        return view
    copied: Any = memoryview(copier(view.obj))
    if copied.nbytes != view.nbytes:
        copied = memoryview(bytearray(view))
    return copied if copied.format == view.format else copied.cast("B").cast(view.format, view.shape)  # type: ignore[no-any-return]


def _copy_thread_local(copier: "Copier", local: threading.local) -> threading.local:
    copied: threading.local = copier.note(local, threading.local())
    copied.__dict__.update((name, copier(value)) for name, value in local.__dict__.items())
    return copied


def copy_file(copier: "Copier", file: Any) -> Any:
    """A file to be read is opened again at the same place; what is written goes nowhere."""
    try:
        if file.closed or (not file.readable() and not file.writable()):
            return file
        if file.writable():
            return _opened(copier, open(os.devnull, "w" if isinstance(file, io.TextIOBase) else "wb"))
        again = _opened(copier, open(file.name, file.mode, encoding=getattr(file, "encoding", None)))  # noqa: SIM115
        again.seek(file.tell())
    except (AttributeError, OSError, ValueError):  # a pipe or a socket, say
        return Exhausted(type(file).__name__)
    return again


def _opened(copier: "Copier", file: Any) -> Any:
    copier.files.append(file)
    return file


Handler = Callable[["Copier", Any], Any]
"""Makes the copy of a value."""

HANDLERS: dict[type, Handler] = {
    list: _copy_list,
    dict: _copy_dict,
    OrderedDict: _copy_dict,
    set: _copy_set,
    tuple: _copy_tuple,
    frozenset: _copy_tuple,
    types.CellType: _copy_cell,
    types.FunctionType: _copy_function,
    types.MethodType: _copy_method,
    types.BuiltinMethodType: _copy_builtin,
    types.GeneratorType: lambda _, generator: Exhausted(type(generator).__name__),
    weakref.ref: _copy_weak_reference,
    weakref.KeyedRef: _copy_keyed_reference,
    functools._lru_cache_wrapper: _copy_cached_function,
    threading.local: _copy_thread_local,
    memoryview: _copy_memory_view,
    type({}.keys()): _copy_dict_view,
    type({}.values()): _copy_dict_view,
    type({}.items()): _copy_dict_view,
    torch.Generator: lambda _, generator: generator.clone_state(),
    staticmethod: lambda copier, value: _rewrapped(value, copier(value.__func__), value.__func__),
    classmethod: lambda copier, value: _rewrapped(value, copier(value.__func__), value.__func__),
    _LOCK: lambda *_: _thread.allocate_lock(),
    _RLOCK: lambda *_: threading.RLock(),
}


def _rewrapped(wrapper: Any, copied: Any, function: Any) -> Any:
    return wrapper if copied is function else type(wrapper)(copied)
