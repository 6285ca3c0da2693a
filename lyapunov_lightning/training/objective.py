"""The training loss of a LightningModule as a function of its parameters, without side effects.

`TrainingObjective` replays the ``training_step`` on the bare module, with copies in the place of its buffers,
parameters and batch, and in a sandbox that takes back what else it does. The random numbers are the operator's to keep.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Optional, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.training.sandbox import Mode, sandbox

Result = TypeVar("Result")

LossFn = Callable[["pl.LightningModule", Any], Any]


class ProbeBatch(NamedTuple):
    """A batch on which the curvature is measured.

    Attributes:
        batch: What the training dataloader yielded.
        batch_idx: Its index, as ``training_step`` gets it.
        is_transferred: Whether the batch is what the loop hands to ``training_step``, on the device, or still what the
            dataloader yielded.

    """

    batch: Any
    batch_idx: int
    is_transferred: bool


class TrainingObjective:
    """The training loss, as `HessianOperator` wants it: of a batch, at the module's parameters or at other values.

    The loss is, in this order, `loss_fn` if given, the module's own method ``curvature_loss(batch)`` if it has one, and
    what ``training_step`` returns; the first two should not write to parameters. It is the raw loss: not divided by
    ``accumulate_grad_batches`` and not scaled for half precision; the precision plugin's context is entered as in
    training.

    Args:
        trainer: The trainer that fits the module.
        pl_module: The module, not wrapped for distributed training.
        mode: ``"train"`` leaves dropout and BatchNorm as they are in training, ``"eval"`` switches them to evaluation.
        loss_fn: Maps the module and a batch to a scalar mean loss.
        names: The parameters that it is a function of; all trainable ones if None.

    """

    def __init__(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        *,
        mode: Mode = "train",
        loss_fn: Optional[LossFn] = None,
        names: Optional[Collection[str]] = None,
    ) -> None:
        self._trainer = trainer
        self._pl_module = pl_module
        self._mode = mode
        self._loss_fn = loss_fn
        self._is_step = loss_fn is None and not hasattr(pl_module, "curvature_loss")
        named = trainable_parameters(pl_module)
        if names is not None:
            named = {name: parameter for name, parameter in named.items() if name in names}
        self._names = [f"module.{name}" for name in named]
        self.parameters = list(named.values())

    def __call__(self, batch: ProbeBatch) -> Tensor:
        """The loss at the present parameters."""
        return self.within(None, batch, _itself)

    def at(self, values: Sequence[Tensor], batch: ProbeBatch) -> Tensor:
        """The loss with `values` in place of the trainable parameters."""
        return self.within(values, batch, _itself)

    def within(
        self, values: Optional[Sequence[Tensor]], batch: ProbeBatch, consume: Callable[[Tensor], Result]
    ) -> Result:
        """What `consume` makes of the loss, while nothing it does has an effect on the module."""
        substitutes = {} if values is None else dict(zip(self._names, values, strict=True))
        replay = _Replay(self._pl_module, lambda: consume(_loss_of(self._loss(batch))))
        # A step may write to parameters too, such as those of a target network; a loss of the user's may not.
        written = [replay.named_buffers(), replay.named_parameters() if self._is_step else ()]
        copies = {name: t.clone() for tensors in written for name, t in tensors if name not in substitutes}
        with sandbox(self._trainer, self._pl_module, self._mode):
            result: Result = torch.func.functional_call(replay, {**copies, **substitutes}, ())
        return result

    def _loss(self, probe: ProbeBatch) -> Any:
        module, batch = self._pl_module, apply_to_collection(probe.batch, Tensor, torch.clone)
        if not probe.is_transferred:
            batch = self._trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = self._trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        with self._trainer.precision_plugin.train_step_context():
            if self._loss_fn is not None:
                return self._loss_fn(module, batch)
            if not self._is_step:
                return module.curvature_loss(batch)  # type: ignore[operator]
            if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
                return module.training_step(batch, probe.batch_idx)
            return module.training_step(batch)


def trainable_parameters(pl_module: "pl.LightningModule") -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name, each once."""
    return {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}


def check_objective(
    owner: str, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *, mode: Mode, loss_fn: Optional[LossFn]
) -> None:
    """Refuse what cannot be measured, before the training starts.

    Args:
        owner: The class that the error names.
        trainer: The trainer.
        pl_module: The module that it is to fit.
        mode: As for `TrainingObjective`.
        loss_fn: As for `TrainingObjective`.

    Raises:
        MisconfigurationException: With the cause and the remedy.

    """
    strategy = trainer.strategy
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or isinstance(strategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            f"`{owner}` needs the whole of the parameters on every device, which {type(strategy).__name__} does not"
            " keep. Train on a single device or with `strategy='ddp'`."
        )
    replays = loss_fn is None and not hasattr(pl_module, "curvature_loss")
    if replays and not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"`{owner}` cannot replay the `training_step` of a module with manual optimization, since it would take"
            " optimizer steps. Define `curvature_loss(self, batch)` on the module, or pass `loss_fn`, to say which loss"
            " is meant."
        )
    if replays and "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise MisconfigurationException(
            f"`{owner}` cannot replay a `training_step` that takes `dataloader_iter`, since it would take batches away"
            " from the training. Let `training_step` take `batch`."
        )
    distributed = trainer.world_size > 1
    if distributed and mode == "train" and any(isinstance(m, nn.SyncBatchNorm) for m in pl_module.modules()):
        raise MisconfigurationException(
            f"`{owner}` cannot differentiate `SyncBatchNorm` twice in training mode. Use `mode='eval'`."
        )


def check_parameters(owner: str, pl_module: "pl.LightningModule") -> None:
    """Refuse a module that has nothing to train.

    Raises:
        MisconfigurationException: If no parameter requires a gradient.

    """
    if not trainable_parameters(pl_module):
        raise MisconfigurationException(
            f"`{owner}` needs a module with trainable parameters, but {type(pl_module).__name__} has none. Remove the"
            " callback, or set `requires_grad` on the parameters that are to be trained."
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


def _itself(loss: Tensor) -> Tensor:
    return loss


class _Replay(nn.Module):
    """Lets ``functional_call`` substitute a module's tensors round any function of the module."""

    def __init__(self, module: nn.Module, function: Callable[[], Any]) -> None:
        super().__init__()
        self.module = module
        self._function = function

    def forward(self) -> Any:
        return self._function()
