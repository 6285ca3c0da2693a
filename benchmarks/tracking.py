"""Outermost eigenvalues followed through trainings and crossings: what a measurement costs, and how often it is wrong.

    python -m benchmarks.tracking --root data

`ExtremeTracker`, as `CurvatureProbe` uses it, measures every few steps at an accuracy of 2 %; every measurement is held
against a search from random vectors for 1e-4. Counted as wrong is what is off by more than 2 % and called converged.
`--root` is the folder of CIFAR-10; without it the rows that need it are left out.
"""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from examples.data import Cifar10
from examples.models import LeNet
from lyapunov_lightning.curvature import HessianOperator, LinearOperator, lanczos
from lyapunov_lightning.curvature.tracking.extremes import End, ExtremeTracker

TOL = 0.02
EVERY = 10


@dataclass
class Measurement:
    """An operator, and its eigenvalues where they are known."""

    operator: LinearOperator
    expected: list[float] | None = None


class Diagonal:
    """A diagonal matrix."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self.size, self.dtype, self.device = len(values), values.dtype, values.device

    def matvec(self, vector: Tensor) -> Tensor:
        """The product."""
        return self._values * vector


def overtaking(size: int, seed: int) -> Iterator[Measurement]:
    """An eigenvalue that grows through another one by 5 % a measurement, above a bulk of all others."""
    values = torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 0.1 - 0.05
    for step in range(30):
        values[0], values[1] = 0.9 + 0.05 * step, 1.0
        yield Measurement(Diagonal(values), [float(values.max()), float(values.min())])


def lenet(root: str, batch_size: int, lr: float, seed: int) -> Iterator[Measurement]:
    """A LeNet on CIFAR-10; each measurement on the batch of its step."""
    data = Cifar10(root, download=False, augment=False)
    data.setup("fit")
    images, labels = zip(*(data.train_set[index] for index in range(10_000)), strict=True)
    inputs, targets = torch.stack(images), torch.tensor(labels)
    torch.manual_seed(seed)
    model = LeNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    for step in range(30 * EVERY):
        chosen = torch.randint(len(inputs), (batch_size,))
        batch = inputs[chosen], targets[chosen]
        if step % EVERY == 0:
            yield Measurement(HessianOperator(loss, model.parameters(), [batch]))
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()


def transformer(seed: int) -> Iterator[Measurement]:
    """A small transformer with dropout on sequences of a random Markov chain, by AdamW."""
    torch.manual_seed(seed)
    width, words, length = 64, 200, 32
    embedding = nn.Embedding(words, width)
    nn.init.normal_(embedding.weight, std=0.02)
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True)
    body, norm = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.LayerNorm(width)
    parameters = [*embedding.parameters(), *body.parameters(), *norm.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    chain = torch.softmax(2 * torch.randn(words, words), dim=1)
    mask = nn.Transformer.generate_square_subsequent_mask(length)

    def loss(batch: Tensor) -> Tensor:
        outputs = norm(body(embedding(batch[:, :-1]), mask=mask, is_causal=True)) @ embedding.weight.T
        return functional.cross_entropy(outputs.flatten(0, 1), batch[:, 1:].flatten())

    for step in range(30 * EVERY):
        batch = torch.randint(words, (8, 1))
        for _ in range(length):
            batch = torch.cat([batch, torch.multinomial(chain[batch[:, -1]], 1)], dim=1)
        if step % EVERY == 0:
            yield Measurement(HessianOperator(loss, parameters, [batch]))
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()


def two_towers(seed: int) -> Iterator[Measurement]:
    """Two networks in one loss, whose weight goes over from the one to the other: their Hessian is of two blocks."""
    digits = load_digits()
    inputs, labels = torch.tensor(digits.data[:400] / 16, dtype=torch.float32), torch.tensor(digits.target[:400])
    torch.manual_seed(seed)
    first = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    second = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 10))
    parameters = [*first.parameters(), *second.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.2)
    wanted = functional.one_hot(labels, 10).float()
    for step in range(300):
        share = step / 300

        def loss(batch: Tensor, share: float = share) -> Tensor:
            error = functional.mse_loss(second(batch), wanted)
            return (1 - share) * functional.cross_entropy(first(batch), labels) + 12 * share * error

        if step % 5 == 0:
            yield Measurement(HessianOperator(loss, parameters, [inputs]))
        optimizer.zero_grad()
        loss(inputs).backward()
        optimizer.step()


def follow(name: str, measurements: Iterator[Measurement], end: End = "largest", seed: int = 0) -> None:
    """Follow a series and print what came of it; the first, cold measurement apart."""
    tracker = ExtremeTracker("lanczos", end, TOL, seed)
    costs: list[int] = []
    errors: list[float] = []
    wrong = covered = 0
    for number, measurement in enumerate(measurements):
        random_state = torch.get_rng_state()
        pairs = tracker.measure(measurement.operator)
        expected = measurement.expected
        if expected is None:
            exact = lanczos(measurement.operator, largest=1, smallest=1, tol=1e-4, seed=1000 + number)
            expected = exact.values.tolist()
        torch.set_rng_state(random_state)
        ends = {"largest": expected[:1], "smallest": expected[1:], "both": expected}[end]
        offs = [abs(float(found) - right) for found, right in zip(pairs.values, ends, strict=True)]
        relative = [off / abs(right) for off, right in zip(offs, ends, strict=True)]
        if number:
            costs.append(pairs.num_matvecs)
            errors.append(max(relative))
            wrong += max(relative) > TOL and bool(pairs.converged.all())
            covered += all(off <= float(error) for off, error in zip(offs, pairs.value_errors, strict=True))
    print(
        f"{name:44s} {end:8s} products {statistics.median(costs):4.0f} median {statistics.mean(costs):5.1f} mean"
        f" {max(costs):3d} most; error {statistics.median(errors):.1e} median {max(errors):.1e} worst;"
        f" wrong {wrong} of {len(costs)}; within value_error {covered}",
        flush=True,
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of CIFAR-10")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(arguments.seeds):
        for size in (10**4, 10**5, 10**6):
            follow(f"overtaking, {size:.0e}", overtaking(size, seed), seed=seed)
        follow("two towers", two_towers(seed), seed=seed)
        follow("transformer", transformer(seed), seed=seed)
        if arguments.root is not None:
            for end in ("largest", "both"):
                follow("LeNet, batches of 128", lenet(arguments.root, 128, 0.05, seed), end, seed)
            follow("LeNet, batches of 4", lenet(arguments.root, 4, 0.02, seed), seed=seed)


if __name__ == "__main__":
    main()
