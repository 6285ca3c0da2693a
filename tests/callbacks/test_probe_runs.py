"""Where the values of the probe go, on which data they are, and how they go on from a checkpoint."""

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset

from lyapunov_lightning import CurvatureProbe, HessianConfig, Schedule
from lyapunov_lightning.curvature.errors import CurvatureWarning
from tests.callbacks.probing import Fit, Reference, name_of, sgd
from tests.modules import MemoryLogger, SmallRegressor, Watcher, dense_hessian, regression_data, regression_loader

# What is kept from measurement to measurement.


def test_what_is_compiled_serves_all_measurements(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of Inductor, which takes seconds, the list of operations is run as it is."""
    inductor = pytest.importorskip("torch._inductor")
    given: list[Any] = []

    def compile(traced: Any, inputs: Any) -> Any:
        given.append(inputs)
        return traced

    monkeypatch.setattr(inductor, "compile", compile)
    reference = Reference()
    hessian = HessianConfig(compile=True)
    probe = CurvatureProbe(2, tol=1e-6, hessian=hessian)
    fit(SmallRegressor(), reference, probe, max_steps=6)
    assert len(given) == 1
    assert len(probe.results) == 3
    for result in probe.results:
        assert result.lambda_max == pytest.approx(float(reference.eigenvalues[result.step][-1]), rel=1e-5)


# Where the values go.


def test_early_stopping_follows_the_curvature(fit: Fit) -> None:
    reference = Reference()
    stopping = EarlyStopping("curvature/lambda_max", stopping_threshold=1e6, check_on_train_epoch_end=True)
    trainer = fit(SmallRegressor(), reference, CurvatureProbe(1, tol=1e-3), stopping, max_steps=30)
    assert (trainer.global_step, stopping.stopped_epoch) == (6, 0)
    patient = EarlyStopping(
        "curvature/lambda_max", mode="max", min_delta=1e6, patience=2, check_on_train_epoch_end=True
    )
    trainer = fit(SmallRegressor(), reference, CurvatureProbe(1, tol=1e-3), patient, max_steps=30)
    assert (trainer.global_step, patient.stopped_epoch) == (18, 2)


@pytest.mark.parametrize("on_epoch_end", [False, True])
def test_checkpoints_are_chosen_by_the_curvature(fit: Fit, on_epoch_end: bool, tmp_path: Path) -> None:
    when = {"save_on_train_epoch_end": True} if on_epoch_end else {"every_n_train_steps": 5}
    checkpoints = ModelCheckpoint(tmp_path / "flat", monitor="curvature/lambda_max", mode="min", save_top_k=1, **when)
    logger = fit(SmallRegressor(sgd(lr=0.5)), CurvatureProbe(1), checkpoints, max_steps=30).logger
    every = 6 if on_epoch_end else 5
    seen = {step + 1: value for step, value in logger.curve("curvature/lambda_max").items() if (step + 1) % every == 0}
    best = min(seen, key=seen.get)
    assert float(checkpoints.best_model_score) == pytest.approx(seen[best], rel=1e-5)
    assert torch.load(checkpoints.best_model_path, weights_only=True)["global_step"] == best


def test_every_logger_gets_the_values(fit: Fit) -> None:
    loggers = [MemoryLogger("one"), MemoryLogger("two")]
    fit(SmallRegressor(), CurvatureProbe(5), logger=loggers)
    curves = [logger.curve("curvature/lambda_max") for logger in loggers]
    assert list(curves[0]) == [0, 5, 10]
    assert curves[0] == curves[1]


def test_without_logger_the_values_are_in_the_metrics_with_one_warning(fit: Fit) -> None:
    reference = Reference()
    with pytest.warns(CurvatureWarning, match="the Trainer has no logger.*`trainer.callback_metrics`") as warned:
        trainer = fit(SmallRegressor(), reference, CurvatureProbe(1, tol=1e-3), logger=False)
    assert len([w for w in warned if issubclass(w.category, CurvatureWarning)]) == 1
    assert float(trainer.callback_metrics["curvature/lambda_max"]) == pytest.approx(reference.largest[11], rel=1e-4)


def test_values_are_logged_at_probed_steps_only(fit: Fit) -> None:
    logger = fit(SmallRegressor(), CurvatureProbe(5), max_steps=23).logger
    assert list(logger.curve("curvature/lambda_max")) == [0, 5, 10, 15, 20]


class Time(Callback):
    """A clock on which a step takes one second and a measurement two."""

    def __init__(self) -> None:
        self.now = 0.0
        self.is_measuring = False

    def perf_counter(self) -> float:
        return self.now

    def measure(self, device: torch.device) -> float:
        self.now += 2.0 * self.is_measuring
        self.is_measuring = not self.is_measuring
        return self.now

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.now += 1.0


def test_measurements_take_their_share_of_the_time(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, clock = Reference(), Time()
    monkeypatch.setattr("lyapunov_lightning.training.spacing.time", clock)
    monkeypatch.setattr("lyapunov_lightning.training.reporting.recording._clock", clock.measure)
    probe = CurvatureProbe(schedule=Schedule(max_overhead=0.25), tol=1e-3)
    found = fit(SmallRegressor(), reference, probe, clock, max_steps=100).logger.curve("curvature/lambda_max")
    assert list(found)[:2] == [0, 5]
    assert 2 * (len(found) - 1) / (clock.now - 2) == pytest.approx(0.25, rel=0.1)
    assert found == pytest.approx({step: reference.largest[step] for step in found}, rel=1e-4)


def test_probes_with_prefixes_measure_side_by_side(fit: Fit) -> None:
    reference = Reference()
    probes = [
        CurvatureProbe(1, tol=1e-3, log_prefix="fine"),
        CurvatureProbe(4, "power", "both", log_prefix="coarse"),
        CurvatureProbe(3, "lanczos", "both", tol=1e-1, log_prefix="rough"),
        CurvatureProbe(2, "lanczos", "smallest", tol=1e-3, log_prefix="low"),
        CurvatureProbe(4, "lyapunov", iterations=200, delta_q=1e-5, log_prefix="followed"),
    ]
    logger = fit(SmallRegressor(), reference, *probes, max_steps=6).logger
    for prefix, every, tolerance, ends in (
        ("fine", 1, 1e-4, {"max"}),
        ("coarse", 4, 1e-2, {"max", "min"}),
        ("rough", 3, 1e-2, {"max", "min"}),
        ("low", 2, 1e-4, {"min"}),
        ("followed", 4, 1e-3, {"max"}),
    ):
        for end in ("max", "min"):
            values = reference.largest if end == "max" else reference.smallest
            expected = {step: values[step] for step in range(0, 6, every)} if end in ends else {}
            assert logger.curve(f"{prefix}/curvature/lambda_{end}") == pytest.approx(expected, rel=tolerance)
    assert not any(tag.startswith("curvature/") for tag in logger.tags)


def test_probe_serves_one_run_after_another(fit: Fit) -> None:
    probe = CurvatureProbe(1, tol=1e-3)
    for _ in range(2):
        reference = Reference()
        found = fit(SmallRegressor(), reference, probe).logger.curve("curvature/lambda_max")
        assert found == pytest.approx(reference.largest, rel=1e-4)


def test_interval_begins_anew_in_the_next_run(fit: Fit) -> None:
    probe = CurvatureProbe(10)
    for _ in range(2):
        logger = fit(SmallRegressor(), probe, max_steps=3).logger
        assert list(logger.curve("curvature/lambda_max")) == [0]


# Fixed data.


class SeenByProbe(Watcher):
    """A loss that notes which samples it is asked for. Only the probe calls it.

    Of the batches it leaves out those that are trained on: the batch sharpness is theirs, whatever the data are.

    """

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.trained: list[tuple[int, ...]] = []

    def __call__(self, module: Any, batch: Any) -> Tensor:
        self.seen.append(tuple(batch[2].tolist()))
        return nn.functional.mse_loss(module(batch[0]), batch[1])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.trained.append(tuple(batch[2].tolist()))

    @property
    def batches(self) -> list[tuple[int, ...]]:
        return [batch for batch in self.seen if batch not in self.trained]

    @property
    def samples(self) -> list[int]:
        return sorted({index for batch in self.batches for index in batch})


class ReferenceOnSamples(Watcher):
    """Like `Reference`, on the samples that the probe is about to see: computed after the run, from copies."""

    def __init__(self) -> None:
        self.parameters: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        copies = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.parameters.setdefault(trainer.global_step, copies)

    def largest(self, module: pl.LightningModule, samples: Sequence[int], steps: Any) -> dict[int, float]:
        values: dict[int, float] = {}
        for step in steps:
            module.load_state_dict(self.parameters[step])
            batch = [part[list(samples)] for part in regression_data().tensors]
            values[step] = float(torch.linalg.eigvalsh(dense_hessian(module, batch)[1])[-1])
        return values


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("options", "num_samples"),
    [({"num_batches": 2}, 16), ({"num_batches": 99}, 48), ({"fraction": 1.0}, 48), ({"fraction": 0.4}, 24), ({}, 8)],
    ids=name_of,
)
def test_fixed_data_are_the_same_samples_throughout(
    fit: Fit, options: dict[str, Any], num_samples: int, accumulate: int
) -> None:
    seen, reference, module = SeenByProbe(), ReferenceOnSamples(), SmallRegressor()
    probe = CurvatureProbe(3, tol=1e-3, hessian=HessianConfig("fixed", loss_fn=seen, **options))
    loader = regression_loader(shuffle=True)
    logger = fit(module, reference, seen, probe, loader=loader, accumulate_grad_batches=accumulate).logger
    assert len(seen.samples) == num_samples
    measured = seen.batches[1:]  # after one evaluation that shows what the step hands to whom
    assert all(count == measured.count(measured[0]) for count in Counter(measured).values())
    found = logger.curve("curvature/lambda_max")
    assert list(found) == [0, 3, 6, 9]
    assert found == pytest.approx(reference.largest(module, seen.samples, found), rel=1e-4)


def test_fixed_data_replay_the_training_step_on_the_whole_set(fit: Fit) -> None:
    reference, module = ReferenceOnSamples(), SmallRegressor()
    loader = regression_loader(batch_size=7, shuffle=True)
    logger = fit(
        module, reference, CurvatureProbe(3, tol=1e-3, hessian=HessianConfig("fixed", fraction=1.0)), loader=loader
    ).logger
    found = logger.curve("curvature/lambda_max")
    assert found == pytest.approx(reference.largest(module, range(48), found), rel=1e-4)


def test_fixed_data_depend_on_the_seed_alone(fit: Fit) -> None:
    def samples(seed: int, run: int) -> list[int]:
        seen = SeenByProbe()
        pl.seed_everything(run, verbose=False)
        probe = CurvatureProbe(3, hessian=HessianConfig("fixed", 1, loss_fn=seen, seed=seed))
        fit(SmallRegressor(), seen, probe, loader=regression_loader(shuffle=True), max_steps=3)
        return seen.samples

    assert samples(0, run=1) == samples(0, run=2)
    assert samples(0, run=1) != samples(1, run=1)


def test_fixed_data_of_a_lyapunov_probe_are_the_whole_set(fit: Fit) -> None:
    reference, module = ReferenceOnSamples(), SmallRegressor()
    probe = CurvatureProbe(1, "lyapunov", hessian=HessianConfig("fixed", fraction=1.0), iterations=150, delta_q=1e-5)
    found = fit(module, reference, probe, loader=regression_loader(batch_size=20), max_steps=1).logger.curve(
        "curvature/lambda_max"
    )
    assert found == pytest.approx(reference.largest(module, range(48), found), rel=1e-3)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(regression_data())


def test_fixed_data_of_a_stream_need_a_number_of_batches(fit: Fit) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"`CurvatureProbe` cannot take a fraction.*HessianConfig\(num_batches"
    ):
        fit(SmallRegressor(), CurvatureProbe(1, hessian=HessianConfig("fixed")), loader=DataLoader(Stream(), 8))


@pytest.mark.parametrize("estimator", ["lanczos", "lyapunov"])
def test_fixed_data_of_a_stream_are_its_first_batches_once_they_have_passed(fit: Fit, estimator: str) -> None:
    reference, module = ReferenceOnSamples(), SmallRegressor()
    options = {"iterations": 150, "delta_q": 1e-5} if estimator == "lyapunov" else {"tol": 1e-3}
    probe = CurvatureProbe(1, estimator, hessian=HessianConfig("fixed", 2), **options)
    with pytest.warns(CurvatureWarning, match="the first 2 batches of this training, kept on the way"):
        logger = fit(module, reference, probe, loader=DataLoader(Stream(), 8), max_steps=3).logger
    found = logger.curve("curvature/lambda_max")
    assert list(found) == [1, 2]
    assert found == pytest.approx(reference.largest(module, range(16), found), rel=1e-3)
    assert list(logger.curve("curvature_details/converged")) == list(found)


# Models that cannot be differentiated twice.


class Once(torch.autograd.Function):
    """A tanh whose backward is a black box, as that of many a fused kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1 - y.square())


class FusedTanh(SmallRegressor):
    def forward(self, inputs: Tensor) -> Tensor:
        return self.net[3](Once.apply(self.net[0](inputs)))


def test_finite_differences_stand_in_with_one_warning(fit: Fit) -> None:
    class Twin(Reference):
        """The same function with a tanh that has two derivatives."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            twin = SmallRegressor()
            twin.load_state_dict(pl_module.state_dict())
            super().on_train_batch_start(trainer, twin, batch, batch_idx)

    reference = Twin()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        logger = fit(FusedTanh(), reference, CurvatureProbe(2, tol=1e-3)).logger
    messages = [str(w.message) for w in warned if issubclass(w.category, CurvatureWarning)]
    found = logger.curve("curvature/lambda_max")
    assert found == pytest.approx({step: reference.largest[step] for step in found}, rel=1e-4)
    assert len(found) == 6
    assert "finite differences" in messages[0]
    assert len(messages) == 1


# Batches of which the loss has no value.


@pytest.mark.parametrize("estimator", ["lanczos", "power", "lyapunov", "critical"])
def test_a_batch_whose_loss_is_nan_fails_the_measurement_and_counts_for_nothing(fit: Fit, estimator: Any) -> None:
    """As where all labels of a batch are ignored: its gradient is zero, and so would its curvature be."""

    def loss_of(module: SmallRegressor, batch: Any) -> Tensor:
        loss = nn.functional.mse_loss(module(batch[0]), batch[1])
        is_without_labels = bool((batch[2] == 0).any())
        return loss.detach() * float("nan") + 0 * loss if is_without_labels else loss

    probe = CurvatureProbe(3, estimator, hessian=HessianConfig("fixed", 3, loss_fn=loss_of))
    with pytest.warns(CurvatureWarning, match="not finite"):
        trainer = fit(SmallRegressor(), probe, max_steps=6)
    assert set(trainer.logger.curve("curvature_details/converged").values()) == {0.0}
    assert not probe.results


# Going on from a checkpoint.


def straight_and_resumed(
    fit: Fit, folder: Path, probes: Callable[[], Sequence[Callback]], at: int, loader: Any, **options: Any
) -> tuple[MemoryLogger, MemoryLogger]:
    """The logs of 26 steps in one run, and of the steps from a checkpoint on."""
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=at, save_top_k=-1, filename="{step}")
    module = SmallRegressor(sgd(momentum=0.9))
    start = {name: value.clone() for name, value in module.state_dict().items()}
    straight = fit(module, *probes(), checkpoints, loader=loader, max_steps=26, **options).logger
    path = folder / f"step={at}.ckpt"
    content = torch.load(path, weights_only=True)
    assert sum("CurvatureProbe" in key for key in content["callbacks"]) == len(probes())
    fresh = SmallRegressor(sgd(momentum=0.9))
    fresh.load_state_dict(start)
    safely = {"weights_only": True} if "weights_only" in inspect.signature(pl.Trainer.fit).parameters else {}
    resumed = fit(fresh, *probes(), loader=loader, max_steps=26, ckpt_path=path, **safely, **options).logger
    return straight, resumed


def curvature_after(logger: MemoryLogger, step: int) -> list[Any]:
    """All that probes logged from a step on, but for the time."""
    return [
        (at, {tag: value for tag, value in metrics.items() if not tag.endswith("seconds")})
        for at, metrics in logger.history
        if at >= step and any("curvature" in tag for tag in metrics)
    ]


IN_AN_EPOCH = DataLoader(ConcatDataset([Subset(regression_data(), range(8))] * 6), 8)
"""Six equal batches: Lightning begins a resumed epoch with its first batch, so others would not be the same."""


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint", "ignore:.*before the epoch ended")
@pytest.mark.parametrize(
    ("options", "when"),
    [
        ({"every_n_steps": 1, "end": "both"}, "epoch"),
        ({"every_n_steps": 1, "end": "both"}, "batch"),
        ({"every_n_steps": 4, "estimator": "power"}, "batch"),
        ({"every_n_steps": 1, "estimator": "lyapunov"}, "batch"),
        ({"every_n_steps": 3, "estimator": "lyapunov", "end": "both", "iterations": 2}, "epoch"),
        ({"every_n_steps": 2, "hessian": HessianConfig("fixed", fraction=0.5)}, "epoch"),
        ({"every_n_steps": 2, "hessian": HessianConfig("fixed", fraction=0.5)}, "batch"),
    ],
    ids=name_of,
)
def test_resumed_run_logs_the_same_bits(fit: Fit, tmp_path: Path, options: dict[str, Any], when: str) -> None:
    at, loader = {"epoch": (12, regression_loader()), "batch": (14, IN_AN_EPOCH)}[when]
    straight, resumed = straight_and_resumed(fit, tmp_path, lambda: [CurvatureProbe(**options)], at, loader)
    expected = curvature_after(straight, at)
    assert len(expected) >= 3
    assert curvature_after(resumed, at) == expected
    assert len(resumed.curve("curvature_details/converged")) == len(expected)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_resumed_run_with_accumulation_and_several_probes_logs_the_same_bits(fit: Fit, tmp_path: Path) -> None:
    def probes() -> list[Callback]:
        return [
            CurvatureProbe(1, log_prefix="one"),
            CurvatureProbe(2, "lyapunov", log_prefix="two"),
            CurvatureProbe(3, end="both", log_prefix="three"),
        ]

    straight, resumed = straight_and_resumed(fit, tmp_path, probes, 12, regression_loader(), accumulate_grad_batches=2)
    assert curvature_after(resumed, 12) == curvature_after(straight, 12)
    assert {"one/curvature/lambda_max", "two/curvature/lyapunov_exponent", "three/curvature/lambda_min"} <= resumed.tags


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_resumed_preconditioned_measurement_logs_the_same_bits(fit: Fit, tmp_path: Path) -> None:
    class Adam(SmallRegressor):
        def __init__(self, _: Any = None) -> None:
            super().__init__(lambda p: torch.optim.AdamW(p, lr=0.02))

    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=18, save_top_k=-1, filename="{step}")
    first, second = CurvatureProbe(1, eigenvalue_every=1), CurvatureProbe(1, eigenvalue_every=1)
    straight = fit(Adam(), first, checkpoints, max_steps=30).logger
    resumed = fit(Adam(), second, max_steps=30, ckpt_path=tmp_path / "step=18.ckpt").logger
    assert curvature_after(resumed, 18) == curvature_after(straight, 18)
    assert "curvature/preconditioned_lambda_max" in resumed.tags


def test_ascent_that_follows_the_other_end_is_not_passed_off_as_the_largest(fit: Fit) -> None:
    class Saddle(SmallRegressor):
        """A loss with the curvatures 1 and -10 along the first two parameters."""

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-12)

    def saddle(module: Any, batch: Any) -> torch.Tensor:
        first, second = module.net[0].weight.reshape(-1)[:2]
        return first.square() / 2 - 5 * second.square()

    probe = CurvatureProbe(1, "lyapunov", hessian=HessianConfig(loss_fn=saddle), iterations=50)
    logger = fit(Saddle(), probe, max_steps=4).logger
    assert list(logger.curve("curvature/lambda_min").values())[-1] == pytest.approx(-10, rel=1e-6)
    assert not logger.curve("curvature/lambda_max")


def test_what_was_measured_before_an_adams_moments_settled_is_in_no_later_average(fit: Fit) -> None:
    # Two eigenvalues only, before: they must not stand for one in another metric either.
    probe = CurvatureProbe(1, eigenvalue_every=10**6)
    fit(SmallRegressor(lambda parameters: torch.optim.Adam(parameters, lr=0.01)), probe, max_steps=30)
    first = next(place for place, result in enumerate(probe.results) if place > 1 and result.is_settled)
    before, after = probe.results[first - 1], probe.results[first]
    assert before.batch_sharpness != before.step_sharpness
    assert after.batch_sharpness == after.step_sharpness
    assert before.decisive_eigenvalue is not None
    assert after.decisive_eigenvalue is None
