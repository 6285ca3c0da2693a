"""The spectral density by stochastic Lanczos quadrature, against the dense spectrum."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lyapunov_lightning.curvature import NonFiniteCurvatureError, SpectralDensity, lanczos, spectral_density
from tests.curvature.helpers import DenseOperator, symmetric_matrix


@pytest.fixture(scope="module")
def matrix() -> Tensor:
    """Three outliers and a bulk of both signs, as Hessians of networks have them."""
    generator = torch.Generator().manual_seed(0)
    bulk = 0.2 * torch.rand(397, generator=generator, dtype=torch.float64).log().neg() - 0.1
    return symmetric_matrix(torch.cat([torch.tensor([50.0, 30.0, 10.0], dtype=torch.float64), bulk]))


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
    assert density.num_matvecs == 20 * 30


def test_as_many_steps_as_dimensions_give_the_spectral_measure_itself() -> None:
    values = torch.tensor([3.0, 1.0, -2.0], dtype=torch.float64)
    density = spectral_density(DenseOperator(torch.diag(values)), num_probes=2, num_steps=10)
    assert density.nodes.sort(dim=1).values[0].tolist() == pytest.approx([-2, 1, 3])
    assert density.weights.sum(dim=1).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("spectrum", [[2.0] * 20, [0.0] * 20, [3.0] * 10 + [-1.0] * 10], ids=["one", "zero", "two"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fewer_distinct_eigenvalues_than_steps_get_all_the_weight(spectrum: list[float], dtype: torch.dtype) -> None:
    matrix = torch.diag(torch.tensor(spectrum, dtype=dtype))
    density = spectral_density(DenseOperator(matrix), num_probes=3, num_steps=15)
    near = (density.nodes[..., None] - torch.tensor(sorted(set(spectrum)))).abs().min(dim=-1).values < 1e-4
    assert float(density.weights[~near].sum()) <= 1e-4
    assert density.weights.sum(dim=1).tolist() == pytest.approx([1] * 3)


def test_all_eigenpairs_known_leave_nothing_to_chance() -> None:
    matrix = torch.diag(torch.tensor([4.0, 1.0, -2.0], dtype=torch.float64))
    pairs = lanczos(DenseOperator(matrix), largest=3)
    density = spectral_density(DenseOperator(matrix), known=pairs)
    assert density.num_matvecs == 0
    assert density.moment(1).value == pytest.approx(1)
    assert density.negative_mass() == pytest.approx(2 / 7)


def test_eigenpairs_that_have_not_converged_do_not_enter(matrix: Tensor) -> None:
    pairs = lanczos(DenseOperator(matrix), largest=3)
    wrong = replace(pairs, values=pairs.values * 2, converged=torch.tensor([True, False, False]))
    wrong.values[0] /= 2
    density = spectral_density(DenseOperator(matrix), num_probes=4, known=wrong)
    assert density.nodes.shape == (4, 1 + 40)
    assert float(density.nodes.max()) == pytest.approx(50)
    assert float(density.nodes[:, 1:].max()) == pytest.approx(30)


@pytest.mark.parametrize("width", [None, 1e-9, 1e-3, 0.03, 0.05, 0.2, 5.0])
@pytest.mark.parametrize("num_points", [50, 1000])
def test_the_curve_integrates_to_one_whatever_its_width(width: float | None, num_points: int) -> None:
    generator = torch.Generator().manual_seed(0)
    nodes = 3 * torch.randn(6, 20, generator=generator, dtype=torch.float64)
    density = SpectralDensity(nodes, torch.full_like(nodes, 1 / 20), 0)
    grid, curve = density.curve(num_points, width)
    assert float(torch.trapezoid(curve, grid)) == pytest.approx(1, abs=1e-6)
    assert float(torch.trapezoid(curve * grid, grid)) == pytest.approx(float(nodes.mean()), abs=float(grid.diff()[0]))
    assert bool((curve >= 0).all())


def test_a_wide_curve_is_the_sum_of_gaussians() -> None:
    density = SpectralDensity(torch.tensor([[0.0, 2.0]]).double(), torch.tensor([[0.25, 0.75]]).double(), 0)
    grid, curve = density.curve(2000, 0.5)
    gaussians = [share * torch.exp(-2 * (grid - node) ** 2) for share, node in ((0.25, 0.0), (0.75, 2.0))]
    torch.testing.assert_close(curve, sum(gaussians) / (0.5 * math.sqrt(2 * math.pi)), atol=1e-5, rtol=0)


def test_bad_arguments_are_named(matrix: Tensor) -> None:
    with pytest.raises(ValueError, match="`num_probes` should be an int of at least 2, got 1"):
        spectral_density(DenseOperator(matrix), num_probes=1)
    with pytest.raises(ValueError, match="`num_steps` should be a positive int, got 0"):
        spectral_density(DenseOperator(matrix), num_steps=0)
    density = SpectralDensity(torch.zeros(2, 2).double(), torch.ones(2, 2).double() / 2, 0)
    with pytest.raises(ValueError, match="`num_points` should be an int of at least 4, got 3"):
        density.curve(3)
    with pytest.raises(ValueError, match=r"`width` should be a positive float, got 0\.0"):
        density.curve(width=0.0)


def test_a_product_that_is_not_finite_is_an_error(matrix: Tensor) -> None:
    with pytest.raises(NonFiniteCurvatureError, match="not finite"):
        spectral_density(DenseOperator(matrix * math.nan))
