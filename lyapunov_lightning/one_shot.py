"""`measure`: the curvature of a module's loss on some data, once and without training."""

import time
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lyapunov_lightning.curvature.arguments import check_int, made_of
from lyapunov_lightning.curvature.directions.plane import (
    Plane,
    PlaneDirections,
    as_plane,
    plane_axes,
    scan_plane,
)
from lyapunov_lightning.curvature.directions.scanning import Direction, noisy_start, parameter_norm, scan_direction
from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.curvature.linear import LinearOperator
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian, fault_of
from lyapunov_lightning.curvature.solvers.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.solvers.lanczos import lanczos
from lyapunov_lightning.curvature.stochastic.density import spectral_density
from lyapunov_lightning.spectrum_result import MeasuredPlane, ScannedLine, SpectrumResult, direction_names
from lyapunov_lightning.training.checks import check_objective, check_parameters, check_size
from lyapunov_lightning.training.config import HessianConfig, HessianLike
from lyapunov_lightning.training.data.loaders import seeded
from lyapunov_lightning.training.distributed import failing_together
from lyapunov_lightning.training.fsdp import put_away
from lyapunov_lightning.training.lightning_names import (
    Callback,
    LightningModule,
    Trainer,
    either,
    in_library_of,
)
from lyapunov_lightning.training.operators import Operators
from lyapunov_lightning.training.replica.copier import Copier
from lyapunov_lightning.training.replica.objective import ProbeBatch, Problem
from lyapunov_lightning.training.reporting.progress import watched

_TOL = 1e-3
"""Relative residual of the eigenpairs."""

_BATCH_SIZE = 128
"""Samples in a batch where the data are a dataset."""

_REACH, _POINTS = 0.05, 31
"""How far along a line the loss is evaluated, to both sides and as a share of the norm of the parameters, and at how
many points."""


def measure(
    module: Any,
    data: Any,
    *,
    largest: int = 1,
    smallest: int = 0,
    density: bool = False,
    lines: int = 0,
    plane: Plane | PlaneDirections | None = None,
    hessian: HessianLike | None = None,
    ckpt_path: str | None = None,
    trainer: Trainer | None = None,
) -> SpectrumResult:
    """Measure the curvature of a LightningModule's training loss as it is now, or as it was in a checkpoint.

    The loss is that of ``training_step``, evaluated as the callbacks do, on a copy of the module: parameters, buffers,
    modes, the random numbers and the trainer's logs are left as they were. Nothing is trained and nothing is logged.

    Args:
        module: The LightningModule.
        data: A dataloader or any other iterable of batches, a dataset, or a LightningDataModule, of which the training
            dataloader is taken. One epoch of it is used, held in memory; of a dataset all samples. Several ranks share
            the batches among them, unless the dataloader already has a ``DistributedSampler``.
        largest: How many of the largest eigenvalues.
        smallest: How many of the smallest.
        density: Whether to estimate the density of all eigenvalues too, for 320 products.
        lines: Along how many eigenvectors of each end to evaluate the loss.
        plane: A plane to evaluate the loss on, at 441 points by default: ``"eigenvectors"``, the first two of those
            that are asked for; ``"gradient"`` with the first one; ``"random"``; or a `Plane`.
        hessian: Which Hessian, or a mapping of its fields. By default that of all of the data in evaluation mode, so
            without dropout.
        ckpt_path: A checkpoint whose weights are measured in place of the module's.
        trainer: Its devices, strategy and precision are used; its callbacks and loggers are not. By default one device,
            a GPU if there is one, in the precision of the module's weights.

    Returns:
        Eigenvalues with vectors, residuals and errors, and what else was asked for.

    Raises:
        ValueError: If an argument is out of its range, or the data give no batch.
        TypeError: If `module` is no LightningModule or `data` nothing that batches come from.
        MisconfigurationException: If the module or the strategy cannot be measured: manual optimization without a loss
            of its own, sharded parameters, nothing to train.
        MeasurementError: If the loss or its derivatives are not finite or cannot be computed.

    Example::

        >>> import torch
        >>> from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
        >>> from lyapunov_lightning import measure
        >>> result = measure(BoringModel(), RandomDataset(32, 64), largest=2, smallest=1)
        >>> result.vectors.shape, bool(result.converged.all())
        (torch.Size([3, 66]), True)

    """
    check_int("largest", largest, least=0)
    check_int("smallest", smallest, least=0)
    check_int("lines", lines, least=0)
    over = as_plane(plane)
    if largest + smallest == 0 and not density and over is None:
        raise ValueError("`largest` and `smallest` should not both be 0 where no `density` or `plane` is asked for.")
    if over is not None:
        over.check_eigenvectors(largest + smallest)
    if not isinstance(module, either("LightningModule")):
        raise TypeError(f"`module` should be a LightningModule, got {type(module).__name__}.")
    config = HessianConfig() if hessian is None else made_of(HessianConfig, "hessian", hessian)
    if config.data == "batch":
        raise ValueError("`hessian` should not have `data='batch'`: there is no step whose batch it could be.")
    if not isinstance(config.data, str | None):
        raise ValueError("`hessian` should not have data of its own: give them as `data`.")
    config = config.filled(data="fixed", fraction=1.0, mode="eval")
    if trainer is None:
        trainer = in_library_of(module, "Trainer")(
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    # On a copy: `predict` moves the module to the device of the trainer, makes that its trainer, and with `ckpt_path`
    # overwrites its weights.
    copier = Copier()
    if module._trainer is not None:
        # A module that was trained leads to its Trainer, and from there to the data, the loggers and the processes.
        copier.memo.note(module._trainer, None)
    twin = copier(module)
    twin.predict_step = _predict_nothing  # Lightning asks for one, or for a `forward`
    once = _Once(data, config, largest, smallest, density, lines, over, twin)
    try:
        with _alone(trainer, once):
            # Not `fit`, which would make optimizers and train, and not `validate` or `test`, for which the module may
            # have no step.
            trainer.predict(twin, dataloaders=_NoBatches(), ckpt_path=ckpt_path, return_predictions=False)
    finally:
        copier.memo.forget()
    assert once.result is not None  # `predict` has called it, or raised
    return once.result


def _predict_nothing(batch: Any, batch_idx: int) -> None:
    """A step for which there is no batch."""


class _NoBatches:
    """Data for `Trainer.predict`, which is to set everything up and then to predict nothing."""

    def __len__(self) -> int:
        # Of an empty loader Lightning skips the whole loop, and `on_predict_start` with it.
        return 1

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class _Once(Callback):
    """Measures when everything is set up: the module on its device, with the checkpoint's weights."""

    def __init__(
        self,
        data: Any,
        config: HessianConfig,
        largest: int,
        smallest: int,
        density: bool,
        lines: int,
        plane: Plane | None,
        module: Any,
    ) -> None:
        super().__init__()
        self._data = data
        self._config = config
        self._largest, self._smallest = largest, smallest
        self._density = density
        self._lines = lines
        self._plane = plane
        self._modes = {inner: inner.training for inner in module.modules()}
        self._started = time.perf_counter()
        self.result: SpectrumResult | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        config, owner = self._config, "measure"
        put_away(pl_module)
        check_objective(owner, trainer, pl_module, config)
        check_parameters(owner, pl_module, config)
        check_size(owner, pl_module, self._largest + self._smallest)
        for inner, is_training in self._modes.items():  # which `predict` has switched to evaluation
            inner.training = is_training
        # `predict` turns gradients off, and tensors made in inference mode could not be part of a graph later either.
        with torch.inference_mode(False), torch.enable_grad(), failing_together(trainer):
            self.result = self._measured(trainer, pl_module)

    def _measured(self, trainer: Trainer, pl_module: LightningModule) -> SpectrumResult:
        config = self._config
        assert config.mode is not None  # see `HessianConfig.filled`
        with seeded(config.seed):  # all ranks draw the same order of batches, of which each takes every n-th
            batches, num_batches = _batches(trainer, pl_module, self._data, config)
        with seeded(config.seed + trainer.global_rank):
            hessian = Operators().make(Problem(trainer, pl_module, config, batches))
        gradient = hessian.gradient()
        with watched(hessian, trainer, "Hessian-vector products", alone=True) as operator:
            pairs = self._pairs(operator)
            fault = None if bool(pairs.converged.all()) else fault_of(hessian, seed=config.seed)
            if fault is not None and trainer.is_global_zero:
                warnings.warn(
                    f"`measure`: the search for eigenvalues has not converged. {fault}", CurvatureWarning, stacklevel=2
                )
            spectrum = spectral_density(operator, known=pairs, seed=config.seed) if self._density else None
        lines = self._along(hessian, gradient, pairs)
        return SpectrumResult(
            values=pairs.values.cpu(),
            # `torch.stack` refuses an empty list, which is what a density without eigenpairs has.
            vectors=torch.stack([hessian.space.whole(row).cpu() for row in pairs.vectors])
            if len(pairs.vectors)
            else torch.empty(0, hessian.size),
            residuals=pairs.residuals.cpu(),
            value_errors=pairs.value_errors.cpu(),
            converged=pairs.converged.cpu(),
            num_largest=pairs.num_largest,
            module=type(pl_module).__name__,
            mode=config.mode,
            loss=hessian.value(),
            gradient_norm=float(hessian.space.norm(gradient)),
            num_parameters=hessian.size,
            num_batches=num_batches,
            density=spectrum,
            lines=lines,
            plane=self._over_plane(hessian, gradient, pairs),
            matvecs=hessian.num_matvecs,
            seconds=time.perf_counter() - self._started,
        )

    def _pairs(self, operator: LinearOperator) -> Eigenpairs:
        if self._largest + self._smallest:
            return lanczos(operator, largest=self._largest, smallest=self._smallest, tol=_TOL, seed=self._config.seed)
        nothing = torch.empty(0, dtype=torch.float64)
        return Eigenpairs(
            values=nothing,
            vectors=torch.empty(0, operator.size),
            residuals=nothing,
            value_errors=nothing,
            missed_probability=nothing,
            converged=nothing.bool(),
            num_matvecs=0,
            num_largest=0,
            start=torch.empty(operator.size),
        )

    def _along(self, hessian: LossHessian, gradient: Tensor, pairs: Eigenpairs) -> dict[str, ScannedLine]:
        """The loss along eigenvectors of both ends."""
        of_largest = min(self._lines, self._largest)
        of_smallest = min(self._lines, self._smallest)
        if not of_largest + of_smallest:
            return {}
        places = [*range(of_largest), *range(self._largest, self._largest + of_smallest)]
        # Once for all lines: the noise is that of the loss, and its measurement takes nine evaluations.
        start = noisy_start(hessian, gradient)
        # In proportion to the parameters, so that the same share of a large and of a small network is seen; 1 for a
        # network of zeros.
        reach = _REACH * parameter_norm(hessian) or 1.0
        found: dict[str, ScannedLine] = {}
        for name, place in zip(direction_names(of_largest, of_smallest), places, strict=True):
            direction = Direction(float(pairs.values[place]), pairs.vectors[place])
            line = scan_direction(
                hessian, direction, gradient, start, scales=[reach], units="norm", points=_POINTS
            ).line
            (window,), search = line.windows, line.search
            found[name] = ScannedLine(
                eigenvalue=direction.curvature,
                distances=window.distances.cpu(),
                losses=window.losses.cpu(),
                model=window.model.cpu(),
                minimum=search.step if search.bracketed else None,
                improvement=search.improvement if search.bracketed else None,
            )
        return found

    def _over_plane(self, hessian: LossHessian, gradient: Tensor, pairs: Eigenpairs) -> MeasuredPlane | None:
        """The loss over a plane, if one is asked for."""
        if self._plane is None:
            return None
        names = direction_names(self._largest, self._smallest)
        axes = plane_axes(
            hessian, self._plane.directions, pairs=pairs, names=names, gradient=gradient, seed=self._config.seed
        )
        return MeasuredPlane(**vars(scan_plane(hessian, axes, self._plane)))


@contextmanager
def _alone(trainer: Trainer, callback: Callback) -> Iterator[None]:
    """Let a trainer run with one callback and no loggers; its own are back afterwards."""
    untyped: Any = trainer  # whose class does not declare its callbacks
    callbacks, loggers = untyped.callbacks, trainer.loggers
    # The user's callbacks would take this for a prediction, and a `BasePredictionWriter` would begin its files. A
    # logger would get the module's hyperparameters, and with them a run that nothing else is logged to.
    untyped.callbacks, trainer.loggers = [callback], []
    try:
        yield
    finally:
        untyped.callbacks, trainer.loggers = callbacks, loggers


def _batches(
    trainer: Trainer, pl_module: LightningModule, data: Any, config: HessianConfig
) -> tuple[list[ProbeBatch], int]:
    """This rank's batches, and how many all ranks have."""
    loader = _loader(trainer, pl_module, data)
    count = config.num_batches
    if count is None and config.fraction is not None and config.fraction < 1:
        if not isinstance(loader, Sized):
            raise ValueError(
                f"`hessian.fraction` is of no use with data without a length, a {type(loader).__name__}. Pass"
                " `num_batches`."
            )
        count = max(1, round(config.fraction * len(loader)))
    batches = [ProbeBatch(batch, index, False) for index, batch in enumerate(islice(loader, count))]
    if not batches:
        raise ValueError(f"`data` should give at least one batch, got a {type(data).__name__} that gives none.")
    # Such a loader gives each rank other batches already. Of any other loader all ranks have read the same ones, and
    # each takes every n-th: unequal shares are weighted by their samples.
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        return batches, len(batches) * trainer.world_size
    return batches[trainer.global_rank :: trainer.world_size], len(batches)


def _loader(trainer: Trainer, pl_module: LightningModule, data: Any) -> Iterable[Any]:
    """The iterable that gives the batches."""
    if isinstance(data, either("LightningDataModule")):
        # As `fit` does: without it Lightning would not find the hooks of the data that move batches to the device.
        connector: Any = trainer._data_connector
        connector.attach_datamodule(pl_module, data)
        # As Lightning does with `prepare_data_per_node`: one process of a machine downloads, and the others wait.
        if trainer.local_rank == 0:
            data.prepare_data()
        trainer.strategy.barrier("prepare_data")
        data.setup("fit")
        loader: Iterable[Any] = data.train_dataloader()
        return loader
    if isinstance(data, Dataset):
        # With the last, smaller batch, so that every sample counts, and once. Batches are weighted by their samples:
        # how large they are does not matter in evaluation mode.
        return DataLoader(data, _BATCH_SIZE)
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise TypeError(
            f"`data` should be a dataloader, a dataset or a LightningDataModule, got {type(data).__name__}."
        )
    batches: Iterable[Any] = data
    return batches
