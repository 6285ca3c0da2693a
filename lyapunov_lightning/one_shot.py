"""`measure`: the curvature of a module's loss on some data, once and without training."""

import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.curvature.arguments import check_int, made_of
from lyapunov_lightning.curvature.directions.plane import (
    Plane,
    PlaneDirections,
    as_plane,
    plane_axes,
    scan_plane,
)
from lyapunov_lightning.curvature.directions.scanning import Direction, noisy_start, parameter_norm, scan_direction
from lyapunov_lightning.curvature.errors import CurvatureWarning, Interrupted
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian, fault_of
from lyapunov_lightning.curvature.solvers.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.solvers.lanczos import lanczos
from lyapunov_lightning.curvature.stochastic.density import SpectralDensity, spectral_density
from lyapunov_lightning.kept_search import KeptSearch, digest_of
from lyapunov_lightning.search_under_way import SearchUnderWay
from lyapunov_lightning.spectrum_result import MeasuredPlane, ScannedLine, SpectrumResult, direction_names
from lyapunov_lightning.training.checks import check_objective, check_parameters, check_precision, check_size
from lyapunov_lightning.training.config import HessianConfig, HessianLike
from lyapunov_lightning.training.data.loaders import seeded
from lyapunov_lightning.training.data.readings import HELD_BYTES, MeasuredBatches, batches_of
from lyapunov_lightning.training.distributed import failing_together
from lyapunov_lightning.training.fsdp import put_away
from lyapunov_lightning.training.lightning_names import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    either,
    in_library_of,
)
from lyapunov_lightning.training.operators import Operators
from lyapunov_lightning.training.replica.copier import Copier
from lyapunov_lightning.training.replica.objective import Problem
from lyapunov_lightning.training.reporting.interruption import Interruption, interruptible
from lyapunov_lightning.training.reporting.progress import lone_bar
from lyapunov_lightning.training.reporting.telling import warn

_TOL = 1e-3
"""Relative residual of the eigenpairs."""

_DENSITY_VECTORS, _DENSITY_STEPS = 8, 40
"""Random vectors of a density, and Lanczos steps of each."""

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
    max_batches: int | None = None,
    max_batch_bytes: int = HELD_BYTES,
    resume: str | Path | None = None,
    progress: bool = True,
    ckpt_path: str | None = None,
    trainer: Trainer | None = None,
) -> SpectrumResult:
    """Measure the curvature of a LightningModule's training loss as it is now, or as it was in a checkpoint.

    The loss is that of ``training_step``, evaluated as the callbacks do, on a copy of the module: parameters, buffers,
    modes, the random numbers and the trainer's logs are left as they were. Nothing is trained and nothing is logged.

    Args:
        module: The LightningModule.
        data: A dataloader or any other iterable of batches, a dataset, or a LightningDataModule, of which the training
            dataloader is taken. One epoch of it is used; of a dataset all samples. Several ranks share the batches
            among them, unless the dataloader already has a ``DistributedSampler``.
        largest: How many of the largest eigenvalues.
        smallest: How many of the smallest.
        density: Whether to estimate the density of all eigenvalues too, for 320 products.
        lines: Along how many eigenvectors of each end to evaluate the loss.
        plane: A plane to evaluate the loss on, at 441 points by default: ``"eigenvectors"``, the first two of those
            that are asked for; ``"gradient"`` with the first one; ``"random"``; or a `Plane`.
        hessian: Which Hessian, or a mapping of its fields. By default that of all of the data in evaluation mode, so
            without dropout.
        max_batches: How many batches of the data to measure on: the first ones; all by default.
        max_batch_bytes: How many bytes of batches may be held in memory, 1 GiB by default. Data that take more are read
            anew for every product, of which a search for one eigenvalue takes some dozens, and only the batch that is
            at work is held. The values are the same. A list of batches is held as it is.
        resume: A file in which to keep the search while it is under way, with which the same call goes on where it was
            interrupted, by Ctrl-C, a kill or a crash. It is removed once the measurement is finished.
        progress: Whether to show on the error stream, if that is a terminal, what takes more than two seconds. Not if
            `trainer` has no progress bar.
        ckpt_path: A checkpoint whose weights are measured in place of the module's.
        trainer: Its devices, strategy and precision are used; its callbacks and loggers are not. By default one device,
            a GPU if there is one, in the precision of the module's weights.

    Returns:
        Eigenvalues with vectors, residuals and errors, and what else was asked for. Ctrl-C during the search ends it
        with what it has found by then, marked as not converged, and a warning; so does a signal to terminate.

    Raises:
        ValueError: If an argument is out of its range or contradicts another one, the data give no batch, or `resume`
            keeps the search of another measurement.
        TypeError: If `module` is no LightningModule or `data` nothing that batches come from.
        MisconfigurationException: If the module or the strategy cannot be measured: manual optimization without a loss
            of its own, sharded parameters, nothing to train.
        MeasurementError: If the loss or its derivatives are not finite or cannot be computed, or data that are read
            anew are not the same again.

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
    if max_batches is not None:
        check_int("max_batches", max_batches, least=1)
        config = replace(config, num_batches=_size_of(config, max_batches), fraction=None)
    check_int("max_batch_bytes", max_batch_bytes, least=0)
    config = config.filled(data="fixed", fraction=1.0, mode="eval")
    if resume is not None and trainer is not None and trainer.world_size > 1:
        raise MisconfigurationException(
            f"`measure(resume=...)` keeps the search of one process, and the trainer has {trainer.world_size}. Leave"
            " `resume` out, or measure on one device."
        )
    kept = None if resume is None else KeptSearch(resume)
    shows = progress and (trainer is None or trainer.progress_bar_callback is not None)
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
    once = _Once(data, config, largest, smallest, density, lines, over, twin, max_batch_bytes, kept, shows)
    try:
        with _alone(trainer, once):
            # Not `fit`, which would make optimizers and train, and not `validate` or `test`, for which the module may
            # have no step.
            trainer.predict(twin, dataloaders=_NoBatches(), ckpt_path=ckpt_path, return_predictions=False)
    finally:
        copier.memo.forget()
    assert once.result is not None  # `predict` has called it, or raised
    return once.result


def _size_of(config: HessianConfig, max_batches: int) -> int:
    """How many batches, where the configuration says nothing else."""
    for name in ("num_batches", "fraction"):
        value = getattr(config, name)
        if value is not None:
            raise ValueError(
                f"`max_batches` and `hessian.{name}` are two sizes of the same data, got {max_batches} and {value}."
            )
    return max_batches


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
        max_batch_bytes: int,
        kept: KeptSearch | None,
        shows: bool,
    ) -> None:
        super().__init__()
        self._data = data
        self._config = config
        self._largest, self._smallest = largest, smallest
        self._density = density
        self._lines = lines
        self._plane = plane
        self._max_batch_bytes = max_batch_bytes
        self._kept = kept
        self._shows = shows
        self._modes = {inner: inner.training for inner in module.modules()}
        self._started = time.perf_counter()
        self.result: SpectrumResult | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        config, owner = self._config, "measure"
        put_away(pl_module)
        check_objective(owner, trainer, pl_module, config)
        check_parameters(owner, pl_module)
        ways_out = {
            "measure with exact products: `method='auto'`": config.method == "finite_difference",
            "leave `lines` out": self._lines > 0,
            "leave `plane` out": self._plane is not None,
        }
        instead = [way_out for way_out, is_needed in ways_out.items() if is_needed]
        if instead:
            check_precision(owner, pl_module, " and ".join(instead))
        check_size(owner, pl_module, self._largest + self._smallest)
        for inner, is_training in self._modes.items():  # which `predict` has switched to evaluation
            inner.training = is_training
        # `predict` turns gradients off, and tensors made in inference mode could not be part of a graph later either.
        with torch.inference_mode(False), torch.enable_grad(), failing_together(trainer):
            self.result = self._measured(trainer, pl_module)

    def _measured(self, trainer: Trainer, pl_module: LightningModule) -> SpectrumResult:
        config = self._config
        assert config.mode is not None  # see `HessianConfig.filled`
        with self._counting(trainer, None) as report:
            batches = batches_of(trainer, pl_module, self._data, config, self._max_batch_bytes, report)
        try:
            with seeded(config.seed + trainer.global_rank):
                hessian = Operators().make(Problem(trainer, pl_module, config, batches))
            with self._counting(trainer, batches):
                gradient, loss = hessian.gradient(), hessian.value()
            if self._kept is not None:
                self._kept.belongs_to(self._identity(trainer, pl_module, batches), loss)
            resumed = 0 if self._kept is None else self._kept.num_matvecs
            pairs, spectrum, is_interrupted = self._searched(trainer, hessian, batches)
            is_whole = not is_interrupted
            with self._counting(trainer, batches):
                lines = self._along(hessian, gradient, pairs) if is_whole else {}
                plane = self._over_plane(hessian, gradient, pairs) if is_whole else None
        finally:
            batches.close()
        if is_whole and self._kept is not None:
            self._kept.remove()
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
            loss=loss,
            gradient_norm=float(hessian.space.norm(gradient)),
            num_parameters=hessian.size,
            num_batches=batches.num_batches,
            density=spectrum,
            lines=lines,
            plane=plane,
            # Of a product that was interrupted nothing is in the pairs.
            matvecs=pairs.num_matvecs if is_interrupted else hessian.num_matvecs + resumed,
            seconds=time.perf_counter() - self._started + (0.0 if self._kept is None else self._kept.seconds),
            max_batches=batches.max_batches,
            is_interrupted=is_interrupted,
        )

    def _searched(
        self, trainer: Trainer, hessian: LossHessian, batches: MeasuredBatches
    ) -> tuple[Eigenpairs, SpectralDensity | None, bool]:
        """The eigenpairs, the density if one is asked for, and whether Ctrl-C has ended the search."""
        seed = self._config.seed
        with (
            lone_bar(trainer, "Hessian-vector products", unit="products", shown=self._shows) as report,
            # Of several ranks each gets its own signal, at a batch of its own: they end as they always did.
            interruptible("`measure`") if trainer.world_size == 1 else nullcontext(Interruption()) as interruption,
        ):
            search = SearchUnderWay(batches, self._kept, interruption, report)
            pairs = self._pairs(hessian, search)
            if search.is_interrupted:
                self._say_interrupted(pairs)
                return pairs, None, True
            try:
                fault = None if bool(pairs.converged.all()) else fault_of(hessian, seed=seed)
                if fault is not None and trainer.is_global_zero:
                    warnings.warn(
                        f"`measure`: the search for eigenvalues has not converged. {fault}",
                        CurvatureWarning,
                        stacklevel=2,
                    )
                if self._kept is not None and (self._density or self._lines or self._plane):
                    self._kept.end(pairs)
                return pairs, self._spectrum(hessian, pairs, search), False
            except Interrupted:
                self._say_interrupted(pairs)
                return pairs, None, True

    def _spectrum(self, hessian: LossHessian, pairs: Eigenpairs, search: SearchUnderWay) -> SpectralDensity | None:
        """The density, if it is asked for."""
        if not self._density:
            return None
        num_steps = max(1, min(_DENSITY_STEPS, hessian.size - int(pairs.converged.sum())))
        operator = search.counted(hessian, _DENSITY_VECTORS * num_steps)
        return spectral_density(
            operator, num_probes=_DENSITY_VECTORS, num_steps=num_steps, known=pairs, seed=self._config.seed
        )

    def _pairs(self, hessian: LossHessian, search: SearchUnderWay) -> Eigenpairs:
        kept = self._kept
        if kept is not None and kept.pairs is not None:
            adopt = hessian.space.adopt
            vectors, start = adopt(kept.pairs.vectors, "vectors"), adopt(kept.pairs.start, "start")[0]
            return replace(kept.pairs, vectors=vectors, start=start)
        if self._largest + self._smallest:
            return lanczos(
                hessian,
                largest=self._largest,
                smallest=self._smallest,
                tol=_TOL,
                seed=self._config.seed,
                watch=search.before_product,
                resume=None if kept is None else kept.search,
            )
        nothing = torch.empty(0, dtype=torch.float64)
        return Eigenpairs(
            values=nothing,
            vectors=torch.empty(0, hessian.size),
            residuals=nothing,
            value_errors=nothing,
            missed_probability=nothing,
            converged=nothing.bool(),
            num_matvecs=0,
            num_largest=0,
            start=torch.empty(hessian.size),
        )

    def _say_interrupted(self, pairs: Eigenpairs) -> None:
        going_on = (
            "Give a file to `resume`, and the same call goes on where it was interrupted."
            if self._kept is None
            else f"The same call goes on from {self._kept.path}."
        )
        warn(f"`measure` was interrupted after {pairs.num_matvecs} products of its search. {going_on}")

    def _identity(self, trainer: Trainer, pl_module: LightningModule, batches: MeasuredBatches) -> dict[str, str]:
        """What makes this measurement another one than any other, by what a user calls it."""
        config, kind = self._config, type(pl_module)
        functions = [
            None if f is None else getattr(f, "__qualname__", repr(f)) for f in (config.loss_fn, config.batch_size_fn)
        ]
        options = (self._largest, self._smallest, config.mode, config.method, config.seed, *functions)
        return {
            "the module": f"{kind.__module__}.{kind.__qualname__}",
            "the weights": digest_of(pl_module),
            "the data": batches.digest,
            "the options": repr((*options, str(trainer.precision))),
        }

    @contextmanager
    def _counting(self, trainer: Trainer, batches: MeasuredBatches | None) -> Iterator[Callable[[int], None]]:
        """Show how many batches are evaluated meanwhile, or are read: the first reading calls what is yielded."""
        with lone_bar(trainer, "Batches", unit="batches", shown=self._shows) as report:
            numbers = itertools.count(1)

            def at_batch(place: int) -> None:
                report(next(numbers), "")

            if batches is not None:
                batches.on_batch = at_batch
            try:
                yield at_batch
            finally:
                if batches is not None:
                    batches.on_batch = None

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
