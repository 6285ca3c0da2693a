"""What one rank has to tell the others with the sum of its products: failures, and that a step has to be found first.

How products are computed, and what is done where PyTorch lacks a derivative, is tested with the operators, in
``tests/curvature/operators``; ranks that are real processes are in ``tests/distributed``.
"""

from typing import Any

import pytest
import torch

from lyapunov_lightning.curvature.errors import MeasurementError, PeerFailureError
from lyapunov_lightning.curvature.loss.fixed_batches import FixedBatches, Total
from lyapunov_lightning.curvature.loss.substitution import SubstitutedLoss
from lyapunov_lightning.curvature.vectors.ranks import Ranks
from lyapunov_lightning.curvature.vectors.space import VectorSpace
from tests.curvature.vectors.test_ranks import COUNT, PlannedError, on_all_ranks

SIZE = 5


def batches_of(ranks: Ranks) -> FixedBatches:
    loss = SubstitutedLoss(lambda batch: batch.sum(), [])
    space = VectorSpace(SIZE, torch.float32, torch.device("cpu"), ranks)
    return FixedBatches(loss, [torch.ones(1)], space, ranks=ranks)


@pytest.mark.parametrize("flagged", [set(), {1}, {0, 2}, {0, 1, 2}], ids=str)
def test_a_flag_of_one_rank_is_seen_by_all_in_the_message_of_the_sum(flagged: set[int]) -> None:
    def run(rank: int, ranks: Ranks) -> Total:
        with batches_of(ranks).mean(SIZE) as total:
            total.is_flagged = rank in flagged
            total.add(torch.full((SIZE,), float(rank)), 1.0 + rank)
        return total

    outcomes, network = on_all_ranks(run)
    assert [total.is_flagged for total in outcomes] == [bool(flagged)] * COUNT
    assert network.lengths == [[SIZE + 3]] * COUNT
    if not flagged:  # (1 * 0 + 2 * 1 + 3 * 2) / 6
        assert all(torch.allclose(total.sum, torch.full((SIZE,), 8 / 6)) for total in outcomes)


def test_a_product_that_is_not_finite_is_no_flag() -> None:
    """NaN of one rank's loss is the solvers' to report, and no reason for the others to do anything else."""

    def run(rank: int, ranks: Ranks) -> Total:
        with batches_of(ranks).mean(SIZE) as total:
            total.add(torch.full((SIZE,), float("nan") if rank == 1 else 1.0), 1.0)
        return total

    outcomes, network = on_all_ranks(run)
    assert not any(total.is_flagged for total in outcomes)
    assert all(total.sum.isnan().all() for total in outcomes)
    assert network.lengths == [[SIZE + 3]] * COUNT


def test_a_rank_that_fails_is_neither_flagged_nor_part_of_the_mean() -> None:
    def run(rank: int, ranks: Ranks) -> Any:
        with batches_of(ranks).mean(SIZE) as total:
            total.is_flagged = rank == 0
            if rank == 1:
                raise PlannedError
            total.add(torch.ones(SIZE), 1.0)
        return total

    outcomes, _ = on_all_ranks(run)
    assert [type(outcome) for outcome in outcomes] == [PeerFailureError, PlannedError, PeerFailureError]


def test_without_a_batch_anywhere_there_is_no_mean() -> None:
    def run(rank: int, ranks: Ranks) -> Any:
        with batches_of(ranks).mean(SIZE):
            pass

    outcomes, _ = on_all_ranks(run)
    assert [type(outcome) for outcome in outcomes] == [MeasurementError] * COUNT
