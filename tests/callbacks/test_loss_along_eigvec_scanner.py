"""LossAlongEigvecScanner finds what the loss does along dense eigenvectors, shares it, and leaves the run alone."""

import functools
import gc
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from scipy.optimize import minimize_scalar
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lyapunov_lightning import CurvatureProbe, LossAlongEigvecScanner, Schedule, SpectrumTracker
from lyapunov_lightning.curvature import HessianOperator, lanczos
from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.training import sharing
from tests.callbacks.identity import Outcome, assert_identical, train
from tests.modules import MemoryLogger, SmallRegressor, dense_hessian, regression_data, regression_loader

TICKS = range(-5, 6)


def fit(tmp_path: Path, *callbacks: Callback, module: Any = None, **options: Any) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    settings = {"max_epochs": 2, "logger": MemoryLogger(), "enable_checkpointing": False, **options}
    ckpt_path, loader = settings.pop("ckpt_path", None), settings.pop("loader", None)
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
    trainer.fit(module or SmallRegressor(), loader or regression_loader(batch_size=16), ckpt_path=ckpt_path)
    return trainer


def every_step(**options: Any) -> LossAlongEigvecScanner:
    """A scanner of the whole training set, of which a reference is easily computed."""
    few = {"points": 3, "sgd_steps": (1.0,), "gradient_batches": 1}
    defaults = {"schedule": Schedule(every_n_steps=1), "tol": 1e-7, "fraction": 1.0, **few}
    return LossAlongEigvecScanner(**{**defaults, **options})


class Reference(Callback):
    """The loss of the whole training set as a function of the parameters at every step, with its derivatives."""

    def __init__(self) -> None:
        self.steps: dict[int, Any] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        inputs, targets, _ = regression_data().tensors
        names, values = zip(*((n, p.detach().clone()) for n, p in pl_module.named_parameters()), strict=True)

        def loss(flat: Tensor) -> Tensor:
            parts = flat.split([value.numel() for value in values])
            pieces = {name: p.view_as(v) for name, p, v in zip(names, parts, values, strict=True)}
            return nn.functional.mse_loss(torch.func.functional_call(pl_module, pieces, (inputs,)), targets)

        flat = torch.cat([value.reshape(-1) for value in values])
        _, hessian = dense_hessian(pl_module, (inputs, targets))
        eigenvalues, vectors = torch.linalg.eigh(hessian)
        order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
        gradients = []
        for part in order.split(16):
            leaf = [p.detach().clone().requires_grad_() for p in values]
            batch_loss = nn.functional.mse_loss(
                torch.func.functional_call(pl_module, dict(zip(names, leaf, strict=True)), (inputs[part],)),
                targets[part],
            )
            grads = torch.autograd.grad(batch_loss, leaf)
            gradients.append(torch.cat([g.reshape(-1) for g in grads]))
        self.steps[trainer.global_step] = {
            "along": lambda vector, t: float(loss(flat + t * vector)),
            "values": eigenvalues,
            "vectors": vectors.T,
            "gradient": torch.autograd.functional.jacobian(loss, flat),
            "gradients": torch.stack(gradients),
        }


# The index of each direction among the dense eigenpairs, which ascend.
DIRECTIONS = {"1": -1, "2": -2, "min_1": 0, "min_2": 1}


@pytest.mark.parametrize("units", ["gradient", "norm"])
def test_fits_and_minima_are_those_of_the_loss_along_dense_eigenvectors(tmp_path: Path, units: Any) -> None:
    reference = Reference()
    scanner = every_step(largest=2, smallest=2, units=units, points=11, sgd_steps=())
    logger = fit(tmp_path, reference, scanner, max_epochs=1).logger
    assert len(reference.steps) == 3
    for step, known in reference.steps.items():

        def logged(tag: str, at: int = step) -> float:
            return logger.curve(f"scan/{tag}")[at]

        for name, index in DIRECTIONS.items():
            vector, curvature = known["vectors"][index], float(known["values"][index])
            slope = float(known["gradient"] @ vector)
            downhill = -math.copysign(1, slope) * vector
            assert logged(f"lambda_{name}") == pytest.approx(curvature, rel=1e-6)
            assert logged(f"gradient_component_{name}") == pytest.approx(abs(slope), rel=1e-4)
            for scale in (0.1, 1):
                width = scale * (abs(slope) if units == "gradient" else 1)
                where = np.linspace(-width, width, 11)
                losses = np.array([known["along"](downhill, t) for t in where])
                fitted = 2 * np.polyfit(where / width, losses, 2)[0] / width**2
                model = known["along"](downhill, 0) - abs(slope) * where + curvature / 2 * where**2
                error = logged(f"curvature_fit_error_{scale}_{name}")
                assert logged(f"curvature_fit_{scale}_{name}") == pytest.approx(fitted, rel=1e-3, abs=4 * error)
                gap = np.abs(losses - model).max()
                assert logged(f"model_gap_{scale}_{name}") == pytest.approx(gap, rel=1e-3, abs=1e-10)
            if logged(f"bracketed_{name}"):
                found = logged(f"unit_step_{name}")
                least = minimize_scalar(
                    lambda t, d=downhill, k=known: k["along"](d, t), bounds=(0.5 * found, 2 * found), method="bounded"
                )
                assert found == pytest.approx(least.x, rel=1e-3)
                assert logged(f"optimal_step_{name}") == pytest.approx(found / abs(slope), rel=1e-4)
                fall = known["along"](downhill, 0) - least.fun
                assert logged(f"best_improvement_{name}") == pytest.approx(fall, rel=1e-4)
            else:
                assert step not in logger.curve(f"scan/optimal_step_{name}")
    assert min(float(known["values"][1]) for known in reference.steps.values()) < 0
    assert set(logger.curve("scan/bracketed_1").values()) == {1}
    assert 1 in logger.curve("scan/bracketed_min_1").values()
    assert set(logger.curve("scan/converged").values()) == {1}


def test_changes_in_sgd_steps_are_those_of_the_mini_batch_gradients(tmp_path: Path) -> None:
    reference = Reference()
    multiples = (0.5, 1.0, 4.0)
    logger = fit(tmp_path, reference, every_step(sgd_steps=multiples, gradient_batches=2), max_epochs=1).logger
    for step, known in reference.steps.items():
        vector = known["vectors"][-1]
        steps = -0.1 * (known["gradients"][:2] @ vector)  # the learning rate times the components
        start = known["along"](vector, 0.0)
        for alpha in multiples:
            expected = sum(known["along"](vector, alpha * float(t)) - start for t in steps) / 2
            found = logger.curve(f"scan/expected_change_{alpha:g}")[step]
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-9)
        mean_length = float(steps.abs().mean())
        assert logger.curve("scan/sgd_step")[step] == pytest.approx(mean_length, rel=1e-4)
        surface = [logger.curve(f"scan/surface_{k}")[step] for k in TICKS]
        expected = [known["along"](vector, k * mean_length) for k in TICKS]
        mirrored = [known["along"](vector, -k * mean_length) for k in TICKS]  # an eigenvector has no sign
        assert surface in (pytest.approx(expected, rel=1e-6), pytest.approx(mirrored, rel=1e-6))


def test_a_convex_quadratic_has_the_minimum_of_newton_in_every_direction(tmp_path: Path) -> None:
    scanner = every_step(largest=2, smallest=1, random=1, units="norm")
    logger = fit(tmp_path, scanner, module=SmallRegressor(linear=True), max_epochs=1).logger
    for name in ("1", "2", "min_1", "random_1"):
        for step, curvature in logger.curve(f"scan/lambda_{name}").items():
            slope = logger.curve(f"scan/gradient_component_{name}")[step]
            for scale in ("0.1", "1"):
                fitted = logger.curve(f"scan/curvature_fit_{scale}_{name}")[step]
                assert fitted == pytest.approx(curvature, rel=1e-6)
                assert logger.curve(f"scan/model_gap_{scale}_{name}")[step] < 1e-12
            assert logger.curve(f"scan/optimal_step_{name}")[step] == pytest.approx(1 / curvature, rel=1e-4)
            improvement = slope**2 / (2 * curvature)
            assert logger.curve(f"scan/best_improvement_{name}")[step] == pytest.approx(improvement, rel=1e-6)


class Saddle(pl.LightningModule):
    """A loss that falls for ever along one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([0.5, -0.25, 0.1], dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (torch.tensor([4.0, 1.0, -2.0], dtype=torch.float64) * self.x.square()).sum() / 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_no_minimum_is_invented_where_the_loss_falls_for_ever(tmp_path: Path) -> None:
    logger = fit(tmp_path, every_step(largest=2), module=Saddle(), max_epochs=1).logger
    assert list(logger.curve("scan/lambda_min_1").values()) == pytest.approx([-2] * 3)
    assert set(logger.curve("scan/bracketed_min_1").values()) == {0}
    assert not any(tag.startswith(("scan/optimal_step_min", "scan/unit_step_min")) for tag in logger.tags)
    assert not any(tag.startswith("scan/best_improvement_min") for tag in logger.tags)
    for step, found in logger.curve("scan/optimal_step_1").items():
        assert found == pytest.approx(1 / 4, rel=1e-4), step


def test_random_directions_are_the_same_at_every_step_and_need_no_eigenvectors(tmp_path: Path) -> None:
    scanner = every_step(largest=0, smallest=0, random=2)
    logger = fit(tmp_path, scanner, module=Saddle(), max_epochs=1).logger
    generator = torch.Generator().manual_seed(0)
    hessian = torch.diag(torch.tensor([4.0, 1.0, -2.0], dtype=torch.float64))
    for name in ("random_1", "random_2"):
        vector = torch.randn(3, generator=generator, dtype=torch.float64)
        expected = float(vector @ hessian @ vector / vector.square().sum())
        assert list(logger.curve(f"scan/lambda_{name}").values()) == pytest.approx([expected] * 3)
    assert set(logger.curve("scan/matvecs").values()) == {2}
    assert "scan/converged" not in logger.tags


def test_forward_passes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = []
    plain = HessianOperator.values_along

    def counted(self: HessianOperator, direction: Tensor, distances: Any) -> Tensor:
        evaluated.append(len(distances))
        return plain(self, direction, distances)

    monkeypatch.setattr(HessianOperator, "values_along", counted)
    logger = fit(
        tmp_path, every_step(gradient_batches=3, points=7, sgd_steps=(1.0, 2.0)), max_steps=1, max_epochs=-1
    ).logger
    assert logger.curve("scan/forward_passes")[0] == sum(evaluated)
    assert sum(evaluated) < 9 + 2 * (2 * 7 + 30) + 2 * 3 + 11


def test_eigenpairs_are_shared_with_other_callbacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    plain = HessianOperator.matvec
    monkeypatch.setattr(HessianOperator, "matvec", lambda self, v: products.append(1) or plain(self, v))
    tracker = {"largest": 4, "smallest": 2, "fraction": 1.0, "tol": 1e-7, "schedule": Schedule(every_n_steps=1)}
    alone = fit(tmp_path, SpectrumTracker(**tracker), max_epochs=1).logger
    expected = len(products)
    for tracker_first in (True, False):
        products.clear()
        callbacks = [SpectrumTracker(**tracker), every_step(largest=2, smallest=2, scales=(), sgd_steps=())]
        logger = fit(tmp_path, *(callbacks if tracker_first else callbacks[::-1]), max_epochs=1).logger
        assert len(products) == expected
        assert logger.curve("scan/lambda_2") == alone.curve("spectrum/lambda_2")
        assert logger.curve("scan/lambda_min_2") == alone.curve("spectrum/lambda_min_2")


@functools.cache
def run_without(**options: Any) -> Outcome:
    """The run that a scanner must not change; the same for many scanners."""
    return train(**options)


@pytest.mark.parametrize(
    ("scanner", "options"),
    [
        ({"largest": 2, "smallest": 1}, {}),
        ({"smallest": 0, "random": 1, "units": "norm"}, {}),
        ({"largest": 0, "smallest": 0, "random": 1, "sgd_steps": ()}, {}),
        ({"scales": (), "sgd_steps": (1.0,), "gradient_batches": 2, "max_bracket": 3.0}, {}),
        ({"data": "batch", "mode": "eval", "points": 3}, {}),
        ({"method": "finite_difference"}, {}),
        ({"data": "batch"}, {"precision": "bf16-mixed"}),
        ({"smallest": 0, "scales": (1.0,)}, {"accumulate": 4}),
    ],
    ids=["ends", "random", "random-only", "steps-only", "eval", "differences", "bf16", "accumulated"],
)
def test_scanner_leaves_the_run_bit_identical(tmp_path: Path, scanner: dict[str, Any], options: dict[str, Any]) -> None:
    few = {"points": 3, "sgd_steps": (1.0,), "gradient_batches": 2, "tol": 1e-2, "num_batches": 2}
    under_test = LossAlongEigvecScanner(
        schedule=Schedule(every_n_steps=26), save_dir=str(tmp_path), **{**few, **scanner}
    )
    with_scanner = train(under_test, **options)
    assert_identical(run_without(**options), with_scanner)
    assert len(with_scanner.curve("scan/loss")) == 2


def test_a_resumed_run_goes_on_bit_identically(tmp_path: Path) -> None:
    def scanner(folder: str) -> LossAlongEigvecScanner:
        schedule = Schedule(every_n_steps=2)
        return every_step(random=1, scales=(1.0,), schedule=schedule, save_dir=str(tmp_path / folder))

    straight_scanner, resumed_scanner = scanner("straight"), scanner("resumed")
    straight = fit(tmp_path, straight_scanner, max_epochs=4).logger
    half = fit(tmp_path, scanner("resumed"), max_epochs=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]
    rest = fit(tmp_path, resumed_scanner, max_epochs=4, ckpt_path=tmp_path / "half.ckpt").logger
    for tag in ("lambda_1", "curvature_fit_1_min_1", "best_improvement_random_1", "expected_change_1", "surface_-3"):
        later = {step: value for step, value in straight.curve(f"scan/{tag}").items() if step >= 6}
        assert len(later) == 3
        assert rest.curve(f"scan/{tag}") == later
    histories = [scanner.state_dict()["history"] for scanner in (straight_scanner, resumed_scanner)]
    assert histories[0].keys() == histories[1].keys()
    assert all(torch.equal(histories[0][name].nan_to_num(), histories[1][name].nan_to_num()) for name in histories[0])
    assert len(histories[1]["surface_0"]) == 6
    tables = [pd.read_csv(tmp_path / folder / "scan.csv") for folder in ("straight", "resumed")]
    values = [table[table.name != "scan/seconds"].reset_index(drop=True) for table in tables]
    pd.testing.assert_frame_equal(*values)


def test_the_table_is_tidy(tmp_path: Path) -> None:
    logger = fit(tmp_path, every_step(log_prefix="mine", save_dir=str(tmp_path / "out")), max_epochs=1).logger
    table = pd.read_csv(tmp_path / "out" / "scan.csv")
    assert list(table) == ["step", "epoch", "name", "value"]
    wide = table.pivot(index="step", columns="name", values="value")
    assert wide["scan/loss"].to_dict() == pytest.approx(logger.curve("mine/scan/loss"), rel=1e-15)


def test_tensorboard_gets_figures_and_charts(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, every_step(scales=(1.0,), schedule=Schedule(every_n_epochs=1)), logger=logger)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    names = {"profiles", "curvature_fit", "optimal_step", "improvement", "expected_change", "surface"}
    assert set(events.Tags()["images"]) == {f"scan/{name}" for name in names}
    assert len(events.Images("scan/surface")) == 2  # one an epoch
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_figures_show_what_there_is(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, every_step(scales=(), sgd_steps=(), smallest=0), logger=logger, max_epochs=1)
    logger.experiment.flush()
    names = {"profiles", "optimal_step", "improvement"}
    assert set(EventAccumulator(logger.log_dir).Reload().Tags()["images"]) == {f"scan/{name}" for name in names}


# What can go wrong.


class Wide(SmallRegressor):
    """Too large for a Krylov basis that spans the whole space."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 60), nn.Tanh(), nn.Linear(60, 2)).double()


def test_eigenpairs_that_did_not_converge_are_told_of_and_scanned_nevertheless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "lanczos", functools.partial(lanczos, max_matvecs=6))
    scanner = every_step(largest=3, smallest=2, scales=(0.01,), units="norm")
    logger = fit(tmp_path, scanner, module=Wide(), max_steps=1, max_epochs=-1).logger
    assert logger.curve("scan/converged")[0] < 1
    assert logger.curve("scan/residual")[0] > 1e-3
    for name in ("1", "3", "min_1", "min_2"):  # second derivatives along their vectors all the same
        curvature = logger.curve(f"scan/lambda_{name}")[0]
        assert logger.curve(f"scan/curvature_fit_0.01_{name}")[0] == pytest.approx(curvature, rel=1e-2, abs=1e-3)


def test_nothing_of_the_size_of_the_model_outlives_a_scan(tmp_path: Path) -> None:
    class Meter(Callback):
        def __init__(self) -> None:
            self.large: list[int] = []
            self.all: list[int] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
            self.large.append(sum(tensor.numel() >= 302 for tensor in tensors))
            self.all.append(len(tensors))

    meter, without = Meter(), Meter()
    scanner = every_step(scales=(1.0,), tol=1e-2)
    fit(tmp_path, scanner, meter, module=Wide(), max_epochs=2)
    fit(tmp_path, without, module=Wide(), max_epochs=2)
    assert len(meter.large) == 6
    assert meter.large[-1] == meter.large[1] == without.large[-1]
    kept = len(scanner.state_dict()["history"])  # one row of numbers for each scan, and the windows of the last one
    assert meter.all[-1] - meter.all[1] <= 4 * kept + 3


def test_failed_measurement_is_warned_of_and_the_run_goes_on(tmp_path: Path) -> None:
    def broken(module: Any, batch: Any) -> Tensor:
        raise RuntimeError("broken on purpose")

    with pytest.warns(CurvatureWarning, match="broken on purpose"):
        trainer = fit(tmp_path, every_step(loss_fn=broken), CurvatureProbe(1, log_prefix="well"))
    assert trainer.global_step == 6
    assert set(trainer.logger.curve("scan/converged").values()) == {0}
    assert set(trainer.logger.curve("well/curvature/converged").values()) == {1}


@pytest.mark.parametrize("largest", [1, 0])
def test_loss_that_is_not_finite_is_warned_of_and_nothing_else_logged(tmp_path: Path, largest: int) -> None:
    scanner = every_step(
        largest=largest,
        smallest=0,
        random=1,
        loss_fn=lambda module, batch: math.nan * nn.functional.mse_loss(module(batch[0]), batch[1]),
    )
    with pytest.warns(CurvatureWarning, match="not finite"):
        trainer = fit(tmp_path, scanner)
    assert trainer.global_step == 6
    assert {tag for tag in trainer.logger.tags if "scan/" in tag} == {"scan/converged", "scan/seconds"}


def test_loss_that_overflows_nearby_is_scanned(tmp_path: Path) -> None:
    class Steep(Saddle):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.where(self.x[0].abs() < 0.9, 4 * self.x.square().sum(), math.inf)

    logger = fit(tmp_path, every_step(smallest=0, units="norm"), module=Steep(), max_steps=1, max_epochs=-1).logger
    assert logger.curve("scan/optimal_step_1")[0] == pytest.approx(1 / 8, rel=1e-4)
    assert logger.curve("scan/curvature_fit_0.1_1")[0] == pytest.approx(8, rel=1e-6)
    assert "scan/curvature_fit_1_1" not in logger.tags
    assert all(math.isfinite(value) for _, metrics in logger.history for value in metrics.values())


def test_direction_without_slope_has_no_window_and_no_minimum(tmp_path: Path) -> None:
    class AtTheTop(Saddle):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (torch.tensor([4.0, 1.0, -2.0], dtype=torch.float64) * (self.x - self.x.detach()).square()).sum()

    logger = fit(tmp_path, every_step(), module=AtTheTop(), max_steps=2, max_epochs=-1).logger
    for name in ("1", "min_1"):
        assert logger.curve(f"scan/gradient_component_{name}") == {0: 0.0, 1: 0.0}
        assert logger.curve(f"scan/bracketed_{name}") == {0: 0.0, 1: 0.0}
    assert not any("fit" in tag for tag in logger.tags)


def test_optimizer_without_a_learning_rate_is_told_of(tmp_path: Path) -> None:
    class Own(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        def step(self, closure: Any = None) -> None:
            closure()

    with pytest.warns(CurvatureWarning, match="no learning rate"):
        logger = fit(tmp_path, every_step(), module=SmallRegressor(Own), max_steps=2, max_epochs=-1).logger
    assert len(logger.curve("scan/optimal_step_1")) == 2
    assert not any(tag.startswith(("scan/expected", "scan/surface")) for tag in logger.tags)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"largest": -1}, "`largest` should be a non-negative int, got -1"),
        ({"random": 0.5}, "`random` should be a non-negative int, got 0.5"),
        ({"largest": 0, "smallest": 0}, "`largest`, `smallest` and `random` should not all be 0"),
        ({"scales": (0.0, 1.0)}, r"`scales` should be different positive floats, got \[0.0, 1.0\]"),
        ({"scales": (1.0, 1.0)}, "`scales` should be different positive floats"),
        ({"scales": (math.inf,)}, "`scales` should be different positive floats"),
        ({"sgd_steps": (-1.0,)}, "`sgd_steps` should be different positive floats"),
        ({"points": 2}, "`points` should be an int of at least 3, got 2"),
        ({"gradient_batches": 0}, "`gradient_batches` should be a positive int, got 0"),
        ({"units": "metres"}, "`units` should be one of gradient, norm, got 'metres'"),
        ({"max_bracket": 0.5}, "`max_bracket` should be a finite float of at least 1, got 0.5"),
        ({"max_bracket": math.nan}, "`max_bracket` should be a finite float of at least 1, got nan"),
        ({"method": "exact"}, "`method` should be one of"),
        ({"mode": "test"}, "`mode` should be 'train' or 'eval'"),
        ({"tol": 0}, "`tol` should be a positive float, got 0"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossAlongEigvecScanner(**options)


def test_more_eigenvectors_than_parameters_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="28 eigenvalues of a model with 26 trainable parameters"):
        fit(tmp_path, LossAlongEigvecScanner(largest=20, smallest=8))


def test_all_eigenvectors_of_a_model_can_be_scanned(tmp_path: Path) -> None:
    scanner = every_step(largest=2, smallest=1, random=1, loss_fn=None)
    loader = DataLoader(regression_data(8), 8)
    logger = fit(tmp_path, scanner, module=Saddle(), loader=loader, max_epochs=1).logger
    assert [logger.curve(f"scan/lambda_{name}")[0] for name in ("1", "2", "min_1")] == pytest.approx([4, 1, -2])
