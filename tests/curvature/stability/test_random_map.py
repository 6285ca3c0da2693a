"""Both rates of growth on random curvatures against closed forms, against each other, and against real optimizers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lyapunov_lightning.curvature.stability import (
    StepMap,
    almost_sure_edge,
    lyapunov_exponent,
    mean_square_edge,
    mean_square_growth,
    stability_of,
)

SIGMAS = 5
"""Standard errors by which an estimate may be off in hundreds of tests."""

momenta = st.sampled_from([0.0, 0.5, 0.9])


@st.composite
def maps(draw: Any) -> StepMap:
    """Steps whose momentum gives in the next step at most what it would keep of the present one, as all do."""
    now, memory = draw(st.floats(0.05, 2.0)), draw(st.just(0.0) | st.floats(0.01, 0.95))
    return StepMap(now, draw(st.floats(0.0, 1.0)) * memory * now, memory, draw(st.floats(0.8, 1.0)))


@st.composite
def batches(draw: Any) -> tuple[np.ndarray, np.ndarray]:
    """Curvatures of up to four kinds of batches, some of them blind or of negative curvature, and their shares."""
    count = draw(st.integers(1, 4))
    curvatures = draw(st.lists(st.floats(-0.2, 2.0), min_size=count, max_size=count))
    weights = draw(st.lists(st.floats(0.05, 1.0), min_size=count, max_size=count))
    return np.array(curvatures), np.array(weights) / sum(weights)


def heavy_ball(rate: float, momentum: float) -> StepMap:
    return StepMap(rate, rate * momentum, momentum)


def spectral_radius(map: StepMap, curvature: float) -> float:
    step = [[map.kept - map.now * curvature, -1.0], [map.later * curvature, map.memory]]
    return float(np.abs(np.linalg.eigvals(np.array(step))).max())


# One curvature at every step


@settings(max_examples=40, deadline=None)
@given(map=maps(), curvature=st.floats(0.0, 3.0))
def test_both_rates_are_that_of_the_spectral_radius_where_all_curvatures_are_equal(map, curvature):
    expected = math.log(max(spectral_radius(map, curvature), 1e-300))
    assume(expected > -5)
    batches = [curvature, curvature], [0.25, 0.75]
    # A double eigenvalue is split by the root of the rounding, and grows like t times its power.
    assert mean_square_growth(map, *batches) == pytest.approx(expected, abs=1e-3)
    assert lyapunov_exponent(map, *batches, num_steps=1000).value == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_both_edges_of_equal_curvatures_are_the_classical_limit(momentum):
    map = heavy_ball(0.1, momentum)
    classical = (2 + 2 * momentum) / 0.1
    assert mean_square_edge(map, [4.0], [1.0]) == pytest.approx(classical / 4)
    assert almost_sure_edge(map, [4.0], [1.0]) == pytest.approx(classical / 4, rel=1e-2)


# Without momentum the matrices are numbers


@settings(max_examples=25, deadline=None)
@given(now=st.floats(0.05, 2.0), kept=st.floats(0.8, 1.0), batches=batches())
def test_without_momentum_the_runs_that_are_followed_grow_by_the_closed_form(now, kept, batches):
    closed = lyapunov_exponent(StepMap(now, kept=kept), *batches)
    assume(closed.value > -5)
    assert closed.value == pytest.approx(float(batches[1] @ np.log(np.abs(kept - now * batches[0]))))
    assert closed.standard_error == 0
    # What comes with the next step, if it is next to nothing, changes nothing but the way to the exponent.
    followed = lyapunov_exponent(StepMap(now, later=1e-12, kept=kept), *batches, num_steps=500)
    assert followed.value == pytest.approx(closed.value, abs=SIGMAS * followed.standard_error + 1e-2)


def test_a_step_that_may_end_at_exactly_zero_has_no_finite_exponent():
    batches = [0.5, 2.0], [0.9, 0.1]
    assert lyapunov_exponent(StepMap(0.5), *batches) == (-math.inf, 0.0)
    assert mean_square_growth(StepMap(0.5), *batches) == pytest.approx(0.5 * math.log(0.9 * 0.75**2))
    assert mean_square_growth(StepMap(0.5), [2.0], [1.0]) == -math.inf
    # What is left of a momentum that gets nothing is what vanishes last.
    assert lyapunov_exponent(StepMap(0.5, memory=0.5), *batches) == (math.log(0.5), 0.0)
    # Nesterov's step is nilpotent at a curvature of 1/η: two such batches in a row end at 0.
    nesterov = StepMap(1.5, later=0.25, memory=0.5)
    assert lyapunov_exponent(nesterov, [0.5, 1.0], [0.9, 0.1]) == (-math.inf, 0.0)
    assert mean_square_growth(nesterov, [0.5, 1.0], [0.9, 0.1]) > -math.inf


def test_a_curvature_that_never_occurs_does_not_count():
    map = heavy_ball(0.5, 0.9)
    assert lyapunov_exponent(map, [1.0, 0.0, 9.0], [0.5, 0.5, 0.0]) == lyapunov_exponent(map, [1.0, 0.0], [0.5, 0.5])
    assert lyapunov_exponent(StepMap(0.5), [2.0, 1.0], [0.0, 1.0]).value == pytest.approx(math.log(0.5))


def test_edges_of_plain_sgd_have_closed_forms():
    # |1 - s| |1 - 3s| is 1 again at s = 4/3.
    spread = [1.0, 3.0], [0.5, 0.5]
    assert mean_square_edge(StepMap(1.0), *spread) == pytest.approx(2 * 2 / 5)
    assert almost_sure_edge(StepMap(1.0), *spread) == pytest.approx(4 / 3, rel=1e-3)
    # What a batch does not see it leaves as it is: the others decide, and among them there is no spread.
    blind = [0.0, 1.0], [0.9, 0.1]
    assert mean_square_edge(StepMap(0.5), *blind) == pytest.approx(4)
    assert almost_sure_edge(StepMap(0.5), *blind) == pytest.approx(4, rel=1e-3)


# The mean square


@settings(max_examples=40, deadline=None)
@given(map=maps(), batches=batches())
def test_mean_square_growth_is_that_of_the_second_moments_step_by_step(map, batches):
    growth = mean_square_growth(map, *batches)
    assume(growth > -3)
    steps = [np.array([[map.kept - map.now * h, -1.0], [map.later * h, map.memory]]) for h in batches[0]]
    moments, logarithm = np.eye(2), 0.0
    for _ in range(1000):
        moments = sum(share * step @ moments @ step.T for share, step in zip(batches[1], steps, strict=True))
        size = np.trace(moments)
        moments, logarithm = moments / size, logarithm + math.log(size)
    assert growth == pytest.approx(logarithm / 2000, abs=2e-2)


@settings(max_examples=50, deadline=None)
@given(map=maps(), batches=batches())
def test_the_mean_square_grows_from_its_edge_on(map, batches):
    assume(float(batches[0] @ batches[1]) > 0.05)
    edge = mean_square_edge(map, *batches)
    assume(1e-3 < edge < 1e4)
    assert mean_square_growth(map, 0.999 * edge * batches[0], batches[1]) < 0
    assert mean_square_growth(map, 1.001 * edge * batches[0], batches[1]) > 0


# Both


@settings(max_examples=40, deadline=None)
@given(map=maps(), batches=batches())
def test_a_run_never_grows_faster_than_the_mean_square(map, batches):
    exponent = lyapunov_exponent(map, *batches, num_steps=500)
    # The runs have their direction yet to find, and a double eigenvalue never quite does.
    assert exponent.value <= mean_square_growth(map, *batches) + SIGMAS * exponent.standard_error + 1e-2


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    "batches",
    [([0.2, 1.0, 4.0], [0.6, 0.3, 0.1]), ([0.9, 1.1], [0.5, 0.5]), ([-0.5, 0.0, 2.0], [0.1, 0.5, 0.4])],
    ids=["skewed", "alike", "partly-negative"],
)
def test_between_the_edges_the_mean_square_grows_and_almost_every_run_shrinks(momentum, batches):
    map, h, shares = heavy_ball(0.3, momentum), np.array(batches[0]), batches[1]
    first, then = mean_square_edge(map, h, shares), almost_sure_edge(map, h, shares)
    assert first < then
    for scale, mean_grows, run_grows in (
        (0.95 * first, False, False),
        (math.sqrt(first * then), True, False),
        (1.05 * then, True, True),
    ):
        exponent = lyapunov_exponent(map, scale * h, shares, seed=1)
        assert (mean_square_growth(map, scale * h, shares) > 0) == mean_grows
        assert (exponent.value > 0) == run_grows
        assert exponent.value < mean_square_growth(map, scale * h, shares)
    assert lyapunov_exponent(map, 0.95 * then * h, shares, seed=1).value < 0


@pytest.mark.parametrize("agreement", [0.95, 0.5, 0.2])
def test_momentum_sets_the_edges_apart_where_batches_see_one_curvature_or_nothing(agreement):
    map, blind = heavy_ball(1.0, 0.9), ([0.0, 1.0], [1 - agreement, agreement])
    assert mean_square_edge(map, *blind) == pytest.approx(2 * 0.19 / (1.9 - 1.8 * agreement))
    assert 1.5 < almost_sure_edge(map, *blind) / mean_square_edge(map, *blind) < 2


def test_what_has_no_edge():
    assert mean_square_edge(StepMap(-0.1), [1.0], [1.0]) == math.inf
    assert almost_sure_edge(StepMap(-0.1), [1.0], [1.0]) == math.inf
    for edge in (mean_square_edge, almost_sure_edge):  # with a momentum of 1 any noise grows
        assert edge(heavy_ball(0.1, 1.0), [0.0, 1.0], [0.5, 0.5]) == 0
    # Batches that see nothing let the decay do its work, and one in a million that grow do not make up for it.
    assert almost_sure_edge(StepMap(0.1, kept=0.9), [0.0, 1.0], [1 - 1e-6, 1e-6]) == math.inf


# Real optimizers


NEVER = 1 - 1e-15
"""A decay of second moments that keeps them as they are."""


def sgd(x: torch.Tensor, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([x], lr=0.1, **options)


def adamw(x: torch.Tensor) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([x], lr=0.1, betas=(0.9, NEVER), eps=0.0, weight_decay=0.05)
    moments = {"exp_avg": torch.zeros_like(x), "exp_avg_sq": torch.ones_like(x)}
    optimizer.state[x].update({"step": torch.tensor(1e18), **moments})
    return optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda x: sgd(x),
        lambda x: sgd(x, momentum=0.9),
        lambda x: sgd(x, momentum=0.8, nesterov=True),
        lambda x: sgd(x, momentum=0.9, dampening=0.5),
        adamw,
    ],
    ids=["sgd", "momentum", "nesterov", "dampening", "adamw"],
)
def test_runs_of_the_real_optimizer_grow_by_the_exponent(make):
    """500 runs at once, each a coordinate of its own: below both edges, between them and beyond them."""
    shape, shares = np.array([0.2, 1.0, 4.0]), np.array([0.6, 0.3, 0.1])
    x = torch.zeros(500, dtype=torch.float64, requires_grad=True)
    stability = stability_of(make(x), [x])
    assert stability is not None
    ((map, _),) = stability.maps
    edges = [edge(map, shape, shares) for edge in (mean_square_edge, almost_sure_edge)]
    assert edges[1] > 1.3 * edges[0]
    signs = []
    for scale in (0.7 * edges[0], math.sqrt(edges[0] * edges[1]), 1.5 * edges[1]):
        curvatures = scale * shape
        optimizer = make(x)
        torch.nn.init.constant_(x, 1e-50)  # so small that Adam's second moments stay as they are
        generator = torch.Generator().manual_seed(0)
        heights = []
        for step in range(401):
            if step in (100, 400):
                heights.append(x.detach().abs().log())
            drawn = torch.multinomial(torch.from_numpy(shares), len(x), replacement=True, generator=generator)
            x.grad = torch.from_numpy(curvatures)[drawn] * x.detach()
            optimizer.step()
        growth = (heights[1] - heights[0]) / 300
        exponent = lyapunov_exponent(map, curvatures, shares)
        error = math.hypot(exponent.standard_error, float(growth.std()) / math.sqrt(len(x)))
        assert float(growth.mean()) == pytest.approx(exponent.value, abs=SIGMAS * error)
        assert error < 1e-2
        signs.append((mean_square_growth(map, curvatures, shares) > 0, float(growth.median()) > 0))
    assert signs == [(False, False), (True, False), (True, True)]


# Bad input


@pytest.mark.parametrize(
    ("curvatures", "probabilities", "said"),
    [
        ([1.0, 2.0], [1.0], "one for each"),
        (1.0, 1.0, "one for each"),
        ([math.nan], [1.0], "finite"),
        ([1.0, 2.0], [0.5, 0.4], "add up to 1"),
        ([1.0, 2.0], [1.5, -0.5], "add up to 1"),
        ([1.0], [math.nan], "add up to 1"),
    ],
)
def test_what_is_no_distribution_is_refused(curvatures, probabilities, said):
    for function in (mean_square_growth, lyapunov_exponent, mean_square_edge, almost_sure_edge):
        with pytest.raises(ValueError, match=said):
            function(StepMap(0.1), curvatures, probabilities)


def test_edges_are_those_of_curvatures_that_are_positive_on_average():
    for edge in (mean_square_edge, almost_sure_edge):
        with pytest.raises(ValueError, match="positive on average"):
            edge(StepMap(0.1), [1.0, -1.0], [0.5, 0.5])
