"""The end of a replica: what nobody else holds is emptied, and what somebody holds is left as it is.

Python counts the references to every object. Those that come from the copies themselves can be counted too; an object
that has more of them is held by somebody else: by a library's cache into which the training step has put it, or by an
object that the step has made. So does Python's garbage collector find out what is garbage; here it is done for the
copies alone, and at once.
"""

import functools
import gc
import sys
import types
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lyapunov_lightning.training.replica.memo import Memo

_MADE_BY_STEPS = frozenset(
    {
        *(dict, list, tuple, set, frozenset, deque, functools.partial),
        *(types.CellType, types.MethodType, types.BuiltinMethodType),
    }
)
"""What a step makes and keeps in copies: a dictionary of its layers, a method as a callback."""


@dataclass
class Held:
    """Copies that may be held from outside of their replica.

    Attributes:
        pairs: Those to which there were references when it ended, each after its original.
        reached: All that can be reached from them among the copies, with the dictionaries of their attributes.
        tensors: All tensors, each after its original. What holds them in C++ does not show in Python's count.

    """

    pairs: list[tuple[Any, Any]] = field(default_factory=list)
    reached: list[Any] = field(default_factory=list)
    tensors: "list[Survivor]" = field(default_factory=list)

    def drop_what_is_gone(self) -> bool:
        """Forget the tensors that nobody holds any more; returns whether anything is left."""
        self.tensors = [survivor for survivor in self.tensors if survivor.copied is not None]
        return bool(self.pairs or self.tensors)


class Survivor:
    """A copy that has outlived its replica.

    Args:
        original: What it is a copy of.
        copied: The copy. Is not kept alive by this, unless it is of a kind without weak references, such as a list.

    """

    __slots__ = ("_itself", "_weakly", "original")

    def __init__(self, original: Any, copied: Any) -> None:
        self.original = original
        self._weakly: weakref.ref[Any] | None = None
        self._itself: Any = None
        try:
            self._weakly = _Reference(copied)
        except TypeError:
            self._itself = copied

    @property
    def copied(self) -> Any:
        """The copy; None once nobody else holds it."""
        if self._weakly is not None:
            return self._weakly()
        return self._itself if sys.getrefcount(self._itself) > _OWN_REFERENCES else None


class _Reference(weakref.ref[Any]):
    """One by itself: of plain ones Python has a single one for each object, and the step may have handed that on."""


_OWN_REFERENCES = 2
"""To what is in an attribute: the attribute's, and that of the function that counts."""


def discard(memo: Memo) -> Held:
    """Empty the copies, so that their memory is free at once, but for those that somebody else holds.

    A module refers to itself, through its trainer for example. Such a cycle lives until Python's garbage collector
    comes by, which counts objects and not bytes: until then the copies of many evaluations would be in memory.

    """
    originals = {
        id(copied): original
        for original in memo.originals
        if (copied := memo.copies.get(id(original))) is not None and copied is not original
        if id(copied) not in memo.kept_by_classes
    }
    copied = None
    # References that do not keep a copy alive, and would be empty: `lib.current = weakref.ref(self)`.
    weakly: list[Any] = []
    for one in memo.owned:
        for reference in weakref.getweakrefs(one) if id(one) in originals else ():
            if type(reference) is weakref.ref:
                weakly.append(reference)
                originals[id(reference)] = weakref.ref(originals[id(one)])
    one = reference = None
    attributes = [one.__dict__ for one in memo.owned]
    memo.originals.clear()
    copies = list(memo.copies.values())
    memo.copies.clear()
    for kept in (memo.blocks, memo.modules, memo.functions, memo.classes):
        kept.clear()
    outside = held_from_outside([*copies, *weakly, *attributes], [memo.owned, copies, weakly, attributes])
    pairs = [(originals[id(one)], one) for one in outside if id(one) in originals]
    reached = _reached_from([one for _, one in pairs], [*copies, *attributes]) if pairs else []
    tensors = [Survivor(originals[id(one)], one) for one in copies if isinstance(one, Tensor) and id(one) in originals]
    held = Held(pairs, reached, tensors)
    kept_alive = set(map(id, held.reached))
    for one in memo.owned:
        if id(one) not in kept_alive:
            one.__dict__.clear()
    memo.owned.clear()
    for file in memo.files:
        # Now, and not when the garbage collector comes by: a hundred evaluations would hold a hundred handles.
        file.close()
    memo.files.clear()
    return held


def surviving(held: list[Held]) -> list[Survivor]:
    """Those copies that are held still, now that all of their replicas are gone; the others are emptied.

    Args:
        held: What `discard` has returned. Is empty afterwards, so that nothing here holds the copies.

    """
    survivors: list[Survivor] = []
    while held:
        one = held.pop()
        outside = set(map(id, held_from_outside(one.reached, [one.pairs, *one.pairs])))
        if not outside:
            for part in one.reached:
                if isinstance(part, dict):
                    dict.clear(part)
        survivors += [Survivor(original, copied) for original, copied in one.pairs if id(copied) in outside]
        survivors += [survivor for survivor in one.tensors if survivor.copied is not None]
    return survivors


def outside_references(memo: Memo, known: Sequence[list[Any]] = ()) -> dict[int, int]:
    """How often each object that was copied is referred to from elsewhere than from the others, by its id.

    The number by itself says little, since the frames of the running training count as well. One that has grown from
    measurement to measurement says that somebody has come to hold the object: itself, a method of it, a function that
    closes over it, a weak reference.

    Args:
        memo: What was copied.
        known: What containers outside hold, whose references do not count.

    """
    own = set(map(id, memo.owned))
    copied = [one for one in memo.originals if memo.copies.get(id(one)) is not one]
    attributes = [one.__dict__ for one in copied if id(memo.copies.get(id(one))) in own and hasattr(one, "__dict__")]
    containers = [*copied, *attributes, memo.originals, copied, attributes, memo.copies, memo.functions, memo.classes]
    containers += known
    explained = Counter(map(id, gc.get_referents(*containers)))
    explained.update(map(id, containers))
    explained.update(id(one) for content in known for one in content)
    counts = list(map(sys.getrefcount, memo.originals))
    weakly = [_weak_references(one) for one in memo.originals]
    itself = _counted_itself()
    return {
        id(one): count - itself - explained[id(one)] + weak
        for one, count, weak in zip(memo.originals, counts, weakly, strict=True)
    }


def _weak_references(one: Any) -> int:
    """How often an object is referred to weakly. Of plain references there is one, which its holders share."""
    if not weakref.getweakrefcount(one):
        return 0
    return sum(map(sys.getrefcount, weakref.getweakrefs(one)))


def held_from_outside(objects: list[Any], known: Sequence[Any] = ()) -> list[Any]:
    """Those of some objects that are referred to from elsewhere than from these objects.

    Args:
        objects: The objects, in a list that nothing else is in need of.
        known: Other containers whose references do not count.

    """
    parts = _parts_of_functions(objects)
    containers = [objects, *known, *objects, *parts]
    counts = list(map(sys.getrefcount, objects))
    explained = Counter(map(id, gc.get_referents(*containers)))
    explained.update(map(id, containers))  # the list of them refers to them as well
    own = _counted_itself()
    more = {
        id(one): number
        for one, count in zip(objects, counts, strict=True)
        if (number := count - own - explained[id(one)]) > 0
    }
    if not more:
        return []
    # By what the step has made, perhaps: `self.layers = {"first": self.first}`. Looked for only now, as it is seldom,
    # and only the references to the few objects in question are counted.
    for key in map(id, gc.get_referents(*_made_by_step(objects, parts))):
        if key in more:
            more[key] -= 1
    return [one for one in objects if more.get(id(one), 0) > 0] if max(more.values()) > 0 else []


def _counted_itself() -> int:
    """The references that the counting itself takes."""
    probe = [object()]
    return next(map(sys.getrefcount, probe)) - 1


def _parts_of_functions(objects: list[Any]) -> list[Any]:
    """The tuples of cells and the dictionaries of attributes of functions among objects, which are none of them.

    Every metric of torchmetrics has wrapped methods, and these hold cells and what they wrap.

    """
    functions = [one for one in objects if type(one) is types.FunctionType]
    parts = {id(part): part for one in functions for part in (one.__closure__, one.__dict__) if part}
    for one in objects if parts else ():
        parts.pop(id(one), None)
    return list(parts.values())


def _made_by_step(objects: list[Any], parts: list[Any]) -> list[Any]:
    """The containers of Python's own kinds that can be reached from objects and are none of them.

    Of a function by its cells and attributes alone, such as what it wraps. It leads to all global variables of its
    module as well, in which a cache may be.

    Args:
        objects: The objects.
        parts: Those of functions among them, which are no part of what is returned.

    """
    seen = {*map(id, objects), *map(id, parts)}
    made: list[Any] = []
    pending = [one for one in objects if not isinstance(one, (types.FunctionType, type))] + parts
    while pending:
        found = []
        for one in [one for one in gc.get_referents(*pending) if type(one) in _MADE_BY_STEPS]:
            if id(one) not in seen:
                seen.add(id(one))
                found.append(one)
        made += found
        pending = found
    return made


def _reached_from(starts: list[Any], objects: list[Any]) -> list[Any]:
    """Those of some objects that can be reached from some of them, the starts included."""
    inside = {id(one): one for one in objects}
    reached = {id(one): one for one in starts}
    pending = list(starts)
    while pending:
        found = [one for one in gc.get_referents(*pending) if id(one) in inside and id(one) not in reached]
        reached.update((id(one), one) for one in found)
        pending = found
    return list(reached.values())
