"""The measures for the negative-eigenvalues paper, on records whose answer is known."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.papers import negative
from examples.papers.negative import (
    POINTS,
    WINDOWS,
    LossProfiles,
    ProfileResult,
    SubsetResult,
    SubsetSpectrum,
    TutorialLeNet,
)
from examples.papers.record import Record
from lyapunov_lightning import Schedule
from lyapunov_lightning.callbacks.results.negative import NegativeResult
from lyapunov_lightning.callbacks.results.scan import ScanResult
from lyapunov_lightning.callbacks.results.spectrum import TrackedSpectrum
from lyapunov_lightning.figures.style import Picture
from lyapunov_lightning.training.results import Result

DIRECTIONS = ("1", "2", "min_1", "min_2")
CURVATURES = (20.0, 10.0, -1.0, -0.5)
FROZEN = (10, 20, 30, 40)
SLOPES = (0.4, 0.3, 0.02, 0.01)
STEPS = range(0, 80, 10)


def record(*measured: list[Any], losses: list[float] | None = None) -> Record:
    losses = [1.0] * 80 if losses is None else losses
    return Record(steps=list(range(len(losses))), losses=losses, measured=list(measured))


def spectra(largest: Callable[[int], float], smallest: Callable[[int], float]) -> Record:
    at: dict[str, Any] = {"epoch": 0.0, "converged": 1.0}
    results = [
        TrackedSpectrum(step=step, largest=(largest(step), largest(step) / 2), smallest=(smallest(step),), **at)
        for step in STEPS
    ]
    return record(results)


def frozen(top: Callable[[int], float], bottom: Callable[[int], float]) -> Record:
    """Eigenvalues 10 and about -1, and what the curvature along the vectors of some steps becomes."""
    return record(
        [
            NegativeResult(
                step=step,
                epoch=0.0,
                lambda_min=(-1.0 - 0.01 * (step % 20),),
                lambda_max=10.0,
                frozen={start: (top(step), bottom(step)) for start in FROZEN if step >= start},
            )
            for step in STEPS
        ]
    )


def profiled(loss: Callable[[Tensor, float, float], Tensor]) -> Record:
    """The loss along lines, a function of distance, slope and curvature."""
    result = ProfileResult(
        step=50,
        epoch=0.0,
        directions=DIRECTIONS,
        curvatures=CURVATURES,
        slopes=SLOPES,
        loss=2.0,
        losses=torch.zeros(len(DIRECTIONS), len(WINDOWS), POINTS, dtype=torch.float64),
    )
    losses = [
        [loss(result.distances(place, window), SLOPES[place], CURVATURES[place]) for window in range(len(WINDOWS))]
        for place in range(len(DIRECTIONS))
    ]
    return record([replace(result, losses=torch.stack([torch.stack(row) for row in losses]))])


def quadratic(t: Tensor, slope: float, curvature: float) -> Tensor:
    return 2.0 - slope * t + curvature / 2 * t**2


def quartic_where_negative(t: Tensor, slope: float, curvature: float) -> Tensor:
    return quadratic(t, slope, curvature) + (30.0 if curvature < 0 else 0.01) * t**4


def scanned(newtons: Mapping[str, float | None], improvements: Callable[[int], tuple[float | None, ...]]) -> Record:
    """Scans at four steps, with the optimal step of each direction in units of 1/|λ|."""
    units = [
        None if newtons[name] is None else newtons[name] * slope / abs(curvature)
        for name, slope, curvature in zip(DIRECTIONS, SLOPES, CURVATURES, strict=True)
    ]
    return record(
        [
            ScanResult(
                step=step,
                epoch=0.0,
                directions=DIRECTIONS,
                curvatures=CURVATURES,
                gradient_components=SLOPES,
                unit_steps=tuple(units),
                best_improvements=improvements(step),
                loss=1.0,
                noise=0.0,
            )
            for step in (0, 10, 20, 30)
        ]
    )


NEWTONS = {"1": 1.0, "2": 1.05, "min_1": 30.0, "min_2": 8.0}


def compared(factor: float, inside: float) -> Record:
    values = (20.0, 10.0, -1.0)
    return record(
        [
            SubsetResult(
                step=step,
                epoch=0.0,
                directions=("1", "2", "min_1"),
                on_subset=tuple(factor * value for value in values),
                on_all=values,
                cosines=(inside,) * 3,
                inside=(inside,) * 3,
            )
            for step in (10, 20)
        ]
    )


def test_a_constant_spectrum_changes_by_no_factor_and_a_growing_one_by_its_growth() -> None:
    calm, growing = spectra(lambda _: 5.0, lambda _: -1.0), spectra(lambda step: 2.0 ** (step / 20), lambda _: -1.0)
    found = negative.late_change({"calm": calm, "growing": growing})
    assert found == pytest.approx({"calm, λ1": 1, "calm, λ2": 1, "growing, λ1": 2, "growing, λ2": 2})


def test_shrinking_eigenvalues_count_as_growing_ones() -> None:
    found = negative.late_change({"run": spectra(lambda step: 2.0 ** (-step / 20), lambda _: -1.0)})
    assert list(found.values()) == pytest.approx([2, 2])


def test_trends_of_the_smallest_eigenvalue_differ_where_one_grows() -> None:
    calm, growing = spectra(lambda _: 5.0, lambda _: -1.0), spectra(lambda _: 5.0, lambda step: -1.0 - step)
    apart = negative.difference_of_trends({"A": calm, "B": growing}, one="A", other="B")
    assert apart["A against B"] == pytest.approx(66 / 11)  # medians at 60, 70 and at 10
    assert negative.difference_of_trends({"A": calm, "B": calm}, one="A", other="B") == {"A against B": 1}


def test_a_smallest_eigenvalue_that_is_positive_has_no_trend() -> None:
    positive = spectra(lambda _: 5.0, lambda _: 1.0)
    assert negative.difference_of_trends({"A": positive, "B": positive}, one="A", other="B") == {"A against B": None}


def test_frozen_directions_that_keep_their_curvature() -> None:
    runs = {"run": frozen(lambda _: 9.0, lambda step: -1.0 - 0.01 * (step % 20))}
    assert list(negative.kept_at_top(runs).values()) == pytest.approx([0.9] * 4)
    assert list(negative.positive_share(runs).values()) == [0] * 4
    assert list(negative.variation(runs).values()) == pytest.approx([1] * 4)


def test_frozen_directions_that_wander() -> None:
    runs = {"run": frozen(lambda _: 1.0, lambda step: 3.0 if step % 20 else -3.0)}
    assert list(negative.kept_at_top(runs).values()) == pytest.approx([0.1] * 4)
    assert list(negative.positive_share(runs).values()) == pytest.approx([1 / 2, 3 / 5, 1 / 2, 2 / 3])
    assert min(negative.variation(runs).values()) > 10


def test_a_direction_that_was_frozen_at_the_end_is_not_decided() -> None:
    only = record([NegativeResult(step=0, epoch=0.0, lambda_min=(-1.0,), lambda_max=1.0, frozen={0: (1.0, -1.0)})])
    assert negative.kept_at_top({"run": only}) == {"run, t₀ = 0": None}


@pytest.mark.parametrize("units", negative.UNITS)
@pytest.mark.parametrize("scale", negative.SCALES)
def test_a_quadratic_has_no_gap_to_its_model(units: negative.Units, scale: float) -> None:
    for direction in DIRECTIONS:
        found = negative.model_gap({"run": profiled(quadratic)}, direction=direction, units=units, scale=scale)
        assert found["run"] == pytest.approx(0, abs=1e-9)


def test_a_quartic_breaks_the_model_at_the_large_scale() -> None:
    runs = {"run": profiled(quartic_where_negative)}
    wide = negative.model_gap(runs, direction="min_1", units="norm", scale=1.0)["run"]
    assert wide == pytest.approx(30 / 0.52)  # of slope 0.02 and half of the curvature 1
    assert negative.model_gap(runs, direction="1", units="norm", scale=1.0)["run"] < 0.01
    assert negative.model_gap(runs, direction="min_1", units="gradient", scale=1.0)["run"] < 0.05


def test_fits_lie_above_the_eigenvalues_where_the_loss_bends_up() -> None:
    runs = {"run": profiled(quartic_where_negative)}
    assert set(negative.above_line(runs, units="norm").values()) == {1.0}
    excess = negative.excess_at_bottom(runs, units="norm")
    assert set(excess) == {"run, scale 0.1", "run, scale 1"}
    assert min(excess.values()) > 100


def test_fits_lie_below_where_it_bends_down() -> None:
    runs = {"run": profiled(lambda t, slope, curvature: quadratic(t, slope, curvature) - t**4)}
    assert set(negative.above_line(runs, units="gradient").values()) == {0.0}
    assert max(negative.excess_at_bottom(runs, units="norm").values()) < 0


def test_a_window_without_finite_losses_says_nothing() -> None:
    runs = {"run": profiled(lambda t, slope, curvature: torch.full_like(t, torch.inf))}
    assert set(negative.above_line(runs, units="norm").values()) == {None}
    assert set(negative.excess_at_bottom(runs, units="norm").values()) == {None}
    assert negative.model_gap(runs, direction="1", units="norm", scale=1.0) == {"run": None}


def test_optimal_steps_are_told_in_units_of_the_inverse_curvature() -> None:
    runs = {"run": scanned(NEWTONS, lambda _: (0.1,) * 4)}
    top, bottom = (negative.steps_in_newtons(runs, end=end) for end in ("top", "bottom"))
    assert len(top) == len(bottom) == 8
    assert top["run, step 0, 2"] == pytest.approx(1.05)
    assert bottom["run, step 30, min_1"] == pytest.approx(30)


def test_a_minimum_that_was_not_found_is_not_known() -> None:
    runs = {"run": scanned({**NEWTONS, "min_1": None}, lambda _: (0.1, 0.1, None, 0.1))}
    assert negative.steps_in_newtons(runs, end="bottom")["run, step 0, min_1"] is None


def test_steps_of_one_over_the_eigenvalue_are_correlated_with_it() -> None:
    quadratics = scanned(dict.fromkeys(DIRECTIONS, 1.0), lambda _: (0.1,) * 4)
    assert negative.correlation_at_bottom({"run": quadratics}) == {"run": pytest.approx(1)}
    # Here 1/α* = |λ|/newtons is 1/30 for 1 and 1/16 for 0.5: the other way round, which is a correlation as well.
    assert negative.correlation_at_bottom({"run": scanned(NEWTONS, lambda _: (0.1,) * 4)}) == {"run": pytest.approx(1)}


def test_improvements_by_end_and_over_time() -> None:
    fading = scanned(NEWTONS, lambda step: (0.1 / (1 + step), 0.1 / (1 + step), 0.4, 0.4))
    runs = {"run": fading}
    by_step = negative.improvement_at_bottom(runs)
    assert by_step["run, step 0"] == pytest.approx(4)
    assert by_step["run, step 30"] == pytest.approx(124)
    assert negative.later_improvement(runs, end="top")["run"] < 0.1
    assert negative.later_improvement(runs, end="bottom") == {"run": pytest.approx(1)}


def test_improvements_that_are_not_known_decide_nothing() -> None:
    runs = {"run": scanned(NEWTONS, lambda _: (0.1, 0.1, None, None))}
    assert set(negative.improvement_at_bottom(runs).values()) == {None}
    assert negative.later_improvement(runs, end="bottom") == {"run": None}


def test_eigenpairs_on_a_part_of_the_data() -> None:
    runs = {"run": compared(factor=1.2, inside=0.9)}
    assert negative.subset_values(runs, end="top") == pytest.approx(
        dict.fromkeys(["run, step 10, 1", "run, step 10, 2", "run, step 20, 1", "run, step 20, 2"], 1.2)
    )
    assert negative.subset_overlap(runs, end="bottom") == pytest.approx({"run, step 10": 0.9, "run, step 20": 0.9})


def test_the_running_estimate_is_held_against_the_exact_value_after_the_first_tenth() -> None:
    results = [
        NegativeResult(step=step, epoch=0.0, lambda_min=(-1.0,), online_lambda_min=-1.0 + (0.1 if step else 5.0))
        for step in STEPS
    ]
    assert negative.estimate_error({"run": record(results)}, run="run") == {"run": pytest.approx(0.1)}


def test_moves_that_lower_the_loss() -> None:
    runs = {"plain": record(losses=[1.0] * 10), "moves": record(losses=[1.0] * 5 + [0.5] * 5)}
    assert negative.loss_with_moves(runs, run="moves", without="plain") == {"moves over plain": 0.5}
    lost = {"plain": record(losses=[1.0] * 10), "moves": record(losses=[1.0] * 9 + [float("nan")])}
    assert negative.loss_with_moves(lost, run="moves", without="plain") == {"moves over plain": None}


@pytest.mark.parametrize(
    ("measure", "options"),
    [
        ("late_change", {}),
        ("difference_of_trends", {"one": "run", "other": "run"}),
        ("kept_at_top", {}),
        ("positive_share", {}),
        ("variation", {}),
        ("model_gap", {"direction": "1", "units": "norm", "scale": 1.0}),
        ("above_line", {"units": "norm"}),
        ("excess_at_bottom", {"units": "norm"}),
        ("steps_in_newtons", {"end": "top"}),
        ("correlation_at_bottom", {}),
        ("improvement_at_bottom", {}),
        ("later_improvement", {"end": "top"}),
        ("subset_values", {"end": "top"}),
        ("subset_overlap", {"end": "top"}),
        ("estimate_error", {"run": "run"}),
    ],
)
def test_a_run_without_measurements_decides_nothing(measure: str, options: dict[str, Any]) -> None:
    found = getattr(negative, measure)({"run": record()}, **options)
    assert found
    assert set(found.values()) == {None}


@pytest.mark.parametrize(
    ("draw", "runs"),
    [
        ("eigenvalues", {"A": [spectra(lambda _: 5.0, lambda _: -1.0)] * 2, "B": [spectra(lambda _: 5.0, abs)] * 2}),
        ("frozen_directions", {"run": [frozen(lambda _: 9.0, lambda _: -1.0)] * 2}),
        ("profiles", {"run": [profiled(quartic_where_negative)] * 2}),
        ("fits", {"run": [profiled(quartic_where_negative)] * 2}),
        ("optimal_steps", {"run": [scanned({**NEWTONS, "min_1": None}, lambda _: (0.1, 0.1, None, 0.1))] * 2}),
        ("improvements", {"run": [scanned(NEWTONS, lambda _: (0.1, 0.2, None, 0.4))] * 2}),
        ("subset", {"run": [compared(factor=1.2, inside=0.9)] * 2}),
        (
            "descent",
            {"run": [record([NegativeResult(step=1, epoch=0.0, online_lambda_min=-1.0)])]},
        ),
    ],
)
def test_pictures_can_be_drawn(draw: str, runs: dict[str, list[Record]]) -> None:
    picture = getattr(negative, draw)(runs)
    assert isinstance(picture, Picture)
    picture.canvas.draw()


def test_the_network_has_as_many_parameters_as_the_paper_says() -> None:
    assert sum(parameter.numel() for parameter in TutorialLeNet().parameters()) == 3_274_634
    assert TutorialLeNet(width=2, in_channels=3, image_size=16)(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


class _Quadratic(nn.Module):
    """Logits of a linear model: its loss is convex in the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)


def fit(callback: Any) -> list[Result]:
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader, TensorDataset

    from examples.models import Classifier

    class Data(pl.LightningDataModule):
        def setup(self, stage: str) -> None:
            generator = torch.Generator().manual_seed(0)
            inputs = torch.randn(64, 4, generator=generator, dtype=torch.float64)
            self.train_set = TensorDataset(inputs, torch.randint(3, (64,), generator=generator))

        def train_dataloader(self) -> DataLoader:
            return DataLoader(self.train_set, 8)

    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        precision="64-true",
        max_steps=3,
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(_Quadratic(), num_classes=3), datamodule=Data())
    return callback.results


@pytest.mark.filterwarnings("ignore:.*no logger")
def test_profiles_are_those_of_the_quadratic_model_nearby() -> None:
    (result,) = fit(LossProfiles(Schedule(at_steps=[2]), largest=2, smallest=1))
    assert result.directions == ("1", "2", "min_1")
    near = WINDOWS.index(("gradient", 0.1))
    assert torch.allclose(result.losses[0, near], result.model(0, near), atol=1e-5)
    middle = POINTS // 2
    assert torch.allclose(result.losses[:, :, middle], torch.tensor(result.loss, dtype=torch.float64))
    assert (result.losses[:2, near, middle + 1] < result.losses[:2, near, middle - 1]).all()  # downhill


@pytest.mark.filterwarnings("ignore:.*no logger")
def test_all_of_the_data_as_a_part_of_itself_has_the_same_eigenpairs() -> None:
    from lyapunov_lightning import HessianConfig

    whole = HessianConfig(fraction=1.0)
    (result,) = fit(SubsetSpectrum(Schedule(at_steps=[2]), largest=2, smallest=1, tol=1e-6, hessian=whole))
    assert result.on_subset[:2] == pytest.approx(result.on_all[:2])
    assert result.cosines[:2] == pytest.approx((1, 1), abs=1e-4)
    assert result.inside[:2] == pytest.approx((1, 1), abs=1e-4)
