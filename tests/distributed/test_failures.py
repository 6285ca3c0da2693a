"""Where one rank fails or disagrees, all take the same way, the training goes on, and each rank says what it knows."""

import re

import pytest
import torch

from tests.distributed import failure_runs as runs
from tests.distributed.models import STEPS
from tests.distributed.references import same

KINDS = ["lanczos", "power", "lyapunov", "scan"]


def converged(outcome, group):
    return [logged[f"{group}_details/converged"] for _, logged in outcome["logged"]]


def assert_failed_once(outcomes, group):
    """At one step, on all ranks, and not again."""
    first, second = outcomes
    assert same(first["logged"], second["logged"])
    assert same(first["parameters"], second["parameters"])
    steps = [step for step in range(STEPS) if step != runs.FAILING_STEP]
    for outcome in outcomes:
        assert [result.step for result in outcome["results"]] == steps
        flags = converged(outcome, group)
        assert len(flags) == STEPS
        assert flags[runs.FAILING_STEP] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_measurements_go_on_when_one_rank_cannot_measure(outcomes, kind):
    found = [outcome[kind] for outcome in outcomes("failing_measurements")]
    assert_failed_once(found, "scan" if kind == "scan" else "curvature")
    if kind == "lanczos":  # a single iteration of the others need not meet the tolerance
        assert converged(found[0], "curvature") == [1, 0, 1, 1]
    for outcome in outcomes("failing_measurements"):
        assert torch.equal(outcome[kind]["parameters"][-1], outcome["without"])


@pytest.mark.parametrize("kind", KINDS)
def test_users_are_told_once_where_and_why_a_measurement_failed(outcomes, kind):
    first, second = (outcome[kind]["warned"] for outcome in outcomes("failing_measurements"))
    assert len(first) == 1
    assert re.search("at step 1 failed.*PeerFailureError.*other", first[0])
    assert len(second) == 1, "the rank that failed says nothing, and no other rank knows why"
    assert re.search("at step 1 failed.*PlannedError.*planned", second[0])


@pytest.mark.parametrize(
    ("part", "group", "rank"),
    [("objective", "curvature", 1), ("after the search", "spectrum", 1)],
)
def test_what_only_one_rank_does_fails_on_all(outcomes, part, group, rank):
    found = [outcome[part] for outcome in outcomes("failing_parts")]
    assert_failed_once(found, group)
    assert len(found[rank]["warned"]) == 1
    assert "PlannedError" in found[rank]["warned"][0]


def test_a_file_that_the_first_rank_cannot_write_costs_no_measurement_and_is_written_later(outcomes):
    first, second = (outcome["files"] for outcome in outcomes("failing_parts"))
    assert same(first["logged"], second["logged"])
    assert same(first["parameters"], second["parameters"])
    assert converged(first, "spectrum") == [1] * STEPS
    assert first["written"] == STEPS
    assert len(first["warned"]) == 1
    assert "PlannedError" in first["warned"][0]
    assert not second["warned"]


def test_share_of_the_time_is_decided_by_the_first_rank_for_all(outcomes):
    first, second = outcomes("share_of_the_time")
    assert first == second
    assert first["only-first-can-afford-all"] == [0, *range(5, runs.TIMED_STEPS)]
    assert first["only-second-can-afford-all"] == [0, 5]
    some = first["first-can-afford-some"]
    assert some[0] == 0
    cost = runs.PACES["first-can-afford-some"][0][1]  # where a step takes 1
    assert 2 <= len(some) <= runs.SHARE * runs.TIMED_STEPS / cost


def test_batchnorm_that_is_to_be_synchronised_is_refused_before_training(outcomes):
    for told in outcomes("synchronised_batchnorm"):
        assert re.match(r"MisconfigurationException: `CurvatureProbe`.*SyncBatchNorm", told)
