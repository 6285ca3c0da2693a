"""How a learning rate that follows the curvature develops over a run."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from lyapunov_lightning.figures.stability import Curve, draw_loss
from lyapunov_lightning.figures.style import (
    INK,
    OCHRE,
    TEAL,
    WIDTH,
    Picture,
    curve,
    floats,
    house_style,
    key,
    mark_lower_edge,
    new_picture,
    stacked,
)
from lyapunov_lightning.figures.ticks import log_axis

_LONGEST_ON_LINEAR_AXIS = 10.0
"""The step length beyond which 1 and 2 are too close to each other on a linear axis."""

Measure = Literal["stability ratio", "step length"]
"""What says how long steps are: the curvature over its stability limit, or the way to the bottom of the parabola."""

_LINES: dict[Measure, tuple[tuple[float, str, str], ...]] = {
    "stability ratio": ((1.0, "1: edge of stability", "--"),),
    # f(α) = −α + α²/2 is lowest at 1 and back at 0 at 2.
    "step length": ((1.0, "1: bottom of the parabola", "--"), (2.0, "2: nothing gained", ":")),
}
"""The values by which a curve is read, with their meanings."""


@house_style()
def learning_rate_figure(
    steps: Sequence[float],
    learning_rates: Sequence[float | None],
    step_lengths: Sequence[float | None],
    *,
    measure: Measure = "stability ratio",
    losses: Curve | None = None,
    restored_at: Sequence[float] = (),
    title: str = "Learning rate from curvature",
) -> Picture:
    """The learning rate that was set, how long the steps are, and the loss.

    Args:
        steps: Optimizer steps.
        learning_rates: The learning rate at these.
        step_lengths: How long the steps are; None where it is not known.
        measure: In what unit: the stability limit, or the step to the bottom of the parabola which slope and curvature
            along the update describe, where at 1 the loss falls the most, and at 2 nothing is gained.
        losses: Optimizer steps and the training loss at these, if it is to be drawn.
        restored_at: Steps at which earlier parameters were restored, marked on the lower edge.
        title: Title of the figure; empty for none.

    Returns:
        The figure.

    Example::

        >>> from lyapunov_lightning.figures import learning_rate_figure
        >>> figure = learning_rate_figure([0, 1, 2], [0.1, 0.2, 0.4], [None, 1.1, 0.9])
        >>> [panel.get_ylabel() for panel in figure.axes]
        ['learning rate', 'stability ratio']

    """
    picture = new_picture(WIDTH, 3.8 if losses is None else 5.2, title)
    panels = stacked(picture, [1.0, 1.0] if losses is None else [1.0, 1.0, 1.0])
    rates, lengths = floats(learning_rates), floats(step_lengths)
    curve(panels[0], steps, rates, color=TEAL, label="learning rate")
    # A rate that doubles or halves is a step of one height on this axis, early and late. Zero has no place on it.
    if np.isfinite(rates).any() and np.nanmin(rates) > 0:
        log_axis(panels[0], "y")
    panels[0].set_ylabel("learning rate")
    if len(restored_at):
        mark_lower_edge(panels[0], restored_at, "parameters restored")
        key(panels[0])

    lower = panels[1]
    curve(lower, steps, lengths, color=OCHRE, linewidth=1.2)
    for length, meaning, style in _LINES[measure]:
        lower.axhline(length, color=INK, linewidth=1.1, linestyle=style, label=meaning, zorder=3)
    key(lower)
    # Without the longest and the shortest hundredth of the steps: one length of 10⁶ would hide all others.
    low, high = np.nanquantile(np.append(lengths, [0.0, 2.2]), [0.01, 0.99])
    if high > _LONGEST_ON_LINEAR_AXIS and np.nanmin(lengths) > 0:
        log_axis(lower, "y")
    else:
        lower.set_ylim(min(low, 0.0), max(high, 2.2))
    lower.set_ylabel(measure)
    if losses is not None:
        draw_loss(panels[2], losses)
    return picture
