"""What an eigen-solver returns, whichever solver it was."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues of a symmetric operator with their vectors and error bounds.

    Attributes:
        values: Shape ``(k,)``, float64 on the CPU: the `num_largest` largest in descending order, then the smallest
            ones in ascending order.
        vectors: Shape ``(k, size)``: one orthonormal row for each value, on the operator's device in its dtype.
        residuals: Shape ``(k,)``, in the unit of the eigenvalues: a bound on ``‖Hv − θv‖``. An eigenvalue lies within
            that distance of ``θ``.
        converged: Shape ``(k,)``, bool: whether the residual reached the tolerance.
        num_matvecs: Products that were spent.
        num_largest: How many of the values are of the upper end.

    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    num_matvecs: int
    num_largest: int

    @property
    def largest(self) -> Tensor:
        """Shape ``(num_largest,)``: the upper end, descending."""
        return self.values[: self.num_largest]

    @property
    def smallest(self) -> Tensor:
        """Shape ``(k - num_largest,)``: the lower end, ascending."""
        return self.values[self.num_largest :]

    @property
    def negative_mass(self) -> float:
        """Share of the negative ones in the sum of the moduli of the values; 0 where all are 0."""
        total = float(self.values.abs().sum())
        return float((-self.values).clamp_min(0).sum()) / total if total else 0.0
