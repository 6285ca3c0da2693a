"""Class attributes and global variables that a training step may write to, replaced by copies while it is replayed.

Some state belongs to no instance and is reached by name: ``type(self).count += 1``, a list in the class body, a counter
in the user's script. The names are known, since a function's code lists those of the attributes and global variables
that it uses. So while a training step is replayed, the classes of what was copied, and the global variables that their
code names, hold copies; afterwards they hold again what they held before. Global variables of installed libraries are
left alone: there are many, and they are hardly ever state of a training step.
"""

import enum
import functools
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from lyapunov_lightning.training.replica.copier import Copier

_LIBRARIES = sys.stdlib_module_names | {
    *("lightning", "lightning_fabric", "lightning_utilities", "lyapunov_lightning", "numpy", "pytorch_lightning"),
    *("torch", "torchmetrics", "torchvision", "transformers"),
    *("_pytest", "hypothesis", "pytest"),
}
"""Packages whose classes keep no state of a training step, and whose code names no global variables that do.

They are left out by name, since most classes that a module reaches are theirs, and looking through `torch.nn.Module`
and all its kin would be most of the work.
"""

_INSTALLED = tuple({sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib", "platstdlib")})
"""Folders of what is installed; everything elsewhere is the user's own."""

_NOT_DATA = (types.ModuleType, type)
"""Global variables that are neither replaced nor put back; a class that the step's code names has its own namespace."""

_NEVER_RESTORED = frozenset({"__dict__", "__weakref__", "__abstractmethods__", "__doc__", "_abc_impl"})
"""Names that Python itself keeps in a class. Some cannot be set; ``_abc_impl`` is a cache of ``isinstance`` in C."""


class Namespace(Protocol):
    """Something that holds copies between `install` and `restore`."""

    def install(self) -> None:
        """Let it hold copies."""

    def restore(self) -> None:
        """Let it hold what it held before."""


@contextmanager
def replaced_namespaces(
    copier: Copier, others: Callable[[Copier], Sequence[Namespace]] = lambda _: ()
) -> Iterator[None]:
    """Let classes and the user's global variables hold copies within the block, and afterwards what they held before.

    Args:
        copier: Has copied the objects whose classes and functions are meant.
        others: Gives what else is to hold copies, once it is known which packages the code names.

    """
    # All are looked through before the first one is replaced: else a class that names a global variable which already
    # holds its copy would be given a copy of that copy.
    namespaces: list[Namespace] = [*_reached(copier)]
    namespaces += others(copier)
    try:
        for namespace in namespaces:
            namespace.install()
        yield
    finally:
        for namespace in namespaces:
            namespace.restore()


@contextmanager
def redirected(function: Callable[..., Any], copier: Copier) -> Iterator[Callable[..., Any]]:
    """Let the user's `loss_fn` find the copy of a module where it names the module itself.

    The function is given the copy as an argument, but need not use it: ``lambda _, batch: loss(model(batch[0]))`` has
    the model in a closure or in a global variable. Differentiated as it stands, such a loss would be a function of the
    training's parameters and no function of the copy's, and all of its curvature 0.

    Args:
        function: The user's function. It is not copied, since it is no part of the training.
        copier: Has made the copy.

    Yields:
        The function; where it is a method of a module that was copied, that method of the copy.

    """
    if isinstance(function, types.MethodType) and copier.memo.has(function.__self__):
        yield types.MethodType(function.__func__, copier.memo.copy_of(function.__self__))
        return
    code = getattr(function, "__code__", None)
    cells = [cell for cell in getattr(function, "__closure__", None) or () if _holds_module(cell, copier)]
    variables: dict[str, Any] = getattr(function, "__globals__", {})
    named = () if code is None else names_in(code) & variables.keys()
    modules = {name: variables[name] for name in named if _is_copied_module(variables[name], copier)}
    contents = [cell.cell_contents for cell in cells]
    try:
        for cell, module in zip(cells, contents, strict=True):
            cell.cell_contents = copier.memo.copy_of(module)
        variables.update({name: copier.memo.copy_of(module) for name, module in modules.items()})
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
    return isinstance(value, nn.Module) and copier.memo.has(value)


class _ClassNamespace:
    """The attributes of a class, of which some hold copies between `install` and `restore`."""

    def __init__(self, cls: type, copier: Copier) -> None:
        self._cls = cls
        self._before = dict(vars(cls))
        # Special methods that are functions are copied: the defaults and closures of a ``__call__`` can hold state.
        # The other special names, such as ``__module__`` and ``__slots__``, are what the class is made of.
        self._copies = {
            name: copied
            for name, value in self._before.items()
            if not (name.startswith("__") and name.endswith("__") and not isinstance(value, types.FunctionType))
            and name not in _NEVER_RESTORED
            and (copied := copier(value)) is not value
        }

    def install(self) -> None:
        for name, copied in self._copies.items():
            # By `setattr`, since the dictionary of a class is read-only, and Python's caches of methods have to be
            # told.
            setattr(self._cls, name, copied)

    def restore(self) -> None:
        # Everything is compared and not only what was replaced: a step may also set and delete attributes of its class.
        now = vars(self._cls)
        for name in [name for name in now if name not in self._before]:
            delattr(self._cls, name)
        for name, value in self._before.items():
            if now.get(name) is not value and name not in _NEVER_RESTORED:
                setattr(self._cls, name, value)


class _GlobalNamespace:
    """Some of the global variables of a Python module, which hold copies between `install` and `restore`."""

    def __init__(self, variables: dict[str, Any], names: frozenset[str], copier: Copier) -> None:
        self._variables = variables
        self._before = {name: v for name in names & variables.keys() if not isinstance(v := variables[name], _NOT_DATA)}
        self._missing = names - variables.keys()
        self._copies = {name: copied for name, v in self._before.items() if (copied := copier(v)) is not v}

    def install(self) -> None:
        self._variables.update(self._copies)

    def restore(self) -> None:
        # `global SEEN; SEEN = True`, by which the training's own step would take itself for the second one.
        for name in self._missing & self._variables.keys():
            del self._variables[name]
        self._variables.update(self._before)


def _reached(copier: Copier) -> list[_ClassNamespace | _GlobalNamespace]:
    """The namespaces behind what was copied.

    Their content is copied as well, and that can reach objects of further classes: so until nothing new is found.

    """
    found: list[_ClassNamespace | _GlobalNamespace] = []
    looked_at: set[Any] = set()
    while True:
        new: list[Any] = [item for item in (*copier.memo.classes, *copier.memo.functions) if item not in looked_at]
        if not new:
            return found
        looked_at.update(new)
        for item in new:
            if isinstance(item, type):
                if _keeps_state(item):
                    _note_package(item.__module__, copier)
                    found.append(_ClassNamespace(item, copier))
                    for function in _functions_of(item):
                        found.extend(_globals_of(function, copier, looked_at))
            else:
                found.extend(_globals_of(item, copier, looked_at))


def _globals_of(function: Callable[..., Any], copier: Copier, looked_at: set[Any]) -> Iterator[_GlobalNamespace]:
    """The global variables that a function of the user's names, and those that functions among them name in turn."""
    pending = [function]
    while pending:
        current = pending.pop()
        code = getattr(current, "__code__", None)
        if code is None or code in looked_at or not _is_users(current.__module__):
            continue
        looked_at.add(code)
        names = names_in(code)
        # ``import helpers`` and then ``helpers.COUNT += 1``: the code names both, `helpers` as a global variable and
        # `COUNT` as an attribute. So the same names are looked for in the user's modules that are among the globals.
        spaces: list[dict[str, Any]] = [current.__globals__]
        for space in spaces:
            for name in names & space.keys():
                value = space[name]
                _note_package(_module_of(value), copier)
                if isinstance(value, types.FunctionType):
                    pending.append(value)
                elif isinstance(value, type):
                    # `Counter.total += 1` of a class of which the module holds no instance.
                    copier.memo.classes[value] = None
                elif space is current.__globals__ and isinstance(value, types.ModuleType) and _is_users(value.__name__):
                    spaces.append(vars(value))
            yield _GlobalNamespace(space, names, copier)


def _module_of(value: Any) -> Any:
    """The name of the Python module that a value is, or in which it or its class is defined."""
    if type(value) is types.ModuleType:
        return value.__name__
    return value.__module__ if isinstance(value, (type, types.FunctionType)) else type(value).__module__


def _note_package(module: Any, copier: Copier) -> None:
    """Note the installed package that a Python module belongs to, unless it is one without state of a step."""
    package = module.partition(".")[0] if isinstance(module, str) else ""
    if package and package not in _LIBRARIES and not _is_users(module):
        copier.memo.packages.add(package)


def _functions_of(cls: type) -> Iterator[Callable[..., Any]]:
    """The functions in a class body, also those within properties, class methods and decorators."""
    for value in vars(cls).values():
        # The getters of properties and what decorators have wrapped. To look with `getattr` on the class would run the
        # user's descriptors.
        function = getattr(value, "fget", None) or getattr(value, "__func__", None) or value
        function = getattr(function, "__wrapped__", function)
        if isinstance(function, types.FunctionType):
            yield function


@functools.lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> frozenset[str]:
    """The names of global variables and attributes in a function's code, and in that of the functions within it."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


@functools.lru_cache(maxsize=4096)
def _is_users(module: str | None) -> bool:
    """Whether a Python module is neither part of Python nor installed; that of a notebook counts as the user's."""
    if module is None or module.partition(".")[0] in _LIBRARIES:
        return module == "__main__"
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is None or not file.startswith(_INSTALLED)


def _keeps_state(cls: type) -> bool:
    """Whether a class may hold state of a training step.

    So may one of an installed package that is not among `_LIBRARIES`: a model from somebody's package counts its calls
    on the class just as the user's own does. The class of an Enum does not let its members be replaced.

    """
    package = (cls.__module__ or "").partition(".")[0]
    return (package not in _LIBRARIES or package == "__main__") and not issubclass(cls, enum.Enum)
