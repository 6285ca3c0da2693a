"""The edge of stability where the curvature differs from batch to batch: for the mean over all runs, and for one run.

``python -m examples.edge_under_noise`` looks at the smallest problem that has both edges: a linear regression with one
weight and one sample a batch, whose feature is 0 in a part of the samples and Gaussian in the rest. The curvature of a
batch then is the square of its feature, and the rarer a feature is, the less the batches agree. For several agreements,
without and with momentum, it draws over the learning rate how fast the root mean square of the weight's error and a
single run grow, by theory, and what runs of ``torch.optim.SGD`` do. Some 15 seconds of one core.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from lyapunov_lightning.curvature.stability import (
    StepMap,
    almost_sure_edge,
    lyapunov_exponent,
    mean_square_edge,
    mean_square_growth,
)
from lyapunov_lightning.figures.style import (
    BLUE,
    GREY,
    INK,
    RED,
    WIDTH,
    Picture,
    house_style,
    new_picture,
    write,
)
from lyapunov_lightning.figures.ticks import Floats, linear_axis, log_axis

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "edge_under_noise.png"
AGREEMENTS = (1.0, 0.3, 0.05)
MOMENTA = {0.0: (0.8, 12.0, 0.62), 0.9: (0.08, 8.0, 0.09)}
"""For each momentum the rates that are drawn, and the growth per step up to which they are."""


@dataclass(frozen=True)
class Batches:
    """What the curvature of a batch may be, and how likely each is; the batch sharpness ``E[h²] / E[h]`` is 1."""

    curvatures: Floats
    probabilities: Floats


def batches(agreement: float) -> Batches:
    """Squares of a Gaussian feature in such a share of the batches that they agree so far, and 0 in the others."""
    if agreement == 1:
        return Batches(np.ones(1), np.ones(1))
    squares = np.array([NormalDist().inv_cdf((1 + (rank + 0.5) / 1000) / 2) ** 2 for rank in range(1000)])
    mean, square = squares.mean(), (squares**2).mean()
    seen = agreement * square / mean**2
    return Batches(np.append(squares * mean / square, 0.0), np.append(np.full(1000, seen / 1000), 1 - seen))


def heavy_ball(rate: float, momentum: float) -> StepMap:
    """The step of ``torch.optim.SGD``."""
    return StepMap(rate, rate * momentum, momentum)


@dataclass(frozen=True)
class Growth:
    """Growth per step over learning rates, in logarithms: of the root mean square, and of the single run."""

    rates: Floats
    mean_square: Floats
    single: Floats


def in_theory(rates: Floats, momentum: float, data: Batches) -> Growth:
    """From the map that a step is."""
    distribution = data.curvatures, data.probabilities
    maps = [heavy_ball(rate, momentum) for rate in rates]
    mean_square = np.array([mean_square_growth(map, *distribution) for map in maps])
    single = np.array([lyapunov_exponent(map, *distribution, num_steps=800).value for map in maps])
    return Growth(rates, mean_square, single)


def in_runs(rates: Floats, momentum: float, data: Batches) -> Growth:
    """From steps of the optimizer itself.

    The mean square is taken early and over many runs, 30,000 with momentum and 500,000 without: later the few that
    carry it are not among so many any more. The median of 1,000 runs is taken late, when most have become alike. Where
    all batches agree nothing is rare, and both are taken late.
    """
    late = range(100, 401)
    settled = round(2 * momentum / (1 - momentum))
    early = range(settled, settled + round(4 / (1 - momentum)) + 1) if len(data.curvatures) > 1 else late
    squares = [row.square().mean(dim=1) for row in distances(rates, momentum, data, 2_000_000 // early[-1], early)]
    medians = [row.median(dim=1).values for row in distances(rates, momentum, data, 1_000, late)]
    return Growth(rates, slopes(squares) / 2, slopes(medians))


def distances(
    rates: Floats, momentum: float, data: Batches, num_runs: int, steps: range, label_noise: float = 0.0
) -> Iterator[Tensor]:
    """How far each run's weight is from its optimum before each of some steps, one row for each learning rate.

    The batch of a step has the same feature ``x`` and the same noise of its label in a run at every rate; its gradient
    is ``x² · error + x · noise``.
    """
    errors = [torch.ones(num_runs, dtype=torch.float64, requires_grad=True) for _ in rates]
    groups = [{"params": [error], "lr": rate} for error, rate in zip(errors, rates.tolist(), strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=momentum)
    generator = torch.Generator().manual_seed(0)
    curvatures, probabilities = torch.from_numpy(data.curvatures), torch.from_numpy(data.probabilities)
    for step in range(steps.stop):
        if step in steps:
            yield torch.stack([error.detach().abs() for error in errors])
        drawn = torch.multinomial(probabilities, num_runs, replacement=True, generator=generator)
        curvature = curvatures[drawn]
        pull = torch.zeros_like(curvature)
        if label_noise:
            pull = label_noise * curvature.sqrt() * torch.randn(num_runs, generator=generator, dtype=torch.float64)
        for error in errors:
            error.grad = curvature * error.detach() + pull
        optimizer.step()


def carried_by_few(rates: Floats, momentum: float, data: Batches) -> Floats:
    """With noise in the labels, the share of the mean square that a thousandth of all moments holds, for each rate."""
    rows = distances(rates, momentum, data, 1_000, range(200, 801), label_noise=1.0)
    squares = torch.cat(list(rows), dim=1).square()
    few = squares.topk(squares.shape[1] // 1_000, dim=1).values
    return (few.sum(dim=1) / squares.sum(dim=1)).numpy()


def slopes(rows: list[Tensor]) -> Floats:
    """By how much the logarithm of each column grows from row to row, by least squares."""
    logarithms = torch.stack(rows).log().numpy()
    return np.asarray(np.polyfit(np.arange(len(rows)), logarithms, deg=1)[0])


@dataclass(frozen=True)
class Panel:
    """All that is known for one momentum and one agreement."""

    momentum: float
    agreement: float
    mean_square_edge: float
    almost_sure_edge: float
    theory: Growth
    runs: Growth


def measured(momentum: float, agreement: float) -> Panel:
    """Theory and runs over the learning rate, and both edges."""
    data = batches(agreement)
    distribution = data.curvatures, data.probabilities
    low, high, _ = MOMENTA[momentum]
    edges = [edge(heavy_ball(1.0, momentum), *distribution) for edge in (mean_square_edge, almost_sure_edge)]
    theory = in_theory(np.union1d(np.geomspace(low, high, 32), [0.995 * edges[0], *edges]), momentum, data)
    runs = in_runs(np.geomspace(low, high, 12)[1:-1], momentum, data)
    return Panel(momentum, agreement, *edges, theory, runs)


@house_style()
def drawn(panels: list[Panel]) -> Picture:
    """A row of panels for each momentum, a column for each agreement."""
    picture = new_picture(WIDTH, 4.6, "How fast a weight's error grows where batches differ in their curvature")
    grid = picture.subplots(len(MOMENTA), len(AGREEMENTS), sharex="row", sharey="row")
    for axes, panel in zip(grid.flat, panels, strict=True):
        draw_growth(axes, panel)
    for axes, agreement in zip(grid[0], AGREEMENTS, strict=True):
        axes.set_title(f"agreement p = {agreement:g}")
    for axes, momentum in zip(grid[:, 0], MOMENTA, strict=True):
        axes.set_ylabel(f"momentum {momentum:g}\ngrowth per step")
    for axes in grid[-1]:
        axes.set_xlabel("η × batch sharpness")
    between, *curves = grid[0, 0].get_legend_handles_labels()[0]
    picture.legend(handles=[*curves, between], loc="outside lower center", ncols=3)
    return picture


def draw_growth(axes: Axes, panel: Panel) -> None:
    """Both rates of growth over the learning rate, and from where to where only the mean square grows."""
    log_axis(axes, "x")
    linear_axis(axes, "y")
    limit = MOMENTA[panel.momentum][-1]
    axes.set_ylim(-limit, limit)
    axes.axhline(0.0, color=GREY, linewidth=0.8)
    first, then = panel.mean_square_edge, panel.almost_sure_edge
    axes.axvspan(first, then, color=GREY, alpha=0.18, linewidth=0, label="between the edges")
    theory, runs = panel.theory, panel.runs
    axes.plot(theory.rates, theory.mean_square, color=RED, linewidth=2.6, label="root mean square")
    axes.plot(runs.rates, runs.mean_square, "o", color=RED, markersize=4.5, label="runs of SGD, root mean square")
    axes.plot(theory.rates, theory.single, color=BLUE, linewidth=1.3, label="Lyapunov exponent")
    axes.plot(runs.rates, runs.single, "o", color=BLUE, markersize=3, label="runs of SGD, median")
    place = {"xytext": (0, 0), "va": "bottom", "color": INK}
    write(axes, f" {then:.2g}", (then, -0.97 * limit), ha="left", **place)
    if then > 1.1 * first:
        write(axes, f"{first:.2g} ", (first, -0.97 * limit), ha="right", **place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture to draw")
    options = parser.parse_args()
    panels = [measured(momentum, agreement) for momentum in MOMENTA for agreement in AGREEMENTS]
    print("                    edge of the  edge of     share of the mean square in a thousandth of all moments")
    print("momentum  agreement mean square  single runs at 0.5 and 0.9 of the first edge, and between both")
    for panel in panels:
        first, then = panel.mean_square_edge, panel.almost_sure_edge
        print(f"{panel.momentum:<9g} {panel.agreement:<9g} {first:<12.3g} {then:<11.3g}", end="")
        rates = np.array([0.5 * first, 0.9 * first, *([(first * then) ** 0.5] if then > 1.1 * first else [])])
        shares = carried_by_few(rates, panel.momentum, batches(panel.agreement))
        print(" ", "  ".join(f"{share:.1%}" for share in shares))
    drawn(panels).save(options.out)
    print(f"The picture: {options.out}")


if __name__ == "__main__":
    main()
