"""Two real processes measure what one would measure on all the data, take every branch together, and never hang."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.lyapunov import LyapunovIteration
from lyapunov_lightning.curvature.tracking import ExtremeTracker
from lyapunov_lightning.training.batches import ProbeData
from lyapunov_lightning.training.distributed import sum_over_processes
from tests.training import distributed_runs as runs

ROOT = Path(__file__).parents[2]
PATIENCE = 240
"""Seconds for all checks together, after which the processes are taken to hang."""

Outcomes = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What both processes returned from a check, which is a reason to fail where one of them did not."""
    directory = tmp_path_factory.mktemp("distributed")
    processes = []
    for rank in range(runs.WORLD_SIZE):
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "SLURM"))},
            **{"LOCAL_RANK": str(rank), "NODE_RANK": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        }
        command = [sys.executable, "-m", "tests.training.distributed_runs", str(directory), str(rank)]
        with open(directory / f"{rank}.log", "w") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    try:
        for process in processes:
            process.wait(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        pass  # the missing outcomes tell
    finally:
        for process in processes:
            process.kill()
            process.wait()

    def load(name: str) -> list[Any]:
        loaded = []
        for rank in range(runs.WORLD_SIZE):
            path = directory / f"{name}-{rank}.pt"
            if not path.exists():
                pytest.fail(f"process {rank} hung or died:\n{(directory / f'{rank}.log').read_text()[-3000:]}")
            loaded.append(torch.load(path, weights_only=False))
        failures = [f"process {rank}:\n{o.trace}" for rank, o in enumerate(loaded) if isinstance(o, runs.Failure)]
        if failures:
            pytest.fail("\n".join(failures))
        return loaded

    return load


def same(first: Any, second: Any) -> bool:
    """Equality of nested structures, bit by bit in their tensors and with NaN equal to itself."""
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second or (first != first and second != second)


# The operator alone.


@pytest.mark.parametrize("method", runs.METHODS)
@pytest.mark.parametrize("dtype", runs.DTYPES)
@pytest.mark.parametrize("kind", runs.SHARDS)
def test_operator_on_shards_is_that_of_their_union(outcomes, kind, dtype, method):
    first = outcomes("operator")[0][kind, dtype, method]
    batches = [batch for shard in runs.shards(kind, torch.float64) for batch in shard]
    union = tuple(map(torch.cat, zip(*batches, strict=True)))  # one batch, so that no weights come in
    exact = runs.measured([union], torch.float64, "double_backward", None)
    rtol = {"float64": 1e-11, "float32": 1e-5}[dtype]
    for name in first:
        expected = exact[name]
        if method == "finite_difference" and "product" in name:
            rtol = {"float64": 1e-7, "float32": 5e-2}[dtype]  # smoothed over the step of this dtype
        assert (first[name].double() - expected).norm() <= rtol * expected.norm(), name


@pytest.mark.parametrize("method", runs.METHODS)
@pytest.mark.parametrize("dtype", runs.DTYPES)
@pytest.mark.parametrize("kind", runs.SHARDS)
def test_operator_on_shards_is_the_same_bit_by_bit_in_both_processes(outcomes, kind, dtype, method):
    first, second = (outcome[kind, dtype, method] for outcome in outcomes("operator"))
    assert same(first, second)


@pytest.mark.parametrize("dtype", runs.DTYPES)
def test_finite_differences_on_shards_are_those_on_their_union(outcomes, dtype):
    batches = [batch for shard in runs.shards("unequal", runs.DTYPES[dtype]) for batch in shard]
    expected = runs.measured(batches, runs.DTYPES[dtype], "finite_difference", None)["product"]
    product = outcomes("operator")[0]["unequal", dtype, "finite_difference"]["product"]
    assert (product - expected).norm() <= {"float64": 1e-8, "float32": 1e-5}[dtype] * expected.norm()


def test_a_product_is_one_flat_collective(outcomes):
    size = sum(parameter.numel() for parameter in runs.small_network(torch.float64).parameters())
    for found in outcomes("collectives"):
        products = found.pop("lanczos products")
        assert len(found.pop("lanczos")) == len(products) > 0
        for what, calls in found.items():
            assert [name for name, _ in calls] == ["all_reduce"], what
            assert size <= calls[0][1] <= size + 8, what


def test_a_single_process_has_no_collectives():
    assert sum_over_processes(SimpleNamespace(world_size=1)) is None


@pytest.mark.parametrize("what", ["matvec", "gradient", "value"])
@pytest.mark.parametrize("fault", runs.FAULTS)
@pytest.mark.parametrize("method", runs.METHODS)
def test_a_failing_process_keeps_its_error_and_the_other_learns_of_it(outcomes, method, fault, what):
    (other, after_other), (own, after_own) = (outcome[method, fault, what] for outcome in outcomes("failing_loss"))
    assert re.match("PeerFailureError: .*1 other process", other)
    assert re.match(
        "PlannedError: planned" if fault not in ("not-a-scalar", "not-a-tensor") else "MeasurementError", own
    )
    assert "other process" not in own
    assert torch.equal(after_other, after_own)  # both are in step again
    assert after_own.isfinite().all()
    assert after_own.any()


def test_without_a_batch_anywhere_every_process_is_told(outcomes):
    assert all(re.match("MeasurementError: No process has a batch", told) for told in outcomes("no_batches"))


# The probe in a training.


def dense_hessian(parameters: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    module = runs.Smooth().double()
    shapes = {name: p.shape for name, p in module.named_parameters()}
    inputs, targets = (tensor.double() for tensor in batch)

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([math.prod(shape) for shape in shapes.values()])
        values = {name.removeprefix("net."): p.view(s) for (name, s), p in zip(shapes.items(), pieces, strict=True)}
        return nn.functional.mse_loss(torch.func.functional_call(module.net, values, (inputs,)), targets)

    return torch.func.hessian(loss)(parameters.double())


def union_of(batches: list[Any]) -> tuple[Tensor, ...]:
    return tuple(map(torch.cat, zip(*batches, strict=True)))


@pytest.mark.parametrize("estimator", ["lanczos", "power", "lyapunov"])
def test_probe_is_identical_in_both_processes(outcomes, estimator):
    first, second = (outcome[estimator] for outcome in outcomes("probe_on_the_step"))
    assert len(first["logged"]) == 3
    assert same(first["logged"], second["logged"])
    assert same(first["state"], second["state"])
    assert same(first["parameters"], second["parameters"])
    assert [len(x) for x, _ in first["batches"] + second["batches"]] == [5] * 6 + [3] * 6


def test_probe_on_the_step_sees_the_batches_of_both_processes(outcomes):
    first, second = (outcome["lanczos"] for outcome in outcomes("probe_on_the_step"))
    for step, logged in first["logged"]:
        batch = union_of([first["batches"][step], second["batches"][step]])
        values = torch.linalg.eigvalsh(dense_hessian(first["parameters"][step], batch))
        assert logged["curvature/converged"] == 1
        assert logged["curvature/lambda_max"] == pytest.approx(float(values[-1]), rel=1e-9)
        assert logged["curvature/lambda_min"] == pytest.approx(float(values[0]), rel=1e-9)


def single_process(first: Any, second: Any) -> Iterator[tuple[dict[str, float], HessianOperator]]:
    """What was logged, beside the operator of one process that has the batches of both."""
    module = runs.Smooth().double()
    for step, logged in first["logged"]:
        nn.utils.vector_to_parameters(first["parameters"][step], module.parameters())
        batch = union_of([first["batches"][step], second["batches"][step]])
        method = "finite_difference" if "curvature/lyapunov_exponent" in logged else "auto"
        yield logged, HessianOperator(module.loss, module.net.parameters(), [batch], method=method)


def test_power_iteration_is_that_on_the_batches_of_both_processes(outcomes):
    tracker = ExtremeTracker("power", "both", tol=1e-4, seed=0)
    for logged, operator in single_process(*(outcome["power"] for outcome in outcomes("probe_on_the_step"))):
        pairs = tracker.measure(operator)
        assert logged["curvature/lambda_max"] == pytest.approx(float(pairs.largest), rel=1e-8)
        assert logged["curvature/lambda_min"] == pytest.approx(float(pairs.smallest), rel=1e-8)


def test_lyapunov_iteration_is_that_on_the_batches_of_both_processes(outcomes):
    iteration = LyapunovIteration(map="ascent", delta_q=5e-2, seed=0)
    for logged, operator in single_process(*(outcome["lyapunov"] for outcome in outcomes("probe_on_the_step"))):
        estimate = iteration.step(operator.gradient, operator.gradient())
        assert logged["curvature/lyapunov_exponent"] == pytest.approx(estimate.exponent, rel=1e-8)
        assert logged["curvature/lambda_max"] == pytest.approx(estimate.eigenvalue, rel=1e-8)


def test_tracker_sees_the_batches_of_both_processes(outcomes):
    first, second = outcomes("tracker_on_the_step")
    assert len(first["logged"]) == 3
    assert same(first["logged"], second["logged"])
    for step, logged in first["logged"]:
        parts = [first["batches"][step], second["batches"][step]]
        hessian = dense_hessian(first["parameters"][step], union_of(parts))
        values, vectors = torch.linalg.eigh(hessian)
        assert logged["spectrum/converged"] == 1
        for rank in range(3):
            assert logged[f"spectrum/lambda_{rank + 1}"] == pytest.approx(float(values[-1 - rank]), rel=1e-9)
        for rank in range(2):
            assert logged[f"spectrum/lambda_min_{rank + 1}"] == pytest.approx(float(values[rank]), rel=1e-9)
        for name, block in (("first", slice(0, 16)), ("last", slice(16, 26))):
            expected = float(torch.linalg.eigvalsh(hessian[block, block])[-1])
            assert logged[f"spectrum/lambda_max_{name}"] == pytest.approx(expected, rel=1e-9)
        module = runs.Smooth().double()
        nn.utils.vector_to_parameters(first["parameters"][step], module.parameters())
        cosines = []
        for part in parts:
            gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(module.loss(part), module.parameters())])
            cosines.append(float((vectors[:, -1] @ gradient).abs() / gradient.norm()))
        assert logged["spectrum/gradient_cosine_1"] == pytest.approx(sum(cosines) / 2, rel=1e-5)


def test_negative_tracker_sees_the_batches_of_both_processes(outcomes):
    first, second = outcomes("negative_tracker_on_the_step")
    assert same(first["logged"], second["logged"])
    assert same(first["state"], second["state"])
    hessians = [
        dense_hessian(first["parameters"][step], union_of([first["batches"][step], second["batches"][step]]))
        for step in range(6)
    ]
    frozen = torch.linalg.eigh(hessians[3]).eigenvectors
    assert [step for step, _ in first["logged"]] == list(range(6))
    for step, logged in first["logged"]:
        values = torch.linalg.eigvalsh(hessians[step])
        assert ("negative/lambda_min_1" in logged) == (step in (0, 2, 3, 4))
        if "negative/lambda_min_1" in logged:
            assert logged["negative/converged"] == 1
            assert logged["negative/lambda_max"] == pytest.approx(float(values[-1]), rel=1e-9)
            for rank in range(2):
                assert logged[f"negative/lambda_min_{rank + 1}"] == pytest.approx(float(values[rank]), rel=1e-9)
        if step == 4:
            for end, vector in (("top", frozen[:, -1]), ("bottom", frozen[:, 0])):
                expected = float(vector @ hessians[step] @ vector)
                assert logged[f"negative/frozen_3_{end}"] == pytest.approx(expected, rel=1e-5)
        of_then = torch.linalg.eigvalsh(hessians[step - int(logged["negative/online_age"])])
        distance = float((of_then - logged["negative/online_lambda_min"]).abs().min())
        assert distance <= logged["negative/online_residual"]


@pytest.mark.parametrize("run", ["lanczos", "online", "failing"])
def test_descent_is_identical_in_both_processes(outcomes, run):
    first, second = (outcome[run] for outcome in outcomes("descent"))
    assert len(first["parameters"]) == 6
    assert same(first["parameters"], second["parameters"])
    assert same(first["logged"], second["logged"])
    moved = {step: logged.get("negative/descended", 0) for step, logged in first["logged"]}
    assert sum(moved.values()) >= (1 if run == "online" else 4)
    if run == "failing":
        assert moved[2] == 0


def test_descent_is_along_the_gradient_and_direction_of_both_processes_batches(outcomes):
    first, second = (outcome["lanczos"] for outcome in outcomes("descent"))
    for step, logged in first["logged"]:
        batch = union_of([first["batches"][step], second["batches"][step]])
        values, vectors = torch.linalg.eigh(dense_hessian(first["parameters"][step], batch))
        module = runs.Smooth().double()
        nn.utils.vector_to_parameters(first["parameters"][step], module.parameters())
        loss = module.loss([tensor.double() for tensor in batch])
        gradient = nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(module.parameters())))
        expected = min(0.1 * abs(float(vectors[:, 0] @ gradient)), 0.1) if values[0] < 0 else 0.0
        assert abs(logged["negative/descent_step"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("run", ["along_update", "inverse_sharpness", "failing"])
def test_controlled_learning_rates_are_identical_in_both_processes(outcomes, run):
    first, second = (outcome[run] for outcome in outcomes("controlled"))
    assert len(first["parameters"]) == 6
    assert same(first["parameters"], second["parameters"])
    assert same(first["logged"], second["logged"])
    assert same(first["state"], second["state"])
    converged = [logged["lr/converged"] for _, logged in first["logged"]]
    assert converged == ([1, 1, 0, 1, 1, 1] if run == "failing" else [1] * 6)


def test_controlled_learning_rate_is_that_of_the_batches_of_both_processes(outcomes):
    """The update is the clipped mean of both gradients; slope and curvature are those of the union of both batches."""
    first, second = (outcome["along_update"] for outcome in outcomes("controlled"))
    for step, logged in first["logged"][:5]:
        parts = [first["batches"][step], second["batches"][step]]
        start = first["parameters"][step]
        module = runs.Smooth().double()

        def gradient_on(batch, module=module, start=start):
            nn.utils.vector_to_parameters(start, module.parameters())
            loss = module.loss([tensor.double() for tensor in batch])
            return nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(module.parameters())))

        update = -sum(gradient_on(part) for part in parts) / 2
        update *= min(1.0, 0.5 / float(update.norm()))
        slope = -float(gradient_on(union_of(parts)) @ update)
        curvature = float(update @ dense_hessian(start, union_of(parts)) @ update)
        assert logged["lr/slope"] == pytest.approx(slope, rel=1e-3)
        assert logged["lr/curvature_along_update"] == pytest.approx(curvature, rel=1e-3, abs=1e-4)
        moved = first["parameters"][step + 1] - start
        torch.testing.assert_close(moved, logged["lr/curvature"] * update.to(moved), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", runs.SHARDS)
def test_a_line_is_evaluated_on_the_union_with_one_collective(outcomes, kind):
    first, second = (outcome[kind] for outcome in outcomes("values_along_a_line"))
    assert same(first["values"], second["values"])
    assert [name for name, _ in first["calls"]] == ["all_reduce"]
    net = runs.small_network(torch.float64)
    start = nn.utils.parameters_to_vector(net.parameters()).detach()
    inputs, labels = union_of([batch for shard in runs.shards(kind, torch.float64) for batch in shard])
    for distance, value in zip(runs.LINE, first["values"].tolist(), strict=True):
        nn.utils.vector_to_parameters(start + distance, net.parameters())
        expected = nn.functional.cross_entropy(net(inputs), labels).detach()
        assert value == pytest.approx(float(expected), rel=1e-13)


def test_scanner_sees_the_batches_of_both_processes(outcomes):
    first, second = outcomes("scanner_on_the_step")
    assert len(first["logged"]) == 3
    assert same(first["logged"], second["logged"])
    assert same(first["state"], second["state"])
    for step, logged in first["logged"]:
        parts = [first["batches"][step], second["batches"][step]]
        batch, start = union_of(parts), first["parameters"][step]
        module = runs.Smooth().double()

        def loss_at(flat, batch=batch, module=module):
            nn.utils.vector_to_parameters(flat, module.parameters())
            return module.loss(batch).detach()

        values, vectors = torch.linalg.eigh(dense_hessian(start, batch))
        assert logged["scan/loss"] == pytest.approx(float(loss_at(start)), rel=1e-12)
        assert logged["scan/lambda_1"] == pytest.approx(float(values[-1]), rel=1e-9)
        assert logged["scan/lambda_min_1"] == pytest.approx(float(values[0]), rel=1e-9)
        top = vectors[:, -1]
        components = []
        for part in parts:
            loss_at(start)
            gradient = torch.autograd.grad(module.loss(part), module.parameters())
            components.append(float(top @ torch.cat([g.reshape(-1) for g in gradient])))
        slope = (5 * components[0] + 3 * components[1]) / 8
        assert logged["scan/gradient_component_1"] == pytest.approx(abs(slope), rel=1e-6)
        downhill = -math.copysign(1, slope) * top
        where = torch.linspace(-1, 1, 11, dtype=torch.float64)
        curve = torch.stack([loss_at(start + t * downhill) for t in where])
        powers = torch.stack([where**power for power in range(3)], dim=1)
        fitted = 2 * float(torch.linalg.lstsq(powers, curve[:, None]).solution[2])
        assert logged["scan/curvature_fit_1_1"] == pytest.approx(fitted, rel=1e-6)
        changes = [float(loss_at(start - 2 * 0.05 * c * top) - loss_at(start)) for c in components]
        assert logged["scan/expected_change_2"] == pytest.approx(sum(changes) / 2, rel=1e-6)
        found = logged["scan/unit_step_1"]
        least = float(loss_at(start + found * downhill))
        assert all(least <= float(loss_at(start + f * found * downhill)) for f in (0, 0.99, 1.01))


def test_scans_go_on_in_both_processes_after_one_failed_in_the_midst(outcomes):
    first, second = outcomes("failing_scan")
    assert same(first["logged"], second["logged"])
    converged = [logged["scan/converged"] for _, logged in first["logged"]]
    assert converged == [1, 1, 0, 1, 1, 1]
    assert len(first["warned"]) == len(second["warned"]) == 1
    assert re.search("PeerFailureError.*other process", first["warned"][0])
    assert re.search("PlannedError.*planned", second["warned"][0])
    assert same(first["parameters"], second["parameters"])


@pytest.mark.parametrize("share", runs.FRACTIONS)
def test_probe_on_fixed_data_sees_the_samples_that_one_process_would_draw(outcomes, share):
    first, second = (outcome[share] for outcome in outcomes("probe_on_fixed_data"))
    loader = torch.utils.data.DataLoader(runs.regression(runs.FIXED_SAMPLES), runs.FIXED_BATCH)
    alone = SimpleNamespace(train_dataloader=loader, global_rank=0, world_size=1)
    probes = ProbeData("fixed", fraction=runs.FRACTIONS[share], seed=5).batches(alone, None, 0)
    batch = union_of([probe.batch for probe in probes])
    assert len(batch[0]) == {"uneven": 7, "one-sample": 1, "all": 21}[share]
    assert same(first["logged"], second["logged"])
    assert [step for step, _ in first["logged"]] == [0, 3]
    for step, logged in first["logged"]:
        values = torch.linalg.eigvalsh(dense_hessian(first["parameters"][step], batch))
        assert logged["curvature/converged"] == 1
        assert logged["curvature/lambda_max"] == pytest.approx(float(values[-1]), rel=1e-9)
        assert logged["curvature/lambda_min"] == pytest.approx(float(values[0]), rel=1e-9)


@pytest.mark.parametrize(
    ("what", "failing_step"), [("loss of lanczos", 2), ("loss of power", 2), ("loss of lyapunov", 2), ("data", 0)]
)
def test_training_goes_on_in_both_processes_when_one_cannot_measure(outcomes, what, failing_step):
    for outcome in outcomes("failing_probe"):
        assert outcome[what]["steps"] == 6
        assert torch.equal(outcome[what]["parameters"], outcome["without probe"]["parameters"])
        converged = outcome[what]["converged"]
        assert len(converged) == 6
        assert converged[failing_step] == 0
        if what != "loss of lyapunov":  # whose single iteration need not have met the tolerance
            assert converged.count(1.0) == 5


@pytest.mark.parametrize("what", ["loss of lanczos", "loss of power", "loss of lyapunov", "data"])
def test_users_are_told_once_where_and_why_a_measurement_failed(outcomes, what):
    first, second = (outcome[what]["warned"] for outcome in outcomes("failing_probe"))
    assert len(first) == 1
    assert re.search("PeerFailureError.*other process", first[0])
    assert len(second) == 1, "the process that failed says nothing, and no other process knows why"
    assert re.search("PlannedError.*planned", second[0])


@pytest.mark.parametrize("settings", runs.IDENTITY)
@pytest.mark.parametrize(
    "part",
    [
        "parameters",
        "gradients",
        "buffers",
        "optimizer",
        "logged",
        "callback metrics",
        "metrics",
        "attributes",
        "generators",
        "steps",
    ],
)
def test_training_of_two_processes_is_bit_identical_with_and_without_probes(outcomes, settings, part):
    for outcome in outcomes("identity"):
        found = outcome[settings]
        assert found["with"]["measurements"] > 50
        assert found["without"]["measurements"] == 0
        assert found["with"]["steps"] == runs.IDENTITY_STEPS
        assert same(found["without"][part], found["with"][part])


def test_bit_identity_is_of_a_training_that_did_something(outcomes):
    first, second = (outcome["fp32"]["without"] for outcome in outcomes("identity"))
    assert len(first["logged"]) >= runs.IDENTITY_STEPS
    assert not same(first["attributes"], second["attributes"])  # the processes saw different data
    assert same(first["parameters"], second["parameters"])
    losses = torch.stack(first["attributes"][0])
    assert losses[-10:].mean() < losses[:10].mean()


@pytest.mark.parametrize("variant", runs.NUDGED)
def test_nudged_training_follows_the_eigenvectors_of_the_samples_of_both_processes(outcomes, variant):
    first, second = (outcome[variant] for outcome in outcomes("nudged_training"))
    assert same(first["parameters"], second["parameters"])
    assert same(first["logged"], second["logged"])
    assert same(first["state"], second["state"])
    inside, outside = {"nudge": (0.1, 1.0), "no_top": (0.0, 1.0), "top_only": (1.0, 0.0)}[variant]
    samples = runs.regression(runs.FIXED_SAMPLES).tensors  # which the processes share as 11 and 10
    module = runs.Smooth().double()
    micro_batches = len(first["batches"]) // 3
    assert micro_batches == 6
    for epoch in range(3):
        start = epoch * micro_batches
        top = torch.linalg.eigh(dense_hessian(first["parameters"][start], samples)).eigenvectors[:, -3:]
        for step in range(start, start + micro_batches, 2):
            before, after = first["parameters"][step], first["parameters"][step + 2]
            nn.utils.vector_to_parameters(before, module.parameters())
            batches = [outcome["batches"][index] for outcome in (first, second) for index in (step, step + 1)]
            loss = sum(module.loss(batch) for batch in batches) / 4
            whole = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, module.parameters())])
            changed = outside * (whole - top @ (top.T @ whole)) + inside * (top @ (top.T @ whole))
            changed *= min(1.0, 1.0 / (float(changed.norm()) + 1e-6))
            assert (before - after - 0.05 * changed).norm() <= 1e-6 * changed.norm()


@pytest.mark.parametrize("what", ["loss", "memory"])
def test_both_processes_keep_their_directions_when_one_cannot_measure(outcomes, what):
    first, second = (outcome[what] for outcome in outcomes("failing_nudge"))
    assert same(first["parameters"], second["parameters"])
    assert same(first["state"], second["state"])
    for outcome in (first, second):
        assert [logged["nudge/converged"] for logged in outcome["logged"] if "nudge/converged" in logged] == [1, 0, 1]
    assert [len(outcome["warned"]) for outcome in (first, second)] == [1, 1]
    assert re.search("PeerFailureError.*1 other process", first["warned"][0])
    assert re.search("PlannedError.*planned", second["warned"][0])


def test_share_of_the_time_is_decided_by_the_first_process_for_both(outcomes):
    first, second = outcomes("share_of_the_time")
    assert first == second
    assert first["only-first-can-afford-all"] == list(range(60))
    assert first["only-second-can-afford-all"] == [0]
    some = first["first-can-afford-some"]
    assert some[0] == 0
    assert 2 <= len(some) <= 30


def test_batchnorm_that_is_to_be_synchronised_is_refused_before_training(outcomes):
    for told in outcomes("synchronised_batchnorm"):
        assert re.match(r"MisconfigurationException: `CurvatureProbe`.*SyncBatchNorm", told)
