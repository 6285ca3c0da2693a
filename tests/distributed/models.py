"""What the ranks train, on what data, and what they note of it."""

import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.training.data.batches import ProbeData
from tests.distributed.ranks import TIMEOUT
from tests.modules import Watcher
from tests.training.live import RememberingLogger

OWN_TAGS = re.compile(r"(^|/)(curvature|spectrum|negative|scan|quasi_newton|nudge)(_details)?/")
"""What the package's callbacks log."""

STEP_BATCHES = [5, 3, 2]
"""Batch size of each rank where the shards are unequal."""

STEPS = 4
"""Optimizer steps of the short trainings."""


class PlannedError(RuntimeError):
    """The fault that a check provokes."""


class Smooth(pl.LightningModule):
    """A small regression without noise, whose Hessian has a closed form of sorts: a dense one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def regression(num_samples: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(num_samples, 3, generator=generator), torch.randn(num_samples, 2, generator=generator)
    )


def unequal_shards(rank: int) -> DataLoader:
    """Data of each rank's own, in batches of a size of its own; to be used without Lightning's sampler."""
    size = STEP_BATCHES[rank]
    return DataLoader(regression(STEPS * size, seed=rank), size)


def strategy(**options: Any) -> DDPStrategy:
    return DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT, **options)


def trainer_of(*callbacks: Callback, **settings: Any) -> pl.Trainer:
    settings = {
        "max_epochs": -1 if "max_steps" in settings else 1,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "strategy": strategy(),
        **settings,
    }
    return pl.Trainer(accelerator="cpu", devices=dist.get_world_size(), callbacks=list(callbacks), **settings)


def fit(module: pl.LightningModule, loader: Any, *callbacks: Callback, **settings: Any) -> pl.Trainer:
    path = settings.pop("ckpt_path", None)
    trainer = trainer_of(*callbacks, **settings)
    trainer.fit(module, loader, ckpt_path=path)
    return trainer


def final(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach()


class Snapshots(Watcher):
    """The parameters and the batch before every step."""

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.parameters.append(final(pl_module).clone())
        self.batches.append(copy.deepcopy(batch))


class Noticing(Watcher):
    """Calls a function in one hook."""

    def __init__(self, hook: str, function: Callable[[], None]) -> None:
        setattr(self, hook, lambda *_: function())


@contextmanager
def measured_batches() -> Iterator[list[list[Any]]]:
    """The fixed data that this rank measures on, one list of batches for each measurement."""
    measured: list[list[Any]] = []
    plain = ProbeData.batches

    def batches(self: ProbeData) -> Any:
        probes = plain(self)
        if probes is not None:
            measured.append([copy.deepcopy(probe.batch) for probe in probes])
        return probes

    ProbeData.batches = batches
    try:
        yield measured
    finally:
        ProbeData.batches = plain


@contextmanager
def failing_once(place: Any, name: str, only: bool, call: int = 1) -> Iterator[None]:
    """Let a function, as a module or a class knows it, fail at its second call, or another; on this rank if `only`."""
    plain, calls = getattr(place, name), count()

    def function(*args: Any, **options: Any) -> Any:
        if next(calls) == call and only:
            raise PlannedError("planned")
        return plain(*args, **options)

    setattr(place, name, function)
    try:
        yield
    finally:
        setattr(place, name, plain)


@contextmanager
def warned() -> Iterator[list[str]]:
    """The package's warnings on this rank, each time that one is given."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)]


def said(function: Callable[[], Any]) -> str:
    """What a function raises."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def is_own(tag: str) -> bool:
    """Whether one of the package's callbacks has logged this."""
    return OWN_TAGS.search(tag) is not None


def own_entries(logger: RememberingLogger) -> list[tuple[int, dict[str, float]]]:
    """What the callbacks have logged, but for the time."""
    return [
        (step, {tag: value for tag, value in metrics.items() if not tag.endswith("seconds")})
        for step, metrics in logger.entries
        if any(map(is_own, metrics))
    ]


class Saving(Callback):
    """Writes a checkpoint at the end of the first epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def shared_folder() -> Path:
    """A new folder that all ranks know."""
    names = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    return Path(str(names[0]))


def observed(
    callback: Any, loader: Any, module: pl.LightningModule | None = None, *beside: Callback, **settings: Any
) -> dict[str, Any]:
    """A training in double precision, with callbacks beside the one in question, and all that is known afterwards."""
    logger, snapshots = RememberingLogger(), Snapshots()
    module = Smooth() if module is None else module
    with measured_batches() as measured, warned() as messages:
        fit(module, loader, snapshots, callback, *beside, logger=logger, **{"precision": "64-true", **settings})
    return {
        "logged": own_entries(logger),
        "results": callback.results,
        "parameters": [*snapshots.parameters, final(module)],
        "batches": snapshots.batches,
        "measured": measured,
        "state": {name: part for name, part in callback.state_dict().items() if name != "results"},
        "warned": messages,
    }
