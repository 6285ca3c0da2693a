"""What the probe says of optimizers whose limit nobody has worked out: Muon, Lion, Adafactor.

``python -m examples.edge_without_rule`` trains the quick start's network on all handwritten digits at once, with each
of them at three learning rates, and prints the stability ratio that is observed of their steps: the share of the
decrease of the loss that a step promises and its own curvature eats. Beside it stands the loss. Two minutes.
"""

import argparse
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from examples.edge_of_stability import train
from lyapunov_lightning import CurvatureProbe
from lyapunov_lightning.curvature import CurvatureWarning


class Lion(torch.optim.Optimizer):
    """The sign of a running mean of the gradients (X. Chen et al., "Symbolic discovery of optimization algorithms").

    Args:
        parameters: The parameters.
        lr: The learning rate, by which every parameter moves at each step.
        betas: The shares of the running mean in the update, and in the next running mean.

    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99)
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            of_update, of_mean = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                parameter.sub_(torch.lerp(parameter.grad, mean, of_update).sign_(), alpha=group["lr"])
                mean.lerp_(parameter.grad, 1 - of_mean)
        return loss


class MatrixMuon(torch.optim.Optimizer):
    """PyTorch's Muon for the matrices, which is all that it takes, and SGD for the rest.

    Args:
        parameters: The parameters.
        lr: The learning rate of both.

    """

    def __init__(self, parameters: Iterable[Tensor], lr: float = 1e-3) -> None:
        found = list(parameters)
        super().__init__(found, {"lr": lr})
        matrices, others = ([p for p in found if (p.ndim == 2) is wanted] for wanted in (True, False))
        self._parts = [torch.optim.Muon(matrices, lr=lr, weight_decay=0.0), torch.optim.SGD(others, lr=lr)]

    def step(self, closure: Any = None) -> Any:
        """Move the matrices and the rest."""
        loss = closure() if closure is not None else None
        for part in self._parts:
            part.step()
        return loss


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[float, ...]]] = {
    "Muon": (MatrixMuon, (1e-3, 1e-2, 1e-1)),
    "Lion": (Lion, (1e-4, 1e-3, 1e-2)),
    "Adafactor": (torch.optim.Adafactor, (1e-3, 1e-2, 1e-1)),
}
"""By name, with the learning rates that are tried: a decade apart."""


class Losses(Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


@dataclass(frozen=True)
class Run:
    """What became of a run, and what was said of it.

    Attributes:
        early: The median stability ratio of the second tenth of the run.
        late: That of its second half.
        losses: The loss of each step.

    """

    early: float
    late: float
    losses: list[float]


def run(optimizer: Callable[..., torch.optim.Optimizer], lr: float, max_steps: int, every_n_steps: int = 5) -> Run:
    """Train with an optimizer that the probe knows no limit of."""
    probe, losses = CurvatureProbe(every_n_steps), Losses()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvatureWarning)  # which says that there is none
        train(partial(optimizer, lr=lr), max_steps, probe, losses, progress_bar=False)
    ratios = [(result.step, result.stability_ratio) for result in probe.results]
    early = median(ratio for step, ratio in ratios if max_steps <= 10 * step < 2 * max_steps)
    return Run(early, median(ratio for step, ratio in ratios if 2 * step >= max_steps), losses.values)


def median(values: Iterable[float | None]) -> float:
    """Of those that are known; NaN if none is."""
    known = [value for value in values if value is not None]
    return float(torch.tensor(known, dtype=torch.float64).median()) if known else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=300, help="steps of each run")
    options = parser.parse_args()
    print("optimizer  learning rate  ratio: second tenth  last half  loss at the end, and its lowest")
    for name, (optimizer, rates) in OPTIMIZERS.items():
        for lr in rates:
            found = run(optimizer, lr, options.max_steps)
            print(
                f"{name:9s}  {lr:13g}  {found.early:19.2f}  {found.late:9.2f}  {found.losses[-1]:15.2g}"
                f"  {min(found.losses):14.2g}",
                flush=True,
            )


if __name__ == "__main__":
    main()
