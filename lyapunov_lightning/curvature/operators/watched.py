"""An operator that reports its products."""

from collections.abc import Callable

import torch

from lyapunov_lightning.curvature.linear import LinearOperator, SymmetricOperator, space_of


class WatchedOperator(SymmetricOperator):
    """An operator that reports each of its products.

    Args:
        operator: The operator.
        report: Called after each product.

    """

    def __init__(self, operator: LinearOperator, report: Callable[[], None]) -> None:
        super().__init__(space_of(operator))
        self._operator = operator
        self._report = report

    def matvec(self, vector: torch.Tensor) -> torch.Tensor:
        """The operator's product."""
        product = self._operator.matvec(vector)
        self._report()
        return product
