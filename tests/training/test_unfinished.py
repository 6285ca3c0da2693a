"""What a measurement that has not converged says of the products, and where it is silent."""

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lyapunov_lightning import CurvatureProbe, HessianConfig, SpectrumTracker, measure
from lyapunov_lightning.curvature import CurvatureWarning


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(32, 6, generator=generator)), batch_size=32)


class Plain(LightningModule):
    """Two smooth networks, of which one predicts what the other one makes of a second view."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        self.predictor = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        view = batch[0].double()
        first, second = self.encoder(view), self.encoder(view.roll(1, 1))
        return (self.predictor(first) - self.target(second)).square().sum(dim=1).mean()

    def target(self, encoded: Tensor) -> Tensor:
        return encoded

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class Stopped(Plain):
    """As SimSiam does it."""

    def target(self, encoded: Tensor) -> Tensor:
        return encoded.detach()


class Hooked(Plain):
    """A hook clips a gradient on its way."""

    def target(self, encoded: Tensor) -> Tensor:
        if encoded.requires_grad:
            encoded.register_hook(lambda gradient: gradient.clamp(-0.01, 0.02))
        return encoded


class Random(Plain):
    """Draws numbers that nobody can draw again."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def target(self, encoded: Tensor) -> Tensor:
        self.generator.seed()
        return encoded * (1 + torch.rand(encoded.shape, generator=self.generator, dtype=encoded.dtype))


def warned(module: LightningModule, callback: Any, steps: int = 3) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CurvatureWarning)
        trainer = Trainer(
            max_steps=steps,
            max_epochs=steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            callbacks=[callback],
        )
        trainer.fit(module, data())
    return [str(warning.message) for warning in caught if issubclass(warning.category, CurvatureWarning)]


KEPT = HessianConfig(method="double_backward")


@pytest.mark.parametrize(
    "callback",
    [
        lambda: CurvatureProbe(every_n_steps=1, tol=1e-4, hessian=KEPT),
        lambda: SpectrumTracker(every_n_steps=1, largest=2, smallest=0, tol=1e-4, hessian=KEPT),
    ],
    ids=["lanczos", "spectrum"],
)
def test_products_of_no_symmetric_matrix_are_named_once_with_their_figures(callback: Any) -> None:
    said = [text for text in warned(Hooked(), callback()) if "symmetric" in text]
    assert len(said) == 1
    assert "uᵀHv and vᵀHu differ by" in said[0]
    assert "hook" in said[0]
    assert "raise `tol`" not in said[0]


def test_random_products_are_named() -> None:
    said = warned(
        Random(), CurvatureProbe(every_n_steps=1, tol=1e-4, hessian=HessianConfig(method="finite_difference"))
    )
    assert any("The products are random: two of them with one vector differ by" in text for text in said)


@pytest.mark.parametrize("estimator", ["lanczos", "lyapunov"])
def test_nothing_is_said_of_a_plain_module(estimator: Any) -> None:
    said = warned(Plain(), CurvatureProbe(every_n_steps=1, estimator=estimator))
    assert not [text for text in said if "symmetric" in text or "random" in text]


def test_a_measurement_on_request_names_them_too() -> None:
    with pytest.warns(CurvatureWarning, match="not those of a symmetric matrix"):
        result = measure(Hooked(), data(), largest=1, smallest=0, hessian=HessianConfig(data="fixed"))
    assert not bool(result.converged.all())


def test_exponents_of_stopped_gradients_have_not_converged() -> None:
    """What they settle at is not the largest eigenvalue of the loss that is computed."""
    probe = CurvatureProbe(every_n_steps=1, estimator="lyapunov", iterations=40)
    said = warned(Stopped(), probe, steps=4)
    assert [text for text in said if "not at an eigenvalue of a symmetric matrix" in text]
    assert not any(result.converged for result in probe.results)
    plain = CurvatureProbe(every_n_steps=1, estimator="lyapunov", iterations=40)
    warned(Plain(), plain, steps=4)
    assert plain.results[-1].converged
