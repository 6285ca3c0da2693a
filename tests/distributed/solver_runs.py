"""Solvers on two ranks without a training: one rank fails anywhere, or computes a little otherwise than the other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lyapunov_lightning.curvature import (
    GaussNewtonOperator,
    HessianOperator,
    OnlineEigenpair,
    ScaledOperator,
    conjugate_gradient,
    lanczos,
    power_iteration,
    spectral_density,
    stochastic_moments,
)
from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.curvature.linear import SymmetricOperator
from lyapunov_lightning.curvature.operators.checks import check_operator
from lyapunov_lightning.curvature.stochastic.trace import stochastic_diagonal
from lyapunov_lightning.curvature.vectors.ranks import Ranks
from lyapunov_lightning.curvature.vectors.space import VectorSpace
from tests.distributed.operator_runs import counted_collectives, of_network, shards, small_network
from tests.distributed.ranks import check

SIZE = 24

Run = Callable[[], Any]


def matrix(kind: str) -> Tensor:
    """A symmetric matrix of size 24, or one that is not quite symmetric."""
    generator = torch.Generator().manual_seed(2)
    vectors, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator))
    values = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    values[-3:] = torch.tensor([3.0, 5.0, 5.0] if kind == "repeated" else [2.0, 3.0, 5.0])
    symmetric = (vectors * values) @ vectors.T
    if kind == "asymmetric":
        symmetric = symmetric + 1e-3 * torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator)
    return symmetric


def all_reduce(buffer: Tensor) -> None:
    dist.all_reduce(buffer)  # as it is now, for it may be counted


class Shard(SymmetricOperator):
    """A matrix, of which each rank has a part.

    Args:
        part: This rank's part.
        reduce: Sums over the ranks.
        noise: How much this rank's hardware differs from that of the others, relative to what it computes.

    """

    def __init__(self, part: Tensor, reduce: Callable[[Tensor], None] | None, noise: float = 0.0) -> None:
        self.ranks = Ranks(reduce)
        space = VectorSpace if noise == 0 else UnlikeSpace
        super().__init__(space(len(part), part.dtype, part.device, self.ranks))
        if isinstance(self.space, UnlikeSpace):
            self.space.noise = noise
        self.part = part
        self.num_matvecs = 0

    def matvec(self, vector: Tensor) -> Tensor:
        self.num_matvecs += 1
        buffer = torch.zeros(self.size + 1, dtype=self.dtype)
        with self.ranks.summing(buffer):
            buffer[:-1] = self.part @ vector
        return buffer[:-1].clone()


class UnlikeSpace(VectorSpace):
    """Vectors on hardware that sums in another order."""

    noise = 0.0
    draws = 0

    def inner(self, rows: Tensor, vector: Tensor, **options: Any) -> Tensor:
        return self._unlike(super().inner(rows, vector, **options))

    def norm(self, vector: Tensor) -> Tensor:
        return self._unlike(super().norm(vector))

    def _unlike(self, numbers: Tensor) -> Tensor:
        self.draws += 1
        generator = torch.Generator().manual_seed(self.draws)
        return numbers * (1 + self.noise * torch.randn(numbers.shape, generator=generator, dtype=numbers.dtype))


def of_matrix(rank: int, kind: str = "simple", dtype: torch.dtype = torch.float64, **options: Any) -> Shard:
    """The operator of a matrix, of which the first rank has a third."""
    part = (matrix(kind) * [1 / 3, 2 / 3][rank]).to(dtype)
    return Shard(part, all_reduce, **options)


def following(operator: Any, steps: int) -> Run:
    """What `OnlineEigenpair` finds in some steps."""
    running = OnlineEigenpair()
    return lambda: [running.step(operator) for _ in range(steps)]


DAMPING = 2.0
"""More than the modulus of any negative eigenvalue of the small network's Hessian."""

RIGHT = torch.ones(SIZE, dtype=torch.float64)
START = torch.ones(2, SIZE).cumsum(dim=1)

SOLVERS: dict[str, tuple[str, Callable[[Any], Run]]] = {
    "lanczos": ("simple", lambda operator: lambda: lanczos(operator, tol=1e-6, max_basis_vectors=6)),
    "lanczos from a start": ("simple", lambda operator: lambda: lanczos(operator, smallest=1, tol=1e-2, start=START)),
    "lanczos for several": (
        "repeated",
        lambda operator: lambda: lanczos(operator, largest=3, smallest=1, tol=1e-4, max_basis_vectors=8),
    ),
    "lanczos of an asymmetric operator": (
        "asymmetric",
        lambda operator: lambda: lanczos(operator, largest=2, tol=1e-2),
    ),
    "power": ("simple", lambda operator: lambda: power_iteration(operator, tol=0.05)),
    "power for the smallest": (
        "simple",
        lambda operator: lambda: power_iteration(operator, end="smallest", max_matvecs=12),
    ),
    "inverse": ("simple", lambda operator: lambda: conjugate_gradient(operator, RIGHT, damping=1.5)),
    "inverse of an indefinite operator": (
        "simple",
        lambda operator: lambda: conjugate_gradient(operator, RIGHT, tol=1e-9),
    ),
    "online": ("simple", lambda operator: following(operator, 12)),
    "density": ("simple", lambda operator: lambda: spectral_density(operator, num_probes=2, num_steps=6)),
    "moments": ("simple", lambda operator: lambda: stochastic_moments(operator, num_probes=3, sketch=2)),
    "diagonal": ("simple", lambda operator: lambda: stochastic_diagonal(operator, num_probes=3)),
    "check": ("simple", lambda operator: lambda: check_operator(operator)),
}
"""By name: the matrix, and what is prepared and then done with it."""


def of_networks(rank: int) -> Iterator[tuple[str, Any, Callable[[Any], Run]]]:
    """Operators that are made of losses, and what is done with them."""
    batches = shards("unequal", torch.float64)[rank]
    net = small_network()
    parameters = list(net.parameters())
    hessian = HessianOperator(
        lambda batch: nn.functional.cross_entropy(net(batch[0]), batch[1]),
        parameters,
        batches,
        method="double_backward",
        reduce=dist.all_reduce,
    )
    yield (
        "lanczos of a scaled Hessian",
        ScaledOperator(hessian, torch.linspace(1, 2, hessian.size), 0.1),
        lambda operator: hessian.reset() or (lambda: lanczos(operator, tol=1e-2, max_basis_vectors=6)),
    )
    gauss_newton = GaussNewtonOperator(
        lambda batch: net(batch[0]),
        lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]),
        parameters,
        batches,
        reduce=dist.all_reduce,
    )
    yield "online of Gauss-Newton", gauss_newton, lambda operator: operator.reset() or following(operator, 6)


@check
def solver_collectives(rank: int) -> dict[str, Any]:
    """The collectives, and how many products there were."""
    found: dict[str, Any] = {}
    for name, (kind, prepare) in SOLVERS.items():
        operator = of_matrix(rank, kind)
        with counted_collectives() as calls:
            prepare(operator)()
        found[name] = {"calls": calls, "products": operator.num_matvecs}
    return found


@check
def inverse_products(rank: int) -> dict[str, Any]:
    """Of the damped Hessian of a loss whose data the ranks share unequally, and of the Hessian as it is."""
    hessian = of_network(shards("unequal", torch.float64)[rank], reduce=dist.all_reduce)
    b = hessian.gradient()
    return {
        "b": b,
        "damped": vars(conjugate_gradient(hessian, b, damping=DAMPING, tol=1e-8)),
        "plain": vars(conjugate_gradient(hessian, b, tol=1e-12)),
    }


# A rank that computes otherwise.

NOISE = {torch.float64: 1e-12, torch.float32: 1e-6}


def plain(result: Any) -> Any:
    """What was found, without the vectors, and these."""
    if isinstance(result, list):
        return [plain(part) for part in result]
    vectors = ("vector", "vectors", "start", "solution")
    found = {name: value for name, value in vars(result).items() if name not in vectors}
    if found.get("non_positive") is not None:
        found["non_positive"] = plain(found["non_positive"])
    return found


@check
def unlike_hardware(rank: int) -> dict[str, Any]:
    """What each rank finds where one of them does not compute the same digits."""
    found = {}
    for dtype, noise in NOISE.items():
        for name, (kind, prepare) in SOLVERS.items():
            operator = of_matrix(rank, kind, dtype, noise=noise * rank)
            result = prepare(operator)()
            vectors = getattr(result, "vectors", torch.zeros(0))
            found[name, dtype] = {"products": operator.num_matvecs, "found": plain(result), "vectors": vectors}
    return found


# A rank that fails.


class OutOfMemory(TorchFunctionMode):
    """Lets one operation of PyTorch find no memory: the n-th one, those that send something not counted.

    Attributes:
        count: Operations so far.
        sent_last: As many as there were when something was sent the last time.

    """

    def __init__(self, failing: int | None = None) -> None:
        super().__init__()
        self._failing = failing
        self._is_sending = False
        self.count = 0
        self.sent_last = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._is_sending:
            self.count += 1
            if self.count == self._failing:
                raise torch.OutOfMemoryError("planned")
        return function(*args, **(kwargs or {}))

    def sending(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """A function that sends something."""

        def send(*args: Any) -> Any:
            before, self._is_sending = self._is_sending, True
            self.sent_last = self.count
            try:
                return plain(*args)
            finally:
                self._is_sending = before

        return send


@contextmanager
def out_of_memory(failing: int | None = None) -> Iterator[OutOfMemory]:
    mode = OutOfMemory(failing)
    originals = {name: getattr(Ranks, name) for name in ("_send", "_sum")}
    for name, plain in originals.items():
        setattr(Ranks, name, mode.sending(plain))
    try:
        with mode:
            yield mode
    finally:
        for name, plain in originals.items():
            setattr(Ranks, name, plain)


EDGE, INSIDE = 3, 4
"""How many operations are tried at either end, and how many in between."""


def places(count: int) -> list[int]:
    inside = torch.linspace(EDGE, count - EDGE, INSIDE).long().tolist()
    return sorted(
        {place for place in [*range(1, EDGE), *inside, *range(count - EDGE, count + 1)] if 0 < place <= count}
    )


def after_failures(rank: int, operator: Any, prepare: Callable[[Any], Run]) -> dict[str, Any]:
    """What each rank gets where the last one fails at one of many places, and whether both can go on."""
    run = prepare(operator)
    with out_of_memory() as mode:
        run()
    count = torch.tensor(float(mode.sent_last * rank))  # what comes later is the failing rank's own affair
    dist.all_reduce(count)
    found = []
    for place in places(int(count)):
        run = prepare(operator)
        try:
            with out_of_memory(place) if rank == 1 else nullcontext():
                run()
            outcome = "nothing"
        except Exception as error:
            outcome = type(error).__name__
        ones = torch.ones(3)
        dist.all_reduce(ones)
        found.append((place, outcome, ones.tolist()))
    return {"found": found, "count": int(count)}


@check
def failing_solvers(rank: int) -> dict[str, dict[str, Any]]:
    cases = [(name, of_matrix(rank, kind), prepare) for name, (kind, prepare) in SOLVERS.items()]
    cases += of_networks(rank)
    return {name: after_failures(rank, operator, prepare) for name, operator, prepare in cases}


@check
def online_after_failures(rank: int) -> list[dict[str, Any]]:
    """What `OnlineEigenpair` finds some steps after the last rank failed, and what its vectors are."""
    operator = of_matrix(rank)
    with out_of_memory() as mode:
        following(operator, 9)()
    found = []
    for place in torch.linspace(mode.count // 2, mode.count, 8).long().tolist():
        running = OnlineEigenpair()
        with suppress(MeasurementError, torch.OutOfMemoryError), out_of_memory(place) if rank == 1 else nullcontext():
            for _ in range(9):
                running.step(operator)
        estimate = [running.step(operator) for _ in range(8)][-1]
        found.append({"vector": estimate.vector, "value": estimate.value, "residual": estimate.residual})
    return found
