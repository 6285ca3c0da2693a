"""How values of Python's own types are copied: functions, references, locks, views, files; and what loggers become.

Each is a `Way`. Which types it is for, and why these have one of their own, says the registry in `rules`.
"""

import _thread
import functools
import gc
import io
import os
import threading
import types
import weakref
from contextlib import suppress
from typing import Any

import torch

from lyapunov_lightning.training.lightning_names import in_library_of
from lyapunov_lightning.training.replica.memo import Memo, UncopiedError
from lyapunov_lightning.training.replica.walk import Copy

COMPILERS = ("torch._dynamo", "torch._inductor")
"""Packages whose functions hold compiled code and the guards of its caches."""


_BY_NAME = (io.TextIOWrapper, io.BufferedReader, io.BufferedRandom, io.FileIO)
"""Kinds of files that ``open`` gives."""


def keep(value: Any, copy: Copy, memo: Memo) -> Any:
    """The value itself."""
    return value


def refuse(value: Any, copy: Copy, memo: Memo) -> Any:
    """No copy, but what the copier's policy puts in its place.

    Raises:
        UncopiedError: Always.

    """
    raise UncopiedError(f"a {type(value).__name__} continues from where it is, and exists only once")


def copy_cell(cell: types.CellType, copy: Copy, memo: Memo) -> types.CellType:
    """A cell with a copy of what a closure keeps in it."""
    copied: types.CellType = memo.note(cell, types.CellType())
    with suppress(ValueError):  # an empty cell, of a name that is bound later
        copied.cell_contents = copy(cell.cell_contents)
    return copied


def copy_function(function: types.FunctionType, copy: Copy, memo: Memo) -> Any:
    """A function with copies of its closure, defaults and attributes; itself where it has none of these."""
    memo.functions[function] = None
    if "_torchdynamo_orig_callable" in function.__dict__:  # compiled: what it was compiled from
        return copy(function._torchdynamo_orig_callable)  # type: ignore[attr-defined]
    # A method that calls `super()` has its class in a closure. That is no state, and classes are not copied.
    is_method = function.__code__.co_freevars == ("__class__",)
    cells = None if is_method or not function.__closure__ else tuple(map(copy, function.__closure__))
    defaults, keywords = copy(function.__defaults__), copy(function.__kwdefaults__)
    if cells is None and defaults is function.__defaults__ and not keywords and not function.__dict__:
        # Itself, since others find it by identity: a registry of losses, `if activation is relu`. A step may still
        # write to it, `forward.calls = 1`, which `Memo.forget` takes back.
        memo.stateless.append(function)
        return function
    if function.__module__ and function.__module__.startswith(COMPILERS):
        # A wrapper that holds compiled code, which a replay does not use: it runs the code as it was written.
        return function
    # With the globals of the original. Those that its code names hold copies for as long as it runs, see `namespaces`.
    copied = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, defaults, cells or function.__closure__
    )
    memo.note(function, copied)
    copied.__kwdefaults__ = keywords
    copied.__qualname__, copied.__module__, copied.__doc__ = (
        function.__qualname__,
        function.__module__,
        function.__doc__,
    )
    copied.__dict__.update((name, copy(value)) for name, value in function.__dict__.items())
    return copied


def copy_method(method: types.MethodType, copy: Copy, memo: Memo) -> Any:
    """The copy's method, and not one that still writes to the original: ``self.hook = self.count_calls``."""
    return types.MethodType(copy(method.__func__), copy(method.__self__))


def copy_builtin(function: types.BuiltinMethodType, copy: Copy, memo: Memo) -> Any:
    """The same method of the copy of an object in C, such as the ``append`` of a list."""
    owner = function.__self__
    if owner is None or isinstance(owner, (types.ModuleType, type)):
        return function  # `math.sqrt`, `dict.fromkeys`
    return getattr(copy(owner), function.__name__)


def copy_wrapped_method(wrapper: Any, copy: Copy, memo: Memo) -> Any:
    """A ``staticmethod`` or ``classmethod`` of the copied function; itself where the function stands for itself."""
    copied = copy(wrapper.__func__)
    return wrapper if copied is wrapper.__func__ else type(wrapper)(copied)


def copy_weak_reference(reference: "weakref.ref[Any]", copy: Copy, memo: Memo) -> Any:
    """A reference to the copy, which something else than this reference has to keep alive."""
    target = reference()
    return reference if target is None else weakref.ref(copy(target))


def copy_keyed_reference(reference: "weakref.KeyedRef[Any, Any]", copy: Copy, memo: Memo) -> Any:
    """An entry of a ``WeakValueDictionary``."""
    target = reference()
    if target is None:
        return reference
    return weakref.KeyedRef(copy(target), copy(reference.__callback__), copy(reference.key))


def copy_cached_function(function: Any, copy: Copy, memo: Memo) -> Any:
    """A function of ``lru_cache`` with an empty cache of its own.

    In the training's cache, arguments of a replay would push out the training's, and copies of modules would live on.

    """
    fresh = functools.lru_cache(**function.cache_parameters())(copy(function.__wrapped__))
    functools.update_wrapper(fresh, function)
    return fresh


def copy_dict_view(view: Any, copy: Copy, memo: Memo) -> Any:
    """The keys, values or items of the copy of a dictionary."""
    (owner,) = gc.get_referents(view)  # its attribute `mapping` is a proxy, of which there is no copy
    return getattr(copy(owner), type(view).__name__.removeprefix("dict_"))()


def copy_memory_view(view: memoryview, copy: Copy, memo: Memo) -> memoryview:
    """A view of the copy of what it is a view of, if that is all of it; else of a copy of what it shows."""
    if view.readonly:
        return view
    copied: Any = memoryview(copy(view.obj))
    if copied.nbytes != view.nbytes:
        # Of a part, whose position in the whole Python does not reveal: what is written to it does not reach the whole.
        copied = memoryview(bytearray(view))
    return copied if copied.format == view.format else copied.cast("B").cast(view.format, view.shape)  # type: ignore[no-any-return]


def copy_thread_local(local: threading.local, copy: Copy, memo: Memo) -> threading.local:
    """What this thread has in a ``threading.local``, in one of the copy's own."""
    copied: threading.local = memo.note(local, threading.local())
    copied.__dict__.update((name, copy(value)) for name, value in local.__dict__.items())
    return copied


def fresh_lock(lock: Any, copy: Copy, memo: Memo) -> Any:
    """A lock that nobody holds. One that another thread holds may never be released in the copy."""
    return _thread.allocate_lock()


def fresh_reentrant_lock(lock: Any, copy: Copy, memo: Memo) -> Any:
    """The same of the kind that one thread may take twice."""
    return threading.RLock()


def copy_generator(generator: torch.Generator, copy: Copy, memo: Memo) -> torch.Generator:
    """Random numbers that continue as the original's would."""
    return generator.clone_state()


def copy_file(file: Any, copy: Copy, memo: Memo) -> Any:
    """A file to be read is opened again at the same place; what is written to one goes nowhere.

    Raises:
        UncopiedError: If it can be read only once, as a pipe or a socket.

    """
    try:
        if file.closed or (not file.readable() and not file.writable()):
            return file
        if file.writable():
            # Also one that can be read as well: what is read from it the step has usually written before.
            return _opened(memo, open(os.devnull, "w" if isinstance(file, io.TextIOBase) else "wb"))
        # A `GzipFile` has a name as well, but by that name one reads what is compressed. A file that was made from a
        # descriptor has that for a name, and the copy's `close` would close it for the training.
        if not isinstance(file, _BY_NAME) or isinstance(file.name, int):
            raise ValueError("there is no name to open it by")
        again = _opened(memo, open(file.name, file.mode, encoding=getattr(file, "encoding", None)))  # noqa: SIM115
        again.seek(file.tell())
    except (AttributeError, OSError, ValueError) as error:  # its name is "<stdin>", or it has no place, as a socket
        raise UncopiedError(str(error)) from error
    return again


def _opened(memo: Memo, file: Any) -> Any:
    memo.files.append(file)
    return file


def silent_logger(logger: Any, copy: Copy, memo: Memo) -> Any:
    """A logger of the same library for which everything goes nowhere."""
    return in_library_of(logger, "loggers.logger.DummyLogger")()


def silent_experiment(experiment: Any, copy: Copy, memo: Memo) -> Any:
    """The experiment of such a logger, on which every method can be called."""
    return in_library_of(experiment, "loggers.logger.DummyLogger")().experiment
