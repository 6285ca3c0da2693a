"""A hundred kills, full disks, no memory, broken loggers, states and tables, and ranks that fail: does the run go on?

    make chaos

Each line of the table is a fault, how often it was tried, and how often all was well: the training went on to the same
end, or ended as it does without the callbacks; what was written is whole and there; nothing hung. The exit status is 1
if it was not. ``docs/chaos.md`` has the table.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lightning
import torch

from benchmarks.chaos import faults
from benchmarks.chaos.faults import Tried
from benchmarks.chaos.pairs import pairs

HEADER = "| fault | tried | well | seconds |\n" + "|---" * 4 + "|"


def main() -> None:
    """Print the table, and below it what was not well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only", default="", help="only faults whose name holds this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, lightning {lightning.__version__}\n\n{HEADER}", flush=True)
    everything: dict[str, Tried] = {}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        unharmed = faults.straight(folder)
        tries: dict[str, Callable[[], Tried | None]] = {
            "SIGTERM, and on": lambda: faults.interrupted(folder, unharmed, signal.SIGTERM, 8),
            "SIGINT, and on": lambda: faults.interrupted(folder, unharmed, signal.SIGINT, 8),
            "disk full (RLIMIT_FSIZE)": lambda: faults.full_disk(folder),
            "disk full (tmpfs)": lambda: faults.full_tmpfs(folder),
            "little memory (RLIMIT_AS)": lambda: faults.little_memory(folder),
            "a logger that raises or hangs for a second": lambda: faults.loggers(folder),
            "an evaluation that fails, each in turn": lambda: faults.evaluations(folder, 100),
            "broken states and tables": lambda: faults.corrupted(folder, 50),
            "SIGKILL at a random moment, and on from the last checkpoint": lambda: faults.kills(
                folder, unharmed, arguments.kills
            ),
        }
        for name, run in tries.items():
            if arguments.only in name:
                began = time.monotonic()
                tried = run()
                if tried is not None:
                    tried.seconds = time.monotonic() - began
                    everything[name] = tried
                    _print_row(name, tried)
        if arguments.only in "DDP, FSDP2: a rank":
            for name, tried in pairs(folder):
                everything[name] = tried
                _print_row(name, tried)
    print()
    for name, tried in everything.items():
        for fault in tried.faults:
            print(f"- {name}: {fault}")
    sys.exit(any(tried.faults for tried in everything.values()))


def _print_row(name: str, tried: Tried) -> None:
    print(f"| {name} | {tried.count} | {tried.count - len(tried.faults)} | {tried.seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
