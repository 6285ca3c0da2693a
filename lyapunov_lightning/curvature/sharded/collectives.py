"""The collectives within an evaluation: a rank that fails in the middle of it does not leave the others waiting.

Where a model is gathered layer by layer, the ranks meet many times in a forward and a backward pass, each time with
tensors of a certain size, and no rank can say in between that it has failed. But the meetings of one evaluation are
those of the one before. So a rank that fails takes part in the rest of them with zeros, and says so at the end.
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
        """A collective is about to be entered.

        Args:
            take_part: Enters one like it, with zeros.

        """
        self._present.append(take_part)

    @contextmanager
    def followed(self, kind: Hashable) -> Iterator[None]:
        """Let what fails in a block fail only after this rank has taken part in all that the others will enter.

        Before the first block of a kind has gone well nothing is known of it, and a rank that fails there leaves.

        Args:
            kind: Which blocks have the same collectives.

        """
        self._present = []
        try:
            yield
        except PeerFailureError:  # the other one did not know how to go on, and has left
            raise
        except Exception:
            for take_part in self._known.get(kind, [])[len(self._present) :]:
                take_part()
            raise
        self._known[kind] = self._present
