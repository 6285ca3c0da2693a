"""SpectrumTracker measures what a dense Hessian has, shares it, and leaves the run alone."""

import functools
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset

from lyapunov_lightning import CurvatureProbe, HessianConfig, Schedule, SpectrumTracker
from lyapunov_lightning.callbacks import spectrum_tracker
from lyapunov_lightning.callbacks.results.spectrum import TrackedSpectrum
from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.training.lightning_names import MisconfigurationException
from tests.callbacks.identity import Outcome, assert_identical, train
from tests.modules import (
    BusyModule,
    MemoryLogger,
    SmallRegressor,
    Watcher,
    dense_hessian,
    regression_data,
    regression_loader,
)
from tests.training_runs import train as run

EVERYTHING = HessianConfig(fraction=1.0)
"""The fixed data are the whole training set, of which a reference is easily computed."""


class Dense(Watcher):
    """The dense Hessian of the whole training set at every step, and the gradients of its batches of eight."""

    def __init__(self) -> None:
        self.hessians: dict[int, Tensor] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        data = regression_data()
        self.hessians[trainer.global_step] = dense_hessian(pl_module, data.tensors)[1]


def fit(tmp_path: Path, *callbacks: Callback, module: Any = None, **options: Any) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    settings = {"max_epochs": 2, "log_every_n_steps": 1, "default_root_dir": tmp_path, **options}
    settings["logger"] = settings.get("logger") or MemoryLogger()
    return run(module or SmallRegressor(), *callbacks, **settings)


def every_step(**options: Any) -> SpectrumTracker:
    return SpectrumTracker(1, **{"tol": 1e-6, "hessian": EVERYTHING, **options})


def test_both_ends_are_those_of_the_dense_hessian_at_every_step(tmp_path: Path) -> None:
    dense = Dense()
    logger = fit(tmp_path, dense, every_step(largest=5, smallest=4), max_epochs=1).logger
    assert len(dense.hessians) == 6
    for step, hessian in dense.hessians.items():
        values = torch.linalg.eigvalsh(hessian).flip(0)
        for rank in range(5):
            assert logger.curve(f"spectrum/lambda_{rank + 1}")[step] == pytest.approx(float(values[rank]), rel=1e-6)
        for rank in range(4):
            found = logger.curve(f"spectrum/lambda_min_{rank + 1}")[step]
            assert found == pytest.approx(float(values[-1 - rank]), rel=1e-6)
        tracked = torch.cat([values[:5], values[-4:]])
        assert logger.curve("spectrum_details/tracked_norm")[step] == pytest.approx(float(tracked.norm()), rel=1e-6)
        share = float((-tracked).clamp_min(0).sum() / tracked.abs().sum())
        assert logger.curve("spectrum_details/negative_mass")[step] == pytest.approx(share, rel=1e-6)
        assert logger.curve("spectrum_details/converged")[step] == 1


@pytest.mark.parametrize("data", ["fixed", "batch"])
def test_dropout_masks_stay_on_fixed_data(tmp_path: Path, data: str) -> None:
    """With parameters that stand still and batches that are all the same."""
    module = SmallRegressor(lambda parameters: torch.optim.SGD(parameters, lr=1e-300), dropout=0.5)
    pl.seed_everything(0, verbose=False)
    logger = MemoryLogger()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=4,
        callbacks=[every_step(largest=2, hessian=HessianConfig(data=data, fraction=1.0 if data == "fixed" else None))],
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, regression_loader(batch_size=48))
    values = list(logger.curve("spectrum/lambda_1").values())
    assert len(values) == 4
    assert len({round(value, 9) for value in values}) == (1 if data == "fixed" else 4)


def test_alignment_and_overlap_are_those_of_the_dense_eigenvectors(tmp_path: Path) -> None:
    class Reference(Dense):
        def __init__(self) -> None:
            super().__init__()
            self.cosines: dict[int, Tensor] = {}
            self.tops: dict[int, Tensor] = {}

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            step = trainer.global_step
            self.tops[step] = torch.linalg.eigh(self.hessians[step]).eigenvectors[:, -3:].T.flip(0)
            loss = torch.nn.functional.mse_loss(pl_module(batch[0]), batch[1])
            parts = torch.autograd.grad(loss, list(pl_module.parameters()))
            gradient = torch.cat([part.reshape(-1) for part in parts])
            self.cosines[step] = self.tops[step] @ gradient / gradient.norm()

    reference = Reference()
    batch = HessianConfig("batch")
    logger = fit(tmp_path, reference, every_step(largest=3, hessian=batch, tol=1e-8), max_epochs=1).logger
    whole = fit(tmp_path, Reference(), every_step(largest=3, tol=1e-8), max_epochs=1).logger
    # On the step's own batch the Hessian is another one, so its cosines are only compared where the data are the same.
    assert set(logger.curve("spectrum_details/gradient_cosine_1")) == set(reference.cosines)
    tops = list(reference.tops.values())
    expected = [float((a @ b.T).square().sum() / 3) for a, b in itertools.pairwise(tops)]
    found = list(whole.curve("spectrum/subspace_overlap").values())
    assert found == pytest.approx(expected, abs=2e-2)  # kept in half precision
    first = list(whole.curve("spectrum_details/subspace_overlap_first").values())
    assert first == pytest.approx([float((tops[0] @ b.T).square().sum() / 3) for b in tops[1:]], abs=2e-2)
    assert set(whole.curve("spectrum_details/gradient_in_random_subspace").values()) == {3 / 26}


def test_cosines_are_averaged_over_the_batches_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reference(Watcher):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step:
                return
            _values, vectors = torch.linalg.eigh(dense_hessian(pl_module, regression_data().tensors)[1])
            rows = []
            for part in torch.arange(48).split(8)[:4]:
                inputs, targets, _ = regression_data()[part]
                loss = torch.nn.functional.mse_loss(pl_module(inputs), targets)
                parts = torch.autograd.grad(loss, list(pl_module.parameters()))
                gradient = torch.cat([p.reshape(-1) for p in parts])
                rows.append((vectors[:, -2:].T.flip(0) @ gradient / gradient.norm()).abs())
            self.cosines = torch.stack(rows)

    monkeypatch.setattr(spectrum_tracker, "_GRADIENT_BATCHES", 4)
    reference = Reference()
    logger = fit(tmp_path, reference, every_step(largest=2, tol=1e-8), max_epochs=1).logger
    for rank in range(2):
        expected = float(reference.cosines[:, rank].mean())
        assert logger.curve(f"spectrum_details/gradient_cosine_{rank + 1}")[0] == pytest.approx(expected, rel=1e-5)
    inside = float(reference.cosines.square().sum(dim=1).mean())
    assert logger.curve("spectrum/gradient_in_top_subspace")[0] == pytest.approx(inside, rel=1e-5)


def test_estimates_cover_the_dense_trace_and_norm(tmp_path: Path) -> None:
    dense, tracker = Dense(), every_step(largest=3, random_vectors=20, density_steps=15)
    logger = fit(tmp_path, dense, tracker, loader=regression_loader(batch_size=24), max_epochs=3).logger
    assert len(dense.hessians) == 6
    for step, hessian in dense.hessians.items():
        for tag, error, value in (
            ("trace", "trace_error", float(hessian.trace())),
            ("frobenius_norm", "frobenius_norm_error", float(hessian.norm())),
        ):
            found, spread = logger.curve(f"spectrum/{tag}")[step], logger.curve(f"spectrum_details/{error}")[step]
            assert abs(found - value) <= 4 * spread + 1e-9


@pytest.mark.parametrize("groups", ["modules", {"first": "net.0.*", "last": "*3*"}], ids=["modules", "patterns"])
def test_blocks_are_those_of_the_dense_hessian(tmp_path: Path, groups: Any) -> None:
    dense = Dense()
    logger = fit(tmp_path, dense, every_step(largest=1, groups=groups), max_epochs=1).logger
    blocks = {"net": slice(0, 26)} if groups == "modules" else {"first": slice(0, 16), "last": slice(16, 26)}
    for step, hessian in dense.hessians.items():
        for name, block in blocks.items():
            expected = float(torch.linalg.eigvalsh(hessian[block, block])[-1])
            assert logger.curve(f"spectrum/lambda_max_{name}")[step] == pytest.approx(expected, rel=1e-3)


class Tied(SmallRegressor):
    """A weight of two layers, a frozen layer, a parameter of the module's own and one that the loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)]
        self.net = nn.Sequential(*layers).double()
        self.net[2].weight = self.net[0].weight
        self.net[4].requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.unused = nn.Linear(2, 1, bias=False).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * self.net(inputs)


def layers_of_tied() -> dict[str, slice]:
    """Where the blocks are among the parameters that are trained: the shared weight is that of the first layer."""
    sizes = {"scale": 1, "net.0": 12, "net.2": 3, "net.6": 8, "unused": 2}
    ends = list(itertools.accumulate(sizes.values(), initial=0))
    return {name: slice(*place) for name, place in zip(sizes, itertools.pairwise(ends), strict=True)}


def test_layers_are_blocks_of_the_dense_hessian_and_their_traces_take_no_product(tmp_path: Path) -> None:
    dense = Dense()
    options: dict[str, Any] = {"largest": 2, "random_vectors": 30}
    tracker = every_step(**options, groups="layers", save_dir=str(tmp_path / "out"))
    few: dict[str, Any] = {"max_epochs": 1, "loader": regression_loader(batch_size=16)}
    logger = fit(tmp_path, dense, tracker, module=Tied(), **few).logger
    blocks, off = layers_of_tied(), 0
    for result in tracker.results:
        hessian = dense.hessians[result.step]
        assert list(result.lambda_max_of) == list(result.trace_of) == list(blocks)
        for name, place in blocks.items():
            block = hessian[place, place]
            largest, error = float(torch.linalg.eigvalsh(block)[-1]), result.lambda_max_error_of[name]
            assert result.lambda_max_of[name] == pytest.approx(largest, rel=1e-3, abs=1e-12)
            assert abs(result.lambda_max_of[name] - largest) <= error + 1e-12
            off += abs(result.trace_of[name] - float(block.trace())) > 2 * result.trace_error_of[name] + 1e-12
        assert sum(result.trace_of.values()) == pytest.approx(result.trace, rel=1e-9)
        assert result.lambda_max_of["unused"] == pytest.approx(0, abs=1e-12)
        assert result.trace_of["unused"] == pytest.approx(0, abs=1e-12)
        assert result.block_converged == 1
        # Five layers are few enough to be curves.
        assert logger.curve("spectrum/lambda_max_net.0")[result.step] == result.lambda_max_of["net.0"]
        assert logger.curve("spectrum_details/trace_net.6")[result.step] == result.trace_of["net.6"]
    assert off <= 3  # of 15, with the same random vectors at every step
    table = pd.read_csv(tmp_path / "out" / "spectrum.csv").set_index(["step", "name"]).value
    first = tracker.results[0]
    assert table[0, "spectrum_details/trace_error_net.0"] == pytest.approx(first.trace_error_of["net.0"], rel=1e-12)
    alone = every_step(**options)
    fit(tmp_path, alone, module=Tied(), **few)
    assert [result.matvecs for result in alone.results] == [result.matvecs for result in tracker.results]


def test_many_layers_are_a_map_and_a_table_and_no_curves(tmp_path: Path) -> None:
    class Deep(SmallRegressor):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6)), nn.Linear(3, 2)).double()

    logger = TensorBoardLogger(tmp_path)
    tracker = every_step(largest=1, random_vectors=2, groups="layers", tol=0.1, save_dir=str(tmp_path / "out"))
    trainer = fit(tmp_path, tracker, module=Deep(), max_epochs=1, logger=logger, limit_train_batches=2)
    logger.experiment.flush()
    tags = EventAccumulator(logger.log_dir).Reload().Tags()
    assert "spectrum/blocks" in tags["images"]
    assert not [tag for tag in tags["scalars"] if "net." in tag]
    assert "spectrum_details/block_converged" in trainer.callback_metrics
    table = pd.read_csv(tmp_path / "out" / "spectrum.csv").set_index(["step", "name"]).value
    for result in tracker.results:
        assert len(result.lambda_max_of) == 7
        for name, value in result.lambda_max_of.items():
            assert table[result.step, f"spectrum/lambda_max_{name}"] == pytest.approx(value, rel=1e-12)
            assert table[result.step, f"spectrum_details/trace_{name}"] == pytest.approx(result.trace_of[name])
    shown = tracker.results.to_pandas()["spectrum/lambda_max_net.3"]
    assert shown.tolist() == [result.lambda_max_of["net.3"] for result in tracker.results]
    panels = tracker.plot("blocks").axes
    assert [label.get_text() for label in panels[0].get_yticklabels()] == list("0123456")


def test_a_layer_that_did_not_converge_is_told_of() -> None:
    found = TrackedSpectrum(step=0, epoch=0.0, converged=1.0, lambda_max_of={"a": 1.0}, block_converged=0.5)
    assert found.scalars()["spectrum_details/block_converged"] == 0.5
    assert not found.has_converged


def test_benettin_follows_the_leading_eigenvalues(tmp_path: Path) -> None:
    class Still(SmallRegressor):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-12)

    class OneBatch(Dense):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:  # with these learning rates it is the same to the end
                self.hessian = dense_hessian(pl_module, batch)[1]

    dense = OneBatch()
    # One batch in a single epoch, for the beginning of an epoch takes longer than a step.
    loader = DataLoader(ConcatDataset([Subset(regression_data(), range(8))] * 100), 8)
    tracker = SpectrumTracker(1, largest=3, estimator="benettin")
    trainer = fit(tmp_path, dense, tracker, module=Still(linear=True), max_epochs=1, loader=loader)
    values = torch.linalg.eigvalsh(dense.hessian).flip(0)[:3]
    for rank in range(3):
        found = float(trainer.callback_metrics[f"spectrum/lambda_{rank + 1}"])
        assert found == pytest.approx(float(values[rank]), rel=1e-3)
    assert float(trainer.callback_metrics["spectrum_details/lyapunov_exponent_1"]) == pytest.approx(1, abs=1e-3)
    first, last = tracker.results[0], tracker.results[-1]
    assert first.converged == 0
    assert first.residual > 0.01 * first.largest[0]
    assert last.residual < 1e-2 * last.largest[0]
    assert last.from_other_end == 0


def test_benettin_evolves_at_every_step_and_logs_when_it_is_due(tmp_path: Path) -> None:
    every = fit(tmp_path, SpectrumTracker(1, 2, 1, estimator="benettin")).logger
    tracker = SpectrumTracker(5, 2, 1, estimator="benettin")
    sparse = fit(tmp_path, tracker).logger
    ranks = ("_1", "_2", "_min_1")
    details = ("tracked_norm", "matvecs", "residual", "converged", "from_other_end")
    tags = {f"spectrum/lambda{rank}" for rank in ranks} | {f"spectrum_details/{name}" for name in details}
    tags |= {f"spectrum_details/{name}{rank}" for name in ("lyapunov_exponent", "paper_lambda") for rank in ranks}
    assert {tag for tag in sparse.tags if tag.startswith("spectrum")} == tags | {"spectrum_details/seconds"}
    assert [result.step for result in tracker.results] == [0, 5, 10]
    for tag in tags:
        assert sparse.curve(tag) == {step: value for step, value in every.curve(tag).items() if step in (0, 5, 10)}


def test_a_resumed_benettin_goes_on_bit_identically(tmp_path: Path) -> None:
    def tracker() -> SpectrumTracker:
        return SpectrumTracker(5, 2, 1, estimator="benettin")

    straight = fit(tmp_path, tracker(), max_epochs=4).logger
    half = fit(tmp_path, tracker(), max_epochs=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = fit(tmp_path, tracker(), max_epochs=4, ckpt_path=tmp_path / "half.ckpt").logger
    for rank in ("_1", "_2", "_min_1"):
        later = {step: value for step, value in straight.curve(f"spectrum/lambda{rank}").items() if step >= 12}
        assert list(later) == [15, 20]
        assert rest.curve(f"spectrum/lambda{rank}") == later


WITHOUT_METRICS = {"module": functools.partial(BusyModule, use_metrics=False)}
"""They take most of a run's time, and are put back in one place for all callbacks: one run with them is enough here."""


@functools.cache
def run_without(**options: Any) -> Outcome:
    """Into the second epoch, of nine batches; of three steps where they are accumulated."""
    return train(steps=12, **options)


@pytest.mark.parametrize(
    ("tracker", "options"),
    [
        pytest.param({"largest": 3, "smallest": 2}, {}, marks=pytest.mark.pictures),
        ({"largest": 2, "random_vectors": 2, "density_steps": 4, "groups": "modules"}, WITHOUT_METRICS),
        ({"largest": 1, "random_vectors": 2, "groups": "layers"}, WITHOUT_METRICS),
        ({"largest": 2, "estimator": "benettin"}, WITHOUT_METRICS),
        (
            {"largest": 2, "hessian": HessianConfig("batch", mode="eval")},
            {"precision": "bf16-mixed", **WITHOUT_METRICS},
        ),
        ({"largest": 2, "smallest": 1}, {"accumulate": 4, **WITHOUT_METRICS}),
    ],
    ids=["ends", "estimates", "layers", "benettin", "bf16", "accumulated"],
)
def test_tracker_leaves_the_run_bit_identical(tmp_path: Path, tracker: dict[str, Any], options: dict[str, Any]) -> None:
    schedule = Schedule(every_n_steps=5, first_n_steps=2)
    with_tracker = train(SpectrumTracker(schedule=schedule, save_dir=str(tmp_path), **tracker), steps=12, **options)
    assert_identical(run_without(**options), with_tracker)
    assert list(with_tracker.curve("spectrum/lambda_1")) == [0, 1, 5, 10]


def test_equal_requests_are_computed_once_with_the_products_of_the_largest_alone(
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

    fixed = replace(EVERYTHING, data="fixed")

    def callbacks() -> list[Callback]:
        return [
            CurvatureProbe(1, eigenvalue_every=1, hessian=fixed, log_prefix="a"),
            every_step(largest=6, smallest=3, tol=1e-4),
            CurvatureProbe(1, end="both", eigenvalue_every=1, hessian=fixed, log_prefix="b"),
        ]

    alone = fit(tmp_path, every_step(largest=6, smallest=3, tol=1e-4), max_epochs=1).logger
    # Each probe measures the batch of each of 6 steps, by one product, and compares 3 of them with the fixed data, by
    # one more on the operator that all share.
    expected = {"operators": counts["operators"] + 2 * 6, "products": counts["products"] + 2 * (6 + 3)}
    for order in ([0, 1, 2], [1, 0, 2], [2, 0, 1]):
        counts.update(operators=0, products=0)
        shared = [callbacks()[index] for index in order]
        logger = fit(tmp_path, *shared, max_epochs=1).logger
        assert counts == expected
        assert logger.curve("spectrum/lambda_1") == alone.curve("spectrum/lambda_1")
        for prefix in "ab":
            assert logger.curve(f"{prefix}/curvature/lambda_max") == alone.curve("spectrum/lambda_1")


def test_results_have_what_is_logged_and_survive_a_checkpoint(tmp_path: Path) -> None:
    tracker = every_step(largest=2, smallest=1, random_vectors=2, density_steps=3, groups="modules")
    trainer = fit(tmp_path, tracker, max_epochs=1)
    results = tracker.results
    assert [result.step for result in results] == list(range(6))
    assert [result.epoch for result in results] == pytest.approx([step / 6 for step in range(6)])
    for result in results:
        assert isinstance(result, TrackedSpectrum)
        for tag, value in result.scalars().items():
            assert trainer.logger.curve(tag)[result.step] == value
        assert result.tracked_norm == pytest.approx(float(torch.tensor([*result.largest, *result.smallest]).norm()))
        assert result.lambda_max_of == {"net": pytest.approx(result.largest[0], rel=1e-3)}
    assert results[0].subspace_overlap is results[0].subspace_overlap_first is None
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"][tracker.state_key]
    restored = every_step(largest=2, smallest=1, random_vectors=2, density_steps=3, groups="modules")
    restored.load_state_dict(state)
    assert restored.results == results


def test_a_plain_tracker_follows_the_logging_and_shows_six_curves(tmp_path: Path) -> None:
    logger = fit(tmp_path, SpectrumTracker(), log_every_n_steps=5).logger
    shown = {tag for tag in logger.tags if tag.startswith("spectrum/")}
    ranked = {f"spectrum/lambda_{rank}" for rank in range(1, 5)}
    assert shown == ranked | {"spectrum/gradient_in_top_subspace", "spectrum/subspace_overlap"}
    assert list(logger.curve("spectrum/lambda_1")) == [0, 5, 10]
    quality = {"residual", "converged", "matvecs", "seconds", "tracked_norm", "negative_mass", "subspace_overlap_first"}
    cosines = {f"gradient_cosine_{rank}" for rank in range(1, 5)} | {"gradient_in_random_subspace"}
    details = {tag.removeprefix("spectrum_details/") for tag in logger.tags if tag.startswith("spectrum_details/")}
    assert details == quality | cosines


def test_different_requests_are_not_shared(tmp_path: Path) -> None:
    logger = fit(tmp_path, every_step(largest=2), CurvatureProbe(1, tol=1e-6), max_epochs=1).logger
    assert logger.curve("spectrum/lambda_1")[3] != pytest.approx(logger.curve("curvature/lambda_max")[3], rel=1e-3)


def test_a_resumed_run_goes_on_bit_identically(tmp_path: Path) -> None:
    def tracker(folder: str) -> SpectrumTracker:
        layers: dict[str, Any] = {"groups": "layers", "random_vectors": 2}
        return every_step(largest=3, smallest=1, save_dir=str(tmp_path / folder), **layers)

    few = {"limit_train_batches": 3}
    straight = fit(tmp_path, tracker("straight"), max_epochs=2, **few).logger
    half = fit(tmp_path, tracker("resumed"), max_epochs=1, **few)
    half.save_checkpoint(tmp_path / "half.ckpt")
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]
    rest = fit(tmp_path, tracker("resumed"), max_epochs=2, **few, ckpt_path=tmp_path / "half.ckpt").logger
    shown = ("lambda_1", "lambda_3", "lambda_min_1", "subspace_overlap", "lambda_max_net.0")
    for tag in [*(f"spectrum/{name}" for name in shown), "spectrum_details/subspace_overlap_first"]:
        later = {step: value for step, value in straight.curve(tag).items() if step >= 3}
        assert len(later) == 3
        assert rest.curve(tag) == later
    tables = [pd.read_csv(tmp_path / folder / "spectrum.csv") for folder in ("straight", "resumed")]
    values = [table[table.name != "spectrum_details/seconds"].reset_index(drop=True) for table in tables]
    pd.testing.assert_frame_equal(*values)


def test_the_table_is_tidy_and_an_earlier_one_is_kept(tmp_path: Path) -> None:
    for _ in range(2):
        tracker = every_step(largest=2, save_dir=str(tmp_path / "out"), save_vectors=True)
        logger = fit(tmp_path, tracker, max_epochs=1).logger
    table = pd.read_csv(tmp_path / "out" / "spectrum.csv")
    assert list(table) == ["step", "epoch", "name", "value"]
    wide = table.pivot(index="step", columns="name", values="value")
    assert wide["spectrum/lambda_1"].to_dict() == pytest.approx(logger.curve("spectrum/lambda_1"), rel=1e-15)
    assert len(pd.read_csv(tmp_path / "out" / "spectrum.1.csv")) == len(table)
    saved = load_file(tmp_path / "out" / "eigenvectors-step00000003.safetensors")
    assert saved["vectors"].shape == (2, 26)
    assert saved["values"].tolist() == pytest.approx([logger.curve(f"spectrum/lambda_{i}")[3] for i in (1, 2)])


def test_tensorboard_gets_figures_and_charts(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    tracker = every_step(largest=2, smallest=1, random_vectors=2, density_steps=3)
    fit(tmp_path, tracker, CurvatureProbe(5), logger=logger)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    names = {"spectrum/eigenvalues", "spectrum/density", "spectrum/gradient_alignment"}
    assert set(events.Tags()["images"]) == {*names, "curvature/at_a_glance"}
    assert len(events.Images("spectrum/eigenvalues")) == 1  # at the end: the run is too short for more
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_a_failed_measurement_is_warned_of_and_the_run_goes_on(tmp_path: Path) -> None:
    def broken(module: Any, batch: Any) -> Tensor:
        raise RuntimeError("broken on purpose")

    tracker = every_step(largest=2, hessian=replace(EVERYTHING, loss_fn=broken))
    with pytest.warns(CurvatureWarning, match="broken on purpose"):
        trainer = fit(tmp_path, tracker, CurvatureProbe(1, log_prefix="well"))
    assert tracker.results == []
    assert trainer.global_step == 12
    assert set(trainer.logger.curve("spectrum_details/converged").values()) == {0}
    assert set(trainer.logger.curve("well/curvature_details/converged").values()) == {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"largest": -1}, "`largest` should be a non-negative int, got -1"),
        ({"largest": 0}, "`largest` and `smallest` should not both be 0"),
        ({"smallest": 1.5}, "`smallest` should be a non-negative int, got 1.5"),
        ({"random_vectors": 1}, "`random_vectors` should be 0 or at least 2"),
        ({"density_steps": 5}, "`random_vectors` should be 0 or at least 2"),
        ({"estimator": "arpack"}, "`estimator` should be one of lanczos, benettin, got 'arpack'"),
        ({"tol": 0}, "`tol` should be a positive float, got 0"),
        ({"groups": "layer"}, "`groups` should be 'layers', 'modules', the depth of the modules, or a dict"),
        ({"max_basis_vectors": 5}, "`max_basis_vectors` should be at least `largest \\+ smallest \\+ 2` = 6, got 5"),
        ({"save_vectors": True}, "`save_vectors` needs `save_dir`"),
        ({"every_n_steps": 2, "schedule": Schedule(every_n_epochs=1)}, "`schedule` should be None"),
        ({"estimator": "benettin", "groups": "layers"}, "`groups` should be left out with .*, got 'layers'"),
        ({"estimator": "benettin", "random_vectors": 3}, "`random_vectors` should be left out with .*, got 3"),
        (
            {"estimator": "benettin", "schedule": Schedule(max_overhead=0.1)},
            "no `max_overhead` with `estimator='benettin'`, which measures at every step, got 0.1",
        ),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpectrumTracker(**options)


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ({"largest": 20, "smallest": 7, "estimator": "benettin"}, r"27 eigenvalues of a model with 26 trainable"),
        ({"largest": 20, "smallest": 7}, r"27 eigenvalues of a model with 26 trainable parameters"),
        ({"groups": {"head": "head.*"}, "largest": 2}, "the group 'head' matches no trainable parameter"),
    ],
)
def test_what_the_model_cannot_give_is_refused_before_training(
    tmp_path: Path, tracker: dict[str, Any], message: str
) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, SpectrumTracker(**tracker))


def test_training_map_of_momentum_is_refused(tmp_path: Path) -> None:
    module = SmallRegressor(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    with pytest.raises(MisconfigurationException, match="no momentum"):
        fit(tmp_path, SpectrumTracker(smallest=1, estimator="benettin"), module=module)
