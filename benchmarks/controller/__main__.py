"""Train what is missing of the benchmark, and print its tables.

    pip install -e '.[bench]'
    python -m benchmarks.controller --out benchmarks/results/controller.jsonl

Each cell is a problem and an optimizer. The best constant rate and the best cosine to zero are looked for on a grid
with factor √10, from a middle one up and down until two in a row are worse than the best. The controller begins at
1e-3, and so does its rule ``along_update``. Prodigy, DAdaptAdam and schedule-free AdamW take the optimizer's place,
where they are installed. What was trained is one line of JSON each, and is not trained again; ``--report`` trains
nothing.
"""

import argparse
import json
import math
import multiprocessing
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.controller.problems import PROBLEMS
from benchmarks.controller.training import OPTIMIZERS, Run
from benchmarks.controller.work import Work, done, quiet, searched, single

RULES = ("batch_sharpness", "along_update")

OTHERS = {
    "prodigy": ("prodigyopt", "cosine", 1.0),
    "dadapt": ("dadaptation", "cosine", 1.0),
    "schedule_free": ("schedulefree", "constant", 2.5e-3),
}
"""What takes an optimizer's place: its package, and the schedule and the rate that its authors advise."""

OFFSET = 0.01
"""Added to both losses of a ratio: it keeps losses near zero from dominating."""


def tasks(args: argparse.Namespace) -> Iterator[tuple[Work, Any]]:
    """All that is asked for: a function, and its first argument."""
    others = {name: entry for name, entry in OTHERS.items() if find_spec(entry[0])}
    for seed, name in product(range(args.seeds), args.problems):
        for optimizer in OPTIMIZERS:
            for method in ("constant", "cosine"):
                yield searched, (name, optimizer, method, seed, args.steps)
            for rule in RULES:
                yield single, Run(name, optimizer, rule, 1e-3, seed, args.steps)
        for other, (_, method, rate) in others.items():
            yield single, Run(name, other, method, rate, seed, args.steps)


def report(results: list[dict[str, Any]]) -> None:
    """Print how far the final losses are from those of the best constant rate, and of the best cosine."""
    finals: dict[tuple[str, str, str, int], float] = {}
    for result in results:
        key = (result["problem"], result["optimizer"], result["method"], result["steps"])
        same = [r for r in results if (r["problem"], r["optimizer"], r["method"], r["steps"]) == key]
        means = defaultdict(list)
        for one in same:
            means[one["rate"]].append(math.inf if one["final"] is None else one["final"])
        finals[key] = min(fmean(values) for values in means.values())
    for steps, is_held_out in product(sorted({result["steps"] for result in results}), (False, True)):
        names = [name for name, problem in PROBLEMS.items() if problem.held_out == is_held_out]
        print(f"\n### {steps} steps, problems that were {'looked at once' if is_held_out else 'looked at often'}\n")
        print(
            "| optimizer | method | within 1.2 | within 1.5 | geometric mean | worst | within 1.2 of the best cosine |"
        )
        print("|---|---|---|---|---|---|---|")
        for optimizer, method in product(OPTIMIZERS, (*RULES, "cosine", *OTHERS)):
            own = (method, OTHERS[method][1]) if method in OTHERS else (optimizer, method)
            cells = [
                (name, finals[(name, *own, steps)], finals[name, optimizer, "constant", steps])
                for name in names
                if (name, *own, steps) in finals and (name, optimizer, "constant", steps) in finals
            ]
            if not cells:
                continue
            ratios = [((loss + OFFSET) / (best + OFFSET), name) for name, loss, best in cells]
            to_cosine = [
                (loss + OFFSET) / (finals[name, optimizer, "cosine", steps] + OFFSET) for name, loss, _ in cells
            ]
            mean = math.exp(fmean(math.log(min(ratio, 1e3)) for ratio, _ in ratios))
            near = [sum(ratio <= bound for ratio, _ in ratios) for bound in (1.2, 1.5)]
            worst, where = max(ratios)
            print(
                f"| {optimizer} | {method} | {near[0]} of {len(cells)} | {near[1]} | {mean:.2f} |"
                f" {worst:.2g} ({where}) | {sum(ratio <= 1.2 for ratio in to_cosine)} |"
            )


def main() -> None:
    """Train and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/controller.jsonl"), help="results file")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="print the tables of the results file, and train nothing")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    known = {Run(**{name: result[name] for name in Run.__dataclass_fields__}): result for result in results}
    if not args.report:
        todo = [(function, argument, known) for function, argument in tasks(args)]
        with multiprocessing.get_context("spawn").Pool(args.processes, quiet) as pool, args.out.open("a") as file:
            for found in pool.imap_unordered(done, todo):
                results += found
                for result in found:
                    print(json.dumps(result), file=file, flush=True)
    report(results)


if __name__ == "__main__":
    main()
