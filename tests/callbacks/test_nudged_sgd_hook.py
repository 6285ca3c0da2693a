"""NudgedSGDHook takes the steps that a dense Hessian and the paper's formula give, in whatever run it is put."""

import functools
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lyapunov_lightning import CurvatureProbe, NudgedSGDHook, Schedule, SpectrumTracker
from lyapunov_lightning.callbacks import nudged_sgd_hook
from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.curvature.vectors import FlatLayout
from lyapunov_lightning.training.optimizers import check_uniform_sgd
from tests.callbacks.identity import Outcome, assert_identical, train
from tests.modules import MemoryLogger, SmallRegressor, dense_hessian, regression_data, regression_loader

VARIANTS = {"nudge": (0.1, 1.0), "top_only": (1.0, 0.0), "no_top": (0.0, 1.0)}
"""The factors of the gradient inside and outside of the top subspace, with `gamma` 0.1."""


def hook(k: int = 3, gamma: float = 0.1, **options: Any) -> NudgedSGDHook:
    """Measures on the whole training set, exactly."""
    return NudgedSGDHook(k, gamma, **{"fraction": 1.0, "tol": 1e-9, **options})


def sgd(**options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, **{"lr": 0.1, **options})


def fit(tmp_path: Path, module: Any = None, *callbacks: Callback, **options: Any) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    settings = {
        "max_epochs": -1 if "max_steps" in options else 2,
        "logger": MemoryLogger(),
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        **options,
    }
    ckpt_path, loader = settings.pop("ckpt_path", None), settings.pop("loader", None)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    module = module if isinstance(module, pl.LightningModule) else (module or SmallRegressor)()
    trainer.fit(module, regression_loader() if loader is None else loader, ckpt_path=ckpt_path)
    return trainer


def weights(trainer: pl.Trainer) -> Tensor:
    return nn.utils.parameters_to_vector(trainer.lightning_module.parameters()).detach().clone()


def seeded(module: Callable[[], pl.LightningModule] = SmallRegressor) -> pl.LightningModule:
    """The module as `fit` makes it."""
    pl.seed_everything(0, verbose=False)
    return module()


class Gradients(Callback):
    """The gradient in ``on_before_optimizer_step``, as it is where this callback stands in the list."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in pl_module.parameters()]
        self.seen.append(torch.cat([part.reshape(-1) for part in parts]))


# The step.


class Quadratic(pl.LightningModule):
    """Half the sum of d·θ², over two tensors."""

    def __init__(self, curvatures: list[float], optimizer: Any = None) -> None:
        super().__init__()
        self.curvatures = torch.tensor(curvatures, dtype=torch.float64)
        values = torch.linspace(1, 2, len(curvatures), dtype=torch.float64)
        self.first, self.second = nn.Parameter(values[:3].clone()), nn.Parameter(values[3:].clone())
        self.optimizer = optimizer or sgd()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.curvatures * torch.cat([self.first, self.second]).square()).sum() / 2 + 0 * batch[0].sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


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


def two_groups(parameters: Any) -> torch.optim.Optimizer:
    """The later half of the parameters first, and with another weight decay."""
    parameters = list(parameters)
    groups = [{"params": parameters[2:], "weight_decay": 0.3}, {"params": parameters[:2], "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.5)


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
    assert list(logger.curve("nudge/subspace_overlap").values()) == pytest.approx(overlap, rel=1e-6)
    assert set(logger.curve("nudge/converged").values()) == {1.0}


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

    every_step = Schedule(every_n_steps=1)
    for resumed in (False, True):
        parts = [update(hook(variant=variant, refresh=every_step), resumed=resumed) for variant in VARIANTS]
        plain = update(resumed=resumed)
        # What the momentum carries on is in both parts; there is none in the first step.
        carried = update(gradient=False, resumed=True) if resumed else torch.zeros_like(plain)
        torch.testing.assert_close(parts[1] + parts[2] - carried, plain, rtol=1e-9, atol=1e-12)
        assert all((part - plain).norm() > 1e-3 * plain.norm() for part in parts)


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    gamma=st.floats(0, 5),
    decay=st.floats(0, 1),
    data=st.data(),
)
def test_change_is_linear_along_any_orthonormal_vectors(
    sizes: list[int], seed: int, gamma: float, decay: float, data: Any
) -> None:
    """For any vectors: γ along them and 1 across, seen in what the optimizer makes of it."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64)) for n in sizes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    k = data.draw(st.integers(1, sum(sizes)))
    rows = torch.linalg.qr(torch.randn(sum(sizes), k, generator=generator, dtype=torch.float64)).Q.T
    nudged = NudgedSGDHook(k, gamma)
    nudged._directions.turn(rows, [])
    flat = FlatLayout(parameters)
    before = flat.flatten(parameters)
    whole = flat.flatten([parameter.grad for parameter in parameters]) + decay * before
    optimizer = torch.optim.SGD(parameters, lr=0.5, weight_decay=decay)
    with torch.no_grad():
        removed = nudged._change_gradient(optimizer, parameters)
    optimizer.step()
    update = (flat.flatten(parameters) - before) / -0.5
    torch.testing.assert_close(rows @ update, gamma * (rows @ whole), rtol=1e-9, atol=1e-9)
    across = whole - rows.T @ (rows @ whole)
    torch.testing.assert_close(update - rows.T @ (rows @ update), across, rtol=1e-9, atol=1e-9)
    share = float((rows @ whole).square().sum() / whole.square().sum())
    assert float(removed) == pytest.approx((1 - gamma) ** 2 * share, rel=1e-9, abs=1e-12)


# A factor of 1 is plain SGD.


SHORT = {"steps": 30}
"""Into the second epoch, of 25 batches."""


@functools.cache
def plain(**options: Any) -> Outcome:
    return train(**options)


@pytest.mark.parametrize(
    ("options", "run"),
    [
        ({}, {}),
        ({"refresh": Schedule(every_n_steps=7)}, SHORT),
        ({"frozen": True}, SHORT),
        ({"num_batches": 2, "mode": "eval"}, SHORT),
        ({"data": "batch", "refresh": Schedule(first_n_steps=3, every_n_epochs=1)}, SHORT),
        ({"log_prefix": "mine"}, {"precision": "bf16-mixed", **SHORT}),
        ({}, {"accumulate": 4, "steps": 15}),
        ({"refresh": Schedule(every_n_steps=5)}, {"accumulate": 3, "precision": "bf16-mixed", "steps": 15}),
        ({"mode": "eval"}, {"validate": True, **SHORT}),
    ],
    ids=["epoch", "steps", "frozen", "eval", "batch", "bf16", "accumulated", "both", "validated"],
)
def test_factor_of_one_is_plain_training_bit_by_bit(options: dict[str, Any], run: dict[str, Any]) -> None:
    nudged = train(NudgedSGDHook(2, 1.0, tol=0.1, **options), **run)
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
    nudged = train(NudgedSGDHook(2, 0.1, tol=0.1))
    with pytest.raises(AssertionError, match="The callback changed the run"):
        assert_identical(plain(), nudged)
    # the measurement itself draws no random number and touches no data
    assert nudged.generators_at_steps == plain().generators_at_steps
    assert nudged.data_seen == plain().data_seen


# Arguments and refusals.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "`k` should be a positive int, got 0."),
        ({"k": 2.0}, "`k` should be a positive int, got 2.0."),
        ({"gamma": -0.1}, "`gamma` should be a finite non-negative float, got -0.1."),
        ({"gamma": math.inf}, "`gamma` should be a finite non-negative float, got inf."),
        ({"gamma": math.nan}, "`gamma` should be a finite non-negative float, got nan."),
        ({"gamma": True}, "`gamma` should be a finite non-negative float, got True."),
        ({"refresh": "step"}, "`refresh` should be 'epoch' or a `Schedule`, got 'step'."),
        ({"refresh": 3}, "`refresh` should be 'epoch' or a `Schedule`, got 3."),
        ({"variant": "top"}, "`variant` should be one of nudge, top_only, no_top, got 'top'."),
        ({"frozen": "yes"}, "`frozen` should be a bool, got 'yes'."),
        ({"tol": 0}, "`tol` should be a positive float, got 0."),
        ({"fraction": 0}, "`fraction` should be in (0, 1], got 0."),
        ({"num_batches": 0}, "`num_batches` should be a positive int, got 0."),
        ({"data": "all"}, "`data` should be 'batch' or 'fixed', got 'all'."),
        ({"mode": "test"}, "`mode` should be 'train' or 'eval', got 'test'."),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_argument_is_named_with_its_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        NudgedSGDHook(**options)


def rates(parameters: Any) -> torch.optim.Optimizer:
    first, *others = parameters
    return torch.optim.SGD([{"params": [first], "lr": 0.2}, {"params": others}], lr=0.1)


def momenta(parameters: Any) -> torch.optim.Optimizer:
    first, *others = parameters
    return torch.optim.SGD([{"params": [first], "momentum": 0.9}, {"params": others}], lr=0.1)


class OwnSGD(torch.optim.SGD):
    """Whatever it does in its step."""


@pytest.mark.parametrize(
    ("optimizer", "cause"),
    [
        (lambda p: torch.optim.Adam(p), "the optimizer is Adam"),
        (lambda p: OwnSGD(p, lr=0.1), "the optimizer is OwnSGD"),
        (sgd(maximize=True), "`maximize` is set"),
        (rates, "the parameter groups have different `lr`: 0.1, 0.2"),
        (momenta, "the parameter groups have different `momentum`: 0.0, 0.9"),
        (lambda p: torch.optim.SGD(list(p)[:3], lr=0.1), "it does not train net.3.bias, which should then not require"),
    ],
    ids=["adam", "subclass", "maximize", "rates", "momenta", "part"],
)
def test_optimizer_for_which_it_is_not_right_is_refused(tmp_path: Path, optimizer: Any, cause: str) -> None:
    message = f"^`NudgedSGDHook` gives directions.*one `torch.optim.SGD`.*, but {re.escape(cause)}.*Use such an optim"
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, lambda: SmallRegressor(optimizer), hook())


def test_no_optimizer_and_several_are_refused() -> None:
    module = SmallRegressor()
    for optimizers in ([], [module.configure_optimizers(), module.configure_optimizers()]):
        with pytest.raises(MisconfigurationException, match=f"but there are {len(optimizers)} optimizers"):
            check_uniform_sgd("NudgedSGDHook", optimizers, dict(module.named_parameters()))


def test_rates_that_part_in_mid_run_are_refused_then(tmp_path: Path) -> None:
    class Scheduled(SmallRegressor):
        def configure_optimizers(self) -> Any:
            optimizer = two_groups(self.parameters())
            factors = [lambda step: 1.0, lambda step: 1.0 if step < 3 else 0.5]
            return [optimizer], [
                {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factors), "interval": "step"}
            ]

    with pytest.raises(MisconfigurationException, match=r"different `lr`: 0\.05, 0\.1"):
        fit(tmp_path, Scheduled, hook())


def test_learning_rate_schedule_for_all_parameters_is_fine(tmp_path: Path) -> None:
    class Scheduled(SmallRegressor):
        def configure_optimizers(self) -> Any:
            optimizer = two_groups(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    assert fit(tmp_path, Scheduled, hook()).global_step == 12


def test_two_of_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"can have one `NudgedSGDHook`, got 2.*Remove all but one"):
        fit(tmp_path, None, hook(), hook(variant="no_top", log_prefix="second"))


def test_more_directions_than_parameters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="cannot find 27 eigenvalues of a model with 26 trainable"):
        fit(tmp_path, None, hook(27))


def test_all_directions_are_another_learning_rate(tmp_path: Path) -> None:
    slower = fit(tmp_path, lambda: SmallRegressor(sgd(lr=0.05)))
    nudged = fit(tmp_path, None, hook(26, gamma=0.5))
    torch.testing.assert_close(weights(nudged), weights(slower), rtol=1e-9, atol=1e-9)


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


# What goes wrong.


def own_warnings(warned: Any) -> list[str]:
    return [str(w.message) for w in warned if issubclass(w.category, CurvatureWarning)]


class Measured:
    """The squared error, which fails to be measured in some epochs."""

    def __init__(self, *epochs: int, value: float | None = None) -> None:
        self.epochs = epochs
        self.value = value

    def __call__(self, module: Any, batch: Any) -> Tensor:
        if module.current_epoch in self.epochs and self.value is None:
            raise RuntimeError("broken on purpose")
        loss = nn.functional.mse_loss(module(batch[0]), batch[1])
        return loss * self.value if module.current_epoch in self.epochs else loss


@pytest.mark.parametrize("value", [None, math.nan, math.inf], ids=["error", "nan", "inf"])
def test_failed_measurement_leaves_the_last_good_directions(tmp_path: Path, value: float | None) -> None:
    with pytest.warns(CurvatureWarning) as warned:
        failing = fit(tmp_path, None, hook(loss_fn=Measured(1, 2, value=value)), max_epochs=3)
    assert len(own_warnings(warned)) == 1
    assert "at step 6 failed" in own_warnings(warned)[0]
    once = fit(tmp_path, None, hook(loss_fn=Measured(), refresh=Schedule(first_n_steps=1)), max_epochs=3)
    assert torch.equal(weights(failing), weights(once))
    assert failing.logger.curve("nudge/converged") == {0: 1.0, 6: 0.0, 12: 0.0}


def test_gradient_is_left_alone_before_the_first_good_measurement(tmp_path: Path) -> None:
    with pytest.warns(CurvatureWarning, match="at step 0 failed"):
        failing = fit(tmp_path, None, hook(loss_fn=Measured(0)), max_epochs=1)
    assert torch.equal(weights(failing), weights(fit(tmp_path, None, max_epochs=1)))
    with pytest.warns(CurvatureWarning, match="at step 0 failed"):
        later = fit(tmp_path, None, hook(loss_fn=Measured(0)), max_epochs=2)
    assert not torch.equal(weights(later), weights(fit(tmp_path, None, max_epochs=2)))
    assert list(later.logger.curve("nudge/removed_fraction")) == list(range(6, 12))


def test_frozen_takes_the_first_measurement_that_succeeds(tmp_path: Path) -> None:
    with pytest.warns(CurvatureWarning, match="at step 0 failed"):
        trainer = fit(tmp_path, None, hook(frozen=True, loss_fn=Measured(0)), max_epochs=3)
    assert list(trainer.logger.curve("nudge/lambda_1")) == [6]


def bounded(products: int) -> Callable[..., Any]:
    """The solver with so few products that not all of its pairs converge."""
    plain = nudged_sgd_hook.lanczos
    return lambda *args, **kwargs: plain(*args, **kwargs, max_matvecs=products)


def test_only_the_pairs_that_converged_are_acted_upon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Split(Quadratic):
        """Two eigenvalues far above a bulk that few products cannot resolve."""

        def __init__(self) -> None:
            super().__init__([1000.0, 500.0, *torch.linspace(1, 2, 30).tolist()], sgd(lr=1e-4))

    monkeypatch.setattr(nudged_sgd_hook, "lanczos", bounded(12))
    callback = hook(4, gamma=0.0, tol=1e-3)
    with pytest.warns(CurvatureWarning, match=r"2 of 4 eigenpairs converged at step 0, and these alone") as warned:
        trainer = fit(tmp_path, Split, callback, max_epochs=2)
    assert len(own_warnings(warned)) == 1
    assert set(trainer.logger.curve("nudge/converged").values()) == {0.5}
    before, after = Split(), trainer.lightning_module
    change = [(new - old).abs() for old, new in zip(before.parameters(), after.parameters(), strict=True)]
    assert change[0][:2].max() < 1e-6  # e₁ and e₂ are held, up to the residuals
    assert min(change[0][2], change[1].min()) > 1e-4
    assert trainer.logger.curve("nudge/subspace_overlap")[6] == pytest.approx(1, abs=1e-6)


def test_without_a_converged_pair_the_last_good_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bounding(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 1:
                monkeypatch.setattr(nudged_sgd_hook, "lanczos", bounded(3))

    callback = hook(3, refresh=Schedule(every_n_steps=4))
    with pytest.warns(CurvatureWarning, match="0 of 3 eigenpairs converged at step 4, and the last good ones are kept"):
        trainer = fit(tmp_path, None, callback, Bounding())
    monkeypatch.undo()
    once = fit(tmp_path, None, hook(3, refresh=Schedule(first_n_steps=1)))
    assert torch.equal(weights(trainer), weights(once))
    assert trainer.logger.curve("nudge/converged") == {0: 1.0, 4: 0.0, 8: 0.0}


class WithUnused(SmallRegressor):
    """Has a parameter that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__(sgd(momentum=0.9, weight_decay=0.1))
        self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_without_gradient_stays_as_it_is(tmp_path: Path, variant: str) -> None:
    module = seeded(WithUnused)
    trainer = fit(tmp_path, module, hook(variant=variant))
    assert module.unused.grad is None
    assert torch.equal(module.unused.detach(), torch.ones(3, dtype=torch.float64))
    without = fit(tmp_path, lambda: SmallRegressor(sgd(momentum=0.9, weight_decay=0.1)), hook(variant=variant))
    torch.testing.assert_close(weights(trainer)[3:], weights(without), rtol=1e-7, atol=1e-9)


class Freezing(Callback):
    """Freezes the first layer at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            pl_module.net[0].requires_grad_(False)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_is_left_alone_while_other_parameters_train(tmp_path: Path, frozen: bool) -> None:
    before, after = Gradients(), Gradients()
    with pytest.warns(CurvatureWarning, match="the trainable parameters are not those") as warned:
        trainer = fit(tmp_path, None, Freezing(3), before, hook(frozen=frozen), after, max_epochs=3)
    assert len(own_warnings(warned)) == 1
    assert ("from now on" if frozen else "until the next measurement") in own_warnings(warned)[0]
    acted = {step for step in range(18) if not torch.equal(before.seen[step], after.seen[step])}
    assert acted == ({0, 1, 2} if frozen else {0, 1, 2, *range(6, 18)})
    assert set(trainer.logger.curve("nudge/removed_fraction")) == acted
    assert all(not gradient[:16].any() for gradient in after.seen[3:])


def test_other_parameters_of_the_same_number_are_not_taken_for_the_same(tmp_path: Path) -> None:
    class Swapping(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step in (0, 3):
                pl_module.twins[0].requires_grad_(trainer.global_step == 3)
                pl_module.twins[1].requires_grad_(trainer.global_step == 0)

    class Twins(SmallRegressor):
        def __init__(self) -> None:
            super().__init__()
            self.twins = nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)])

        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(inputs) * self.twins[0] * self.twins[1]

    with pytest.warns(CurvatureWarning, match="the trainable parameters are not those"):
        trainer = fit(tmp_path, Twins, Swapping(), hook())
    assert set(trainer.logger.curve("nudge/removed_fraction")) == {0, 1, 2, *range(6, 12)}


def test_sparse_gradients_are_changed_too(tmp_path: Path) -> None:
    class Embedded(pl.LightningModule):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 2, sparse=sparse, dtype=torch.float64)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.table(batch[2] % 3) - batch[1]).pow(4).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    sparse, dense = (
        fit(tmp_path, functools.partial(Embedded, is_sparse), hook(2, method="finite_difference", tol=1e-4))
        for is_sparse in (True, False)
    )
    assert {0, 6} <= set(sparse.logger.curve("nudge/lambda_1"))
    torch.testing.assert_close(weights(sparse), weights(dense), rtol=1e-6, atol=1e-8)


def test_manual_optimization_is_nudged_in_its_own_step(tmp_path: Path) -> None:
    class Manual(SmallRegressor):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def curvature_loss(self, batch: Any) -> Tensor:
            return nn.functional.mse_loss(self(batch[0]), batch[1])

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.curvature_loss(batch))
            optimizer.step()

    manual, automatic = fit(tmp_path, Manual, hook()), fit(tmp_path, None, hook())
    torch.testing.assert_close(weights(manual), weights(automatic), rtol=1e-12, atol=1e-12)


def test_a_second_training_begins_without_directions(tmp_path: Path) -> None:
    callback = hook(frozen=True, variant="no_top")
    pl.seed_everything(3, verbose=False)
    fit(tmp_path, SmallRegressor(), callback)
    again = fit(tmp_path, None, callback)
    assert torch.equal(weights(again), weights(fit(tmp_path, None, hook(frozen=True, variant="no_top"))))


# With other callbacks.


def others(folder: Path) -> list[Callback]:
    return [
        CurvatureProbe(3, end="both", data="fixed", fraction=1.0),
        CurvatureProbe(4, "lyapunov", log_prefix="step"),
        SpectrumTracker(6, 2, fraction=1.0, tol=1e-4),
        ModelCheckpoint(folder, monitor="nudge/lambda_1", mode="min", every_n_epochs=1, save_on_train_epoch_end=True),
        EarlyStopping("train_loss", patience=50),
    ]


def test_other_callbacks_and_their_order_do_not_change_the_training(tmp_path: Path) -> None:
    def run(order: Callable[[list[Callback]], list[Callback]]) -> pl.Trainer:
        return fit(
            tmp_path,
            lambda: SmallRegressor(sgd(momentum=0.9)),
            *order([hook(tol=1e-2), *others(tmp_path)]),
            enable_checkpointing=True,
            gradient_clip_val=0.5,
        )

    alone = fit(tmp_path, lambda: SmallRegressor(sgd(momentum=0.9)), hook(tol=1e-2), gradient_clip_val=0.5)
    for order in (list, lambda them: them[::-1]):
        together = run(order)
        assert torch.equal(weights(together), weights(alone))
        assert together.logger.curve("nudge/lambda_1") == alone.logger.curve("nudge/lambda_1")
        assert together.checkpoint_callback.best_model_path
        assert len(together.logger.curve("curvature/lambda_max")) == 4
        assert len(together.logger.curve("spectrum/lambda_6")) == 2


def test_frozen_directions_hold_no_measurement_of_others(tmp_path: Path) -> None:
    callback = hook(frozen=True, refresh=Schedule(every_n_steps=1))
    for order in ([callback, *others(tmp_path)], [*others(tmp_path), callback]):
        fit(tmp_path, None, *order, enable_checkpointing=True)
        assert callback.subscription._measurement is None


@pytest.mark.parametrize("refresh", ["epoch", Schedule(every_n_steps=4)], ids=["epoch", "steps"])
@pytest.mark.parametrize("frozen", [False, True])
def test_state_is_plain_and_no_larger_than_the_eigenvectors(tmp_path: Path, refresh: Any, frozen: bool) -> None:
    trainer = fit(tmp_path, None, hook(refresh=refresh, frozen=frozen))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    [state] = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"].values()
    vectors = state["directions"]["vectors"]
    assert vectors.shape == (3, 26)
    assert vectors.dtype == torch.float64
    assert vectors.untyped_storage().nbytes() == 3 * 26 * 8
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(3, dtype=torch.float64))


# The command line.


def test_configuration_of_the_example_is_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lightning.pytorch.cli import LightningCLI

    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    config = ["--config", "examples/configs/nudged_sgd.yaml", f"--trainer.default_root_dir={tmp_path}"]

    def parsed(*more: str) -> NudgedSGDHook:
        cli = LightningCLI(args=[*config, *more], run=False, save_config_callback=None)
        [found] = [callback for callback in cli.trainer.callbacks if isinstance(callback, NudgedSGDHook)]
        return found

    assert parsed().subscription.timetable._schedule == Schedule(every_n_epochs=1)
    schedule = parsed("--trainer.callbacks.refresh.every_n_steps=20").subscription.timetable._schedule
    assert schedule == Schedule(every_n_steps=20)
