"""What `measure` takes where the data are read anew for every product, and where they are held.

    python -m benchmarks.streaming        # a minute or two on one core; nothing is downloaded

96 batches of 2 MiB, an MLP of 33,000 parameters, one largest eigenvalue to a thousandth. Each row is a process of its
own, with one thread. The bytes of batches are counted from the moment at which the dataloader has made one until the
last that holds it lets go.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
import weakref
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.models import MLP, Classifier
from lyapunov_lightning import measure
from lyapunov_lightning.curvature import HessianOperator

BATCHES, BATCH_SIZE, FEATURES = 96, 256, 2048
MIB = 2**20
WAYS = {"held": (2**30, 2**29), "read, graphs up to 64 MiB": (0, 64 * MIB), "read, no graphs": (0, 0)}
"""How many bytes of batches, and of graphs, may be held."""


class Drawn(Dataset[tuple[Tensor, int]]):
    """Samples that are drawn when they are asked for, each the same every time."""

    def __len__(self) -> int:
        return BATCHES * BATCH_SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(FEATURES, generator=torch.Generator().manual_seed(index)), index % 10


class Counted:
    """Makes batches, and counts the bytes of those that somebody holds."""

    def __init__(self) -> None:
        self.made = self.held = self.most = 0

    def __call__(self, samples: list[tuple[Tensor, int]]) -> list[Tensor]:
        """A batch of these samples."""
        inputs = torch.stack([sample for sample, _ in samples])
        self.made += 1
        self.held += inputs.nbytes
        self.most = max(self.most, self.held)
        weakref.finalize(inputs.untyped_storage(), self._let_go, inputs.nbytes)
        return [inputs, torch.tensor([label for _, label in samples])]

    def _let_go(self, num_bytes: int) -> None:
        self.held -= num_bytes


def work(way: str) -> dict[str, Any]:
    """Measure once."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batches, graphs = WAYS[way]
    module = Classifier(MLP(FEATURES, [16]), optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1))
    counted = Counted()
    loader = DataLoader(Drawn(), BATCH_SIZE, collate_fn=counted)
    began = time.process_time()
    # For a user that is no option: the default is four times all of these graphs.
    assert HessianOperator.__init__.__kwdefaults__ is not None
    HessianOperator.__init__.__kwdefaults__["max_graph_bytes"] = graphs
    found = measure(module, loader, max_batch_bytes=batches, progress=False)
    return {
        "value": float(found.values),
        "products": found.matvecs,
        "seconds": time.process_time() - began,
        "made": counted.made,
        "most": counted.most / MIB,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=list(WAYS), help=argparse.SUPPRESS)
    way = parser.parse_args().worker
    if way is not None:
        warnings.simplefilter("ignore")
        pl.seed_everything(0, verbose=False)
        print(json.dumps(work(way)))
        return
    print("| 192 MiB of data | most of them in memory | most memory of the process | batches made | processor time |")
    print("|---|---|---|---|---|")
    for way in WAYS:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.streaming", "--worker", way]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        found = json.loads(lines[-1])
        memory = f"{found['most']:.0f} MiB | {found['peak']:.0f} MiB"
        print(f"| {way} | {memory} | {found['made']:,} | {found['seconds']:.1f} s |", flush=True)
        print(f"    {found['products']} products, {found['value']:.9g}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
