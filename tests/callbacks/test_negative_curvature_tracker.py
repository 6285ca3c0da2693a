"""NegativeCurvatureTracker measures what a dense Hessian has, when it is asked to, and leaves the run alone."""

import functools
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lyapunov_lightning import CurvatureProbe, HessianConfig, NegativeCurvatureTracker, Schedule, SpectrumTracker
from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.training.schedule import ScheduleState
from tests.callbacks.identity import Outcome, assert_identical, train
from tests.callbacks.negative_runs import EVERY_STEP, WHOLE, Dense, fit, tracker
from tests.modules import BusyModule, SmallRegressor, dense_hessian, regression_data, regression_loader

# What is measured.


def test_smallest_eigenpairs_are_those_of_the_dense_hessian_at_every_step(tmp_path: Path) -> None:
    dense, own = Dense(), tracker()
    logger = fit(tmp_path, dense, own).logger
    assert len(dense.hessians) == 12
    for result, (step, hessian) in zip(own.results, dense.hessians.items(), strict=True):
        values, vectors = torch.linalg.eigh(hessian)
        assert (result.step, result.epoch) == (step, pytest.approx(step / 3))
        for rank in range(3):
            value = logger.curve(f"negative/lambda_min_{rank + 1}")[step]
            assert value == pytest.approx(float(values[rank]), rel=1e-6)
            component = logger.curve(f"negative_details/gradient_component_{rank + 1}")[step]
            assert component == pytest.approx(abs(float(vectors[:, rank] @ dense.gradients[step])), rel=1e-3, abs=1e-6)
        assert logger.curve("negative_details/lambda_max")[step] == pytest.approx(float(values[-1]), rel=1e-6)
        ratio = logger.curve("negative/lambda_ratio")[step]
        assert ratio == pytest.approx(float(-values[0] / values[-1]), rel=1e-6)
        tracked = torch.cat([values[:3], values[-1:]])
        share = float((-tracked).clamp_min(0).sum() / tracked.abs().sum())
        assert logger.curve("negative_details/negative_mass")[step] == pytest.approx(share, rel=1e-6)
        assert 0 < share < 1
        norm = float(dense.gradients[step].norm())
        assert logger.curve("negative_details/gradient_norm")[step] == pytest.approx(norm, rel=1e-9)
        assert logger.curve("negative_details/converged")[step] == 1
        assert result.lambda_min == tuple(logger.curve(f"negative/lambda_min_{rank}")[step] for rank in (1, 2, 3))
    assert {tag for tag in logger.tags if tag.startswith("negative/")} == {
        *(f"negative/lambda_min_{rank}" for rank in (1, 2, 3)),
        "negative/lambda_ratio",
    }


def test_pairs_that_did_not_converge_are_logged_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lyapunov_lightning.training import sharing

    plain = sharing.lanczos
    monkeypatch.setattr(sharing, "lanczos", lambda *args, **kwargs: plain(*args, max_matvecs=6, **kwargs))
    logger = fit(tmp_path, tracker()).logger
    assert set(logger.curve("negative_details/matvecs").values()) == {6}
    assert max(logger.curve("negative_details/converged").values()) < 1
    assert min(logger.curve("negative_details/residual").values()) > 1e-3


# When.


def test_without_a_schedule_it_follows_the_logging(tmp_path: Path) -> None:
    own = tracker(schedule=None)
    assert list(fit(tmp_path, own, log_every_n_steps=5).logger.curve("negative/lambda_min_1")) == [0, 5, 10]


@pytest.mark.parametrize(
    ("options", "log_every_n_steps", "expected"),
    [
        ({"schedule": EVERY_STEP}, 1, set(range(12))),
        ({"schedule": Schedule(every_n_steps=4)}, 1, {0, 2, 4, 7, 8}),
        ({"schedule": Schedule(every_n_epochs=1)}, 1, {0, 2, 3, 6, 7, 9}),
        ({"schedule": Schedule(at_steps=[2, 9])}, 1, {2, 7, 9}),
        ({"schedule": None, "every_n_steps": 6}, 1, {0, 2, 6, 7}),
        ({"schedule": None}, 5, {0, 2, 5, 7, 10}),
    ],
)
def test_frozen_directions_are_followed_from_their_step_on(
    tmp_path: Path, options: dict[str, Any], log_every_n_steps: int, expected: set[int]
) -> None:
    dense = Dense()
    own = tracker(**options, freeze_at=[7, 2], tol=1e-9)
    logger = fit(tmp_path, dense, own, log_every_n_steps=log_every_n_steps).logger
    assert set(logger.curve("negative/lambda_min_1")) == expected
    for frozen_at in (2, 7):
        vectors = torch.linalg.eigh(dense.hessians[frozen_at]).eigenvectors
        for end, vector in (("top", vectors[:, -1]), ("bottom", vectors[:, 0])):
            curve = logger.curve(f"negative/frozen_{frozen_at}_{end}")
            assert set(curve) == {step for step in expected if step >= frozen_at}
            for step, value in curve.items():
                assert value == pytest.approx(float(vector @ dense.hessians[step] @ vector), rel=1e-5, abs=1e-8)
    values = torch.linalg.eigvalsh(dense.hessians[2])
    assert logger.curve("negative/frozen_2_bottom")[2] == pytest.approx(float(values[0]), rel=1e-6)


def test_steps_to_freeze_are_measured_even_if_nothing_is_logged(tmp_path: Path) -> None:
    own = tracker(schedule=None, freeze_at=[3, 5])
    with pytest.warns(CurvatureWarning, match="log_every_n_steps=0"):
        fit(tmp_path, own, log_every_n_steps=0)
    assert [(result.step, list(result.frozen)) for result in own.results] == [(3, [3]), (5, [3, 5])]


def test_frozen_directions_with_gradient_accumulation_are_those_of_optimizer_steps(tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2, "max_epochs": 6}
    logger = fit(tmp_path, tracker(schedule=Schedule(every_n_steps=3), freeze_at=[5]), **options).logger
    assert list(logger.curve("negative/frozen_5_top")) == [5, 6, 9]
    assert list(logger.curve("negative/lambda_min_1")) == [0, 3, 5, 6, 9]


class TwoStepsABatch(SmallRegressor):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def curvature_loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(2):
            self.optimizers().zero_grad()
            self.manual_backward(self.curvature_loss(batch))
            self.optimizers().step()


def test_a_step_inside_of_a_batch_is_frozen_at_the_first_opportunity_under_its_own_name(tmp_path: Path) -> None:
    dense, own = Dense(), tracker(schedule=Schedule(every_n_steps=8), freeze_at=[3], tol=1e-9)
    fit(tmp_path, dense, own, module=TwoStepsABatch)
    assert [(result.step, list(result.frozen)) for result in own.results] == [(0, []), (4, [4]), (8, [4]), (16, [4])]
    vectors = torch.linalg.eigh(dense.hessians[4]).eigenvectors
    for result in own.results[1:]:
        expected = tuple(float(v @ dense.hessians[result.step] @ v) for v in (vectors[:, -1], vectors[:, 0]))
        assert result.frozen[4] == pytest.approx(expected, rel=1e-6)


def test_nothing_is_frozen_by_default_or_by_an_empty_list(tmp_path: Path) -> None:
    for options in ({}, {"freeze_at": []}):
        assert not any("frozen" in tag for tag in fit(tmp_path, tracker(**options), max_epochs=1).logger.tags)


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        yield from regression_data()


def test_a_step_before_the_fixed_data_are_complete_freezes_nothing_and_says_so(tmp_path: Path) -> None:
    own = tracker(HessianConfig(num_batches=3), freeze_at=[1, 4])
    with pytest.warns(CurvatureWarning) as warned:
        logger = fit(tmp_path, own, loader=DataLoader(Endless(), 16)).logger
    kept, not_frozen = (str(w.message) for w in warned if issubclass(w.category, CurvatureWarning))
    assert "first 3 batches of this training" in kept
    assert "no directions are frozen at step 1, since the fixed data are not complete yet" in not_frozen
    assert list(logger.curve("negative/frozen_4_top")) == list(range(4, 12))
    assert "negative/frozen_1_top" not in logger.tags


# The running estimate.


def test_running_estimate_is_a_rayleigh_quotient_with_its_residual_for_one_product_a_step(tmp_path: Path) -> None:
    dense = Dense()
    own = tracker(estimator="online", smallest=0, schedule=None)
    trainer = fit(tmp_path, dense, own, max_epochs=12)
    logger = trainer.logger
    assert set(logger.curve("negative_details/matvecs").values()) == {1}
    assert "negative/lambda_min_1" not in logger.tags
    ages = logger.curve("negative_details/online_age")
    assert list(ages.values()) == [0, 1, 2, 3] * 9
    for step, age in ages.items():
        hessian = dense.hessians[step - int(age)]
        value = logger.curve("negative/online_lambda_min")[step]
        residual = logger.curve("negative_details/online_residual")[step]
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
    errors = logger.curve("negative_details/online_error")
    assert set(errors) == {0, 300}
    assert errors[0] > 0.05 > errors[300]
    for step, error in errors.items():
        running, exact = (logger.curve(f"negative/{t}")[step] for t in ("online_lambda_min", "lambda_min_1"))
        assert error == pytest.approx(abs(running / exact - 1), rel=1e-9, abs=1e-12)


def test_running_estimate_has_a_schedule_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    charged: list[ScheduleState] = []
    monkeypatch.setattr(ScheduleState, "record", lambda self, seconds: charged.append(self))
    own = tracker(estimator="online", online_schedule=Schedule(every_n_steps=5), schedule=Schedule(every_n_steps=3))
    logger = fit(tmp_path, own).logger
    assert list(logger.curve("negative/online_lambda_min")) == [0, 5, 10]
    assert list(logger.curve("negative/lambda_min_1")) == [0, 3, 6, 9]
    assert list(logger.curve("negative_details/online_error")) == [0]
    # The time of a measurement counts for the schedule that asked for the larger part of it.
    assert [state is own.schedule_state for state in charged] == [True, True, False, True, True, False]


# What is left alone.


WITHOUT_METRICS = {"module": functools.partial(BusyModule, use_metrics=False)}
"""They take most of a run's time, and are put back in one place for all callbacks: one run with them is enough here."""


@functools.cache
def run_without(**options: Any) -> Outcome:
    return train(steps=12, **options)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        pytest.param({"smallest": 3}, {}, marks=pytest.mark.pictures),
        ({"freeze_at": [0, 5, 20]}, WITHOUT_METRICS),
        ({"data": "batch"}, WITHOUT_METRICS),
        ({"num_batches": 2}, WITHOUT_METRICS),
        ({"mode": "eval", "fraction": 0.2}, WITHOUT_METRICS),
        ({"method": "forward_over_reverse", "tol": 0.9}, WITHOUT_METRICS),
        ({"method": "finite_difference", "tol": 0.9}, WITHOUT_METRICS),
        ({"loss_fn": lambda module, batch: module.loss(batch), "log_prefix": "mine"}, WITHOUT_METRICS),
        ({"estimator": "online"}, WITHOUT_METRICS),
        ({"estimator": "online", "freeze_at": [3], "online_schedule": Schedule(every_n_steps=3)}, WITHOUT_METRICS),
        ({"estimator": "online", "data": "batch"}, WITHOUT_METRICS),
        ({"estimator": "online", "smallest": 0, "schedule": None}, WITHOUT_METRICS),
        ({"freeze_at": [3]}, {"precision": "bf16-mixed", **WITHOUT_METRICS}),
        ({"estimator": "online"}, {"precision": "bf16-mixed", "accumulate": 4, **WITHOUT_METRICS}),
        ({"freeze_at": [5], "estimator": "online"}, {"accumulate": 4, **WITHOUT_METRICS}),
        ({"tol": 1e-6, "seed": 3, "schedule": Schedule(max_overhead=0.9)}, WITHOUT_METRICS),
    ],
    ids=lambda value: ",".join(name for name in value if name != "module"),
)
def test_reading_leaves_the_run_bit_identical(
    tmp_path: Path, arguments: dict[str, Any], options: dict[str, Any]
) -> None:
    own = {"schedule": Schedule(every_n_steps=8), "smallest": 1, "tol": 0.3, "save_dir": str(tmp_path), **arguments}
    hessian = {field.name: own.pop(field.name) for field in fields(HessianConfig) if field.name in own}
    with_tracker = train(NegativeCurvatureTracker(**own, hessian=HessianConfig(**hessian)), steps=12, **options)
    assert_identical(run_without(**options), with_tracker)
    tag = "online_lambda_min" if "estimator" in arguments else "lambda_min_1"
    prefix = "mine/" if "log_prefix" in arguments else ""
    assert len(with_tracker.curve(f"{prefix}negative/{tag}")) >= 2
    assert len((tmp_path / "negative.csv").read_text().splitlines()) > 4


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
    spectrum = {"schedule": EVERY_STEP, "largest": 6, "smallest": 3, "hessian": WHOLE, "tol": 1e-7}
    fit(tmp_path, SpectrumTracker(**spectrum))
    expected = dict(counts)
    assert expected["operators"] == 12
    for first_is_own in (True, False):
        counts.update(operators=0, products=0)
        probe = CurvatureProbe(1, eigenvalue_every=1, hessian=HessianConfig("fixed", fraction=1.0))
        both = [tracker(), SpectrumTracker(**spectrum), probe]
        logger = fit(tmp_path, *(both if first_is_own else both[::-1])).logger
        # Beside the shared ones: at each of the 12 steps the probe's Hessian of the step's own batch, with one product
        # for the batch sharpness, and of these are compared with the fixed data the first three and every eighth.
        assert counts["operators"] == expected["operators"] + 12
        assert counts["products"] == expected["products"] + 12 + 4
        for rank in (1, 2, 3):
            assert logger.curve(f"negative/lambda_min_{rank}") == logger.curve(f"spectrum/lambda_min_{rank}")
        assert logger.curve("negative_details/lambda_max") == logger.curve("curvature/lambda_max")


# Resuming, figures, and what is refused.


def test_frozen_directions_and_the_running_estimate_go_on_in_a_resumed_run(tmp_path: Path) -> None:
    def own() -> NegativeCurvatureTracker:
        return tracker(freeze_at=[4, 15], estimator="online", smallest=2)

    first, resumed = own(), own()
    straight = fit(tmp_path, first, max_epochs=8).logger
    half = fit(tmp_path, own(), max_epochs=4)
    half.save_checkpoint(tmp_path / "half.ckpt")
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]
    rest = fit(tmp_path, resumed, max_epochs=8, ckpt_path=tmp_path / "half.ckpt").logger
    for group, tag in (
        ("negative", "frozen_4_top"),
        ("negative", "frozen_4_bottom"),
        ("negative", "frozen_15_bottom"),
        ("negative", "online_lambda_min"),
        ("negative_details", "online_error"),
    ):
        later = {step: value for step, value in straight.curve(f"{group}/{tag}").items() if step >= 12}
        assert len(later) >= 9
        assert rest.curve(f"{group}/{tag}") == later
    assert len(first.results) == 24
    assert resumed.results == first.results


def test_tensorboard_gets_the_figures_at_the_end(tmp_path: Path) -> None:
    logger, own = TensorBoardLogger(tmp_path), tracker(freeze_at=[2, 8])
    fit(tmp_path, own, logger=logger, max_epochs=3)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    assert set(events.Tags()["images"]) == {"negative/eigenvalues", "negative/frozen"}
    assert len(events.Images("negative/frozen")) == 1  # the epochs before are shorter than 50 drawings
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    upper, lower = own.plot("frozen").axes
    for end, panel in enumerate((upper, lower)):
        ends, *frozen = panel.lines
        expected = [result.lambda_max if panel is upper else result.lambda_min[0] for result in own.results]
        assert ends.get_ydata().tolist() == pytest.approx(expected)
        assert [line.get_xdata().tolist() for line in frozen] == [[2, 3, 4, 5, 6, 7, 8], [8]]
        values = [result.frozen[2][end] for result in own.results[2:]]
        assert frozen[0].get_ydata().tolist() == pytest.approx(values)


def test_there_is_no_figure_of_what_was_not_measured(tmp_path: Path) -> None:
    own, running = tracker(estimator="online"), NegativeCurvatureTracker(smallest=0, estimator="online")
    fit(tmp_path, own, running, max_epochs=1)
    assert own.figures().keys() == {"eigenvalues"}
    assert running.figures() == {}


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
            "`every_n_steps` and `schedule` are of no use with `smallest=0`. Use `online_schedule`.",
        ),
        (
            {"smallest": 0, "estimator": "online", "every_n_steps": 3},
            "`every_n_steps` and `schedule` are of no use with `smallest=0`. Use `online_schedule`.",
        ),
        (
            {"online_schedule": EVERY_STEP},
            "`online_schedule` is of no use with `estimator='lanczos'`. Use 'online'.",
        ),
        (
            {"online_schedule": 3, "estimator": "online"},
            "`online_schedule` should be a Schedule, or a mapping of its fields, got 3.",
        ),
        ({"every_n_steps": 3, "schedule": EVERY_STEP}, "`every_n_steps` is itself a schedule"),
        ({"estimator": "oja"}, "`estimator` should be one of lanczos, online, got 'oja'."),
        ({"tol": 0}, "`tol` should be a positive float, got 0."),
        ({"hessian": 1.0}, "`hessian` should be a HessianConfig, or a mapping of its fields, got 1.0."),
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
    assert fit(tmp_path, tracker(smallest=25)).logger.curve("negative_details/converged")[11] == 1


def test_two_trackers_live_side_by_side(tmp_path: Path) -> None:
    trainer: pl.Trainer = fit(tmp_path, tracker(), tracker(log_prefix="mine"), max_epochs=1)
    assert trainer.logger.curve("negative/lambda_min_1") == trainer.logger.curve("mine/negative/lambda_min_1")
