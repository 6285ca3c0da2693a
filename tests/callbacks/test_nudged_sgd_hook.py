"""NudgedSGDHook takes the steps that a dense Hessian and the paper's formula give, in whatever run it is put."""

import functools
import itertools
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lyapunov_lightning import HessianConfig, NudgedSGDHook, Schedule
from tests.callbacks.identity import Outcome, assert_identical, train
from tests.callbacks.nudging import VARIANTS, Gradients, Quadratic, fit, hook, seeded, sgd, two_groups, weights
from tests.modules import BusyModule, SmallRegressor, dense_hessian, regression_data, regression_loader

# The step.


def test_update_is_that_of_newton_where_the_paper_says_so(tmp_path: Path) -> None:
    module = Quadratic([100.0] * 5 + [1.0] * 2)
    before = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    trainer = fit(tmp_path, module, NudgedSGDHook(k=5, gamma=0.01, tol=1e-4), max_steps=1)
    newton = -0.1 * before  # η H⁻¹ g with g = Hθ
    torch.testing.assert_close(weights(trainer) - before, newton, rtol=1e-6, atol=0)


def by_hand(
    module: pl.LightningModule,
    inside: float,
    outside: float,
    *,
    k: int = 3,
    epochs: int = 2,
    lr: float = 0.1,
    momentum: float = 0.0,
    nesterov: bool = False,
    dampening: float = 0.0,
    decay: Any = 0.0,
    accumulate: int = 1,
    clip: float = math.inf,
) -> dict[str, Any]:
    """Trains on `regression_loader` with the formula of the docstring and dense Hessians, without any optimizer."""
    parameters = list(module.parameters())
    theta = nn.utils.parameters_to_vector(parameters).detach().clone()
    velocity, found = None, {"removed": [], "tops": [], "values": []}
    for _ in range(epochs):
        values, vectors = torch.linalg.eigh(dense_hessian(module, regression_data().tensors)[1])
        top = vectors[:, -k:].T.flip(0)
        found["tops"].append(top)
        found["values"].append(values[-k:].flip(0))
        for batches in zip(*[iter(regression_loader())] * accumulate, strict=True):
            losses = [nn.functional.mse_loss(module(inputs), targets) for inputs, targets, _ in batches]
            parts = torch.autograd.grad(sum(losses) / accumulate, parameters)
            whole = torch.cat([part.reshape(-1) for part in parts]) + decay * theta
            changed = outside * (whole - top.T @ (top @ whole)) + inside * (top.T @ (top @ whole))
            found["removed"].append(float((whole - changed).square().sum() / whole.square().sum()))
            handed = changed - decay * theta
            handed = handed * min(1.0, clip / (float(handed.norm()) + 1e-6))  # as `clip_grad_norm_` does
            used = handed + decay * theta
            velocity = used if velocity is None else momentum * velocity + (1 - dampening) * used
            theta = theta - lr * (used + momentum * velocity if nesterov else velocity if momentum else used)
            with torch.no_grad():
                nn.utils.vector_to_parameters(theta, parameters)
    return {**found, "weights": theta}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("optimizer", "settings", "trainer"),
    [
        ({}, {}, {}),
        ({"momentum": 0.9}, {"momentum": 0.9}, {}),
        ({"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "nesterov": True}, {}),
        ({"momentum": 0.8, "dampening": 0.3}, {"momentum": 0.8, "dampening": 0.3}, {}),
        ({"weight_decay": 0.2}, {"decay": 0.2}, {}),
        ({}, {"accumulate": 3}, {"accumulate_grad_batches": 3}),
        ({}, {"clip": 0.3}, {"gradient_clip_val": 0.3}),
        (
            {"momentum": 0.9, "weight_decay": 0.2},
            {"momentum": 0.9, "decay": 0.2, "accumulate": 2, "clip": 0.3},
            {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
        ),
        (None, {"momentum": 0.5, "decay": torch.tensor([0.0] * 16 + [0.3] * 10)}, {}),
    ],
    ids=["plain", "momentum", "nesterov", "dampening", "decay", "accumulated", "clipped", "all", "groups"],
)
def test_training_is_that_by_hand_with_dense_eigenvectors(
    tmp_path: Path, variant: str, optimizer: Any, settings: dict[str, Any], trainer: dict[str, Any]
) -> None:
    make = two_groups if optimizer is None else sgd(**optimizer)
    expected = by_hand(seeded(lambda: SmallRegressor(make)), *VARIANTS[variant], **settings)
    found = fit(tmp_path, lambda: SmallRegressor(make), hook(variant=variant), **trainer)
    torch.testing.assert_close(weights(found), expected["weights"], rtol=1e-7, atol=1e-8)
    logger = found.logger
    assert list(logger.curve("nudge/removed_fraction").values()) == pytest.approx(expected["removed"], rel=1e-6)
    for rank in range(3):
        values = [float(value[rank]) for value in expected["values"]]
        assert list(logger.curve(f"nudge/lambda_{rank + 1}").values()) == pytest.approx(values, rel=1e-7)
    overlap = [float((a @ b.T).square().sum() / 3) for a, b in itertools.pairwise(expected["tops"])]
    assert list(logger.curve("nudge_details/subspace_overlap").values()) == pytest.approx(overlap, rel=1e-6)
    assert set(logger.curve("nudge_details/converged").values()) == {1.0}


def test_frozen_follows_the_eigenvectors_of_the_first_measurement(tmp_path: Path) -> None:
    module = seeded()
    first = torch.linalg.eigh(dense_hessian(module, regression_data().tensors)[1]).eigenvectors[:, -1]
    before = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    constant = fit(tmp_path, None, hook(1, variant="top_only", frozen=True), max_epochs=3)
    moved = weights(constant) - before
    assert moved.norm() > 1e-2
    torch.testing.assert_close(first * (first @ moved), moved, rtol=0, atol=1e-9)
    assert list(constant.logger.curve("nudge/lambda_1")) == [0]
    followed = weights(fit(tmp_path, None, hook(1, variant="top_only"), max_epochs=3)) - before
    assert (followed - first * (first @ followed)).norm() > 1e-3


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_top_only_and_no_top_are_parts_of_the_plain_update(tmp_path: Path, momentum: float, decay: float) -> None:
    def module(gradient: bool = True) -> SmallRegressor:
        made = SmallRegressor(sgd(momentum=momentum, weight_decay=decay))
        if not gradient:  # what is left is the momentum
            made.register_buffer("nothing", torch.zeros(()))
            made.on_before_optimizer_step = lambda optimizer: [
                parameter.grad.copy_(-decay * parameter.detach()) for parameter in made.parameters()
            ]
        return made

    begin = fit(tmp_path, module, max_steps=4)
    begin.save_checkpoint(tmp_path / "begin.ckpt")

    def update(*callbacks: Callback, gradient: bool = True, resumed: bool) -> Tensor:
        if not resumed:
            pl.seed_everything(0, verbose=False)
            fresh = module()
            before = nn.utils.parameters_to_vector(fresh.parameters()).detach().clone()
            return weights(fit(tmp_path, fresh, *callbacks, max_steps=1)) - before
        state = torch.load(tmp_path / "begin.ckpt", weights_only=True)
        state["state_dict"] |= {} if gradient else {"nothing": torch.zeros(())}
        torch.save(state, tmp_path / "state.ckpt")
        trainer = fit(tmp_path, module(gradient), *callbacks, max_steps=5, ckpt_path=tmp_path / "state.ckpt")
        return weights(trainer) - weights(begin)

    for resumed in (False, True):
        parts = [update(hook(variant=variant, every_n_steps=1), resumed=resumed) for variant in VARIANTS]
        plain = update(resumed=resumed)
        # What the momentum carries on is in both parts; there is none in the first step.
        carried = update(gradient=False, resumed=True) if resumed else torch.zeros_like(plain)
        torch.testing.assert_close(parts[1] + parts[2] - carried, plain, rtol=1e-9, atol=1e-12)
        assert all((part - plain).norm() > 1e-3 * plain.norm() for part in parts)


# A factor of 1 is plain SGD.


WITHOUT_METRICS = {"module": functools.partial(BusyModule, use_metrics=False)}
"""They take most of a run's time, and are put back in one place for all callbacks: one run with them is enough here."""


@functools.cache
def plain(**options: Any) -> Outcome:
    return train(**options)


@pytest.mark.parametrize(
    ("options", "run"),
    [
        ({}, {}),
        ({"every_n_steps": 7}, WITHOUT_METRICS),
        ({"frozen": True}, WITHOUT_METRICS),
        ({"hessian": HessianConfig(num_batches=2, mode="eval")}, WITHOUT_METRICS),
        ({"hessian": HessianConfig("batch"), "schedule": Schedule(first_n_steps=3, every_n_epochs=1)}, WITHOUT_METRICS),
        ({"log_prefix": "mine"}, {"precision": "bf16-mixed", **WITHOUT_METRICS}),
        ({}, {"accumulate": 4, "steps": 14, **WITHOUT_METRICS}),
        ({"every_n_steps": 5}, {"accumulate": 3, "precision": "bf16-mixed", "steps": 14, **WITHOUT_METRICS}),
        ({"hessian": HessianConfig(mode="eval")}, {"validate": True, **WITHOUT_METRICS}),
    ],
    ids=["epoch", "steps", "frozen", "eval", "batch", "bf16", "accumulated", "both", "validated"],
)
def test_factor_of_one_is_plain_training_bit_by_bit(options: dict[str, Any], run: dict[str, Any]) -> None:
    nudged = train(NudgedSGDHook(k=2, gamma=1.0, tol=0.1, **options), **run)
    assert_identical(plain(**run), nudged)
    prefix = f"{options['log_prefix']}/" if "log_prefix" in options else ""
    assert len(nudged.curve(f"{prefix}nudge/lambda_1")) >= (1 if options.get("frozen") else 2)
    removed = nudged.curve(f"{prefix}nudge/removed_fraction")
    assert len(removed) >= 5
    assert set(removed.values()) == {0.0}


def test_factor_of_one_is_plain_training_with_weight_decay_too(tmp_path: Path) -> None:
    def module() -> SmallRegressor:
        return SmallRegressor(sgd(momentum=0.9, weight_decay=0.2))

    assert torch.equal(weights(fit(tmp_path, module, hook(gamma=1.0))), weights(fit(tmp_path, module)))


def test_other_factors_are_not_plain_training() -> None:
    nudged = train(NudgedSGDHook(k=2, gamma=0.1, tol=0.1))
    with pytest.raises(AssertionError, match="The callback changed the run"):
        assert_identical(plain(), nudged)
    # the measurement itself draws no random number and touches no data
    assert nudged.generators_at_steps == plain().generators_at_steps
    assert nudged.data_seen == plain().data_seen


# Half precision with a loss scaler.


def scaled(scale: float) -> MixedPrecision:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    return MixedPrecision("16-mixed", "cpu", scaler)


class InFloat32(SmallRegressor):
    """Overflows at the third step if told to."""

    def __init__(self, overflows: bool = False, **options: Any) -> None:
        super().__init__(sgd(momentum=0.9, weight_decay=0.1, **options))
        self.net.float()
        self.overflows = overflows

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch[0].float(), batch[1].float()
        loss = nn.functional.mse_loss(self.net(inputs).float(), targets)
        return loss * (math.inf if self.overflows and batch_idx == 2 else 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_scale_does_not_show(tmp_path: Path, variant: str) -> None:
    # Scales by powers of two are exact, so only what acts upon scaled gradients could tell them apart.
    runs = [
        fit(tmp_path, InFloat32, hook(variant=variant, tol=0.1), plugins=[scaled(scale)], gradient_clip_val=0.3)
        for scale in (64.0, 256.0)
    ]
    torch.testing.assert_close(weights(runs[0]), weights(runs[1]), rtol=1e-4, atol=1e-5)
    plain = fit(tmp_path, InFloat32, plugins=[scaled(64.0)], gradient_clip_val=0.3)
    assert (weights(plain) - weights(runs[0])).norm() > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_overflow_is_left_to_the_scaler(tmp_path: Path, variant: str) -> None:
    gradients = Gradients()
    trainer = fit(
        tmp_path,
        lambda: InFloat32(overflows=True),
        hook(variant=variant, tol=0.1, loss_fn=lambda m, b: nn.functional.mse_loss(m.net(b[0].float()), b[1].float())),
        gradients,
        plugins=[scaled(64.0)],
        max_epochs=1,
    )
    assert weights(trainer).isfinite().all()
    assert [bool(gradient.isfinite().all()) for gradient in gradients.seen] == [True, True, False, True, True, True]
    assert trainer.logger.curve("nudge/removed_fraction").keys() == {0, 1, 3, 4, 5}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_not_finite_does_not_spread(tmp_path: Path, variant: str, value: float) -> None:
    class OneBadNumber(SmallRegressor):
        def on_after_backward(self) -> None:
            if self.global_step == 2:
                self.net[0].bias.grad[1] = value

    before, after = Gradients(), Gradients()
    trainer = fit(tmp_path, OneBadNumber, before, hook(variant=variant), after, max_steps=3)
    assert int(before.seen[2].isfinite().sum()) == 25
    torch.testing.assert_close(after.seen[2], before.seen[2], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(after.seen[1], before.seen[1])
    assert list(trainer.logger.curve("nudge/removed_fraction")) == [0, 1]


def test_fused_optimizer_that_unscales_in_its_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"needs the gradients unscaled.*`fused=False`"):
        fit(tmp_path, lambda: InFloat32(fused=True), hook(), plugins=[scaled(64.0)])
    assert fit(tmp_path, lambda: SmallRegressor(sgd(fused=True)), hook()).global_step == 12
