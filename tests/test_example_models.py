"""The networks among the examples: their sizes in the papers, their first outputs, and the Classifier on them."""

import math
from collections.abc import Callable
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from examples.models import (
    MLP,
    VGG11,
    Classifier,
    LanguageModel,
    LeNet,
    LeNet1,
    Linear,
    ResNet18,
    ResNet32,
    SimpleCNN,
    TextCNN,
    TinyResNet,
)
from lyapunov_lightning import measure


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def convolution(width_in: int, width_out: int, kernel: int = 3, bias: bool = True) -> int:
    return kernel**2 * width_in * width_out + bias * width_out


def resnet(widths: list[int], num_blocks: int, batch_norm: bool) -> int:
    """Parameters: BatchNorm has a weight and a bias for each filter, convolutions without it have a bias."""
    each = 2 if batch_norm else 1
    total = convolution(3, widths[0], bias=False) + each * widths[0]
    width_in = widths[0]
    for width in widths:
        for _ in range(num_blocks):
            total += convolution(width_in, width, bias=False) + convolution(width, width, bias=False) + 2 * each * width
            if width_in != width:
                total += convolution(width_in, width, 1, bias=False) + each * width
            width_in = width
    return total + 10 * widths[-1] + 10


def vgg11() -> int:
    widths = [3, 64, 128, 256, 256, 512, 512, 512, 512]
    return sum(map(convolution, widths[:-1], widths[1:])) + 10 * 512 + 10


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (Linear(3072), 30_730),
        (SimpleCNN(), 591_274),
        (SimpleCNN(width=16, image_size=16), 50_138),
        (ResNet18(), resnet([64, 128, 256, 512], 2, batch_norm=True)),  # 11.17 million
        (ResNet32(), resnet([16, 32, 64], 5, batch_norm=False)),  # 0.466 million
        (ResNet32(batch_norm=True), resnet([16, 32, 64], 5, batch_norm=True)),
        (VGG11(), vgg11()),  # 9.23 million
        (TinyResNet(), 19_922),
        (LanguageModel(10_000), 10_000 * 200 + 2 * (2 * 800 * 200 + 2 * 800) + 10_000 * 201),
        (TextCNN(5000), 5000 * 50 + 250 * 151 + 250 * 251 + 2 * 251),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_size(network: nn.Module, expected: int) -> None:
    assert size(network) == expected


IMAGE_NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "Linear": lambda side: Linear(3 * side**2),
    "MLP": lambda side: MLP(3 * side**2, [16, 16]),
    "LeNet": lambda side: LeNet(image_size=side),
    "LeNet1": lambda side: LeNet1(image_size=side),
    "SimpleCNN": lambda side: SimpleCNN(width=4, image_size=side),
    "TinyResNet": lambda side: TinyResNet(),
    "ResNet18": lambda side: ResNet18(width=8),
    "ResNet32": lambda side: ResNet32(width=8),
    "ResNet32 with BatchNorm": lambda side: ResNet32(width=8, batch_norm=True),
    "VGG11": lambda side: VGG11(width=8),
}


@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("name", IMAGE_NETWORKS)
def test_images_give_gradients_and_a_first_loss_near_that_of_guessing(name: str, side: int) -> None:
    torch.manual_seed(0)
    network = IMAGE_NETWORKS[name](side)
    outputs = network(torch.randn(32, 3, side, side))
    assert outputs.shape == (32, 10)
    loss = functional.cross_entropy(outputs, torch.arange(32) % 10)
    assert loss.item() == pytest.approx(math.log(10), abs=0.7)
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


@pytest.mark.parametrize(
    "network", [LeNet(1, image_size=28), SimpleCNN(1, image_size=28, width=4), VGG11(width=4, in_channels=1)]
)
def test_grey_images_of_28_pixels(network: nn.Module) -> None:
    assert network(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_signal_of_resnet32_without_batch_norm_stays_of_order_one() -> None:
    torch.manual_seed(0)
    signal = torch.randn(16, 3, 16, 16)
    norms = []
    for layer in ResNet32():
        signal = layer(signal)
        if signal.ndim == 4 and signal.shape[-1] > 1:
            norms.append(signal.square().mean().sqrt().item())
    assert len(norms) == 17
    assert 0.5 < min(norms) < max(norms) < 2


def test_residual_branches_of_resnet32_without_batch_norm_begin_small() -> None:
    torch.manual_seed(0)
    for block in (layer for layer in ResNet32(width=32) if hasattr(layer, "residual")):
        first, _, last = block.residual
        for convolution, variance in ((first, 2), (last, 2 / 15)):
            inputs = convolution.weight[0].numel()
            assert convolution.weight.var().item() == pytest.approx(variance / inputs, rel=0.1)
            assert not convolution.bias.any()


def rows(vocabulary: int, length: int, number: int = 8) -> Tensor:
    return torch.randint(vocabulary, (number, length))


def test_language_model_guesses_at_first() -> None:
    torch.manual_seed(0)
    outputs = LanguageModel(50, width=8)(rows(50, 7))
    assert outputs.shape == (8, 7, 50)
    assert functional.cross_entropy(outputs.flatten(0, 1), rows(50, 7).flatten()).item() == pytest.approx(
        math.log(50), abs=0.1
    )


@pytest.mark.parametrize("is_bidirectional", [False, True])
def test_only_the_bidirectional_model_sees_what_is_to_come(is_bidirectional: bool) -> None:
    network = LanguageModel(50, width=8, bidirectional=is_bidirectional).eval()
    words = rows(50, 7)
    changed = words.clone()
    changed[:, 4] = (words[:, 4] + 1) % 50
    differs = (network(words) != network(changed)).any(dim=2).any(dim=0)
    assert differs.tolist() == [is_bidirectional] * 4 + [True] * 3


def test_text_network() -> None:
    torch.manual_seed(0)
    network = TextCNN(50, width=8, filters=16, hidden=16)
    loss = functional.cross_entropy(network(rows(50, 20, 64)), torch.arange(64) % 2)
    assert loss.item() == pytest.approx(math.log(2), abs=0.2)
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def trainer() -> pl.Trainer:
    return pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )


def test_classifier_trains_a_language_model() -> None:
    torch.manual_seed(0)
    words, following = rows(50, 7), rows(50, 7)
    loader = DataLoader(TensorDataset(words, following), 4)
    module = Classifier(LanguageModel(50, width=8, dropout=0.0), num_classes=50)
    outputs = module(words).reshape(-1, 50)
    runner = trainer()
    runner.validate(module, loader, verbose=False)
    accuracy = (outputs.argmax(dim=1) == following.flatten()).float().mean()
    assert runner.callback_metrics["val/loss"].item() == pytest.approx(
        functional.cross_entropy(outputs, following.flatten()).item()
    )
    assert runner.callback_metrics["val/accuracy"].item() == pytest.approx(accuracy.item())
    before = module.network.decoder.weight.clone()
    trainer().fit(module, loader)
    assert not module.network.decoder.weight.equal(before)


@pytest.mark.parametrize(
    ("network", "labels"),
    [(LanguageModel(50, width=8), rows(50, 7)), (TextCNN(50, 4, 8, 8), torch.arange(8) % 2)],
    ids=["LanguageModel", "TextCNN"],
)
def test_curvature_of_text_networks_is_measured(network: nn.Module, labels: Tensor) -> None:
    samples = DataLoader(TensorDataset(rows(50, 7), labels), 8)
    measured = measure(Classifier(network, num_classes=50 if labels.ndim == 2 else 2), samples)
    assert math.isfinite(measured.largest[0])


def test_squared_error_is_half_the_squared_distance() -> None:
    module = Classifier(Linear(4, 3), num_classes=3, loss="squared_error")
    inputs, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    distances = (module(inputs) - torch.eye(3)[labels]).square().sum(dim=1)
    trainer().fit(module, DataLoader(TensorDataset(inputs, labels), 5))
    assert module.trainer.callback_metrics["train/loss"].item() == pytest.approx(distances.mean().item() / 2)


def test_scheduler_steps_with_every_batch() -> None:
    halve = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    module = Classifier(Linear(4), optimizer=partial(torch.optim.SGD, lr=1.0), scheduler=halve)
    trainer().fit(module, DataLoader(TensorDataset(torch.randn(6, 4), torch.randint(10, (6,))), 2))
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == 0.5**module.trainer.global_step
    assert module.trainer.global_step >= 1
