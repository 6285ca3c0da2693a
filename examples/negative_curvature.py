"""Train a LeNet on MNIST, look at its loss along eigenvectors of the Hessian, and say what was seen.

``python -m examples.negative_curvature --root DIR`` trains with a few seeds, on the images in ``DIR/MNIST/raw``, which
are downloaded if they are not there. The training is that of the command
``lyapunov-lightning fit --config examples/configs/mnist_negative.yaml``.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from matplotlib.figure import Figure
from torch import nn

from examples.models import Classifier
from lyapunov_lightning import LossAlongEigvecScanner
from lyapunov_lightning.callbacks.results import ScanResult
from lyapunov_lightning.cli import main as run_cli

CONFIG = Path(__file__).parent / "configs" / "mnist_negative.yaml"
PICTURE = Path("logs/negative_curvature.png")
STEPS = (500, 1000, 1500)
"""The measurements that the table is of."""


class DecayingClassifier(Classifier):
    """A classifier whose learning rate decays exponentially at every step.

    Args:
        network: Maps inputs to one output for each class.
        optimizer: Makes the optimizer from the parameters.
        decay: The factor of an epoch.
        steps_per_epoch: How many steps the factor is spread over.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable = torch.optim.RMSprop,
        decay: float = 0.75,
        steps_per_epoch: int = 1875,
    ) -> None:
        super().__init__(network, optimizer=optimizer)
        self.decay = decay
        self.steps_per_epoch = steps_per_epoch

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay ** (1 / self.steps_per_epoch))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(frozen=True)
class Seen:
    """What was found along the directions of one end at one step; NaN where nothing was."""

    curvature: np.ndarray
    fitted: np.ndarray
    optimal_step: np.ndarray
    unit_step: np.ndarray
    improvement: np.ndarray


def seen(result: ScanResult, is_bottom: bool) -> Seen:
    """The directions of one end."""
    chosen = [name.startswith("min_") == is_bottom for name in result.directions]

    def column(values: Sequence[float | None]) -> np.ndarray:
        return np.array(values, dtype=float)[chosen]

    return Seen(
        curvature=column(result.curvatures),
        fitted=column([fits[0] for fits in result.curvature_fits]),  # of the only scale
        optimal_step=column(result.optimal_steps),
        unit_step=column(result.unit_steps),
        improvement=column(result.best_improvements),
    )


def report(seed: int, step: int, top: Seen, bottom: Seen) -> None:
    """One line of the table."""
    print(
        f"| {seed} | {step} | {top.curvature[0]:.3g} | {bottom.curvature[0]:.3g}"
        f" | {np.nanmedian(top.optimal_step * top.curvature):.3f}"
        f" | {np.nanmedian(bottom.optimal_step * abs(bottom.curvature)):.1f}"
        f" | {np.nanmax(bottom.optimal_step * abs(bottom.curvature)):.0f}"
        f" | {np.nanmin(bottom.unit_step):.2f}, {np.nanmedian(bottom.unit_step):.2f}, {np.nanmax(bottom.unit_step):.2f}"
        f" | {np.nanmedian(bottom.improvement) / np.nanmedian(top.improvement):.1f}"
        f" | {np.mean(bottom.fitted > 0):.0%}"
        f" | {np.isfinite(top.optimal_step).sum()}, {np.isfinite(bottom.optimal_step).sum()} |"
    )


def draw(ends: list[tuple[Seen, Seen]]) -> Figure:
    """All directions of all runs: optimal steps and improvements."""
    figure = Figure(figsize=(7.4, 3.4), layout="constrained")
    inverse, fall = figure.subplots(1, 2)
    for colour, label, seen in (
        ("#c1432e", "largest eigenvalues", [top for top, _ in ends]),
        ("#2f6f9f", "smallest eigenvalues", [bottom for _, bottom in ends]),
    ):
        modulus = np.concatenate([abs(s.curvature) for s in seen])
        style = {"s": 12, "color": colour, "label": label}
        inverse.scatter(modulus, 1 / np.concatenate([s.optimal_step for s in seen]), **style)
        fall.scatter(modulus, np.concatenate([s.improvement for s in seen]), **style)
        span = np.array([modulus.min(), modulus.max()])
        inverse.plot(span, span, color="#333333", linewidth=0.8, linestyle="--")
    for panel, ylabel in ((inverse, "1 / optimal step"), (fall, "best improvement of the loss")):
        panel.set(xscale="log", yscale="log", xlabel="modulus of the eigenvalue", ylabel=ylabel)
    fall.legend(frameon=False, fontsize=8)
    for panel in (inverse, fall):
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data", help="folder that holds MNIST, or is to hold it")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where to draw")
    options = parser.parse_args()

    ends: dict[tuple[int, int], tuple[Seen, Seen]] = {}
    for seed in range(options.seeds):
        arguments = ["--seed_everything", str(seed), "--data.root", options.root]
        trainer = run_cli(["fit", "--config", str(CONFIG), *arguments]).trainer
        scanner = next(callback for callback in trainer.callbacks if isinstance(callback, LossAlongEigvecScanner))
        for result in scanner.results:
            if result.step in STEPS:
                ends[seed, result.step] = seen(result, is_bottom=False), seen(result, is_bottom=True)

    print("\n| seed | step | λ_1 | λ_min | α*λ, top | α*|λ|, bottom | its maximum", end="")
    print(
        " | unit step, bottom (min, median, max) | improvement, bottom/top | fit > 0, bottom | bracketed, top, bottom |"
    )
    print("|---" * 11 + "|")
    for (seed, step), (top, bottom) in ends.items():
        report(seed, step, top, bottom)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(list(ends.values())).savefig(options.picture, dpi=130)
    print(f"\nThe picture: {options.picture}")


if __name__ == "__main__":
    main()
