"""The measures for the sharpest-directions paper, on records whose answer is known."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from examples.papers import sharpest
from examples.papers.experiments import load, names
from examples.papers.record import Record
from examples.papers.sharpest import KerasCNN
from lyapunov_lightning.callbacks.results.nudge import NudgeResult
from lyapunov_lightning.callbacks.results.scan import ScanResult
from lyapunov_lightning.callbacks.results.spectrum import TrackedSpectrum
from lyapunov_lightning.figures.style import Picture
from lyapunov_lightning.training.results import Result

RISING = (1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0)
PEAKING = (1.0, 4.0, 10.0, 10.0, 10.0, 6.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0)
LOW_PEAK = (1.0, 5.0, 5.0, 5.0, 4.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0)


def spectrum(values: Sequence[float], cosines: Sequence[float] = (0.4, 0.2)) -> list[Result]:
    """Measured every ten steps, five to an epoch: λ₁ as given, and half of it as λ₂."""
    return [
        TrackedSpectrum(
            step=10 * index,
            epoch=2.0 * index,
            largest=(value, value / 2),
            cosines_largest=tuple(cosines),
            gradient_in_top_subspace=sum(cosine**2 for cosine in cosines),
            gradient_in_random_subspace=len(cosines) / 1000,
        )
        for index, value in enumerate(values)
    ]


def scans(curvatures: Sequence[float], changes: Sequence[float | None], loss: float = 2.0) -> list[Result]:
    return [
        ScanResult(
            step=10 * index,
            epoch=2.0 * index,
            directions=("1",),
            curvatures=(curvature,),
            gradient_components=(0.1,),
            unit_steps=(0.1,),
            best_improvements=(0.1,),
            sgd_steps=(0.5, 1.0, 2.0),
            expected_changes=tuple(changes),
            sgd_step=0.1,
            surface=tuple(float(k * k) for k in range(-5, 6)),
            loss=loss,
            noise=0.0,
        )
        for index, curvature in enumerate(curvatures)
    ]


def nudges(values: Sequence[float], first: int = 0) -> list[Result]:
    return [
        NudgeResult(
            step=first + 10 * i, epoch=2.0 * i, eigenvalues=(v, v / 2), residual=0.0, num_converged=2, matvecs=9
        )
        for i, v in enumerate(values)
    ]


def record(
    *measured: list[Result],
    losses: Sequence[float] = (2.0,) * 100,
    rate: float = 0.1,
    accuracies: Sequence[float] = (),
    **fields: Any,
) -> Record:
    """A run with so many losses, whose validations are spread evenly over it."""
    count = len(losses)
    validation = [
        {"step": (index + 1) * count / len(accuracies), "val/accuracy": value} for index, value in enumerate(accuracies)
    ]
    rates = fields.pop("learning_rates", [rate] * count)
    return Record(
        steps=list(range(count)),
        losses=list(losses),
        learning_rates=rates,
        validation=validation,
        measured=list(measured),
        **fields,
    )


def only(numbers: dict[str, float | None]) -> float | None:
    (number,) = numbers.values()
    return number


def test_growth_is_the_peak_over_the_first_value_and_a_lone_jump_is_no_peak() -> None:
    assert sharpest.growth({"a": record(spectrum(PEAKING))}, ranks=[1, 2]) == {"a, λ₁": 10.0, "a, λ₂": 10.0}
    assert only(sharpest.growth({"a": record(spectrum((2.0, 2.0, 90.0, 2.0, 2.0)))})) == 1.0
    assert only(sharpest.growth({"a": record()})) is None
    assert only(sharpest.growth({"a": record(spectrum(PEAKING))}, ranks=[3])) is None


def test_decline_is_known_once_the_peak_is_over() -> None:
    assert only(sharpest.decline({"a": record(spectrum(PEAKING))})) == 0.5
    assert only(sharpest.decline({"a": record(spectrum(RISING))})) is None


def test_alternation_tells_ups_and_downs_from_growth() -> None:
    assert only(sharpest.alternation({"a": record(spectrum((1.0, 9.0, 8.0, 9.0, 8.0, 9.0, 8.0)))})) == 1.0
    assert only(sharpest.alternation({"a": record(spectrum((*RISING, 20.0, 22.0)))})) == 0.0
    assert only(sharpest.alternation({"a": record(spectrum((1.0, 2.0)))})) is None


def test_rate_times_peak_is_known_once_the_peak_is_over() -> None:
    assert only(sharpest.rate_times_peak({"a": record(spectrum(PEAKING))})) == pytest.approx(1.0)
    assert only(sharpest.rate_times_peak({"a": record(spectrum(RISING))})) is None


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (PEAKING, LOW_PEAK, 2.0),
        (LOW_PEAK, PEAKING, 0.5),
        (RISING, PEAKING, 1.6),  # a higher peak may come, which would change nothing
        (PEAKING, RISING, 0.625),
        (RISING[:4], PEAKING, None),  # here it would
        (PEAKING, RISING[:4], None),
        ((), PEAKING, None),
    ],
)
def test_peak_ratios_are_left_open_where_a_peak_to_come_decides(
    first: Sequence[float], second: Sequence[float], expected: float | None
) -> None:
    runs = {"first": record(spectrum(first)), "second": record(spectrum(second))}
    assert only(sharpest.peak_ratios(runs, [("first", "second")])) == expected


def test_peak_times_are_compared_in_epochs() -> None:
    runs = {"late": record(spectrum(PEAKING)), "early": record(spectrum(LOW_PEAK)), "open": record(spectrum(RISING))}
    assert only(sharpest.peak_time_ratios(runs, [("late", "early")])) == 2.0
    assert only(sharpest.peak_time_ratios(runs, [("open", "late")])) > 1  # type: ignore[operator]
    assert only(sharpest.peak_time_ratios({"short": record(spectrum((1.0, 2.0))), **runs}, [("short", "late")])) is None


def test_growth_after_a_drop_compares_both_stages() -> None:
    rates = [0.1] * 60 + [0.01] * 60
    short = record(spectrum([4.0] * 7 + [8.0] * 5), losses=[1.0] * 120, learning_rates=rates)
    long = record(spectrum([8.0] * 7 + [4.0] * 5), losses=[1.0] * 120, learning_rates=rates)
    runs = {"short": short, "long": long}
    assert sharpest.growth_after_drop(runs) == {"short": 2.0, "long": 0.5}
    assert only(sharpest.growth_after_drop_ratios(runs, [("short", "long")], kind="norm")) == pytest.approx(4.0)
    assert only(sharpest.growth_after_drop({"none": record(spectrum(PEAKING))})) is None


def test_rises_of_the_loss() -> None:
    stable = record(losses=[2.0, 1.5, 1.0, 0.9])
    unstable = record(losses=[2.0, 1.0, 3.0, 0.5])
    lost = record(losses=[2.0, float("nan")])
    runs = {"stable": stable, "unstable": unstable, "lost": lost}
    assert sharpest.largest_rise(runs) == {"stable": 0.0, "unstable": 2.0, "lost": np.inf}
    assert only(sharpest.rise_ratios(runs, [("unstable", "stable")], least=0.1)) > 1  # type: ignore[operator]
    assert only(sharpest.rise_ratios(runs, [("stable", "unstable")], least=0.1)) == 0.0
    assert only(sharpest.rise_ratios(runs, [("lost", "stable")], least=0.1)) == np.inf
    assert only(sharpest.rise_ratios(runs, [("stable", "stable")], least=0.1)) is None
    assert only(sharpest.rise_ratios(runs, [("lost", "lost")], least=0.1)) is None


def test_losses_and_speeds_are_compared() -> None:
    fast = record(nudges(PEAKING, first=50), losses=np.linspace(2.0, 0.5, 100).tolist())
    slow = record(nudges(PEAKING, first=50), losses=np.linspace(2.0, 1.0, 100).tolist())
    lost = record(losses=[2.0] * 99 + [float("nan")])
    runs = {"fast": fast, "slow": slow, "lost": lost}
    assert only(sharpest.loss_ratios(runs, [("fast", "slow")])) < 1  # type: ignore[operator]
    assert only(sharpest.loss_ratios(runs, [("lost", "slow")])) is None
    assert only(sharpest.speed_ratios(runs, [("fast", "slow")])) < 0.8  # type: ignore[operator]
    assert only(sharpest.speed_ratios(runs, [("slow", "fast")])) > 1  # type: ignore[operator]
    assert only(sharpest.speed_ratios(runs, [("slow", "slow")])) == 1.0
    assert only(sharpest.speed_ratios(runs, [("fast", "lost")])) is None
    assert only(sharpest.loss_since(runs, ["slow"])) < 0.7  # type: ignore[operator]
    flat = {"flat": record(nudges(PEAKING, first=50))}
    assert only(sharpest.loss_since(flat, ["flat"])) == 1.0
    assert only(sharpest.loss_since({"lost": lost}, ["lost"])) is None


def test_accuracies_are_compared_when_the_training_is_there() -> None:
    better = record(accuracies=[0.3, 0.6, 0.5, 0.9], losses=[0.05] * 100)
    worse = record(accuracies=[0.3, 0.5, 0.6, 0.8], losses=[0.5] * 100)
    runs = {"better": better, "worse": worse, "blind": record()}
    pairs = [("better", "worse")]
    assert only(sharpest.accuracy_gaps(runs, pairs)) == pytest.approx(0.1)
    assert only(sharpest.accuracy_gaps(runs, pairs, at=0.5)) == pytest.approx(0.1)
    assert only(sharpest.accuracy_gaps(runs, pairs, converged=0.1)) is None
    assert only(sharpest.accuracy_gaps(runs, pairs, converged=1.0)) == pytest.approx(0.1)
    assert only(sharpest.accuracy_gaps(runs, [("better", "blind")])) is None


def test_distances_are_compared() -> None:
    runs = {"near": record(distance=1.0), "far": record(distance=2.0), "still": record(distance=0.0)}
    assert only(sharpest.distance_ratios(runs, [("near", "far")])) == 0.5
    assert only(sharpest.distance_ratios(runs, [("near", "still")])) is None


def test_alignment_is_the_maximum_of_the_mean_cosine() -> None:
    runs = {"a": record(spectrum(PEAKING, cosines=(0.4, 0.2)))}
    assert only(sharpest.alignment(runs)) == pytest.approx(0.3)
    # A random vector in 1,000 dimensions has the cosine sqrt(2 / (1000 π)).
    assert only(sharpest.alignment(runs, over_random=True)) == pytest.approx(0.3 / np.sqrt(2 / (1000 * np.pi)))
    assert only(sharpest.alignment({"a": record()})) is None


def test_steps_along_the_sharpest_direction_are_judged_from_the_edge_on() -> None:
    # A parabola with its minimum at 0.6 of a step: changes are α² − 1.2 α.
    overshoots = record(scans((1.0, 30.0, 30.0), (0.25 - 0.6, 1.0 - 1.2, 4.0 - 2.4)))
    assert only(sharpest.best_multiples({"a": overshoots})) == pytest.approx(0.6)
    assert only(sharpest.expected_changes({"a": overshoots}, multiple=2.0)) == pytest.approx(0.8)
    assert only(sharpest.expected_changes({"a": overshoots}, multiple=4.0)) is None
    short = record(scans((30.0, 30.0), (-0.5, -1.0, -2.0)))  # straight down
    assert only(sharpest.best_multiples({"a": short})) == np.inf
    flat = record(scans((1.0, 1.0, 1.0), (-0.1, -0.2, -0.4)))  # far from the edge, 0.1 · 1 < 0.5
    assert only(sharpest.best_multiples({"a": flat})) is None
    assert only(sharpest.expected_changes({"a": flat}, multiple=2.0)) is None
    uphill = record(scans((30.0, 30.0), (0.5, 1.5, 5.0)))
    assert only(sharpest.best_multiples({"a": uphill})) == 0.0


def test_relative_height_is_that_of_the_loss_in_steps() -> None:
    # λ₂ is half of λ₁, and the step along it half as long.
    assert only(sharpest.relative_height({"a": record(spectrum(PEAKING))}, rank=2)) == pytest.approx(1 / 8)
    assert only(sharpest.relative_height({"a": record(spectrum(PEAKING))}, rank=3)) is None


def test_sharpness_is_compared_at_the_peak_and_at_the_end() -> None:
    sharp = record(nudges(PEAKING), spectrum(PEAKING), losses=[0.05] * 100)
    flat = record(nudges(LOW_PEAK), spectrum(LOW_PEAK), losses=[0.5] * 100)
    runs = {"sharp": sharp, "flat": flat, "none": record()}
    pairs = [("sharp", "flat")]
    assert only(sharpest.sharpness_ratios(runs, pairs, when="peak")) == 2.0
    assert only(sharpest.sharpness_ratios(runs, pairs)) == pytest.approx(5 / 3)
    assert only(sharpest.sharpness_ratios(runs, pairs, kind="norm")) == pytest.approx(5 / 3)
    assert only(sharpest.sharpness_ratios(runs, pairs, converged=0.1)) is None
    assert only(sharpest.sharpness_ratios(runs, [("sharp", "none")])) is None


def test_keras_cnn_has_zero_biases_and_the_shapes_of_the_paper() -> None:
    network = KerasCNN()
    assert network(torch.zeros(2, 3, 32, 32)).tolist() == torch.zeros(2, 10).tolist()
    assert [len(p) for p in network.parameters() if p.ndim == 4] == [32, 32, 64, 64]


@pytest.mark.parametrize("name", [name for name in names() if name.startswith("sharpest")])
def test_every_figure_is_drawn_and_decided_from_any_records(name: str) -> None:
    experiment = load(name, "small")
    whole = record(
        spectrum(PEAKING),
        scans((30.0,) * 6, (-0.1, 0.1, 0.5)),
        nudges(PEAKING, first=40),
        losses=np.linspace(2.0, 1.0, 120).tolist(),
        accuracies=[0.1, 0.4],
        distance=1.0,
    )
    for one in (whole, record(losses=[float("nan")] * 3)):  # what a run leaves that is lost at once
        runs = dict.fromkeys(experiment.runs, one)
        for claim in experiment.claims:
            numbers = experiment.function(claim.measure)(runs, **claim.options)
            assert numbers
            assert all(value is None or isinstance(value, float) for value in numbers.values())
        of_seeds = {name: [one, one] for name in runs}
        assert isinstance(experiment.function(experiment.draw)(of_seeds, **experiment.draw_options), Picture)
