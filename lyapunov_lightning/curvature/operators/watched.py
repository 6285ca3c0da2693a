"""An operator that counts its products while they are made."""

import time
from collections.abc import Callable

import torch

from lyapunov_lightning.curvature.linear import LinearOperator, SymmetricOperator, space_of


class WatchedOperator(SymmetricOperator):
    """An operator that counts its products, and reports the count once they have taken a while.

    Most searches end before anybody asks how far they are. So it is the operator that counts, and whoever shows the
    count is called only from then on.

    Args:
        operator: The operator.
        report: Called with the number of products so far after each product.
        after: Seconds from now in which nothing is reported.

    Attributes:
        num_matvecs: Products so far.

    """

    def __init__(self, operator: LinearOperator, report: Callable[[int], None], after: float = 0.0) -> None:
        super().__init__(space_of(operator))
        self.num_matvecs = 0
        self._operator = operator
        self._report = report
        self._silent_until = time.perf_counter() + after

    def matvec(self, vector: torch.Tensor) -> torch.Tensor:
        """The operator's product."""
        product = self._operator.matvec(vector)
        self.num_matvecs += 1
        # Not by the wall clock, which may be set while a search is under way.
        if time.perf_counter() > self._silent_until:
            self._report(self.num_matvecs)
        return product
