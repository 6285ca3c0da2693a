"""The training loss of a LightningModule, evaluated again without side effects.

For every evaluation a replica of the module is made, with parameters of its own. The training step runs on the replica,
the loss is differentiated with respect to the replica's parameters, and the replica is thrown away. So nothing has to
be put back, and the step finds what it finds in training: parameters that are parameters, buffers, optimizers, a
trainer. That all evaluations draw the same random numbers is seen to by the operator that asks for them.
"""

import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lyapunov_lightning.curvature.errors import CurvatureWarning, MeasurementError
from lyapunov_lightning.curvature.loss.fixed_batches import Evaluation
from lyapunov_lightning.curvature.loss.randomness import RandomState
from lyapunov_lightning.training.config import HessianConfig, LossFn, Mode
from lyapunov_lightning.training.lightning_names import LightningModule, Trainer, either, in_library_of
from lyapunov_lightning.training.replica.elsewhere import Elsewhere
from lyapunov_lightning.training.replica.namespaces import redirected
from lyapunov_lightning.training.replica.replica import Replica, context_of_its_own, replica, trainable_parameters


class ProbeBatch(NamedTuple):
    """A batch on which the curvature is measured.

    Attributes:
        batch: What the training dataloader yielded.
        batch_idx: Its index, as ``training_step`` gets it.
        is_transferred: True for a batch as the loop hands it to ``training_step``, on the device; False for one as the
            dataloader yielded it.

    """

    batch: Any
    batch_idx: int
    is_transferred: bool


class TrainingObjective:
    """The training loss, as `HessianOperator` wants it: of a batch, at the module's parameters or at other values.

    The loss is, in this order, `loss_fn` if given, the module's own method ``curvature_loss(batch)`` if it has one, and
    what ``training_step`` returns, each after the module's ``on_train_batch_start``. It is the raw loss: not divided by
    ``accumulate_grad_batches`` and not scaled for half precision. The precision plugin's context is entered as in
    training, but for that of mixed precision: the weights are in float32 there, and so the loss is computed in it.

    Args:
        trainer: The trainer that fits the module.
        pl_module: The module, not wrapped for distributed training.
        mode: ``"train"`` leaves dropout and BatchNorm as they are in training, ``"eval"`` switches them to evaluation.
        loss_fn: Maps the module and a batch to a scalar mean loss.
        batch_size_fn: Maps a batch to the number of its samples.
        names: The parameters that it is a function of; all trainable ones if None.
        elsewhere: What replays of this run may leave outside of their replicas.

    Attributes:
        whole: For each parameter that is sharded over ranks the whole tensor, which stands for it on the replicas.

    """

    # Tells the operator that no evaluation sees what an earlier one has written, so that it need not look for writes.
    is_copied = True

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        *,
        mode: Mode = "train",
        loss_fn: LossFn | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        names: Collection[str] | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self._elsewhere = Elsewhere() if elsewhere is None else elsewhere
        self._trainer = trainer
        self._pl_module = pl_module
        self._mode = mode
        self._loss_fn = loss_fn
        self._batch_size_fn = batch_size_fn
        self._takes_index: bool | None = None  # as the first evaluation finds, see `_step`
        self._is_wide = True  # whether the step of mixed precision is computed in float32, see `_loss`
        self.whole: Mapping[Tensor, Tensor] = {}
        named = trainable_parameters(pl_module)
        if names is not None:
            named = {name: parameter for name, parameter in named.items() if name in names}
        self.parameters = list(named.values())

    @contextmanager
    def evaluated(self, probe: ProbeBatch, values: Sequence[Tensor] | None = None) -> Iterator[Evaluation]:
        """Evaluate the loss of a batch on a replica of the module.

        Args:
            probe: The batch.
            values: What the parameters are to be, in their order, dual tensors for forward derivatives included; the
                present values if None.

        Yields:
            The loss, with the replica's parameters. The context is that of the training step, for layers that are
            evaluated again while the loss is differentiated.

        Raises:
            MeasurementError: If the step returned no loss.

        """
        if not self._elsewhere.is_rehearsed:
            self._rehearse(probe)
        # Where other values are asked for, they are written to a tensor of the shape of the whole sharded parameter.
        changed = {} if values is None else dict(zip(self.parameters, values, strict=True))
        whole = {p: torch.empty_like(tensor) if p in changed else tensor for p, tensor in self.whole.items()}
        versions = [tensor._version for tensor in self.whole.values()]
        with replica(self._trainer, self._pl_module, self._mode, whole, self._elsewhere) as twin:
            leaves = [twin.copier(parameter) for parameter in self.parameters]
            if values is not None:
                with torch.no_grad():
                    for leaf, value in zip(leaves, values, strict=True):
                        leaf.copy_(value)
            loss = self._evaluated_on(twin, probe)
            # A replica's sharded parameters share the memory of `whole`, which is gathered once for all evaluations.
            # All others are copies, and a step may write to them.
            if versions != [tensor._version for tensor in self.whole.values()]:
                raise MeasurementError(
                    "The training step writes to its parameters, which sharded ones do not allow for in a replay. Write"
                    " to them outside of the step, such as in `on_train_batch_end`."
                )
            yield Evaluation(loss, leaves, lambda: self._num_samples(probe.batch, twin.logged_sizes), twin)

    def _rehearse(self, probe: ProbeBatch) -> None:
        """Evaluate the loss once for nothing but to see where the step puts objects of the module, outside of it.

        Else the second evaluation of a measurement could find there the objects of the first one, whose graph is kept.

        """
        randomness = RandomState.capture()
        try:
            with replica(self._trainer, self._pl_module, self._mode, self.whole, self._elsewhere) as twin:
                self._evaluated_on(twin, probe)
            del twin
        finally:
            randomness.restore()
        self._elsewhere.is_rehearsed = True
        self._elsewhere.settle()

    def _evaluated_on(self, twin: "Replica", probe: ProbeBatch) -> Tensor:
        """The loss of a batch on a replica."""
        # By the twin's copier, for a module that has kept the batch: the two are to be one object for the step as well.
        with torch._C.DisableTorchFunction():  # see `replica`
            batch = twin.copier(probe.batch)
        # A step that needs gradients of its inputs may say `torch.set_grad_enabled(True)`. Left so, all the arithmetic
        # of the measurement would be recorded, and hold the twin.
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            return _loss_of(context_of_its_own(twin.copier).run(self._loss, twin, batch, probe))

    def _loss(self, twin: "Replica", batch: Any, probe: ProbeBatch) -> Any:
        module, trainer = twin.module, twin.module._trainer
        if not probe.is_transferred:
            # What the loop does between the dataloader and the step, by the hooks of the twin.
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        # The module's own hook comes after those of the callbacks, so it has not run yet when a measurement is made. A
        # weight that it anneals would have the value of the step before.
        if module.on_train_batch_start(batch, probe.batch_idx) == -1:
            raise MeasurementError("The module's `on_train_batch_start` skips the rest of the epoch, and so the step.")
        plugin = trainer.precision_plugin
        # In mixed precision the weights are in float32. Computed in half precision, the gradients would be rounded to
        # two or three digits, and the smallest eigenvalues would be those of the rounding.
        if not self._is_wide or not isinstance(plugin, either("plugins.precision.MixedPrecision")):
            with plugin.train_step_context():
                return self._step(twin, batch, probe)
        randomness = RandomState.capture()
        try:
            return self._step(twin, batch, probe)
        except Exception as error:
            if not _is_of_dtypes(error):
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        # So a kernel on the way knows half precision only. This twin has run a part of the step once already; all twins
        # after it run it once, as `_is_wide` says.
        randomness.restore()
        with plugin.train_step_context():
            output = self._step(twin, batch, probe)
        self._is_wide = False
        warnings.warn(
            "The step of a training in mixed precision cannot be computed in float32, so its curvature is measured in"
            f" half precision, which makes it noisy. PyTorch says: {reason}",
            CurvatureWarning,
            stacklevel=2,
        )
        return output

    def _step(self, twin: "Replica", batch: Any, probe: ProbeBatch) -> Any:
        """What the user's function returns, else the module's method, else the training step."""
        module = twin.module
        if self._loss_fn is not None:
            with redirected(self._loss_fn, twin.copier) as loss_fn:
                return loss_fn(module, batch)
        if hasattr(module, "curvature_loss"):
            return module.curvature_loss(batch)
        if self._takes_index is None:  # once, as Python takes long to tell the arguments of a function
            takes = in_library_of(module, "utilities.signature_utils.is_param_in_hook_signature")
            self._takes_index = takes(module.training_step, "batch_idx", min_args=2)
        if self._takes_index:
            return module.training_step(batch, probe.batch_idx)
        return module.training_step(batch)

    def _num_samples(self, batch: Any, logged: Sequence[int]) -> int:
        """The size of a batch: by `batch_size_fn`, as the step passed it to `self.log`, or as Lightning reads it."""
        if self._batch_size_fn is not None:
            return self._batch_size_fn(batch)
        if logged:
            return logged[0]
        return _read_batch_size(self._pl_module, batch)


def _read_batch_size(pl_module: LightningModule, batch: Any) -> int:
    """The size of a batch as Lightning reads it, with Lightning's warning where that is ambiguous.

    Raises:
        MeasurementError: If there is no tensor to read it from.

    """
    try:
        return int(in_library_of(pl_module, "utilities.data.extract_batch_size")(batch))
    except (RecursionError, in_library_of(pl_module, "utilities.exceptions.MisconfigurationException")) as error:
        raise MeasurementError(
            f"The number of samples in a batch of type {type(batch).__name__} is not known. Pass `batch_size=` to"
            " `self.log` in the training step, or `HessianConfig(batch_size_fn=...)`."
        ) from error


def _is_of_dtypes(error: Exception) -> bool:
    """Whether a step may have failed because its inputs were in float32, which kernels for half precision refuse.

    What they say differs from one to the next (fused attention, int8 matrix products), and some assert it without a
    word. A step that fails for another reason fails again in half precision, with its own error.

    """
    if isinstance(error, (MeasurementError, torch.OutOfMemoryError)):
        return False
    return isinstance(error, AssertionError) or _OF_DTYPES.search(str(error)) is not None


_OF_DTYPES = re.compile(
    r"dtype|scalar type|data type|float type|tensor type|\bhalf\b|b?float16|\bb?fp?16\b|'Float'|available kernel"
    r"|no operator found",
    re.IGNORECASE,
)


def _loss_of(output: Any) -> Tensor:
    """The loss in what a step returned."""
    if isinstance(output, Mapping):
        if "loss" not in output:
            raise MeasurementError(
                f"The step returned a mapping without the key 'loss', with {', '.join(map(repr, output)) or 'nothing'}."
            )
        output = output["loss"]
    if output is None:
        raise MeasurementError("The step returned None for the probed batch, so there is no loss to differentiate.")
    if not isinstance(output, Tensor):
        raise MeasurementError(f"The step should return a scalar tensor, got {type(output).__name__}.")
    return output


@dataclass(frozen=True)
class Problem:
    """What the Hessian is asked of: a loss, parameters and batches.

    Attributes:
        trainer: The trainer that fits the module.
        pl_module: The module, whose training loss is meant.
        config: Which Hessian.
        batches: This rank's batches.
        names: The names of the parameters whose block of the Hessian is meant; all trainable ones if None.
        elsewhere: What replays of this run may leave outside of their replicas.

    """

    trainer: Trainer
    pl_module: LightningModule
    config: HessianConfig
    batches: Sequence[ProbeBatch]
    names: Collection[str] | None = None
    elsewhere: Elsewhere = field(default_factory=Elsewhere)

    def objective(self, kind: type[TrainingObjective] = TrainingObjective, **options: Any) -> Any:
        """The training loss of this problem, evaluated in one of the ways that there are for it.

        Args:
            kind: The way.
            options: What it needs in addition.

        """
        assert self.config.mode is not None  # see `HessianConfig.filled`
        return kind(
            self.trainer,
            self.pl_module,
            mode=self.config.mode,
            loss_fn=self.config.loss_fn,
            batch_size_fn=self.config.batch_size_fn,
            names=self.names,
            elsewhere=self.elsewhere,
            **options,
        )
