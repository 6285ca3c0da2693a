"""Figures of what the callbacks measured."""

from collections.abc import Sequence
from typing import Optional

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

_INK = "#333333"
_SHARPNESS = "#c1432e"
_LIMIT = "#333333"
_LOSS = "#2f6f9f"


def sharpness_figure(
    steps: Sequence[float],
    sharpness: Sequence[float],
    stability_limit: Sequence[float],
    *,
    loss_steps: Optional[Sequence[float]] = None,
    loss: Optional[Sequence[float]] = None,
    title: str = "",
) -> Figure:
    """The sharpness of a run against the stability limit of its learning rate, above the training loss.

    Args:
        steps: Optimizer steps of the probes.
        sharpness: ``curvature/lambda_max`` at these.
        stability_limit: ``curvature/stability_limit`` at these.
        loss_steps: Optimizer steps of the loss, if it is to be drawn.
        loss: The training loss at these.
        title: Title of the figure.

    Returns:
        The figure; ``savefig`` it or hand it to a logger.

    Example::

        >>> from lyapunov_lightning.figures import sharpness_figure
        >>> figure = sharpness_figure([0, 10, 20], [1.0, 3.0, 4.1], [4.0, 4.0, 4.0])
        >>> [line.get_label() for line in figure.axes[0].lines]
        ['sharpness', 'stability limit']

    """
    with_loss = loss is not None and loss_steps is not None
    figure = Figure(figsize=(7, 4.6 if with_loss else 3), layout="constrained")
    panels = figure.subplots(2 if with_loss else 1, 1, sharex=True, squeeze=False)[:, 0]
    upper = panels[0]
    upper.plot(steps, sharpness, color=_SHARPNESS, linewidth=1.6, label="sharpness")
    upper.plot(steps, stability_limit, color=_LIMIT, linewidth=1.2, linestyle="--", label="stability limit")
    upper.set_ylim(bottom=min(0.0, *sharpness))
    upper.set_ylabel("curvature")
    upper.legend(frameon=False)
    upper.set_title(title, fontsize=11, color=_INK)
    if loss is not None and loss_steps is not None:
        panels[1].plot(loss_steps, loss, color=_LOSS, linewidth=1.2)
        panels[1].set_yscale("log")
        panels[1].set_ylabel("training loss")
    panels[-1].set_xlabel("step")
    for panel in panels:
        _open_frame(panel)
    return figure


def eigenvalues_figure(
    steps: Sequence[float], largest: Tensor, smallest: Optional[Tensor] = None, *, title: str = ""
) -> Figure:
    """Eigenvalues over the training, coloured by rank, on a logarithmic axis.

    The moduli of negative eigenvalues are drawn dashed, so that both ends share the axis, as in figure 1 of the
    negative-eigenvalues paper and figures 2 to 4 of the sharpest-directions paper.

    Args:
        steps: Optimizer steps of the measurements, T of them.
        largest: Shape ``(T, k)``: the upper end, descending.
        smallest: Shape ``(T, j)``: the lower end, ascending.
        title: Title of the figure.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.figures import eigenvalues_figure
        >>> figure = eigenvalues_figure([0, 10], torch.tensor([[2.0, 1.0], [4.0, 2.0]]))
        >>> len(figure.axes[0].lines)
        2

    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    _draw_ranked(panel, steps, largest, "plasma", positive=True)
    if smallest is not None and smallest.shape[1]:
        _draw_ranked(panel, steps, smallest, "viridis", positive=False)
    panel.set_yscale("log")
    panel.set_xlabel("step")
    panel.set_ylabel("eigenvalue (dashed: modulus of negative ones)")
    panel.set_title(title, fontsize=11, color=_INK)
    _open_frame(panel)
    return figure


def density_figure(grid: Tensor, density: Tensor, eigenvalues: Optional[Tensor] = None, *, title: str = "") -> Figure:
    """The spectral density on a logarithmic axis, with ticks where single eigenvalues are known.

    Args:
        grid: Shape ``(m,)``: eigenvalues.
        density: Shape ``(m,)``: the density at these.
        eigenvalues: Shape ``(k,)``: known eigenvalues to mark.
        title: Title of the figure.

    """
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    panel = figure.subplots()
    floor = float(density.max()) * 1e-8
    panel.plot(grid.numpy(), density.clamp_min(floor).numpy(), color=_LOSS, linewidth=1.3)
    panel.set_yscale("log")
    if eigenvalues is not None:
        panel.plot(eigenvalues.numpy(), np.full(len(eigenvalues), floor), "|", color=_SHARPNESS, markersize=12)
    panel.set_xlabel("eigenvalue")
    panel.set_ylabel("density")
    panel.set_title(title, fontsize=11, color=_INK)
    _open_frame(panel)
    return figure


def alignment_figure(
    steps: Sequence[float], cosines: Tensor, inside: Sequence[float], baseline: float, *, title: str = ""
) -> Figure:
    """How far the mini-batch gradients lie in the sharpest directions.

    Args:
        steps: Optimizer steps of the measurements, T of them.
        cosines: Shape ``(T, k)``: mean absolute cosine of the gradient with each eigenvector.
        inside: The share of the gradient's squared norm inside the top subspace, T of them.
        baseline: That share for a random vector.
        title: Title of the figure.

    """
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    colours = colormaps["plasma"](np.linspace(0.85, 0.05, cosines.shape[1]))
    for rank in reversed(range(cosines.shape[1])):
        upper.plot(steps, cosines[:, rank].numpy(), color=colours[-1 - rank], linewidth=1.1)
    upper.set_ylabel("|cosine| by rank")
    upper.set_title(title, fontsize=11, color=_INK)
    lower.plot(steps, inside, color=_SHARPNESS, linewidth=1.4, label="gradient")
    lower.axhline(baseline, color=_LIMIT, linewidth=1.0, linestyle="--", label="random vector")
    lower.set_yscale("log")
    lower.set_ylabel("share in top subspace")
    lower.set_xlabel("step")
    lower.legend(frameon=False)
    for panel in (upper, lower):
        _open_frame(panel)
    return figure


def _draw_ranked(panel: Axes, steps: Sequence[float], values: Tensor, colours: str, *, positive: bool) -> None:
    """One line for each rank, the outermost drawn last and darkest; what has the other sign is left out."""
    shades = colormaps[colours](np.linspace(0.85, 0.05, values.shape[1]))
    for rank in reversed(range(values.shape[1])):
        line = values[:, rank].numpy() if positive else -values[:, rank].numpy()
        line = np.where(line > 0, line, np.nan)
        style = "-" if positive else "--"
        panel.plot(steps, line, style, color=shades[-1 - rank], linewidth=1.2, marker="." if len(steps) < 8 else "")


def _open_frame(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
