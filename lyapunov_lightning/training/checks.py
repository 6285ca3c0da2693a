"""Refusals: what cannot be measured is refused before training starts."""

import inspect
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lyapunov_lightning.curvature.vectors.layout import is_narrow
from lyapunov_lightning.training.config import HessianConfig
from lyapunov_lightning.training.fsdp import reason_against
from lyapunov_lightning.training.lightning_names import LightningModule, MisconfigurationException, Trainer, either
from lyapunov_lightning.training.replica.copier import Copier, Exhausted
from lyapunov_lightning.training.replica.namespaces import names_in
from lyapunov_lightning.training.replica.replica import trainable_parameters
from lyapunov_lightning.training.reporting.files import RunFiles


def check_objective(owner: str, trainer: Trainer, pl_module: LightningModule, config: HessianConfig) -> None:
    """Refuse a strategy or a module whose loss cannot be evaluated again.

    Args:
        owner: The class that the error names.
        trainer: The trainer.
        pl_module: The module that is to be trained.
        config: Which Hessian is to be measured.

    Raises:
        MisconfigurationException: With the cause and the remedy.

    """
    _check_strategy(owner, trainer.strategy)
    # The backward pass of SyncBatchNorm sums over the ranks outside autograd. On one rank, or with the running
    # statistics, it is a BatchNorm like any other.
    synchronises = trainer.world_size > 1 and config.mode != "eval"
    if synchronises and any(isinstance(module, nn.SyncBatchNorm) for module in pl_module.modules()):
        raise MisconfigurationException(
            f"`{owner}` cannot differentiate `SyncBatchNorm` twice in training mode. Use `HessianConfig(mode='eval')`."
        )
    if config.loss_fn is None and not hasattr(pl_module, "curvature_loss"):
        _check_step(owner, pl_module)


def check_parameters(owner: str, pl_module: nn.Module) -> None:
    """Refuse parameters whose Hessian does not exist or cannot be measured.

    Raises:
        MisconfigurationException: With the cause and the remedy.

    """
    reason = reason_against(pl_module)
    if reason is not None:
        raise MisconfigurationException(f"`{owner}` cannot measure {type(pl_module).__name__}: {reason}.")
    parameters = trainable_parameters(pl_module)
    if not parameters:
        raise MisconfigurationException(
            f"`{owner}` needs a module with trainable parameters, but {type(pl_module).__name__} has none. Remove the"
            " callback, or set `requires_grad` on the parameters that are to be trained."
        )
    not_real = [name for name, parameter in parameters.items() if not parameter.is_floating_point()]
    if not_real:
        raise MisconfigurationException(
            f"`{owner}` measures the curvature along real parameters, but {', '.join(not_real)} of"
            f" {type(pl_module).__name__} are {parameters[not_real[0]].dtype}. Keep real and imaginary parts as two"
            " parameters, with `torch.view_as_complex` in `forward`."
        )


def check_precision(owner: str, pl_module: nn.Module, instead: str | None) -> None:
    """Refuse parameters in half precision where the loss, or its gradient, is evaluated at nearby ones.

    Args:
        owner: The class that the error names.
        pl_module: The module that is to be trained.
        instead: How the user would measure without; None where there is no such way.

    Raises:
        MisconfigurationException: With the cause and the remedy.

    """
    # A float16 parameter near 1 can change by 5e-4 at least, a bfloat16 one by 4e-3. A step that crosses few kinks of
    # the loss changes single parameters by far less.
    parameters = trainable_parameters(pl_module)
    narrow = [name for name, parameter in parameters.items() if is_narrow([parameter])]
    if narrow:
        raise MisconfigurationException(
            f"`{owner}` evaluates the loss or its gradient at nearby parameters, which are lost in the rounding of"
            f" {parameters[narrow[0]].dtype} ({', '.join(narrow[:3])}). Keep the parameters in float32, as mixed"
            f" precision does{'' if instead is None else f', or {instead}'}."
        )


def check_size(owner: str, pl_module: nn.Module, num_eigenvalues: int) -> None:
    """Refuse to look for more eigenvalues than the Hessian has.

    Raises:
        MisconfigurationException: With both numbers.

    """
    size = sum(parameter.numel() for parameter in trainable_parameters(pl_module).values())
    if num_eigenvalues > size:
        raise MisconfigurationException(
            f"`{owner}` cannot find {num_eigenvalues} eigenvalues of a model with {size} trainable parameters. Ask for"
            " fewer."
        )


def check_files(callbacks: Iterable[tuple[str, Sequence[RunFiles]]]) -> None:
    """Refuse callbacks of one Trainer that would write to one file.

    Args:
        callbacks: The class and the files of each.

    Raises:
        MisconfigurationException: With both and the file.

    """
    owners: dict[Path, str] = {}
    for owner, files in callbacks:
        for path in {each.pattern for each in files}:
            if path in owners:
                raise MisconfigurationException(
                    f"A `{owners[path]}` and a `{owner}` of this Trainer would write to one file, {path}. Give each a"
                    " `save_dir` of its own."
                )
            owners[path] = owner


def _check_strategy(owner: str, strategy: Any) -> None:
    """Refuse a strategy under which a replay has no access to the whole parameters."""
    name = type(strategy).__name__
    if isinstance(strategy, either("strategies.FSDPStrategy")):
        raise MisconfigurationException(
            f"`{owner}` cannot measure the flat parameters of {name} (FSDP1), of which PyTorch computes no second"
            " derivatives. Use `strategy=ModelParallelStrategy(...)` with `fully_shard` in `configure_model` (FSDP2)."
        )
    known = (
        *either("strategies.SingleDeviceStrategy"),
        *either("strategies.DDPStrategy"),
        *either("strategies.ModelParallelStrategy"),
    )
    # DeepSpeed's strategy derives from that of DDP, and shards what DDP keeps whole.
    if not isinstance(strategy, known) or isinstance(strategy, either("strategies.DeepSpeedStrategy")):
        raise MisconfigurationException(
            f"`{owner}` cannot get the whole parameters from {name}, which keeps and gathers them in its own way."
            " Train on a single device, with `strategy='ddp'`, or sharded with `ModelParallelStrategy` and"
            " `fully_shard` (FSDP2)."
        )


def _check_step(owner: str, pl_module: LightningModule) -> None:
    """Refuse a training step that cannot be run again."""
    remedy = (
        "Define `curvature_loss(self, batch)` on the module, or pass `HessianConfig(loss_fn=...)`, to say which loss is"
        " meant."
    )
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"`{owner}` cannot replay the `training_step` of a module with manual optimization, since it would take"
            f" optimizer steps. {remedy}"
        )
    # Lightning hands such a step its own iterator: with a replay at every step the training would get every second
    # batch only, without a word.
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise MisconfigurationException(
            f"`{owner}` cannot replay a `training_step` that takes `dataloader_iter`, since it would take batches away"
            " from the training. Let `training_step` take `batch`."
        )
    for name in _names_in_step(type(pl_module)):
        # Instance attributes only: `getattr` would run properties, and parameters are not iterators.
        value = vars(pl_module).get(name)
        if isinstance(value, (types.GeneratorType, Iterator)) and isinstance(Copier()(value), Exhausted):
            raise MisconfigurationException(
                f"`{owner}` cannot replay a `training_step` that draws from `self.{name}`: a {type(value).__name__}"
                f" cannot be copied, so a replay would take its items away from the training. {remedy}"
            )


def _names_in_step(cls: type) -> set[str]:
    """The names of attributes in the code of ``training_step``, and of all methods that it names in turn."""
    found: set[str] = set()
    pending = {"training_step"}
    while pending:
        name = pending.pop()
        found.add(name)
        method = inspect.getattr_static(cls, name, None)  # `getattr` would run the user's descriptors
        if isinstance(method, types.FunctionType):
            pending |= names_in(inspect.unwrap(method).__code__) - found
    return found
