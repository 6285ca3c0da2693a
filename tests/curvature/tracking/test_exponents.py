"""Exponents that are followed from one operator to the next similar one."""

import io
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lyapunov_lightning.curvature.tracking.exponents import EndExponents, ExponentTracker
from tests.curvature.helpers import rng_state, symmetric_matrix


def measured(
    tracker: ExponentTracker, spectrum: Sequence[float], measurements: int = 1, **options: Any
) -> EndExponents | None:
    """The last of some measurements on a quadratic with this spectrum, at a point with a slope."""
    hessian = symmetric_matrix(spectrum)
    here = torch.full((len(hessian),), 0.7, dtype=hessian.dtype)
    found = None
    for _ in range(measurements):
        found = tracker.measure(lambda q: here + hessian @ q, here, **options)
    return found


INNER = [0.5, 0.25, 0.0, -0.25, -0.5]


@pytest.mark.parametrize("iterations", [1, 3])
def test_gradient_ascent_finds_the_largest_eigenvalue_and_the_papers_one(iterations: int) -> None:
    found = measured(ExponentTracker(iterations=iterations), [3.0, *INNER, -1.0], 300 // iterations)
    assert found is not None
    assert found.lambda_max == pytest.approx(3.0, rel=1e-8)
    assert found.exponent == pytest.approx(1.0, abs=1e-8)
    assert found.inverse_h0 == pytest.approx((math.e - 1) / 3.0, rel=1e-8)
    assert found.lambda_min is found.exponent_sgd is found.paper_lambda_min is None
    assert found.num_gradients == iterations
    assert found.is_within(1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_training_map_finds_the_smallest_eigenvalue_and_the_papers_one(momentum: float) -> None:
    lr = 0.1
    found = measured(ExponentTracker("smallest"), [2.0, *INNER, -3.0], 400, lr=lr, momentum=momentum)
    assert found is not None
    assert found.lambda_min == pytest.approx(-3.0, rel=1e-8)
    # The larger root of μ² - (1 + m - αh) μ + m = 0.
    trace = 1 + momentum + 3 * lr
    growth = math.log((trace + math.sqrt(trace**2 - 4 * momentum)) / 2)
    assert found.exponent == pytest.approx(growth, rel=1e-8)
    paper = -(growth**2 + growth * (1 - momentum)) / lr if momentum else -growth / lr
    assert found.paper_lambda_min == pytest.approx(paper, rel=1e-8)
    assert found.lambda_max is found.exponent_sgd is found.inverse_h0 is None
    assert found.num_gradients == 1
    assert found.is_within(1e-5)


def test_both_ends_have_a_map_each() -> None:
    found = measured(ExponentTracker("both", iterations=2), [4.0, *INNER, -2.0], 200, lr=0.1)
    assert found is not None
    assert found.lambda_max == pytest.approx(4.0, rel=1e-8)
    assert found.lambda_min == pytest.approx(-2.0, rel=1e-8)
    assert found.exponent == pytest.approx(1.0, abs=1e-8)
    assert found.exponent_sgd == pytest.approx(math.log(1.2), rel=1e-8)
    assert found.inverse_h0 == pytest.approx((math.e - 1) / 4.0, rel=1e-8)
    assert found.paper_lambda_min == pytest.approx(-math.log(1.2) / 0.1, rel=1e-8)
    assert [estimate.end for estimate in found.estimates] == ["largest", "smallest"]
    assert found.num_gradients == 4


def test_beyond_the_edge_of_stability_training_follows_the_largest_eigenvalue() -> None:
    """Its factor 1 - 0.5 * 6 = -2 is the largest; no smallest eigenvalue is claimed then."""
    spectrum = [6.0, *INNER, 0.0]
    one = measured(ExponentTracker("smallest"), spectrum, 200, lr=0.5)
    assert one is not None
    assert one.lambda_max == pytest.approx(6.0, rel=1e-8)
    assert one.exponent == pytest.approx(math.log(2), rel=1e-8)
    assert one.lambda_min is one.paper_lambda_min is None
    both = measured(ExponentTracker("both"), spectrum, 200, lr=0.5)
    assert both is not None
    assert both.lambda_max == pytest.approx(6.0, rel=1e-8)
    assert both.estimates[0].eigenvalue == both.lambda_max  # that of the ascent
    assert both.exponent_sgd == pytest.approx(math.log(2), rel=1e-8)
    assert both.lambda_min is both.paper_lambda_min is None


def test_where_the_negative_end_dominates_ascent_finds_that_one() -> None:
    """Its factor 1 - 20 β outgrows 1 + β; no largest eigenvalue is claimed then."""
    spectrum = [1.0, *INNER, -20.0]
    one = measured(ExponentTracker("largest"), spectrum, 300)
    assert one is not None
    assert one.lambda_min == pytest.approx(-20.0, rel=1e-8)
    assert one.lambda_max is None
    assert one.exponent == pytest.approx(1.0, abs=1e-8)
    both = measured(ExponentTracker("both"), spectrum, 300, lr=0.05)
    assert both is not None
    assert both.lambda_max is None
    assert both.lambda_min == both.estimates[1].eigenvalue == pytest.approx(-20.0, rel=1e-8)


def test_a_learning_rate_of_zero_moves_nothing_to_be_followed() -> None:
    assert measured(ExponentTracker("smallest"), INNER, lr=0.0) is None
    both = measured(ExponentTracker("both"), [3.0, *INNER], 200, lr=0.0)
    assert both is not None
    assert both.lambda_max == pytest.approx(3.0, rel=1e-8)
    assert both.lambda_min is both.exponent_sgd is None
    assert both.num_gradients == 1


def test_an_estimate_is_within_the_tolerance_that_its_residual_allows() -> None:
    early, late = (measured(ExponentTracker(), [3.0, *INNER], count) for count in (1, 60))
    assert early is not None
    assert late is not None
    assert not early.is_within(1e-3)
    assert late.is_within(1e-3)
    (estimate,) = late.estimates
    assert not late.is_within(0.99 * estimate.residual / estimate.eigenvalue)


@pytest.mark.parametrize("end", ["largest", "smallest", "both"])
@pytest.mark.parametrize("num_before", [0, 3])
def test_exponents_go_on_from_their_state_bit_by_bit(end: Any, num_before: int) -> None:
    spectrum, options = [3.0, *INNER, -1.0], {"lr": 0.1, "momentum": 0.9}
    straight, resumed = (ExponentTracker(end, seed=5) for _ in range(2))
    measured(straight, spectrum, num_before, **options)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        assert measured(straight, spectrum, **options) == measured(resumed, spectrum, **options)


def test_exponents_have_random_numbers_of_their_own() -> None:
    before = rng_state()
    one = measured(ExponentTracker("both", seed=3), [3.0, *INNER], lr=0.1)
    assert rng_state() == before
    torch.manual_seed(99)
    assert measured(ExponentTracker("both", seed=3), [3.0, *INNER], lr=0.1) == one
    assert measured(ExponentTracker("both", seed=4), [3.0, *INNER], lr=0.1) != one


def test_the_length_of_the_perturbation_is_that_in_which_curvature_is_smoothed() -> None:
    """Of |q|**3 the curvature over a distance grows with the distance."""
    here = torch.zeros(3, dtype=torch.float64)
    found = [
        ExponentTracker(delta_q=delta_q).measure(lambda q: 3 * q * torch.linalg.vector_norm(q), here)
        for delta_q in (0.1, 0.2)
    ]
    assert [result.lambda_max for result in found if result is not None] == pytest.approx([0.3, 0.6])
