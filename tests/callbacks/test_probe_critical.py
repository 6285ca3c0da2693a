"""The probe's critical sharpness, along the steps that the optimizer takes."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lyapunov_lightning import CurvatureProbe, HessianConfig, QuasiNewtonLRController
from lyapunov_lightning.callbacks.estimators import ESTIMATORS, CriticalLearningRate, MeasuredStep
from lyapunov_lightning.callbacks.results.probe import ProbeResult
from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.training.schedule import ScheduleState
from tests.callbacks.probing import Fit, sgd, two_groups
from tests.modules import SmallRegressor, Watcher, dense_hessian, regression_data, regression_loader

FULL = {"batch_size": 48}


class Steps(Watcher):
    """Goes along with a run and notes what the critical sharpness of each step is, by a dense search of its own.

    Args:
        other: A batch on which the loss is looked at in place of the step's own ones.

    """

    def __init__(self, other: Any = None) -> None:
        self._other = other
        self.along_update: dict[int, float] = {}
        self.along_gradient: dict[int, float] = {}
        self.critical: dict[int, float] = {}
        self.changes: dict[int, float] = {}
        self.lr = math.nan
        self._batches: list[Any] = []
        self._begun: tuple[int, Tensor, Any, Tensor] | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._batches = [*(self._batches if self._begun is not None else []), batch]
        whole = [torch.cat(parts) for parts in zip(*self._batches, strict=True)]
        measured = whole if self._other is None else self._other
        _, hessian = dense_hessian(pl_module, measured)
        self._begun = trainer.global_step, flat(pl_module), measured, hessian
        self.lr = max(group["lr"] for group in trainer.optimizers[0].param_groups)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._begun is None or trainer.global_step == self._begun[0]:
            return
        (step, before, measured, hessian), self._begun = self._begun, None
        update = (flat(pl_module) - before) / self.lr

        def loss(parameters: Tensor) -> Tensor:
            return loss_at(pl_module, parameters, measured)

        gradient = torch.autograd.functional.jacobian(loss, before)
        self.along_update[step] = float(update @ hessian @ update / -(gradient @ update))
        self.along_gradient[step] = float(gradient @ hessian @ gradient / (gradient @ gradient))
        with torch.no_grad():
            start = float(loss(before))
            self.changes[step] = float(loss(before + self.lr * update)) - start
            etas = [self.lr * 2 ** (power / 200) for power in range(-1000, 2000)]
            values = torch.vmap(loss)(before + torch.tensor(etas, dtype=before.dtype)[:, None] * update)
        risen = (values > start).nonzero()
        self.critical[step] = 2 / etas[int(risen[0])] if len(risen) else math.nan


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


def loss_at(module: nn.Module, parameters: Tensor, batch: Any) -> Tensor:
    named = dict(module.named_parameters())
    pieces = parameters.split([parameter.numel() for parameter in named.values()])
    values = {name: piece.view_as(named[name]) for name, piece in zip(named, pieces, strict=True)}
    return nn.functional.mse_loss(torch.func.functional_call(module, values, (batch[0],)), batch[1])


def probe(every_n_steps: int = 1, **options: Any) -> CurvatureProbe:
    return CurvatureProbe(every_n_steps, "critical", **options)


def near(values: dict[int, float], rel: float = 0.021) -> Any:
    return pytest.approx(values, rel=rel)


# What is measured.


def test_gradient_descent_on_a_quadratic_has_the_curvature_along_the_gradient(fit: Fit) -> None:
    steps = Steps()
    module = SmallRegressor(sgd(lr=0.05), linear=True)
    logger = fit(module, steps, probe(), loader=regression_loader(**FULL)).logger
    found = logger.curve("curvature/critical_sharpness")
    assert found == near(steps.along_gradient)
    assert list(found) == list(range(12))
    assert logger.curve("curvature_details/stability_limit") == pytest.approx(dict.fromkeys(range(12), 2 / 0.05))
    assert logger.curve("curvature/stability_ratio") == pytest.approx({s: v * 0.05 / 2 for s, v in found.items()})
    errors = logger.curve("curvature_details/value_error")
    assert all(abs(found[step] - value) <= errors[step] for step, value in steps.along_gradient.items())
    assert set(logger.curve("curvature_details/converged").values()) == {1.0}
    passes = list(logger.curve("curvature_details/forward_passes").values())
    assert passes[0] <= 15
    assert max(passes[1:]) <= 10
    assert logger.tags >= {"curvature_details/seconds", "curvature_details/matvecs"}
    assert not logger.tags & {"curvature/lambda_max", "curvature_details/residual", "curvature/lambda_min"}


@pytest.mark.parametrize(
    "optimizer",
    [
        sgd(lr=0.3, momentum=0.5),
        lambda p: torch.optim.Adam(p, lr=1e-2),
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, lr=1e-3),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
        two_groups,
    ],
    ids=["momentum", "adam", "adamw", "rmsprop", "lbfgs", "groups"],
)
def test_it_is_that_of_the_step_which_the_optimizer_takes(fit: Fit, optimizer: Any) -> None:
    steps = Steps()
    watching = probe()
    fit(SmallRegressor(optimizer), steps, watching, loader=regression_loader(**FULL))
    found = {result.step: result.critical_sharpness for result in watching.results}
    assert found == near(steps.critical)
    assert len(found) == 12


def test_on_a_quadratic_it_is_the_curvature_over_the_slope_for_adam_too(fit: Fit) -> None:
    steps = Steps()
    module = SmallRegressor(lambda p: torch.optim.Adam(p, lr=1e-2), linear=True)
    logger = fit(module, steps, probe(), loader=regression_loader(**FULL)).logger
    assert logger.curve("curvature/critical_sharpness") == near(steps.along_update)


@pytest.mark.parametrize("lr", [0.1, 0.9, 1.5, 3.0])
def test_ratio_above_one_is_a_step_that_raises_the_loss(fit: Fit, lr: float) -> None:
    steps, watching = Steps(), probe()
    fit(SmallRegressor(sgd(lr=lr), linear=True), steps, watching, loader=regression_loader(**FULL), max_steps=6)
    known = [result for result in watching.results if abs(result.stability_ratio - 1) > 0.03]
    assert known
    assert all((result.stability_ratio > 1) is (steps.changes[result.step] > 0) for result in known)
    assert {result.stability_ratio > 1 for result in known} == {lr > 1.2}


def test_it_does_not_matter_what_moves_the_parameters_or_the_learning_rate_after_the_step(fit: Fit) -> None:
    class Meddler(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            trainer.optimizers[0].param_groups[0]["lr"] *= 0.9
            with torch.no_grad():
                pl_module.net[0].weight.add_(0.1)

    class Scheduled(SmallRegressor):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    steps, watching = Steps(), probe()
    fit(Scheduled(sgd(lr=0.1)), steps, Meddler(), watching, loader=regression_loader(**FULL))
    assert {result.step: result.learning_rate for result in watching.results} == pytest.approx(
        {step: 0.1 * 0.72**step for step in range(12)}
    )
    assert {result.step: result.critical_sharpness for result in watching.results} == near(steps.critical)


def test_it_goes_along_with_a_callback_that_sets_the_learning_rate(fit: Fit) -> None:
    for place in (0, 1):
        steps, watching = Steps(), probe()
        others: list[Callback] = [QuasiNewtonLRController()]
        others.insert(place, watching)
        fit(SmallRegressor(sgd(lr=1e-3)), *others, steps, loader=regression_loader(**FULL))
        assert len(watching.results) == 12
        assert all(result.converged for result in watching.results)


def test_a_step_of_several_batches_is_seen_on_all_of_them(fit: Fit) -> None:
    steps, watching = Steps(), probe()
    logger = fit(SmallRegressor(), steps, watching, accumulate_grad_batches=3, max_steps=4).logger
    found = logger.curve("curvature/critical_sharpness")
    expected = {step: value for step, value in steps.critical.items() if not math.isnan(value)}
    assert found == near({step: value for step, value in expected.items() if step in found})
    assert len(watching.results) == 4
    assert len(found) == 4


def test_values_are_of_the_parameters_before_the_step_with_its_random_numbers(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float]] = []

    class Watching(CriticalLearningRate):
        def measure(self, at: MeasuredStep) -> ProbeResult:
            after = at.hessian.layout.flatten(at.hessian.parameters)
            values = at.hessian.values_along(self._before - after, [1.0])
            seen.append((at.step.index, float(values[0])))
            return super().measure(at)

    monkeypatch.setitem(ESTIMATORS, "critical", Watching)
    trainer = fit(SmallRegressor(dropout=0.3), probe())
    assert dict(seen) == pytest.approx(trainer.logger.curve("train_loss"), rel=1e-9)


def test_dropout_has_the_masks_of_the_step(fit: Fit) -> None:
    watching = probe()
    fit(SmallRegressor(sgd(lr=0.05), dropout=0.3), watching)
    assert all(result.converged for result in watching.results)  # with others the loss would not fall first


def test_fixed_data_are_seen_along_the_same_step(fit: Fit) -> None:
    steps = Steps(next(iter(regression_loader(**FULL))))
    logger = fit(SmallRegressor(sgd(lr=0.05)), steps, probe(hessian=HessianConfig("fixed", 6))).logger
    found = logger.curve("curvature/critical_sharpness")
    assert found == near({step: steps.critical[step] for step in found})
    assert len(found) >= 8


def test_the_loss_of_other_data_is_seen_along_the_same_step(fit: Fit) -> None:
    inputs, targets = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    steps, own_steps = Steps((inputs, targets)), Steps()

    def of_others(module: Any, batch: Any) -> Tensor:
        return nn.functional.mse_loss(module(inputs), targets)

    probes = [probe(log_prefix="own"), probe(log_prefix="other", hessian=HessianConfig(loss_fn=of_others))]
    module = SmallRegressor(sgd(lr=0.02), linear=True)
    logger = fit(module, steps, own_steps, *probes, loader=regression_loader(**FULL)).logger
    own, other = (logger.curve(f"{name}/curvature/critical_sharpness") for name in ("own", "other"))
    assert own == near(own_steps.along_update)
    # Where the step leads downhill on the other data too, the curvature there is over the slope there.
    downhill = {step: value for step, value in steps.along_update.items() if value > 0}
    assert other == near(downhill)
    assert len(other) >= 3
    assert all(value != pytest.approx(own[step], rel=0.1) for step, value in other.items())


def test_a_loader_of_other_data_gives_the_relative_critical_sharpness(fit: Fit) -> None:
    """On a quadratic it is ``uᵀH'u / (−g'ᵀu)``, with Hessian and gradient of the other data and the own update."""
    generator = torch.Generator().manual_seed(5)
    others = [torch.randn(20, width, generator=generator, dtype=torch.float64) for width in (3, 2)]
    steps, own_steps, others_seen = Steps(others), Steps(), DataLoader(TensorDataset(*others), 8, shuffle=True)
    before = others_seen.generator, torch.get_rng_state()
    probes = [probe(log_prefix="own"), probe(log_prefix="other", hessian=HessianConfig(data=others_seen))]
    module = SmallRegressor(sgd(lr=0.02), linear=True)
    logger = fit(module, steps, own_steps, *probes, loader=regression_loader(**FULL)).logger
    own, other = (logger.curve(f"{name}/curvature/critical_sharpness") for name in ("own", "other"))
    assert own == near(own_steps.along_update)
    # All three batches, the last of which has half the samples; left out where the step leads uphill on them.
    assert other == near({step: value for step, value in steps.along_update.items() if value > 0})
    assert len(other) >= 3
    assert others_seen.generator is before[0]
    assert others_seen._iterator is None


def test_an_eigenvalue_is_that_of_the_other_data_and_the_batch_sharpness_that_of_the_step(fit: Fit) -> None:
    data = regression_data(20).tensors
    loader = DataLoader(TensorDataset(*data), 20)
    dense: dict[int, float] = {}

    class Dense(Watcher):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            dense[trainer.global_step] = float(torch.linalg.eigvalsh(dense_hessian(pl_module, data)[1])[-1])

    options: dict[str, Any] = {"eigenvalue_every": 1, "tol": 1e-6}
    watching = [
        CurvatureProbe(1, hessian=HessianConfig(data=loader), log_prefix="other", **options),
        CurvatureProbe(1, log_prefix="own", **options),
    ]
    fit(SmallRegressor(sgd(lr=0.05)), Dense(), *watching, max_steps=3)
    other, own = (each.results for each in watching)
    assert [result.lambda_max for result in other] == pytest.approx(list(dense.values()), rel=1e-5)
    assert [result.step_sharpness for result in other] == pytest.approx([result.step_sharpness for result in own])


def test_a_loader_that_cannot_be_read_is_refused_before_training(fit: Fit) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(regression_loader())

        def __len__(self) -> int:
            return 6

    hessian = HessianConfig(data=DataLoader(Stream(), None))
    with pytest.raises(
        MisconfigurationException, match=r"the DataLoader in `HessianConfig\(data=...\)`, since an Iter"
    ):
        fit(SmallRegressor(), probe(hessian=hessian))


# Where there is no step, or no value.


def failures_of(fit: Fit, *callbacks: Callback, module: Any = None, **options: Any) -> tuple[list[str], Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module or SmallRegressor(), *callbacks, **options)
    return [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)], trainer


class Sometimes(SmallRegressor):
    """Skips every other batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if batch_idx % 2 == 0 else None


def test_a_step_that_is_skipped_fails_with_one_warning(fit: Fit) -> None:
    watching = probe()
    said, trainer = failures_of(fit, watching, module=Sometimes())
    assert len(said) == 1
    assert "did not move the parameters" in said[0]
    assert list(trainer.logger.curve("curvature_details/converged").values())[:4] == [1.0, 0.0, 1.0, 0.0]
    assert {result.step % 2 for result in watching.results} == {0}


def test_a_step_that_a_loss_scaler_skips_fails_at_that_step_alone(fit: Fit) -> None:
    class Scaled(pl.plugins.precision.Precision):
        """Takes no third step, as a scaler does that finds an overflow."""

        def __init__(self) -> None:
            self.count = 0

        def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
            self.count += 1
            if self.count != 3:
                return super().optimizer_step(optimizer, model, closure, **kwargs)
            result = closure()
            self._after_closure(model, optimizer)
            return result

    said, trainer = failures_of(fit, probe(), plugins=[Scaled()])
    assert len(said) == 1
    assert "the measurement at step 2 failed" in said[0] or "did not move" in said[0]
    converged = trainer.logger.curve("curvature_details/converged")
    assert sum(value == 0.0 for value in converged.values()) == 1


@pytest.mark.parametrize(
    ("lr", "said"), [(0.0, "a learning rate of 0.0"), (1e-18, "lost in the rounding|did not move the parameters")]
)
def test_a_learning_rate_that_moves_nothing_fails(fit: Fit, lr: float, said: str) -> None:
    with pytest.warns(CurvatureWarning, match=said):
        fit(SmallRegressor(sgd(lr=lr)), probe())


def test_a_step_that_leads_uphill_has_no_value(fit: Fit) -> None:
    logger = fit(SmallRegressor(sgd(lr=1e-2, maximize=True)), probe(), max_steps=3).logger
    assert set(logger.curve("curvature_details/converged").values()) == {0.0}
    assert max(logger.curve("curvature_details/forward_passes").values()) <= 10
    assert not logger.tags & {"curvature/critical_sharpness", "curvature/stability_ratio"}
    assert "curvature_details/stability_limit" in logger.tags


class Manual(SmallRegressor):
    """Optimizes by hand, with one optimizer or two."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.count = count

    def curvature_loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.zero_grad()
            self.manual_backward(self.curvature_loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        layers = [self.net[0], self.net[-1]] if self.count == 2 else [self.net] * self.count
        return [torch.optim.SGD(layer.parameters(), lr=0.05) for layer in layers] or None


def test_steps_that_are_made_by_hand_are_seen(fit: Fit) -> None:
    steps, watching = Steps(), probe()
    fit(Manual(1), steps, watching, loader=regression_loader(**FULL))
    assert {result.step: result.critical_sharpness for result in watching.results} == near(steps.critical)


@pytest.mark.parametrize("count", [0, 2])
def test_several_optimizers_or_none_are_refused(fit: Fit, count: int) -> None:
    with pytest.raises(MisconfigurationException, match=rf"here are {count}\. Use `estimator='lanczos'`"):
        fit(Manual(count), probe())


@pytest.mark.parametrize("end", ["smallest", "both"])
def test_other_ends_are_refused(end: Any) -> None:
    with pytest.raises(ValueError, match=f"`end` should be 'largest' with.*got '{end}'. Use `estimator='lanczos'`"):
        CurvatureProbe(1, "critical", end)


def test_parameters_in_half_precision_are_refused(fit: Fit) -> None:
    with pytest.raises(MisconfigurationException, match="lost in the rounding"):
        fit(SmallRegressor().bfloat16(), probe())


# How it goes on, and what it leaves.


def test_it_goes_on_from_a_checkpoint(fit: Fit, tmp_path: Any) -> None:
    whole = probe()
    fit(SmallRegressor(), whole, loader=regression_loader(**FULL))
    pl.seed_everything(5, verbose=False)
    fit(
        SmallRegressor(),
        probe(),
        ModelCheckpoint(tmp_path / "half", every_n_train_steps=6, filename="half", save_top_k=-1),
        loader=regression_loader(**FULL),
        max_steps=6,
    )
    resumed = probe()
    fit(
        SmallRegressor(),
        resumed,
        loader=regression_loader(**FULL),
        ckpt_path=str(next((tmp_path / "half").glob("*.ckpt"))),
        weights_only=True,
    )
    assert resumed.results == whole.results


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        ("critical", {"accumulate_grad_batches": 2}),
        ("lyapunov", {}),
        ("lyapunov", {"gradient_clip_val": 1.0}),
        ("lanczos", {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2}),
    ],
)
def test_a_measurement_in_several_parts_is_paid_for_once(
    fit: Fit, estimator: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spent: list[float] = []
    monkeypatch.setattr(ScheduleState, "record", lambda state, seconds: spent.append(seconds))
    logger = fit(SmallRegressor(), CurvatureProbe(2, estimator), **options).logger
    logged = list(logger.curve("curvature_details/seconds").values())
    assert len(spent) == len(logged) == 6
    assert all(whole > part for whole, part in zip(spent, logged, strict=True))


def test_a_failed_measurement_is_paid_for(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    spent: list[float] = []
    monkeypatch.setattr(ScheduleState, "record", lambda state, seconds: spent.append(seconds))
    failures_of(fit, probe(), module=Sometimes())
    assert len(spent) == 12


def test_it_leaves_no_hook_on_the_optimizer(fit: Fit) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            raise RuntimeError("stop")

    optimizers: list[Any] = []

    def kept(parameters: Any) -> torch.optim.Optimizer:
        optimizers.append(torch.optim.SGD(parameters, lr=0.1))
        return optimizers[-1]

    fit(SmallRegressor(kept), probe())
    with pytest.raises(RuntimeError, match="stop"):
        fit(SmallRegressor(kept), probe(), Stop())
    assert [dict(optimizer._optimizer_step_post_hooks) for optimizer in optimizers] == [{}, {}]


def test_one_probe_serves_one_run_after_another(fit: Fit) -> None:
    watching = probe()
    for _ in range(2):
        steps = Steps()
        logger = fit(SmallRegressor(), steps, watching, loader=regression_loader(**FULL)).logger
        assert logger.curve("curvature/critical_sharpness") == near(steps.critical)


def test_a_learning_rate_that_is_too_large_is_blamed(fit: Fit) -> None:
    watching = probe()
    module = SmallRegressor(sgd(lr=1.3), linear=True)
    with pytest.warns(CurvatureWarning, match="The learning rate is too large"):
        fit(module, watching, loader=regression_loader(**FULL), max_steps=40)
    found = watching.diagnosis()
    assert found.kind == "too_fast"
    assert found.sharpness.startswith("The critical sharpness was")
    assert found.consequence.startswith("The learning rate is too large")


def test_figure_and_summary_speak_of_it(fit: Fit) -> None:
    watching = probe()
    fit(SmallRegressor(sgd(lr=0.1)), watching, loader=regression_loader(**FULL))
    labels = [line.get_label() for line in watching.plot().axes[0].lines]
    assert labels[:2] == ["critical sharpness", "stability limit"]
    assert watching.diagnosis().kind == "room"
    assert "The critical sharpness stayed below the stability limit" in str(watching.diagnosis())
    assert "has room" not in str(watching.diagnosis())
    assert "no others" in str(watching.diagnosis())
    assert watching.charts()["sharpness and stability limit"][0] == "curvature/critical_sharpness$"
