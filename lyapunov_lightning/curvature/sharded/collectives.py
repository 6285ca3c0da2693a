"""The collectives within an evaluation: a rank that fails in the middle of it does not leave the others waiting.

Where a model is gathered layer by layer, the ranks meet in many collectives during a forward and a backward pass, each
with tensors of a certain size, and no rank can say in between that it has failed. But an evaluation has the same
collectives as the one before. So a rank that fails takes part in the remaining ones with zeros, and says so at the end.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from lyapunov_lightning.curvature.errors import PeerFailureError


class Collectives:
    """Remembers the collectives of evaluations, in their order."""

    def __init__(self) -> None:
        self._known: dict[Hashable, list[Callable[[], object]]] = {}
        self._present: list[Callable[[], object]] = []

    def note(self, take_part: Callable[[], object]) -> None:
        """Remember a collective that is about to be entered.

        Args:
            take_part: Enters an equal collective, with zeros.

        """
        self._present.append(take_part)

    @contextmanager
    def followed(self, kind: Hashable) -> Iterator[None]:
        """Raise an error of a block only after this rank has taken part in all collectives that the others enter.

        This works once a block of the same kind has succeeded. Before that nobody knows the collectives, and a rank
        that fails leaves at once.

        Args:
            kind: Blocks of equal kind have the same collectives.

        """
        self._present = []
        try:
            yield
        except PeerFailureError:
            raise  # the rank that failed has left, so that nobody would meet this one in the remaining collectives
        except Exception:
            for take_part in self._known.get(kind, [])[len(self._present) :]:
                take_part()
            raise
        self._known[kind] = self._present  # only of a block that succeeded: one that failed has not seen all of them
