"""The operator of several ranks is that of one with the data of all, and a rank that fails leaves none waiting."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lyapunov_lightning.training.distributed import any_rank, failing_together, sum_over_ranks
from tests.distributed import operator_runs as runs
from tests.distributed.references import same, union_of

# On the union.


@pytest.mark.parametrize("method", runs.METHODS)
@pytest.mark.parametrize("dtype", runs.DTYPES)
@pytest.mark.parametrize("kind", runs.SHARDS)
def test_operator_on_shards_is_that_of_their_union(outcomes, kind, dtype, method):
    first = outcomes("operator")[0][kind, dtype, method]
    batches = [batch for shard in runs.shards(kind, torch.float64) for batch in shard]
    exact = runs.measured(runs.of_network([union_of(batches)], method="double_backward"))  # no weights come in
    rtol = {"float64": 1e-11, "float32": 1e-5}[dtype]
    for name in first:
        expected = exact[name]
        if method == "finite_difference" and "product" in name:
            rtol = {"float64": 1e-7, "float32": 5e-2}[dtype]  # smoothed over the step of this dtype
        assert (first[name].double() - expected).norm() <= rtol * expected.norm(), name


@pytest.mark.parametrize("dtype", runs.DTYPES)
@pytest.mark.parametrize("kind", runs.SHARDS)
def test_operator_on_shards_is_the_same_bit_by_bit_on_all_ranks(outcomes, kind, dtype):
    for method in runs.METHODS:
        first, second = (outcome[kind, dtype, method] for outcome in outcomes("operator"))
        assert same(first, second), method


@pytest.mark.parametrize("dtype", runs.DTYPES)
def test_finite_differences_on_shards_are_those_on_their_union(outcomes, dtype):
    batches = [batch for shard in runs.shards("unequal", runs.DTYPES[dtype]) for batch in shard]
    operator = runs.of_network(batches, runs.DTYPES[dtype], method="finite_difference")
    expected = runs.measured(operator)["product"]
    product = outcomes("operator")[0]["unequal", dtype, "finite_difference"]["product"]
    assert (product - expected).norm() <= {"float64": 1e-8, "float32": 1e-5}[dtype] * expected.norm()


@pytest.mark.parametrize("kind", runs.SHARDS)
def test_a_line_is_evaluated_on_the_union_with_one_collective(outcomes, kind):
    first, second = (outcome[kind] for outcome in outcomes("values_along_a_line"))
    assert same(first["values"], second["values"])
    assert [name for name, _ in first["calls"]] == ["all_reduce"]
    net = runs.small_network()
    start = nn.utils.parameters_to_vector(net.parameters()).detach()
    inputs, labels = union_of([batch for shard in runs.shards(kind, torch.float64) for batch in shard])
    for distance, value in zip(runs.LINE, first["values"].tolist(), strict=True):
        nn.utils.vector_to_parameters(start + distance, net.parameters())
        expected = nn.functional.cross_entropy(net(inputs), labels).detach()
        assert value == pytest.approx(float(expected), rel=1e-13)


# Collectives.


def test_a_product_is_one_flat_collective(outcomes):
    size = sum(parameter.numel() for parameter in runs.small_network().parameters())
    for found in outcomes("collectives"):
        assert [length == size + 3 for _, length in found["lanczos"]].count(True) == found["products"] > 0
        for what, calls in found["of one operation"].items():
            if what == "first finite_difference":  # before which the step is found
                assert len(calls) > 10
                calls = calls[-1:]
            assert [name for name, _ in calls] == ["all_reduce"], what
            assert size <= calls[0][1] <= size + 8, what


def test_a_single_rank_has_no_collectives():
    alone = SimpleNamespace(world_size=1)
    assert sum_over_ranks(alone) is None
    assert any_rank(alone, True)
    assert not any_rank(alone, False)
    with failing_together(alone):
        pass
    with pytest.raises(ZeroDivisionError), failing_together(alone):
        _ = 1 / 0


@pytest.mark.parametrize("where", runs.RANKS)
def test_all_ranks_know_what_is_the_case_on_one(outcomes, where):
    assert [outcome["any"][where] for outcome in outcomes("together")] == [bool(runs.RANKS[where])] * 2


@pytest.mark.parametrize("where", runs.RANKS)
def test_what_fails_on_one_rank_fails_on_all(outcomes, where):
    for rank, outcome in enumerate(outcomes("together")):
        told = outcome["failing"][where]
        if rank in runs.RANKS[where]:
            assert told == "PlannedError: planned"
        elif runs.RANKS[where]:
            assert told.startswith("PeerFailureError: ")
        else:
            assert told == "nothing"


# Failures.


@pytest.mark.parametrize("what", runs.OPERATIONS)
@pytest.mark.parametrize("fault", runs.FAULTS)
@pytest.mark.parametrize("method", runs.METHODS)
def test_a_failing_rank_keeps_its_error_and_the_other_learns_of_it(outcomes, method, fault, what):
    (other, after_other), (own, after_own) = (outcome[method, fault, what] for outcome in outcomes("failing_loss"))
    assert re.match("PeerFailureError: .*1 other", other)
    assert re.match(
        "PlannedError: planned" if fault not in ("not-a-scalar", "not-a-tensor") else "MeasurementError", own
    )
    assert torch.equal(after_other, after_own)  # both are in step again
    assert after_own.isfinite().all()
    assert after_own.any()


def test_without_a_batch_anywhere_every_rank_is_told(outcomes):
    assert all(re.match("MeasurementError: No rank has a batch", told) for told in outcomes("no_batches"))
