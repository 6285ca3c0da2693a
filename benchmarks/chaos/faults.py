"""The faults. Each returns how often it was tried, how often all was well, and what was not."""

import copy
import csv
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.chaos.training import HALF, STEPS, Faulty, all_six, fork, reading, train, wait
from lyapunov_lightning import HessianConfig


@dataclass
class Tried:
    """What came of a fault."""

    count: int = 0
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def see(self, well: bool, otherwise: str) -> None:
        """Count one try."""
        self.count += 1
        if not well:
            self.faults.append(otherwise)


def ended(folder: Path) -> list[torch.Tensor] | None:
    """The weights at the end of a run, if it came there."""
    path = folder / "end.pt"
    return torch.load(path, weights_only=True)["weights"] if path.exists() else None


def same_end(folder: Path, other: Path) -> bool:
    """Whether two runs came to the same weights, to the bit."""
    first, second = ended(folder), ended(other)
    return first is not None and second is not None and all(map(torch.equal, first, second))


def rows(folder: Path) -> dict[str, list[list[str]]]:
    """All rows of all tables but those that hold times."""
    tables = {}
    for path in sorted((folder / "out").glob("*[a-z].csv")):
        with path.open(newline="") as file:
            tables[path.name] = [row for row in csv.reader(file) if not row[2].endswith("seconds")]
    return tables


def files(folder: Path) -> list[str]:
    """The eigenvector files of the run, without those that it has put aside: it may have begun twice."""
    return sorted(path.name for path in (folder / "out").iterdir() if path.suffix != ".csv" and path.is_file())


def straight(folder: Path) -> Path:
    """A run that nothing happens to."""
    there = folder / "straight"
    there.mkdir()
    assert wait(fork(lambda: train(there, all_six(there)), there / "log")) == 0, (there / "log").read_text()[-2000:]
    return there


def kills(folder: Path, unharmed: Path, count: int) -> Tried:
    """SIGKILL at random moments, and on from the last checkpoint, until the run ends."""
    tried, chance = Tried(), random.Random(1)
    length = 5.0  # seconds that the last process took which was not killed, on a machine that may be busy
    for number in range(1, 10_000):
        there = folder / f"kills-{number}"
        there.mkdir()
        num_kills = 0
        while True:
            process = fork(lambda there=there: train(there, all_six(there)), there / "log")  # type: ignore[misc]
            began = time.monotonic()
            if tried.count + num_kills < count and num_kills < 12:
                time.sleep(chance.uniform(0, length))
                os.kill(process, signal.SIGKILL)  # one that has ended meanwhile does not mind
            status = wait(process)
            if status == 0:
                length = time.monotonic() - began
            if status != -signal.SIGKILL:
                break
            num_kills += 1
        well = status == 0 and same_end(there, unharmed) and rows(there) == rows(unharmed)
        well = well and files(there) == files(unharmed)
        for _ in range(max(num_kills, 1)):
            tried.see(well, f"run {number}: status {status}, {(there / 'log').read_text()[-300:]!r}")
        if tried.count >= count:
            return tried
    return tried


def interrupted(folder: Path, unharmed: Path, number: signal.Signals, count: int) -> Tried:
    """A signal, after which the process ends as it does without the callbacks, and the run can go on."""
    tried, chance = Tried(), random.Random(2)
    bare = folder / f"{number.name}-bare"
    bare.mkdir()

    def long(there: Path, callbacks: list[Any]) -> Callable[[], Any]:
        return lambda: train(there, callbacks, steps=10**6, checkpoints=False)

    process = fork(long(bare, []), bare / "log")
    time.sleep(2)
    os.kill(process, number)
    expected = wait(process)
    for index in range(count):
        there = folder / f"{number.name}-{index}"
        there.mkdir()
        process = fork(lambda there=there: train(there, all_six(there)), there / "log")  # type: ignore[misc]
        time.sleep(chance.uniform(0.3, 1.5))
        os.kill(process, number)
        status = wait(process)
        again = 0 if status == 0 else wait(fork(lambda there=there: train(there, all_six(there)), there / "log"))  # type: ignore[misc]
        well = status in (expected, 0, -number) and again == 0 and same_end(there, unharmed)
        tried.see(well and rows(there) == rows(unharmed), f"status {status} for {expected}, then {again}")
    return tried


def _ends_as_without(
    tried: Tried, there: Path, callbacks: Callable[[Path], list[Any]], limit: Callable[[], Any]
) -> None:
    """Train under a limit, once without the callbacks and once with them."""
    statuses = []
    for name, own in (("bare", []), ("ours", None)):
        place = there / name
        place.mkdir(parents=True)

        def run(place: Path = place, own: Any = own) -> None:
            made = callbacks(place) if own is None else own
            limit()
            train(place, made, checkpoints=False, steps=12, pictures=True)

        statuses.append(wait(fork(run, there / f"{name}.log")))
    well = statuses[1] == 0 or statuses[0] != 0
    for path in there.rglob("out/*.csv"):
        with path.open(newline="") as file:
            well = well and all(len(row) == 4 for row in csv.reader(file)) and path.read_bytes()[-1:] in (b"\n", b"")
    tried.see(well, f"statuses {statuses}, {(there / 'ours.log').read_text()[-300:]!r}")


def full_disk(folder: Path) -> Tried:
    """No file may grow beyond a size, which cuts rows in the midst."""
    tried = Tried()
    for size in (0, 10, 100, 500, 1000, 2000, 3000, 5000):
        limit = lambda size=size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))  # noqa: E731
        _ends_as_without(tried, folder / f"full-{size}", reading, limit)  # type: ignore[arg-type]
    return tried


def full_tmpfs(folder: Path) -> Tried | None:
    """A small disk in memory that is full; None where it cannot be mounted."""
    tried = Tried()
    for kilobytes in (4, 8, 16, 32):
        disk = folder / f"tmpfs-{kilobytes}" / "disk"
        disk.mkdir(parents=True)
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)], capture_output=True, check=False
        )
        if mounted.returncode:
            return None
        try:
            _ends_as_without(tried, folder / f"tmpfs-{kilobytes}", lambda _, disk=disk: reading(disk), lambda: None)  # type: ignore[misc]
        finally:
            subprocess.run(["umount", str(disk)], check=False)
    return tried


def little_memory(folder: Path) -> Tried:
    """No more address space than a little."""
    tried = Tried()
    for megabytes in (1, 4, 16, 32, 64, 128, 256):

        def limit(megabytes: int = megabytes) -> None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + megabytes * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))

        _ends_as_without(tried, folder / f"memory-{megabytes}", all_six, limit)
    return tried


def loggers(folder: Path) -> Tried:
    """Loggers that raise, now and then or always, or hang for a second."""
    tried, chance = Tried(), random.Random(3)

    def raise_(often: float) -> None:
        if chance.random() < often:
            raise ConnectionError("out of reach")

    acts: list[Callable[[], None]] = [lambda often=often: raise_(often) for often in (0.1, 0.5, 0.9, 1.0)]  # type: ignore[misc]
    acts += [lambda: time.sleep(1), lambda: _hang_and_raise()]
    for number, act in enumerate(acts):
        there = folder / f"logger-{number}"
        there.mkdir()

        def run(there: Path = there, act: Callable[[], None] = act) -> None:
            train(there, reading(there), logger=Faulty(act), steps=6)

        tried.see(wait(fork(run, there / "log")) == 0, (there / "log").read_text()[-300:])
    return tried


def _hang_and_raise() -> None:
    time.sleep(1)
    raise TimeoutError("out of reach")


def evaluations(folder: Path, most: int) -> Tried:
    """Every evaluation of the loss fails in turn, and the run is that without the callbacks."""
    tried, steps = Tried(), 7
    bare = folder / "evaluations-bare"
    bare.mkdir()
    assert wait(fork(lambda: train(bare, [], steps=steps), bare / "log")) == 0
    counted = folder / "evaluations-counted"
    counted.mkdir()

    def counting(there: Path, failing: int | None) -> None:
        seen = iter(range(10**9))

        def loss(module: Any, batch: Any) -> torch.Tensor:
            found = next(seen)
            if found == failing:
                raise RuntimeError("planned")
            (there / "count").write_text(str(found)) if failing is None else None
            return module.training_step(batch, 0)

        train(there, reading(there, HessianConfig(fraction=0.5, loss_fn=loss)), steps=steps)

    assert wait(fork(lambda: counting(counted, None), counted / "log")) == 0
    total = int((counted / "count").read_text()) + 1
    for failing in range(0, total, max(1, -(-total // most))):
        there = folder / f"evaluations-{failing}"
        there.mkdir()
        status = wait(fork(lambda there=there, failing=failing: counting(there, failing), there / "log"))  # type: ignore[misc]
        tried.see(status == 0 and same_end(there, bare), f"evaluation {failing} of {total}: status {status}")
    return tried


def _leaves(state: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(state, dict) and state:
        for key, value in state.items():
            yield from _leaves(value, (*where, key))
    else:
        yield where


def _corrupted(state: Any, chance: random.Random) -> Any:
    """A state with a few of its leaves changed or gone."""
    state = copy.deepcopy(state)
    for where in chance.sample([*_leaves(state)], 3):
        inner = state
        for key in where[:-1]:
            inner = inner[key]
        value, kind = inner.get(where[-1]), chance.randrange(6)
        if kind == 0:
            del inner[where[-1]]
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            inner[where[-1]] = (value * torch.nan, value.flatten()[:-1], value[..., :1], value.int(), None)[kind - 1]
        else:
            inner[where[-1]] = (None, "a word", [], -1.5, {"a": 1})[kind - 1]
    return state


def corrupted(folder: Path, count: int) -> Tried:
    """Callback states with broken leaves, and tables with bytes changed, cut, put in or zeroed."""
    tried, chance = Tried(), random.Random(4)
    half = folder / "half"
    half.mkdir()
    assert wait(fork(lambda: train(half, all_six(half), steps=STEPS // 2), half / "log")) == 0
    checkpoint = torch.load(half / "last.ckpt", weights_only=True)
    tables = {path.name: path.read_bytes() for path in (half / "out").glob("*.csv")}
    ours = [key for key in checkpoint["callbacks"] if "ModelCheckpoint" not in key]
    for number in range(count):
        there = folder / f"corrupted-{number}"
        (there / "out").mkdir(parents=True)
        broken = {key: _corrupted(checkpoint["callbacks"][key], chance) if key in ours else value
                  for key, value in checkpoint["callbacks"].items()}  # fmt: skip
        torch.save({**checkpoint, "callbacks": broken}, there / "last.ckpt")
        for name, content in tables.items():
            at, kind = chance.randrange(len(content)), chance.randrange(4)
            put = (bytes([chance.randrange(256)]), b"", b"\0" * 50, b"a foreign row;\n")[kind]
            (there / "out" / name).write_bytes(content[:at] + put + (content[at + 1 :] if kind != 1 else b""))
        status = wait(fork(lambda there=there: train(there, all_six(there)), there / "log"))  # type: ignore[misc]
        log = (there / "log").read_text()
        kept = all(len(row) == 4 for table in rows(there).values() for row in table)
        tried.see(status == 0 and kept and ended(there) is not None, f"{number}: status {status}, {log[-400:]!r}")
    return tried


__all__ = ["HALF", "Tried", "corrupted", "evaluations", "full_disk", "full_tmpfs", "interrupted", "kills"]
