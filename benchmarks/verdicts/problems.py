"""The problems whose largest usable learning rate is looked for: small networks of many kinds, on about 1,000 samples.

Nothing of `held_out` may stand here: these are the problems on which the gauge was made.
"""

import functools
import gzip
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.problems import SmallTransformer, images
from benchmarks.quasi_newton import Samples, characters

SAMPLES = 1024
"""With 300 steps a batch of 4 sees them a little more than once."""
FEWER = 512
"""For networks that take longer."""
VOCABULARY = 50
"""The characters of the Penn Treebank."""
LENGTH = 6
"""Of the pieces that a transformer reads."""


@dataclass(frozen=True)
class Problem:
    """Data, a network and a mean loss that is never negative.

    Attributes:
        data: Makes the samples, given the folder of the data.
        network: Makes the network, with the weights that torch's global generator gives it.
        loss: The mean loss of the network's outputs, given the targets.
        needs: What has to be in the folder of the data.

    """

    data: Callable[[str], Samples]
    network: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    needs: str = ""

    def is_there(self, root: str) -> bool:
        """Whether its data are in the folder."""
        return not self.needs or (Path(root) / self.needs).exists()


def seeded(seed: int) -> torch.Generator:
    """A generator of its own: data are the same in every run."""
    return torch.Generator().manual_seed(seed)


def _idx(path: Path, header: int, count: int) -> Tensor:
    """The first bytes after the header of a file of MNIST, which may be packed."""
    packed = path.with_suffix(".gz")
    with gzip.open(packed) if packed.exists() else path.open("rb") as file:
        file.seek(header)
        return torch.frombuffer(bytearray(file.read(count)), dtype=torch.uint8)


def mnist(root: str) -> Samples:
    """Digits of 10 x 10 pixels."""
    raw = Path(root, "MNIST", "raw")
    pixels = _idx(raw / "train-images-idx3-ubyte", 16, SAMPLES * 28 * 28).view(-1, 1, 28, 28).float()
    pixels = functional.interpolate(pixels, size=10, mode="area")
    return (pixels - pixels.mean()) / pixels.std(), _idx(raw / "train-labels-idx1-ubyte", 8, SAMPLES).long()


def mislabelled_mnist(root: str) -> Samples:
    """The same, one label of five drawn at random."""
    inputs, labels = mnist(root)
    generator = seeded(3)
    is_drawn = torch.rand(len(labels), generator=generator) < 0.2
    return inputs, torch.where(is_drawn, torch.randint(10, labels.shape, generator=generator), labels)


def small_cifar(root: str) -> Samples:
    """Images of 10 x 10 pixels."""
    pixels, labels = images(root, FEWER)
    return functional.interpolate(pixels, size=10, mode="area"), labels


def spirals(root: str) -> Samples:
    """Three spirals in the plane."""
    generator = seeded(5)
    length, labels = 0.3 + 3 * torch.rand(SAMPLES, generator=generator), torch.arange(SAMPLES) % 3
    angle = length + labels * 2 * math.pi / 3
    points = torch.stack([length * angle.cos(), length * angle.sin()], dim=1)
    return points + 0.1 * torch.randn(SAMPLES, 2, generator=generator), labels


def wave(root: str) -> Samples:
    """A smooth function of three numbers, without noise."""
    inputs = 4 * torch.rand(SAMPLES, 3, generator=seeded(6)) - 2
    return inputs, (torch.sin(inputs[:, :2].sum(1)) + inputs[:, 0] * inputs[:, 2] / 2).unsqueeze(1)


def next_character(root: str) -> Samples:
    """Eight characters of the Penn Treebank, and the one that follows."""
    pieces, _ = characters(root)
    return pieces[:SAMPLES, :8].contiguous(), pieces[:SAMPLES, 8].contiguous()


def pieces_of_text(root: str) -> Samples:
    """Pieces of the Penn Treebank, each with the piece shifted by one character."""
    pieces, shifted = characters(root)
    return pieces[:FEWER, :LENGTH].contiguous(), shifted[:FEWER, :LENGTH].contiguous()


def scales(root: str) -> Samples:
    """A linear function with noise, of inputs whose scales are up to 30 apart."""
    generator = seeded(8)
    inputs = torch.randn(SAMPLES, 20, generator=generator) * torch.logspace(0, -1.5, 20)
    weights = torch.randn(20, 1, generator=generator)
    return inputs, inputs @ weights + 0.3 * torch.randn(SAMPLES, 1, generator=generator)


def ratings(root: str) -> Samples:
    """Ratings of 60 items by 100 users, by four hidden tastes and noise; users and items are not equally frequent."""
    generator = seeded(7)
    users, items = ((torch.rand(SAMPLES, generator=generator) ** 2 * n).long() for n in (100, 60))
    tastes, traits = torch.randn(100, 4, generator=generator), torch.randn(60, 4, generator=generator)
    noise = 0.3 * torch.randn(SAMPLES, generator=generator)
    return torch.stack([users, items], dim=1), (tastes[users] * traits[items]).sum(1) / 2 + noise


def collocation(root: str) -> Samples:
    """Points of the unit interval, and the second derivative that is wanted there."""
    points = torch.rand(SAMPLES, 1, generator=seeded(9))
    return points, -((3 * math.pi) ** 2) / 10 * torch.sin(3 * math.pi * points)


class Factors(nn.Module):
    """A matrix factorisation with biases: what a user thinks of an item."""

    def __init__(self, rank: int = 8) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(100, rank + 1), nn.Embedding(60, rank + 1)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, pairs: Tensor) -> Tensor:
        """The ratings."""
        users, items = self.users(pairs[:, 0]), self.items(pairs[:, 1])
        return (users[:, 1:] * items[:, 1:]).sum(1) + users[:, 0] + items[:, 0]


class SecondDerivative(nn.Module):
    """The second derivative of a network of one number that is 0 at 0 and at 1: a physics-informed network."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers = [nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)]
        self.body = nn.Sequential(*layers)

    def forward(self, points: Tensor) -> Tensor:
        """At each of the points."""
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            value = self.body(points) * points * (1 - points)
            (slope,) = torch.autograd.grad(value.sum(), points, create_graph=True)
            return torch.autograd.grad(slope.sum(), points, create_graph=True)[0]


def mlp(widths: list[int], activation: type[nn.Module]) -> nn.Module:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width, following in itertools.pairwise(widths):
        layers += [nn.Linear(width, following), activation()]
    return nn.Sequential(*layers[:-1])


def cnn(norm: Callable[[int], nn.Module], activation: type[nn.Module]) -> nn.Module:
    """Two convolutions, each with a norm."""
    first, second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
    norms = [norm(8), activation()], [norm(16), activation()]
    return nn.Sequential(first, *norms[0], second, *norms[1], nn.Flatten(), nn.Linear(144, 10))


def normed_characters() -> nn.Module:
    """An embedding, and a layer with LayerNorm."""
    body = [nn.Flatten(), nn.Linear(96, 40), nn.LayerNorm(40), nn.GELU(), nn.Linear(40, VOCABULARY)]
    return nn.Sequential(nn.Embedding(VOCABULARY, 12), *body)


def transformer() -> nn.Module:
    """One layer, tied embeddings."""
    return SmallTransformer(VOCABULARY, width=16, layers=1, length=LENGTH)


_MNIST, _CIFAR, _PTB = "MNIST/raw", "cifar-10-batches-py", "ptb/ptb.train.txt"
_classes, _squares = functional.cross_entropy, functional.mse_loss

PROBLEMS = {
    "MNIST, ReLU": Problem(mnist, lambda: mlp([100, 40, 40, 10], nn.ReLU), _classes, _MNIST),
    "label noise": Problem(mislabelled_mnist, lambda: mlp([100, 48, 10], nn.GELU), _classes, _MNIST),
    "spirals, tanh": Problem(spirals, lambda: mlp([2, 32, 32, 3], nn.Tanh), _classes),
    "regression, SiLU": Problem(wave, lambda: mlp([3, 32, 32, 1], nn.SiLU), _squares),
    "characters, LayerNorm": Problem(next_character, normed_characters, _classes, _PTB),
    "CNN, BatchNorm": Problem(small_cifar, lambda: cnn(nn.BatchNorm2d, nn.ReLU), _classes, _CIFAR),
    "CNN, GroupNorm": Problem(small_cifar, lambda: cnn(functools.partial(nn.GroupNorm, 2), nn.GELU), _classes, _CIFAR),
    "transformer": Problem(pieces_of_text, transformer, _classes, _PTB),
    "factorisation": Problem(ratings, Factors, _squares),
    "physics-informed": Problem(collocation, SecondDerivative, _squares),
    "bad conditioning": Problem(scales, lambda: mlp([20, 48, 1], nn.ReLU), _squares),
}
