"""The operator, and what ranks do together, without a training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lyapunov_lightning.curvature import HessianOperator, lanczos
from lyapunov_lightning.training.distributed import any_rank, failing_together, sum_over_ranks
from tests.distributed.models import PlannedError, said
from tests.distributed.ranks import WORLD_SIZE, check

TRAINER: Any = SimpleNamespace(world_size=WORLD_SIZE, strategy=SimpleNamespace(root_device=torch.device("cpu")))

SHARDS = {
    "unequal": [[5, 3, 2], [4]],
    "one-has-none": [[5, 3, 2], []],
    "one-sample": [[6], [1]],
    "equal": [[3, 3], [3, 3]],
}
"""The sizes of each rank's batches."""

METHODS = ("double_backward", "forward_over_reverse", "finite_difference")
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def shards(kind: str, dtype: torch.dtype) -> list[list[tuple[Tensor, Tensor]]]:
    """The batches of each rank."""
    generator = torch.Generator().manual_seed(4)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(size, 4, dtype=torch.float64, generator=generator).to(dtype)
        return inputs, torch.randint(3, (size,), generator=generator)

    return [[batch(size) for size in sizes] for sizes in SHARDS[kind]]


def small_network(dtype: torch.dtype = torch.float64) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return net.to(dtype)


def of_network(batches: list[Any], dtype: torch.dtype = torch.float64, **options: Any) -> HessianOperator:
    net = small_network(dtype)
    return HessianOperator(
        lambda batch: nn.functional.cross_entropy(net(batch[0]), batch[1]), net.parameters(), batches, **options
    )


def of_all_ranks(rank: int, kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> HessianOperator:
    return of_network(shards(kind, dtype)[rank], dtype, reduce=sum_over_ranks(TRAINER), **options)


def measured(operator: HessianOperator) -> dict[str, Tensor]:
    """All that an operator tells of the Hessian of a small network."""
    generator = torch.Generator().manual_seed(1)
    vector, shift = torch.randn(2, operator.size, dtype=torch.float64, generator=generator).to(operator.dtype)
    results = {
        "product": operator.matvec(vector),
        "second product": operator.matvec(2 * vector),
        "gradient": operator.gradient(),
        "displaced gradient": operator.gradient(0.1 * shift),
        "value": torch.tensor([operator.value(), operator.value(0.1 * shift)]),
    }
    if operator.method == "double_backward":
        tol = 1e-9 if operator.dtype is torch.float64 else 1e-5
        results["eigenvalues"] = lanczos(operator, largest=3, smallest=2, tol=tol).values
    return results


@check
def operator(rank: int) -> dict[str, Any]:
    return {
        (kind, dtype, method): measured(of_all_ranks(rank, kind, DTYPES[dtype], method=method))
        for kind in SHARDS
        for dtype in DTYPES
        for method in METHODS
    }


COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "reduce",
    "reduce_scatter_tensor",
    "scatter",
)


@contextmanager
def counted_collectives() -> Iterator[list[tuple[str, int]]]:
    """The collectives that are called in the block, with the number of elements of the first argument."""
    calls: list[tuple[str, int]] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, args[0].numel() if args and isinstance(args[0], Tensor) else 0))
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


@check
def collectives(rank: int) -> dict[str, Any]:
    """The collectives of each operation, and how many products `lanczos` took."""
    found: dict[str, Any] = {}
    for method in METHODS:
        operator = of_all_ranks(rank, "unequal", method=method)
        for number in ("first", "second"):
            with counted_collectives() as calls:
                operator.matvec(torch.ones(operator.size, dtype=torch.float64))
            found[f"{number} {method}"] = calls
    with counted_collectives() as calls:
        operator.gradient()
    found["gradient"] = calls
    with counted_collectives() as calls:
        pairs = lanczos(operator, largest=1, tol=1e-2)
    return {"of one operation": found, "lanczos": calls, "products": pairs.num_matvecs}


LINE = [-0.2, 0.0, 0.1, 0.5]


@check
def values_along_a_line(rank: int) -> dict[str, Any]:
    """The loss at four points of a line, with the collectives that it took."""
    found = {}
    for kind in SHARDS:
        operator = of_all_ranks(rank, kind)
        with counted_collectives() as calls:
            values = operator.values_along(torch.ones(operator.size, dtype=torch.float64), LINE)
        found[kind] = {"values": values, "calls": calls}
    return found


# Failures.


def _raise() -> None:
    raise PlannedError("planned")


FAULTS = {
    "first-evaluation": (0, lambda value: _raise()),
    "second-batch": (1, lambda value: _raise()),
    "not-a-scalar": (0, lambda value: torch.stack([value, value])),
    "not-a-tensor": (0, lambda value: None),
}
"""At which evaluation the loss of the last rank goes wrong, and how."""

OPERATIONS = ("matvec", "gradient", "value")


class BreakableLoss:
    """A loss that goes wrong while it has a fault."""

    def __init__(self, fault: str | None) -> None:
        self.net = small_network()
        self.fault = fault
        self.evaluations = 0

    def evaluate(self, batch: Any) -> Any:
        self.evaluations += 1
        value = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if self.fault is not None and self.evaluations > FAULTS[self.fault][0]:
            return FAULTS[self.fault][1](value)
        return value


@check
def failing_loss(rank: int) -> dict[str, Any]:
    """What each rank gets when the loss of the last one goes wrong, and whether both can go on."""
    batches = shards("equal", torch.float64)[rank]
    found = {}
    for method in METHODS:
        for fault in FAULTS:
            for what in OPERATIONS:
                loss = BreakableLoss(fault if rank == 1 else None)
                operator = HessianOperator(
                    loss.evaluate, loss.net.parameters(), batches, method=method, reduce=sum_over_ranks(TRAINER)
                )
                arguments = (torch.ones(operator.size, dtype=torch.float64),) if what == "matvec" else ()
                run = getattr(operator, what)
                caught = said(lambda run=run, arguments=arguments: run(*arguments))
                loss.fault = None
                found[method, fault, what] = (caught, torch.as_tensor(run(*arguments)))
    return found


@check
def no_batches(rank: int) -> str:
    operator = HessianOperator(lambda batch: None, small_network().parameters(), [], reduce=sum_over_ranks(TRAINER))
    return said(lambda: operator.matvec(torch.ones(operator.size)))


RANKS = {"none": (), "first": (0,), "last": (1,), "all": (0, 1)}
"""On which ranks something is the case."""


@check
def together(rank: int) -> dict[str, Any]:
    """Whether all ranks know that something is the case on some, and that something failed on some."""

    def fail(on: tuple[int, ...]) -> None:
        with failing_together(TRAINER):
            if rank in on:
                _raise()

    return {
        "any": {name: any_rank(TRAINER, rank in on) for name, on in RANKS.items()},
        "failing": {name: said(lambda on=on: fail(on)) for name, on in RANKS.items()},
    }
