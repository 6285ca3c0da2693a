"""Checks of arguments, with errors that name argument and value."""

from typing import Any, get_args


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
        raise ValueError(f"`{name}` should be a {'positive' if least else 'non-negative'} int, got {value}.")


def check_positive(name: str, value: float) -> None:
    """Make sure that a number is above zero.

    Raises:
        ValueError: If it is not.

    """
    if not value > 0:  # NaN is refused as well
        raise ValueError(f"`{name}` should be a positive float, got {value}.")
