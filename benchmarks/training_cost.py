"""What the callbacks add to a training: its time with them over its time without."""

import logging
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.axes import Axes
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers import excused
from benchmarks.problems import Batch, drawn, images
from benchmarks.report import Figure, Outcome, Settings, Table, dot, names_axis, spread
from benchmarks.timing import Sample, timed
from benchmarks.workers import shared
from examples.models import MLP, Classifier, LeNet
from lyapunov_lightning import CurvatureProbe, QuasiNewtonLRController, Schedule, SpectrumTracker
from lyapunov_lightning.figures.style import BLUE, INK, OCHRE, RED, TEAL
from lyapunov_lightning.figures.ticks import log_axis

ABOUT = """\
Time of `Trainer.fit` with one callback over its time without, in pairs that follow each other: SGD with momentum,
metrics, a TensorBoard logger, images in memory, one thread. All that the callback does is in it, the first (cold)
measurement and the figure at the end of a run of so few steps as well: longer runs pay less. Cockpit has no callback
for Lightning; its `HessMaxEV` (power iteration for the eigenvalue of largest modulus) is set beside the same loop in
plain PyTorch."""


@dataclass(frozen=True)
class Way:
    """A callback, as it is asked to measure.

    Attributes:
        callback: Makes it.
        seconds: About how long a plain run is to take.
        least: The fewest steps of a run.
        bound: The target.

    """

    callback: Callable[[], pl.Callback]
    seconds: float
    least: int
    bound: float | None = None


WAYS: dict[str, Way] = {
    "CurvatureProbe, default (every 50 steps)": Way(lambda: CurvatureProbe(), 4.0, 150, 1.1),
    "CurvatureProbe, every 10 steps": Way(lambda: CurvatureProbe(10), 1.0, 50, 1.6),
    "CurvatureProbe, every step": Way(lambda: CurvatureProbe(1), 0.3, 15),
    "CurvatureProbe, every step, lyapunov": Way(lambda: CurvatureProbe(1, estimator="lyapunov"), 1.0, 40, 2.2),
    "SpectrumTracker, every epoch": Way(lambda: SpectrumTracker(schedule=Schedule(every_n_epochs=1)), 1.0, 0),
    "QuasiNewtonLRController": Way(lambda: QuasiNewtonLRController(), 1.0, 60),
}
COCKPIT = {"cockpit HessMaxEV, every 50 steps": 50, "cockpit HessMaxEV, every 10 steps": 10}

SETUPS = {"LeNet, batch 128": (LeNet, 128), "LeNet, batch 512": (LeNet, 512)}
SETUPS |= {f"MLP, batch {size}": (lambda: MLP(3072, [200, 200, 200]), size) for size in (128, 512)}
IMAGES = 10_000
"""Which make an epoch of 78 or 19 steps."""


QUICK = "toy MLP, batch 8"
SETUPS[QUICK] = (lambda: MLP(3072, [4]), 8)


def fit(setup: str, data: Batch, steps: int, callbacks: list[pl.Callback]) -> None:
    """One training from the same parameters."""
    make, batch_size = SETUPS[setup]
    torch.manual_seed(0)
    module = Classifier(make(), optimizer=lambda parameters: torch.optim.SGD(parameters, 0.02, momentum=0.9))
    train(module, data, batch_size, steps, callbacks)


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


def loop(setup: str, data: Batch, steps: int, interval: int | None) -> None:
    """The same in plain PyTorch, with cockpit or without."""
    make, batch_size = SETUPS[setup]
    torch.manual_seed(0)
    network, criterion = make(), torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9)
    batches = drawn(data, batch_size)
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
            info = {"batch_size": batch_size, "individual_losses": one_by_one, "loss": loss, "optimizer": optimizer}
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


def work(setup: str, settings: Settings) -> dict[str, Any]:
    """The ratios of all callbacks in one training, or why there are none."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = images(settings.root, 32 if settings.quick else IMAGES)
    batch_size = SETUPS[setup][1]
    epoch = len(data[0]) // batch_size
    fit(setup, data, 2, [])
    seconds_of_step = timed(lambda: fit(setup, data, 2 if settings.quick else 20, []))[0] / 20
    found: dict[str, Any] = {"ratios": {}, "steps": {}, "missing": {}, "ms": 1e3 * seconds_of_step}
    for name, way in WAYS.items():
        steps = 2 if settings.quick else max(way.least, math.ceil(way.seconds / seconds_of_step))
        if "epoch" in name:
            steps = epoch * max(1, round(steps / epoch))
        fit(setup, data, 1, [way.callback()])  # imports, and what libraries set up at the first call
        found["ratios"][name] = _ratios(
            lambda steps=steps: fit(setup, data, steps, []),
            lambda steps=steps, way=way: fit(setup, data, steps, [way.callback()]),
            settings.repeats,
        )
        found["steps"][name] = steps
    for name, interval in COCKPIT.items():
        if batch_size > 128:
            found["missing"][name] = "not tried: it takes minutes"
            continue
        steps = 2 if settings.quick else 2 * interval
        with excused() as reasons:
            loop(setup, data, 1, interval)
            found["ratios"][name] = _ratios(
                lambda steps=steps: loop(setup, data, steps, None),
                lambda steps=steps, interval=interval: loop(setup, data, steps, interval),
                settings.repeats,
            )
            found["steps"][name] = steps
        if reasons:
            found["missing"][name] = reasons[0]
    return found


def _ratios(plain: Callable[[], None], watched: Callable[[], None], repeats: int) -> list[float]:
    pairs = [(timed(plain)[0], timed(watched)[0]) for _ in range(repeats)]
    return [with_it / without for without, with_it in pairs]


def run(settings: Settings) -> Outcome:
    """Measure."""
    started = time.perf_counter()
    # Long ones first, so that the processes end together.
    names = [QUICK] if settings.quick else ["LeNet, batch 512", "LeNet, batch 128", "MLP, batch 512", "MLP, batch 128"]
    found = dict(zip(names, shared(work, names, settings.jobs, settings), strict=True))
    return outcome_of({name: found[name] for name in SETUPS if name in found}, time.perf_counter() - started)


def outcome_of(found: dict[str, dict[str, Any]], seconds: float) -> Outcome:
    """The figures and the table."""
    figures = [
        Figure(f"{setup}: time with {name} over without", Sample(tuple(cells["ratios"][name])), way.bound)
        for name, way in WAYS.items()
        if way.bound is not None
        for setup, cells in found.items()
    ]
    header = ["with", *(f"{setup} ({cells['ms']:.0f} ms a step)" for setup, cells in found.items())]
    rows = [[name, *(_cell(cells, name) for cells in found.values())] for name in (*WAYS, *COCKPIT)]
    ratios = {setup: cells["ratios"] for setup, cells in found.items()}
    table = Table("Time over that of the run without (steps of the run)", header, rows)
    return Outcome("training", "Training with a callback", ABOUT, figures, [table], {"ratios": ratios}, seconds)


def _cell(cells: dict[str, Any], name: str) -> str:
    if name in cells["missing"]:
        return str(cells["missing"][name])
    return f"{spread(Sample(tuple(cells['ratios'][name])))}; {cells['steps'][name]}"


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
    panel.set_xlabel("time over that without (dotted: targets)")
