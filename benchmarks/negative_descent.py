"""Whether moves along the most negative direction help a training, and how well the running estimate follows it.

    python -m benchmarks.negative_descent
    python -m benchmarks.negative_descent --data mnist --root DIR   # torchvision's layout; nothing is downloaded

Each row is a training of the same network from the same seeds, for the same number of optimizer steps, with and without
the descent of the paper's appendix C. The loss is that of the whole training set. The second table gives the relative
error of the running estimate against Lanczos on the same data at every tenth step, in a run that it does not change.
"""

import argparse
import functools
import logging
import warnings
from dataclasses import replace
from statistics import mean, median, stdev
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.data import Digits
from examples.models import MLP, Classifier, LeNet
from lyapunov_lightning import HessianConfig, NegativeCurvatureTracker
from lyapunov_lightning.callbacks.negative_curvature_tracker import Descent

DESCENTS: dict[str, Descent | None] = {
    "none": None,
    "rate 1, at most 0.1": Descent(lr=1.0, max_step=0.1),
    "rate 100, at most 0.3": Descent(lr=100.0, max_step=0.3),
}

OPTIMIZERS: dict[str, Any] = {
    "SGD 0.05": functools.partial(torch.optim.SGD, lr=0.05),
    "SGD 0.5": functools.partial(torch.optim.SGD, lr=0.5),
    "RMSprop 0.00036": functools.partial(torch.optim.RMSprop, lr=0.00036, alpha=0.95, momentum=0.22),
    "Adam 0.003": functools.partial(torch.optim.Adam, lr=0.003),
}
"""A slow and a fast learning rate, the paper's optimizer, and what a practitioner would take."""


def dataset(name: str, root: str, num_train: int) -> tuple[TensorDataset, Any]:
    """Samples, and what makes a network for them."""
    if name == "digits":
        digits = Digits()
        digits.setup("fit")
        inputs, labels = zip(*digits.train_set, strict=True)
        return TensorDataset(torch.stack(inputs), torch.stack(labels)), lambda: MLP(64, [64, 64])
    from torchvision.datasets import MNIST

    images = MNIST(root, train=True)
    inputs = nn.functional.pad(images.data[:num_train, None].float() / 255, (2, 2, 2, 2))
    return TensorDataset((inputs - 0.13) / 0.31, images.targets[:num_train]), lambda: LeNet(1)


class WholeLoss(pl.Callback):
    """The loss of the whole training set after some steps."""

    def __init__(self, data: TensorDataset, steps: list[int]) -> None:
        self.data = data
        self.steps = steps
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The loss before a step."""
        if trainer.global_step in self.steps:  # here all that follows the last step has been done
            self.losses.append(self.value(pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The loss after the last step."""
        self.losses.append(self.value(pl_module))

    @torch.no_grad()
    def value(self, module: nn.Module) -> float:
        """The mean loss of all samples."""
        inputs, labels = self.data.tensors
        return float(nn.functional.cross_entropy(module(inputs), labels))


def train(
    data: TensorDataset, network: Any, optimizer: Any, steps: list[int], seed: int, tracker: pl.Callback | None
) -> list[float]:
    """The losses at these steps."""
    pl.seed_everything(seed, verbose=False)
    losses = WholeLoss(data, steps[:-1])
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps[-1],
        max_epochs=-1,
        logger=False,
        callbacks=[losses] if tracker is None else [tracker, losses],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(network(), optimizer=optimizer), DataLoader(data, 64, shuffle=True))
    return losses.losses


def row(values: list[list[float]]) -> str:
    """Mean and standard deviation over the seeds, for each column."""
    columns: list[Tensor] = list(torch.tensor(values).T)
    return "  ".join(f"{mean(c.tolist()):.4f} ± {stdev(c.tolist()):.4f}" for c in columns)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--root", default="data")
    parser.add_argument("--num-train", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--table", choices=["descent", "error", "both"], default="both")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-batches", type=int, default=4, help="batches of 64 that the curvature is measured on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data, network = dataset(arguments.data, arguments.root, arguments.num_train)
    steps = [arguments.steps // 4, arguments.steps // 2, arguments.steps]
    hessian = HessianConfig(num_batches=arguments.num_batches)
    if arguments.table != "error":
        print(f"Mean loss of {len(data)} samples of {arguments.data} after {steps} steps, {arguments.seeds} seeds")
        for optimizer_name, optimizer in OPTIMIZERS.items():
            for name, descent in DESCENTS.items():
                losses, moves = [], 0.0
                for seed in range(arguments.seeds):
                    own = None
                    if descent is not None:
                        own = NegativeCurvatureTracker(smallest=0, hessian=hessian, estimator="online", descent=descent)
                    losses.append(train(data, network, optimizer, steps, seed, own))
                    if own is not None:
                        moves += mean(bool(result.descent_step) for result in own.results) / arguments.seeds
                print(
                    f"  {optimizer_name:16s} {name:22s} {row(losses)}   moved at {moves:.0%} of the steps", flush=True
                )
    if arguments.table != "descent":
        print("Relative error of the running estimate against Lanczos at every tenth step from step 50 on, one seed")
        for optimizer_name, optimizer in OPTIMIZERS.items():
            for source in ("fixed", "batch"):
                own = NegativeCurvatureTracker(10, 1, hessian=replace(hessian, data=source), estimator="online")
                train(data, network, optimizer, steps, 0, own)
                compared = [result for result in own.results if result.online_error is not None][5:]
                error = median(result.online_error for result in compared)
                ratio = median(result.lambda_ratio for result in compared if result.lambda_ratio is not None)
                print(
                    f"  {optimizer_name:16s} {source:6s} data: median {error:.3f}, |lambda_min|/lambda_max {ratio:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
