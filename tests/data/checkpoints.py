"""Runs of every callback whose checkpoints are kept beside this file, and the script that wrote them.

``checkpoints.pt.xz`` holds, for each of `RUNS`, checkpoints from the midst of a training and what that training logged
from there on. It was written by the package as it was before its modules moved into rooms, and shows that checkpoints
of that time still resume. So the suite only reads it. To add runs, or to keep checkpoints of another state of the
package, run this file with that state on the path, in a folder that is none of ours::

    PYTHONPATH=<the package's root in that state> python <here>/tests/data/checkpoints.py <file to write>

It imports nothing of the tests, and of the package only paths that are public: the module and the data that the
checkpoints belong to have to stay as they are.
"""

import io
import lzma
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lyapunov_lightning import (
    CurvatureProbe,
    HessianConfig,
    LossAlongEigvecScanner,
    NegativeCurvatureTracker,
    NudgedSGDHook,
    QuasiNewtonLRController,
    Schedule,
    SpectrumTracker,
)
from lyapunov_lightning.callbacks.negative_curvature_tracker import Descent
from lyapunov_lightning.callbacks.rules import RuleName

FILE = Path(__file__).with_suffix(".pt.xz")

OURS = tuple(
    kind.__name__
    for kind in (
        CurvatureProbe,
        LossAlongEigvecScanner,
        NegativeCurvatureTracker,
        NudgedSGDHook,
        QuasiNewtonLRController,
        SpectrumTracker,
    )
)


class Kept(Logger):
    """Keeps what is logged, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}

    name, version = "kept", 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.logged.setdefault(step, {}).update({tag: float(value) for tag, value in metrics.items()})


class Network(pl.LightningModule):
    """26 parameters in float64, and squared errors.

    Args:
        optimizer: Maps the parameters to an optimizer.
        added: What is added to the loss at some steps, whose gradient stays as it is.

    """

    def __init__(
        self, optimizer: Callable[[Any], torch.optim.Optimizer], added: dict[int, float] | None = None
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.added = added or {}
        self.hidden, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.last(self.hidden(inputs).tanh()), targets)
        loss = loss + self.added.get(self.trainer.global_step, 0.0)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


class ResumableLoader(DataLoader):
    """The same batches in the same order in every epoch, and goes on in the midst of one."""

    def __init__(self, dataset: TensorDataset, batch_size: int) -> None:
        super().__init__(dataset, batch_size)
        self.position = 0

    def __iter__(self) -> Iterator[Any]:
        if self.position == len(self):
            self.position = 0
        for start in range(self.position * self.batch_size, len(self.dataset), self.batch_size):
            self.position += 1
            yield list(self.dataset[start : start + self.batch_size])

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(48, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(48, 2, generator=generator, dtype=torch.float64)
    targets = torch.stack([inputs.prod(dim=1), (2 * inputs[:, 0]).sin()], dim=1) + 0.3 * noise
    return TensorDataset(inputs, targets)


class Run(NamedTuple):
    """A training with callbacks, and the steps at which its checkpoints were written.

    Attributes:
        callbacks: Makes the callbacks.
        at: The steps.
        optimizer: Maps the parameters to an optimizer.
        added: What is added to the loss at some steps.
        steps: How many steps it takes.
        full_batch: Whether each of them sees all data.

    """

    callbacks: Callable[[], list[Callback]]
    at: tuple[int, ...] = (7,)
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, lr=0.1)
    added: dict[int, float] | None = None
    steps: int = 14
    full_batch: bool = False


def _momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05)


def _two_groups(parameters: Any) -> torch.optim.Optimizer:
    first, *others = parameters
    return torch.optim.Adam([{"params": [first], "lr": 0.1}, {"params": others}], lr=0.05)


HALF = HessianConfig(fraction=0.5)
EXACT = 1e-9
"""At this tolerance the eigenvalues are those of the matrix, whatever the solver."""

FROM_STEP_5 = dict.fromkeys(range(5, 20), 1e6)

ALONG: RuleName = "along_update"
"""The rule that was the default when the checkpoints were written."""

# `eigenvalue_every` asks for what was measured at every step without it when the checkpoints were written.
RUNS: dict[str, Run] = {
    "probe, lanczos": Run(lambda: [CurvatureProbe(3, end="both", tol=EXACT)], optimizer=_momentum),
    "probe, preconditioned": Run(lambda: [CurvatureProbe(3, tol=EXACT, eigenvalue_every=1)], optimizer=_adam),
    "probe, power": Run(lambda: [CurvatureProbe(2, "power", end="both", tol=0.1)]),
    "probe, power, preconditioned": Run(
        lambda: [CurvatureProbe(2, "power", tol=0.1, eigenvalue_every=1)], optimizer=_adam
    ),
    "probe, lyapunov": Run(lambda: [CurvatureProbe(1, "lyapunov", end="both")], optimizer=_momentum),
    "probe, lyapunov, now and then": Run(lambda: [CurvatureProbe(3, "lyapunov", end="smallest", iterations=2)]),
    "probe, critical": Run(lambda: [CurvatureProbe(2, "critical")], optimizer=_momentum),
    "probe, above the limit": Run(
        lambda: [CurvatureProbe(2, tol=EXACT)],
        at=(30,),
        optimizer=lambda p: torch.optim.SGD(p, lr=1.5),
        steps=38,  # beyond the limit what rounding does grows from step to step
        full_batch=True,
    ),
    "probe, schedule": Run(
        lambda: [CurvatureProbe(schedule=Schedule(first_n_steps=2, every_n_epochs=1, at_steps=[9]), tol=EXACT)], at=(8,)
    ),
    "spectrum": Run(
        lambda: [SpectrumTracker(3, 2, 2, hessian=HALF, tol=EXACT, random_vectors=2, density_steps=4, groups="modules")]
    ),
    "spectrum, benettin": Run(lambda: [SpectrumTracker(2, 2, 2, estimator="benettin")]),
    "negative, frozen": Run(
        lambda: [NegativeCurvatureTracker(3, 2, hessian=HALF, freeze_at=[2, 9], tol=EXACT)], at=(5, 10)
    ),
    "negative, descent": Run(lambda: [NegativeCurvatureTracker(3, 1, hessian=HALF, descent=Descent(), tol=EXACT)]),
    "negative, online": Run(
        lambda: [NegativeCurvatureTracker(4, 1, hessian=HALF, estimator="online", freeze_at=[3], tol=EXACT)]
    ),
    "negative, online descent": Run(
        lambda: [NegativeCurvatureTracker(smallest=0, estimator="online", descent=Descent(lr=0.5))]
    ),
    "scan": Run(lambda: [LossAlongEigvecScanner(5, 1, 1, 1, hessian=HALF, points=5, tol=EXACT)]),
    "nudge": Run(lambda: [NudgedSGDHook(4, 2, 3.0, hessian=HALF, tol=EXACT)], optimizer=_momentum),
    "nudge, frozen": Run(lambda: [NudgedSGDHook(k=2, variant="no_top", frozen=True, hessian=HALF, tol=EXACT)]),
    # Before the first learning rate, right after it, and on the way, when it falls at the end.
    "controller": Run(
        lambda: [QuasiNewtonLRController(rule=ALONG, schedule=Schedule(at_steps=[3, 5, 8, 11]))],
        at=(2, 4, 9, 12),
        steps=16,
    ),
    "controller, two groups": Run(lambda: [QuasiNewtonLRController(2, ALONG)], optimizer=_two_groups, at=(1, 7)),
    "controller, halved": Run(lambda: [QuasiNewtonLRController(rule=ALONG)], added={9: 1e6}, at=(10, 13), steps=18),
    "controller, stopped": Run(
        lambda: [QuasiNewtonLRController(rule=ALONG, safeguard=False)], added=FROM_STEP_5, at=(10, 18), steps=20
    ),
    "controller, sharpness": Run(lambda: [QuasiNewtonLRController(rule="inverse_sharpness")], at=(1, 7)),
    "controller, sharpness, halved": Run(
        lambda: [QuasiNewtonLRController(2, "inverse_sharpness", annealing=0.4)],
        optimizer=_momentum,
        added={9: 1e6},
        at=(10, 15),
        steps=18,
    ),
    "all": Run(
        lambda: [
            CurvatureProbe(2, end="both", tol=EXACT),
            SpectrumTracker(4, 2, hessian=HALF, tol=EXACT),
            LossAlongEigvecScanner(6, hessian=HALF, points=5, tol=EXACT),
            NegativeCurvatureTracker(4, 1, descent=Descent(), hessian=HALF, tol=EXACT),
            QuasiNewtonLRController(rule=ALONG),
            NudgedSGDHook(4, 2, 0.1, hessian=HALF, tol=EXACT),
        ]
    ),
}


def kept() -> dict[str, Any]:
    """What the file holds."""
    with lzma.open(FILE) as file:
        return torch.load(io.BytesIO(file.read()), weights_only=True)


def results_of(callbacks: list[Any]) -> list[list[dict[str, float]]]:
    """What each callback measured, by tag."""
    return [
        [{"step": result.step, "epoch": result.epoch, **result.scalars()} for result in callback.results]
        for callback in callbacks
    ]


def fit(run: Run, folder: str | Path, *others: Callback, ckpt_path: str | Path | None = None) -> dict[str, Any]:
    """Train, or go on training.

    Returns:
        What was logged by step, what each callback measured, and where the parameters and learning rates ended.

    """
    pl.seed_everything(1, verbose=False)
    logger, callbacks = Kept(), run.callbacks()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=run.steps,
        max_epochs=-1,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[*callbacks, *others],
        enable_checkpointing=any(isinstance(other, ModelCheckpoint) for other in others),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    loader = ResumableLoader(data(), 48 if run.full_batch else 8)
    module = Network(run.optimizer, run.added)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*IntervalSampler.*|.*srun.*")
        trainer.fit(module, loader, ckpt_path=ckpt_path)
    return {
        "logged": logger.logged,
        "results": results_of(callbacks),
        "parameters": nn.utils.parameters_to_vector(module.parameters()).detach(),
        "learning_rates": [group["lr"] for group in trainer.optimizers[0].param_groups],
    }


def _written(run: Run) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        saved = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        end = fit(run, folder, saved)
        checkpoints = {}
        for step in run.at:
            checkpoint = torch.load(Path(folder) / f"step={step}.ckpt", weights_only=True)
            ours = {key: state for key, state in checkpoint["callbacks"].items() if key.startswith(OURS)}
            checkpoints[step] = {**checkpoint, "callbacks": ours}
    logged = {step: metrics for step, metrics in end["logged"].items() if step >= min(run.at)}
    return {"checkpoints": checkpoints, **end, "logged": logged}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with lzma.open(sys.argv[1], "wb", preset=9) as file:
        torch.save({name: _written(run) for name, run in RUNS.items()}, file)
