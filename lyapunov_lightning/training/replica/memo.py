"""Which copy stands for which original, and what has to be undone once the copies are no longer needed.

Two names of one object have to become two names of one copy, and tensors that share memory have to go on sharing it:
else a step that writes to a tied weight, or to a view of a buffer, would compute something else than it does in
training. So every copy is noted here, together with what else is known of what was met on the way.
"""

import types
from typing import Any

import torch
from torch import nn

from lyapunov_lightning.curvature.errors import MeasurementError

PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, type, range, slice, object})
"""Types whose instances nothing can be written to, so that each stands for itself.

They are looked up where they are met and not handed on, which saves four calls out of ten: of the 42 keys and values
that a `torch.nn.Linear` holds, 25 are of these.
"""


class UncopiedError(Exception):
    """Something cannot be copied; the copier's policy says what happens then.

    Args:
        reason: Why, for a message.
        is_its_own_copy: Whether the object's own way to be copied has returned the object itself.

    """

    def __init__(self, reason: str, *, is_its_own_copy: bool = False) -> None:
        super().__init__(reason)
        self.is_its_own_copy = is_its_own_copy


class Limits:
    """How much may be copied where nobody knows beforehand how much there is, as of a dataset.

    Args:
        objects: The number of objects.
        num_bytes: The size of tensors, arrays and other objects, in bytes.

    Attributes:
        shared: Where memory begins and ends that was too large, so that original and copy share it.

    """

    def __init__(self, objects: int, num_bytes: int) -> None:
        self._objects = objects
        self._bytes_left = num_bytes
        self.shared: list[tuple[int, int]] = []

    def check_number(self, count: int) -> None:
        """Refuse a further object where so many were copied before.

        Raises:
            MeasurementError: If these are as many as may be.

        """
        if count >= self._objects:
            raise MeasurementError(f"more than {self._objects:,} objects would have to be copied")

    def affords(self, num_bytes: int) -> bool:
        """Whether memory of this size may be copied in addition to all that was copied before."""
        if num_bytes > self._bytes_left:
            return False
        self._bytes_left -= num_bytes
        return True


class Memo:
    """Which copy stands for which original.

    Args:
        limits: How much may be copied; no matter how much if None.

    Attributes:
        copies: The copies, by the ``id`` of what they stand for. A plain dictionary, which is what ``__deepcopy__``
            methods take as their memo.
        originals: All that was copied, alive.
        blocks: Copies of whole blocks of memory, by the address of the original's.
        limits: How much may be copied.
        modules: The copies of modules.
        classes: The classes of what was copied, in which a step may keep state as well, in the order in which they were
            met; likewise
        functions: the functions.
        stateless: Objects without attributes, which stand for themselves.
        files: Files that were opened for the copies.
        owned: The copies that were made attribute by attribute, see `own`.
        kept_by_classes: The ids of copies that their own classes hold, such as the instance for equal arguments.
        packages: Installed packages that the user's code names, or whose classes were met.

    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.copies: dict[int, Any] = {}
        # An id says which object is meant for as long as that lives. One that was made on the way, such as the state
        # that `__reduce__` returns, would go at once, and the next object at its address be taken for it.
        self.originals: list[Any] = []
        self.blocks: dict[int, torch.UntypedStorage] = {}
        self.limits = limits
        self.modules: list[nn.Module] = []
        self.classes: dict[type, None] = {}
        self.functions: dict[types.FunctionType, None] = {}
        self.stateless: list[Any] = []
        self.files: list[Any] = []
        self.owned: list[Any] = []
        self.kept_by_classes: set[int] = set()
        self.packages: set[str] = set()

    def note(self, original: Any, copied: Any) -> Any:
        """Let `copied` stand for `original` wherever that is met from now on; returns `copied`."""
        self.copies[id(original)] = copied
        self.originals.append(original)
        return copied

    def own(self, original: Any, copied: Any) -> Any:
        """Note a copy that was made attribute by attribute, so that these may be dropped in the end; returns `copied`.

        A copy that a class has made in its own way is only noted: what that consists of is the class's affair.

        """
        self.owned.append(copied)
        return self.note(original, copied)

    def has(self, original: Any) -> bool:
        """Whether something stands for an object."""
        return id(original) in self.copies

    def copy_of(self, original: Any) -> Any:
        """What stands for an object.

        Raises:
            KeyError: If nothing does.

        """
        return self.copies[id(original)]

    def forget(self) -> None:
        """Take back what was written to objects without attributes.

        These stand for themselves, since an instance of a bare class may be a sentinel that is compared by identity,
        ``x is MISSING``, and since a function has hardly ever attributes.

        """
        for stateless in self.stateless:
            stateless.__dict__.clear()
