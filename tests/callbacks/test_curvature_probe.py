"""What the probe logs, and when: against dense Hessians that are computed beside it."""

import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset

from lyapunov_lightning import CurvatureProbe
from lyapunov_lightning.curvature.errors import CurvatureWarning
from tests.modules import MemoryLogger, SmallRegressor, dense_hessian, regression_data, regression_loader


def name_of(value: object) -> str:
    """The name of a parameter in a test's id: the same in every process, which a set's or a function's repr is not."""
    if isinstance(value, dict):
        return ",".join(f"{key}={name_of(entry)}" for key, entry in value.items()) or "default"
    if isinstance(value, (set, frozenset)):
        return "+".join(sorted(map(str, value)))
    return getattr(value, "__name__", str(value))


Fit = Callable[..., pl.Trainer]


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    """Fits a module, by default for 12 steps with a `MemoryLogger`, and returns the trainer."""

    def run(module: pl.LightningModule, *callbacks: Callback, loader: Any = None, **options: Any) -> pl.Trainer:
        fit_options = {name: options.pop(name) for name in ("ckpt_path", "weights_only") if name in options}
        defaults = {
            "accelerator": "cpu",
            "max_steps": 12,
            "max_epochs": -1,
            "log_every_n_steps": 1,
            "logger": MemoryLogger(),
            "enable_checkpointing": any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        trainer = pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})
        trainer.fit(module, regression_loader() if loader is None else loader, **fit_options)
        return trainer

    pl.seed_everything(5, verbose=False)
    return run


class Reference(Callback):
    """Goes before the probe and computes what it should find from a dense Hessian, by step."""

    def __init__(self, loss: Any = None, eval_mode: bool = False) -> None:
        self.eigenvalues: dict[int, Tensor] = {}
        self.preconditioned: dict[int, float] = {}
        self.losses: dict[int, float] = {}
        self.learning_rates: dict[int, float] = {}
        self.loss = loss
        self.eval_mode = eval_mode

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step in self.eigenvalues:
            return  # with gradient accumulation the first batch of a step is the one that counts
        pl_module.train(not self.eval_mode)
        self.losses[step], hessian = dense_hessian(pl_module, batch, self.loss)
        pl_module.train()
        self.eigenvalues[step] = torch.linalg.eigvalsh(hessian)
        optimizer = trainer.optimizers[0]
        self.learning_rates[step] = optimizer.param_groups[0]["lr"]
        scale = self.inverse_preconditioner(optimizer).sqrt() if optimizer.state else None
        if scale is not None and len(scale) == len(hessian):
            scaled = scale[:, None] * hessian * scale
            self.preconditioned[step] = float(torch.linalg.eigvalsh(scaled)[-1])

    def inverse_preconditioner(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """The factor of each coordinate of the gradient in the update, over the highest learning rate."""
        highest = max(group["lr"] for group in optimizer.param_groups)
        factors: list[Tensor] = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
                    name = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
                    corrected = state[name] / (1 - group["betas"][1] ** state["step"])
                    factor = 1 / (corrected.sqrt() + group["eps"])
                elif isinstance(optimizer, torch.optim.RMSprop):
                    centre = state["grad_avg"] ** 2 if group["centered"] else 0
                    factor = 1 / ((state["square_avg"] - centre).sqrt() + group["eps"])
                else:
                    factor = torch.ones_like(parameter)
                factors.append((factor * group["lr"] / highest).detach().reshape(-1))
        return torch.cat(factors)

    @property
    def largest(self) -> dict[int, float]:
        return {step: float(values[-1]) for step, values in self.eigenvalues.items()}

    @property
    def smallest(self) -> dict[int, float]:
        return {step: float(values[0]) for step, values in self.eigenvalues.items()}


def all_near(values: Iterable[float], expected: float, **tolerance: float) -> bool:
    return all(value == pytest.approx(expected, **tolerance) for value in values)


def sgd(**options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, **{"lr": 0.1, **options})


# The values.


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(
    "probe",
    [
        {},
        {"method": "double_backward"},
        {
            "method": "forward_over_reverse",
            "loss_fn": lambda module, batch: (module(batch[0]) - batch[1]).square().mean(),
        },
        {"method": "finite_difference"},
        {"estimator": "power", "tol": 1e-4},
    ],
    ids=name_of,
)
def test_both_ends_are_those_of_the_dense_hessian_at_each_step(
    fit: Fit, probe: dict[str, Any], accumulate: int
) -> None:
    reference = Reference()
    options = {"every_n_steps": 1, "end": "both", "tol": 1e-3, **probe}
    trainer = fit(SmallRegressor(), reference, CurvatureProbe(**options), accumulate_grad_batches=accumulate)
    found = trainer.logger.curve("curvature/lambda_max")
    slow = probe.get("estimator") == "power"
    assert list(found) == list(range(12))
    assert found == pytest.approx(reference.largest, rel=1e-2 if slow else 1e-4)
    assert trainer.logger.curve("curvature/lambda_min") == pytest.approx(reference.smallest, rel=1e-2 if slow else 1e-4)
    assert slow or set(trainer.logger.curve("curvature/converged").values()) == {1.0}
    spread = max(found.values()) / min(found.values())
    assert spread > 1.05, "values that do not change would not tell the steps apart"


@pytest.mark.parametrize("accumulate", [1, 4])
def test_value_stands_at_the_step_of_the_loss_that_it_belongs_to(fit: Fit, accumulate: int) -> None:
    # At one batch a step and with the whole data in each, the loss that Lightning logs at a step is the reference's.
    reference = Reference()
    loader = DataLoader(ConcatDataset([regression_data()] * 4), 48)
    trainer = fit(
        SmallRegressor(), reference, CurvatureProbe(3, tol=1e-3), loader=loader, accumulate_grad_batches=accumulate
    )
    assert trainer.logger.curve("train_loss") == pytest.approx(reference.losses)
    found = trainer.logger.curve("curvature/lambda_max")
    assert list(found) == [0, 3, 6, 9]
    assert found == pytest.approx({step: reference.largest[step] for step in found}, rel=1e-4)


@pytest.mark.parametrize("estimator", ["lanczos", "power"])
def test_residual_bounds_the_error_and_tells_of_convergence(fit: Fit, estimator: str) -> None:
    reference = Reference()
    logger = fit(SmallRegressor(), reference, CurvatureProbe(1, estimator, tol=1e-3), max_steps=30).logger
    found = logger.curve("curvature/lambda_max")
    for step, residual in logger.curve("curvature/residual").items():
        nearest = (reference.eigenvalues[step] - found[step]).abs().min()
        assert nearest <= residual
        assert logger.curve("curvature/converged")[step] == (residual <= 1e-3 * found[step])


def test_forward_over_reverse_measures_the_mean_squared_error(fit: Fit) -> None:
    # PyTorch's own double differentiation in this order fails for `mse_loss` with a plain target.
    reference = Reference()
    logger = fit(SmallRegressor(), reference, CurvatureProbe(1, method="forward_over_reverse", tol=1e-3)).logger
    assert logger.curve("curvature/lambda_max") == pytest.approx(reference.largest, rel=1e-4)


def test_double_precision_of_the_trainer_is_that_of_the_measurement(fit: Fit) -> None:
    reference = Reference()
    module = SmallRegressor().float()
    trainer = fit(module, reference, CurvatureProbe(1, tol=1e-6), precision="64-true")
    assert trainer.logger.curve("curvature/lambda_max") == pytest.approx(reference.largest, rel=1e-9)


def test_mixed_precision_is_near_to_full_precision(fit: Fit) -> None:
    reference = Reference()
    loader = DataLoader([tuple(t.float() for t in sample[:2]) for sample in regression_data()], 8)
    trainer = fit(SmallRegressor().float(), reference, CurvatureProbe(1), loader=loader, precision="bf16-mixed")
    assert trainer.logger.curve("curvature/lambda_max") == pytest.approx(reference.largest, rel=0.05)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_dropout_acts_as_the_mode_says_with_the_mask_of_the_step(fit: Fit, mode: str) -> None:
    reference = Reference(eval_mode=mode == "eval")
    trainer = fit(SmallRegressor(dropout=0.3), reference, CurvatureProbe(1, end="both", tol=1e-3, mode=mode))
    assert trainer.logger.curve("curvature/lambda_max") == pytest.approx(reference.largest, rel=1e-4)
    assert trainer.logger.curve("curvature/lambda_min") == pytest.approx(reference.smallest, rel=1e-4)
    if mode == "train":
        assert trainer.logger.curve("train_loss") == pytest.approx(reference.losses)


class FourthPower(SmallRegressor):
    def curvature_loss(self, batch: Any) -> Tensor:
        return fourth_power(self(batch[0]), batch[1])


def fourth_power(predictions: Tensor, targets: Tensor) -> Tensor:
    return (predictions - targets).pow(4).mean()


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (SmallRegressor, {"loss_fn": lambda module, batch: fourth_power(module(batch[0]), batch[1])}),
        (FourthPower, {}),
    ],
    ids=["loss_fn", "curvature_loss"],
)
def test_own_loss_is_the_one_that_is_measured(fit: Fit, module: type, options: dict[str, Any]) -> None:
    reference = Reference(loss=fourth_power)
    trainer = fit(module(), reference, CurvatureProbe(1, tol=1e-3, **options))
    assert trainer.logger.curve("curvature/lambda_max") == pytest.approx(reference.largest, rel=1e-4)


def test_loss_fn_goes_before_curvature_loss(fit: Fit) -> None:
    reference = Reference()
    probe = CurvatureProbe(1, tol=1e-3, loss_fn=lambda m, batch: nn.functional.mse_loss(m(batch[0]), batch[1]))
    trainer = fit(FourthPower(), reference, probe)
    assert trainer.logger.curve("curvature/lambda_max") == pytest.approx(reference.largest, rel=1e-4)


class ReturnsMapping(SmallRegressor):
    def training_step(self, batch: Any) -> Any:
        return {"loss": super().training_step(batch, 0), "other": batch}


def test_step_that_returns_a_mapping_and_takes_no_index_is_measured(fit: Fit) -> None:
    reference = Reference()
    trainer = fit(ReturnsMapping(), reference, CurvatureProbe(1, tol=1e-3))
    assert trainer.logger.curve("curvature/lambda_max") == pytest.approx(reference.largest, rel=1e-4)


class Unfreeze(Callback):
    """Trains the last layer alone up to a step, then everything."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.net[0].requires_grad_(trainer.global_step >= 5)


@pytest.mark.parametrize("estimator", ["lanczos", "power", "lyapunov"])
def test_parameters_may_be_unfrozen_in_mid_training(fit: Fit, estimator: str) -> None:
    reference = Reference()
    options = {"iterations": 200, "delta_q": 1e-4} if estimator == "lyapunov" else {}
    trainer = fit(
        SmallRegressor(), Unfreeze(), reference, CurvatureProbe(1, estimator, tol=1e-4, **options), max_steps=8
    )
    assert {len(values) for values in reference.eigenvalues.values()} == {10, 26}
    assert trainer.logger.curve("curvature/lambda_max") == pytest.approx(reference.largest, rel=1e-3)


# The tags.

ALWAYS = {"lambda_max", "residual", "converged", "matvecs", "seconds", "lr_times_lambda_max", "inverse_h0"}
BOTTOM = {"lambda_min", "residual", "converged", "matvecs", "seconds"}


@pytest.mark.parametrize(
    ("probe", "tags"),
    [
        ({}, ALWAYS),
        ({"end": "smallest"}, BOTTOM),
        ({"end": "both"}, ALWAYS | {"lambda_min", "residual_min"}),
        ({"estimator": "power"}, ALWAYS),
        ({"estimator": "power", "end": "smallest"}, BOTTOM),
        ({"estimator": "power", "end": "both"}, ALWAYS | {"lambda_min", "residual_min"}),
        ({"estimator": "lyapunov"}, ALWAYS | {"lyapunov_exponent"}),
        ({"estimator": "lyapunov", "end": "smallest"}, BOTTOM | {"lyapunov_exponent", "paper_lambda_min"}),
        (
            {"estimator": "lyapunov", "end": "both"},
            ALWAYS | {"lyapunov_exponent", "lambda_min", "residual_min", "lyapunov_exponent_sgd", "paper_lambda_min"},
        ),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("prefix", [None, "mine"])
def test_exactly_the_documented_tags_are_logged(fit: Fit, probe: dict[str, Any], tags: set[str], prefix: Any) -> None:
    trainer = fit(SmallRegressor(), CurvatureProbe(1, log_prefix=prefix, **probe), max_steps=3)
    own = {tag for tag in trainer.logger.tags if "curvature/" in tag}
    front = f"{prefix}/" if prefix else ""
    assert own == {f"{front}curvature/{name}" for name in tags | {"stability_limit"}}
    assert all(len(trainer.logger.curve(tag)) == 3 for tag in own)
    assert {tag: trainer.callback_metrics[tag].item() for tag in own} == pytest.approx(
        {tag: trainer.logger.curve(tag)[2] for tag in own}
    )


@pytest.mark.parametrize(
    ("optimizer", "limit"),
    [
        (sgd(lr=0.05), 2 / 0.05),
        (sgd(lr=0.05, momentum=0.8), 3.6 / 0.05),
        (sgd(lr=0.05, momentum=0.8, nesterov=True), 3.6 / (2.6 * 0.05)),
        (lambda parameters: torch.optim.AdamW(parameters, lr=0.01), 38 / 0.01),
    ],
    ids=["sgd", "heavy-ball", "nesterov", "adamw"],
)
def test_tags_stand_in_their_relations(fit: Fit, optimizer: Any, limit: float) -> None:
    trainer = fit(SmallRegressor(optimizer), CurvatureProbe(1))
    logger = trainer.logger
    for step, largest in logger.curve("curvature/lambda_max").items():
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        assert logger.curve("curvature/lr_times_lambda_max")[step] == pytest.approx(lr * largest)
        assert logger.curve("curvature/inverse_h0")[step] == pytest.approx((math.e - 1) / largest)
        assert logger.curve("curvature/residual")[step] <= 1e-2 * largest
        assert logger.curve("curvature/seconds")[step] > 0
    assert all_near(logger.curve("curvature/stability_limit").values(), limit)


def test_negative_largest_eigenvalue_has_no_learning_rate(fit: Fit) -> None:
    probe = CurvatureProbe(1, loss_fn=lambda module, batch: -sum(p.square().sum() for p in module.parameters()))
    logger = fit(SmallRegressor(), probe, max_steps=2).logger
    assert logger.curve("curvature/lambda_max") == pytest.approx({0: -2.0, 1: -2.0})
    assert "curvature/inverse_h0" not in logger.tags


class Decaying(SmallRegressor):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_learning_rate_is_that_of_the_step(fit: Fit) -> None:
    reference = Reference()
    logger = fit(Decaying(), reference, CurvatureProbe(1)).logger
    expected = {step: 0.2 * 0.8**step for step in range(12)}
    assert reference.learning_rates == pytest.approx(expected)
    assert logger.curve("curvature/stability_limit") == pytest.approx({s: 2 / lr for s, lr in expected.items()})
    edge = {step: lr * reference.largest[step] for step, lr in expected.items()}
    assert logger.curve("curvature/lr_times_lambda_max") == pytest.approx(edge, rel=1e-3)


class Warmup(SmallRegressor):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize(
    "probe", [{}, {"estimator": "lyapunov", "end": "both"}, {"estimator": "lyapunov", "end": "smallest"}], ids=name_of
)
def test_warmup_from_a_learning_rate_of_zero_is_no_failure(fit: Fit, probe: dict[str, Any]) -> None:
    logger = fit(Warmup(), CurvatureProbe(1, **probe), max_steps=4).logger
    assert sorted(logger.curve("curvature/stability_limit")) == [1, 2, 3]
    if probe.get("end") != "smallest":
        assert sorted(logger.curve("curvature/lambda_max")) == [0, 1, 2, 3]


# Preconditioned measurement.


def two_groups(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    first, *others = parameters
    return torch.optim.SGD([{"params": [first], "lr": 0.02}, {"params": others}], lr=0.1, momentum=0.5)


@pytest.mark.parametrize("estimator", ["lanczos", "power"])
@pytest.mark.parametrize(
    ("optimizer", "limit"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.8, 0.99)), 3.6 / (0.2 * 0.02)),
        (lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.0, 0.9), amsgrad=True), 2 / 0.02),
        (lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.5), 3 / 0.02),
        (lambda p: torch.optim.RMSprop(p, lr=0.02, centered=True), 2 / 0.02),
        (two_groups, 3 / 0.1),
    ],
    ids=["adamw", "amsgrad", "rmsprop", "centered", "groups"],
)
def test_preconditioned_eigenvalue_is_that_of_the_dense_matrix(
    fit: Fit, optimizer: Any, limit: float, estimator: str
) -> None:
    reference = Reference()
    logger = fit(SmallRegressor(optimizer), reference, CurvatureProbe(1, estimator, tol=1e-4)).logger
    found = logger.curve("curvature/preconditioned_lambda_max")
    found.pop(0, None)  # an adaptive optimizer has no preconditioner before its first step
    assert list(found) == list(range(1, 12))
    assert found == pytest.approx(reference.preconditioned, rel=1e-2 if estimator == "power" else 1e-4)
    limits = logger.curve("curvature/stability_limit")
    assert all_near([limits[step] for step in found], limit)
    assert logger.curve("curvature/lambda_max") == pytest.approx(reference.largest, rel=1e-4)
    for step, converged in logger.curve("curvature/converged").items():
        met = logger.curve("curvature/residual")[step] <= 1e-4 * reference.largest[step]
        met_too = step not in found or logger.curve("curvature/preconditioned_residual")[step] <= 1e-4 * found[step]
        assert converged == (met and met_too)


@pytest.mark.parametrize("optimizer", [torch.optim.NAdam, torch.optim.Rprop, torch.optim.Adagrad])
def test_unknown_optimizer_has_no_limit_and_one_warning(fit: Fit, optimizer: type) -> None:
    reference = Reference()
    with pytest.warns(CurvatureWarning, match=f"stability limit of {optimizer.__name__} is not known") as warned:
        logger = fit(SmallRegressor(lambda p: optimizer(p, lr=0.01)), reference, CurvatureProbe(1, tol=1e-3)).logger
    assert len([w for w in warned if issubclass(w.category, CurvatureWarning)]) == 1
    assert not {"curvature/stability_limit", "curvature/preconditioned_lambda_max"} & logger.tags
    assert logger.curve("curvature/lambda_max") == pytest.approx(reference.largest, rel=1e-4)
    assert "curvature/lr_times_lambda_max" in logger.tags


# The Lyapunov estimator.


@pytest.mark.parametrize(("dropout", "iterations", "settled"), [(0.0, 60, 8), (0.3, 400, 0)])
def test_lyapunov_converges_to_the_largest_eigenvalue(fit: Fit, dropout: float, iterations: int, settled: int) -> None:
    # The parameters stay where they are. With dropout each step has a Hessian of its own, so one probe must suffice.
    reference = Reference()
    probe = CurvatureProbe(1, "lyapunov", tol=1e-3, iterations=iterations, delta_q=1e-5)
    module, loader = SmallRegressor(sgd(lr=1e-12), dropout), regression_loader(batch_size=48)
    logger = fit(module, reference, probe, loader=loader, max_steps=settled + 3).logger
    steps = range(settled, settled + 3)
    largest = {step: reference.largest[step] for step in steps}
    assert {step: logger.curve("curvature/lambda_max")[step] for step in steps} == pytest.approx(largest, rel=1e-3)
    assert {logger.curve("curvature/converged")[step] for step in steps} == {1.0}
    assert all_near([logger.curve("curvature/lyapunov_exponent")[step] for step in steps], 1, abs=1e-2)
    h0 = {step: (math.e - 1) / largest[step] for step in steps}
    assert {step: logger.curve("curvature/inverse_h0")[step] for step in steps} == pytest.approx(h0, rel=2e-2)


STEPS_TAKEN: Counter[str] = Counter()
"""Calls of training steps; a counter on the module would be put back after each replay."""


class Counted(SmallRegressor):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        STEPS_TAKEN["at", self.global_step] += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("options", "first", "later"),
    [
        ({}, 2, 1),
        ({"iterations": 3}, 4, 3),
        ({"end": "both"}, 3, 2),
        ({"data": "fixed", "num_batches": 1}, 2, 2),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("module", [{}, {"dropout": 0.3}, {"optimizer": sgd(momentum=0.9)}], ids=name_of)
def test_lyapunov_reuses_the_gradient_of_the_step(
    fit: Fit, options: dict[str, Any], first: int, later: int, module: dict[str, Any]
) -> None:
    STEPS_TAKEN.clear()
    fit(Counted(**module), CurvatureProbe(4, "lyapunov", **options), gradient_clip_val=1e-3)
    replays = [STEPS_TAKEN["at", step] - 1 for step in range(12)]
    assert replays == [first, 0, 0, 0, later, 0, 0, 0, later, 0, 0, 0]


def test_lyapunov_reuses_the_gradient_of_the_first_accumulated_batch(fit: Fit) -> None:
    STEPS_TAKEN.clear()
    reference = Reference()
    probe = CurvatureProbe(1, "lyapunov", delta_q=1e-6, iterations=200)
    logger = fit(Counted(), reference, probe, accumulate_grad_batches=3, max_steps=4).logger
    assert [STEPS_TAKEN["at", step] - 3 for step in range(4)] == [201, 200, 200, 200]
    assert logger.curve("curvature/lambda_max") == pytest.approx(reference.largest, rel=1e-3)


class ScaledGradients(Counted):
    """Its gradients after the backward pass are not those of its loss."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (3 * loss).backward()


def test_lyapunov_computes_the_gradient_where_the_step_has_another_one(fit: Fit) -> None:
    STEPS_TAKEN.clear()
    reference = Reference()
    probe = CurvatureProbe(1, "lyapunov", delta_q=1e-6, iterations=200)
    logger = fit(ScaledGradients(), reference, probe, max_steps=5).logger
    assert [STEPS_TAKEN["at", step] - 1 for step in range(5)] == [201] * 5
    assert logger.curve("curvature/lambda_max") == pytest.approx(reference.largest, rel=1e-3)


@pytest.mark.parametrize(("lr", "momentum"), [(0.4, 0.0), (0.1, 0.5)])
def test_training_map_finds_the_smallest_eigenvalue_with_the_rate_and_momentum_of_the_optimizer(
    fit: Fit, lr: float, momentum: float
) -> None:
    reference = Reference()
    module = SmallRegressor(sgd(lr=lr, momentum=momentum), linear=True)
    probe = CurvatureProbe(1, "lyapunov", "smallest", iterations=40, tol=1e-3)
    logger = fit(module, reference, probe, loader=regression_loader(batch_size=48)).logger
    assert logger.curve("curvature/lambda_min")[11] == pytest.approx(reference.smallest[11], rel=1e-3)
    assert logger.curve("curvature/converged")[11] == 1.0
    # the larger root of the characteristic polynomial of heavy ball, μ² - (1 + m - αh) μ + m = 0
    trace = 1 + momentum - lr * reference.smallest[11]
    growth = (trace + math.sqrt(trace**2 - 4 * momentum)) / 2
    assert logger.curve("curvature/lyapunov_exponent")[11] == pytest.approx(math.log(growth), rel=1e-3)


def test_training_map_that_oscillates_is_not_passed_off_as_converged(fit: Fit) -> None:
    # With much momentum every direction swings, the roots of the polynomial are complex and no growth settles.
    reference = Reference()
    module = SmallRegressor(sgd(lr=0.4, momentum=0.5), linear=True)
    probe = CurvatureProbe(1, "lyapunov", "smallest", iterations=40)
    logger = fit(module, reference, probe, loader=regression_loader(batch_size=48)).logger
    found, bottom = logger.curve("curvature/lambda_min"), reference.smallest[11]
    wrong = [step for step, value in found.items() if value != pytest.approx(bottom, rel=0.1)]
    assert wrong
    assert not any(logger.curve("curvature/converged")[step] for step in wrong)


def test_training_map_beyond_the_edge_of_stability_finds_the_largest_eigenvalue(fit: Fit) -> None:
    reference = Reference()
    module = SmallRegressor(sgd(lr=3.0), linear=True)
    probe = CurvatureProbe(1, "lyapunov", "smallest", iterations=40, loss_fn=lambda m, b: m.loss_at_hand(b))
    module.loss_at_hand = lambda batch: nn.functional.mse_loss(module(batch[0]), batch[1])
    logger = fit(module, reference, probe, loader=regression_loader(batch_size=48), max_steps=4).logger
    assert 3.0 * reference.largest[3] > 2
    assert logger.curve("curvature/lambda_max")[3] == pytest.approx(reference.largest[3], rel=1e-3)
    assert "curvature/lambda_min" not in logger.tags


@pytest.mark.parametrize("end", ["smallest", "both"])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p),
        sgd(momentum=0.9, nesterov=True),
        sgd(momentum=0.9, dampening=0.5),
        two_groups,
    ],
    ids=["adamw", "nesterov", "dampening", "groups"],
)
def test_training_map_of_another_optimizer_than_sgd_is_refused(fit: Fit, end: str, optimizer: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"`CurvatureProbe.* the map of SGD.*Use `estimator="):
        fit(SmallRegressor(optimizer), CurvatureProbe(1, "lyapunov", end))


# Cost.


@pytest.mark.parametrize("estimator", ["lanczos", "power"])
def test_later_probes_need_fewer_products_than_the_first(fit: Fit, estimator: str) -> None:
    module = SmallRegressor(sgd(lr=0.02))
    logger = fit(module, CurvatureProbe(1, estimator), loader=regression_loader(batch_size=48)).logger
    first, *later = logger.curve("curvature/matvecs").values()
    assert max(later) < first


def test_probe_builds_the_graph_of_the_gradient_once(fit: Fit) -> None:
    STEPS_TAKEN.clear()
    logger = fit(Counted(), CurvatureProbe(1, "lanczos", "both")).logger
    assert [STEPS_TAKEN["at", step] - 1 for step in range(12)] == [1] * 12
    assert min(logger.curve("curvature/matvecs").values()) > 1


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


def test_share_of_time_replaces_the_interval(fit: Fit) -> None:
    reference = Reference()
    probe = CurvatureProbe(every_n_steps=1000, max_overhead=0.5, tol=1e-3)
    found = fit(SmallRegressor(), reference, probe, max_steps=100).logger.curve("curvature/lambda_max")
    assert 0 in found
    assert 1 < len(found) < 100
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
    logger = fit(SmallRegressor(), reference, *probes).logger
    for prefix, every, tolerance, ends in (
        ("fine", 1, 1e-4, {"max"}),
        ("coarse", 4, 1e-2, {"max", "min"}),
        ("rough", 3, 1e-2, {"max", "min"}),
        ("low", 2, 1e-4, {"min"}),
        ("followed", 4, 1e-3, {"max"}),
    ):
        for end in ("max", "min"):
            values = reference.largest if end == "max" else reference.smallest
            expected = {step: values[step] for step in range(0, 12, every)} if end in ends else {}
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


class SeenByProbe:
    """A loss that notes which samples it is asked for. Only the probe calls it."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def __call__(self, module: Any, batch: Any) -> Tensor:
        self.batches.append(tuple(batch[2].tolist()))
        return nn.functional.mse_loss(module(batch[0]), batch[1])

    @property
    def samples(self) -> list[int]:
        return sorted({index for batch in self.batches for index in batch})


class ReferenceOnSamples(Callback):
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
    [({"num_batches": 2}, 16), ({"num_batches": 99}, 48), ({"fraction": 1.0}, 48), ({"fraction": 0.4}, 20), ({}, 3)],
    ids=name_of,
)
def test_fixed_data_are_the_same_samples_throughout(
    fit: Fit, options: dict[str, Any], num_samples: int, accumulate: int
) -> None:
    seen, reference, module = SeenByProbe(), ReferenceOnSamples(), SmallRegressor()
    probe = CurvatureProbe(3, data="fixed", tol=1e-3, loss_fn=seen, **options)
    loader = regression_loader(shuffle=True)
    logger = fit(module, reference, probe, loader=loader, accumulate_grad_batches=accumulate).logger
    assert len(seen.samples) == num_samples
    assert all(count == seen.batches.count(seen.batches[0]) for count in Counter(seen.batches).values())
    found = logger.curve("curvature/lambda_max")
    assert list(found) == [0, 3, 6, 9]
    assert found == pytest.approx(reference.largest(module, seen.samples, found), rel=1e-4)


def test_fixed_data_replay_the_training_step_on_the_whole_set(fit: Fit) -> None:
    reference, module = ReferenceOnSamples(), SmallRegressor()
    loader = regression_loader(batch_size=7, shuffle=True)
    logger = fit(module, reference, CurvatureProbe(3, data="fixed", fraction=1.0, tol=1e-3), loader=loader).logger
    found = logger.curve("curvature/lambda_max")
    assert found == pytest.approx(reference.largest(module, range(48), found), rel=1e-4)


def test_fixed_data_depend_on_the_seed_alone(fit: Fit) -> None:
    def samples(seed: int, run: int) -> list[int]:
        seen = SeenByProbe()
        pl.seed_everything(run, verbose=False)
        fit(SmallRegressor(), CurvatureProbe(3, data="fixed", num_batches=1, loss_fn=seen, seed=seed), max_steps=3)
        return seen.samples

    assert samples(0, run=1) == samples(0, run=2)
    assert samples(0, run=1) != samples(1, run=1)


def test_fixed_data_of_a_lyapunov_probe_are_the_whole_set(fit: Fit) -> None:
    reference, module = ReferenceOnSamples(), SmallRegressor()
    probe = CurvatureProbe(1, "lyapunov", data="fixed", fraction=1.0, iterations=150, delta_q=1e-5)
    found = fit(module, reference, probe, loader=regression_loader(batch_size=20), max_steps=3).logger.curve(
        "curvature/lambda_max"
    )
    assert found == pytest.approx(reference.largest(module, range(48), found), rel=1e-3)


class WithBatchNorm(SmallRegressor):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(4).double())


@pytest.mark.parametrize("options", [{"fraction": 9 / 48}, {"fraction": 17 / 48}], ids=name_of)
def test_fixed_data_never_leave_a_batch_of_one_to_batch_norm(fit: Fit, options: dict[str, Any]) -> None:
    logger = fit(WithBatchNorm(), CurvatureProbe(4, data="fixed", **options)).logger
    assert list(logger.curve("curvature/lambda_max")) == [0, 4, 8]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(regression_data())


def test_fixed_data_of_a_stream_need_a_number_of_batches(fit: Fit) -> None:
    with pytest.raises(MisconfigurationException, match=r"CurvatureProbe\(data='fixed'\).*Pass `num_batches`"):
        fit(SmallRegressor(), CurvatureProbe(1, data="fixed"), loader=DataLoader(Stream(), 8))


@pytest.mark.parametrize("estimator", ["lanczos", "lyapunov"])
def test_fixed_data_of_a_stream_are_its_first_batches_once_they_have_passed(fit: Fit, estimator: str) -> None:
    reference, module = ReferenceOnSamples(), SmallRegressor()
    options = {"iterations": 150, "delta_q": 1e-5} if estimator == "lyapunov" else {"tol": 1e-3}
    probe = CurvatureProbe(1, estimator, data="fixed", num_batches=3, **options)
    logger = fit(module, reference, probe, loader=DataLoader(Stream(), 8), max_steps=6).logger
    found = logger.curve("curvature/lambda_max")
    assert list(found) == list(range(2, 6))
    assert found == pytest.approx(reference.largest(module, range(24), found), rel=1e-3)
    assert list(logger.curve("curvature/converged")) == list(found)


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


# Going on from a checkpoint.


def straight_and_resumed(
    fit: Fit, folder: Path, probes: Callable[[], Sequence[Callback]], at: int, loader: Any, **options: Any
) -> tuple[MemoryLogger, MemoryLogger]:
    """The logs of 40 steps in one run, and of the steps from a checkpoint on."""
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=at, save_top_k=-1, filename="{step}")
    module = SmallRegressor(sgd(momentum=0.9))
    start = {name: value.clone() for name, value in module.state_dict().items()}
    straight = fit(module, *probes(), checkpoints, loader=loader, max_steps=40, **options).logger
    path = folder / f"step={at}.ckpt"
    content = torch.load(path, weights_only=True)
    assert sum("CurvatureProbe" in key for key in content["callbacks"]) == len(probes())
    fresh = SmallRegressor(sgd(momentum=0.9))
    fresh.load_state_dict(start)
    safely = {"weights_only": True} if "weights_only" in inspect.signature(pl.Trainer.fit).parameters else {}
    resumed = fit(fresh, *probes(), loader=loader, max_steps=40, ckpt_path=path, **safely, **options).logger
    return straight, resumed


def curvature_after(logger: MemoryLogger, step: int) -> list[Any]:
    """All that probes logged from a step on, but for the time."""
    return [
        (at, {tag: value for tag, value in metrics.items() if not tag.endswith("seconds")})
        for at, metrics in logger.history
        if at >= step and any("curvature/" in tag for tag in metrics)
    ]


IN_AN_EPOCH = DataLoader(ConcatDataset([Subset(regression_data(), range(8))] * 6), 8)
"""Six equal batches: Lightning begins a resumed epoch with its first batch, so others would not be the same."""


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint", "ignore:.*before the epoch ended")
@pytest.mark.parametrize(("at", "loader"), [(18, regression_loader()), (20, IN_AN_EPOCH)], ids=["epoch", "batch"])
@pytest.mark.parametrize(
    "options",
    [
        {"every_n_steps": 1, "end": "both"},
        {"every_n_steps": 4, "estimator": "power"},
        {"every_n_steps": 1, "estimator": "lyapunov"},
        {"every_n_steps": 3, "estimator": "lyapunov", "end": "both", "iterations": 2},
        {"every_n_steps": 2, "data": "fixed", "fraction": 0.5},
    ],
    ids=name_of,
)
def test_resumed_run_logs_the_same_bits(
    fit: Fit, tmp_path: Path, options: dict[str, Any], at: int, loader: DataLoader
) -> None:
    straight, resumed = straight_and_resumed(fit, tmp_path, lambda: [CurvatureProbe(**options)], at, loader)
    expected = curvature_after(straight, at)
    assert len(expected) >= 5
    assert curvature_after(resumed, at) == expected
    assert len(resumed.curve("curvature/converged")) == len(expected)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_resumed_run_with_accumulation_and_several_probes_logs_the_same_bits(fit: Fit, tmp_path: Path) -> None:
    def probes() -> list[Callback]:
        return [
            CurvatureProbe(1, log_prefix="one"),
            CurvatureProbe(2, "lyapunov", log_prefix="two"),
            CurvatureProbe(3, end="both", log_prefix="three"),
        ]

    straight, resumed = straight_and_resumed(fit, tmp_path, probes, 18, regression_loader(), accumulate_grad_batches=2)
    assert curvature_after(resumed, 18) == curvature_after(straight, 18)
    assert {"one/curvature/lambda_max", "two/curvature/lyapunov_exponent", "three/curvature/lambda_min"} <= resumed.tags


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_resumed_preconditioned_measurement_logs_the_same_bits(fit: Fit, tmp_path: Path) -> None:
    class Adam(SmallRegressor):
        def __init__(self, _: Any = None) -> None:
            super().__init__(lambda p: torch.optim.AdamW(p, lr=0.02))

    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=18, save_top_k=-1, filename="{step}")
    straight = fit(Adam(), CurvatureProbe(1), checkpoints, max_steps=30).logger
    resumed = fit(Adam(), CurvatureProbe(1), max_steps=30, ckpt_path=tmp_path / "step=18.ckpt").logger
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

    probe = CurvatureProbe(1, "lyapunov", loss_fn=saddle, iterations=50)
    logger = fit(Saddle(), probe).logger
    assert list(logger.curve("curvature/lambda_min").values())[-1] == pytest.approx(-10, rel=1e-6)
    assert not logger.curve("curvature/lambda_max")
