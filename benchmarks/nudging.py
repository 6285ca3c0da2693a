"""Where nudged SGD does harm: γ from 0 to 5, momentum, BatchNorm, and eigenvectors that have grown old.

    python -m benchmarks.nudging                 # some ten minutes on one core; nothing is downloaded
    python -m benchmarks.nudging --problems words --steps 200

Three small problems (`benchmarks.controller.problems`): convolutions with BatchNorm and dropout, residual blocks with
LayerNorm, and a recurrent network. For each, with and without momentum, the best constant rate of plain SGD is looked
for in a grid with factor √10. At this rate, and at a third of it, γ acts along the three sharpest directions, measured
every 40 steps or at the first step alone. What counts is the mean training loss of the last 40 steps over that of
γ = 1, and in brackets the sharpness at the end over that of γ = 1.
"""

import argparse
import logging
import math
import statistics
import warnings
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import trainers
from benchmarks.controller.problems import Batch, samples
from benchmarks.controller.training import OPTIMIZERS, WINDOW, Learner, Run
from lyapunov_lightning import HessianConfig, NudgedSGDHook
from lyapunov_lightning.curvature import HessianOperator, MeasurementError, lanczos

K = 3
GRID = [math.sqrt(10) ** exponent for exponent in range(-5, 2)]
GAMMAS = (0.0, 0.1, 0.5, 2.0, 5.0)
AGES = {"every 40 steps": 40, "once": 10**9}


@dataclass(frozen=True)
class Outcome:
    """What came of a training.

    Attributes:
        loss: The mean training loss of the last steps; infinite where it is not finite, or above that of the beginning.
        sharpness: The largest eigenvalue at the end, on the first samples; NaN where there is none.

    """

    loss: float
    sharpness: float


def train(problem: str, optimizer: str, rate: float, gamma: float, interval: int, steps: int) -> Outcome:
    """Train once."""
    learner = Learner(Run(problem, optimizer, "constant", rate, 0, steps))
    data = samples(learner.problem.data)
    torch.manual_seed(1)
    loader = DataLoader(TensorDataset(*data), learner.problem.batch_size, shuffle=True, drop_last=True)
    hook = NudgedSGDHook(k=K, gamma=gamma, every_n_steps=interval, hessian=HessianConfig(num_batches=4), tol=1e-2)
    trainers.train(learner, loader, [] if gamma == 1 else [hook], steps)
    loss = statistics.fmean(learner.losses[-WINDOW:])
    if not loss <= learner.losses[0]:  # NaN as well
        return Outcome(math.inf, math.nan)
    return Outcome(loss, sharpness_of(learner, tuple(part[:512] for part in data)))


def sharpness_of(learner: Learner, batch: Batch) -> float:
    """The largest eigenvalue of the Hessian on these samples, without dropout."""
    learner.eval()
    parameters = list(learner.parameters())
    operator = HessianOperator(lambda given: learner.problem.loss(learner.network, given), parameters, [batch])
    try:
        return float(lanczos(operator, tol=1e-2).values)
    except MeasurementError:
        return math.nan


def cell(own: Outcome, plain: Outcome) -> str:
    """Loss and sharpness over those of γ = 1."""
    if not math.isfinite(own.loss):
        return "diverged"
    return f"{own.loss / plain.loss:.3g} ({own.sharpness / plain.sharpness:.2g})"


def main() -> None:
    """Print a table for each problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=["digits convolutions", "residual", "words"])
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    header = [f"γ = {gamma:g}" for gamma in GAMMAS]
    print("| problem | momentum | rate | directions measured | " + " | ".join(header) + " |")
    print("|---" * (4 + len(GAMMAS)) + "|", flush=True)
    for problem in arguments.problems:
        for optimizer in ("SGD", "momentum"):
            momentum = OPTIMIZERS[optimizer][1].get("momentum", 0.0)
            found = {rate: train(problem, optimizer, rate, 1.0, 1, arguments.steps) for rate in GRID}
            best = min(found, key=lambda rate: found[rate].loss)
            for part, rate in (("best", best), ("a third", GRID[max(0, GRID.index(best) - 1)])):
                for age, interval in AGES.items():
                    own = [train(problem, optimizer, rate, gamma, interval, arguments.steps) for gamma in GAMMAS]
                    cells = " | ".join(cell(one, found[rate]) for one in own)
                    print(f"| {problem} | {momentum:g} | {part}, {rate:.2g} | {age} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
