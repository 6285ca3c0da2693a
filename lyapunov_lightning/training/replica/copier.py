"""Copies of everything that a training step may write to.

A step may keep its state anywhere that it can reach: in modules, containers, objects of the user's own, closures,
iterators, generators of random numbers. A `Copier` follows all of these references and copies what it finds, with
identity kept: two names of one object are two names of one copy. ``copy.deepcopy`` falls short of that in four ways. It
shares functions, and with them the closures of hooks; a single lock or a tensor with a graph lets it fail as a whole;
what an object hides from pickling is lost; and tensors that share memory no longer do.

Its parts: `walk` goes from object to object, `rules` says how each is copied, `memo` knows what was copied, and a
`Policy` decides what depends on what the copy is for.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from torch.utils.data import DataLoader, Dataset

from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.training.lightning_names import either
from lyapunov_lightning.training.replica.handlers import keep
from lyapunov_lightning.training.replica.memo import Limits, Memo, UncopiedError
from lyapunov_lightning.training.replica.rules import Rule, derived, way_of
from lyapunov_lightning.training.replica.walk import Walk

_log = logging.getLogger(__name__)


class Exhausted:
    """Stands in the place of an iterator that cannot be copied, and refuses to be drawn from.

    An iterator that was handed through would give the training's items away. This one only matters to a step that
    draws, and lets all others be measured.

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


def hand_through(value: Any, error: UncopiedError) -> Any:
    """What replicas have in the place of what cannot be copied, by what a step could do to it.

    Of an iterator it would take items. Anything else, a handle of a C library for example, is handed through as it is,
    and listed in the log.

    """
    if error.is_its_own_copy:
        # A constant of a compiled package, most likely. It is not listed, since nothing would be to be done about it.
        return value
    cls = type(value)
    if isinstance(value, Iterator):
        # Most steps that can reach an iterator never draw from it: only the one that does is refused, when it does.
        return Exhausted(cls.__name__)
    _list_as_uncopied(f"{cls.__module__}.{cls.__qualname__}", str(error))
    return value


@functools.lru_cache(maxsize=1024)
def _list_as_uncopied(name: str, reason: str) -> None:
    """Log it, once: a replay of every step would say the same."""
    _log.info("A %s is not copied for replays: %s", name, reason)


@dataclass(frozen=True)
class Policy:
    """What depends on what a copy is for; by default it is for a replica.

    Attributes:
        rules: Rules that come before all others.
        uncopied: What stands for a value that cannot be copied, given the reason. May raise a MeasurementError, which
            then ends the whole copy.
        limits: How much may be copied. They are used up, so they are for one copier; no limits if None.

    """

    rules: tuple[Rule, ...] = (
        Rule(
            derived(Dataset, DataLoader, *either("LightningDataModule"), *either("Trainer")),
            keep,
            "Data are large, and only read. The trainer leads to everything; a replica has a view of it instead.",
        ),
    )
    uncopied: Callable[[Any, UncopiedError], Any] = hand_through
    limits: Limits | None = None


REPLICA = Policy()
"""The policy of replicas, and of batches that are kept. Without limits, it is used by as many copiers as there are."""


class Copier(Walk):
    """Copies objects with everything that can be reached from them.

    Args:
        policy: What depends on what the copies are for.

    Attributes:
        memo: Which copy stands for which original, with the modules, classes and functions that were met.

    """

    def __init__(self, policy: Policy = REPLICA) -> None:
        super().__init__(Memo(policy.limits), functools.partial(way_of, policy.rules), policy.uncopied)
