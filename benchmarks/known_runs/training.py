"""A run, trained in a plain loop, and what the learning rate does to it."""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import nn

from benchmarks.known_runs.problems import PROBLEMS, Loss
from benchmarks.quasi_newton import Samples
from lyapunov_lightning.curvature import HessianOperator, power_iteration
from lyapunov_lightning.curvature.stability import stability_of

ALL = 1_000_000
"""The batch size of full-batch training."""

_BEYOND_REASON = 300.0
"""A learning rate at which no sweep goes on; an AdamW bears some that are larger, by its decay."""

LOWEST_RATE = {"SGD": 0.03, "momentum": 0.003, "Nesterov": 0.003, "Adam": 3e-4, "AdamW": 3e-4, "RMSprop": 1e-4}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "momentum": functools.partial(torch.optim.SGD, momentum=0.9),
    "Nesterov": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
}


@dataclass(frozen=True)
class Fault:
    """What is wrong with the data of some steps.

    Attributes:
        kind: ``"scaled"`` or ``"shifted"`` inputs, ``"scaled targets"``, ``"other labels"``, ``"not a number"``.
        start: The first such step.
        count: How many steps.
        size: By how much.

    """

    kind: str
    start: int
    count: int
    size: float = 1.0

    def spoil(self, batch: Samples) -> Samples:
        """The batch with the fault."""
        inputs, targets = batch
        if self.kind == "scaled":
            return inputs * self.size, targets
        if self.kind == "shifted":
            return inputs + self.size, targets
        if self.kind == "scaled targets":
            return inputs, targets * self.size
        if self.kind == "other labels":
            return inputs, (targets + 1) % (int(targets.max()) + 1)
        return torch.where(
            torch.arange(len(inputs)).view(-1, *[1] * (inputs.dim() - 1)) == 0, math.nan, inputs
        ), targets


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        problem: What is learned, by name.
        optimizer: By which optimizer, by name.
        batch_size: Samples in a batch.
        seed: Of data, network and batches.
        rate: The learning rate.
        steps: Optimizer steps.
        raised: From which step on the rate is multiplied, and by how much.
        is_gradual: Whether the rate then grows to that until the end.
        is_annealed: Whether the rate warms up over a tenth of the run, and falls to 0 along a cosine.
        fault: What is wrong with the data.
        clip: The norm to which gradients are clipped, if they are.
        accumulate: Batches of a step.
        resumed: The step from which on it is resumed from a checkpoint, if it is.

    """

    problem: str
    optimizer: str
    batch_size: int
    seed: int
    rate: float = 0.0
    steps: int = 200
    raised: tuple[int, float] | None = None
    is_gradual: bool = False
    is_annealed: bool = False
    fault: Fault | None = None
    clip: float | None = None
    accumulate: int = 1
    resumed: int | None = None

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        if self.is_annealed:
            warm = min(1.0, (step + 1) / (0.1 * self.steps))
            return self.rate * max(1e-6, warm * (1 + math.cos(math.pi * step / self.steps)) / 2)
        if self.raised is None or step < self.raised[0]:
            return self.rate
        start, factor = self.raised
        return self.rate * factor ** ((step - start) / (self.steps - start) if self.is_gradual else 1)

    @property
    def loss(self) -> Loss:
        """The loss of outputs and targets."""
        return PROBLEMS[self.problem].loss

    def network(self) -> nn.Module:
        """The network before the training."""
        torch.manual_seed(self.seed)
        return PROBLEMS[self.problem].network()

    def optimizer_of(self, network: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a network."""
        return OPTIMIZERS[self.optimizer](network.parameters(), lr=self.rate)

    def batches(self) -> list[Samples]:
        """All batches, in order; each epoch is shuffled."""
        inputs, targets = data(self.problem, self.seed)
        generator, found = torch.Generator().manual_seed(self.seed), list[Samples]()
        while len(found) < self.steps * self.accumulate:
            order = torch.randperm(len(targets), generator=generator)
            size = min(self.batch_size, len(targets))
            whole = order[: len(order) // size * size].view(-1, size)
            found += [(inputs[places], targets[places]) for places in whole]
        if self.fault is not None:
            spoiled = range(self.fault.start * self.accumulate, (self.fault.start + self.fault.count) * self.accumulate)
            for place in spoiled:
                found[place] = self.fault.spoil(found[place])
        return found[: self.steps * self.accumulate]


@functools.lru_cache(maxsize=32)
def data(problem: str, seed: int) -> Samples:
    """All samples of a problem."""
    return PROBLEMS[problem].data(seed)


@functools.lru_cache(maxsize=4096)
def train(run: Run) -> tuple[list[float], float]:
    """Train without Lightning and without a probe.

    Returns:
        The loss of every step until it is not finite, and that of all data at the end: the median of the last steps
        where that is lower, since a single step may be a spike.

    """
    network = run.network()
    optimizer, batches, losses = run.optimizer_of(network), iter(run.batches()), list[float]()
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group["lr"] = run.rate_at(step)
        optimizer.zero_grad()
        loss = 0.0
        for inputs, targets in itertools.islice(batches, run.accumulate):
            part = run.loss(network(inputs), targets) / run.accumulate
            part.backward()
            loss += part.item()
        losses.append(loss)
        if not math.isfinite(loss):
            return losses, math.inf
        if run.clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), run.clip)
        optimizer.step()
    return losses, min(whole_loss(run, network), median(losses[-20:]))


def whole_loss(run: Run, network: nn.Module) -> float:
    """The loss of all data; infinite where it is not finite."""
    inputs, targets = data(run.problem, run.seed)
    with torch.no_grad():
        loss = run.loss(network(inputs), targets).item()
    return loss if math.isfinite(loss) else math.inf


@dataclass(frozen=True)
class Sweep:
    """What the learning rate does to a setting.

    Attributes:
        first: The loss of all data before the training.
        finals: Those after it, by learning rate.

    """

    first: float
    finals: dict[float, float]

    def progress(self, run: Run) -> float:
        """The progress of a run as a share of the best one in the sweep."""
        return (self.first - train(run)[1]) / (self.first - min(self.finals.values()))

    @property
    def usable(self) -> float:
        """The largest usable learning rate."""
        lowest = min(self.finals.values())
        upwards = itertools.dropwhile(lambda item: item[1] > lowest, self.finals.items())
        good = itertools.takewhile(lambda item: self.first - item[1] > 0.75 * (self.first - lowest), upwards)
        return max(rate for rate, _ in good)

    @property
    def broken(self) -> float:
        """The smallest learning rate beyond that makes no progress.

        Raises:
            LookupError: If there is none in the sweep.

        """
        broken = [rate for rate, loss in self.finals.items() if rate > self.usable and loss >= self.first]
        if not broken:
            raise LookupError("Every learning rate makes progress.")
        return broken[0]


@functools.lru_cache(maxsize=512)
def sweep(setting: Run) -> Sweep:
    """Train at rates a factor of √3 apart, until two in a row make no progress or it is long beyond reason."""
    first, finals = whole_loss(setting, setting.network()), dict[float, float]()
    rate = LOWEST_RATE[setting.optimizer]
    while list(finals.values())[-2:] != [math.inf] * 2 and rate < _BEYOND_REASON:
        final = train(replace(setting, rate=rate))[1]
        finals[rate] = final if final < first else math.inf
        rate *= math.sqrt(3)
    return Sweep(first, finals)


def eigenvalue_over_limit(run: Run) -> float:
    """The largest eigenvalue of all data over the classical limit, by the median over the last third of a run."""
    network, batch = run.network(), data(run.problem, run.seed)
    parameters = list(network.parameters())
    optimizer, ratios = run.optimizer_of(network), list[float]()
    for step in range(run.steps):
        optimizer.zero_grad()
        run.loss(network(batch[0]), batch[1]).backward()
        if step > 2 * run.steps // 3 and step % 20 == 0:
            stability = stability_of(optimizer, parameters)
            hessian = HessianOperator(lambda batch: run.loss(network(batch[0]), batch[1]), parameters, [batch])
            assert stability is not None  # the optimizers here all have a rule
            found = power_iteration(stability.matrix(hessian), tol=0.05, max_matvecs=30)
            ratios.append(float(found.values[0]) / stability.limit)
        optimizer.step()
    return median(ratios)
