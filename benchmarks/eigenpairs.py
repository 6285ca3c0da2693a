"""Extreme eigenpairs at equal accuracy: this package beside others."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from benchmarks import problems
from benchmarks.least import least_products
from benchmarks.peers import OUR_PRODUCT, OURS, SOLVERS, TOL, Eigenthings, Task, excused, time_limit
from benchmarks.problems import Problem
from benchmarks.report import Figure, Outcome, Settings, Table, dot, names_axis, spread
from benchmarks.timing import Sample, timed
from benchmarks.workers import shared
from lyapunov_lightning.curvature import lanczos
from lyapunov_lightning.figures.style import GREY, INK, RED, SKY

TASKS = (Task(20, 3), Task(1, 1), Task(5, 0))
PROBLEMS = ("LeNet, trained", "LeNet, untrained", "small ResNet", "small transformer")
ALLOWED = 1.05
"""A residual counts as equal up to this factor, since solvers stop by estimates of their own."""
VALUE_ERROR = 1e-3
"""An eigenvalue that is further off than this was taken for another one."""
SLOW = 1.25
"""Who takes this many times the best peer's time in the first round is not repeated: it decides nothing."""
STOPPED = 3.0
"""Who takes this many times the best peer's time is stopped, where that is possible."""

ABOUT = f"""\
Wall-clock seconds on one thread until all eigenpairs (largest + smallest) have relative residuals of {TOL:g}, from
the call to the vectors, graphs and operators included. The LeNets and the small ResNet (BatchNorm, evaluation mode)
are measured on images, the transformer on sequences of a random Markov chain. Residuals are computed afterwards with
one and the same operator; a row whose residual is worse than asked for, or that misses an eigenvalue, is marked and
is not the best peer. *Least* is the dimension of one Krylov space that holds all pairs, *δ* the chance that an
eigenvalue was missed, which no other solver tells. Peers are those with products of their own; SciPy's `eigsh` on our
product is shown for the solver alone. Who takes more than {SLOW:g} times the best peer's time in the first round is
not repeated; 20 + 3 has one repeat less."""


@dataclass
class Row:
    """What a solver did on one problem.

    Attributes:
        who: The solver.
        seconds: One number for each repeat.
        products: Hessian-vector products of one run.
        least: The least that one Krylov space can do with, see `benchmarks.least`; 0 if that was not measured.
        missed: The chance that an eigenvalue was missed, as the solver tells.
        residual: The worst relative residual.
        is_complete: Whether these are the eigenvalues that were asked for.
        missing: Why there is nothing else.

    """

    who: str
    seconds: list[float] = field(default_factory=list)
    products: int = 0
    residual: float = math.nan
    is_complete: bool = True
    missing: str = ""
    least: int = 0
    missed: float = math.nan

    @property
    def is_accurate(self) -> bool:
        """Whether it found what was asked for, as well as was asked for."""
        return not self.missing and self.is_complete and self.residual <= ALLOWED * TOL

    @property
    def is_peer(self) -> bool:
        """Whether it is another package with products of its own."""
        return self.who not in (OURS, OUR_PRODUCT)

    @property
    def mark(self) -> str:
        """What to say of it."""
        if self.missing:
            return self.missing
        marks = []
        if not self.residual <= ALLOWED * TOL:
            marks.append("residual too large")
        if not self.is_complete:
            marks.append("other eigenvalues")
        return ", ".join(marks)


def make(name: str, settings: Settings) -> Problem:
    """One of the problems."""
    quick = settings.quick
    if name == "small ResNet":
        return problems.resnet(settings.root, 16 if quick else 256, 3 if quick else 200)
    if name == "small transformer":
        sizes = problems.TINY if quick else {}
        return problems.small_transformer(4 if quick else 32, 6 if quick else 32, 3 if quick else 300, **sizes)
    steps = 0 if name == "LeNet, untrained" else 3 if quick else 390
    return problems.lenet(settings.root, 16 if quick else 512, steps)


def residuals_of(problem: Problem, vectors: Tensor) -> tuple[Tensor, float]:
    """Rayleigh quotients of the vectors, one row each, and the worst relative residual."""
    judge = problem.operator()
    vectors = vectors.to(judge.dtype) / vectors.to(judge.dtype).norm(dim=1, keepdim=True)
    images = torch.stack([judge.matvec(vector) for vector in vectors])
    values = (vectors * images).sum(dim=1)
    return values, float(((images - values[:, None] * vectors).norm(dim=1) / values.abs()).max())


def same_values(values: Tensor, expected: Tensor, task: Task) -> bool:
    """Whether the eigenvalues of both ends are the expected ones, in whatever order."""
    ends = [values[: task.largest].sort(descending=True).values, values[task.largest :].sort().values]
    error = (torch.cat(ends).double() - expected.double()).abs() / expected.double().abs()
    return bool((error <= VALUE_ERROR).all())


def compared(problem: Problem, task: Task, repeats: int) -> list[Row]:
    """All solvers on one problem."""
    exact = lanczos(
        problem.operator(), largest=task.largest, smallest=task.smallest, tol=TOL / 4, max_matvecs=5000, seed=1
    )
    least = least_products(problem.operator(), task)
    rows = [Row(who, least=least) for who in SOLVERS]

    def best_peer() -> float:
        """The least time of a peer in the first round."""
        accurate = (row.seconds[0] for row in rows if row.is_peer and row.seconds and row.is_accurate)
        return min(accurate, default=math.inf)

    for repeat in range(repeats):
        for row in rows:
            if row.missing or (repeat and row.is_peer and row.seconds[0] > SLOW * best_peer()):
                continue
            solver = SOLVERS[row.who]
            problem.restore()
            with excused() as reasons:
                if isinstance(solver, Eigenthings):
                    solver.prepare(problem, task)
                with time_limit(STOPPED * best_peer()):
                    seconds, found = timed(lambda solver=solver: solver(problem, task))
                row.seconds.append(seconds)
                if not repeat:
                    problem.restore()
                    values, row.residual = residuals_of(problem, found.vectors)
                    row.is_complete = same_values(values, exact.values, task)
                    row.products, row.missed = found.products, found.missed
            problem.restore()
            row.missing = reasons[0] if reasons else ""
    return rows


def ratios(rows: list[Row]) -> tuple[str, Sample, Sample]:
    """The best peer, our time over its, and our time over that of ARPACK on our product; samples may be empty."""
    mine = next(row for row in rows if row.who == OURS)
    peers = [row for row in rows if row.is_peer and row.is_accurate]
    best = min(peers, key=lambda row: Sample(tuple(row.seconds)).median, default=None)
    arpack = next((row for row in rows if row.who == OUR_PRODUCT and row.is_accurate), None)

    def over(other: Row | None) -> Sample:
        if other is None or not mine.is_accurate:
            return Sample(())
        pairs = min(len(mine.seconds), len(other.seconds))
        return Sample(tuple(mine.seconds[:pairs])).over(Sample(tuple(other.seconds[:pairs])))

    return best.who if best else "", over(best), over(arpack)


def warm_up() -> None:
    """Call every solver once, so that no import is timed."""
    toy = problems.small_transformer(2, 6, **problems.TINY)
    for solver in SOLVERS.values():
        with excused():
            solver(toy, Task(1, 0))
        toy.restore()


def work(name: str, settings: Settings) -> dict[str, list[Row]]:
    """All tasks on one problem."""
    warm_up()
    problem = make(name, settings)
    tasks = (Task(2, 1), Task(2, 0)) if settings.quick else TASKS
    repeats = {task: settings.repeats - (task.largest > 10 and settings.repeats > 2) for task in tasks}
    return {task.name: compared(problem, task, repeats[task]) for task in tasks}


def run(settings: Settings) -> Outcome:
    """Measure."""
    started = time.perf_counter()
    names = PROBLEMS[-1:] if settings.quick else PROBLEMS
    found = dict(zip(names, shared(work, names, settings.jobs, settings), strict=True))
    return outcome_of(found, time.perf_counter() - started)


def outcome_of(found: dict[str, dict[str, list[Row]]], seconds: float) -> Outcome:
    """The figures and the tables."""
    figures, tables, dots = [], [], []
    for name, tasks in found.items():
        for task, rows in tasks.items():
            best, ratio, arpack = ratios(rows)
            title = f"{name}, {task}"
            why = "" if ratio.values else "no peer" if not best else "ours is not accurate"
            figures.append(Figure(f"{title}: our time over that of the best peer ({best})", ratio, 0.35, missing=why))
            dots.append({"name": title, "peer": list(ratio.values), "arpack": list(arpack.values)})
            tables.append(Table(title, _HEADER, [_cells(row, rows, best) for row in rows]))
    medians = [figure.sample.median for figure in figures if figure.sample.values]
    overall = Sample(tuple(medians))
    figures.append(Figure("median of these rows", overall, 0.2, missing="" if medians else "no peer"))
    return Outcome("eigenpairs", "Eigenpairs at equal accuracy", ABOUT, figures, tables, {"dots": dots}, seconds)


_HEADER = ["solver", "products", "least", "δ", "seconds", "our time / its", "residual", ""]


def _cells(row: Row, rows: list[Row], best: str) -> list[str]:
    if not row.seconds:
        return [row.who, "", "", "", "", "", "", row.missing]
    mine, its = next(r for r in rows if r.who == OURS), Sample(tuple(row.seconds))
    ratio = f"{Sample(tuple(mine.seconds)).median / its.median:.2f}" if mine.seconds else ""
    note = row.mark or ("best peer" if row.who == best else "")
    missed = "" if math.isnan(row.missed) else f"{row.missed:.0e}"
    least = str(row.least) if row.least else ""
    return [row.who, str(row.products), least, missed, spread(its), ratio, f"{row.residual:.1e}", note]


def draw(panel: Axes, plot: dict[str, Any]) -> None:
    """Our time over that of the best peer, and over that of ARPACK on our product."""
    names_axis(panel, [entry["name"] for entry in plot["dots"]])
    for height, entry in enumerate(plot["dots"]):
        kinds = (("arpack", SKY, "SciPy eigsh on our product"), ("peer", RED, "the best peer"))
        for kind, colour, label in kinds:
            if entry[kind]:
                dot(panel, Sample(tuple(entry[kind])), height, color=colour, label="_" if height else label)
    panel.axvline(1.0, color=GREY, linewidth=0.8)
    panel.axvline(0.35, color=INK, linewidth=0.8, linestyle=":")
    panel.set_xlim(0, None)
    panel.set_xlabel("our time over that of ... (dotted: target)")
