"""Measures, drawings and callbacks for "Negative eigenvalues of the Hessian in deep neural networks"."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from typing_extensions import override

from examples.papers.common import median, one_key, running_mean, with_strength
from examples.papers.record import Record
from examples.papers.verdicts import Numbers
from lyapunov_lightning.callbacks.results.negative import NegativeResult
from lyapunov_lightning.callbacks.results.scan import ScanResult
from lyapunov_lightning.callbacks.results.spectrum import TrackedSpectrum
from lyapunov_lightning.curvature import HessianOperator, lanczos, quadratic_fit
from lyapunov_lightning.figures.style import (
    BLUE,
    GREY,
    IN_TIME,
    INK,
    OCHRE,
    RED,
    TEAL,
    Picture,
    colour_bar,
    curve,
    key,
    new_picture,
    shades,
    subscript,
)
from lyapunov_lightning.figures.ticks import fitting_axis, linear_axis, log_axis, symlog_axis
from lyapunov_lightning.training.callback import CurvatureCallback
from lyapunov_lightning.training.config import HessianConfig
from lyapunov_lightning.training.results import Result
from lyapunov_lightning.training.schedule import Schedule
from lyapunov_lightning.training.sharing import EigenRequest, Step

End = Literal["top", "bottom"]
Units = Literal["gradient", "norm"]

SCALES = (0.1, 1.0)
"""The windows of figs. 3 and 4."""

UNITS: tuple[Units, ...] = ("gradient", "norm")
"""What these are multiples of: the gradient's component along the vector as in eq. (1), or the vector itself."""

WINDOWS = [(units, scale) for units in UNITS for scale in SCALES]

POINTS = 11
"""Losses in a window."""


# The network, and what no callback of the package measures


class TutorialLeNet(nn.Sequential):
    """LeNet as in TensorFlow's tutorial of 2016: two convolutions that keep the size, two fully connected layers.

    The paper gives only the number of parameters, about 3.3 million: this one has 3,274,634 on MNIST.

    Args:
        width: Filters of the first convolution; twice as many in the second, and 32 times as many hidden units.
        in_channels: Channels of the images.
        image_size: Their height and width.
        num_classes: Number of outputs.
    """

    def __init__(self, width: int = 32, in_channels: int = 1, image_size: int = 28, num_classes: int = 10) -> None:
        super().__init__(
            nn.Conv2d(in_channels, width, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * (image_size // 4) ** 2, 32 * width),
            nn.ReLU(),
            nn.Linear(32 * width, num_classes),
        )


@dataclass(frozen=True, kw_only=True)
class ProfileResult(Result):
    """The loss along eigenvectors, the largest eigenvalue's first, then those of the lower end from the smallest on.

    Attributes:
        directions: Their names: ``1`` ... for the upper end, ``min_1`` ... for the lower end.
        curvatures: The eigenvalues.
        slopes: The modulus of the gradient's component along each.
        loss: The loss where the lines begin.
        losses: Shape ``(directions, windows, points)``: the loss in each of the `WINDOWS`, evenly spaced from one end
            to the other; on the second half of the points one goes in the direction in which it falls at first.
    """

    directions: tuple[str, ...]
    curvatures: tuple[float, ...]
    slopes: tuple[float, ...]
    loss: float
    losses: Tensor

    @override
    def scalars(self) -> dict[str, float]:
        return {}

    def distances(self, direction: int, window: int) -> Tensor:
        """Where in parameter space the losses are."""
        units, scale = WINDOWS[window]
        width = scale * (self.slopes[direction] if units == "gradient" else 1.0)
        return torch.linspace(-width, width, self.losses.shape[-1], dtype=torch.float64)

    def model(self, direction: int, window: int) -> Tensor:
        """The quadratic with the slope and the curvature of the loss at distance 0."""
        where = self.distances(direction, window)
        return self.loss - self.slopes[direction] * where + self.curvatures[direction] / 2 * where.square()


class LossProfiles(CurvatureCallback):
    """Keeps the loss along eigenvectors in all `WINDOWS`, to draw it and to fit quadratics."""

    group = "profiles"
    result_class = ProfileResult

    def __init__(
        self,
        schedule: Schedule | None = None,
        largest: int = 1,
        smallest: int = 1,
        tol: float = 1e-3,
        hessian: HessianConfig = HessianConfig(),
    ) -> None:
        request = EigenRequest(largest, smallest, tol)
        super().__init__(None, schedule, hessian, None, request=request, arguments={})

    @override
    def measure(self, hessian: HessianOperator, step: Step) -> ProfileResult:
        pairs = self.shared.eigenpairs(step, self)
        components = pairs.vectors @ hessian.gradient()
        slopes = components.abs().tolist()
        steps = torch.linspace(-1, 1, POINTS, dtype=torch.float64)
        losses = []
        for vector, component, slope in zip(pairs.vectors, components.tolist(), slopes, strict=True):
            downhill = -1.0 if component > 0 else 1.0
            widths = [scale * (slope if units == "gradient" else 1.0) for units, scale in WINDOWS]
            distances = torch.cat([downhill * width * steps for width in widths])
            losses.append(hessian.values_along(vector, distances.tolist()).view(len(WINDOWS), POINTS).cpu())
        return ProfileResult(
            step=step.index,
            epoch=step.epoch,
            directions=_names(len(pairs.largest), len(pairs.smallest)),
            curvatures=tuple(pairs.values.tolist()),
            slopes=tuple(slopes),
            loss=hessian.value(),
            losses=torch.stack(losses),
        )


@dataclass(frozen=True, kw_only=True)
class SubsetResult(Result):
    """The eigenpairs on a part of the training data beside those on all of them.

    Attributes:
        directions: Their names: ``1`` ... for the upper end, ``min_1`` ... for the lower end.
        on_subset, on_all: The eigenvalues.
        cosines: The modulus of the cosine between the two eigenvectors of each rank.
        inside: How much of the squared norm of each eigenvector of the part lies in the span of that end's eigenvectors
            on all data.
    """

    directions: tuple[str, ...]
    on_subset: tuple[float, ...]
    on_all: tuple[float, ...]
    cosines: tuple[float, ...]
    inside: tuple[float, ...]

    @override
    def scalars(self) -> dict[str, float]:
        return {}


class SubsetSpectrum(CurvatureCallback):
    """Compares eigenpairs on the fixed data, 5 % of the training set by default, with those on all of it."""

    group = "subset"
    result_class = SubsetResult

    def __init__(
        self,
        schedule: Schedule | None = None,
        largest: int = 10,
        smallest: int = 10,
        tol: float = 1e-2,
        hessian: HessianConfig = HessianConfig(),
    ) -> None:
        self._tol = tol
        request = EigenRequest(largest, smallest, tol)
        super().__init__(None, schedule, hessian, None, request=request, arguments={})

    @override
    def measure(self, hessian: HessianOperator, step: Step) -> SubsetResult:
        part, network = self.shared.eigenpairs(step, self), step.pl_module
        top, bottom = len(part.largest), len(part.smallest)
        whole = lanczos(
            HessianOperator(
                lambda batch: functional.cross_entropy(network(batch[0]), batch[1]),
                network.parameters(),
                [[tensor.to(network.device) for tensor in batch] for batch in _in_order(step.trainer)],
            ),
            largest=top,
            smallest=bottom,
            tol=self._tol,
            start=part.start,
        )
        inside = []
        for place in (slice(0, top), slice(top, None)):
            inside += (part.vectors[place] @ whole.vectors[place].T).square().sum(dim=1).tolist()
        return SubsetResult(
            step=step.index,
            epoch=step.epoch,
            directions=_names(top, bottom),
            on_subset=tuple(part.values.tolist()),
            on_all=tuple(whole.values.tolist()),
            cosines=tuple((part.vectors * whole.vectors).sum(dim=1).abs().tolist()),
            inside=tuple(inside),
        )


def _in_order(trainer: Any) -> DataLoader:
    return DataLoader(trainer.datamodule.train_set, 500)


def _names(largest: int, smallest: int) -> tuple[str, ...]:
    return (*map(str, range(1, largest + 1)), *(f"min_{rank}" for rank in range(1, smallest + 1)))


# Measures


def late_change(runs: Mapping[str, Record]) -> Numbers:
    """By how much the median of each of the largest eigenvalues differs between the last two quarters, as a factor."""
    found: Numbers = {}
    for name, record in runs.items():
        _, _, third, last = (_matrix(part, "largest") for part in _quarters(record))
        for rank in range(max(third.shape[1], last.shape[1])):
            label = f"{name}, λ{rank + 1}"
            found[label] = _factor(median(third[:, rank]), median(last[:, rank])) if len(third) * len(last) else None
    return found or dict.fromkeys(runs)


def difference_of_trends(runs: Mapping[str, Record], one: str, other: str) -> Numbers:
    """How much more the most negative eigenvalue changes over the training in one run than in the other."""
    changes = []
    for name in (one, other):
        first, _, _, last = (_matrix([r for r in part if r.step], "smallest") for part in _quarters(runs[name]))
        ends = [median(-part[:, 0]) if len(part) else None for part in (first, last)]
        changes.append(ends[1] / ends[0] if all(ends) and min(ends) > 0 else None)  # type: ignore[operator, type-var]
    return {f"{one} against {other}": _factor(*changes)}


def kept_at_top(runs: Mapping[str, Record]) -> Numbers:
    """The curvature along the top eigenvector of a step over the top eigenvalue, median of the later steps."""
    return _of_frozen(runs, lambda ends, along: median(along[:, 0] / ends[:, 0]))


def positive_share(runs: Mapping[str, Record]) -> Numbers:
    """At which share of the later steps the curvature along the bottom eigenvector of a step is positive."""
    return _of_frozen(runs, lambda ends, along: float((along[:, 1] > 0).mean()))


def variation(runs: Mapping[str, Record]) -> Numbers:
    """How much more the curvature along the bottom eigenvector of a step varies later than the smallest eigenvalue."""
    return _of_frozen(runs, lambda ends, along: float(along[:, 1].std() / ends[:, 1].std()))


def model_gap(runs: Mapping[str, Record], direction: str, units: Units, scale: float) -> Numbers:
    """How far the loss lies from its quadratic model in a window, over the largest change that the model promises."""
    found: Numbers = dict.fromkeys(runs)
    window = WINDOWS.index((units, scale))
    for name, record in runs.items():
        first = next(iter(record.results(ProfileResult)), None)
        if first is not None:
            place = first.directions.index(direction)
            model = first.model(place, window)
            gap = (first.losses[place, window] - model).abs().max() / (model - first.loss).abs().max()
            found[name] = _finite(gap)
    return found


def above_line(runs: Mapping[str, Record], units: Units) -> Numbers:
    """The share of the directions along which a fitted quadratic has more curvature than the eigenvalue."""
    return _of_fits(runs, units, lambda values, fits: float((fits > values).mean()))


def excess_at_bottom(runs: Mapping[str, Record], units: Units) -> Numbers:
    """By how much fitted curvatures exceed negative eigenvalues, over the same at the upper end, both as medians."""
    excess = _of_fits(runs, units, lambda values, fits: float(np.median((fits - values) / abs(values))))
    found: Numbers = {}
    for name, bottom in excess.items():
        if name.endswith("bottom"):
            top = excess[name.removesuffix("bottom") + "top"]
            found[name.removesuffix(", bottom")] = None if bottom is None or not top else bottom / abs(top)
    return found


def steps_in_newtons(runs: Mapping[str, Record], end: End) -> Numbers:
    """The optimal step as a multiple of ``1/|λ|``; None where no minimum was found."""
    found: Numbers = {}
    for name, record in runs.items():
        for result in record.results(ScanResult):
            for place in _places(result, end):
                step = result.optimal_steps[place]
                label = f"{name}, step {result.step}, {result.directions[place]}"
                found[label] = None if step is None else step * abs(result.curvatures[place])
    return found or dict.fromkeys(runs)


def correlation_at_bottom(runs: Mapping[str, Record]) -> Numbers:
    """The modulus of the rank correlation of ``1/α*`` with ``|λ|`` over all directions of negative curvature."""
    from scipy.stats import spearmanr

    found: Numbers = {}
    for name, record in runs.items():
        points = [
            (abs(result.curvatures[place]), 1 / step)
            for result in record.results(ScanResult)
            for place in _places(result, "bottom")
            if (step := result.optimal_steps[place])
        ]
        found[name] = _finite(abs(spearmanr(*zip(*points, strict=True)).statistic)) if len(points) > 4 else None
    return found


def improvement_at_bottom(runs: Mapping[str, Record]) -> Numbers:
    """The median improvement along directions of negative curvature over that along positive ones, for each step."""
    found: Numbers = {}
    for name, record in runs.items():
        for result in record.results(ScanResult):
            top, bottom = (median(_improvements([result], end)) for end in ("top", "bottom"))
            found[f"{name}, step {result.step}"] = None if bottom is None or not top else bottom / top
    return found or dict.fromkeys(runs)


def later_improvement(runs: Mapping[str, Record], end: End) -> Numbers:
    """The median improvement in the second half of the scans over that in the first half."""
    found: Numbers = {}
    for name, record in runs.items():
        results = record.results(ScanResult)
        half = len(results) // 2
        early, late = (median(_improvements(part, end)) for part in (results[:half], results[half:]))
        found[name] = None if late is None or not early else late / early
    return found


def subset_values(runs: Mapping[str, Record], end: End) -> Numbers:
    """The eigenvalues on the part of the data over those on all of them, by rank."""
    return {
        f"{name}, step {result.step}, {result.directions[place]}": result.on_subset[place] / result.on_all[place]
        for name, result in _compared(runs)
        for place in _at(result.directions, end)
    } or dict.fromkeys(runs)


def subset_overlap(runs: Mapping[str, Record], end: End) -> Numbers:
    """The mean squared cosine of the angles between the eigenvectors' spans on the part of the data and on all."""
    return {
        f"{name}, step {result.step}": float(np.mean([result.inside[place] for place in _at(result.directions, end)]))
        for name, result in _compared(runs)
    } or dict.fromkeys(runs)


def estimate_error(runs: Mapping[str, Record], run: str) -> Numbers:
    """The median relative error of the running estimate, without the first tenth of the steps."""
    record = runs[run]
    first = len(record.steps) / 10
    errors = [r.online_error for r in record.results(NegativeResult) if r.step >= first and r.online_error is not None]
    return {run: median(errors)}


def loss_with_moves(runs: Mapping[str, Record], run: str, without: str) -> Numbers:
    """The mean training loss of the second half of the steps, over that of the run without moves."""
    late = [np.mean(runs[name].losses[len(runs[name].losses) // 2 :]) for name in (run, without)]
    return {f"{run} over {without}": _finite(late[0] / late[1])}


# Drawings


def eigenvalues(runs: Mapping[str, Sequence[Record]]) -> Picture:
    """Fig. 1: both ends of the spectrum and the loss, a panel for each data set."""
    picture, panels = _grid(1, len(runs), 3.4, sharey=True)
    for panel, (name, records) in zip(panels, runs.items(), strict=True):
        for record, strength in with_strength(records):
            results = record.results(TrackedSpectrum)
            steps, top, bottom = [r.step for r in results], _matrix(results, "largest"), _matrix(results, "smallest")
            smooth = running_mean(record.losses)
            dots = {"color": INK, "linestyle": ":", "linewidth": 1.1, "alpha": strength}
            curve(panel, record.steps[: len(smooth)], smooth, label="training loss", **dots)
            colours = shades(top.shape[1], "viridis")
            for rank in reversed(range(top.shape[1])):
                label = "λ₁" if rank == 0 else f"… λ{subscript(top.shape[1])}" if rank == top.shape[1] - 1 else None
                style = {"color": colours[rank], "linewidth": 1.0, "alpha": strength}
                curve(panel, steps, np.where(top[:, rank] > 0, top[:, rank], np.nan), label=label, **style)
            lowest = np.where(bottom[:, 0] < 0, -bottom[:, 0], np.nan)
            curve(panel, steps, lowest, color=RED, alpha=strength, label="|λₙ|, the most negative")
        log_axis(panel, "y")
        panel.set_title(name)
        panel.set_xlabel("step")
    panels[0].set_ylabel("eigenvalue")
    one_key(picture, panels[0])
    return picture


def frozen_directions(runs: Mapping[str, Sequence[Record]]) -> Picture:
    """Fig. 2: the curvature along eigenvectors of some steps, the bottom one of the second of these steps."""
    picture, panels = _grid(2, 2, 5.4, sharex=True)
    records = next(iter(runs.values()))
    for record, strength in with_strength(records):
        results = record.results(NegativeResult)
        frozen = sorted({step for result in results for step in result.frozen})
        chosen = [*[(step, 0) for step in frozen if step != frozen[1]][:3], (frozen[1], 1)]
        for panel, (start, end) in zip(panels[4 - len(chosen) :], chosen, strict=True):
            steps = [result.step for result in results]
            values = [result.lambda_min[0] if end else result.lambda_max for result in results]
            name = "λₙ(t)" if end else "λ₁(t)"
            curve(panel, steps, values, color=INK, linestyle="--", linewidth=1.0, alpha=strength, label=name)
            later = [(result.step, result.frozen[start][end]) for result in results if start in result.frozen]
            curve(panel, *zip(*later, strict=True), color=BLUE, alpha=strength, label="along the vector of t₀")
            panel.axvline(start, color=OCHRE, linewidth=1.0, label="t₀")
            panel.set_title(f"{'bottom' if end else 'top'} eigenvector of step {start}")
    for panel in panels:
        linear_axis(panel, "y")
        linear_axis(panel, "x", whole=True)
    panels[3].axhline(0, color=GREY, linewidth=0.8, linestyle=":")
    one_key(picture, panels[0], panels[3])
    for panel in panels[2:]:
        panel.set_xlabel("step t")
    for panel in panels[::2]:
        panel.set_ylabel("vᵀH(t)v")
    return picture


def profiles(runs: Mapping[str, Sequence[Record]]) -> Picture:
    """Fig. 3: loss and model along both ends' first eigenvectors, at both scales in both units."""
    picture, panels = _grid(4, 2, 8.6)
    record = next(iter(runs.values()))[0]
    result = record.results(ProfileResult)[0]
    rows = [(units, name) for units in UNITS for name in ("1", "min_1")]
    places = [(name, (units, scale)) for units, name in rows for scale in SCALES]
    for panel, (name, (units, scale)) in zip(panels, places, strict=True):
        direction, window = result.directions.index(name), WINDOWS.index((units, scale))
        alpha = np.linspace(-scale, scale, result.losses.shape[-1])
        curve(panel, alpha, result.losses[direction, window], color=OCHRE, label="loss", linewidth=1.8)
        curve(panel, alpha, result.model(direction, window), color=BLUE, linestyle="--", label="quadratic model")
        vector = "v₁" if name == "1" else "vₙ"
        panel.set_title(f"along {vector}, λ = {result.curvatures[direction]:.3g}".replace("-", "−"))
        factor = f"α[gᵀ{vector}]" if units == "gradient" else "α"
        panel.set_xlabel(f"α, of θ − {factor}{vector}")
        linear_axis(panel, "x")
        linear_axis(panel, "y")
    for panel in panels[::2]:
        panel.set_ylabel("loss")
    one_key(picture, panels[0])
    return picture


def fits(runs: Mapping[str, Sequence[Record]]) -> Picture:
    """Fig. 4: fitted curvatures against eigenvalues, later steps lighter."""
    picture, panels = _grid(2, 2, 6.2)
    records = next(iter(runs.values()))
    for panel, (units, scale) in zip(panels, WINDOWS, strict=True):
        window, points = WINDOWS.index((units, scale)), []
        for number, record in enumerate(records):
            for result in record.results(ProfileResult):
                points += [(result.step, result.curvatures[i], y, number) for i, y in _fits(result, window)]
        _scatter(panel, points, diagonal=True)
        unit = "|α|" if units == "gradient" else "distance"
        panel.set_title(f"fitted over {unit} ≤ {scale:g}")
        panel.set_xlabel("eigenvalue λ")
    for panel in panels[::2]:
        panel.set_ylabel("curvature of the fit")
    one_key(picture, panels[0])
    _bar(picture, panels, records, ProfileResult)
    return picture


def optimal_steps(runs: Mapping[str, Sequence[Record]]) -> Picture:
    """Fig. 5: the inverse optimal step against the eigenvalue, later steps lighter."""
    return _scans(runs, lambda result: [1 / s if s else None for s in result.optimal_steps], "1 / α*", diagonal=True)


def improvements(runs: Mapping[str, Sequence[Record]]) -> Picture:
    """Fig. 6: the best improvement against the eigenvalue, later steps lighter."""
    return _scans(runs, lambda result: list(result.best_improvements), "best improvement of the loss", diagonal=False)


def subset(runs: Mapping[str, Sequence[Record]]) -> Picture:
    """Appendix B: eigenvalues on a part of the data against those on all, and how far the vectors agree."""
    picture, panels = _grid(1, 2, 3.4)
    values, vectors = panels
    records = next(iter(runs.values()))
    points = []
    for number, record in enumerate(records):
        for result in record.results(SubsetResult):
            points += [(result.step, *pair, number) for pair in zip(result.on_all, result.on_subset, strict=True)]
            colour = IN_TIME(0.0 if result is record.results(SubsetResult)[0] else 1.0)
            label = f"step {result.step}" if number == 0 else None
            places = range(len(result.directions))
            style = {"marker": "s" if number else "o", "markersize": 4, "linewidth": 0, "alpha": 0.8}
            vectors.plot(places, result.inside, color=colour, label=label, **style)
            vectors.set_xticks(list(places), [_rank(name) for name in result.directions])
    _scatter(values, points, diagonal=True)
    values.set_xlabel("eigenvalue on all images")
    values.set_ylabel("on 5 % of them")
    vectors.set_ylim(0, 1.05)
    vectors.set_xlabel("number of the eigenvector")
    vectors.set_ylabel("its part in the subspace\nof all images, cos²")
    key(values)
    key(vectors)
    return picture


def descent(runs: Mapping[str, Sequence[Record]]) -> Picture:
    """Appendix C: the running estimate beside the eigenvalue, and the training loss with and without moves."""
    picture, panels = _grid(1, 2, 3.4)
    estimate, loss = panels
    for colour, (name, records) in zip((INK, TEAL, RED), runs.items(), strict=False):
        for record, strength in with_strength(records):
            results = record.results(NegativeResult)
            exact = [result for result in results if result.lambda_min]
            if exact:
                known = [(result.step, result.online_lambda_min) for result in results]
                curve(estimate, *zip(*known, strict=True), color=OCHRE, alpha=strength, label="running estimate")
                points = {"marker": "o", "markersize": 3, "linewidth": 0, "alpha": strength}
                steps, smallest = [r.step for r in exact], [r.lambda_min[0] for r in exact]
                curve(estimate, steps, smallest, color=INK, label="smallest eigenvalue", **points)
            smooth = running_mean(record.losses)
            curve(loss, record.steps[: len(smooth)], smooth, color=colour, alpha=strength, label=name)
    log_axis(loss, "y")
    linear_axis(estimate, "y")
    for panel, label in ((estimate, "eigenvalue"), (loss, "training loss")):
        linear_axis(panel, "x", whole=True)
        panel.set_xlabel("step")
        panel.set_ylabel(label)
        handles = {handle.get_label(): handle for handle in panel.get_legend_handles_labels()[0]}
        key(panel, handles=list(handles.values()))
    return picture


# What they share


def _quarters(record: Record) -> list[list[TrackedSpectrum]]:
    """The results of each quarter of the training."""
    results = record.results(TrackedSpectrum)
    end = max(len(record.steps), 1)
    return [[r for r in results if quarter <= 4 * r.step / end < quarter + 1] for quarter in range(4)]


def _matrix(results: Sequence[TrackedSpectrum], end: Literal["largest", "smallest"]) -> np.ndarray:
    """The eigenvalues of an end, a row for each result."""
    rows = [getattr(result, end) for result in results]
    return np.array(rows, dtype=float) if rows else np.empty((0, 0))


def _of_frozen(runs: Mapping[str, Record], value: Callable[[np.ndarray, np.ndarray], float | None]) -> Numbers:
    """Something of both ends of the spectrum and the curvatures along frozen vectors at the later steps."""
    found: Numbers = {}
    for name, record in runs.items():
        results = [result for result in record.results(NegativeResult) if result.lambda_min]
        for start in sorted({step for result in results for step in result.frozen}):
            later = [result for result in results if start in result.frozen and result.step > start]
            ends = np.array([(result.lambda_max, result.lambda_min[0]) for result in later])
            along = np.array([result.frozen[start] for result in later])
            number = value(ends, along) if len(later) > 2 else None
            found[f"{name}, t₀ = {start}"] = None if number is None else _finite(number)
    return found or dict.fromkeys(runs)


def _fits(result: ProfileResult, window: int) -> Iterator[tuple[int, float]]:
    """For each direction the curvature of the fitted quadratic, where the window has a width and finite losses."""
    for place, losses in enumerate(result.losses[:, window]):
        distances = result.distances(place, window)
        if distances.any() and losses.isfinite().all():
            yield place, quadratic_fit(distances, losses).curvature


def _of_fits(runs: Mapping[str, Record], units: Units, value: Callable[[np.ndarray, np.ndarray], float]) -> Numbers:
    """Something of the eigenvalues and fitted curvatures of each window and end, over all steps."""
    found: Numbers = {}
    for name, record in runs.items():
        for scale in SCALES:
            window = WINDOWS.index((units, scale))
            points: dict[End, list[tuple[float, float]]] = {"top": [], "bottom": []}
            for result in record.results(ProfileResult):
                for place, fit in _fits(result, window):
                    end = _end(result.directions[place], result.curvatures[place])
                    if end is not None:
                        points[end].append((result.curvatures[place], fit))
            for end, pairs in points.items():
                label = f"{name}, scale {scale:g}, {end}"
                found[label] = value(*np.array(pairs).T) if pairs else None
    return found


def _end(direction: str, curvature: float) -> End | None:
    """To which end a direction belongs, if its curvature has the sign of it."""
    if direction.startswith("min_"):
        return "bottom" if curvature < 0 else None
    return "top" if curvature > 0 else None


def _at(directions: Sequence[str], end: End) -> list[int]:
    return [place for place, name in enumerate(directions) if name.startswith("min_") == (end == "bottom")]


def _places(result: ScanResult, end: End) -> list[int]:
    named = zip(result.directions, result.curvatures, strict=True)
    return [place for place, (name, curvature) in enumerate(named) if _end(name, curvature) == end]


def _improvements(results: Sequence[ScanResult], end: End) -> list[float]:
    """The known improvements along the directions of an end."""
    return [
        improvement
        for result in results
        for place in _places(result, end)
        if (improvement := result.best_improvements[place]) is not None
    ]


def _compared(runs: Mapping[str, Record]) -> list[tuple[str, SubsetResult]]:
    return [(name, result) for name, record in runs.items() for result in record.results(SubsetResult)]


def _rank(direction: str) -> str:
    """1, 2 ... and n, n−1 ... for the smallest of n eigenvalues."""
    number = int(direction.removeprefix("min_"))
    return str(number) if not direction.startswith("min_") else "n" if number == 1 else f"n−{number - 1}"


def _factor(one: float | None, other: float | None) -> float | None:
    """The ratio of two positive numbers, the larger one first."""
    return max(one / other, other / one) if one and other and min(one, other) > 0 else None


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(float(value)) else None


def _grid(rows: int, columns: int, height: float, **options: Any) -> tuple[Picture, list[Axes]]:
    picture = new_picture(7.6, height)
    return picture, picture.subplots(rows, columns, squeeze=False, **options).ravel().tolist()


def _scatter(panel: Axes, points: Sequence[tuple[float, float, float, int]], *, diagonal: bool) -> None:
    """Points (step, x, y, number of the seed), coloured by step; the first seed as discs, others as squares."""
    table = np.array(points, dtype=float).reshape(-1, 4)
    table = table[np.isfinite(table).all(axis=1)]
    low, high = (table[:, 0].min(), table[:, 0].max()) if len(table) else (0.0, 1.0)
    for number, marker in ((0, "o"), (1, "s")):
        step, x, y, _ = table[np.minimum(table[:, 3], 1) == number].T
        style = {"cmap": IN_TIME, "vmin": low, "vmax": high, "linewidths": 0, "alpha": 0.8, "zorder": 3}
        panel.scatter(x, y, c=step, s=16, marker=marker, **style)
    if not diagonal:
        fitting_axis(panel, "x", table[:, 1])
        fitting_axis(panel, "y", table[:, 2])
    elif len(table):  # both axes alike, so that the line is straight
        for axis in ("x", "y"):
            symlog_axis(panel, axis, float(np.abs(table[:, 1]).min()))
        ends = [table[:, 1].min(), table[:, 1].max()]
        panel.plot(ends, ends, color=INK, linewidth=1.0, linestyle="--", zorder=1, label="y = x")


def _scans(
    runs: Mapping[str, Sequence[Record]],
    values: Callable[[ScanResult], Sequence[float | None]],
    label: str,
    *,
    diagonal: bool,
) -> Picture:
    """Something of each direction against its eigenvalue: the negative eigenvalues, and all."""
    picture, panels = _grid(1, 2, 3.6)
    records = next(iter(runs.values()))
    points = [
        (result.step, x, np.nan if y is None else y, number)
        for number, record in enumerate(records)
        for result in record.results(ScanResult)
        for x, y in zip(result.curvatures, values(result), strict=True)
    ]
    _scatter(panels[0], [point for point in points if point[1] < 0], diagonal=False)
    _scatter(panels[1], points, diagonal=diagonal)
    for panel, title in zip(panels, ("negative eigenvalues", "all eigenvalues"), strict=True):
        panel.set_title(title)
        panel.set_xlabel("eigenvalue λ")
    panels[0].set_ylabel(label)
    if diagonal:
        one_key(picture, panels[1])
    _bar(picture, panels, records, ScanResult)
    return picture


def _bar(picture: Picture, panels: Sequence[Axes], records: Sequence[Record], kind: type[Result]) -> None:
    """The key of the colours."""
    steps = [result.step for record in records for result in record.results(kind)]
    if steps and min(steps) < max(steps):
        colour_bar(picture, panels, min(steps), max(steps), "step", whole=True)
