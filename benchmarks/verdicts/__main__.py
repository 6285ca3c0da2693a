"""Is it true what `CurvatureProbe` says of the learning rate? Held against sweeps of the rate on small problems.

    make verdicts ROOT=data                                        # all of it, up to 40 minutes on two cores
    python -m benchmarks.verdicts --problems 'spirals, tanh' --batches 4 full --root data      # some of it
    python -m benchmarks.verdicts --quick                          # toy sizes: whether it runs

For every cell (a problem, an optimizer, a batch size, a schedule, a seed) rates a factor of 2 apart are tried. The
largest usable one is the largest whose final loss, the mean of losses of all data over the last tenth of the run, is
within 1.25 of the best. Then the cell is trained in a Trainer with a `CurvatureProbe` at that rate and at 1/2, 1/4,
1/8, 1/16 and 1/30 of it, and what the probe calls the limit of the rate is divided by the largest usable one.

What is found is kept in the folder of --out as JSON lines, a run that was interrupted goes on, and only the readings
are taken again where the package has changed. --held-out runs other problems, on which nothing was tuned.
Needed below --root: MNIST/raw, cifar-10-batches-py, ptb/ptb.train.txt; a problem without its data is left out.
"""

import argparse
import math
import random
import sys
import time
from pathlib import Path

from benchmarks.__main__ import processor
from benchmarks.quasi_newton import quiet
from benchmarks.verdicts import report
from benchmarks.verdicts.design import BATCHES, every_pair, half_of_the_pairs
from benchmarks.verdicts.held_out import HELD_OUT
from benchmarks.verdicts.kept import Kept, reading_mark, truth_mark
from benchmarks.verdicts.problems import PROBLEMS
from benchmarks.verdicts.training import EVERY_PROBLEM, MORE_OPTIMIZERS, OPTIMIZERS, Cell, Size
from benchmarks.verdicts.work import Task, kept_sweep, sweep_of, worked

QUICK = Size(steps=40, samples=64)


def batch_size(text: str) -> int | None:
    """A batch size of the command line."""
    return None if text == "full" else int(text)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.verdicts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data", help="folder of the data; nothing is downloaded")
    parser.add_argument("--problems", nargs="+", choices=list(EVERY_PROBLEM), help="all that are not held out")
    parser.add_argument("--optimizers", nargs="+", choices=[*OPTIMIZERS, *MORE_OPTIMIZERS])
    parser.add_argument("--batches", nargs="+", type=batch_size, default=list(BATCHES), help="sizes, or full")
    parser.add_argument("--held-out", action="store_true", help="the problems on which nothing was tuned")
    parser.add_argument("--sweeps", action="store_true", help="the sweeps alone, without readings")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--quick", action="store_true", help="toy sizes, and problems that need no data")
    parser.add_argument("--fresh", action="store_true", help="forget what was found earlier")
    parser.add_argument("--out", type=Path, default=Path("logs/verdicts"), help="folder of what is written")
    return parser.parse_args(arguments)


def cells_of(args: argparse.Namespace) -> tuple[list[Cell], list[str]]:
    """The cells, in an order in which the first ones tell something of all, and the problems without data."""
    mine = HELD_OUT if args.held_out else PROBLEMS
    names = args.problems or [name for name in mine if not (args.quick and mine[name].needs)]
    missing = [name for name in names if not EVERY_PROBLEM[name].is_there(args.root)]
    optimizers = args.optimizers or [*OPTIMIZERS, *(MORE_OPTIMIZERS if args.held_out else ())]
    design = half_of_the_pairs if args.held_out else every_pair
    cells = [cell for cell in design(names, optimizers, args.batches) if cell.problem not in missing]
    random.Random(0).shuffle(cells)
    return cells, missing


def run(args: argparse.Namespace) -> str:
    """Find what is missing, and report."""
    size = QUICK if args.quick else Size()
    files = [args.out / "sweeps.jsonl", args.out / "readings.jsonl"]
    for path in files if args.fresh else []:
        path.unlink(missing_ok=True)
    sweeps, readings = Kept(files[0], truth_mark(size)), Kept(files[1], reading_mark(size))
    cells, missing = cells_of(args)
    tasks = [
        Task(cell, args.root, size, sweeps.get(cell), not args.sweeps)
        for cell in cells
        if sweeps.get(cell) is None or (readings.get(cell) is None and not args.sweeps)
    ]
    started = time.perf_counter()
    for number, finding in enumerate(worked(tasks, args.jobs), 1):
        cell, found = finding.task.cell, finding.sweep
        if finding.task.sweep is None:
            sweeps.add(cell, kept_sweep(found))
        if finding.readings is not None:
            readings.add(cell, finding.readings)
        elapsed = (time.perf_counter() - started) / 60
        usable = f"usable up to {found.rate:g}" if found.is_inside else "not inside the grid"
        progress = f"{number} of {len(tasks)}, {elapsed:.1f} min: {report.describe(cell)}: {usable}"
        print(f"{progress}, {len(found.losses)} rates, {finding.seconds:.0f} s", file=sys.stderr, flush=True)
    return reported(args, cells, missing, sweeps, readings)


def reported(args: argparse.Namespace, cells: list[Cell], missing: list[str], sweeps: Kept, readings: Kept) -> str:
    """The tables of what is kept."""
    order = sorted(cells, key=lambda cell: cells_key(cell))
    found = {cell: sweep_of(sweeps.get(cell)) for cell in order if sweeps.get(cell) is not None}
    all_readings = [
        reading
        for cell, swept in found.items()
        if swept.rate is not None
        for reading in report.readings_of(cell, swept.rate, readings.get(cell) or [])
    ]
    outside = [cell for cell, swept in found.items() if not swept.is_inside]
    vague = [cell for cell, swept in found.items() if swept.is_inside and swept.tells_little]
    named = "held-out problems" if args.held_out else "problems"
    small = " Toy sizes: none of these numbers says anything." if args.quick else ""
    about = (
        f"`make verdicts`: {len({cell.problem for cell in found})} {named}, {len(found)} cells, "
        f"{len(all_readings)} readings; {processor()}.{small}"
    )
    notes = report.notes(missing, outside, vague, all_readings, len(cells) - len(found))
    return report.markdown(about, all_readings, notes)


def cells_key(cell: Cell) -> tuple[int, float, int]:
    """Optimizers, batches and problems as they are listed."""
    optimizers = [*OPTIMIZERS, *MORE_OPTIMIZERS]
    return optimizers.index(cell.optimizer), cell.batch or math.inf, list(EVERY_PROBLEM).index(cell.problem)


def main(arguments: list[str] | None = None) -> None:
    """Run, print the tables, and write them."""
    args = parsed(arguments)
    quiet()
    text = run(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / ("held_out.md" if args.held_out else "report.md")).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
