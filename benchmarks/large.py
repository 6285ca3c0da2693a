"""What curvature costs at the size that people train: GPT-2, a ResNet-50, and a decoder of a billion parameters.

    python -m benchmarks.large --model gpt2                       # 124 million parameters, on a GPU if there is one
    python -m benchmarks.large --model resnet50                   # 26 million, images of 224 x 224
    python -m benchmarks.large --model decoder1b --devices 8      # FSDP2: each device has its part of the parameters
    python -m benchmarks.large --model gpt2 --scale medium        # 23 million, feasible on a processor
    python -m benchmarks.large --model gpt2 --scale toy           # whether it runs, in seconds

One training by Lightning, in which the measurements take turns: after two plain steps one measurement, then two plain
steps and another one, and all that over again. So the time of each of them stands beside that of the steps next to it.
What is measured is the mean loss over one fixed batch of the training's size for each device; the critical
sharpness is that of the step's own batch. On GPUs the memory is the
peak of the allocator in a step with a measurement, over that of a plain step; on a processor it is the peak resident
size of a process of its own for each kind of measurement, over that of one that only trains.

Prints a table, and writes it with all numbers as JSON.
"""

import argparse
import importlib.metadata
import logging
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Subset, TensorDataset

from benchmarks.problems import Batch, has_images, images, sentences
from benchmarks.report import Figure, Outcome, Run, Table, save, spread
from benchmarks.timing import Sample
from benchmarks.transformers import LanguageModel
from examples.data import PennTreebank
from lyapunov_lightning import CurvatureProbe, HessianConfig, Schedule, SpectrumTracker
from lyapunov_lightning.callbacks.results.spectrum import TrackedSpectrum
from lyapunov_lightning.curvature import spectral_density
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.training.sharing import Step

WARM, PLAIN = 2, 2
"""Steps that are not counted, in which libraries set themselves up; and plain steps before each measurement."""

BATCHES = 4
"""Different batches for each device; the training goes through them again and again."""

PROBES, STEPS = 2, 16
"""Random vectors of the density and products for each of them: 32 in all."""

PRODUCTS = 3
"""Products that are timed one by one, after one that is not."""

DEFAULT_BASIS_BYTES = 5 * 2**27
"""What a Krylov basis of the default size may take, but for the fewest vectors that it can do with."""

READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero")
"""Operations that make the host wait for the device."""

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")
"""The same, as a profile of a GPU has it."""


@dataclass(frozen=True)
class Setup:
    """A model with its data and its optimizer.

    Attributes:
        make: Makes the network, whose ``blocks``, if it is to be sharded, are sharded one by one.
        data: Makes so many samples: the folder of data sets, and the number.
        batch_size: Samples in a batch, for each device.
        optimizer: Makes the optimizer.
        is_sharded: Whether every device has a part of the parameters only.

    """

    make: Callable[[], nn.Module]
    data: Callable[[str | None, int], Batch]
    batch_size: int
    optimizer: Callable[..., torch.optim.Optimizer]
    is_sharded: bool = False


@dataclass(frozen=True)
class Text:
    """The size of a language model, and of a batch.

    Attributes:
        words: Size of the vocabulary.
        width: Width of the layers.
        layers: Their number.
        heads: Heads of the attention.
        length: Of the sequences.
        batch_size: Sequences in a batch.

    """

    words: int
    width: int
    layers: int
    heads: int
    length: int
    batch_size: int


@dataclass(frozen=True)
class Picture:
    """A network for images, their height and width, and how many of them make a batch."""

    make: Callable[[], nn.Module]
    size: int
    batch_size: int


TEXTS = {
    "gpt2": {
        "toy": Text(100, 16, 2, 2, 8, 2),
        "medium": Text(8000, 512, 6, 8, 64, 4),
        "full": Text(50_257, 768, 12, 12, 1024, 8),
    },
    "decoder1b": {
        "toy": Text(100, 16, 2, 2, 8, 2),
        "medium": Text(8000, 512, 6, 8, 64, 2),
        "full": Text(32_000, 2048, 18, 16, 2048, 2),
    },
}
PICTURES = {
    "toy": Picture(lambda: _tiny_resnet(), 16, 4),
    "medium": Picture(lambda: _resnet50(10), 32, 16),
    "full": Picture(lambda: _resnet50(1000), 224, 64),
}
MODELS = ("gpt2", "resnet50", "decoder1b")
SCALES = ("toy", "medium", "full")


def setup_of(model: str, scale: str, length: int | None = None, batch_size: int | None = None) -> Setup:
    """One of the three models.

    Args:
        model: Which of them.
        scale: How large.
        length: Of the sequences, in place of the usual one.
        batch_size: Samples in a batch for each device, in place of the usual number.

    """
    if model == "resnet50":
        picture = PICTURES[scale]
        return Setup(picture.make, partial(_pictures, picture.size), batch_size or picture.batch_size, _sgd)
    text = TEXTS[model][scale]
    length = length or text.length
    network = partial(
        LanguageModel,
        model == "decoder1b",
        words=text.words,
        width=text.width,
        layers=text.layers,
        heads=text.heads,
        length=length,
    )
    data = partial(_rows, length, text.words)
    return Setup(network, data, batch_size or text.batch_size, _adamw, is_sharded=model == "decoder1b")


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-4)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def _tiny_resnet() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet  # type: ignore[import-untyped]

    network: Any = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10, width_per_group=1)
    network.layer3, network.layer4, network.fc = nn.Identity(), nn.Identity(), nn.Linear(512, 10)
    return cast(nn.Module, network)


def _resnet50(num_classes: int) -> nn.Module:
    from torchvision.models import resnet50  # type: ignore[import-untyped]

    network: nn.Module = resnet50(num_classes=num_classes)
    return network


def _pictures(size: int, root: str | None, count: int) -> Batch:
    """CIFAR-10 where its images are of the right size, else random ones."""
    return images(root if size == 32 else None, count, size)


def _rows(length: int, words: int, root: str | None, count: int) -> Batch:
    """Rows of the Penn Treebank where it is there, else of a random Markov chain."""
    if not has_text(root):
        return sentences(count, length, min(words, 200))
    text = PennTreebank(str(root), sequence_length=length, vocabulary=min(words, 10_000), download=False)
    text.setup("fit")
    inputs, targets = text.train_set[:count]
    return inputs, targets


def has_text(root: str | None) -> bool:
    """Whether the Penn Treebank is there."""
    return root is not None and (Path(root) / "ptb" / "ptb.train.txt").is_file()


class Large(pl.LightningModule):
    """What a user has: a network, a mean cross-entropy and an optimizer.

    Args:
        setup: The model.

    """

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.setup_of_model = setup
        self.network: nn.Module | None = None

    def configure_model(self) -> None:
        """Make the network on its device, and let each device keep its part of it if it is to be sharded."""
        if self.network is not None:
            return
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = self.setup_of_model.make()
        if self.setup_of_model.is_sharded:
            from torch.distributed.fsdp import fully_shard

            assert isinstance(self.network, LanguageModel)
            assert self.device_mesh is not None
            mesh = self.device_mesh["data_parallel"]
            for block in self.network.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.network, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The mean loss of a batch."""
        assert self.network is not None
        inputs, targets = batch
        loss: Tensor = functional.cross_entropy(self.network(inputs), targets)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """That of the model."""
        return self.setup_of_model.optimizer(self.parameters())


class _Alone(SpectrumTracker):
    """What is measured without eigenpairs, and not drawn."""

    def figures(self) -> dict[str, Any]:
        return {}


class Density(_Alone):
    """The density alone, without the eigenpairs that would make it exact at its ends."""

    def measure(self, hessian: LossHessian, step: Step) -> TrackedSpectrum:
        """Spend the products."""
        self.density = spectral_density(hessian, num_probes=PROBES, num_steps=STEPS)
        return TrackedSpectrum(step=step.index, epoch=step.epoch, matvecs=self.density.num_matvecs)


class Products(_Alone):
    """Single products, timed, and one of them seen by the profiler.

    Attributes:
        seconds: Of a product, the median of each measurement.
        waits: How often the host waited for the device within the last product.
        method: How products were computed.

    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seconds: list[float] = []
        self.waits = 0
        self.method = ""

    def measure(self, hessian: LossHessian, step: Step) -> TrackedSpectrum:
        """The same product several times, and once more for the profiler."""
        device = step.trainer.strategy.root_device
        is_cuda = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
        vector = hessian.space.random(torch.Generator().manual_seed(0))
        with hessian.space.together():  # as in a solver
            hessian.matvec(vector)
            seconds = [_seconds_of(partial(hessian.matvec, vector), device) for _ in range(PRODUCTS)]
            with profile(activities=activities) as profiled:
                hessian.matvec(vector)
        self.seconds.append(statistics.median(seconds))
        self.waits = sum(event.name.startswith(WAITS if is_cuda else READS) for event in profiled.events() or ())
        self.method = hessian.method
        return TrackedSpectrum(step=step.index, epoch=step.epoch, matvecs=2 + PRODUCTS)


def _seconds_of(task: Callable[[], object], device: torch.device) -> float:
    """How long it takes until the device is done with it."""
    _wait(device)
    started = time.perf_counter()
    task()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Meter:
    """What each step takes: two callbacks, one before and one behind those of which it is told.

    Attributes:
        seconds: Of each step, with what was measured in it.
        gradients: Of the forward and the backward pass of each step.
        peaks: Bytes that the allocator of a GPU held at most in each step; zeros on a processor.

    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.gradients: list[float] = []
        self.peaks: list[int] = []
        self._started = self._begun = 0.0
        self.before, self.behind = _Before(self), _Behind(self)

    def start(self, device: torch.device) -> None:
        """A step is to begin."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._started = _now(device)

    def begin(self, device: torch.device) -> None:
        """What is measured before the step has been."""
        self._begun = _now(device)

    def differentiated(self, device: torch.device) -> None:
        """The gradient is there."""
        self.gradients.append(_now(device) - self._begun)

    def end(self, device: torch.device) -> None:
        """The step is over, and what is measured behind it."""
        self.seconds.append(_now(device) - self._started)
        self.peaks.append(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)


class _Before(pl.Callback):
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._meter.start(trainer.strategy.root_device)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        self._meter.differentiated(trainer.strategy.root_device)


class _Behind(pl.Callback):
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._meter.begin(trainer.strategy.root_device)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._meter.end(trainer.strategy.root_device)


def _now(device: torch.device) -> float:
    _wait(device)
    return time.perf_counter()


CRITICAL = "critical sharpness"

WAYS: dict[str, Callable[..., Any]] = {
    "products": partial(Products, largest=1),
    CRITICAL: partial(CurvatureProbe, estimator="critical"),
    "sharpness": CurvatureProbe,
    "both ends": partial(CurvatureProbe, end="both"),
    "10 + 3 eigenpairs": partial(SpectrumTracker, largest=10, smallest=3),
    f"density, {PROBES * STEPS} products": partial(Density, largest=1),
}
"""What is measured, by name: callbacks that are still to be told when."""


@dataclass(frozen=True)
class Options:
    """How it is run.

    Attributes:
        model: One of the three.
        scale: How large it is.
        devices: How many processors or GPUs.
        repeats: How often each measurement is made.
        ways: The measurements; none to train alone.
        root: Folder of CIFAR-10 and of the Penn Treebank; random data without.
        length: Of the sequences, if not the usual one.
        batch_size: For each device, if not the usual one.
        hessian: Fields of `HessianConfig` that are not the usual ones.

    """

    model: str
    scale: str = "full"
    devices: int = 1
    repeats: int = 3
    ways: tuple[str, ...] = tuple(WAYS)
    root: str | None = None
    length: int | None = None
    batch_size: int | None = None
    hessian: dict[str, Any] = field(default_factory=dict)

    @property
    def setup(self) -> Setup:
        """The model."""
        return setup_of(self.model, self.scale, self.length, self.batch_size)

    @property
    def accelerator(self) -> str:
        """Where it runs: on GPUs if there are any, but not at toy size."""
        return "gpu" if torch.cuda.is_available() and self.scale != "toy" else "cpu"

    @property
    def steps(self) -> dict[str, list[int]]:
        """At which steps what is measured."""
        rounds = [WARM + PLAIN + (PLAIN + 1) * number for number in range(self.repeats * len(self.ways))]
        return {way: rounds[place :: len(self.ways)] for place, way in enumerate(self.ways)}

    @property
    def num_steps(self) -> int:
        """Steps in all."""
        return max((steps[-1] for steps in self.steps.values()), default=WARM + PLAIN) + 1


@dataclass(frozen=True)
class Found:
    """What a training has told.

    Attributes:
        num_parameters: Of the whole model.
        is_first: Whether this is the first of the devices.
        meter: What the steps took.
        callbacks: What was measured, by name.

    """

    num_parameters: int
    is_first: bool
    meter: Meter
    callbacks: dict[str, Any]


def trained(options: Options, **settings: Any) -> Found:
    """One training with measurements.

    Args:
        options: What to train and to measure.
        settings: Further settings of the trainer.

    """
    setup, meter = options.setup, Meter()
    config = HessianConfig("fixed", num_batches=1, **options.hessian)
    configs = {
        CRITICAL: replace(config, data="batch", num_batches=None)
    }  # whether a step raises the loss is a question to its own batch
    callbacks = {
        way: WAYS[way](schedule=Schedule(at_steps=steps), hessian=configs.get(way, config), log_prefix=way)
        for way, steps in options.steps.items()
    }
    count = options.devices * setup.batch_size
    samples = TensorDataset(*setup.data(options.root, BATCHES * count))
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator=options.accelerator,
            devices=options.devices,
            strategy=_strategy(options),
            max_epochs=1,
            callbacks=[meter.before, *callbacks.values(), meter.behind],
            logger=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **settings,
        )
        module = Large(setup)
        # The same samples in every step, however many devices share them.
        rows = range(trainer.global_rank, options.num_steps * count, options.devices)
        own = Subset(samples, [row % len(samples) for row in rows])
        trainer.fit(module, DataLoader(own, setup.batch_size))
    return Found(sum(p.numel() for p in module.parameters()), trainer.is_global_zero, meter, callbacks)


def _strategy(options: Options) -> Strategy | str:
    backend = "nccl" if options.accelerator == "gpu" else "gloo"
    if options.setup.is_sharded:
        return ModelParallelStrategy(options.devices, tensor_parallel_size=1, process_group_backend=backend)
    return DDPStrategy(process_group_backend=backend) if options.devices > 1 else "auto"


def outcome_of(options: Options, found: Found, peaks: dict[str, int], seconds: float) -> Outcome:
    """The figures and the tables.

    Args:
        options: What was trained and measured.
        found: What the training has told.
        peaks: Bytes beyond the training at the peak of each measurement, as far as they are known from elsewhere.
        seconds: How long it took.

    """
    meter, vector = found.meter, 4 * found.num_parameters
    figures, rows = [], []
    for way, callback in found.callbacks.items():
        steps = options.steps[way]
        if isinstance(callback, Products):
            gradients = Sample(tuple(plain(meter.gradients, step) for step in steps))
            seconds_of_product, waits = Sample(tuple(callback.seconds)), Sample((float(callback.waits),))
            figures += [
                Figure("a gradient, in ms", gradients.times(1e3)),
                Figure("a product, in ms", seconds_of_product.times(1e3)),
                Figure("a product, in gradients", seconds_of_product.over(gradients)),
                Figure("waits of the host within a product", waits, None if options.setup.is_sharded else 0.0),
            ]
            continue
        costs = [meter.seconds[step] / plain(meter.seconds, step) - 1 for step in steps]
        figures.append(Figure(f"{way}, in training steps", Sample(tuple(costs))))
        if meter.peaks[-1]:
            peaks = {**peaks, way: max(meter.peaks[step] - max(meter.peaks[step - PLAIN : step]) for step in steps)}
        memory = ["", ""] if way not in peaks else [f"{peaks[way] / 2**30:.2f}", f"{peaks[way] / vector:.1f}"]
        later = spread(Sample(tuple(costs[1:])), 1) if costs[1:] else ""
        rows.append([way, *_told(callback.results), f"{costs[0]:.1f}", later, *memory])
    header = ["measurement", "products", "accuracy met", "first, steps", "later, steps", "GiB beyond training"]
    header.append("in vectors of the model's size")
    plot = {"seconds": meter.seconds, "gradients": meter.gradients, "peaks": peaks}
    title = f"{options.model}, {options.scale}: {found.num_parameters / 1e6:.2f} million parameters"
    return Outcome(options.model, title, _how(options, found), figures, [Table("", header, rows)], plot, seconds)


def plain(numbers: Sequence[float], step: int) -> float:
    """The mean over the plain steps before one with a measurement."""
    return statistics.fmean(numbers[step - PLAIN : step])


def _told(results: Sequence[Any]) -> list[str]:
    """How many products each measurement took, and how many of them were as accurate as they were to be."""
    passes = [getattr(result, "forward_passes", None) for result in results]
    if None not in passes:
        counts = ", ".join(map(str, passes)) + " forward passes"
    else:
        counts = ", ".join(str(result.matvecs) for result in results)
    converged = [getattr(result, "converged", None) for result in results]
    if None in converged:
        return [counts, ""]
    return [counts, f"{statistics.fmean(float(share or 0.0) for share in converged):.0%}"]


def _how(options: Options, found: Found) -> str:
    """Where and how it was measured."""
    setup = options.setup
    inputs, _ = setup.data(options.root, 1)
    shape = " x ".join(map(str, (setup.batch_size, *inputs.shape[1:])))
    if options.model == "resnet50":
        data = "CIFAR-10" if inputs.shape[-1] == 32 and has_images(options.root) else "random images"
    else:
        data = "Penn Treebank" if has_text(options.root) else "random text"
    device = torch.cuda.get_device_name() if options.accelerator == "gpu" else f"{torch.get_num_threads()} threads"
    where = f"{options.devices} x {device}" if options.devices > 1 else device
    methods = {callback.method for callback in found.callbacks.values() if isinstance(callback, Products)}
    products = f", products by {', '.join(methods)}" if methods else ""
    further = "".join(f", `{name}={value}`" for name, value in options.hessian.items())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "lightning"))
    return (
        f"{options.accelerator.upper()}: {where}; a batch of {shape} for each device ({data}), measured on one of them;"
        f" {'momentum' if options.model == 'resnet50' else 'AdamW'}{products}{further}; {versions}."
    )


def basis_vectors(num_parameters: float, wanted: int, devices: int = 1) -> int:
    """How many vectors a Krylov basis of the default size holds, with the one in which it grows.

    Args:
        num_parameters: Of the whole model, in float32.
        wanted: Eigenpairs.
        devices: Over how many devices the model is sharded.

    """
    affordable = int(DEFAULT_BASIS_BYTES // (4 * num_parameters / devices))
    least = 8 if wanted == 1 else max(32, 2 * wanted + 16)  # a single eigenvalue is one that `CurvatureProbe` asks for
    return min(least, max(affordable, wanted + 4)) + 1


def reckoned() -> Table:
    """Memory on each device by formula, in GiB; nothing of it is measured."""
    rows = []
    for name, num_parameters in {"124 million": 124e6, "1 billion": 1.04e9, "7 billion": 7e9}.items():
        for devices in (1, 8):
            vector = 4 * num_parameters / 2**30
            sharpness, pairs = (
                (basis_vectors(num_parameters, wanted, devices) + wanted + 3) * vector / devices for wanted in (1, 13)
            )
            whole = 6 * vector if devices == 1 else 8 * vector  # what is gathered and scattered comes on top
            sharded = [5 * vector, 10 * vector / devices] if devices > 1 else [math.nan, math.nan]
            cells = [4 * vector / devices, whole, *sharded, sharpness, pairs]
            shown = ["" if math.isnan(cell) else f"{cell:.1f}" for cell in cells]
            rows.append([name, str(devices), *shown])
    header = ["parameters", "devices", "training, AdamW", "product, gathered or whole", "layerwise", "on shards"]
    return Table("", [*header, "basis of the sharpness", "of 10 + 3 eigenpairs"], rows)


def peak(options: Options) -> int:
    """Bytes that the process has held at most, after a training."""
    trained(options)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def weighed(options: Options, arguments: Sequence[str]) -> dict[str, int]:
    """Bytes beyond the training at the peak of each measurement, each in a process of its own.

    Args:
        options: What is to be measured.
        arguments: Of this command.

    """
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.large", *arguments, "--weigh"]

    def peak_of(*ways: str) -> int:
        output = subprocess.run([*command, *ways], check=True, capture_output=True, text=True).stdout
        return int(next(line for line in output.splitlines() if line.startswith("PEAK")).split()[1])

    alone = peak_of()
    return {way: peak_of(way) - alone for way in options.ways if way != "products"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, and print what was found."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.large", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--reckon", action="store_true", help="measure nothing: memory by formula, for three sizes")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=list(WAYS),
        default=list(WAYS),
        metavar="WAY",
        help=f"some of {', '.join(map(repr, WAYS))}",
    )
    parser.add_argument(
        "--root", default="data", help="folder of CIFAR-10 and of ptb/ptb.train.txt; none is downloaded"
    )
    parser.add_argument("--length", type=int, help="length of the sequences")
    parser.add_argument("--batch-size", type=int, help="samples in a batch for each device")
    parser.add_argument("--offload", action="store_true", help="Krylov bases in the CPU's memory")
    parser.add_argument("--max-gather-bytes", type=int, help="bound for what is gathered of a sharded model")
    parser.add_argument("--no-memory", action="store_true", help="no processes for the memory of each measurement")
    parser.add_argument("--kept", type=Path, default=Path("logs"), help="folder of the JSON file")
    parser.add_argument("--weigh", nargs="*", help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    if found.reckon:
        print(reckoned().markdown())
        return
    hessian: dict[str, Any] = {"offload": True} if found.offload else {}
    if found.max_gather_bytes is not None:
        hessian["max_gather_bytes"] = found.max_gather_bytes
    options = Options(
        found.model,
        found.scale,
        found.devices,
        found.repeats,
        tuple(found.ways),
        found.root,
        found.length,
        found.batch_size,
        hessian,
    )
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if found.weigh is not None:
        bytes_held = peak(replace(options, ways=tuple(found.weigh), repeats=1))
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"PEAK {bytes_held}")
        return
    started = time.perf_counter()
    # Lightning starts this command once more for every further device, with a rank.
    has_memory = options.accelerator == "cpu" and options.scale != "toy" and not found.no_memory
    peaks = weighed(options, sys.argv[1:]) if has_memory and "LOCAL_RANK" not in os.environ else {}
    result = trained(options)
    if result.is_first:
        outcome = outcome_of(options, result, peaks, time.perf_counter() - started)
        run = Run(f"`python -m benchmarks.large {' '.join(sys.argv[1:])}`", [outcome])
        print(run.markdown())
        save(run, found.kept / f"large-{found.model}-{found.scale}.json")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
