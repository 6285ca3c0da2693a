"""The fixed data of a distributed run are those that each rank's own loader gives, and all ranks have them or none."""

import re

import pytest
import torch
from torch.utils.data import DistributedSampler

from tests.distributed import data_runs as runs
from tests.distributed.references import dense_hessian, same, union_of


def assert_measured_on(batches, outcomes):
    """All ranks logged the same, which is the curvature on the union of these batches."""
    first, second = outcomes
    assert same(first["logged"], second["logged"])
    assert same(first["parameters"], second["parameters"])
    for result in first["results"]:
        values = torch.linalg.eigvalsh(dense_hessian(first["parameters"][result.step], union_of(batches)))
        assert result.converged
        assert result.lambda_max == pytest.approx(float(values[-1]), rel=1e-9)
        assert result.lambda_min == pytest.approx(float(values[0]), rel=1e-9)


def fixed_batches(outcome):
    """What a rank measured on, the same every time."""
    first = outcome["measured"][0]
    assert all(same(first, again) for again in outcome["measured"])
    return first


@pytest.mark.parametrize("share", runs.FRACTIONS)
def test_fixed_data_are_the_first_batches_of_each_ranks_sampler(outcomes, share):
    found = [outcome[share] for outcome in outcomes("sampled")]
    inputs = runs.regression(runs.NUM_SAMPLES).tensors[0]
    batches = []
    for rank, outcome in enumerate(found):
        sampler = DistributedSampler(range(runs.NUM_SAMPLES), len(found), rank, shuffle=True, seed=0)
        expected = torch.tensor(list(sampler)).split(runs.BATCH)[: round(6 * runs.FRACTIONS[share])]
        mine = fixed_batches(outcome)
        assert [len(batch[0]) for batch in mine] == list(map(len, expected))
        assert all(torch.equal(batch[0], inputs[indices]) for batch, indices in zip(mine, expected, strict=True))
        batches += mine
    assert [result.step for result in found[0]["results"]] == [0, 2]
    assert_measured_on(batches, found)


@pytest.mark.parametrize("shards", runs.RAGGED)
def test_unequal_shards_of_the_fixed_data_are_weighted_by_their_samples(outcomes, shards):
    found = [outcome[shards] for outcome in outcomes("ragged")]
    per_rank = [fixed_batches(outcome) for outcome in found]
    sizes = [[len(inputs) for inputs, _ in batches] for batches in per_rank]
    assert sizes == {"equal counts": [[5, 5, 2], [3, 3, 3]], "unequal counts": [[5, 5, 5], [2, 2]]}[shards]
    assert [result.step for result in found[0]["results"]] == [0, 1]
    assert_measured_on([batch for batches in per_rank for batch in batches], found)


CANNOT = {"broken on the last": 1, "broken on the first": 0, "a stream on the last": 1}


@pytest.mark.parametrize("case", CANNOT)
def test_all_ranks_keep_passing_batches_where_one_cannot_draw(outcomes, case):
    found = [outcome[case] for outcome in outcomes("not_drawn")]
    for outcome in found:
        assert same(fixed_batches(outcome), outcome["batches"][:2])
    assert [result.step for result in found[0]["results"]] == [1, 2, 3]  # once they are complete
    assert_measured_on([batch for outcome in found for batch in outcome["batches"][:2]], found)


@pytest.mark.parametrize("case", CANNOT)
def test_the_training_does_not_notice_that_its_data_could_not_be_drawn(outcomes, case):
    for outcome in outcomes("not_drawn"):
        expected = torch.cat([value.reshape(-1) for value in outcome["without"].values()])
        assert torch.equal(outcome[case]["parameters"][-1], expected)


@pytest.mark.parametrize("case", CANNOT)
def test_the_first_rank_says_that_batches_are_kept(outcomes, case):
    first, second = (outcome[case]["warned"] for outcome in outcomes("not_drawn"))
    assert len(first) == 1
    cause = "of another rank cannot be read" if CANNOT[case] else "PlannedError: planned"
    assert re.search(f"first 2 batches of this training.*{cause}", first[0])
    assert not second


def test_no_checkpoint_has_the_batches_of_one_rank_for_all(outcomes):
    assert outcomes("kept") == [None, None]
