"""What a Hessian-vector product costs: in gradients of the same loss, and in memory."""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import nn

from benchmarks import peers, problems
from benchmarks.peers import KEPT, PRODUCTS, REBUILT, excused
from benchmarks.problems import Problem
from benchmarks.report import Figure, Outcome, Settings, Table, dot, names_axis, spread
from benchmarks.timing import Sample, interleaved
from benchmarks.workers import quiet, shared
from lyapunov_lightning.figures.style import BLUE, INK, OCHRE, RED, TEAL

ABOUT = """\
Time of one product with a vector after the first one, over the time of one gradient of the same loss on the same
batch; one thread, interleaved. A graph of the gradient is kept from the first product on, or made anew for each
("off", "rebuilt").

Memory is what the process holds at most from before the operator is made until after the second product, beyond what
it held before (model, data and imports); each is a process of its own that gives freed memory back at once."""

TIMED = ("MLP, batch 512", "LeNet, batch 512", "LeNet, batch 64", "small ResNet", "small transformer")
WEIGHED = ("MLP", "LeNet", "small transformer")
GRADIENT = "one gradient"
MEMORY_ALLOWED = 1.05
"""Of the cheapest peer's memory: two runs of the same program differ by this much."""


def timed_problem(name: str, settings: Settings) -> Problem:
    """A network, untrained, as it is timed."""
    quick, root = settings.quick, settings.root
    if name.startswith("MLP"):
        return problems.mlp(root, 8 if quick else 512, [8] if quick else [200, 200, 200])
    if name.startswith("LeNet"):
        return problems.lenet(root, 8 if quick else int(name.split()[-1]))
    if name == "small ResNet":
        return problems.resnet(root, 8 if quick else 256)
    return problems.small_transformer(*((2, 6) if quick else (32, 32)), **(problems.TINY if quick else {}))


def weighed_problem(name: str, quick: bool) -> Problem:
    """A network on random data, so large that its memory shows."""
    if name == "MLP":
        return problems.mlp(None, 64, [16] if quick else [3000, 3000])
    if name == "LeNet":
        return problems.lenet(None, 64 if quick else 4096)
    sizes = problems.TINY if quick else {"words": 2000, "width": 128, "layers": 4}
    return problems.small_transformer(2 if quick else 64, 8 if quick else 64, **sizes)


def gradient_of(problem: Problem) -> None:
    """One gradient, as training computes it."""
    torch.autograd.grad(problem.loss(problem.batches[0]), problem.parameters)


def work(name: str, settings: Settings) -> dict[str, Any]:
    """Seconds of a gradient and of a product of each package, or why there are none."""
    problem = timed_problem(name, settings)
    torch.manual_seed(0)
    vector = torch.randn(problem.size)
    missing: dict[str, str] = {}
    tasks: dict[str, Callable[[], object]] = {GRADIENT: lambda: gradient_of(problem)}
    for who, make in PRODUCTS.items():
        with excused() as reasons:
            product = make(problem)
            _check(product(vector), problem, vector)
            tasks[who] = lambda product=product: product(vector)
        problem.restore()
        if reasons:
            missing[who] = reasons[0]
    calls = 1 if settings.quick else max(1, round(0.1 / interleaved({"": tasks[GRADIENT]}, 2)[""].median))
    seconds = interleaved(tasks, 2 if settings.quick else 2 * settings.repeats, calls)
    return {"seconds": {who: sample.values for who, sample in seconds.items()}, "missing": missing}


def _check(found: torch.Tensor, problem: Problem, vector: torch.Tensor) -> None:
    """Whether a product is that of the Hessian."""
    expected = peers.plain_product(problem)(vector)
    error = float((found - expected).norm() / expected.norm())
    if error > 1e-3:
        raise peers.UnableError(f"off by {error:.0e} of its size")


def memory(name: str, who: str, quick: bool) -> float | str:
    """Bytes at the peak, in a process of its own; or why there are none."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.products", name, who, *(["--quick"] if quick else [])]
    # Without it freed memory stays with the process, and what one tensor leaves is the next one's.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['killed'])[-1][:100]}"
    found: float | str = json.loads(done.stdout.splitlines()[-1])
    return found


def weigh(name: str, who: str, quick: bool) -> None:
    """The worker: print the peak of this process, beyond what model and data take."""
    quiet()
    problem = weighed_problem(name, quick)
    found: float | str = 0.0
    with excused() as reasons:
        make = _gradient_twice if who == GRADIENT else PRODUCTS[who]
        make(_toy())(torch.ones(_toy().size))  # imports, and what libraries set up at the first call
        vector = torch.ones(problem.size)
        before = _peak(anew=True)
        product = make(problem)
        for _ in range(2):
            product(vector)
        found = _peak() - before
    print(json.dumps(reasons[0] if reasons else found))


def _peak(anew: bool = False) -> float:
    """Bytes that this process has held at most, or from now on if it is to begin anew."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float((1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    # On Linux `getrusage` begins with what the parent held when it started this process.
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return 1024.0 * int(fields["VmHWM"].split()[0])


def _gradient_twice(problem: Problem) -> Callable[[torch.Tensor], None]:
    return lambda _: gradient_of(problem)


def _toy() -> Problem:
    torch.manual_seed(0)
    return Problem(
        "toy", nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), [(torch.ones(4, 3), torch.ones(4).long())]
    )


def weighed(item: tuple[str, str], quick: bool) -> float | str:
    """The peak of one package on one problem."""
    return memory(*item, quick)


def run(settings: Settings) -> Outcome:
    """Measure."""
    started = time.perf_counter()
    timed_names = TIMED[-1:] if settings.quick else TIMED
    weighed_names = WEIGHED[:1] if settings.quick else WEIGHED
    who = [GRADIENT, KEPT, REBUILT, "plain PyTorch, graph rebuilt"] if settings.quick else [GRADIENT, *PRODUCTS]
    times = dict(zip(timed_names, shared(work, timed_names, settings.jobs, settings), strict=True))
    items = [(name, package) for name in weighed_names for package in who]
    peaks = dict(zip(items, shared(weighed, items, settings.jobs, settings.quick), strict=True))
    return outcome_of(times, peaks, time.perf_counter() - started)


def outcome_of(times: dict[str, Any], peaks: dict[tuple[str, str], float | str], seconds: float) -> Outcome:
    """The figures and the tables."""
    figures = [
        Figure(f"{name}: a product with the kept graph, in gradients", in_gradients(found)[KEPT], 2.2)
        for name, found in times.items()
    ]
    names = list(dict.fromkeys(name for name, _ in peaks))
    packages = list(dict.fromkeys(package for _, package in peaks))
    for name in names:
        figures.append(memory_figure(name, {package: peaks[name, package] for package in packages}))
    cost = Table("Time, in gradients", ["product", *times], [_times(who, times) for who in PRODUCTS])
    weights = [[who, *(_size(peaks[name, who]) for name in names)] for who in packages]
    title = (
        "Memory beyond model and data, in MiB (untrained, batches of 64 to 4,096; the MLP has 18 million parameters)"
    )
    gradients = {name: {who: list(s.values) for who, s in in_gradients(found).items()} for name, found in times.items()}
    return Outcome(
        "products",
        "A Hessian-vector product",
        ABOUT,
        figures,
        [cost, Table(title, ["product", *names], weights)],
        {"gradients": gradients},
        seconds,
    )


def in_gradients(found: dict[str, Any]) -> dict[str, Sample]:
    """Time over that of a gradient, by package."""
    samples = {who: Sample(tuple(values)) for who, values in found["seconds"].items()}
    return {who: sample.over(samples[GRADIENT]) for who, sample in samples.items() if who != GRADIENT}


def memory_figure(name: str, peaks: dict[str, float | str]) -> Figure:
    """Our memory with the graph off over that of the cheapest peer."""
    others = {who: peak for who, peak in peaks.items() if who not in (GRADIENT, KEPT, REBUILT)}
    numbers = {who: peak for who, peak in others.items() if isinstance(peak, float) and peak > 0}
    mine = peaks[REBUILT]
    if not numbers or not isinstance(mine, float):
        return Figure(f"{name}: memory with the graph off", Sample(()), MEMORY_ALLOWED, missing="no peer was measured")
    best = min(numbers, key=lambda who: numbers[who])
    title = f"{name}: memory with the graph off over that of the cheapest peer ({best})"
    return Figure(title, Sample((mine / numbers[best],)), MEMORY_ALLOWED)


def _times(who: str, times: dict[str, Any]) -> list[str]:
    cells = [who]
    for found in times.values():
        ratio = in_gradients(found).get(who)
        cells.append(found["missing"].get(who, "") if ratio is None else spread(ratio))
    return cells


def _size(peak: float | str) -> str:
    return peak if isinstance(peak, str) else f"{peak / 2**20:.0f}"


def draw(panel: Axes, plot: dict[str, Any]) -> None:
    """Gradients that a product takes, by package."""
    names = [who for who in PRODUCTS if any(who in found for found in plot["gradients"].values())]
    names_axis(panel, names)
    colours = (RED, BLUE, TEAL, OCHRE, INK)
    for shift, (problem, found) in enumerate(plot["gradients"].items()):
        labelled = False
        for height, who in enumerate(names):
            if who in found:
                sample = Sample(tuple(found[who]))
                dot(
                    panel, sample, height + 0.13 * (shift - 2), color=colours[shift], label="_" if labelled else problem
                )
                labelled = True
    panel.axvline(2.2, color=INK, linewidth=0.8, linestyle=":")
    panel.set_xlim(0, None)
    panel.set_xlabel("gradients (dotted: target with the kept graph)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The memory of one package on one problem.")
    parser.add_argument("problem", choices=WEIGHED)
    parser.add_argument("who", choices=[GRADIENT, *PRODUCTS])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    weigh(arguments.problem, arguments.who, arguments.quick)
