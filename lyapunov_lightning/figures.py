"""Figures of what the callbacks measured."""

from collections.abc import Sequence
from typing import Optional

from matplotlib.figure import Figure

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
        panel.spines[["top", "right"]].set_visible(False)
    return figure
