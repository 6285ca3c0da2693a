"""One edge whatever the batch: the stability ratio of three optimizers at batches of 8, 64, 512 and all images.

``python -m examples.edge_whatever_the_batch --root data`` trains a small network on 2,048 images of CIFAR-10 twelve
times, by SGD, momentum 0.9 and AdamW. It draws ``curvature/stability_ratio``, and below it what one would look at
without knowing of batches: the largest eigenvalue over the limit of full-batch training. Some five minutes of one core.

Every run has half of the largest learning rate that it bears. ``--sweep`` looks for those: it doubles the rate as long
as the final loss is within 1.25 of the lowest of all rates. Some ten minutes more.
"""

import argparse
import json
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.axes import Axes
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from examples.data import Cifar10
from examples.models import MLP, Classifier
from lyapunov_lightning import CurvatureProbe
from lyapunov_lightning.figures.style import INK, RED, WIDTH, Picture, house_style, new_picture, shades, write
from lyapunov_lightning.figures.ticks import Floats, linear_axis, log_axis

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "edge_whatever_the_batch.png"
CACHE = Path("logs/edge_whatever_the_batch.json")
NUM_IMAGES = 2048
STEPS = {8: 6000, 64: 2000, 512: 1000, NUM_IMAGES: 500}
"""For each batch size, how many steps a run has."""

MEASUREMENTS = 120
"""How often a run is measured, at equal distances."""

SMOOTHED = 13
"""Measurements whose median a curve shows."""

LOWEST, HIGHEST = 0.01, 8.0
"""The ratios that are drawn."""


@dataclass(frozen=True)
class Family:
    """An optimizer with its learning rates.

    Attributes:
        make: Makes it from parameters, but for the learning rate.
        full_batch_limit: The largest stable eigenvalue times the learning rate, where all batches are alike.
        first: The rate from which the sweep doubles.
        rates: The rate for each batch size of `STEPS`: half of the largest usable one that the sweep found.

    """

    make: Callable[..., torch.optim.Optimizer]
    full_batch_limit: float
    first: float
    rates: tuple[float, ...]


FAMILIES = {
    "SGD": Family(torch.optim.SGD, 2.0, 0.1, (0.1, 0.4, 0.4, 0.4)),
    "momentum 0.9": Family(partial(torch.optim.SGD, momentum=0.9), 2 + 2 * 0.9, 0.0125, (0.0125, 0.05, 0.2, 0.2)),
    "AdamW": Family(torch.optim.AdamW, (2 + 2 * 0.9) / (1 - 0.9), 0.0005, (0.001, 0.002, 0.004, 0.004)),
}


@dataclass(frozen=True)
class Run:
    """What a probe saw of a run, at each measurement whose ratio is to be judged.

    Attributes:
        rate: The learning rate.
        shares: How far the training was, from 0 to 1.
        ratios: ``curvature/stability_ratio``.
        sharpness: The batch sharpness over the limit, of which the ratio is one of two parts.
        classical: The largest eigenvalue over the full-batch limit; None before its first measurement.
        agreement: The agreement of the batches, median over the second half.
        loss: The mean loss over the last tenth of the steps.

    """

    rate: float
    shares: list[float]
    ratios: list[float]
    sharpness: list[float]
    classical: list[float | None]
    agreement: float
    loss: float


class Losses(pl.Callback):
    """The training loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))
        if not math.isfinite(self.values[-1]):
            trainer.should_stop = True

    @property
    def final(self) -> float:
        """The mean over the last tenth of the steps; infinite for a loss that is lost."""
        last = self.values[-max(1, len(self.values) // 10) :]
        return float(np.mean(last)) if math.isfinite(self.values[-1]) else math.inf


def images(root: str, number: int = NUM_IMAGES) -> Dataset:
    """The first images of CIFAR-10, at 8 x 8 pixels."""
    if not Path(root, "cifar-10-batches-py").is_dir():
        raise SystemExit(f"There is no CIFAR-10 in {root}: give the folder that holds `cifar-10-batches-py` by --root.")
    data = Cifar10(root, download=False, augment=False, num_train=number, num_val=1, downsample=4)
    data.setup("fit")
    return data.train_set


def batches(dataset: Dataset, size: int, num_steps: int) -> DataLoader:
    """All batches of a run, which sees every image once before it sees one again."""
    size = min(size, len(dataset))
    order = RandomSampler(dataset, num_samples=size * num_steps)
    return DataLoader(dataset, batch_size=None, sampler=BatchSampler(order, size, drop_last=True))


def train(
    dataset: Dataset, family: Family, rate: float, batch_size: int, num_steps: int, *callbacks: pl.Callback
) -> Losses:
    """Train the network, which is the same one every time; the losses."""
    pl.seed_everything(0, verbose=False)
    network = MLP(in_features=3 * 8 * 8, hidden=[64, 64])
    losses = Losses()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=num_steps,
        logger=False,
        default_root_dir="logs",
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[losses, *callbacks],
    )
    module = Classifier(network, loss="squared_error", optimizer=partial(family.make, lr=rate))
    trainer.fit(module, batches(dataset, batch_size, num_steps))
    return losses


def largest_usable(dataset: Dataset, family: Family, batch_size: int, num_steps: int) -> float:
    """The largest rate, by doubling, whose final loss is within 1.25 of the lowest."""
    found: dict[float, float] = {}
    rate = family.first
    while not found or found[rate / 2] <= 1.25 * min(found.values()):
        found[rate] = train(dataset, family, rate, batch_size, num_steps).final
        rate *= 2
    print("  " + "  ".join(f"{rate:g}: {loss:.4f}" for rate, loss in found.items()), flush=True)
    return max(rate for rate, loss in found.items() if loss <= 1.25 * min(found.values()))


def measured(dataset: Dataset, family: Family, rate: float, batch_size: int, num_steps: int) -> Run:
    """One run with the probe that watched it."""
    probe = CurvatureProbe(max(1, num_steps // MEASUREMENTS), eigenvalue_every=2)
    losses = train(dataset, family, rate, batch_size, num_steps, probe)
    known = [result for result in probe.results if result.stability_ratio is not None and result.is_settled]
    eigenvalues = [result.decisive_eigenvalue for result in known]
    late = [result.batch_agreement for result in known[len(known) // 2 :] if result.batch_agreement is not None]
    return Run(
        rate=rate,
        shares=[result.step / num_steps for result in known],
        ratios=[float(result.stability_ratio) for result in known],
        sharpness=[float(result.batch_sharpness / result.stability_limit) for result in known],
        classical=[None if value is None else value * rate / family.full_batch_limit for value in eigenvalues],
        agreement=float(np.median(late)),
        loss=losses.final,
    )


def smooth(values: Sequence[float | None]) -> Floats:
    """The running median, of fewer measurements at the ends."""
    array = np.array(values, dtype=np.float64)
    reach = SMOOTHED // 2
    return np.array([np.nanmedian(array[max(0, place - reach) : place + reach + 1]) for place in range(len(array))])


@house_style()
def drawn(runs: dict[str, dict[int, Run]]) -> Picture:
    """A column for each optimizer: above the stability ratio, below what full-batch training would be judged by."""
    picture = new_picture(WIDTH + 1.5, 4.8, "One edge whatever the batch")
    grid = picture.subplots(2, len(runs), sharex=True, sharey=True, squeeze=False)
    for column, (name, by_batch) in zip(grid.T, runs.items(), strict=True):
        colours = shades(len(by_batch))
        for (batch_size, run), colour in zip(by_batch.items(), colours, strict=True):
            label = "all images" if batch_size == max(by_batch) else f"batches of {batch_size}"
            draw_course(column[0], run.shares, run.ratios, color=colour, label=label)
            draw_course(column[1], run.shares, run.classical, color=colour)
        column[0].set_title(name)
        column[1].set_xlabel("share of the training")
    for axes in grid.flat:
        log_axis(axes, "y")
        linear_axis(axes, "x")
        axes.axhline(1.0, color=INK, linewidth=1.0, linestyle="--", zorder=4)
        axes.axhspan(1.0, HIGHEST, color=RED, alpha=0.06, linewidth=0, zorder=0)
    grid[0, 0].set_ylim(LOWEST, HIGHEST)
    write(grid[1, 1], "edge of stability", (0.0, 1.0), xytext=(0, 4))
    grid[0, 0].set_ylabel("stability ratio")
    grid[1, 0].set_ylabel("largest eigenvalue /\nfull-batch limit")
    picture.legend(handles=grid[0, 0].get_legend_handles_labels()[0], loc="outside lower center", ncols=4)
    return picture


def draw_course(axes: Axes, shares: Sequence[float], values: Sequence[float | None], **options: Any) -> None:
    """The running median, and the single measurements behind it."""
    axes.plot(shares, np.array(values, dtype=np.float64), color=options["color"], alpha=0.22, linewidth=0.7)
    axes.plot(shares, smooth(values), linewidth=1.8, zorder=3, **options)


def told(run: Run) -> str:
    """In numbers, where a run was."""
    course = smooth(run.ratios)
    reached = next((f"{share:.2f}" for share, ratio in zip(run.shares, course, strict=True) if ratio >= 0.95), "never")
    ratio, sharpness, classical = (
        np.array(values[-(len(values) // 3) :], dtype=np.float64)
        for values in (run.ratios, run.sharpness, run.classical)
    )
    low, middle, high = np.nanquantile(ratio, [0.1, 0.5, 0.9])
    return (
        f"η = {run.rate:g}: first {course[0]:.2f}, 1 reached at {reached} of the run; over the last third {low:.2f} to "
        f"{high:.2f}, median {middle:.2f}, of the batch sharpness alone {np.nanmedian(sharpness):.2f}, classical "
        f"{np.nanmedian(classical):.3f}; agreement {run.agreement:.3f}; loss {run.loss:.4f}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder that holds `cifar-10-batches-py`")
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture to draw")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the runs are kept, and read if they are there")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps to make, for a quick look")
    parser.add_argument("--sweep", action="store_true", help="only look for the largest usable learning rates")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    kept = json.loads(options.cache.read_text()) if options.cache.exists() else {}
    dataset: Dataset | None = None
    runs: dict[str, dict[int, Run]] = {}
    for name, family in FAMILIES.items():
        runs[name] = {}
        for (batch_size, full), rate in zip(STEPS.items(), family.rates, strict=True):
            num_steps = max(2, round(options.scale * full))
            run = f"{name}, {batch_size}, {rate:g}, {num_steps} steps"
            if options.sweep or run not in kept:
                dataset = images(options.root) if dataset is None else dataset
            if options.sweep:
                print(f"{name}, batches of {batch_size}:", flush=True)
                print(f"  {largest_usable(dataset, family, batch_size, num_steps):g}", flush=True)
                continue
            if run not in kept:
                kept[run] = asdict(measured(dataset, family, rate, batch_size, num_steps))
                options.cache.parent.mkdir(parents=True, exist_ok=True)
                options.cache.write_text(json.dumps(kept))
            runs[name][batch_size] = Run(**kept[run])
            print(f"{name}, batches of {batch_size}: {told(runs[name][batch_size])}", flush=True)
    if not options.sweep:
        drawn(runs).save(options.out)
        print(f"The picture: {options.out}")


if __name__ == "__main__":
    main()
