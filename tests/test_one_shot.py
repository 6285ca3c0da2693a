"""`measure`: this module, these data, now."""

import copy
import sys
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lyapunov_lightning import HessianConfig, SpectrumResult, measure
from lyapunov_lightning.curvature.directions.plane import Plane
from lyapunov_lightning.curvature.errors import MeasurementError, NonFiniteCurvatureError
from lyapunov_lightning.training.lightning_names import MisconfigurationException
from lyapunov_lightning.training.reporting import progress
from tests.modules import (
    AugmentedClusters,
    BusyModule,
    SmallRegressor,
    dense_hessian,
    regression_data,
    regression_loader,
)


class Data(pl.LightningDataModule):
    """Prepares and sets up as users' do, and moves batches by a hook of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage}")
        self.samples = regression_data()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.samples, 10)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("transferred")
        return batch


class Partial(SmallRegressor):
    """Averages over the targets that are there, of which the last batch has none."""

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        loss: Tensor = super().training_step(batch, batch_idx)
        return loss if batch_idx < 2 else loss * 0 + float("nan")


def test_a_batch_whose_loss_is_not_finite_fails_the_measurement() -> None:
    with pytest.raises(NonFiniteCurvatureError):
        measure(Partial(), regression_loader(24))


def test_the_loss_over_a_plane_is_that_at_its_points_and_is_saved(tmp_path: Any) -> None:
    module = SmallRegressor()
    inputs, targets, _ = regression_data().tensors
    found = measure(module, regression_loader(), largest=2, plane=Plane("eigenvectors", points=3, reach=0.2))
    plane = found.plane
    assert plane is not None
    assert plane.names == ("1", "2")
    start = nn.utils.parameters_to_vector(module.parameters()).detach()
    for i, x in enumerate(plane.coordinates.tolist()):
        for j, y in enumerate(plane.coordinates.tolist()):
            moved = copy.deepcopy(module).eval()
            place = start + start.norm() * (x * found.vectors[0] + y * found.vectors[1])
            nn.utils.vector_to_parameters(place, moved.parameters())
            with torch.no_grad():
                loss = nn.functional.mse_loss(moved(inputs), targets)
            assert float(plane.losses[i, j]) == pytest.approx(float(loss), rel=1e-5)
    found.save(tmp_path / "found.pt")
    again = SpectrumResult.load(tmp_path / "found.pt").plane
    assert again is not None
    assert torch.equal(again.losses, plane.losses)
    assert "over the plane of 1 and 2: the lowest loss lies" in found.summary()
    assert found.plot_plane().axes[0].get_xlabel() == "along eigenvector 1, share of ‖θ‖"
    assert hasattr(found.plot_plane(surface=True).axes[0], "zaxis")


def test_a_plane_needs_no_eigenvalues_and_is_drawn_only_where_there_is_one() -> None:
    assert (
        measure(SmallRegressor(), regression_loader(24), largest=0, plane=Plane("random", points=3)).plane is not None
    )
    with pytest.raises(ValueError, match="takes 2 eigenvectors"):
        measure(SmallRegressor(), regression_loader(24), plane="eigenvectors")
    with pytest.raises(ValueError, match="No plane was measured"):
        measure(SmallRegressor(), regression_loader(24)).plot_plane()


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(regression_data())


def reference(module: Any, size: int = 48) -> tuple[float, Tensor]:
    inputs, targets, _ = regression_data().tensors
    return dense_hessian(module, (inputs[:size], targets[:size]))


def quiet(**options: Any) -> pl.Trainer:
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(**{**settings, **options})


def sharpness(module: Any, size: int = 48) -> float:
    return float(torch.linalg.eigvalsh(reference(module, size)[1])[-1])


def module(**options: Any) -> SmallRegressor:
    torch.manual_seed(0)
    return SmallRegressor(**options)


@pytest.mark.parametrize(
    "data",
    [
        lambda: regression_loader(batch_size=10),
        lambda: regression_loader(batch_size=7, shuffle=True),
        lambda: list(regression_loader(batch_size=9)),
        regression_data,
        Stream,
        Data,
    ],
    ids=["loader", "shuffled", "list", "dataset", "stream", "datamodule"],
)
def test_all_of_the_data_is_measured_with_unequal_batches_weighted_right(data):
    regressor = module()
    loss, dense = reference(regressor)
    exact = torch.linalg.eigvalsh(dense)
    result = measure(regressor, data(), largest=3, smallest=2)
    expected = torch.cat([exact.flip(0)[:3], exact[:2]])
    assert result.values.numpy() == pytest.approx(expected.numpy(), rel=1e-6, abs=1e-9)
    assert result.loss == pytest.approx(loss, rel=1e-12)
    residuals = torch.linalg.vector_norm(result.vectors @ dense - result.values[:, None] * result.vectors, dim=1)
    assert residuals.numpy() == pytest.approx(result.residuals.numpy(), rel=1e-2, abs=1e-9)
    assert (result.num_parameters, result.num_largest) == (26, 3)


def test_density_and_lines_are_those_of_the_loss():
    regressor = module()
    loss, dense = reference(regressor)
    result = measure(regressor, regression_loader(), largest=1, smallest=1, density=True, lines=1)
    exact = torch.linalg.eigvalsh(dense)
    mean = result.density.moment(1)
    assert mean.value == pytest.approx(float(exact.mean()), abs=4 * mean.standard_error)
    for name, place in (("1", 0), ("min_1", 1)):
        line = result.lines[name]
        assert line.eigenvalue == float(result.values[place])
        far = int(line.distances.argmax())
        moved = copy.deepcopy(regressor)
        sides = []
        for sign in (1, -1):
            displacement = sign * line.distances[far] * result.vectors[place]
            offset = 0
            for parameter, original in zip(moved.parameters(), regressor.parameters(), strict=True):
                piece = displacement[offset : offset + parameter.numel()]
                parameter.data = original.detach() + piece.view_as(parameter)
                offset += parameter.numel()
            sides.append(reference(moved)[0])
        assert min(abs(side - float(line.losses[far])) for side in sides) < 1e-12
        assert float(line.model[far]) != pytest.approx(float(line.losses[far]), rel=1e-9)
        assert float(line.losses[line.distances.abs().argmin()]) == pytest.approx(loss, rel=1e-12)


def test_dropout_is_off_unless_asked_for():
    regressor = module(dropout=0.5)
    evaluated = measure(regressor, regression_loader())
    assert measure(regressor, regression_loader()).values == evaluated.values
    regressor.eval()
    assert evaluated.loss == pytest.approx(reference(regressor)[0], rel=1e-12)
    regressor.train()
    trained = measure(regressor, regression_loader(), hessian=HessianConfig(mode="train"))
    assert (trained.mode, evaluated.mode) == ("train", "eval")
    assert abs(trained.loss - evaluated.loss) > 1e-3


@pytest.mark.parametrize("hessian", [HessianConfig(num_batches=2), HessianConfig(fraction=1 / 3)])
def test_a_config_says_how_much_of_the_data(hessian):
    regressor = module()
    result = measure(regressor, regression_loader(), hessian=hessian)
    assert result.num_batches == 2
    assert float(result.largest) == pytest.approx(
        float(torch.linalg.eigvalsh(reference(regressor, 16)[1])[-1]), rel=1e-6
    )


@pytest.mark.parametrize("max_batch_bytes", [0, 10**9])
def test_the_first_batches_are_measured_read_or_held(max_batch_bytes, recwarn):
    regressor = module()
    data = regression_loader(batch_size=8)
    result = measure(regressor, data, max_batches=2, max_batch_bytes=max_batch_bytes, largest=2, lines=1)
    loss, dense = reference(regressor, 16)
    assert result.largest.numpy() == pytest.approx(torch.linalg.eigvalsh(dense).flip(0)[:2].numpy(), rel=1e-6)
    assert result.loss == pytest.approx(loss, rel=1e-12)
    assert (result.num_batches, result.max_batches) == (2, 2)
    assert "the first 2 batches, evaluation mode" in result.summary()
    assert "the first" not in measure(regressor, data).summary()
    told = [str(warning.message) for warning in recwarn if "max_batch_bytes" in str(warning.message)]
    assert len(told) == (max_batch_bytes == 0)


def test_a_generator_outside_of_the_loss_keeps_its_state_and_a_bar_is_shown_on_a_terminal_alone(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SHOWN_AFTER_SECONDS", -1.0)
    monkeypatch.setattr(progress, "_LOOKS_APART_SECONDS", 0.0)
    loader = DataLoader(regression_data(), 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    state = loader.generator.get_state()
    measure(module(), loader)
    assert torch.equal(loader.generator.get_state(), state)
    assert "Batches" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    measure(module(), loader, density=True)
    shown = capsys.readouterr()
    assert not shown.out.count("\r")
    for text in ("Batches: 6 batches", "Hessian-vector products: ", "batch 2 of 6; ", " more: ", "Batches: 12 batches"):
        assert text in shown.err, text
    for off in ({"progress": False}, {"trainer": quiet(logger=False)}):
        measure(module(), loader, **off)
        assert "products" not in capsys.readouterr().err


def everything_of(busy: pl.LightningModule) -> Any:
    own = {name: value for name, value in vars(busy).items() if not name.startswith("_")}
    return copy.deepcopy((busy.state_dict(), own, [inner.training for inner in busy.modules()]))


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_module_and_the_random_numbers_are_left_as_they_were(mode):
    """With BatchNorm, dropout, metrics, and state outside of parameters and buffers."""
    torch.manual_seed(0)
    busy = BusyModule()
    busy.net[1].eval()  # a part that the user keeps in evaluation
    before, random_state = everything_of(busy), torch.get_rng_state()
    measure(busy, DataLoader(AugmentedClusters(40), 10, shuffle=True), hessian=HessianConfig(mode=mode), smallest=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(before, everything_of(busy))
    assert busy._trainer is None
    assert all(parameter.grad is None for parameter in busy.parameters())


def test_a_module_that_is_being_trained_and_its_trainer_are_left_alone(tmp_path):
    values: list[float] = []

    class Measuring(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            values.append(float(measure(pl_module, regression_loader()).largest))

    def trained(*callbacks: pl.Callback) -> tuple[pl.Trainer, SmallRegressor]:
        trainer = quiet(max_epochs=2, logger=False, enable_checkpointing=False, callbacks=list(callbacks))
        regressor = module()
        trainer.fit(regressor, regression_loader(shuffle=True))
        return trainer, regressor

    torch.manual_seed(1)
    trainer, with_ = trained(Measuring())
    torch.manual_seed(1)
    _, without = trained()
    assert_same(dict(with_.state_dict()), dict(without.state_dict()))
    assert with_._trainer is trainer
    assert values[-1] == pytest.approx(sharpness(with_), rel=1e-6)


def test_a_checkpoint_is_measured_in_place_of_the_weights_and_leaves_them(tmp_path):
    trainer = quiet(max_epochs=2, logger=False, default_root_dir=tmp_path)
    trained = module()
    trainer.fit(trained, regression_loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = module()
    weights = copy.deepcopy(fresh.state_dict())
    result = measure(fresh, regression_loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert float(result.largest) == pytest.approx(sharpness(trained), rel=1e-6)
    assert_same(dict(weights), dict(fresh.state_dict()))


def test_a_trainer_lends_its_precision_and_keeps_its_callbacks_and_loggers(tmp_path):
    class Acting(pl.Callback):
        calls = 0

        def on_predict_start(self, *args: Any) -> None:
            type(self).calls += 1

    callback = Acting()
    trainer = quiet(precision="bf16-true", default_root_dir=tmp_path, callbacks=[callback])
    callbacks, loggers = list(trainer.callbacks), list(trainer.loggers)
    torch.manual_seed(0)
    busy = BusyModule()
    clusters = list(DataLoader(AugmentedClusters(40), 10))
    in_float32 = measure(busy, clusters)
    in_bf16 = measure(busy, clusters, trainer=trainer)
    assert in_bf16.loss != in_float32.loss
    assert in_bf16.loss == pytest.approx(in_float32.loss, rel=2e-2)
    mixed = measure(busy, clusters, trainer=quiet(precision="bf16-mixed", default_root_dir=tmp_path))
    assert mixed.loss == in_float32.loss
    assert (trainer.callbacks, trainer.loggers, Acting.calls) == (callbacks, loggers, 0)
    assert not list(tmp_path.rglob("events*"))


def test_modules_of_the_other_name_are_served():
    pytorch_lightning = pytest.importorskip("pytorch_lightning", reason="the second name is not installed")

    class Other(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.mse_loss(self.inner(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    other = Other()
    assert float(measure(other, regression_loader()).largest) == pytest.approx(sharpness(other.inner), rel=1e-6)


# What the result can do.


def test_a_result_is_shown_written_and_read_again(tmp_path):
    result = measure(module(), regression_loader(), largest=2, smallest=1, density=True, lines=1)
    text = result.summary()
    assert "SmallRegressor: 26 parameters, 6 batches, evaluation mode" in text
    assert [line.split()[0] for line in text.splitlines() if line.endswith("  yes")] == ["1", "2", "min_1"]
    assert len(result.plot().axes) >= 4
    own = Figure().subplots()
    assert result.plot(ax=own) is own
    assert own.get_ylabel() == result.plot().axes[0].get_ylabel()
    assert result._repr_png_().startswith(b"\x89PNG")
    assert repr(result).startswith("SpectrumResult(SmallRegressor, largest=[")
    result.save(tmp_path / "spectrum.pt")
    again = SpectrumResult.load(tmp_path / "spectrum.pt")
    assert again.summary() == text
    assert torch.equal(again.vectors, result.vectors)
    assert torch.equal(again.lines["1"].losses, result.lines["1"].losses)
    table = result.to_pandas()
    assert list(table.index) == ["1", "2", "min_1"]
    assert table["eigenvalue"].tolist() == result.values.tolist()


def test_density_alone_needs_no_eigenvalues():
    result = measure(module(), regression_loader(), largest=0, density=True)
    assert len(result.values) == 0
    assert "trace" in result.summary()
    assert result.plot().axes


# What cannot be measured.


class ByHand(SmallRegressor):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Broken(SmallRegressor):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * torch.nan


@pytest.mark.parametrize(
    ("made", "data", "options", "error", "message"),
    [
        (module, regression_loader, {"largest": -1}, ValueError, "`largest` should be a non-negative int, got -1"),
        (module, regression_loader, {"largest": 0}, ValueError, "should not both be 0 where no `density`"),
        (module, regression_loader, {"max_batches": 0}, ValueError, "`max_batches` should be a positive int, got 0"),
        (module, regression_loader, {"max_batch_bytes": -1}, ValueError, "`max_batch_bytes` should be a non-negative"),
        (module, regression_loader, {"max_batches": 3, "hessian": HessianConfig(num_batches=2)}, ValueError,
         "`max_batches` and `hessian.num_batches` are two sizes of the same data, got 3 and 2"),
        (module, regression_loader, {"max_batches": 3, "hessian": HessianConfig(fraction=0.5)}, ValueError,
         "`max_batches` and `hessian.fraction` are two sizes of the same data, got 3 and 0.5"),
        (module, regression_loader, {"hessian": "eval"}, ValueError, "`hessian` should be a HessianConfig, or a"),
        (module, regression_loader, {"hessian": HessianConfig("batch")}, ValueError, "should not have `data='batch'`"),
        (module, regression_loader, {"hessian": HessianConfig(DataLoader([1]))}, ValueError, "have data of its own"),
        (module, list, {}, ValueError, "`data` should give at least one batch, got a list that gives none"),
        (module, lambda: 3, {}, TypeError, "`data` should be a dataloader, a dataset or a Li.*, got int"),
        (module, lambda: (b for b in regression_loader()), {"hessian": HessianConfig(fraction=0.5)}, ValueError,
         "`hessian.fraction` is of no use with data without a length, a generator"),
        (lambda: nn.Linear(3, 2), regression_loader, {}, TypeError, "`module` should be a LightningModule, got Linear"),
        (ByHand, regression_loader, {}, MisconfigurationException, "`measure`.*curvature_loss"),
        (module, regression_loader, {"largest": 27}, MisconfigurationException, "`measure`.*26"),
        (Broken, regression_loader, {}, MeasurementError, "finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_by_name(made, data, options, error, message):
    with pytest.raises(error, match=message):
        measure(made(), data(), **options)


def test_the_module_keeps_working_after_a_refusal():
    regressor = module()
    with pytest.raises(MisconfigurationException):
        measure(regressor, regression_loader(), largest=27)
    assert measure(regressor, regression_loader()).converged.all()
