"""LightningModules of general methods: uncertainty, forecasting, pictures. The data is made here."""

from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.wild.wild_module import WildModule


def _curve(size: int = 96) -> list[dict[str, Tensor]]:
    """Points of a noisy wave, under the names that lightning-uq-box gives them."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(size, 2, generator=generator)
    targets = (5 * inputs[:, :1]).sin() + 0.2 * torch.randn(size, 1, generator=generator)
    return [{"input": one, "target": other} for one, other in zip(inputs, targets, strict=True)]


class Curve(pl.LightningDataModule):
    """The points, as a data module, which deep kernels ask their trainer for."""

    def train_dataloader(self) -> DataLoader[Any]:
        """In batches of 16."""
        return DataLoader(_curve(), 16, shuffle=True)  # type: ignore[arg-type]


def _lightning_uq_box(name: str) -> tuple[Any, Any]:
    from lightning_uq_box import uq_methods as uq

    network = nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1))
    adam = partial(torch.optim.Adam, lr=1e-2)
    if name == "DKLRegression":
        module = uq.DKLRegression(network[:4], n_inducing_points=8, optimizer=adam)
    elif name == "MDNRegression":
        module = uq.MDNRegression(network, n_components=3, hidden_dims=[8], optimizer=adam)
    else:
        more = {"burnin_epochs": 1, "beta": 1.0, "num_mc_samples_train": 3, "optimizer": adam}
        module = uq.BNN_VI_ELBO_Regression(network, nn.MSELoss(), **more)
    return module, Curve()


def _darts(name: str) -> tuple[Any, Any]:
    from darts import TimeSeries, models
    from darts.utils.likelihood_models.torch import GaussianLikelihood

    time = np.arange(60)
    generator = np.random.default_rng(0)
    waves = [np.sin(time / period) + 0.1 * generator.standard_normal(60) for period in (2, 3, 5)]
    series = [TimeSeries.from_values(wave.astype(np.float32)) for wave in waves]
    more = {"input_chunk_length": 12, "output_chunk_length": 4, "batch_size": 16, "optimizer_kwargs": {"lr": 1e-2}}
    if name == "N-BEATS":
        whole = models.NBEATSModel(num_stacks=2, num_blocks=1, num_layers=2, layer_widths=12, **more)
    else:
        whole = models.TCNModel(
            num_filters=4, num_layers=2, dropout=0.1, weight_norm=True, likelihood=GaussianLikelihood(), **more
        )
    (_, options) = whole._setup_for_fit_from_dataset(series)
    prepared = whole._setup_for_train(options["train_dataset"])
    return prepared["model"], prepared["datamodule"]


def _lightly() -> tuple[Any, Any]:
    from lightly.utils.benchmarking import FinetuneClassifier

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 3
    pictures = torch.randn(3, 3, 12, 12, generator=generator)[labels] + torch.randn(96, 3, 12, 12, generator=generator)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.AdaptiveMaxPool2d(1)
    )
    module = FinetuneClassifier(network, batch_size_per_device=16, lr=0.05, feature_dim=8, num_classes=3, topk=(1, 2))
    return module, DataLoader(TensorDataset(pictures, labels), 16, shuffle=True)


METHODS = (
    WildModule("lightning-uq-box", "BNN_VI_ELBO_Regression", partial(_lightning_uq_box, "BNN_VI_ELBO_Regression")),
    WildModule("lightning-uq-box", "DKLRegression (GPyTorch)", partial(_lightning_uq_box, "DKLRegression")),
    WildModule("lightning-uq-box", "MDNRegression", partial(_lightning_uq_box, "MDNRegression")),
    WildModule("darts", "N-BEATS", partial(_darts, "N-BEATS"), library="pytorch_lightning"),
    WildModule("darts", "TCN, Gaussian likelihood", partial(_darts, "TCN"), library="pytorch_lightning"),
    WildModule("lightly", "FinetuneClassifier", _lightly, library="pytorch_lightning"),
)
