"""The library under both of its names, ``lightning.pytorch`` and ``pytorch_lightning``, which have no class in common.

One of the two has to be installed, and the other is served where it is. What the package wants to recognise it looks
for in `either`. What it hands to the library, its callbacks and its refusals, belongs to both: a Trainer of either name
takes the callbacks, and ``except`` with the exception of either name catches the refusals.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias, Union

_NAMES = ("lightning.pytorch", "pytorch_lightning")


@contextmanager
def _messages_stay_where_they_are() -> Iterator[None]:
    """Import one name without taking over the messages of the other, if that is in use.

    Both log through one module, and the name that is imported last has all messages sent to its own logger. A user who
    has muted or redirected the Trainer's messages, as the documentation shows, would see them again.

    """
    # Whichever name is in use has loaded the module. Where neither is, the name that is imported last gets the
    # messages: sorted imports have `lightning` before this package and `pytorch_lightning` after it.
    if not any(sys.modules.get(name) for name in _NAMES):
        yield
        return
    rank_zero: Any = sys.modules["lightning_utilities.core.rank_zero"]
    logger, deprecation = rank_zero.log, rank_zero.rank_zero_deprecation_category
    yield
    rank_zero.log, rank_zero.rank_zero_deprecation_category = logger, deprecation


def _installed() -> tuple[str, ...]:
    """The names that can be imported, which are imported on the way.

    A callback has to derive from the base class of each library before a Trainer of that library sees it, so it is too
    late to look for the second name when it is first used.

    Raises:
        ModuleNotFoundError: If neither is installed.

    """
    found: list[str] = []
    errors: list[ImportError] = []
    for name in _NAMES:
        try:
            import_module(name)
        except ImportError as error:  # also of a copy that is too old for this PyTorch, which nobody else can use
            errors.append(error)
        else:
            found.append(name)
    if not found:
        raise errors[0]
    return tuple(found)


with _messages_stay_where_they_are():
    _LIBRARIES = _installed()


@cache
def either(name: str) -> tuple[type[Any], ...]:
    """The classes that have a name in ``lightning.pytorch`` and in ``pytorch_lightning``, for ``isinstance``.

    Args:
        name: The class with the modules that it is in, such as ``"Trainer"`` or ``"loggers.TensorBoardLogger"``.

    Returns:
        Both classes, or the only one where one library is not installed, or in a version that does not have it.

    Raises:
        AttributeError: If neither has it.

    Example:
        >>> import lightning.pytorch
        >>> from lyapunov_lightning.training.lightning_names import either
        >>> isinstance(lightning.pytorch.LightningModule(), either("LightningModule"))
        True

    """
    classes = tuple(found for library in _LIBRARIES if (found := _find(library, name)) is not None)
    if not classes:
        raise AttributeError(f"Neither {' nor '.join(_NAMES)} has `{name}`.")
    return classes


def in_library_of(part: object, name: str) -> Any:
    """The class or function that has a name in the library of a given object, to make what that library would make.

    Args:
        part: A trainer, a module, a logger or another object of one of the two libraries. An object of neither counts
            as one of ``lightning.pytorch``, or of the one that is installed.
        name: As for `either`.

    Raises:
        AttributeError: If the library does not have it.

    """
    modules = (f"{kind.__module__}." for kind in type(part).__mro__)
    library = next((name for module in modules for name in _NAMES if module.startswith(f"{name}.")), _LIBRARIES[0])
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
        raise  # the module exists, and fails to import something else: that is not ours to hide


# A type checker sees both names; at run time there are those that are installed.
if TYPE_CHECKING:
    import lightning.fabric.utilities.exceptions
    import lightning.pytorch
    import lightning_fabric.utilities.exceptions
    import pytorch_lightning

    Trainer: TypeAlias = lightning.pytorch.Trainer | pytorch_lightning.Trainer
    LightningModule: TypeAlias = lightning.pytorch.LightningModule | pytorch_lightning.LightningModule

    # The two bases disagree on whose Trainer a hook takes; an override has to take both.
    class _Callback(lightning.pytorch.Callback, pytorch_lightning.Callback):  # type: ignore[misc]
        pass

    class _MisconfigurationException(
        lightning.fabric.utilities.exceptions.MisconfigurationException,
        lightning_fabric.utilities.exceptions.MisconfigurationException,
    ):
        pass

else:
    Trainer = Union[either("Trainer")]
    """A trainer of either name, for annotations."""

    LightningModule = Union[either("LightningModule")]
    """A module of either name, for annotations."""

    class _Callback(*either("Callback")):
        pass

    class _MisconfigurationException(*either("utilities.exceptions.MisconfigurationException")):
        pass


# Both names take these from `lightning_utilities`, whose functions know the rank of this process once one is imported.
rank_zero_info: Callable[[str], None] = _find(_LIBRARIES[0], "utilities.rank_zero.rank_zero_info")
rank_zero_only: Callable[[Callable[[str], None]], Callable[[str], None]] = _find(
    _LIBRARIES[0], "utilities.rank_zero.rank_zero_only"
)


def callbacks_of(trainer: Trainer) -> list[Any]:
    """The callbacks of a trainer, an attribute that its class does not declare."""
    untyped: Any = trainer
    callbacks: list[Any] = untyped.callbacks
    return callbacks


def optimizers_of(trainer: Trainer) -> list[Any]:
    """The optimizers, without the one that Lightning puts in the place of none, which has no parameters."""
    return [optimizer for optimizer in trainer.optimizers if optimizer.param_groups]


def log_interval(trainer: Trainer) -> int:
    """After how many steps a trainer logs, 0 for never: another attribute that its class does not declare."""
    untyped: Any = trainer
    return int(untyped.log_every_n_steps or 0)


def is_accumulating(trainer: Trainer) -> bool:
    """Whether the optimizer steps after a later batch than the present one, asked before or within a batch."""
    untyped: Any = trainer
    return untyped.accumulate_grad_batches > 1 and bool(untyped.fit_loop.epoch_loop._should_accumulate())


def may_clip(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether gradients may be changed between the backward pass and the step: by clipping or in the module's hooks."""
    hooks = ("configure_gradient_clipping", "on_before_optimizer_step", "optimizer_step")
    bases = either("LightningModule")
    own = any(getattr(type(pl_module), hook) not in [getattr(base, hook) for base in bases] for hook in hooks)
    return trainer.gradient_clip_val is not None or own


class Callback(_Callback):
    """The base class of callbacks that Trainers and command lines of both names take for theirs."""


class MisconfigurationException(_MisconfigurationException):
    """What this package raises for a combination that cannot be right."""
