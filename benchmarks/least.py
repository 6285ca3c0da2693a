"""How far the eigen-solver is from the least number of products.

    python -m benchmarks.least --count 30 --seed 0

The least that a Krylov method can take from a start is the dimension of one Krylov space, without restart and with full
reorthogonalisation, that holds all wanted pairs to the tolerance. What is spent beyond it goes into restarts and into
making sure that no copy of a repeated eigenvalue was missed, of which one space says nothing.

The script takes made-up spectra of five kinds: a bulk with outliers, clusters, power laws, both signs, and such as
networks have. `benchmarks.eigenpairs` has the same figure for networks.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from benchmarks.outermost import network
from benchmarks.peers import TOL, Task
from lyapunov_lightning.curvature import LinearOperator, lanczos
from lyapunov_lightning.curvature.solvers.krylov import KrylovBasis, Target

TASKS = (Task(20, 3), Task(1, 1), Task(5, 0))
MOST = 600
"""Dimension at which it is given up."""


def least_products(operator: LinearOperator, task: Task, seed: int = 0) -> int:
    """The dimension of one Krylov space that holds the wanted pairs, from the start that `lanczos` takes."""
    basis = KrylovBasis(operator, min(MOST, operator.size), torch.Generator().manual_seed(seed))
    target = Target(task.largest, task.smallest, TOL)
    basis.begin()
    while not basis.is_full:
        basis.expand()
        if basis.length > task.largest + task.smallest and bool(basis.ritz(target).converged.all()):
            return basis.length
    raise ValueError(f"{task.name} eigenpairs are not within {MOST} products.")


class Diagonal:
    """A diagonal matrix: of an operator a random start sees the eigenvalues alone."""

    dtype = torch.float64
    device = torch.device("cpu")

    def __init__(self, values: Tensor) -> None:
        self.size = len(values)
        self.values = values

    def matvec(self, vector: Tensor) -> Tensor:
        """The product with one vector."""
        return self.values * vector


def bulk_and_outliers(rng: np.random.Generator, size: int) -> np.ndarray:
    """A normal bulk with 10 to 60 outliers above and a few below."""
    values = 10.0 ** rng.uniform(-3, -1) * rng.standard_normal(size)
    count = rng.integers(10, 60)
    values[:count] = 10 * rng.uniform(0.8, 0.98) ** np.arange(count)
    values[count : count + 5] = -rng.uniform(0.1, 2, 5)
    return values


def clusters(rng: np.random.Generator, size: int) -> np.ndarray:
    """Clusters of some width, the outermost ones of few values."""
    centres, widths = rng.standard_normal(8), 10.0 ** rng.uniform(-2, -1, 8)
    counts = np.full(8, size // 8)
    counts[np.argsort(centres)[[0, -2, -1]]] = rng.integers(3, 20, 3)
    return np.concatenate([c + w * rng.standard_normal(n) for c, w, n in zip(centres, widths, counts, strict=True)])


def power_law(rng: np.random.Generator, size: int) -> np.ndarray:
    """Values that fall with a power of their rank, and a negative part that does so from a tenth on."""
    values = np.arange(1, size + 1.0) ** -rng.uniform(0.7, 2)
    values[rng.permutation(size)[: size // 3]] *= -0.1
    return values


def both_signs(rng: np.random.Generator, size: int) -> np.ndarray:
    """Heavy tails on both sides of zero."""
    return rng.standard_normal(size) ** rng.choice([3, 5])


KINDS: tuple[Callable[[np.random.Generator, int], np.ndarray], ...] = (
    bulk_and_outliers,
    clusters,
    power_law,
    both_signs,
    network,
)


def ratios(count: int, seed: int) -> Iterator[tuple[str, Task, int, int, float]]:
    """Kind, task, products, the least, and the chance of a missed eigenvalue, for `count` spectra."""
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        kind = KINDS[index % len(KINDS)]
        operator = Diagonal(torch.from_numpy(kind(rng, int(10 ** rng.uniform(3, 3.7)))))
        for task in TASKS:
            least = least_products(operator, task, seed=index)
            pairs = lanczos(
                operator, largest=task.largest, smallest=task.smallest, tol=TOL, max_matvecs=5000, seed=index
            )
            yield kind.__name__, task, pairs.num_matvecs, least, float(pairs.missed_probability.max())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30, help="how many spectra")
    parser.add_argument("--seed", type=int, default=0, help="seed of the spectra")
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {}
    print(f"{'spectrum':20} {'pairs':8} {'products':>8} {'least':>6} {'ratio':>6} {'missed':>8}")
    for kind, task, products, least, missed in ratios(arguments.count, arguments.seed):
        found.setdefault(task.name, []).append(products / least)
        print(f"{kind:20} {task.name:8} {products:8} {least:6} {products / least:6.2f} {missed:8.1e}", flush=True)
    for name, values in found.items():
        print(f"{name}: median {statistics.median(values):.2f}, worst {max(values):.2f}")


if __name__ == "__main__":
    main()
