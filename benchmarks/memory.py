"""Peak memory of training a ResNet-18 with and without a SpectrumTracker, each in a process of its own.

``python -m benchmarks.memory`` prints the peak resident size of both and the difference. The images are random: what
is measured is memory.
"""

import argparse
import resource
import subprocess
import sys

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from examples.models import Classifier
from lyapunov_lightning import HessianConfig, SpectrumTracker


def train(with_tracker: bool, largest: int, batch_size: int) -> None:
    """Train a few steps and print the process's peak resident size in MiB, with the products of the tracker."""
    torch.manual_seed(0)
    network = resnet18(num_classes=10)
    data = TensorDataset(torch.randn(10 * batch_size, 3, 32, 32), torch.randint(10, (10 * batch_size,)))
    tracker = SpectrumTracker(2, largest, hessian=HessianConfig(num_batches=4), tol=0.1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=3,
        callbacks=[tracker] if with_tracker else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(network, optimizer=lambda p: torch.optim.SGD(p, 0.01)), DataLoader(data, batch_size))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"PEAK {peak:.0f} {tracker.results[-1].matvecs if tracker.results else 0}")


def main() -> None:
    """Run both processes and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=10, help="eigenvalues that are tracked")
    parser.add_argument("--batch-size", type=int, default=128, help="images in a batch; four batches are measured")
    parser.add_argument("--worker", choices=["with", "without"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        train(args.worker == "with", args.largest, args.batch_size)
        return
    peaks = {}
    for kind in ("without", "with"):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--worker", kind]
        command += ["--largest", str(args.largest), "--batch-size", str(args.batch_size)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak, matvecs = next(line for line in output.splitlines() if line.startswith("PEAK")).split()[1:]
        peaks[kind] = float(peak)
        print(f"{kind:>8} the tracker: {peaks[kind] / 1024:.2f} GiB at the peak ({matvecs} products a measurement)")
    print(f"the tracker's own: {(peaks['with'] - peaks['without']) / 1024:.2f} GiB")


if __name__ == "__main__":
    main()
