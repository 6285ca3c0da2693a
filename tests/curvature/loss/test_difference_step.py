"""Finite-difference steps that fit the loss: on transformers, on networks with kinks, and on made-up errors."""

import copy
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.problems import Problem
from benchmarks.transformers import gpt2_like, llama_like
from lyapunov_lightning.curvature import CurvatureWarning, HessianOperator, lanczos
from lyapunov_lightning.curvature.loss.difference_step import first_step, fitting_step
from lyapunov_lightning.curvature.vectors.layout import FlatLayout
from lyapunov_lightning.curvature.vectors.ranks import Ranks
from lyapunov_lightning.curvature.vectors.space import VectorSpace
from tests.curvature.helpers import OnceDifferentiableTanh, relative_error, vector


def wide(problem: Problem) -> Problem:
    """The same numbers in float64."""
    batches = [tuple(t.double() if t.is_floating_point() else t for t in batch) for batch in problem.batches]
    return Problem(problem.name, copy.deepcopy(problem.network).double(), batches)


def rectified(scale: float = 1.0) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))
        inputs = torch.randn(128, 20)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(scale)
    return Problem("ReLU MLP", network, [(inputs, inputs[:, :5].argmax(1))])


def leading(operator: HessianOperator, tol: float = 1e-2) -> float:
    return float(lanczos(operator, largest=1, tol=tol, max_matvecs=120).values[0])


@pytest.mark.parametrize("build", [gpt2_like, llama_like])
def test_the_leading_eigenvalue_of_a_sharp_transformer_is_right_in_float32(build: Callable[..., Problem]) -> None:
    """Measured within 0.2 %; at a step of 5e-2, which suits small networks, 10 % to 80 % too low."""
    problem = build(count=4)
    expected = leading(wide(problem).operator(), tol=1e-3)
    assert expected > 40
    operator = problem.operator(method="finite_difference")
    assert leading(operator) == pytest.approx(expected, rel=0.02)
    assert operator.step < 1e-2
    assert abs(leading(problem.operator(method="finite_difference", step=5e-2)) / expected - 1) > 0.05


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_networks_with_kinks_keep_the_long_step(scale: float) -> None:
    """Short ones see few kinks, each of which counts the more: 3e-3 makes 1.7 of 0.6."""
    problem = rectified(scale)
    operator = problem.operator(method="finite_difference")
    operator.matvec(torch.ones(operator.size))
    assert operator.step == 5e-2


def test_a_step_in_float64_leaves_next_to_no_error() -> None:
    problem = wide(gpt2_like(count=2))
    exact, operator = problem.operator(), problem.operator(method="finite_difference")
    direction = exact.matvec(exact.gradient())
    assert relative_error(operator.matvec(direction), exact.matvec(direction)) <= 1e-5


def test_the_step_is_found_once_and_again_after_a_reset() -> None:
    problem = gpt2_like(count=2)
    calls = 0

    def loss(batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return problem.loss(batch)

    operator = HessianOperator(loss, problem.parameters, problem.batches, method="finite_difference")
    assert operator.step is None
    operator.matvec(torch.ones(operator.size))
    step, first = operator.step, calls
    assert step is not None
    assert 2 + 7 <= first <= 2 + 15
    operator.matvec(torch.arange(float(operator.size)))
    assert (operator.step, calls, operator.num_matvecs) == (step, first + 2, 2)
    operator.reset()
    assert operator.step is None
    operator.matmat(torch.ones(operator.size, 2))
    assert (operator.step, calls, operator.num_matvecs) == (step, 2 * first + 4, 4)


def test_a_step_that_is_given_is_kept_and_costs_nothing() -> None:
    operator = gpt2_like(count=2).operator(method="finite_difference", step=0.1)
    assert operator.step == 0.1
    operator.matvec(torch.ones(operator.size))
    operator.reset()
    assert operator.step == 0.1


def test_auto_finds_the_step_when_it_falls_back() -> None:
    weight = (3 * vector(12)).view(4, 3).float().requires_grad_()
    inputs = [vector(40, seed=seed).view(10, 4).float() for seed in (1, 2)]

    def loss(batch: Tensor, tanh: Callable[[Tensor], Tensor] = OnceDifferentiableTanh.apply) -> Tensor:
        return tanh(batch @ weight).pow(3).mean()

    operator = HessianOperator(loss, [weight], inputs)
    with pytest.warns(CurvatureWarning, match="finite differences") as caught:
        product = operator.matvec(vector(12))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert operator.num_matvecs == 1
    asked = HessianOperator(loss, [weight], inputs, method="finite_difference")
    assert torch.equal(product, asked.matvec(vector(12)))
    assert operator.step == asked.step
    exact = HessianOperator(lambda batch: loss(batch, torch.tanh), [weight], inputs)
    assert relative_error(product, exact.matvec(vector(12)).double()) <= 2e-3


def test_a_comparison_with_finite_differences_finds_a_step_without_going_over_to_them() -> None:
    operator = gpt2_like(count=2).operator()
    check = operator.check(finite_difference=True)
    assert check.inexactness <= 1e-2
    assert operator.method == "double_backward"


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-2])
def test_steps_are_no_longer_than_the_parameters(scale: float) -> None:
    parameters = [torch.full((4,), scale, requires_grad=True), torch.full((9,), 1e3)]
    longest = first_step(parameters, FlatLayout(parameters).space())
    assert longest == pytest.approx(5e-2 * min(1, 2 * scale) if scale else 5e-2)


def test_steps_are_no_shorter_than_the_rounding_of_the_parameters_allows() -> None:
    parameters = [torch.full((10_000,), 100.0, requires_grad=True)]  # of norm 10,000
    assert first_step(parameters, FlatLayout(parameters).space()) == pytest.approx(1.0)


# Made-up errors of the products.

SIZE = 40
SPACE = VectorSpace(SIZE, torch.float64, torch.device("cpu"))


def chosen(error: Callable[[float], Tensor | float], space: VectorSpace = SPACE) -> float:
    """The step for products with such an error, in multiples of the first step."""
    start = vector(SIZE, seed=9)

    def difference(vector: Tensor, step: float) -> Tensor:
        return (start + error(step)) * torch.linalg.vector_norm(vector) / torch.linalg.vector_norm(start)

    return fitting_step(difference, start, 1.0, space)


def noise(step: float) -> Tensor:
    return vector(SIZE, seed=int(1e4 * step) + 17)


def test_a_step_is_short_enough_for_the_truncation_and_no_shorter() -> None:
    assert chosen(lambda h: 1e-3 * h**2 * vector(SIZE)) == 1 / 4
    assert chosen(lambda h: 1e-1 * h**2 * vector(SIZE)) == 1 / 16
    assert chosen(lambda h: 10 * h**2 * vector(SIZE)) == 1 / 256


def test_a_step_is_long_enough_for_the_rounding() -> None:
    assert chosen(lambda h: 0.1 / h * noise(h)) == 1
    assert chosen(lambda h: h**2 * vector(SIZE) + 2e-4 / h * noise(h)) == 1 / 16


def test_errors_that_grow_as_the_step_shrinks_and_vanish_of_a_sudden_are_those_of_kinks() -> None:
    assert chosen(lambda h: 0.3 / h**0.5 * noise(h)) == 1
    assert chosen(lambda h: 0.3 / h**0.5 * noise(h) if h > 0.01 else 1e-5 / h * noise(h)) == 1


def test_what_is_not_finite_or_zero_leaves_the_first_step() -> None:
    assert chosen(lambda h: float("nan")) == 1
    assert fitting_step(lambda v, h: torch.zeros_like(v), torch.zeros(SIZE), 1.0, SPACE) in (1, 1 / 4)


def test_ranks_with_unlike_rounding_take_one_step() -> None:
    """The numbers that are compared are the means over the ranks, whatever each of them has."""
    sent: list[Tensor] = []

    def reduce(buffer: Tensor) -> None:
        sent.append(buffer.clone())
        buffer.mul_(2)  # another rank that sends the same

    space = VectorSpace(SIZE, torch.float64, torch.device("cpu"), Ranks(reduce))
    assert chosen(lambda h: 1e-1 * h**2 * vector(SIZE), space) == 1 / 16
    assert len(sent) >= 3


def test_ranks_without_a_batch_fall_back_with_the_others() -> None:
    """Two ranks in one process, the second one without a batch: their collectives have to be the same ones."""
    weight = vector(12).view(4, 3).requires_grad_()
    batch = vector(40, seed=1).view(10, 4)

    def loss(batch: Tensor) -> Tensor:
        return OnceDifferentiableTanh.apply(batch @ weight).pow(3).mean()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvatureWarning)
        results = in_two_threads(loss, [weight], [[batch], []])
    expected = HessianOperator(loss, [weight], [batch], method="finite_difference").matvec(vector(12))
    for product, operator, num_fallbacks in results:
        assert relative_error(product, expected) <= 1e-9
        assert operator.method == "finite_difference"
        assert operator.step == results[0][1].step
        assert num_fallbacks == 1  # or the next operators of the ranks would not be alike


def in_two_threads(
    loss: Any, parameters: list[Tensor], batches: list[list[Tensor]]
) -> list[tuple[Tensor, HessianOperator, int]]:
    """A product on each of two ranks: threads, one of which runs while the other one is in a collective."""
    barrier, running = threading.Barrier(2, timeout=120), threading.Lock()
    sent: dict[int, Tensor] = {}

    def run(rank: int) -> tuple[Tensor, HessianOperator, int]:
        def reduce(buffer: Tensor) -> None:
            sent[rank] = buffer.clone()
            running.release()
            try:
                barrier.wait()
                total = sent[0] + sent[1]
                barrier.wait()
            finally:
                running.acquire()
            buffer.copy_(total)

        with running:
            weights = [float(len(batch)) for batch in batches[rank]]
            fallbacks: list[int] = []
            options: dict[str, Any] = {"reduce": reduce, "on_fallback": lambda: fallbacks.append(rank)}
            operator = HessianOperator(loss, parameters, batches[rank], weights=weights, **options)
            try:
                return operator.matvec(vector(operator.size)), operator, len(fallbacks)
            except BaseException:
                barrier.abort()
                raise

    with ThreadPoolExecutor(2) as executor:
        return list(executor.map(run, range(2)))
