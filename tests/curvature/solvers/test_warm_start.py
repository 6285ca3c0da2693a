"""A warm start is the given direction, with a tenth of everything else."""

import pytest
import torch

from lyapunov_lightning.curvature.solvers.warm_start import with_noise
from lyapunov_lightning.curvature.vectors.space import VectorSpace

SPACE = VectorSpace(4, torch.float64, torch.device("cpu"))
NOISE = torch.tensor([0.0, 3.0, 0.0, 4.0], dtype=torch.float64)


def test_the_noise_has_a_tenth_of_the_norm_whatever_both_norms_were() -> None:
    for factor in (1e-9, 1.0, 1e9):
        start = with_noise(SPACE, torch.tensor([2 * factor, 0, 0, 0], dtype=torch.float64), NOISE * factor)
        assert start.tolist() == pytest.approx([1, 0.06, 0, 0.08])


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_direction_that_is_none_is_replaced_by_the_noise(value: float) -> None:
    assert torch.equal(with_noise(SPACE, torch.full((4,), value, dtype=torch.float64), NOISE), NOISE)
