"""The curvature of the diagonal blocks of the Hessian, such as those of the layers, over the training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm

from lyapunov_lightning.figures.style import GREY, TICK_SIZE, WIDTH, Picture, floats, house_style, new_picture, note
from lyapunov_lightning.figures.ticks import Floats, linear_axis, number_label

_ROW, _MOST_ROWS = 0.19, 40
"""The height of a block's row in inches, in which its name can be read, and how many rows are of this height: of more
blocks every second name is written, or every third."""

_LONGEST = 32
"""Letters of a name; of a longer one its beginning and its end are written."""


@house_style()
def blocks_figure(
    steps: Sequence[float],
    lambda_max: Sequence[Mapping[str, float]],
    traces: Sequence[Mapping[str, float]] = (),
    trace_errors: Sequence[Mapping[str, float]] = (),
    *,
    title: str = "Sharpness of the diagonal blocks",
) -> Picture:
    """The largest eigenvalue of each block, a row each, over the training; beside it the traces, if there are any.

    Both have a logarithmic scale of colours. What is not positive is grey, as is a trace that is not above its standard
    error; what was not measured is white.

    Args:
        steps: Optimizer steps of the measurements, ascending, T of them.
        lambda_max: For each measurement the largest eigenvalue of each block, by its name.
        traces: For each measurement the trace of each block.
        trace_errors: For each measurement their standard errors.
        title: Title of the figure; empty for none.

    Returns:
        The figure.

    Example::

        >>> from lyapunov_lightning.figures import blocks_figure
        >>> figure = blocks_figure([0, 10], [{"net.0": 2.0, "net.2": 5.0}, {"net.0": 4.0, "net.2": 3.0}])
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['0', '2']

    """
    # Blocks come and go as parameters are frozen and unfrozen.
    names = list(dict.fromkeys(name for values in lambda_max for name in values))
    quantities = {"largest eigenvalue": lambda_max} | ({"trace": traces} if any(traces) else {})
    height = 0.9 + _ROW * min(max(len(names), 5), _MOST_ROWS)
    picture = new_picture(WIDTH if len(quantities) == 1 else 1.5 * WIDTH, height, title)
    panels = np.atleast_1d(picture.subplots(1, len(quantities), sharey=True)).tolist()
    for panel, (quantity, measured) in zip(panels, quantities.items(), strict=True):
        rows = _rows(names, measured)
        if quantity == "trace" and trace_errors:
            rows = np.where(rows <= _rows(names, trace_errors), 0.0, rows)
        _draw_map(panel, floats(list(steps)), rows, quantity)
        panel.set_xlabel("step")
    every = -(-len(names) // _MOST_ROWS)
    shown = range(0, len(names), every)
    shared = _shared_modules(names)
    short = [_short(name.removeprefix(f"{shared}.")) for name in names]
    panels[0].set_yticks(list(shown), [short[place] for place in shown], fontsize=TICK_SIZE)
    panels[0].set_ylabel(f"block of {_short(shared)}" if shared else "block")
    panels[0].set_ylim(len(names) - 0.5, -0.5)  # the first layer at the top
    return picture


def _rows(names: Sequence[str], measured: Sequence[Mapping[str, float]]) -> Floats:
    return floats([[values.get(name) for values in measured] for name in names])


def _draw_map(panel: Axes, steps: Floats, rows: Floats, quantity: str) -> None:
    """A cell for each block and measurement, which reaches halfway to the next one."""
    linear_axis(panel, "x", whole=True)
    edges = _edges(steps)
    beside = np.arange(len(rows) + 1) - 0.5
    panel.set_xlim(edges[0], edges[-1])
    panel.tick_params(axis="y", length=0)
    positive = np.ma.masked_where(~(rows > 0), rows)
    other = np.ma.masked_where(~(rows <= 0), np.zeros_like(rows))
    panel.pcolormesh(edges, beside, other, cmap=ListedColormap([GREY]), rasterized=True)
    if not positive.count():
        note(panel, f"no positive {quantity}")
        return
    low, high = float(positive.min()), float(positive.max())
    # At least a factor of two, or the noise of blocks that are all alike would fill the scale.
    middle = (low * high) ** 0.5
    norm = LogNorm(min(low, middle / 2**0.5), max(high, middle * 2**0.5))
    cells = panel.pcolormesh(edges, beside, positive, cmap="viridis", norm=norm, rasterized=True)
    figure: Any = panel.figure  # that of axes which were given
    bar = figure.colorbar(cells, ax=panel, aspect=30, pad=0.02)
    bar.ax.minorticks_off()
    ticks = _ticks(norm.vmin, norm.vmax)
    bar.set_ticks(ticks, labels=[number_label(tick) for tick in ticks])
    bar.set_label(quantity)
    bar.outline.set_visible(False)


def _edges(steps: Floats) -> Floats:
    """Where the cells of measurements at these steps begin and end."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    between = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - between[0]], between, [2 * steps[-1] - between[-1]]])


def _ticks(low: Any, high: Any) -> list[float]:
    """Powers of ten, or where there are few of them numbers between, at most seven."""
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    for digits in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)):
        ticks = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: -(-len(ticks) // 7)]


def _shared_modules(names: Sequence[str]) -> str:
    """The modules that all blocks lie in, which need not be written at each of them."""
    modules = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for level in zip(*modules, strict=False):
        if len(names) == 1 or len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _short(name: str) -> str:
    half = _LONGEST // 2
    return name if len(name) <= _LONGEST else f"{name[: half - 1]}…{name[-half:]}"
