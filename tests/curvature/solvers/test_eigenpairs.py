"""What eigenpairs tell of themselves, from their values alone."""

import pytest
import torch

from lyapunov_lightning.curvature import Eigenpairs


def pairs(values: list[float], num_largest: int) -> Eigenpairs:
    count = len(values)
    zeros = torch.zeros(count)
    return Eigenpairs(
        values=torch.tensor(values, dtype=torch.float64),
        vectors=torch.eye(count, 5),
        residuals=zeros,
        value_errors=zeros,
        missed_probability=zeros,
        converged=zeros == 0,
        num_matvecs=7,
        num_largest=num_largest,
        start=torch.zeros(5),
    )


def test_the_ends_are_apart():
    found = pairs([3.0, 1.0, -2.0], num_largest=2)
    assert found.largest.tolist() == [3.0, 1.0]
    assert found.smallest.tolist() == [-2.0]


@pytest.mark.parametrize(
    ("values", "share"), [([3.0, -1.0], 0.25), ([-1.0, -3.0], 1.0), ([2.0, 1.0], 0.0), ([0.0, 0.0], 0.0), ([], 0.0)]
)
def test_the_negative_mass_is_a_share_of_the_moduli(values, share):
    assert pairs(values, 1).negative_mass == pytest.approx(share)
