"""How the cost of a measurement grows with parameters, eigenpairs and batches."""

import time
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.axes import Axes

from benchmarks import problems
from benchmarks.problems import Problem
from benchmarks.report import Figure, Outcome, Settings, Table, spread
from benchmarks.timing import Sample, exponent, interleaved
from benchmarks.workers import shared
from lyapunov_lightning.curvature import Eigenpairs, lanczos
from lyapunov_lightning.figures.style import BLUE, GREY, OCHRE, RED
from lyapunov_lightning.figures.ticks import log_axis

PRODUCTS = 16
BOUND = 1.1
ABOUT = f"""\
Seconds of a measurement on one thread, graphs included, and the exponent of its growth: the slope of a straight line
through the logarithms. Up to {BOUND:g} counts as linear; what every measurement costs whatever its size makes the
slope flatter, so that the one between the two largest sizes stands beside it. Parameters: {PRODUCTS} products of
Lanczos on an MLP of two equally wide hidden layers, 64 samples. Batches: {PRODUCTS} products of Lanczos on a LeNet,
32 images each. Eigenpairs: so many of the largest at relative residuals of 1e-3, on a trained LeNet and 256 images."""

KINDS = ("parameters", "eigenpairs", "batches")


def of_parameters(settings: Settings) -> dict[float, Callable[[], Eigenpairs]]:
    """A fixed number of products, by parameters."""
    tasks: dict[float, Callable[[], Eigenpairs]] = {}
    for wanted in (1e4, 1e5) if settings.quick else (1e4, 1e5, 1e6, 1e7):
        width = round((wanted - 10) ** 0.5 / 2)  # of 2 width, width and width neurons: about 4 width² parameters
        torch.manual_seed(0)
        network = torch.nn.Sequential(
            torch.nn.Linear(2 * width, width),
            torch.nn.ReLU(),
            torch.nn.Linear(width, width),
            torch.nn.ReLU(),
            torch.nn.Linear(width, width),
        )
        data = torch.randn(64, 2 * width), torch.randint(width, (64,))
        problem = Problem("MLP", network, [data])
        tasks[problem.size] = lambda problem=problem: _products(problem)
    return tasks


def of_batches(settings: Settings) -> dict[float, Callable[[], Eigenpairs]]:
    """A fixed number of products, by batches."""
    counts = (1, 2, 4) if settings.quick else (1, 4, 16, 64)
    problem = problems.lenet(settings.root, counts[-1] * (2 if settings.quick else 32))
    (inputs, labels), most = problem.batches[0], counts[-1]
    batches = list(zip(inputs.chunk(most), labels.chunk(most), strict=True))
    parts = [Problem("", problem.network, batches[:count]) for count in counts]
    return {len(part.batches): lambda part=part: _products(part) for part in parts}


def of_eigenpairs(settings: Settings) -> dict[float, Callable[[], Eigenpairs]]:
    """A fixed accuracy, by eigenpairs."""
    problem = problems.lenet(settings.root, 8 if settings.quick else 256, 3 if settings.quick else 390)
    counts = (1, 2) if settings.quick else (1, 5, 20, 50)
    return {count: lambda count=count: lanczos(problem.operator(), largest=count, tol=1e-3) for count in counts}


MAKERS = {"parameters": of_parameters, "eigenpairs": of_eigenpairs, "batches": of_batches}


def _products(problem: Problem) -> Eigenpairs:
    return lanczos(problem.operator(), tol=1e-12, max_matvecs=PRODUCTS)


def work(kind: str, settings: Settings) -> dict[str, Any]:
    """Seconds and products by size."""
    tasks = MAKERS[kind](settings)
    products: dict[str, int] = {}

    def counted(name: str, task: Callable[[], Eigenpairs]) -> Callable[[], None]:
        def call() -> None:
            products[name] = task().num_matvecs

        return call

    seconds = interleaved({str(size): counted(str(size), task) for size, task in tasks.items()}, settings.repeats)
    times = [list(sample.values) for sample in seconds.values()]
    return {"sizes": list(tasks), "seconds": times, "products": [products[str(size)] for size in tasks]}


def run(settings: Settings) -> Outcome:
    """Measure."""
    started = time.perf_counter()
    found = dict(zip(KINDS, shared(work, KINDS, settings.jobs, settings), strict=True))
    return outcome_of(found, time.perf_counter() - started)


def exponents(found: dict[str, Any], last: int = 0) -> Sample:
    """The exponent of each repeat, of all sizes or of the last ones."""
    repeats = zip(*found["seconds"][-last:], strict=True)
    return Sample(tuple(exponent(found["sizes"][-last:], costs) for costs in repeats))


def outcome_of(found: dict[str, Any], seconds: float) -> Outcome:
    """The figures and the tables."""
    figures, tables = [], []
    for kind, cells in found.items():
        figures.append(Figure(f"exponent of the cost by {kind}", exponents(cells), BOUND))
        figures.append(Figure(f"exponent between the two largest, by {kind}", exponents(cells, last=2)))
        rows = [
            [f"{size:,}", str(products), spread(Sample(tuple(times)), 3)]
            for size, products, times in zip(cells["sizes"], cells["products"], cells["seconds"], strict=True)
        ]
        tables.append(Table(f"By {kind}", [kind, "products", "seconds"], rows))
    return Outcome("growth", "How the cost grows", ABOUT, figures, tables, {"curves": found}, seconds)


def draw(panel: Axes, plot: dict[str, Any]) -> None:
    """Costs over sizes, both over the smallest."""
    farthest = 1.0
    for (kind, cells), colour in zip(plot["curves"].items(), (RED, BLUE, OCHRE), strict=False):
        costs = [Sample(tuple(times)).median for times in cells["seconds"]]
        sizes = [size / cells["sizes"][0] for size in cells["sizes"]]
        farthest = max(farthest, sizes[-1])
        label = f"{kind}: exponent {exponents(cells).median:.2f}"
        panel.plot(sizes, [cost / costs[0] for cost in costs], color=colour, marker="o", markersize=4, label=label)
    panel.plot([1, farthest], [1, farthest], color=GREY, linewidth=0.8, linestyle=":", label="linear")
    log_axis(panel, "x")
    log_axis(panel, "y")
    panel.set_xlabel("size over the smallest")
    panel.set_ylabel("seconds over those of the smallest")
