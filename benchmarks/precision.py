"""How right the outermost eigenvalues are in each precision and by each kind of product, and what a product takes.

    python -m benchmarks.precision              # printed, in some minutes
    python -m benchmarks.precision --write      # into docs/benchmarks/precision.md

A Trainer of each precision trains each network, and the Hessian of its first step is measured as the callbacks do it.
The reference is the Hessian in float64 of the very same weights and inputs, as they are after the Trainer has rounded
them.
"""

import argparse
import copy
import logging
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.problems import Problem, drawn, images, train
from benchmarks.transformers import gpt2_like, llama_like
from examples.models import MLP, LeNet
from lyapunov_lightning.curvature import CurvatureWarning, HessianOperator, MeasurementError, lanczos
from lyapunov_lightning.training.replica.objective import ProbeBatch, TrainingObjective

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "precision.md"
METHODS = ("double_backward", "forward_over_reverse", "finite_difference")
PRECISIONS = ("64-true", "32-true", "bf16-mixed", "16-mixed", "bf16-mixed, autocast", "16-mixed, autocast", "bf16-true")
TOL, MAX_MATVECS = 1e-2, 60
REPEATS = 15


class Measured(pl.LightningModule):
    """Trains a network of a problem.

    Args:
        problem: The network and its loss.

    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.network, self.criterion = problem.network, problem.criterion

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of the network's scores."""
        return self.criterion(self.network(batch[0]).float() if self._is_narrow else self.network(batch[0]), batch[1])

    @property
    def _is_narrow(self) -> bool:
        return self.dtype not in (torch.float32, torch.float64)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """No optimizer that matters: the step is only measured."""
        return torch.optim.SGD(self.parameters(), lr=0.0)


class MeasuredInAutocast(Measured):
    """Is measured in the half precision that it is trained in, as its own loss asks for.

    Args:
        problem: The network and its loss.
        dtype: Half precision.

    """

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        super().__init__(problem)
        self.narrow = dtype

    def curvature_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of the step, rounded as in training."""
        with torch.autocast("cpu", self.narrow, cache_enabled=False):
            return self.training_step(batch, 0)


class Measuring(Callback):
    """Measures by all methods, in the first step.

    Attributes:
        found: For each method the relative errors of the largest and of the smallest eigenvalue, and the seconds that a
            product takes; or why there is none.

    """

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float, float] | str] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure."""
        network = copy.deepcopy(pl_module.network).double()
        exact = Problem("", network, [tuple(t.double() if t.is_floating_point() else t for t in batch)])
        expected = lanczos(exact.operator(), largest=1, smallest=1, tol=1e-4, max_matvecs=300).values
        for method in METHODS:
            objective = TrainingObjective(trainer, pl_module)
            operator = HessianOperator(objective, objective.parameters, [ProbeBatch(batch, 0, True)], method=method)
            try:
                pairs = lanczos(operator, largest=1, smallest=1, tol=TOL, max_matvecs=MAX_MATVECS)
            except MeasurementError as error:
                self.found[method] = "refused" if "half" in str(error) else "none"
                continue
            largest, smallest = ((pairs.values - expected).abs() / expected.abs()).tolist()
            self.found[method] = largest, smallest, seconds(operator)


def seconds(operator: HessianOperator) -> float:
    """What a product takes at best, once there is a graph."""
    vector = torch.ones(operator.size, dtype=operator.dtype)
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        operator.matvec(vector)
        taken.append(time.perf_counter() - start)
    return min(taken)


def problems(root: str | None) -> Iterator[Problem]:
    """The networks: two with kinks, trained a little, and two sharp transformers."""
    for name, build in (("MLP, ReLU", partial(MLP, 3072, [16, 16])), ("LeNet, ReLU", LeNet)):
        torch.manual_seed(0)
        data = images(root, 256)
        problem = Problem(name, build(), [(data[0][:64], data[1][:64])])
        train(problem, drawn(data, 64), 30, torch.optim.SGD(problem.parameters, lr=0.02))
        yield problem
    yield gpt2_like()
    yield llama_like()


def measured(problem: Problem, precision: str) -> dict[str, tuple[float, float, float] | str]:
    """What is found in one precision."""
    kind, *_ = precision.split(",")
    problem = copy.deepcopy(problem)
    dtype = torch.float16 if kind == "16-mixed" else torch.bfloat16
    module = MeasuredInAutocast(problem, dtype) if "autocast" in precision else Measured(problem)
    # Lightning takes bfloat16 for float16 on the CPU unless it is given the plugin.
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")) if kind == "16-mixed" else None
    measuring = Measuring()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        precision=None if plugin else kind,
        plugins=plugin,
        callbacks=[measuring],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(problem.batches, batch_size=None))
    return measuring.found


def table(root: str | None) -> Iterator[str]:
    """The lines of both tables in Markdown."""
    results = {(p.name, p.size, kind): measured(p, kind) for p in problems(root) for kind in PRECISIONS}
    names = ("double backward", "forward over reverse", "finite differences")
    yield "| network | precision | " + " | ".join(names) + " |"
    yield "|---|---|" + "---|" * len(METHODS)
    for (name, size, kind), found in results.items():
        yield f"| {name} ({size:,}) | {kind} | " + " | ".join(map(_errors, map(found.get, METHODS))) + " |"
    yield ""
    yield "| network | precision | " + " | ".join(f"{name}, ms" for name in names) + " |"
    yield "|---|---|" + "--:|" * len(METHODS)
    for (name, size, kind), found in results.items():
        if kind in ("32-true", "bf16-mixed", "bf16-mixed, autocast", "16-mixed, autocast"):
            yield f"| {name} ({size:,}) | {kind} | " + " | ".join(map(_time, map(found.get, METHODS))) + " |"


def _errors(found: tuple[float, float, float] | str | None) -> str:
    if not isinstance(found, tuple):
        return str(found)
    return " / ".join(f"{error:.0e}" if error < 0.095 else f"{error:.0%}" for error in found[:2])


def _time(found: tuple[float, float, float] | str | None) -> str:
    return f"{1e3 * found[2]:.1f}" if isinstance(found, tuple) else str(found)


HEAD = f"""\
# How right it is in each precision

Written by `python -m benchmarks.precision --write`.

The relative errors of λ_max and of λ_min, found by Lanczos to a relative residual of {TOL:g} or in {MAX_MATVECS}
products at most, against float64 of the same weights. **bf16-mixed** and **16-mixed** are what the callbacks measure:
the weights are in float32 there, and the loss is computed in it. **autocast** are the same trainings with a
`curvature_loss` that enters autocast itself, to be measured in the half precision that is trained in. In **bf16-true**
the weights are in half precision, and the reference has the rounded ones. "refused" is a `MeasurementError`:
differences of gradients are lost in the rounding of half precision. "none" is a loss that the method cannot
differentiate.
"""


def main() -> None:
    """Print the tables, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of CIFAR-10; random images without it")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", CurvatureWarning)
    lines = table(arguments.root)
    about = f"torch {torch.__version__.split('+')[0]}, Lightning {pl.__version__}, CPU, one thread."
    if not arguments.write:
        print("\n".join(lines))
        return
    errors, times = "\n".join(lines).split("\n\n")
    PAGE.write_text("\n".join([HEAD, about, "", errors, "", READING, "", times, ""]))


READING = """\
In autocast the rounding of the activations is a staircase that no derivative sees: exact products are those of a loss
nearby, rounded at every layer. On networks that are easy that is an error of less than a per cent, on sharp
transformers one of ten and more. Measured in float32 the same weights have none of it, for about the same time.

Kinks, those of ReLU, are seen by finite differences only, which smooth the curvature over their step. In float64 the
step is so short that it meets next to none of them; in float32 it cannot be, and of a network early in training even
λ_max is then far too large.

## What a product takes

In milliseconds, the best of 15, with the graph of the gradient kept where there is one."""


if __name__ == "__main__":
    main()
