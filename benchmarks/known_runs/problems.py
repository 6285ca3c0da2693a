"""Small problems, most of them made up, and the sets that they form."""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.quasi_newton import Samples

Loss = Callable[[Tensor, Tensor], Tensor]


def spirals(seed: int) -> Samples:
    """Three arms of a spiral, one class each."""
    generator = torch.Generator().manual_seed(seed)
    radius, label = torch.rand(900, generator=generator) * 3 + 0.3, torch.arange(900) % 3
    angle = 2.2 * radius + 2 * math.pi / 3 * label
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1) / 2
    return points + 0.05 * torch.randn(900, 2, generator=generator), label


def waves(seed: int) -> Samples:
    """A smooth function of four numbers."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(1500, 4, generator=generator) * 2 - 1
    values = torch.sin(3 * inputs.sum(dim=1)) + inputs[:, 0] * inputs[:, 1]
    return inputs, values[:, None] + 0.05 * torch.randn(1500, 1, generator=generator)


def clusters(seed: int) -> Samples:
    """Five clusters in 20 dimensions that overlap."""
    generator = torch.Generator().manual_seed(seed)
    centres, label = torch.randn(5, 20, generator=generator), torch.randint(0, 5, (1000,), generator=generator)
    return centres[label] + 1.2 * torch.randn(1000, 20, generator=generator), label


def noisy(seed: int) -> Samples:
    """A smooth function in noise that is twice as large."""
    generator = torch.Generator().manual_seed(seed)
    inputs, weights = torch.randn(1500, 10, generator=generator), torch.randn(10, 1, generator=generator) / 3
    return inputs, torch.tanh(inputs @ weights) + 0.7 * torch.randn(1500, 1, generator=generator)


def steps_in_noise(seed: int) -> Samples:
    """The sign of a product, in noise that is as large."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(1200, 6, generator=generator) * 2 - 1
    signs = torch.sign(inputs[:, :1] * inputs[:, 1:2])
    return inputs, signs + torch.randn(1200, 1, generator=generator)


def letters(seed: int, length: int, size: int) -> Samples:
    """The next letter after some, of a text made by a Markov chain."""
    generator = torch.Generator().manual_seed(seed)
    chances = torch.softmax(1.5 * torch.randn(size, size, generator=generator), dim=1)
    text = [0]
    for _ in range(3000 + length):
        text.append(int(torch.multinomial(chances[text[-1]], 1, generator=generator)))
    letter = torch.tensor(text)
    return torch.stack([letter[place : place + 3000] for place in range(length)], dim=1), letter[length : 3000 + length]


def from_scikit(name: str, seed: int) -> Samples:
    """A data set of scikit-learn, standardised; a shuffled part of it where it is large."""
    from sklearn import datasets

    inputs, targets = map(torch.tensor, getattr(datasets, f"load_{name}")(return_X_y=True))
    inputs = inputs.float()
    inputs = (inputs - inputs.mean(dim=0)) / (inputs.std() if name == "digits" else inputs.std(dim=0))
    if name == "diabetes":
        targets = ((targets - targets.mean()) / targets.std()).float()[:, None]
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))[:1200]
    return inputs[order], targets[order]


def digits(seed: int, targets: str = "label") -> Samples:
    """Handwritten digits, with their labels, these as numbers 0 and 1, or themselves to be learned."""
    inputs, label = from_scikit("digits", seed)
    if targets == "label":
        return inputs.view(-1, 1, 8, 8), label
    return inputs, inputs if targets == "itself" else functional.one_hot(label, 10).float()


def mlp(*widths: int, activation: type[nn.Module], norm: bool = False) -> nn.Module:
    """Linear layers of these widths."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, outputs), *([nn.LayerNorm(outputs)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


def reader(size: int, length: int, width: int) -> nn.Module:
    """A network that reads letters."""
    hidden = [nn.Linear(8 * length, width), nn.GELU()]
    return nn.Sequential(nn.Embedding(size, 8), nn.Flatten(), *hidden, nn.Linear(width, size))


def convolutions() -> nn.Module:
    """Two convolutions with a batch normalization between them."""
    body = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(32, 10))


@dataclass(frozen=True)
class Problem:
    """Data for a seed, a network, and their loss."""

    data: Callable[[int], Samples]
    network: Callable[[], nn.Module]
    loss: Loss


CE, MSE = functional.cross_entropy, functional.mse_loss
PROBLEMS = {
    "spirals": Problem(spirals, lambda: mlp(2, 32, 32, 3, activation=nn.Tanh), CE),
    "waves": Problem(waves, lambda: mlp(4, 48, 48, 1, activation=nn.SiLU), MSE),
    "digits": Problem(digits, lambda: mlp(64, 32, 32, 10, activation=nn.ReLU), CE),
    "digits as numbers": Problem(
        functools.partial(digits, targets="numbers"), lambda: mlp(64, 48, 10, activation=nn.Tanh), MSE
    ),
    "diabetes": Problem(
        functools.partial(from_scikit, "diabetes"), lambda: mlp(10, 64, 64, 1, activation=nn.ReLU), MSE
    ),
    "clusters": Problem(clusters, lambda: mlp(20, 32, 32, 5, activation=nn.GELU, norm=True), CE),
    "noisy": Problem(noisy, lambda: mlp(10, 32, 1, activation=nn.Tanh), MSE),
    "letters": Problem(functools.partial(letters, length=4, size=20), lambda: reader(20, 4, 32), CE),
    "wine": Problem(functools.partial(from_scikit, "wine"), lambda: mlp(13, 24, 24, 3, activation=nn.ReLU), CE),
    "tumours": Problem(functools.partial(from_scikit, "breast_cancer"), lambda: mlp(30, 32, 2, activation=nn.SiLU), CE),
    "convolutions": Problem(digits, convolutions, CE),
    "autoencoder": Problem(
        functools.partial(digits, targets="itself"), lambda: mlp(64, 32, 8, 32, 64, activation=nn.GELU), MSE
    ),
    "steps in noise": Problem(steps_in_noise, lambda: mlp(6, 40, 40, 1, activation=nn.Tanh), MSE),
    "pairs of letters": Problem(functools.partial(letters, length=1, size=30), lambda: reader(30, 1, 24), CE),
}
SETS = {
    "first": (
        ["spirals", "waves", "digits", "digits as numbers", "diabetes", "clusters"],
        ["noisy", "letters", "diabetes"],
    ),
    "second": (
        ["wine", "tumours", "convolutions", "autoencoder", "steps in noise", "waves"],
        ["steps in noise", "pairs of letters", "letters"],
    ),
}
"""For each set its problems, and those for noise."""

SEEDS = {"first": 0, "second": 1000}
