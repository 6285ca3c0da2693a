"""Other packages that compute eigenpairs or products of Hessians, each behind a small function.

They are imported where they are called, so that a package that is not there is a row that says so.
"""

import contextlib
import importlib
import importlib.metadata
import math
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.problems import Problem
from lyapunov_lightning.curvature import lanczos

TOL = 1e-3
MOST_STEPS = 600
"""Of hessian-eigenthings, which keeps a vector of each."""


class UnableError(Exception):
    """What was asked for is beyond a package; the message says why."""


@dataclass(frozen=True)
class Task:
    """How many eigenpairs of each end are wanted."""

    largest: int
    smallest: int

    @property
    def name(self) -> str:
        """Such as 20 + 3."""
        return f"{self.largest} + {self.smallest}"

    @property
    def ends(self) -> list[tuple[int, str]]:
        """Those that are wanted, as ARPACK names them."""
        return [(count, end) for count, end in ((self.largest, "LA"), (self.smallest, "SA")) if count]


@dataclass(frozen=True, eq=False)
class Found:
    """Eigenvectors as rows, those of the upper end first, and the products that they took.

    `missed` is the chance that an eigenvalue was missed, for a solver that tells it.
    """

    vectors: Tensor
    products: int
    missed: float = math.nan


Solver = Callable[[Problem, Task], Found]
Product = Callable[[Tensor], Tensor]


class Counted:
    """A product that counts its calls."""

    def __init__(self, product: Product) -> None:
        self.product = product
        self.count = 0

    def __call__(self, vector: Tensor) -> Tensor:
        """The product."""
        self.count += 1
        return self.product(vector)


# Products


def plain_product(problem: Problem, *, keep: bool = True) -> Product:
    """Double backward in plain PyTorch: the gradient is differentiated once more for each vector.

    Args:
        problem: Whose Hessian.
        keep: Whether the graph of the gradient is made once, or for each product.

    """
    parameters = problem.parameters

    def gradient() -> Tensor:
        losses = [problem.loss(batch) * (len(batch[0]) / total) for batch in problem.batches]
        parts = torch.autograd.grad(torch.stack(losses).sum(), parameters, create_graph=True)
        return torch.cat([part.reshape(-1) for part in parts])

    total = sum(len(batch[0]) for batch in problem.batches)
    kept = gradient() if keep else None

    def product(vector: Tensor) -> Tensor:
        parts = torch.autograd.grad(gradient() if kept is None else kept, parameters, vector, retain_graph=keep)
        return torch.cat([part.reshape(-1) for part in parts])

    return product


def curvlinops_product(problem: Problem) -> Product:
    """Forward over reverse, anew for each product."""
    from curvlinops import HessianLinearOperator

    hessian = HessianLinearOperator(
        problem.network, problem.criterion, problem.parameters, problem.batches, check_deterministic=False
    )
    return lambda vector: hessian @ vector


def _eigenthings_operator(problem: Problem) -> Any:
    import hessian_eigenthings

    return hessian_eigenthings.HessianOperator(problem.network, problem.batches, lambda _, batch: problem.loss(batch))


def eigenthings_product(problem: Problem) -> Product:
    """Double backward, anew for each product."""
    return _eigenthings_operator(problem).matvec


def _split(vector: Tensor, parameters: list[Any]) -> list[Tensor]:
    parts = vector.split([parameter.numel() for parameter in parameters])
    return [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]


def pyhessian_product(problem: Problem) -> Product:
    """Double backward; with a single batch the graph is kept."""
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    found = hessian(problem.network, problem.criterion, data=_only_batch(problem), cuda=False)

    def product(vector: Tensor) -> Tensor:
        parts = hessian_vector_product(found.gradsH, found.params, _split(vector, found.params))
        return torch.cat([part.reshape(-1) for part in parts])

    return product


def backpack_product(problem: Problem) -> Product:
    """BackPACK's, on which cockpit stands; cockpit keeps the graph of the step's gradient."""
    from backpack.hessianfree.hvp import hessian_vector_product

    parameters = problem.parameters
    loss = problem.loss(_only_batch(problem))
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        parts = hessian_vector_product(loss, parameters, _split(vector, parameters), grad_params=gradient)
        return torch.cat([part.reshape(-1) for part in parts])

    return product


def _only_batch(problem: Problem) -> Any:
    (batch,) = problem.batches
    return batch


# Solvers


def ours(problem: Problem, task: Task) -> Found:
    """Both ends from one Krylov space."""
    pairs = lanczos(problem.operator(), largest=task.largest, smallest=task.smallest, tol=TOL, max_matvecs=5000)
    return Found(pairs.vectors, pairs.num_matvecs, float(pairs.missed_probability.max()))


def eigsh_on(product: Product, problem: Problem, task: Task) -> Found:
    """ARPACK by way of SciPy, one call for each end."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    counted = Counted(product)

    def of_array(vector: np.ndarray) -> np.ndarray:
        return counted(torch.from_numpy(vector.astype(np.float32).reshape(-1))).numpy()

    linear = LinearOperator((problem.size, problem.size), matvec=of_array, dtype=np.float32)
    start = torch.randn(problem.size, generator=torch.Generator().manual_seed(0)).numpy()
    found = [eigsh(linear, count, which=end, tol=TOL, v0=start)[1].T for count, end in task.ends]
    return Found(torch.from_numpy(np.concatenate(found)), counted.count)


class Eigenthings:
    """hessian-eigenthings' Lanczos, which has no restarts and is told how many steps to take: the fewest that do.

    They are looked for once for each problem and end, and not counted: one long run tells what all shorter ones give.

    """

    def __init__(self) -> None:
        self._runs: weakref.WeakKeyDictionary[Problem, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()

    def prepare(self, problem: Problem, task: Task) -> None:
        """Find out how many steps it takes."""
        for count, end in task.ends:
            self._fewest(problem, count, end)

    def __call__(self, problem: Problem, task: Task) -> Found:
        """One run for each end."""
        import hessian_eigenthings

        hessian, vectors, products = _eigenthings_operator(problem), [], 0
        for count, end in task.ends:
            steps = self._fewest(problem, count, end)
            result = hessian_eigenthings.lanczos(
                hessian, k=count, max_iter=steps, tol=1e-12, which=end, seed=0, reorthogonalize=True
            )
            vectors.append(result.eigenvectors.reshape(count, -1))
            products += steps
        return Found(torch.cat(vectors), products)

    def _fewest(self, problem: Problem, count: int, end: str) -> int:
        most = min(96, problem.size)
        while True:
            diagonal, off_diagonal = self._run(problem, most)
            for steps in range(count, len(diagonal) + 1):
                inner = off_diagonal[: steps - 1]
                matrix = torch.diag(diagonal[:steps]) + inner.diag(1) + inner.diag(-1)
                values, vectors = torch.linalg.eigh(matrix)
                chosen = slice(-count, None) if end == "LA" else slice(None, count)
                residuals = off_diagonal[steps - 1] * vectors[-1, chosen].abs()
                if (residuals <= 0.9 * TOL * values[chosen].abs()).all():
                    return steps
            if most >= min(MOST_STEPS, problem.size):
                raise UnableError(f"no residuals of {TOL:g} within {most} steps")
            most = min(2 * most, MOST_STEPS, problem.size)

    def _run(self, problem: Problem, steps: int) -> tuple[Tensor, Tensor]:
        """The tridiagonal matrix of so many steps or more, from the start that its seed 0 gives; by our products."""
        from hessian_eigenthings.algorithms.lanczos import lanczos_tridiagonal

        if problem not in self._runs or len(self._runs[problem][0]) < steps:
            start = torch.randn(problem.size, generator=torch.Generator().manual_seed(0))
            run = lanczos_tridiagonal(problem.operator(), start, steps, reorthogonalize=True)
            off_diagonal = torch.cat([run.betas[: len(run.alphas) - 1], torch.tensor([run.last_beta])])
            self._runs[problem] = run.alphas.double(), off_diagonal.double()
        return self._runs[problem]


def pyhessian(problem: Problem, task: Task) -> Found:
    """Power iteration with deflation: the largest in modulus."""
    if task.smallest:
        raise UnableError("largest in modulus only")
    module = importlib.import_module("pyhessian.hessian")
    count, plain = 0, module.hessian_vector_product

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if time.perf_counter() > _until:
            raise UnableError(f"stopped after {count} products, many times the best peer's time")
        return plain(*arguments)

    module.hessian_vector_product = counted
    try:
        found = module.hessian(problem.network, problem.criterion, data=_only_batch(problem), cuda=False)
        _, vectors = found.eigenvalues(maxIter=500, tol=1e-6, top_n=task.largest)
    finally:
        module.hessian_vector_product = plain
    return Found(torch.stack([torch.cat([part.reshape(-1) for part in parts]) for parts in vectors]), count)


_until = math.inf


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Let a solver that can be stopped take no longer than this in a block."""
    global _until
    _until = time.perf_counter() + seconds
    try:
        yield
    finally:
        _until = math.inf


KEPT, REBUILT = "lyapunov_lightning, graph kept", "lyapunov_lightning, graph off"

PRODUCTS: dict[str, Callable[[Problem], Product]] = {
    KEPT: lambda problem: problem.operator().matvec,
    REBUILT: lambda problem: problem.operator(max_graph_bytes=0).matvec,
    "plain PyTorch, graph kept": plain_product,
    "plain PyTorch, graph rebuilt": lambda problem: plain_product(problem, keep=False),
    "curvlinops": curvlinops_product,
    "hessian-eigenthings": eigenthings_product,
    "PyHessian (graph kept)": pyhessian_product,
    "BackPACK, cockpit's (graph kept)": backpack_product,
}

OURS = "lyapunov_lightning"
OUR_PRODUCT = "SciPy `eigsh`, our product"

SOLVERS: dict[str, Solver] = {
    OURS: ours,
    OUR_PRODUCT: lambda problem, task: eigsh_on(problem.operator().matvec, problem, task),
    "SciPy `eigsh`, plain PyTorch": lambda problem, task: eigsh_on(plain_product(problem), problem, task),
    "curvlinops + `eigsh`": lambda problem, task: eigsh_on(curvlinops_product(problem), problem, task),
    "hessian-eigenthings": Eigenthings(),
    "PyHessian": pyhessian,
}
"""Those with products of their own are peers."""

PACKAGES = {
    "curvlinops": "curvlinops-for-pytorch",
    "hessian-eigenthings": "hessian-eigenthings",
    "PyHessian": "pyhessian",
    "cockpit": "cockpit-for-pytorch",
    "SciPy": "scipy",
}
"""What they are called where they are installed from."""


def versions() -> dict[str, str]:
    """The version of each package, where it is installed."""
    found = {}
    for name, distribution in PACKAGES.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(distribution)
    return found


@contextlib.contextmanager
def excused() -> Iterator[list[str]]:
    """Let a package be missing or unable in a block; the list that is given has then the reason."""
    reasons: list[str] = []
    try:
        yield reasons
    except UnableError as error:
        reasons.append(str(error))
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _MODULES
        reasons.append("not installed" if missing else f"cannot be imported: {error}")
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        reasons.append(f"failed: {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}")


_MODULES = {"curvlinops", "hessian_eigenthings", "pyhessian", "cockpit", "backpack", "scipy"}
