r"""The spectral density from random vectors.

Gauss quadrature of ``zᵀf(A)z`` from the tridiagonal matrix of a few Lanczos steps begun at ``z``, averaged over random
``z`` (stochastic Lanczos quadrature: S. Ubaru, J. Chen and Y. Saad, 2017; B. Ghorbani, S. Krishnan and Y. Xiao, "An
investigation into neural net optimization via Hessian eigenvalue density", 2019).

A few eigenvalues far outside dominate the variance. Where their eigenpairs are known and have converged, they enter
exactly and the random vectors are kept orthogonal to them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lyapunov_lightning.curvature.linear import LinearOperator, space_of
from lyapunov_lightning.curvature.solvers.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.stochastic.estimates import Estimate, estimate
from lyapunov_lightning.curvature.stochastic.trace import check_probes, converged_pairs, projected, read
from lyapunov_lightning.curvature.vectors.space import VectorSpace


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
        return estimate((self.weights * function(self.nodes)).sum(dim=1), is_skewed=True)

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
            num_points: Points of the grid, which reaches five widths and a step beyond the outermost eigenvalues.
            width: Standard deviation of the Gaussian; by default four steps of the grid. Of one that is narrower than
                a step, each point has the mean over the step around it.

        Returns:
            The grid and the density on it, each of shape ``(num_points,)``.

        Raises:
            ValueError: If there are less than 4 points or the width is not positive.

        """
        if num_points < 4:
            raise ValueError(f"`num_points` should be an int of at least 4, got {num_points!r}.")
        low, high = float(self.nodes.min()), float(self.nodes.max())
        if width is None:
            span = high - low or max(abs(high), 1.0) * 1e-3
            width = 4 * span / max(num_points - 43, 1)
        elif not 0 < width < math.inf:
            raise ValueError(f"`width` should be a positive float, got {width!r}.")
        step = (high - low + 10 * width) / (num_points - 3)
        reach = 5 * width + step
        grid = torch.linspace(low - reach, high + reach, num_points, dtype=torch.float64)
        edges = torch.cat([grid - step / 2, grid[-1:] + step / 2])
        weights = self.weights.flatten() / len(self.weights)
        # Means over the steps: values at the points would miss a Gaussian that lies between two of them. Each
        # Gaussian's share of a step is taken before the sum over all Gaussians: a matrix product rounds the sums below
        # two edges each in its own way, and where nothing lies between them their difference may be -1e-16.
        shares = torch.special.ndtr((edges[:, None] - self.nodes.flatten()) / width).diff(dim=0).clamp_min(0)
        return grid, shares @ weights / step


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
        known: Eigenpairs, as `lanczos` returns them. Converged ones enter exactly, the others are left out.
        seed: Seed of the random vectors.

    Returns:
        The density.

    Raises:
        ValueError: If `num_probes` is less than 2 or `num_steps` less than 1.
        NonFiniteCurvatureError: If a product is not finite.

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
    check_probes(num_probes)
    if num_steps < 1:
        raise ValueError(f"`num_steps` should be a positive int, got {num_steps!r}.")
    space = space_of(operator)
    generator = torch.Generator().manual_seed(seed)
    with space.together():
        rows, values = converged_pairs(known, space)
        # The complement of the known vectors ends there, and a step further would be made of rounding.
        num_steps = min(num_steps, space.size - len(values))
        entries: list[Tensor] = []
        for _ in range(num_probes if num_steps else 0):
            entries += _tridiagonal(operator, space, rows, generator, num_steps)
        table = read(entries, space).view(num_probes, 2 * num_steps) if entries else None
    exact = values.expand(num_probes, -1)
    # Each known eigenvalue is one of n, and the random vectors share out the rest.
    nodes, weights = [exact], [torch.full_like(exact, 1 / space.size)]
    if table is not None:
        drawn, shares = _quadrature(table[:, :num_steps], table[:, num_steps:-1])
        nodes.append(drawn)
        weights.append(shares * (1 - len(values) / space.size))
    return SpectralDensity(torch.cat(nodes, dim=1), torch.cat(weights, dim=1), num_probes * num_steps)


def _tridiagonal(
    operator: LinearOperator, space: VectorSpace, known: Tensor, generator: torch.Generator, num_steps: int
) -> list[Tensor]:
    """Lanczos steps from a random vector in the complement of known ones, with full reorthogonalisation, twice.

    Where the space that is reached from there ends, what is left is rounding: its norm, next to nothing, cuts the
    matrix in two, and what follows has no weight.

    Args:
        operator: The symmetric operator.
        space: The space of its vectors.
        known: Shape ``(k, n)``, orthonormal.
        generator: Source of the random vector.
        num_steps: How many.

    Returns:
        The entries on the diagonal, then as many next to it, of which the last one is beyond the matrix; all of them
        scalars on the device.

    """
    basis = space.empty(num_steps)
    row = projected(space, space.random(generator), known)
    row /= space.norm(row)
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    for step in range(num_steps):
        basis[step] = row
        # A copy: an operator may return memory of its own, and the row is worked on in place.
        row = operator.matvec(basis[step]).clone()
        diagonal.append(space.inner(basis[step], row))
        beside.append(space.orthonormalise(row, [known], [basis[: step + 1]]))
    return diagonal + beside


def _quadrature(diagonals: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights of tridiagonal matrices, each of shape ``(num_probes, num_steps)``."""
    matrices = torch.diag_embed(diagonals) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    nodes, vectors = torch.linalg.eigh(matrices)
    # The weights are the squares of the eigenvectors' first components (G. Golub and J. Welsch, "Calculation of Gauss
    # quadrature rules", 1969).
    return nodes, vectors[:, 0].square()
