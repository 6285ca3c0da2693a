"""Every rank logs the same, and it is what one would measure on the samples of all ranks."""

import math

import pytest
import torch
from torch import Tensor, nn

from lyapunov_lightning.curvature.tracking.exponents import ExponentTracker
from lyapunov_lightning.curvature.tracking.extremes import ExtremeTracker
from tests.distributed import measurement_runs as runs
from tests.distributed.models import STEP_BATCHES, STEPS
from tests.distributed.references import (
    dense_hessian,
    gradient_at,
    loss_at,
    on_the_step,
    same,
    single_process,
    smooth_at,
    union_of,
)

PROBED_STEPS = [0, 2]


def assert_same_everywhere(outcomes):
    first = outcomes[0]
    for other in outcomes[1:]:
        for part in ("logged", "results", "state", "parameters"):
            assert same(first[part], other[part]), part


# The probe.


@pytest.mark.parametrize("estimator", runs.PROBES)
def test_probe_is_identical_on_all_ranks(outcomes, estimator):
    found = [outcome[estimator] for outcome in outcomes("probes")]
    assert_same_everywhere(found)
    assert [result.step for result in found[0]["results"]] == PROBED_STEPS
    sizes = [[len(inputs) for inputs, _ in outcome["batches"]] for outcome in found]
    assert sizes == [[size] * STEPS for size in STEP_BATCHES[:2]]


def test_probe_sees_the_batches_of_all_ranks(outcomes):
    found = [outcome["lanczos"] for outcome in outcomes("probes")]
    for result, parameters, batches in on_the_step(found):
        values = torch.linalg.eigvalsh(dense_hessian(parameters, union_of(batches)))
        assert result.converged
        assert result.lambda_max == pytest.approx(float(values[-1]), rel=1e-9)
        assert result.lambda_min == pytest.approx(float(values[0]), rel=1e-9)


def test_power_iteration_is_that_on_the_batches_of_all_ranks(outcomes):
    tracker = ExtremeTracker("power", "both", tol=1e-4, seed=0)
    for result, operator in single_process([outcome["power"] for outcome in outcomes("probes")]):
        pairs = tracker.measure(operator)
        assert result.lambda_max == pytest.approx(float(pairs.largest), rel=1e-8)
        assert result.lambda_min == pytest.approx(float(pairs.smallest), rel=1e-8)


def test_lyapunov_iteration_is_that_on_the_batches_of_all_ranks(outcomes):
    tracker = ExponentTracker("largest", seed=0)
    found = [outcome["lyapunov"] for outcome in outcomes("probes")]
    for result, operator in single_process(found, method="finite_difference"):
        expected = tracker.measure(operator.gradient, operator.gradient())
        assert result.exponent == pytest.approx(expected.exponent, rel=1e-8)
        assert result.lambda_max == pytest.approx(expected.lambda_max, rel=1e-8)


# The trackers.


def test_tracker_sees_the_batches_of_all_ranks(outcomes):
    found = outcomes("tracker")
    assert_same_everywhere(found)
    assert len(found[0]["results"]) == 2
    for result, parameters, batches in on_the_step(found):
        hessian = dense_hessian(parameters, union_of(batches))
        values, vectors = torch.linalg.eigh(hessian)
        assert result.converged == 1
        assert result.largest == pytest.approx(values.flip(0)[:3].tolist(), rel=1e-9)
        assert result.smallest == pytest.approx(values[:2].tolist(), rel=1e-9)
        for name, block in (("net.0", slice(0, 16)), ("net.2", slice(16, 26))):
            dense = hessian[block, block]
            assert result.lambda_max_of[name] == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-9)
            assert abs(result.trace_of[name] - float(dense.trace())) <= 4 * result.trace_error_of[name]
        assert sum(result.trace_of.values()) == pytest.approx(result.trace, rel=1e-9)
        gradients = [gradient_at(parameters, batch) for batch in batches]
        cosines = [float((vectors[:, -1] @ gradient).abs() / gradient.norm()) for gradient in gradients]
        assert result.cosines_largest[0] == pytest.approx(sum(cosines) / 2, rel=1e-5)


def test_negative_tracker_sees_the_batches_of_all_ranks(outcomes):
    found = outcomes("negative_tracker")
    assert_same_everywhere(found)
    hessians = [dense_hessian(parameters, union_of(batches)) for _, parameters, batches in on_the_step(found)]
    frozen = torch.linalg.eigh(hessians[runs.FROZEN_AT]).eigenvectors
    results = found[0]["results"]
    assert [result.step for result in results] == list(range(STEPS))
    for result, hessian in zip(results, hessians, strict=True):
        values = torch.linalg.eigvalsh(hessian)
        assert bool(result.lambda_min) == (result.step in (0, 1, 2))
        if result.lambda_min:
            assert result.converged == 1
            assert result.lambda_max == pytest.approx(float(values[-1]), rel=1e-9)
            assert result.lambda_min == pytest.approx(values[:2].tolist(), rel=1e-9)
        if result.step == 2:
            expected = [float(vector @ hessian @ vector) for vector in (frozen[:, -1], frozen[:, 0])]
            assert result.frozen[runs.FROZEN_AT] == pytest.approx(expected, rel=1e-5)
        of_then = torch.linalg.eigvalsh(hessians[result.step - result.online_age])
        assert float((of_then - result.online_lambda_min).abs().min()) <= result.online_residual


# The scanner.


def test_scanner_sees_the_batches_of_all_ranks(outcomes):
    found = outcomes("scanner")
    assert_same_everywhere(found)
    assert [result.step for result in found[0]["results"]] == PROBED_STEPS
    for result, start, batches in on_the_step(found):
        batch = union_of(batches)

        def change_at(displacement: Tensor, start: Tensor = start, batch: tuple[Tensor, ...] = batch) -> float:
            return loss_at(start + displacement, batch) - loss_at(start, batch)

        values, vectors = torch.linalg.eigh(dense_hessian(start, batch))
        assert result.loss == pytest.approx(loss_at(start, batch), rel=1e-12)
        assert result.curvatures[:2] == pytest.approx([float(values[-1]), float(values[0])], rel=1e-9)
        top = vectors[:, -1]
        components = [float(top @ gradient_at(start, part)) for part in batches]
        slope = sum(size * c for size, c in zip(STEP_BATCHES[:2], components, strict=True)) / sum(STEP_BATCHES[:2])
        assert result.gradient_components[0] == pytest.approx(abs(slope), rel=1e-6)
        downhill = -math.copysign(1, slope) * top
        where = torch.linspace(-1, 1, 11, dtype=torch.float64)
        curve = torch.tensor([change_at(t * downhill) for t in where], dtype=torch.float64)
        powers = torch.stack([where**power for power in range(3)], dim=1)
        fitted = 2 * float(torch.linalg.lstsq(powers, curve[:, None]).solution[2])
        assert result.curvature_fits[0][result.scales.index(1.0)] == pytest.approx(fitted, rel=1e-6)
        changes = [change_at(-0.05 * component * top) for component in components]
        assert result.expected_changes[result.sgd_steps.index(1.0)] == pytest.approx(sum(changes) / 2, rel=1e-6)
        least = change_at(result.unit_steps[0] * downhill)
        assert all(least <= change_at(f * result.unit_steps[0] * downhill) for f in (0, 0.99, 1.01))


# Weights.


def weighted_sharpness(parameters: Tensor, batches: list, weights: list[float]) -> float:
    hessians = [dense_hessian(parameters, [part[:size] for part in batch[:2]]) for batch, size in batches]
    mean = sum(weight * hessian for weight, hessian in zip(weights, hessians, strict=True)) / sum(weights)
    return float(torch.linalg.eigvalsh(mean)[-1])


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("self.log", [5, 2]),
        ("batch_size_fn", [5, 2]),
        ("batch_size_fn before self.log", [2, 5]),
        ("length", [6, 6]),
    ],
)
def test_ranks_are_weighted_by_the_samples_that_they_are_told_of(outcomes, way, expected):
    found = [outcome[way] for outcome in outcomes("weights")]
    assert_same_everywhere(found)
    assert len(found[0]["results"]) == 2
    for result, parameters, batches in on_the_step(found):
        sharpness = {
            tuple(weights): weighted_sharpness(parameters, list(zip(batches, [5, 2], strict=True)), weights)
            for weights in ([5, 2], [2, 5], [6, 6])
        }
        assert result.lambda_max == pytest.approx(sharpness.pop(tuple(expected)), rel=1e-9)
        assert all(abs(other / result.lambda_max - 1) > 1e-3 for other in sharpness.values())


# Steps with collectives of their own.


@pytest.mark.parametrize("kind", ["Centred", "Contrasting"])
def test_a_step_that_gathers_from_all_ranks_is_measured_and_left_alone(outcomes, kind):
    found = [outcome[kind] for outcome in outcomes("gathering")]
    assert_same_everywhere(found)
    assert not any(outcome["warned"] for outcome in found)
    for outcome in found:
        assert torch.equal(outcome["parameters"][-1], outcome["without"])
    assert [result.step for result in found[0]["results"]] == [0, 1]
    for result, parameters, batches in on_the_step(found):
        values = torch.linalg.eigvalsh({"Centred": centred, "Contrasting": contrasting}[kind](parameters, batches))
        assert result.converged
        assert result.lambda_max == pytest.approx(float(values[-1]), rel=1e-9)
        assert result.lambda_min == pytest.approx(float(values[0]), rel=1e-9)


def centred(parameters: Tensor, batches: list) -> Tensor:
    inputs, targets = union_of(batches)
    return dense_hessian(parameters, (inputs - inputs.mean(0), targets))


def contrasting(parameters: Tensor, batches: list) -> Tensor:
    """The Hessian of the mean of both ranks' losses."""
    inputs, targets = (tensor.double() for tensor in union_of(batches))
    net = smooth_at(parameters).net
    weights = [parameter.detach() for parameter in net.parameters()]
    sizes = [weight.numel() for weight in weights]

    def loss(flat: Tensor) -> Tensor:
        values = dict(
            zip(
                dict(net.named_parameters()),
                map(Tensor.view_as, flat.split(sizes), weights),
                strict=True,
            )
        )
        outputs = torch.func.functional_call(net, values, (inputs,))
        return runs.contrast(outputs, outputs) + nn.functional.mse_loss(outputs, targets)

    return torch.func.hessian(loss)(parameters.double())


# One shot.


def test_one_shot_is_that_of_the_data_of_all_ranks_and_the_same_on_each(outcomes):
    first, second = outcomes("one_shot")
    for name in ("values", "vectors", "residuals", "loss", "gradient_norm", "num_batches", "matvecs"):
        assert same(first[name], second[name]), name
    data = runs.regression(runs.ONE_SHOT_SAMPLES).tensors
    start = nn.utils.parameters_to_vector(runs.Smooth().parameters()).detach()
    exact = torch.linalg.eigvalsh(dense_hessian(start, data))
    found = torch.cat([exact.flip(0)[:2], exact[:1]])
    assert first["values"].tolist() == pytest.approx(found.tolist(), rel=1e-4)
    assert first["loss"] == pytest.approx(loss_at(start, data), rel=1e-5)
    assert first["num_batches"] == 5
    assert same(first["lines"]["1"].losses, second["lines"]["1"].losses)


# The losses beside the curvature.


def test_losses_are_the_means_over_the_ranks(outcomes):
    found = [outcome["lanczos"] for outcome in outcomes("probes")]
    own = [[loss_at(p, b) for p, b in zip(f["parameters"][:STEPS], f["batches"], strict=True)] for f in found]
    means = [sum(losses) / len(losses) for losses in zip(*own, strict=True)]
    for outcome in found:
        [state] = [state["losses"] for state in [outcome["state"]]]
        assert state["steps"] == list(range(STEPS))
        assert state["values"] == pytest.approx(means, rel=1e-5)
