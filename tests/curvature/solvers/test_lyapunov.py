"""Lyapunov exponents on quadratics, where they are known in closed form, and of a small network."""

import io
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lyapunov_lightning.curvature import (
    LyapunovEstimate,
    LyapunovIteration,
    LyapunovSpectrum,
    LyapunovSpectrumEstimate,
    NonFiniteCurvatureError,
)
from tests.curvature.helpers import random_vectors, rng_state, symmetric_matrix
from tests.curvature.memory import PeakMemory
from tests.problems import mlp

MAPS: dict[str, dict[str, Any]] = {
    "ascent": {},
    "sgd": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
}
every_map = pytest.mark.parametrize("name", MAPS)


def iteration_of(name: str, **options: Any) -> LyapunovIteration:
    return LyapunovIteration(map="ascent" if name == "ascent" else "sgd", **options)


def follow(
    iteration: LyapunovIteration, hessian: Tensor, steps: int, *, slope: float = 0.0, **options: Any
) -> LyapunovEstimate:
    """The last of some iterations on a quadratic with this Hessian, at a point with this slope in all directions."""
    gradient_here = torch.full((len(hessian),), slope, dtype=hessian.dtype)
    for _ in range(steps):
        estimate = iteration.step(lambda q: gradient_here + hessian @ q, gradient_here, **options)
    return estimate


def spectrum_between(low: float, high: float) -> Tensor:
    """Nine eigenvalues with a gap at either end, so that the iterations settle soon."""
    inner = torch.linspace(low + 0.25 * (high - low), high - 0.25 * (high - low), 7, dtype=torch.float64)
    return torch.cat([torch.tensor([low, high], dtype=torch.float64), inner])


# Closed forms on quadratics.


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 30.0, 1e4])
def test_algorithm_1_steers_the_exponent_to_1_from_any_scale(scale: float) -> None:
    iteration = LyapunovIteration()
    hessian = symmetric_matrix(spectrum_between(-0.5 * scale, scale))
    estimate = follow(iteration, hessian, 300)
    assert estimate.exponent == pytest.approx(1.0, abs=1e-9)
    assert estimate.eigenvalue == pytest.approx(scale, rel=1e-8)
    assert estimate.curvature == pytest.approx(scale, rel=1e-8)
    assert estimate.paper_eigenvalue == pytest.approx(scale / (math.e - 1), rel=1e-8)
    assert iteration.beta == pytest.approx((math.e - 1) / scale, rel=1e-8)
    assert estimate.residual <= 1e-6 * scale
    assert estimate.end == "largest"
    assert estimate.num_gradients == 1


def test_one_step_of_algorithm_1_is_as_the_paper_writes_it() -> None:
    """Also away from the fixed point: growth, exponent, control, and the exact inversion for an eigenvector."""
    hessian = torch.diag(torch.tensor([3.0, 3.0], dtype=torch.float64))
    iteration = LyapunovIteration()
    estimate = follow(iteration, hessian, 1)
    assert estimate.exponent == pytest.approx(math.log(1 + 3.0), rel=1e-14)
    assert estimate.eigenvalue == pytest.approx(3.0, rel=1e-14)
    assert iteration.beta == pytest.approx(1 / math.log(4), rel=1e-14)
    assert estimate.paper_eigenvalue == pytest.approx(math.log(4), rel=1e-14)
    assert estimate.residual <= 1e-13


@pytest.mark.parametrize("lr", [1e-2, 0.1, 0.5])
def test_sgd_finds_the_smallest_eigenvalue_below_the_edge(lr: float) -> None:
    hessian = symmetric_matrix(spectrum_between(-2.0, 3.0))  # lr * 3 < 2
    steps = int(60 / lr)  # neighbours, 1.25 apart, fall behind by exp(-lr * 1.25) a step
    estimate = follow(LyapunovIteration(map="sgd"), hessian, steps, lr=lr)
    assert estimate.end == "smallest"
    assert estimate.exponent == pytest.approx(math.log(1 + 2 * lr), rel=1e-8)
    assert estimate.eigenvalue == pytest.approx(-2.0, rel=1e-8)
    assert estimate.paper_eigenvalue == pytest.approx(-math.log(1 + 2 * lr) / lr, rel=1e-8)
    assert estimate.curvature == pytest.approx(-2.0, rel=1e-8)


def test_sgd_finds_the_largest_eigenvalue_beyond_the_edge() -> None:
    lr = 0.5
    hessian = symmetric_matrix(spectrum_between(0.0, 6.0))  # lr * 6 = 3 > 2: the factor is -2
    estimate = follow(LyapunovIteration(map="sgd"), hessian, 200, lr=lr)
    assert estimate.end == "largest"
    assert estimate.exponent == pytest.approx(math.log(2), rel=1e-8)
    assert estimate.eigenvalue == pytest.approx(6.0, rel=1e-8)
    assert estimate.curvature == pytest.approx(6.0, rel=1e-8)


def test_sgd_finds_the_end_that_grows_faster_where_both_grow() -> None:
    """Beyond the edge by less than the negative end grows: |1 - 0.5 * 4.5| = 1.25 < |1 + 0.5 * 2| = 2."""
    estimate = follow(LyapunovIteration(map="sgd"), symmetric_matrix(spectrum_between(-2.0, 4.5)), 300, lr=0.5)
    assert estimate.end == "smallest"
    assert estimate.eigenvalue == pytest.approx(-2.0, rel=1e-8)


@pytest.mark.parametrize(("lr", "momentum"), [(0.1, 0.9), (0.5, 0.5), (1e-2, 0.99), (1.0, 0.1)])
def test_momentum_finds_the_smallest_eigenvalue_below_the_edge(lr: float, momentum: float) -> None:
    low = -1.0
    hessian = symmetric_matrix(spectrum_between(low, 1.5))
    estimate = follow(LyapunovIteration(map="sgd"), hessian, 2000, lr=lr, momentum=momentum)
    # The larger root of μ² - (1 + m - αh) μ + m = 0, from q' = q + α p', p' = m p - h q, (p, q)' = μ (p, q).
    trace = 1 + momentum - lr * low
    multiplier = (trace + math.sqrt(trace**2 - 4 * momentum)) / 2
    assert estimate.end == "smallest"
    assert estimate.exponent == pytest.approx(math.log(multiplier), rel=1e-8)
    assert estimate.eigenvalue == pytest.approx(low, rel=1e-8)
    log = math.log(multiplier)
    assert estimate.paper_eigenvalue == pytest.approx(-(log**2 + log * (1 - momentum)) / lr, rel=1e-8)


@pytest.mark.parametrize("beyond", [1.05, 1.5, 3.0])
def test_momentum_finds_the_largest_eigenvalue_beyond_its_edge(beyond: float) -> None:
    """Heavy ball turns unstable at (2 + 2m)/α, not at 2/α."""
    lr, momentum = 0.1, 0.5
    high = beyond * (2 + 2 * momentum) / lr
    estimate = follow(
        LyapunovIteration(map="sgd"), symmetric_matrix(spectrum_between(0.0, high)), 2000, lr=lr, momentum=momentum
    )
    assert estimate.end == "largest"
    assert estimate.exponent > 0
    assert estimate.eigenvalue == pytest.approx(high, rel=1e-8)
    assert estimate.curvature == pytest.approx(high, rel=1e-8)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_papers_numbers_are_the_limit_of_small_steps(momentum: float) -> None:
    lr = 1e-4 * (1 - momentum)
    hessian = torch.diag(torch.tensor([-2.0, -2.0], dtype=torch.float64))
    estimate = follow(LyapunovIteration(map="sgd"), hessian, 400, lr=lr, momentum=momentum)
    assert estimate.eigenvalue == pytest.approx(-2.0, rel=1e-7)
    # The next order is αh/(1 - m)/2 = 1e-4.
    assert estimate.paper_eigenvalue == pytest.approx(-2.0, rel=2e-4)
    assert estimate.paper_eigenvalue != pytest.approx(estimate.eigenvalue, rel=1e-6)


def test_the_ascent_map_says_which_end_it_found() -> None:
    """Beyond |λ_min| = (e + 1)/(e - 1) λ_max the negative end grows faster, and turns round at every step."""
    mild = follow(LyapunovIteration(), symmetric_matrix(spectrum_between(-2.0, 1.0)), 400)
    assert (mild.end, round(mild.eigenvalue, 8)) == ("largest", 1.0)
    for hessian in (symmetric_matrix(spectrum_between(-10.0, 1.0)), symmetric_matrix(spectrum_between(-4.0, -1.0))):
        estimate = follow(LyapunovIteration(), hessian, 400)
        values = torch.linalg.eigvalsh(hessian)
        found = float(values[-1] if estimate.end == "largest" else values[0])
        assert estimate.eigenvalue == pytest.approx(found, rel=1e-8)
        assert estimate.curvature == pytest.approx(found, rel=1e-8)


@every_map
def test_quadratics_look_the_same_at_any_distance_and_slope(name: str) -> None:
    hessian = symmetric_matrix(spectrum_between(-2.0, 3.0))
    options = MAPS[name]
    reference = follow(iteration_of(name), hessian, 25, **options)
    for delta_q, slope in ((1e-3, 0.0), (10.0, 0.0), (1.0, 5.0)):
        estimate = follow(iteration_of(name, delta_q=delta_q), hessian, 25, slope=slope, **options)
        for field, value in asdict(estimate).items():
            # Rounding: of q to 1e-16, and of a gradient of size 5 next to Hq.
            assert value == (value if isinstance(value, str) else pytest.approx(asdict(reference)[field], rel=1e-10))
        assert estimate.end == reference.end


@every_map
def test_the_perturbation_keeps_its_length(name: str) -> None:
    hessian = symmetric_matrix(spectrum_between(-2.0, 3.0))
    lengths = []

    def gradient(q: Tensor) -> Tensor:
        lengths.append(float(q.norm()))
        return hessian @ q

    iteration = iteration_of(name, delta_q=0.3)
    for _ in range(20):
        iteration.step(gradient, torch.zeros(9, dtype=torch.float64), **MAPS[name])
    assert lengths == pytest.approx([0.3] * 20, rel=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_perturbation_that_one_step_takes_to_zero_is_an_exponent_of_minus_infinity(momentum: float) -> None:
    """An eigenvalue of exactly 1/α."""
    hessian = torch.diag(torch.tensor([2.0, 2.0], dtype=torch.float64))
    iteration = LyapunovIteration(map="sgd")
    estimate = follow(iteration, hessian, 1, lr=0.5, momentum=momentum)
    assert estimate.exponent == -math.inf
    assert estimate.curvature == pytest.approx(2.0)
    follow(iteration, symmetric_matrix([1.0, -1.0]), 1, lr=0.5, momentum=momentum)  # it goes on


@every_map
def test_a_stretch_without_curvature_is_survived(name: str) -> None:
    """A flat loss, as before the first unit of a ReLU network wakes up."""
    iteration = iteration_of(name)
    flat = follow(iteration, torch.zeros(9, 9, dtype=torch.float64), 1000, **MAPS[name])
    assert flat.exponent == pytest.approx(0.0, abs=1e-12)
    assert flat.eigenvalue == pytest.approx(0.0, abs=1e-12)
    estimate = follow(iteration, symmetric_matrix(spectrum_between(-2.0, 3.0)), 2000, **MAPS[name])
    assert estimate.eigenvalue == pytest.approx(3.0 if name == "ascent" else -2.0, rel=1e-8)


# A network.


@pytest.mark.parametrize("name", ["ascent", "sgd"])
def test_the_curvature_of_a_network_is_found(name: str) -> None:
    problem = mlp()
    values = torch.linalg.eigvalsh(problem.dense_hessian())
    operator = problem.operator()
    iteration = iteration_of(name, delta_q=1e-4)
    here = operator.gradient()
    for _ in range(300):
        estimate = iteration.step(operator.gradient, here, **({} if name == "ascent" else {"lr": 1.0}))
    # A one-sided difference over 1e-4 is off by as much times the third derivatives.
    assert estimate.eigenvalue == pytest.approx(float(values[-1 if name == "ascent" else 0]), rel=1e-3)
    assert estimate.residual <= 1e-2 * abs(estimate.eigenvalue)


def test_float32_perturbations_stay_in_float32() -> None:
    iteration = LyapunovIteration()
    estimate = follow(iteration, symmetric_matrix(spectrum_between(-1.0, 2.0)).float(), 100)
    assert iteration.state_dict()["perturbation"].dtype == torch.float32
    assert estimate.eigenvalue == pytest.approx(2.0, rel=1e-5)


# State.


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as Lightning loads it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_map
def test_a_resumed_iteration_goes_on_to_the_last_bit(name: str) -> None:
    hessian = symmetric_matrix(spectrum_between(-2.0, 3.0))
    first = iteration_of(name, seed=1)
    follow(first, hessian, 5, **MAPS[name])
    state = saved_and_loaded(first.state_dict())
    kept = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    second = iteration_of(name, seed=2)
    second.load_state_dict(state)
    for _ in range(5):
        assert follow(second, hessian, 1, **MAPS[name]) == follow(first, hessian, 1, **MAPS[name])
    assert equal_states(state, kept)  # what was loaded is not written to
    fresh = iteration_of(name, seed=1)
    fresh.load_state_dict(saved_and_loaded(iteration_of(name, seed=1).state_dict()))  # before the first step
    assert follow(fresh, hessian, 3, **MAPS[name]) == follow(iteration_of(name, seed=1), hessian, 3, **MAPS[name])


def equal_states(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[key]) if isinstance(value, Tensor) else value == second[key]
        for key, value in first.items()
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("there", [True, False])
@every_map
def test_a_gradient_that_is_not_finite_raises_and_changes_nothing(name: str, there: bool, bad: float) -> None:
    hessian = symmetric_matrix(spectrum_between(-2.0, 3.0))
    broken = torch.zeros(9, dtype=torch.float64)
    broken[3] = bad
    zero = torch.zeros(9, dtype=torch.float64)
    for steps in (0, 4):
        disturbed, undisturbed = iteration_of(name), iteration_of(name)
        for iteration in (disturbed, undisturbed):
            if steps:
                follow(iteration, hessian, steps, **MAPS[name])
        with pytest.raises(NonFiniteCurvatureError, match="not finite"):
            disturbed.step(lambda q: broken if there else hessian @ q, zero if there else broken, **MAPS[name])
        if steps:
            assert equal_states(disturbed.state_dict(), undisturbed.state_dict())
        for _ in range(3):
            assert follow(disturbed, hessian, 1, **MAPS[name]) == follow(undisturbed, hessian, 1, **MAPS[name])


def test_another_number_of_parameters_begins_anew() -> None:
    iteration = iteration_of("momentum")
    follow(iteration, symmetric_matrix(spectrum_between(-2.0, 3.0)), 5, lr=0.1, momentum=0.9)
    smaller = symmetric_matrix([-1.0, 0.0, 1.0])
    estimate = follow(iteration, smaller, 3, lr=0.1, momentum=0.9)
    assert estimate == follow(iteration_of("momentum"), smaller, 3, lr=0.1, momentum=0.9)


@every_map
def test_the_seed_determines_the_perturbation_and_the_global_generators_are_left_alone(name: str) -> None:
    hessian = symmetric_matrix(spectrum_between(-2.0, 3.0))
    before = rng_state()
    first, second, other = (follow(iteration_of(name, seed=seed), hessian, 4, **MAPS[name]) for seed in (1, 1, 2))
    assert rng_state() == before
    assert first == second
    assert first.exponent != other.exponent


# Several perturbations.


def follow_spectrum(
    spectrum: LyapunovSpectrum,
    hessian: Tensor,
    steps: int,
    gradient: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> LyapunovSpectrumEstimate:
    zero = torch.zeros(len(hessian), dtype=hessian.dtype)
    for _ in range(steps):
        estimate = spectrum.step(gradient or (lambda q: hessian @ q), zero, **options)
    return estimate


def test_several_perturbations_find_the_largest_eigenvalues() -> None:
    hessian = symmetric_matrix([5.0, 4.0, 3.0, 1.0, 0.5, 0.0, -0.5])
    estimate = follow_spectrum(LyapunovSpectrum(3), hessian, 600)
    assert estimate.eigenvalues.tolist() == pytest.approx([5.0, 4.0, 3.0], rel=1e-8)
    beta = (math.e - 1) / 5
    expected = [math.log(1 + beta * h) for h in (5.0, 4.0, 3.0)]
    assert estimate.exponents.tolist() == pytest.approx(expected, rel=1e-8)
    assert estimate.paper_eigenvalues.tolist() == pytest.approx([x / beta for x in expected], rel=1e-8)
    assert estimate.num_gradients == 3


def test_several_perturbations_of_sgd_find_the_smallest_eigenvalues() -> None:
    hessian = symmetric_matrix([1.0, 0.5, 0.0, -1.0, -2.0, -3.0])
    estimate = follow_spectrum(LyapunovSpectrum(3, map="sgd"), hessian, 1500, lr=0.1)
    assert estimate.eigenvalues.tolist() == pytest.approx([-3.0, -2.0, -1.0], rel=1e-8)
    assert estimate.exponents.tolist() == pytest.approx([math.log(1.3), math.log(1.2), math.log(1.1)], rel=1e-8)


def test_turning_perturbations_have_negative_multipliers() -> None:
    """Beyond the edge: 1 - 0.5 * 8 = -3 and 1 - 0.5 * 7 = -2.5, ahead of 1 + 0.5 * 2 = 2."""
    hessian = symmetric_matrix([8.0, 7.0, 2.0, 1.0, -2.0])
    estimate = follow_spectrum(LyapunovSpectrum(3, map="sgd"), hessian, 600, lr=0.5)
    assert estimate.eigenvalues.tolist() == pytest.approx([8.0, 7.0, -2.0], rel=1e-8)


def test_the_mean_exponents_sum_up_to_the_growth_of_volumes() -> None:
    """With as many perturbations as parameters it is the determinant that grows, whatever their directions."""
    hessian = symmetric_matrix([1.0, 0.5, -0.25, -1.0])
    spectrum = LyapunovSpectrum(4, map="sgd")
    logs = torch.log1p(-0.3 * torch.linalg.eigvalsh(hessian))
    for _ in range(7):
        estimate = follow_spectrum(spectrum, hessian, 1, lr=0.3)
        assert float(estimate.exponents.sum()) == pytest.approx(float(logs.sum()), rel=1e-12)
        assert float(estimate.mean_exponents.sum()) == pytest.approx(float(logs.sum()), rel=1e-12)


@pytest.mark.parametrize("kind", ["ascent", "sgd"])
def test_resumed_perturbations_go_on_to_the_last_bit(kind: Any) -> None:
    hessian = symmetric_matrix(spectrum_between(-2.0, 3.0))
    options = {} if kind == "ascent" else {"lr": 0.1}
    first, second = LyapunovSpectrum(3, map=kind, seed=1), LyapunovSpectrum(3, map=kind, seed=2)
    follow_spectrum(first, hessian, 5, **options)
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    for _ in range(3):
        a, b = (asdict(follow_spectrum(spectrum, hessian, 1, **options)) for spectrum in (first, second))
        assert equal_states(a, b)


@pytest.mark.parametrize("kind", ["ascent", "sgd"])
def test_perturbations_are_left_as_they_were_by_a_gradient_that_is_not_finite(kind: Any) -> None:
    hessian = symmetric_matrix(spectrum_between(-2.0, 3.0))
    options = {} if kind == "ascent" else {"lr": 0.1}
    disturbed, undisturbed = LyapunovSpectrum(2, map=kind), LyapunovSpectrum(2, map=kind)
    before = rng_state()
    for spectrum in (disturbed, undisturbed):
        follow_spectrum(spectrum, hessian, 4, **options)
    with pytest.raises(NonFiniteCurvatureError, match="not finite"):
        follow_spectrum(disturbed, hessian, 1, lambda q: q * math.nan, **options)
    assert equal_states(disturbed.state_dict(), undisturbed.state_dict())
    assert rng_state() == before


def test_several_perturbations_survive_a_stretch_without_curvature() -> None:
    spectrum = LyapunovSpectrum(2)
    follow_spectrum(spectrum, torch.zeros(5, 5, dtype=torch.float64), 1000)
    estimate = follow_spectrum(spectrum, symmetric_matrix([3.0, 2.0, 0.5, 0.0, -1.0]), 2000)
    assert estimate.eigenvalues.tolist() == pytest.approx([3.0, 2.0], rel=1e-8)


@pytest.mark.parametrize("kind", ["ascent", "sgd"])
@pytest.mark.parametrize("steps", [1, 3, 300])
def test_residuals_are_those_of_the_perturbations_at_every_stage(kind: Any, steps: int) -> None:
    hessian = symmetric_matrix(spectrum_between(-2.0, 3.0))
    spectrum = LyapunovSpectrum(4, map=kind)
    options = {} if kind == "ascent" else {"lr": 0.3}
    zero = torch.zeros(9, dtype=torch.float64)
    seen: list[Tensor] = []
    for _ in range(steps):
        estimate = spectrum.step(lambda q: seen.append(q) or hessian @ q, zero, **options)
    directions = torch.stack(seen[-4:]) / 5e-2
    torch.testing.assert_close(directions @ directions.T, torch.eye(4, dtype=torch.float64))
    expected = torch.linalg.vector_norm(directions @ hessian - estimate.eigenvalues[:, None] * directions, dim=1)
    torch.testing.assert_close(estimate.residuals, expected, rtol=1e-6, atol=1e-12)
    assert estimate.num_gradients == len(seen) / steps == 4
    assert torch.equal(estimate.converged(0.1), expected <= 0.1 * estimate.eigenvalues.abs())


def test_few_steps_on_a_flat_spectrum_have_not_converged_and_say_so() -> None:
    hessian = symmetric_matrix(torch.linspace(1.0, 1.3, 60).tolist())
    estimate = follow_spectrum(LyapunovSpectrum(3), hessian, 5)
    assert not bool(estimate.converged(1e-2).any())
    assert bool((estimate.residuals > 0.02).all())
    settled = follow_spectrum(LyapunovSpectrum(3), symmetric_matrix([5.0, 4.0, 3.0, 1.0]), 300)
    assert bool(settled.converged(1e-6).all())


def test_largest_growth_is_not_the_largest_eigenvalue_and_the_end_says_so() -> None:
    hessian = symmetric_matrix([1.0, 0.5, 0.0, -4.0, -5.0])
    spectrum = LyapunovSpectrum(3)
    spectrum.beta = 1.0
    estimate = follow_spectrum(spectrum, hessian, 400)
    assert estimate.eigenvalues.tolist() == pytest.approx([-5.0, -4.0, 1.0], rel=1e-6)
    assert estimate.ends == ("smallest", "smallest", "largest")
    turned = follow_spectrum(LyapunovSpectrum(3, map="sgd"), symmetric_matrix([8.0, 7.0, 2.0, 1.0, -2.0]), 600, lr=0.5)
    assert turned.eigenvalues.tolist() == pytest.approx([8.0, 7.0, -2.0], rel=1e-8)
    assert turned.ends == ("largest", "largest", "smallest")


@pytest.mark.parametrize("kind", ["ascent", "sgd"])
def test_a_direction_that_vanishes_begins_anew(kind: Any) -> None:
    """Plain SGD at a learning rate of 1/λ lands in the minimum of every direction in one step."""
    hessian = torch.eye(6, dtype=torch.float64) * (2.0 if kind == "sgd" else -1.0)
    spectrum = LyapunovSpectrum(3, map=kind)
    options = {"lr": 0.5} if kind == "sgd" else {}
    estimate = follow_spectrum(spectrum, hessian, 1, **options)
    assert bool((estimate.exponents < -30).all())
    seen: list[Tensor] = []
    spectrum.beta = 1.0
    spectrum.step(lambda q: seen.append(q) or 0 * q, torch.zeros(6, dtype=torch.float64), **options)
    rows = torch.stack(seen) / 5e-2
    torch.testing.assert_close(rows @ rows.T, torch.eye(3, dtype=torch.float64))


class Transfers(TorchDispatchMode):
    """Counts reads of tensors' values."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MAPS)
def test_one_iteration_reads_its_numbers_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hessian = symmetric_matrix(spectrum_between(-2.0, 3.0))
    iteration = iteration_of(name)
    follow(iteration, hessian, 2, **MAPS[name])
    reads = 0
    to_list = Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        nonlocal reads
        reads += 1
        return to_list(tensor)

    monkeypatch.setattr(Tensor, "tolist", counted)
    with Transfers() as transfers:
        follow(iteration, hessian, 1, **MAPS[name])
    assert (reads, transfers.count) == (1, 0)


def test_several_perturbations_take_the_memory_of_twice_as_many_vectors_and_few_more() -> None:
    size, count = 100_000, 8
    spectrum = LyapunovSpectrum(count)
    curvatures = torch.linspace(-1.0, 2.0, size)
    here = torch.zeros(size)
    spectrum.step(lambda q: curvatures * q, here)
    with PeakMemory() as memory:
        spectrum.step(lambda q: curvatures * q, here)
    assert 2 * count <= memory.num_bytes / here.nbytes <= 2 * count + 4.1


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"map": "adam"}, "`map`.*'ascent' or 'sgd'.*'adam'"),
        ({"delta_q": 0.0}, r"`delta_q`.*positive.*0\.0"),
        ({"delta_q": -1.0}, r"`delta_q`.*positive.*-1\.0"),
        ({"delta_q": math.nan}, "`delta_q`.*positive.*nan"),
    ],
)
def test_bad_arguments_are_named_with_their_values(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LyapunovIteration(**arguments)
    with pytest.raises(ValueError, match=message):
        LyapunovSpectrum(1, **arguments)


@pytest.mark.parametrize("lr", [0.0, -0.1, math.nan])
def test_the_training_map_needs_a_learning_rate(lr: float) -> None:
    hessian = symmetric_matrix([1.0, 2.0])
    with pytest.raises(ValueError, match=f"`lr` should be a positive float.*{lr}"):
        follow(LyapunovIteration(map="sgd"), hessian, 1, lr=lr)
    with pytest.raises(ValueError, match=f"`lr` should be a positive float.*{lr}"):
        follow_spectrum(LyapunovSpectrum(1, map="sgd"), hessian, 1, lr=lr)


def test_as_many_perturbations_as_there_are_parameters_at_most() -> None:
    with pytest.raises(ValueError, match=r"`num_perturbations`.*positive.*0"):
        LyapunovSpectrum(0)
    with pytest.raises(ValueError, match=r"`num_perturbations` should be at most.*2, got 3"):
        follow_spectrum(LyapunovSpectrum(3), symmetric_matrix([1.0, 2.0]), 1)
    assert follow_spectrum(LyapunovSpectrum(2), random_vectors(2, 2), 1).exponents.shape == (2,)
