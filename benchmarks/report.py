"""What a benchmark has to say: figures beside their targets, tables, and panels of the picture."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.timing import Sample
from lyapunov_lightning.figures.style import Picture, house_style, new_picture

Draw = Callable[[Axes, Any], None]

PANELS = [["eigenpairs", "products"], ["training", "growth"], ["training", "processes"]]
"""Where the sections stand in the picture."""


@dataclass(frozen=True)
class Settings:
    """How a benchmark is run.

    Attributes:
        root: Folder of CIFAR-10; random images without.
        repeats: Interleaved repeats of what is timed.
        jobs: How many processes of one thread each share the problems of a section.
        quick: Whether all is so small that it takes seconds, and says nothing about speed.

    """

    root: str | None = None
    repeats: int = 3
    jobs: int = 2
    quick: bool = False


@dataclass(frozen=True)
class Figure:
    """A figure with its target, if it has one.

    Attributes:
        name: What was measured.
        sample: The repeats; none where it could not be measured.
        bound: The target.
        at_least: Whether more is better.
        missing: Why it could not be measured.

    """

    name: str
    sample: Sample
    bound: float | None = None
    at_least: bool = False
    missing: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met by the median; None where there is none, or no figure."""
        if self.bound is None or not self.sample.values:
            return None
        return self.sample.median >= self.bound if self.at_least else self.sample.median <= self.bound

    @property
    def row(self) -> list[str]:
        """As a row of the table."""
        target = "" if self.bound is None else f"{'≥' if self.at_least else '≤'} {self.bound:g}"
        verdict = {True: "met", False: "**missed**", None: "not measured" if self.bound is not None else ""}[
            self.is_met
        ]
        if not self.sample.values:
            return [self.name, self.missing, "", target, verdict]
        low, high = self.sample.quartiles
        return [self.name, f"{self.sample.median:.2f}", f"{low:.2f} to {high:.2f}", target, verdict]


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading of each column."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        return f"**{self.title}**\n\n{text}" if self.title else text


@dataclass(frozen=True)
class Outcome:
    """What a section has found.

    Attributes:
        section: Its name on the command line.
        title: The heading.
        about: How it was measured, and the rule of its target.
        figures: What is to be compared with a target.
        tables: Everything that was measured.
        plot: What is drawn of it, by names.
        seconds: How long it took.

    """

    section: str
    title: str
    about: str
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plot: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Run:
    """Everything that was measured in one run.

    Attributes:
        about: Where and how.
        outcomes: What each section has found.

    """

    about: str
    outcomes: list[Outcome]

    def markdown(self) -> str:
        """As Markdown: the one table first, then everything in detail."""
        figures = [figure.row for outcome in self.outcomes for figure in outcome.figures]
        parts = [self.about, Table("", ["figure", "median", "quartiles", "target", ""], figures).markdown()]
        for outcome in self.outcomes:
            parts += [f"## {outcome.title}", outcome.about, *(table.markdown() for table in outcome.tables)]
        took = ", ".join(f"{outcome.section} {outcome.seconds / 60:.1f}" for outcome in self.outcomes)
        return "\n\n".join([*parts, f"Minutes that the sections took: {took}."]) + "\n"


def spread(sample: Sample, digits: int = 2) -> str:
    """The median, with the quartiles where there are repeats."""
    text = f"{sample.median:.{digits}f}"
    if len(sample.values) > 1:
        low, high = sample.quartiles
        text += f" ({low:.{digits}f}–{high:.{digits}f})"
    return text


@house_style()
def picture(run: Run, panels: Mapping[str, Draw]) -> Picture:
    """All sections that were run, in one picture."""
    shown = {outcome.section: outcome for outcome in run.outcomes if outcome.plot}
    rows = [[name if name in shown else "." for name in row] for row in PANELS]
    rows = [row for row in rows if set(row) != {"."}]
    figure = new_picture(13.0, 3.2 * max(len(rows), 1))
    if rows:
        for name, panel in figure.subplot_mosaic(rows).items():
            panels[name](panel, shown[name].plot)
            lines_of_legend = math.ceil(len(panel.get_legend_handles_labels()[0]) / 2)
            if lines_of_legend:
                panel.legend(loc="lower left", bbox_to_anchor=(0.0, 1.02), ncols=2)
            panel.set_title(shown[name].title, pad=10 + 15 * lines_of_legend)
    return figure


def names_axis(panel: Axes, names: Sequence[str]) -> None:
    """One line for each name, from the top."""
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.tick_params(axis="y", length=0)


def dot(panel: Axes, sample: Sample, height: float, **options: Any) -> None:
    """A median with its quartiles, on a line."""
    low, high = sample.quartiles
    panel.plot([low, high], [height, height], linewidth=1.2, color=options["color"], label="_")
    panel.plot([sample.median], [height], **{"marker": "o", "markersize": 5, "linestyle": "", **options})


def save(run: Run, path: Path) -> None:
    """Write it as JSON, so that it can be drawn again without being measured again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(run), indent=1, ensure_ascii=False))


def load(path: Path) -> Run:
    """What `save` wrote."""
    found = json.loads(path.read_text())
    outcomes = []
    for outcome in found["outcomes"]:
        figures = [Figure(**{**figure, "sample": _sample(figure["sample"])}) for figure in outcome.pop("figures")]
        tables = [Table(**table) for table in outcome.pop("tables")]
        outcomes.append(Outcome(**outcome, figures=figures, tables=tables))
    return Run(found["about"], outcomes)


def _sample(found: Mapping[str, Any]) -> Sample:
    return Sample(tuple(found["values"]))
