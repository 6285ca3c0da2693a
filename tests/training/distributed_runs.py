"""What each of two real processes does for `test_distributed.py`; run as a module with a directory and a rank.

Every check runs in both processes, one after the other, and what it returns is saved as ``{check}-{rank}.pt``. A check
that raises is saved as a `Failure`, so that one fault does not hide the other results.
"""

import copy
import logging
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lyapunov_lightning import (
    CurvatureProbe,
    LossAlongEigvecScanner,
    NegativeCurvatureTracker,
    NudgedSGDHook,
    QuasiNewtonLRController,
    Schedule,
    SpectrumTracker,
)
from lyapunov_lightning.callbacks import nudged_sgd_hook
from lyapunov_lightning.curvature import HessianOperator, lanczos
from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.training import recording, schedule
from lyapunov_lightning.training.distributed import sum_over_processes
from tests.training.live import RememberingLogger

WORLD_SIZE = 2
TIMEOUT = timedelta(seconds=60)
"""How long a process waits for the other one before it gives up."""

CHECKS: dict[str, Callable[[int], Any]] = {}
"""By name; each takes the rank."""


@dataclass
class Failure:
    """A check that raised."""

    trace: str


def check(function: Callable[[int], Any]) -> Callable[[int], Any]:
    CHECKS[function.__name__] = function
    return function


# The operator alone.

SHARDS = {
    "unequal": [[5, 3, 2], [4]],
    "one-has-none": [[5, 3, 2], []],
    "one-sample": [[6], [1]],
    "equal": [[3, 3], [3, 3]],
}
"""The sizes of each process's batches."""

METHODS = ("double_backward", "forward_over_reverse", "finite_difference")
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def shards(kind: str, dtype: torch.dtype) -> list[list[tuple[Tensor, Tensor]]]:
    """The batches of each process."""
    generator = torch.Generator().manual_seed(4)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(size, 4, dtype=torch.float64, generator=generator).to(dtype)
        return inputs, torch.randint(3, (size,), generator=generator)

    return [[batch(size) for size in sizes] for sizes in SHARDS[kind]]


def small_network(dtype: torch.dtype) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return net.to(dtype)


def measured(batches: list[Any], dtype: torch.dtype, method: str, reduce: Any) -> dict[str, Tensor]:
    """All that an operator tells of the Hessian of a small network."""
    net = small_network(dtype)
    loss = nn.CrossEntropyLoss()
    operator = HessianOperator(
        lambda batch: loss(net(batch[0]), batch[1]), net.parameters(), batches, method=method, reduce=reduce
    )
    generator = torch.Generator().manual_seed(1)
    vector, shift = torch.randn(2, operator.size, dtype=torch.float64, generator=generator).to(dtype)
    results = {
        "product": operator.matvec(vector),
        "second product": operator.matvec(2 * vector),
        "gradient": operator.gradient(),
        "displaced gradient": operator.gradient(0.1 * shift),
        "value": torch.tensor([operator.value(), operator.value(0.1 * shift)]),
    }
    if method == "double_backward":
        tol = 1e-9 if dtype is torch.float64 else 1e-5
        results["eigenvalues"] = lanczos(operator, largest=3, smallest=2, tol=tol).values
    return results


@check
def operator(rank: int) -> dict[str, Any]:
    reduce = sum_over_processes(SimpleNamespace(world_size=WORLD_SIZE))
    return {
        (kind, dtype, method): measured(shards(kind, DTYPES[dtype])[rank], DTYPES[dtype], method, reduce)
        for kind in SHARDS
        for dtype in DTYPES
        for method in METHODS
    }


COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "reduce",
    "reduce_scatter_tensor",
    "scatter",
)


@contextmanager
def counted_collectives() -> Iterator[list[tuple[str, int]]]:
    """The collectives that are called in the block, with the number of elements of the first argument."""
    calls: list[tuple[str, int]] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, args[0].numel() if args and isinstance(args[0], Tensor) else 0))
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


@check
def collectives(rank: int) -> dict[str, list[tuple[str, int]]]:
    reduce = sum_over_processes(SimpleNamespace(world_size=WORLD_SIZE))
    net = small_network(torch.float64)
    loss = nn.CrossEntropyLoss()
    batches = shards("unequal", torch.float64)[rank]
    found = {}
    for method in METHODS:
        operator = HessianOperator(
            lambda batch: loss(net(batch[0]), batch[1]), net.parameters(), batches, method=method, reduce=reduce
        )
        for number in ("first", "second"):
            with counted_collectives() as calls:
                operator.matvec(torch.ones(operator.size, dtype=torch.float64))
            found[f"{number} {method}"] = calls
    with counted_collectives() as calls:
        operator.gradient()
    found["gradient"] = calls
    with counted_collectives() as calls:
        pairs = lanczos(operator, largest=1, tol=1e-2)
    found["lanczos"] = calls
    found["lanczos products"] = [("matvec", 0)] * pairs.num_matvecs
    return found


class PlannedError(RuntimeError):
    """The fault that a check provokes."""


FAULTS = {
    "first-evaluation": (0, lambda value: _raise()),
    "second-batch": (1, lambda value: _raise()),
    "not-a-scalar": (0, lambda value: torch.stack([value, value])),
    "not-a-tensor": (0, lambda value: None),
}
"""At which evaluation the loss of the second process goes wrong, and how."""


def _raise() -> None:
    raise PlannedError("planned")


class BreakableLoss:
    """A loss that goes wrong while it has a fault."""

    def __init__(self, fault: str | None) -> None:
        self.net = small_network(torch.float64)
        self.fault = fault
        self.evaluations = 0

    def evaluate(self, batch: Any) -> Any:
        self.evaluations += 1
        value = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if self.fault is not None and self.evaluations > FAULTS[self.fault][0]:
            return FAULTS[self.fault][1](value)
        return value


@check
def failing_loss(rank: int) -> dict[str, Any]:
    """What each process gets when the loss of the second one goes wrong, and whether both can go on."""
    reduce = sum_over_processes(SimpleNamespace(world_size=WORLD_SIZE))
    batches = shards("equal", torch.float64)[rank]
    found = {}
    for method in METHODS:
        for fault in FAULTS:
            for what in ("matvec", "gradient", "value"):
                loss = BreakableLoss(fault if rank == 1 else None)
                parameters = loss.net.parameters()
                operator = HessianOperator(loss.evaluate, parameters, batches, method=method, reduce=reduce)
                arguments = (torch.ones(operator.size, dtype=torch.float64),) if what == "matvec" else ()
                try:
                    getattr(operator, what)(*arguments)
                    caught = "nothing"
                except Exception as error:
                    caught = f"{type(error).__name__}: {error}"
                loss.fault = None
                found[method, fault, what] = (caught, torch.as_tensor(getattr(operator, what)(*arguments)))
    return found


@check
def no_batches(rank: int) -> str:
    reduce = sum_over_processes(SimpleNamespace(world_size=WORLD_SIZE))
    operator = HessianOperator(lambda batch: None, small_network(torch.float64).parameters(), [], reduce=reduce)
    try:
        operator.matvec(torch.ones(operator.size))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# Trainings.


class Smooth(pl.LightningModule):
    """A small regression without noise, whose Hessian has a closed form of sorts: a dense one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Snapshots(Callback):
    """The parameters and the batch before every step."""

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.parameters.append(nn.utils.parameters_to_vector(pl_module.parameters()).detach().clone())
        self.batches.append(copy.deepcopy(batch))


def regression(num_samples: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(num_samples, 3, generator=generator), torch.randn(num_samples, 2, generator=generator)
    )


def fit(module: pl.LightningModule, loader: Any, *callbacks: Callback, **settings: Any) -> pl.Trainer:
    settings = {
        "max_epochs": -1 if "max_steps" in settings else 1,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "strategy": DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT),
        **settings,
    }
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=WORLD_SIZE,
        callbacks=list(callbacks),
        **settings,
    )
    trainer.fit(module, loader)
    return trainer


def is_own(tag: str) -> bool:
    """Whether one of the package's callbacks has logged this."""
    return any(f"{group}/" in tag for group in ("curvature", "spectrum", "negative", "nudge", "scan", "lr"))


def own_entries(logger: RememberingLogger) -> list[tuple[int, dict[str, float]]]:
    """What a callback has logged, but for the time."""
    return [
        (step, {tag: value for tag, value in metrics.items() if not tag.endswith("seconds")})
        for step, metrics in logger.entries
        if any(map(is_own, metrics))
    ]


def probed(probe: Any, loader: Any, **settings: Any) -> dict[str, Any]:
    logger, snapshots, module = RememberingLogger(), Snapshots(), Smooth()
    fit(module, loader, snapshots, probe, logger=logger, precision="64-true", **settings)
    return {
        "logged": own_entries(logger),
        "parameters": snapshots.parameters,
        "batches": snapshots.batches,
        "state": probe.state_dict(),
    }


STEP_BATCHES = [5, 3]
"""Batch size of each process."""


@check
def probe_on_the_step(rank: int) -> dict[str, Any]:
    found = {}
    for estimator, tol in (("lanczos", 1e-8), ("power", 1e-4), ("lyapunov", 1e-2)):
        end = "largest" if estimator == "lyapunov" else "both"
        size = STEP_BATCHES[rank]
        loader = DataLoader(regression(6 * size, seed=rank), size)
        probe = CurvatureProbe(2, estimator, end, tol=tol)
        found[estimator] = probed(probe, loader, use_distributed_sampler=False)
    return found


@check
def tracker_on_the_step(rank: int) -> dict[str, Any]:
    size = STEP_BATCHES[rank]
    tracker = SpectrumTracker(
        3,
        2,
        Schedule(every_n_steps=2),
        "batch",
        tol=1e-8,
        random_vectors=4,
        density_steps=5,
        groups={"first": "net.0.*", "last": "net.2.*"},
    )
    return probed(tracker, DataLoader(regression(6 * size, seed=rank), size), use_distributed_sampler=False)


@check
def negative_tracker_on_the_step(rank: int) -> dict[str, Any]:
    size = STEP_BATCHES[rank]
    schedule = Schedule(every_n_steps=2)
    tracker = NegativeCurvatureTracker(2, schedule, "batch", freeze_at=[3], estimator="online", tol=1e-8)
    return probed(tracker, DataLoader(regression(6 * size, seed=rank), size), use_distributed_sampler=False)


@check
def values_along_a_line(rank: int) -> dict[str, Any]:
    """The loss at four points of a line, with the collectives that it took."""
    reduce = sum_over_processes(SimpleNamespace(world_size=WORLD_SIZE))
    found = {}
    for kind in SHARDS:
        net = small_network(torch.float64)
        operator = HessianOperator(
            lambda batch, net=net: nn.functional.cross_entropy(net(batch[0]), batch[1]),
            net.parameters(),
            shards(kind, torch.float64)[rank],
            reduce=reduce,
        )
        with counted_collectives() as calls:
            values = operator.values_along(torch.ones(operator.size, dtype=torch.float64), LINE)
        found[kind] = {"values": values, "calls": calls}
    return found


LINE = [-0.2, 0.0, 0.1, 0.5]


@check
def scanner_on_the_step(rank: int) -> dict[str, Any]:
    size = STEP_BATCHES[rank]
    scanner = LossAlongEigvecScanner(1, 1, 1, Schedule(every_n_steps=2), "batch", tol=1e-8, units="norm")
    return probed(scanner, DataLoader(regression(6 * size, seed=rank), size), use_distributed_sampler=False)


@check
def failing_scan(rank: int) -> dict[str, Any]:
    """A training in which the second process fails in the midst of the scan at step 2."""
    evaluations = 0

    def loss_fn(module: Any, batch: Any) -> Tensor:
        nonlocal evaluations
        if module.trainer.global_step == 2:
            evaluations += 1
            if rank == 1 and evaluations == 40:
                raise PlannedError("planned")
        return module.loss(batch)

    size = STEP_BATCHES[rank]
    scanner = LossAlongEigvecScanner(1, 1, 0, Schedule(every_n_steps=1), "batch", tol=1e-8, loss_fn=loss_fn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = DataLoader(regression(6 * size, seed=rank), size)
        found = probed(scanner, loader, use_distributed_sampler=False)
    return {**found, "warned": [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)]}


@check
def descent(rank: int) -> dict[str, Any]:
    """Trainings that move along the most negative direction; in one of them the second process once cannot measure."""

    def loss_fn(module: Any, batch: Any) -> Tensor:
        if rank == 1 and module.trainer.global_step == 2:
            raise PlannedError("planned")
        return module.loss(batch)

    size = STEP_BATCHES[rank]
    found = {}
    for name, options in {
        "lanczos": {"data": "batch"},
        "online": {"data": "fixed", "fraction": 1.0, "estimator": "online"},
        "failing": {"data": "batch", "loss_fn": loss_fn},
    }.items():
        tracker = NegativeCurvatureTracker(
            1, Schedule(every_n_steps=1), descend=True, descend_lr=0.1, tol=1e-8, **options
        )
        loader = DataLoader(regression(6 * size, seed=rank), size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CurvatureWarning)
            found[name] = probed(tracker, loader, use_distributed_sampler=False, gradient_clip_val=0.5)
    return found


@check
def controlled(rank: int) -> dict[str, Any]:
    """Trainings at learning rates from curvature; in one of them the second process once cannot measure."""

    def loss_fn(module: Any, batch: Any) -> Tensor:
        if rank == 1 and module.trainer.global_step == 2:
            raise PlannedError("planned")
        return module.loss(batch)

    size = STEP_BATCHES[rank]
    found = {}
    for name, options in {
        "along_update": {"averaging": 0.0, "max_growth": 1e6},
        "inverse_sharpness": {"rule": "inverse_sharpness"},
        "failing": {"loss_fn": loss_fn},
    }.items():
        loader = DataLoader(regression(6 * size, seed=rank), size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CurvatureWarning)
            controller = QuasiNewtonLRController(**options)
            found[name] = probed(controller, loader, use_distributed_sampler=False, gradient_clip_val=0.5)
    return found


FRACTIONS = {"uneven": 7 / 21, "one-sample": 1 / 21, "all": 1.0}
FIXED_SAMPLES, FIXED_BATCH = 21, 2


@check
def probe_on_fixed_data(rank: int) -> dict[str, Any]:
    found = {}
    for name, fraction in FRACTIONS.items():
        probe = CurvatureProbe(3, "lanczos", "both", data="fixed", fraction=fraction, tol=1e-8, seed=5)
        found[name] = probed(probe, DataLoader(regression(FIXED_SAMPLES), FIXED_BATCH, shuffle=True))
    return found


class Noticing(Callback):
    """Calls a function before every step."""

    def __init__(self, function: Callable[[pl.Trainer], None]) -> None:
        self.function = function

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.function(trainer)


class Breakable(Dataset):
    """A dataset that fails while it is told to."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data
        self.is_broken = False

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        if self.is_broken:
            raise PlannedError("planned")
        return self.data[index]


def final(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach()


@check
def failing_probe(rank: int) -> dict[str, Any]:
    """Trainings in which the second process fails to measure at step 2, or to draw its data at step 0."""
    found = {}

    def loss_fn(module: Any, batch: Any) -> Tensor:
        if rank == 1 and module.trainer.global_step == 2:
            raise PlannedError("planned")
        return module.loss(batch)

    def run(name: str, *callbacks: Callback, dataset: Any = None) -> None:
        logger, module = RememberingLogger(), Smooth()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loader = DataLoader(regression(12) if dataset is None else dataset, 1)
            trainer = fit(module, loader, *callbacks, logger=logger, max_steps=6)
        found[name] = {
            "converged": logger.values_of("curvature/converged"),
            "parameters": final(module),
            "steps": trainer.global_step,
            "warned": [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)],
        }

    run("without probe")
    for estimator in ("lanczos", "power", "lyapunov"):
        run(f"loss of {estimator}", CurvatureProbe(1, estimator, tol=0.5, loss_fn=loss_fn))
    dataset = Breakable(regression(12))
    breaking = Noticing(lambda trainer: setattr(dataset, "is_broken", rank == 1 and trainer.global_step == 0))
    mending = Noticing(lambda trainer: setattr(dataset, "is_broken", False))
    probe = CurvatureProbe(1, data="fixed", fraction=1.0, tol=0.5)
    run("data", breaking, probe, mending, dataset=dataset)
    return found


class Busy(pl.LightningModule):
    """BatchNorm, dropout, metrics that are synchronised, and logging."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.accuracy = MulticlassAccuracy(3)
        self.synced = MeanMetric(dist_sync_on_step=True)
        self.losses: list[Tensor] = []
        self.order: list[Tensor] = []
        self.average = torch.zeros(())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels, indices = batch
        logits = self.net(inputs + 0.1 * torch.randn_like(inputs))
        loss = nn.functional.cross_entropy(logits, labels)
        self.accuracy(logits, labels)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("synced", self.synced(loss.detach()), on_step=True)
        self.losses.append(loss.detach())
        self.order.append(indices)
        self.average.mul_(0.9).add_(0.1 * loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def classification() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(88, 4, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(1), torch.arange(88))


IDENTITY = {
    "fp32": {"precision": "32-true", "accumulate_grad_batches": 1},
    "bf16-accumulate-4": {"precision": "bf16-mixed", "accumulate_grad_batches": 4},
}
IDENTITY_STEPS = 50


def trained(*callbacks: Callback, **settings: Any) -> dict[str, Any]:
    """Everything that a probe must leave alone, after a training of 50 steps."""
    pl.seed_everything(11, verbose=False)
    logger, module = RememberingLogger(), Busy()
    trainer = fit(
        module,
        DataLoader(classification(), 8, shuffle=True),
        *callbacks,
        logger=logger,
        gradient_clip_val=0.5,
        max_steps=IDENTITY_STEPS,
        **settings,
    )
    return {
        "measurements": len(own_entries(logger)),
        "parameters": dict(module.named_parameters()),
        "gradients": {name: p.grad for name, p in module.named_parameters()},
        "buffers": dict(module.named_buffers()),
        "optimizer": trainer.optimizers[0].state_dict(),
        "logged": [
            (step, {tag: value for tag, value in metrics.items() if not is_own(tag)})
            for step, metrics in logger.entries
            if not any(map(is_own, metrics))
        ],
        "callback metrics": {tag: v for tag, v in trainer.callback_metrics.items() if not is_own(tag)},
        "metrics": [module.accuracy.metric_state, module.synced.metric_state],
        "attributes": (module.losses, module.order, module.average),
        "generators": (torch.rand(2), torch.tensor([random.random(), np.random.rand()])),
        "steps": trainer.global_step,
    }


@check
def identity(rank: int) -> dict[str, Any]:
    found = {}
    for name, settings in IDENTITY.items():
        probes = [
            CurvatureProbe(1, end="both", tol=0.3),
            CurvatureProbe(3, "lyapunov", data="fixed", fraction=0.2, mode="eval"),
            CurvatureProbe(4, "power", tol=0.3, log_prefix="second"),
            SpectrumTracker(2, 1, Schedule(every_n_steps=13), fraction=0.2, random_vectors=2, groups="modules"),
            SpectrumTracker(2, estimator="benettin", schedule=Schedule(every_n_steps=13), log_prefix="third"),
            NegativeCurvatureTracker(
                1, Schedule(every_n_steps=17), freeze_at=[2], estimator="online", fraction=0.2, log_prefix="fourth"
            ),
            NudgedSGDHook(2, gamma=1.0, refresh=Schedule(every_n_steps=13), fraction=0.2),
            LossAlongEigvecScanner(1, 1, 1, Schedule(every_n_steps=23), fraction=0.2, log_prefix="fifth"),
        ]
        found[name] = {
            "without": trained(**settings),
            "with": trained(*probes, **settings),
        }
    return found


NUDGED = {
    "nudge": {"gamma": 0.1},
    "no_top": {"variant": "no_top"},
    "top_only": {"variant": "top_only"},
}


def nudged(loader: Any, loss_fn: Any = None, **options: Any) -> dict[str, Any]:
    """A training with another learning rate along the sharpest directions of the samples of both processes."""
    logger, snapshots, module = RememberingLogger(), Snapshots(), Smooth()
    hook = NudgedSGDHook(3, **options, fraction=1.0, tol=1e-8, loss_fn=loss_fn, seed=5)
    settings = {"max_epochs": 3, "precision": "64-true", "gradient_clip_val": 1.0, "accumulate_grad_batches": 2}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, loader, snapshots, hook, logger=logger, **settings)
    return {
        "logged": [
            {tag: value for tag, value in metrics.items() if not tag.endswith("seconds")}
            for _, metrics in logger.entries
        ],
        "parameters": [*snapshots.parameters, final(module)],
        "batches": snapshots.batches,
        "state": hook.state_dict(),
        "warned": [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)],
    }


@check
def nudged_training(rank: int) -> dict[str, Any]:
    loader = DataLoader(regression(FIXED_SAMPLES), FIXED_BATCH, shuffle=True)
    return {name: nudged(loader, **options) for name, options in NUDGED.items()}


@check
def failing_nudge(rank: int) -> dict[str, Any]:
    """Trainings in which the second process alone fails in the second epoch: in its loss, or after all products."""
    loader = DataLoader(regression(FIXED_SAMPLES), FIXED_BATCH)
    epochs = iter(range(3))
    plain = nudged_sgd_hook.lanczos

    def loss_fn(module: Any, batch: Any) -> Tensor:
        if rank == 1 and module.current_epoch == 1:
            raise PlannedError("planned")
        return module.loss(batch)

    def lanczos_without_memory(*args: Any, **options: Any) -> Any:
        pairs = plain(*args, **options)
        if next(epochs) == 1 and rank == 1:
            raise PlannedError("planned")
        return pairs

    found = {"loss": nudged(loader, loss_fn, gamma=0.1)}
    nudged_sgd_hook.lanczos = lanczos_without_memory
    try:
        found["memory"] = nudged(loader, gamma=0.1)
    finally:
        nudged_sgd_hook.lanczos = plain
    return found


class FakeClock:
    """A clock of one process that goes on by itself at every look."""

    def __init__(self, pace: float) -> None:
        self.now = 0.0
        self.pace = pace

    def perf_counter(self) -> float:
        self.now += self.pace
        return self.now


PACES = {
    "only-first-can-afford-all": [(1.0, 1e-6), (1e-6, 1.0)],
    "only-second-can-afford-all": [(1e-6, 1.0), (1.0, 1e-6)],
    "first-can-afford-some": [(1.0, 0.5), (1.0, 1e-6)],
}
"""How fast the clocks of the two processes go during steps and during measurements."""


@check
def share_of_the_time(rank: int) -> dict[str, list[int]]:
    """Trainings in which the two processes disagree about how much time measurements take."""
    found = {}
    for name, paces in PACES.items():
        step_pace, cost_pace = paces[rank]
        originals = recording.time, schedule.time
        recording.time, schedule.time = FakeClock(cost_pace), FakeClock(step_pace)
        logger = RememberingLogger()
        probe = CurvatureProbe(max_overhead=0.3, tol=0.5)
        try:
            fit(Smooth(), DataLoader(regression(120), 1), probe, logger=logger)
        finally:
            recording.time, schedule.time = originals
        found[name] = logger.steps_of("curvature/lambda_max")
    return found


class Unwrapped(DDPStrategy):
    """Without the wrapper, which refuses to synchronise BatchNorm on a CPU before anything else could."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return model


@check
def synchronised_batchnorm(rank: int) -> str:
    """What a Trainer that is to synchronise BatchNorm, which the probe cannot differentiate, says before training."""

    class Normalised(Smooth):
        def __init__(self) -> None:
            super().__init__()
            self.net.insert(1, nn.BatchNorm1d(4))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            strategy = Unwrapped(process_group_backend="gloo", timeout=TIMEOUT)
            loader = DataLoader(regression(12), 2)
            fit(Normalised(), loader, CurvatureProbe(1), sync_batchnorm=True, strategy=strategy)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(directory: Path, rank: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory / 'rendezvous'}", rank=rank, world_size=WORLD_SIZE, timeout=TIMEOUT
    )
    for name in names or CHECKS:
        outcome: Any
        try:
            outcome = CHECKS[name](rank)
        except Exception:
            outcome = Failure(traceback.format_exc())
        torch.save(outcome, directory / f"{name}-{rank}.tmp")
        (directory / f"{name}-{rank}.tmp").rename(directory / f"{name}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.modules["tests.training.distributed_runs"] = sys.modules["__main__"]  # what is saved is found under this name
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
