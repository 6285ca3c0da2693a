"""The networks that the benchmarks measure, with their data."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.models import MLP, LeNet, TinyResNet
from lyapunov_lightning.curvature import HessianOperator

Batch = tuple[Tensor, Tensor]


@dataclass(eq=False)
class Problem:
    """A mean cross-entropy over fixed batches.

    Attributes:
        name: As the tables call it.
        network: Maps inputs to scores, classes in dimension 1.
        batches: Inputs and labels.
        training: Whether the network is measured in training mode.

    """

    name: str
    network: nn.Module
    batches: list[Batch]
    training: bool = True
    criterion: nn.Module = field(default_factory=nn.CrossEntropyLoss)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters, all of which are trained."""
        return list(self.network.parameters())

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters)

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of one batch."""
        return self.criterion(self.network(batch[0]), batch[1])

    def operator(self, **options: Any) -> HessianOperator:
        """A new operator of ours, without graphs that an earlier one kept."""
        return HessianOperator(self.loss, self.parameters, self.batches, **options)

    def restore(self) -> None:
        """Undo what other packages do to a network: they switch it to evaluation, and leave gradients behind."""
        self.network.train(self.training)
        self.network.zero_grad(set_to_none=True)


class SmallTransformer(nn.Module):
    """A language model with tied embeddings and without dropout, whose attention can be differentiated twice.

    PyTorch's fused attention cannot be, so that no other package would have a product; it is switched off for all.

    Args:
        words: Size of the vocabulary.
        width: Width of the layers.
        layers: Their number.
        length: The longest sequence.
    """

    def __init__(self, words: int = 200, width: int = 64, layers: int = 2, length: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, words: Tensor) -> Tensor:
        """The scores of the next words, of shape ``(sequence, word, position)``."""
        length = words.shape[1]
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            hidden = self.body(
                self.embedding(words) + self.positions[:length], mask=self.mask[:length, :length], is_causal=True
            )
        return (self.norm(hidden) @ self.embedding.weight.T).transpose(1, 2)


TINY = {"words": 20, "width": 8, "layers": 1}
"""A transformer of about 1,100 parameters."""


def has_images(root: str | None) -> bool:
    """Whether CIFAR-10 is there, in torchvision's layout."""
    return root is not None and (Path(root) / "cifar-10-batches-py").is_dir()


def images(root: str | None, count: int, size: int = 32) -> Batch:
    """The first images of CIFAR-10's training set; noise round ten patterns where the data are not there.

    Args:
        root: Folder of CIFAR-10.
        count: How many images.
        size: Of random images; CIFAR-10's are 32 x 32.

    """
    if has_images(root):
        from torchvision.datasets import CIFAR10

        data = CIFAR10(root, train=True)
        pixels = torch.from_numpy(data.data[:count]).permute(0, 3, 1, 2).float() / 255
        mean, deviation = torch.tensor((0.4914, 0.4822, 0.4465)), torch.tensor((0.247, 0.2435, 0.2616))
        scaled = (pixels - mean[:, None, None]) / deviation[:, None, None]
        return scaled.contiguous(), torch.tensor(data.targets[:count])
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (count,), generator=generator)
    patterns = torch.randn(10, 3, size, size, generator=generator)
    return patterns[labels] + torch.randn(count, 3, size, size, generator=generator), labels


def sentences(count: int, length: int, words: int = 200) -> Batch:
    """Sequences of a random Markov chain, and the words that follow."""
    generator = torch.Generator().manual_seed(0)
    chances = torch.softmax(2 * torch.randn(words, words, generator=generator), dim=1)
    text = torch.randint(words, (count, 1), generator=generator)
    for _ in range(length):
        text = torch.cat([text, torch.multinomial(chances[text[:, -1]], 1, generator=generator)], dim=1)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def drawn(data: Batch, batch_size: int) -> Iterator[Batch]:
    """Batches drawn at random, without end."""
    generator = torch.Generator().manual_seed(0)
    while True:
        chosen = torch.randint(len(data[0]), (batch_size,), generator=generator)
        yield data[0][chosen], data[1][chosen]


def train(problem: Problem, batches: Iterator[Batch], steps: int, optimizer: torch.optim.Optimizer) -> None:
    """Train in place."""
    problem.network.train()
    for _, batch in zip(range(steps), batches, strict=False):
        optimizer.zero_grad()
        problem.loss(batch).backward()
        optimizer.step()
    problem.restore()


def of_images(
    name: str, make: Callable[[], nn.Module], root: str | None, count: int, steps: int = 0, training: bool = True
) -> Problem:
    """A network on images, trained by SGD with momentum.

    Args:
        name: As the tables call it.
        make: Makes the network.
        root: Folder of CIFAR-10.
        count: Images that the loss is the mean of.
        steps: Training steps on batches of 128 of the first 10,000 images.
        training: Whether the network is measured in training mode.

    """
    torch.manual_seed(0)
    problem = Problem(name, make(), [images(root, count)], training)
    if steps:
        optimizer = torch.optim.SGD(problem.parameters, lr=0.02, momentum=0.9)
        train(problem, drawn(images(root, min(10_000, 128 * steps)), 128), steps, optimizer)
    problem.restore()
    return problem


def of_sentences(name: str, count: int, length: int, steps: int = 0, **options: int) -> Problem:
    """A transformer on sequences, trained by AdamW on batches of 16.

    Args:
        name: As the tables call it.
        count: Sequences that the loss is the mean of.
        length: Of each of them.
        steps: Training steps.
        options: Of `SmallTransformer`.

    """
    torch.manual_seed(0)
    words = options.get("words", 200)
    problem = Problem(name, SmallTransformer(length=length, **options), [sentences(count, length, words)])
    if steps:
        optimizer = torch.optim.AdamW(problem.parameters, lr=1e-3)
        train(problem, drawn(sentences(1000, length, words), 16), steps, optimizer)
    return problem


def lenet(root: str | None, count: int, steps: int = 0) -> Problem:
    """A LeNet of 52,202 parameters, trained or not."""
    return of_images(f"LeNet, {'' if steps else 'un'}trained", LeNet, root, count, steps)


def resnet(root: str | None, count: int, steps: int = 0) -> Problem:
    """A ResNet of 22,000 parameters with BatchNorm, in evaluation mode."""
    return of_images("small ResNet", TinyResNet, root, count, steps, training=False)


def mlp(root: str | None, count: int, hidden: list[int]) -> Problem:
    """Fully connected layers."""
    return of_images("MLP", lambda: MLP(3072, hidden), root, count)


def small_transformer(count: int, length: int, steps: int = 0, **options: int) -> Problem:
    """A transformer of two layers."""
    return of_sentences("small transformer", count, length, steps, **options)
