"""Models that are sharded over the ranks are measured and acted upon as if each rank had the whole."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lyapunov_lightning.curvature import (
    HessianOperator,
    lanczos,
    power_iteration,
    spectral_density,
    stochastic_moments,
)
from tests.distributed import sharded_runs as runs
from tests.distributed.references import same, union_of
from tests.distributed.sharded_models import loss_of, transformer

EXACT, DIFFERENCES, FLOAT32 = 1e-12, 1e-6, 1e-4
"""Relative errors: rounding in float64, differences of gradients in it, and rounding in float32."""

TOLERANCE = {"shards": DIFFERENCES, "float32": FLOAT32}


def close(first: Any, second: Any, tolerance: float) -> bool:
    """Whether nested numbers agree, the small ones of a tensor or a tuple in relation to the largest one."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(close(first[k], second[k], tolerance) for k in first)
    if isinstance(first, (list, tuple)) and not all(isinstance(entry, (int, float)) for entry in first):
        return len(first) == len(second) and all(close(a, b, tolerance) for a, b in zip(first, second, strict=True))
    if isinstance(first, (bool, str, type(None))):
        return first == second
    a, b = (torch.as_tensor(each, dtype=torch.float64) for each in (first, second))
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    scale = b.nan_to_num().abs().max() if b.numel() else 0.0
    return bool(((a - b).nan_to_num().abs() <= tolerance * scale + 1e-300).all())


# Numbers.


@pytest.fixture(scope="module")
def numbers(outcomes) -> list[Any]:
    return outcomes("sharded_numbers")


def one_process(numbers: list[Any], name: str) -> HessianOperator:
    """The Hessian where all samples are, at the whole parameters, in double precision."""
    net = transformer().double()
    torch.nn.utils.vector_to_parameters(
        torch.cat([p.double().reshape(-1) for p in numbers[0][name]["parameters"]]), net.parameters()
    )
    batch = union_of([outcome[name]["batch"] for outcome in numbers])
    return HessianOperator(lambda batch: loss_of(net, batch), net.parameters(), [batch])


SETTINGS = [*runs.WAYS, "float32", "two copies"]


@pytest.mark.parametrize("name", SETTINGS)
def test_products_gradients_and_losses_are_those_of_one_process(numbers, name):
    found, hessian, tolerance = numbers[0][name]["found"], one_process(numbers, name), TOLERANCE.get(name, EXACT)
    direction = found["direction"].double()
    first = found["vectors"][0].double()
    products = torch.stack([hessian @ direction, hessian @ first])
    assert close(found["products"], products, max(tolerance, 3e-4) if name == "float32" else tolerance)
    assert close(found["gradient"], hessian.gradient(), tolerance)
    assert close(found["displaced gradient"], hessian.gradient(0.01 * direction), tolerance)
    assert close(found["values"], hessian.values_along(direction, [0.0, 0.01, -0.02]), tolerance)
    assert close(found["plane"], hessian.values_along(torch.stack([direction, first]), runs.PLANE), tolerance)
    assert found["value"] == pytest.approx(hessian.value(0.01 * direction), rel=tolerance)


@pytest.mark.parametrize("name", SETTINGS)
def test_eigenpairs_are_those_of_one_process(numbers, name):
    found, hessian, tolerance = numbers[0][name]["found"], one_process(numbers, name), TOLERANCE.get(name, 1e-10)
    values, residuals, converged = found["pairs"]
    expected = lanczos(hessian, **runs.PAIRS, tol=1e-9)
    assert converged
    assert close(values, expected.values, tolerance)
    vectors = found["vectors"].double()
    assert close(vectors @ vectors.T, torch.eye(3, dtype=torch.float64), 1e-5 if name == "float32" else EXACT)
    assert close(found["power"], power_iteration(hessian, tol=1e-1).values, 1e-1 if name in TOLERANCE else 1e-9)
    products = torch.stack([hessian @ vector for vector in vectors])
    slack = tolerance * values.abs().max()
    assert ((products - values[:, None] * vectors).norm(dim=1) <= residuals + slack).all()
    if name in ("gathered", "layerwise", "two copies", "offloaded"):  # the same search, from the same random vector
        few = lanczos(hessian, **runs.PAIRS, max_matvecs=runs.FEW)
        assert not close(few.values, expected.values, 1e-3)
        assert close(found["after few products"], few.values, 1e-8)


@pytest.mark.parametrize("name", [*runs.WAYS, "two copies"])
def test_estimates_over_the_spectrum_come_from_the_random_vectors_of_one_process(numbers, name):
    found, hessian = numbers[0][name]["found"], one_process(numbers, name)
    assert torch.equal(found["direction"], hessian.space.random(torch.Generator().manual_seed(1)))
    known = lanczos(hessian, **runs.PAIRS, tol=1e-9)
    moments = stochastic_moments(hessian, num_probes=2, known=known, blocks=runs.blocks_of(hessian))
    tolerance = 1e-4 if name == "shards" else 1e-6
    assert close(found["traces"], [estimate.value for estimate in moments.trace_of.values()], tolerance)
    assert close(found["trace"], (moments.trace.value, moments.frobenius_norm.value), tolerance)
    assert close(found["density"], spectral_density(hessian, num_probes=2, num_steps=6).nodes, tolerance)


@pytest.mark.parametrize("name", SETTINGS)
def test_inverse_products_have_the_residual_that_they_say(numbers, name):
    found, hessian, tolerance = numbers[0][name]["found"], one_process(numbers, name), TOLERANCE.get(name, 1e-10)
    solution, damping, residual, converged = found["inverse"]
    b, solution = found["direction"].double(), solution.double()
    true = float((b - hessian @ solution - damping * solution).norm())
    assert converged
    assert residual <= 1e-3 * float(b.norm())
    assert true == pytest.approx(residual, abs=tolerance * damping * float(solution.norm()))


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_of_the_batches_are_averaged_over_the_ranks(numbers, name):
    found, hessian = numbers[0][name]["found"], one_process(numbers, name)
    vectors = found["vectors"][:2].double()
    if "gathered" in found["method"]:  # where each rank has a gradient of its own
        gradients = []
        for outcome in numbers:
            own = HessianOperator(hessian._batches._objective._loss, hessian.parameters, [outcome[name]["batch"]])
            gradients.append(own.gradient())
    else:
        gradients = [hessian.gradient()]
    expected = torch.stack([torch.cat([(vectors @ g).abs(), g.norm()[None]]) for g in gradients]).mean(dim=0)
    assert close(found["components"], expected, TOLERANCE.get(name, 1e-10))


@pytest.mark.parametrize("name", SETTINGS)
def test_all_ranks_have_the_same_numbers_and_a_part_of_the_vectors(numbers, name):
    first, second = (outcome[name]["found"] for outcome in numbers)
    parts = (
        "products",
        "direction",
        "gradient",
        "values",
        "pairs",
        "after few products",
        "vectors",
        "trace",
        "density",
        "components",
    )
    assert all(same(first[part], second[part]) for part in parts)
    (size, *lengths), (_, *others) = first["lengths"], second["lengths"]
    assert size == runs.PARAMETERS
    assert len({*lengths}) == len({*others}) == 1  # the eigenvectors are as long as the space says
    whole = name == "two copies"
    assert lengths[0] + others[0] == (2 if whole else 1) * size
    assert whole or max(lengths[0], others[0]) < 0.55 * size


def test_the_way_is_the_one_that_has_room_and_says_so(numbers):
    methods = {name: numbers[0][name]["found"]["method"] for name in SETTINGS}
    exact = "double_backward on gathered parameters"
    assert methods == {
        "gathered": exact,
        "layerwise": "double_backward through gathering of layers",
        "shards": "finite_difference on shards",
        **dict.fromkeys(("offloaded", "float32", "two copies"), exact),
    }
    for name in SETTINGS:
        check, note = numbers[0][name]["found"]["check"], numbers[0][name]["note"]
        assert check.asymmetry < TOLERANCE.get(name, EXACT)
        assert check.nondeterminism == 0
        assert "sharded" in note
        assert "symmetric to" in note


# The callbacks.


@pytest.fixture(scope="module")
def callbacks(outcomes) -> list[Any]:
    return outcomes("sharded_callbacks")


NOT_COMPARED = ("residual", "value_error", "preconditioned_residual", "matvecs")
"""What says how a search went, and not what it found."""

OF_MINI_BATCHES = ("cosines", "gradient_in_top")
"""What is said of the mini-batches, which are those of all ranks together where no rank has a gradient of its own."""


def plain(result: Any) -> dict[str, Any]:
    """All fields of a result."""
    return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}


def fields(result: Any) -> dict[str, Any]:
    """What a result says, but for the sign of a step along a vector that has none."""
    found = plain(result)
    if found.get("descent_step") is not None:
        found["descent_step"] = abs(found["descent_step"])
    return found


@pytest.mark.parametrize("name", runs.CALLBACKS)
def test_a_callback_finds_and_does_on_shards_what_it_does_on_copies(callbacks, name):
    sharded, copied = callbacks[0][name]["sharded"], callbacks[0][name]["copied"]
    assert sharded["warned"] == copied["warned"]
    assert len(sharded["results"][0]) == len(copied["results"][0]) > 0
    assert close(sharded["parameters"], copied["parameters"], 1e-9)
    left_out = NOT_COMPARED + (OF_MINI_BATCHES if name in ("layerwise", "differences") else ())
    for found, expected in zip(sharded["results"][0], copied["results"][0], strict=True):
        one, other = fields(found), fields(expected)
        assert one.keys() == other.keys()
        for field in one:
            if not field.startswith(left_out):
                assert close(one[field], other[field], 1e-6), (field, one[field], other[field])


@pytest.mark.parametrize("name", runs.CALLBACKS)
def test_ranks_agree_on_what_is_logged_and_on_the_parameters(callbacks, name):
    first, second = (outcome[name]["sharded"] for outcome in callbacks)
    assert same([plain(r) for r in first["results"][0]], [plain(r) for r in second["results"][0]])
    assert same(first["parameters"], second["parameters"])
    assert first["logged"]


GAUGED = {
    "adamw": (
        "batch_sharpness",
        "batch_sharpness_error",
        "step_sharpness",
        "batch_agreement",
        "stability_limit",
        "noise_ratio",
        "clipping",
    ),
    "unknown": ("lost_decrease", "clipping"),
}
"""What is known of the steps of an optimizer."""


@pytest.mark.parametrize("way", runs.ROOM)
@pytest.mark.parametrize("optimizer", GAUGED)
def test_steps_on_shards_are_as_near_to_their_edge_as_those_on_copies(outcomes, optimizer, way):
    found = outcomes("sharded_gauges")
    first, second = (outcome[optimizer][way] for outcome in found)
    assert same([plain(r) for r in first["results"][0]], [plain(r) for r in second["results"][0]])
    copied = found[0][optimizer]["copied"]
    assert first["warned"] == copied["warned"]
    assert close(first["parameters"], copied["parameters"], 1e-9)
    seen = [[getattr(result, name) for name in GAUGED[optimizer]] for result in first["results"][0]]
    expected = [[getattr(result, name) for name in GAUGED[optimizer]] for result in copied["results"][0]]
    assert all(number is not None for number in expected[-1])
    for numbers, others in zip(seen, expected, strict=True):
        for name, number, other in zip(GAUGED[optimizer], numbers, others, strict=True):
            assert number == (other if other is None else pytest.approx(other, rel=1e-6)), name


def test_a_rank_that_has_nothing_of_a_model_takes_part_in_all_that_is_measured(outcomes):
    first, second = (outcome["sharded"] for outcome in outcomes("sharded_on_one_rank"))
    assert same([plain(r) for r in first["results"][0]], [plain(r) for r in second["results"][0]])
    copied = outcomes("sharded_on_one_rank")[0]["copied"]
    assert first["warned"] == copied["warned"] == []
    for result, expected in zip(first["results"][0], copied["results"][0], strict=True):
        for name in (*GAUGED["adamw"][:-1], "decisive_eigenvalue"):
            assert close(getattr(result, name), getattr(expected, name), 1e-6), (result.step, name)


def test_vectors_are_given_up_where_other_parameters_train_from_now_on(outcomes):
    for outcome in outcomes("sharded_unfreezing"):
        sharded, copied = outcome["sharded"], outcome["copied"]
        assert sharded["warned"] == copied["warned"] == []
        for found, expected in zip(sharded["results"][0], copied["results"][0], strict=True):
            assert found.lambda_max == pytest.approx(expected.lambda_max, rel=1e-6)
        assert close(sharded["parameters"], copied["parameters"], 1e-6)


# Nothing is changed.


@pytest.mark.parametrize("name", runs.IDENTITY)
@pytest.mark.parametrize("part", ["parameters", "gradients", "drawn", "steps"])
def test_a_sharded_training_is_bit_identical_with_and_without_callbacks(outcomes, name, part):
    for outcome in outcomes("sharded_identity"):
        found = outcome[name]
        assert same(found["without"][part], found["with"][part])
        assert found["with"]["measurements"] > 0
        assert all("the stability limit of Unknown is not known" in message for message in found["with"]["warned"])
        assert found["with"]["steps"] > 0


# What goes wrong.


@pytest.mark.parametrize("who", runs.FAILURES)
def test_a_measurement_that_fails_is_warned_of_on_all_ranks_and_the_training_goes_on(outcomes, who):
    for rank, outcome in enumerate(outcomes("sharded_failures")):
        found = outcome[who]
        assert same(found["parameters"], outcome["plain"]["parameters"])
        probe, tracker = found["results"]
        assert [result.step for result in probe] == [result.step for result in tracker] == [0, 2]
        assert len(found["warned"]) == 2
        reason = "failed on 1 other rank" if who.startswith("one rank") and rank == 0 else "planned"
        assert all(reason in message for message in found["warned"])


@pytest.mark.parametrize("way", runs.STRUCK)
@pytest.mark.parametrize("event", runs.EVENTS)
def test_what_happens_at_the_first_measurement_does_not_decide_the_way_of_the_run(outcomes, event, way):
    for rank, outcome in enumerate(outcomes("sharded_events")):
        found = outcome[f"{event}, {way}"]
        assert [result.step for result in found["results"][0]] == [1, 2]
        assert found["ways"] == [way]
        [message] = found["warned"]
        assert ("planned" if rank in runs.STRUCK[way] else "failed on 1 other rank") in message


def test_a_rank_that_fails_on_fewer_batches_than_before_leaves_no_other_waiting(outcomes):
    for rank, outcome in enumerate(outcomes("sharded_accumulation")):
        failing = outcome["failing"]
        assert same(failing["parameters"], outcome["plain"]["parameters"])
        assert [result.step for result in failing["results"][0]] == [0, 1, 2, 4, 5]
        [message] = failing["warned"]
        assert ("planned" if rank else "failed on 1 other rank") in message


# Resuming.


@pytest.mark.parametrize(
    "name", [f"{name}, sharded" for names, *_ in runs.RESUMED for name in names] + ["nudge, whole"]
)
def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(outcomes, name):
    for outcome in outcomes("sharded_resume"):
        straight, resumed = outcome[name]["straight"], outcome[name]["resumed"]
        assert same(straight["parameters"], resumed["parameters"])
        first, second = ([plain(r) for r in run["results"][0]] for run in (straight, resumed))
        for one, other in zip(first, second, strict=True):
            different = {field for field in one if not same(one[field], other[field])}
            # Searches begin anew, and the batch with which a first step would be compared is not in a checkpoint.
            unlike = {"block_matvecs", "lambda_max_error_of", "batch_agreement", "noise_ratio", "stability_ratio"}
            assert different <= {"lambda_max_of", "stability_limit", *unlike}
            assert all(close(one[field], other[field], 1e-3) for field in different - unlike)
        assert len(first) > 1


def test_a_copy_of_a_sharded_training_brings_back_parameters_and_optimizer(outcomes):
    for before, after, again in outcomes("sharded_copies"):
        assert not same(before[: len(after)], after)
        assert same(before, again)


def test_one_shot_of_a_sharded_model_is_that_of_the_whole(outcomes):
    for outcome in outcomes("sharded_measure"):
        found, expected = outcome["sharded"], outcome["copied"]
        assert close(found.values, expected.values, 1e-9)
        assert close((found.vectors @ expected.vectors.T).abs(), torch.eye(3, dtype=torch.float64), 1e-4)
        assert close([found.loss, found.gradient_norm], [expected.loss, expected.gradient_norm], EXACT)
        for name, line in expected.lines.items():
            assert close(found.lines[name].losses, line.losses, 1e-4)


# What cannot be measured.


def test_what_is_not_sharded_by_data_alone_is_refused_with_the_remedy(outcomes):
    first, _ = outcomes("sharded_refusals")
    assert "net.head.weight" in first["half sharded"]
    assert "Call `fully_shard` on the whole module" in first["half sharded"]
    assert "tensor parallelism" in first["tensor parallel"]
    assert "`lyapunov_lightning.measure`" in first["tensor parallel"]
    assert "ModelParallelStrategy" in first["fsdp1"]
    assert "`fully_shard`" in first["fsdp1"]
    for said in first.values():
        assert said.startswith("MisconfigurationException: `CurvatureProbe`")


def test_values_of_nan_stay_apart() -> None:
    assert not close([1.0, math.nan], [1.0, 1.0], 1e-3)
    assert close(Tensor([1.0, 1e-9]), Tensor([1.0, 0.0]), 1e-6)
