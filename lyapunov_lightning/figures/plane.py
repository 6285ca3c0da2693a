"""The loss over a plane through the parameters: contours with the path of the training, and a surface."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import BoundaryNorm
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from lyapunov_lightning.figures.style import (
    IN_TIME,
    INK,
    RED,
    Picture,
    floats,
    house_style,
    new_picture,
    note,
)
from lyapunov_lightning.figures.ticks import Floats, linear_axis

_LEVELS = 18
"""Contours."""

_LARGE_RANGE = 10.0
"""Highest over lowest loss from which contours are evenly spaced in its logarithm: evenly spaced in the loss they would
all lie on the walls of the valley."""


@house_style()
def plane_contour_figure(
    coordinates: Tensor,
    losses: Tensor,
    names: Sequence[str] = ("1", "2"),
    path: Sequence[tuple[float, float]] = (),
    *,
    title: str = "Loss over a plane",
) -> Picture:
    """The contours of the loss over a plane, and where the training was on it.

    Args:
        coordinates: Shape ``(m,)``: the coordinates on each axis; 0 is where the parameters are.
        losses: Shape ``(m, m)``: the loss, the row being the coordinate on the first axis. What is not finite is left
            white.
        names: The names of the axes.
        path: Earlier parameters projected on the plane, the oldest first; what lies outside of the plane is not drawn.
        title: Title of the figure; empty for none.

    Returns:
        The figure.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.figures import plane_contour_figure
        >>> t = torch.linspace(-1, 1, 5)
        >>> figure = plane_contour_figure(t, t[:, None] ** 2 + t**2, path=[(-0.5, -0.5), (0.0, 0.0)])
        >>> figure.axes[0].get_xlabel()
        'along eigenvector 1, share of ‖θ‖'

    """
    where, values = floats(coordinates), floats(losses)
    picture = new_picture(5.8, 4.6, title)
    panel = picture.subplots()
    linear_axis(panel, "x")
    linear_axis(panel, "y")
    panel.set_xlabel(_label(names[0]))
    panel.set_ylabel(_label(names[1]))
    levels = _levels(values)
    if levels is None:
        note(panel, "the loss is the same everywhere, or not finite")
        return picture
    known = np.ma.masked_invalid(values.T)
    filled = panel.contourf(where, where, known, levels=levels, cmap=IN_TIME, alpha=0.85, norm=_norm(levels))
    panel.contour(where, where, known, levels=levels, colors="white", linewidths=0.4)
    bar = panel.figure.colorbar(filled, ax=panel, aspect=30, pad=0.02, shrink=0.95, ticks=levels[::3])
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    bar.ax.minorticks_off()
    bar.set_label("loss")
    bar.outline.set_visible(False)
    if len(path):
        points = floats(list(path))
        panel.plot(*points.T, color=INK, linewidth=1.2, marker="o", markersize=2.5, label="path of the training")
    panel.plot([0.0], [0.0], "o", color=RED, markersize=6, zorder=5, label="present parameters")
    panel.set_xlim(where[0], where[-1])
    panel.set_ylim(where[0], where[-1])
    panel.legend(loc="lower left", bbox_to_anchor=(0.0, 1.01), ncols=2)
    return picture


@house_style()
def plane_surface_figure(
    coordinates: Tensor, losses: Tensor, names: Sequence[str] = ("1", "2"), *, title: str = "Loss over a plane"
) -> Picture:
    """The loss over a plane as a surface.

    Args:
        coordinates: Shape ``(m,)``: the coordinates on each axis; 0 is where the parameters are.
        losses: Shape ``(m, m)``: the loss, the row being the coordinate on the first axis.
        names: The names of the axes.
        title: Title of the figure; empty for none.

    Returns:
        The figure.

    """
    where, values = floats(coordinates), floats(losses)
    picture = new_picture(6.0, 4.8, title)
    panel: Any = picture.space()
    levels = _levels(values)
    if levels is not None:
        is_large = _is_large(values)
        heights = np.log10(values) if is_large else values
        x, y = np.meshgrid(where, where, indexing="ij")
        panel.plot_surface(x, y, np.ma.masked_invalid(heights), cmap=IN_TIME, linewidth=0, rcount=60, ccount=60)
        panel.plot([0.0], [0.0], [heights[len(where) // 2, len(where) // 2]], "o", color=RED, markersize=5, zorder=10)
        panel.set_zlabel("log₁₀ loss" if is_large else "loss")
    panel.set_xlabel(_label(names[0]))
    panel.set_ylabel(_label(names[1]))
    for axis in (panel.xaxis, panel.yaxis, panel.zaxis):
        axis.set_pane_color("white")
        axis.get_major_formatter().set_useOffset(False)
    panel.locator_params(nbins=5)
    panel.view_init(elev=32, azim=-58)
    return picture


def _label(name: str) -> str:
    kind, _, rank = name.partition("_")
    if kind == "random":
        return f"along random direction {rank}, share of ‖θ‖"
    return f"along {'the gradient' if name == 'gradient' else f'eigenvector {name}'}, share of ‖θ‖"


def _is_large(values: Floats) -> bool:
    low, high = np.nanmin(values), np.nanmax(values)
    return bool(low > 0 and high > _LARGE_RANGE * low)


def _levels(values: Floats) -> Floats | None:
    """Ascending losses to draw contours at; None where there are no two different ones."""
    if not np.isfinite(values).any():
        return None
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if not high > low:
        return None
    return np.asarray((np.geomspace if _is_large(values) else np.linspace)(low, high, _LEVELS))


def _norm(levels: Floats) -> Any:
    """Colours that are as far apart as the contours."""
    return BoundaryNorm(levels, IN_TIME.N)
