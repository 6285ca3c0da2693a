"""Other people's LightningModules, trained without and with the four reading callbacks: is the run the same?

    make wild

Each module is trained twice from one seed. Compared, bit by bit: parameters, buffers, gradients, the states of the
optimizers, what the module logged, the progress, and the attributes of every module inside it; at each step also the
batch, the generators, the gradients, and those attributes. The exit status is 1 if a run was changed, died, or
measured a value that is not finite.
"""

import argparse
import dataclasses
import hashlib
import importlib
import importlib.metadata
import logging
import math
import os
import sys
import tempfile
import time
import warnings
from typing import Any

import lightning.pytorch
import pytorch_lightning
import torch

from benchmarks.wild.modules import WILD_MODULES, WildModule
from lyapunov_lightning import (
    CurvatureProbe,
    HessianConfig,
    LossAlongEigvecScanner,
    NegativeCurvatureTracker,
    SpectrumTracker,
)
from lyapunov_lightning.curvature.errors import CurvatureWarning
from tests.callbacks import identity
from tests.modules import MemoryLogger

HEADER = (
    "| module | package | parameters | identical | λ_max, first | last | converged | warnings |\n" + "|---" * 8 + "|"
)


def reading_callbacks() -> list[Any]:
    """The four of them, so often that a run of 24 steps meets each of them three to six times."""
    two_batches = HessianConfig(num_batches=2)
    return [
        CurvatureProbe(4, end="both"),
        SpectrumTracker(8, largest=3, smallest=1, hessian=two_batches),
        NegativeCurvatureTracker(8, hessian=two_batches),
        LossAlongEigvecScanner(8, hessian=two_batches),
    ]


class Witness(lightning.pytorch.Callback, pytorch_lightning.Callback):
    """The last callback, which notes what the run is about to do."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note what the step will find."""
        found = {
            "batch": _without_slots(batch),
            "generators": identity._generators(),
            "module": module_state(pl_module),
        }
        self.steps.append({name: digest(identity._plain(value)) for name, value in found.items()})

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Note the gradients, before they are clipped."""
        gradients = {name: parameter.grad for name, parameter in pl_module.named_parameters()}
        self.steps.append({"gradients": digest(identity._plain(gradients))})


@dataclasses.dataclass
class Run:
    """A run, in what must not depend on the callbacks, and in what they measured."""

    state: dict[str, Any]
    measured: list[dict[str, float]]
    warned: list[str]
    parameters: int

    def curve(self, tag: str) -> list[float]:
        """The values of one tag."""
        return [metrics[tag] for metrics in self.measured if tag in metrics]

    def converged(self) -> float:
        """The share of what was asked for that converged, as the callbacks say."""
        shares = [value for metrics in self.measured for tag, value in metrics.items() if tag.endswith("/converged")]
        return sum(shares) / len(shares) if shares else math.nan

    def not_finite(self) -> list[str]:
        """The tags with a value that is not finite."""
        return sorted({tag for step in self.measured for tag, value in step.items() if not math.isfinite(value)})


def _without_slots(value: Any) -> Any:
    """A batch with the objects that have slots in place of a `__dict__` (graphs, often) turned into dictionaries."""
    if isinstance(value, (list, tuple)):
        return [_without_slots(inner) for inner in value]
    if dataclasses.is_dataclass(value) and not hasattr(value, "__dict__"):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    return value


def digest(value: Any) -> str:
    """A short name for a value, equal for equal values."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


def module_state(module: Any) -> dict[str, Any]:
    """Parameters, buffers and attributes of a module and of all those inside it."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    attributes = {name: identity._attributes(inner) for name, inner in module.named_modules()}
    for noted in attributes.values():
        noted.pop("_metric_attributes", None)  # Lightning's own, by the addresses of the metrics
    return {"tensors": identity._plain(tensors), "attributes": attributes}


def train(wild: WildModule, steps: int, callbacks: list[Any]) -> Run:
    """Train a fresh module from a fixed seed, with the trainer of the library that its package imports."""
    library = importlib.import_module(wild.library)
    lightning.pytorch.seed_everything(7, verbose=False)
    module, data = wild.build()
    witness, logger = Witness(), MemoryLogger()
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = library.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            max_epochs=steps,
            gradient_clip_val=1.0,
            log_every_n_steps=3,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=logger,
            callbacks=[*callbacks, witness],
            default_root_dir=root,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        if isinstance(data, (lightning.pytorch.LightningDataModule, pytorch_lightning.LightningDataModule)):
            trainer.fit(module, datamodule=data)
        else:
            trainer.fit(module, data)
    state = {
        **module_state(module),
        "gradients": identity._plain({name: parameter.grad for name, parameter in module.named_parameters()}),
        "optimizers": identity._plain([optimizer.state_dict() for optimizer in trainer.optimizers]),
        "logged": identity._plain([(step, identity._select(metrics, own=False)) for step, metrics in logger.history]),
        "callback_metrics": identity._plain(identity._select(trainer.callback_metrics, own=False)),
        "generators": identity._generators(),
        "progress": [trainer.global_step, trainer.current_epoch, trainer.should_stop],
        "steps": witness.steps,
    }
    state["logged"] = [entry for entry in state["logged"] if entry[1]]
    return Run(
        state=state,
        measured=[identity._select(metrics, own=True) for _, metrics in logger.history],
        warned=[str(warning.message) for warning in caught if issubclass(warning.category, CurvatureWarning)],
        parameters=sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad),
    )


def compare(wild: WildModule, steps: int) -> tuple[str, list[str], bool]:
    """A row of the table, what is to be said about it, and whether all is well."""
    package = f"{wild.package} {importlib.metadata.version(wild.package)}"
    without = train(wild, steps, [])
    start = f"| {wild.name} | {package}{', pytorch_lightning' if 'pytorch_' in wild.library else ''} |"
    start += f" {without.parameters:,} |"
    try:
        run = train(wild, steps, reading_callbacks())
    except Exception as error:  # whatever it is, it is a row of the table, and the other modules are to be seen too
        return f"{start} died | | | | |", [f"{type(error).__name__}: {error}"], False
    differences: list[str] = []
    for kind, expected in without.state.items():
        identity._compare(kind, expected, run.state[kind], differences)
    sharpness, not_finite = run.curve("curvature/lambda_max"), run.not_finite()
    first, last = (f"{sharpness[at]:.3g}" if sharpness else "none" for at in (0, -1))
    row = f"{start} {'no' if differences else 'yes'} | {first} | {last} | {run.converged():.0%} | {len(run.warned)} |"
    notes = [f"differs: {difference}" for difference in differences[:3]]
    notes += [f"not finite: {tag}" for tag in not_finite] + [f"warned: {message}" for message in run.warned]
    return row, notes, not differences and not not_finite and bool(sharpness)


def main() -> None:
    """Print the table, and below it what there is to say about each module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of each run")
    parser.add_argument("--only", default="", help="only modules whose name or package holds this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for library in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(library).setLevel(logging.ERROR)
    print(
        f"torch {torch.__version__}, lightning {lightning.__version__}, {arguments.steps} steps\n\n{HEADER}", flush=True
    )
    notes, well = [], True
    for wild in WILD_MODULES:
        if arguments.only.lower() in f"{wild.name} {wild.package}".lower():
            started = time.perf_counter()
            row, said, fine = compare(wild, arguments.steps)
            print(row, flush=True)
            print(f"{wild.name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
            notes += [f"- {wild.package}, {wild.name}: {line}" for line in said]
            well = well and fine
    print("\n".join(["", *notes]))
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
