"""What measures and drawings of several papers share."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from examples.papers.record import Record
from lyapunov_lightning.figures.style import Picture
from lyapunov_lightning.figures.ticks import Floats


def median(values: Sequence[float] | Floats) -> float | None:
    """The median; None if there is nothing."""
    return float(np.median(values)) if len(values) else None


def running_mean(losses: Sequence[float], width: int = 20) -> Floats:
    """The mean of each loss and those before it, `width` of them where there are so many."""
    sums = np.cumsum(np.insert(np.asarray(losses, dtype=np.float64), 0, 0.0))
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def with_strength(records: Sequence[Record]) -> list[tuple[Record, float]]:
    """The records with how opaque each is drawn: the first seed last, on top of the others, which are faint."""
    return [(record, 0.35) for record in records[1:]] + [(record, 1.0) for record in records[:1]]


def one_key(picture: Picture, *panels: Axes) -> None:
    """One legend over the picture: each name in these panels once."""
    handles = {handle.get_label(): handle for panel in panels for handle in panel.get_legend_handles_labels()[0]}
    if handles:
        picture.legend(handles=list(handles.values()), loc="outside upper left", ncols=len(handles))
