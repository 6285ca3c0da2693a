"""What a logger could not take yet."""

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_MOST_WAITING = 10_000
"""Entries that wait at most; the newest stay."""

_MOST_REFUSALS = 10
"""How often an entry may be refused while newer ones are taken, before it is given up: then it is the entry and not
the way to the logger, such as a NaN to a service that takes none."""


class Backlog(Generic[T]):
    """Entries that could not be delivered, the oldest first."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[T, int]] = deque(maxlen=_MOST_WAITING)

    @property
    def num_waiting(self) -> int:
        """How many there are."""
        return len(self._waiting)

    def deliver(self, take: Callable[[T], None], entry: T) -> None:
        """Deliver an entry, and once that has gone well those that wait; if not, it waits with them.

        Raises:
            Exception: What `take` raised for the entry.

        """
        # The new one first: a logger that is out of reach may take a second to say so, which is to be spent once.
        try:
            take(entry)
        except Exception:
            self._waiting.append((entry, 0))
            raise
        self._catch_up(take, refusals=1)

    def retry(self, take: Callable[[T], None]) -> None:
        """Deliver those that wait, up to the first that is refused."""
        self._catch_up(take, refusals=0)

    def _catch_up(self, take: Callable[[T], None], refusals: int) -> None:
        while self._waiting:
            entry, refused = self._waiting[0]
            try:
                take(entry)
            except Exception:
                self._waiting.popleft()
                if refused + refusals < _MOST_REFUSALS:
                    self._waiting.append((entry, refused + refusals))  # behind the others, which may be taken
                return
            self._waiting.popleft()
