"""The running estimate finds the smallest eigenpair of an operator that stays, and follows one that moves."""

import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lyapunov_lightning.curvature import HessianOperator, NonFiniteCurvatureError, OnlineEigenpair, OnlineEstimate
from tests.curvature.helpers import DenseOperator, rng_state, symmetric_matrix
from tests.curvature.memory import PeakMemory
from tests.problems import PROBLEMS

STEPS = 300


def after(steps: int, operator: Any, **options: Any) -> OnlineEstimate:
    running = OnlineEigenpair(**options)
    for _ in range(steps):
        estimate = running.step(operator)
    return estimate


def smallest(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[0])


# An operator that stays.


@pytest.mark.parametrize("name", PROBLEMS)
def test_300_products_find_the_smallest_eigenvalue_of_a_network(name: str) -> None:
    problem = PROBLEMS[name]()
    expected = smallest(problem.dense_hessian())
    assert expected < 0
    estimate = after(STEPS, problem.operator())
    assert estimate.value == pytest.approx(expected, rel=1e-6)  # 5 % are asked for
    assert estimate.residual < 1e-6


def trained_network() -> tuple[HessianOperator, Tensor]:
    """1,002 parameters after 150 steps of gradient descent, where the lower end is small beside the upper one."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 20, dtype=torch.float64, generator=generator)
    labels = (inputs[:, :10] * inputs[:, 10:]).argmax(dim=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    parameters = list(net.parameters())
    for _ in range(150):
        loss = nn.functional.cross_entropy(net(inputs), labels)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter -= 0.5 * gradient

    def at(flat: Tensor) -> Tensor:
        pieces = flat.split([p.numel() for p in parameters])
        names = dict(net.named_parameters())
        values = {name: piece.view_as(p) for (name, p), piece in zip(names.items(), pieces, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(net, values, (inputs,)), labels)

    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    operator = HessianOperator(lambda b: nn.functional.cross_entropy(net(b[0]), b[1]), parameters, [(inputs, labels)])
    return operator, torch.func.hessian(at)(flat)


def test_300_products_find_a_lower_end_that_is_small_beside_the_upper_one() -> None:
    operator, hessian = trained_network()
    values = torch.linalg.eigvalsh(hessian)
    assert -0.05 < float(values[0] / values[-1]) < 0
    assert after(STEPS, operator).value == pytest.approx(float(values[0]), rel=0.05)


@settings(max_examples=15, deadline=None)
@given(
    size=st.integers(2, 60),
    top=st.floats(-2, 3).map(lambda exponent: 10**exponent),
    scale=st.floats(-4, 4).map(lambda exponent: 10**exponent),
    seed=st.integers(0, 10_000),
    cycle=st.integers(4, 8),
)
def test_300_products_find_the_smallest_eigenvalue_of_any_matrix(
    size: int, top: float, scale: float, seed: int, cycle: int
) -> None:
    bulk = torch.rand(size - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spectrum = scale * torch.cat([torch.tensor([-1.0], dtype=torch.float64), -0.8 + (top + 0.8) * bulk])
    estimate = after(STEPS, DenseOperator(symmetric_matrix(spectrum, seed)), seed=seed, cycle=cycle)
    assert estimate.value == pytest.approx(-scale, rel=0.05)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
def test_small_operators_are_solved_exactly(size: int) -> None:
    matrix = symmetric_matrix(torch.linspace(-1.0, 3.0, size))
    assert after(40, DenseOperator(matrix)).value == pytest.approx(smallest(matrix), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "spectrum",
    [[0.0] * 5, [2.0] * 5, [-2.0] * 5, [-1.0, -1.0, 3.0, 3.0, 3.0, 7.0], [5.0] * 9 + [-1e-3]],
    ids=["zero", "positive", "negative", "repeated", "small"],
)
def test_repeated_eigenvalues_are_no_trouble(spectrum: list[float], dtype: torch.dtype) -> None:
    estimate = after(60, DenseOperator(symmetric_matrix(spectrum).to(dtype)))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype] * max(map(abs, spectrum))
    assert estimate.value == pytest.approx(min(spectrum), abs=tolerance)
    assert float(estimate.vector.norm()) == pytest.approx(1, rel=1e-5)


def test_an_eigenvector_that_is_not_the_smallest_is_left_again() -> None:
    running = OnlineEigenpair()
    before = torch.diag(torch.tensor([-1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], dtype=torch.float64))
    for _ in range(200):
        running.step(DenseOperator(before))
    after_change = before.clone()
    after_change[0, 0] = 1.5  # still an eigenvector, to rounding
    after_change[5, 5] = -3.0
    for _ in range(200):
        estimate = running.step(DenseOperator(after_change))
    assert estimate.value == pytest.approx(-3, rel=1e-6)


# An operator that moves.


def moving(steps: int, size: int = 40, speed: float = 0.02) -> Iterator[Tensor]:
    """Matrices whose eigenvectors turn by `speed` radians a step in random planes, and whose values drift."""
    generator = torch.Generator().manual_seed(3)
    spectrum = torch.linspace(-0.3, 6.0, size, dtype=torch.float64)
    spectrum[0] = -1
    vectors = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    skew = torch.randn(size, size, generator=generator, dtype=torch.float64)
    skew = skew - skew.T
    turn = torch.linalg.matrix_exp(skew * (speed / torch.linalg.matrix_norm(skew, 2)))
    for step in range(steps):
        vectors = turn @ vectors
        values = spectrum * (1 + 0.2 * math.sin(step / 50))
        yield (vectors * values) @ vectors.T


@pytest.mark.parametrize("cycle", [4, 6])
def test_it_follows_a_matrix_that_turns(cycle: int) -> None:
    running = OnlineEigenpair(cycle)
    errors = []
    for step, matrix in enumerate(moving(400)):
        value = running.step(DenseOperator(matrix)).value
        if step >= 100:
            errors.append(abs(value / smallest(matrix) - 1))
    assert sorted(errors)[len(errors) // 2] < 0.05


def test_value_and_residual_belong_to_the_matrix_that_they_were_measured_on() -> None:
    running = OnlineEigenpair()
    matrices: list[Tensor] = []
    ages = []
    for matrix in moving(60, speed=0.3):
        matrices.append(matrix)
        estimate = running.step(DenseOperator(matrix))
        ages.append(estimate.age)
        of_then = matrices[-1 - estimate.age]
        product = of_then @ estimate.vector
        assert float(estimate.vector.norm()) == pytest.approx(1, rel=1e-12)
        assert estimate.value == pytest.approx(float(estimate.vector @ product), rel=1e-10)
        assert estimate.residual == pytest.approx(float((product - estimate.value * estimate.vector).norm()), rel=1e-10)
        distance = (torch.linalg.eigvalsh(of_then) - estimate.value).abs().min()
        assert float(distance) <= estimate.residual * (1 + 1e-10)
    assert ages == [0, 1, 2, 3] * 15


# What it costs and keeps.


@pytest.mark.parametrize("cycle", [4, 5, 7])
def test_a_step_is_one_product_and_the_vectors_are_few(cycle: int) -> None:
    operator = DenseOperator(symmetric_matrix(torch.linspace(-1.0, 5.0, 50)))
    running = OnlineEigenpair(cycle)
    for step in range(1, 60):
        running.step(operator)
        assert operator.num_matvecs == step
        state = running.state_dict()
        assert len(state["rows"]) <= cycle + 1


@pytest.mark.parametrize("pause", [1, 2, 3, 4, 5, 30])
def test_a_restored_estimate_goes_on_bit_by_bit(pause: int) -> None:
    matrices = list(moving(40))
    straight, first = OnlineEigenpair(), OnlineEigenpair()
    expected = [straight.step(DenseOperator(matrix)) for matrix in matrices][pause:]
    for matrix in matrices[:pause]:
        first.step(DenseOperator(matrix))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = OnlineEigenpair(seed=5)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for matrix, estimate in zip(matrices[pause:], expected, strict=True):
        found = second.step(DenseOperator(matrix))
        assert (found.value, found.residual, found.age) == (estimate.value, estimate.residual, estimate.age)
        assert torch.equal(found.vector, estimate.vector)


def test_a_state_is_a_copy() -> None:
    running = OnlineEigenpair()
    matrices = list(moving(20))
    for matrix in matrices[:6]:
        running.step(DenseOperator(matrix))
    state = running.state_dict()
    kept = {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
    for matrix in matrices[6:]:
        running.step(DenseOperator(matrix))
    assert all(torch.equal(value, kept[name]) for name, value in state.items() if isinstance(value, Tensor))


def test_random_numbers_are_the_seeds_alone() -> None:
    before = rng_state()
    matrix = symmetric_matrix(torch.linspace(-1.0, 5.0, 30))
    first, second, other = (after(20, DenseOperator(matrix), seed=seed) for seed in (1, 1, 2))
    assert rng_state() == before
    assert torch.equal(first.vector, second.vector)
    assert not torch.equal(first.vector, other.vector)


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 11])
def test_a_product_that_is_not_finite_leaves_the_estimate_as_it_was(at: int) -> None:
    matrix = symmetric_matrix(torch.linspace(-1.0, 5.0, 30))
    running = OnlineEigenpair()
    for _ in range(at):
        estimate = running.step(DenseOperator(matrix))
    with pytest.raises(NonFiniteCurvatureError, match="not finite"):
        running.step(DenseOperator(matrix * math.nan))
    state = running.state_dict()
    assert (state["value"], state["residual"]) == (estimate.value, estimate.residual)
    for _ in range(STEPS):
        estimate = running.step(DenseOperator(matrix))
    assert estimate.value == pytest.approx(-1, rel=1e-9)


def test_it_begins_anew_where_the_size_changes() -> None:
    running = OnlineEigenpair()
    for size in (20, 30, 7):
        matrix = symmetric_matrix(torch.linspace(-float(size), 5.0, size))
        assert running.step(DenseOperator(matrix)).age == 0
        for _ in range(100):
            estimate = running.step(DenseOperator(matrix))
        assert estimate.value == pytest.approx(-size, rel=1e-6)


@pytest.mark.parametrize("cycle", [3, 2, 0, -1, 4.0, True, None])
def test_bad_cycle_is_named(cycle: Any) -> None:
    with pytest.raises(ValueError, match=f"^`cycle` should be an int of at least 4, got {cycle}.$"):
        OnlineEigenpair(cycle)


@pytest.mark.parametrize("cycle", [4, 8])
def test_a_step_works_with_one_vector_more_than_it_holds(cycle: int) -> None:
    diagonal = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    class Diagonal(DenseOperator):
        def matvec(self, vector: Tensor) -> Tensor:
            return self._matrix * vector

    running = OnlineEigenpair(cycle)
    with PeakMemory() as memory:
        for _ in range(3 * cycle):
            running.step(Diagonal(diagonal))
    assert memory.num_bytes / diagonal.nbytes <= cycle + 2 + 0.1
