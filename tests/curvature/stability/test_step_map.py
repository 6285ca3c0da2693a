"""The limit of a step's map against the growth of its second moments, computed as a matrix."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lyapunov_lightning.curvature.stability import StepMap

shares = st.floats(0.02, 1.0)


def growth(map: StepMap, sharpness: float, agreement: float) -> float:
    """By how much the second moments of ``(x, v)`` grow in a step on batches of two curvatures, 0 and ``sharpness``.

    Of these a share of `agreement` has the curvature: then ``E[h²] / E[h]`` is the sharpness, and ``E[h]² / E[h²]`` the
    agreement.
    """

    def step(curvature: float) -> np.ndarray:
        return np.array([[map.kept - map.now * curvature, -1.0], [map.later * curvature, map.memory]])

    steep, flat = step(sharpness), step(0.0)
    mean = agreement * np.kron(steep, steep) + (1 - agreement) * np.kron(flat, flat)
    return float(abs(np.linalg.eigvals(mean)).max())


@given(
    now=st.floats(0.05, 2.0),
    passed_on=st.floats(0.0, 1.0),
    memory=st.floats(0.0, 0.98),
    kept=st.floats(0.7, 1.0),
    agreement=shares,
)
def test_second_moments_decay_below_the_limit_and_grow_above_it(now, passed_on, memory, kept, agreement):
    map = StepMap(now, passed_on * memory * now, memory, kept)
    limit = map.limit(agreement)
    assume(1e-3 < limit < 1e4)
    assert growth(map, 0.999 * limit, agreement) < 1
    assert growth(map, 1.001 * limit, agreement) > 1


@given(rate=st.floats(1e-6, 1e3), momentum=st.floats(0.0, 0.99), agreement=shares)
def test_the_limit_is_in_inverse_proportion_to_the_rate(rate, momentum, agreement):
    unit = StepMap(1.0, momentum, momentum).limit(agreement)
    assert StepMap(rate, rate * momentum, momentum).limit(agreement) == pytest.approx(unit / rate, rel=1e-6)


@pytest.mark.parametrize("momentum", [5e-324, 1e-310, 1e-100, 1e-30])
def test_a_momentum_of_next_to_nothing_does_not_move_the_limit(momentum):
    assert StepMap(0.5, 0.5 * momentum, momentum).limit(0.5) == pytest.approx(4)
    assert StepMap(0.5, 0.0, momentum).limit(0.5) == pytest.approx(4)


def test_a_step_uphill_or_of_no_length_has_no_limit():
    assert StepMap(0.0).limit(0.5) == math.inf
    assert StepMap(-0.1).limit(1.0) == math.inf
