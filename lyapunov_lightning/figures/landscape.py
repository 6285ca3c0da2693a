"""The loss along directions in parameter space, compared with what its curvature promises."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from lyapunov_lightning.curvature.directions.landscape import Window
from lyapunov_lightning.figures.style import (
    BLUE,
    GREY,
    IN_TIME,
    INK,
    RED,
    WIDTH,
    Picture,
    colour_bar,
    curve,
    floats,
    house_style,
    key,
    new_picture,
    note,
    shades,
    stacked,
)
from lyapunov_lightning.figures.ticks import Floats, fitting_axis, linear_axis, number_label

_FEWEST_IN_A_SURFACE = 5
"""The number of scans from which a surface shows more than curves in one plane."""

_MOST_IN_A_SURFACE = 60
"""With more curves the nearer ones hide those behind them."""


@house_style()
def loss_profiles_figure(
    profiles: Mapping[str, Sequence[Window]], *, title: str = "Loss along directions, and its quadratic model"
) -> Picture:
    """The loss along directions against its quadratic model: figure 3 of the negative-eigenvalues paper.

    What is drawn is how far the loss lies from that at distance 0, which the axis names.

    Args:
        profiles: For each direction, by the title of its row, the windows over which the loss was evaluated.
        title: Title of the figure; empty for none.

    Returns:
        The figure.

    """
    columns = max([1, *map(len, profiles.values())])
    rows = max(1, len(profiles))
    picture = new_picture(max(5.0, 3.9 * columns), 2.7 * rows + 0.2, title)
    panels = picture.subplots(rows, columns, squeeze=False)
    picture.align_ylabels(panels[:, 0])
    keyed = False
    if not profiles:
        note(panels[0, 0], "nothing was scanned")
        panels[0, 0].set_axis_off()
    for row, (name, windows) in zip(panels, profiles.items(), strict=False):
        for panel, window in zip(row, windows, strict=False):
            draw_profile(panel, window.distances, window.losses, window.model)
            panel.set_xlabel("distance downhill, ‖Δθ‖")
            if panel is not row[0]:
                panel.set_ylabel("")
            if not keyed:
                key(panel)
                keyed = True
        # The legend of the first panel stands above it, and would be overwritten by the titles.
        pad = 20 if row[0].get_legend() else 6  # titles of a row stand in one line
        for panel, window in zip(row, windows, strict=False):
            panel.set_title(f"scale {number_label(window.scale)}", loc="right", color=GREY, fontsize=9, pad=pad)
        for panel in row[len(windows) :]:
            panel.set_axis_off()
        if not windows:
            note(row[0], "no slope along this direction, nothing to scan")
        row[0].set_title(name, pad=pad)
    return picture


@house_style()
def curvature_fit_figure(
    eigenvalues: Tensor,
    fits: Mapping[str, Tensor],
    *,
    steps: Sequence[float] | None = None,
    title: str = "Curvature of fitted quadratics",
) -> Picture:
    """The curvature of quadratics fitted at several scales against the eigenvalue, later measurements lighter.

    A quadratic loss is on the line: figure 4 of the negative-eigenvalues paper.

    Args:
        eigenvalues: Shape ``(T, k)``: of T measurements along k directions.
        fits: By scale, the fitted curvatures of the same shape; NaN where there are none.
        steps: Optimizer steps of the measurements, T of them; without them they are counted.
        title: Title of the figure; empty for none.

    Returns:
        The figure.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.figures import curvature_fit_figure
        >>> eigenvalues = torch.tensor([[2.0, -1.0], [3.0, -0.5]])
        >>> figure = curvature_fit_figure(eigenvalues, {"0.1": eigenvalues, "1": eigenvalues + 0.5})
        >>> [panel.get_title(loc="right") for panel in figure.axes[:2]]
        ['scale 0.1', 'scale 1']

    """
    picture = new_picture(max(5.0, 3.7 * len(fits) + 0.6), 3.6, title)
    panels = picture.subplots(1, max(1, len(fits)), squeeze=False)[0]
    moments = _moments(len(eigenvalues), steps)
    for panel, (scale, fitted) in zip(panels, fits.items(), strict=False):
        _scatter_against_eigenvalues(panel, eigenvalues, fitted, moments, quadratic=True)
        panel.set_ylabel("curvature of the fit" if panel is panels[0] else "")
        panel.set_title(f"scale {scale}", loc="right", color=GREY, fontsize=9)
    key(next((panel for panel in panels if panel.lines), panels[0]))
    _moments_bar(picture, panels, moments, steps)
    return picture


@house_style()
def optimal_step_figure(
    eigenvalues: Tensor,
    optimal_steps: Tensor,
    *,
    steps: Sequence[float] | None = None,
    title: str = "Optimal steps along directions",
) -> Picture:
    """The inverse of the optimal step against the eigenvalue: figure 5 of the negative-eigenvalues paper.

    Args:
        eigenvalues: Shape ``(T, k)``: of T measurements along k directions.
        optimal_steps: The optimal steps, of the same shape; NaN where there are none.
        steps: Optimizer steps of the measurements, T of them; without them they are counted.
        title: Title of the figure; empty for none.

    Returns:
        The figure.

    """
    # A minimum at distance 0 has no inverse. It comes out infinite, which no panel draws, and would warn the user.
    with np.errstate(divide="ignore"):
        inverses = 1 / floats(optimal_steps)
    return _against_eigenvalues(eigenvalues, inverses, "1 / optimal step", steps, title, quadratic=True)


@house_style()
def improvement_figure(
    eigenvalues: Tensor,
    improvements: Tensor,
    *,
    steps: Sequence[float] | None = None,
    title: str = "How far the loss falls along directions",
) -> Picture:
    """The best improvement of the loss against the eigenvalue: figure 6 of the negative-eigenvalues paper.

    Args:
        eigenvalues: Shape ``(T, k)``: of T measurements along k directions.
        improvements: The improvements, of the same shape; NaN where there are none.
        steps: Optimizer steps of the measurements, T of them; without them they are counted.
        title: Title of the figure; empty for none.

    Returns:
        The figure.

    """
    label = "best improvement of the loss"
    return _against_eigenvalues(eigenvalues, improvements, label, steps, title, quadratic=False)


@house_style()
def expected_change_figure(
    epochs: Sequence[float],
    changes: Mapping[str, Tensor],
    *,
    title: str = "Change of the loss by steps along the first direction",
) -> Picture:
    """The mean change of the loss by steps along one direction: figure 6, left, of the sharpest-directions paper.

    Args:
        epochs: Of the measurements, T of them.
        changes: By multiple of a step, the changes of shape ``(T,)``.
        title: Title of the figure; empty for none.

    Returns:
        The figure.

    """
    picture = new_picture(WIDTH, 3.2, title)
    (panel,) = stacked(picture, [1.0], "epoch")
    linear_axis(panel, "x", whole=all(float(epoch).is_integer() for epoch in epochs))
    for colour, (multiple, change) in zip(shades(len(changes)), changes.items(), strict=True):
        label = f"{multiple} SGD step" if multiple == "1" else f"{multiple} SGD steps"
        curve(panel, epochs, change, color=colour, label=label)
    panel.axhline(0, color=INK, linewidth=0.8, linestyle="--", zorder=1)
    panel.set_ylabel("mean change of the loss")
    if changes:
        key(panel)
    return picture


@house_style()
def loss_surface_figure(
    epochs: Sequence[float],
    multiples: Sequence[int],
    losses: Tensor,
    sharpness: Tensor,
    *,
    title: str = "Loss along the first direction",
) -> Picture:
    """The loss in steps of SGD along a direction, over the training: figure 6, right, of the sharpest-directions paper.

    It is a surface from five measurements on; fewer are curves in one plane.

    Args:
        epochs: Of the measurements, T of them; at most about 60, evenly chosen, are drawn.
        multiples: The distances in steps, m of them.
        losses: Shape ``(T, m)``.
        sharpness: Shape ``(T,)``: the curvature along the direction, which colours the curves of a surface.
        title: Title of the figure; empty for none.

    Returns:
        The figure.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.figures import loss_surface_figure
        >>> losses = torch.tensor([[2.0, 1.0, 2.0], [3.0, 1.0, 2.5]])
        >>> figure = loss_surface_figure([0.0, 1.0], [-1, 0, 1], losses, torch.tensor([1.0, 2.0]))
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['epoch 0', 'epoch 1']

    """
    where, values, curvatures = floats(list(multiples)), floats(losses), floats(sharpness)
    if len(epochs) < _FEWEST_IN_A_SURFACE:
        picture = new_picture(5.6, 3.6, title)
        panel = picture.subplots()
        linear_axis(panel, "x", whole=True)
        linear_axis(panel, "y")
        for epoch, colour, loss in zip(epochs, shades(len(epochs)), values, strict=True):
            curve(panel, where, loss, color=colour, label=f"epoch {epoch:.4g}", marker="o", markersize=3)
        panel.set_xlabel("distance along the direction, SGD steps")
        panel.set_ylabel("loss")
        key(panel)
        return picture
    picture = new_picture(6.4, 5.0, title)
    surface: Any = picture.space()
    known = curvatures[np.isfinite(curvatures)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    # Every n-th with n rounded up, so that there are never more than the most; rounded down, 119 scans would all be
    # drawn.
    for index in range(0, len(epochs), -(-len(epochs) // _MOST_IN_A_SURFACE)):
        share = (curvatures[index] - low) / (high - low) if high > low and np.isfinite(curvatures[index]) else 0.5
        there = np.full(len(where), float(epochs[index]))
        surface.plot(where, there, values[index], color=IN_TIME(share), linewidth=1.2)
    _dress_surface(surface)
    if high > low:
        colour_bar(picture, surface, low, high, "curvature along the direction", pad=0.1, shrink=0.7)
    return picture


def draw_profile(panel: Axes, distances: Tensor, losses: Tensor, model: Tensor) -> None:
    """The loss along a line and its quadratic model, both from the loss at distance 0."""
    where, values, quadratic = floats(distances), floats(losses), floats(model)
    # Read off the model and not off the losses: a window may have no point at distance 0, and the model passes through
    # the loss there exactly.
    start = _at_zero(where, quadratic)
    curve(panel, where, values - start, color=RED, linewidth=1.7, label="loss", zorder=3)
    curve(panel, where, quadratic - start, color=BLUE, linestyle="--", linewidth=1.3, label="quadratic model", zorder=4)
    linear_axis(panel, "x")
    linear_axis(panel, "y")
    panel.set_ylabel(f"loss − L₀ (L₀ = {start:.4g})" if start else "loss")


def _at_zero(distances: Floats, quadratic: Floats) -> float:
    """The value at distance 0 of a quadratic that is known at some distances; 0 if it is not known."""
    known = np.isfinite(distances) & np.isfinite(quadratic)
    width = np.abs(distances[known]).max(initial=0.0)
    if len(np.unique(distances[known])) < 3 or not width:
        return 0.0
    # Through all points, where three would do: each has its rounding.
    return float(np.polynomial.polynomial.polyfit(distances[known] / width, quadratic[known], 2)[0])


def _against_eigenvalues(
    eigenvalues: Tensor, values: Any, label: str, steps: Sequence[float] | None, title: str, *, quadratic: bool
) -> Picture:
    """A picture of one such scatter."""
    picture = new_picture(5.6, 3.8, title)
    panel, moments = picture.subplots(), _moments(len(eigenvalues), steps)
    _scatter_against_eigenvalues(panel, eigenvalues, values, moments, quadratic=quadratic)
    panel.set_ylabel(label)
    if quadratic:
        key(panel)
    _moments_bar(picture, panel, moments, steps)
    return picture


def _scatter_against_eigenvalues(
    panel: Axes, eigenvalues: Tensor, values: Any, moments: Floats, *, quadratic: bool
) -> None:
    """One point for each direction of each measurement, coloured by its time; the diagonal is a quadratic loss."""
    x, y = floats(eigenvalues), floats(values)
    colours = np.repeat(moments, x.shape[1])
    x, y = x.reshape(-1), y.reshape(-1)
    known = np.isfinite(x) & np.isfinite(y)
    x, y, colours = x[known], y[known], colours[known]
    low, high = _ends(moments)
    # With the ends of all measurements, and not of those that are known here: panels side by side share one colour bar.
    panel.scatter(x, y, c=colours, s=18, cmap=IN_TIME, vmin=low, vmax=high, linewidths=0, alpha=0.9, zorder=3)
    # Both axes have one scale where there is a diagonal, so that it is straight.
    fitting_axis(panel, "x", np.concatenate([x, y]) if quadratic else x)
    fitting_axis(panel, "y", np.concatenate([x, y]) if quadratic else y)
    if quadratic and len(x):
        # A single point gives the diagonal no length: some is added on both sides, by a factor, as on a logarithmic
        # axis.
        ends = [x.min(), x.max()] if x.min() < x.max() else sorted([0.7 * x[0], 1.4 * x[0]])
        panel.plot(ends, ends, color=INK, linewidth=1.0, linestyle="--", zorder=1, label="quadratic loss")
    panel.set_xlabel("eigenvalue")
    if not len(x):
        note(panel, "none found")
        panel.set_xticks([])


def _moments(count: int, steps: Sequence[float] | None) -> Floats:
    """When the measurements were: their steps, or their numbers from 1."""
    return np.arange(1.0, count + 1) if steps is None else floats(list(steps))


def _ends(moments: Floats) -> tuple[float, float]:
    return (float(moments.min()), float(moments.max())) if len(moments) else (0.0, 1.0)


def _moments_bar(picture: Picture, panels: Any, moments: Floats, steps: Sequence[float] | None) -> None:
    """A colour bar for the times of the measurements, if there is more than one."""
    low, high = _ends(moments)
    if low < high:
        colour_bar(picture, panels, low, high, "measurement" if steps is None else "step", whole=True)


def _dress_surface(surface: Any) -> None:
    surface.set_xlabel("SGD steps")
    surface.set_ylabel("epoch")
    surface.set_zlabel("loss")
    for axis in (surface.xaxis, surface.yaxis, surface.zaxis):
        axis.set_pane_color("white")
        # Private: a three-dimensional panel can turn its grid on and off, and has no way to its colour.
        axis._axinfo["grid"].update(color="#dddddd", linewidth=0.6)
        # Losses of 2.3010 to 2.3025 would be labelled 0.0010 to 0.0025, with the 2.3 in a corner.
        axis.get_major_formatter().set_useOffset(False)
    surface.view_init(elev=28, azim=-58)
