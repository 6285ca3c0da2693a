r"""The whole spectrum from random vectors: trace, Frobenius norm, spectral density.

- *Trace and Frobenius norm*: for a random vector ``z`` with independent entries of mean 0 and variance 1, ``zᵀAz`` and
  ``‖Az‖²`` have the means ``tr A`` and ``‖A‖²_F`` (M. Hutchinson, 1990). Both come from the same products.
- *Density*: Gauss quadrature of ``zᵀf(A)z`` from the tridiagonal matrix of a few Lanczos steps begun at ``z``, averaged
  over ``z`` (stochastic Lanczos quadrature: S. Ubaru, J. Chen and Y. Saad, 2017; B. Ghorbani, S. Krishnan and Y. Xiao,
  "An investigation into neural net optimization via Hessian eigenvalue density", 2019).

A few eigenvalues far outside dominate the variance of all of these. Where their eigenpairs are known, they enter
exactly and the random vectors are kept orthogonal to them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lyapunov_lightning.curvature.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.krylov import KrylovBasis, random_vector
from lyapunov_lightning.curvature.linear import LinearOperator

_STUDENT_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11)
"""Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond them it is near the normal's."""


@dataclass(frozen=True)
class Estimate:
    """A mean over independent random samples.

    Attributes:
        value: The mean.
        standard_error: Its standard error, estimated from the samples; NaN for a single one.
        num_samples: How many there were.

    """

    value: float
    standard_error: float
    num_samples: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval by Student's t."""
        freedom = self.num_samples - 1
        quantile = _STUDENT_95[freedom - 1] if 1 <= freedom <= len(_STUDENT_95) else 1.96 + 2.4 / max(freedom, 1)
        half = quantile * self.standard_error
        return self.value - half, self.value + half


@dataclass(frozen=True)
class Moments:
    """Sums over all eigenvalues.

    Attributes:
        trace: The sum of the eigenvalues.
        frobenius_norm: The root of the sum of their squares.
        num_matvecs: Products that were spent.

    """

    trace: Estimate
    frobenius_norm: Estimate
    num_matvecs: int


def stochastic_moments(
    operator: LinearOperator, *, num_probes: int = 10, known: Eigenpairs | None = None, seed: int = 0
) -> Moments:
    """Trace and Frobenius norm, one product a random vector.

    Args:
        operator: The symmetric operator.
        num_probes: How many random vectors.
        known: Eigenpairs that enter exactly, such as those of `lanczos`.
        seed: Seed of the random vectors.

    Returns:
        The estimates with their standard errors.

    Raises:
        ValueError: If `num_probes` is less than 2, of which no error can be estimated.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature import HessianOperator, stochastic_moments
        >>> x = torch.ones(50, dtype=torch.float64, requires_grad=True)
        >>> hessian = HessianOperator(lambda batch: (batch * x**2).sum() / 2, [x], [torch.ones(1)])
        >>> low, high = stochastic_moments(hessian).trace.interval
        >>> low <= 50 <= high
        True

    """
    _check_probes(num_probes)
    complement = _Complement(operator, known, seed)
    traces, squares = [], []
    for _ in range(num_probes):
        vector = complement.random_vector()
        product = operator.matvec(vector)
        traces.append(float(vector @ product))
        squares.append(float(complement.project(product).square().sum()))
    trace = _estimate(torch.tensor(traces, dtype=torch.float64))
    square = _estimate(torch.tensor(squares, dtype=torch.float64))
    norm = math.sqrt(square.value + float(complement.values.square().sum()))
    return Moments(
        trace=Estimate(trace.value + float(complement.values.sum()), trace.standard_error, num_probes),
        frobenius_norm=Estimate(norm, square.standard_error / (2 * norm) if norm else 0.0, num_probes),
        num_matvecs=num_probes,
    )


@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of all eigenvalues, as weighted points.

    Each random vector gives the nodes and weights of a Gauss quadrature; the known eigenvalues are points of their own.

    Attributes:
        nodes: Shape ``(num_probes, num_points)``, in the unit of the eigenvalues.
        weights: Shape ``(num_probes, num_points)``; each row sums to 1.
        num_matvecs: Products that were spent.

    """

    nodes: Tensor
    weights: Tensor
    num_matvecs: int

    def mean(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """The mean of a function over all eigenvalues."""
        return _estimate((self.weights * function(self.nodes)).sum(dim=1))

    def moment(self, order: int) -> Estimate:
        """The mean of the eigenvalues' powers; the order 1 is the trace over the size."""
        return self.mean(lambda nodes: nodes**order)

    def negative_mass(self) -> float:
        """The share of the negative eigenvalues in the sum of all moduli; 0 for a zero operator."""
        total = self.mean(torch.abs).value
        return self.mean(lambda nodes: (-nodes).clamp_min(0)).value / total if total else 0.0

    def curve(self, num_points: int = 1000, width: float | None = None) -> tuple[Tensor, Tensor]:
        """The density on a grid, smoothed by a Gaussian; its integral is 1.

        Args:
            num_points: Points of the grid, which reaches five widths beyond the outermost eigenvalues.
            width: Standard deviation of the Gaussian; by default four steps of the grid.

        Returns:
            The grid and the density on it, each of shape ``(num_points,)``.

        """
        low, high = float(self.nodes.min()), float(self.nodes.max())
        if width is None:
            span = high - low or max(abs(high), 1.0) * 1e-3
            width = 4 * span / max(num_points - 41, 1)
        grid = torch.linspace(low - 5 * width, high + 5 * width, num_points, dtype=torch.float64)
        distance = (grid[:, None] - self.nodes.flatten()) / width
        weights = self.weights.flatten() / len(self.weights)
        return grid, torch.exp(-(distance**2) / 2) @ weights / (width * math.sqrt(2 * math.pi))


def spectral_density(
    operator: LinearOperator,
    *,
    num_probes: int = 8,
    num_steps: int = 40,
    known: Eigenpairs | None = None,
    seed: int = 0,
) -> SpectralDensity:
    """The spectral density by stochastic Lanczos quadrature, ``num_probes · num_steps`` products.

    Args:
        operator: The symmetric operator.
        num_probes: How many random vectors.
        num_steps: Lanczos steps of each; polynomials up to degree ``2 · num_steps - 1`` are integrated exactly.
        known: Eigenpairs that enter exactly, such as those of `lanczos`.
        seed: Seed of the random vectors.

    Returns:
        The density.

    Raises:
        ValueError: If `num_probes` is less than 2 or `num_steps` less than 1.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.curvature import HessianOperator, spectral_density
        >>> x = torch.ones(4, dtype=torch.float64, requires_grad=True)
        >>> scale = torch.tensor([1.0, 2.0, 3.0, -2.0], dtype=torch.float64)
        >>> hessian = HessianOperator(lambda batch: (batch * x**2).sum() / 2, [x], [scale])
        >>> density = spectral_density(hessian, num_probes=100)
        >>> grid, curve = density.curve()
        >>> round(float(torch.trapezoid(curve, grid)), 3)
        1.0

    """
    _check_probes(num_probes)
    if num_steps < 1:
        raise ValueError(f"`num_steps` should be a positive int, got {num_steps}.")
    complement = _Complement(operator, known, seed)
    share = len(complement.values) / operator.size
    num_steps = min(num_steps, operator.size - len(complement.values))
    exact = complement.values.expand(num_probes, -1)
    nodes = [exact]
    weights = [torch.full_like(exact, 1 / operator.size)]
    num_matvecs = 0
    if num_steps:
        rows = [_quadrature(complement, num_steps) for _ in range(num_probes)]
        num_matvecs = num_probes * num_steps
        nodes.append(torch.stack([row[0] for row in rows]))
        weights.append(torch.stack([row[1] for row in rows]) * (1 - share))
    return SpectralDensity(torch.cat(nodes, dim=1), torch.cat(weights, dim=1), num_matvecs)


class _Complement:
    """The operator on the orthogonal complement of its known eigenvectors, and random vectors there."""

    def __init__(self, operator: LinearOperator, known: Eigenpairs | None, seed: int) -> None:
        self._operator = operator
        self._generator = torch.Generator().manual_seed(seed)
        self._known = None if known is None else known.vectors.to(device=operator.device, dtype=operator.dtype)
        self.values = torch.zeros(0, dtype=torch.float64) if known is None else known.values
        self.size = operator.size
        self.dtype = operator.dtype
        self.device = operator.device

    @property
    def generator(self) -> torch.Generator:
        return self._generator

    def matvec(self, vector: Tensor) -> Tensor:
        return self.project(self._operator.matvec(vector))

    def project(self, vector: Tensor) -> Tensor:
        return vector if self._known is None else vector.addmv(self._known.T, self._known @ vector, alpha=-1)

    def random_vector(self) -> Tensor:
        return self.project(random_vector(self._operator, self._generator))


def _quadrature(complement: _Complement, num_steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights, each of shape ``(num_steps,)``, of the spectral measure of one random vector."""
    basis = KrylovBasis(complement, min(num_steps, complement.size), complement.generator)
    basis.begin(complement.random_vector())
    for _ in range(num_steps):
        basis.expand()
    nodes, vectors = basis.eigh()
    return nodes, vectors[0].square()


def _estimate(samples: Tensor) -> Estimate:
    count = len(samples)
    error = float(samples.std() / math.sqrt(count)) if count > 1 else math.nan
    return Estimate(float(samples.mean()), error, count)


def _check_probes(num_probes: int) -> None:
    if num_probes < 2:
        raise ValueError(f"`num_probes` should be an int of at least 2, got {num_probes}.")
