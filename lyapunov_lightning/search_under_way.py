"""A search for eigenvalues by `measure` while it is under way."""

from collections.abc import Callable

from lyapunov_lightning.curvature.linear import LinearOperator
from lyapunov_lightning.curvature.operators.watched import WatchedOperator
from lyapunov_lightning.curvature.solvers.lanczos import Search
from lyapunov_lightning.kept_search import KeptSearch
from lyapunov_lightning.training.data.readings import MeasuredBatches
from lyapunov_lightning.training.reporting.interruption import Interruption
from lyapunov_lightning.training.reporting.time_left import Clock, products_by_trend


class SearchUnderWay:
    """The products of a search while they are made: shown, kept in a file, and ended by Ctrl-C at the next batch.

    Args:
        batches: What each product goes through.
        kept: The file, if there is one.
        interruption: Whether an end was asked for.
        report: Shows a number of products, with a note.

    Attributes:
        is_interrupted: Whether it was ended.

    """

    def __init__(
        self,
        batches: MeasuredBatches,
        kept: KeptSearch | None,
        interruption: Interruption,
        report: Callable[[int, str], None],
    ) -> None:
        self._kept = kept
        self._interruption = interruption
        self._report = report
        self._clock = Clock(max(1, len(batches)))
        self._count, self._most = 0, 0
        self._trend: int | None = None
        self.is_interrupted = False
        batches.on_batch = self._at_batch

    def before_product(self, search: Search) -> None:
        """What `lanczos` calls."""
        if self._kept is not None:
            self._kept.note(search)
        trend = products_by_trend(search.excess)
        self._begin(search.num_matvecs, search.max_matvecs, trend)

    def counted(self, operator: LinearOperator, num_products: int) -> WatchedOperator:
        """An operator of which so many products are going to be made."""
        self._begin(0, num_products, num_products)
        return WatchedOperator(operator, lambda count: self._begin(count, num_products, num_products))

    def _begin(self, count: int, most: int, trend: int | None) -> None:
        """So many products are made."""
        self._stop_if_asked()
        self._count, self._most, self._trend = count, most, trend
        self._clock.begin_product()
        self._tell()

    def _at_batch(self, place: int) -> None:
        self._stop_if_asked()
        self._clock.at_batch(place)
        self._tell()

    def _stop_if_asked(self) -> None:
        if not self._interruption.is_asked:
            return
        if self._kept is not None and not self.is_interrupted:
            self._kept.write()
        self.is_interrupted = True
        self._interruption.check()

    def _tell(self) -> None:
        if self._count >= self._most:  # the last one is made
            return
        trend = None if self._trend is None else self._trend - self._count
        self._report(self._count, self._clock.told(self._most - self._count, trend))
