"""What a callback adds to a training of a few hundred steps, in CPU time, on four networks.

    python -m benchmarks.probe_cost --root data                      # `CurvatureProbe()` as it comes, 400 steps
    python -m benchmarks.probe_cost --with 'every 10' --steps 100    # or another one of the list
    python -m benchmarks.probe_cost --parts                          # and what the parts of it take, in training steps

Runs without and with the callback follow each other, in one thread, from the same parameters, with a TensorBoard
logger. Everything is in it, the cold first search and the figure at the end too. CIFAR-10 below --root, else noise.
"""

import argparse
import logging
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torchvision
from torch import Tensor

from benchmarks.problems import SmallTransformer, images
from benchmarks.timing import Sample
from benchmarks.training_cost import train
from examples.models import MLP, Classifier, LeNet
from lyapunov_lightning import CurvatureProbe, QuasiNewtonLRController, Schedule, SpectrumTracker
from lyapunov_lightning.callbacks.estimators.eigenvalues import Eigenvalues
from lyapunov_lightning.callbacks.gauges import SharpnessGauge

WAYS: dict[str, Callable[[], pl.Callback]] = {
    "as it comes": lambda: CurvatureProbe(),
    "every 10": lambda: CurvatureProbe(10),
    "every 10, lyapunov": lambda: CurvatureProbe(10, "lyapunov"),
    "every step, lyapunov": lambda: CurvatureProbe(1, "lyapunov"),
    "tracker, every epoch": lambda: SpectrumTracker(schedule=Schedule(every_n_epochs=1)),
    "controller": lambda: QuasiNewtonLRController(),
}
PARTS = {
    "eigenvalue": (Eigenvalues, "measure"),
    "batch sharpness by products": (SharpnessGauge, "measure"),
    "batch sharpness by losses": (SharpnessGauge, "glance"),
    "figure and words": (CurvatureProbe, "conclude"),
}


class LanguageModel(pl.LightningModule):
    """A small transformer on random words, by AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.network = SmallTransformer()

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """The loss of the next words."""
        words = batch[0]
        loss = torch.nn.functional.cross_entropy(self.network(words[:, :-1]), words[:, 1:])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As transformers are trained."""
        return torch.optim.AdamW(self.parameters(), 1e-3)


def classifier(make: Callable[[], torch.nn.Module]) -> Callable[[], pl.LightningModule]:
    """Makes a classifier by SGD with momentum."""
    return lambda: Classifier(make(), optimizer=lambda parameters: torch.optim.SGD(parameters, 0.02, momentum=0.9))


NETWORKS: dict[str, tuple[Callable[[], pl.LightningModule], int]] = {
    "LeNet, batch 128": (classifier(LeNet), 128),
    "MLP, batch 128": (classifier(lambda: MLP(3072, [200, 200, 200])), 128),
    "transformer, AdamW, batch 16": (LanguageModel, 16),
    "ResNet-18, batch 32": (classifier(lambda: torchvision.models.resnet18(num_classes=10)), 32),
}


def seconds_of(name: str, data: dict[str, tuple[Tensor, ...]], steps: int, callbacks: list[pl.Callback]) -> float:
    """CPU time of one training."""
    make, batch_size = NETWORKS[name]
    torch.manual_seed(0)
    module = make()
    samples = data["words" if make is LanguageModel else "images"]
    began = time.process_time()
    train(module, samples, batch_size, steps, callbacks)
    return time.process_time() - began


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
    parser.add_argument("--with", dest="way", choices=list(WAYS), default="as it comes")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", action="store_true", help="what the parts of it take")
    parser.add_argument("--root", default="data", help="folder of CIFAR-10; nothing is downloaded")
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    words = torch.randint(200, (4000, 65), generator=torch.Generator().manual_seed(0))
    data = {"images": images(args.root, 10_000), "words": (words,)}
    spent = take_apart() if args.parts else {}
    for name in args.networks:
        seconds_of(name, data, 2, [])
        seconds_of(name, data, 2, [WAYS[args.way]()])  # what libraries set up at the first call
        spent.clear()
        plain: list[float] = []
        ratios: list[float] = []
        for _ in range(args.repeats):
            plain.append(seconds_of(name, data, args.steps, []))
            ratios.append(seconds_of(name, data, args.steps, [WAYS[args.way]()]) / plain[-1])
        sample = Sample(tuple(ratios))
        low, high = sample.quartiles
        step = 1e3 * sum(plain) / len(plain) / args.steps
        print(f"{name}: {sample.median:.2f} ({low:.2f} to {high:.2f}) times the {step:.0f} ms of a step", flush=True)
        for part, seconds in spent.items():
            print(f"    {part}: {seconds / sum(plain) * args.steps:.1f} steps of {args.steps}")


if __name__ == "__main__":
    main()
