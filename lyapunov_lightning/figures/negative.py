"""Negative curvature, and how the curvature along the eigenvectors of one step changes later in the training."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from lyapunov_lightning.figures.spectrum import draw_family
from lyapunov_lightning.figures.style import (
    INK,
    MOST_NAMES,
    PURPLE,
    WIDTH,
    Picture,
    curve,
    floats,
    house_style,
    key,
    label_ends,
    new_picture,
    note,
    rank_names,
    shades,
    stacked,
)
from lyapunov_lightning.figures.ticks import is_wide, log_axis


@house_style()
def frozen_figure(
    steps: Sequence[float],
    ends: Tensor,
    top: Mapping[int, Tensor],
    bottom: Mapping[int, Tensor],
    *,
    title: str = "Curvature along eigenvectors of earlier steps",
) -> Picture:
    """The curvature along eigenvectors of some steps over the rest of the training, and the eigenvalues themselves.

    A curve begins at the step whose eigenvector it follows, marked by a dot, and then shows how far the curvature in
    that direction stays with the end of the spectrum: figure 2 of the negative-eigenvalues paper.

    Args:
        steps: Optimizer steps of the measurements, T of them.
        ends: Shape ``(T, 2)``: the largest and the smallest eigenvalue at these.
        top: For each frozen step the steps and curvatures along its top eigenvector, of shape ``(m, 2)``.
        bottom: The same for its bottom eigenvector.
        title: Title of the figure; empty for none.

    Returns:
        The figure.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.figures import frozen_figure
        >>> ends = torch.tensor([[2.0, -1.0], [3.0, -2.0]])
        >>> top, bottom = torch.tensor([[0.0, 2.0], [10.0, 2.5]]), torch.tensor([[0.0, -1.0], [10.0, 0.5]])
        >>> figure = frozen_figure([0, 10], ends, {0: top}, {0: bottom})
        >>> [line.get_label() for line in figure.axes[1].lines]
        ['smallest eigenvalue', 'of step 0']

    """
    picture = new_picture(WIDTH, 5.2, title)
    panels = stacked(picture, [1.0, 1.0])
    names = ("largest eigenvalue", "smallest eigenvalue")
    for panel, name, end, curves in zip(panels, names, floats(ends).T, (top, bottom), strict=True):
        curve(panel, steps, end, color=INK, linewidth=1.1, linestyle="--", label=name)
        drawn = [end]
        for colour, (step, points) in zip(shades(len(curves)), sorted(curves.items()), strict=True):
            times, values = floats(points).T
            label = f"of step {step}"
            curve(panel, times, values, color=colour, marker="o", markersize=5, markevery=[0], label=label)
            drawn.append(values)
        # Only where everything is positive: along an old eigenvector the curvature may change its sign, and that
        # crossing is what the figure is looked at for.
        if is_wide(np.concatenate(drawn)):
            log_axis(panel, "y")
        panel.set_ylabel(f"curvature along\n{'top' if panel is panels[0] else 'bottom'} eigenvectors")
        handles, labels = panel.get_legend_handles_labels()
        if len(labels) > MOST_NAMES + 1:  # the dots say for the others where they were frozen
            handles, labels = [*handles[:2], handles[-1]], [*labels[:2], labels[-1]]
        key(panel, handles=handles, labels=labels)
    return picture


@house_style()
def negative_figure(
    steps: Sequence[float], lambda_min: Tensor, lambda_max: Sequence[float | None], *, title: str = "Negative curvature"
) -> Picture:
    """The most negative eigenvalues over the training, and how large they are compared with the largest positive one.

    The modulus of what is negative is drawn on a logarithmic axis, as in figure 1 of the negative-eigenvalues paper.

    Args:
        steps: Optimizer steps of the measurements, T of them.
        lambda_min: Shape ``(T, k)``: the smallest eigenvalues, ascending.
        lambda_max: The largest eigenvalue, T of them.
        title: Title of the figure; empty for none.

    Returns:
        The figure.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.figures import negative_figure
        >>> figure = negative_figure([0, 10], torch.tensor([[-2.0, -1.0], [-1.0, 0.5]]), [4.0, 5.0])
        >>> figure.axes[1].lines[0].get_ydata().tolist()
        [0.5, 0.2]

    """
    picture = new_picture(WIDTH, 4.8, title)
    upper, lower = stacked(picture, [1.5, 1.0])
    values = floats(lambda_min)
    # What is positive is left out: its modulus on this axis would look like negative curvature.
    moduli = np.where(values < 0, -values, np.nan)
    names = [f"|{name}|" for name in rank_names(0, moduli.shape[1])]
    ends = draw_family(upper, steps, moduli, names, "viridis")
    if ends:
        log_axis(upper, "y")
    else:
        note(upper, "no eigenvalue below zero")
    upper.set_ylabel("modulus of\nnegative eigenvalues")
    label_ends(upper, ends, 2.6)
    largest = floats(lambda_max)
    ratio = np.full(len(largest), np.nan)
    if moduli.shape[1]:
        # Only where the largest eigenvalue is positive: a ratio of two negative ends measures nothing.
        np.divide(moduli[:, 0], largest, out=ratio, where=largest > 0)
    curve(lower, steps, ratio, color=PURPLE)
    if np.isnan(ratio).all():
        note(lower, "not known")
    elif is_wide(ratio):
        log_axis(lower, "y")
    else:
        lower.set_ylim(bottom=0.0)
    lower.set_ylabel("|λₙ| / λ₁")
    return picture
