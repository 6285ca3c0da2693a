"""Measures and drawings for "A chaos theory approach to understand neural network optimization"."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes

from examples.papers.common import median, one_key, with_strength
from examples.papers.record import Record
from examples.papers.verdicts import Numbers
from lyapunov_lightning.callbacks.results.learning_rate import LearningRateResult
from lyapunov_lightning.callbacks.results.probe import ProbeResult
from lyapunov_lightning.callbacks.results.spectrum import TrackedSpectrum
from lyapunov_lightning.curvature.solvers.lyapunov import H0_CONVENTION
from lyapunov_lightning.figures.style import BLUE, INK, OCHRE, RED, TEAL, Picture, curve, new_picture

ALGORITHM_1, EXACT = 0, 1
"""The probes of the part ``exponents``, in this order."""


# Measures


def inverse_h0_over_rate(runs: Mapping[str, Record]) -> Numbers:
    """The median of ``(1/h0)/α`` over the second half of each run, but not where the learning rate is set from it."""
    return {name: median(_ratios(_late(record))) for name, record in runs.items() if record.results(ProbeResult)}


def at_edge(runs: Mapping[str, Record]) -> Numbers:
    """For each run the median of the exact sharpness over the stability limit in the second half."""
    found: Numbers = {}
    for name, record in runs.items():
        late = _late(record, EXACT)
        found[name] = median([r.stability_ratio for r in late if r.converged and r.stability_ratio is not None])
    return found


def ratio_between_rates(runs: Mapping[str, Record], low: str, high: str) -> Numbers:
    """The median of ``1/h0`` in each run with `high` in its name over that in the run with `low` there instead."""
    found: Numbers = {}
    for name, record in runs.items():
        if high in name:
            above = median([r.inverse_h0 for r in _late(record) if r.inverse_h0])
            below = median([r.inverse_h0 for r in _late(runs[name.replace(high, low)]) if r.inverse_h0])
            found[name] = None if above is None or below is None else above / below
    return found


def correlation_with_rate(runs: Mapping[str, Record], first_step_share: float) -> Numbers:
    """Rank correlation of ``1/h0`` and ``α``, without the first steps."""
    from scipy.stats import spearmanr

    found: Numbers = {}
    for name, record in runs.items():
        late = [r for r in _late(record, share=first_step_share) if r.inverse_h0]
        pairs = np.array([[r.inverse_h0, r.learning_rate] for r in late])
        found[name] = float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic) if len(pairs) > 2 else None
    return found


def inverse_h0_where_rate_is(
    runs: Mapping[str, Record], rates: Literal["low", "high"], first_step_share: float
) -> Numbers:
    """The median of ``(1/h0)/α`` over the fifth of the steps with the lowest or the highest rates."""
    found: Numbers = {}
    for name, record in runs.items():
        late = [r for r in _late(record, share=first_step_share) if r.inverse_h0]
        late.sort(key=lambda result: result.learning_rate or 0.0, reverse=rates == "high")
        found[name] = median(_ratios(late[: len(late) // 5]))
    return found


def loss_at_end(runs: Mapping[str, Record]) -> Numbers:
    """The median loss of the last tenth of the steps over that of the first tenth; infinite where it was lost."""
    found: Numbers = {}
    for name, record in runs.items():
        tenths = _parts(record.losses, 10)
        last = float(np.median(tenths[-1]))
        found[name] = last / float(np.median(tenths[0])) if np.isfinite(last) else np.inf
    return found


def largest_rise(runs: Mapping[str, Record]) -> Numbers:
    """The most by which the mean loss of a tenth of the steps exceeds the lowest one before it, as a ratio."""
    found: Numbers = {}
    for name, record in runs.items():
        means = np.array([part.mean() for part in _parts(record.losses, 10)])
        rises = means[1:] / np.minimum.accumulate(means)[:-1]
        found[name] = float(rises.max()) if np.isfinite(means).all() else np.inf
    return found


def rate_at_end(runs: Mapping[str, Record]) -> Numbers:
    """The median learning rate of the last fifth of the steps over that of the first fifth."""
    found: Numbers = {}
    for name, record in runs.items():
        fifths = _parts(record.learning_rates, 5)
        found[name] = float(np.median(fifths[-1]) / np.median(fifths[0]))
    return found


def shallowness(runs: Mapping[str, Record]) -> Numbers:
    """The last of the exact eigenvalues over the first, each averaged over the training."""
    found: Numbers = {}
    for name, record in runs.items():
        averages = _averages(record.results(TrackedSpectrum, EXACT))
        found[name] = None if averages is None else float(averages[-1] / averages[0])
    return found


def benettin_over_exact(runs: Mapping[str, Record]) -> Numbers:
    """The largest eigenvalue that the perturbations find over the exact one, each averaged over the training."""
    found: Numbers = {}
    for name, record in runs.items():
        evolved, exact = (_averages(record.results(TrackedSpectrum, index)) for index in (ALGORITHM_1, EXACT))
        found[name] = None if evolved is None or exact is None else float(evolved[0] / exact[0])
    return found


def spread_over_lengths(runs: Mapping[str, Record]) -> Numbers:
    """The largest over the smallest median of ``1/h0`` in the second half, among perturbations of all lengths."""
    found: Numbers = {}
    for name, record in runs.items():
        medians = [value for value in _by_length(record).values() if value is not None]
        found[name] = max(medians) / min(medians) if medians else None
    return found


def formula_over_exact(runs: Mapping[str, Record], of: str) -> Numbers:
    """The smallest eigenvalue by the paper's formula over the exact one of the step: the median over all steps.

    Of the runs with `of` in their name.
    Steps at which the perturbation is no eigenvector, by its residual, say nothing about the formula.
    """
    found: Numbers = {}
    for name, record in runs.items():
        if of not in name:
            continue
        exact = {r.step: r.lambda_min for r in record.results(ProbeResult, EXACT) if r.converged and r.lambda_min}
        ratios = [
            result.paper_lambda_min / exact[result.step]
            for result in record.results(ProbeResult)
            if result.step in exact and _is_settled(result)
        ]
        found[name] = median(ratios)
    return found


# Drawings


def training_curves(runs: Mapping[str, Sequence[Record]], columns: int) -> Picture:
    """Exponent, inverse curvature, learning rate and loss of each run by step; later seeds faint."""
    picture, panels = _grid(runs, columns)
    for panel, records in zip(panels, runs.values(), strict=True):
        for record, faint in with_strength(records):
            curve(panel, record.steps, record.losses, color=TEAL, alpha=0.7 * faint, label="loss", linewidth=0.9)
            measured = record.results(ProbeResult) or record.results(LearningRateResult)
            steps = [result.step for result in measured]
            exponents = [result.exponent for result in measured]
            curve(panel, steps, exponents, color=BLUE, alpha=0.5 * faint, label="exponent λ", linewidth=0.8)
            inverse = [result.inverse_h0 for result in measured]
            curve(panel, steps, inverse, color=OCHRE, alpha=faint, label="1/h0", linewidth=1.0)
            rate = {"color": RED, "alpha": faint, "label": "learning rate α", "linewidth": 1.4}
            curve(panel, record.steps[: len(record.learning_rates)], record.learning_rates, **rate)
    for panel in panels:
        panel.set_yscale("log")
        panel.set_xlabel("step")
    one_key(picture, panels[0])
    return picture


def leading_eigenvalues(runs: Mapping[str, Sequence[Record]]) -> Picture:
    """The eigenvalues by number, averaged over the training."""
    picture, panels = _grid(runs, 2)
    for panel, records in zip(panels, runs.values(), strict=True):
        for record, faint in with_strength(records):
            for index, name, colour in ((EXACT, "exact", INK), (ALGORITHM_1, "evolved perturbations", OCHRE)):
                averages = _averages(record.results(TrackedSpectrum, index))
                if averages is not None:
                    numbers = range(1, len(averages) + 1)
                    panel.plot(numbers, averages, "o-", color=colour, alpha=faint, markersize=3.5, label=name)
        panel.set_xlabel("number of the eigenvalue")
    panels[0].set_ylabel("average over the first epoch")
    one_key(picture, panels[0])
    return picture


def lengths(runs: Mapping[str, Sequence[Record]]) -> Picture:
    """The median of ``1/h0`` by the length of the perturbation, over that of the exact eigenvalue."""
    picture, panels = _grid(runs, 3)
    for panel, records in zip(panels, runs.values(), strict=True):
        for record, faint in with_strength(records):
            exact = median([H0_CONVENTION / r.lambda_max for r in _exact_of(record) if r.lambda_max])
            medians = _by_length(record)
            relative = [None if value is None or exact is None else value / exact for value in medians.values()]
            curve(panel, list(medians), relative, color=OCHRE, alpha=faint, marker="o", markersize=4)
        panel.axhline(1, color=INK, linewidth=0.8, linestyle=":")
        panel.set_xscale("log")
        panel.set_xlabel("length Δq")
    panels[0].set_ylabel("1/h0 over (e − 1)/λ_max")
    return picture


def smallest_eigenvalues(runs: Mapping[str, Sequence[Record]]) -> Picture:
    """The smallest eigenvalue by step: by the paper's formula, by exact inversion of the map, and by Lanczos."""
    picture, panels = _grid(runs, 3)
    for panel, records in zip(panels, runs.values(), strict=True):
        for record, faint in with_strength(records):
            followed, exact = record.results(ProbeResult), record.results(ProbeResult, EXACT)
            steps = [result.step for result in followed]
            curve(panel, steps, [r.paper_lambda_min for r in followed], color=OCHRE, alpha=faint, label="the formula")
            curve(panel, [r.step for r in exact], [r.lambda_min for r in exact], color=INK, alpha=faint, label="exact")
        panel.set_xlabel("step")
    panels[0].set_ylabel("smallest eigenvalue")
    one_key(picture, panels[0])
    return picture


# What they share


def _late(record: Record, index: int = ALGORITHM_1, share: float = 0.5) -> list[ProbeResult]:
    """What a probe found after that share of the steps."""
    first = share * (record.steps[-1] + 1) if record.steps else 0.0
    return [result for result in record.results(ProbeResult, index) if result.step >= first]


def _ratios(results: Sequence[ProbeResult]) -> list[float]:
    return [r.inverse_h0 / r.learning_rate for r in results if r.inverse_h0 and r.learning_rate]


def _is_settled(result: ProbeResult) -> bool:
    """Whether the perturbation is an eigenvector of the smallest eigenvalue, roughly."""
    if result.lambda_min is None or result.paper_lambda_min is None or result.residual is None:
        return False
    return result.residual < abs(result.lambda_min) / 2


def _parts(values: Sequence[float], number: int) -> list[np.ndarray]:
    return np.array_split(np.array(values), number)


def _averages(results: Sequence[TrackedSpectrum]) -> np.ndarray | None:
    """Of the eigenvalues over the results; None if there are none."""
    measured = [result.largest for result in results if result.largest]
    return np.array(measured).mean(axis=0) if measured else None


def _by_length(record: Record) -> dict[float, float | None]:
    """For each length of perturbation, which is in the prefix of the probe, the median ``1/h0`` of the second half."""
    lengths_seen = (1e-3, 5e-3, 1e-2, 5e-2, 1e-1)
    return {
        length: median([result.inverse_h0 for result in _late(record, index) if result.inverse_h0])
        for index, length in enumerate(lengths_seen)
    }


def _exact_of(record: Record) -> list[ProbeResult]:
    """The exact probe comes after the five of `_by_length`."""
    return _late(record, 5)


def _grid(runs: Mapping[str, Any], columns: int) -> tuple[Picture, list[Axes]]:
    rows = -(-len(runs) // columns)
    picture = new_picture(8.0, 2.1 * rows + 0.3)
    panels: list[Axes] = picture.subplots(rows, columns, squeeze=False).ravel().tolist()
    for panel in panels[len(runs) :]:
        panel.set_visible(False)
    for panel, name in zip(panels, runs, strict=False):
        panel.set_title(name)
    return picture, panels[: len(runs)]
