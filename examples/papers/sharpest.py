"""Measures and drawings for "On the relation between the sharpest directions of DNN loss and the SGD step length"."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from examples.models import SimpleCNN
from examples.papers.common import running_mean
from examples.papers.record import Record
from examples.papers.verdicts import Numbers
from lyapunov_lightning.callbacks.results.nudge import NudgeResult
from lyapunov_lightning.callbacks.results.scan import ScanResult
from lyapunov_lightning.callbacks.results.spectrum import TrackedSpectrum
from lyapunov_lightning.figures.style import (
    BLUE,
    COLOURS,
    GREY,
    IN_TIME,
    INK,
    Picture,
    curve,
    key,
    new_picture,
    shades,
    subscript,
)
from lyapunov_lightning.figures.ticks import linear_axis, log_axis

Floats = NDArray[np.float64]
Pairs = Sequence[tuple[str, str]]
"""Names of runs that are compared: the number is that of the first over, or less, that of the second."""

When = Literal["peak", "end"]

_STEPS = range(-5, 6)
"""The SGD steps at which a scan looks at the loss surface."""


class KerasCNN(SimpleCNN):
    """SimpleCNN initialised as in Keras, which the paper used: uniform of Glorot and Bengio, and zero biases.

    From PyTorch's own initialisation it stands still for some hundred steps.

    Args:
        in_channels: Channels of the images.
        width: Filters of the first convolution.
        image_size: Height and width of the images.
    """

    def __init__(self, in_channels: int = 3, width: int = 32, image_size: int = 32) -> None:
        super().__init__(in_channels, width=width, image_size=image_size)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)


# Measures of the spectrum


def growth(runs: Mapping[str, Record], ranks: Sequence[int] = (1,), names: Sequence[str] | None = None) -> Numbers:
    """The peak of each eigenvalue over its first value."""
    found: Numbers = {}
    for name, record in _chosen(runs, names):
        values = _eigenvalues(record)
        for rank in ranks:
            known = len(values) > 2 and rank <= values.shape[1] and values[0, rank - 1] > 0
            ratio = float(_smooth(values[:, rank - 1]).max() / values[0, rank - 1]) if known else None
            found[f"{name}, λ{subscript(rank)}"] = ratio
    return found


def decline(runs: Mapping[str, Record], names: Sequence[str] | None = None) -> Numbers:
    """The mean of λ₁ in the last quarter of the run over its peak; not known where that is where the run ends."""
    found: Numbers = {}
    for name, record in _chosen(runs, names):
        values = _smooth(_largest(record))
        known = len(values) > 3 and not _still_grows(values)
        found[name] = float(values[-(len(values) // 4) :].mean() / values.max()) if known else None
    return found


def alternation(runs: Mapping[str, Record], names: Sequence[str] | None = None) -> Numbers:
    """How often λ₁ turns once it has grown to half its peak: 0 for monotone growth, 2/3 for independent values."""
    found: Numbers = {}
    for name, record in _chosen(runs, names):
        values = _largest(record)
        later = values[_reached(values, 0.5) :] if len(values) else values
        moves = np.sign(np.diff(later))
        found[name] = float(np.mean(moves[1:] != moves[:-1])) if len(moves) > 4 else None
    return found


def rate_times_peak(runs: Mapping[str, Record], names: Sequence[str] | None = None) -> Numbers:
    """The learning rate times the peak of λ₁; not known where λ₁ still grows when the run ends."""
    found: Numbers = {}
    for name, record in _chosen(runs, names):
        values = _smooth(_largest(record))
        is_known = len(values) > 2 and not _still_grows(values)
        found[name] = float(values.max() * max(record.learning_rates)) if is_known else None
    return found


def peak_ratios(runs: Mapping[str, Record], pairs: Pairs, rank: int = 1) -> Numbers:
    """The peak of an eigenvalue in one run over that in another.

    A run in which it still grows when the run ends bounds its peak from below, which may decide the matter, or not.
    """
    found: Numbers = {}
    for first, second in pairs:
        upper, lower = (_smooth(_eigenvalues(runs[name])[:, rank - 1 : rank].ravel()) for name in (first, second))
        found[f"{first} / {second}"] = None
        if len(upper) > 2 and len(lower) > 2 and upper.max() > 0 and lower.max() > 0:
            ratio = float(upper.max() / lower.max())
            at_least, at_most = _still_grows(upper), _still_grows(lower)
            if not ((at_least and ratio <= 1) or (at_most and ratio > 1)):
                found[f"{first} / {second}"] = ratio
    return found


def peak_time_ratios(runs: Mapping[str, Record], pairs: Pairs) -> Numbers:
    """When λ₁ comes within a tenth of its peak, in epochs, in one run over the same in another.

    The very maximum of a curve that hovers would be at an accidental time. A peak that is still to come is later than
    the end of its run.
    """
    found: Numbers = {}
    for first, second in pairs:
        times, open_ended = [], []
        for name in (first, second):
            results = runs[name].results(TrackedSpectrum)
            values = _smooth(_largest(runs[name]))
            grows = len(values) < 3 or _still_grows(values)
            open_ended.append(grows)
            times.append(results[-1 if grows else _reached(values, 0.9) + 1].epoch if results else 0.0)
        ratio = times[0] / times[1] if times[0] > 0 and times[1] > 0 else None
        if ratio is not None and ((open_ended[0] and ratio <= 1) or (open_ended[1] and ratio > 1)):
            ratio = None
        found[f"{first} / {second}"] = ratio
    return found


def growth_after_drop(
    runs: Mapping[str, Record], kind: Literal["lambda", "norm"] = "lambda", names: Sequence[str] | None = None
) -> Numbers:
    """λ₁ (or the norm) after the learning rate's drop over that before it, means of the last quarters of both."""
    found: Numbers = {}
    for name, record in _chosen(runs, names):
        rates = np.array(record.learning_rates)
        dropped = np.flatnonzero(np.diff(rates) < 0)
        found[name] = None
        if len(dropped):
            results = record.results(TrackedSpectrum)
            values = _norms(record) if kind == "norm" else _largest(record)
            steps = np.array([result.step for result in results])
            before, after = values[steps <= dropped[0] + 1], values[steps > dropped[0] + 1]
            if len(before) and len(after):
                found[name] = float(_last_quarter(after).mean() / _last_quarter(before).mean())
    return found


def growth_after_drop_ratios(
    runs: Mapping[str, Record], pairs: Pairs, kind: Literal["lambda", "norm"] = "lambda"
) -> Numbers:
    """`growth_after_drop` of one run over that of another."""
    grown = growth_after_drop(runs, kind)
    return {f"{first} / {second}": _ratio(grown[first], grown[second]) for first, second in pairs}


# Measures of the loss


def largest_rise(runs: Mapping[str, Record], names: Sequence[str] | None = None) -> Numbers:
    """How far the training loss rises above its lowest value so far, at most; without a bound where it is lost."""
    return {name: _largest_rise(record) for name, record in _chosen(runs, names)}


def rise_ratios(runs: Mapping[str, Record], pairs: Pairs, least: float) -> Numbers:
    """`largest_rise` of one run over that of another; not known where neither comes to `least`, both being stable."""
    found: Numbers = {}
    for first, second in pairs:
        rises = _largest_rise(runs[first]), _largest_rise(runs[second])
        is_known = max(rises) >= least and np.isfinite(min(rises))
        found[f"{first} / {second}"] = rises[0] / max(rises[1], 1e-9) if is_known else None
    return found


def loss_ratios(runs: Mapping[str, Record], pairs: Pairs) -> Numbers:
    """The training loss at the end of one run, the mean of its last tenth, over that of another."""
    return {f"{first} / {second}": _ratio(_end_loss(runs[first]), _end_loss(runs[second])) for first, second in pairs}


def loss_since(runs: Mapping[str, Record], names: Sequence[str]) -> Numbers:
    """The training loss at the end over that of the twenty steps before the hook's first measurement."""
    found: Numbers = {}
    for name, record in _chosen(runs, names):
        hook = record.results(NudgeResult)
        before = record.losses[max(0, hook[0].step - 20) : hook[0].step] if hook else []
        found[name] = _ratio(_end_loss(record), float(np.mean(before))) if before else None
    return found


def speed_ratios(runs: Mapping[str, Record], pairs: Pairs) -> Numbers:
    """How many steps the first run needs to the loss that the second one ends with, over how many that one needs."""
    found: Numbers = {}
    for first, second in pairs:
        one, other = (running_mean(runs[name].losses) for name in (first, second))
        found[f"{first} / {second}"] = None
        if len(one) and len(other) and np.isfinite(other).all():
            goal = other[-1]
            needed = np.flatnonzero(one <= goal)
            usual = np.flatnonzero(other <= goal)
            # Not reached at all: at least as many as there were, and one more.
            found[f"{first} / {second}"] = float(((needed[0] if len(needed) else len(one)) + 1) / (usual[0] + 1))
    return found


def accuracy_gaps(runs: Mapping[str, Record], pairs: Pairs, at: float = 1.0, converged: float | None = None) -> Numbers:
    """The validation accuracy of one run less that of another.

    Args:
        runs: The records.
        pairs: Which of them.
        at: At which share of the training.
        converged: The training loss that both have to reach at the end; above it there is no final accuracy yet.

    """
    found: Numbers = {}
    for first, second in pairs:
        values = [_accuracy(runs[name], at) for name in (first, second)]
        too_early = converged is not None and any(
            not (_end_loss(runs[name]) or np.inf) <= converged for name in (first, second)
        )
        gap = None if None in values or too_early else values[0] - values[1]  # type: ignore[operator]
        found[f"{first} − {second}"] = gap
    return found


def distance_ratios(runs: Mapping[str, Record], pairs: Pairs) -> Numbers:
    """The distance from the initial parameters at the end of one run over that of another."""
    return {f"{first} / {second}": _ratio(runs[first].distance, runs[second].distance) for first, second in pairs}


# Measures of SGD's step


def alignment(runs: Mapping[str, Record], over_random: bool = False, names: Sequence[str] | None = None) -> Numbers:
    """The maximum over the training of the gradient's mean absolute cosine with the tracked directions.

    Args:
        runs: The records.
        over_random: Whether to divide by the cosine of a random vector, ``sqrt(2 / (π n))`` in n dimensions.
        names: Of which of them; all if not given.

    """
    found: Numbers = {}
    for name, record in _chosen(runs, names):
        results = [result for result in record.results(TrackedSpectrum) if result.cosines_largest]
        cosines = [float(np.mean(result.cosines_largest)) for result in results]
        best = max(cosines, default=None)
        found[name] = None if best is None else best / (_random_cosine(results[0]) if over_random else 1.0)
    return found


def expected_changes(
    runs: Mapping[str, Record], multiple: float, edge: float = 0.5, names: Sequence[str] | None = None
) -> Numbers:
    """The mean change of the loss by a multiple of SGD's steps along the sharpest direction, over the loss.

    The mean is over the scans from that on at which ηλ₁ has come to `edge`; it is not known where it never does, as
    there the steps are still short in comparison with the curvature.
    """
    found: Numbers = {}
    for name, record in _chosen(runs, names):
        changes = [_change(scan, multiple) for scan in _scans_at_edge(record, edge)]
        known = [
            change / scan.loss
            for change, scan in zip(changes, _scans_at_edge(record, edge), strict=True)
            if change is not None
        ]
        found[name] = float(np.mean(known)) if len(known) > 1 else None
    return found


def best_multiples(runs: Mapping[str, Record], edge: float = 0.5, names: Sequence[str] | None = None) -> Numbers:
    """How many of SGD's steps along the sharpest direction would on average lower the loss most; below 1 it oversteps.

    It is the minimum of the parabola through the mean changes by half a step and a whole one, 0 where the parabola does
    not fall at all, and the median over the scans from that on at which ηλ₁ has come to `edge`.
    """
    found: Numbers = {}
    for name, record in _chosen(runs, names):
        best = []
        for scan in _scans_at_edge(record, edge):
            half, whole = _change(scan, 0.5), _change(scan, 1.0)
            if half is None or whole is None:
                continue
            curvature, slope = 2 * whole - 4 * half, 4 * half - whole
            best.append(np.inf if curvature <= 0 else max(0.0, -slope / (2 * curvature)))
        found[name] = float(np.median(best)) if len(best) > 1 else None
    return found


def relative_height(runs: Mapping[str, Record], rank: int, names: Sequence[str] | None = None) -> Numbers:
    """How steep the loss is in units of SGD's steps along an eigenvector, over how steep it is along the first one.

    By k steps of length s the loss rises by ``λ (k s)² / 2``, so it is ``λᵢ sᵢ²`` that counts, and the mean step along
    a direction is in proportion to the mini-batch gradients' cosine with it.
    """
    found: Numbers = {}
    for name, record in _chosen(runs, names):
        ratios = [
            result.largest[rank - 1]
            * result.cosines_largest[rank - 1] ** 2
            / (result.largest[0] * result.cosines_largest[0] ** 2)
            for result in record.results(TrackedSpectrum)
            if len(result.cosines_largest) >= rank and result.cosines_largest[0] > 0 and result.largest[0] > 0
        ]
        found[name] = float(np.median(ratios)) if ratios else None
    return found


# Measures of Nudged-SGD


def sharpness_ratios(
    runs: Mapping[str, Record],
    pairs: Pairs,
    when: When = "end",
    kind: Literal["lambda", "norm"] = "lambda",
    converged: float | None = None,
) -> Numbers:
    """How sharp it is where one run goes over how sharp it is where another does.

    Args:
        runs: The records.
        pairs: Which of them.
        when: At the peak, or at the end, the mean over the last quarter of the measurements.
        kind: λ₁, or the Frobenius norm of all eigenvalues that were measured.
        converged: The training loss that both have to reach at the end; above it there is no final region yet.

    """
    found: Numbers = {}
    for first, second in pairs:
        values = []
        for name in (first, second):
            series = _sharpness(runs[name], kind)
            if len(series) and np.isfinite(series).all():
                values.append(float(series.max() if when == "peak" else _last_quarter(series).mean()))
            else:
                values.append(None)
            if converged is not None and not (_end_loss(runs[name]) or np.inf) <= converged:
                values[-1] = None
        found[f"{first} / {second}"] = _ratio(*values)
    return found


# Drawings


def eigenvalues(
    runs: Mapping[str, Sequence[Record]], first_epochs: float | None = None, below: str = "accuracy"
) -> Picture:
    """All tracked eigenvalues of each run by epoch, and the accuracy below; a column for each run.

    Args:
        runs: The records.
        first_epochs: If given, a second row of panels shows these alone.
        below: What the lowest row shows: ``"accuracy"`` of validation and training, or ``"loss"``.

    """
    rows = 2 if first_epochs is None else 3
    picture = new_picture(max(7.0, 3.4 * len(runs)), 2.2 * rows)
    panels = picture.subplots(rows, len(runs), squeeze=False)
    for column, (name, records) in zip(panels.T, runs.items(), strict=True):
        column[0].set_title(name)
        for panel, until in zip(column[:-1], (None, first_epochs), strict=False):
            for record, options in _faint(records):
                results = record.results(TrackedSpectrum)
                shown = [result for result in results if until is None or result.epoch <= until]
                values = np.array([result.largest for result in shown])
                if values.ndim == 2:
                    for values_of_rank, colour in zip(values.T, _ranks(values.shape[1]), strict=True):
                        curve(panel, [result.epoch for result in shown], values_of_rank, color=colour, **options)
            log_axis(panel, "y")
            rate = max((max(record.learning_rates, default=0.0) for record in records), default=0.0)
            if rate > 0:
                panel.axhline(2 / rate, color=INK, linewidth=0.8, linestyle=":")
        for record, options in _faint(records):
            if below == "loss":
                curve(column[-1], _epochs(record), record.losses, color=BLUE, **options)
            else:
                curve(column[-1], *_accuracies(record), color=BLUE, **options)
        column[-1].set_xlabel("epoch")
    panels[0, 0].set_ylabel("eigenvalues (dotted: 2/η)")
    panels[-1, 0].set_ylabel("training loss" if below == "loss" else "validation accuracy")
    return picture


def families(
    runs: Mapping[str, Sequence[Record]], panels: Mapping[str, Mapping[str, str]], columns: int = 3
) -> Picture:
    """λ₁ (solid) and λ₂ (dashed) of several runs in one panel, by epoch; later seeds faint.

    Args:
        runs: The records.
        panels: For each panel, by its title, the names of its runs by their labels.
        columns: How many panels in a row.

    """
    rows = -(-len(panels) // columns)
    picture = new_picture(max(7.0, 2.7 * columns), 2.7 * rows)
    grid = picture.subplots(rows, columns, squeeze=False)
    for panel in grid.ravel()[len(panels) :]:
        panel.set_axis_off()
    for panel, (title, names) in zip(grid.ravel(), panels.items(), strict=False):
        for (label, name), colour in zip(names.items(), shades(len(names)), strict=True):
            for record, options in _faint(runs[name]):
                values = _eigenvalues(record)
                epochs = [result.epoch for result in record.results(TrackedSpectrum)]
                for rank, style in zip(range(min(2, values.shape[1])), ("-", "--"), strict=False):
                    named = {"label": label} if rank == 0 and "alpha" not in options else {}
                    curve(panel, epochs, values[:, rank], color=colour, linestyle=style, **named, **options)
        log_axis(panel, "y")
        panel.set_xlabel("epoch")
        panel.set_title(title, pad=36)
        key(panel, handlelength=1.2)
    for row in grid:
        row[0].set_ylabel("λ₁, λ₂ (dashed)")
    return picture


def alignments(runs: Mapping[str, Sequence[Record]], panels: Mapping[str, Mapping[str, str]]) -> Picture:
    """The mean cosine of the gradient with the sharpest directions, and of a random one, by the training loss."""
    picture = new_picture(7.0, 3.2)
    grid = picture.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (title, names) in zip(grid, panels.items(), strict=True):
        for (label, name), colour in zip(names.items(), shades(len(names)), strict=True):
            for record, options in _faint(runs[name]):
                results = [result for result in record.results(TrackedSpectrum) if result.cosines_largest]
                losses = running_mean(record.losses)
                where = [losses[min(result.step, len(losses) - 1)] for result in results]
                cosines = [float(np.mean(result.cosines_largest)) for result in results]
                named = {} if "alpha" in options else {"label": label}
                curve(panel, where, cosines, color=colour, **named, **options)
                if results and "alpha" not in options:
                    panel.axhline(_random_cosine(results[0]), color=GREY, linewidth=1.0)
        panel.invert_xaxis()
        linear_axis(panel, "x")
        panel.set_xlabel("training loss")
        panel.set_title(title, pad=36)
        key(panel, handlelength=1.2)
    grid[0].set_ylim(bottom=0.0)
    grid[0].set_ylabel("mean |cosine| with the top 5\n(grey: random vector)")
    return picture


def sgd_steps(runs: Mapping[str, Sequence[Record]], multiples: Sequence[float] = (0.5, 1.0, 2.0)) -> Picture:
    """The mean change of the loss by steps along the first direction, and the surface along it; a row for each run.

    The surface is that of the first seed.
    """
    picture = new_picture(7.5, 3.1 * len(runs))
    for row, (name, records) in enumerate(runs.items()):
        panel = picture.add_subplot(len(runs), 2, 2 * row + 1)
        for multiple, colour in zip(multiples, (COLOURS[0], COLOURS[3], COLOURS[1], COLOURS[4]), strict=False):
            for record, options in _faint(records):
                scans = record.results(ScanResult)
                changes = [_change(scan, multiple) for scan in scans]
                label = None if "alpha" in options else f"α = {multiple:g}"
                curve(panel, [scan.epoch for scan in scans], changes, color=colour, label=label, **options)
        panel.axhline(0, color=INK, linewidth=0.8, linestyle="--", zorder=1)
        panel.set_title(name, pad=22)
        panel.set_xlabel("epoch")
        panel.set_ylabel("mean change of the loss")
        key(panel)
        _surface(picture.add_subplot(len(runs), 2, 2 * row + 2, projection="3d"), records[0].results(ScanResult))
    return picture


def directions(runs: Mapping[str, Sequence[Record]], ranks: Sequence[int] = (1, 3, 4)) -> Picture:
    """The quadratic model of the loss in SGD's steps along several eigenvectors, in units of that along the first."""
    picture = new_picture(7.0, 3.2)
    panels = picture.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    steps = np.linspace(-5, 5, 101)
    for panel, (name, records) in zip(panels, runs.items(), strict=True):
        for rank, colour in zip(ranks, shades(len(ranks)), strict=True):
            for record, options in _faint(records):
                height = relative_height({name: record}, rank)[name]
                if height is not None:
                    label = None if "alpha" in options else f"e{subscript(rank)}"
                    curve(panel, steps, height * steps**2, color=colour, label=label, **options)
        linear_axis(panel, "x", whole=True)
        panel.set_xlabel("distance, SGD steps")
        panel.set_title(name, pad=22)
        key(panel)
    panels[0].set_ylabel("rise of the loss\n(1: by one step along e₁)")
    return picture


def variants(runs: Mapping[str, Sequence[Record]], since: float = 0.0) -> Picture:
    """Training loss and largest eigenvalue of several variants of SGD by epoch.

    Args:
        runs: The records.
        since: Epoch from which on they differ, marked by a line.

    """
    picture = new_picture(7.0, 3.2)
    left, right = picture.subplots(1, 2)
    for (name, records), colour in zip(runs.items(), (COLOURS[1], COLOURS[2], COLOURS[3], COLOURS[0]), strict=False):
        for record, options in _faint(records):
            label = None if "alpha" in options else name
            curve(left, _epochs(record), running_mean(record.losses), color=colour, label=label, **options)
            results = record.results(TrackedSpectrum)
            curve(right, [result.epoch for result in results], _largest(record), color=colour, **options)
    log_axis(right, "y")
    left.set_ylabel("training loss")
    right.set_ylabel("λ₁")
    for panel in (left, right):
        panel.set_xlabel("epoch")
        if since:
            panel.axvline(since, color=INK, linewidth=0.8, linestyle=":")
    key(left)
    return picture


def nudged(runs: Mapping[str, Sequence[Record]], baseline: str | None = None) -> Picture:
    """Validation accuracy, and λ_max with the Frobenius norm (dashed), of Nudged-SGD by epoch; the baseline is grey."""
    picture = new_picture(7.5, 3.3)
    left, right = picture.subplots(1, 2)
    others = [name for name in runs if name != baseline]
    colours = {**dict(zip(others, shades(len(others)), strict=True)), baseline: GREY}
    for name, records in runs.items():
        for record, options in _faint(records):
            label = None if "alpha" in options else name
            curve(left, *_accuracies(record), color=colours[name], label=label, **options)
            epochs = [result.epoch for result in record.results(NudgeResult)]
            curve(right, epochs, _sharpness(record, "lambda"), color=colours[name], **options)
            tracked = record.results(TrackedSpectrum)
            norms = _norms(record)
            curve(right, [r.epoch for r in tracked], norms, color=colours[name], linestyle="--", **options)
    log_axis(right, "y")
    left.set_ylabel("validation accuracy")
    right.set_ylabel("λ_max, ‖H‖_F (dashed)")
    for panel in (left, right):
        panel.set_xlabel("epoch")
    key(left)
    return picture


def drops(runs: Mapping[str, Sequence[Record]]) -> Picture:
    """λ₁ and the norm (dashed), validation accuracy, and learning rate by epoch, for several schedules."""
    picture = new_picture(8.0, 3.0)
    panels = picture.subplots(1, 3)
    for (name, records), colour in zip(runs.items(), shades(len(runs)), strict=True):
        for record, options in _faint(records):
            label = None if "alpha" in options else name
            epochs = [result.epoch for result in record.results(TrackedSpectrum)]
            curve(panels[0], epochs, _largest(record), color=colour, **options)
            curve(panels[0], epochs, _norms(record), color=colour, linestyle="--", **options)
            curve(panels[1], *_accuracies(record), color=colour, **options)
            curve(panels[2], _epochs(record), record.learning_rates, color=colour, label=label, **options)
    for panel, label in zip(panels, ("λ₁, norm (dashed)", "validation accuracy", "learning rate"), strict=True):
        panel.set_xlabel("epoch")
        panel.set_ylabel(label)
    log_axis(panels[0], "y")
    log_axis(panels[2], "y")
    panels[2].legend(handlelength=1.2)
    return picture


def table(runs: Mapping[str, Sequence[Record]], middle: float = 0.5) -> Picture:
    """The paper's columns as a table, a row for each seed of each run."""
    columns = {
        "‖H‖_F,\npeak / end": lambda record: _of_both(_sharpness(record, "norm")),
        "test acc.": lambda record: _percent(_accuracy(record, 1.0)),
        f"acc. at\n{middle:.0%}": lambda record: _percent(_accuracy(record, middle)),
        "loss": lambda record: _number(_end_loss(record)),
        "dist.": lambda record: _number(record.distance),
    }
    lines = sum(1 + len(records) for records in runs.values())
    picture = new_picture(7.5, 0.7 + 0.23 * lines)
    panel = picture.subplots()
    panel.set_axis_off()
    panel.set_xlim(0, 1)
    panel.set_ylim(-lines - 0.2, 2.2)
    places = [0.3, 0.52, 0.67, 0.82, 0.97]
    for place, title in zip(places, columns, strict=True):
        panel.text(place, 0.9, title, ha="right", va="bottom", linespacing=1.1)
    panel.axhline(0.6, color=INK, linewidth=0.8)
    height = 0.0
    for name, records in runs.items():
        panel.text(0.0, height, name, va="center", fontweight="bold")
        height -= 1.0
        for seed, record in enumerate(records):
            panel.text(0.0, height, f"   seed {seed}", va="center", color=GREY)
            for place, cell in zip(places, columns.values(), strict=True):
                panel.text(place, height, cell(record), ha="right", va="center")
            height -= 1.0
    return picture


# Series


def _chosen(runs: Mapping[str, Record], names: Sequence[str] | None) -> list[tuple[str, Record]]:
    """The records with these names, or all of them."""
    return [(name, runs[name]) for name in (runs if names is None else names)]


def _eigenvalues(record: Record) -> Floats:
    """Shape (measurements, eigenvalues): the tracked ones, or those that Nudged-SGD measured for itself."""
    rows = [result.largest for result in record.results(TrackedSpectrum)]
    rows = rows or [result.eigenvalues for result in record.results(NudgeResult)]
    return np.array(rows, dtype=np.float64) if rows else np.empty((0, 0))


def _largest(record: Record) -> Floats:
    values = _eigenvalues(record)
    return values[:, 0] if values.size else np.empty(0)


def _norms(record: Record) -> Floats:
    return np.linalg.norm(_eigenvalues(record), axis=1) if _eigenvalues(record).size else np.empty(0)


def _sharpness(record: Record, kind: Literal["lambda", "norm"]) -> Floats:
    """λ₁ as Nudged-SGD measures it, where it does, as that is more often; the norm of most eigenvalues."""
    if kind == "norm":
        return _norms(record)
    measured = record.results(NudgeResult)
    return np.array([result.eigenvalues[0] for result in measured]) if measured else _largest(record)


def _smooth(values: Floats) -> Floats:
    """The running median of three, without the ends: λ₁ of few samples jumps, and a lone jump is no peak."""
    if len(values) < 3:
        return values
    return np.median(np.stack([values[:-2], values[1:-1], values[2:]]), axis=0)


def _still_grows(values: Floats) -> bool:
    """Whether the peak is among the last tenth of the values, so that a higher one may have come later."""
    return int(values.argmax()) >= len(values) - max(1, len(values) // 10)


def _reached(values: Floats, share: float) -> int:
    """Where a share of the maximum is first reached."""
    return int(np.flatnonzero(values >= share * values.max())[0])


def _last_quarter(values: Floats) -> Floats:
    return values[-max(1, len(values) // 4) :]


def _largest_rise(record: Record) -> float:
    losses = np.array(record.losses)
    if not len(losses) or not np.isfinite(losses).all():
        return np.inf
    return float((losses - np.minimum.accumulate(losses)).max())


def _end_loss(record: Record) -> float | None:
    losses = record.losses[-max(1, len(record.losses) // 10) :]
    return float(np.mean(losses)) if losses and np.isfinite(losses).all() else None


def _accuracy(record: Record, at: float) -> float | None:
    """The validation accuracy at a share of the training: that of the last validation until then."""
    until = at * (record.steps[-1] + 1) if record.steps else 0
    seen = [each["val/accuracy"] for each in record.validation if each["step"] <= until and "val/accuracy" in each]
    return seen[-1] if seen else None


def _ratio(first: float | None, second: float | None) -> float | None:
    return None if first is None or not second else first / second


def _random_cosine(result: TrackedSpectrum) -> float:
    """The mean absolute cosine of a random vector with a direction."""
    assert result.gradient_in_random_subspace is not None  # where there are directions
    return float(np.sqrt(2 / np.pi * result.gradient_in_random_subspace / len(result.largest)))


def _scans_at_edge(record: Record, edge: float) -> list[ScanResult]:
    scans = record.results(ScanResult)
    rates = dict(zip(record.steps, record.learning_rates, strict=False))
    for index, scan in enumerate(scans):
        if rates.get(scan.step, 0.0) * scan.curvatures[0] >= edge:
            return scans[index:]
    return []


def _change(scan: ScanResult, multiple: float) -> float | None:
    """The expected change at a multiple of the step."""
    changes = dict(zip(scan.sgd_steps, scan.expected_changes, strict=False))
    return changes.get(multiple)


# What drawings share


def _faint(records: Sequence[Record]) -> list[tuple[Record, dict[str, Any]]]:
    """The first seed in full, later ones faint behind it."""
    return [
        (record, {"linewidth": 1.3, "zorder": 3} if index == 0 else {"linewidth": 0.8, "alpha": 0.35})
        for index, record in enumerate(records)
    ]


def _ranks(count: int) -> list[Any]:
    """From red to blue, as in the paper."""
    return list(shades(count, "coolwarm_r")) if count > 1 else [COLOURS[0]]


def _epochs(record: Record) -> Floats:
    """The epoch of every step, as the measurements tell them."""
    results = record.results(TrackedSpectrum) or record.results(ScanResult) or record.results(NudgeResult)
    known = [result for result in results if result.epoch > 0]
    rate = known[-1].epoch / known[-1].step if known else 1.0
    return np.array(record.steps[: len(record.losses)], dtype=np.float64) * rate


def _accuracies(record: Record) -> tuple[list[float], list[float]]:
    """Epochs and validation accuracies."""
    epochs = _epochs(record)
    rate = epochs[-1] / record.steps[-1] if len(epochs) > 1 else 1.0
    seen = [each for each in record.validation if "val/accuracy" in each]
    return [each["step"] * rate for each in seen], [each["val/accuracy"] for each in seen]


def _surface(panel: Any, scans: Sequence[ScanResult]) -> None:
    """The loss at so many steps along the first direction, coloured by the spectral norm."""
    known = [scan for scan in scans if len(scan.surface) == len(_STEPS) and None not in scan.surface]
    if not known:
        note_3d = "nothing was scanned"
        panel.text2D(0.5, 0.5, note_3d, transform=panel.transAxes, ha="center", color=GREY)
        return
    sharpness = np.array([scan.curvatures[0] for scan in known])
    shares = (sharpness - sharpness.min()) / max(float(np.ptp(sharpness)), 1e-12)
    for scan, share in zip(known, shares, strict=True):
        panel.plot(list(_STEPS), [scan.epoch] * len(_STEPS), list(scan.surface), color=IN_TIME(share), linewidth=1.2)
    panel.set_xlabel("steps along e₁")
    panel.set_ylabel("epoch")
    panel.set_zlabel("loss")


def _of_both(values: Floats) -> str:
    return f"{_number(values.max())} / {_number(values[-1])}" if len(values) else "–"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
