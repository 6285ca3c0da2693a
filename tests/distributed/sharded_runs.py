"""Models whose parameters are sharded over the ranks, measured and acted upon."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lyapunov_lightning import (
    CurvatureProbe,
    HessianConfig,
    LossAlongEigvecScanner,
    NegativeCurvatureTracker,
    NudgedSGDHook,
    QuasiNewtonLRController,
    SpectrumTracker,
    measure,
)
from lyapunov_lightning.callbacks.negative_curvature_tracker import Descent
from lyapunov_lightning.curvature import (
    conjugate_gradient,
    lanczos,
    power_iteration,
    spectral_density,
    stochastic_moments,
)
from lyapunov_lightning.curvature.directions.plane import Plane
from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.training.checks import check_objective
from lyapunov_lightning.training.fsdp import put_away
from lyapunov_lightning.training.operators import Operators
from lyapunov_lightning.training.optimizers.kept_copy import KeptCopy
from lyapunov_lightning.training.replica.objective import ProbeBatch, Problem
from tests.distributed.models import (
    PlannedError,
    Saving,
    own_entries,
    said,
    shared_folder,
    strategy,
    trainer_of,
    warned,
)
from tests.distributed.ranks import check
from tests.distributed.sharded_models import Decoder, sharded_strategy, texts, transformer
from tests.modules import Watcher
from tests.training.live import RememberingLogger

PARAMETERS = sum(p.numel() for p in transformer().parameters())

FIXED = HessianConfig("fixed", num_batches=2)
STEP = HessianConfig("batch")

ROOM = {"gathered": None, "layerwise": 6 * 8 * PARAMETERS, "shards": 0}
"""Of which memory which way is taken."""

READING: dict[str, Any] = {
    "probe": lambda **options: CurvatureProbe(1, end="both", tol=1e-8, eigenvalue_every=1, **options),
    "lyapunov": lambda **options: CurvatureProbe(1, "lyapunov", end="both", eigenvalue_every=1, **options),
    "critical": lambda **options: CurvatureProbe(1, "critical", **options),
    "spectrum": lambda **options: SpectrumTracker(
        2, 3, 2, tol=1e-8, hessian=FIXED, random_vectors=3, density_steps=6, groups={"head": "net.head*"}, **options
    ),
    "layerwise": lambda **options: SpectrumTracker(
        3, 1, 1, tol=1e-8, hessian=HessianConfig(num_batches=2, max_gather_bytes=6 * 8 * PARAMETERS), **options
    ),
    "differences": lambda **options: SpectrumTracker(
        3, 1, 1, tol=1e-4, hessian=HessianConfig(num_batches=2, max_gather_bytes=0), **options
    ),
    "benettin": lambda **options: SpectrumTracker(1, 2, 1, estimator="benettin", **options),
    "negative": lambda **options: NegativeCurvatureTracker(
        2, 2, hessian=FIXED, freeze_at=[1], estimator="online", tol=1e-8, **options
    ),
    "scanner": lambda **options: LossAlongEigvecScanner(
        2,
        random=1,
        hessian=FIXED,
        tol=1e-8,
        units="norm",
        points=5,
        scales=[1.0],
        sgd_steps=[1.0],
        plane=Plane("random", points=3),
        **options,
    ),
}

ACTING: dict[str, Any] = {
    "descent": lambda: NegativeCurvatureTracker(2, 1, hessian=STEP, descent=Descent(0.1, 0.05), tol=1e-8),
    "controller": lambda: QuasiNewtonLRController(),
    "inverse_sharpness": lambda: QuasiNewtonLRController(rule="inverse_sharpness"),
    "nudge": lambda: NudgedSGDHook(2, k=2, hessian=FIXED, tol=1e-10),
}

CALLBACKS = {**READING, **ACTING}

QUICK: dict[str, Any] = {
    **CALLBACKS,
    "probe": lambda **options: CurvatureProbe(1, end="both", tol=0.1, eigenvalue_every=1, **options),
    "spectrum": lambda **options: SpectrumTracker(
        2, 2, 1, tol=1e-4, hessian=FIXED, random_vectors=2, groups={"head": "net.head*"}, **options
    ),
    "negative": lambda **options: NegativeCurvatureTracker(
        2, 1, hessian=FIXED, freeze_at=[1], estimator="online", tol=0.1, **options
    ),
    "nudge": lambda: NudgedSGDHook(2, k=1, hessian=FIXED, tol=0.1),
}
"""The same, for runs in which it is not the numbers that count."""


def loader_of(rank: int, sizes: Sequence[int] = (4, 4), num_batches: int = 3) -> DataLoader:
    return DataLoader(texts(num_batches * sizes[rank], seed=rank), sizes[rank])


def whole_parameters(module: Any) -> list[Tensor]:
    for inner in module.modules():
        if hasattr(inner, "reshard"):
            inner.reshard()
    found = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters()]
    return [tensor.detach().clone() for tensor in found]


def trained(
    rank: int, *callbacks: Any, module: Any = None, sizes: Sequence[int] = (4, 4), num_batches: int = 3, **settings: Any
) -> Any:
    """A training, sharded if nothing else is said, and what became of it."""
    logger = RememberingLogger()
    module = Decoder() if module is None else module
    settings = {"strategy": sharded_strategy(), "logger": logger, "use_distributed_sampler": False, **settings}
    validation, path = settings.pop("val_dataloaders", None), settings.pop("ckpt_path", None)
    with warned() as messages:
        trainer = trainer_of(*callbacks, **settings)
        trainer.fit(module, loader_of(rank, sizes, num_batches), validation, ckpt_path=path)
    return {
        "parameters": whole_parameters(module),
        "results": [callback.results for callback in callbacks if hasattr(callback, "results")],
        "logged": own_entries(logger),
        "warned": messages,
        "steps": trainer.global_step,
    }


@check
def sharded_callbacks(rank: int) -> dict[str, Any]:
    """The callbacks on shards, and on copies of the whole model: those that read beside each other."""
    found: dict[str, Any] = {name: {} for name in CALLBACKS}
    for kind, of_kind in (("sharded", sharded_strategy), ("copied", strategy)):
        reading = [make(log_prefix=name) for name, make in READING.items()]
        run = trained(rank, *reading, strategy=of_kind(), module=Decoder())
        for name, results in zip(READING, run["results"], strict=True):
            logged = [(step, own) for step, metrics in run["logged"] if (own := of_prefix(name, metrics))]
            found[name][kind] = {**run, "results": [results], "logged": logged}
        for name, make in ACTING.items():
            found[name][kind] = trained(rank, make(), strategy=of_kind(), module=Decoder())
    return found


def of_prefix(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {tag: value for tag, value in metrics.items() if tag.startswith(f"{prefix}/")}


class Unknown(torch.optim.SGD):
    """An optimizer of the user's own, of which no limit is known."""


GAUGED: dict[str, Any] = {
    "adamw": partial(torch.optim.AdamW, betas=(0.8, 0.95)),
    "unknown": partial(Unknown, momentum=0.9),
}
"""Optimizers whose steps are gauged."""


@check
def sharded_gauges(rank: int) -> dict[str, Any]:
    """How near trainings are to their edge, of ranks with unequal numbers of samples and gradients that are clipped."""
    settings: dict[str, Any] = {"sizes": (5, 3), "gradient_clip_val": 0.5}
    found: dict[str, Any] = {}
    for name, optimizer in GAUGED.items():
        for way, room in {"copied": None, **ROOM}.items():
            # A search on shards takes longer than all the rest: there the eigenvalue is followed from step to step.
            config = HessianConfig("batch", max_gather_bytes=room)
            probe = CurvatureProbe(1, tol=0.5, eigenvalue_every=9, hessian=config)
            if way == "shards":
                config = replace(config, method="finite_difference")
                probe = CurvatureProbe(1, "lyapunov", eigenvalue_every=9, hessian=config)
            kind = strategy() if way == "copied" else sharded_strategy()
            module = Decoder(optimizer=optimizer, lr=0.05)
            num_batches = 3 if name == "adamw" else 2  # until a step was compared
            run = trained(rank, probe, module=module, strategy=kind, num_batches=num_batches, **settings)
            found.setdefault(name, {})[way] = run
    return found


class Narrow(Decoder):
    """Three numbers, all of them the first rank's."""

    def configure_model(self) -> None:
        if self.net is not None:
            return
        self.net = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.net.weight.fill_(0.5)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return (self.net(inputs[:, :3].double()) - targets[:, :1]).square().mean()  # type: ignore[misc]


@check
def sharded_on_one_rank(rank: int) -> dict[str, Any]:
    """A model of which one rank has nothing."""
    found = {}
    for kind, of_kind in (("sharded", sharded_strategy), ("copied", strategy)):
        module = Narrow(optimizer=GAUGED["adamw"])
        found[kind] = trained(rank, CurvatureProbe(1, tol=1e-8), module=module, strategy=of_kind())
    return found


class Unfreezing(pl.Callback):
    """Lets a bias of one number a rank train from the second step on."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._set(pl_module, False)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self._set(pl_module, True)

    def _set(self, pl_module: Any, is_trained: bool) -> None:
        pl_module.net.blocks[0].second_norm.bias.requires_grad_(is_trained)


@check
def sharded_unfreezing(rank: int) -> dict[str, Any]:
    """Parameters that come to the trained ones in mid-run, of which the ranks have different numbers."""
    found = {}
    for kind, of_kind in (("sharded", sharded_strategy), ("copied", strategy)):
        callbacks = [CALLBACKS["probe"](), *(QUICK[name]() for name in ("spectrum", "negative", "controller"))]
        if kind == "copied":  # which does not bear parameters that are frozen when it begins
            of_kind = partial(strategy, find_unused_parameters=True)
        found[kind] = trained(rank, Unfreezing(), *callbacks, strategy=of_kind())
    return found


# What a reading callback leaves behind.

IDENTITY: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "resharded": (
        {"optimizer": torch.optim.AdamW, "lr": 0.01, "dropout": 0.1},
        [QUICK[name] for name in ("probe", "critical", "spectrum", "negative", "scanner")],
    ),
    "kept whole": (
        {"sharding": {"reshard_after_forward": False}, "checkpointed": True, "dropout": 0.1},
        [lambda: CurvatureProbe(1, eigenvalue_every=3, hessian=HessianConfig(max_gather_bytes=6 * 8 * PARAMETERS))],
    ),
    "by differences": (
        {"optimizer": Unknown, "dropout": 0.1},
        [lambda: CurvatureProbe(1, hessian=HessianConfig(max_gather_bytes=0))],
    ),
    "two copies": ({"copies": 2, "lr": 0.05}, [QUICK["probe"]]),
}
"""Modules, and callbacks that read beside their training."""


class Randomness(Watcher):
    """Draws random numbers at every step, as a training with augmentation does."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.drawn.append(torch.randn(2))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients += [p.grad.to_local().clone() for p in pl_module.parameters() if p.grad is not None]


@check
def sharded_identity(rank: int) -> dict[str, Any]:
    """The same training without and with the reading callbacks, with validation in between."""
    found: dict[str, Any] = {}
    for name, (options, reading) in IDENTITY.items():
        for kind in ("without", "with"):
            torch.manual_seed(5 + rank)
            watching = Randomness()
            callbacks = [make() for make in reading] if kind == "with" else []
            run = trained(
                rank,
                watching,
                *callbacks,
                module=Decoder(**options),
                sizes=(3, 3),
                val_dataloaders=loader_of(rank, num_batches=1),
                val_check_interval=1,
                accumulate_grad_batches=1 + (name == "resharded"),
                gradient_clip_val=0.5,
            )
            found.setdefault(name, {})[kind] = {
                "parameters": run["parameters"],
                "gradients": watching.gradients,
                "drawn": watching.drawn,
                "steps": run["steps"],
                "measurements": sum(map(len, run["results"])),
                "warned": run["warned"],
            }
    return found


# Numbers.


class Looking(Watcher):
    """Has a look at the operator before one step."""

    def __init__(self, look: Any, at_step: int = 1, hessian: HessianConfig = STEP) -> None:
        self.look, self.at_step, self.hessian = look, at_step, hessian
        self.found: Any = None
        self.batch: Any = None
        self.parameters: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != self.at_step:
            return
        put_away(pl_module)
        operators = Operators()
        config = self.hessian.filled(data="batch", fraction=1.0, mode="train")
        problem = Problem(trainer, pl_module, config, [ProbeBatch(batch, batch_idx, True)])
        said: list[str] = []
        operators.make(problem, said.append)
        self.batch, self.note = batch, " ".join(said)
        self.found = self.look(operators.make(problem))  # in the way that was found
        self.parameters = whole_parameters(pl_module)


def looked_at(rank: int, look: Any, module: Any = None, **options: Any) -> dict[str, Any]:
    looking = Looking(look, **options)
    # After validation the outermost module is still gathered, at values that may be of before the step.
    validation = {"val_dataloaders": loader_of(rank, num_batches=1), "val_check_interval": 1}
    trained(rank, looking, module=module, sizes=(5, 3), num_batches=2, **validation)
    return {"found": looking.found, "batch": looking.batch, "parameters": looking.parameters, "note": looking.note}


PAIRS = {"largest": 2, "smallest": 1}
"""Eigenpairs that are looked for."""

FEW = 6
"""Products of a search that is broken off, before its values are those of any search."""

PLANE = [(0.01, 0.0), (-0.01, 0.2)]
"""Points on the plane of a random direction and the first eigenvector."""


def blocks_of(operator: Any) -> dict[str, Sequence[slice]]:
    """Every second parameter, and the others."""
    places = operator.layout.slices()
    return {"even": places[::2], "odd": places[1::2]}


def numbers_of(operator: Any, tol: float = 1e-9) -> dict[str, Any]:
    space = operator.space
    direction = space.random(torch.Generator().manual_seed(1))
    pairs = lanczos(operator, **PAIRS, tol=tol)
    vectors = torch.stack([space.whole(row) for row in pairs.vectors])
    moments = stochastic_moments(operator, num_probes=2, known=pairs, blocks=blocks_of(operator))
    damping = 1 + float(pairs.values.abs().max())
    inverse = conjugate_gradient(operator, direction, damping=damping, tol=1e-3)
    return {
        "products": torch.stack([space.whole(operator.matvec(d)) for d in (direction, pairs.vectors[0])]),
        "direction": space.whole(direction),
        "gradient": space.whole(operator.gradient()),
        "displaced gradient": space.whole(operator.gradient(0.01 * direction)),
        "values": operator.values_along(direction, [0.0, 0.01, -0.02]),
        "plane": operator.values_along(torch.stack([direction, pairs.vectors[0]]), PLANE),
        "value": operator.value(0.01 * direction),
        "pairs": (pairs.values, pairs.residuals, bool(pairs.converged.all())),
        "after few products": lanczos(operator, **PAIRS, max_matvecs=FEW).values,
        "vectors": vectors,
        "power": power_iteration(operator, tol=1e-1).values,
        "inverse": (space.whole(inverse.solution), damping, inverse.residual, inverse.converged),
        "trace": (moments.trace.value, moments.frobenius_norm.value),
        "traces": [estimate.value for estimate in moments.trace_of.values()],
        "density": spectral_density(operator, num_probes=2, num_steps=6).nodes,
        "components": operator.mean_over_batches(
            pairs.vectors[:2], lambda components, norm: torch.cat([components.abs(), norm.reshape(1)]), 3
        ),
        "lengths": (space.size, space.length, pairs.vectors.shape[1]),
        "check": operator.check(),
        "method": operator.method,
    }


WAYS: dict[str, tuple[HessianConfig, float]] = {
    "gathered": (STEP, 1e-9),
    "layerwise": (HessianConfig("batch", max_gather_bytes=6 * 8 * PARAMETERS), 1e-9),
    "shards": (HessianConfig("batch", max_gather_bytes=0), 1e-4),
    "offloaded": (HessianConfig("batch", offload=True), 1e-9),
}
"""The ways to a product, and how well eigenpairs can be known by them."""


@check
def sharded_numbers(rank: int) -> dict[str, Any]:
    """Everything that is computed, of ranks with unequal numbers of samples."""
    found = {
        way: looked_at(rank, partial(numbers_of, tol=tol), Decoder(checkpointed=way != "gathered"), hessian=config)
        for way, (config, tol) in WAYS.items()
    }
    # Measured in the precision of the parameters, whatever they are trained in.
    policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    found["float32"] = looked_at(rank, partial(numbers_of, tol=1e-4), Decoder(dtype=torch.float32, sharding=policy))
    found["two copies"] = looked_at(rank, numbers_of, Decoder(copies=2))
    return found


# What goes wrong.


FAILURES: dict[str, tuple[tuple[int, ...], str, str]] = {
    "one rank": ((1,), "after", "gathered"),
    "all ranks": ((0, 1), "after", "gathered"),
    "all ranks, on shards": ((0, 1), "after", "shards"),
    **{
        f"one rank, {where}, {way}": ((1,), where, way)
        for where in ("forward", "backward")
        for way in ("layerwise", "shards")
    },
}
"""Which ranks fail in the second measurement, where, and in which way to a product."""


@check
def sharded_failures(rank: int) -> dict[str, Any]:
    """Losses that fail on one rank in the middle of products, or on all of them, in a training that goes on."""

    def failing(ranks: tuple[int, ...], where: str = "after") -> Any:
        def loss_fn(module: Any, batch: Any) -> Tensor:
            fails = rank in ranks and module.trainer.global_step == 1
            if fails and where == "forward":  # a replica, so that nothing is left of the hook
                module.net.blocks[0].down.register_forward_hook(raise_planned)
            loss = module.loss(batch)
            if fails and where == "backward" and loss.requires_grad:
                loss.register_hook(raise_planned)
            if fails and where == "after":
                raise PlannedError("planned")
            return loss

        return loss_fn

    found: dict[str, Any] = {"plain": trained(rank)}
    for name, (ranks, where, way) in FAILURES.items():
        config = HessianConfig("batch", loss_fn=failing(ranks, where), max_gather_bytes=ROOM[way])
        callbacks = CurvatureProbe(1, hessian=config, tol=0.5), SpectrumTracker(1, 1, hessian=config, tol=0.5)
        found[name] = trained(rank, *callbacks)
    return found


EVENTS = {"a step without a loss": MeasurementError, "any exception": PlannedError}
"""What happens at the first measurement of a run, in each of its evaluations."""

STRUCK = {"gathered": (1,), "layerwise": (0, 1)}
"""On which ranks, by the way to a product. A rank that fails alone in the first evaluation through layers that are
gathered one after the other cannot know which collectives the others are in."""


@check
def sharded_events(rank: int) -> dict[str, Any]:
    """Losses that fail while the first measurement looks for a way to a product."""

    def failing(kind: type[Exception], ranks: tuple[int, ...]) -> Any:
        def loss_fn(module: Any, batch: Any) -> Tensor:
            if rank in ranks and module.trainer.global_step == 0:
                raise kind("planned")
            return module.loss(batch)

        return loss_fn

    found: dict[str, Any] = {}
    for way, ranks in STRUCK.items():
        for name, kind in EVENTS.items():
            config = HessianConfig("batch", loss_fn=failing(kind, ranks), max_gather_bytes=ROOM[way])
            with ways_taken() as taken:
                outcome = trained(rank, CurvatureProbe(1, hessian=config, tol=0.5))
            found[f"{name}, {way}"] = {**outcome, "ways": taken}
    return found


@contextmanager
def ways_taken() -> Iterator[list[str]]:
    """The way to a product of each operator that is made."""
    taken: list[str] = []
    plain = Operators._take

    def take(self: Any, problem: Any, way: Any, *arguments: Any) -> None:
        taken.append(way)
        plain(self, problem, way, *arguments)

    Operators._take = take
    try:
        yield taken
    finally:
        Operators._take = plain


@check
def sharded_accumulation(rank: int) -> dict[str, Any]:
    """Trainings whose last step in an epoch has one batch and the others two, without and with a probe.

    The last rank fails on the one batch of the fourth step, after products on the two of the third.
    """

    def failing(module: Any, batch: Any) -> Tensor:
        if module.trainer.global_step == 3 and rank == 1:
            raise PlannedError("planned")
        return module.loss(batch)

    config = HessianConfig("batch", loss_fn=failing, max_gather_bytes=ROOM["layerwise"])
    probe = CurvatureProbe(1, tol=0.5, eigenvalue_every=9, hessian=config)
    settings = {"max_epochs": 3, "accumulate_grad_batches": 2}
    return {"failing": trained(rank, probe, **settings), "plain": trained(rank, **settings)}


def raise_planned(*_: Any) -> None:
    raise PlannedError("planned")


# Resuming.

RESUMED: list[tuple[tuple[str, ...], dict[str, Any], tuple[bool, ...]]] = [
    (("probe", "lyapunov", "spectrum", "negative"), {"lr": 0.05}, (True,)),
    (("controller",), {}, (True,)),
    (("nudge",), {"optimizer": partial(torch.optim.SGD, momentum=0.5)}, (True, False)),
]
"""Callbacks of one training, the options of the module that they watch, and whether its checkpoints are sharded."""


@check
def sharded_resume(rank: int) -> dict[str, Any]:
    """Trainings that go on from sharded checkpoints, and one from a whole checkpoint."""
    folder = shared_folder()
    found: dict[str, Any] = {}
    for names, options, kinds in RESUMED:
        for is_sharded in kinds:
            kind = "sharded" if is_sharded else "whole"
            path = folder / f"{names[0]}-{kind}.ckpt"
            for way, start in (("straight", None), ("resumed", path)):
                prefixes = [{"log_prefix": name} if len(names) > 1 else {} for name in names]
                callbacks = [QUICK[name](**prefix) for name, prefix in zip(names, prefixes, strict=True)]
                run = trained(
                    rank,
                    *callbacks,
                    *([] if start else [Saving(path)]),
                    module=Decoder(**options),
                    num_batches=2,
                    max_epochs=2,
                    strategy=sharded_strategy(save_distributed_checkpoint=is_sharded),
                    ckpt_path=start,
                )
                for name, results in zip(names, run["results"], strict=True):
                    found.setdefault(f"{name}, {kind}", {})[way] = {**run, "results": [results]}
    return found


class GoingBack(pl.Callback):
    """Copies a training before its second step, and brings it back before the third."""

    def __init__(self) -> None:
        self.copy = KeptCopy()
        self.noted: list[list[Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        optimizer = trainer.optimizers[0]
        if batch_idx == 1:
            self.copy.take(1, pl_module, optimizer)
            self.copy.confirm()
        elif batch_idx == 2:
            self.noted.append(whole_parameters(pl_module))
            assert self.copy.restore(optimizer) == 1
        if batch_idx:
            state = [value for entry in optimizer.state.values() for value in entry.values()]
            state = [value.full_tensor() if hasattr(value, "full_tensor") else value for value in state]
            self.noted.append(whole_parameters(pl_module) + [value.clone() for value in state])


@check
def sharded_copies(rank: int) -> list[list[Tensor]]:
    """Parameters and the optimizer's state before a step, after it, and brought back."""
    going_back = GoingBack()
    trained(rank, going_back, module=Decoder(optimizer=torch.optim.AdamW, lr=0.1))
    return going_back.noted


@check
def sharded_measure(rank: int) -> dict[str, Any]:
    """One shot of a model in parts and of copies of the whole."""
    options: dict[str, Any] = {"largest": 2, "smallest": 1, "lines": 1}
    return {
        kind: measure(
            Decoder(),
            DataLoader(texts(12, seed=3), 3),
            trainer=trainer_of(strategy=of_kind(), use_distributed_sampler=False),
            **options,
        )
        for kind, of_kind in (("sharded", sharded_strategy), ("copied", strategy))
    }


# What is refused.


@check
def sharded_refusals(rank: int) -> dict[str, str]:
    """What a callback says of models that are spread over the ranks in other ways."""

    class HalfSharded(Decoder):
        def configure_model(self) -> None:
            self.net = transformer()
            for block in self.net.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])

    class TensorParallel(Decoder):
        def configure_model(self) -> None:
            self.net = transformer()
            for block in self.net.blocks:
                plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(block, self.device_mesh["tensor_parallel"], plan)

    across = sharded_strategy(data_parallel_size=1, tensor_parallel_size=2)
    fsdp1 = FSDPStrategy(process_group_backend="gloo")
    return {
        "half sharded": said(lambda: trained(rank, CurvatureProbe(1), module=HalfSharded())),
        "tensor parallel": said(lambda: trained(rank, CurvatureProbe(1), module=TensorParallel(), strategy=across)),
        "fsdp1": said(
            lambda: check_objective("CurvatureProbe", SimpleNamespace(strategy=fsdp1), Decoder(), HessianConfig())
        ),
    }
