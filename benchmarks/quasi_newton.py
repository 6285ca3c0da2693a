"""`QuasiNewtonLRController` beside tuned constant rates, tuned cosines to zero, Prodigy and Mechanic.

    pip install -e '.[bench]'
    python -m benchmarks.quasi_newton --root data

Seven problems, two losses where both make sense, three optimizers, three seeds, equal steps for every method. A
constant rate and a cosine are run at each rate of a grid of half-decades; Prodigy takes the optimizer's place, Mechanic
wraps it, each at a constant scale and at a cosine to zero. What is not yet in the results file is trained, one line of
JSON for each run, and the tables are printed; ``--report`` only prints them. ``--long`` trains three of the problems
for 2,000 steps, with one seed for the grids. ``--cost`` times the controller beside a constant rate in the same
Trainer, and checks that a constant rate gives the same losses there as in the plain loop of the other methods.

Needed in ROOT: CIFAR-10 in torchvision's layout, and the Penn Treebank's text in ``ptb/ptb.train.txt``.
"""

import argparse
import functools
import itertools
import json
import logging
import math
import multiprocessing
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import trainers
from examples.models import MLP, LeNet1, TinyResNet
from lyapunov_lightning import QuasiNewtonLRController

Samples = tuple[Tensor, Tensor]


@functools.cache
def cifar(root: str, classes: int) -> Samples:
    """The first 6,000 images of the first classes of CIFAR-10, normalised, with their labels."""
    from torchvision.datasets import CIFAR10

    data = CIFAR10(root, train=True)
    labels = torch.tensor(data.targets)
    chosen = (labels < classes).nonzero()[:6000, 0]
    images = torch.tensor(data.data[chosen.numpy()]).permute(0, 3, 1, 2).float()
    return (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True), labels[chosen]


@functools.cache
def digits(root: str) -> Samples:
    """Handwritten digits of 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


@functools.cache
def diabetes(root: str) -> Samples:
    """A regression with 10 features; features and targets are standardised."""
    from sklearn.datasets import load_diabetes

    inputs, targets = (torch.tensor(a, dtype=torch.float32) for a in load_diabetes(return_X_y=True))
    return (inputs - inputs.mean(0)) / inputs.std(0), (targets - targets.mean()) / targets.std()


@functools.cache
def characters(root: str) -> Samples:
    """Pieces of 32 characters of the Penn Treebank, each with the pieces shifted by one."""
    text = (Path(root) / "ptb" / "ptb.train.txt").read_text()
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([index[character] for character in text[: 32 * 12000 + 1]])
    return ids[:-1].view(-1, 32), ids[1:].view(-1, 32)


class CharacterTransformer(nn.Module):
    """Predicts the next character: two layers of width 48, a context of 32."""

    def __init__(self, vocabulary: int = 64, width: int = 48, context: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(context, width))
        layer = functools.partial(nn.TransformerEncoderLayer, width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.layers = nn.ModuleList([layer(norm_first=True) for _ in range(2)])
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, ids: Tensor) -> Tensor:
        """The logits after each character."""
        hidden = self.embedding(ids) + self.positions
        for layer in self.layers:
            hidden = layer(hidden, src_mask=self.mask)
        return self.head(hidden)


def digits_cnn() -> nn.Module:
    """Two convolutions with BatchNorm and dropout."""
    return nn.Sequential(
        *[nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU()],
        *[nn.Flatten(), nn.Dropout(0.3), nn.Linear(256, 10)],
    )


@dataclass(frozen=True)
class Problem:
    """Data, network, batch size, and the losses to train it with."""

    data: Callable[[str], Samples]
    network: Callable[[], nn.Module]
    batch_size: int
    losses: tuple[str, ...] = ("cross_entropy", "squared_error")


def ten_classes(root: str) -> Samples:
    """Ten-class CIFAR-10."""
    return cifar(root, 10)


PROBLEMS = {
    "linear": Problem(lambda root: cifar(root, 2), lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), 128),
    "MLP": Problem(ten_classes, lambda: MLP(3072, [100, 100]), 128),
    "LeNet1": Problem(ten_classes, LeNet1, 64),
    "tinyResNet": Problem(ten_classes, TinyResNet, 64),
    "digits CNN": Problem(digits, digits_cnn, 64),
    "diabetes": Problem(diabetes, lambda: MLP(10, [64], 1, activation="tanh"), 32, ("squared_error",)),
    "transformer": Problem(characters, CharacterTransformer, 32, ("cross_entropy",)),
}
LONG = (("digits CNN", "cross_entropy"), ("diabetes", "squared_error"), ("MLP", "cross_entropy"))
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {}),
}
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
GRID_SIZE = 6
LOWEST: dict[tuple[str, ...], float] = {
    **{("SGD",): 3e-3, ("momentum",): 1e-3, ("AdamW",): 3e-4},
    **{("linear", "cross_entropy", "SGD"): 3e-4, ("linear", "squared_error", "SGD"): 3e-5},
    **{("linear", "cross_entropy", "momentum"): 1e-4, ("linear", "squared_error", "momentum"): 3e-5},
    **{("linear", "cross_entropy", "AdamW"): 1e-4, ("diabetes", "squared_error", "AdamW"): 1e-3},
    **{("digits CNN", "cross_entropy", "momentum"): 3e-3, ("transformer", "cross_entropy", "momentum"): 3e-3},
}
"""Where the grid of an optimizer begins, and where it begins elsewhere for a problem."""
GRIDS = ("constant", "cosine")
OTHERS = ("prodigy", "prodigy_cosine", "mechanic", "mechanic_cosine")
CONTROLLERS: dict[str, dict[str, Any]] = {
    "controller": {"rule": "along_update"},
    "controller_every_step": {"rule": "along_update", "every_n_steps": 1},
    "inverse_sharpness": {"rule": "inverse_sharpness"},
}
METHODS = (*GRIDS, *OTHERS, *CONTROLLERS)
WINDOW = 40
"""The last steps, whose mean loss counts."""
OFFSET = 0.01
"""Added to both losses of a ratio."""


@dataclass(frozen=True)
class Run:
    """One training; `optimizer` is ``"prodigy"`` for Prodigy, and `rate` None where there is no grid."""

    problem: str
    loss: str
    optimizer: str
    method: str
    rate: float | None
    seed: int
    steps: int


@dataclass(frozen=True)
class Batches:
    """Batches without end, in an order that the seed fixes; none is smaller than the others."""

    samples: Samples
    size: int
    seed: int

    def __iter__(self) -> Iterator[Samples]:
        generator = torch.Generator().manual_seed(self.seed)
        inputs, targets = self.samples
        while True:
            order = torch.randperm(len(inputs), generator=generator)
            for chosen in order[: len(order) // self.size * self.size].split(self.size):
                yield inputs[chosen], targets[chosen]


def loss_of(outputs: Tensor, targets: Tensor, loss: str) -> Tensor:
    """Cross-entropy, mean squared error, or half the squared distance to one-hot labels."""
    if loss == "cross_entropy":
        return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())
    if targets.is_floating_point():
        return functional.mse_loss(outputs.squeeze(1), targets)
    return (outputs - functional.one_hot(targets, outputs.shape[1])).square().sum(dim=1).mean() / 2


class Learner(pl.LightningModule):
    """Trains the network of a run, and keeps the loss of every step."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        torch.manual_seed(run.seed)
        self.network = PROBLEMS[run.problem].network()
        self.run = run
        self.losses: list[float] = []

    def training_step(self, batch: Samples, batch_idx: int) -> Tensor:
        """The mean loss."""
        return loss_of(self.network(batch[0]), batch[1], self.run.loss)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the loss."""
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The one that the run asks for."""
        if self.run.optimizer == "prodigy":
            from prodigyopt import Prodigy

            return Prodigy(self.parameters(), lr=1.0)
        kind, options = OPTIMIZERS[self.run.optimizer]
        if self.run.method.startswith("mechanic"):
            from mechanic_pytorch import mechanize

            return mechanize(kind)(self.parameters(), lr=1.0, **options)
        return kind(self.parameters(), lr=self.run.rate or 1e-3, **options)


def in_loop(learner: Learner, batches: Iterable[Samples]) -> torch.optim.Optimizer:
    """Train in a plain loop, which ends where the loss is not finite; returns the optimizer."""
    optimizer, steps = learner.configure_optimizers(), learner.run.steps
    highest = optimizer.param_groups[0]["lr"]
    for step, batch in enumerate(itertools.islice(batches, steps)):
        if learner.run.method.endswith("cosine"):
            optimizer.param_groups[0]["lr"] = highest * (1 + math.cos(math.pi * step / steps)) / 2
        loss = learner.training_step(batch, step)
        learner.losses.append(loss.item())
        if not math.isfinite(learner.losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return optimizer


def in_trainer(learner: Learner, batches: Iterable[Samples], callbacks: list[pl.Callback]) -> torch.optim.Optimizer:
    """Train in a Trainer; returns the optimizer."""
    trainer = trainers.train(learner, batches, callbacks, learner.run.steps)
    return trainer.optimizers[0]


def train(run: Run, root: str) -> dict[str, Any]:
    """What is written down of a run."""
    problem = PROBLEMS[run.problem]
    batches = Batches(problem.data(root), problem.batch_size, run.seed)
    learner = Learner(run)
    started = time.perf_counter()
    if run.method in CONTROLLERS:
        optimizer = in_trainer(learner, batches, [QuasiNewtonLRController(**CONTROLLERS[run.method])])
    else:
        optimizer = in_loop(learner, batches)
    seconds = time.perf_counter() - started
    losses, group = learner.losses, optimizer.param_groups[0]
    last_rate = group["lr"] * group.get("d", 1.0)  # Prodigy's estimate
    state: dict[Any, Any] = optimizer.state
    if "_mechanic" in state:
        last_rate *= float(state["_mechanic"]["s"].sum())
    is_complete = len(losses) == run.steps
    return {
        **asdict(run),
        "final": _finite(np.mean(losses[-WINDOW:])) if is_complete else None,
        "first": _finite(np.mean(losses[:5])),
        "worst": _finite(np.max(losses)),
        "seconds": round(seconds, 3),
        "last_rate": _finite(last_rate),
    }


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def grid(problem: str, loss: str, optimizer: str) -> tuple[float, ...]:
    """The rates that are tried."""
    start = RATES.index(LOWEST.get((problem, loss, optimizer), LOWEST[optimizer,]))
    return RATES[start : start + GRID_SIZE]


def runs(cells: list[tuple[str, str]], args: argparse.Namespace) -> Iterator[Run]:
    """All that is asked for, one seed after the other."""
    for seed, method, (problem, loss) in itertools.product(range(args.seeds), args.methods, cells):
        if args.long and method in GRIDS and seed:
            continue
        for optimizer in ["prodigy"] if method.startswith("prodigy") else args.optimizers:
            if (method, optimizer) == ("inverse_sharpness", "AdamW"):
                continue  # refused: the largest eigenvalue says nothing of its steps
            for rate in grid(problem, loss, optimizer) if method in GRIDS else [None]:
                yield Run(problem, loss, optimizer, method, rate, seed, args.steps)


def report(results: list[dict[str, Any]]) -> None:
    """The tables, in Markdown."""
    print(
        f"A loss is the mean of the last {WINDOW} steps, then over the seeds. Ratios are to the best constant rate of "
        f"the same problem and optimizer, (loss + {OFFSET}) / (best + {OFFSET}): the {OFFSET} keeps losses near zero "
        "from dominating. Prodigy takes the optimizer's place, and is one and the same run for all three. A run has "
        "diverged that is not finite at its end, or ends above the mean of its first 5 losses. Geometric means are of "
        "the cells with a finite ratio. A rate marked * is at the edge of the grid."
    )
    for steps in sorted({result["steps"] for result in results}):
        _report_steps([result for result in results if result["steps"] == steps], steps)


def _report_steps(results: list[dict[str, Any]], steps: int) -> None:
    shown = METHODS[1:]
    cells: dict[tuple[str, ...], dict[tuple[str, float | None], list[dict[str, Any]]]]
    cells = defaultdict(lambda: defaultdict(list))
    for result in results:
        optimizers = list(OPTIMIZERS) if result["optimizer"] == "prodigy" else [result["optimizer"]]
        for optimizer in optimizers:
            cells[result["problem"], result["loss"], optimizer][result["method"], result["rate"]].append(result)
    ratios: dict[tuple[str, str], list[float]] = defaultdict(list)
    diverged: dict[tuple[str, str], list[bool]] = defaultdict(list)
    print(f"\n## {steps} steps\n\n| problem | loss | optimizer | best constant | {' | '.join(shown)} |")
    print("|---|---|---|---|" + "---|" * len(shown))
    for cell in sorted(cells, key=_order):
        means = {key: _mean([_final(result) for result in found]) for key, found in cells[cell].items()}
        best = _best(means, "constant")
        if best is None:
            continue
        columns = []
        for method in shown:
            chosen = _best(means, method)
            if chosen is None:
                columns.append("")
                continue
            ratio = (means[chosen] + OFFSET) / (means[best] + OFFSET)
            ratios[cell[2], method].append(ratio)
            diverged[cell[2], method] += [_has_diverged(result) for result in cells[cell][chosen]]
            columns.append(f"{ratio:.2f}" + (f" at {_rate(cell, chosen[1])}" if method in GRIDS else ""))
        print(f"| {' | '.join(cell)} | {means[best]:.4f} at {_rate(cell, best[1])} | {' | '.join(columns)} |")
    print("\n| optimizer | method | cells | within 1.2 | largest ratio | geometric mean | diverged runs |")
    print("|---|---|---|---|---|---|---|")
    for optimizer, method in itertools.product(OPTIMIZERS, shown):
        found = np.array(ratios[optimizer, method])
        if not len(found):
            continue
        mean = np.exp(np.log(found[np.isfinite(found)]).mean()) if np.isfinite(found).any() else math.inf
        runs_diverged = diverged[optimizer, method]
        print(
            f"| {optimizer} | {method} | {len(found)} | {(found <= 1.2).mean():.0%} | {found.max():.2f} | {mean:.3f} | "
            f"{sum(runs_diverged)} of {len(runs_diverged)} |"
        )


def _order(cell: tuple[str, ...]) -> tuple[int, str, int]:
    return list(PROBLEMS).index(cell[0]), cell[1], list(OPTIMIZERS).index(cell[2])


def _best(means: dict[tuple[str, float | None], float], method: str) -> tuple[str, float | None] | None:
    """The rate of a method with the lowest loss, if the method was run."""
    return min((key for key in means if key[0] == method), key=means.__getitem__, default=None)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _final(result: dict[str, Any]) -> float:
    return math.inf if result["final"] is None else result["final"]


def _has_diverged(result: dict[str, Any]) -> bool:
    return _final(result) > (math.inf if result["first"] is None else result["first"]) or result["final"] is None


def _rate(cell: tuple[str, ...], rate: float | None) -> str:
    rates = grid(*cell)
    return f"{rate:g}{'*' if rate in (rates[0], rates[-1]) else ''}"


def report_cost(root: str, steps: int, repeats: int) -> None:
    """The time of the controller relative to a constant rate, with momentum."""
    rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    methods = ["constant", *CONTROLLERS]
    print(
        f"Training time with momentum, {steps} steps, median of {repeats} interleaved repeats; the controllers relative"
    )
    print(f"to a constant rate.\n\n| problem | {' | '.join(methods)} |\n|---|{'---|' * len(methods)}")
    for name in ("MLP", "LeNet1", "transformer"):
        problem = PROBLEMS[name]
        batches = Batches(problem.data(root), problem.batch_size, 0)
        plain = Learner(Run(name, "cross_entropy", "momentum", "constant", 1e-3, 0, steps))
        in_loop(plain, batches)
        for _, method in itertools.product(range(repeats), methods):
            learner = Learner(plain.run)
            callbacks = [QuasiNewtonLRController(**CONTROLLERS[method])] if method in CONTROLLERS else []
            started = time.perf_counter()
            in_trainer(learner, batches, [*callbacks])
            rows[name][method].append(time.perf_counter() - started)
            if not callbacks and learner.losses != plain.losses:
                raise AssertionError(f"{name}: the losses in the Trainer are not those of the plain loop.")
        base = np.array(rows[name]["constant"])
        cells = [f"{np.median(np.array(rows[name][method]) / base):.2f}" for method in CONTROLLERS]
        print(f"| {name} | {np.median(base):.2f} s | {' | '.join(cells)} |", flush=True)


def quiet() -> None:
    """One thread, no warnings and no messages of Lightning."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder that holds cifar-10-batches-py and ptb")
    parser.add_argument("--results", type=Path, default=Path("logs/quasi_newton.jsonl"), help="one line for each run")
    parser.add_argument("--steps", type=int, help="250, or 2000 with --long")
    parser.add_argument("--seeds", type=int, default=3, help="one for the grids with --long")
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--long", action="store_true", help="2,000 steps on three of the problems")
    parser.add_argument("--processes", type=int, default=1, help="how many runs at once")
    parser.add_argument("--report", action="store_true", help="print the tables of the results file, and train nothing")
    parser.add_argument("--cost", action="store_true", help="time the controller, and do nothing else")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of --cost")
    args = parser.parse_args(arguments)
    args.steps = args.steps or (2000 if args.long else 250)
    quiet()
    if args.cost:
        report_cost(args.root, args.steps, args.repeats)
        return
    cells = [(name, loss) for name in args.problems for loss in PROBLEMS[name].losses]
    cells = [cell for cell in cells if not args.long or cell in LONG]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    results = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    done = {Run(**{field.name: result[field.name] for field in fields(Run)}) for result in results}
    missing = [] if args.report else [run for run in runs(cells, args) if run not in done]
    with multiprocessing.get_context("spawn").Pool(args.processes, quiet) as pool, args.results.open("a") as file:
        for result in pool.imap_unordered(functools.partial(train, root=args.root), missing):
            results.append(result)
            print(json.dumps(result), file=file, flush=True)
    report(results)


if __name__ == "__main__":
    main()
