"""A message, the case that brings it up, and what it says to do: the rows of the tables of tests of remedies."""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from lyapunov_lightning.curvature import CurvatureWarning
from lyapunov_lightning.training.reporting import recording

_PAGE = Path(__file__).parent.parent / "docs" / "troubleshooting.md"

Act = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A message with its remedies.

    Attributes:
        says: A part of the message, without backticks, and with … for what depends on the case.
        case: Brings the message up.
        remedies: For each remedy, as the message or its entry in `docs/troubleshooting.md` writes it without backticks,
            what a user then does; it fails where the result is not right.
        also: Parts of other messages that may come with the remedies.

    """

    says: str
    case: Act
    remedies: Mapping[str, Act]
    also: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return self.says[:60]


def plain(text: str) -> str:
    """A message in one line and without backticks."""
    return " ".join(text.replace("`", "").replace("**", "").split())


def says(part: str, message: str) -> bool:
    """Whether a message has a part in which … stands for anything."""
    return re.search(".*?".join(map(re.escape, part.split("…"))), message) is not None


def heard(act: Act) -> tuple[list[str], list[str]]:
    """What the package says meanwhile: its warnings with the error that ended it, and its notes on the console."""
    notes: list[str] = []
    errors: list[str] = []
    with warnings.catch_warnings(record=True) as caught, mock.patch.object(recording, "rank_zero_info", notes.append):
        warnings.simplefilter("always")
        try:
            act()
        except AssertionError:
            raise
        except Exception as error:
            errors.append(f"{error}")
    told = [str(warning.message) for warning in caught if issubclass(warning.category, CurvatureWarning)]
    return [plain(text) for text in told + errors], list(map(plain, notes))


def check(row: Row) -> None:
    """Run into a message, and do each thing that it says: then it does not come, and no other one in its place."""
    first, notes = heard(row.case)
    messages = [text for text in first + notes if says(row.says, text)]
    assert messages, f"{row.says!r} was not said, but {first + notes}"
    longest = max(row.says.split("…"), key=len).strip()
    told = messages[0] + " ".join(
        entry for entry, bold in _BOLD.items() if longest in entry or any(says(part, messages[0]) for part in bold)
    )
    for remedy, act in row.remedies.items():
        assert remedy in told, f"{remedy!r} is not what {messages[0]!r} names, nor its entry in the documentation"
        warned, notes = heard(act)
        # A run that is well has notes of its own, such as the diagnosis at its end.
        again = [text for text in notes if says(row.says, text)]
        after = again + [text for text in warned if not any(says(part, text) for part in row.also)]
        assert not after, f"{remedy!r} leads to {after}"


def _bold() -> dict[str, list[str]]:
    """The entries of the documentation, each with the messages that it is about."""
    entries = re.split(r"\n\n|\n- ", _PAGE.read_text())
    return {plain(entry): [plain(part) for part in re.findall(r"\*\*(.+?)\*\*", entry, re.DOTALL)] for entry in entries}


_BOLD = _bold()
