"""The library under both of its names, ``lightning.pytorch`` and ``pytorch_lightning``, which have no class in common.

What the package wants to recognise it looks for in `either`. What it hands to the library, its callbacks and its
refusals, belongs to both: a Trainer of either name takes the callbacks, and ``except`` with the exception of either
name catches the refusals.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, TypeAlias

from lightning_utilities.core import rank_zero

_NAMES = ("lightning.pytorch", "pytorch_lightning")


@contextmanager
def _messages_stay_where_they_are() -> Iterator[None]:
    """Import one name without taking over the messages of the other, if that is in use.

    Both log through one module, and the name that is imported last has all messages sent to its own logger. Whoever has
    muted or redirected the messages of his Trainer, as the documentation shows, would see them again.

    """
    is_in_use = any(name in sys.modules for name in _NAMES)
    logger, deprecation = rank_zero.log, rank_zero.rank_zero_deprecation_category
    yield
    if is_in_use:
        rank_zero.log, rank_zero.rank_zero_deprecation_category = logger, deprecation


# Where neither is in use yet, the last one gets the messages: sorted imports have `lightning` before this package and
# `pytorch_lightning` after it.
with _messages_stay_where_they_are():
    import lightning.fabric.utilities.exceptions
    import lightning.pytorch
    import lightning_fabric.utilities.exceptions
    import pytorch_lightning


Trainer: TypeAlias = lightning.pytorch.Trainer | pytorch_lightning.Trainer
"""A trainer of either name, for annotations."""

LightningModule: TypeAlias = lightning.pytorch.LightningModule | pytorch_lightning.LightningModule
"""A module of either name, for annotations."""


# The two bases disagree on whose Trainer a hook takes; an override has to take both.
class Callback(lightning.pytorch.Callback, pytorch_lightning.Callback):  # type: ignore[misc]
    """The base class of callbacks that Trainers and command lines of both names take for theirs."""


class MisconfigurationException(
    lightning.fabric.utilities.exceptions.MisconfigurationException,
    lightning_fabric.utilities.exceptions.MisconfigurationException,
):
    """What this package raises for a combination that cannot be right."""


@cache
def either(name: str) -> tuple[type[Any], ...]:
    """The classes that have a name in ``lightning.pytorch`` and in ``pytorch_lightning``, for ``isinstance``.

    Args:
        name: The class with the modules that it is in, such as ``"Trainer"`` or ``"loggers.TensorBoardLogger"``.

    Returns:
        Both classes, or the only one where the two are installed in versions of which one does not have it.

    Raises:
        AttributeError: If neither has it.

    Example:
        >>> import lightning.pytorch, pytorch_lightning
        >>> lightning.pytorch.LightningModule is pytorch_lightning.LightningModule
        False
        >>> isinstance(pytorch_lightning.LightningModule(), either("LightningModule"))
        True

    """
    classes = tuple(found for library in _NAMES if (found := _find(library, name)) is not None)
    if not classes:
        raise AttributeError(f"Neither {' nor '.join(_NAMES)} has `{name}`.")
    return classes


def in_library_of(part: object, name: str) -> Any:
    """The class or function that has a name in the library that a part is of, to make what its own parts would make.

    Args:
        part: A trainer, a module, a logger or another object of one of the two libraries; of any other, it is taken for
            one of ``lightning.pytorch``.
        name: As for `either`.

    Raises:
        AttributeError: If the library does not have it.

    """
    modules = (f"{kind.__module__}." for kind in type(part).__mro__)
    library = next((name for module in modules for name in _NAMES if module.startswith(f"{name}.")), _NAMES[0])
    found = _find(library, name)
    if found is None:
        raise AttributeError(f"{library} does not have `{name}`.")
    return found


def _find(library: str, name: str) -> Any:
    """What has the name, or None where the library has no such name or module."""
    place, _, name = f"{library}.{name}".rpartition(".")
    try:
        return getattr(import_module(place), name, None)
    except ModuleNotFoundError as error:
        if error.name is not None and place.startswith(error.name):
            return None
        raise  # the module is there, and what it needs is not
