"""NudgedSGDHook in runs where something goes wrong, beside other callbacks, and where it is refused."""

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn

from lyapunov_lightning import CurvatureProbe, HessianConfig, NudgedSGDHook, Schedule, SpectrumTracker
from lyapunov_lightning.callbacks import nudged_sgd_hook
from lyapunov_lightning.callbacks.results.nudge import NudgeResult
from lyapunov_lightning.curvature.errors import CurvatureWarning
from tests.callbacks.nudging import VARIANTS, Gradients, Quadratic, fit, hook, seeded, sgd, two_groups, weights
from tests.modules import SmallRegressor

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
    once = fit(tmp_path, None, hook(loss_fn=Measured(), schedule=Schedule(first_n_steps=1)), max_epochs=3)
    assert torch.equal(weights(failing), weights(once))
    assert failing.logger.curve("nudge_details/converged") == {0: 1.0, 6: 0.0, 12: 0.0}


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
    assert set(trainer.logger.curve("nudge_details/converged").values()) == {0.5}
    before, after = Split(), trainer.lightning_module
    change = [(new - old).abs() for old, new in zip(before.parameters(), after.parameters(), strict=True)]
    assert change[0][:2].max() < 1e-6  # e₁ and e₂ are held, up to the residuals
    assert min(change[0][2], change[1].min()) > 1e-4
    assert trainer.logger.curve("nudge_details/subspace_overlap")[6] == pytest.approx(1, abs=1e-6)


def test_without_a_converged_pair_the_last_good_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bounding(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 1:
                monkeypatch.setattr(nudged_sgd_hook, "lanczos", bounded(3))

    callback = hook(3, every_n_steps=4)
    with pytest.warns(CurvatureWarning, match="0 of 3 eigenpairs converged at step 4, and the last good ones are kept"):
        trainer = fit(tmp_path, None, callback, Bounding())
    monkeypatch.undo()
    once = fit(tmp_path, None, hook(3, schedule=Schedule(first_n_steps=1)))
    assert torch.equal(weights(trainer), weights(once))
    assert trainer.logger.curve("nudge_details/converged") == {0: 1.0, 4: 0.0, 8: 0.0}


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
        CurvatureProbe(3, end="both", hessian=HessianConfig("fixed", fraction=1.0)),
        CurvatureProbe(4, "lyapunov", log_prefix="step"),
        SpectrumTracker(6, 6, 2, hessian=HessianConfig(fraction=1.0), tol=1e-4),
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
    class Held(Callback):
        """What the callbacks of the package hold together in the midst of a step."""

        def __init__(self, callback: NudgedSGDHook) -> None:
            self.callback = callback
            self.operators: list[int] = []

        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
            self.operators.append(len(self.callback.shared._shared))

    callback = hook(frozen=True, every_n_steps=1)
    for order in ([callback, *others(tmp_path)], [*others(tmp_path), callback]):
        held = Held(callback)
        trainer = fit(tmp_path, None, *order, held, enable_checkpointing=True)
        assert held.operators == [0] * trainer.global_step
        assert callback.search_start is None


@pytest.mark.parametrize("every_n_steps", [None, 4])
@pytest.mark.parametrize("frozen", [False, True])
def test_state_is_plain_and_no_larger_than_the_eigenvectors(
    tmp_path: Path, every_n_steps: int | None, frozen: bool
) -> None:
    trainer = fit(tmp_path, None, hook(every_n_steps=every_n_steps, frozen=frozen))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    [state] = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"].values()
    vectors = state["directions"]["vectors"]
    assert vectors.shape == (3, 26)
    assert vectors.dtype == torch.float64
    assert vectors.untyped_storage().nbytes() == 3 * 26 * 8
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(3, dtype=torch.float64))


def test_results_are_what_is_logged(tmp_path: Path) -> None:
    callback = hook(2, every_n_steps=4, log_prefix="mine")
    logger = fit(tmp_path, None, callback).logger
    assert all(type(result) is NudgeResult for result in callback.results)
    assert [result.step for result in callback.results] == [0, 4, 8]
    assert [result.epoch for result in callback.results] == pytest.approx([0, 4 / 6, 8 / 6])
    assert [result.subspace_overlap is None for result in callback.results] == [True, False, False]
    for result in callback.results:
        scalars = result.scalars()
        assert len(scalars) == (5 if result.step == 0 else 6)
        assert scalars == {tag: logger.curve(f"mine/{tag}")[result.step] for tag in scalars}
    own = {tag for tag in logger.tags if tag.startswith("mine/")}
    assert own == {f"mine/{tag}" for tag in [*scalars, "nudge/removed_fraction", "nudge_details/seconds"]}


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
        ({"schedule": "epoch"}, "`schedule` should be a Schedule, or a mapping of its fields, got 'epoch'."),
        ({"every_n_steps": 0}, "`every_n_steps` should be a positive int, got 0."),
        ({"variant": "top"}, "`variant` should be one of nudge, top_only, no_top, got 'top'."),
        ({"frozen": "yes"}, "`frozen` should be a bool, got 'yes'."),
        ({"tol": 0}, "`tol` should be a positive float, got 0."),
        ({"hessian": []}, "`hessian` should be a HessianConfig, or a mapping of its fields, got []."),
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


# The command line.


def test_configuration_in_yaml_is_understood(tmp_path: Path) -> None:
    from lightning.pytorch.cli import LightningCLI

    (tmp_path / "config.yaml").write_text("""
trainer:
  callbacks:
    - class_path: lyapunov_lightning.NudgedSGDHook
      init_args: {k: 2, gamma: 0.1, variant: no_top, hessian: {num_batches: 3, mode: eval}}
    - class_path: lyapunov_lightning.NudgedSGDHook
      init_args: {schedule: {every_n_steps: 20, first_n_steps: 5}, frozen: true}
""")
    arguments = ["--config", str(tmp_path / "config.yaml"), f"--trainer.default_root_dir={tmp_path}"]
    cli = LightningCLI(SmallRegressor, args=arguments, run=False, save_config_callback=None)
    first, second = (found for found in cli.trainer.callbacks if isinstance(found, NudgedSGDHook))
    assert first.schedule == Schedule(every_n_epochs=1)
    assert first.config == HessianConfig("fixed", 3, mode="eval")
    assert (first._k, first._inside, first._outside, first._frozen) == (2, 0.0, 1.0, False)
    assert second.schedule == Schedule(every_n_steps=20, first_n_steps=5)
    assert second.config == HessianConfig("fixed", fraction=0.05, mode="train")
    assert (second._k, second._inside, second._outside, second._frozen) == (5, 0.01, 1.0, True)
