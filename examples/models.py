"""Small networks, and the LightningModule that trains them."""

import itertools
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

Loss = Literal["cross_entropy", "squared_error"]


class Classifier(pl.LightningModule):
    """Trains a network to classify.

    Args:
        network: Maps inputs to one output for each class.
        num_classes: Number of classes.
        loss: ``"cross_entropy"``, or ``"squared_error"``: half the squared distance to the one-hot labels.
        optimizer: Makes the optimizer from the parameters.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int = 10,
        loss: Loss = "cross_entropy",
        optimizer: OptimizerCallable = torch.optim.SGD,
    ) -> None:
        super().__init__()
        self.network = network
        self.num_classes = num_classes
        self.loss = loss
        self.optimizer = optimizer
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        outputs = self(inputs)
        loss = self._loss(outputs, labels)
        self.train_accuracy(outputs, labels)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", self.train_accuracy)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        inputs, labels = batch
        outputs = self(inputs)
        self.val_accuracy(outputs, labels)
        self.log("val/loss", self._loss(outputs, labels))
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())

    def _loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if self.loss == "cross_entropy":
            return functional.cross_entropy(outputs, labels)
        targets = functional.one_hot(labels, self.num_classes).to(outputs)
        return (outputs - targets).square().sum(dim=1).mean() / 2


class MLP(nn.Sequential):
    """Fully connected network on flattened inputs.

    Args:
        in_features: Number of inputs.
        hidden: Width of each hidden layer.
        num_classes: Number of outputs.
        activation: ``"tanh"``, ``"relu"`` or ``"gelu"``.
    """

    def __init__(
        self,
        in_features: int,
        hidden: list[int],
        num_classes: int = 10,
        activation: Literal["tanh", "relu", "gelu"] = "relu",
    ) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        widths = [in_features, *hidden]
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), _activation(activation)]
        super().__init__(*layers, nn.Linear(widths[-1], num_classes))


class LeNet(nn.Sequential):
    """Two convolutions and two fully connected layers, for 32 x 32 images.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of outputs.
        activation: ``"tanh"``, ``"relu"`` or ``"gelu"``.
        hidden: Width of the fully connected layer.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        activation: Literal["tanh", "relu", "gelu"] = "relu",
        hidden: int = 120,
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, 6, 5),
            _activation(activation),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            _activation(activation),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(400, hidden),
            _activation(activation),
            nn.Linear(hidden, num_classes),
        )


class SimpleCNN(nn.Sequential):
    """Four convolutions and two linear layers, for 32 x 32 images: appendix D of the sharpest-directions paper.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of outputs.
        activation: ``"relu"`` as in the paper, ``"tanh"`` or ``"gelu"``.
    """

    def __init__(
        self, in_channels: int = 3, num_classes: int = 10, activation: Literal["tanh", "relu", "gelu"] = "relu"
    ) -> None:
        layers: list[nn.Module] = []
        widths = [in_channels, 32, 32, 64, 64]
        for index, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(width_in, width_out, 3, padding=1), _activation(activation)]
            if index % 2:
                layers.append(nn.MaxPool2d(2))
        super().__init__(
            *layers, nn.Flatten(), nn.Linear(4096, 128), _activation(activation), nn.Linear(128, num_classes)
        )


class LeNet1(nn.Sequential):
    """Two small convolutions and one linear layer, for 32 x 32 images.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of outputs.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__(
            nn.Conv2d(in_channels, 4, 5),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(4, 12, 5),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(300, num_classes),
        )


class TinyResNet(nn.Sequential):
    """Three residual blocks with BatchNorm, about 20,000 parameters.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of outputs.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__(
            nn.Conv2d(in_channels, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            _ResidualBlock(8, 8, 2),
            _ResidualBlock(8, 16, 2),
            _ResidualBlock(16, 32, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, num_classes),
        )


class _ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width_out),
            nn.ReLU(),
            nn.Conv2d(width_out, width_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(width_out),
        )
        self.shortcut = nn.Conv2d(width_in, width_out, 1, stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.residual(inputs) + self.shortcut(inputs))


def _activation(name: str) -> nn.Module:
    return {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}[name]()
