"""The sharpness of a run against the stability limit of its optimizer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lyapunov_lightning.figures.style import (
    BLUE,
    COLOURS,
    GREY,
    INK,
    OCHRE,
    RED,
    WIDTH,
    Picture,
    curve,
    floats,
    house_style,
    key,
    mark_lower_edge,
    new_picture,
    stacked,
    with_fixed_margins,
    write,
)
from lyapunov_lightning.figures.ticks import Floats, is_wide, linear_axis, log_axis, number_label

Curve = tuple[Sequence[float], Sequence[float]]
"""Steps and the values at these."""


@house_style()
def sharpness_figure(
    steps: Sequence[float],
    sharpness: Sequence[float | None],
    stability_limit: Sequence[float | None],
    *,
    batch_sharpness: Sequence[float | None] = (),
    learning_rate: Sequence[float | None] = (),
    learning_rate_limit: Sequence[float | None] = (),
    stability_ratio: Sequence[float | None] = (),
    losses: Curve | None = None,
    met_at: float | None = None,
    crossings: Sequence[float] = (),
    label: str = "sharpness",
    title: str = "",
) -> Picture:
    """The sharpness of a run against its stability limit, the learning rate against its own, and the training loss.

    What binds and lies above a limit is shaded. An axis is logarithmic where its values span more than 30 times; values
    that are None or not finite are left out, and a line goes on from one known value to the next.

    Args:
        steps: Optimizer steps of the measurements.
        sharpness: ``curvature/lambda_max`` at these.
        stability_limit: ``curvature_details/stability_limit`` at these; None where it is not known.
        batch_sharpness: ``curvature/batch_sharpness`` at these, if it was measured.
        learning_rate: ``curvature/learning_rate`` at these, for a panel of its own; none where it is empty.
        learning_rate_limit: ``curvature/learning_rate_limit`` at these.
        stability_ratio: ``curvature/stability_ratio`` at these, which says which of the curves binds; the upper one if
            it is empty.
        losses: Optimizer steps and the training loss at these, if it is to be drawn.
        met_at: The step at which the sharpness met the limit, marked by a dot.
        crossings: Further steps at which it went above the limit, marked on the lower edge.
        label: What the eigenvalue is, such as ``"preconditioned sharpness"``.
        title: Title of the figure; empty for none.

    Returns:
        The figure; ``save`` it or hand it to a logger.

    Example::

        >>> from lyapunov_lightning.figures import sharpness_figure
        >>> figure = sharpness_figure([0, 10, 20], [1.0, 3.0, 4.1], [4.0, 4.0, 4.0], met_at=20)
        >>> [line.get_label() for line in figure.axes[0].lines[:2]]
        ['sharpness', 'stability limit']

    """
    heights = [3.0, *([2.0] if _is_known(learning_rate_limit) else []), *([] if losses is None else [2.0])]
    picture = new_picture(WIDTH, 1.6 * len(heights) + 1.4, title, is_measured=False)
    upper, *lower = panels = stacked(picture, heights)
    times, values, limits = floats(steps), floats(sharpness), floats(stability_limit)
    _known_curve(upper, times, values, color=RED, linewidth=1.7, label=label, zorder=3)
    along = floats(batch_sharpness) if len(batch_sharpness) else np.full(len(times), np.nan)
    _known_curve(upper, times, along, color=OCHRE, linewidth=1.7, label="batch sharpness", zorder=3)
    if np.isfinite(limits).any():
        dashed: dict[str, Any] = {"color": INK, "linewidth": 1.2, "linestyle": "--", "label": "stability limit"}
        # Across the whole panel and not only between the first and the last measurement: a constant limit holds before
        # and after them too.
        if len(np.unique(limits)) == 1:
            upper.axhline(limits[0], **dashed)
        else:
            _known_curve(upper, times, limits, **dashed)
    _fit_from_zero(upper, np.concatenate([values, along, limits]))
    binding = np.fmax(_joined(upper, times, values), _joined(upper, times, along))
    if len(stability_ratio):
        # At most what is drawn: a ratio may count an eigenvalue that was measured some steps before.
        binding = np.fmin(binding, floats(stability_ratio) * limits)
    _shade_above(upper, times, binding, limits)
    upper.set_ylabel("curvature")
    if len(crossings):
        mark_lower_edge(upper, crossings, "above it again")
    if met_at is not None:
        _mark_meeting(upper, met_at, times, binding)
    rows = key(upper)
    if _is_known(learning_rate_limit):
        _draw_rates(lower[0], times, floats(learning_rate), floats(learning_rate_limit))
    if losses is not None:
        draw_loss(lower[-1], losses)
    with_fixed_margins(picture, panels, rows)
    return picture


def _is_known(values: Sequence[float | None]) -> bool:
    """Whether there is a value to be drawn."""
    return bool(len(values)) and bool(np.isfinite(floats(values)).any())


def _known_curve(panel: Axes, times: Floats, values: Floats, **options: Any) -> None:
    """A line through the values that are known, where several quantities are measured at different steps."""
    known = np.isfinite(values)
    if known.any():
        curve(panel, times[known], values[known], **options)


def _scale(panel: Axes) -> tuple[Callable[[Floats], Floats], Callable[[Floats], Floats]]:
    """To where lines of the panel are straight, and back. What is not positive has no place on a logarithmic axis."""
    if panel.get_yscale() != "log":
        return (lambda values: values), (lambda places: places)
    return (lambda values: np.log(np.where(values > 0, values, np.nan))), np.exp


def _joined(panel: Axes, times: Floats, values: Floats) -> Floats:
    """The values on the line that is drawn through the known ones; NaN before the first and after the last."""
    there, back = _scale(panel)
    places = there(values)
    known = np.isfinite(places)
    if not known.any():
        return values
    joined = back(np.interp(times, times[known], places[known], left=np.nan, right=np.nan))
    return np.where(known, values, joined)


def _shade_above(panel: Axes, times: Floats, values: Floats, limits: Floats) -> None:
    """Shade between a curve and its limit where the curve is above, on a panel whose axes have their scales."""
    there, back = _scale(panel)
    upper, lower = there(values), there(limits)
    known = np.isfinite(upper) & np.isfinite(lower)
    times, upper, lower = times[known], upper[known], lower[known]
    # Where the curve meets the limit between two measurements: Matplotlib would look for it as on a linear axis, and
    # shade beside the curve on any other.
    gap = upper - lower
    before = np.flatnonzero(gap[:-1] * gap[1:] < 0)
    share = gap[before] / (gap[before] - gap[before + 1])

    def completed(numbers: Floats) -> Floats:
        at = numbers[before] + share * (numbers[before + 1] - numbers[before])
        return np.insert(numbers, before + 1, at)

    times, lower, gap = completed(times), completed(lower), np.insert(gap, before + 1, 0.0)
    if (gap > 0).any():
        upper = lower + gap
        panel.fill_between(times, back(lower), back(upper), where=gap >= 0, color=RED, alpha=0.15, linewidth=0)


def _draw_rates(panel: Axes, times: Floats, rates: Floats, limits: Floats) -> None:
    """The learning rate, and where it would have been at the limit."""
    _known_curve(panel, times, rates, color=BLUE, linewidth=1.7, label="learning rate", zorder=3)
    _known_curve(panel, times, limits, color=INK, linewidth=1.2, linestyle="--", label="its limit")
    # A rate of 0, at the beginning of a warm-up, has no place on a logarithmic axis, which the others need.
    positive = np.concatenate([rates, limits])
    if is_wide(positive[positive > 0]):
        log_axis(panel, "y")
    else:
        panel.set_ylim(bottom=0.0)
    _shade_above(panel, times, rates, limits)
    panel.set_ylabel("learning rate")
    key(panel)


@house_style()
def stability_ratio_figure(
    curves: Mapping[str, Curve], *, losses: Mapping[str, Curve] | None = None, title: str = ""
) -> Picture:
    """The eigenvalue that counts for each optimizer over its stability limit: the edge of stability is 1 for all.

    Args:
        curves: By the name of a run, optimizer steps and ``curvature/stability_ratio`` at these.
        losses: By the same names, optimizer steps and the training loss at these, for a panel below.
        title: Title of the figure; empty for none.

    Returns:
        The figure.

    Example::

        >>> from lyapunov_lightning.figures import stability_ratio_figure
        >>> runs = {"SGD": ([0, 10, 20], [0.2, 0.8, 1.0]), "Adam": ([0, 10, 20], [0.5, 1.0, 1.0])}
        >>> figure = stability_ratio_figure(runs)
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['SGD', 'Adam']

    """
    picture = new_picture(WIDTH, 5.4 if losses else 3.6, title)
    panels = stacked(picture, [3.0, 1.7] if losses else [1.0])
    upper = panels[0]
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(curves)}
    for name, (steps, ratios) in curves.items():
        curve(upper, steps, ratios, color=colours[name], linewidth=1.6, label=name, zorder=3)
    upper.axhline(1.0, color=INK, linewidth=1.0, linestyle="--")
    _fit_from_zero(upper, np.concatenate([[1.0], *(floats(ratios) for _, ratios in curves.values())]))
    low, high = upper.get_ylim()
    # A run that stays far below the limit is to show how far: the edge is always in view.
    high = max(high, 1.2)
    upper.axhspan(1.0, high, color=RED, alpha=0.06, linewidth=0, zorder=0)
    upper.set_ylim(low, high)
    beside = upper.get_yaxis_transform()
    write(upper, "edge of\nstability", (1.0, 1.0), xycoords=beside, xytext=(6, 0), va="center")
    upper.set_ylabel("sharpness / stability limit")
    key(upper)
    if losses:
        for name, loss in losses.items():
            draw_loss(panels[1], loss, colours.get(name, GREY))
    return picture


def _fit_from_zero(panel: Axes, values: Floats) -> None:
    """A logarithmic axis for what spans far, else one that begins at zero, where the limit is a proportion to see."""
    if is_wide(values):
        log_axis(panel, "y")
        return
    if np.isfinite(values).any():
        panel.set_ylim(bottom=min(0.0, 1.06 * float(np.nanmin(values))))


def draw_loss(panel: Axes, losses: Curve, colour: str = BLUE) -> None:
    """The training loss, on a logarithmic axis if all that is drawn there is positive."""
    steps, values = losses
    curve(panel, steps, values, color=colour, linewidth=1.2 if len(values) < 2000 else 0.7)
    # Of all curves on the panel: several runs share one, and a single loss below zero takes the logarithm from all.
    drawn = np.concatenate([floats(line.get_ydata()) for line in panel.lines])
    (log_axis if np.isfinite(drawn).any() and np.nanmin(drawn) > 0 else linear_axis)(panel, "y")
    panel.set_ylabel("training loss")


def _mark_meeting(panel: Axes, step: float, times: Floats, values: Floats) -> None:
    """A dot where the curve met the limit. The key says what it is: text beside it would lie on one of the curves."""
    known = np.isfinite(values)
    if not known.any():
        return
    height = float(np.interp(step, times[known], values[known]))
    is_first = step <= times[known][0]
    label = "at the limit from the start" if is_first else f"meets it at step {number_label(step)}"
    panel.plot(
        [step], [height], "o", color=RED, markersize=6, markeredgecolor="white", zorder=5, label=label, clip_on=False
    )
