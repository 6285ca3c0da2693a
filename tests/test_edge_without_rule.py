"""What the documentation says of optimizers without a known limit: how far they step, and where their ratio settles."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from examples.edge_without_rule import OPTIMIZERS, MatrixMuon, median
from lyapunov_lightning import CurvatureProbe
from lyapunov_lightning.curvature.errors import CurvatureWarning
from tests.modules import MemoryLogger, SmallRegressor, regression_loader
from tests.training_runs import train

Make = Callable[..., torch.optim.Optimizer]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_as_long_whatever_the_size_of_the_gradient(name: str) -> None:
    make, _ = OPTIMIZERS[name]
    lengths = []
    for scale in (1.0, 1e-3):
        weight = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
        optimizer = make([weight, torch.nn.Parameter(torch.ones(2))], lr=0.01)
        generator = torch.Generator().manual_seed(0)
        before = weight.detach().clone()
        for _ in range(3):
            weight.grad = scale * torch.randn(4, 3, generator=generator, dtype=torch.float64)
            optimizer.step()
        lengths.append(float((weight - before).norm()))
    assert lengths[1] == pytest.approx(lengths[0], rel=2e-2)


def ratios(make: Make, lr: float) -> list[float | None]:
    """The stability ratios of gradient descent on all samples of a quadratic, in a training of 120 steps."""
    torch.manual_seed(0)
    probe = CurvatureProbe(4)
    with pytest.warns(CurvatureWarning, match="the stability limit of .* is not known"):
        train(
            SmallRegressor(optimizer=partial(make, lr=lr), linear=True),
            probe,
            loader=regression_loader(batch_size=48),
            max_steps=120,
            logger=MemoryLogger(),
        )
    assert all(result.stability_limit is None for result in probe.results)
    return [result.stability_ratio for result in probe.results]


@pytest.mark.parametrize("name", ["Muon", "Lion"])
def test_steps_of_a_fixed_length_end_at_a_ratio_of_one_at_either_of_two_rates(name: str) -> None:
    """On a quadratic too, whose curvature cannot follow the rate: the gradient shrinks, and the step does not."""
    make, _ = OPTIMIZERS[name]
    small, large = ratios(make, 0.08), ratios(make, 0.3)
    assert median(small[1:4]) < 0.3
    for found in (small, large):
        assert median(found[-10:]) == pytest.approx(1, abs=0.3)


def test_muon_takes_the_matrices_and_sgd_the_rest() -> None:
    weight, bias = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3))
    optimizer = MatrixMuon([weight, bias], lr=0.1)
    weight.grad, bias.grad = torch.ones(3, 2), torch.full((3,), 2.0)
    optimizer.step()
    assert bias.tolist() == pytest.approx([0.8] * 3)
    # A matrix of rank one, made orthogonal: its one singular value is about 1, whatever it was.
    assert float(torch.linalg.matrix_norm(weight - 1, 2)) == pytest.approx(0.1, rel=0.8)
