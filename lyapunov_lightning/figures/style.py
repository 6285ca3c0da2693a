"""The one style of all figures: a picture, its panels, and what is written on them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.rcsetup import cycler
from matplotlib.ticker import NullLocator

from lyapunov_lightning.figures.ticks import Floats, linear_axis

INK = "#333333"
RED, BLUE, OCHRE, TEAL, PURPLE, SKY, GREY = COLOURS = (
    "#c1432e",
    "#2f74b0",
    "#e0a52f",
    "#45ab8f",
    "#5c3566",
    "#8fc4e6",
    "#707070",
)
"""They differ in lightness, so that they can be distinguished with any of the common colour blindnesses."""

IN_TIME = LinearSegmentedColormap.from_list("in_time", colormaps["viridis"](np.linspace(0.0, 0.9, 256)))
"""For points whose colour says when they were measured; without the yellow end, which is hard to see on white."""

WIDTH = 7.0
"""The width of a picture with one column of panels, in inches."""

MOST_NAMES = 6
"""How many curves of one family are all named; of more only the first and the last are."""

TICK_SIZE = 9.0
"""The font size of tick labels and small text, in points."""

_LEFT, _RIGHT, _BELOW, _ABOVE, _ROW = 0.95, 0.12, 0.5, 0.45, 0.19
"""Margins of a figure whose layout is not measured, and the height of a row of its key, in inches."""

_CARD_WIDTH, _CARD_HEIGHT, _CARD_DPI = 4.4, 0.8, 200
"""The width of a figure for a logger's card, in inches, the share of its height, and its resolution: TensorBoard shows
it about 350 pixels wide, so that texts of 9 points are 10 pixels high. In pictures of 7 inches they were 6, and could
not be read."""

_SAVED_DPI = 200
_SHOWN_DPI = 150

_LOOKED_AT = (
    *("axes.", "axes3d.", "errorbar.", "figure.", "font.", "grid.", "image.", "legend.", "lines.", "markers."),
    *("mathtext.", "patch.", "path.", "pdf.", "savefig.", "scatter.", "svg.", "text.", "xtick.", "ytick."),
)
"""The settings on which the look of a figure depends. They start from Matplotlib's defaults, so that our figures look
the same whatever a user has set for their own."""

_STYLE: dict[Any, Any] = {
    **{name: value for name, value in matplotlib.rcParamsDefault.items() if name.startswith(_LOOKED_AT)},
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.unicode_minus": True,
    "axes.xmargin": 0.02,
    "axes.ymargin": 0.06,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
    "figure.dpi": _SHOWN_DPI,
    "figure.facecolor": "white",
    "legend.borderaxespad": 0.0,
    "legend.columnspacing": 1.6,
    "legend.fontsize": TICK_SIZE,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.handletextpad": 0.6,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "pdf.fonttype": 42,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",  # text stays text, which can be searched and edited
    "svg.hashsalt": "lyapunov_lightning",  # equal figures are equal files
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": TICK_SIZE,
    "xtick.minor.size": 2,
    "ytick.color": INK,
    "ytick.labelsize": TICK_SIZE,
    "ytick.minor.size": 2,
}


@contextmanager
def house_style() -> Iterator[None]:
    """Draw with our settings of Matplotlib; a user's own are back afterwards."""
    # `rc_context` puts back all settings, also where drawing fails. A style that was set for good would change the
    # user's own figures in the same process.
    with matplotlib.rc_context(_STYLE):
        yield


_GIVEN: ContextVar[Axes | None] = ContextVar("given", default=None)


@contextmanager
def drawn_on(ax: Axes) -> Iterator[None]:
    """Draw the first panel of each figure on axes of one's own, in place of a new figure.

    What a function of this package returns is then of no further use. Legends stand above the axes, as always.

    Args:
        ax: The axes.

    Example::

        >>> from matplotlib.figure import Figure
        >>> from lyapunov_lightning.figures import drawn_on, sharpness_figure
        >>> left, right = Figure().subplots(1, 2)
        >>> with drawn_on(right):
        ...     _ = sharpness_figure([0, 10, 20], [1.0, 3.0, 4.1], [4.0, 4.0, 4.0])
        >>> right.get_ylabel()
        'curvature'

    """
    if not isinstance(ax, Axes):
        raise ValueError(f"`ax` should be Axes of Matplotlib, got {ax!r}.")
    token = _GIVEN.set(ax)
    try:
        yield
    finally:
        _GIVEN.reset(token)


_ON_CARD: ContextVar[bool] = ContextVar("on_card", default=False)


@contextmanager
def sized_for_cards() -> Iterator[None]:
    """Make figures of a size at which their texts can be read on the small cards of loggers."""
    token = _ON_CARD.set(True)
    try:
        yield
    finally:
        _ON_CARD.reset(token)


class Picture(Figure):
    """A Matplotlib figure that a notebook shows by itself, and that is saved for paper and screen at once.

    Pyplot does not know it, so that it opens no window and needs no closing.

    Example::

        >>> from tempfile import TemporaryDirectory
        >>> from lyapunov_lightning.figures import sharpness_figure
        >>> picture = sharpness_figure([0, 10, 20], [1.0, 3.0, 4.1], [4.0, 4.0, 4.0])
        >>> with TemporaryDirectory() as folder:
        ...     [path.name for path in picture.save(f"{folder}/sharpness")]
        ['sharpness.png', 'sharpness.svg']

    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.given = _GIVEN.get()
        with house_style():
            super().__init__(*args, **kwargs)

    def subplots(self, *args: Any, **kwargs: Any) -> Any:
        """As Matplotlib's own, with the first panel on the axes that were given, if any were."""
        panels = super().subplots(*args, **kwargs)
        if self.given is None:
            return panels
        if isinstance(panels, Axes):
            return self.given
        panels = panels.copy()
        panels.flat[0] = self.given
        return panels

    def space(self) -> Any:
        """One panel of three dimensions.

        Raises:
            ValueError: If axes were given that have two.

        """
        if self.given is None:
            return self.add_subplot(projection="3d")
        if self.given.name != "3d":
            raise ValueError("`ax` should have three dimensions for this figure: `subplot_kw={'projection': '3d'}`.")
        return self.given

    def draw(self, renderer: RendererBase) -> None:
        """Draw it in its own style: Matplotlib makes ticks when they are first drawn, with the settings of then."""
        with house_style():
            super().draw(renderer)

    def save(self, path: str | Path) -> list[Path]:
        """Write a PNG of 200 dots per inch and an SVG side by side.

        Args:
            path: Where to write; missing directories are made. A suffix that names a format of pictures is replaced;
                a format other than these two is written as well.

        Returns:
            What was written.

        """
        path = Path(path)
        formats = {"png": None, "svg": None}
        suffix = path.suffix.removeprefix(".").lower()
        # Only then a suffix: "run.1" is a name with a dot, and `with_suffix` would write every run to the same file.
        if suffix in self.canvas.get_supported_filetypes():
            formats[suffix] = None
            path = path.with_suffix("")
        path.parent.mkdir(parents=True, exist_ok=True)
        written = [path.with_name(f"{path.name}.{name}") for name in formats]
        with house_style():
            for name, file in zip(formats, written, strict=True):
                # Without the date, so that the same figure gives the same file.
                self.savefig(file, dpi=_SAVED_DPI, metadata={"Date": None} if name == "svg" else None)
        return written

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        buffer = BytesIO()
        self.savefig(buffer, format="png", dpi=_SHOWN_DPI)
        return buffer.getvalue()


def new_picture(width: float, height: float, title: str = "", *, is_measured: bool = True) -> Picture:
    """An empty picture with a title.

    Args:
        width: In inches.
        height: In inches, without the title.
        title: Written over all panels, at the left.
        is_measured: Whether the layout is that of the texts as they are; else `with_fixed_margins` is to make it.

    """
    layout = "constrained" if is_measured else None
    # What is wider has several columns of panels, whose texts would run into each other.
    on_card = _ON_CARD.get() and width <= WIDTH
    if on_card:
        width, height = min(width, _CARD_WIDTH), _CARD_HEIGHT * height
    picture = Picture(figsize=(width, height + (0.3 if title else 0.0)), layout=layout)
    if on_card:
        picture.set_dpi(_CARD_DPI)
    if title:
        picture.suptitle(title, fontsize=11.5, color=INK, x=0.01, ha="left")
    return picture


def stacked(picture: Picture, heights: Sequence[float], steps_label: str = "step") -> list[Axes]:
    """Panels one below the other that share an axis of steps.

    Args:
        picture: Where to put them.
        heights: Their relative heights.
        steps_label: What the shared axis is.

    """
    panels = picture.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights))[:, 0].tolist()
    for panel in panels:
        linear_axis(panel, "y")
    linear_axis(panels[0], "x", whole=True)
    for panel in {panels[-1], picture.given} - {None}:
        panel.set_xlabel(steps_label)
    picture.align_ylabels([panel for panel in panels if panel is not picture.given])
    return panels  # type: ignore[no-any-return]


def with_fixed_margins(picture: Picture, panels: Sequence[Axes], rows: int = 1) -> None:
    """Lay out stacked panels, with a legend above each, by margins that are known beforehand.

    For figures that are drawn while a training waits: it takes half the time of a layout that measures every text, and
    without the small ticks of logarithmic axes, a hundred objects, half of what is left.

    Args:
        picture: Made by `new_picture` without a measured layout, with everything drawn.
        panels: Its panels.
        rows: How many rows the key of the first panel has.

    """
    width, height = picture.get_size_inches()
    above = _ABOVE + (0.3 if picture.get_suptitle() else 0.0) + _ROW * max(rows - 1, 0)
    picture.subplots_adjust(
        left=_LEFT / width, right=1 - _RIGHT / width, bottom=_BELOW / height, top=1 - above / height, hspace=0.35
    )
    for panel in panels:
        if panel is picture.given:
            continue  # which has margins of its own
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_minor_locator(NullLocator())
        panel.yaxis.set_label_coords((0.2 - _LEFT) / (width - _LEFT - _RIGHT), 0.5)


def floats(values: Any) -> Floats:
    """Numbers, tensors and Nones as an array in which NaN stands for all that cannot be drawn."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    array = np.array(values, dtype=np.float64)  # None becomes NaN
    array[~np.isfinite(array)] = np.nan
    return array


def curve(panel: Axes, steps: Any, values: Any, **options: Any) -> Line2D:
    """A line through what is finite, with dots where a line alone would not show: at single points and few of them."""
    steps, values = floats(steps), floats(values)
    missing = np.pad(np.isnan(values), 1, constant_values=True)
    alone = ~missing[1:-1] & missing[:-2] & missing[2:]
    # A line between a missing value and the next has no length, and a measurement there would be invisible.
    dotted = ~missing[1:-1] if len(values) < 8 else alone
    (line,) = panel.plot(steps, values, **options)
    if "marker" not in options and dotted.any():
        line.set(marker="o", markersize=3.5 if len(values) < 8 else 2.5, markevery=np.flatnonzero(dotted).tolist())
    return line


def key(panel: Axes, **options: Any) -> int:
    """The legend above the panel, where it covers no data, in a row if it fits; none where nothing has a name.

    Returns:
        How many rows it has.

    """
    handles = options.get("handles", panel.get_legend_handles_labels()[0])
    if not handles:
        return 0
    figure, grid = panel.get_figure(root=True), panel.get_gridspec()
    # In points, 72 to the inch, without the 0.9 inch that the labels of the axis take at the left.
    room = 72 * ((figure.get_figwidth() if figure else WIDTH) - 0.9) / (grid.ncols if grid else 1)
    columns = next((n for n in range(len(handles), 1, -1) if _width_of_key(handles, n) < room), 1)
    panel.legend(loc="lower left", bbox_to_anchor=(0.0, 1.02), ncols=columns, **options)
    return -(-len(handles) // columns)


def _width_of_key(handles: Sequence[Any], columns: int) -> float:
    """About how wide a legend of so many columns is, in points: an entry has its text, a line and gaps."""
    # Estimated: the true width is known after drawing, and laying a figure out takes half a second. A letter is about
    # 0.5 of the font size wide.
    widths = [TICK_SIZE * (0.52 * len(str(handle.get_label())) + 4.0) for handle in handles]
    return float(sum(max(column) for column in np.array_split(widths, columns)))


def note(panel: Axes, text: str) -> None:
    """A few words in the middle of a panel that has nothing to draw."""
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color=GREY, fontsize=TICK_SIZE)
    panel.set_yticks([])


def write(panel: Axes, text: str, xy: tuple[float, float], **options: Any) -> None:
    """Small text next to a point, with a white rim, so that it can be read where it crosses lines."""
    options = {"fontsize": TICK_SIZE, "textcoords": "offset points", "annotation_clip": False, **options}
    rim = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    panel.annotate(text, xy, path_effects=rim, **options)


def mark_lower_edge(panel: Axes, places: Sequence[float], label: str) -> None:
    """Short strokes on the lower edge of a panel, where something happened or is known."""
    where: Any = panel.get_xaxis_transform()
    panel.plot(
        floats(places),
        np.zeros(len(places)),
        "|",
        color=RED,
        markersize=9,
        markeredgewidth=1.0,
        clip_on=False,
        transform=where,
        label=label,
    )


def label_ends(panel: Axes, labels: Sequence[tuple[str, float, Any]], height: float) -> None:
    """Names of curves at their right ends, moved apart where they would overlap.

    Call it when all else is drawn: the labels stand where the limits of the axis, as they are then, put the values.

    Args:
        panel: The axes.
        labels: For each curve its name, its last value and its colour.
        height: About the height of the panel in inches.

    """
    # In the scale of the axis: on a logarithmic one names at 1 and 2 stand as far apart as at 100 and 200.
    low, high = panel.transScale.transform([(1.0, limit) for limit in panel.get_ylim()])[:, 1]
    drawable = [(name, value, colour) for name, value, colour in labels if np.isfinite(value)]
    if panel.get_yscale() == "log":
        drawable = [label for label in drawable if label[1] > 0]
    if not drawable:
        return
    places = np.array([panel.transScale.transform((1.0, value))[1] for _, value, _ in drawable])
    places = (places - low) / (high - low)
    room = 1.35 * TICK_SIZE / (72 * height)
    order = np.argsort(places)
    for place, index in zip(_apart(places[order], room), order, strict=True):
        name, _, colour = drawable[index]
        write(panel, name, (1.0, place), xycoords="axes fraction", xytext=(3, 0), va="center", color=colour)


def _apart(places: Floats, room: float) -> Floats:
    """Ascending places moved to be `room` apart: groups that touch stay centred where they were."""
    # By groups and not one after the other from below, which would push all names of a dense family upwards, away from
    # their curves.
    groups: list[list[float]] = []
    for place in places.tolist():
        groups.append([place])
        while len(groups) > 1:
            (before, after) = groups[-2:]
            if np.mean(after) - np.mean(before) >= room * (len(before) + len(after)) / 2:
                break
            groups[-2:] = [before + after]
    moved = [np.mean(group) + room * (np.arange(len(group)) - (len(group) - 1) / 2) for group in groups]
    return np.concatenate(moved) if moved else places


def shades(count: int, name: str = "plasma") -> Floats:
    """Colours of an ordered set, the first the darkest; none so light that it is lost on white."""
    return np.asarray(colormaps[name](np.linspace(0.0, 0.78, count)), dtype=np.float64)


def colour_bar(
    picture: Picture, panels: Any, low: float, high: float, label: str, *, whole: bool = False, **options: Any
) -> None:
    """The key of a colour map at the side of the panels."""
    mappable = ScalarMappable(Normalize(low, high), IN_TIME)
    if picture.given is not None:
        panels = picture.given
    bar = picture.colorbar(mappable, ax=panels, aspect=30, **{"pad": 0.02, "shrink": 0.95, **options})
    linear_axis(bar.ax, "y", whole=whole)
    bar.set_label(label)
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()


def subscript(number: int) -> str:
    """A number in small lowered digits."""
    return str(number).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def rank_names(largest: int, smallest: int) -> list[str]:
    """λ₁, λ₂ ... for the largest eigenvalues, then λₙ, λₙ₋₁ ... for the smallest of n."""
    upper = [f"λ{subscript(rank)}" for rank in range(1, largest + 1)]
    lower = ["λₙ" if rank == 0 else f"λₙ₋{subscript(rank)}" for rank in range(smallest)]
    return upper + lower
