"""What callbacks do to a training is the same on every rank, from what was measured on all, or is not done at all."""

import re

import pytest
import torch

from tests.distributed import acting_runs as runs
from tests.distributed.references import dense_hessian, gradient_at, on_the_step, same, union_of


def assert_same_everywhere(outcomes):
    for part in ("logged", "results", "state", "parameters"):
        assert same(outcomes[0][part], outcomes[1][part]), part


def assert_told_once(outcomes):
    """Of a measurement that failed on the last rank."""
    first, second = (outcome["warned"] for outcome in outcomes)
    assert re.search("PeerFailureError.*1 other", first[0])
    assert re.search("PlannedError.*planned", second[0])
    assert len(first) == len(second) == 1


# Moves along the most negative direction.


@pytest.mark.parametrize("run", ["lanczos", "online", "failing"])
def test_descent_is_identical_on_all_ranks(outcomes, run):
    found = [outcome[run] for outcome in outcomes("descent")]
    assert_same_everywhere(found)
    moved = {result.step for result in found[0]["results"] if result.descent_step}
    assert len(moved) >= (1 if run == "online" else 3)
    if run == "failing":
        assert moved == {0, 1, 3}
        assert_told_once(found)


def test_descent_is_along_the_gradient_and_direction_of_the_batches_of_all_ranks(outcomes):
    for result, parameters, batches in on_the_step([outcome["lanczos"] for outcome in outcomes("descent")]):
        batch = union_of(batches)
        values, vectors = torch.linalg.eigh(dense_hessian(parameters, batch))
        slope = abs(float(vectors[:, 0] @ gradient_at(parameters, batch)))
        expected = min(runs.DESCENT.lr * slope, runs.DESCENT.max_step) if values[0] < 0 else 0.0
        assert abs(result.descent_step) == pytest.approx(expected, rel=1e-4)


# Learning rates.


@pytest.mark.parametrize("run", ["along_update", "inverse_sharpness", "failing"])
def test_controlled_learning_rates_are_identical_on_all_ranks(outcomes, run):
    found = [outcome[run] for outcome in outcomes("controlled")]
    assert_same_everywhere(found)
    converged = [logged["quasi_newton_details/converged"] for _, logged in found[0]["logged"]]
    assert converged == ([1, 1, 0, 1] if run == "failing" else [1] * 4)
    if run == "failing":
        assert_told_once(found)


def test_controlled_learning_rate_is_that_of_the_batches_of_all_ranks(outcomes):
    """The step is the clipped mean of both gradients; slope and curvature are those of the union of both batches."""
    found = [outcome["along_update"] for outcome in outcomes("controlled")]
    last, lr = None, 0.0
    for result, start, batches in on_the_step(found):
        update = -sum(gradient_at(start, batch) for batch in batches) / 2
        update *= min(1.0, runs.CLIP / float(update.norm()))
        seen = update if last is None else last  # the first one is seen by its own batch
        gradient, hessian = gradient_at(start, union_of(batches)), dense_hessian(start, union_of(batches))
        curvature = float(seen @ hessian @ seen)
        slope = -float(gradient @ seen)
        slope += lr * abs(curvature)
        assert result.slope_along_update == pytest.approx(slope, rel=1e-3, abs=1e-4)
        assert result.curvature_along_update == pytest.approx(curvature, rel=1e-3, abs=1e-4)
        moved, lr = found[0]["parameters"][result.step + 1] - start, result.learning_rate
        torch.testing.assert_close(moved, lr * update.to(moved), rtol=1e-3, atol=1e-5)
        last = moved.to(update) / lr


def test_a_training_that_one_rank_sees_lost_is_brought_back_on_all(outcomes):
    found = outcomes("brought_back")
    assert_same_everywhere(found)
    assert [result.restored for result in found[0]["results"]] == [0, 0, 0, 1]
    parameters = found[0]["parameters"]
    assert torch.equal(parameters[runs.FAILING_STEP + 1], parameters[0])  # the only copy is that of the first step
    assert torch.isfinite(parameters[-1]).all()
    assert re.search("at step 3 the loss was nan.*brought back to step 0", found[0]["warned"][0])


# Nudges.


@pytest.mark.parametrize("variant", runs.NUDGED)
def test_nudged_training_follows_the_eigenvectors_of_the_samples_of_all_ranks(outcomes, variant):
    found = [outcome[variant] for outcome in outcomes("nudged_training")]
    assert_same_everywhere(found)
    inside, outside = {"nudge": (0.1, 1.0), "no_top": (0.0, 1.0), "top_only": (1.0, 0.0)}[variant]
    samples = union_of([batch for outcome in found for batch in outcome["measured"][0]])
    assert len(samples[0]) == runs.NUM_SAMPLES + 1  # which the ranks share as 11 and 11
    parameters = found[0]["parameters"]
    micro_batches = len(found[0]["batches"]) // runs.EPOCHS
    assert micro_batches == 4
    for epoch in range(runs.EPOCHS):
        first = epoch * micro_batches
        top = torch.linalg.eigh(dense_hessian(parameters[first], samples)).eigenvectors[:, -3:]
        for step in range(first, first + micro_batches, 2):
            batches = [outcome["batches"][index] for outcome in found for index in (step, step + 1)]
            whole = sum(gradient_at(parameters[step], batch) for batch in batches) / 4
            changed = outside * (whole - top @ (top.T @ whole)) + inside * (top @ (top.T @ whole))
            changed *= min(1.0, 1.0 / (float(changed.norm()) + 1e-6))
            moved = parameters[step + 2] - parameters[step]
            assert (moved + runs.LR * changed).norm() <= 1e-6 * changed.norm()


@pytest.mark.parametrize("what", ["loss", "memory"])
def test_all_ranks_keep_their_directions_when_one_cannot_measure(outcomes, what):
    found = [outcome[what] for outcome in outcomes("failing_nudge")]
    assert_same_everywhere(found)
    assert_told_once(found)
    converged = [logged.get("nudge_details/converged") for _, logged in found[0]["logged"]]
    assert [flag for flag in converged if flag is not None] == [1, 0]
    assert found[0]["state"]["directions"]["vectors"].shape == (3, 26)
