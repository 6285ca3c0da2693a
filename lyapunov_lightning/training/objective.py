"""The training loss of a LightningModule as a function of its parameters, without side effects.

A replayed ``training_step`` does more than return a loss: it updates BatchNorm statistics and metrics, logs, appends to
lists, draws random numbers. `TrainingObjective` runs it in a sandbox that takes all of that back: buffers and
parameters are substituted, whatever the modules keep as attributes is put back, and logging goes nowhere. The random
numbers are the operator's to keep.
"""

import copy
import inspect
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple, Optional

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

from lyapunov_lightning.curvature.errors import MeasurementError

LossFn = Callable[["pl.LightningModule", Any], Any]
Mode = Literal["train", "eval"]

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)
_REGISTRIES = ("_parameters", "_buffers", "_modules")


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
    what ``training_step`` returns. It is the raw loss: not divided by ``accumulate_grad_batches`` and not scaled for
    half precision; the precision plugin's context is entered as in training.

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
        named = trainable_parameters(pl_module)
        if names is not None:
            named = {name: parameter for name, parameter in named.items() if name in names}
        self._names = [f"module.{name}" for name in named]
        self.parameters = list(named.values())

    def __call__(self, batch: ProbeBatch) -> Tensor:
        """The loss at the present parameters."""
        return self._evaluate({}, batch)

    def at(self, values: Sequence[Tensor], batch: ProbeBatch) -> Tensor:
        """The loss with `values` in place of the trainable parameters."""
        return self._evaluate(dict(zip(self._names, values, strict=True)), batch)

    def _evaluate(self, substitutes: dict[str, Tensor], batch: ProbeBatch) -> Tensor:
        replay = _Replay(self._pl_module, lambda: self._loss(batch))
        buffers = {name: buffer.clone() for name, buffer in replay.named_buffers()}
        with _sandbox(self._trainer, self._pl_module, self._mode), self._trainer.precision_plugin.train_step_context():
            output = torch.func.functional_call(replay, {**buffers, **substitutes}, ())
        return _loss_of(output)

    def _loss(self, probe: ProbeBatch) -> Any:
        module, batch = self._pl_module, probe.batch
        if not probe.is_transferred:
            batch = self._trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = self._trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        if self._loss_fn is not None:
            return self._loss_fn(module, batch)
        own = getattr(module, "curvature_loss", None)
        if own is not None:
            return own(batch)
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


class _Replay(nn.Module):
    """Lets ``functional_call`` substitute a module's tensors round any function of the module."""

    def __init__(self, module: nn.Module, function: Callable[[], Any]) -> None:
        super().__init__()
        self.module = module
        self._function = function

    def forward(self) -> Any:
        return self._function()


@contextmanager
def _sandbox(trainer: "pl.Trainer", pl_module: "pl.LightningModule", mode: Mode) -> Iterator[None]:
    """Everything that a step does to its modules and loggers is taken back, also on an exception."""
    modules = list(_all_modules(pl_module))
    kept = [(vars(module), _Attributes(vars(module))) for module in modules]
    loggers = trainer.loggers
    with ExitStack() as stack:
        try:
            trainer.loggers = [DummyLogger() for _ in loggers]
            for module in modules:
                _isolate(module)
                if mode == "eval":
                    module.training = False
            if "torch._dynamo" in sys.modules:  # something may be compiled, and compiled code has one derivative only
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
        finally:
            trainer.loggers = loggers
            for attributes, before in kept:
                before.restore(attributes)


def _all_modules(pl_module: "pl.LightningModule") -> Iterator[nn.Module]:
    """The module, its submodules, and modules (metrics, most often) in its plain containers."""
    seen: set[int] = set()
    stack: list[nn.Module] = list(pl_module.modules())
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        for name, value in vars(module).items():
            if name not in _REGISTRIES and type(value) in _CONTAINERS:
                items = value.values() if isinstance(value, dict) else value
                stack.extend(inner for item in items if isinstance(item, nn.Module) for inner in item.modules())


def _isolate(module: nn.Module) -> None:
    """Make what the module does to the outside go nowhere."""
    attributes = vars(module)
    if isinstance(module, pl.LightningModule):
        attributes.update(log=_ignore, log_dict=_ignore, print=_ignore)
    if isinstance(module, Metric):
        attributes["dist_sync_on_step"] = False  # a collective that processes with fewer batches would not join
    for name, value in attributes.items():
        if isinstance(value, Tensor) and not value.requires_grad:
            attributes[name] = value.clone()  # such as a metric's state, which is updated in place


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


class _Attributes:
    """The attributes of a module as they were, the contents of its containers among them."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        self._values = dict(attributes)
        self._contents = [
            (value, copy.copy(value))
            for name, value in attributes.items()
            if name not in _REGISTRIES and type(value) in _CONTAINERS
        ]

    def restore(self, attributes: dict[str, Any]) -> None:
        for added in attributes.keys() - self._values.keys():
            del attributes[added]
        attributes.update(self._values)
        for container, content in self._contents:
            if isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                getattr(container, "extend" if isinstance(container, deque) else "update")(content)
