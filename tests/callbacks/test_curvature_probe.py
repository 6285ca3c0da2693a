"""What the probe logs, and when: against dense Hessians that are computed beside it."""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader

from lyapunov_lightning import CurvatureProbe, HessianConfig, SpectrumTracker
from lyapunov_lightning.curvature import lanczos
from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.training import sharing
from tests.callbacks.probing import Fit, Reference, all_near, name_of, sgd, two_groups
from tests.modules import SmallRegressor, regression_data, regression_loader


def mean_square(module: Any, batch: Any) -> Tensor:
    return (module(batch[0]) - batch[1]).square().mean()


# The values.


@pytest.mark.parametrize(
    ("probe", "accumulate"),
    [
        ({}, 1),
        ({}, 4),
        ({"hessian": HessianConfig(method="double_backward")}, 1),
        ({"hessian": HessianConfig(method="forward_over_reverse", loss_fn=mean_square)}, 4),
        ({"hessian": HessianConfig(method="finite_difference")}, 1),
        ({"hessian": HessianConfig(method="finite_difference")}, 4),
        ({"estimator": "power", "tol": 1e-4}, 1),
    ],
    ids=name_of,
)
def test_both_ends_are_those_of_the_dense_hessian_at_each_step(
    fit: Fit, probe: dict[str, Any], accumulate: int
) -> None:
    reference = Reference()
    options = {"every_n_steps": 1, "end": "both", "tol": 1e-3, **probe}
    probing, steps = CurvatureProbe(**options), 6 if accumulate == 1 else 4
    trainer = fit(SmallRegressor(), reference, probing, accumulate_grad_batches=accumulate, max_steps=steps)
    found = trainer.logger.curve("curvature/lambda_max")
    slow = probe.get("estimator") == "power"
    assert list(found) == list(range(steps))
    assert found == pytest.approx(reference.largest, rel=1e-2 if slow else 1e-4)
    assert trainer.logger.curve("curvature/lambda_min") == pytest.approx(reference.smallest, rel=1e-2 if slow else 1e-4)
    assert slow or set(trainer.logger.curve("curvature_details/converged").values()) == {1.0}
    spread = max(found.values()) / min(found.values())
    assert spread > 1.05, "values that do not change would not tell the steps apart"


@pytest.mark.parametrize(
    ("callbacks", "bytes_of_small", "bound"),
    [
        (lambda: [CurvatureProbe(1)], 0, 8),
        (lambda: [CurvatureProbe(1), CurvatureProbe(1, log_prefix="other")], 0, 8),
        (lambda: [CurvatureProbe(1)], 2**20, None),
        (lambda: [CurvatureProbe(1, end="both")], 0, None),
        (lambda: [CurvatureProbe(1), SpectrumTracker(1, 1, hessian=HessianConfig("batch"))], 0, None),
        (
            lambda: [CurvatureProbe(1), SpectrumTracker(1, 1, hessian=HessianConfig("batch"), max_basis_vectors=12)],
            0,
            12,
        ),
    ],
    ids=["one", "two alike", "small vectors", "both ends", "beside a tracker", "beside a tracker's bound"],
)
def test_one_eigenvalue_takes_the_memory_of_a_few_vectors(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, callbacks: Any, bytes_of_small: int, bound: int | None
) -> None:
    asked: list[int | None] = []

    def searched(*args: Any, **options: Any) -> Any:
        asked.append(options["max_basis_vectors"])
        return lanczos(*args, **options)

    monkeypatch.setattr(sharing, "lanczos", searched)
    monkeypatch.setattr(sharing, "_SMALL_VECTOR_BYTES", bytes_of_small)
    reference, probes = Reference(), callbacks()
    fit(SmallRegressor(), reference, *probes, max_steps=3)
    assert asked == [bound] * 3
    for result in probes[0].results:
        assert result.lambda_max == pytest.approx(reference.largest[result.step], rel=2e-2)


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
    logger = fit(SmallRegressor(), reference, CurvatureProbe(1, estimator, tol=1e-3)).logger
    found = logger.curve("curvature/lambda_max")
    for step, residual in logger.curve("curvature_details/residual").items():
        nearest = (reference.eigenvalues[step] - found[step]).abs().min()
        assert nearest <= residual
        error = logger.curve("curvature_details/value_error")[step]
        assert abs(reference.largest[step] - found[step]) <= 1e-3 * found[step]
        assert abs(reference.largest[step] - found[step]) <= error
        accuracy = residual if estimator == "power" else error
        assert logger.curve("curvature_details/converged")[step] == (accuracy <= 1e-3 * found[step])


def test_forward_over_reverse_measures_the_mean_squared_error(fit: Fit) -> None:
    # PyTorch's own double differentiation in this order fails for `mse_loss` with a plain target.
    reference = Reference()
    logger = fit(
        SmallRegressor(), reference, CurvatureProbe(1, tol=1e-3, hessian=HessianConfig(method="forward_over_reverse"))
    ).logger
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
    trainer = fit(
        SmallRegressor(dropout=0.3),
        reference,
        CurvatureProbe(1, end="both", tol=1e-3, hessian=HessianConfig(mode=mode)),
    )
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
        (
            SmallRegressor,
            {"hessian": HessianConfig(loss_fn=lambda module, batch: fourth_power(module(batch[0]), batch[1]))},
        ),
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
    probe = CurvatureProbe(1, tol=1e-3, hessian=HessianConfig(loss_fn=mean_square))
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
        pl_module.net[0].requires_grad_(trainer.global_step >= 2)


@pytest.mark.parametrize("estimator", ["lanczos", "power", "lyapunov"])
def test_parameters_may_be_unfrozen_in_mid_training(fit: Fit, estimator: str) -> None:
    reference = Reference()
    options = {"iterations": 200, "delta_q": 1e-4} if estimator == "lyapunov" else {}
    trainer = fit(
        SmallRegressor(), Unfreeze(), reference, CurvatureProbe(1, estimator, tol=1e-4, **options), max_steps=4
    )
    assert {len(values) for values in reference.eigenvalues.values()} == {10, 26}
    assert trainer.logger.curve("curvature/lambda_max") == pytest.approx(reference.largest, rel=1e-3)


# The tags.

EDGE = {"curvature/stability_ratio", "curvature/learning_rate_limit", "curvature_details/stability_limit"}
GAUGE = EDGE | {f"curvature_details/{name}" for name in ("batch_agreement", "batch_sharpness_error", "noise_ratio")}
GAUGED = {"curvature/batch_sharpness", "curvature/learning_rate"}
EIGENVALUE = {"curvature_details/eigenvalue_ratio", "curvature_details/lr_times_lambda_max"}
DETAILS = {f"curvature_details/{name}" for name in ("residual", "converged", "matvecs", "seconds")}
LARGEST = DETAILS | EIGENVALUE | {"curvature/lambda_max"}
SMALLEST = DETAILS | {"curvature/lambda_min"}
BOTH = LARGEST | SMALLEST | {"curvature_details/residual_min"}
ERROR, ERROR_MIN = {"curvature_details/value_error"}, {"curvature_details/value_error_min"}
EXPONENT = {"curvature/lyapunov_exponent"}
PAPER_MIN = {"curvature_details/paper_lambda_min"}
H0, H0_DETAIL = {"curvature/inverse_h0"}, {"curvature_details/inverse_h0"}


@pytest.mark.parametrize(
    ("probe", "tags"),
    [
        ({}, LARGEST | GAUGED | ERROR | H0_DETAIL),
        ({"end": "smallest"}, SMALLEST | GAUGED | ERROR),
        ({"end": "both"}, BOTH | GAUGED | ERROR | ERROR_MIN | H0_DETAIL),
        ({"estimator": "power"}, LARGEST | GAUGED | ERROR | H0_DETAIL),
        ({"estimator": "power", "end": "smallest"}, SMALLEST | GAUGED | ERROR),
        ({"estimator": "power", "end": "both"}, BOTH | GAUGED | ERROR | ERROR_MIN | H0_DETAIL),
        ({"estimator": "lyapunov"}, LARGEST | GAUGED | H0 | EXPONENT),
        ({"estimator": "lyapunov", "end": "smallest"}, SMALLEST | GAUGED | EXPONENT | PAPER_MIN),
        (
            {"estimator": "lyapunov", "end": "both"},
            BOTH | GAUGED | H0 | EXPONENT | PAPER_MIN | {"curvature_details/lyapunov_exponent_sgd"},
        ),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("prefix", [None, "mine"])
def test_exactly_the_documented_tags_are_logged(fit: Fit, probe: dict[str, Any], tags: set[str], prefix: Any) -> None:
    loader = regression_loader(batch_size=48)  # with small ones a step may make no progress on others
    trainer = fit(SmallRegressor(), CurvatureProbe(1, log_prefix=prefix, **probe), loader=loader, max_steps=3)
    own = {tag for tag in trainer.logger.tags if "curvature" in tag}
    front = f"{prefix}/" if prefix else ""
    assert own == {f"{front}{tag}" for tag in tags | GAUGE}
    papers = sum(name in tag for tag in own for name in ("/lyapunov_exponent", "curvature/inverse_h0"))
    assert sum("_details/" not in tag for tag in own) - papers <= 6
    # Batches are compared, and a standard error is known, from the second measurement on.
    late = ("batch_agreement", "batch_sharpness_error", "noise_ratio")
    assert {tag for tag in own if len(trainer.logger.curve(tag)) != 3} == {tag for tag in own if tag.endswith(late)}
    assert all(sorted(trainer.logger.curve(tag)) == [1, 2] for tag in own if tag.endswith(late))
    assert {tag: trainer.callback_metrics[tag].item() for tag in own} == pytest.approx(
        {tag: trainer.logger.curve(tag)[2] for tag in own}
    )


@pytest.mark.parametrize(
    ("optimizer", "limit"),
    [
        (sgd(lr=0.05), 2 / 0.05),
        (sgd(lr=0.05, momentum=0.8), 3.6 / 0.05),
        (sgd(lr=0.05, momentum=0.8, nesterov=True), 3.6 / (2.6 * 0.05)),
        (lambda parameters: torch.optim.AdamW(parameters, lr=0.01), 19 * (2 - 0.01 * 0.01) / 0.01),
    ],
    ids=["sgd", "heavy-ball", "nesterov", "adamw"],
)
def test_tags_stand_in_their_relations(fit: Fit, optimizer: Any, limit: float) -> None:
    # On all of the data, where batches agree and the limit is the classical one.
    trainer = fit(SmallRegressor(optimizer), CurvatureProbe(1), loader=regression_loader(batch_size=48))
    logger = trainer.logger
    [lr] = {group["lr"] for group in trainer.optimizers[0].param_groups}
    curves = {tag: logger.curve(tag) for tag in logger.tags}
    for step, largest in curves["curvature/lambda_max"].items():
        assert curves["curvature_details/lr_times_lambda_max"][step] == pytest.approx(lr * largest)
        assert curves["curvature/learning_rate"][step] == lr
        assert curves["curvature_details/inverse_h0"][step] == pytest.approx((math.e - 1) / largest)
        assert curves["curvature_details/value_error"][step] <= 2e-2 * largest
        assert curves["curvature_details/seconds"][step] > 0
        if step == 0 and step not in curves["curvature/stability_ratio"]:
            continue  # with momentum the limit is known once batches have been compared
        counts = curves.get("curvature/preconditioned_lambda_max", {}).get(step, largest)
        ratio = max(counts, curves["curvature/batch_sharpness"][step]) / limit
        assert curves["curvature/stability_ratio"][step] == pytest.approx(ratio)
        assert curves["curvature_details/eigenvalue_ratio"][step] == pytest.approx(counts / limit)
        assert curves["curvature/learning_rate_limit"][step] == pytest.approx(lr / ratio)
    has_momentum = limit != 2 / lr
    assert min(curves["curvature/batch_sharpness"]) == 0
    assert min(curves["curvature/stability_ratio"]) == int(has_momentum)
    assert all_near(curves["curvature_details/stability_limit"].values(), limit)


def test_negative_largest_eigenvalue_has_no_learning_rate(fit: Fit) -> None:
    probe = CurvatureProbe(
        1, hessian=HessianConfig(loss_fn=lambda m, batch: -sum(p.square().sum() for p in m.parameters()))
    )
    logger = fit(SmallRegressor(), probe, max_steps=2).logger
    assert logger.curve("curvature/lambda_max") == pytest.approx({0: -2.0, 1: -2.0})
    assert not any("inverse_h0" in tag for tag in logger.tags)


class Decaying(SmallRegressor):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_learning_rate_is_that_of_the_step(fit: Fit) -> None:
    reference = Reference()
    logger = fit(Decaying(), reference, CurvatureProbe(1, tol=1e-4)).logger
    expected = {step: 0.2 * 0.8**step for step in range(12)}
    assert reference.learning_rates == pytest.approx(expected)
    assert logger.curve("curvature/learning_rate") == pytest.approx(expected)
    assert logger.curve("curvature_details/stability_limit") == pytest.approx({s: 2 / lr for s, lr in expected.items()})
    edge = {step: lr * reference.largest[step] for step, lr in expected.items()}
    assert logger.curve("curvature_details/lr_times_lambda_max") == pytest.approx(edge, rel=1e-3)


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
    assert sorted(logger.curve("curvature_details/stability_limit")) == [1, 2, 3]
    assert set(logger.curve("curvature/stability_ratio")) == {1, 2, 3}
    if probe.get("estimator") != "lyapunov":  # which has not settled
        assert list(logger.curve("curvature_details/converged").values()) == [1.0] * 4
    if probe.get("end") != "smallest":
        assert sorted(logger.curve("curvature/lambda_max")) == [0, 1, 2, 3]


# Preconditioned measurement.


@pytest.mark.parametrize("estimator", ["lanczos", "power"])
@pytest.mark.parametrize(
    ("optimizer", "limit"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.8, 0.99)), 1.8 * (2 - 0.02 * 0.01) / (0.2 * 0.02)),
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
    # On all of the data, where the limit is the classical one.
    loader = regression_loader(batch_size=48)
    probe = CurvatureProbe(1, estimator, tol=1e-4, eigenvalue_every=1)
    logger = fit(SmallRegressor(optimizer), reference, probe, loader=loader).logger
    found = logger.curve("curvature/preconditioned_lambda_max")
    assert list(found) == list(range(12))
    assert found == pytest.approx(reference.preconditioned, rel=1e-2 if estimator == "power" else 1e-4)
    limits = logger.curve("curvature_details/stability_limit")
    assert all_near(limits.values(), limit)
    assert set(limits) >= set(range(1, 12))  # with momentum once two batches have been compared
    ratios = logger.curve("curvature_details/eigenvalue_ratio")
    assert ratios == pytest.approx({step: found[step] / limit for step in limits}, rel=1e-6)
    assert logger.curve("curvature/lambda_max") == pytest.approx(reference.largest, rel=1e-4)
    for step, converged in logger.curve("curvature_details/converged").items():
        met = logger.curve("curvature_details/value_error")[step] <= 1e-4 * reference.largest[step]
        error = logger.curve("curvature_details/preconditioned_value_error").get(step, 0.0)
        met_too = step not in found or error <= 1e-4 * found[step]
        assert converged == (met and met_too)


def test_lyapunov_leaves_out_the_limit_on_what_it_does_not_measure(fit: Fit) -> None:
    module = SmallRegressor(lambda parameters: torch.optim.AdamW(parameters, lr=0.02))
    logger = fit(module, CurvatureProbe(1, "lyapunov")).logger
    assert logger.curve("curvature/lambda_max")
    assert not {"curvature_details/eigenvalue_ratio", "curvature/preconditioned_lambda_max"} & logger.tags
    limits, ratios = logger.curve("curvature_details/stability_limit"), logger.curve("curvature/stability_ratio")
    sharpness = logger.curve("curvature/batch_sharpness")  # the only one that is in the optimizer's metric
    assert ratios == pytest.approx({step: sharpness[step] / limit for step, limit in limits.items()})
    assert len(ratios) == 11


class Uphill(SmallRegressor):
    """Maximizes the negative loss, which is the same training."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return -super().training_step(batch, batch_idx)


def test_ascent_is_measured_at_the_lower_end(fit: Fit) -> None:
    reference = Reference()
    module = Uphill(sgd(weight_decay=0.1, maximize=True))
    loader = regression_loader(batch_size=48)  # on less the limit is higher, as the decay is the same for all batches
    logger = fit(module, reference, CurvatureProbe(1, tol=1e-6), loader=loader).logger
    top = reference.largest  # of the loss itself, which is the negative of the one that is maximized
    assert logger.curve("curvature/preconditioned_lambda_max") == pytest.approx(top, rel=1e-4)
    assert all_near(logger.curve("curvature_details/stability_limit").values(), 2 / 0.1 - 0.1)
    ratios = {step: value / 19.9 for step, value in top.items() if step}  # once two batches were compared
    assert logger.curve("curvature_details/eigenvalue_ratio") == pytest.approx(ratios, rel=1e-4)
    sharpness = logger.curve("curvature/batch_sharpness")
    assert 0 < sharpness[0] <= top[0]
    binding = {step: max(ratio, sharpness[step] / 19.9) for step, ratio in ratios.items()}
    assert logger.curve("curvature/stability_ratio") == pytest.approx(binding, rel=1e-4)


@pytest.mark.parametrize("optimizer", [torch.optim.Adadelta, torch.optim.Rprop, torch.optim.ASGD])
def test_unknown_optimizer_is_judged_by_what_its_steps_lose_with_one_warning(fit: Fit, optimizer: type) -> None:
    reference = Reference()
    with pytest.warns(CurvatureWarning, match=f"stability limit of {optimizer.__name__} is not known") as warned:
        logger = fit(SmallRegressor(lambda p: optimizer(p, lr=0.01)), reference, CurvatureProbe(1, tol=1e-3)).logger
    assert len([w for w in warned if issubclass(w.category, CurvatureWarning)]) == 1
    assert not {"curvature_details/stability_limit", "curvature/preconditioned_lambda_max"} & logger.tags
    assert not {"curvature_details/eigenvalue_ratio", "curvature/batch_sharpness"} & logger.tags
    assert list(logger.curve("curvature/stability_ratio")) == list(range(12))
    assert logger.curve("curvature/learning_rate_limit")[0] == pytest.approx(
        0.01 / logger.curve("curvature/stability_ratio")[0]
    )
    assert logger.curve("curvature/lambda_max") == pytest.approx(reference.largest, rel=1e-4)
    assert "curvature_details/lr_times_lambda_max" in logger.tags
