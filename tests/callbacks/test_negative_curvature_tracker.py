"""NegativeCurvatureTracker measures what a dense Hessian has, leaves the run alone, and moves only as it says."""

import functools
import math
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lyapunov_lightning import CurvatureProbe, NegativeCurvatureTracker, Schedule, SpectrumTracker
from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.errors import CurvatureWarning
from tests.callbacks.identity import Outcome, assert_identical, train
from tests.modules import MemoryLogger, SmallRegressor, dense_hessian, regression_data, regression_loader

EVERY_STEP = Schedule(every_n_steps=1)


def flat_parameters(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


class Dense(Callback):
    """The parameters, the dense Hessian and the gradient of the whole training set before every step.

    Beside it the parameters after each step as the optimizer leaves them, if it goes before the tracker.
    """

    def __init__(self) -> None:
        self.before: dict[int, Tensor] = {}
        self.after: dict[int, Tensor] = {}
        self.hessians: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step, data = trainer.global_step, regression_data()
        if step in self.hessians:
            return
        self.before[step] = flat_parameters(pl_module)
        self.hessians[step] = dense_hessian(pl_module, data.tensors)[1]
        loss = nn.functional.mse_loss(pl_module(data.tensors[0]), data.tensors[1])
        self.gradients[step] = nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(pl_module.parameters())))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after[trainer.global_step - 1] = flat_parameters(pl_module)


def fit(
    tmp_path: Path, *callbacks: Callback, module: Any = SmallRegressor, loader: Any = None, **options: Any
) -> pl.Trainer:
    """Train what `module` makes, from a fixed seed, for 12 steps."""
    pl.seed_everything(0, verbose=False)
    settings = {"max_epochs": 4, "logger": MemoryLogger(), "enable_checkpointing": False, **options}
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **settings,
    )
    trainer.fit(module(), regression_loader(batch_size=16) if loader is None else loader, ckpt_path=ckpt_path)
    return trainer


def tracker(**options: Any) -> NegativeCurvatureTracker:
    """On the whole training set, of which a reference is easily computed, at every step."""
    return NegativeCurvatureTracker(**{"schedule": EVERY_STEP, "fraction": 1.0, "tol": 1e-7, **options})


# What is measured.


def test_smallest_eigenpairs_are_those_of_the_dense_hessian_at_every_step(tmp_path: Path) -> None:
    dense = Dense()
    logger = fit(tmp_path, dense, tracker()).logger
    assert len(dense.hessians) == 12
    for step, hessian in dense.hessians.items():
        values, vectors = torch.linalg.eigh(hessian)
        found = {tag: logger.curve(f"negative/{tag}")[step] for tag in ("lambda_max", "lambda_ratio", "negative_mass")}
        for rank in range(3):
            value = logger.curve(f"negative/lambda_min_{rank + 1}")[step]
            assert value == pytest.approx(float(values[rank]), rel=1e-6)
            component = logger.curve(f"negative/gradient_component_{rank + 1}")[step]
            assert component == pytest.approx(abs(float(vectors[:, rank] @ dense.gradients[step])), rel=1e-3, abs=1e-6)
        assert found["lambda_max"] == pytest.approx(float(values[-1]), rel=1e-6)
        assert found["lambda_ratio"] == pytest.approx(float(-values[0] / values[-1]), rel=1e-6)
        tracked = torch.cat([values[:3], values[-1:]])
        share = float((-tracked).clamp_min(0).sum() / tracked.abs().sum())
        assert found["negative_mass"] == pytest.approx(share, rel=1e-6)
        assert 0 < share < 1
        norm = float(dense.gradients[step].norm())
        assert logger.curve("negative/gradient_norm")[step] == pytest.approx(norm, rel=1e-9)
        assert logger.curve("negative/converged")[step] == 1


def test_pairs_that_did_not_converge_are_logged_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lyapunov_lightning.training import sharing

    plain = sharing.lanczos
    monkeypatch.setattr(sharing, "lanczos", lambda *args, **kwargs: plain(*args, max_matvecs=6, **kwargs))
    logger = fit(tmp_path, tracker()).logger
    assert set(logger.curve("negative/matvecs").values()) == {6}
    assert max(logger.curve("negative/converged").values()) < 1
    assert min(logger.curve("negative/residual").values()) > 1e-3


@pytest.mark.parametrize("schedule", [EVERY_STEP, Schedule(every_n_steps=4), Schedule(every_n_epochs=1)])
def test_frozen_directions_are_followed_from_their_step_on(tmp_path: Path, schedule: Schedule) -> None:
    dense = Dense()
    logger = fit(tmp_path, dense, tracker(schedule=schedule, freeze_at=[7, 2], tol=1e-9)).logger
    measured = set(logger.curve("negative/lambda_max"))
    assert {2, 7} <= measured
    for frozen_at in (2, 7):
        vectors = torch.linalg.eigh(dense.hessians[frozen_at]).eigenvectors
        for end, vector in (("top", vectors[:, -1]), ("bottom", vectors[:, 0])):
            curve = logger.curve(f"negative/frozen_{frozen_at}_{end}")
            assert set(curve) == {step for step in measured if step >= frozen_at}
            for step, value in curve.items():
                assert value == pytest.approx(float(vector @ dense.hessians[step] @ vector), rel=1e-5, abs=1e-8)
    values = torch.linalg.eigvalsh(dense.hessians[2])
    assert logger.curve("negative/frozen_2_bottom")[2] == pytest.approx(float(values[0]), rel=1e-6)


def test_frozen_directions_with_gradient_accumulation_are_those_of_optimizer_steps(tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2, "max_epochs": 6}
    logger = fit(tmp_path, tracker(schedule=Schedule(every_n_steps=3), freeze_at=[5]), **options).logger
    assert list(logger.curve("negative/frozen_5_top")) == [5, 6, 9]
    assert list(logger.curve("negative/lambda_max")) == [0, 3, 5, 6, 9]


def test_nothing_is_frozen_by_default_or_by_an_empty_list(tmp_path: Path) -> None:
    for options in ({}, {"freeze_at": []}):
        assert not any("frozen" in tag for tag in fit(tmp_path, tracker(**options), max_epochs=1).logger.tags)


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        yield from regression_data()


def test_a_step_before_the_fixed_data_are_complete_freezes_nothing_and_says_so(tmp_path: Path) -> None:
    fixed = {"num_batches": 3, "fraction": 0.05}
    with pytest.warns(CurvatureWarning, match="no directions are frozen at step 1, since the fixed data"):
        logger = fit(tmp_path, tracker(freeze_at=[1, 4], **fixed), loader=DataLoader(Endless(), 16)).logger
    assert list(logger.curve("negative/frozen_4_top")) == list(range(4, 12))
    assert "negative/frozen_1_top" not in logger.tags


# The running estimate.


def test_running_estimate_is_a_rayleigh_quotient_with_its_residual_for_one_product_a_step(tmp_path: Path) -> None:
    dense = Dense()
    own = tracker(estimator="online", smallest=0, schedule=None)
    trainer = fit(tmp_path, dense, own, max_epochs=12)
    logger = trainer.logger
    assert set(logger.curve("negative/matvecs").values()) == {1}
    assert "negative/lambda_min_1" not in logger.tags
    ages = logger.curve("negative/online_age")
    assert list(ages.values()) == [0, 1, 2, 3] * 9
    for step, age in ages.items():
        hessian = dense.hessians[step - int(age)]
        value = logger.curve("negative/online_lambda_min")[step]
        residual = logger.curve("negative/online_residual")[step]
        assert float((torch.linalg.eigvalsh(hessian) - value).abs().min()) <= residual


class Still(SmallRegressor):
    """Stays where it is."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_running_estimate_is_the_eigenvalue_after_300_steps_where_nothing_moves(tmp_path: Path) -> None:
    own = tracker(estimator="online", schedule=Schedule(every_n_steps=300), smallest=1)
    trainer = fit(tmp_path, own, module=Still, loader=regression_loader(batch_size=48), max_epochs=-1, max_steps=301)
    logger = trainer.logger
    expected = float(torch.linalg.eigvalsh(dense_hessian(trainer.lightning_module, regression_data().tensors)[1])[0])
    assert logger.curve("negative/online_lambda_min")[300] == pytest.approx(expected, rel=1e-6)
    errors = logger.curve("negative/online_error")
    assert set(errors) == {0, 300}
    assert errors[0] > 0.05 > errors[300]
    for step, error in errors.items():
        running, exact = (logger.curve(f"negative/{t}")[step] for t in ("online_lambda_min", "lambda_min_1"))
        assert error == pytest.approx(abs(running / exact - 1), rel=1e-9, abs=1e-12)


def test_running_estimate_has_a_schedule_of_its_own(tmp_path: Path) -> None:
    own = tracker(estimator="online", online_schedule=Schedule(every_n_steps=5), schedule=Schedule(every_n_steps=3))
    logger = fit(tmp_path, own).logger
    assert list(logger.curve("negative/online_lambda_min")) == [0, 5, 10]
    assert list(logger.curve("negative/lambda_min_1")) == [0, 3, 6, 9]
    assert list(logger.curve("negative/online_error")) == [0]


# What is left alone.


@functools.cache
def run_without(**options: Any) -> Outcome:
    return train(steps=20, **options)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({}, {}),
        ({"freeze_at": [0, 9, 20]}, {}),
        ({"data": "batch", "smallest": 1}, {}),
        ({"num_batches": 2}, {}),
        ({"mode": "eval", "fraction": 0.2}, {}),
        ({"method": "forward_over_reverse", "smallest": 1, "tol": 0.9}, {}),
        ({"method": "finite_difference", "smallest": 1, "tol": 0.9}, {}),
        ({"loss_fn": lambda module, batch: module.loss(batch), "log_prefix": "mine"}, {}),
        ({"estimator": "online"}, {}),
        ({"estimator": "online", "freeze_at": [3], "online_schedule": Schedule(every_n_steps=3)}, {}),
        ({"estimator": "online", "data": "batch"}, {}),
        ({"estimator": "online", "smallest": 0, "schedule": None}, {}),
        ({"freeze_at": [3]}, {"precision": "bf16-mixed"}),
        ({"estimator": "online"}, {"precision": "bf16-mixed", "accumulate": 4}),
        ({"freeze_at": [5], "estimator": "online"}, {"accumulate": 4}),
        ({"tol": 1e-6, "seed": 3, "schedule": Schedule(max_overhead=0.9)}, {}),
    ],
    ids=lambda value: ",".join(f"{name}" for name in value),
)
def test_reading_leaves_the_run_bit_identical(
    tmp_path: Path, arguments: dict[str, Any], options: dict[str, Any]
) -> None:
    schedule = {"schedule": Schedule(every_n_steps=9), "tol": 0.3}
    own = NegativeCurvatureTracker(**{**schedule, "save_dir": str(tmp_path), **arguments})
    with_tracker = train(own, steps=20, **options)
    assert_identical(run_without(**options), with_tracker)
    tag = "online_lambda_min" if "estimator" in arguments else "lambda_min_1"
    prefix = "mine/" if "log_prefix" in arguments else ""
    assert len(with_tracker.curve(f"{prefix}negative/{tag}")) >= 2
    assert len((tmp_path / "negative.csv").read_text().splitlines()) > 4


def test_descent_that_finds_nothing_negative_leaves_the_parameters_bit_identical(tmp_path: Path) -> None:
    convex = functools.partial(SmallRegressor, linear=True)

    def final(*callbacks: Callback) -> Tensor:
        return flat_parameters(fit(tmp_path, *callbacks, module=convex).lightning_module)

    for estimator in ("lanczos", "online"):
        assert torch.equal(final(), final(tracker(descend=True, estimator=estimator, smallest=1)))


# What is shared.


def test_other_callbacks_share_the_computation_of_the_largest_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"operators": 0, "products": 0}
    plain_init, plain_matvec = HessianOperator.__init__, HessianOperator.matvec

    def counted_init(self: HessianOperator, *args: Any, **kwargs: Any) -> None:
        counts["operators"] += 1
        plain_init(self, *args, **kwargs)

    def counted_matvec(self: HessianOperator, vector: Tensor) -> Tensor:
        counts["products"] += 1
        return plain_matvec(self, vector)

    monkeypatch.setattr(HessianOperator, "__init__", counted_init)
    monkeypatch.setattr(HessianOperator, "matvec", counted_matvec)
    spectrum = {"schedule": EVERY_STEP, "fraction": 1.0, "tol": 1e-7}
    fit(tmp_path, SpectrumTracker(6, 3, **spectrum))
    expected = dict(counts)
    for first_is_own in (True, False):
        counts.update(operators=0, products=0)
        both = [tracker(), SpectrumTracker(6, 3, **spectrum), CurvatureProbe(1, data="fixed", fraction=1.0)]
        logger = fit(tmp_path, *(both if first_is_own else both[::-1])).logger
        assert counts == expected
        for rank in (1, 2, 3):
            assert logger.curve(f"negative/lambda_min_{rank}") == logger.curve(f"spectrum/lambda_min_{rank}")
        assert logger.curve("negative/lambda_max") == logger.curve("curvature/lambda_max")


# The descent.


@pytest.mark.parametrize(("lr", "longest"), [(0.3, 1e6), (50.0, 0.02)], ids=["rate", "longest"])
def test_the_move_is_the_documented_one(tmp_path: Path, lr: float, longest: float) -> None:
    dense = Dense()
    own = tracker(descend=True, descend_lr=lr, descend_max_step=longest, tol=1e-9)
    trainer = fit(tmp_path, dense, own)
    moved = 0
    for step in range(11):
        values, vectors = torch.linalg.eigh(dense.hessians[step])
        component = float(vectors[:, 0] @ dense.gradients[step])
        length = min(lr * abs(component), longest) if values[0] < 0 else 0.0
        expected = dense.after[step] - math.copysign(length, component) * vectors[:, 0]
        torch.testing.assert_close(dense.before[step + 1], expected, rtol=1e-6, atol=1e-8)
        logged = trainer.logger.curve("negative/descent_step")[step]
        assert abs(logged) == pytest.approx(length, rel=1e-5, abs=1e-9)
        assert trainer.logger.curve("negative/descended")[step] == float(length > 0)
        moved += length > 0
    assert moved >= 5


def test_the_move_lowers_the_loss_to_both_orders(tmp_path: Path) -> None:
    dense = Dense()
    fit(tmp_path, dense, tracker(descend=True, descend_lr=1.0))
    for step in range(11):
        move = dense.before[step + 1] - dense.after[step]
        assert float(move @ dense.gradients[step]) < 0
        assert float(move @ dense.hessians[step] @ move) < 0


def test_there_is_no_move_while_the_residual_exceeds_the_curvature(tmp_path: Path) -> None:
    dense = Dense()
    own = tracker(descend=True, estimator="online", smallest=0, schedule=None)
    logger = fit(tmp_path, dense, own, max_epochs=8).logger
    value, residual, moved = (
        logger.curve(f"negative/{tag}") for tag in ("online_lambda_min", "online_residual", "descended")
    )
    assert {step for step, moves in moved.items() if moves} == {s for s in value if value[s] < -residual[s]}
    assert 0 < sum(moved.values()) < len(moved)
    for step in range(23):
        assert torch.equal(dense.after[step], dense.before[step + 1]) == (not moved[step])


def test_moves_follow_the_schedule_and_wait_for_the_optimizer_step(tmp_path: Path) -> None:
    class Moves(Callback):
        """Which batches ended with other parameters than the optimizer had left."""

        def __init__(self) -> None:
            self.batches: list[tuple[int, int]] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            now = flat_parameters(pl_module)
            if hasattr(self, "left") and not torch.equal(now, self.left):
                self.batches.append((trainer.global_step, batch_idx))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.left = flat_parameters(pl_module)

    moves = Moves()
    own = tracker(descend=True, schedule=Schedule(every_n_steps=2))
    fit(tmp_path, moves, own, accumulate_grad_batches=3, max_epochs=8, gradient_clip_val=0.1)
    assert moves.batches == [(1, 0), (3, 0), (5, 0), (7, 0)]


@pytest.mark.parametrize("estimator", ["lanczos", "online"])
@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_a_run_with_descent_is_deterministic_and_resumes_bit_identically(
    tmp_path: Path, precision: str, estimator: str
) -> None:
    options = {"precision": precision, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}

    def own() -> NegativeCurvatureTracker:
        return tracker(
            descend=True,
            estimator=estimator,
            freeze_at=[3],
            schedule=Schedule(every_n_steps=2),
            save_dir=str(tmp_path / "out"),
        )

    def module() -> SmallRegressor:
        dtype = torch.float64 if precision == "64-true" else torch.float32
        return SmallRegressor(lambda parameters: torch.optim.Adam(parameters, lr=0.02)).to(dtype)

    def loader() -> DataLoader:
        data = regression_data()
        if precision != "64-true":
            data.tensors = tuple(t.float() if t.is_floating_point() else t for t in data.tensors)
        return DataLoader(data, 16)

    def run(**more: Any) -> pl.Trainer:
        return fit(tmp_path, own(), module=module, loader=loader(), **options, **more)

    straight, again = run(max_epochs=6), run(max_epochs=6)
    assert torch.equal(*(flat_parameters(trainer.lightning_module) for trainer in (straight, again)))
    half = run(max_epochs=3)
    half.save_checkpoint(tmp_path / "half.ckpt")
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]
    rest = run(max_epochs=6, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(*(flat_parameters(trainer.lightning_module) for trainer in (straight, rest)))
    assert sum(straight.logger.curve("negative/descended").values()) > 3
    for tag in straight.logger.tags:
        if tag.startswith("negative/") and tag != "negative/seconds":
            later = {step: value for step, value in straight.logger.curve(tag).items() if step >= 6}
            assert rest.logger.curve(tag) == later
    without = fit(tmp_path, module=module, loader=loader(), max_epochs=6, **options)
    assert not torch.equal(*(flat_parameters(trainer.lightning_module) for trainer in (straight, without)))


def test_a_checkpoint_of_a_step_holds_the_move_after_it(tmp_path: Path) -> None:
    class Final(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 8:
                self.parameters = flat_parameters(pl_module)

    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=8, save_top_k=-1)
    final = Final()
    fit(tmp_path, tracker(descend=True), final, saving, enable_checkpointing=True)
    (path,) = (tmp_path / "saved").iterdir()
    state = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(torch.cat([value.reshape(-1) for value in state.values()]), final.parameters)


class SkipsBatches(SmallRegressor):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


def test_steps_without_a_gradient_are_no_trouble(tmp_path: Path) -> None:
    dense = Dense()
    own = tracker(descend=True, loss_fn=lambda module, batch: nn.functional.mse_loss(module(batch[0]), batch[1]))
    trainer = fit(tmp_path, dense, own, module=SkipsBatches, max_epochs=6)
    assert trainer.global_step == 18  # also where there was no gradient, as Lightning counts
    moved = trainer.logger.curve("negative/descended")
    assert list(moved) == list(range(18))
    assert sum(moved.values()) > 6
    for step in range(17):
        assert torch.equal(dense.after[step], dense.before[step + 1]) == (not moved[step])


@pytest.mark.parametrize("estimator", ["lanczos", "online"])
def test_failing_measurements_are_warned_of_once_and_move_nothing(tmp_path: Path, estimator: str) -> None:
    def broken(module: Any, batch: Any) -> Tensor:
        return nn.functional.mse_loss(module(batch[0]), batch[1]) * math.nan

    with pytest.warns(CurvatureWarning, match="not finite") as warned:
        trainer = fit(tmp_path, tracker(descend=True, estimator=estimator, loss_fn=broken))
    assert len([w for w in warned if issubclass(w.category, CurvatureWarning)]) == 1
    assert trainer.logger.curve("negative/converged") == dict.fromkeys(range(12), 0.0)
    assert torch.equal(*(flat_parameters(t.lightning_module) for t in (trainer, fit(tmp_path))))


def test_a_failed_measurement_is_followed_by_good_ones(tmp_path: Path) -> None:
    def now_and_then(module: Any, batch: Any) -> Tensor:
        if module.global_step in (3, 4):
            raise RuntimeError("broken on purpose")
        return nn.functional.mse_loss(module(batch[0]), batch[1])

    with pytest.warns(CurvatureWarning, match="broken on purpose"):
        logger = fit(tmp_path, tracker(estimator="online", descend=True, loss_fn=now_and_then)).logger
    assert list(logger.curve("negative/online_lambda_min")) == [0, 1, 2, *range(5, 12)]


# Resuming, figures, and what is refused.


def test_frozen_directions_and_the_running_estimate_go_on_in_a_resumed_run(tmp_path: Path) -> None:
    def own() -> NegativeCurvatureTracker:
        return tracker(freeze_at=[4, 15], estimator="online", smallest=2)

    straight = fit(tmp_path, own(), max_epochs=8).logger
    half = fit(tmp_path, own(), max_epochs=4)
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = fit(tmp_path, own(), max_epochs=8, ckpt_path=tmp_path / "half.ckpt").logger
    for tag in ("frozen_4_top", "frozen_4_bottom", "frozen_15_bottom", "online_lambda_min", "online_error"):
        later = {step: value for step, value in straight.curve(f"negative/{tag}").items() if step >= 12}
        assert len(later) >= 9
        assert rest.curve(f"negative/{tag}") == later


def test_tensorboard_gets_the_figure_once_an_epoch(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, tracker(freeze_at=[2, 8]), logger=logger, max_epochs=3)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    assert events.Tags()["images"] == ["negative/frozen"]
    assert len(events.Images("negative/frozen")) == 3
    assert "custom_scalars__config__" in events.Tags()["tensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smallest": 0}, "`smallest` should be a positive int, got 0."),
        ({"smallest": -1, "estimator": "online"}, "`smallest` should be a non-negative int, got -1."),
        ({"smallest": 1.5}, "`smallest` should be a positive int, got 1.5."),
        ({"smallest": True}, "`smallest` should be a positive int, got True."),
        ({"freeze_at": [3, -1]}, r"`freeze_at` should hold non-negative ints, got [3, -1]."),
        ({"freeze_at": [1.0]}, r"`freeze_at` should hold non-negative ints, got [1.0]."),
        ({"freeze_at": [True]}, r"`freeze_at` should hold non-negative ints, got [True]."),
        ({"freeze_at": ["3"]}, r"`freeze_at` should hold non-negative ints, got ['3']."),
        ({"freeze_at": [5, 2, 5]}, r"`freeze_at` should hold each step once, got [5, 2, 5]."),
        ({"freeze_at": 5}, "`freeze_at` should be a list of steps, got 5."),
        (
            {"freeze_at": [5], "smallest": 0, "estimator": "online"},
            "`smallest` should be a positive int where `freeze_at` is given, got 0.",
        ),
        (
            {"smallest": 0, "estimator": "online", "schedule": EVERY_STEP},
            "`schedule` is of no use with `smallest=0`. Use `online_schedule`.",
        ),
        (
            {"online_schedule": EVERY_STEP},
            "`online_schedule` is of no use with `estimator='lanczos'`. Use 'online'.",
        ),
        ({"estimator": "oja"}, "`estimator` should be one of lanczos, online, got 'oja'."),
        ({"descend_lr": 0}, "`descend_lr` should be a positive float, got 0."),
        ({"descend_lr": math.nan}, "`descend_lr` should be a positive float, got nan."),
        ({"descend_max_step": -1.0}, "`descend_max_step` should be a positive float, got -1.0."),
        ({"tol": 0}, "`tol` should be a positive float, got 0."),
        ({"method": "exact"}, "`method` should be one of auto, double_backward, forward_over_reverse,"),
        ({"data": "all"}, "`data` should be 'batch' or 'fixed', got 'all'."),
        ({"mode": "test"}, "`mode` should be 'train' or 'eval', got 'test'."),
        ({"fraction": 0}, "`fraction` should be in (0, 1], got 0."),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named_with_their_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        NegativeCurvatureTracker(**options)


@pytest.mark.parametrize("estimator", ["lanczos", "online"])
def test_more_eigenvalues_than_parameters_are_refused_before_training(tmp_path: Path, estimator: str) -> None:
    with pytest.raises(MisconfigurationException, match="`NegativeCurvatureTracker` cannot find 27 eigenvalues"):
        fit(tmp_path, NegativeCurvatureTracker(smallest=26, estimator=estimator))
    assert fit(tmp_path, tracker(smallest=25)).logger.curve("negative/converged")[11] == 1


def test_descent_beside_lbfgs_is_refused(tmp_path: Path) -> None:
    def module() -> SmallRegressor:
        return SmallRegressor(lambda parameters: torch.optim.LBFGS(parameters, lr=0.1))

    with pytest.raises(MisconfigurationException, match=r"`NegativeCurvatureTracker`.*LBFGS.*Use another optimizer"):
        fit(tmp_path, NegativeCurvatureTracker(descend=True), module=module)
    fit(tmp_path, NegativeCurvatureTracker(), module=module, max_epochs=1)
