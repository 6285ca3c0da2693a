"""A twin stands for the module wherever Lightning asks for it, and other modules are not touched meanwhile."""

import threading
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lyapunov_lightning import CurvatureProbe, HessianConfig
from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.training.replica import elsewhere
from lyapunov_lightning.training.replica.replica import replica
from tests.callbacks.identity import train
from tests.modules import BusyModule
from tests.training.live import InsideTheStep, RememberingLogger, Task


class Ending(Task):
    """A module with a finalizer."""

    ended = 0

    def __del__(self) -> None:
        Ending.ended += 1


class Counting(pl.LightningDataModule):
    """Counts the batches that are moved to the device, and scales them by the count."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs
        self.moved = 0

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(self.inputs, self.inputs[:, :1]), 4)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.moved += 1
        return [tensor * (1 + 0.1 * self.moved) for tensor in batch]


def fitted(module: pl.LightningModule, data: Any, callbacks: list[Any], **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=3,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"logger": RememberingLogger(), **options},
        )
        if isinstance(data, pl.LightningDataModule):
            trainer.fit(module, datamodule=data)
        else:
            trainer.fit(module, data)
    return [str(warning.message) for warning in caught if "lyapunov" in warning.category.__module__]


def fixed_probe() -> CurvatureProbe:
    return CurvatureProbe(1, hessian=HessianConfig(data="fixed", num_batches=2))


def points() -> Tensor:
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(2))


def test_a_module_with_a_finalizer_is_measured_on_fixed_data_and_ends_once():
    module, probe, before = Ending(nn.Linear(6, 1)), fixed_probe(), Ending.ended
    inputs = points()
    said = fitted(module, DataLoader(TensorDataset(inputs, module.net(inputs).detach() + 1), 4), [probe])
    assert said == []
    assert len(probe.results) == 3
    assert Ending.ended == before


def test_a_data_module_that_counts_in_its_transfer_hooks_goes_on_counting_the_trainings_batches():
    parameters = []
    for callbacks in ([], [fixed_probe()]):
        torch.manual_seed(0)
        module, data = Task(nn.Linear(6, 1)), Counting(points())
        assert fitted(module, data, callbacks) == []
        assert data.moved == 3
        parameters.append([parameter.detach() for parameter in module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*parameters, strict=True))


def test_what_another_thread_logs_meanwhile_is_logged():
    """A second Trainer may train in another thread while this one measures."""
    logged: list[str] = []

    class Other(pl.LightningModule):
        def print(self, *args: Any, **kwargs: Any) -> None:
            super().print(*args, **kwargs)
            logged.append("printed")

    def check(trainer: Any, module: Any, *_: Any) -> bool:
        before = pl.LightningModule.print
        with replica(trainer, module) as outer:
            with replica(trainer, module):
                other = threading.Thread(target=lambda: Other().log("x", 1.0))  # says that there is no trainer
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    other.start(), other.join()
                assert any("self.log()" in str(warning.message) for warning in caught)
            outer.module.log("x", 1.0, batch_size=5)
            assert outer.logged_sizes == [5]
        return pl.LightningModule.print is before

    inside = InsideTheStep(check)
    fitted(Task(nn.Linear(6, 1)), DataLoader(TensorDataset(points(), points()[:, :1]), 4), [inside])
    assert inside.results == [True, True, True]


def test_a_strided_nested_tensor_in_a_batch_is_measured():
    model = nn.Linear(3, 1, dtype=torch.float64)
    parts = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3)], dtype=torch.float64)

    def loss(batch: Any) -> Tensor:
        return torch.stack([model(part).square().mean() for part in batch.unbind()]).mean()

    hessian = HessianOperator(loss, list(model.parameters()), [parts])
    vector = torch.ones(4, dtype=torch.float64)
    first = hessian.matvec(vector)
    torch.testing.assert_close(first, torch.tensor([4.0, 4.0, 4.0, 5.0], dtype=torch.float64))
    with torch.no_grad():
        parts.unbind()[0].mul_(2)
    assert not torch.equal(hessian.matvec(vector), first)


@pytest.mark.parametrize("estimator", ["lanczos", "lyapunov", "critical"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_module_that_hands_nothing_on_is_not_searched_for(
    estimator: Any, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With metrics, whose methods are wrapped, a logger and a schedule: looking through the heap takes seconds."""
    searches: list[int] = []
    monkeypatch.setattr(elsewhere.gc, "collect", lambda *_: searches.append(1))
    train(CurvatureProbe(2, estimator), module=BusyModule, steps=6, precision=precision)
    assert not searches
