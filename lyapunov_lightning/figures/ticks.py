"""Axes whose tick labels are plain numbers, as many as there is room for.

Matplotlib's own logarithmic ticks overlap on short axes and on those of both signs, thin out to a single label on
ranges below a decade, and its formatter takes out common offsets (``1e-5+2.278``). Here a locator tries sets of ticks
from fine to coarse and takes the first whose labels, as they are going to be written, have room on the axis as it is
laid out.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.ticker import Formatter, Locator, LogLocator, MaxNLocator, NullFormatter, SymmetricalLogLocator
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Which = Literal["x", "y"]

TICK_SIZE = 9.0
"""The font size of tick labels, in points."""

_MOST_LABELS = 8
_WIDE_RANGE = 30.0
"""From which ratio of the largest to the least value on a logarithmic axis shows more than a linear one."""

_MOST_DECADES = 6
"""How many decades an axis of both signs shows on either side: what is smaller is zero to the eye."""

_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def linear_axis(panel: Axes, which: Which, *, whole: bool = False) -> None:
    """A linear axis with evenly spaced ticks.

    Args:
        panel: The axes.
        which: Which of its axes.
        whole: Whether only whole numbers are marked, as for steps.

    """
    _set_scale(panel, which, "linear")
    _set_ticks(panel, which, _LinearTicks(whole))


def log_axis(panel: Axes, which: Which) -> None:
    """A logarithmic axis, which leaves out what is not positive."""
    _set_scale(panel, which, "log", nonpositive="mask")
    _set_ticks(panel, which, _LogTicks(), _MinorTicks(0.0))


def symlog_axis(panel: Axes, which: Which, threshold: float) -> None:
    """An axis that is logarithmic for both signs and linear between ``-threshold`` and ``threshold``.

    Args:
        panel: The axes.
        which: Which of its axes.
        threshold: Positive; the power of ten below is taken.

    """
    threshold = 10.0 ** math.floor(math.log10(threshold) + 1e-9)
    _set_scale(panel, which, "symlog", linthresh=threshold)
    _set_ticks(panel, which, _SymlogTicks(threshold), _MinorTicks(threshold))


def fitting_axis(panel: Axes, which: Which, values: Any) -> None:
    """Whichever of the three shows these values best.

    Args:
        panel: The axes.
        which: Which of its axes.
        values: All that is drawn along it; what is not finite does not count.

    """
    values = np.asarray(values, dtype=np.float64).reshape(-1)
    values = values[np.isfinite(values) & (values != 0)]
    moduli = np.abs(values)
    if not len(values) or moduli.max() <= _WIDE_RANGE * moduli.min():
        linear_axis(panel, which)
    elif (values > 0).all():
        log_axis(panel, which)
    else:
        symlog_axis(panel, which, max(moduli.min(), moduli.max() / 10**_MOST_DECADES))


def is_wide(values: Floats) -> bool:
    """Whether the finite ones of these values are positive and span so much that they need a logarithmic axis."""
    values = values[np.isfinite(values)]
    return bool(len(values) and values.min() > 0 and values.max() > _WIDE_RANGE * values.min())


def number_labels(values: Sequence[float] | Floats) -> list[str]:
    """How the ticks of an axis are written: without a common offset or factor beside the axis.

    Evenly spaced ticks get the same number of decimals, others as few as they need.

    Args:
        values: The ticks, ascending.

    Example::

        >>> from lyapunov_lightning.figures.ticks import number_labels
        >>> number_labels([0.0, 0.5, 1.0])
        ['0.0', '0.5', '1.0']
        >>> number_labels([2.27801, 2.27802])
        ['2.27801', '2.27802']
        >>> number_labels([1e-6, 1e-3, 1.0])
        ['10⁻⁶', '10⁻³', '1']
        >>> number_labels([-2e9, 0.0, 2e9])
        ['−2×10⁹', '0', '2×10⁹']

    """
    ticks = np.asarray(values, dtype=np.float64)
    largest = float(np.abs(ticks).max(initial=0.0))
    if not largest:
        return ["0"] * len(ticks)
    gaps = np.diff(ticks)
    evenly = len(ticks) > 1 and bool(np.allclose(gaps, gaps[0], rtol=1e-3, atol=4e-16 * largest))
    if not evenly:
        least = float(np.abs(ticks[ticks != 0]).min())
        return [_shortest(tick, in_powers=least < 0.99e-3 or largest > 1.01e4) for tick in ticks.tolist()]
    exponent = 0 if 0.99e-3 < largest < 1e7 else math.floor(math.log10(largest) + 1e-9)
    scaled = ticks / 10.0**exponent
    gap = abs(float(gaps[0])) / 10.0**exponent
    # The fewest decimals with which no tick is moved by more than a hundredth of the way to the next.
    decimals = next((d for d in range(17) if np.abs(scaled.round(d) - scaled).max() <= gap / 100), 17)
    return [
        _with_power(_grouped(f"{tick:.{decimals}f}"), exponent) if tick or not exponent else "0"
        for tick in (scaled.round(decimals) + 0.0).tolist()
    ]


def _shortest(value: float, *, in_powers: bool) -> str:
    if not value or not in_powers or value == 1:
        return _grouped(f"{value:.10g}").replace("-", "−")
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    return _with_power(f"{value / 10.0**exponent:.10g}", exponent)


def _grouped(digits: str) -> str:
    """Long whole numbers in groups of three: 10 000."""
    return f"{int(digits):,}".replace(",", "\u202f") if digits.isdigit() and len(digits) > 4 else digits


def _with_power(digits: str, exponent: int) -> str:
    digits = digits.replace("-", "−")
    if not exponent:
        return digits
    power = f"10{str(exponent).translate(_SUPERSCRIPTS)}"
    return {"1": power, "−1": f"−{power}"}.get(digits, f"{digits}×{power}")


class _PlainNumbers(Formatter):
    """Writes ticks by `number_labels`."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}".replace("-", "−")

    def format_ticks(self, values: Any) -> list[str]:
        """Write all ticks of an axis."""
        return number_labels(values)


def _room_for(axis: Axis, ticks: Floats) -> bool:
    """Whether the labels of these ticks neither overlap nor crowd the axis."""
    if len(ticks) > _MOST_LABELS:
        return False
    if len(ticks) < 2:
        return True
    window, panel = axis.get_view_interval(), axis.axes
    low, high = axis.get_transform().transform(np.asarray(window, dtype=np.float64))
    if high == low:
        return True
    pixels = panel.bbox.width if isinstance(axis, XAxis) else panel.bbox.height
    figure = panel.get_figure(root=True)
    if figure is None:
        return True
    points = pixels * 72 / figure.dpi
    places = (axis.get_transform().transform(ticks) - low) / (high - low) * points
    if isinstance(axis, XAxis):
        sizes = np.array([_width(label) for label in number_labels(ticks)])
        needed = (sizes[1:] + sizes[:-1]) / 2 + TICK_SIZE
    else:
        needed = np.full(len(ticks) - 1, 1.6 * TICK_SIZE)
    return bool((np.abs(np.diff(places)) >= needed).all())


def _width(label: str) -> float:
    """About the width of a label in points: a digit is 0.64 of the font size wide, a raised one 0.4."""
    raised = sum(character in "⁰¹²³⁴⁵⁶⁷⁸⁹⁻" for character in label)
    return TICK_SIZE * (0.4 * raised + 0.66 * (len(label) - raised))


def _fitting(axis: Axis, candidates: Iterable[Floats]) -> Floats:
    """The first set of ticks that has room and marks two places at least; else the last that marks any."""
    low, high = sorted(axis.get_view_interval())
    slack = 1e-9 * (high - low)
    found = np.empty(0)
    for ticks in candidates:
        inside = ticks[(ticks >= low - slack) & (ticks <= high + slack)]
        if not len(inside):
            continue
        if len(inside) > 1 and _room_for(axis, inside):
            return inside
        found = inside
    return found[:1]


def _evenly_spaced(low: float, high: float, whole: bool = False) -> Iterator[Floats]:
    """Round numbers in ever wider steps."""
    for most in range(_MOST_LABELS - 1, 0, -1):
        locator = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=1)
        yield np.asarray(locator.tick_values(low, high), dtype=np.float64)


class _LinearTicks(MaxNLocator):
    def __init__(self, whole: bool) -> None:
        super().__init__(_MOST_LABELS, integer=whole)
        self._whole = whole

    def tick_values(self, vmin: float, vmax: float) -> Any:
        return _fitting(_axis(self), _evenly_spaced(vmin, vmax, self._whole))


class _LogTicks(LogLocator):
    def tick_values(self, vmin: float, vmax: float) -> Any:
        return _fitting(_axis(self), self._candidates(*sorted((vmin, vmax))))

    def _candidates(self, low: float, high: float) -> Iterator[Floats]:
        if not (0 < low < high < math.inf):
            return
        exponents = np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        decades: Floats = np.asarray(10.0**exponents, dtype=np.float64)
        marked = ((decades >= low) & (decades <= high)).sum()
        if marked < 3:
            parts = np.outer(decades, [1, 2, 5]).reshape(-1)
            if ((parts >= low) & (parts <= high)).sum() > 2:
                yield parts
                yield np.outer(decades, [1, 3]).reshape(-1)
                if marked == 2:
                    yield decades
            yield from _evenly_spaced(low, high)
        yield from _strides(exponents)


class _SymlogTicks(SymmetricalLogLocator):
    def __init__(self, threshold: float) -> None:
        super().__init__(base=10, linthresh=threshold)
        self._threshold = threshold

    def tick_values(self, vmin: float, vmax: float) -> Any:
        return _fitting(_axis(self), self._candidates(*sorted((vmin, vmax))))

    def _candidates(self, low: float, high: float) -> Iterator[Floats]:
        first = math.log10(self._threshold)
        most = max(1, math.ceil(math.log10(max(abs(low), abs(high)) / self._threshold)) + 1)
        # Zero, then on both sides every n-th decade: on this axis they are as far apart as the threshold from zero.
        whole = [10.0 ** (first + np.arange(stride - 1, most, stride)) for stride in range(1, most + 1)]
        for decades in whole:
            ticks = np.concatenate([-decades[::-1], [0.0], decades])
            if ((ticks >= low) & (ticks <= high)).sum() > 2:
                yield ticks
        yield from _evenly_spaced(low, high)
        yield np.array([0.0])


class _MinorTicks(Locator):
    """Unlabelled marks at 2 ... 9 times each power of ten on up to six decades, at the powers alone beyond."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def __call__(self) -> Any:
        return self.tick_values(*_axis(self).get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> Any:
        largest = max(abs(vmin), abs(vmax))
        least = self._threshold or min(vmin, vmax)
        if not 0 < least < largest < math.inf:
            return []
        exponents = np.arange(math.floor(math.log10(least) + 1e-9), math.ceil(math.log10(largest)) + 1)
        parts = np.arange(1, 10) if len(exponents) <= _MOST_DECADES else np.ones(1)
        ticks = np.outer(10.0**exponents, parts).reshape(-1)
        if self._threshold:
            ticks = np.concatenate([-ticks[::-1], ticks])
        return ticks[(ticks >= min(vmin, vmax)) & (ticks <= max(vmin, vmax))]


def _strides(exponents: NDArray[Any]) -> Iterator[Floats]:
    """Every power of ten, every second, and so on."""
    for stride in range(1, len(exponents) + 1):
        yield np.asarray(10.0 ** exponents[exponents % stride == 0], dtype=np.float64)


def _axis(locator: Locator) -> Axis:
    assert isinstance(locator.axis, Axis), "a locator is asked for ticks once it belongs to an axis"
    return locator.axis


def _set_scale(panel: Axes, which: Which, scale: str, **options: Any) -> None:
    (panel.set_xscale if which == "x" else panel.set_yscale)(scale, **options)


def _set_ticks(panel: Axes, which: Which, major: Locator, minor: Locator | None = None) -> None:
    axis: Axis = panel.xaxis if which == "x" else panel.yaxis
    axis.set_major_locator(major)
    axis.set_major_formatter(_PlainNumbers())
    if minor is not None:
        axis.set_minor_locator(minor)
    axis.set_minor_formatter(NullFormatter())
