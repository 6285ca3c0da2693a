"""The walk through all that can be reached from a value, with a copy made of each object on the way.

How an object of some class is copied is not known here: `Walk` asks for it, see the registry in `rules`. Here is what
goes down into an object and on to what that refers to, container by container and attribute by attribute.

All ways to make a copy have the same form: ``way(value, copy, memo)`` returns the copy of a value, or the value itself
where it stands for itself. It calls `copy` for what the value refers to, after it has noted its own copy in the `Memo`
where what it refers to may refer back to the value.
"""

import copyreg
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.training.replica.memo import PLAIN, Memo, UncopiedError

Copy = Callable[[Any], Any]
"""Returns the copy of a value."""

Way = Callable[[Any, Copy, Memo], Any]
"""Makes the copy of a value."""


class Walk:
    """Copies values with everything that can be reached from them, each object once.

    Args:
        memo: Records the copies.
        way_of: The way in which instances of a class are copied.
        uncopied: What stands for a value that cannot be copied, and for what reason it cannot.

    """

    def __init__(
        self, memo: Memo, way_of: Callable[[type], Way], uncopied: Callable[[Any, UncopiedError], Any]
    ) -> None:
        self.memo = memo
        self._way_of = way_of
        self._uncopied = uncopied

    def __call__(self, value: Any) -> Any:
        """The copy of a value, the same one every time; the value itself where nothing can write to it."""
        cls = type(value)
        if cls in PLAIN:
            return value
        memo, key = self.memo, id(value)
        copies = memo.copies
        if key in copies:
            return copies[key]
        if memo.limits is not None:
            memo.limits.check_number(len(copies))
        # For each object and not once for all of them: one handle in a list leaves the rest of the list to be copied.
        try:
            copied = self._way_of(cls)(value, self, memo)
        except UncopiedError as error:
            copied = self._uncopied(value, error)
        # Most ways have noted it by now, before they went on to what it refers to.
        if copied is not value and key not in copies:
            memo.note(value, copied)
        return copied


# Containers. Lists and dictionaries note their copies in two lines of their own: a network of five layers has a hundred
# of them, nearly all empty and for hooks, and the call of `Memo.note` would be a quarter of the time that each takes.


def copy_list(value: list[Any], copy: Copy, memo: Memo) -> list[Any]:
    """A list of copies."""
    copied: list[Any] = []
    memo.copies[id(value)] = copied
    memo.originals.append(value)
    for entry in value:
        copied.append(entry if type(entry) in PLAIN else copy(entry))
    return copied


def copy_dict(value: dict[Any, Any], copy: Copy, memo: Memo) -> dict[Any, Any]:
    """A dictionary of copies, the keys included: a module may be a key."""
    copied: dict[Any, Any] = type(value)()
    memo.copies[id(value)] = copied
    memo.originals.append(value)
    for key, entry in value.items():
        copied[key if type(key) in PLAIN else copy(key)] = entry if type(entry) in PLAIN else copy(entry)
    return copied


def copy_set(value: set[Any], copy: Copy, memo: Memo) -> set[Any]:
    """A set of copies."""
    copied: set[Any] = memo.note(value, set())
    copied.update(map(copy, value))
    return copied


def copy_tuple(value: Any, copy: Copy, memo: Memo) -> Any:
    """A tuple or a frozenset of copies; itself where all its entries are themselves.

    Nothing can be written to it, and a step may compare it by identity.

    """
    copied = [copy(entry) for entry in value]
    if id(value) in memo.copies:
        # An entry holds it: ``pair = ([],); pair[0].append(pair)``. The list has asked for its copy in the meantime.
        return memo.copies[id(value)]
    return value if all(one is other for one, other in zip(copied, value, strict=True)) else type(value)(copied)


# Instances of classes, the user's own or anybody's: by their attributes, or by the protocol of ``copy`` and ``pickle``.


def copy_instance(first: Way, value: Any, copy: Copy, memo: Memo) -> Any:
    """A copy of an instance of a class about which nothing is known.

    Args:
        first: The way to try first. Classes of third parties fail in ways of their own, an object with a lock in
            ``__reduce__`` and one with an open socket in ``__deepcopy__``, and none of that is a reason to measure
            nothing. What fails is copied by its attributes.
        value: The instance.
        copy: Copies what it refers to.
        memo: Records the copy.

    Raises:
        UncopiedError: If the instance keeps its state where Python does not see it.
        MeasurementError: If it is larger than what may be copied.

    """
    cls: Any = type(value)
    if memo.limits is not None:  # else not asked, since `__sizeof__` may be the user's
        size = sys.getsizeof(value)
        if not memo.limits.affords(size):
            raise MeasurementError(f"a {cls.__qualname__} of {size:,} bytes is too large to be copied")
    try:
        copied = first(value, copy, memo)
    except MeasurementError:
        raise
    except Exception as error:
        memo.copies.pop(id(value), None)  # the one that was begun lacks whatever has failed
        if isinstance(value, Iterator):
            # Its place is in no attribute. A copy of these would begin anew, or draw from what the original draws from.
            raise UncopiedError(str(error)) from error
        copied = _copied_otherwise(value, copy, memo, error)
    # Itself, though it has memory that no attribute shows: a constant of a compiled package, or a handle that says it
    # is one. Which of the two nobody can see, so it is the policy's to decide.
    if copied is value and cls.__basicsize__ > _Bare.__basicsize__ and cls not in copyreg.dispatch_table:
        raise UncopiedError("it is not written in Python", is_its_own_copy=True)
    return copied


def _copied_otherwise(value: Any, copy: Copy, memo: Memo, error: Exception) -> Any:
    try:
        return by_attributes(value, copy, memo)
    except Exception:  # it keeps its state in C, or its attributes are entries
        if isinstance(value, dict):
            return _by_entries(value, copy, memo)
        raise UncopiedError(str(error)) from error


class _Bare:
    """An instance has no more memory than any of a class that is written in Python."""


def by_attributes(value: Any, copy: Copy, memo: Memo) -> Any:
    """A copy with the same attributes, or, of a class that keeps state in C, by the protocol."""
    cls: Any = type(value)
    try:
        # Not by the class, whose `__new__` and `__init__` may want arguments, or count the instances.
        empty: Any = object.__new__(without_finalizer(cls))
    except TypeError:
        return by_protocol(value, copy, memo)
    return _with_attributes(value, empty, copy, memo)


def by_protocol(value: Any, copy: Copy, memo: Memo) -> Any:
    """A copy as the class says that it is put together, by ``__reduce_ex__``."""
    memo.classes.update(dict.fromkeys(type(value).__mro__))
    reduced = value.__reduce_ex__(4)
    if isinstance(reduced, str):  # the name of a singleton
        return value
    make, arguments, state, items, pairs, setter = (*reduced, *[None] * 6)[:6]
    # From here on as `copy._reconstruct`, which is private, with a copier in the place of its memo.
    copied = make(*map(copy, arguments))
    if copied is value:
        # Its class keeps one instance for equal arguments, as those of fsspec's file systems do. To set the state of
        # that one would be to write to the original.
        return value
    _note_if_kept(copied, memo, 0)
    memo.note(value, copied)
    if state is not None:
        state = copy(state)
        if setter is not None:
            setter(copied, state)
        elif hasattr(copied, "__setstate__"):
            copied.__setstate__(state)
        else:
            attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
            copied.__dict__.update(attributes or {})
            for name, attribute in (slots or {}).items():
                setattr(copied, name, attribute)
    for item in items or ():
        copied.append(copy(item))
    for key, entry in pairs or ():
        copied[copy(key)] = copy(entry)
    return copied


def by_own_method(value: Any, copy: Copy, memo: Memo) -> Any:
    """A copy by the class's own ``__deepcopy__``, which is given the copies made so far."""
    copied = value.__deepcopy__(memo.copies)
    _note_if_kept(copied, memo, id(value) in memo.copies)
    return copied


def _note_if_kept(copied: Any, memo: Memo, others: int) -> None:
    """Note a copy that its class holds as soon as it has made it: a singleton, or the one for equal arguments.

    Args:
        copied: The copy.
        memo: Gets the note.
        others: The number of references to it from the memo.

    """
    # The caller's, this function's, and that of the function that counts.
    if sys.getrefcount(copied) > 3 + others:
        memo.kept_by_classes.add(id(copied))


def _by_entries(value: dict[Any, Any], copy: Copy, memo: Memo) -> Any:
    """A dictionary of the user's own, whatever its class makes of the usual ways to look into one.

    One with ``__getattr__ = dict.__getitem__`` raises a KeyError where the protocol asks for ``__setstate__``.

    """
    cls: Any = type(value)
    copied = memo.note(value, dict.__new__(cls))
    if cls.__dictoffset__:
        vars(copied).update({name: copy(attribute) for name, attribute in vars(value).items()})
    dict.update(copied, {copy(key): copy(entry) for key, entry in dict.items(value)})
    return copied


def _with_attributes(value: Any, copied: Any, copy: Copy, memo: Memo) -> Any:
    """Fill an empty instance with copies of the attributes of another one."""
    memo.classes.update(dict.fromkeys(type(value).__mro__))
    # Those of all base classes, with names such as `__count` as they are mangled in each.
    slots = copyreg._slotnames(type(value))  # type: ignore[attr-defined]
    attributes = getattr(value, "__dict__", None)
    if not attributes and not slots:
        # `MISSING = Sentinel()`, and `if value is MISSING` in the step. `Memo.forget` takes back what is written to it.
        if attributes is not None:
            memo.stateless.append(value)
        return value
    if attributes is None:
        memo.note(value, copied)
    else:
        memo.own(value, copied)
        target = copied.__dict__
        for name, attribute in attributes.items():
            # Into the dictionary, and not by `setattr`, which properties, modules and frozen dataclasses have their
            # own ideas of.
            target[name] = attribute if type(attribute) in PLAIN else copy(attribute)
    for name in slots:
        if hasattr(value, name):  # a slot may be empty
            # Past the class's own `__setattr__`, by which a frozen dataclass refuses.
            object.__setattr__(copied, name, copy(getattr(value, name)))
    return copied


@functools.lru_cache(maxsize=4096)
def without_finalizer(cls: Any) -> Any:
    """The class, or one like it whose instances do nothing when they go.

    What a finalizer releases, a file, a process or a row in a table, is the original's.

    """
    if not hasattr(cls, "__del__"):
        return cls
    # Without slots of its own, so that instances are laid out alike and pass for the class's, in `isinstance` as well.
    namespace = {"__del__": lambda self: None, "__module__": cls.__module__, "__slots__": ()}
    return type(cls)(cls.__name__, (cls,), namespace)


# Modules: instances whose copies are to be found again.


def copy_module(module: nn.Module, copy: Copy, memo: Memo) -> nn.Module:
    """A module by its attributes, never by a ``__deepcopy__`` or a ``__getstate__`` of its class.

    These leave out what their authors could not pickle, hooks or a compiled graph, which the step will call.

    """
    if isinstance(module, torch.jit.ScriptModule):
        return _script_module(module, memo)
    cls: Any = type(module)
    copied: nn.Module = _with_attributes(module, object.__new__(without_finalizer(cls)), copy, memo)
    memo.modules.append(copied)
    return copied


def _script_module(module: torch.jit.ScriptModule, memo: Memo) -> nn.Module:
    """A compiled module knows how to copy itself; its tensors are those that were noted for the original's."""
    with torch.no_grad():  # else the copy's tensors are functions of the original's
        copied: nn.Module = module.__deepcopy__({})  # in C++, which knows nothing of the memo
        pairs = zip((*module.parameters(), *module.buffers()), (*copied.parameters(), *copied.buffers()), strict=True)
        for tensor, twin in pairs:
            if memo.has(tensor):
                twin.copy_(memo.copy_of(tensor))
            twin.requires_grad_(tensor.requires_grad)
            memo.note(tensor, twin)
    memo.modules.append(copied)
    memo.note(module, copied)
    return copied
