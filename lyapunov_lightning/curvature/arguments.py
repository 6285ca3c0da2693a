"""Checks of arguments, with errors that name argument and value."""

from collections.abc import Mapping
from dataclasses import fields
from numbers import Real
from typing import Any, TypeVar, get_args

T = TypeVar("T")


def check_choice(name: str, value: object, literal: Any) -> None:
    """Make sure that a value is one of a ``Literal``'s.

    Raises:
        ValueError: If it is not.

    """
    if value not in get_args(literal):
        raise ValueError(f"`{name}` should be one of {', '.join(get_args(literal))}, got {value!r}.")


def check_int(name: str, value: object, least: int) -> None:
    """Make sure that a value is an int, of at least 0 or 1.

    Raises:
        ValueError: If it is not.

    """
    # In Python True is an int: `every_n_steps: true` in a YAML file would measure at each step.
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` should be a {'positive' if least else 'non-negative'} int, got {value!r}.")


def check_positive(name: str, value: object) -> None:
    """Make sure that a number is above zero.

    Raises:
        ValueError: If it is not.

    """
    # A string, such as the "1e-3" that YAML makes of 1e-3, cannot be compared with a number. NaN is refused as well.
    if not isinstance(value, Real) or not float(value) > 0:
        raise ValueError(f"`{name}` should be a positive float, got {value!r}.")


def made_of(kind: type[T], name: str, value: object) -> T:
    """A value of a dataclass, which may be given as a mapping of its fields, as in YAML.

    Args:
        kind: The dataclass.
        name: The argument that it was given for.
        value: What was given.

    Raises:
        ValueError: If it is neither, or the mapping has other keys than the fields.

    Example::

        >>> from lyapunov_lightning import Schedule
        >>> from lyapunov_lightning.curvature.arguments import made_of
        >>> made_of(Schedule, "schedule", {"every_n_epochs": 2}) == Schedule(every_n_epochs=2)
        True

    """
    if isinstance(value, kind):
        return value
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(value, Mapping):
        raise ValueError(f"`{name}` should be a {kind.__name__}, or a mapping of its fields, got {value!r}.")
    unknown = [key for key in value if key not in known]
    if unknown:
        raise ValueError(f"`{name}` should have no other fields than {', '.join(known)}, got {unknown[0]!r}.")
    return kind(**value)
