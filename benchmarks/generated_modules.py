"""Many generated modules, each trained without and with the reading callbacks and compared bit by bit.

    python -m benchmarks.generated_modules --cases 2000 --start 0

Prints every case that breaks a guarantee with its seed and its description, and at the end how many cases came to
what. With ``--shrink`` a failing case is made as small as it goes on failing; ``--source SEED`` prints a case as the
Python file that it is, to be run by hand.
"""

import argparse
import logging
import time
from collections import Counter

import lightning.pytorch  # noqa: F401  (sets the levels of its loggers when it is imported)
import torch

from tests.generator.cases import case_of
from tests.generator.runs import Verdict, check, shrink


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="how many")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--shrink", action="store_true", help="look for the smallest case that fails")
    parser.add_argument("--source", type=int, metavar="SEED", help="print a case and run nothing")
    arguments = parser.parse_args()
    if arguments.source is not None:
        print(case_of(arguments.source).source())
        return
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    kinds: Counter[str] = Counter()
    failed: list[int] = []
    started = time.perf_counter()
    for seed in range(arguments.start, arguments.start + arguments.cases):
        verdict = _verdict(seed)
        kinds[verdict.kind] += 1
        if verdict.failed:
            failed.append(seed)
            print(shrink(verdict.case) if arguments.shrink else verdict, flush=True)
    minutes = (time.perf_counter() - started) / 60
    print(f"{arguments.cases} cases in {minutes:.1f} minutes: {dict(kinds)}; failing seeds: {failed or 'none'}")


def _verdict(seed: int) -> Verdict:
    """What came of a case, also where the check itself broke."""
    case = case_of(seed)
    try:
        return check(case)
    except Exception as error:
        return Verdict(case, "FAILED", (f"{error!r} from {error.__cause__!r}",))


if __name__ == "__main__":
    main()
