"""Places outside of a replica that hold its objects: a library's cache, a class, a registry.

A step may hand the module's objects to a library that keeps them: Pyro's store of parameters, a registry, a list of
callbacks. A replayed step hands it those of the replica. They are found when the replica has ended, and their originals
are put in their places. The places are learnt: in all later replays they hold copies for as long as the step runs,
like the user's own global variables, and afterwards what they held before.

The training's own steps hand objects over too, so the packages' global variables are looked through as well. In pandas
that takes 60 ms and in SciPy 130, several steps of a small network. So they are looked through only where an object of
the module is referred to more often than at the last measurement, and at measurements 1, 4, 16 and so on.
"""

import contextlib
import copyreg
import functools
import gc
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence, Sized
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.training.replica.copier import Copier
from lyapunov_lightning.training.replica.held import Held, Survivor, discard, outside_references, surviving
from lyapunov_lightning.training.replica.memo import PLAIN, Memo

_ROUNDS = 4
"""How deep what cannot be changed may be nested round an object: a method in a tuple in a tuple of a list is 3."""

_MOST_PLACES = 100
"""A step that hands its objects to ever new places leaves traces that nobody can follow."""

_LOOKED_AT = 2**17
"""Values among the packages' global variables in which the module's own objects are looked for."""

_LOOKS = frozenset(4**power for power in range(16))
"""The measurements at which the packages are looked through in any case."""

_DEPTH = 6
"""How deep below a global variable: of a store, its dictionary, an entry, an entry's attributes, and a list there."""


Former = Mapping[int, list[Any] | int]
"""What containers held before a step, by their ids: the content, names or keys and values in turn, or its size."""


class Place:
    """A container that holds objects of the module, or one name in a namespace.

    Args:
        holder: A dictionary, list, deque or set; with a name, also a class or an instance.
        name: The only name that is meant; all of the container if None.

    """

    def __init__(self, holder: Any, name: str | None = None) -> None:
        self.holder = holder
        self.name = name

    @property
    def key(self) -> tuple[int, str | None]:
        """Equal for equal places."""
        return id(self.holder), self.name

    def content(self) -> list[Any]:
        """What is there now: of a dictionary keys and values in turn, of a name its value, or nothing."""
        if self.name is not None:
            spaces = self.holder if isinstance(self.holder, dict) else _variables(self.holder)
            return [spaces[self.name]] if self.name in spaces else []
        if isinstance(self.holder, dict):
            return [part for pair in dict.items(self.holder) for part in pair]
        return list(self.holder)

    def fill(self, content: Sequence[Any]) -> None:
        """Let exactly this be there."""
        holder, name = self.holder, self.name
        if name is not None:
            if isinstance(holder, dict):
                dict.update(holder, {name: content[0]}) if content else holder.pop(name, None)
            elif not content:
                if name in _variables(holder):
                    delattr(holder, name)
            elif isinstance(holder, type):
                setattr(holder, name, content[0])
            else:
                object.__setattr__(holder, name, content[0])
            return
        # By the methods of Python's own class: those of a subclass may count, or refuse.
        kind: Any = next(kind for kind in (OrderedDict, dict, list, deque, set) if isinstance(holder, kind))
        kind.clear(holder)
        if issubclass(kind, dict):
            for key, value in zip(content[::2], content[1::2], strict=True):
                kind.__setitem__(holder, key, value)
        else:
            (kind.update if kind is set else kind.extend)(holder, content)


class _Replaced:
    """A place that holds copies between `install` and `restore`."""

    def __init__(self, place: Place, copier: Copier) -> None:
        self._place = place
        self._before = place.content()
        self._copies = [copier(entry) for entry in self._before]

    def install(self) -> None:
        self._place.fill(self._copies)

    def restore(self) -> None:
        self._place.fill(self._before)


def _variables(holder: Any) -> Any:
    """The attributes of a class or of an instance, those in slots included."""
    if isinstance(holder, type):
        return vars(holder)
    found = dict(getattr(holder, "__dict__", {}))
    names = ["cell_contents"] if isinstance(holder, types.CellType) else copyreg._slotnames(type(holder))  # type: ignore[attr-defined]
    for name in names:
        with contextlib.suppress(AttributeError, ValueError):  # an empty slot, an empty cell
            found[name] = getattr(holder, name)
    return found


class Elsewhere:
    """What the replays of one run may leave outside of their replicas.

    Attributes:
        is_rehearsed: Whether an evaluation has shown what the step puts where.

    """

    def __init__(self) -> None:
        self.is_rehearsed = False
        self._places: dict[tuple[int, str | None], Place] = {}
        self._held: list[Held] = []
        self._references: dict[int, dict[int, int]] = {}  # by the depth of the stack, since frames hold objects too
        self._looks = 0
        self._containers: dict[int, Sized] = {}
        self._before: Former | None = None
        self._lost: tuple[str, str] | None = None  # what, and to where

    def check(self) -> None:
        """Refuse a replay whose traces could not be removed.

        Raises:
            MeasurementError: If those of an earlier one could not.

        """
        if self._lost is not None:
            what, where = self._lost
            raise MeasurementError(
                f"The training step hands {what} of the module to {where}, from where a replay cannot take it back:"
                " each further one would leave more there. So nothing is measured any more. Hand it over outside of the"
                " step, for example in `on_fit_start`, or define `curvature_loss(self, batch)` on the module."
            )

    def namespaces(self, copier: Copier) -> "list[_Replaced]":
        """The known places, which hold copies for as long as they are installed."""
        if self._before is None:
            self._before = self._looked_at(copier.memo)
        return [_Replaced(place, copier) for place in self._places.values()]

    def _looked_at(self, memo: Memo) -> "Former":
        """Look through the packages if they may have come to hold an object; returns what they hold.

        What goes unnoticed until the next whole look: an object that one holder drops while another takes it, between
        two measurements, a function that was there before and is registered only then, and a tensor that was made since
        the last measurement and that one holder has.

        """
        known = [place.content() for place in self._places.values()]
        depth = _depth_of_stack()
        before, now = self._references.get(depth), outside_references(memo, known)
        self._references[depth] = now
        self._looks += 1
        is_due = before is None or self._looks in _LOOKS
        if not is_due and not _have_grown(memo, before or {}, now):
            return dict(zip(self._containers, map(len, self._containers.values()), strict=True))
        places, self._containers, contents = _among_globals(memo)
        self._learn(places)
        return contents

    def end(self, memo: Memo) -> None:
        """End a replica: drop its copies, but for what somebody else holds; `settle` looks after that."""
        # What is known of the earlier ones holds their originals, and so batches that are read but not held. Their
        # tensors are gone by now, unless somebody holds them.
        self._held = [held for held in self._held if held.drop_what_is_gone()]
        self._held.append(discard(memo))

    def settle(self) -> None:
        """Put originals in the places of copies that are held outside of their replicas.

        To be called when nothing of this package holds copies any more: when a measurement is over, before the step.

        """
        held, self._held = self._held, []
        before, self._before = self._before, None
        survivors = surviving(held)
        if survivors:
            _collect(survivors)
            self._learn(_put_right(survivors, before or {}))
            self._refuse(survivors)

    def _learn(self, places: Sequence[Place]) -> None:
        for place in places:
            self._places.setdefault(place.key, place)
        if len(self._places) > _MOST_PLACES:
            holders = sorted({_name(place.holder) for place in self._places.values()})
            self._lost = "an object", f"ever new places ({', '.join(holders[:3])})"

    def _refuse(self, survivors: "list[Survivor]") -> None:
        """Refuse all further measurements if copies are still held."""
        held = [(one, survivor.original) for survivor in survivors if (one := survivor.copied) is not None]
        if not held:
            return
        own = {id(held), *map(id, held), *map(id, survivors)}
        holders = [one for one in gc.get_referrers(*(one for one, _ in held)) if id(one) not in own]
        if any(isinstance(one, types.FrameType) for one in holders):
            return  # of an exception that somebody keeps, and will drop
        for copied, original in held:
            _unite(original, copied)
        where = _name(holders[0]) if holders else "something that is not written in Python"
        self._lost = f"a {type(held[0][1]).__name__}", where


def _collect(survivors: list[Survivor]) -> None:
    """Free what holds itself, in a cycle that the step has made. What is still there then is held.

    The youngest objects first: those of a step are mostly among them, and to go through all takes as long as many steps
    where a process has a million objects.

    """
    for generation in range(3):
        gc.collect(generation)
        if all(survivor.copied is None for survivor in survivors):
            return


def _have_grown(memo: Memo, before: Mapping[int, int], now: Mapping[int, int]) -> bool:
    """Whether somebody has come to hold an object since references were counted, the last time at the same depth."""
    for one in memo.originals:
        number = now[id(one)]
        # The loss of the step, its batch, what was logged of it: new tensors, which the running step holds.
        is_of_the_step = number == 1 and id(one) not in before and type(one) is Tensor
        is_memory = isinstance(one, torch.UntypedStorage)  # of which a new object is made whenever it is asked for
        if number > before.get(id(one), 0) and not (is_of_the_step or is_memory):
            return True
    return False


def _depth_of_stack() -> int:
    depth, frame = 0, sys._getframe()
    while frame.f_back is not None:
        depth, frame = depth + 1, frame.f_back
    return depth


def _name(holder: Any) -> str:
    return f"a {type(holder).__module__}.{type(holder).__qualname__}"


def _unite(original: Any, copied: Any) -> None:
    """Let a copy that stays somewhere be as good as the original: one state for both."""
    if isinstance(original, Tensor):
        with torch._C.DisableTorchFunction(), contextlib.suppress(RuntimeError):  # where they are of different kinds
            copied.data = original.data
    elif "__dict__" in dir(type(original)):
        object.__setattr__(copied, "__dict__", vars(original))


def _put_right(survivors: list[Survivor], before: Former) -> list[Place]:
    """Put originals in the places of copies, wherever these are held; returns the places.

    Args:
        survivors: The copies.
        before: What is known of the content of places before the step.

    """
    alive = [(one, survivor.original) for survivor in survivors if (one := survivor.copied) is not None]
    instead = {id(one): original for one, original in alive}
    wanted = [one for one, _ in alive]
    kept: list[Any] = []  # so that no new object comes to lie at the address of one that was looked for
    own = {id(alive), id(kept), *map(id, alive), *map(id, survivors)}
    places: list[Place] = []
    for _ in range(_ROUNDS):
        if not wanted:
            break
        kept.append(wanted)
        own.add(id(wanted))
        holders = [one for one in gc.get_referrers(*wanted) if id(one) not in own]
        own.add(id(holders))
        wanted = []
        for holder in holders:
            if (rebuilt := _rebuilt(holder, instead)) is not holder:
                instead[id(holder)] = rebuilt
                wanted.append(holder)
            else:
                places += _replaced_in(holder, instead, before)
    return places


def _rebuilt(holder: Any, instead: dict[int, Any]) -> Any:
    """Another one of what cannot be changed, with originals in the places of copies; else the holder itself."""

    def of(value: Any) -> Any:
        return instead.get(id(value), value)

    kind = type(holder)
    if isinstance(holder, (tuple, frozenset)):
        return kind(*map(of, holder)) if hasattr(holder, "_fields") else kind(map(of, holder))
    if kind is types.MethodType:
        return types.MethodType(of(holder.__func__), of(holder.__self__))
    if kind is types.BuiltinMethodType:
        return getattr(of(holder.__self__), holder.__name__)
    if kind is functools.partial:
        keywords = {name: of(value) for name, value in holder.keywords.items()}
        return functools.partial(of(holder.func), *map(of, holder.args), **keywords)
    return holder


def _replaced_in(holder: Any, instead: dict[int, Any], before: Former) -> list[Place]:
    """Put back what was there, or originals in the places of copies; returns where, for what is to be learnt."""
    if isinstance(holder, types.FrameType):
        return []
    if isinstance(holder, types.FunctionType):
        holder.__defaults__ = instead.get(id(holder.__defaults__), holder.__defaults__)
        return []
    if isinstance(holder, (list, deque, set)):
        places = [Place(holder)]
    elif isinstance(holder, dict):
        owners = [one for one in gc.get_referrers(holder) if not isinstance(one, (types.FrameType, list, dict, tuple))]
        caches = [one for one in owners if isinstance(one, functools._lru_cache_wrapper)]
        for cache in caches:
            # What was computed from copies is not to be found again by the originals.
            cache.cache_clear()
        if caches:
            return []
        # Of a class, of a Python module or an instance: one name of it. Else it is a container.
        classes = [one for one in owners if isinstance(one, type) and vars(one).keys() == holder.keys()]
        names = [name for name, value in dict.items(holder) if id(value) in instead]
        if classes:
            places = [Place(classes[0], name) for name in names]
        elif any(getattr(one, "__dict__", None) is holder for one in owners):
            places = [Place(holder, name) for name in names]
        else:
            places = [Place(holder)]
    else:
        places = [Place(holder, name) for name, value in _variables(holder).items() if id(value) in instead]
        if isinstance(holder, types.CellType):
            # Where a function is registered that the step has made, the step will register it anew: else it ran twice.
            functions = _functions_with(holder)
            instead = instead | {id(function): function for function in functions}
            places += [Place(one) for one in _known_holders(functions, before) if isinstance(one, (dict, list, deque))]
    if all(place.name is None and id(place.holder) not in before for place in places):
        # A container that the step has made, `registry.setdefault(name, []).append(self)`: it will make it anew.
        instead = instead | {id(place.holder): place.holder for place in places}
        places = [Place(one) for one in _known_holders([place.holder for place in places], before)] or places
    for place in places:
        place.fill(_former(place, before.get(id(place.holder)), instead))
    return places


def _former(place: Place, known: list[Any] | int | None, instead: dict[int, Any]) -> list[Any]:
    """What a place held before the step, as far as that is known.

    Args:
        place: The place.
        known: The content of its holder, the number of entries in it, or nothing.
        instead: The originals of copies, by the ids of these.

    """
    if isinstance(known, list):
        if place.name is None:
            return known
        return [value for name, value in zip(known[::2], known[1::2], strict=True) if name == place.name]
    content = place.content()
    width = 2 if place.name is None and isinstance(place.holder, dict) else 1
    entries = [content[start : start + width] for start in range(0, len(content), width)]
    others = [entry for entry in entries if not any(id(part) in instead for part in entry)]
    # Are those with copies in addition to all that was there? Else they have taken the place of others.
    if known is not None:
        size = len(vars(place.holder) if isinstance(place.holder, type) else place.holder)
        if size - (len(entries) - len(others)) >= known:
            return list(chain(*others))
    return [instead.get(id(value), value) for value in content]


def _known_holders(objects: list[Any], before: Former) -> list[Any]:
    return [one for one in (gc.get_referrers(*objects) if objects else ()) if id(one) in before]


def _functions_with(cell: types.CellType) -> list[Any]:
    """The functions with this cell."""
    closures = [one for one in gc.get_referrers(cell) if type(one) is tuple]
    return [
        one
        for one in (gc.get_referrers(*closures) if closures else ())
        if isinstance(one, types.FunctionType) and any(part is cell for part in one.__closure__ or ())
    ]


def _among_globals(memo: Memo) -> tuple[list[Place], dict[int, Sized], Former]:
    """Look through the global variables of the packages that the module uses, as far as Python shows them.

    Returns:
        Where they hold objects of the module already. The step would find the training's own objects there, and write
        to them, or compute with parameters of which the replica's are copies. Then, by their ids, the containers that
        were looked through, and what they held.

    """
    own = set(map(id, memo.owned))
    wanted = {
        id(original)
        for original in memo.originals
        if id(copied := memo.copies.get(id(original))) in own or isinstance(copied, (Tensor, list, dict, set, deque))
    }
    # A process has thousands of modules, and most training steps name no package that keeps anything.
    loaded = list(sys.modules.items()) if memo.packages else []
    modules = [module for name, module in loaded if name.partition(".")[0] in memo.packages and module]
    places: list[Place] = []
    containers: dict[int, Sized] = {}
    contents: dict[int, list[Any]] = {}
    seen = {id(one) for one in memo.originals}
    pending: list[tuple[Any, int]] = [
        (module, 0) for module in [*modules, torch.nn.modules.module]
    ]  # in which are the hooks of all modules
    for holder, depth in pending:
        if len(seen) > _LOOKED_AT:
            break
        is_itself = isinstance(holder, (type, tuple, dict, list, deque, set))
        space = holder if is_itself else getattr(holder, "__dict__", holder)
        if isinstance(space, (type, dict, list, deque, set)):
            containers[id(space)] = vars(space) if isinstance(space, type) else space
            contents[id(space)] = (
                list(chain(*vars(space).items())) if isinstance(space, type) else Place(space).content()
            )
        for name, value in _entries(holder):
            if type(value) in PLAIN:
                continue
            if _leads_to(value, wanted):
                if not isinstance(holder, tuple):  # else it has led here from where that is
                    places.append(Place(space, name))
            elif depth < _DEPTH and id(value) not in seen and _may_hold(value, memo.packages):
                seen.add(id(value))
                pending.append((value, depth + 1))
    return places, containers, contents


def _entries(holder: Any) -> Iterator[tuple[str | None, Any]]:
    """What an object holds, by names where it has names."""
    if isinstance(holder, dict):
        entries = [(None, part) for pair in dict.items(holder) for part in pair]
    elif isinstance(holder, (list, deque, set, tuple)):
        entries = [(None, value) for value in holder]
    else:
        entries = list(_variables(holder).items())
    for name, value in entries:
        yield name, value() if isinstance(value, weakref.ref) else value


def _leads_to(value: Any, wanted: set[int]) -> bool:
    """Whether a value is one of those wanted, or refers to one and is made anew when it is copied."""
    if id(value) in wanted:
        return True
    kind = type(value)  # and not `isinstance`, which asks proxies of others what they stand for
    if kind is types.MethodType:
        return id(value.__self__) in wanted
    if kind is types.FunctionType:
        # `register_module_forward_hook(lambda *_: self.count())`
        return any(id(part) in wanted for cell in value.__closure__ or () for part in gc.get_referents(cell))
    if kind is functools.partial:
        return any(_leads_to(part, wanted) for part in (value.func, *value.args, *value.keywords.values()))
    return issubclass(kind, tuple) and any(_leads_to(entry, wanted) for entry in value)


def _may_hold(value: Any, packages: set[str]) -> bool:
    """Whether to look into a value: containers of Python's, and instances and classes of the packages."""
    kind = type(value)
    if issubclass(kind, type):
        where = value.__module__
    elif kind in PLAIN or issubclass(kind, nn.Module):
        return False
    elif issubclass(kind, (dict, list, deque, set, tuple, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)):
        return True
    else:
        where = kind.__module__
    return isinstance(where, str) and where.partition(".")[0] in packages
