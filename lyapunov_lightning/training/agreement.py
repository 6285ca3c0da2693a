"""Do all ranks of a run have the same callbacks, with the same arguments?

A rank that measures at other steps than the others, or other things, leaves them waiting in a collective until the
network gives up, and then nobody knows why. A rank that has no callback at all takes part in no collective of ours, so
what each rank has is put into the store through which the ranks have found each other, and read from there: before the
barrier of Lightning that ends the hook ``setup`` it is written, after it all have written.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from lyapunov_lightning.training.lightning_names import MisconfigurationException, Trainer

Description = dict[str, str]
"""What has to be equal on all ranks, in words, by name."""

_OF_THE_FIRST_RANK = ("save_dir", "log_prefix")
"""Arguments that may differ: the first rank alone writes, and each rank keeps its tags for itself."""


def described(callback: object, arguments: Mapping[str, Any]) -> Description:
    """A callback in words that are the same on all ranks for equal arguments."""
    told = {name: _in_words(value) for name, value in arguments.items() if name not in _OF_THE_FIRST_RANK}
    return {"class": type(callback).__name__, **told}


def announce(trainer: Trainer, callbacks: Sequence[Description]) -> None:
    """Tell the other ranks what this one has, in the hook ``setup``."""
    store = _store(trainer)
    if store is not None:
        before = _announced(store, trainer.global_rank)
        _put(store, trainer.global_rank, {"number": before["number"] + 1, "has_ended": False, "callbacks": callbacks})


def withdraw(trainer: Trainer) -> None:
    """Mark what was announced as that of a run that has ended: the next one may have no callbacks here."""
    store = _store(trainer)
    if store is not None:
        _put(store, trainer.global_rank, {**_announced(store, trainer.global_rank), "has_ended": True})


def check_agreement(trainer: Trainer) -> None:
    """Refuse ranks that have announced different callbacks, in a hook after ``setup``.

    Raises:
        MisconfigurationException: On each rank that has callbacks, with the difference.

    """
    store = _store(trainer)
    if store is None:
        return
    own = _announced(store, trainer.global_rank)["number"]
    found: list[list[Description]] = []
    for rank in range(trainer.world_size):
        told = _announced(store, rank)
        # One that has ended with this number is of this run, on a rank that has refused it already.
        is_earlier = told["has_ended"] and told["number"] != own
        found.append([] if is_earlier else told["callbacks"])
    for rank, callbacks in enumerate(found):
        if callbacks != found[0]:
            raise MisconfigurationException(
                "The ranks have different callbacks of `lyapunov_lightning`, and would wait for each other forever:"
                f" {_difference(found[0], callbacks, rank)}. Give all ranks the same callbacks in the same order, with"
                " the same arguments."
            )


def _difference(first: list[Description], other: list[Description], rank: int) -> str:
    names = [[callback["class"] for callback in callbacks] for callbacks in (first, other)]
    if names[0] != names[1]:
        has = [", ".join(f"`{name}`" for name in own) or "none" for own in names]
        return f"rank 0 has {has[0]}, and rank {rank} has {has[1]}"
    return "; ".join(_differences(first, other, rank))


def _differences(first: list[Description], other: list[Description], rank: int) -> Iterator[str]:
    for own, theirs in zip(first, other, strict=True):
        for name in sorted({*own, *theirs}):
            values = [told.get(name, "its default") for told in (own, theirs)]
            if values[0] != values[1]:
                yield f"`{name}` of `{own['class']}` is {values[0]} on rank 0 and {values[1]} on rank {rank}"


def _in_words(value: Any) -> str:
    """A value in words without addresses, which differ from process to process."""
    if isinstance(value, functools.partial):
        return f"partial of {_in_words(value.func)}"
    if callable(value) and not isinstance(value, type):
        return getattr(value, "__qualname__", type(value).__name__)
    if hasattr(value, "__dataclass_fields__"):
        fields = ", ".join(f"{name}={_in_words(getattr(value, name))}" for name in value.__dataclass_fields__)
        return f"{type(value).__name__}({fields})"
    words = repr(value)
    return type(value).__name__ if " at 0x" in words else words


def _announced(store: Any, rank: int) -> dict[str, Any]:
    """What a rank has announced last; nothing for one that never has."""
    key = _key(rank)
    # Asked for first, since a store waits for a key that is not there. None is ever removed.
    if not store.check([key]):
        return {"number": 0, "has_ended": True, "callbacks": []}
    told: dict[str, Any] = json.loads(store.get(key))
    return told


def _put(store: Any, rank: int, told: Mapping[str, Any]) -> None:
    store.set(_key(rank), json.dumps(told))


def _key(rank: int) -> str:
    return f"lyapunov_lightning/callbacks/{rank}"


def _store(trainer: Trainer) -> Any:
    """The store of the run's processes; None for a single one, or where they have met without a store (MPI)."""
    if trainer.world_size == 1 or not dist.is_initialized():
        return None
    try:
        return dist.distributed_c10d._get_default_store()
    except (RuntimeError, ValueError):
        return None
