"""What a message says to do, done on the case that brings it up: callbacks, arguments, the Trainer and the data."""

import random
import sys
import sysconfig
import tempfile
import types
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lyapunov_lightning import (
    CurvatureProbe,
    HessianConfig,
    LossAlongEigvecScanner,
    NegativeCurvatureTracker,
    NudgedSGDHook,
    QuasiNewtonLRController,
    Schedule,
    SpectrumTracker,
    measure,
)
from lyapunov_lightning.callbacks import nudged_sgd_hook
from lyapunov_lightning.curvature.directions.plane import Plane
from lyapunov_lightning.training.checks import check_objective
from lyapunov_lightning.training.optimizers.requirements import check_unscaled
from lyapunov_lightning.training.reporting.recording import Recorder
from tests.modules import MemoryLogger
from tests.remedies import Row, check
from tests.training_runs import train

CURVATURES = torch.tensor([3.0, 2.0, -1.0], dtype=torch.float64)
"""What is on the diagonal of the Hessian in all of these trainings."""


def bowl(weight: Tensor) -> Tensor:
    """The loss whose Hessian is that diagonal wherever it is taken."""
    return (CURVATURES.to(weight) * weight.square()).sum() / 2


class Module(pl.LightningModule):
    """Three parameters with a quadratic loss.

    Args:
        optimizer: Maps the module to what `configure_optimizers` returns.
        loss: Maps the module and a batch to what the step returns.

    """

    def __init__(self, optimizer: Any = None, loss: Any = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64))
        self._optimizer = optimizer or (lambda module: SGD(module.parameters(), lr=0.1))
        self._loss = loss or (lambda module, batch: bowl(module.w))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self._loss(self, batch)

    def configure_optimizers(self) -> Any:
        return self._optimizer(self)


def with_own_loss(module: Any) -> Any:
    """The module, with a method that computes the loss for measurements."""
    module.curvature_loss = lambda batch: bowl(module.w)
    return module


def loss_fn(module: Any, batch: Any) -> Tensor:
    return bowl(module.w)


def loader(size: int = 8, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(size, 1, dtype=torch.float64)), 4, **options)


class Stream(IterableDataset):
    """Data without a length, which are given once."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.ones(16, 1, dtype=torch.float64))


class StreamWithLength(Stream):
    def __len__(self) -> int:
        return 16


def run(callbacks: Any, module: Any = None, data: Any = None, **options: Any) -> Any:
    """Train for a step. Returns the callback, or all of them."""
    several = callbacks if isinstance(callbacks, list) else [callbacks]
    settings = {"max_steps": 1, "logger": MemoryLogger(), "log_every_n_steps": 1, **options}
    with tempfile.TemporaryDirectory() as folder:
        train(
            Module() if module is None else module,
            *several,
            loader=loader() if data is None else data,
            default_root_dir=folder,
            **settings,
        )
    return callbacks


def fit(callbacks: Any, module: Any = None, data: Any = None, **options: Any) -> Any:
    """The same; what was measured is right."""
    run(callbacks, module, data, **options)
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        is_right(callback)
    return callbacks


def scanner(**options: Any) -> LossAlongEigvecScanner:
    """One that scans as little as it may."""
    return LossAlongEigvecScanner(**{"every_n_steps": 2, "smallest": 0, "points": 3, "sgd_steps": (), **options})


def is_right(callback: Any) -> None:
    """The last result of a callback is that of the Hessian with `CURVATURES`."""
    if isinstance(callback, CurvatureProbe):
        found = [result.lambda_max for result in callback.results if result.lambda_max is not None]
        if found:
            np.testing.assert_allclose(found[-1], 3, rtol=0.02)
        else:
            assert callback.results
            assert "'critical'" in repr(callback)
    elif isinstance(callback, (SpectrumTracker, NudgedSGDHook)):
        result = callback.results[-1]
        found = result.largest if isinstance(callback, SpectrumTracker) else result.eigenvalues
        if "benettin" not in repr(callback):  # which has a long way to go
            np.testing.assert_allclose(found[0], 3, rtol=0.02)
    elif isinstance(callback, NegativeCurvatureTracker):
        result = callback.results[-1]
        np.testing.assert_allclose(
            result.lambda_min[0] if result.lambda_min else result.online_lambda_min, -1, rtol=0.2
        )
    elif isinstance(callback, (LossAlongEigvecScanner, QuasiNewtonLRController)):
        assert callback.results


@pytest.fixture(autouse=True)
def _nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of the time of a training of two steps."""
    monkeypatch.setattr(Recorder, "draw", lambda *arguments: True)


@pytest.fixture(autouse=True)
def _library_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library.__name__, library)


# Arguments


def argument(says: str, act: Callable[[Any], object], wrong: Any, right: dict[str, Any]) -> Row:
    """A value that is refused, and for each of the values that the message names one that is tried."""
    return Row(says, lambda: act(wrong), {named: lambda value=value: act(value) for named, value in right.items()})


def made(kind: Any, says: str, wrong: dict[str, Any], **right: dict[str, Any]) -> Row:
    """Arguments of a class that are refused, and what the message makes of them, by its words with _ between them."""
    named = {words.replace("_", " ").replace("  ", "_"): arguments for words, arguments in right.items()}
    return argument(says, lambda arguments: kind(**arguments), wrong, named)


ESTIMATES = "should be left out with estimator='benettin', which measures exponents and nothing else"
BENETTIN = {"estimator": "benettin"}

ARGUMENTS = [
    Row(
        "every_n_steps is itself a schedule, so schedule should be None.",
        lambda: CurvatureProbe(2, schedule=Schedule(first_n_steps=1)),
        {
            "schedule should be None": lambda: (
                fit(CurvatureProbe(2)),
                fit(CurvatureProbe(schedule=Schedule(every_n_steps=2, first_n_steps=1))),
            )
        },
    ),
    argument("every_n_steps should be a positive int, got '10'.", CurvatureProbe, "10", {"positive int": 10}),
    argument("tol should be a positive float", lambda tol: CurvatureProbe(1, tol=tol), 0, {"positive": 1e-3}),
    argument(
        "estimator should be one of lanczos, lyapunov, power, critical",
        lambda name: fit(CurvatureProbe(1, name, iterations=25), max_steps=1),
        "arpack",
        {name: name for name in ("lanczos", "lyapunov", "power", "critical")},
    ),
    argument(
        "hessian should be a HessianConfig, or a mapping of its fields",
        lambda hessian: fit(SpectrumTracker(1, 2, hessian=hessian)),
        "fixed",
        {"HessianConfig": HessianConfig(data="fixed"), "a mapping of its fields": {"data": "fixed"}},
    ),
    argument(
        "schedule should have no other fields than",
        lambda schedule: CurvatureProbe(schedule=schedule),
        {"every": 5},
        {"every_n_steps": {"every_n_steps": 5}, "first_n_steps": {"first_n_steps": 5}},
    ),
    argument(
        "eigenvalue_every should be None with estimator='critical'",
        lambda every: fit(CurvatureProbe(1, "critical", eigenvalue_every=every)),
        3,
        {"None": None},
    ),
    Row(
        "end should be 'largest' with estimator='critical'",
        lambda: CurvatureProbe(1, "critical", "both"),
        {
            "'largest'": lambda: fit(CurvatureProbe(1, "critical", "largest")),
            "Use estimator='lanczos'": lambda: fit(CurvatureProbe(1, "lanczos", "both")),
        },
    ),
    argument(
        "scales should be different positive floats",
        lambda scales: fit(scanner(scales=scales)),
        [0.1, 0.1],
        {"different": [0.1, 0.2]},
    ),
    made(
        LossAlongEigvecScanner,
        "largest, smallest and random should not all be 0 where no plane is asked for.",
        {"largest": 0, "smallest": 0},
        largest={"largest": 1, "smallest": 0},
        random={"largest": 0, "smallest": 0, "random": 1},
        plane={"largest": 0, "smallest": 0, "plane": "random"},
    ),
    argument(
        "points should be an int of at least 3",
        lambda points: fit(scanner(points=points)),
        2,
        {"at least 3": 3},
    ),
    made(
        NegativeCurvatureTracker,
        "smallest should be a positive int where freeze_at is given",
        {"smallest": 0, "estimator": "online", "freeze_at": [1]},
        positive={"smallest": 1, "estimator": "online", "freeze_at": [1]},
    ),
    Row(
        "online_schedule is of no use with estimator='lanczos'.",
        lambda: NegativeCurvatureTracker(1, 1, online_schedule=Schedule(every_n_steps=1)),
        {
            "Use 'online'": lambda: fit(
                NegativeCurvatureTracker(1, 1, estimator="online", online_schedule=Schedule(every_n_steps=1))
            )
        },
    ),
    Row(
        "every_n_steps and schedule are of no use with smallest=0.",
        lambda: NegativeCurvatureTracker(1, 0, estimator="online"),
        {
            "Use online_schedule": lambda: fit(
                NegativeCurvatureTracker(smallest=0, estimator="online", online_schedule={"every_n_steps": 1}),
                max_steps=8,
            )
        },
    ),
    argument(
        "gamma should be a finite non-negative float", lambda g: fit(NudgedSGDHook(1, 1, g)), -1, {"non-negative": 0.0}
    ),
    argument("frozen should be a bool", lambda frozen: NudgedSGDHook(1, frozen=frozen), 1, {"bool": True}),
    argument(
        "annealing should be in [0, 1]",
        lambda share: fit(QuasiNewtonLRController(1, annealing=share)),
        1.5,
        {"[0, 1]": 1.0},
    ),
    made(
        SpectrumTracker,
        "largest and smallest should not both be 0.",
        {"largest": 0},
        largest={"largest": 1},
        smallest={"largest": 0, "smallest": 1},
    ),
    Row(
        "random_vectors should be 0 or at least 2, and not 0 where density_steps are asked for",
        lambda: SpectrumTracker(1, 1, density_steps=2),
        {
            "at least 2": lambda: fit(SpectrumTracker(1, 1, density_steps=2, random_vectors=2)),
            "0": lambda: fit(SpectrumTracker(1, 1, random_vectors=0)),
        },
    ),
    argument(
        "max_basis_vectors should be at least largest + smallest + 2 = 3, got 2.",
        lambda n: fit(SpectrumTracker(1, 1, max_basis_vectors=n)),
        2,
        {"3": 3},
    ),
    Row(
        "save_vectors needs save_dir",
        lambda: SpectrumTracker(1, save_vectors=True),
        {"save_dir": lambda: _writes_vectors()},
    ),
    Row(
        "schedule should have no max_overhead with estimator='benettin'",
        lambda: SpectrumTracker(schedule={"max_overhead": 0.1}, **BENETTIN),
        {"no max_overhead": lambda: fit(SpectrumTracker(schedule={"every_n_steps": 1}, largest=1, **BENETTIN))},
    ),
    *(
        Row(
            ESTIMATES,
            lambda wrong=wrong: SpectrumTracker(1, **BENETTIN, **wrong),
            {
                "should be left out": lambda: fit(SpectrumTracker(1, 1, **BENETTIN)),
                # as the page says
                "use a second SpectrumTracker with a log_prefix": lambda wrong=wrong: fit(
                    [SpectrumTracker(1, 1, **BENETTIN), SpectrumTracker(1, 1, log_prefix="second", **wrong)]
                ),
            },
        )
        for wrong in ({"random_vectors": 2}, {"groups": "layers"})
    ),
    *(
        Row(
            f"hessian should not have {of} with estimator='benettin', which follows the steps",
            lambda hessian=hessian: SpectrumTracker(1, hessian=hessian, **BENETTIN),
            {of: lambda: fit(SpectrumTracker(1, 1, **BENETTIN))},
        )
        for of, hessian in [
            ("data='fixed'", {"data": "fixed"}),
            ("data of its own", HessianConfig(data=loader())),
            ("num_batches", {"num_batches": 2}),
            ("fraction", {"fraction": 0.5}),
        ]
    ),
    argument(
        "data should be 'batch', 'fixed' or a DataLoader", lambda data: HessianConfig(data), [1], {"'fixed'": "fixed"}
    ),
    argument("fraction should be in (0, 1]", lambda share: HessianConfig(fraction=share), 2, {"(0, 1]": 1}),
    argument("seed should be an int", lambda seed: HessianConfig(seed=seed), True, {"an int": 1}),
    made(
        HessianConfig,
        "num_batches and fraction are two sizes of the same data",
        {"num_batches": 1, "fraction": 0.5},
        Leave_one_of_them_out={"num_batches": 1},
    ),
    *(
        Row(
            "num_batches=1 is a size of fixed data, and data='batch' is the batch of the step.",
            lambda kind=kind: kind(1, hessian={"num_batches": 1}),
            {
                "Use data='fixed'": lambda kind=kind: fit(kind(1, hessian={"num_batches": 1, "data": "fixed"})),
                "leave the size out": lambda kind=kind: fit(kind(1)),
            },
        )
        for kind in (CurvatureProbe, QuasiNewtonLRController)
    ),
    argument("loss_fn should be a function", lambda f: HessianConfig(loss_fn=f), "loss", {"a function": loss_fn}),
    argument("offload should be a bool", lambda value: HessianConfig(offload=value), 1, {"a bool": True}),
    argument("max_overhead should be in (0, 1)", lambda share: Schedule(max_overhead=share), 1, {"(0, 1)": 0.5}),
    argument(
        "thin_to should be at least every_n_steps, the distance that it lets grow",
        lambda n: Schedule(every_n_steps=10, thin_to=n),
        5,
        {"at least every_n_steps": 10},
    ),
    made(
        Schedule,
        "A schedule should have at least one of every_n_steps, every_n_epochs, … and at_steps",
        {},
        every__n__steps={"every_n_steps": 1},
        every__n__epochs={"every_n_epochs": 1},
        first__n__steps={"first_n_steps": 1},
        max__overhead={"max_overhead": 0.1},
        at__steps={"at_steps": [1]},
    ),
    *(
        argument(
            f"freeze_at should {says}", lambda at: NegativeCurvatureTracker(1, freeze_at=at), wrong, {says: [0, 2]}
        )
        for says, wrong in [
            ("be a list of steps", 2),
            ("hold non-negative ints", [-1]),
            ("hold each step once", [2, 2]),
        ]
    ),
    argument(
        "name should be one of eigenvalues",
        lambda name: plt.close(fit(NudgedSGDHook(1, 1)).plot(name)),
        "spectrum",
        {"eigenvalues": "eigenvalues"},
    ),
    Row(
        "NudgedSGDHook has measured nothing yet that could be drawn.",
        lambda: NudgedSGDHook(1, 1).plot(),
        {"Fit a module with it first": lambda: plt.close(fit(NudgedSGDHook(1, 1)).plot())},
    ),
    argument(
        "ax should be Axes of Matplotlib",
        lambda at: _drawn_on(at),
        "figure",
        {"Axes of Matplotlib": "axes"},
    ),
    argument(
        "ax should have three dimensions for this figure: subplot_kw={'projection': '3d'}.",
        lambda options: _surface_on(options),
        {},
        {"subplot_kw={'projection': '3d'}": {"projection": "3d"}},
    ),
]


def _writes_vectors() -> None:
    with tempfile.TemporaryDirectory() as folder:
        fit(SpectrumTracker(1, 1, save_dir=folder, save_vectors=True))


def _drawn_on(what: str) -> None:
    figure, axes = plt.subplots()
    fit(NudgedSGDHook(1, 1)).plot(ax=axes if what == "axes" else figure)
    assert axes.lines
    plt.close(figure)


def _surface_on(options: dict[str, str]) -> None:
    figure, axes = plt.subplots(subplot_kw=options)
    try:
        fit(scanner(largest=2, plane=Plane(points=3)), max_steps=1).plot("plane_surface", ax=axes)
    finally:
        plt.close(figure)


# The module


class Manual(Module):
    """Takes its own steps."""

    def __init__(self, loss: Any = None) -> None:
        super().__init__(loss=loss)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(bowl(self.w))
        optimizer.step()


class TakesTheIterator(Module):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        next(dataloader_iter)
        return bowl(self.w)


class Draws(Module):
    """Takes something from an attribute in each step."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.source = source

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return bowl(self.w) * next(iter(self.source)).mean()


class DrawsFromBelow(Draws):
    """The same, out of the sight of a check of the step."""

    def __init__(self, source: Any) -> None:
        super().__init__([])
        self.source = SimpleNamespace(inner=source)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return bowl(self.w) * next(iter(vars(self.source)["inner"])).mean()


def items() -> Iterator[Tensor]:
    while True:
        yield torch.ones(1, dtype=torch.float64)


class Frozen(Module):
    """One in which nothing is trained."""

    def __init__(self) -> None:
        super().__init__(loss=lambda module, batch: None)
        self.w.requires_grad_(False)


class Complex(Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, dtype=torch.complex128))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (CURVATURES * self.w.abs().square()).sum() / 2


class TwoParts(Module):
    """Real and imaginary parts in a parameter of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (CURVATURES * torch.view_as_complex(self.w).abs().square()).sum() / 2


class Half(Module):
    """Has a kernel that knows half precision only."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.float32)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        found = nn.functional.linear(self.w[None], torch.eye(3))[0]
        if found.dtype is not torch.bfloat16:
            raise RuntimeError("expected scalar type BFloat16 but found Float")
        return bowl(found.float())


library: Any = types.ModuleType("a_library_in_c")
"""Keeps what it is handed where Python cannot look."""
library.__file__ = f"{sysconfig.get_path('purelib')}/{library.__name__}.py"  # so it looks installed


class Thing:
    """Something of the module's own."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight, self.scale = weight, 1.0


class HandsOver(Module):
    """Hands an object of its own to a library."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.thing, self.when = Thing(self.w), when
        library.slot = np.array([None], dtype=object)

    def on_fit_start(self) -> None:
        if self.when == "at the start":
            library.slot[0] = self.thing

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.when == "in the step":
            library.slot[0] = library.slot[0] or self.thing
        return bowl(self.w) * library.slot[0].scale


def noisy(draw: Callable[[], float]) -> Callable[[Any, Any], Tensor]:
    """A loss with a little noise."""
    return lambda module, batch: bowl(module.w) * (1 + 0.002 * draw())


def stopped(module: Any, batch: Any) -> Tensor:
    """A loss of which a part is stopped."""
    return bowl(module.w) + 3 * module.w[0] * module.w[1:].detach().square().sum()


def is_measured_in_half_precision(callback: Any) -> None:
    fit(callback, narrow())


def narrow(dtype: torch.dtype = torch.bfloat16) -> Module:
    return Module().to(dtype)


TO_A_LOSS = {
    "Define curvature_loss(self, batch)": lambda make: fit(CurvatureProbe(1), with_own_loss(make())),
    "HessianConfig(loss_fn=...)": lambda make: fit(CurvatureProbe(1, hessian=HessianConfig(loss_fn=loss_fn)), make()),
}

HALF = "at nearby parameters, which are lost in the rounding of torch.bfloat16 (w)."
KEEP = "Keep the parameters in float32"
EXACT = "measure with exact products: "
DIFFERENCES = {"hessian": {"method": "finite_difference"}}

MODULES = [
    *(
        Row(
            says,
            lambda make=make: fit(CurvatureProbe(1), make()),
            {remedy: lambda act=act, make=make: act(make) for remedy, act in TO_A_LOSS.items()},
        )
        for says, make in [
            ("cannot replay the training_step of a module with manual optimization", Manual),
            ("that draws from self.source: a generator cannot be copied", lambda: Draws(items())),
        ]
    ),
    Row(
        "that draws from self.source: a generator cannot be copied",
        lambda: fit(CurvatureProbe(1), Draws(items())),
        {"Keep a list in its place": lambda: fit(CurvatureProbe(1), Draws([torch.ones(1, dtype=torch.float64)]))},
    ),
    Row(
        "The training step draws from a generator, which cannot be copied",
        lambda: fit(NudgedSGDHook(1, 1), DrawsFromBelow(items())),
        {
            "Keep a list": lambda: fit(NudgedSGDHook(1, 1), DrawsFromBelow([torch.ones(1, dtype=torch.float64)])),
            "or a DataLoader that is iterated anew": lambda: fit(
                NudgedSGDHook(1, 1), DrawsFromBelow(DataLoader(torch.ones(4, dtype=torch.float64)))
            ),
            "define curvature_loss(self, batch)": lambda: fit(
                NudgedSGDHook(1, 1), with_own_loss(DrawsFromBelow(items()))
            ),
        },
    ),
    Row(
        "cannot replay a training_step that takes dataloader_iter",
        lambda: fit(CurvatureProbe(1), TakesTheIterator()),
        {"Let training_step take batch": lambda: fit(CurvatureProbe(1), Module())},
    ),
    Row(
        "QuasiNewtonLRController cannot steer a module with manual optimization",
        lambda: fit(QuasiNewtonLRController(1), Manual()),
        {"Use automatic optimization": lambda: fit(QuasiNewtonLRController(1), Module())},
    ),
    Row(
        "needs a module with trainable parameters, but Frozen has none.",
        lambda: fit(CurvatureProbe(1), Frozen()),
        {
            "Remove the callback": lambda: fit([], Frozen()),
            "set requires_grad on the parameters that are to be trained": lambda: fit(CurvatureProbe(1), Module()),
        },
    ),
    Row(
        "measures the curvature along real parameters, but w of Complex are torch.complex128.",
        lambda: fit(CurvatureProbe(1), Complex()),
        {"torch.view_as_complex in forward": lambda: fit(CurvatureProbe(1), TwoParts())},
    ),
    Row(
        "cannot find 5 eigenvalues of a model with 3 trainable parameters. Ask for fewer.",
        lambda: fit(SpectrumTracker(1, 5)),
        {"Ask for fewer": lambda: fit(SpectrumTracker(1, 3))},
    ),
    Row(
        "the group 'head' matches no trainable parameter of Module. Its parameters are w.",
        lambda: fit(SpectrumTracker(1, 1, groups={"head": "head.*"})),
        {"Its parameters are w": lambda: fit(SpectrumTracker(1, 1, groups={"head": "w"}))},
    ),
    *(
        Row(
            f"{type(wrong()).__name__} evaluates the loss or its gradient {HALF}",
            lambda wrong=wrong: fit(wrong(), narrow()),
            {
                KEEP: lambda wrong=wrong: fit(wrong(), Module()),
                EXACT + remedy: lambda right=right: is_measured_in_half_precision(right()),
            },
        )
        for remedy, wrong, right in [
            ("estimator='lanczos'", lambda: CurvatureProbe(1, "lyapunov", iterations=25), lambda: CurvatureProbe(1)),
            ("estimator='lanczos'", lambda: CurvatureProbe(1, "critical"), lambda: CurvatureProbe(1)),
            (
                "estimator='lanczos' and method='auto'",
                lambda: CurvatureProbe(1, "critical", **DIFFERENCES),
                lambda: CurvatureProbe(1),
            ),
            ("estimator='lanczos'", lambda: SpectrumTracker(1, 1, **BENETTIN), lambda: SpectrumTracker(1, 1)),
            ("method='auto'", lambda: SpectrumTracker(1, 1, **DIFFERENCES), lambda: SpectrumTracker(1, 1)),
            ("method='auto'", lambda: NudgedSGDHook(1, 1, **DIFFERENCES), lambda: NudgedSGDHook(1, 1)),
        ]
    ),
    Row(
        f"LossAlongEigvecScanner evaluates the loss or its gradient {HALF} Keep … precision does.",
        lambda: fit(scanner(), narrow()),
        {KEEP: lambda: fit(scanner(), Module())},
    ),
    *(
        Row(
            "measures updates as differences of parameters, which are lost in the rounding of torch.bfloat16.",
            lambda rule=rule: fit(QuasiNewtonLRController(1, rule), narrow()),
            {
                "Use mixed precision": lambda rule=rule: fit(
                    QuasiNewtonLRController(1, rule), narrow(torch.float32), precision="bf16-mixed"
                )
            },
        )
        for rule in ("batch_sharpness", "inverse_sharpness")
    ),
    *(
        Row(
            says,
            lambda wrong=wrong: run(NudgedSGDHook(1, 1, hessian=HessianConfig(loss_fn=wrong)), max_steps=1),
            {remedy: lambda: fit(NudgedSGDHook(1, 1, hessian=HessianConfig(loss_fn=loss_fn)))},
        )
        for says, remedy, wrong in [
            (
                "The step returned a mapping without the key 'loss', with 'value'.",
                "Let it return the loss",
                lambda module, batch: {"value": bowl(module.w)},
            ),
            (
                "The step should return a scalar tensor, got tuple.",
                "Let it return the loss",
                lambda module, batch: (1.0,),
            ),
        ]
    ),
    Row(
        "cannot be computed in float32, so its curvature is measured in half precision",
        lambda: fit(NudgedSGDHook(1, 1, tol=0.1), Half(), precision="bf16-mixed"),
        {
            "give a curvature_loss that does without this kernel": lambda: fit(
                NudgedSGDHook(1, 1), with_own_loss(Half()), precision="bf16-mixed"
            )
        },
    ),
    Row(
        "The training step hands … of the module to",
        lambda: fit(NudgedSGDHook(1, 1), HandsOver("in the step"), max_steps=3),
        {
            "Hand it over outside of the step, for example in on_fit_start": lambda: fit(
                NudgedSGDHook(1, 1), HandsOver("at the start"), max_steps=3
            ),
            "define curvature_loss(self, batch)": lambda: fit(
                NudgedSGDHook(1, 1), with_own_loss(HandsOver("in the step")), max_steps=3
            ),
        },
    ),
    *(
        Row(
            f"the measurement at step 0 has not converged. {says}",
            lambda wrong=wrong, how=method: run(SpectrumTracker(2, 1, hessian={"method": how}), wrong(), max_steps=1),
            {
                remedy: lambda right=right, how=method: fit(
                    SpectrumTracker(2, 1, hessian={"method": how}), right(), max_steps=1
                )
            },
        )
        for says, remedy, method, wrong, right in [
            (
                "The products are random",
                "PyTorch's global generators",
                "finite_difference",
                lambda: Module(loss=noisy(lambda: random.SystemRandom().gauss(0, 1))),
                lambda: Module(loss=noisy(lambda: float(torch.randn(())))),
            ),
            (
                "The products are not those of a symmetric matrix",
                "out of the measurement with a curvature_loss",
                "finite_difference",
                lambda: Module(loss=stopped),
                lambda: with_own_loss(Module(loss=stopped)),
            ),
        ]
    ),
]


# The data


class WithSamples(Module):
    """Logs a value in its step, with the number of samples where it is told to."""

    def __init__(self, batch_size: int | None) -> None:
        super().__init__()
        self.batch_size = batch_size

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("value", 1.0, **({} if self.batch_size is None else {"batch_size": self.batch_size}))
        return bowl(self.w)


class NoTensor:
    """A batch that does not tell its size."""


def of_objects() -> DataLoader:
    return DataLoader(range(8), 4, collate_fn=lambda batch: NoTensor())


OWN = "cannot take its data from the DataLoader in HessianConfig(data=...), since … Stream, cannot be read"

DATA = [
    Row(
        "SpectrumTracker cannot take a fraction of data without a length as its fixed data.",
        lambda: run(SpectrumTracker(1, 1), data=DataLoader(Stream(), 4)),
        {
            "Pass HessianConfig(num_batches=...)": lambda: fit(
                SpectrumTracker(1, 1, hessian={"num_batches": 1}), data=DataLoader(Stream(), 4)
            ),
            "give the dataloader a length": lambda: fit(
                SpectrumTracker(1, 1), data=DataLoader(StreamWithLength(), 4), max_steps=4
            ),
        },
        also=("kept on the way",),
    ),
    *(
        Row(
            OWN,
            lambda size=size: run(SpectrumTracker(1, 1, hessian=HessianConfig(DataLoader(Stream(), 4), **size))),
            {
                "over a dataset with indices, such as a Subset": lambda size=size: fit(
                    SpectrumTracker(1, 1, hessian=HessianConfig(DataLoader(Subset(loader().dataset, [0, 1])), **size))
                ),
                "TensorDataset": lambda size=size: fit(SpectrumTracker(1, 1, hessian=HessianConfig(loader(), **size))),
            },
        )
        for size in ({}, {"num_batches": 1}, {"fraction": 0.5})
    ),
    Row(
        "kept on the way, since an IterableDataset, StreamWithLength, cannot be read a second time.",
        lambda: run(SpectrumTracker(1, 1), data=DataLoader(StreamWithLength(), 4), max_steps=3),
        {"a plain DataLoader": lambda: fit(SpectrumTracker(1, 1))},
    ),
    Row(
        "no directions are frozen at step 0, since the fixed data are not complete yet.",
        lambda: run(
            NegativeCurvatureTracker(1, 1, freeze_at=[0], hessian={"num_batches": 2}), data=DataLoader(Stream(), 4)
        ),
        {"Freeze later": lambda: _frozen_at(2)},
        also=("kept on the way",),
    ),
    Row(
        "The number of samples in a batch of type NoTensor is not known.",
        lambda: run(SpectrumTracker(1, 1, hessian={"num_batches": 2}), WithSamples(None), of_objects()),
        {
            "batch_size= to self.log": lambda: fit(
                SpectrumTracker(1, 1, hessian={"num_batches": 2}), WithSamples(4), of_objects()
            ),
            "HessianConfig(batch_size_fn=...)": lambda: fit(
                SpectrumTracker(1, 1, hessian={"num_batches": 2, "batch_size_fn": lambda batch: 4}),
                Module(),
                of_objects(),
            ),
        },
    ),
]


def _frozen_at(step: int) -> None:
    tracker = NegativeCurvatureTracker(1, 1, freeze_at=[step], hessian={"num_batches": 1})
    fit(tracker, data=DataLoader(Stream(), 4), max_steps=step + 1)
    assert step in tracker.results[-1].frozen


# The Trainer


def on(strategy: Any, world_size: int = 1) -> Any:
    """As much of a trainer as the check looks at."""
    return SimpleNamespace(strategy=strategy, world_size=world_size)


def accepts(trainer: Any, mode: Any = "train") -> None:
    module = Module()
    module.norm = nn.SyncBatchNorm(2)
    check_objective("CurvatureProbe", trainer, module, HessianConfig(mode=mode))


def curves() -> None:
    logger = MemoryLogger()
    fit(CurvatureProbe(1), logger=logger)
    assert logger.curve("curvature/lambda_max")


def nudge(every: int, log_prefix: str | None = None) -> NudgedSGDHook:
    return NudgedSGDHook(every, 1, log_prefix=log_prefix)


def negative(every: int, log_prefix: str | None = None) -> NegativeCurvatureTracker:
    return NegativeCurvatureTracker(every, 1, log_prefix=log_prefix)


nudge.__name__, negative.__name__ = NudgedSGDHook.__name__, NegativeCurvatureTracker.__name__


def two(kind: Any, *prefixes: str | None) -> list[Any]:
    return [kind(every, log_prefix=prefix) for every, prefix in enumerate(prefixes, 1)]


def tables(*folders: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fit([SpectrumTracker(1, count, save_dir=f"{folder}/{name}") for count, name in enumerate(folders, 1)])


TRAINERS = [
    *(
        Row(
            f"Two {kind.__name__} of this Trainer would log under the same tags",
            lambda kind=kind: run(two(kind, None, None)),
            {f"{kind.__name__}(log_prefix='second')": lambda kind=kind: fit(two(kind, None, "second"))},
        )
        for kind in (CurvatureProbe, negative)
    ),
    *(
        Row(
            f"A Trainer can have one {kind.__name__}, got 2",
            lambda kind=kind: run(two(kind, None, "second")),
            {"Remove all but one": lambda kind=kind: fit(kind(1))},
        )
        for kind in (QuasiNewtonLRController, nudge)
    ),
    Row(
        "would write to one file, …spectrum.csv.",
        lambda: tables("a", "a"),
        {"Give each a save_dir of its own": lambda: tables("a", "b")},
    ),
    Row(
        "cannot measure the flat parameters of FSDPStrategy (FSDP1)",
        lambda: accepts(on(FSDPStrategy())),
        {"Use strategy=ModelParallelStrategy(...)": lambda: accepts(on(ModelParallelStrategy()))},
    ),
    Row(
        "cannot get the whole parameters from SimpleNamespace",
        lambda: accepts(on(SimpleNamespace())),
        {
            "on a single device": lambda: accepts(on(SingleDeviceStrategy())),
            "strategy='ddp'": lambda: accepts(on(DDPStrategy())),
            "ModelParallelStrategy": lambda: accepts(on(ModelParallelStrategy())),
        },
    ),
    Row(
        "cannot differentiate SyncBatchNorm twice in training mode.",
        lambda: accepts(on(DDPStrategy(), 2)),
        {"Use HessianConfig(mode='eval')": lambda: accepts(on(DDPStrategy(), 2), "eval")},
    ),
    Row(
        "the Trainer has no logger",
        lambda: run(CurvatureProbe(1), logger=False),
        {"Pass a logger to the Trainer": curves},
    ),
    Row(
        "the Trainer logs nothing (log_every_n_steps=0), so nothing is measured either.",
        lambda: run(SpectrumTracker(largest=1), log_every_n_steps=0),
        {"Pass every_n_steps": lambda: fit(SpectrumTracker(1, 1), log_every_n_steps=0)},
    ),
    Row(
        "it measures while trainer.fit trains, and nothing during trainer.validate.",
        lambda: _validated(),
        {
            "lyapunov_lightning.measure(module, data)": lambda: np.testing.assert_allclose(
                measure(Module(), loader(), progress=False).values, [3.0], rtol=1e-3
            )
        },
    ),
    Row(
        "its state in the checkpoint … is not whole",
        lambda: resumed(lambda state: state.update(version=99)),
        {"from another checkpoint": lambda: resumed(lambda state: None)},
    ),
]


def _validated() -> None:
    class Validated(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", callbacks=[CurvatureProbe()], enable_checkpointing=False, **quiet)
    trainer.validate(Validated(), loader(), verbose=False)


def resumed(change: Callable[[dict[str, Any]], None]) -> None:
    """A run that goes on from a checkpoint in which the state of its callback was changed."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/run.ckpt"
        settings = {"logger": MemoryLogger(), "default_root_dir": folder}
        train(Module(), SpectrumTracker(1, 1), loader=loader(), max_steps=2, **settings).save_checkpoint(path)
        checkpoint = torch.load(path, weights_only=True)
        [state] = [state for name, state in checkpoint["callbacks"].items() if name.startswith("SpectrumTracker")]
        change(state)
        torch.save(checkpoint, path)
        tracker = SpectrumTracker(1, 1)
        train(Module(), tracker, loader=loader(), max_steps=4, ckpt_path=path, **settings)
        is_right(tracker)
        assert [result.step for result in tracker.results] == [0, 1, 2, 3]


# The optimizer


def optimized(make: Callable[[Any], Any]) -> Module:
    """A module with an optimizer, from its parameters."""
    return Module(lambda module: make(module.parameters()))


def by_groups(**second: Any) -> Callable[[Any], Any]:
    """SGD with two parameter groups, for a module of two parameters."""

    def make(module: Any) -> SGD:
        return SGD([{"params": [module.w]}, {"params": [module.v], **second}], lr=0.1)

    return make


class TwoParameters(Module):
    def __init__(self, optimizer: Any, is_trained: bool = True) -> None:
        super().__init__(optimizer, lambda module, batch: bowl(module.w) + module.v.square().sum() / 2)
        self.v = nn.Parameter(torch.ones(1, dtype=torch.float64), requires_grad=is_trained)


class OwnSGD(SGD):
    """Somebody's own, of which nobody knows how it steps."""


class WarmsUp(Module):
    """Sets the learning rate itself, from some step on."""

    def __init__(self, first: int | None) -> None:
        super().__init__()
        self.first = first

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.first is not None and self.global_step >= self.first:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 + self.global_step)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class SeveralOptimizers(Manual):
    def configure_optimizers(self) -> Any:
        return [SGD([self.w], lr=0.01), SGD([self.w], lr=0.01)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(bowl(self.w))
            optimizer.step()


class Scaled:
    """As much of a trainer as the check of scaled gradients looks at."""

    def __init__(self, fused: bool, scaler: Any) -> None:
        self.optimizers = [SimpleNamespace(param_groups=[{"fused": fused}])]
        self.precision_plugin = SimpleNamespace(scaler=scaler)


def controlled(make: Callable[[Any], Any], *others: Any, rule: Any = "along_update", **options: Any) -> None:
    fit([QuasiNewtonLRController(1, rule, **options), *others], optimized(make))


def controlled_or_not(make: Callable[[Any], Any]) -> dict[str, Any]:
    return {
        "Use SGD": lambda: controlled(lambda p: SGD(p, lr=0.1)),
        "Adam": lambda: controlled(lambda p: Adam(p, lr=0.1)),
        "or take the callback out": lambda: fit([], optimized(make)),
    }


def maximizing(parameters: Any) -> SGD:
    return SGD(parameters, lr=1e-3, maximize=True)


def plain(parameters: Any) -> SGD:
    return SGD(parameters, lr=0.1)


def along(callback: Any) -> None:
    fit(callback, Module(lambda module: None))


LOWER = "at the lower end of the spectrum, which is not the optimizer here."
UNIFORM = "which requires one torch.optim.SGD with the same learning rate for all of them, but"

OPTIMIZERS = [
    Row(
        f"CurvatureProbe follows the map of SGD with one parameter group and plain or heavy-ball momentum {LOWER}",
        lambda: run(CurvatureProbe(1, "lyapunov", "both"), optimized(Adam)),
        {
            "Use estimator='lanczos'": lambda: fit(CurvatureProbe(1, "lanczos", "both"), optimized(Adam)),
            "or ask for the upper end only": lambda: fit(
                CurvatureProbe(1, "lyapunov", "largest", iterations=25), optimized(Adam)
            ),
        },
    ),
    Row(
        f"SpectrumTracker follows the map of SGD with one parameter group and no momentum {LOWER}",
        lambda: run(SpectrumTracker(1, 1, 1, **BENETTIN), optimized(Adam)),
        {
            "Use estimator='lanczos'": lambda: fit(SpectrumTracker(1, 1, 1), optimized(Adam)),
            "or ask for the upper end only": lambda: fit(SpectrumTracker(1, 1, 0, **BENETTIN), optimized(Adam)),
        },
    ),
    *(
        Row(
            f"{UNIFORM} {cause}",
            lambda make=make: run(NudgedSGDHook(1, 1), make()),
            {
                "Use such an optimizer": lambda: fit(NudgedSGDHook(1, 1), optimized(plain)),
                "or remove the callback": lambda make=make: fit([], make()),
            },
        )
        for cause, make in [
            ("…", lambda: optimized(Adam)),
            ("the parameter groups have different lr", lambda: TwoParameters(by_groups(lr=0.2))),
        ]
    ),
    Row(
        f"{UNIFORM} it does not train v, which should then not require a gradient.",
        lambda: run(NudgedSGDHook(1, 1), TwoParameters(lambda module: plain([module.w]))),
        {
            "should then not require a gradient": lambda: fit(
                NudgedSGDHook(1, 1), TwoParameters(lambda module: plain([module.w]), is_trained=False)
            )
        },
    ),
    Row(
        "needs the gradients unscaled, which a fused optimizer does only in its step.",
        lambda: check_unscaled("NudgedSGDHook", Scaled(True, "scaler")),
        {
            "Use fused=False": lambda: check_unscaled("NudgedSGDHook", Scaled(False, "scaler")),
            "precision='bf16-mixed'": lambda: check_unscaled("NudgedSGDHook", Scaled(True, None)),
        },
    ),
    Row(
        "which LBFGS would take for a change of the gradient along its own step.",
        lambda: run(NegativeCurvatureTracker(1, 1, descent={}), optimized(torch.optim.LBFGS)),
        {
            "Use another optimizer": lambda: fit(NegativeCurvatureTracker(1, 1, descent={}), optimized(plain)),
            "do not ask for the descent": lambda: fit(
                NegativeCurvatureTracker(1, 1), optimized(lambda p: torch.optim.LBFGS(p, lr=0.1))
            ),
        },
    ),
    Row(
        "sets the learning rate, and so does StepLR.",
        lambda: run(QuasiNewtonLRController(1), Module(scheduled)),
        {
            "Return the optimizer alone from configure_optimizers": lambda: fit(
                QuasiNewtonLRController(1), Module(lambda module: scheduled(module)[0][0])
            ),
        },
    ),
    Row(
        "sets the learning rate, and so does StepLR.",
        lambda: configured("--lr_scheduler=torch.optim.lr_scheduler.StepLR", "--lr_scheduler.step_size=1"),
        {"or leave lr_scheduler out of the configuration": lambda: configured()},
    ),
    Row(
        "needs an optimizer to steer, and configure_optimizers returned none.",
        lambda: run(QuasiNewtonLRController(1), Module(lambda module: None)),
        {
            "Return one": lambda: fit(QuasiNewtonLRController(1), optimized(plain)),
            "or take the callback out": lambda: fit([], Module(lambda module: None)),
        },
    ),
    Row(
        "cannot steer LBFGS",
        lambda: controlled(torch.optim.LBFGS),
        {"Use SGD": lambda: controlled(plain), "Adam": lambda: controlled(lambda p: Adam(p, lr=0.1))},
    ),
    Row(
        "cannot steer SGD, which goes uphill (maximize). Use SGD, Adam or any other optimizer",
        lambda: controlled(maximizing),
        controlled_or_not(maximizing),
    ),
    Row(
        "cannot steer Rprop, which takes steps … Use SGD, Adam or any other optimizer",
        lambda: controlled(torch.optim.Rprop),
        controlled_or_not(torch.optim.Rprop),
    ),
    Row(
        "sets the learning rate, and so does StochasticWeightAveraging.",
        lambda: controlled(plain, StochasticWeightAveraging(0.1, swa_epoch_start=1)),
        {
            "Use one of the two": lambda: controlled(plain),
            "or WeightAveraging": lambda: controlled(plain, WeightAveraging()),
        },
    ),
    Row(
        "needs an optimizer with a positive learning rate lr in every parameter group",
        lambda: controlled(lambda p: SGD(p, lr=0.0)),
        {"a positive learning rate": lambda: controlled(lambda p: SGD(p, lr=1e-6))},
    ),
    Row(
        "QuasiNewtonLRController(rule='inverse_sharpness') is the paper's rule for SGD",
        lambda: controlled(Adam, rule="inverse_sharpness"),
        {
            "Use rule='along_update'": lambda: controlled(Adam, rule="along_update"),
            "or force=True": lambda: controlled(Adam, rule="inverse_sharpness", force=True),
        },
    ),
    Row(
        "QuasiNewtonLRController does not know the stability limit of OwnSGD.",
        lambda: controlled(lambda p: OwnSGD(p, lr=0.1), rule="batch_sharpness"),
        {"Use rule='along_update'": lambda: controlled(lambda p: OwnSGD(p, lr=0.1), rule="along_update")},
    ),
    *(
        Row(
            says,
            lambda first=first: run(QuasiNewtonLRController(1), WarmsUp(first), max_steps=2),
            {
                "Leave one of the two out": lambda: (
                    fit(QuasiNewtonLRController(1), WarmsUp(None), max_steps=2),
                    run([], WarmsUp(0), max_steps=2),
                )
            },
        )
        for says, first in [
            ("sets the learning rate, and the learning rate was set to … Leave one of the two out", 0),
            ("at step 1 the learning rate was set to … It is set again here. This is said once.", 1),
        ]
    ),
    *(
        Row(
            f"measures along the update of the one optimizer, and here are {count}.",
            lambda make=make: run(CurvatureProbe(1, "critical"), make()),
            {"Use estimator='lanczos'": lambda make=make: fit(CurvatureProbe(1, "lanczos"), make())},
        )
        for count, make in [
            (0, lambda: Module(lambda module: None)),
            (2, lambda: with_own_loss(SeveralOptimizers())),
        ]
    ),
    Row(
        "the optimizer has no learning rate, so scan/expected_change_... is left out.",
        lambda: run(scanner(sgd_steps=(1.0,)), optimized(WithoutRate)),
        {"need an lr": lambda: fit(scanner(sgd_steps=(1.0,)))},
    ),
]


class WithoutRate(torch.optim.Optimizer):
    """Moves a little down, and has no learning rate."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(1e-3 * parameter.grad)
        return loss


def scheduled(module: Any) -> Any:
    optimizer = plain(module.parameters())
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Bare(pl.LightningModule):
    """Leaves its optimizer to the configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return bowl(self.w)


def configured(*more: str) -> None:
    """A training by a command line, with an optimizer and what else its configuration has."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    with tempfile.TemporaryDirectory() as folder:
        cli = LightningCLI(
            Bare,
            args=["--optimizer=torch.optim.SGD", "--optimizer.lr=0.1", *more],
            trainer_defaults={"max_steps": 2, "logger": False, "default_root_dir": folder, **quiet},
            save_config_callback=None,
            run=False,
        )
        controller = QuasiNewtonLRController(1)
        cli.trainer.loggers = [MemoryLogger()]
        cli.trainer.callbacks.append(controller)
        cli.trainer.fit(cli.model, loader())
        assert controller.results


# What is said while a run goes on


class Spoilt(Module):
    """Its loss is NaN from some step on, as where the data are."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return bowl(self.w) * (torch.nan if self.global_step >= self.first else 1.0)


class Split(Module):
    """Two eigenvalues above a bulk that few products cannot resolve."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(32, dtype=torch.float64))
        self.curvatures = torch.cat([torch.tensor([3.0, 2.0]), torch.linspace(0.1, 0.2, 30)]).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.curvatures * self.w.square()).sum() / 2


def nudged_in_few_products(k: int, tol: float) -> None:
    few = partial(nudged_sgd_hook.lanczos, max_matvecs=12)
    with mock.patch.object(nudged_sgd_hook, "lanczos", few):
        fit(NudgedSGDHook(1, k, tol=tol), Split(), max_steps=1)


def convex(module: Any, batch: Any) -> Tensor:
    return (CURVATURES.abs() * module.w.square()).sum() / 2


def at_rate(lr: float) -> CurvatureProbe:
    """A training of some length on a convex loss, whose limit lies at 2/3."""
    return fit(CurvatureProbe(4), Module(lambda module: SGD(module.parameters(), lr=lr), convex), max_steps=32)


def of_unknown_length(**options: Any) -> None:
    fit(QuasiNewtonLRController(5), data=DataLoader(Stream(), 4), **{"max_steps": -1, "max_epochs": 1, **options})


def with_all_eigenvalues() -> None:
    probe = fit(CurvatureProbe(eigenvalue_every=1), max_steps=12, log_every_n_steps=10)
    assert all(result.lambda_max is not None for result in probe.results)


RUNS = [
    Row(
        "2 of 4 eigenpairs converged at step 0, … Ask for fewer, or raise tol",
        lambda: nudged_in_few_products(4, 1e-3),
        {
            "Ask for fewer": lambda: nudged_in_few_products(2, 1e-3),
            "or raise tol": lambda: nudged_in_few_products(4, 0.3),
        },
    ),
    Row(
        "the sharpness has been above the stability limit since step",
        lambda: at_rate(0.7),
        {"Lower the learning rate": lambda: at_rate(0.6)},
    ),
    Row(
        "what estimator='lyapunov' follows has come to rest, and not at an eigenvalue of a symmetric matrix",
        lambda: run(CurvatureProbe(1, "lyapunov", iterations=25), Module(loss=stopped), max_steps=1),
        {"estimator='lanczos'": lambda: run(CurvatureProbe(1, "lanczos"), Module(loss=stopped), max_steps=1)},
    ),
    Row(
        "so it is measured this once, and the batch sharpness at all measurements.",
        lambda: run(CurvatureProbe(), max_steps=12, log_every_n_steps=10),
        {"eigenvalue_every=1 asks for both each time": with_all_eigenvalues},
    ),
    Row(
        "the length of the training is not known, so the learning rate does not fall towards its end",
        of_unknown_length,
        {
            "Give the Trainer max_steps": lambda: of_unknown_length(max_steps=4),
            "or max_epochs and a dataloader with a length": lambda: fit(
                QuasiNewtonLRController(1), max_steps=-1, max_epochs=1
            ),
        },
    ),
    Row(
        "The learning rate stays at … from now on.",
        lambda: run(QuasiNewtonLRController(1, safeguard=False), Spoilt(2), max_steps=6),
        {"numbers in the data that are not finite": lambda: fit(QuasiNewtonLRController(1), max_steps=6)},
    ),
]

ROWS = [*ARGUMENTS, *MODULES, *DATA, *TRAINERS, *OPTIMIZERS, *RUNS]


@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_what_the_message_says_to_do_helps(row: Row) -> None:
    check(row)
