"""The learning rate of `QuasiNewtonLRController` against constant ones, and against D-Adaptation and Prodigy.

Two-class CIFAR-10, batches of 512, weight decay 5e-4, random crops and flips; four networks with two losses each, equal
steps for every method. ``python -m benchmarks.quasi_newton --root data`` trains what is not yet in the results file,
one line of JSON for each run, and prints the tables; ``--report`` only prints them. Needs the extra ``bench``.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from examples.models import MLP, LeNet1, TinyResNet
from lyapunov_lightning import QuasiNewtonLRController

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)),
    "MLP": lambda: MLP(3072, [200, 200, 200], 2),
    "LeNet1": lambda: LeNet1(3, 2),
    "tinyResNet": lambda: TinyResNet(3, 2),
}
LOSSES = ("cross_entropy", "squared_error")
GRID = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
RULES = ("along_update", "inverse_sharpness")
OTHERS = ("prodigy", "dadaptation")
WEIGHT_DECAY = 5e-4
BATCH_SIZE = 512
WINDOW = 50
"""Steps over which a loss is smoothed."""


class Batches(IterableDataset):
    """Whole batches of the first two classes, cropped and flipped at random, the same for every method.

    Args:
        root: Folder that holds CIFAR-10 in torchvision's layout.
        seed: Seed of order and augmentation.
    """

    def __init__(self, root: str, seed: int) -> None:
        from torchvision.datasets import CIFAR10

        data = CIFAR10(root, train=True)
        labels = torch.tensor(data.targets)
        images = torch.tensor(data.data[(labels < 2).numpy()]).permute(0, 3, 1, 2).float() / 255
        mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.247, 0.2435, 0.2616])
        padded = functional.pad((images - mean[:, None, None]) / std[:, None, None], [4] * 4)
        self.crops = padded.unfold(2, 32, 1).unfold(3, 32, 1)
        self.labels = labels[labels < 2]
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            for chosen in torch.randperm(len(self.labels), generator=generator).split(BATCH_SIZE)[:-1]:
                rows, columns = torch.randint(9, (2, len(chosen)), generator=generator)
                images = self.crops[chosen, :, rows, columns]
                flipped = torch.rand(len(chosen), generator=generator) < 0.5
                yield torch.where(flipped[:, None, None, None], images.flip(3), images), self.labels[chosen]


class Learner(pl.LightningModule):
    """Trains a network and keeps the loss of every step; stops where it diverges."""

    def __init__(self, network: nn.Module, loss: str, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.network, self.loss, self.optimizer = network, loss, optimizer
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean loss."""
        inputs, labels = batch
        outputs = self.network(inputs)
        if self.loss == "cross_entropy":
            return functional.cross_entropy(outputs, labels)
        return (outputs - functional.one_hot(labels, 2).to(outputs)).square().sum(dim=1).mean() / 2

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the loss."""
        self.losses.append(float(outputs["loss"]))
        if not self.losses[-1] < 1e4:
            self.trainer.should_stop = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The method's."""
        return self.optimizer(self.parameters())


class Rates(pl.Callback):
    """Keeps the learning rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep it."""
        self.seen.append(float(trainer.optimizers[0].param_groups[0]["lr"]))


def run(
    network: str, loss: str, method: str, seed: int, steps: int, batches: Batches, **options: Any
) -> dict[str, Any]:
    """Train once; the losses and learning rates of all steps."""
    callbacks: list[pl.Callback] = [Rates()]
    if method in RULES:
        callbacks.insert(0, QuasiNewtonLRController(rule=method, **options))
    torch.manual_seed(seed)
    module = Learner(NETWORKS[network](), loss, _optimizer(method))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches.seed = seed
    started = time.perf_counter()
    trainer.fit(module, DataLoader(batches, batch_size=None))
    seconds = time.perf_counter() - started
    return {
        **{"network": network, "loss": loss, "method": method, "seed": seed, "seconds": seconds},
        **{"losses": module.losses, "rates": callbacks[-1].seen},  # type: ignore[attr-defined]
    }


def _optimizer(method: str) -> Callable[[Any], torch.optim.Optimizer]:
    if method == "prodigy":
        from prodigyopt import Prodigy

        return lambda parameters: Prodigy(parameters, weight_decay=WEIGHT_DECAY, decouple=False)
    if method == "dadaptation":
        from dadaptation import DAdaptSGD

        return lambda parameters: DAdaptSGD(parameters, weight_decay=WEIGHT_DECAY)
    lr = 1e-3 if method in RULES else float(method)
    return lambda parameters: torch.optim.SGD(parameters, lr, weight_decay=WEIGHT_DECAY)


def final_loss(losses: list[float], steps: int) -> float:
    """Mean of the last window; infinite for a run that diverged."""
    if len(losses) < steps or not math.isfinite(losses[-1]):
        return math.inf
    return float(np.mean(losses[-WINDOW:]))


def rises(losses: list[float]) -> float:
    """The most that the smoothed loss rises again after any of its values, relative to that value."""
    smoothed = np.convolve(losses, np.ones(WINDOW) / WINDOW, "valid")
    return float((smoothed / np.minimum.accumulate(smoothed)).max() - 1)


def report(results: list[dict[str, Any]], steps: int) -> None:
    """The tables, in Markdown."""
    table: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        table[result["network"], result["loss"]][result["method"]].append(result)
    shown = [*RULES, *OTHERS]
    print(f"| problem | best constant | {' | '.join(shown)} |\n|---|---|{'---|' * len(shown)}")
    for (network, loss), methods in table.items():
        means = {
            method: float(np.mean([final_loss(run["losses"], steps) for run in runs]))
            for method, runs in methods.items()
        }
        constants = {method: mean for method, mean in means.items() if method not in shown}
        best = min(constants, key=constants.__getitem__)
        cells = [f"{means[m]:.4f} ({means[m] / means[best]:.2f}x)" if m in means else "" for m in shown]
        print(f"| {network}, {loss} | {means[best]:.4f} at {best} | {' | '.join(cells)} |")
    print("\n| the smoothed loss rises by at most | best constant | along_update | inverse_sharpness | lr at the end |")
    print("|---|---|---|---|---|")
    for (network, loss), methods in table.items():
        constants = {method: runs for method, runs in methods.items() if method not in shown}
        best = min(constants, key=lambda m: np.mean([final_loss(run["losses"], steps) for run in constants[m]]))
        cells = [f"{max(rises(run['losses']) for run in methods[m]):.1%}" for m in (best, *RULES) if m in methods]
        rates = [
            f"{np.mean([np.mean(run['rates'][-WINDOW:]) for run in methods[m]]):.3g}" for m in RULES if m in methods
        ]
        print(f"| {network}, {loss} | {' | '.join(cells)} | {', '.join(rates)} |")


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder that holds cifar-10-batches-py")
    parser.add_argument("--results", type=Path, default=Path("logs/quasi_newton.jsonl"), help="one line for each run")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=LOSSES)
    parser.add_argument("--methods", nargs="+", default=[*RULES, *map(str, GRID), *OTHERS])
    parser.add_argument("--report", action="store_true", help="print the tables of the results file, and train nothing")
    args = parser.parse_args(arguments)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    results = [json.loads(line) for line in lines]
    done = {(r["network"], r["loss"], r["method"], r["seed"]) for r in results}
    batches = None if args.report else Batches(args.root, 0)
    for seed in range(args.seeds):
        for network in args.networks:
            for loss in args.losses:
                for method in args.methods:
                    if batches is None or (network, loss, method, seed) in done:
                        continue
                    results.append(run(network, loss, method, seed, args.steps, batches))
                    with args.results.open("a") as file:
                        file.write(json.dumps(results[-1]) + "\n")
                    print(
                        f"{network}, {loss}, {method}, seed {seed}: {final_loss(results[-1]['losses'], args.steps):.4f}"
                    )
    report(results, args.steps)


if __name__ == "__main__":
    main()
