"""How straight the way of one measurement through the package is: calls, files, and moves between files.

Run it from a clone: ``python -m benchmarks.walk``. A `CurvatureProbe` with its defaults watches the training of a
three-layer network by SGD, with a logger, and `sys.setprofile` records one of its measurements: all that the callback's
``on_train_batch_start`` does. It is the second one, a warm one: the first has gathered the fixed data and left a vector
to start from. What is counted is a property of the code and not of the machine:

- *calls*: entries into Python functions of the package. A generator counts each time it is resumed, so that a context
  manager counts twice.
- *functions* and *files*: how many different ones were entered.
- *moves*: of two consecutive frames of the package, whatever ran in between, the second is in another file. *Out* is a
  move by a call (or a resumed generator), *back* one by a return (or a ``yield``).
- *frames to the user*: frames of the package below the first call of the user's ``training_step``, with their files.

The number of products depends on rounding, and each has its share of the calls and the moves; so it is given, too.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lyapunov_lightning
from lyapunov_lightning.callbacks import CurvatureProbe

PACKAGE = os.path.dirname(os.path.abspath(lyapunov_lightning.__file__)) + os.sep


@dataclass
class Walk:
    """What one measurement went through.

    Attributes:
        calls: How often each function of the package was entered, by file, name and line.
        out: Moves by calls, from file to file.
        back: Moves by returns, from file to file.
        to_user: The files of the frames below the first ``training_step``, the outermost one first.
        num_matvecs: Hessian-vector products of the measurement.

    """

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    out: Counter[tuple[str, str]] = field(default_factory=Counter)
    back: Counter[tuple[str, str]] = field(default_factory=Counter)
    to_user: list[str] = field(default_factory=list)
    num_matvecs: int = 0

    @property
    def files(self) -> set[str]:
        """The files that were entered."""
        return {file for file, _ in self.calls}

    @property
    def moves(self) -> int:
        """Moves between files, out and back."""
        return self.out.total() + self.back.total()

    def share(self, part: str) -> float:
        """The share of the moves that begin or end in files whose path contains `part`."""
        both = self.out + self.back
        return sum(count for pair, count in both.items() if any(part in file for file in pair)) / max(both.total(), 1)

    def __str__(self) -> str:
        return (
            f"calls {self.calls.total():,}, functions {len(self.calls)}, files {len(self.files)}, moves {self.moves:,}"
            f" ({self.out.total()} out, {self.back.total()} back), to the user's training_step"
            f" {len(self.to_user)} frames in {len(set(self.to_user))} files, {self.num_matvecs} products"
        )


@contextmanager
def walked(walk: Walk, user: Callable[..., Any]) -> Iterator[None]:
    """Record what is called in a block.

    Args:
        walk: Where to.
        user: The user's function, whose depth is of interest.

    """
    frames: list[str] = []
    own = user.__code__

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "return"):
            return
        code = frame.f_code
        if code is own and event == "call" and not walk.to_user:
            walk.to_user = list(frames)
        if not code.co_filename.startswith(PACKAGE):
            return
        file = code.co_filename[len(PACKAGE) :]
        if event == "call":
            walk.calls[file, f"{code.co_name}:{code.co_firstlineno}"] += 1
            if frames and frames[-1] != file:
                walk.out[frames[-1], file] += 1
            frames.append(file)
        elif frames:
            frames.pop()
            if frames and frames[-1] != file:
                walk.back[file, frames[-1]] += 1

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


class Network(pl.LightningModule):
    """Three layers with cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss, logged."""
        loss = nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WalkedProbe(CurvatureProbe):
    """A probe one of whose measurements is recorded: the second.

    Attributes:
        walk: What was recorded.

    """

    walk: Walk | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure, and record the measurement."""
        hook = super().on_train_batch_start
        if len(self.results) != 1 or self.walk is not None:
            hook(trainer, pl_module, batch, batch_idx)
            return
        walk = Walk()
        with walked(walk, Network.training_step):
            hook(trainer, pl_module, batch, batch_idx)
        walk.num_matvecs = self.results[-1].matvecs
        self.walk = walk


def measure(directory: str) -> Walk:
    """Train for two measurements, and record the second one; what is logged goes to a directory."""
    pl.seed_everything(0, verbose=False)
    inputs, labels = torch.randn(256, 20), torch.randint(4, (256,))
    probe = WalkedProbe(every_n_steps=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        callbacks=[probe],
        logger=CSVLogger(directory),
        default_root_dir=directory,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Network(), DataLoader(TensorDataset(inputs, labels), batch_size=32))
    assert probe.walk is not None
    return probe.walk


def main() -> None:
    """Print the counts, and on request the moves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=0, help="how many of the most frequent moves to list")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        walk = measure(directory)
    print(walk)
    print(f"share of the moves that touch training/replica: {walk.share('replica'):.0%}")
    for (first, second), count in (walk.out + walk.back).most_common(arguments.pairs):
        print(f"{count:6d}  {first} -> {second}")


if __name__ == "__main__":
    main()
