"""The three kinds of axis in the figures: Matplotlib's own ticks, labelled with plain numbers."""

import math
import re
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import (
    FuncFormatter,
    Locator,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    SymmetricalLogLocator,
)
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Which = Literal["x", "y"]

_WIDE_RANGE = 30.0
"""The ratio of the largest to the smallest value from which a logarithmic axis shows more than a linear one."""

_MOST_DECADES = 6
"""How many decades an axis of both signs shows on either side; what is smaller looks like zero on it."""

_STEPS = [1, 2, 2.5, 5, 10]
_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def linear_axis(panel: Axes, which: Which, *, whole: bool = False) -> None:
    """A linear axis; with `whole` only whole numbers are marked, as for steps."""
    _set(panel, which, "linear", MaxNLocator(_most(panel, which), steps=_STEPS, integer=whole, min_n_ticks=2 - whole))


def log_axis(panel: Axes, which: Which) -> None:
    """A logarithmic axis, which leaves out what is not positive."""
    _set(panel, which, "log", _LogTicks(numticks=_most(panel, which)), nonpositive="mask")


def symlog_axis(panel: Axes, which: Which, threshold: float) -> None:
    """An axis that is logarithmic for both signs and linear up to `threshold`, rounded down to a power of ten."""
    threshold = 10.0 ** np.floor(np.log10(threshold) + 1e-9)
    _set(panel, which, "symlog", _SymlogTicks(threshold), linthresh=threshold)


def fitting_axis(panel: Axes, which: Which, values: Any) -> None:
    """Whichever of the three shows these values best; values that are not finite do not count."""
    values = np.asarray(values, dtype=np.float64).reshape(-1)
    moduli = np.abs(values[np.isfinite(values) & (values != 0)])
    if not len(moduli) or moduli.max() <= _WIDE_RANGE * moduli.min():
        linear_axis(panel, which)
    elif not (values < 0).any():
        log_axis(panel, which)
    else:
        symlog_axis(panel, which, max(moduli.min(), moduli.max() / 10**_MOST_DECADES))


def is_wide(values: Floats) -> bool:
    """Whether the finite ones among these values are positive and span so much that they need a logarithmic axis."""
    values = values[np.isfinite(values)]
    return bool(len(values) and values.min() > 0 and values.max() > _WIDE_RANGE * values.min())


def number_label(value: float, place: int | None = None) -> str:
    """How a number is written at a tick, whatever the place of the tick.

    Matplotlib takes a common offset or power out of the labels (``1e-5+2.278``) and writes it above the axis, where it
    is easily missed and where our legends are.

    Example::

        >>> from lyapunov_lightning.figures.ticks import number_label
        >>> [number_label(value) for value in (0.0, 0.5, 2.27801, 1e-6, -2e9)]
        ['0', '0.5', '2.27801', '10⁻⁶', '−2×10⁹']

    """
    text = f"{value:.10g}"
    if value and not 0.99e-3 < abs(value) < 0.99e5:
        digits, exponent = f"{value:.9e}".split("e")
        text = re.sub("^(-?)1×", r"\1", f"{float(digits):.10g}×10{str(int(exponent)).translate(_SUPERSCRIPTS)}")
    return text.replace("-", "−")


class _LogTicks(LogLocator):
    """Powers of ten as Matplotlib chooses them, and numbers between where fewer than two of these are in view."""

    def tick_values(self, vmin: float, vmax: float) -> Any:
        ratio = vmax / vmin if vmin > 0 else np.inf
        if ratio < 5:  # there may be one of 1, 2, 5, 10 ... or none
            return MaxNLocator(2, steps=_STEPS).tick_values(vmin, vmax)
        self.set_params(subs=[1, 2, 5] if ratio < 10 else [1, 3] if ratio < 100 else [1])
        return super().tick_values(vmin, vmax)


class _SymlogTicks(SymmetricalLogLocator):
    """Zero and every n-th power of ten.

    Matplotlib's own locator marks the threshold on both sides of zero, where labels overlap if there are many decades,
    and on an axis that ends at 10⁻³ it counts the decades up to 1 and drops most ticks.
    """

    def __init__(self, threshold: float) -> None:
        super().__init__(base=10, linthresh=threshold)
        self._threshold = threshold

    def tick_values(self, vmin: float, vmax: float) -> Any:
        decades = np.log10(np.maximum(np.abs([vmin, vmax]) / self._threshold, 1.0))
        stride = max(1, math.ceil(decades.sum() / 4))
        powers = self._threshold * 10.0 ** np.arange(stride - 1, decades.max() + 1, stride)
        return np.concatenate([-powers[::-1], [0.0], powers])


def _most(panel: Axes, which: Which) -> Any:
    """How many ticks the labels have room for, on a panel that has its first size."""
    # Matplotlib reckons with labels 27 points wide below an axis, but 1.2×10⁻⁹ takes 45 and a gap. On the left a label
    # is one line high whatever it says.
    return "auto" if which == "y" else max(3, int(panel.bbox.width / panel.figure.dpi / 0.85))


def _set(panel: Axes, which: Which, scale: str, ticks: Locator, **options: Any) -> None:
    (panel.set_xscale if which == "x" else panel.set_yscale)(scale, **options)
    axis = panel.xaxis if which == "x" else panel.yaxis
    axis.set_major_locator(ticks)
    axis.set_major_formatter(FuncFormatter(number_label))
    axis.set_minor_formatter(NullFormatter())
