"""The kinds of runs: each is made so that its cause is known, and checked by trainings that differ in that alone."""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from benchmarks.known_runs.problems import MSE, SEEDS, SETS
from benchmarks.known_runs.training import ALL, OPTIMIZERS, Fault, Run, eigenvalue_over_limit, sweep, train

Maker = Callable[[Run, random.Random], Iterator[Run]]


def too_fast(setting: Run, draw: random.Random) -> Iterator[Run]:
    """It makes no progress, not even at first, and at a third of the rate it does."""
    found = sweep(setting)
    for factor in (1, 3**0.5):
        run = replace(setting, rate=factor * found.broken)
        is_lost = found.progress(run) <= 0.05 and not _falls_at_first(run)
        if is_lost and found.progress(replace(run, rate=run.rate / 3)) > 0.5:
            yield run


def too_fast_later(setting: Run, draw: random.Random) -> Iterator[Run]:
    """The broken rate, where the loss falls at first; or the usable one, raised to beyond that in a step or in many."""
    found = sweep(setting)
    sharpening = replace(setting, rate=found.broken)
    is_lost = found.progress(sharpening) <= 0.05 and _falls_at_first(sharpening)
    if is_lost and found.progress(replace(sharpening, rate=found.broken / 3)) > 0.5:
        yield sharpening
    run = replace(setting, rate=found.usable / 6, steps=300)
    start = draw.choice([100, 150])
    for factor in (2, 6):
        raised = replace(run, raised=(start, factor * found.broken / run.rate), is_gradual=draw.random() < 0.5)
        lower = replace(raised, raised=(start, factor * found.broken / run.rate / 10))
        if found.progress(raised) <= 0.05 and min(found.progress(run), found.progress(lower)) > 0.5:
            yield raised


def _falls_at_first(run: Run) -> bool:
    """Whether the loss falls by a tenth in the first steps."""
    losses = train(run)[0]
    return len(losses) >= 25 and median(losses[5:25]) < 0.9 * losses[0]


def at_edge(setting: Run, draw: random.Random) -> Iterator[Run]:
    """On all data at about half of the usable rate, until the largest eigenvalue is at its limit."""
    found = sweep(setting)
    run = replace(setting, rate=found.usable / 1.7, steps=700)
    if found.progress(run) > 0.75 and 0.85 < eigenvalue_over_limit(run) < 1.3:
        yield run


def room(setting: Run, draw: random.Random) -> Iterator[Run]:
    """At a tenth to a thirtieth of the usable rate; four times as much gets on better by a tenth of all progress."""
    found = sweep(setting)
    run = replace(setting, rate=found.usable / draw.choice([10, 15, 20, 30]), steps=250)
    if found.progress(replace(run, rate=4 * run.rate)) > found.progress(run) + 0.1:
        yield run


def data_fault(setting: Run, draw: random.Random) -> Iterator[Run]:
    """At a fifth to a twentieth of the usable rate, with three to six batches that are far off."""
    yield from _spoiled(setting, draw, counts=(3, 4, 6), sizes=(10.0, 30.0, 100.0), is_survived=False)


def bad_batch(setting: Run, draw: random.Random) -> Iterator[Run]:
    """The same with one or two, of which the run recovers."""
    yield from _spoiled(setting, draw, counts=(1, 1, 2), sizes=(5.0, 10.0), is_survived=True)


def _spoiled(
    setting: Run, draw: random.Random, counts: Sequence[int], sizes: Sequence[float], is_survived: bool
) -> Iterator[Run]:
    found = sweep(setting)
    healthy = replace(setting, rate=found.usable / draw.choice([5, 10, 20]), steps=250)
    kinds = ["scaled", "scaled", "shifted", "scaled targets" if setting.loss is MSE else "other labels"]
    kind = draw.choice(kinds if is_survived else [*kinds[:3], "not a number"])
    fault = Fault(kind, draw.randint(60, 180), draw.choice(counts), draw.choice(sizes))
    run = replace(healthy, fault=fault)
    losses, before = train(run)[0], slice(fault.start - 10, fault.start)
    is_seen = not losses[fault.start] < 3 * fmean(losses[before])  # a number that is none is seen as well
    harm = found.progress(healthy) - found.progress(run)
    if found.progress(healthy) > 0.3 and is_seen and not (is_survived and harm > 0.2):
        yield run


def noise_limited(setting: Run, draw: random.Random) -> Iterator[Run]:
    """A third of the rate comes as far, and three times as much is stable and comes no farther."""
    found = sweep(replace(setting, steps=800))
    for share in (1.7, 3, 5):
        run = replace(setting, rate=found.usable / share, steps=800)
        third, once, thrice = (found.progress(replace(run, rate=factor * run.rate)) for factor in (1 / 3, 1, 3))
        if once > 0.5 and abs(third - once) < 0.15 and -math.inf < thrice < once + 0.03:
            yield run


def clipped(setting: Run, draw: random.Random) -> Iterator[Run]:
    """At the broken rate or beyond, which clipping makes usable."""
    found = sweep(setting)
    lost = replace(setting, rate=found.broken * draw.choice([1, 2]), steps=250)
    for clip in (0.01, 0.03, 0.1, 0.3):
        run = replace(lost, clip=clip)
        if found.progress(run) > 0.6 and found.progress(lost) <= 0.05:
            yield run


def annealed_room(setting: Run, draw: random.Random) -> Iterator[Run]:
    """Warm-up and cosine, with room."""
    for run in room(setting, draw):
        annealed = replace(run, is_annealed=True, steps=300)
        found = sweep(setting)
        if found.progress(replace(annealed, rate=4 * run.rate)) > found.progress(annealed) + 0.1:
            yield annealed


def annealed_too_fast(setting: Run, draw: random.Random) -> Iterator[Run]:
    """Warm-up and cosine, to a rate that is broken; a fifth of it is not."""
    found = sweep(setting)
    for factor in (1.7, 3):
        run = replace(setting, rate=factor * found.broken, is_annealed=True, steps=300)
        if found.progress(run) <= 0.1 and found.progress(replace(run, rate=run.rate / 5)) > 0.5:
            yield run


def resumed(make: Maker) -> Maker:
    """The same, resumed from a checkpoint."""

    def found(setting: Run, draw: random.Random) -> Iterator[Run]:
        return (replace(run, resumed=run.steps // 3) for run in make(setting, draw))

    return found


def accumulated(make: Maker) -> Maker:
    """The same, in steps of four batches."""

    def found(setting: Run, draw: random.Random) -> Iterator[Run]:
        return make(replace(setting, accumulate=4), draw)

    return found


def healthy_adam(setting: Run, draw: random.Random) -> Iterator[Run]:
    """At a fifth or a tenth of the usable rate, from the first step of an Adam on."""
    found = sweep(setting)
    run = replace(setting, rate=found.usable / draw.choice([5, 10]))
    if found.progress(run) > 0.4:
        yield run


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    Attributes:
        make: Finds runs of it in a setting.
        named: The kinds of diagnosis that name the cause.
        count: How many runs.
        optimizers: Of which optimizers.
        batch_sizes: In which batches.
        is_noisy: Whether it needs a problem with much noise.

    """

    make: Maker
    named: tuple[str, ...]
    count: int
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    batch_sizes: tuple[int, ...] = (8, 32, 128, ALL)
    is_noisy: bool = False


IN_DATA = ("data_fault", "bad_batch")
SGDS, SMALL = ("SGD", "momentum", "Nesterov"), (8, 32, 128)
KINDS = {
    "too fast from the start": Kind(too_fast, ("too_fast",), 10),
    "too fast later": Kind(too_fast_later, ("too_fast_later",), 10),
    "at the edge": Kind(at_edge, ("at_edge", "limited"), 8, (*SGDS, "AdamW", "RMSprop"), (ALL,)),
    "room": Kind(room, ("room",), 10),
    "fault in the data": Kind(data_fault, IN_DATA, 10, batch_sizes=SMALL),
    "bad batch": Kind(bad_batch, IN_DATA, 10, batch_sizes=SMALL),
    "limited by noise": Kind(noise_limited, ("noise_limited",), 8, batch_sizes=(4, 8), is_noisy=True),
    "clipped": Kind(clipped, ("clipped",), 8, SGDS),
    "accumulated, too fast": Kind(accumulated(too_fast), ("too_fast",), 4, batch_sizes=(8, 16)),
    "accumulated, room": Kind(accumulated(room), ("room",), 4, batch_sizes=(4, 8, 16)),
    "schedule, too fast": Kind(annealed_too_fast, ("too_fast", "too_fast_later"), 4),
    "schedule, room": Kind(annealed_room, ("room",), 4),
    "resumed, too fast later": Kind(resumed(too_fast_later), ("too_fast_later",), 2),
    "resumed, room": Kind(resumed(room), ("room",), 2),
    "an Adam's first steps": Kind(healthy_adam, ("room", "noise_limited", "at_edge"), 6, ("Adam", "AdamW")),
}


def runs_of(name: str, which: str) -> Iterator[Run]:
    """The runs of a kind: one of each setting that has any, in a random order."""
    kind, draw = KINDS[name], random.Random(f"{name} {which}")
    problems = SETS[which][kind.is_noisy]
    settings = list(itertools.product(problems, kind.optimizers, kind.batch_sizes))
    draw.shuffle(settings)
    found = 0
    for number, (problem, optimizer, batch_size) in enumerate(settings):
        setting = Run(problem, optimizer, batch_size, SEEDS[which] + number)
        try:
            run = next(kind.make(setting, draw), None)
        except LookupError:  # no learning rate is broken
            continue
        if run is not None:
            yield run
            found += 1
            if found == kind.count:
                return
