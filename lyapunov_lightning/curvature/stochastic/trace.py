r"""Sums over all eigenvalues from random vectors: trace, Frobenius norm, diagonal.

For a random vector ``z`` with independent entries of mean 0 and variance 1, ``zᵀAz``, ``‖Az‖²`` and ``z ⊙ Az`` have the
means ``tr A``, ``‖A‖²_F`` and ``diag A`` (M. Hutchinson, 1990; C. Bekas, E. Kokiopoulou and Y. Saad, "An estimator for
the diagonal of a matrix", 2007). A few eigenvalues far outside dominate the variance. With orthonormal vectors ``V``
near to their eigenvectors and random vectors in the orthogonal complement, where ``P = I - VVᵀ``,

.. math:: \operatorname{tr} A = \operatorname{tr} V^\top A V + \mathbb{E}\, z^\top P A P z, \qquad
          \|A\|_F^2 = \|AV\|_F^2 + \mathbb{E}\, \|A P z\|^2,

whatever ``V`` is: nothing has to be an eigenvector, the terms of ``V`` have only to be its own. So eigenpairs that are
known enter with their values where they have converged, and at the price of a product each where not; and where none is
known, a random sketch ``V = orth(A S)`` brings most of the way, at the price of two products a vector (Hutch++: R.
Meyer, C. Musco, C. Musco and D. Woodruff, "Hutch++: optimal stochastic trace estimation", 2021).

The traces of all diagonal blocks come out of the same products. What the coordinates ``b`` of a block have in the inner
products ``vᵀAv`` and ``(Pz)ᵀ(APz)`` has the mean

.. math:: \operatorname{tr} A_{bb} = \operatorname{tr}(V V^\top A)_{bb} + \mathbb{E}\, (Pz)_b^\top (A P z)_b,

since ``PA`` and ``VVᵀA`` add up to ``A``. So in every sample the shares of the blocks add up to the trace, and what a
block's rows have outside of the block adds to its variance alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lyapunov_lightning.curvature.arguments import check_choice, check_int
from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.linear import LinearOperator, space_of
from lyapunov_lightning.curvature.solvers.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.stochastic.estimates import Estimate, estimate
from lyapunov_lightning.curvature.vectors.space import VectorSpace

Probes = Literal["gaussian", "signs"]


@dataclass(frozen=True)
class Moments:
    """Sums over all eigenvalues.

    Attributes:
        trace: The sum of the eigenvalues.
        frobenius_norm: The root of the sum of their squares.
        num_matvecs: Products that were spent.
        trace_of: The traces of diagonal blocks, by name, if some were asked for.

    """

    trace: Estimate
    frobenius_norm: Estimate
    num_matvecs: int
    trace_of: Mapping[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class DiagonalEstimate:
    """A matrix's diagonal, estimated.

    Attributes:
        value: Shape ``(n,)``: the entries.
        standard_error: Shape ``(n,)``: the standard error of each, estimated from the samples.
        num_samples: How many random vectors there were, of which each took a product.

    """

    value: Tensor
    standard_error: Tensor
    num_samples: int


def stochastic_moments(
    operator: LinearOperator,
    *,
    num_probes: int = 10,
    known: Eigenpairs | None = None,
    sketch: int = 0,
    probes: Probes = "gaussian",
    seed: int = 0,
    blocks: Mapping[str, Sequence[slice]] | None = None,
) -> Moments:
    """Trace and Frobenius norm, one product a random vector.

    The intervals of the estimates allow for one eigenvalue that dominates, and so are wide for few random vectors.
    Outliers that are known or found by a sketch make the standard errors small, which counts for more.

    Args:
        operator: The symmetric operator.
        num_probes: How many random vectors.
        known: Eigenpairs whose vectors the random ones are kept orthogonal to, as `lanczos` returns them. The ones that
            have not converged take a product each.
        sketch: How many directions of large eigenvalues to look for in advance, at two products each: about as many as
            there are outliers that are not known.
        probes: ``"gaussian"``, or ``"signs"`` (Rademacher vectors), of which the trace has a smaller error the more
            the diagonal stands out; the intervals then do not hold for matrices that are nearly diagonal.
        seed: Seed of the random vectors.
        blocks: Diagonal blocks whose traces are wanted too, at no further product: for each name where in this rank's
            vectors its coordinates are, see `FlatLayout.slices`.

    Returns:
        The estimates with their standard errors.

    Raises:
        ValueError: If `num_probes` is less than 2, of which no error can be estimated, or another argument is out of
            its range.
        NonFiniteCurvatureError: If a product is not finite.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature import HessianOperator, stochastic_moments
        >>> x = torch.ones(50, dtype=torch.float64, requires_grad=True)
        >>> hessian = HessianOperator(lambda batch: (batch * x**2).sum() / 2, [x], [torch.ones(1)])
        >>> low, high = stochastic_moments(hessian).trace.interval
        >>> low <= 50 <= high
        True
        >>> first = stochastic_moments(hessian, probes="signs", blocks={"first": [slice(0, 20)]}).trace_of["first"]
        >>> round(first.value, 3)  # exactly, as the matrix is diagonal
        20.0

    """
    check_probes(num_probes)
    check_int("sketch", sketch, least=0)
    check_choice("probes", probes, Probes)
    space = space_of(operator)
    generator = torch.Generator().manual_seed(seed)
    parts = list((blocks or {}).values())

    def measured(vector: Tensor, product: Tensor) -> list[Tensor]:
        """What there is to sum up of a product."""
        shares = space.inner_of_parts(vector, product, parts)
        return [space.inner(vector, product), space.norm(product), *shares.unbind()]

    with space.together():
        treated = _Treated(operator, space, known, measured)
        treated.sketch(sketch, generator)
        pairs: list[Tensor] = []
        for _ in range(num_probes):
            vector = space.random(generator) if probes == "gaussian" else space.random_signs(generator)
            treated.project(vector)
            pairs += measured(vector, operator.matvec(vector))
        shares = treated.shares(parts)
        numbers = read([*shares.unbind(), *treated.pairs, *pairs], space)
    of_known, numbers = numbers[: len(parts)], numbers[len(parts) :].view(-1, 2 + len(parts))
    # The first numbers are exact for their vectors, and no samples.
    exact, drawn = numbers.split([len(numbers) - num_probes, num_probes])
    drawn_of = [estimate(samples, is_skewed=True) for samples in drawn[:, 2:].unbind(dim=1)]
    certain = of_known + exact[:, 2:].sum(dim=0)
    trace = estimate(drawn[:, 0], is_skewed=True)
    square = estimate(drawn[:, 1].square(), is_skewed=True)
    norm = (square.value + treated.square + float(exact[:, 1].square().sum())) ** 0.5
    return Moments(
        trace=Estimate(
            trace.value + treated.trace + float(exact[:, 0].sum()), trace.standard_error, num_probes, is_skewed=True
        ),
        # The error of a root: that of the square over twice the root.
        frobenius_norm=Estimate(norm, square.standard_error / (2 * norm) if norm else 0.0, num_probes, is_skewed=True),
        num_matvecs=treated.num_matvecs + num_probes,
        trace_of={
            name: Estimate(found.value + share, found.standard_error, num_probes, is_skewed=True)
            for name, found, share in zip(blocks or {}, drawn_of, certain.tolist(), strict=True)
        },
    )


def stochastic_diagonal(
    operator: LinearOperator, *, num_probes: int = 10, known: Eigenpairs | None = None, seed: int = 0
) -> DiagonalEstimate:
    """The diagonal, from ``z ⊙ Az`` for vectors of random signs, one product each.

    An entry's variance is the sum of the squares of the other entries in its row, so what is nearly diagonal is known
    from a few products; elsewhere the error falls with the root of their number only.

    Args:
        operator: The symmetric operator.
        num_probes: How many random vectors.
        known: Eigenpairs; those that have converged enter with their values, the others are left out.
        seed: Seed of the random vectors.

    Raises:
        ValueError: If `num_probes` is less than 2, of which no error can be estimated.
        NonFiniteCurvatureError: If a product is not finite.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature import HessianOperator
        >>> from lyapunov_lightning.curvature.stochastic.trace import stochastic_diagonal
        >>> x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        >>> scale = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
        >>> hessian = HessianOperator(lambda batch: (batch * x**2).sum() / 2, [x], [scale])
        >>> stochastic_diagonal(hessian, num_probes=2).value
        tensor([ 1.,  2., -3.], dtype=torch.float64)

    """
    check_probes(num_probes)
    space = space_of(operator)
    generator = torch.Generator().manual_seed(seed)
    with space.together():
        vectors, values = converged_pairs(known, space)
        mean, spread = space.zeros(), space.zeros()
        for count in range(1, num_probes + 1):
            signs = space.random_signs(generator)
            # Projected on both sides, P A P: what is projected on one side only is not symmetric, and the diagonal of
            # the cross terms would add to the variance.
            sample = operator.matvec(projected(space, signs.clone(), vectors))
            sample = projected(space, sample.clone(), vectors).mul_(signs)
            # B. Welford's update (1962): the difference of the sum of squares and the squared sum would cancel, in
            # float32 altogether where the error is less than 3e-4 of the entry.
            sample -= mean
            mean.add_(sample, alpha=1 / count)
            spread.addcmul_(sample, sample, value=1 - 1 / count)
        read([space.norm(mean)], space)  # raises where anything is not finite, on all ranks
    for value, vector in zip(values.tolist(), vectors, strict=True):
        mean.addcmul_(vector, vector, value=value)
    return DiagonalEstimate(mean, spread.div_(num_probes * (num_probes - 1)).sqrt_(), num_probes)


class _Treated:
    """Vectors whose share in trace and norm is known, and to which the random vectors are kept orthogonal.

    Attributes:
        trace: The trace of the pairs that have converged.
        square: The sum of the squares of their eigenvalues.
        pairs: For each vector ``v`` that is no converged eigenvector, what is measured of ``v`` and ``Av``: ``vᵀAv``,
            ``‖Av‖`` and the shares of the blocks, on the device.
        num_matvecs: Products that these took.

    """

    def __init__(
        self,
        operator: LinearOperator,
        space: VectorSpace,
        known: Eigenpairs | None,
        measured: Callable[[Tensor, Tensor], list[Tensor]],
    ) -> None:
        self._operator = operator
        self._space = space
        self._measured = measured
        self._rows, values = converged_pairs(known, space)
        self._values = values
        self.trace, self.square = float(values.sum()), float(values.square().sum())
        self.pairs: list[Tensor] = []
        self.num_matvecs = 0
        if known is not None:
            self._treat(space.adopt(known.vectors, "known.vectors")[~known.converged])

    def sketch(self, count: int, generator: torch.Generator) -> None:
        """Add what the operator makes of some random vectors."""
        found: list[Tensor] = []
        for _ in range(min(count, self._space.size - len(self._rows))):
            # Products turn random vectors towards the large eigenvalues, which make the variance (Hutch++).
            image = self._operator.matvec(self.project(self._space.random(generator))).clone()
            self.num_matvecs += 1
            self._space.orthonormalise(image, [self._rows], [torch.stack(found)] if found else [])
            found.append(image)
        if found:
            self._treat(torch.stack(found))

    def shares(self, parts: Sequence[Sequence[slice]]) -> Tensor:
        """What the converged pairs have in the traces of blocks, on the device."""
        shares = torch.zeros(len(parts), dtype=self._space.dtype, device=self._space.device)
        if parts:
            for value, row in zip(self._values.tolist(), self._rows, strict=False):  # the others come after these
                shares += value * self._space.inner_of_parts(row, row, parts)
        return shares

    def project(self, vector: Tensor) -> Tensor:
        """Take the components along the vectors out, in place."""
        return projected(self._space, vector, self._rows)

    def _treat(self, rows: Tensor) -> None:
        for row in rows:
            self.pairs += self._measured(row, self._operator.matvec(row))
        self.num_matvecs += len(rows)
        self._rows = torch.cat([self._rows, rows]) if len(rows) else self._rows


def converged_pairs(known: Eigenpairs | None, space: VectorSpace) -> tuple[Tensor, Tensor]:
    """Vectors, one row each, and values of the pairs that have converged."""
    if known is None:
        return space.empty(0), torch.zeros(0, dtype=torch.float64, device="cpu")
    is_known = known.converged.cpu()
    vectors = space.adopt(known.vectors, "known.vectors")
    return vectors if bool(is_known.all()) else vectors[is_known], known.values.double().cpu()[is_known]


def projected(space: VectorSpace, vector: Tensor, rows: Tensor) -> Tensor:
    """The vector without its components along orthonormal rows, in place."""
    if len(rows):
        space.subtract(vector, space.inner(rows, vector), rows)
    return vector


def read(numbers: list[Tensor], space: VectorSpace) -> Tensor:
    """Scalars on the device as float64 numbers on the CPU, the same on all ranks, in one transfer.

    Raises:
        NonFiniteCurvatureError: If one of them is not finite.

    """
    wide = torch.float32 if space.device.type == "mps" else torch.float64
    found = space.agreed(torch.stack([number.to(wide) for number in numbers]))
    if not bool(torch.isfinite(found).all()):
        raise NonFiniteCurvatureError
    return found


def check_probes(num_probes: int) -> None:
    """Make sure that there are random vectors enough to estimate an error.

    Raises:
        ValueError: If there are not.

    """
    if num_probes < 2:
        raise ValueError(f"`num_probes` should be an int of at least 2, got {num_probes!r}.")
