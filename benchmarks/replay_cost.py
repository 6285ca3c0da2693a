"""What it costs to evaluate a training step on a replica: time of a forward pass and of a gradient, against plain ones.

Run it from a clone: ``python -m benchmarks.replay_cost``. The models are an MLP of 5 modules, a ResNet-18 with metrics
of torchmetrics on 32 images of CIFAR-10's shape, and a transformer encoder of 12 layers with about 500 MB of
parameters.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision

from lyapunov_lightning.training.replica.objective import ProbeBatch, TrainingObjective


class Classifier(pl.LightningModule):
    """A network with cross-entropy, and metrics if wanted."""

    def __init__(self, network: nn.Module, metrics: bool = False) -> None:
        super().__init__()
        self.network = network
        names = [MulticlassAccuracy(10), MulticlassPrecision(10), MulticlassF1Score(10)]
        self.metrics = MetricCollection(names) if metrics else None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss, with what training steps do beside it."""
        logits = self.network(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        if self.metrics is not None:
            self.log_dict(self.metrics(logits, batch[1]))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), 0.01)


class Encoder(nn.Module):
    """Twelve layers of width 512 over tokens, with an embedding that makes up for most of the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50_000, 768)
        layer = nn.TransformerEncoderLayer(768, 12, 3072, 0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.head = nn.Linear(768, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of sequences of tokens."""
        return self.head(self.layers(self.embedding(tokens)).mean(1))


def models() -> dict[str, tuple[Callable[[], Classifier], Callable[[], tuple[Tensor, Tensor]]]]:
    """The models, each with what makes a batch for it."""

    def mlp() -> Classifier:
        return Classifier(nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)))

    def labels(count: int) -> Tensor:
        return torch.randint(10, (count,))

    return {
        "MLP": (mlp, lambda: (torch.randn(64, 20), labels(64))),
        "ResNet-18": (
            lambda: Classifier(torchvision.models.resnet18(num_classes=10), metrics=True),
            lambda: (torch.randn(32, 3, 32, 32), labels(32)),
        ),
        "encoder": (lambda: Classifier(Encoder()), lambda: (torch.randint(50_000, (2, 16)), labels(2))),
    }


class Measure(pl.Callback):
    """Times evaluations before the third step, when there are gradients of the step before."""

    def __init__(self, ways: dict[str, Any], repeats: int) -> None:
        self.ways = ways
        self.repeats = repeats
        self.times: dict[str, list[float]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Time all ways in turn."""
        if batch_idx != 2:
            return
        probe = ProbeBatch(batch, batch_idx, True)
        for _ in range(self.repeats):
            for name, make in self.ways.items():
                for kind in ("forward", "gradient"):
                    objective = make(trainer, pl_module)
                    started = time.perf_counter()
                    evaluate(objective, probe, kind == "gradient")
                    self.times.setdefault(f"{name} {kind}", []).append(time.perf_counter() - started)


def evaluate(objective: Any, probe: ProbeBatch, differentiate: bool) -> None:
    """Evaluate an objective once, as the eigen-solvers do."""
    with objective.evaluated(probe) as evaluation:
        if differentiate:
            torch.autograd.grad(evaluation.loss, evaluation.leaves)


class Plain:
    """The step itself, run on the module without any care."""

    def __init__(self, trainer: Any, pl_module: Any) -> None:
        self.module = pl_module
        self.parameters = list(pl_module.parameters())

    def evaluated(self, probe: ProbeBatch) -> Any:
        """Run the step itself."""
        return _Evaluated(self.module, self.parameters, probe)


class _Evaluated:
    def __init__(self, module: Any, leaves: list[Tensor], probe: ProbeBatch) -> None:
        self.module, self.leaves, self.probe = module, leaves, probe

    def __enter__(self) -> "_Evaluated":
        self.loss = self.module.training_step(self.probe.batch, self.probe.batch_idx)
        return self

    def __exit__(self, *_: Any) -> None:
        del self.loss


def main() -> None:
    """Print a table of milliseconds, medians over interleaved repeats."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--models", nargs="*", default=list(models()))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways = {"plain": Plain, "replica": TrainingObjective}
    for name in arguments.models:
        make, draw = models()[name]
        pl.seed_everything(0, verbose=False)
        measure = Measure(ways, arguments.repeats)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=3,
            callbacks=[measure],
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(make(), DataLoader([draw() for _ in range(3)], batch_size=None))
        row = "  ".join(f"{key} {1000 * statistics.median(t):.2f}" for key, t in measure.times.items())
        print(f"{name}: {row}")


if __name__ == "__main__":
    main()
