"""The networks of three papers and some smaller ones, and the LightningModule that trains them."""

import itertools
import math
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

Activation = Literal["tanh", "relu", "gelu"]
Loss = Literal["cross_entropy", "squared_error"]


class Classifier(pl.LightningModule):
    """Trains a network to classify.

    Args:
        network: Maps inputs to one output for each class, or to a row of them: every position of a row has a label.
        num_classes: Number of classes.
        loss: ``"cross_entropy"``, or ``"squared_error"``: half the squared distance to the one-hot labels.
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes a learning rate scheduler for it, which steps with every batch.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int = 10,
        loss: Loss = "cross_entropy",
        optimizer: OptimizerCallable = torch.optim.SGD,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.num_classes = num_classes
        self.loss = loss
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        outputs, labels = self._positions(batch)
        loss = self._loss(outputs, labels)
        self.train_accuracy(outputs, labels)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", self.train_accuracy)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        outputs, labels = self._positions(batch)
        self.val_accuracy(outputs, labels)
        self.log("val/loss", self._loss(outputs, labels))
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"},
        }

    def _positions(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Outputs and labels, with the positions of all rows in one."""
        inputs, labels = batch
        return self(inputs).flatten(0, -2), labels.flatten()

    def _loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if self.loss == "cross_entropy":
            return functional.cross_entropy(outputs, labels)
        targets = functional.one_hot(labels, self.num_classes).to(outputs)
        return (outputs - targets).square().sum(dim=1).mean() / 2


class Linear(nn.Sequential):
    """One linear layer on flattened inputs: least-squares regression, with the loss ``"squared_error"``.

    Args:
        in_features: Number of inputs.
        num_classes: Number of outputs.
    """

    def __init__(self, in_features: int, num_classes: int = 10) -> None:
        super().__init__(nn.Flatten(), nn.Linear(in_features, num_classes))


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
        activation: Activation = "relu",
    ) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        widths = [in_features, *hidden]
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), _activation(activation)]
        super().__init__(*layers, nn.Linear(widths[-1], num_classes))


class LeNet(nn.Sequential):
    """Two convolutions and two fully connected layers.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of outputs.
        activation: ``"tanh"``, ``"relu"`` or ``"gelu"``.
        hidden: Width of the fully connected layer.
        image_size: Height and width of the images, at least 16.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        activation: Activation = "relu",
        hidden: int = 120,
        image_size: int = 32,
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, 6, 5),
            _activation(activation),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            _activation(activation),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * _lenet_side(image_size) ** 2, hidden),
            _activation(activation),
            nn.Linear(hidden, num_classes),
        )


class SimpleCNN(nn.Sequential):
    """Four convolutions and two linear layers: appendix D of the sharpest-directions paper.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of outputs.
        activation: ``"relu"`` as in the paper, ``"tanh"`` or ``"gelu"``.
        width: Filters of the first convolution, 32 in the paper. The convolutions have 1, 1, 2 and 2 times as many,
            and the linear layer has 4 times as many units.
        image_size: Height and width of the images.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        activation: Activation = "relu",
        width: int = 32,
        image_size: int = 32,
    ) -> None:
        layers: list[nn.Module] = []
        widths = [in_channels, width, width, 2 * width, 2 * width]
        for index, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(width_in, width_out, 3, padding=1), _activation(activation)]
            if index % 2:
                layers.append(nn.MaxPool2d(2))
        super().__init__(
            *layers,
            nn.Flatten(),
            nn.Linear(2 * width * (image_size // 4) ** 2, 4 * width),
            _activation(activation),
            nn.Linear(4 * width, num_classes),
        )


class LeNet1(nn.Sequential):
    """Two small convolutions and one linear layer.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of outputs.
        image_size: Height and width of the images, at least 16.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, image_size: int = 32) -> None:
        super().__init__(
            nn.Conv2d(in_channels, 4, 5),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(4, 12, 5),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(12 * _lenet_side(image_size) ** 2, num_classes),
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
            _ResidualBlock(8, 8, 2, norm_shortcut=False),
            _ResidualBlock(8, 16, 2, norm_shortcut=False),
            _ResidualBlock(16, 32, 2, norm_shortcut=False),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, num_classes),
        )


class ResNet18(nn.Sequential):
    """ResNet-18 with BatchNorm, in the variant for small images: a first convolution of 3 x 3 and no max-pooling.

    Args:
        num_classes: Number of outputs.
        width: Filters of the first stage, 64 as a rule. The four stages have 1, 2, 4 and 8 times as many.
        in_channels: Channels of the images.
    """

    def __init__(self, num_classes: int = 10, width: int = 64, in_channels: int = 3) -> None:
        super().__init__(
            *_convolution(in_channels, width, 3),
            nn.ReLU(),
            *_stages([width, 2 * width, 4 * width, 8 * width], 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8 * width, num_classes),
        )


class ResNet32(nn.Sequential):
    """ResNet-32 for small images (He et al. 2015): three stages of five residual blocks, as a rule without BatchNorm.

    Without BatchNorm the initialisation is scaled by the depth, in the way of Taki (2017). All convolutions have the
    normal initialisation of He et al. (variance 2 / inputs) and zero biases; the weights of the last convolution of
    each of the 15 residual branches are then divided by the square root of 15. A branch thus adds at first about a
    fifteenth of the variance of what it branches from: the signal grows by a constant factor, not with the depth.

    Args:
        num_classes: Number of outputs.
        width: Filters of the first stage, 16 in the paper. The stages have 1, 2 and 4 times as many.
        batch_norm: Whether BatchNorm follows every convolution; otherwise convolutions have biases.
        in_channels: Channels of the images.
    """

    def __init__(self, num_classes: int = 10, width: int = 16, batch_norm: bool = False, in_channels: int = 3) -> None:
        super().__init__(
            *_convolution(in_channels, width, 3, batch_norm=batch_norm),
            nn.ReLU(),
            *_stages([width, 2 * width, 4 * width], 5, batch_norm),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, num_classes),
        )
        _he_initialisation(self)
        if not batch_norm:
            blocks = [layer for layer in self if isinstance(layer, _ResidualBlock)]
            for block in blocks:
                last = next(layer for layer in reversed(block.residual) if isinstance(layer, nn.Conv2d))
                nn.init.normal_(last.weight, std=math.sqrt(2 / last.weight[0].numel() / len(blocks)))


class VGG11(nn.Sequential):
    """Configuration A of Simonyan and Zisserman (2015) with one linear layer at its end, and no BatchNorm.

    Convolutions have the normal initialisation of He et al., by which this depth trains from the start.

    Args:
        num_classes: Number of outputs.
        width: Filters of the first convolution, 64 in the paper; at most 8 times as many later.
        in_channels: Channels of the images, whose height and width are at least 16.
    """

    def __init__(self, num_classes: int = 10, width: int = 64, in_channels: int = 3) -> None:
        layers: list[nn.Module] = []
        width_in = in_channels
        for stage in ([1], [2], [4, 4], [8, 8], [8, 8]):
            for multiple in stage:
                layers += [*_convolution(width_in, multiple * width, 3, batch_norm=False), nn.ReLU()]
                width_in = multiple * width
            layers.append(nn.MaxPool2d(2))
        layers[-1] = nn.AdaptiveMaxPool2d(1)  # the same for 32 x 32 images; nothing is left to pool of 16 x 16
        super().__init__(*layers, nn.Flatten(), nn.Linear(width_in, num_classes))
        _he_initialisation(self)


class LanguageModel(nn.Module):
    """Predicts the next word at every position, by an LSTM: the "small" one of Zaremba et al. (2014).

    It maps words of shape (batch, positions) to outputs of shape (batch, positions, vocabulary). Rows begin with a
    state of zeros. All parameters are at first uniform between -0.1 and 0.1.

    Args:
        vocabulary: Number of words.
        width: Size of the embedding and of each layer.
        layers: Number of LSTM layers.
        dropout: Share of the values that are dropped before, between and after the layers.
        bidirectional: Whether a second LSTM reads the row backwards, and so has seen the words to predict.
    """

    # The sharpest-directions paper calls its model bidirectional. One that reads backwards as well sees the answer:
    # it is no language model, so that the default is the model of Zaremba et al., which reads forwards.
    def __init__(
        self, vocabulary: int, width: int = 200, layers: int = 2, dropout: float = 0.1, bidirectional: bool = False
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        between = dropout if layers > 1 else 0.0
        self.lstm = nn.LSTM(width, width, layers, batch_first=True, dropout=between, bidirectional=bidirectional)
        self.decoder = nn.Linear(2 * width if bidirectional else width, vocabulary)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def forward(self, words: Tensor) -> Tensor:
        states, _ = self.lstm(self.dropout(self.embedding(words)))
        return self.decoder(self.dropout(states))


class TextCNN(nn.Module):
    """Classifies texts by one convolution over their words: in substance the example ``imdb_cnn`` of Keras.

    Args:
        vocabulary: Number of words.
        width: Size of the embedding.
        filters: Filters of the convolution, of which the maximum over the text is taken.
        hidden: Width of the fully connected layer.
        num_classes: Number of outputs.
        kernel: Words that the convolution sees at once.
        dropout: Share of the values that are dropped after the embedding and in the fully connected layer.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int = 50,
        filters: int = 250,
        hidden: int = 250,
        num_classes: int = 2,
        kernel: int = 3,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.embedding = nn.Sequential(nn.Embedding(vocabulary, width), nn.Dropout(dropout))
        self.convolution = nn.Sequential(nn.Conv1d(width, filters, kernel), nn.ReLU(), nn.AdaptiveMaxPool1d(1))
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(filters, hidden), nn.Dropout(dropout), nn.ReLU(), nn.Linear(hidden, num_classes)
        )

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.convolution(self.embedding(words).mT))


class _ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution only where the shape changes."""

    def __init__(
        self, width_in: int, width_out: int, stride: int, batch_norm: bool = True, norm_shortcut: bool = True
    ) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *_convolution(width_in, width_out, 3, stride, batch_norm),
            nn.ReLU(),
            *_convolution(width_out, width_out, 3, 1, batch_norm),
        )
        self.shortcut = nn.Sequential()
        if stride > 1 or width_in != width_out:
            layers = _convolution(width_in, width_out, 1, stride, batch_norm)
            self.shortcut.extend(layers if norm_shortcut else layers[:1])

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.residual(inputs) + self.shortcut(inputs))


def _convolution(width_in: int, width_out: int, size: int, stride: int = 1, batch_norm: bool = True) -> list[nn.Module]:
    """A convolution that keeps height and width but for its stride, and its BatchNorm or else its biases."""
    convolution = nn.Conv2d(width_in, width_out, size, stride, padding=size // 2, bias=not batch_norm)
    return [convolution, nn.BatchNorm2d(width_out)] if batch_norm else [convolution]


def _stages(widths: list[int], num_blocks: int, batch_norm: bool = True) -> list[_ResidualBlock]:
    """Stages of residual blocks, each at half the height and width of the one before it."""
    blocks = []
    width_in = widths[0]
    for stage, width in enumerate(widths):
        for index in range(num_blocks):
            stride = 2 if stage > 0 and index == 0 else 1
            blocks.append(_ResidualBlock(width_in, width, stride, batch_norm))
            width_in = width
    return blocks


def _he_initialisation(network: nn.Module) -> None:
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _lenet_side(image_size: int) -> int:
    """Height and width after two convolutions of 5 x 5, each with a pooling to the half."""
    return ((image_size - 4) // 2 - 4) // 2


def _activation(name: Activation) -> nn.Module:
    return {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}[name]()
