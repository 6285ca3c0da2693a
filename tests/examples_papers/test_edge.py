"""The measures of the edge of stochastic stability on made-up records whose answers are known."""

from collections.abc import Sequence

import pytest

from examples.papers import edge
from examples.papers.edge import BatchesResult
from examples.papers.record import Record
from lyapunov_lightning.callbacks.results.probe import ProbeResult
from lyapunov_lightning.curvature.solvers.lyapunov import H0_CONVENTION
from lyapunov_lightning.figures.style import Picture
from lyapunov_lightning.training.results import Result

STEPS = range(0, 100, 10)


def on_all(values: Sequence[float], converged: bool = True) -> list[Result]:
    return [
        ProbeResult(step=step, epoch=0.0, lambda_max=value, converged=converged)
        for step, value in zip(STEPS, values, strict=True)
    ]


def on_batch(eigenvalues: Sequence[float | None]) -> list[Result]:
    return [
        ProbeResult(step=step, epoch=0.0, lambda_max=eigenvalue, stability_limit=40.0, converged=True)
        for step, eigenvalue in zip(STEPS, eigenvalues, strict=True)
    ]


def along_gradients(sharpness: Sequence[float]) -> list[Result]:
    """Of two batches, one with a gradient three times as steep."""
    return [
        BatchesResult(step=step, epoch=0.0, slopes=(1.0, 3.0), curvatures=(0.0, 4.0 * value))
        for step, value in zip(STEPS, sharpness, strict=True)
    ]


def followed(eigenvalue: float) -> list[Result]:
    return [
        ProbeResult(step=step, epoch=0.0, inverse_h0=H0_CONVENTION / eigenvalue, exponent=1.0, converged=True)
        for step in STEPS
    ]


def record(*measured: list[Result], rate: float = 0.1) -> Record:
    """A run of a hundred steps."""
    return Record(steps=list(range(100)), losses=[1.0] * 100, learning_rates=[rate] * 100, measured=list(measured))


RUN = record(
    on_all([2.0] * 5 + [10.0] * 5),
    on_batch([None, 50.0] * 5),
    along_gradients([4.0] * 5 + [20.0] * 5),
    followed(12.0),
)


def test_each_curvature_counts_over_its_edge_in_the_second_half() -> None:
    runs = {"run": RUN}
    assert edge.over_edge(runs, "all", {"run": 2.0}) == {"run": pytest.approx(0.5)}
    assert edge.over_edge(runs, "sharpness", {"run": 0.2}) == {"run": pytest.approx(10.0)}
    assert edge.over_edge(runs, "batch", {"run": 2.0}) == {"run": pytest.approx(2.5)}
    assert edge.over_edge(runs, "algorithm", {"run": 2.0}) == {"run": pytest.approx(0.6)}
    assert edge.at_measured_edge(runs, ["run"]) == {"run": pytest.approx(0.5)}


def test_the_papers_number_is_in_its_own_convention() -> None:
    """With 1/h0 = (e − 1)/λ_max, an eigenvalue at 2/α is a 1/h0 at 0.86 α."""
    at_edge = record(on_all([20.0] * 10), on_batch([20.0] * 10), along_gradients([20.0] * 10), followed(20.0))
    assert edge.inverse_h0_over_rate({"run": at_edge}, ["run"]) == {"run": pytest.approx(H0_CONVENTION / 2)}


def test_growth_and_ratios() -> None:
    twice = record(on_all([20.0] * 10), on_batch([20.0] * 10), along_gradients([20.0] * 10), rate=0.2)
    runs = {"run": RUN, "twice": twice}
    assert edge.growth(runs, "sharpness", ["run", "twice"]) == {"run": pytest.approx(5.0), "twice": pytest.approx(1.0)}
    assert edge.ratios(runs, "all", [("run", "twice")]) == {"run / twice": pytest.approx(0.25)}
    assert edge.one_over_another(runs, "algorithm", "all", ["run"]) == {"run": pytest.approx(1.2)}


def test_what_was_not_measured_or_has_not_converged_is_not_known() -> None:
    runs = {"run": record(on_all([20.0] * 10, converged=False)), "other": RUN}
    assert edge.over_edge(runs, "all", {"run": 2.0}) == {"run": None}
    assert edge.inverse_h0_over_rate(runs, ["run"]) == {"run": None}
    assert edge.growth(runs, "sharpness", ["run"]) == {"run": None}
    assert edge.ratios(runs, "all", [("run", "other"), ("other", "run")]) == {"run / other": None, "other / run": None}
    assert edge.one_over_another(runs, "algorithm", "all", ["run"]) == {"run": None}


def test_courses_are_drawn() -> None:
    runs = {"with momentum": [RUN, RUN], "without": [RUN, RUN]}
    edges = {"with momentum": {"small batches": 0.2, "large batches": 3.8}}
    picture = edge.courses(runs, columns=2, edges=edges)
    assert isinstance(picture, Picture)
