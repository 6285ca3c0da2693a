"""A vector is scaled by one factor within a subspace and by another one across it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyapunov_lightning.curvature.acting.projection import scaled_in_subspace


@given(
    size=st.integers(1, 12),
    share=st.floats(0, 1),
    inside=st.floats(-3, 3),
    outside=st.floats(-3, 3),
    seed=st.integers(0, 1000),
    is_shifted=st.booleans(),
)
def test_it_is_the_formula_with_a_dense_projector(
    size: int, share: float, inside: float, outside: float, seed: int, is_shifted: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = max(1, round(share * size))
    rows = torch.linalg.qr(torch.randn(size, k, generator=generator, dtype=torch.float64)).Q.T
    vector, shift = torch.randn(2, size, generator=generator, dtype=torch.float64)
    projector = rows.T @ rows
    factors = inside * projector + outside * (torch.eye(size, dtype=torch.float64) - projector)
    whole = vector + shift if is_shifted else vector
    expected = factors @ whole - (shift if is_shifted else 0)
    scaled, removed = scaled_in_subspace(
        vector, rows, inside=inside, outside=outside, shift=shift if is_shifted else None
    )
    torch.testing.assert_close(scaled, expected, rtol=1e-9, atol=1e-9)
    share_removed = float((whole - factors @ whole).square().sum() / whole.square().sum())
    assert float(removed) == pytest.approx(share_removed, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("is_shifted", [False, True])
def test_what_is_not_finite_stays_as_it_is(value: float, is_shifted: bool) -> None:
    vector = torch.tensor([0.1, value, 0.3])
    rows = torch.ones(1, 3) / math.sqrt(3)
    shift = torch.tensor([1e6, 1.0, 1.0]) if is_shifted else None
    scaled, removed = scaled_in_subspace(vector, rows, inside=0.0, outside=1.0, shift=shift)
    torch.testing.assert_close(scaled, vector, rtol=0, atol=0, equal_nan=True)
    assert not math.isfinite(removed)


def test_arguments_stay_as_they_are_and_zero_has_nothing_to_remove() -> None:
    vector, shift, rows = torch.ones(3), torch.ones(3), torch.eye(3)[:1]
    scaled_in_subspace(vector, rows, inside=0.0, outside=0.5, shift=shift)
    assert torch.equal(vector, torch.ones(3))
    assert torch.equal(shift, torch.ones(3))
    scaled, removed = scaled_in_subspace(torch.zeros(3), rows, inside=0.0, outside=0.5)
    assert torch.equal(scaled, torch.zeros(3))
    assert float(removed) == 0
