"""The 20 largest and 3 smallest Hessian eigenvalues of a trained CIFAR-10 network: this package beside four others.

    pip install -e '.[bench]'
    python -m benchmarks.eigensolvers --root data

Every solver works on the same trained LeNet (ReLU and max-pooling) and the same images, and is asked for relative
residuals of 1e-3. What it reached is measured with one and the same operator afterwards, so that a row with a worse
residual is not taken for a faster one. Products are counted where each package computes them. Two repeats are
interleaved; the better time of each counts.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn import functional

from examples.data import Cifar10
from examples.models import LeNet
from lyapunov_lightning.curvature import HessianOperator, lanczos

TOL = 1e-3


@dataclass
class Row:
    """What a solver found: eigenvectors as rows, products, seconds."""

    vectors: Tensor
    products: int
    seconds: float = 0.0  # by the solver's own clock, where it has one; else the whole call


class Problem:
    """The trained network with its data, and how many eigenvalues of each end are wanted."""

    def __init__(self, root: str, num_samples: int, train_steps: int, largest: int, smallest: int) -> None:
        self.largest, self.smallest = largest, smallest
        self.ends = (largest, "LA"), (smallest, "SA")  # as ARPACK names them
        data = Cifar10(root, download=False, augment=False)
        data.setup("fit")
        generator = torch.Generator().manual_seed(0)
        loader = torch.utils.data.DataLoader(data.train_set, 128, shuffle=True, generator=generator)
        self.network = LeNet()
        optimizer = torch.optim.SGD(self.network.parameters(), lr=0.02, momentum=0.9)
        for _, (images, labels) in zip(range(train_steps), loader, strict=False):
            optimizer.zero_grad()
            functional.cross_entropy(self.network(images), labels).backward()
            optimizer.step()
        self.network.eval()
        images, labels = zip(*(data.train_set[i] for i in range(num_samples)), strict=True)
        self.batch = torch.stack(images), torch.tensor(labels)
        self.parameters = list(self.network.parameters())

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean cross-entropy."""
        return functional.cross_entropy(self.network(batch[0]), batch[1])

    def operator(self, **options: int) -> HessianOperator:
        """A new operator, without graphs kept by an earlier one."""
        return HessianOperator(self.loss, self.parameters, [self.batch], **options)


def residuals_of(problem: Problem, vectors: Tensor) -> tuple[Tensor, float]:
    """Rayleigh quotients of the vectors, one row each, and the worst relative residual."""
    judge = problem.operator()
    vectors = vectors.to(judge.dtype) / vectors.to(judge.dtype).norm(dim=1, keepdim=True)
    images = torch.stack([judge.matvec(vector) for vector in vectors])
    values = (vectors * images).sum(dim=1)
    return values, float(((images - values[:, None] * vectors).norm(dim=1) / values.abs()).max())


def ours(problem: Problem) -> Row:
    """Both ends from one Krylov space."""
    pairs = lanczos(problem.operator(), largest=problem.largest, smallest=problem.smallest, tol=TOL, max_matvecs=5000)
    return Row(pairs.vectors, pairs.num_matvecs)


def scipy_eigsh(problem: Problem, **options: int) -> Row:
    """ARPACK, one call for each end, on this package's products."""
    hessian = problem.operator(**options)

    def product(vector: np.ndarray) -> np.ndarray:
        return hessian.matvec(torch.from_numpy(vector.reshape(-1))).numpy()

    linear = LinearOperator((hessian.size, hessian.size), matvec=product, dtype=np.float32)
    start = torch.randn(hessian.size, generator=torch.Generator().manual_seed(0)).numpy()
    found = [
        eigsh(linear, k, which=end, tol=TOL, v0=start)[1]
        for k, end in ((problem.largest, "LA"), (problem.smallest, "SA"))
    ]
    return Row(torch.from_numpy(np.concatenate([v.T for v in found])), hessian.num_matvecs)


def curvlinops_eigsh(problem: Problem) -> Row:
    """Curvlinops has operators; its eigenvalues come from ARPACK."""
    from curvlinops import HessianLinearOperator

    hessian = HessianLinearOperator(
        problem.network,
        nn.CrossEntropyLoss(),
        problem.parameters,
        [problem.batch],
        check_deterministic=False,
    ).to_scipy()
    count = 0

    def product(vector: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return hessian @ vector.astype(np.float32).reshape(-1)

    linear = LinearOperator(hessian.shape, matvec=product, dtype=np.float32)
    start = torch.randn(hessian.shape[0], generator=torch.Generator().manual_seed(0)).numpy()
    found = [
        eigsh(linear, k, which=end, tol=TOL, v0=start)[1]
        for k, end in ((problem.largest, "LA"), (problem.smallest, "SA"))
    ]
    return Row(torch.from_numpy(np.concatenate([v.T for v in found])), count)


def hessian_eigenthings(problem: Problem) -> Row:
    """Its own Lanczos, which has no restarts and is told how many products to spend: the fewest that do, per end."""
    import hessian_eigenthings as other

    hessian = other.HessianOperator(problem.network, [problem.batch], lambda network, batch: problem.loss(batch))
    found, products, seconds = [], 0, 0.0
    for k, end in problem.ends:
        steps, residual = 2 * k, math.inf
        while residual > TOL and steps < 600:
            steps = math.ceil(1.15 * steps)
            started = time.perf_counter()
            result = other.lanczos(hessian, k=k, max_iter=steps, tol=1e-12, which=end, seed=0, reorthogonalize=True)
            took = time.perf_counter() - started
            vectors = result.eigenvectors.reshape(k, -1)
            residual = residuals_of(problem, vectors)[1]
        found.append(vectors)
        products, seconds = products + steps, seconds + took
    return Row(torch.cat(found), products, seconds)


def pyhessian(problem: Problem) -> Row:
    """Power iteration with deflation; it has no lower end, so this is the largest ones in modulus only."""
    from pyhessian import hessian as module

    count = 0
    package = __import__("pyhessian.hessian", fromlist=["hessian_vector_product"])
    plain = package.hessian_vector_product

    def counted(*arguments: object) -> object:
        nonlocal count
        count += 1
        return plain(*arguments)

    package.hessian_vector_product = counted
    try:
        found = module(problem.network, nn.CrossEntropyLoss(), data=problem.batch, cuda=False)
        _, vectors = found.eigenvalues(maxIter=500, tol=1e-6, top_n=problem.largest)
    finally:
        package.hessian_vector_product = plain
        problem.network.zero_grad()
    return Row(torch.stack([torch.cat([part.reshape(-1) for part in v]) for v in vectors]), count)


SOLVERS: dict[str, Callable[[Problem], Row]] = {
    "lyapunov_lightning": ours,
    "scipy eigsh, our product": scipy_eigsh,
    "scipy eigsh, graph rebuilt": lambda problem: scipy_eigsh(problem, max_graph_bytes=0),
    "curvlinops + scipy eigsh": curvlinops_eigsh,
    "hessian-eigenthings": hessian_eigenthings,
    "PyHessian (largest only)": pyhessian,
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of CIFAR-10 in torchvision's layout")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--train-steps", type=int, default=600)
    parser.add_argument("--largest", type=int, default=20)
    parser.add_argument("--smallest", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(SOLVERS), help="solvers to run")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    problem = Problem(arguments.root, arguments.samples, arguments.train_steps, arguments.largest, arguments.smallest)
    judge = problem.operator()
    reference = lanczos(judge, largest=problem.largest, smallest=problem.smallest, tol=1e-4, max_matvecs=5000, seed=1)
    print(f"LeNet, {judge.size} parameters, {arguments.samples} images, loss {judge.value():.3f}")
    print(f"largest {reference.largest[0]:.3f} ... {reference.largest[-1]:.3f}, smallest {reference.smallest.tolist()}")
    best: dict[str, Row] = {}
    for _ in range(arguments.repeats):
        for name in arguments.only:
            started = time.perf_counter()
            row = SOLVERS[name](problem)
            row.seconds = row.seconds or time.perf_counter() - started
            if name not in best or row.seconds < best[name].seconds:
                best[name] = row
    base = best.get("lyapunov_lightning")
    print(f"\n{'solver':30s} {'products':>9s} {'seconds':>8s} {'ours/its':>9s} {'residual':>9s} {'error':>8s}")
    for name, row in best.items():
        values, residual = residuals_of(problem, row.vectors)
        ends = [values[: problem.largest].sort(descending=True).values, values[problem.largest :].sort().values]
        wanted = reference.values[: len(values)]
        error = ((torch.cat(ends).double() - wanted).abs() / wanted.abs()).max()
        ratio = f"{base.seconds / row.seconds:.2f}" if base is not None else ""
        print(f"{name:30s} {row.products:9d} {row.seconds:8.2f} {ratio:>9s} {residual:9.1e} {error:8.1e}")


if __name__ == "__main__":
    main()
