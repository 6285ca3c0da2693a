"""SpectrumTracker on a network of 2,000 parameters, at three points of a real training."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lyapunov_lightning import HessianConfig, SpectrumTracker
from lyapunov_lightning.curvature import HessianOperator, lanczos, spectral_density
from tests.modules import MemoryLogger, Watcher


class DigitClassifier(pl.LightningModule):
    """64 - 24 - 20 - 10 with tanh: 2,270 parameters in float64."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 10)]
        self.net = nn.Sequential(*layers).double()

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2)


class DenseSpectrum(Watcher):
    """All eigenvalues of the Hessian on the whole training set, from rows of exact second derivatives."""

    def __init__(self, data: TensorDataset, steps: set[int]) -> None:
        self._data = data
        self._steps = steps
        self.values: dict[int, Tensor] = {}
        self.densities: dict[int, Any] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step not in self._steps:
            return
        parameters = list(pl_module.parameters())
        gradients = torch.autograd.grad(pl_module.loss(self._data.tensors), parameters, create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in gradients])
        eye = torch.eye(len(flat), dtype=torch.float64)
        rows = [
            torch.cat(
                [
                    g.reshape(len(part), -1)
                    for g in torch.autograd.grad(flat, parameters, part, retain_graph=True, is_grads_batched=True)
                ],
                dim=1,
            )
            for part in eye.split(500)
        ]
        self.values[step] = torch.linalg.eigvalsh(torch.cat(rows)).flip(0)
        hessian = HessianOperator(pl_module.loss, parameters, [self._data.tensors])
        known = lanczos(hessian, largest=10, smallest=2)
        self.densities[step] = spectral_density(hessian, num_probes=10, num_steps=30, known=known)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[DenseSpectrum, MemoryLogger]:
    """Three points of a training on handwritten digits, measured and dense."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images[:64] / 16), torch.tensor(labels[:64]))
    pl.seed_everything(0, verbose=False)
    dense, logger = DenseSpectrum(data, {0, 40, 80}), MemoryLogger()
    tracker = SpectrumTracker(40, 10, 10, hessian=HessianConfig(fraction=1.0), tol=1e-5)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=81,
        max_epochs=-1,
        logger=logger,
        callbacks=[dense, tracker],
        default_root_dir=tmp_path_factory.mktemp("run"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitClassifier(), DataLoader(data, 32, shuffle=True))
    return dense, logger


def test_ten_eigenvalues_of_each_end_are_within_1e_6_of_the_dense_ones(run: Any) -> None:
    dense, logger = run
    assert sorted(dense.values) == [0, 40, 80]
    for step, values in dense.values.items():
        assert len(values) == 2270
        for rank in range(10):
            upper = logger.curve(f"spectrum/lambda_{rank + 1}")[step]
            lower = logger.curve(f"spectrum/lambda_min_{rank + 1}")[step]
            assert upper == pytest.approx(float(values[rank]), rel=1e-6)
            assert lower == pytest.approx(float(values[-1 - rank]), rel=1e-6)


def test_density_has_the_dense_moments_within_two_standard_errors(run: Any) -> None:
    dense, _ = run
    inside = 0
    for step, values in dense.values.items():
        density = dense.densities[step]
        grid, curve = density.curve()
        assert float(torch.trapezoid(curve, grid)) == pytest.approx(1, abs=1e-3)
        for order in (1, 2, 3, 4):
            moment = density.moment(order)
            error = abs(moment.value - float((values**order).mean()))
            inside += error <= 2 * moment.standard_error + 1e-9 * float((values.abs() ** order).mean())
    # 12 moments, each of which is inside in 93 of 100 cases by Student's t with nine degrees of freedom.
    assert inside >= 9
