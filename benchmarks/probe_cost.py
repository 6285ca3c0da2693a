"""What a callback adds to a training of a few hundred steps, in CPU time, on four networks.

    python -m benchmarks.probe_cost --root data                        # `CurvatureProbe()` as it comes, 400 steps
    python -m benchmarks.probe_cost --with 'CurvatureProbe(10)'        # or another one of the list
    python -m benchmarks.probe_cost --parts                            # and what the parts take, in training steps

One row of what `make bench` tells of the callbacks, see `benchmarks.training_cost`, for a closer look.
"""

import argparse
import logging
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import Sample
from benchmarks.training_cost import QUICK, SETUPS, WAYS, seconds_of
from lyapunov_lightning import CurvatureProbe
from lyapunov_lightning.callbacks.estimators.eigenvalues import Eigenvalues
from lyapunov_lightning.callbacks.gauges import SharpnessGauge

PARTS = {
    "eigenvalue": (Eigenvalues, "measure"),
    "batch sharpness by products": (SharpnessGauge, "measure"),
    "batch sharpness by losses": (SharpnessGauge, "glance"),
    "figure and words": (CurvatureProbe, "conclude"),
}


def take_apart() -> dict[str, float]:
    """Count the CPU time of the parts from now on."""
    spent: dict[str, float] = defaultdict(float)

    def counted(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.process_time() - began

        return count

    for part, (owner, name) in PARTS.items():
        setattr(owner, name, counted(part, getattr(owner, name)))
    return spent


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print a line for each network."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.probe_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--with", dest="way", choices=list(WAYS), default="CurvatureProbe()")
    parser.add_argument("--networks", nargs="+", choices=list(SETUPS), default=[n for n in SETUPS if n != QUICK])
    parser.add_argument("--steps", type=int, help="of a run, in place of those of `make bench`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", action="store_true", help="what the parts of it take")
    parser.add_argument("--root", default="data", help="folder of CIFAR-10; nothing is downloaded")
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    way, spent = WAYS[args.way], take_apart() if args.parts else {}
    for name in args.networks:
        setup = SETUPS[name]
        data = setup.data(args.root)
        steps = args.steps or way.steps or len(data[0]) // setup.batch_size
        seconds_of(setup, data, 2, [])
        seconds_of(setup, data, 2, [way.callback()])  # what libraries set up at the first call
        spent.clear()
        plain: list[float] = []
        ratios: list[float] = []
        for _ in range(args.repeats):
            plain.append(seconds_of(setup, data, steps, [], way.counted_from))
            ratios.append(seconds_of(setup, data, steps, [way.callback()], way.counted_from) / plain[-1])
        sample = Sample(tuple(ratios))
        low, high = sample.quartiles
        step = 1e3 * sum(plain) / len(plain) / steps
        print(f"{name}: {sample.median:.3f} ({low:.3f} to {high:.3f}) times the {step:.0f} ms of a step", flush=True)
        for part, seconds in spent.items():
            print(f"    {part}: {seconds / sum(plain) * steps:.1f} steps of {steps}")


if __name__ == "__main__":
    main()
