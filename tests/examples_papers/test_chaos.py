"""The measures of the chaos-theory paper on made-up records whose answers are known."""

import math
from collections.abc import Sequence

import pytest

from examples.papers import chaos
from examples.papers.record import Record
from lyapunov_lightning.callbacks.results.learning_rate import LearningRateResult
from lyapunov_lightning.callbacks.results.probe import ProbeResult
from lyapunov_lightning.callbacks.results.spectrum import TrackedSpectrum
from lyapunov_lightning.figures.style import Picture

RATES = [0.1] * 50 + [0.2] * 50


def probed(inverse_h0: Sequence[float], rates: Sequence[float] = RATES) -> list[ProbeResult]:
    """What Algorithm 1 found at each step."""
    return [
        ProbeResult(step=step, epoch=0.0, inverse_h0=value, learning_rate=rate, exponent=1.0)
        for step, (value, rate) in enumerate(zip(inverse_h0, rates, strict=True))
    ]


def record(measured: list, losses: Sequence[float] = (1.0,) * 100, rates: Sequence[float] = RATES) -> Record:
    """A run of a hundred steps."""
    return Record(steps=list(range(100)), losses=list(losses), learning_rates=list(rates), measured=measured)


def test_inverse_h0_counts_over_the_rate_in_the_second_half() -> None:
    followed = record([probed([0.3 * rate for rate in RATES])])
    late = record([probed([7.0] * 50 + [0.2] * 50)])
    controlled = record([[LearningRateResult(step=0, epoch=0.0, learning_rate=0.1)]])
    found = chaos.inverse_h0_over_rate({"followed": followed, "late": late, "controlled": controlled})
    assert found == {"followed": pytest.approx(0.3), "late": pytest.approx(1.0)}


def test_edge_is_that_of_converged_exact_values() -> None:
    def exact(sharpness: float, converged: bool) -> list[ProbeResult]:
        return [
            ProbeResult(
                step=step,
                epoch=0.0,
                lambda_max=sharpness,
                decisive_eigenvalue=sharpness,
                stability_limit=20.0,
                converged=converged,
                learning_rate=0.1,
            )
            for step in range(0, 100, 20)
        ]

    found = chaos.at_edge(
        {
            "at": record([probed(RATES), exact(20.0, True)]),
            "below": record([probed(RATES), exact(5.0, True)]),
            "unknown": record([probed(RATES), exact(5.0, False)]),
        }
    )
    assert found == {"at": 1.0, "below": 0.25, "unknown": None}


def test_ratio_between_rates_pairs_runs_by_their_names() -> None:
    runs = {
        "MLP, α = 0.1": record([probed([0.1] * 100)]),
        "MLP, α = 0.3": record([probed([0.27] * 100)]),
        "MLP, cyclic": record([probed([5.0] * 100)]),
    }
    assert chaos.ratio_between_rates(runs, low="α = 0.1", high="α = 0.3") == {"MLP, α = 0.3": pytest.approx(2.7)}


def test_correlation_and_levels_under_a_wave_of_rates() -> None:
    wave = [0.01 + 0.29 * abs(math.sin(step / 7)) for step in range(100)]
    follows = record([probed([max(rate, 0.1) for rate in wave], wave)])
    constant_but_noisy = record([probed([0.1 + 0.001 * (step * 37 % 11) for step in range(100)], wave)])
    runs = {"follows": follows, "does not": constant_but_noisy}
    correlation = chaos.correlation_with_rate(runs, first_step_share=0.25)
    assert correlation["follows"] > 0.9
    assert abs(correlation["does not"]) < 0.3
    assert chaos.inverse_h0_where_rate_is(runs, "high", 0.25)["follows"] == pytest.approx(1.0)
    assert chaos.inverse_h0_where_rate_is(runs, "low", 0.25)["follows"] > 1.5


def test_losses_and_rates_of_a_controlled_run() -> None:
    falls = record([], losses=[1.0 / (1 + step) for step in range(100)], rates=[1.0] * 50 + [0.5] * 50)
    rises = record([], losses=[1.0] * 50 + [2.0] * 20 + [1.0] * 30, rates=[0.5] * 50 + [1.0] * 50)
    lost = record([], losses=[1.0] * 60 + [math.nan] * 40)
    runs = {"falls": falls, "rises": rises, "lost": lost}
    at_end = chaos.loss_at_end(runs)
    assert at_end["falls"] < 0.1
    assert at_end["rises"] == 1.0
    assert at_end["lost"] == math.inf
    largest = chaos.largest_rise(runs)
    assert largest["falls"] < 1
    assert largest["rises"] == 2.0
    assert largest["lost"] == math.inf
    assert chaos.rate_at_end({"falls": falls, "rises": rises}) == {"falls": 0.5, "rises": 2.0}


def test_averages_of_spectra() -> None:
    evolved = [TrackedSpectrum(step=step, epoch=0.0, largest=(9.0, 5.0)) for step in range(4)]
    exact = [
        TrackedSpectrum(step=step, epoch=0.0, largest=values) for step, values in ((0, (8.0, 1.0)), (2, (12.0, 3.0)))
    ]
    run = {"run": record([evolved, exact])}
    assert chaos.shallowness(run) == {"run": pytest.approx(0.2)}
    assert chaos.benettin_over_exact(run) == {"run": pytest.approx(0.9)}
    assert chaos.shallowness({"run": record([])}) == {"run": None}
    assert isinstance(chaos.leading_eigenvalues({"run": [run["run"]] * 2}), Picture)


def test_spread_over_lengths_is_of_the_medians() -> None:
    values = (0.2, 0.21, 0.22, 0.2, 0.3)
    run = record([*(probed([9.0] * 50 + [value] * 50) for value in values), probed([0.2] * 100)])
    assert chaos.spread_over_lengths({"run": run}) == {"run": pytest.approx(1.5)}
    assert isinstance(chaos.lengths({"run": [run, run]}), Picture)


def test_formula_is_held_against_the_exact_value_of_the_same_step() -> None:
    followed = [
        ProbeResult(step=step, epoch=0.0, paper_lambda_min=-float(step), lambda_min=-1.1 * step, residual=residual)
        for step, residual in ((10, 1.0), (20, 1.0), (60, 59.0), (80, 2.0))
    ]
    exact = [
        ProbeResult(step=step, epoch=0.0, lambda_min=value, converged=step != 20)
        for step, value in ((10, -20.0), (20, -1.0), (60, -1.0), (80, -160.0))
    ]
    run = record([followed, exact])
    assert chaos.formula_over_exact({"a run": run, "other": run}, of="run") == {"a run": pytest.approx(0.5)}
    assert chaos.formula_over_exact({"run": record([followed])}, of="run") == {"run": None}
    assert isinstance(chaos.smallest_eigenvalues({"run": [run, run]}), Picture)


def test_curves_are_drawn_of_measured_and_of_controlled_runs() -> None:
    controlled = [
        LearningRateResult(step=s, epoch=0.0, learning_rate=0.1, inverse_h0=0.1, exponent=1.0) for s in range(100)
    ]
    runs = {"measured": [record([probed(RATES)])] * 2, "controlled": [record([controlled])] * 2}
    assert isinstance(chaos.training_curves(runs, columns=2), Picture)
