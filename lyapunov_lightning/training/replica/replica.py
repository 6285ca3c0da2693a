"""A twin of a module to evaluate its step on: the same tensors of parameters, a copy of everything else."""

import contextvars
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
from lyapunov_lightning.training.lightning_names import either
from lyapunov_lightning.training.replica.copier import Copier
from lyapunov_lightning.training.replica.namespaces import replaced_namespaces
from lyapunov_lightning.training.replica.trainer_view import view_of

_OUTGOING = ("log", "log_dict", "print")
"""Methods of a LightningModule that tell somebody else of a step."""


@dataclass
class Replica:
    """A twin of a module.

    Attributes:
        module: The twin.
        copier: Has made it, and knows which parameter of the twin stands for which of the module.
        logged_sizes: What the step passed to ``self.log`` as ``batch_size``.

    """

    module: Any
    copier: Copier
    logged_sizes: list[int] = field(default_factory=list)

    def __del__(self) -> None:
        # A twin holds itself in cycles. Nothing of it holds this object, which so outlives the last use of the twin.
        self.copier.discard()


@contextmanager
def replica(
    trainer: Any, pl_module: Any, mode: Mode = "train", whole: Mapping[Tensor, Tensor] = MappingProxyType({})
) -> Iterator[Replica]:
    """Make a twin of a module, on which its training step can be run without any effect on the training.

    Args:
        trainer: The trainer that fits the module.
        pl_module: The module, not wrapped for distributed training.
        mode: ``"eval"`` switches the twin's modules to evaluation, ``"train"`` leaves them as they are.
        whole: What the twin has in the place of parameters that are sharded; its parameters share the memory.

    Yields:
        The twin. Class attributes and globals hold copies as long as the block lasts.

    """
    sizes: list[int] = []

    def silent(*_: Any, batch_size: int | None = None, **__: Any) -> None:
        if batch_size is not None:
            sizes.append(batch_size)

    families = either("LightningModule")
    outgoing = {getattr(family, name): silent for family in families for name in _OUTGOING}
    copier = Copier(replaced=outgoing)
    with torch._C.DisableTorchFunction():  # copying is none of the operations that a mode may replace
        for parameter, tensor in whole.items():
            is_made = tensor.requires_grad and not tensor.is_leaf  # of shards, as whose function it is wanted
            copier.note(parameter, tensor if is_made else nn.Parameter(tensor.detach(), parameter.requires_grad))
        view = view_of(trainer, copier)
        module = copier(pl_module)
        if whole:
            for original in pl_module.modules():
                unsharded(copier.copy_of(original), original)
    module._trainer = view
    view.strategy._lightning_module = view.strategy.model = module
    for inner in copier.modules:
        _isolate(inner, mode)
    gradients = [(t, copier.copy_of(t)) for t in pl_module.parameters() if t.grad is not None and t not in whole]
    with ExitStack() as stack:
        stack.callback(copier.forget)
        stack.enter_context(replaced_namespaces(copier))
        stack.enter_context(_replaced_methods(families, silent))
        if gradients:
            stack.enter_context(_LateGradients(gradients))
        yield Replica(module, copier, sizes)


def context_of_its_own(copier: Copier) -> contextvars.Context:
    """The present context variables, to be set without an effect on the training."""
    context = contextvars.copy_context()
    copies = [(variable, copied) for variable, value in context.items() if (copied := copier(value)) is not value]
    for variable, copied in copies:
        context.run(variable.set, copied)
    return context


def _isolate(module: nn.Module, mode: Mode) -> None:
    attributes = vars(module)
    if isinstance(module, Metric):
        attributes["dist_sync_on_step"] = False  # a collective that ranks with fewer batches would not join
    if attributes.get("_backward_hooks") or attributes.get("_backward_pre_hooks"):
        attributes.update(_backward_hooks={}, _backward_pre_hooks={})  # they cannot be differentiated twice
    if mode == "eval":
        if isinstance(module, torch.jit.ScriptModule):  # whose attributes are kept elsewhere
            module.eval()
        attributes["training"] = False


@contextmanager
def _replaced_methods(families: Sequence[type], silent: Callable[..., None]) -> Iterator[None]:
    """Let what LightningModules log go nowhere, also where a subclass calls the method of its parent."""
    before = [(family, name, vars(family)[name]) for family in families for name in _OUTGOING]
    try:
        for family, name, _ in before:
            setattr(family, name, silent)
        yield
    finally:
        for family, name, method in before:
            setattr(family, name, method)


class _LateGradients(TorchFunctionMode):
    """Copies the gradients of the last step to the twin's parameters once a step asks for any.

    Few steps do, and the copy would take as much memory as the parameters.
    """

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
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
