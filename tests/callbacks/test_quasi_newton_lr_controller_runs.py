"""The controller in company: resumed, beside other callbacks, with groups that come in mid-run; and what it refuses."""

import copy
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn

from lyapunov_lightning import (
    CurvatureProbe,
    HessianConfig,
    NegativeCurvatureTracker,
    NudgedSGDHook,
    QuasiNewtonLRController,
    Schedule,
    SpectrumTracker,
)
from lyapunov_lightning.callbacks.negative_curvature_tracker import Descent
from lyapunov_lightning.callbacks.results.learning_rate import LearningRateResult
from lyapunov_lightning.curvature.acting.pace import LRBounds
from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.training.reporting import recording
from tests.callbacks.steering import OPTIMIZERS, RULES, fit, seeded, weights
from tests.modules import MemoryLogger, SmallRegressor, dense_hessian, regression_data, regression_loader

HALF = HessianConfig(fraction=0.5)

# Resuming, and the company of other callbacks.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["momentum", "AdamW"])
def test_a_resumed_run_goes_on_bit_by_bit(rule: str, name: str, tmp_path: Any) -> None:
    def run(epochs: int, module: pl.LightningModule, ckpt_path: str | None = None) -> pl.Trainer:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=MemoryLogger(),
            callbacks=[QuasiNewtonLRController(2, rule, annealing=0, force=True)],
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, regression_loader(), ckpt_path=ckpt_path, weights_only=ckpt_path is not None)
        return trainer

    straight, halved, resumed = (seeded(optimizer=OPTIMIZERS[name]) for _ in range(3))
    whole = run(4, straight)
    half = run(2, halved)
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = run(4, resumed, str(tmp_path / "half.ckpt"))
    assert torch.equal(weights(straight), weights(resumed))
    assert whole.callback_metrics["quasi_newton/learning_rate"] == rest.callback_metrics["quasi_newton/learning_rate"]


def state_of_the_first_version(rule: str, length: int) -> dict[str, Any]:
    """What a checkpoint holds, after three steps of a model of so many parameters."""
    vector = torch.linspace(-1, 1, length, dtype=torch.float64)
    is_papers = rule == "inverse_sharpness"
    common = {"step": 2, "epoch": 0.5, "learning_rate": 0.025, "annealing": 1.0, "restored": 0, "converged": True}
    along = {"proposed": 0.0025, "step_length": 10.0, "slope_along_update": 0.14, "curvature_along_update": 3.9}
    papers = {"lambda_max": 2.9, "inverse_h0": 0.59, "exponent": 0.96, "curvature_along_gradient": 1.8, "refuted": True}
    edge = {"stability_ratio": 0.5, "batch_sharpness": 40.0, "batch_agreement": 0.3}
    found = {"along_update": along, "inverse_sharpness": papers, "batch_sharpness": edge}[rule]
    result = {**common, **dict.fromkeys([*along, *papers, *edge, "trials"]), **found}
    rules: dict[str, Any] = {
        "inverse_sharpness": {
            "iteration": {"beta": 2.0, "perturbation": vector / 100, "velocity": None},
            "average": 2.8,
        },
        "along_update": {"averages": [0.47, 0.34, 15.0, 13.9], "count": 3, "is_known": True},
        "batch_sharpness": {
            "gauge": {"sharpness": {"seen": [[1.0, 2.0]], "compared": []}, "count": 1, "is_settled": True},
            "others": None,
            **{"largest": {"vector": vector}, "ratio": [20.0, 18.0, False], "count": 1, "is_whole": False},
        },
    }
    losses = [8.75, 0.5, 0.25]
    return {
        "schedule": {"passed": 2, "measured": 2},
        "results": {"items": [result]},
        "data": {"value": None},
        "rule": rules[rule],
        "pace": {"lr": 0.025, "ceiling": math.inf, "is_stopped": False, "highest": 0.026},
        "safeguard": {
            "watch": {"first": losses, "losses": losses, "calm": losses, "counts": [0, 0, 3], "best": [math.inf, 0.0]},
            "restored": 1,
            "attempts": 2,
        },
        "rates": {"ratios": [1.0]},
        "annealing": {"factor": 1.0, "step": 2},
        # A vector of None came with numbers that nothing reads.
        "update": {"vector": None, "lr": 0.02, "size": 26} if is_papers else {"vector": vector, "lr": 0.02, "size": 26},
        "losses": {"steps": [0, 1, 2], "values": losses, "counts": [1, 1]},
    }


def in_lists(state: Any) -> Any:
    """A state with lists in place of tensors."""
    if isinstance(state, dict):
        return {name: in_lists(entry) for name, entry in state.items()}
    return state.tolist() if isinstance(state, Tensor) else state


@pytest.mark.parametrize("rule", RULES)
def test_states_of_the_first_version_are_read(rule: str) -> None:
    module = seeded()
    state, controller = state_of_the_first_version(rule, len(weights(module))), QuasiNewtonLRController(1, rule)
    controller.load_state_dict(copy.deepcopy(state))
    if rule == "inverse_sharpness":
        state["update"] = {"vector": None, "lr": 0.0, "size": 0}
    written = controller.state_dict()
    assert written.pop("version") == 1
    assert in_lists(written) == in_lists(state)
    _, logger = fit(controller, module)
    rates = list(logger.curve("quasi_newton/learning_rate").values())
    assert 0.025 / 1.25 < rates[0] < 0.025 * 1.08


@pytest.mark.parametrize(("rule", "estimator"), [("batch_sharpness", "lanczos"), ("inverse_sharpness", "online")])
def test_order_and_company_of_the_callbacks_do_not_matter(rule: str, estimator: str) -> None:
    def outcome(order: Sequence[int], with_readers: bool) -> tuple[Tensor, dict[int, float]]:
        acting: list[Callback] = [
            QuasiNewtonLRController(rule=rule),
            NudgedSGDHook(k=2, gamma=0.1, hessian=HALF),
            NegativeCurvatureTracker(3, 1, estimator=estimator, descent=Descent(), hessian=HALF),
            EarlyStopping("quasi_newton/learning_rate", patience=1000, check_on_train_epoch_end=True),
        ]
        callbacks = [acting[index] for index in order]
        if with_readers:
            callbacks.insert(1, CurvatureProbe(2, end="both"))
            callbacks.insert(3, SpectrumTracker(3, 3, 2, hessian=HALF))
        module = seeded(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5))
        _, logger = fit(callbacks, module, steps=18, gradient_clip_val=0.5)
        return weights(module), logger.curve("quasi_newton/learning_rate")

    first, curve = outcome((0, 1, 2, 3), with_readers=False)
    for order, with_readers in [((2, 1, 0, 3), False), ((3, 2, 0, 1), True), ((0, 1, 2, 3), True)]:
        other, other_curve = outcome(order, with_readers)
        assert torch.equal(first, other)
        assert curve == other_curve


class Finetuned(pl.LightningModule):
    """A network of which the head trains first, and the backbone once Lightning's callback unfreezes it."""

    def __init__(self, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.backbone, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.backbone(inputs).tanh())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])


@pytest.mark.parametrize("ratio", [0.1, 3.0])
@pytest.mark.parametrize("name", ["SGD", "momentum", "Adam"])
@pytest.mark.parametrize("rule", RULES)
def test_groups_that_are_added_in_mid_run_are_followed(rule: str, name: str, ratio: float) -> None:
    """An independent reference: PyTorch's own optimizer, to which the group is added at the same step."""
    rates: list[list[float]] = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    torch.manual_seed(2)
    module = Finetuned(OPTIMIZERS[name])
    reference = copy.deepcopy(module)
    controller = QuasiNewtonLRController(1, rule, force=True)
    finetuning = BackboneFinetuning(1, backbone_initial_ratio_lr=ratio, should_align=False)
    # Lightning's callback sets the rate of its group anew in every epoch: that is not overruled in silence.
    with pytest.warns(CurvatureWarning, match="at step 12 the learning rate was set to .* by other code"):
        trainer, logger = fit([controller, Rates(), finetuning], module, steps=18)
    assert trainer.global_step == 18
    lrs = logger.curve("quasi_newton/learning_rate")
    assert [len(lr) for lr in rates] == [1] * 6 + [2] * 12
    assert [max(lr) for lr in rates] == list(lrs.values())
    assert [backbone / head for head, backbone in rates[6:]] == pytest.approx([ratio] * 12, rel=1e-12)
    # The first batch after new parameters have come sees an update that they had no part in.
    assert [result.step for result in controller.results if not result.converged] == [6] * (rule == "along_update")
    optimizer = OPTIMIZERS[name](reference.head.parameters())
    for step, (inputs, targets, _) in zip(range(18), itertools.cycle(regression_loader()), strict=False):
        if step == 6:
            optimizer.add_param_group({"params": list(reference.backbone.parameters())})
        for group, lr in zip(optimizer.param_groups, rates[step], strict=True):
            group["lr"] = lr
        optimizer.zero_grad()
        nn.functional.mse_loss(reference(inputs), targets).backward()
        optimizer.step()
    torch.testing.assert_close(weights(module), weights(reference), rtol=1e-9, atol=1e-11)


def test_the_tracked_vector_grows_with_the_network() -> None:
    torch.manual_seed(2)
    module = Finetuned(OPTIMIZERS["SGD"])
    controller = QuasiNewtonLRController(
        rule="inverse_sharpness", bounds=LRBounds(max_lr=1e-9, min_lr=1e-10), safeguard=False
    )
    loader = regression_loader(batch_size=48)
    fit([controller, BackboneFinetuning(1, lambda epoch: 1.0)], module, loader, steps=60)  # which stays where it is
    batch = next(iter(loader))
    tops = []
    for is_whole in (False, True):
        module.backbone.requires_grad_(is_whole)
        tops.append(float(torch.linalg.eigvalsh(dense_hessian(module, batch)[1])[-1]))
    assert tops[1] > 1.01 * tops[0]
    assert controller.results[0].lambda_max == pytest.approx(tops[0], rel=0.05)
    assert controller.results[-1].lambda_max == pytest.approx(tops[1], rel=0.05)


def test_results_are_what_is_logged() -> None:
    for rule, num_tags in (
        ("batch_sharpness", [8, 6, 7]),
        ("along_update", [8, 6, 8]),
        ("inverse_sharpness", [10] * 3),
    ):
        controller = QuasiNewtonLRController(None, rule, schedule=Schedule(every_n_steps=5), log_prefix="mine")
        _, logger = fit(controller, seeded())
        assert all(type(result) is LearningRateResult for result in controller.results)
        assert [result.step for result in controller.results] == [0, 5, 10]
        assert [result.epoch for result in controller.results] == pytest.approx([0, 5 / 6, 10 / 6])
        assert [len(result.scalars()) for result in controller.results] == num_tags
        for result in controller.results:
            scalars = result.scalars()
            assert scalars == {tag: logger.curve(f"mine/{tag}")[result.step] for tag in scalars}
        own = {tag for tag in logger.tags if tag.startswith("mine/")}
        logged = {tag for result in controller.results for tag in result.scalars()}
        assert own == {f"mine/{tag}" for tag in [*logged, "quasi_newton_details/seconds"]}


def test_checkpoints_at_steps_have_the_controllers_parameters(tmp_path: Any) -> None:
    module = seeded()
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    seen: dict[int, Tensor] = {}

    class Witness(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen[trainer.global_step] = weights(pl_module).clone()

    fit([checkpoint, QuasiNewtonLRController(), Witness()], module, steps=6, enable_checkpointing=True)
    for step in range(1, 6):
        state = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(torch.cat([value.reshape(-1) for value in state.values()]), seen[step])


def test_the_hook_on_the_optimizer_goes_with_the_run() -> None:
    trainer, _ = fit(QuasiNewtonLRController())
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


class Stream(torch.utils.data.IterableDataset[Any]):
    """Data without a length: Lightning estimates the steps of an epoch at -1."""

    def __iter__(self) -> Any:
        return iter(regression_data())


def test_a_run_whose_end_nobody_knows_is_not_annealed() -> None:
    loader = torch.utils.data.DataLoader(Stream(), batch_size=8)
    _, logger = fit(QuasiNewtonLRController(), seeded(), loader, max_epochs=2, steps=-1)
    rows = [row for _, row in logger.history if "quasi_newton/learning_rate" in row]
    assert len(rows) > 5
    assert {row["quasi_newton_details/annealing"] for row in rows} == {1.0}
    assert min(row["quasi_newton/learning_rate"] for row in rows) > 0


def test_a_run_whose_end_nobody_knows_says_so_and_one_with_an_end_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(recording, "rank_zero_info", said.append)
    for steps, annealing, is_said in ((-1, None, True), (-1, 0, False), (4, None, False)):
        said.clear()
        loader = torch.utils.data.DataLoader(Stream(), batch_size=8)
        fit(QuasiNewtonLRController(annealing=annealing), seeded(), loader, max_epochs=1, steps=steps)
        assert any("length of the training is not known" in text for text in said) == is_said


def test_a_longer_resumed_run_does_not_jump(tmp_path: Any) -> None:
    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def run(steps: int, ckpt_path: Any = None) -> pl.Trainer:
        callbacks = [QuasiNewtonLRController(5), Rates()]
        options = {"weights_only": True} if ckpt_path else {}
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="cpu",
            logger=MemoryLogger(),
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(seeded(), regression_loader(), ckpt_path=ckpt_path, **options)
        return trainer

    run(30).save_checkpoint(tmp_path / "end.ckpt")
    assert rates[-1] < 0.2 * max(rates)
    run(300, str(tmp_path / "end.ckpt"))
    assert len(rates) == 300
    grown = [after / before for before, after in itertools.pairwise(rates[29:60])]
    assert 1.05 < max(grown) < 1.1 * 1.08


class WarmsUp(SmallRegressor):
    """Sets the learning rate itself, from some step on."""

    def __init__(self, since: int) -> None:
        super().__init__(optimizer=OPTIMIZERS["momentum"])
        self.since = since

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        if self.trainer.global_step >= self.since:
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 100)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)


@pytest.mark.parametrize("rule", RULES)
def test_a_warm_up_of_the_users_is_refused_at_the_first_step(rule: str) -> None:
    module = WarmsUp(0)
    before = weights(module).clone()
    with pytest.raises(MisconfigurationException, match=r"set to 0\.001 by other code, such as a warm-up"):
        fit(QuasiNewtonLRController(rule=rule), module)
    assert torch.equal(weights(module), before)


def test_a_schedule_of_the_users_that_begins_later_is_told_once() -> None:
    with pytest.warns(CurvatureWarning, match=r"at step 6 the learning rate was set to 0\.007 by other code") as warned:
        trainer, _ = fit(QuasiNewtonLRController(), WarmsUp(6))
    assert len([warning for warning in warned if issubclass(warning.category, CurvatureWarning)]) == 1
    assert trainer.global_step == 12


def test_a_step_that_returns_none_is_passed_over() -> None:
    class Skips(SmallRegressor):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    module = Skips()
    with pytest.warns(CurvatureWarning, match="returned None"):
        _, logger = fit(QuasiNewtonLRController(), module)
    assert torch.isfinite(weights(module)).all()
    assert logger.curve("quasi_newton/learning_rate")


# The command line.


def test_configuration_in_yaml_is_understood(tmp_path: Any) -> None:
    from lightning.pytorch.cli import LightningCLI

    (tmp_path / "config.yaml").write_text("""
trainer:
  callbacks:
    - class_path: lyapunov_lightning.QuasiNewtonLRController
      init_args: {every_n_steps: 3, rule: inverse_sharpness, bounds: {max_lr: 0.5, window: 20}, hessian: {mode: eval}}
    - class_path: lyapunov_lightning.QuasiNewtonLRController
""")
    arguments = ["--config", str(tmp_path / "config.yaml"), f"--trainer.default_root_dir={tmp_path}"]
    cli = LightningCLI(SmallRegressor, args=arguments, run=False, save_config_callback=None)
    first, second = (found for found in cli.trainer.callbacks if isinstance(found, QuasiNewtonLRController))
    assert first.schedule == Schedule(every_n_steps=3)
    assert first.config == HessianConfig("batch", mode="eval", method="finite_difference")
    assert first._steering.pace.bounds == LRBounds(max_lr=0.5, window=20)
    assert first._rule_name == "inverse_sharpness"
    assert second.schedule == Schedule(every_n_steps=10, first_n_steps=20)
    assert second.config == HessianConfig("batch", mode="train")
    assert second._steering.pace.bounds == LRBounds()


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "newton"}, "`rule` should be one of batch_sharpness, along_update, inverse_sharpness, got 'newton'."),
        ({"every_n_steps": 0}, "`every_n_steps` should be a positive int, got 0."),
        ({"bounds": 1.0}, "`bounds` should be a LRBounds, or a mapping of its fields, got 1.0."),
        ({"annealing": 1.1}, "`annealing` should be in [0, 1], got 1.1."),
        ({"annealing": math.nan}, "`annealing` should be in [0, 1], got nan."),
    ],
    ids=str,
)
def test_bad_argument_is_named_with_its_value(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        QuasiNewtonLRController(**arguments)


class Scheduled(SmallRegressor):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class NoOptimizer(SmallRegressor):
    def configure_optimizers(self) -> None:
        return None


class Manual(SmallRegressor):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def curvature_loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Scheduled, "sets the learning rate, and so does StepLR"),
        (lambda: SmallRegressor(torch.optim.LBFGS), "cannot steer LBFGS"),
        (Manual, "manual optimization"),
        (NoOptimizer, "returned none"),
        (lambda: SmallRegressor().bfloat16(), "lost in the rounding of torch.bfloat16"),
        (lambda: SmallRegressor(lambda p: torch.optim.SGD(p, lr=0.0)), "positive learning rate"),
        (lambda: SmallRegressor(torch.optim.Rprop), "cannot steer Rprop.*not in proportion to its learning rate"),
    ],
)
def test_what_cannot_be_steered_is_refused(make: Callable[[], pl.LightningModule], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"QuasiNewtonLRController.*{message}"):
        fit(QuasiNewtonLRController(), make())


def test_stochastic_weight_averaging_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="so does StochasticWeightAveraging"):
        fit([QuasiNewtonLRController(), StochasticWeightAveraging(0.1, swa_epoch_start=1)], seeded(), steps=-1)


def test_the_papers_rule_is_for_sgd_unless_one_insists() -> None:
    adam = seeded(optimizer=OPTIMIZERS["Adam"])
    with pytest.raises(MisconfigurationException, match=r"rule for SGD.*Adam. Use `rule='along_update'`"):
        fit(QuasiNewtonLRController(rule="inverse_sharpness"), adam)
    _, logger = fit(QuasiNewtonLRController(rule="inverse_sharpness", force=True), adam)
    assert logger.curve("quasi_newton/learning_rate")


def test_two_controllers_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="one `QuasiNewtonLRController`, got 2"):
        fit([QuasiNewtonLRController(), QuasiNewtonLRController(rule="inverse_sharpness")])
