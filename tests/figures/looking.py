"""What can be seen to be wrong with a drawn figure without looking at it."""

from collections.abc import Iterable
from itertools import combinations
from typing import Any

from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox


def draw(figure: Figure) -> Any:
    """Draw the figure; what comes back measures its texts."""
    figure.set_dpi(72)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def written(axis: Axis) -> list[str]:
    return [label.get_text() for label in axis.get_majorticklabels() if label.get_text()]


def overlapping(boxes: Iterable[Bbox]) -> list[tuple[Bbox, Bbox]]:
    shrunk = [box.padded(-0.3) for box in boxes]
    return [pair for pair in combinations(shrunk, 2) if pair[0].overlaps(pair[1])]


def check_axis(axis: Axis, renderer: Any) -> None:
    labels = [label for label in axis.get_majorticklabels() if label.get_visible() and label.get_text()]
    texts = [label.get_text() for label in labels]
    assert not overlapping(label.get_window_extent(renderer) for label in labels), texts
    assert len(set(texts)) == len(texts), texts
    assert axis.get_offset_text().get_text() == ""


def check_picture(figure: Figure) -> None:
    """Draw it: no labels overlap or stick out, none is taken apart into an offset, every axis is named."""
    renderer = draw(figure)
    page = figure.bbox.padded(1.0)
    for panel in figure.axes:
        if not panel.axison or hasattr(panel, "zaxis"):
            continue
        is_colour_bar = panel.get_label() == "<colorbar>"
        for axis in (panel.xaxis, panel.yaxis):
            check_axis(axis, renderer)
        assert panel.get_ylabel() or panel.get_subplotspec().colspan.start > 0
        shares_lower = any(
            other is not panel and other.get_xlabel() for other in panel.get_shared_x_axes().get_siblings(panel)
        )
        assert panel.get_xlabel() or shares_lower or is_colour_bar
        extents = [text.get_window_extent(renderer) for text in panel.texts]
        assert not overlapping(extents), [text.get_text() for text in panel.texts]
        if panel.get_legend() is not None:
            extents.append(panel.get_legend().get_window_extent(renderer))
        for extent in extents:
            inside = page.x0 <= extent.x0 and extent.x1 <= page.x1 and page.y0 <= extent.y0 and extent.y1 <= page.y1
            assert inside, (panel.get_ylabel(), extent, page)
        assert not panel.spines["top"].get_visible() or is_colour_bar
