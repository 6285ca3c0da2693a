"""`QuasiNewtonLRController` in random small trainings: does it ever lose one?

    pip install -e '.[bench]'
    python -m benchmarks.controller_stress --runs 500

Each seed draws network, data, loss, optimizer, batch size, start rate, interval, rule and length, at times with
gradient clipping, accumulated gradients, `NudgedSGDHook` or the descent of `NegativeCurvatureTracker` beside. Counted
is a run that

- raises (``error``),
- has parameters or buffers that are not finite at its end (``parameters``),
- has a training loss that is not finite anywhere (``loss``),
- has a mean of its last 10 losses above 1.5 times that of its first 5 (``rise``), which small batches make noisy,
- or has a loss on all the data above 1.5 times the one before the training (``whole``), which also sees a run that
  was lost within its first steps.

Every run is one line of JSON; ``--only SEED`` repeats one and prints its losses. The exit status is 1 if anything was
counted.
"""

import argparse
import copy
import functools
import json
import math
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.quasi_newton import Samples, loss_of, quiet
from lyapunov_lightning import (
    Descent,
    HessianConfig,
    NegativeCurvatureTracker,
    NudgedSGDHook,
    QuasiNewtonLRController,
    Schedule,
)

VERDICTS = ("error", "parameters", "loss", "rise", "whole")
OPTIMIZERS = {
    **dict.fromkeys(("SGD", "momentum", "nesterov"), torch.optim.SGD),
    **{"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW, "RMSprop": torch.optim.RMSprop},
}
REGRESSIONS = ("diabetes", "synthetic")
IMAGES = ("digits", "random labels")
Norms = dict[str | None, Callable[[int], nn.Module]]


def draw(seed: int) -> dict[str, Any]:
    """The training that belongs to a seed."""
    chance = random.Random(seed)

    def log_uniform(low: float, high: float) -> float:
        return float(f"{math.exp(chance.uniform(math.log(low), math.log(high))):.3g}")

    data = chance.choice([*IMAGES, *REGRESSIONS, "wine", "breast cancer"])
    optimizer = chance.choice(list(OPTIMIZERS))
    drawn: dict[str, Any] = {
        "data": data,
        "loss": chance.choice(["squared_error"] if data in REGRESSIONS else ["cross_entropy", "squared_error"]),
        "network": chance.choice(["MLP", "MLP", "conv"] if data in IMAGES else ["MLP"]),
        "widths": [int(log_uniform(4, 128)) for _ in range(chance.randint(1, 4))],
        "activation": chance.choice(["ReLU", "Tanh", "GELU"]),
        "norm": chance.choice([None, None, "BatchNorm", "LayerNorm"]),
        "dropout": chance.choice([0.0, 0.0, 0.1, 0.3, 0.5]),
        "optimizer": optimizer,
        "momentum": round(1 - log_uniform(0.01, 0.5), 4) if optimizer in ("momentum", "nesterov") else 0.0,
        "weight_decay": chance.choice([0.0, log_uniform(1e-5, 0.1)]),
        "groups": chance.choice([None, None, None, log_uniform(0.1, 10)]),  # the biases' rate over that of the weights
        "batch_size": int(log_uniform(4, 129)),
        "start_rate": log_uniform(1e-6, 10),
        "interval": chance.choice([None, *[int(log_uniform(1, 51)) for _ in range(3)]]),
        "rule": chance.choice(["default", "inverse_sharpness"]),
        "steps": chance.randint(60, 300),
        "clip": chance.choice([None, None, None, log_uniform(0.1, 10)]),
        "accumulate": chance.choice([1, 1, 1, 2]),
        "descent": chance.random() < 0.15,
        "nudge": chance.random() < 0.3,
    }
    if OPTIMIZERS[optimizer] is not torch.optim.SGD:
        drawn["rule"] = "default"  # the other one is refused
    drawn["nudge"] &= optimizer in ("SGD", "momentum") and drawn["groups"] is None
    return {"seed": seed, **drawn}


def samples(name: str, seed: int) -> Samples:
    """Inputs and targets, standardised."""
    from sklearn import datasets

    generator = torch.Generator().manual_seed(seed)
    if name == "synthetic":
        inputs = torch.randn(1000, 20, generator=generator)
        noise = torch.rand(1, generator=generator) * torch.randn(1000, generator=generator)
        return inputs, torch.sin(inputs @ torch.randn(20, generator=generator)) + noise
    loader = {"breast cancer": "load_breast_cancer", "random labels": "load_digits"}.get(name, f"load_{name}")
    arrays = getattr(datasets, loader)(return_X_y=True)
    inputs, targets = torch.tensor(arrays[0], dtype=torch.float32), torch.tensor(arrays[1])
    if name in IMAGES:
        order = torch.randperm(len(targets), generator=generator) if name == "random labels" else slice(None)
        return inputs.view(-1, 1, 8, 8) / 16, targets[order]
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    return inputs, (targets - targets.mean()).float() / targets.std() if name == "diabetes" else targets


def network_of(drawn: dict[str, Any], data: Samples) -> nn.Module:
    """The drawn network for the data."""
    inputs, targets = data
    outputs = 1 if targets.is_floating_point() else int(targets.max()) + 1
    activation = {"ReLU": nn.ReLU, "Tanh": nn.Tanh, "GELU": nn.GELU}[drawn["activation"]]
    layers: list[nn.Module] = []
    if drawn["network"] == "conv":
        norms: Norms = {None: nn.Identity, "BatchNorm": nn.BatchNorm2d, "LayerNorm": functools.partial(nn.GroupNorm, 1)}
        layers += [
            nn.Conv2d(1, 8, 3),
            norms[drawn["norm"]](8),
            activation(),
            nn.Conv2d(8, 8, 3, stride=2),
            activation(),
        ]
        layers += [nn.Flatten(), nn.Dropout(drawn["dropout"]), nn.Linear(32, outputs)]
        return nn.Sequential(*layers)
    norms = {None: nn.Identity, "BatchNorm": nn.BatchNorm1d, "LayerNorm": nn.LayerNorm}
    width = inputs[0].numel()
    for hidden in drawn["widths"]:
        layers += [nn.Linear(width, hidden), norms[drawn["norm"]](hidden), activation(), nn.Dropout(drawn["dropout"])]
        width = hidden
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, outputs))


class Learner(pl.LightningModule):
    """Trains the drawn network, and keeps the loss of every batch."""

    def __init__(self, drawn: dict[str, Any], data: Samples) -> None:
        super().__init__()
        self.network = network_of(drawn, data)
        self.drawn = drawn
        self.losses: list[float] = []

    def training_step(self, batch: Samples, batch_idx: int) -> Tensor:
        """The mean loss."""
        return loss_of(self.network(batch[0]), batch[1], self.drawn["loss"])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the loss, which Lightning has divided for the accumulation."""
        self.losses.append(float(outputs["loss"]) * self.drawn["accumulate"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The drawn one, with the biases and norms in a group of their own if there are two."""
        drawn = self.drawn
        options: dict[str, Any] = {"lr": drawn["start_rate"], "weight_decay": drawn["weight_decay"]}
        if drawn["momentum"]:
            options |= {"momentum": drawn["momentum"], "nesterov": drawn["optimizer"] == "nesterov"}
        groups: list[dict[str, Any]] = [{"params": list(self.parameters())}]
        if drawn["groups"] is not None:
            groups = [{"params": [p for p in self.parameters() if p.dim() > 1]}]
            groups += [{"params": [p for p in self.parameters() if p.dim() == 1]}]
            groups[1]["lr"] = drawn["start_rate"] * drawn["groups"]
        return OPTIMIZERS[drawn["optimizer"]](groups, **options)

    @torch.no_grad()
    def whole(self, data: Samples) -> float:
        """The loss on all the data as one batch, without dropout."""
        network = copy.deepcopy(self.network).train()
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        return float(loss_of(network(data[0]), data[1], self.drawn["loss"]))


def callbacks_of(drawn: dict[str, Any]) -> list[pl.Callback]:
    """The controller, and what is drawn beside it."""
    rule: dict[str, Any] = {} if drawn["rule"] == "default" else {"rule": drawn["rule"]}
    callbacks: list[pl.Callback] = [QuasiNewtonLRController(drawn["interval"], **rule)]
    schedule, hessian = Schedule(every_n_steps=40), HessianConfig(num_batches=2)
    if drawn["nudge"]:
        callbacks.append(NudgedSGDHook(k=3, gamma=0.1, schedule=schedule, hessian=hessian))
    if drawn["descent"]:
        callbacks.append(
            NegativeCurvatureTracker(smallest=2, schedule=schedule, hessian=hessian, descent=Descent()),
        )
    return callbacks


def train(seed: int, keep_losses: bool = False) -> dict[str, Any]:
    """Train once; what was drawn and what came of it."""
    drawn = draw(seed)
    data = samples(drawn["data"], seed)
    torch.manual_seed(seed)
    learner = Learner(drawn, data)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        TensorDataset(*data), drawn["batch_size"], shuffle=True, drop_last=True, num_workers=0, generator=generator
    )
    before, started, error = learner.whole(data), time.perf_counter(), None
    try:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=drawn["steps"],
            callbacks=callbacks_of(drawn),
            gradient_clip_val=drawn["clip"],
            accumulate_grad_batches=drawn["accumulate"],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(learner, loader)
    except Exception as exception:  # whatever it is, it is what the script looks for
        error = f"{type(exception).__name__}: {exception}"
    seconds = time.perf_counter() - started
    losses = np.array(learner.losses or [math.nan])
    first, final, after = losses[:5].mean(), losses[-10:].mean(), learner.whole(data)
    tensors = [tensor for tensor in learner.state_dict().values() if tensor.is_floating_point()]
    found = {
        "error": error is not None,
        "parameters": not all(bool(tensor.isfinite().all()) for tensor in tensors),
        "loss": bool(learner.losses) and not np.isfinite(losses).all(),
        "rise": bool(learner.losses) and not final <= 1.5 * first,
        "whole": not after <= 1.5 * before,
    }
    numbers = {"before": before, "after": after, "first": first, "final": final, "worst": losses.max()}
    return {
        **drawn,
        "counted": [verdict for verdict in VERDICTS if found[verdict]],
        **{name: _finite(value) for name, value in numbers.items()},
        "seconds": round(seconds, 2),
        "message": error,
        **({"losses": [_finite(loss) for loss in losses]} if keep_losses else {}),
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def summarise(results: list[dict[str, Any]]) -> None:
    """How many runs were counted, and which."""
    counted = [result for result in results if result["counted"]]
    print(f"\n{len(counted)} of {len(results)} runs were counted.\n\n| rule | runs | {' | '.join(VERDICTS)} |")
    print("|---|---|" + "---|" * len(VERDICTS))
    for rule in sorted({result["rule"] for result in results}):
        found = [result for result in results if result["rule"] == rule]
        counts = Counter(verdict for result in found for verdict in result["counted"])
        print(f"| {rule} | {len(found)} | {' | '.join(str(counts[verdict]) for verdict in VERDICTS)} |")
    if counted:
        print("\nSeeds:", *sorted(result["seed"] for result in counted))


def main(arguments: list[str] | None = None) -> int:
    """Train, print what was counted, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", type=int, metavar="SEED", help="repeat one run, and print its losses")
    parser.add_argument("--processes", type=int, default=1, help="how many runs at once")
    parser.add_argument("--results", type=Path, default=Path("logs/controller_stress.jsonl"), help="written anew")
    args = parser.parse_args(arguments)
    quiet()
    if args.only is not None:
        result = train(args.only, keep_losses=True)
        losses = result.pop("losses")
        print(json.dumps(result))
        print(*(f"{index:5d} {math.nan if loss is None else loss:.5g}" for index, loss in enumerate(losses)), sep="\n")
        return int(bool(result["counted"]))
    args.results.parent.mkdir(parents=True, exist_ok=True)
    results = []
    seeds = range(args.first, args.first + args.runs)
    with multiprocessing.get_context("spawn").Pool(args.processes, quiet) as pool, args.results.open("w") as file:
        for result in pool.imap_unordered(train, seeds):
            results.append(result)
            print(json.dumps(result), file=file, flush=True)
            if result["counted"]:
                print(json.dumps(result), flush=True)
    summarise(results)
    return int(any(result["counted"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
