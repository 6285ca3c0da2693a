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
        value_errors: Shape ``(k,)``: how far ``θ`` is estimated to be from that eigenvalue: the squared residual over
            the distance to where the next eigenvalue seen by the search may lie, or the residual where that is less;
            never less than the noise of the products. A bound if nothing lies in between that the search has not seen.
            Of the outermost values, where those alone were wanted to a tolerance of their own, it is how far the
            outermost eigenvalue may lie beyond ``θ`` without having shown, which may be more than the residual.
        missed_probability: Shape ``(k,)``: the chance, at most, that an eigenvalue lies further out than this one, by
            more than residual and tolerance, and is none of the others: a copy of a repeated one, say, or one that the
            start of the search hides. It is that for the worst place of such an eigenvalue, over the random numbers of
            the search; after a warm start of a single value of an end as far as what is missed grew beside the known
            ones before. 0 where the whole space was searched, 1 where nothing was done that could tell. A search that
            runs out of products returns with the chance that it has got to; `converged` tells of the residuals alone.
        converged: Shape ``(k,)``, bool: whether the tolerance was reached.
        num_matvecs: Products that were spent.
        num_largest: How many of the values are of the upper end.
        start: Shape ``(size,)``: where to start the search for the same pairs of an operator that has changed a little:
            all these vectors, and a share of the ones that came next to them and may have overtaken them since.

    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    value_errors: Tensor
    missed_probability: Tensor
    converged: Tensor
    num_matvecs: int
    num_largest: int
    start: Tensor

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
