"""LightningModules of the sciences: cells, molecules, the earth and routes. The data is made here."""

import tempfile
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.wild.wild_module import WildModule


def _cells(cells: int = 96, genes: int = 24) -> Any:
    """Counts of three kinds of cells in two batches, every fourth cell without its label."""
    import anndata

    generator = np.random.default_rng(0)
    kinds = np.arange(cells) % 3
    means = generator.gamma(2.0, 2.0, (3, genes))[kinds] * generator.uniform(0.5, 2.0, (cells, 1))
    table = anndata.AnnData(generator.poisson(means).astype(np.float32))
    table.obs["batch"] = np.where(generator.random(cells) < 0.5, "first", "second")
    table.obs["kind"] = np.where(np.arange(cells) % 4 == 0, "unknown", kinds.astype(str))
    return table


def _scvi(name: str) -> tuple[Any, Any]:
    import scvi

    table = _cells()
    if name == "AmortizedLDA":
        scvi.model.AmortizedLDA.setup_anndata(table)
        model = scvi.model.AmortizedLDA(table, n_topics=4, n_hidden=16)
        plan = scvi.train.LowLevelPyroTrainingPlan(model.module, optim_kwargs={"lr": 1e-2}, n_epochs_kl_warmup=3)
        loader = scvi.dataloaders.AnnDataLoader(model.adata_manager, shuffle=True, batch_size=16)
    elif name == "SCANVI":
        scvi.model.SCANVI.setup_anndata(table, labels_key="kind", unlabeled_category="unknown", batch_key="batch")
        model = scvi.model.SCANVI(table, n_hidden=16, n_latent=4)
        plan = scvi.train.SemiSupervisedTrainingPlan(model.module, n_classes=3, n_epochs_kl_warmup=3, lr=1e-2)
        loader = scvi.dataloaders.SemiSupervisedDataLoader(
            model.adata_manager, n_samples_per_label=8, shuffle=True, batch_size=16
        )
    else:
        scvi.model.SCVI.setup_anndata(table, batch_key="batch")
        model = scvi.model.SCVI(table, n_hidden=16, n_latent=4)
        plan = scvi.train.TrainingPlan(model.module, n_epochs_kl_warmup=3, lr=1e-2)
        loader = scvi.dataloaders.AnnDataLoader(model.adata_manager, shuffle=True, batch_size=16)
    plan.n_obs_training = len(table)
    return plan, loader


def _path(steps: int = 160, columns: int = 6) -> Tensor:
    """A walk between two wells, seen in several mixed and noisy columns."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(steps, generator=generator)
    walk = [torch.ones(())]
    for push in noise[1:]:
        walk.append(walk[-1] + 0.1 * (walk[-1] - walk[-1] ** 3) + 0.3 * push)
    mixed = torch.stack(walk).unsqueeze(1) * torch.randn(columns, generator=generator)
    return mixed + 0.3 * torch.randn(steps, columns, generator=generator)


def _mlcolvar(name: str) -> tuple[Any, Any]:
    from mlcolvar.cvs import Committor, DeepTICA
    from mlcolvar.data import DictDataset, DictModule
    from mlcolvar.utils.timelagged import create_timelagged_dataset

    path = _path()
    if name == "DeepTICA":
        data = create_timelagged_dataset(path, lag_time=2)
        module = DeepTICA([path.shape[1], 12, 3], n_cvs=2)
        return module, DictModule(data, lengths=[1.0], batch_size=40)
    labels = (path[:, 0] > path[:, 0].mean()).long()
    labels[::3] = 2
    data = DictDataset({"data": path, "labels": labels, "weights": torch.ones(len(path))})
    module = Committor([path.shape[1], 12, 1], atomic_masses=torch.ones(path.shape[1]), alpha=0.1, gamma=10.0, n_dim=1)
    return module, DictModule(data, lengths=[1.0], batch_size=40)


def _pictures(count: int = 48, size: int = 32, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Gratings of three directions."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    waves = torch.stack([torch.sin(0.7 * rows), torch.sin(0.7 * columns), torch.sin(0.5 * (rows + columns))])
    pictures = waves[labels].unsqueeze(1) + 0.4 * torch.randn(count, channels, size, size, generator=generator)
    return pictures.sigmoid(), labels


def _torchgeo() -> tuple[Any, Any]:
    from torchgeo.trainers import SemanticSegmentationTask

    pictures, _ = _pictures()
    rows = [{"image": picture, "mask": (picture.mean(0) > 0.5).long()} for picture in pictures]
    module = SemanticSegmentationTask(
        model="fcn", num_filters=4, in_channels=3, task="multiclass", num_classes=2, loss="jaccard", lr=1e-2
    )
    module.monitor = "train_loss"  # its scheduler follows the validation, which there is none of here
    return module, DataLoader(rows, 8, shuffle=True)  # type: ignore[arg-type]


def _rl4co() -> tuple[Any, Any]:
    from rl4co.envs import TSPEnv
    from rl4co.models import AttentionModel

    module = AttentionModel(
        TSPEnv(generator_params={"num_loc": 6}),
        baseline="exponential",
        policy_kwargs={"embed_dim": 16, "num_encoder_layers": 1, "num_heads": 2, "feedforward_hidden": 16},
        train_data_size=96,
        val_data_size=8,
        test_data_size=8,
        batch_size=16,
        optimizer_kwargs={"lr": 1e-3},
        data_dir=tempfile.gettempdir(),
    )
    return module, None


SCIENCES = (
    WildModule("scvi-tools", "TrainingPlan (SCVI)", partial(_scvi, "SCVI")),
    WildModule("scvi-tools", "SemiSupervisedTrainingPlan (SCANVI)", partial(_scvi, "SCANVI")),
    WildModule("scvi-tools", "LowLevelPyroTrainingPlan (AmortizedLDA)", partial(_scvi, "AmortizedLDA")),
    WildModule("mlcolvar", "DeepTICA", partial(_mlcolvar, "DeepTICA")),
    WildModule("mlcolvar", "Committor", partial(_mlcolvar, "Committor")),
    WildModule("torchgeo", "SemanticSegmentationTask", _torchgeo),
    WildModule("rl4co", "AttentionModel", _rl4co),
)
