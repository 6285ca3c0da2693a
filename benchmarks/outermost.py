"""Whether the outermost eigenvalues are what they are said to be: how often one is called converged and is not.

    python -m benchmarks.outermost --count 300 --seed 0

Each operator has one of the kinds of spectra that are hardest for a Krylov space, or one like that of a network, and a
random size. It is searched cold, then changed a little and searched again from where the first search ended, with
values to 1e-2. A value that is called converged is *beyond its error* if the true one lies further away than
`value_errors` says, and *beyond the tolerance* if it lies further away than was asked for.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lyapunov_lightning.curvature import Eigenpairs, lanczos

TOL = 1e-2
_ENDS = ((1, 0), (0, 1), (1, 1))
_ROUNDING = 1e-12
"""What a value may be off by through rounding, relative to the norm of the operator."""


class Pairs:
    """A symmetric matrix with given eigenvalues, whose eigenvectors are turned out of the axes two by two.

    A random start sees the eigenvalues alone, whatever the eigenvectors are; the angles are what a warm start sees.
    """

    dtype = torch.float64
    device = torch.device("cpu")

    def __init__(self, values: Tensor, angles: Tensor) -> None:
        self.size = len(values)
        self.values = values
        self._cos, self._sin = angles.cos(), angles.sin()
        self.num_matvecs = 0

    def matvec(self, vector: Tensor) -> Tensor:
        """The product with one vector."""
        self.num_matvecs += 1
        return self._turned(self.values * self._turned(vector, 1.0), -1.0)

    def _turned(self, vector: Tensor, sign: float) -> Tensor:
        half = len(self._cos)
        turned = vector.clone()
        turned[:half] = self._cos * vector[:half] + sign * self._sin * vector[half : 2 * half]
        turned[half : 2 * half] = self._cos * vector[half : 2 * half] - sign * self._sin * vector[:half]
        return turned


def repeated(rng: np.random.Generator, size: int) -> np.ndarray:
    """A few values, each of them many times."""
    levels = rng.standard_normal(rng.integers(3, 12))
    return rng.choice(levels, size, p=rng.dirichlet(np.ones(len(levels))))


def clustered(rng: np.random.Generator, size: int) -> np.ndarray:
    """Clusters of any width."""
    count = rng.integers(3, 12)
    centres, widths = rng.standard_normal(count), 10.0 ** rng.uniform(-6, -1.3, count)
    which = rng.choice(count, size, p=rng.dirichlet(np.ones(count)))
    return centres[which] * (1 + widths[which] * rng.standard_normal(size))


def huge_range(rng: np.random.Generator, size: int) -> np.ndarray:
    """Values of both signs over many orders of magnitude."""
    share = rng.uniform(0.05, 0.95)
    signs = np.where(rng.random(size) < share, 1, -1)
    return signs * 10.0 ** rng.uniform(-rng.uniform(3, 12), 2, size)


def indefinite(rng: np.random.Generator, size: int) -> np.ndarray:
    """A bulk on both sides of zero: normal, uniform, or with heavy tails."""
    shape = rng.integers(3)
    if shape == 0:
        return rng.standard_normal(size) + rng.uniform(-1, 1)
    if shape == 1:
        return rng.uniform(-1, rng.uniform(0.1, 2), size)
    return rng.standard_normal(size) ** 3


def network(rng: np.random.Generator, size: int) -> np.ndarray:
    """What Hessians of networks look like: a bulk at zero, some outliers above, a few below."""
    values = 0.02 * rng.standard_normal(size) * rng.random(size)
    outliers = rng.integers(2, 20)
    values[:outliers] = 10.0 ** rng.uniform(-1, 1) * rng.uniform(0.6, 0.98) ** np.arange(outliers)
    values[outliers : outliers + 3] = -rng.uniform(0.02, 0.3, 3)
    return values


HARD: tuple[Callable[[np.random.Generator, int], np.ndarray], ...] = (repeated, clustered, huge_range, indefinite)


@dataclass(frozen=True)
class Case:
    """One operator and how it was searched."""

    kind: str
    is_warm: bool
    pairs: Eigenpairs
    exact: Tensor
    norm: float

    @property
    def is_beyond_its_error(self) -> bool:
        """Whether a value that is called converged lies further off than it says."""
        return self._any_beyond(self.pairs.value_errors)

    @property
    def is_beyond_the_tolerance(self) -> bool:
        """Whether a value that is called converged lies further off than was asked for."""
        return self._any_beyond(TOL * self.exact.abs())

    def _any_beyond(self, allowed: Tensor) -> bool:
        errors = (self.pairs.values - self.exact).abs()
        return bool(((errors > allowed + _ROUNDING * self.norm) & self.pairs.converged).any())


def cases(
    count: int, seed: int, kinds: Sequence[Callable[[np.random.Generator, int], np.ndarray]] = HARD
) -> Iterator[Case]:
    """`count` operators, each searched cold and then, changed, warm."""
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        kind = kinds[index % len(kinds)]
        size = int(10 ** rng.uniform(1.5, 2.8))
        largest, smallest = _ENDS[rng.integers(3)]
        values = torch.from_numpy(kind(rng, size))
        values = values[torch.from_numpy(rng.permutation(size))]
        change = 10.0 ** rng.uniform(-4, -1.5)
        moved = values * (1 + change * torch.from_numpy(rng.standard_normal(size)))
        angles = change * torch.from_numpy(rng.standard_normal(size // 2))
        start = None
        for is_warm, (now, turned) in enumerate(((values, 0 * angles), (moved, angles))):
            ends = now.sort().values
            exact = torch.cat([ends.flip(0)[:largest], ends[:smallest]])
            pairs = lanczos(
                Pairs(now, turned),
                largest=largest,
                smallest=smallest,
                value_tol=TOL,
                start=start,
                seed=2 * index + is_warm,
            )
            yield Case(kind.__name__, bool(is_warm), pairs, exact, float(now.abs().max()))
            start = pairs.start


def table(found: Sequence[Case]) -> Iterator[str]:
    """The lines of the table."""
    yield f"{'':12} {'':4} {'searches':>8} {'products':>8} {'unfinished':>10} {'beyond error':>12} {'beyond tol':>10}"
    for kind in [*dict.fromkeys(case.kind for case in found), "all"]:
        for is_warm in (False, True):
            rows = [case for case in found if kind in (case.kind, "all") and case.is_warm == is_warm]
            products = sum(case.pairs.num_matvecs for case in rows) / len(rows)
            unfinished = sum(not bool(case.pairs.converged.all()) for case in rows)
            errors = sum(case.is_beyond_its_error for case in rows)
            wrong = sum(case.is_beyond_the_tolerance for case in rows)
            name = "warm" if is_warm else "cold"
            yield f"{kind:12} {name:4} {len(rows):8} {products:8.2f} {unfinished:10} {errors:12} {wrong:10}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="how many operators")
    parser.add_argument("--seed", type=int, default=0, help="seed of their spectra")
    arguments = parser.parse_args()
    for kinds in (HARD, (network,)):
        print("\n".join(table(list(cases(arguments.count, arguments.seed, kinds)))))


if __name__ == "__main__":
    main()
