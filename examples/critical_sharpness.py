"""Critical sharpness beside the largest eigenvalue: forward passes against Hessian-vector products, in one picture.

``python -m examples.critical_sharpness`` trains the quick start's network on all handwritten digits at once, by
gradient descent and by AdamW, with two probes at the same steps. It draws the run of gradient descent, and prints of
both how the critical sharpness compares with the curvature along the same update, ``uᵀHu / -gᵀu`` from a Hessian-vector
product, and its stability ratio with that of the largest eigenvalue. Half a minute on two cores.
"""

import argparse
import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from examples.edge_of_stability import train
from lyapunov_lightning import CurvatureProbe
from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.figures.stability import draw_loss
from lyapunov_lightning.figures.style import (
    INK,
    OCHRE,
    RED,
    WIDTH,
    Picture,
    curve,
    house_style,
    key,
    new_picture,
    stacked,
)

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "critical_sharpness.png"
OPTIMIZERS: dict[str, partial[Any]] = {
    "gradient descent, η = 0.4": partial(torch.optim.SGD, lr=0.4),
    "AdamW, η = 0.001": partial(torch.optim.AdamW, lr=1e-3),
}


class AlongUpdates(Callback):
    """The curvature ``uᵀHu / -gᵀu`` along every n-th update ``u``, for comparison, and the loss of all steps."""

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.values: dict[int, float] = {}
        self.losses: list[float] = []
        self._before: tuple[int, HessianOperator] | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            module = copy.deepcopy(pl_module.network)
            hessian = HessianOperator(
                lambda pair: pl_module._loss(module(pair[0]), pair[1]), module.named_parameters(), [batch]
            )
            self._before = trainer.global_step, hessian

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        if self._before is not None:
            (step, hessian), self._before = self._before, None
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            after, before = (hessian.layout.flatten(list(p)) for p in (pl_module.parameters(), hessian.parameters))
            update = (after - before) / rate
            self.values[step] = float(update @ hessian.matvec(update) / -(hessian.gradient() @ update))


def probed(
    optimizer: partial[torch.optim.Optimizer], every_n_steps: int, max_steps: int
) -> tuple[CurvatureProbe, CurvatureProbe, AlongUpdates]:
    """Train with an optimizer; the probe of eigenvalues, the critical one, and the reference."""
    probes = (
        CurvatureProbe(every_n_steps, log_prefix="eigenvalue"),
        CurvatureProbe(every_n_steps, "critical", log_prefix="critical"),
    )
    reference = AlongUpdates(every_n_steps)
    train(optimizer, max_steps, *probes, reference, progress_bar=False)
    return *probes, reference


@house_style()
def drawn(eigenvalues: CurvatureProbe, critical: CurvatureProbe, losses: list[float], title: str) -> Picture:
    """Both curvatures and the limit, above the loss."""
    picture = new_picture(WIDTH, 4.6, title)
    upper, lower = stacked(picture, [3.0, 2.0])
    steps = [result.step for result in critical.results]
    eigenvalue = [result.lambda_max for result in eigenvalues.results]
    limit = [result.stability_limit for result in critical.results]
    curve(upper, [result.step for result in eigenvalues.results], eigenvalue, color=RED, label="largest eigenvalue")
    sharpness = [result.critical_sharpness for result in critical.results]
    curve(upper, steps, sharpness, color=OCHRE, label="critical sharpness", linewidth=1.3, zorder=3)
    curve(upper, steps, limit, color=INK, linewidth=1.2, linestyle="--", label="2/η")
    upper.set_ylim(bottom=0.0)
    upper.set_ylabel("curvature")
    key(upper)
    draw_loss(lower, (range(len(losses)), losses))
    return picture


def ratios(
    eigenvalues: CurvatureProbe, critical: CurvatureProbe, reference: AlongUpdates, max_steps: int
) -> dict[str, list[float]]:
    """What the critical sharpness is in proportion to the others, in ascending order."""
    of_eigenvalue = {result.step: result.stability_ratio for result in eigenvalues.results}
    along: list[float] = []
    early: list[float] = []
    late: list[float] = []
    for result in critical.results:
        if result.critical_sharpness is None:
            continue
        along.append(result.critical_sharpness / reference.values[result.step])
        other = of_eigenvalue[result.step]
        if other is not None:  # AdamW has no scales before its first step
            part = early if result.step < max_steps / 5 else late if result.step >= max_steps / 2 else []
            part.append(result.stability_ratio / other)
    return {
        "to the curvature along the update": sorted(along),
        "of its stability ratio to the eigenvalue's, first fifth of the steps": sorted(early),
        "of its stability ratio to the eigenvalue's, second half of the steps": sorted(late),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=1000, help="steps with each optimizer")
    parser.add_argument("--every_n_steps", type=int, default=5, help="steps between two measurements")
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture to draw")
    options = parser.parse_args()
    for name, optimizer in OPTIMIZERS.items():
        eigenvalues, critical, reference = probed(optimizer, options.every_n_steps, options.max_steps)
        known = [result for result in critical.results if result.critical_sharpness is not None]
        later = [result.forward_passes for result in critical.results[1:]]
        print(f"\n{name}: {len(known)} of {len(critical.results)} measurements have a value,", end=" ")
        print(f"{critical.results[0].forward_passes} forward passes for the first one, {min(later)} to {max(later)},")
        print(f"{sum(later) / len(later):.1f} on average, for each later one. Its proportion")
        for what, values in ratios(eigenvalues, critical, reference, options.max_steps).items():
            tenth, median, ninth = (values[round(share * (len(values) - 1))] for share in (0.1, 0.5, 0.9))
            print(f"- {what}: {tenth:.3g} to {ninth:.3g} in 80 % of the steps, median {median:.3g}")
        if name == next(iter(OPTIMIZERS)):
            options.out.parent.mkdir(parents=True, exist_ok=True)
            drawn(eigenvalues, critical, reference.losses, name[0].upper() + name[1:]).save(options.out)
            print(f"The picture: {options.out}")


if __name__ == "__main__":
    main()
