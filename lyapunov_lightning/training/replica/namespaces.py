"""Class attributes and global variables that a training step may write to, replaced by copies while it is replayed.

State that does not hang on an instance is reached by name: ``type(self).count += 1``, a list in the class body, a
counter in the user's script. Which names those are is known, since a function's code names its attributes and globals.
So for as long as a replay lasts, the classes of what was copied and the globals that their code names hold copies, and
afterwards what they held before. Globals of installed libraries are left alone: they are many, and hardly ever state of
a training step.
"""

import enum
import functools
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lyapunov_lightning.training.replica.copier import Copier

_LIBRARIES = sys.stdlib_module_names | {
    *("lightning", "lightning_fabric", "lightning_utilities", "lyapunov_lightning", "numpy", "pytorch_lightning"),
    *("torch", "torchmetrics", "torchvision", "transformers"),
}
"""Packages whose classes keep no state of a training step."""

_INSTALLED = tuple({sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib", "platstdlib")})
"""Folders of what is installed; everything elsewhere is the user's own."""

_NOT_DATA = (types.ModuleType, type)

_NEVER_RESTORED = frozenset({"__dict__", "__weakref__", "__abstractmethods__", "__doc__", "_abc_impl"})


@contextmanager
def replaced_namespaces(copier: Copier) -> Iterator[None]:
    """Let classes and the user's globals hold copies meanwhile, and what they held before afterwards.

    Args:
        copier: Has copied the objects of whose classes and functions this is about.

    """
    namespaces = _reached(copier)
    try:
        for namespace in namespaces:
            namespace.install()
        yield
    finally:
        for namespace in namespaces:
            namespace.restore()


@contextmanager
def redirected(function: Callable[..., Any], copier: Copier) -> Iterator[Callable[..., Any]]:
    """Let a function of the user's that refers to a module itself find the module's copy.

    Args:
        function: Called with the copy as an argument, which it may not use; not copied, since it is no part of the
            training.
        copier: Has made the copy.

    Yields:
        The function, or the copy's where it is a method of a module that was copied.

    """
    if isinstance(function, types.MethodType) and copier.has(function.__self__):
        yield types.MethodType(function.__func__, copier.copy_of(function.__self__))
        return
    code = getattr(function, "__code__", None)
    cells = [cell for cell in getattr(function, "__closure__", None) or () if _holds_module(cell, copier)]
    variables: dict[str, Any] = getattr(function, "__globals__", {})
    named = () if code is None else names_in(code) & variables.keys()
    modules = {name: variables[name] for name in named if _is_copied_module(variables[name], copier)}
    contents = [cell.cell_contents for cell in cells]
    try:
        for cell, module in zip(cells, contents, strict=True):
            cell.cell_contents = copier.copy_of(module)
        variables.update({name: copier.copy_of(module) for name, module in modules.items()})
        yield function
    finally:
        for cell, module in zip(cells, contents, strict=True):
            cell.cell_contents = module
        variables.update(modules)


def _holds_module(cell: types.CellType, copier: Copier) -> bool:
    try:
        return _is_copied_module(cell.cell_contents, copier)
    except ValueError:  # an empty cell
        return False


def _is_copied_module(value: Any, copier: Copier) -> bool:
    return isinstance(value, nn.Module) and copier.has(value)


class _ClassNamespace:
    """The attributes of a class."""

    def __init__(self, cls: type, copier: Copier) -> None:
        self._cls = cls
        self._before = dict(vars(cls))
        self._copies = {
            name: copied
            for name, value in self._before.items()
            if not (name.startswith("__") and name.endswith("__") and not isinstance(value, types.FunctionType))
            and name not in _NEVER_RESTORED
            and (copied := copier(value)) is not value
        }

    def install(self) -> None:
        for name, copied in self._copies.items():
            setattr(self._cls, name, copied)

    def restore(self) -> None:
        now = vars(self._cls)
        for name in [name for name in now if name not in self._before]:
            delattr(self._cls, name)
        for name, value in self._before.items():
            if now.get(name) is not value and name not in _NEVER_RESTORED:
                setattr(self._cls, name, value)


class _GlobalNamespace:
    """Some of the global variables of a module."""

    def __init__(self, variables: dict[str, Any], names: frozenset[str], copier: Copier) -> None:
        self._variables = variables
        self._before = {name: v for name in names & variables.keys() if not isinstance(v := variables[name], _NOT_DATA)}
        self._missing = names - variables.keys()
        self._copies = {name: copied for name, v in self._before.items() if (copied := copier(v)) is not v}

    def install(self) -> None:
        self._variables.update(self._copies)

    def restore(self) -> None:
        for name in self._missing & self._variables.keys():
            del self._variables[name]  # made by the step
        self._variables.update(self._before)


def _reached(copier: Copier) -> list[_ClassNamespace | _GlobalNamespace]:
    """The namespaces behind what was copied; copying their content can reach further ones."""
    found: list[_ClassNamespace | _GlobalNamespace] = []
    looked_at: set[Any] = set()
    while True:
        new: list[Any] = [item for item in (*copier.classes, *copier.functions) if item not in looked_at]
        if not new:
            return found
        looked_at.update(new)
        for item in new:
            if isinstance(item, type):
                if _keeps_state(item):
                    found.append(_ClassNamespace(item, copier))
                    for function in _functions_of(item):
                        found.extend(_globals_of(function, copier, looked_at))
            else:
                found.extend(_globals_of(item, copier, looked_at))


def _globals_of(function: Callable[..., Any], copier: Copier, looked_at: set[Any]) -> Iterator[_GlobalNamespace]:
    """The globals that a function of the user's names, and those that the functions among them name."""
    pending = [function]
    while pending:
        current = pending.pop()
        code = getattr(current, "__code__", None)
        if code is None or code in looked_at or not _is_users(current.__module__):
            continue
        looked_at.add(code)
        names = names_in(code)
        spaces: list[dict[str, Any]] = [current.__globals__]
        for space in spaces:
            for name in names & space.keys():
                value = space[name]
                if isinstance(value, types.FunctionType):
                    pending.append(value)
                elif isinstance(value, type):
                    copier.classes[value] = None
                elif space is current.__globals__ and isinstance(value, types.ModuleType) and _is_users(value.__name__):
                    spaces.append(vars(value))
            yield _GlobalNamespace(space, names, copier)


def _functions_of(cls: type) -> Iterator[Callable[..., Any]]:
    for value in vars(cls).values():
        function = getattr(value, "fget", None) or getattr(value, "__func__", None) or value
        function = getattr(function, "__wrapped__", function)
        if isinstance(function, types.FunctionType):
            yield function


@functools.lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> frozenset[str]:
    """The names of globals and attributes in a function's code, that of the functions in it included."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


@functools.lru_cache(maxsize=4096)
def _is_users(module: str | None) -> bool:
    """Whether a module is neither part of Python nor installed."""
    if module is None or module.partition(".")[0] in _LIBRARIES:
        return module == "__main__"
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is None or not file.startswith(_INSTALLED)


def _keeps_state(cls: type) -> bool:
    """Whether a class is written in Python, by somebody who may keep state in it."""
    package = (cls.__module__ or "").partition(".")[0]
    return (package not in _LIBRARIES or package == "__main__") and not issubclass(cls, enum.Enum)
