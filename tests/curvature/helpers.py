"""Dense matrices as operators, ways to products with their accuracy, errors, and the state of random generators."""

import copy
import functools
import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from lyapunov_lightning.curvature import HessianOperator, MeasurementError
from lyapunov_lightning.curvature.loss.fixed_batches import Evaluation
from tests.problems import PROBLEMS, Batch, Problem

METHODS: dict[str, dict[str, Any]] = {
    "kept": {"method": "double_backward"},
    "rebuilt": {"method": "double_backward", "max_graph_bytes": 0},
    "forward_over_reverse": {"method": "forward_over_reverse"},
    "finite_difference": {"method": "finite_difference"},
}
EXACT = ["kept", "rebuilt", "forward_over_reverse"]
# Exact products are off by rounding, times what cancels in a sum. A central difference over 1e-6 adds its third
# derivatives (1e-12) and the gradients' rounding over the step (1e-10).
TOLERANCE = {"kept": 1e-10, "rebuilt": 1e-10, "forward_over_reverse": 1e-10, "finite_difference": 1e-5}

every_method = pytest.mark.parametrize("how", METHODS)
every_problem = pytest.mark.parametrize("name", PROBLEMS)


class DenseOperator:
    """A matrix known by its products, which it counts."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix
        self.size = len(matrix)
        self.dtype = matrix.dtype
        self.device = matrix.device
        self.num_matvecs = 0

    def matvec(self, vector: Tensor) -> Tensor:
        self.num_matvecs += 1
        return self._matrix @ vector


def symmetric_matrix(spectrum: Sequence[float] | Tensor, seed: int = 0) -> Tensor:
    """A random symmetric float64 matrix with these eigenvalues."""
    values = torch.as_tensor(spectrum, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(square).Q
    matrix = (vectors * values) @ vectors.T
    return (matrix + matrix.T) / 2


def both_ends(matrix: Tensor, largest: int, smallest: int) -> Tensor:
    """The largest eigenvalues descending, then the smallest ascending, by a dense solver."""
    values = torch.linalg.eigvalsh(matrix.double())
    return torch.cat([values.flip(0)[:largest], values[:smallest]])


def random_vectors(count: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=torch.float64).to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(actual.double() - expected) / torch.linalg.vector_norm(expected))


def rng_state() -> tuple[Any, ...]:
    """The states of the global generators of Python, NumPy and PyTorch, to be compared by ``==``."""
    numpy = np.random.get_state(legacy=False)["state"]
    return random.getstate(), numpy["pos"], numpy["key"].tolist(), torch.get_rng_state().tolist()


def vector(size: int, seed: int = 0) -> Tensor:
    return random_vectors(1, size, seed)[0]


@functools.cache
def reference(name: str) -> Tensor:
    """The dense Hessian, by `torch.func` where that is right.

    In torch 2.15 `torch.func.hessian` is off by some per cent for functions of a LayerNorm's weight; second
    differences of the loss and `torch.autograd.functional.hessian` agree with each other against it.
    """
    problem = PROBLEMS[name]()
    if name == "transformer":
        return problem.dense_hessian()
    return torch.func.hessian(problem.loss_at)(problem.flat_parameters)


def rounded(build: Callable[[], Problem], dtype: torch.dtype) -> tuple[Problem, Problem]:
    """A problem in a narrow dtype, and the very same numbers in float64."""
    narrow, wide = build().to(dtype), build().to(dtype).to(torch.float64)
    return narrow, wide


@contextmanager
def or_refused() -> Iterator[None]:
    """To refuse with a `MeasurementError` is as right as a right number."""
    with suppress(MeasurementError):
        yield


class Watched:
    """A loss that remembers the storages of the tensors created in it, without keeping them alive.

    The output of tanh and exp is saved by the very node that creates it, the reference cycle that is easily left over.
    """

    def __init__(
        self, problem: Problem, fail_at: int | None = None, tanh: Callable[[Tensor], Tensor] = torch.tanh
    ) -> None:
        self._problem = problem
        self._tanh = tanh
        self._fail_at = fail_at
        self.calls = 0
        self.storages: list[StorageWeakRef] = []

    def __call__(self, batch: Batch) -> Tensor:
        self.calls += 1
        hidden = self._tanh(functional.linear(batch[0], *self._problem.parameters[:2]))
        scores = functional.linear(hidden, *self._problem.parameters[2:])
        probabilities = torch.exp(functional.log_softmax(scores, dim=1))
        self.storages += [StorageWeakRef(tensor.untyped_storage()) for tensor in (hidden, probabilities)]
        if self.calls == self._fail_at:
            raise KeyError("in the middle")
        return functional.nll_loss(torch.log(probabilities), batch[1])

    @property
    def num_alive(self) -> int:
        return sum(not storage.expired() for storage in self.storages)


@contextmanager
def without_garbage_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class OnceDifferentiableTanh(torch.autograd.Function):
    """Has no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1 - y**2)


def twice(loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The second derivative as PyTorch takes it, along a vector of ones."""
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    return torch.autograd.grad(gradient, parameters, [torch.ones_like(entry) for entry in gradient], allow_unused=True)


class Twin:
    """A loss that is evaluated on a copy of the model, whose parameters are its own, as the copy of a module has them.

    Args:
        problem: The model and the batches.
        samples: Maps a batch to the number of its samples.
        extra: Is added to the loss.

    """

    def __init__(
        self,
        problem: Problem,
        samples: Callable[[Batch], float] = lambda batch: len(batch[1]),
        extra: Callable[[nn.Module], Tensor | float] = lambda model: 0.0,
    ) -> None:
        self._problem = problem
        self._samples = samples
        self._extra = extra
        self.num_asked = 0

    @contextmanager
    def evaluated(self, batch: Batch, values: Sequence[Tensor] | None = None) -> Iterator[Evaluation]:
        model = copy.deepcopy(self._problem.model)
        leaves = list(model.parameters())
        if values is not None:
            with torch.no_grad():
                for leaf, value in zip(leaves, values, strict=True):
                    leaf.copy_(value)
        loss = functional.cross_entropy(model(batch[0]), batch[1]) + self._extra(model)
        yield Evaluation(loss, leaves, lambda: self._num_samples(batch), owner=model)

    def _num_samples(self, batch: Batch) -> float:
        self.num_asked += 1
        return self._samples(batch)

    def operator(self, **options: Any) -> HessianOperator:
        return HessianOperator(self, self._problem.parameters, self._problem.batches, **options)


class Counted:
    """A function of one distance, as the scans want it, that keeps where it was evaluated."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.seen: list[float] = []

    def __call__(self, distances: Sequence[float]) -> Tensor:
        self.seen += distances
        return self.function(torch.tensor(distances, dtype=torch.float64))
