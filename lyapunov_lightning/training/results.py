"""What a measurement returns: numbers in fields, and the tags under which they are logged."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, Generic, TypeVar

_MOST_KEPT = 10_000
"""Results that are kept; beyond that every second one is dropped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The result of one measurement.

    Fields hold numbers, strings, tensors of numbers, and tuples of these, so that a checkpoint can keep them and
    ``torch.load(weights_only=True)`` loads it. No field holds anything of the size of the model.

    Attributes:
        step: The optimizer step before which the measurement was made.
        epoch: The number of epochs before it, with the fraction of the present one that had passed.

    """

    step: int
    epoch: float

    @property
    def has_converged(self) -> bool:
        """Whether all searches met their tolerance; where one did not, the products are looked at."""
        return True

    def scalars(self) -> dict[str, float]:
        """The numbers to log, by tag; the only place that knows the tags."""
        raise NotImplementedError

    def table(self) -> dict[str, float]:
        """Further numbers for the table on disk only, such as one for each of many directions."""
        return {}


R = TypeVar("R", bound=Result)


class ResultList(list[R]):
    """Results in their order, which can be made a table.

    Example::

        >>> from lyapunov_lightning import CurvatureProbe
        >>> len(CurvatureProbe().results.to_pandas())  # nothing was measured yet
        0

    """

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with a row for each result, indexed by the step.

        Its columns are the epoch, and every number under the tag by which it is logged; NaN where it was not measured.

        Raises:
            ModuleNotFoundError: If pandas is not installed.

        """
        pandas = pandas_for("results.to_pandas")
        rows = [{"epoch": result.epoch, **result.scalars(), **result.table()} for result in self]
        return pandas.DataFrame(rows, index=pandas.Index([result.step for result in self], name="step"))


def pandas_for(owner: str) -> Any:
    """Pandas, which few need.

    Raises:
        ModuleNotFoundError: If it is not installed, with who needs it and the remedy.

    """
    try:
        return import_module("pandas")  # by name, so that type checkers do not ask for it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"`{owner}` needs pandas. Install it with `pip install pandas`.") from error


class Results(Generic[R]):
    """The results of a callback in their order, kept across a resume.

    Args:
        kind: The class of the results.

    """

    def __init__(self, kind: type[R]) -> None:
        self._kind = kind
        self.items: ResultList[R] = ResultList()

    def add(self, result: R) -> None:
        """Keep a result. Of very many every second one is dropped, so that those kept still span the whole run."""
        self.items.append(result)
        if len(self.items) > _MOST_KEPT:
            del self.items[1:-1:2]  # neither the first nor the last one

    def state_dict(self) -> dict[str, Any]:
        """All fields of all results."""
        # Plain dictionaries: ``torch.load(weights_only=True)`` refuses dataclasses, and with them the user's whole
        # checkpoint.
        names = [field.name for field in fields(self._kind)]
        return {"items": [{name: getattr(result, name) for name in names} for result in self.items]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        # Without the fields of another version, and without results that lack one.
        names = {field.name for field in fields(self._kind)}
        items: list[R] = []
        for kept in state["items"]:
            with suppress(TypeError):
                items.append(self._kind(**{name: value for name, value in kept.items() if name in names}))
        # In place: the list may have been handed out as the callback's `results` before.
        self.items[:] = [item for item in items if isinstance(item.step, int) and isinstance(item.epoch, (int, float))]


def ranked(tag: str, values: Sequence[float]) -> dict[str, float]:
    """Values under numbered tags, ``{tag}_1`` and so on."""
    return {f"{tag}_{rank}": float(value) for rank, value in enumerate(values, 1)}


Row = tuple[float | None, ...]
"""Numbers, and None where there is none or it is not finite."""


def finite(value: float) -> float | None:
    """A number, or None if it is not finite."""
    return value if math.isfinite(value) else None


def known(values: Mapping[str, float | None]) -> dict[str, float]:
    """The values that are known, by tag."""
    return {tag: float(value) for tag, value in values.items() if value is not None}
