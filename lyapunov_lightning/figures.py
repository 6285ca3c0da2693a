"""Figures of what the callbacks measured."""

from collections.abc import Mapping, Sequence
from typing import Optional

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lyapunov_lightning.curvature.landscape import Window

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


def frozen_figure(
    steps: Sequence[float],
    ends: Tensor,
    top: Mapping[int, Tensor],
    bottom: Mapping[int, Tensor],
    *,
    title: str = "",
) -> Figure:
    """The curvature along eigenvectors of some steps over the rest of the training, beside the eigenvalues themselves.

    A curve begins at the step whose eigenvector it follows, marked by a dot, and then shows how far the curvature in
    that direction stays with the end of the spectrum: figure 2 of the negative-eigenvalues paper.

    Args:
        steps: Optimizer steps of the measurements, T of them.
        ends: Shape ``(T, 2)``: the largest and the smallest eigenvalue at these.
        top: For each frozen step the steps and curvatures along its top eigenvector, of shape ``(m, 2)``.
        bottom: The same for its bottom eigenvector.
        title: Title of the figure.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.figures import frozen_figure
        >>> ends = torch.tensor([[2.0, -1.0], [3.0, -2.0]])
        >>> top, bottom = torch.tensor([[0.0, 2.0], [10.0, 2.5]]), torch.tensor([[0.0, -1.0], [10.0, 0.5]])
        >>> figure = frozen_figure([0, 10], ends, {0: top}, {0: bottom})
        >>> [line.get_label() for line in figure.axes[1].lines]
        ['smallest eigenvalue', 'frozen at step 0']

    """
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    names = ("largest eigenvalue", "smallest eigenvalue")
    for panel, name, end, curves in zip(panels, names, ends.T, (top, bottom), strict=True):
        panel.plot(steps, end.numpy(), color=_LIMIT, linewidth=1.0, linestyle="--", label=name)
        colours = colormaps["plasma"](np.linspace(0.05, 0.8, len(curves)))
        for colour, (step, curve) in zip(colours, sorted(curves.items()), strict=True):
            times, values = curve.T.numpy()
            panel.plot(
                times, values, color=colour, linewidth=1.3, marker="o", markevery=[0], label=f"frozen at step {step}"
            )
        panel.set_ylabel("curvature")
        panel.legend(frameon=False, fontsize=8)
        _open_frame(panel)
    panels[0].set_title(title, fontsize=11, color=_INK)
    panels[-1].set_xlabel("step")
    return figure


def loss_profiles_figure(profiles: Mapping[str, Sequence[Window]], *, title: str = "") -> Figure:
    """The loss along directions against its quadratic model: figure 3 of the negative-eigenvalues paper.

    Args:
        profiles: For each direction, by the title of its row, the windows over which the loss was evaluated.
        title: Title of the figure.

    """
    columns = max([1, *map(len, profiles.values())])
    figure = Figure(figsize=(4 * columns, 2.8 * len(profiles)), layout="constrained")
    panels = figure.subplots(len(profiles), columns, squeeze=False)
    for row, (name, windows) in zip(panels, profiles.items(), strict=True):
        row[0].set_title(name, fontsize=10, color=_INK, loc="left")
        for panel, window in zip(row, windows, strict=False):
            where = window.distances.numpy()
            panel.plot(where, window.losses.numpy(), color=_SHARPNESS, linewidth=1.5, label="loss")
            panel.plot(where, window.model.numpy(), color=_LOSS, linewidth=1.2, linestyle="--", label="quadratic model")
            panel.set_xlabel(f"distance downhill (scale {window.scale:g})")
        for panel in row:
            _open_frame(panel)
    panels[0, 0].set_ylabel("loss")
    if panels[0, 0].lines:
        panels[0, 0].legend(frameon=False)
    figure.suptitle(title, fontsize=11, color=_INK)
    return figure


def curvature_fit_figure(eigenvalues: Tensor, fits: Mapping[str, Tensor], *, title: str = "") -> Figure:
    """The curvature of quadratics fitted at several scales against the eigenvalue, later measurements in yellow.

    A quadratic loss is on the line: figure 4 of the negative-eigenvalues paper.

    Args:
        eigenvalues: Shape ``(T, k)``: of T measurements along k directions.
        fits: By scale, the fitted curvatures of the same shape; NaN where there are none.
        title: Title of the figure.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.figures import curvature_fit_figure
        >>> eigenvalues = torch.tensor([[2.0, -1.0], [3.0, -0.5]])
        >>> figure = curvature_fit_figure(eigenvalues, {"0.1": eigenvalues, "1": eigenvalues + 0.5})
        >>> [panel.get_title() for panel in figure.axes]
        ['scale 0.1', 'scale 1']

    """
    figure = Figure(figsize=(4 * len(fits), 3.8), layout="constrained")
    for panel, (scale, fitted) in zip(figure.subplots(1, len(fits), squeeze=False)[0], fits.items(), strict=True):
        _scatter(panel, eigenvalues, fitted)
        _diagonal(panel, eigenvalues)
        panel.set_yscale("symlog", linthresh=_threshold(eigenvalues))
        panel.set_ylabel("curvature of the fit")
        panel.set_title(f"scale {scale}", fontsize=10, color=_INK)
    figure.suptitle(title, fontsize=11, color=_INK)
    return figure


def optimal_step_figure(eigenvalues: Tensor, optimal_steps: Tensor, *, title: str = "") -> Figure:
    """The inverse of the optimal step against the eigenvalue: figure 5 of the negative-eigenvalues paper.

    Args:
        eigenvalues: Shape ``(T, k)``: of T measurements along k directions.
        optimal_steps: The optimal steps, of the same shape; NaN where there are none.
        title: Title of the figure.

    """
    figure = Figure(figsize=(5, 3.8), layout="constrained")
    panel = figure.subplots()
    _scatter(panel, eigenvalues, 1 / optimal_steps)
    _diagonal(panel, eigenvalues)
    panel.set_yscale("symlog", linthresh=_threshold(eigenvalues))
    panel.set_ylabel("1 / optimal step")
    panel.set_title(title, fontsize=11, color=_INK)
    return figure


def improvement_figure(eigenvalues: Tensor, improvements: Tensor, *, title: str = "") -> Figure:
    """The best improvement of the loss against the eigenvalue: figure 6 of the negative-eigenvalues paper.

    Args:
        eigenvalues: Shape ``(T, k)``: of T measurements along k directions.
        improvements: The improvements, of the same shape; NaN where there are none.
        title: Title of the figure.

    """
    figure = Figure(figsize=(5, 3.8), layout="constrained")
    panel = figure.subplots()
    _scatter(panel, eigenvalues, improvements)
    if bool((improvements > 0).any()):
        panel.set_yscale("log")
    panel.set_ylabel("best improvement of the loss")
    panel.set_title(title, fontsize=11, color=_INK)
    return figure


def expected_change_figure(epochs: Sequence[float], changes: Mapping[str, Tensor], *, title: str = "") -> Figure:
    """The mean change of the loss by steps along one direction: figure 6, left, of the sharpest-directions paper.

    Args:
        epochs: Of the measurements, T of them.
        changes: By multiple of a step, the changes of shape ``(T,)``.
        title: Title of the figure.

    """
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    panel = figure.subplots()
    for colour, (multiple, change) in zip(
        colormaps["plasma"](np.linspace(0.05, 0.8, len(changes))), changes.items(), strict=True
    ):
        panel.plot(epochs, change.numpy(), color=colour, linewidth=1.2, marker=".", label=f"{multiple} steps")
    panel.axhline(0, color=_LIMIT, linewidth=0.8, linestyle="--")
    panel.set_xlabel("epoch")
    panel.set_ylabel("mean change of the loss")
    panel.set_title(title, fontsize=11, color=_INK)
    panel.legend(frameon=False, fontsize=8)
    _open_frame(panel)
    return figure


def loss_surface_figure(
    epochs: Sequence[float], multiples: Sequence[int], losses: Tensor, sharpness: Tensor, *, title: str = ""
) -> Figure:
    """The loss in steps of SGD along a direction, over the training: figure 6, right, of the sharpest-directions paper.

    Args:
        epochs: Of the measurements, T of them; at most about 60, evenly chosen, are drawn.
        multiples: The distances in steps, m of them.
        losses: Shape ``(T, m)``.
        sharpness: Shape ``(T,)``: the curvature along the direction, which colours the curves from blue to red.
        title: Title of the figure.

    Example::

        >>> import torch
        >>> from lyapunov_lightning.figures import loss_surface_figure
        >>> losses = torch.tensor([[2.0, 1.0, 2.0], [3.0, 1.0, 2.5]])
        >>> figure = loss_surface_figure([0.0, 1.0], [-1, 0, 1], losses, torch.tensor([1.0, 2.0]))
        >>> len(figure.axes[0].lines)
        2

    """
    figure = Figure(figsize=(6, 5), layout="constrained")
    panel = figure.add_subplot(projection="3d")
    low, high = float(sharpness.min()), float(sharpness.max())
    for index in range(0, len(epochs), max(1, len(epochs) // 60)):
        share = (float(sharpness[index]) - low) / (high - low) if high > low else 0.5
        where = np.full(len(multiples), epochs[index])
        panel.plot(multiples, where, losses[index].numpy(), color=colormaps["coolwarm"](share), linewidth=1.1)
    panel.set_xlabel("SGD steps")
    panel.set_ylabel("epoch")
    panel.set_zlabel("loss")
    panel.set_title(title, fontsize=11, color=_INK)
    return figure


def _scatter(panel: Axes, eigenvalues: Tensor, values: Tensor) -> None:
    """One point for each direction of each measurement, coloured by the measurement's place in time."""
    times = np.repeat(np.arange(len(eigenvalues)), eigenvalues.shape[1])
    finite = values.isfinite().reshape(-1).numpy()
    x, y = eigenvalues.reshape(-1).numpy()[finite], values.reshape(-1).numpy()[finite]
    panel.scatter(x, y, c=times[finite], s=14, cmap="viridis", vmin=0, vmax=max(1, len(eigenvalues) - 1))
    panel.set_xscale("symlog", linthresh=_threshold(eigenvalues))
    panel.set_xlabel("eigenvalue")
    _open_frame(panel)


def _diagonal(panel: Axes, eigenvalues: Tensor) -> None:
    """Where a quadratic loss has all points."""
    ends = eigenvalues.reshape(-1).sort().values.numpy()
    panel.plot(ends, ends, color=_LIMIT, linewidth=0.8, linestyle="--", zorder=0)


def _threshold(eigenvalues: Tensor) -> float:
    """Where a logarithmic axis of both signs is to begin: with the eigenvalues of least modulus."""
    moduli = eigenvalues.abs()
    return float(moduli[moduli > 0].min()) if bool((moduli > 0).any()) else 1.0


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
