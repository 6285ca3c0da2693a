"""LossAlongEigvecScanner where there is less to be found, or nothing, and what it refuses."""

import functools
import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lyapunov_lightning import CurvatureProbe, LossAlongEigvecScanner, Schedule
from lyapunov_lightning.curvature import lanczos
from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.training import sharing
from tests.callbacks.scan_runs import Saddle, curve, every_step, fit, tags
from tests.modules import SmallRegressor, regression_data


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
    assert logger.curve("scan_details/converged")[0] < 1
    assert logger.curve("scan_details/residual")[0] > 1e-3
    for name in ("1", "3", "min_1", "min_2"):  # second derivatives along their vectors all the same
        curvature = curve(scanner, f"scan/lambda_{name}")[0]
        assert curve(scanner, f"scan/curvature_fit_0.01_{name}")[0] == pytest.approx(curvature, rel=1e-2, abs=1e-3)


def test_nothing_of_the_size_of_the_model_outlives_a_scan(tmp_path: Path) -> None:
    class Meter(Callback):
        """Looks through all objects of the process, which takes long, so only after the second batch and the last."""

        def __init__(self) -> None:
            self.large: dict[int, int] = {}
            self.all: dict[int, int] = {}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            step = trainer.global_step
            if step in (2, 6):
                tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
                self.large[step] = sum(tensor.numel() >= 302 for tensor in tensors)
                self.all[step] = len(tensors)

    meter, without = Meter(), Meter()
    scanner = every_step(scales=(1.0,), tol=1e-2)
    fit(tmp_path, scanner, meter, module=Wide(), max_epochs=2)
    fit(tmp_path, without, module=Wide(), max_epochs=2)
    assert meter.large[6] == meter.large[2] == without.large[6]
    assert len(scanner.results) == 6
    assert meter.all[6] - meter.all[2] <= 3  # of the results numbers are kept, and the windows of the last one only


def test_failed_measurement_is_warned_of_and_the_run_goes_on(tmp_path: Path) -> None:
    def broken(module: Any, batch: Any) -> Tensor:
        raise RuntimeError("broken on purpose")

    with pytest.warns(CurvatureWarning, match="broken on purpose"):
        trainer = fit(tmp_path, every_step(loss_fn=broken), CurvatureProbe(1, log_prefix="well"))
    assert trainer.global_step == 6
    assert set(trainer.logger.curve("scan_details/converged").values()) == {0}
    assert set(trainer.logger.curve("well/curvature_details/converged").values()) == {1}


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
    assert {tag for tag in trainer.logger.tags if "scan" in tag} == {"scan_details/converged", "scan_details/seconds"}
    assert scanner.results == []


def test_loss_that_overflows_nearby_is_scanned(tmp_path: Path) -> None:
    class Steep(Saddle):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.where(self.x[0].abs() < 0.9, (torch.tensor([4.0, 1, 1]) * self.x.square()).sum(), math.inf)

    scanner = every_step(smallest=0, units="norm")
    logger = fit(tmp_path, scanner, module=Steep(), max_steps=1, max_epochs=-1).logger
    assert logger.curve("scan/optimal_step_1")[0] == pytest.approx(1 / 8, rel=1e-4)
    assert curve(scanner, "scan/curvature_fit_0.1_1")[0] == pytest.approx(8, rel=1e-6)
    assert "scan/curvature_fit_1_1" not in tags(scanner)
    assert scanner.results[0].curvature_fits == ((pytest.approx(8, rel=1e-6), None),)
    assert all(math.isfinite(value) for value in scanner.results[0].table().values())
    assert all(math.isfinite(value) for _, metrics in logger.history for value in metrics.values())


def test_direction_without_slope_has_no_window_and_no_minimum(tmp_path: Path) -> None:
    class AtTheTop(Saddle):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (torch.tensor([4.0, 1.0, -2.0], dtype=torch.float64) * (self.x - self.x.detach()).square()).sum()

    scanner = every_step()
    fit(tmp_path, scanner, module=AtTheTop(), max_steps=2, max_epochs=-1)
    for name in ("1", "min_1"):
        assert curve(scanner, f"scan/gradient_component_{name}") == {0: 0.0, 1: 0.0}
        assert curve(scanner, f"scan/bracketed_{name}") == {0: 0.0, 1: 0.0}
    assert not any("fit" in tag for tag in tags(scanner))
    assert scanner.figures().keys() >= {"profiles", "curvature_fit", "optimal_step"}


def test_optimizer_without_a_learning_rate_is_told_of(tmp_path: Path) -> None:
    class Own(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        def step(self, closure: Any = None) -> None:
            closure()

    scanner = every_step()
    with pytest.warns(CurvatureWarning, match="no learning rate"):
        fit(tmp_path, scanner, module=SmallRegressor(Own), max_steps=2, max_epochs=-1)
    assert len(curve(scanner, "scan/optimal_step_1")) == 2
    assert not any(tag.startswith(("scan/expected", "scan/surface", "scan_details/sgd")) for tag in tags(scanner))
    assert not scanner.figures().keys() & {"expected_change", "surface"}


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
        ({"units": "metres"}, "`units` should be one of gradient, norm, got 'metres'"),
        ({"every_n_steps": 0}, "`every_n_steps` should be a positive int, got 0"),
        ({"every_n_steps": 2, "schedule": Schedule(every_n_steps=2)}, "`every_n_steps` is itself a schedule"),
        ({"hessian": "eval"}, "`hessian` should be a HessianConfig"),
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
    scanner = every_step(largest=2, smallest=1, random=1)
    loader = DataLoader(regression_data(8), 8)
    fit(tmp_path, scanner, module=Saddle(), loader=loader, max_epochs=1)
    assert [curve(scanner, f"scan/lambda_{name}")[0] for name in ("1", "2", "min_1")] == pytest.approx([4, 1, -2])
