"""One measurement, shared by two processes: how much faster it is than in one of them."""

import multiprocessing
import time
from functools import partial
from typing import Any

import torch.distributed as dist
from matplotlib.axes import Axes

from benchmarks import problems
from benchmarks.problems import Problem
from benchmarks.report import Figure, Outcome, Settings, Table, dot, names_axis, spread
from benchmarks.timing import Sample, timed
from benchmarks.workers import quiet
from lyapunov_lightning.curvature import HessianOperator, lanczos
from lyapunov_lightning.figures.style import INK, RED

ABOUT = """\
Sixteen products of Lanczos on eight fixed batches, graphs included: all batches in one process, over four in each of
two (gloo, one thread each). The two largest eigenvalues are compared as well."""

NAMES = ("LeNet, 8 batches of 256", "MLP, 8 batches of 512", "small transformer, 8 batches of 16")
RANKS = 2
PRODUCTS = 16


def make(name: str, settings: Settings) -> Problem:
    """One of the problems, with eight batches."""
    quick = settings.quick
    if name.startswith("LeNet"):
        problem = problems.lenet(settings.root, 32 if quick else 2048)
    elif name.startswith("MLP"):
        problem = problems.mlp(settings.root, 32 if quick else 4096, [8] if quick else [200, 200, 200])
    else:
        problem = problems.small_transformer(16 if quick else 128, 6 if quick else 32)
    (inputs, labels), count = problem.batches[0], 8
    problem.batches = list(zip(inputs.chunk(count), labels.chunk(count), strict=True))
    return problem


def measure(problem: Problem, batches: list[Any], together: bool) -> tuple[int, list[float]]:
    """Products and eigenvalues."""
    reduce = dist.all_reduce if together else None
    hessian = HessianOperator(problem.loss, problem.parameters, batches, reduce=reduce)
    pairs = lanczos(hessian, largest=2, tol=1e-12, max_matvecs=PRODUCTS)
    return pairs.num_matvecs, pairs.values.tolist()


def rank_main(rank: int, port: int, names: list[str], settings: Settings, results: Any) -> None:
    """A process: the first one alone and both together, in turn."""
    quiet()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    for name in names:
        problem = make(name, settings)
        seconds: dict[str, list[float]] = {"one": [], "two": []}
        found: dict[str, tuple[int, list[float]]] = {}
        for repeat in range(settings.repeats + 1):  # the first one is not counted
            for kind in ("one", "two"):
                dist.barrier()
                if kind == "one" and rank:
                    continue
                batches = problem.batches[rank::RANKS] if kind == "two" else problem.batches
                took, found[kind] = timed(partial(measure, problem, batches, kind == "two"))
                if repeat:
                    seconds[kind].append(took)
        if rank == 0:
            results.put((name, seconds, found))
    dist.barrier()
    dist.destroy_process_group()


def run(settings: Settings) -> Outcome:
    """Measure."""
    started = time.perf_counter()
    names = list(NAMES[1:2] if settings.quick else NAMES)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (_free_port(), names, settings, results)
    processes = [context.Process(target=rank_main, args=(rank, *arguments), daemon=True) for rank in range(RANKS)]
    for process in processes:
        process.start()
    found = {}
    while len(found) < len(names):
        if not results.empty():
            name, seconds, measured = results.get()
            found[name] = seconds, measured
        elif any(process.exitcode for process in processes):
            for process in processes:
                process.terminate()
            raise RuntimeError("A process of the distributed measurement failed.")
        else:
            time.sleep(0.1)
    for process in processes:
        process.join()
    return outcome_of(found, time.perf_counter() - started)


def outcome_of(found: dict[str, Any], seconds: float) -> Outcome:
    """The figures and the table."""
    figures, rows, speedups = [], [], {}
    for name, (times, measured) in found.items():
        one, two = Sample(tuple(times["one"])), Sample(tuple(times["two"]))
        speedup = one.over(two)
        speedups[name] = list(speedup.values)
        figures.append(Figure(f"{name}: speed-up by a second process", speedup, 1.7, at_least=True))
        (products, values), (shared_products, shared_values) = measured["one"], measured["two"]
        error = max(abs(a - b) / abs(a) for a, b in zip(values, shared_values, strict=True))
        rows.append([name, spread(one), spread(two), spread(speedup), f"{products}, {shared_products}", f"{error:.0e}"])
    header = ["measurement", "one process, s", "two processes, s", "speed-up", "products", "eigenvalues differ by"]
    plot = {"speedups": speedups}
    return Outcome("processes", "Two processes", ABOUT, figures, [Table("", header, rows)], plot, seconds)


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def draw(panel: Axes, plot: dict[str, Any]) -> None:
    """The speed-ups."""
    names_axis(panel, list(plot["speedups"]))
    for height, values in enumerate(plot["speedups"].values()):
        dot(panel, Sample(tuple(values)), height, color=RED)
    panel.axvline(1.7, color=INK, linewidth=0.8, linestyle=":")
    panel.set_xlim(0, 2.1)
    panel.set_xlabel("time of one process over that of two (dotted: target)")
