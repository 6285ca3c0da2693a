"""The descent of NegativeCurvatureTracker moves the parameters only as it says, and goes on in a resumed run."""

import functools
import math
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lyapunov_lightning import HessianConfig, NegativeCurvatureTracker, Schedule
from lyapunov_lightning.callbacks.negative_curvature_tracker import Descent
from lyapunov_lightning.curvature.errors import CurvatureWarning
from tests.callbacks.negative_runs import Dense, fit, flat_parameters, tracker
from tests.modules import SmallRegressor, regression_data


@pytest.mark.parametrize(("lr", "longest"), [(0.3, 1e6), (50.0, 0.02)], ids=["rate", "longest"])
def test_the_move_is_the_documented_one(tmp_path: Path, lr: float, longest: float) -> None:
    dense = Dense()
    own = tracker(descent=Descent(lr, longest), tol=1e-9)
    trainer = fit(tmp_path, dense, own)
    moved = 0
    for step in range(11):
        values, vectors = torch.linalg.eigh(dense.hessians[step])
        component = float(vectors[:, 0] @ dense.gradients[step])
        length = min(lr * abs(component), longest) if values[0] < 0 else 0.0
        expected = dense.after[step] - math.copysign(length, component) * vectors[:, 0]
        torch.testing.assert_close(dense.before[step + 1], expected, rtol=1e-6, atol=1e-8)
        logged = trainer.logger.curve("negative_details/descent_step")[step]
        assert abs(logged) == pytest.approx(length, rel=1e-5, abs=1e-9)
        assert trainer.logger.curve("negative_details/descended")[step] == float(length > 0)
        moved += length > 0
    assert moved >= 5
    assert [result.descent_step for result in own.results] == list(
        trainer.logger.curve("negative_details/descent_step").values()
    )


def test_the_move_lowers_the_loss_to_both_orders(tmp_path: Path) -> None:
    dense = Dense()
    fit(tmp_path, dense, tracker(descent=Descent(lr=1.0)))
    for step in range(11):
        move = dense.before[step + 1] - dense.after[step]
        assert float(move @ dense.gradients[step]) < 0
        assert float(move @ dense.hessians[step] @ move) < 0


def test_there_is_no_move_while_the_residual_exceeds_the_curvature(tmp_path: Path) -> None:
    dense = Dense()
    own = tracker(descent=Descent(), estimator="online", smallest=0, schedule=None)
    logger = fit(tmp_path, dense, own, max_epochs=8).logger
    value = logger.curve("negative/online_lambda_min")
    residual, moved = (logger.curve(f"negative_details/{tag}") for tag in ("online_residual", "descended"))
    assert {step for step, moves in moved.items() if moves} == {s for s in value if value[s] < -residual[s]}
    assert 0 < sum(moved.values()) < len(moved)
    for step in range(23):
        assert torch.equal(dense.after[step], dense.before[step + 1]) == (not moved[step])


def test_moves_of_the_running_estimate_follow_its_own_schedule(tmp_path: Path) -> None:
    own = tracker(
        descent=Descent(), estimator="online", smallest=1, online_schedule=Schedule(every_n_steps=3, first_n_steps=1)
    )
    logger = fit(tmp_path, own).logger
    assert list(logger.curve("negative_details/descended")) == [0, 3, 6, 9]
    assert list(logger.curve("negative/lambda_min_1")) == list(range(12))


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
    own = tracker(descent=Descent(), schedule=Schedule(every_n_steps=2))
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
            descent=Descent(),
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
    assert sum(straight.logger.curve("negative_details/descended").values()) > 3
    tags = {tag for tag in straight.logger.tags if tag.startswith("negative")} - {"negative_details/seconds"}
    assert {"negative/frozen_3_top", "negative/lambda_min_1", "negative_details/descent_step"} <= tags
    for tag in tags:
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
    fit(tmp_path, tracker(descent=Descent()), final, saving, enable_checkpointing=True)
    (path,) = (tmp_path / "saved").iterdir()
    state = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(torch.cat([value.reshape(-1) for value in state.values()]), final.parameters)


class SkipsBatches(SmallRegressor):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


def plain_loss(module: Any, batch: Any) -> Tensor:
    return nn.functional.mse_loss(module(batch[0]), batch[1])


def test_steps_without_a_gradient_are_no_trouble(tmp_path: Path) -> None:
    dense = Dense()
    own = tracker(HessianConfig(fraction=1.0, loss_fn=plain_loss), descent=Descent())
    trainer = fit(tmp_path, dense, own, module=SkipsBatches, max_epochs=6)
    assert trainer.global_step == 18  # also where there was no gradient, as Lightning counts
    moved = trainer.logger.curve("negative_details/descended")
    assert list(moved) == list(range(18))
    assert sum(moved.values()) > 6
    for step in range(17):
        assert torch.equal(dense.after[step], dense.before[step + 1]) == (not moved[step])


@pytest.mark.parametrize("estimator", ["lanczos", "online"])
def test_failing_measurements_are_warned_of_once_and_move_nothing(tmp_path: Path, estimator: str) -> None:
    def broken(module: Any, batch: Any) -> Tensor:
        return plain_loss(module, batch) * math.nan

    own = tracker(HessianConfig(fraction=1.0, loss_fn=broken), descent=Descent(), estimator=estimator)
    with pytest.warns(CurvatureWarning, match="not finite") as warned:
        trainer = fit(tmp_path, own)
    assert len([w for w in warned if issubclass(w.category, CurvatureWarning)]) == 1
    assert trainer.logger.curve("negative_details/converged") == dict.fromkeys(range(12), 0.0)
    assert own.results == []
    assert torch.equal(*(flat_parameters(t.lightning_module) for t in (trainer, fit(tmp_path))))


def test_a_failed_measurement_is_followed_by_good_ones(tmp_path: Path) -> None:
    def now_and_then(module: Any, batch: Any) -> Tensor:
        if module.global_step in (3, 4):
            raise RuntimeError("broken on purpose")
        return plain_loss(module, batch)

    own = tracker(HessianConfig(fraction=1.0, loss_fn=now_and_then), estimator="online", descent=Descent())
    with pytest.warns(CurvatureWarning, match="broken on purpose"):
        logger = fit(tmp_path, own).logger
    assert list(logger.curve("negative/online_lambda_min")) == [0, 1, 2, *range(5, 12)]
    assert [result.step for result in own.results] == [0, 1, 2, *range(5, 12)]


def test_descent_that_finds_nothing_negative_leaves_the_parameters_bit_identical(tmp_path: Path) -> None:
    convex = functools.partial(SmallRegressor, linear=True)

    def final(*callbacks: Callback) -> Tensor:
        return flat_parameters(fit(tmp_path, *callbacks, module=convex).lightning_module)

    for estimator in ("lanczos", "online"):
        assert torch.equal(final(), final(tracker(descent=Descent(), estimator=estimator, smallest=1)))


# Arguments.


def test_descent_is_a_mapping_in_yaml() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(NegativeCurvatureTracker, "tracker")

    def parsed(descent: str) -> Any:
        init_args = f'{{"every_n_steps": 5, "freeze_at": [2, 7], "descent": {descent}}}'
        config = f'{{"class_path": "lyapunov_lightning.NegativeCurvatureTracker", "init_args": {init_args}}}'
        return parser.instantiate_classes(parser.parse_args([f"--tracker={config}"])).tracker._descent

    assert parsed('{"lr": 0.5}') == Descent(lr=0.5, max_step=0.1)
    assert parsed("{}") == Descent()
    assert parsed("null") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "`lr` should be a positive float, got 0."),
        ({"lr": math.nan}, "`lr` should be a positive float, got nan."),
        ({"max_step": -1.0}, "`max_step` should be a positive float, got -1.0."),
    ],
)
def test_bad_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Descent(**options)


def test_descent_is_no_flag() -> None:
    with pytest.raises(ValueError, match=r"^`descent` should be a Descent, or a mapping of its fields, got True\."):
        NegativeCurvatureTracker(descent=True)  # type: ignore[arg-type]


def test_descent_beside_lbfgs_is_refused(tmp_path: Path) -> None:
    def module() -> SmallRegressor:
        return SmallRegressor(lambda parameters: torch.optim.LBFGS(parameters, lr=0.1))

    with pytest.raises(MisconfigurationException, match=r"`NegativeCurvatureTracker`.*LBFGS.*Use another optimizer"):
        fit(tmp_path, NegativeCurvatureTracker(descent=Descent()), module=module)
    fit(tmp_path, NegativeCurvatureTracker(), module=module, max_epochs=1)
