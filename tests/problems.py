"""Small networks with ragged batches and dense Hessians to compare with, shared by the tests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lyapunov_lightning.curvature import HessianOperator

NUM_CLASSES = 3
Batch = tuple[Tensor, Tensor]


def whole_hessian(loss: Tensor, flat: Tensor) -> tuple[float, Tensor]:
    """The value of a loss and its Hessian, by PyTorch's plain derivatives of it.

    All rows at once, which takes a sixth of the time of ``torch.autograd.functional.hessian`` at 26 parameters.

    """
    zeros: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    (gradient,) = torch.autograd.grad(loss, flat, create_graph=True, **zeros)
    if not gradient.requires_grad:
        return loss.item(), torch.zeros(len(flat), len(flat), dtype=flat.dtype)
    basis = torch.eye(len(flat), dtype=flat.dtype)
    (rows,) = torch.autograd.grad(gradient, flat, basis, is_grads_batched=True, **zeros)
    return loss.item(), rows.detach()


@dataclass(frozen=True)
class Problem:
    """A classifier with batches of unequal size, whose mean losses have unequal weights in the mean over samples."""

    model: nn.Module
    batches: list[Batch]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def flat_parameters(self) -> Tensor:
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of one batch at the model's parameters."""
        inputs, labels = batch
        return functional.cross_entropy(self.model(inputs), labels)

    def loss_at(self, flat: Tensor) -> Tensor:
        """The mean loss over all samples, as a function of the flat parameters: the independent reference."""
        values = {
            name: piece.view(parameter.shape)
            for (name, parameter), piece in zip(
                self.model.named_parameters(), flat.split([p.numel() for p in self.parameters]), strict=True
            )
        }
        losses = [
            functional.cross_entropy(functional_call(self.model, values, (inputs,)), labels, reduction="sum")
            for inputs, labels in self.batches
        ]
        return torch.stack(losses).sum() / sum(len(labels) for _, labels in self.batches)

    def operator(self, **options: Any) -> HessianOperator:
        return HessianOperator(self.loss, self.parameters, self.batches, **options)

    def to(self, dtype: torch.dtype) -> "Problem":
        """This problem in another precision; the model is converted in place."""
        batches = [(x.to(dtype) if x.is_floating_point() else x, labels) for x, labels in self.batches]
        return Problem(self.model.to(dtype), batches)

    def dense_hessian(self) -> Tensor:
        """By `torch.autograd`, with kernels that have second derivatives."""
        flat = self.flat_parameters.requires_grad_()
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            return whole_hessian(self.loss_at(flat), flat)[1]

    def gradient_at(self, flat: Tensor) -> Tensor:
        flat = flat.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.loss_at(flat), flat)
        return gradient


class _LastStepLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, NUM_CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.lstm(inputs)[0][:, -1])


class _MeanTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(
            4, nhead=2, dim_feedforward=8, dropout=0.0, activation="gelu", batch_first=True
        )
        self.head = nn.Linear(4, NUM_CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.encoder(inputs).mean(dim=1))


class _TiedLanguageModel(nn.Module):
    """Predicts a token from one token; the embedding is also the output layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_CLASSES, 4)
        self.hidden = nn.Linear(4, 4)
        self.output = nn.Linear(4, NUM_CLASSES, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(torch.tanh(self.hidden(self.embedding(tokens))))


def _problem(build: Callable[[], nn.Module], *input_shape: int, sizes: tuple[int, ...] = (5, 3)) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double()
        for parameter in model.parameters():  # LayerNorm's ones and zero biases hide mistakes
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
        shape = input_shape or ()
        batches = [
            (
                torch.randn(size, *shape, dtype=torch.float64) if shape else torch.randint(NUM_CLASSES, (size,)),
                torch.randint(NUM_CLASSES, (size,)),
            )
            for size in sizes
        ]
    return Problem(model, batches)


def mlp(dropout: float = 0.0, sizes: tuple[int, ...] = (5, 3)) -> Problem:
    """Two layers with tanh: 51 parameters."""
    return _problem(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, NUM_CLASSES)),
        4,
        sizes=sizes,
    )


def cnn(activation: type[nn.Module] = nn.GELU) -> Problem:
    """Convolution, BatchNorm in eval mode with statistics of its own, max-pooling: 75 parameters."""

    def build() -> nn.Module:
        norm = nn.BatchNorm2d(3)
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.5, 2.0)
        layers = [nn.Conv2d(1, 3, 3), norm, activation(), nn.MaxPool2d(2), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(12, NUM_CLASSES)).eval()

    return _problem(build, 1, 6, 6)


def relu_cnn() -> Problem:
    return cnn(nn.ReLU)


def lstm() -> Problem:
    return _problem(_LastStepLSTM, 5, 3)


def transformer() -> Problem:
    return _problem(_MeanTransformer, 4, 4)


def tied() -> Problem:
    return _problem(_TiedLanguageModel)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mlp": mlp,
    "cnn": cnn,
    "relu_cnn": relu_cnn,
    "lstm": lstm,
    "transformer": transformer,
    "tied": tied,
}
