"""LossAlongEigvecScanner finds what the loss does along dense eigenvectors, shares it, and leaves the run alone."""

import functools
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger
from scipy.optimize import minimize_scalar
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lyapunov_lightning import HessianConfig, LossAlongEigvecScanner, Schedule, SpectrumTracker
from lyapunov_lightning.callbacks import loss_along_eigvec_scanner
from lyapunov_lightning.callbacks.loss_along_eigvec_scanner import path_to
from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.directions.plane import Plane
from tests.callbacks.identity import Outcome, assert_identical, train
from tests.callbacks.scan_runs import Saddle, curve, every_step, fit, tags
from tests.modules import BusyModule, SmallRegressor, Watcher, dense_hessian, regression_data

TICKS = range(-5, 6)


class Reference(Watcher):
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
        gradients = []
        for part in torch.arange(48).split(16):
            leaf = [p.detach().clone().requires_grad_() for p in values]
            batch_loss = nn.functional.mse_loss(
                torch.func.functional_call(pl_module, dict(zip(names, leaf, strict=True)), (inputs[part],)),
                targets[part],
            )
            grads = torch.autograd.grad(batch_loss, leaf)
            gradients.append(torch.cat([g.reshape(-1) for g in grads]))
        self.steps[trainer.global_step] = {
            "place": flat,
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
    fit(tmp_path, reference, scanner, max_epochs=1)
    assert len(reference.steps) == len(scanner.results) == 3
    for step, known in reference.steps.items():

        def logged(tag: str, at: int = step) -> float:
            return curve(scanner, f"scan/{tag}")[at]

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
                assert step not in curve(scanner, f"scan/optimal_step_{name}")
    assert min(float(known["values"][1]) for known in reference.steps.values()) < 0
    assert set(curve(scanner, "scan/bracketed_1").values()) == {1}
    assert 1 in curve(scanner, "scan/bracketed_min_1").values()
    assert set(curve(scanner, "scan_details/converged").values()) == {1}


@pytest.mark.parametrize("batches", [2, 10])
def test_changes_in_sgd_steps_are_those_of_the_mini_batch_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    monkeypatch.setattr(loss_along_eigvec_scanner, "_GRADIENT_BATCHES", batches)  # of the three that there are
    reference = Reference()
    multiples = (0.5, 1.0, 4.0)
    scanner = every_step(sgd_steps=multiples)
    logger = fit(tmp_path, reference, scanner, max_epochs=1).logger
    for step, known in reference.steps.items():
        vector = known["vectors"][-1]
        steps = -0.1 * (known["gradients"][:batches] @ vector)  # the learning rate times the components
        assert len(steps) == min(batches, 3)
        start = known["along"](vector, 0.0)
        for alpha in multiples:
            expected = sum(known["along"](vector, alpha * float(t)) - start for t in steps) / len(steps)
            found = logger.curve(f"scan/expected_change_{alpha:g}")[step]
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-9)
        mean_length = float(steps.abs().mean())
        assert logger.curve("scan_details/sgd_step")[step] == pytest.approx(mean_length, rel=1e-4)
        surface = [curve(scanner, f"scan/surface_{k}")[step] for k in TICKS]
        expected = [known["along"](vector, k * mean_length) for k in TICKS]
        mirrored = [known["along"](vector, -k * mean_length) for k in TICKS]  # an eigenvector has no sign
        assert surface in (pytest.approx(expected, rel=1e-6), pytest.approx(mirrored, rel=1e-6))


def test_a_convex_quadratic_has_the_minimum_of_newton_in_every_direction(tmp_path: Path) -> None:
    scanner = every_step(largest=2, smallest=1, random=1, units="norm")
    fit(tmp_path, scanner, module=SmallRegressor(linear=True), max_epochs=1)
    for name in ("1", "2", "min_1", "random_1"):
        for step, curvature in curve(scanner, f"scan/lambda_{name}").items():
            slope = curve(scanner, f"scan/gradient_component_{name}")[step]
            for scale in ("0.1", "1"):
                fitted = curve(scanner, f"scan/curvature_fit_{scale}_{name}")[step]
                assert fitted == pytest.approx(curvature, rel=1e-6)
                assert curve(scanner, f"scan/model_gap_{scale}_{name}")[step] < 1e-12
            assert curve(scanner, f"scan/optimal_step_{name}")[step] == pytest.approx(1 / curvature, rel=1e-4)
            improvement = slope**2 / (2 * curvature)
            assert curve(scanner, f"scan/best_improvement_{name}")[step] == pytest.approx(improvement, rel=1e-6)


def test_no_minimum_is_invented_where_the_loss_falls_for_ever(tmp_path: Path) -> None:
    scanner = every_step(largest=2)
    logger = fit(tmp_path, scanner, module=Saddle(), max_epochs=1).logger
    assert list(curve(scanner, "scan/lambda_min_1").values()) == pytest.approx([-2] * 3)
    assert set(curve(scanner, "scan/bracketed_min_1").values()) == {0}
    nowhere = ("scan/optimal_step_min", "scan/unit_step_min", "scan/best_improvement_min")
    assert not any(tag.startswith(nowhere) for tag in tags(scanner) | logger.tags)
    for step, found in logger.curve("scan/optimal_step_1").items():
        assert found == pytest.approx(1 / 4, rel=1e-4), step


def test_random_directions_are_the_same_at_every_step_and_need_no_eigenvectors(tmp_path: Path) -> None:
    scanner = every_step(largest=0, smallest=0, random=2)
    fit(tmp_path, scanner, module=Saddle(), max_epochs=1)
    generator = torch.Generator().manual_seed(0)
    hessian = torch.diag(torch.tensor([4.0, 1.0, -2.0], dtype=torch.float64))
    for name in ("random_1", "random_2"):
        vector = torch.randn(3, generator=generator, dtype=torch.float64)
        expected = float(vector @ hessian @ vector / vector.square().sum())
        assert list(curve(scanner, f"scan/lambda_{name}").values()) == pytest.approx([expected] * 3)
    assert set(curve(scanner, "scan_details/matvecs").values()) == {2}
    assert "scan_details/converged" not in tags(scanner)


def test_forward_passes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = []
    plain = HessianOperator.values_along

    def counted(self: HessianOperator, direction: Tensor, distances: Any) -> Tensor:
        evaluated.append(len(distances))
        return plain(self, direction, distances)

    monkeypatch.setattr(HessianOperator, "values_along", counted)
    logger = fit(tmp_path, every_step(points=7, sgd_steps=(1.0, 2.0)), max_steps=1, max_epochs=-1).logger
    assert logger.curve("scan_details/forward_passes")[0] == sum(evaluated)
    assert sum(evaluated) < 9 + 2 * (2 * 7 + 30) + 2 * 3 + 11


def test_eigenpairs_are_shared_with_other_callbacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    plain = HessianOperator.matvec
    monkeypatch.setattr(HessianOperator, "matvec", lambda self, v: products.append(1) or plain(self, v))
    tracker = {"every_n_steps": 1, "largest": 4, "smallest": 2, "hessian": HessianConfig(fraction=1.0), "tol": 1e-7}
    alone = fit(tmp_path, SpectrumTracker(**tracker), max_epochs=1).logger
    expected = len(products)
    for tracker_first in (True, False):
        products.clear()
        scanner = every_step(largest=2, smallest=2, scales=(), sgd_steps=())
        callbacks = [SpectrumTracker(**tracker), scanner]
        fit(tmp_path, *(callbacks if tracker_first else callbacks[::-1]), max_epochs=1)
        assert len(products) == expected
        assert curve(scanner, "scan/lambda_2") == alone.curve("spectrum/lambda_2")
        assert curve(scanner, "scan/lambda_min_2") == alone.curve("spectrum/lambda_min_2")


WITHOUT_METRICS = {"module": functools.partial(BusyModule, use_metrics=False)}
"""They take most of a run's time, and are put back in one place for all callbacks: one run with them is enough here."""


@functools.cache
def run_without(**options: Any) -> Outcome:
    """The run that a scanner must not change; the same for many scanners. Into the second epoch, of nine batches."""
    return train(steps=12, **options)


@pytest.mark.parametrize(
    ("scanner", "options"),
    [
        pytest.param({"largest": 2, "smallest": 1, "num_batches": 2}, {}, marks=pytest.mark.pictures),
        ({"smallest": 0, "random": 1, "units": "norm"}, WITHOUT_METRICS),
        ({"largest": 0, "smallest": 0, "random": 1, "sgd_steps": ()}, WITHOUT_METRICS),
        ({"scales": (), "sgd_steps": (1.0,)}, WITHOUT_METRICS),
        ({"data": "batch", "mode": "eval", "points": 3}, WITHOUT_METRICS),
        ({"method": "finite_difference"}, WITHOUT_METRICS),
        ({"data": "batch"}, {"precision": "bf16-mixed", **WITHOUT_METRICS}),
        ({"smallest": 0, "scales": (1.0,)}, {"accumulate": 4, **WITHOUT_METRICS}),
        ({"smallest": 0, "scales": (), "sgd_steps": (), "plane": Plane("gradient", points=3)}, WITHOUT_METRICS),
        ({"largest": 0, "smallest": 0, "sgd_steps": (), "plane": Plane("random", points=3)}, WITHOUT_METRICS),
    ],
    ids=[
        "ends",
        "random",
        "random-only",
        "steps-only",
        "eval",
        "differences",
        "bf16",
        "accumulated",
        "plane",
        "filters",
    ],
)
def test_scanner_leaves_the_run_bit_identical(tmp_path: Path, scanner: dict[str, Any], options: dict[str, Any]) -> None:
    own = {"points": 3, "sgd_steps": (1.0,), "tol": 1e-2, "save_dir": str(tmp_path), **scanner}
    if own.get("data") != "batch":
        own = {"num_batches": 1, **own}
    hessian = {field.name: own.pop(field.name) for field in fields(HessianConfig) if field.name in own}
    with_scanner = train(LossAlongEigvecScanner(10, **own, hessian=HessianConfig(**hessian)), steps=12, **options)
    assert_identical(run_without(**options), with_scanner)
    assert len(with_scanner.curve("scan_details/loss")) == 2


def test_a_resumed_run_goes_on_bit_identically(tmp_path: Path) -> None:
    def scanner(folder: str) -> LossAlongEigvecScanner:
        schedule = Schedule(every_n_steps=2)
        plane = Plane("random", points=3)
        options = {"smallest": 0, "random": 1, "scales": (1.0,), "plane": plane, "schedule": schedule}
        return every_step(**options, save_dir=str(tmp_path / folder))

    straight_scanner, resumed_scanner = scanner("straight"), scanner("resumed")
    straight = fit(tmp_path, straight_scanner, max_epochs=3).logger
    half = fit(tmp_path, scanner("resumed"), max_epochs=1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]
    rest = fit(tmp_path, resumed_scanner, max_epochs=3, ckpt_path=tmp_path / "half.ckpt").logger
    for tag in ("optimal_step_1", "best_improvement_random_1", "expected_change_1"):
        later = {step: value for step, value in straight.curve(f"scan/{tag}").items() if step >= 3}
        assert len(later) == 3
        assert rest.curve(f"scan/{tag}") == later
    assert len(straight_scanner.results) == 5
    assert resumed_scanner.results == straight_scanner.results
    assert resumed_scanner.results[-1].table() == straight_scanner.results[-1].table() != {}
    tables = [pd.read_csv(tmp_path / folder / "scan.csv") for folder in ("straight", "resumed")]
    values = [table[table.name != "scan_details/seconds"].reset_index(drop=True) for table in tables]
    pd.testing.assert_frame_equal(*values)


def test_the_plane_keeps_the_first_eigenvectors_and_the_training_walks_on_it(tmp_path: Path) -> None:
    reference = Reference()
    scanner = every_step(scales=(), sgd_steps=(), plane=Plane("eigenvectors", points=3, reach=0.1))
    logger = fit(tmp_path, reference, scanner, max_epochs=1).logger
    results, first = scanner.results, reference.steps[0]
    axes = [first["vectors"][-1], first["vectors"][0]]
    place, length = first["place"], float(first["place"].norm())
    for result in results:
        known = reference.steps[result.step]
        assert (result.plane_axes, result.plane_step) == (("1", "min_1"), 0)
        # An eigenvector may point to either side, so the four corners are compared as a set.
        corners = [result.plane_losses[i][j] for i in (0, 2) for j in (0, 2)]
        offsets = [0.1 * length * (x * axes[0] + y * axes[1]) for x in (-1, 1) for y in (-1, 1)]
        assert sorted(corners) == pytest.approx(sorted(known["along"](offset, 1.0) for offset in offsets), rel=1e-5)
        assert result.plane_losses[1][1] == pytest.approx(known["along"](axes[0], 0.0), rel=1e-6)
        walked = torch.stack(axes) @ (known["place"] - place) / length
        found = [now - then for now, then in zip(result.plane_position, results[0].plane_position, strict=True)]
        assert [abs(each) for each in found] == pytest.approx(walked.abs().tolist(), abs=1e-6)
        lowest = min(min(row) for row in result.plane_losses)
        improvement = logger.curve("scan/plane_improvement")[result.step]
        assert improvement == pytest.approx(result.plane_losses[1][1] - lowest)
        assert result.table()["scan/path_1"] == result.plane_position[0]
    assert results[-1].forward_passes >= 9
    path = path_to(results)
    assert path[-1] == (0, 0)
    drawn = scanner.plot("plane").axes[0].lines[0]
    assert drawn.get_xydata() == pytest.approx(np.array(path))
    assert "plane_surface" in scanner.figures()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"plane": "sideways"}, "`plane.directions` should be one of"),
        (
            {"smallest": 0, "plane": "eigenvectors"},
            r"takes 2 eigenvectors, and `largest \+ smallest` is 1. Ask for more",
        ),
        ({"largest": 0, "smallest": 0, "plane": "gradient"}, "takes 1 eigenvector, and"),
        ({"largest": 0, "smallest": 0}, "should not all be 0 where no `plane`"),
    ],
)
def test_planes_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossAlongEigvecScanner(**arguments)


@pytest.mark.parametrize(
    ("written", "plane"),
    [("random", Plane("random")), ({"directions": "gradient", "points": 11}, Plane("gradient", 11)), (None, None)],
)
def test_in_a_configuration_a_plane_is_a_name_or_a_mapping(written: Any, plane: Plane | None) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(LossAlongEigvecScanner, "scanner")
    made = parser.instantiate_classes(parser.parse_object({"scanner": {"plane": written}})).scanner
    assert made._plane == plane


def test_the_table_has_what_is_logged_and_further_numbers(tmp_path: Path) -> None:
    scanner = every_step(log_prefix="mine", save_dir=str(tmp_path / "out"))
    logger = fit(tmp_path, scanner, max_epochs=1).logger
    table = pd.read_csv(tmp_path / "out" / "scan.csv")
    assert list(table) == ["step", "epoch", "name", "value"]
    wide = table.pivot(index="step", columns="name", values="value")
    assert wide["scan_details/loss"].to_dict() == pytest.approx(logger.curve("mine/scan_details/loss"), rel=1e-15)
    assert set(wide) == tags(scanner) | {"scan_details/seconds"}
    further = {tag for result in scanner.results for tag in result.table()}
    assert {"scan/lambda_1", "scan/curvature_fit_0.1_min_1", "scan/surface_-5", "scan/unit_step_1"} <= further
    for tag in further:
        assert wide[tag].dropna().to_dict() == pytest.approx(curve(scanner, tag), rel=1e-15)
        assert f"mine/{tag}" not in logger.tags


def test_by_default_there_are_six_curves_at_the_steps_of_the_logging(tmp_path: Path) -> None:
    logger = fit(tmp_path, LossAlongEigvecScanner(), log_every_n_steps=2).logger
    assert {tag for tag in logger.tags if tag.startswith("scan/")} == {
        *(f"scan/{name}_{direction}" for name in ("optimal_step", "best_improvement") for direction in ("1", "min_1")),
        "scan/expected_change_0.5",
        "scan/expected_change_1",
    }
    assert list(logger.curve("scan_details/loss")) == [0, 2, 4]


def test_tensorboard_gets_figures_and_charts(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    scanner = every_step(scales=(1.0,), schedule=Schedule(every_n_epochs=1))
    fit(tmp_path, scanner, logger=logger)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    names = {"profiles", "curvature_fit", "optimal_step", "improvement", "expected_change", "surface"}
    assert set(events.Tags()["images"]) == {f"scan/{name}" for name in names}
    assert len(events.Images("scan/surface")) == 1  # at the end: the run is too short for more
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    figures = {name: scanner.plot(name) for name in scanner.figures()}
    (line, _) = figures["expected_change"].axes[0].lines
    assert line.get_label() == "1 SGD step"
    assert line.get_ydata().tolist() == pytest.approx(list(curve(scanner, "scan/expected_change_1").values()))
    fits = [curve(scanner, f"scan/{name}_{i}") for i in ("1", "min_1") for name in ("lambda", "curvature_fit_1")]
    points = figures["curvature_fit"].axes[0].collections[0].get_offsets().data
    assert points.tolist() == [pytest.approx([c[step] for c in fits[i : i + 2]]) for step in (0, 3) for i in (0, 2)]
    assert [panel.get_title(loc="left").split(":")[0] for panel in figures["profiles"].axes] == ["1", "min_1"]


def test_figures_show_what_there_is(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, every_step(scales=(), sgd_steps=(), smallest=0), logger=logger, max_epochs=1)
    logger.experiment.flush()
    names = {"profiles", "optimal_step", "improvement"}
    assert set(EventAccumulator(logger.log_dir).Reload().Tags()["images"]) == {f"scan/{name}" for name in names}
