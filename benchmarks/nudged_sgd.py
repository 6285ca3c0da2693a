"""Nudged-SGD on CIFAR-10 with different learning rates along the sharpest directions: table 2 of the paper, in small.

    python -m benchmarks.nudged_sgd --root data

SimpleCNN, initialized as in Keras, which the paper used, is trained with plain SGD at η = 0.01 and batches of 128 on
the first images of CIFAR-10. The five sharpest directions are measured on 128 fixed images before every epoch, and get
the learning rate γη. The paper trained on all 50,000 images until the end and took the Frobenius norm of the top 50
eigenvalues; here it is that of the tracked five. One line for each γ; the runs differ in nothing else.
"""

import argparse
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn

from examples.data import Cifar10
from examples.models import Classifier, SimpleCNN
from lyapunov_lightning import HessianConfig, NudgedSGDHook

K, LEARNING_RATE, BATCH_SIZE = 5, 0.01, 128


class Curves(Logger):
    """Keeps every scalar with its step."""

    name, version = "curves", 0

    def __init__(self) -> None:
        super().__init__()
        self.series: dict[str, dict[int, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep them."""
        for tag, value in metrics.items():
            self.series.setdefault(tag, {})[step or 0] = value

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """There are none."""


@dataclass
class Run:
    """What one training left behind, an entry for each epoch in the lists."""

    losses: list[float]
    accuracies: list[float]
    sharpness: list[float]
    norms: list[float]
    converged: float
    removed: float
    products: list[float]
    distance: float
    seconds: float


def weights(module: nn.Module) -> Tensor:
    """All parameters in one vector."""
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def train(gamma: float, arguments: argparse.Namespace) -> Run:
    """Train once, and measure once more after the last epoch."""
    pl.seed_everything(arguments.seed, verbose=False)
    network = SimpleCNN()
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    module = Classifier(network, optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE))
    begin, curves = weights(module), Curves()
    hook = NudgedSGDHook(k=K, gamma=gamma, hessian=HessianConfig(num_batches=1), tol=1e-2)
    steps = arguments.images // BATCH_SIZE
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps * arguments.epochs + 1,  # whose measurement is that of the trained network
            max_epochs=-1,
            limit_val_batches=8,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            logger=curves,
            callbacks=[hook],
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        started = time.perf_counter()
        trainer.fit(module, Cifar10(arguments.root, BATCH_SIZE, download=False, num_train=arguments.images))
    losses = torch.tensor(list(curves.series["train/loss"].values()))[: steps * arguments.epochs]
    values = torch.tensor([result.eigenvalues for result in hook.results])
    removed = list(curves.series["nudge/removed_fraction"].values())
    return Run(
        losses=losses.view(arguments.epochs, steps).mean(dim=1).tolist(),
        accuracies=list(curves.series["val/accuracy"].values())[: arguments.epochs],
        sharpness=values[:, 0].tolist(),
        norms=values.norm(dim=1).tolist(),
        converged=min(result.num_converged for result in hook.results) / K,
        removed=sum(removed) / len(removed),
        products=[result.matvecs for result in hook.results],
        distance=float((weights(module) - begin).norm()),
        seconds=time.perf_counter() - started,
    )


def show(values: list[float], places: int) -> str:
    """Numbers in a row."""
    return " ".join(f"{value:.{places}f}" for value in values)


def main() -> None:
    """Print the curves and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder that holds cifar-10-batches-py")
    parser.add_argument("--gammas", type=float, nargs="+", default=[0.01, 0.1, 1.0, 5.0])
    parser.add_argument("--images", type=int, default=12_800, help="how many of the training images")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    runs: dict[float, Run] = {}
    for gamma in arguments.gammas:
        runs[gamma] = run = train(gamma, arguments)
        print(f"\nγ = {gamma}: {run.seconds:.0f} s, at least {run.converged:.0%} of the eigenpairs converged")
        print(f"  training loss, mean of each epoch   {show(run.losses, 3)}")
        print(f"  validation accuracy after each      {show(run.accuracies, 3)}")
        print(f"  λ_max before each, and at the end   {show(run.sharpness, 1)}")
        print(f"  norm of the {K}, likewise            {show(run.norms, 1)}")
        print(f"  Hessian-vector products, likewise   {show(run.products, 0)}", flush=True)
    print("\n| γ | λ_max peak / end | ‖H‖_F peak / end | val. acc. | loss | dist. | removed |")
    print("|---|---|---|---|---|---|---|")
    for gamma, run in runs.items():
        ends = f"{max(run.sharpness):.1f} / {run.sharpness[-1]:.1f} | {max(run.norms):.1f} / {run.norms[-1]:.1f}"
        last = f"{run.accuracies[-1]:.1%} | {run.losses[-1]:.3f} | {run.distance:.2f} | {run.removed:.0%}"
        print(f"| {gamma} | {ends} | {last} |")


if __name__ == "__main__":
    main()
