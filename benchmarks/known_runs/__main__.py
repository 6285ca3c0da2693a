"""The table: how many sentences name the cause."""

import argparse
import logging

import torch

import benchmarks.known_runs
from benchmarks.known_runs.kinds import KINDS, runs_of
from benchmarks.known_runs.problems import SETS
from benchmarks.known_runs.watching import watch


def main() -> None:
    """Train, and print which sentences are wrong and how many are right."""
    parser = argparse.ArgumentParser(
        description=benchmarks.known_runs.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", choices=SETS, default="first", help="which problems and seeds")
    parser.add_argument("--only", choices=KINDS, help="one kind of run")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    counts = dict[str, tuple[int, int]]()
    for name in [options.only] if options.only else KINDS:
        found = [(run, watch(run).diagnosis()) for run in runs_of(name, options.set)]
        wrong = [(run, diagnosis) for run, diagnosis in found if diagnosis.kind not in KINDS[name].named]
        counts[name] = len(found) - len(wrong), len(found)
        for run, diagnosis in wrong:
            print(f"  {name}: {run}\n    {diagnosis.kind}: {diagnosis}", flush=True)
    print("\n| kind of run | sentences that name the cause |\n|---|---|")
    for name, (right, total) in counts.items():
        print(f"| {name} | {right} of {total} |")
    right, total = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
    print(f"| **all** | **{right} of {total}** |")


if __name__ == "__main__":
    main()
