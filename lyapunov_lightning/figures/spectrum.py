"""The ends and the density of the spectrum of the Hessian, and how the gradient lies in the sharpest directions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from torch import Tensor

from lyapunov_lightning.figures.landscape import draw_profile
from lyapunov_lightning.figures.style import (
    BLUE,
    INK,
    MOST_NAMES,
    OCHRE,
    RED,
    TEAL,
    WIDTH,
    Picture,
    curve,
    floats,
    house_style,
    key,
    label_ends,
    mark_lower_edge,
    new_picture,
    note,
    rank_names,
    shades,
    stacked,
)
from lyapunov_lightning.figures.ticks import Floats, fitting_axis, linear_axis, log_axis

Line = tuple[Tensor, Tensor, Tensor, float]
"""Distances, losses and the quadratic model at these, and the eigenvalue."""


@house_style()
def eigenvalues_figure(
    steps: Sequence[float],
    largest: Tensor,
    smallest: Tensor | None = None,
    *,
    title: str = "Extreme eigenvalues of the Hessian",
) -> Picture:
    """Eigenvalues over the training, coloured by rank, on a logarithmic axis.

    The moduli of negative eigenvalues are drawn dashed, so that both ends share the axis, as in figure 1 of the
    negative-eigenvalues paper and figures 2 to 4 of the sharpest-directions paper.

    Args:
        steps: Optimizer steps of the measurements, T of them.
        largest: Shape ``(T, k)``: the upper end, descending.
        smallest: Shape ``(T, j)``: the lower end, ascending.
        title: Title of the figure; empty for none.

    Returns:
        The figure.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.figures import eigenvalues_figure
        >>> figure = eigenvalues_figure([0, 10], torch.tensor([[2.0, 1.0], [4.0, 2.0]]))
        >>> len(figure.axes[0].lines)
        2

    """
    picture = new_picture(WIDTH, 4.0, title)
    (panel,) = stacked(picture, [1.0])
    _draw_eigenvalues(panel, steps, floats(largest), None if smallest is None else floats(smallest), height=3.2)
    return picture


@house_style()
def density_figure(
    grid: Tensor, density: Tensor, eigenvalues: Tensor | None = None, *, title: str = "Spectral density of the Hessian"
) -> Picture:
    """The spectral density on a logarithmic axis, with ticks where single eigenvalues are known.

    Args:
        grid: Shape ``(m,)``: eigenvalues.
        density: Shape ``(m,)``: the density at these.
        eigenvalues: Shape ``(k,)``: known eigenvalues to mark.
        title: Title of the figure; empty for none.

    Returns:
        The figure.

    """
    picture = new_picture(WIDTH, 3.2, title)
    _draw_density(picture.subplots(), grid, density, eigenvalues)
    return picture


@house_style()
def alignment_figure(
    steps: Sequence[float],
    cosines: Tensor,
    inside: Sequence[float | None],
    baseline: float,
    *,
    title: str = "Mini-batch gradients in the sharpest directions",
) -> Picture:
    """How far the mini-batch gradients lie in the sharpest directions.

    Args:
        steps: Optimizer steps of the measurements, T of them.
        cosines: Shape ``(T, k)``: mean absolute cosine of the gradient with each eigenvector.
        inside: The share of the gradient's squared norm inside the top subspace, T of them.
        baseline: That share for a random vector.
        title: Title of the figure; empty for none.

    Returns:
        The figure.

    """
    picture = new_picture(WIDTH, 4.8, title)
    upper, lower = stacked(picture, [1.0, 1.0])
    values = floats(cosines)
    names = [f"v{name[1:]}" for name in rank_names(values.shape[1], 0)]
    ends = draw_family(upper, steps, values, names)
    upper.set_ylim(bottom=0.0)
    label_ends(upper, ends, 1.9)
    upper.set_ylabel("|cosine| with\neigenvector")
    curve(lower, steps, inside, color=RED, label="gradient")
    # A random vector has a share of k/n in k of n directions: compared with that, 1 % of a gradient may be much.
    lower.axhline(baseline, color=INK, linewidth=1.0, linestyle="--", label="random vector")
    # With the baseline, which lies orders of magnitude below.
    _log_if_positive(lower, np.append(floats(inside), baseline))
    lower.set_ylabel("share in\ntop subspace")
    key(lower)
    return picture


@house_style()
def subspace_figure(
    steps: Sequence[float],
    eigenvalues: Tensor,
    overlaps: Sequence[float | None],
    *,
    removed: tuple[Sequence[float], Sequence[float]] | None = None,
    title: str = "The sharpest directions",
) -> Picture:
    """The sharpest directions that an update is changed along: how sharp, how lasting, and how much is taken out.

    Args:
        steps: Optimizer steps of the measurements, T of them.
        eigenvalues: Shape ``(T, k)``: the largest eigenvalues, descending.
        overlaps: ``‖V_old V_newᵀ‖²_F / k`` with the last measurement, T of them, 1 for the same subspace; None for the
            first.
        removed: Optimizer steps, and the share of the squared norm of the gradient that was taken out at these.
        title: Title of the figure; empty for none.

    Returns:
        The figure.

    """
    picture = new_picture(WIDTH, 4.4 if removed is None else 5.4, title)
    panels = stacked(picture, [1.6, 1.0] if removed is None else [1.6, 1.0, 1.0])
    _draw_eigenvalues(panels[0], steps, floats(eigenvalues), None, height=1.9)
    curve(panels[1], steps, overlaps, color=TEAL)
    panels[1].set_ylim(0.0, 1.05)
    if np.isnan(floats(overlaps)).all():
        note(panels[1], "nothing to compare with yet")
    panels[1].set_ylabel("overlap with\nlast subspace")
    if removed is not None:
        curve(panels[2], *removed, color=OCHRE)
        panels[2].set_ylim(bottom=0.0)
        panels[2].set_ylabel("removed share\nof gradient²")
    return picture


@house_style()
def spectrum_overview_figure(
    values: Tensor,
    value_errors: Tensor,
    num_largest: int,
    *,
    density: tuple[Tensor, Tensor] | None = None,
    lines: Mapping[str, Line] | None = None,
    title: str = "",
) -> Picture:
    """The curvature at one point: eigenvalues, density, and the loss along eigenvectors, as far as they are known.

    Args:
        values: Shape ``(k,)``: the largest eigenvalues, descending, then the smallest, ascending.
        value_errors: Shape ``(k,)``: their estimated errors.
        num_largest: How many of them are of the upper end.
        density: The grid and the spectral density on it, of shape ``(m,)`` each.
        lines: By the name of a direction, distances, the losses and their quadratic model there, each of shape
            ``(m,)``, and the eigenvalue.
        title: Title of the figure; empty for none.

    Returns:
        The figure, with a panel for each of these.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.figures import spectrum_overview_figure
        >>> figure = spectrum_overview_figure(torch.tensor([4.0, 2.0, -1.0]), torch.full((3,), 0.1), num_largest=2)
        >>> figure.axes[0].get_ylabel()
        'eigenvalue'

    """
    along = lines or {}
    count = bool(len(values)) + (density is not None) + len(along)
    # One row of up to three panels, then two rows, then rows of three: no panel gets narrower than its labels.
    columns = count if count < 4 else (count + 1) // 2 if count < 7 else 3
    rows = -(-count // max(columns, 1))
    picture = new_picture(max(WIDTH if columns > 1 else 5.0, 3.6 * columns), 3.1 * max(rows, 1), title)
    given = [] if picture.given is None else [picture.given]
    places = range(len(given), count)
    panels = iter([*given, *(picture.add_subplot(max(rows, 1), columns, place + 1) for place in places)])
    if len(values):
        _draw_ranks(next(panels), floats(values), floats(value_errors), num_largest)
    if density is not None:
        _draw_density(next(panels), *density, values if len(values) else None)
    first = count - len(along)
    for place, (name, (distances, losses, model, eigenvalue)) in enumerate(along.items(), first):
        panel = next(panels)
        draw_profile(panel, distances, losses, model)
        # Titles of a row stand in one line, above the key that one of its panels has.
        heading = f"{name}: curvature {eigenvalue:.3g}".replace("-", "−")
        panel.set_title(heading, pad=20 if place // columns == first // columns else 6)
        panel.set_xlabel("distance along the eigenvector, ‖Δθ‖")
        if place == first:
            key(panel)
    return picture


def _draw_eigenvalues(
    panel: Axes, steps: Sequence[float], largest: Floats, smallest: Floats | None, *, height: float
) -> None:
    """Both ends on one logarithmic axis; what has the other sign is left out."""
    # A logarithmic axis has no place for the other sign. A largest eigenvalue below zero is rare, and its modulus would
    # be read as a sharpness.
    upper = np.where(largest > 0, largest, np.nan)
    lower = np.empty((len(largest), 0)) if smallest is None else np.where(smallest < 0, -smallest, np.nan)
    names = rank_names(upper.shape[1], lower.shape[1])
    ends = draw_family(panel, steps, upper, names[: upper.shape[1]])
    moduli = [f"|{name}|" for name in names[upper.shape[1] :]]
    ends += draw_family(panel, steps, lower, moduli, "viridis", linestyle="--")
    drawn = np.concatenate([upper, lower], axis=1)
    _log_if_positive(panel, drawn)
    if not ends:
        note(panel, "no eigenvalue above zero")
    panel.set_ylabel("eigenvalue")
    label_ends(panel, ends, height)
    if lower.shape[1]:
        handles = [
            Line2D([], [], color=shades(1)[0], label="largest eigenvalues"),
            Line2D([], [], color=shades(1, "viridis")[0], linestyle="--", label="modulus of negative eigenvalues"),
        ]
        key(panel, handles=handles)


def draw_family(
    panel: Axes,
    steps: Sequence[float],
    values: Floats,
    names: Sequence[str],
    colours: str = "plasma",
    **options: Any,
) -> list[tuple[str, float, Any]]:
    """A curve for each rank, the first darkest and drawn last; what to label them with when all is drawn."""
    count = values.shape[1]
    palette = shades(count, colours)
    ends: list[tuple[str, float, Any]] = []
    # The first rank last, so that it lies above the others, which are many and close together.
    for rank in reversed(range(count)):
        curve(panel, steps, values[:, rank], color=palette[rank], label=names[rank], **options)
        known = values[:, rank][np.isfinite(values[:, rank])]
        if len(known):
            ends.insert(0, (names[rank], float(known[-1]), palette[rank]))
    if len(ends) > MOST_NAMES:
        ends = [ends[0], ends[-1]]
    return ends


def _draw_density(panel: Axes, grid: Tensor, density: Tensor, eigenvalues: Tensor | None) -> None:
    where, height = floats(grid), floats(density)
    linear_axis(panel, "x")
    if np.isfinite(height).any() and np.nanmax(height) > 0:
        # Eight decades below its peak a density estimated from few vectors is rounding.
        floor = float(np.nanmax(height)) * 1e-8
        height = np.maximum(height, floor)
        log_axis(panel, "y")
        panel.fill_between(where, floor, height, color=BLUE, alpha=0.15, linewidth=0)
        panel.set_ylim(bottom=floor)
    curve(panel, where, height, color=BLUE, linewidth=1.3, label="density")
    if eigenvalues is not None and len(eigenvalues):
        mark_lower_edge(panel, eigenvalues.tolist(), "known eigenvalues")
        key(panel)
    panel.set_xlabel("eigenvalue")
    panel.set_ylabel("spectral density")


def _draw_ranks(panel: Axes, values: Floats, errors: Floats, num_largest: int) -> None:
    """Eigenvalues side by side with their errors, from the largest on the left to the smallest on the right."""
    num_smallest = len(values) - num_largest
    order = [*range(num_largest), *reversed(range(num_largest, len(values)))]
    names = rank_names(num_largest, num_smallest)
    # A gap stands for all the eigenvalues that were not asked for.
    places = np.arange(len(values)) + np.where(np.arange(len(values)) >= num_largest, float(num_largest > 0), 0.0)
    fitting_axis(panel, "y", values)
    colours = [RED if index < num_largest else BLUE for index in order]
    for place, index, colour in zip(places, order, colours, strict=True):
        error = errors[index] if np.isfinite(errors[index]) else 0.0
        panel.errorbar(
            place, values[index], yerr=error, fmt="o", color=colour, markersize=4.5, capsize=2.5, elinewidth=1
        )
    # Where all have one sign and span far the axis is logarithmic, and has no zero to mark.
    if panel.get_yscale() != "log":
        panel.axhline(0.0, color=INK, linewidth=0.8, zorder=0)
    # Eight names fit below a panel. Of more only the ends of both groups are named, from which the others are counted.
    every = -(-len(values) // 8)
    ends = {0, num_largest - 1, num_largest, len(values) - 1}
    shown = [i for i in range(len(values)) if every == 1 or i in ends]
    panel.set_xticks(places[shown], [names[order[i]] for i in shown])
    panel.set_xlim(-0.7, max(places[-1] + 0.7, 0.7))
    panel.set_xlabel("rank")
    panel.set_ylabel("eigenvalue")


def _log_if_positive(panel: Axes, values: Floats) -> None:
    if (values[np.isfinite(values)] > 0).any():
        log_axis(panel, "y")
