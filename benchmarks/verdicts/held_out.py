"""Problems on which nothing is tuned: they are looked at once, when the gauge is done."""

import math

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.problems import images
from benchmarks.quasi_newton import Samples
from benchmarks.verdicts.problems import SAMPLES, VOCABULARY, Problem, mlp, pieces_of_text, seeded

NODES, COMMUNITIES = 512, 4


def digits(root: str) -> Samples:
    """Digits of 8 x 8 pixels, which travel with scikit-learn."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels[:SAMPLES], dtype=torch.float32) / 16, torch.tensor(labels[:SAMPLES])


def copies(root: str) -> Samples:
    """The same, to be given back."""
    pixels, _ = digits(root)
    return pixels, pixels


def views(root: str) -> Samples:
    """Two views of three hidden numbers, or of two draws of them, and whether they belong together, as 1 and -1."""
    generator = seeded(21)
    hidden, others = torch.randn(2, SAMPLES, 3, generator=generator)
    is_pair = torch.rand(SAMPLES, generator=generator) < 0.5
    left, right = hidden, torch.where(is_pair[:, None], hidden, others)
    ways = torch.randn(2, 3, 32, generator=generator) / 2
    both = torch.stack([left @ ways[0], right @ ways[1]], dim=1)
    return both + 0.1 * torch.randn(both.shape, generator=generator), 2 * is_pair.float() - 1


def picture(root: str) -> Samples:
    """Places and brightness of the pixels of an image."""
    pixels = images(root, 1)[0][0].mean(0).flatten()
    line = torch.linspace(-1, 1, 32)
    places = torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1).view(-1, 2)
    return places, ((pixels - pixels.mean()) / pixels.std()).unsqueeze(1)


def mixed(root: str) -> Samples:
    """A linear map of rank 5 of correlated inputs."""
    generator = seeded(22)
    inputs = torch.randn(SAMPLES, 16, generator=generator) @ torch.randn(16, 16, generator=generator) / 4
    weights = torch.randn(16, 5, generator=generator) @ torch.randn(5, 8, generator=generator) / 4
    return inputs, inputs @ weights + 0.1 * torch.randn(SAMPLES, 8, generator=generator)


def counts(root: str) -> Samples:
    """Counts whose expectation depends on six numbers."""
    generator = seeded(23)
    inputs = torch.randn(SAMPLES, 6, generator=generator)
    rates = torch.exp(0.5 + torch.sin(inputs[:, 0]) + 0.4 * inputs[:, 1] * inputs[:, 2].tanh())
    return inputs, torch.poisson(rates, generator=generator).unsqueeze(1)


def heavy_tails(root: str) -> Samples:
    """A function of six numbers with noise of heavy tails."""
    generator = seeded(24)
    inputs = torch.randn(SAMPLES, 6, generator=generator)
    tails = torch.randn(SAMPLES, generator=generator) / torch.rand(SAMPLES, generator=generator).sqrt().clamp(min=0.1)
    return inputs, (inputs[:, 0] * inputs[:, 1] + torch.sin(2 * inputs[:, 2]) + 0.1 * tails).unsqueeze(1)


def two_branches(root: str) -> Samples:
    """A number with two likely values, which depend on another number."""
    generator = seeded(25)
    inputs = 2 * torch.rand(SAMPLES, 1, generator=generator) - 1
    sign = 2.0 * torch.randint(2, (SAMPLES, 1), generator=generator) - 1
    noise = 0.5 * torch.randn(SAMPLES, 1, generator=generator)
    return inputs, sign * (3 + torch.sin(3 * inputs)) + noise


def communities() -> tuple[Tensor, Tensor, Tensor]:
    """Features, the normalised adjacency, and the communities of the nodes of a random graph."""
    generator = seeded(26)
    labels = torch.arange(NODES) % COMMUNITIES
    chances = torch.where(labels[:, None] == labels, 0.03, 0.008)
    edges = torch.triu(torch.rand(NODES, NODES, generator=generator) < chances, diagonal=1).float()
    adjacency = edges + edges.T + torch.eye(NODES)
    scale = adjacency.sum(1).rsqrt()
    features = functional.one_hot(labels, 16) + torch.randn(NODES, 16, generator=generator)
    return features, scale[:, None] * adjacency * scale, labels


def nodes(root: str) -> Samples:
    """The numbers of the nodes, and their communities, one of ten drawn at random: no network can learn those."""
    generator = seeded(27)
    is_drawn = torch.rand(NODES, generator=generator) < 0.1
    drawn = torch.randint(COMMUNITIES, (NODES,), generator=generator)
    return torch.arange(NODES), torch.where(is_drawn, drawn, communities()[2])


class GraphNetwork(nn.Module):
    """Two graph convolutions over the whole graph, of which some nodes are asked for."""

    def __init__(self) -> None:
        super().__init__()
        features, adjacency, _ = communities()
        self.register_buffer("features", features)
        self.register_buffer("adjacency", adjacency)
        self.first, self.second = nn.Linear(16, 48), nn.Linear(48, COMMUNITIES)

    def forward(self, asked: Tensor) -> Tensor:
        """The scores of the nodes that are asked for."""
        hidden = torch.relu(self.first(self.adjacency @ self.features))
        return self.second(self.adjacency[asked] @ hidden)


class Recurrent(nn.Module):
    """A GRU that predicts the next character."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(VOCABULARY, 12), nn.GRU(12, 24, batch_first=True)
        self.head = nn.Linear(24, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        """The scores, of shape ``(sequence, character, position)``."""
        return self.head(self.body(self.embedding(ids))[0]).transpose(1, 2)


class Siren(nn.Module):
    """Sines of sines, with the initialisation of its paper (arXiv 2006.09661)."""

    def __init__(self, width: int = 40, frequency: float = 10.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, 1)])
        self.frequency = frequency
        for number, layer in enumerate(self.layers):
            bound = math.sqrt(6 / layer.in_features) / frequency if number else 1 / layer.in_features
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, places: Tensor) -> Tensor:
        """The brightness."""
        *hidden, last = self.layers
        for layer in hidden:
            places = torch.sin(self.frequency * layer(places))
        return last(places)


class Towers(nn.Module):
    """Two networks, and how well their outputs agree: a scaled cosine."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = mlp([32, 32, 16], nn.GELU), mlp([32, 32, 16], nn.GELU)
        self.scale, self.shift = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))

    def forward(self, pairs: Tensor) -> Tensor:
        """The agreement of each pair."""
        cosine = functional.cosine_similarity(self.left(pairs[:, 0]), self.right(pairs[:, 1]))
        return self.scale.exp() * cosine + self.shift


def belong_together(agreement: Tensor, signs: Tensor) -> Tensor:
    """The logistic loss of each pair by itself, so that it does not depend on what else is in the batch."""
    return functional.softplus(-signs * agreement).mean()


def deviance(scores: Tensor, counts: Tensor) -> Tensor:
    """The negative log-likelihood of a Poisson distribution, over that of the counts as their own expectation."""
    return 2 * (torch.xlogy(counts, counts) - counts - counts * scores + scores.exp()).mean()


def quantile(outputs: Tensor, targets: Tensor, share: float = 0.8) -> Tensor:
    """The loss whose minimum is a quantile."""
    error = targets - outputs
    return torch.maximum(share * error, (share - 1) * error).mean()


def density(outputs: Tensor, targets: Tensor) -> Tensor:
    """The negative log-likelihood of a mixture of three normal distributions."""
    scores, centres, logs = outputs.chunk(3, dim=1)
    each = scores.log_softmax(1) - logs - ((targets - centres) * (-logs).exp()) ** 2 / 2
    return math.log(2 * math.pi) / 2 - each.logsumexp(1).mean()


def mixture() -> nn.Module:
    """Scores, centres and logarithms of widths of three normal distributions, with centres that lie apart."""
    network = mlp([1, 32, 32, 9], nn.Tanh)
    with torch.no_grad():
        network[-1].bias[3:6] = torch.tensor([-1.0, 0.0, 1.0])
    return network


def with_dropout() -> nn.Module:
    """A network that forgets three of ten."""
    first, second = [nn.Linear(64, 48), nn.ReLU(), nn.Dropout(0.3)], [nn.Linear(48, 32), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(*first, *second, nn.Linear(32, 10))


HELD_OUT = {
    "autoencoder": Problem(copies, lambda: mlp([64, 24, 6, 24, 64], nn.ELU), functional.mse_loss),
    "GRU": Problem(pieces_of_text, Recurrent, functional.cross_entropy, "ptb/ptb.train.txt"),
    "SIREN": Problem(picture, Siren, functional.mse_loss, "cifar-10-batches-py"),
    "two towers": Problem(views, Towers, belong_together),
    "dropout": Problem(digits, with_dropout, functional.cross_entropy),
    "deep linear": Problem(mixed, lambda: mlp([16, *[20] * 5, 8], nn.Identity), functional.mse_loss),
    "Poisson": Problem(counts, lambda: mlp([6, 32, 32, 1], nn.Softplus), deviance),
    "quantile": Problem(heavy_tails, lambda: mlp([6, 40, 32, 1], nn.SiLU), quantile),
    "mixture density": Problem(two_branches, mixture, density),
    "graph": Problem(nodes, GraphNetwork, functional.cross_entropy),
}
