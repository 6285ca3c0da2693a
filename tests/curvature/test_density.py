"""Estimates over the whole spectrum, against the dense one."""

import math

import pytest
import torch
from torch import Tensor

from lyapunov_lightning.curvature import Estimate, lanczos, spectral_density, stochastic_moments
from tests.curvature.helpers import DenseOperator


@pytest.fixture(scope="module")
def matrix() -> Tensor:
    """Three outliers and a bulk of both signs, as Hessians of networks have them."""
    generator = torch.Generator().manual_seed(0)
    bulk = 0.2 * torch.rand(397, generator=generator, dtype=torch.float64).log().neg() - 0.1
    values = torch.cat([torch.tensor([50.0, 30.0, 10.0], dtype=torch.float64), bulk])
    q = torch.linalg.qr(torch.randn(400, 400, generator=generator, dtype=torch.float64)).Q
    return q @ torch.diag(values) @ q.T


@pytest.mark.parametrize("known", [0, 5])
def test_intervals_cover_trace_and_norm_in_90_of_100_seeds(matrix: Tensor, known: int) -> None:
    pairs = lanczos(DenseOperator(matrix), largest=known) if known else None
    covered = {"trace": 0, "norm": 0}
    for seed in range(100):
        moments = stochastic_moments(DenseOperator(matrix), num_probes=20, known=pairs, seed=seed)
        for name, estimate, value in (
            ("trace", moments.trace, float(matrix.trace())),
            ("norm", moments.frobenius_norm, float(matrix.norm())),
        ):
            low, high = estimate.interval
            covered[name] += low <= value <= high
        assert moments.num_matvecs == 20
    assert min(covered.values()) >= 90, covered


def test_known_eigenpairs_reduce_the_error_by_much(matrix: Tensor) -> None:
    pairs = lanczos(DenseOperator(matrix), largest=3)
    blind = stochastic_moments(DenseOperator(matrix)).trace.standard_error
    assert stochastic_moments(DenseOperator(matrix), known=pairs).trace.standard_error < 0.1 * blind


@pytest.mark.parametrize("known", [0, 5])
def test_density_integrates_to_one_and_has_the_dense_moments(matrix: Tensor, known: int) -> None:
    pairs = lanczos(DenseOperator(matrix), largest=known, smallest=2) if known else None
    density = spectral_density(DenseOperator(matrix), num_probes=20, num_steps=30, known=pairs)
    grid, curve = density.curve()
    assert float(torch.trapezoid(curve, grid)) == pytest.approx(1, abs=1e-3)
    values = torch.linalg.eigvalsh(matrix)
    for order in (1, 2, 3, 4):
        moment = density.moment(order)
        assert abs(moment.value - float((values**order).mean())) <= 3 * moment.standard_error
    if known:
        share = float((-values).clamp_min(0).sum() / values.abs().sum())
        assert density.negative_mass() == pytest.approx(share, rel=0.15)


def test_as_many_steps_as_dimensions_give_the_spectral_measure_itself() -> None:
    values = torch.tensor([3.0, 1.0, -2.0], dtype=torch.float64)
    density = spectral_density(DenseOperator(torch.diag(values)), num_probes=2, num_steps=10)
    assert density.nodes.sort(dim=1).values[0].tolist() == pytest.approx([-2, 1, 3])
    assert density.weights.sum(dim=1).tolist() == pytest.approx([1, 1])


def test_all_eigenpairs_known_leave_nothing_to_chance() -> None:
    matrix = torch.diag(torch.tensor([4.0, 1.0, -2.0], dtype=torch.float64))
    pairs = lanczos(DenseOperator(matrix), largest=3)
    density = spectral_density(DenseOperator(matrix), known=pairs)
    assert density.num_matvecs == 0
    assert density.moment(1).value == pytest.approx(1)
    assert density.negative_mass() == pytest.approx(2 / 7)


@pytest.mark.parametrize("count", [2, 5, 18, 30])
def test_intervals_are_those_of_students_t(count: int) -> None:
    from scipy.stats import t

    low, high = Estimate(1.0, 0.5, count).interval
    assert (high - low) / 2 == pytest.approx(0.5 * float(t.ppf(0.975, count - 1)), rel=5e-3)


def test_bad_arguments_are_named(matrix: Tensor) -> None:
    with pytest.raises(ValueError, match="`num_probes` should be an int of at least 2, got 1"):
        stochastic_moments(DenseOperator(matrix), num_probes=1)
    with pytest.raises(ValueError, match="`num_steps` should be a positive int, got 0"):
        spectral_density(DenseOperator(matrix), num_steps=0)
    assert math.isnan(Estimate(1.0, math.nan, 1).interval[0])
