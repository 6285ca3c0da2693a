"""What cannot be right is refused with the cause and the remedy; what fails in mid-training is warned of once."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lyapunov_lightning import CurvatureProbe, HessianConfig, Schedule, callbacks
from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.training.checks import check_objective
from tests.modules import MemoryLogger, SmallRegressor, Watcher, dense_hessian, regression_data, regression_loader
from tests.training_runs import train

# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` should be a positive int, got 0."),
        ({"every_n_steps": -1}, "`every_n_steps` should be a positive int, got -1."),
        ({"every_n_steps": 1.5}, "`every_n_steps` should be a positive int, got 1.5."),
        ({"every_n_steps": True}, "`every_n_steps` should be a positive int, got True."),
        (
            {"every_n_steps": 5, "schedule": Schedule(first_n_steps=3)},
            "`every_n_steps` is itself a schedule, so `schedule` should be None.",
        ),
        ({"schedule": 5}, "`schedule` should be a Schedule, or a mapping of its fields, got 5."),
        ({"hessian": "eval"}, "`hessian` should be a HessianConfig, or a mapping of its fields, got 'eval'."),
        ({"every_n_steps": "10"}, "`every_n_steps` should be a positive int, got '10'."),
        ({"tol": "1e-3"}, "`tol` should be a positive float, got '1e-3'."),
        ({"estimator": "arpack"}, "`estimator` should be one of lanczos, lyapunov, power, critical, got 'arpack'."),
        ({"end": "top"}, "`end` should be one of largest, smallest, both, got 'top'."),
        ({"end": None}, "`end` should be one of largest, smallest, both, got None."),
        ({"tol": -1}, "`tol` should be a positive float, got -1."),
        ({"tol": 0}, "`tol` should be a positive float, got 0."),
        ({"tol": math.nan}, "`tol` should be a positive float, got nan."),
        ({"iterations": 0}, "`iterations` should be a positive int, got 0."),
        ({"iterations": 2.0}, "`iterations` should be a positive int, got 2.0."),
        ({"iterations": True}, "`iterations` should be a positive int, got True."),
        ({"delta_q": -1}, "`delta_q` should be a positive float, got -1."),
        ({"delta_q": 0}, "`delta_q` should be a positive float, got 0."),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_argument_is_named_with_its_value(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        CurvatureProbe(**arguments)


def test_arguments_are_checked_whichever_the_estimator() -> None:
    with pytest.raises(ValueError, match="`delta_q`"):
        CurvatureProbe(estimator="lanczos", delta_q=-1)
    with pytest.raises(ValueError, match="`iterations`"):
        CurvatureProbe(estimator="power", iterations=0)


# Modules and trainers.


@pytest.mark.parametrize(
    "name", ["CurvatureProbe", "SpectrumTracker", "NegativeCurvatureTracker", "LossAlongEigvecScanner"]
)
def test_two_of_a_kind_without_a_prefix_are_refused_with_the_remedy(name: str) -> None:
    kind = getattr(callbacks, name)
    with pytest.raises(MisconfigurationException, match=rf"^Two `{name}`.*`{name}\(log_prefix='second'\)`\.$"):
        train(SmallRegressor(), kind(1), EarlyStopping("loss"), kind(2), max_steps=1)


def test_two_of_a_kind_with_prefixes_keep_their_states_apart(tmp_path: Path) -> None:
    def two() -> list[CurvatureProbe]:
        return [CurvatureProbe(2), CurvatureProbe(3, log_prefix="second")]

    first, second = two(), two()
    options = {"max_steps": 6, "logger": MemoryLogger()}
    train(SmallRegressor(), *first, **options).save_checkpoint(tmp_path / "end.ckpt")
    train(SmallRegressor(), *second, **options, ckpt_path=tmp_path / "end.ckpt")
    assert [[result.step for result in probe.results] for probe in second] == [[0, 2, 4], [0, 3]]


Fit = Callable[..., pl.Trainer]


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    def run(module: pl.LightningModule, *callbacks: Callback, **options: Any) -> pl.Trainer:
        defaults = {"max_steps": 12, "logger": MemoryLogger(), "log_every_n_steps": 1, "default_root_dir": tmp_path}
        return train(module, *callbacks, **{**defaults, "max_epochs": -1, **options})

    pl.seed_everything(5, verbose=False)
    return run


class Dense(Watcher):
    """Goes before the probe: the largest eigenvalue of a dense Hessian at each step."""

    def __init__(self) -> None:
        self.largest: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.largest.append(float(torch.linalg.eigvalsh(dense_hessian(pl_module, batch)[1])[-1]))


class Manual(SmallRegressor):
    """Takes its own steps, two for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(self(batch[0]), batch[1]))
            optimizer.step()


class ManualWithOwnLoss(Manual):
    def curvature_loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])


def squared_error(module: Any, batch: Any) -> Tensor:
    return nn.functional.mse_loss(module(batch[0]), batch[1])


def test_manual_optimization_without_a_loss_is_refused(fit: Fit) -> None:
    message = r"`CurvatureProbe`.*manual optimization.*`curvature_loss\(self, batch\)`.*loss_fn"
    with pytest.raises(MisconfigurationException, match=message):
        fit(Manual(), CurvatureProbe())


@pytest.mark.parametrize("estimator", ["lanczos", "lyapunov"])
@pytest.mark.parametrize(
    ("module", "options"),
    [(ManualWithOwnLoss, {}), (Manual, {"hessian": HessianConfig(loss_fn=squared_error)})],
    ids=["module", "loss_fn"],
)
def test_manual_optimization_with_a_loss_is_measured(
    fit: Fit, module: type, options: dict[str, Any], estimator: str
) -> None:
    dense = Dense()
    more = {"iterations": 200, "delta_q": 1e-5} if estimator == "lyapunov" else {}
    probe = CurvatureProbe(1, estimator, tol=1e-3, **options, **more)
    found = fit(module(), dense, probe, max_steps=6).logger.curve("curvature/lambda_max")
    assert len(found) == 3  # a batch is two optimizer steps
    assert list(found.values()) == pytest.approx(dense.largest, rel=1e-3)


class NothingToTrain(pl.LightningModule):
    """No parameters, as a baseline may have."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> None:
        return None


class Frozen(SmallRegressor):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None


@pytest.mark.parametrize("module", [NothingToTrain, Frozen])
def test_module_without_trainable_parameters_is_refused(fit: Fit, module: type) -> None:
    message = f"`CurvatureProbe` needs a module with trainable parameters, but {module.__name__} has none. Remove the"
    with pytest.raises(MisconfigurationException, match=message):
        fit(module(), CurvatureProbe())


class TakesIterator(SmallRegressor):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, *_ = next(dataloader_iter)
        return squared_error(self, batch)


def test_step_that_takes_an_iterator_is_refused(fit: Fit) -> None:
    with pytest.raises(MisconfigurationException, match=r"`dataloader_iter`.*Let `training_step` take `batch`"):
        fit(TakesIterator(), CurvatureProbe())


def deepspeed() -> DeepSpeedStrategy:
    return DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # its constructor needs the package to be installed


def model_parallel() -> Any:
    from lightning.pytorch.strategies import ModelParallelStrategy

    return ModelParallelStrategy()


def on(strategy: Any, world_size: int = 2) -> Any:
    """As much of a trainer as the check looks at; the real one does not start such a strategy on a CPU."""
    return SimpleNamespace(strategy=strategy, world_size=world_size)


@pytest.mark.parametrize("strategy", [FSDPStrategy, deepspeed])
@pytest.mark.parametrize("loss_fn", [None, squared_error])
def test_strategy_that_hides_parameters_is_refused(strategy: Any, loss_fn: Any) -> None:
    built = strategy()
    message = f"`CurvatureProbe` cannot .*{type(built).__name__}.*ModelParallelStrategy.*`fully_shard`"
    with pytest.raises(MisconfigurationException, match=message):
        check_objective("CurvatureProbe", on(built), SmallRegressor(), HessianConfig(loss_fn=loss_fn))


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy, DDPStrategy, model_parallel])
def test_strategy_that_gives_parameters_is_accepted(strategy: Any) -> None:
    check_objective("CurvatureProbe", on(strategy()), SmallRegressor(), HessianConfig())


def test_synchronised_batch_norm_is_refused_where_it_synchronises() -> None:
    module = SmallRegressor()
    module.net.append(nn.SyncBatchNorm(2))
    with pytest.raises(MisconfigurationException, match=r"`SyncBatchNorm`.*Use `HessianConfig\(mode='eval'\)`"):
        check_objective("CurvatureProbe", on(DDPStrategy()), module, HessianConfig())
    check_objective("CurvatureProbe", on(DDPStrategy()), module, HessianConfig(mode="eval"))
    check_objective("CurvatureProbe", on(SingleDeviceStrategy(), world_size=1), module, HessianConfig())


def test_setup_of_other_stages_checks_nothing(tmp_path: Path) -> None:
    class Evaluated(Manual):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        callbacks=[CurvatureProbe()],
    )
    with pytest.warns(CurvatureWarning, match="nothing during `trainer.validate`"):
        trainer.validate(Evaluated(), regression_loader(), verbose=False)


def test_empty_training_data_are_no_failure(fit: Fit) -> None:
    fit(SmallRegressor(), CurvatureProbe(1), loader=DataLoader([], 4), max_epochs=1)


# Failures in mid-training: one warning for each kind, `curvature_details/converged` is 0, training goes on.


def of_the_probe(warned: Any) -> list[str]:
    return [str(w.message) for w in warned if issubclass(w.category, CurvatureWarning)]


def raise_error(error: BaseException) -> Callable[..., Any]:
    def loss_fn(module: Any, batch: Any) -> Tensor:
        raise error

    return loss_fn


BAD_LOSSES: dict[str, tuple[Any, str]] = {
    "vector": (lambda m, b: (m(b[0]) - b[1]).square(), r"scalar, got a tensor of shape \(8, 2\).*`.mean\(\)`"),
    "float": (lambda m, b: 1.5, "should (be|return) a scalar tensor, got float"),
    "none": (lambda m, b: None, "returned None"),
    "mapping": (lambda m, b: {"accuracy": torch.zeros(())}, "mapping without the key 'loss', with 'accuracy'"),
    "nan": (lambda m, b: squared_error(m, b) * math.nan, "not finite"),
    "inf": (lambda m, b: squared_error(m, b) * math.inf, "not finite"),
    "error": (raise_error(ZeroDivisionError("no good")), "ZeroDivisionError.*no good"),
    "runtime-error": (raise_error(RuntimeError("no good")), "RuntimeError.*no good"),
    "memory": (raise_error(torch.OutOfMemoryError("CUDA out of memory")), "OutOfMemoryError.*CUDA out of memory"),
    "stop-iteration": (raise_error(StopIteration("no good")), "StopIteration"),
}


@pytest.mark.parametrize("estimator", ["lanczos", "lyapunov", "power"])
@pytest.mark.parametrize("name", BAD_LOSSES)
def test_failing_measurement_is_warned_of_once_and_training_goes_on(fit: Fit, name: str, estimator: str) -> None:
    loss_fn, message = BAD_LOSSES[name]
    with pytest.warns(CurvatureWarning, match=message) as warned:
        trainer = fit(
            SmallRegressor(), CurvatureProbe(1, estimator, hessian=HessianConfig(loss_fn=loss_fn)), max_steps=3
        )
    assert len(of_the_probe(warned)) == 1
    assert "`CurvatureProbe`: the measurement at step 0 failed, and training goes on" in of_the_probe(warned)[0]
    assert trainer.global_step == 3
    assert trainer.logger.curve("curvature_details/converged") == dict.fromkeys(range(3), 0.0)
    assert "curvature/lambda_max" not in trainer.logger.tags


def test_each_kind_of_failure_is_warned_of_once(fit: Fit) -> None:
    errors = [ValueError("first"), KeyError("second"), ValueError("third"), None]

    def loss_fn(module: Any, batch: Any) -> Tensor:
        error = errors[min(module.global_step, 3)]
        if error is not None:
            raise error
        return squared_error(module, batch)

    with pytest.warns(CurvatureWarning) as warned:
        logger = fit(SmallRegressor(), CurvatureProbe(1, hessian=HessianConfig(loss_fn=loss_fn))).logger
    first, second = of_the_probe(warned)
    assert "at step 0 failed" in first
    assert "first" in first
    assert "at step 1 failed" in second
    assert "second" in second
    assert list(logger.curve("curvature/lambda_max")) == list(range(3, 12))


def test_interruption_by_the_user_is_not_swallowed(fit: Fit) -> None:
    # Lightning turns the interruption into a graceful end of the run, in which nothing is measured any more.
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(SmallRegressor(), CurvatureProbe(1, hessian=HessianConfig(loss_fn=raise_error(KeyboardInterrupt()))))


class SkipsBatches(SmallRegressor):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("estimator", ["lanczos", "lyapunov", "power"])
def test_step_that_returns_none_now_and_then_is_warned_of_once(fit: Fit, estimator: str) -> None:
    with pytest.warns(CurvatureWarning, match="returned None") as warned:
        trainer = fit(SkipsBatches(), CurvatureProbe(1, estimator))
    assert len(of_the_probe(warned)) == 1
    assert trainer.global_step == 12
    expected = [step for step in range(12) if step % 3 != 1]
    assert list(trainer.logger.curve("curvature/lambda_max")) == expected
    converged = trainer.logger.curve("curvature_details/converged")
    assert {step: converged.get(step) for step in (1, 4, 7, 10)} == dict.fromkeys((1, 4, 7, 10), 0.0)


class Overflows(SmallRegressor):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if batch_idx == 3 else loss


@pytest.mark.parametrize("estimator", ["lanczos", "lyapunov", "power"])
def test_loss_that_is_not_finite_is_warned_of_once(fit: Fit, estimator: str) -> None:
    with pytest.warns(CurvatureWarning, match="not finite") as warned:
        trainer = fit(Overflows(), CurvatureProbe(1, estimator))
    assert len(of_the_probe(warned)) == 1
    assert trainer.global_step == 12
    # the parameters are NaN from the fourth step on
    assert list(trainer.logger.curve("curvature/lambda_max")) == [0, 1, 2]
    assert trainer.logger.curve("curvature_details/converged").keys() == set(range(12))
    assert all(not trainer.logger.curve("curvature_details/converged")[step] for step in range(3, 12))
    logged = [value for _, metrics in trainer.logger.history for tag, value in metrics.items() if "curvature" in tag]
    assert all(map(math.isfinite, logged))


@pytest.mark.parametrize("estimator", ["lanczos", "lyapunov", "power"])
def test_probe_recovers_from_one_bad_batch(fit: Fit, estimator: str) -> None:
    # as with skipped steps of a loss scaler: one batch overflows, the parameters stay good
    def loss_fn(module: Any, batch: Any) -> Tensor:
        return squared_error(module, batch) * (math.nan if module.global_step in (0, 2) else 1)

    dense = Dense()
    options = {"iterations": 200, "delta_q": 1e-5} if estimator == "lyapunov" else {"tol": 1e-3}
    probe = CurvatureProbe(1, estimator, hessian=HessianConfig(loss_fn=loss_fn), **options)
    with pytest.warns(CurvatureWarning, match="not finite"):
        logger = fit(SmallRegressor(), dense, probe, max_steps=4).logger
    found = logger.curve("curvature/lambda_max")
    assert found.keys() == {1, 3}
    assert found == pytest.approx({step: dense.largest[step] for step in found}, rel=1e-2)


def test_loss_without_curvature_is_measured_as_zero(fit: Fit) -> None:
    probe = CurvatureProbe(
        1, end="both", hessian=HessianConfig(loss_fn=lambda module, batch: sum(p.sum() for p in module.parameters()))
    )
    logger = fit(SmallRegressor(), probe, max_steps=3).logger
    assert logger.curve("curvature/lambda_max") == {0: 0.0, 1: 0.0, 2: 0.0}
    assert logger.curve("curvature/lambda_min") == {0: 0.0, 1: 0.0, 2: 0.0}
    assert set(logger.curve("curvature_details/converged").values()) == {1.0}


def test_loss_of_no_parameter_is_no_crash(fit: Fit) -> None:
    probe = CurvatureProbe(1, hessian=HessianConfig(loss_fn=lambda module, batch: batch[0].mean()))
    trainer = fit(SmallRegressor(), probe, max_steps=3)
    assert trainer.global_step == 3
    assert set(trainer.logger.curve("curvature/lambda_max").values()) == {0.0}


class OneParameter(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 1.5 * self.weight.square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("end", ["largest", "smallest"])
@pytest.mark.parametrize("estimator", ["lanczos", "power"])
def test_single_parameter_has_an_eigenvalue(fit: Fit, estimator: str, end: str) -> None:
    trainer = fit(OneParameter(), CurvatureProbe(1, estimator, end), max_steps=3)
    name = "lambda_max" if end == "largest" else "lambda_min"
    assert trainer.logger.curve(f"curvature/{name}") == dict.fromkeys(range(3), pytest.approx(3.0))


def test_single_parameter_has_no_two_ends(fit: Fit) -> None:
    with pytest.raises(MisconfigurationException, match=r"`CurvatureProbe` cannot find 2 eigenvalues.*1 trainable"):
        fit(OneParameter(), CurvatureProbe(1, end="both"), max_steps=3)


def test_batch_without_tensors_is_measured_where_no_sample_count_is_needed(fit: Fit) -> None:
    class OfNumbers(OneParameter):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return float(batch["scale"][0]) * self.weight.square().sum()

    loader = DataLoader([{"scale": "2.0"}] * 4, 1)
    assert fit(OfNumbers(), CurvatureProbe(1), loader=loader, max_steps=2).logger.curve("curvature/lambda_max") == {
        0: pytest.approx(4.0),
        1: pytest.approx(4.0),
    }


def test_fixed_data_with_more_samples_wanted_than_there_are_takes_them_all(fit: Fit) -> None:
    dense, seen = Dense(), set()

    def loss_fn(module: Any, batch: Any) -> Tensor:
        seen.update(batch[2].tolist())
        return squared_error(module, batch)

    loader = DataLoader(regression_data(10), 10)
    logger = fit(
        SmallRegressor(),
        dense,
        CurvatureProbe(1, tol=1e-3, hessian=HessianConfig("fixed", 50, loss_fn=loss_fn)),
        loader=loader,
    ).logger
    assert seen == set(range(10))
    assert list(logger.curve("curvature/lambda_max").values()) == pytest.approx(dense.largest, rel=1e-4)
