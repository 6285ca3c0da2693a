"""Twenty-four small trainings of unlike kinds, half of which nobody looked at while the rule was made.

None needs a download: digits and diabetes come with scikit-learn, everything else is drawn. Each problem makes its
network and its batches from a seed, and is trained for a few hundred or thousand steps in about a second.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """One kind of training.

    Attributes:
        data: Makes the samples.
        network: Makes the network, once the seed is set.
        loss: Maps the network and a batch to the loss.
        batch_size: Samples in a batch; None for all of them.
        held_out: Whether it was left out while the rule was made.

    """

    data: Callable[[], Batch]
    network: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    batch_size: int | None
    held_out: bool = False

    def batches(self, seed: int) -> Iterator[Batch]:
        """Batches without end, in an order that the seed fixes; none is smaller than the others."""
        data = samples(self.data)
        count = len(data[0])
        size = count if self.batch_size is None else self.batch_size
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(count, generator=generator)
            for chosen in order[: count // size * size].split(size):
                yield data if size == count else tuple(part[chosen] for part in data)


@functools.cache
def samples(make: Callable[[], Batch]) -> Batch:
    """The samples that a function makes, made once."""
    return make()


def drawn(seed: int = 0) -> torch.Generator:
    """Random numbers that no seed of a training changes."""
    return torch.Generator().manual_seed(seed)


# Data.


def digits() -> Batch:
    """Handwritten digits of 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def wrong_digits() -> Batch:
    """The same, with two labels in ten drawn anew."""
    images, labels = samples(digits)
    wrong = torch.rand(len(labels), generator=drawn()) < 0.2
    return images, torch.where(wrong, torch.randint(10, labels.shape, generator=drawn(1)), labels)


def diabetes() -> Batch:
    """Ten standardised features and a standardised target."""
    from sklearn.datasets import load_diabetes

    inputs, targets = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    return (inputs - inputs.mean(0)) / inputs.std(0), (targets - targets.mean()) / targets.std()


def spirals() -> Batch:
    """Two spirals of 100 points each."""
    angle = torch.linspace(0.5, 3 * math.pi, 100)
    one = torch.stack([angle.cos() * angle, angle.sin() * angle], dim=1) / 10
    points = torch.cat([one, -one]) + 0.02 * torch.randn(200, 2, generator=drawn())
    return points, torch.arange(200) // 100


def parity() -> Batch:
    """The parity of three of twenty bits."""
    bits = torch.randint(2, (2000, 20), generator=drawn()).float() * 2 - 1
    return bits, (bits[:, :3].prod(1) > 0).long()


def ratings() -> Batch:
    """Entries of a noisy matrix of rank 5."""
    left, right = torch.randn(100, 5, generator=drawn()), torch.randn(80, 5, generator=drawn(1))
    rows, columns = torch.randint(100, (4000,), generator=drawn(2)), torch.randint(80, (4000,), generator=drawn(3))
    values = (left[rows] * right[columns]).sum(1) / math.sqrt(5)
    return rows, columns, values + 0.1 * torch.randn(4000, generator=drawn(4))


def sentences() -> Batch:
    """Sequences of a random Markov chain of 40 words, and the words that follow."""
    generator = drawn()
    chances = torch.softmax(2 * torch.randn(40, 40, generator=generator), dim=1)
    text = torch.randint(40, (800, 1), generator=generator)
    for _ in range(16):
        text = torch.cat([text, torch.multinomial(chances[text[:, -1]], 1, generator=generator)], dim=1)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def additions() -> Batch:
    """Sequences of numbers, two of which are marked, and the sum of these two."""
    numbers = torch.rand(2000, 12, generator=drawn())
    marks = torch.zeros(2000, 12)
    places = torch.rand(2000, 12, generator=drawn(1)).argsort(1)[:, :2]
    marks.scatter_(1, places, 1.0)
    return torch.stack([numbers, marks], dim=2), (numbers * marks).sum(1)


def collocation() -> Batch:
    """Points of an interval."""
    return (torch.linspace(0, 1, 64)[:, None],)


def stretched() -> Batch:
    """A linear regression whose features' sizes span a factor of 30."""
    inputs = torch.randn(500, 30, generator=drawn()) * torch.logspace(0, -1.5, 30)
    weights = torch.randn(30, generator=drawn(1))
    return inputs, inputs @ weights + 0.05 * torch.randn(500, generator=drawn(2))


def noisy_classes() -> Batch:
    """Two classes of Gaussians that overlap, with 20 features."""
    labels = torch.randint(2, (2000,), generator=drawn())
    return torch.randn(2000, 20, generator=drawn(1)) + 0.4 * (2 * labels[:, None] - 1), labels


def teacher() -> Batch:
    """The product of three random matrices, as inputs and outputs."""
    inputs = torch.randn(300, 10, generator=drawn())
    weights = [torch.randn(10, 10, generator=drawn(seed)) / math.sqrt(10) for seed in (1, 2, 3)]
    return inputs, inputs @ weights[0] @ weights[1] @ weights[2]


def graph() -> Batch:
    """Two communities of a random graph of 120 nodes: the normalised adjacency, features and labels."""
    labels = torch.arange(120) // 60
    same = labels[:, None] == labels[None, :]
    edges = (torch.rand(120, 120, generator=drawn()) < torch.where(same, 0.12, 0.03)).float().triu(1)
    edges = edges + edges.T + torch.eye(120)
    degree = edges.sum(1).rsqrt()
    features = torch.randn(120, 16, generator=drawn(1)) + 0.2 * labels[:, None]
    return degree[:, None] * edges * degree[None, :], features, labels


def moons() -> Batch:
    """Two half-moons."""
    from sklearn.datasets import make_moons

    points, labels = make_moons(1000, noise=0.15, random_state=0)
    return torch.tensor(points, dtype=torch.float32), torch.tensor(labels)


def counts() -> Batch:
    """Counts whose logarithmic rates are smooth functions of eight features."""
    inputs = torch.randn(1500, 8, generator=drawn())
    rates = (torch.sin(inputs[:, 0]) + 0.5 * inputs[:, 1] * inputs[:, 2].tanh() + 0.5).exp()
    return inputs, torch.poisson(rates, generator=drawn(1))


def picture() -> Batch:
    """The pixels of a smooth picture, by their places."""
    axis = torch.linspace(-1, 1, 24)
    x, y = torch.meshgrid(axis, axis, indexing="ij")
    values = torch.sin(6 * x * y) + torch.cos(9 * x) * torch.sin(7 * y)
    return torch.stack([x.flatten(), y.flatten()], dim=1), values.flatten()


def bags() -> Batch:
    """Sets of ten vectors, of which positive ones hold one that is unlike."""
    vectors = torch.randn(1200, 10, 8, generator=drawn())
    labels = torch.randint(2, (1200,), generator=drawn(1))
    vectors[:, 0] += 2.0 * labels[:, None]
    return vectors, labels


def pairs_of_words() -> Batch:
    """Words that stand beside each other in the sentences, and words drawn at random."""
    text = samples(sentences)[0]
    first, second = text[:, :-1].flatten(), text[:, 1:].flatten()
    return first, second, torch.randint(40, (len(first), 4), generator=drawn())


# Networks.


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of these widths, with activations in between."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


def convolutions() -> nn.Module:
    """Two convolutions with BatchNorm, and dropout."""
    return nn.Sequential(
        *[nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()],
        *[nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, 10)],
    )


def deep_linear() -> nn.Module:
    """Four linear layers and nothing else."""
    return nn.Sequential(*(nn.Linear(10, 10, False) for _ in range(4)))


def residual() -> nn.Module:
    """Two residual blocks with LayerNorm."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), Block(32), Block(32), nn.Linear(32, 10))


class Factors(nn.Module):
    """Two embeddings whose inner products are the predictions."""

    def __init__(self, rows: int, columns: int, width: int) -> None:
        super().__init__()
        self.rows, self.columns = nn.Embedding(rows, width), nn.Embedding(columns, width)
        for table in (self.rows, self.columns):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The predictions."""
        others = self.columns(columns).view(len(rows), -1, self.columns.embedding_dim)
        return (self.rows(rows)[:, None] * others).sum(-1)


class WordTransformer(nn.Module):
    """Two layers of causal attention."""

    def __init__(self, words: int = 40, width: int = 32, length: int = 16) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(words, width), nn.Linear(width, words)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, words: Tensor) -> Tensor:
        """The scores of the next words."""
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            hidden = self.body(self.embedding(words) + self.positions, mask=self.mask, is_causal=True)
        return self.head(hidden)


class Recurrent(nn.Module):
    """A recurrent layer with a linear one on its states, or on the last of them."""

    def __init__(self, kind: type[nn.Module], inputs: int, width: int, outputs: int, words: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, inputs) if words else nn.Identity()
        self.layer, self.head = kind(inputs, width, batch_first=True), nn.Linear(width, outputs)

    def forward(self, sequences: Tensor) -> Tensor:
        """The outputs at every place."""
        return self.head(self.layer(self.embedding(sequences))[0])


class Block(nn.Module):
    """A residual block with LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), mlp(width, 2 * width, width, activation=nn.GELU)

    def forward(self, hidden: Tensor) -> Tensor:
        """The sum of the input and what is made of it."""
        return hidden + self.inner(self.norm(hidden))


class Sines(nn.Module):
    """Layers with sines, as for pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 48), nn.Linear(48, 48)])
        self.head = nn.Linear(48, 1)

    def forward(self, places: Tensor) -> Tensor:
        """The values of the pixels."""
        hidden = torch.sin(8 * self.layers[0](places))
        return self.head(torch.sin(self.layers[1](hidden)))


class Variational(nn.Module):
    """A variational autoencoder with four latent variables."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(64, 48, 8), mlp(4, 48, 64)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logits of the pixels, and mean and log-variance of the latent variables."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        latent = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return self.decoder(latent), mean, log_variance


class GraphNetwork(nn.Module):
    """Two graph convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 2)

    def forward(self, adjacency: Tensor, features: Tensor) -> Tensor:
        """The scores of the nodes."""
        return adjacency @ self.second(torch.relu(adjacency @ self.first(features)))


class Bag(nn.Module):
    """Attention over the members of a set."""

    def __init__(self) -> None:
        super().__init__()
        self.member, self.weight, self.head = nn.Linear(8, 24), nn.Linear(24, 1), nn.Linear(24, 2)

    def forward(self, sets: Tensor) -> Tensor:
        """The scores of the sets."""
        members = torch.tanh(self.member(sets))
        return self.head(functional.dropout((self.weight(members).softmax(1) * members).sum(1), 0.1, self.training))


# Losses.


def cross_entropy(network: nn.Module, batch: Batch) -> Tensor:
    """Of scores in the last dimension."""
    *inputs, labels = batch
    return functional.cross_entropy(network(*inputs).flatten(0, -2), labels.flatten())


def squared_error(network: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error."""
    *inputs, targets = batch
    return functional.mse_loss(network(*inputs).reshape(targets.shape), targets)


def reconstruction(network: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of an autoencoder."""
    return functional.mse_loss(network(batch[0]), batch[0].flatten(1))


def last_error(network: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of the output at the last place of a sequence."""
    return functional.mse_loss(network(batch[0])[:, -1, 0], batch[1])


def poisson_equation(network: nn.Module, batch: Batch) -> Tensor:
    """The residual of ``u'' = -4π² sin(2πx)`` with ``u = 0`` at both ends."""
    points = batch[0].clone().requires_grad_()
    solution = network(points)
    slope = torch.autograd.grad(solution.sum(), points, create_graph=True)[0]
    bend = torch.autograd.grad(slope.sum(), points, create_graph=True)[0]
    residual = bend / 40 + torch.sin(2 * math.pi * batch[0])
    return residual.square().mean() + network(points.new_tensor([[0.0], [1.0]])).square().mean()


def evidence(network: nn.Module, batch: Batch) -> Tensor:
    """The negative evidence bound of an image, per pixel."""
    logits, mean, log_variance = network(batch[0])
    pixels = functional.binary_cross_entropy_with_logits(logits, batch[0].flatten(1), reduction="sum")
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2
    return (pixels + divergence) / batch[0].numel()


def contrast(network: nn.Module, batch: Batch) -> Tensor:
    """Two noisy views of an image should lie nearer than those of others."""
    one, other = (functional.normalize(network(batch[0] + 0.2 * torch.randn_like(batch[0])), dim=1) for _ in range(2))
    return functional.cross_entropy(one @ other.T / 0.2, torch.arange(len(one)))


def pinball(network: nn.Module, batch: Batch) -> Tensor:
    """The loss of the 0.8 quantile."""
    error = batch[1] - network(batch[0]).squeeze(1)
    return torch.maximum(0.8 * error, -0.2 * error).mean()


def hinge(network: nn.Module, batch: Batch) -> Tensor:
    """Of scores of two classes."""
    return torch.relu(1 - (2 * batch[1] - 1) * network(batch[0]).squeeze(1)).mean()


def poisson_likelihood(network: nn.Module, batch: Batch) -> Tensor:
    """Of counts, by their logarithmic rates."""
    return functional.poisson_nll_loss(network(batch[0]).squeeze(1), batch[1], full=True)


def negative_sampling(network: nn.Module, batch: Batch) -> Tensor:
    """Words that stand together against words that do not."""
    words, others, drawn_words = batch
    near, far = network(words, others[:, None]).flatten(), network(words, drawn_words).flatten()
    return -(functional.logsigmoid(near).mean() + functional.logsigmoid(-far).mean())


_held_out = functools.partial(Problem, held_out=True)

PROBLEMS: dict[str, Problem] = {
    "digits MLP": Problem(digits, lambda: mlp(64, 64, 64, 10), cross_entropy, 64),
    "digits convolutions": Problem(digits, convolutions, cross_entropy, 32),
    "wrong labels": Problem(wrong_digits, lambda: mlp(64, 64, 10), cross_entropy, 8),
    "spirals": Problem(spirals, lambda: mlp(2, 32, 32, 2, activation=nn.Tanh), cross_entropy, None),
    "sparse parity": Problem(parity, lambda: mlp(20, 64, 2), cross_entropy, 64),
    "differential equation": Problem(
        collocation, lambda: mlp(1, 32, 32, 1, activation=nn.Tanh), poisson_equation, None
    ),
    "factors": Problem(ratings, lambda: Factors(100, 80, 5), squared_error, 32),
    "transformer": Problem(sentences, WordTransformer, cross_entropy, 16),
    "autoencoder": Problem(digits, lambda: mlp(64, 32, 6, 32, 64), reconstruction, 128),
    "diabetes": Problem(diabetes, lambda: mlp(10, 48, 1, activation=nn.Tanh), squared_error, 4),
    "stretched regression": Problem(stretched, lambda: nn.Linear(30, 1), squared_error, None),
    "addition": Problem(additions, lambda: Recurrent(nn.LSTM, 2, 24, 1), last_error, 32),
    "noisy logistic": _held_out(noisy_classes, lambda: nn.Linear(20, 2), cross_entropy, 2),
    "deep linear": _held_out(teacher, deep_linear, squared_error, None),
    "variational": _held_out(digits, Variational, evidence, 64),
    "residual": _held_out(
        digits,
        residual,
        cross_entropy,
        32,
    ),
    "contrast": _held_out(digits, lambda: mlp(64, 64, 16), contrast, 64),
    "graph": _held_out(graph, GraphNetwork, cross_entropy, None),
    "quantile": _held_out(diabetes, lambda: mlp(10, 48, 1), pinball, 32),
    "hinge": _held_out(moons, lambda: mlp(2, 32, 1), hinge, 4),
    "words": _held_out(sentences, lambda: Recurrent(nn.GRU, 24, 32, 40, words=40), cross_entropy, 8),
    "counts": _held_out(counts, lambda: mlp(8, 32, 32, 1), poisson_likelihood, 16),
    "picture": _held_out(picture, Sines, squared_error, None),
    "bags": _held_out(bags, Bag, cross_entropy, 32),
    "pairs of words": _held_out(pairs_of_words, lambda: Factors(40, 40, 8), negative_sampling, 64),
}
"""By name; the second half was looked at once, at the end."""
