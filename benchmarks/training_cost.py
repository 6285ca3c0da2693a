"""What the callbacks add to a training: its CPU time with them over that without."""

import logging
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torchvision
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.axes import Axes
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from benchmarks.peers import excused
from benchmarks.problems import Batch, SmallTransformer, drawn, images
from benchmarks.report import Figure, Outcome, Settings, Table, dot, names_axis, spread
from benchmarks.timing import Sample, cpu_seconds
from benchmarks.workers import shared
from examples.models import MLP, Classifier, LeNet
from lyapunov_lightning import CurvatureProbe, QuasiNewtonLRController, Schedule, SpectrumTracker
from lyapunov_lightning.figures.style import BLUE, INK, OCHRE, RED, TEAL
from lyapunov_lightning.figures.ticks import log_axis

ABOUT = """\
CPU time of `Trainer.fit` with one callback over that without, in pairs that follow each other, from the same
parameters: metrics, a TensorBoard logger, data in memory, one thread; SGD with momentum for the networks on images. All
that the callback does is in it, the first (cold) measurement and the figure at the end of so short a run as well:
longer runs pay less. The last row of ours is of steps in which the probe does not measure. Cockpit has no callback for
Lightning; its `HessMaxEV` (power iteration for the eigenvalue of largest modulus) is set beside the same loop in plain
PyTorch."""


@dataclass(frozen=True)
class Way:
    """A callback, as it is asked to measure.

    Attributes:
        callback: Makes it.
        steps: How many a run has; 0 for those of an epoch.
        bound: The target.
        repeats: How often it is measured at most.
        milliseconds: The longest step of a network with which it is tried.
        counted_from: The step from which on the time is counted; that of the start of the run is in it at 0.

    """

    callback: Callable[[], pl.Callback]
    steps: int
    bound: float | None = None
    repeats: int = 3
    milliseconds: float = math.inf
    counted_from: int = 0


WAYS: dict[str, Way] = {
    "CurvatureProbe()": Way(lambda: CurvatureProbe(), 400, 1.1),
    "CurvatureProbe(), 2,000 steps": Way(lambda: CurvatureProbe(), 2000, 1.05, repeats=1, milliseconds=60),
    "CurvatureProbe(10)": Way(lambda: CurvatureProbe(10), 400, 1.6, repeats=2),
    'CurvatureProbe(1, "lyapunov")': Way(lambda: CurvatureProbe(1, "lyapunov"), 400, 2.2, repeats=2),
    "SpectrumTracker, every epoch": Way(lambda: SpectrumTracker(schedule=Schedule(every_n_epochs=1)), 0, 2.0),
    "QuasiNewtonLRController()": Way(lambda: QuasiNewtonLRController(), 300, 1.3, milliseconds=60),
    "a step without a measurement": Way(
        lambda: CurvatureProbe(schedule=Schedule(at_steps=(10**9,))), 300, 1.005, counted_from=20
    ),
}
COCKPIT = {"cockpit HessMaxEV, every 50 steps": 50, "cockpit HessMaxEV, every 10 steps": 10}


class LanguageModel(pl.LightningModule):
    """A small transformer on random words, by AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.network = SmallTransformer()

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """The loss of the next words."""
        words = batch[0]
        loss = functional.cross_entropy(self.network(words[:, :-1]), words[:, 1:])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As transformers are trained."""
        return torch.optim.AdamW(self.parameters(), 1e-3)


@dataclass(frozen=True)
class Setup:
    """A training.

    Attributes:
        network: Makes the network of a classifier of images; None for the language model.
        batch_size: Samples of a step.
        repeats: How often a callback is measured at most.

    """

    network: Callable[[], torch.nn.Module] | None
    batch_size: int
    repeats: int = 3

    def module(self) -> pl.LightningModule:
        """The module, with the same parameters each time."""
        torch.manual_seed(0)
        if self.network is None:
            return LanguageModel()
        return Classifier(self.network(), optimizer=lambda parameters: torch.optim.SGD(parameters, 0.02, momentum=0.9))

    def data(self, root: str | None, quick: bool = False) -> Batch:
        """What it is trained on: images of CIFAR-10 below `root`, else noise; or words."""
        if self.network is None:
            return (torch.randint(200, (4000, 65), generator=torch.Generator().manual_seed(0)),)
        return images(root, 32 if quick else IMAGES)


IMAGES = 10_000
"""Which make an epoch of 78 steps of 128."""

QUICK = "toy MLP, batch 8"

SETUPS = {
    "LeNet, batch 128": Setup(LeNet, 128),
    "MLP, batch 128": Setup(lambda: MLP(3072, [200, 200, 200]), 128),
    "transformer, AdamW, batch 16": Setup(None, 16),
    "ResNet-18, batch 32": Setup(lambda: torchvision.models.resnet18(num_classes=10), 32, repeats=1),
    QUICK: Setup(lambda: MLP(3072, [4]), 8),
}


class Clock(pl.Callback):
    """Takes the CPU time from a step on."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._began = 0.0
        self.seconds = 0.0

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self._step:
            self._began = time.process_time()

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds = time.process_time() - self._began


def seconds_of(setup: Setup, data: Batch, steps: int, callbacks: list[pl.Callback], counted_from: int = 0) -> float:
    """CPU time of one training, or of its steps from one on."""
    module, clock = setup.module(), Clock(counted_from)
    whole = cpu_seconds(lambda: train(module, data, setup.batch_size, steps, [clock, *callbacks]))
    return clock.seconds if counted_from else whole


def train(
    module: pl.LightningModule, data: Sequence[Tensor], batch_size: int, steps: int, callbacks: list[pl.Callback]
) -> None:
    """Some steps with a TensorBoard logger, and nothing else beside the callbacks."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            callbacks=callbacks,
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(TensorDataset(*data), batch_size, shuffle=True, drop_last=True))


def loop(setup: Setup, data: Batch, steps: int, interval: int | None) -> None:
    """A classifier in plain PyTorch, with cockpit or without."""
    assert setup.network is not None
    torch.manual_seed(0)
    network, criterion = setup.network(), torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9)
    batches = drawn(data, setup.batch_size)
    watch = _cockpit(network, criterion, interval) if interval else None
    for step in range(steps):
        inputs, labels = next(batches)
        optimizer.zero_grad()
        outputs = network(inputs)
        loss = criterion(outputs, labels)
        if watch is None:
            loss.backward()
        else:
            one_by_one = functional.cross_entropy(outputs.detach(), labels, reduction="none")
            info = {
                "batch_size": setup.batch_size,
                "individual_losses": one_by_one,
                "loss": loss,
                "optimizer": optimizer,
            }
            with watch(step, info=info):
                loss.backward(create_graph=watch.create_graph(step))
        optimizer.step()


def _cockpit(network: Any, criterion: Any, interval: int) -> Any:
    from backpack import extend
    from cockpit import Cockpit
    from cockpit.quantities import HessMaxEV
    from cockpit.utils import schedules

    extend(network)
    extend(criterion)
    return Cockpit(network.parameters(), quantities=[HessMaxEV(track_schedule=schedules.linear(interval))])


def work(name: str, settings: Settings) -> dict[str, Any]:
    """The ratios of all callbacks in one training, or why there are none."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    setup = SETUPS[name]
    data = setup.data(settings.root, settings.quick)
    seconds_of(setup, data, 2, [])
    few = 2 if settings.quick else 20
    step = 1e3 * seconds_of(setup, data, few, []) / few
    found: dict[str, Any] = {"ratios": {}, "steps": {}, "missing": {}, "ms": step}
    for kind, way in WAYS.items():
        if step > way.milliseconds and not settings.quick:
            found["missing"][kind] = "not tried: it takes long"
            continue
        steps = min(way.steps, few) if settings.quick else way.steps
        steps = steps or len(data[0]) // setup.batch_size
        seconds_of(setup, data, 2, [way.callback()])  # imports, and what libraries set up at the first call
        repeats = min(settings.repeats, way.repeats, setup.repeats)
        found["ratios"][kind] = _ratios(
            lambda steps=steps, way=way: seconds_of(setup, data, steps, [], way.counted_from),
            lambda steps=steps, way=way: seconds_of(setup, data, steps, [way.callback()], way.counted_from),
            repeats,
        )
        found["steps"][kind] = steps
    for kind, interval in COCKPIT.items():
        if setup.network is None or step > 60:
            found["missing"][kind] = "not tried"
            continue
        steps = 2 if settings.quick else 2 * interval
        with excused() as reasons:
            loop(setup, data, 1, interval)
            found["ratios"][kind] = _ratios(
                lambda steps=steps: cpu_seconds(lambda: loop(setup, data, steps, None)),
                lambda steps=steps, interval=interval: cpu_seconds(lambda: loop(setup, data, steps, interval)),
                settings.repeats,
            )
            found["steps"][kind] = steps
        if reasons:
            found["missing"][kind] = reasons[0]
    return found


def _ratios(plain: Callable[[], float], watched: Callable[[], float], repeats: int) -> list[float]:
    pairs = [(plain(), watched()) for _ in range(repeats)]
    return [with_it / without for without, with_it in pairs]


def run(settings: Settings) -> Outcome:
    """Measure."""
    started = time.perf_counter()
    # Long ones first, so that the processes end together.
    names = [QUICK] if settings.quick else [name for name in reversed(SETUPS) if name != QUICK]
    found = dict(zip(names, shared(work, names, settings.jobs, settings), strict=True))
    return outcome_of({name: found[name] for name in SETUPS if name in found}, time.perf_counter() - started)


def outcome_of(found: dict[str, dict[str, Any]], seconds: float) -> Outcome:
    """The figures and the table."""
    figures = [
        Figure(f"{setup}: CPU time with {name} over without", Sample(tuple(cells["ratios"][name])), way.bound)
        for name, way in WAYS.items()
        if way.bound is not None
        for setup, cells in found.items()
        if name in cells["ratios"]
    ]
    header = ["with", *(f"{setup} ({cells['ms']:.0f} ms a step)" for setup, cells in found.items())]
    rows = [[name, *(_cell(cells, name) for cells in found.values())] for name in (*WAYS, *COCKPIT)]
    ratios = {setup: cells["ratios"] for setup, cells in found.items()}
    table = Table("CPU time over that of the run without; steps of the run", header, rows)
    return Outcome("training", "Training with a callback", ABOUT, figures, [table], {"ratios": ratios}, seconds)


def _cell(cells: dict[str, Any], name: str) -> str:
    if name in cells["missing"]:
        return str(cells["missing"][name])
    sample = Sample(tuple(cells["ratios"][name]))
    return f"{spread(sample, 3 if sample.median < 1.02 else 2)}; {cells['steps'][name]}"


def draw(panel: Axes, plot: dict[str, Any]) -> None:
    """Time with over time without."""
    names = [*WAYS, *COCKPIT]
    names_axis(panel, names)
    colours = dict(zip(SETUPS, (RED, OCHRE, BLUE, TEAL, INK), strict=True))
    for shift, (setup, ratios) in enumerate(plot["ratios"].items()):
        labelled = False
        for height, name in enumerate(names):
            if name in ratios:
                label = "_" if labelled else setup
                sample = Sample(tuple(ratios[name]))
                dot(panel, sample, height + 0.15 * (shift - 1.5), color=colours[setup], label=label)
                labelled = True
    for height, name in enumerate(names):
        bound = WAYS[name].bound if name in WAYS else None
        if bound is not None:
            panel.plot([bound, bound], [height - 0.4, height + 0.4], color=INK, linewidth=0.8, linestyle=":")
    log_axis(panel, "x")
    panel.set_xlabel("CPU time over that without (dotted: targets)")
