"""The Hessian and its relatives without negative eigenvalues: how far apart they are, and what the difference is.

``python -m examples.gauss_newton`` trains the quick start's network on all handwritten digits at once. The Hessian is
``H = G + R``: the Gauss–Newton matrix ``G``, which sees the loss bend and the network as linear, and the rest ``R``,
the curvature of the network weighted by the residuals of the samples. Along the training both ends of ``H`` are
measured, the largest eigenvalues of ``G`` and of the empirical Fisher matrix, and both ends of ``R``. Half a minute.
"""

import argparse
import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn import functional

from examples.edge_of_stability import train
from lyapunov_lightning.curvature import (
    EmpiricalFisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    LinearOperator,
    lanczos,
)
from lyapunov_lightning.figures.style import (
    BLUE,
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
from lyapunov_lightning.figures.ticks import log_axis

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "gauss_newton.png"


class Difference:
    """What one operator has beyond another: all that a solver asks of it is its products."""

    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        self.first, self.second = first, second
        self.size, self.dtype, self.device = first.size, first.dtype, first.device

    def matvec(self, vector: Tensor) -> Tensor:
        return self.first.matvec(vector) - self.second.matvec(vector)


@dataclass(frozen=True)
class Ends:
    """Outermost eigenvalues before a step: of the Hessian, of its relatives, and of what is between them."""

    step: int
    loss: float
    hessian: float
    gauss_newton: float
    fisher: float
    rest: float
    hessian_min: float
    rest_min: float


def half_squares(outputs: Tensor, labels: Tensor) -> Tensor:
    """Half the squared distance to the one-hot label, of each sample."""
    return (outputs - functional.one_hot(labels, outputs.shape[1])).square().sum(dim=1) / 2


def measured(network: torch.nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Ends:
    """The ends of all four matrices, on one batch."""
    parameters = dict(network.named_parameters())
    hessian = HessianOperator(lambda pair: half_squares(network(pair[0]), pair[1]).mean(), parameters, [batch])
    gauss_newton = GaussNewtonOperator(
        outputs=lambda pair: network(pair[0]),
        loss=lambda outputs, pair: half_squares(outputs, pair[1]).mean(),
        parameters=parameters,
        batches=[batch],
    )
    fisher = EmpiricalFisherOperator(lambda pair: half_squares(network(pair[0]), pair[1]), parameters, [batch])
    both_ends = partial(lanczos, largest=1, smallest=1, tol=1e-2)
    ends, ends_of_rest = both_ends(hessian), both_ends(Difference(hessian, gauss_newton))
    return Ends(
        step=step,
        loss=hessian.value(),
        hessian=float(ends.largest),
        gauss_newton=float(lanczos(gauss_newton, tol=1e-2).largest),
        fisher=float(lanczos(fisher, tol=1e-2).largest),
        rest=float(ends_of_rest.largest),
        hessian_min=float(ends.smallest),
        rest_min=float(ends_of_rest.smallest),
    )


class Relatives(Callback):
    """Measures every n steps, on the step's batch and a copy of the network."""

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.found: list[Ends] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self.found.append(measured(copy.deepcopy(pl_module.network), batch, trainer.global_step))


@house_style()
def drawn(found: list[Ends], title: str) -> Picture:
    """The upper ends, above the lower ones."""
    picture = new_picture(WIDTH, 5.0, title)
    upper, lower = stacked(picture, [3.0, 2.4])
    steps = [ends.step for ends in found]
    curve(upper, steps, [ends.hessian for ends in found], color=RED, label="Hessian H")
    curve(upper, steps, [ends.gauss_newton for ends in found], color=INK, linestyle="--", label="Gauss–Newton G")
    curve(upper, steps, [ends.rest for ends in found], color=OCHRE, label="rest H − G")
    curve(upper, steps, [ends.fisher for ends in found], color=BLUE, label="empirical Fisher")
    log_axis(upper, "y")
    upper.set_ylabel("largest eigenvalue")
    key(upper)
    curve(lower, steps, [-ends.rest_min for ends in found], color=OCHRE, label="rest H − G")
    curve(lower, steps, [-ends.hessian_min for ends in found], color=RED, label="Hessian H")
    log_axis(lower, "y")
    lower.set_ylabel("−(smallest eigenvalue)")
    key(lower)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=0.2, help="learning rate of gradient descent")
    parser.add_argument("--max_steps", type=int, default=800, help="steps of gradient descent")
    parser.add_argument("--every_n_steps", type=int, default=40, help="steps between two measurements")
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture to draw")
    options = parser.parse_args()
    relatives = Relatives(options.every_n_steps)
    train(partial(torch.optim.SGD, lr=options.lr), options.max_steps, relatives, progress_bar=False)
    print("step   loss  λ_max: H      G    H − G  Fisher  λ_min:  H   H − G")
    for ends in relatives.found[:: max(len(relatives.found) // 8, 1)]:
        print(
            f"{ends.step:4d} {ends.loss:6.3f} {ends.hessian:8.3f} {ends.gauss_newton:7.3f} {ends.rest:7.3f}"
            f" {ends.fisher:7.3f} {ends.hessian_min:8.3f} {ends.rest_min:7.3f}"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    drawn(relatives.found, f"Gradient descent, η = {options.lr:g}").save(options.out)
    print(f"The picture: {options.out}")


if __name__ == "__main__":
    main()
