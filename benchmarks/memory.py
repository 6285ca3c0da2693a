"""Peak memory of training a ResNet-18 with a callback over that without, in vectors of the model's size.

    python -m benchmarks.memory                 # the probe as it comes, at every other step, and the tracker
    python -m benchmarks.memory --batch-size 128

Each training has a process of its own, whose allocator gives back at once what is freed, so that the peak of its
resident size is what was in use. The images are random: what is measured is memory. Beside the vectors a measurement
holds its batch's graph, which grows with the batch and not with the model.
"""

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Callable

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from benchmarks.trainers import train
from examples.models import Classifier
from lyapunov_lightning import CurvatureProbe, HessianConfig, SpectrumTracker

CALLBACKS: dict[str, Callable[[], list[pl.Callback]]] = {
    "without": list,
    "CurvatureProbe()": lambda: [CurvatureProbe()],
    "CurvatureProbe(2)": lambda: [CurvatureProbe(2)],
    'CurvatureProbe(2, "lyapunov")': lambda: [CurvatureProbe(2, "lyapunov")],
    "SpectrumTracker(12, 10)": lambda: [SpectrumTracker(12, 10, hessian=HessianConfig(num_batches=4), tol=0.1)],
}

_STEPS = 26
"""In which the probe as it comes measures an eigenvalue, at step 20, and the tracker a second time."""

_RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
"""By which glibc takes each tensor from the system and gives it back."""


def peak_of(kind: str, batch_size: int) -> None:
    """Train a few steps and print the process's peak resident size in bytes, and that of a vector."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = resnet18(num_classes=10)
    data = TensorDataset(torch.randn(8 * batch_size, 3, 32, 32), torch.randint(10, (8 * batch_size,)))
    module = Classifier(network, optimizer=lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9))
    train(module, DataLoader(data, batch_size), CALLBACKS[kind](), _STEPS)
    vector = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    print(f"PEAK {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024} {vector}")


def main() -> None:
    """Run all, each in its process, and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--worker", choices=list(CALLBACKS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        peak_of(args.worker, args.batch_size)
        return
    plain = 0
    for kind in CALLBACKS:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--worker", kind]
        command += ["--batch-size", str(args.batch_size)]
        found = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **_RETURNED})
        peak, vector = map(int, next(line for line in found.stdout.splitlines() if line.startswith("PEAK")).split()[1:])
        plain = plain or peak
        print(f"{kind}: {peak / 2**30:.2f} GiB, {(peak - plain) / vector:.1f} vectors of {vector / 2**20:.0f} MiB more")


if __name__ == "__main__":
    main()
