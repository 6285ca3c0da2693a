"""A twin of a module to run its training step on: parameters of its own with the same values, and copies of the rest.

In the code, *twin* is the module that the step runs on, and `Replica` is the twin with what is known of it.
"""

import contextvars
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchmetrics import Metric

from lyapunov_lightning.training.config import Mode
from lyapunov_lightning.training.fsdp import unsharded
from lyapunov_lightning.training.lightning_names import LightningModule, Trainer, either
from lyapunov_lightning.training.replica.copier import Copier
from lyapunov_lightning.training.replica.elsewhere import Elsewhere
from lyapunov_lightning.training.replica.namespaces import replaced_namespaces
from lyapunov_lightning.training.replica.trainer_view import view_of

_OUTGOING = ("log", "log_dict", "print")
"""Methods by which a LightningModule reports on a step: loggers, the progress bar, the user's terminal."""


@dataclass
class Replica:
    """A twin of a module.

    Attributes:
        module: The twin.
        copier: Has made it; its memo knows which parameter of the twin stands for which of the module.
        logged_sizes: What the step has passed to ``self.log`` as ``batch_size``, in order.
        elsewhere: What it may leave outside.

    """

    module: Any
    copier: Copier
    logged_sizes: list[int] = field(default_factory=list)
    elsewhere: Elsewhere = field(default_factory=Elsewhere)

    def __del__(self) -> None:
        # Here, and not at the end of `replica`: a graph that is kept for further products needs the twin after that
        # block, where it recomputes layers (activation checkpointing). Nothing of the twin holds this object, so it
        # goes at once with the last one that needs the twin, while the twin itself is held by its own cycles.
        self.module = None
        self.elsewhere.end(self.copier.memo)


@contextmanager
def replica(
    trainer: Trainer,
    pl_module: LightningModule,
    mode: Mode = "train",
    whole: Mapping[Tensor, Tensor] = MappingProxyType({}),
    elsewhere: Elsewhere | None = None,
) -> Iterator[Replica]:
    """Make a twin of a module, on which its training step can be run without any effect on the training.

    Args:
        trainer: The trainer that fits the module.
        pl_module: The module, not wrapped for distributed training.
        mode: ``"eval"`` switches the twin's modules to evaluation, ``"train"`` leaves them as they are.
        whole: What the twin has in the place of parameters that are sharded; its parameters share the memory.
        elsewhere: What earlier replicas of this run have shown of places outside that hold the module's objects.

    Yields:
        The twin. Class attributes and global variables hold copies as long as the block lasts.

    """
    elsewhere = Elsewhere() if elsewhere is None else elsewhere
    elsewhere.check()
    sizes: list[int] = []

    # In the place of `self.log`, which would add the replay's values to the mean that the training logs, silently.
    def silent(*_: Any, batch_size: int | None = None, **__: Any) -> None:
        if batch_size is not None:
            sizes.append(batch_size)

    families = either("LightningModule")
    outgoing = [getattr(family, name) for family in families for name in _OUTGOING]
    copier = Copier()
    for method in outgoing:
        copier.memo.note(method, silent)
    # A mode that is active sees every operation, and ours replace some of them. Copying is none of the operations of
    # the loss; and a subclass of Tensor may refuse to be cloned.
    with torch._C.DisableTorchFunction():
        for parameter, tensor in whole.items():
            # Gathered from shards within the graph it stays as it is, since the loss is wanted as a function of these.
            is_made = tensor.requires_grad and not tensor.is_leaf
            copier.memo.note(parameter, tensor if is_made else nn.Parameter(tensor.detach(), parameter.requires_grad))
        view = view_of(trainer, copier)
        module = copier(pl_module)
        if whole:
            for original in pl_module.modules():
                unsharded(copier.memo.copy_of(original), original)
    module._trainer = view
    view.strategy._lightning_module = view.strategy.model = module
    view._data_connector._datahook_selector.model = module
    for inner in copier.memo.modules:
        _isolate(inner, mode)
    gradients = [(t, copier.memo.copy_of(t)) for t in pl_module.parameters() if t.grad is not None and t not in whole]
    # What the block puts in place, it takes back in the opposite order, also where the step fails.
    with ExitStack() as stack:
        stack.callback(copier.memo.forget)
        stack.enter_context(replaced_namespaces(copier, elsewhere.namespaces))
        for inner in copier.memo.modules:
            if isinstance(inner, families):
                vars(inner)[_SILENT] = silent
        stack.enter_context(_SILENCE.kept(families))
        if gradients:
            stack.enter_context(_LateGradients(gradients))
        yield Replica(module, copier, sizes, elsewhere)


def context_of_its_own(copier: Copier) -> contextvars.Context:
    """Copies of the present context variables, in a context of their own, where a step can set them without effect.

    Libraries keep there what others keep in global variables, such as the active span of a tracer.

    """
    context = contextvars.copy_context()
    copies = [(variable, copied) for variable, value in context.items() if (copied := copier(value)) is not value]
    for variable, copied in copies:
        context.run(variable.set, copied)
    return context


def _isolate(module: nn.Module, mode: Mode) -> None:
    """Let a copied module do nothing that cannot be done in a replay."""
    attributes = vars(module)
    if isinstance(module, Metric):
        # The metric would sum over the ranks in its `forward`. Ranks measure different numbers of batches, and one with
        # fewer would not join in: the others would wait for it for ever.
        attributes["dist_sync_on_step"] = False
    if attributes.get("_backward_hooks") or attributes.get("_backward_pre_hooks"):
        # To call these hooks, PyTorch puts the module's inputs and outputs through a function of its own that cannot be
        # differentiated twice. And `wandb.watch` would take the gradients of a replay for the training's.
        attributes.update(_backward_hooks={}, _backward_pre_hooks={})
    if mode == "eval":
        if isinstance(module, torch.jit.ScriptModule):  # its attributes are kept in C++
            module.eval()
        # Set and not by `eval()`, which the user may have overridden, to keep a backbone frozen for example.
        attributes["training"] = False


_SILENT = "_silent_in_replay"
"""Attribute of a twin: what its methods of `_OUTGOING` do instead."""


class _Silence:
    """Lets what twins log go nowhere, while other modules go on logging, such as those of another thread's Trainer.

    On the class, since a `log` that the user has overridden calls ``super().log``, which no attribute of the twin would
    catch. Once for all replays that are under way: if each put back what it had found, the first to end would let the
    others' twins log, and the last would leave the methods of the first in place.

    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._before: list[tuple[type, str, Any]] = []

    @contextmanager
    def kept(self, families: Sequence[type]) -> Iterator[None]:
        """For the duration of a replay."""
        with self._lock:
            if self._under_way == 0:
                self._before = [(family, name, vars(family)[name]) for family in families for name in _OUTGOING]
                for family, name, method in self._before:
                    setattr(family, name, _silent_for_twins(method))
            self._under_way += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1
                if self._under_way == 0:
                    for family, name, method in self._before:
                        setattr(family, name, method)


_SILENCE = _Silence()
"""One for the process, as the classes are."""


def _silent_for_twins(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def log(self: Any, *args: Any, **kwargs: Any) -> Any:
        return vars(self).get(_SILENT, functools.partial(method, self))(*args, **kwargs)

    return log


class _LateGradients(TorchFunctionMode):
    """Copies the gradients of the last step to the twin's parameters once a step asks for any of them.

    Few steps do, and the copy takes as much memory as the parameters. A step that runs a backward pass of its own asks
    for them too: in training it would add to those of the last step, if these have not been set to zero.

    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._pairs = pairs

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self._pairs and func in _LOOK_AT_GRADIENTS:
            pairs, self._pairs = self._pairs, []
            for parameter, twin in pairs:
                if twin.grad is None and parameter.grad is not None:
                    twin.grad = parameter.grad.detach().clone()
        return func(*args, **(kwargs or {}))


_GRADIENT: Any = vars(torch._C.TensorBase)["grad"]

_LOOK_AT_GRADIENTS = frozenset({_GRADIENT.__get__, _GRADIENT.__set__, Tensor.backward, torch.autograd.backward})


def trainable_parameters(pl_module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name, each once."""
    return {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}
