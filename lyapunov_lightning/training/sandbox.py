"""A room in which a training step leaves no trace.

A replayed ``training_step`` does more than return a loss: it updates metrics, appends to lists, counts, logs. Whatever
the modules keep as attributes is noted before and put back after, down into containers and the user's own objects;
plain tensors among them are replaced by copies meanwhile, since they are updated in place; logging goes nowhere.
Parameters and buffers are not the sandbox's: who replays the step substitutes them.
"""

import copy
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric

Mode = Literal["train", "eval"]

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)

_REGISTRIES = ("_parameters", "_buffers", "_modules")
"""Of these and of hooks the entries are noted, and not looked into."""

_OUTSIDE = ("_trainer", "_fabric")
"""What a LightningModule knows of the training; it is not the step's to change."""

_HOOKS = frozenset(
    name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and name not in _REGISTRIES
)
"""The registries of hooks of a module."""

_LIBRARIES = frozenset({"builtins", "lightning", "lightning_fabric", "numpy", "pytorch_lightning", "torch", "types"})
"""Packages whose objects are not looked into."""

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
"""Random generators that a module keeps for itself: the step draws from copies, the same numbers every time."""

_LONG = 1000
"""Containers beyond this length are put back as a whole, and the tensors in them are not copied."""


@contextmanager
def sandbox(trainer: "pl.Trainer", pl_module: "pl.LightningModule", mode: Mode) -> Iterator[None]:
    """Take back everything that a block does to the module's attributes and the loggers, also on an exception.

    Args:
        trainer: The trainer, whose loggers are replaced meanwhile.
        pl_module: The module.
        mode: ``"eval"`` switches the module to evaluation meanwhile, ``"train"`` leaves it as it is.

    """
    modules = list(_all_modules(pl_module))
    registered = set(map(id, pl_module.modules()))
    loggers = trainer.loggers
    notes = _Notes()
    with ExitStack() as stack:
        try:
            trainer.loggers = [DummyLogger() for _ in loggers]
            for module in modules:
                notes.take(vars(module))
                _isolate(module, mode)
                if id(module) not in registered:  # such as a teacher that is hidden in a list
                    _copy_tensors(module)
            if "torch._dynamo" in sys.modules:  # something may be compiled, and compiled code has one derivative only
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
        finally:
            trainer.loggers = loggers
            notes.put_back()


def _isolate(module: nn.Module, mode: Mode) -> None:
    """Make what the module does to the outside go nowhere, and keep the outside from what is done to it."""
    attributes = vars(module)
    if isinstance(module, pl.LightningModule):
        attributes.update(log=_ignore, log_dict=_ignore, print=_ignore)
    if isinstance(module, Metric):
        attributes["dist_sync_on_step"] = False  # a collective that processes with fewer batches would not join
    if attributes["_backward_hooks"] or attributes["_backward_pre_hooks"]:
        attributes.update(_backward_hooks=OrderedDict(), _backward_pre_hooks=OrderedDict())
    if mode == "eval":
        attributes["training"] = False


def _copy_tensors(module: nn.Module) -> None:
    """Put copies in the place of a module's own parameters and buffers, which nobody else substitutes."""
    for registry in (module._parameters, module._buffers):
        for name, tensor in list(registry.items()):
            if tensor is not None:
                registry[name] = tensor.clone()  # type: ignore[assignment]


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


def _all_modules(pl_module: "pl.LightningModule") -> Iterator[nn.Module]:
    """The module, its submodules, and modules (metrics, most often) in plain containers of theirs."""
    seen: set[int] = set()
    pending: list[Any] = [pl_module]
    while pending:
        item = pending.pop()
        if isinstance(item, nn.Module):
            if id(item) not in seen:
                seen.add(id(item))
                yield item
                pending.extend(item._modules.values())
                pending.extend(
                    value
                    for name, value in vars(item).items()
                    if type(value) in _CONTAINERS and name not in _HOOKS and name not in _REGISTRIES
                )
        elif type(item) in _CONTAINERS and id(item) not in seen and len(item) <= _LONG:
            seen.add(id(item))
            pending.extend(_entries(item))


def _entries(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


class _Notes:
    """What was in dictionaries and other containers, to be put back."""

    def __init__(self) -> None:
        self._noted: list[tuple[Any, Any]] = []
        self._seen: set[int] = set()

    def take(self, attributes: dict[str, Any]) -> None:
        """Note the attributes of a module or another object, and put copies in the place of what changes in place."""
        self._noted.append((attributes, dict(attributes)))
        for name, value in list(attributes.items()):
            if name in _REGISTRIES or name in _HOOKS:
                self._noted.append((value, dict(value)))
            elif name not in _OUTSIDE:
                attributes[name] = self._stand_in(value)

    def put_back(self) -> None:
        """Everything as it was, the last noted first: an inner container before the one that holds it."""
        for container, content in reversed(self._noted):
            if isinstance(container, dict):
                for added in container.keys() - content.keys():
                    del container[added]
                if list(container) != list(content):  # entries were taken out: their order counts too
                    container.clear()
                for key, entry in content.items():  # a Counter's update would add
                    container[key] = entry
            elif isinstance(container, list):
                container[:] = content
            elif isinstance(container, deque):
                container.clear()
                container.extend(content)
            else:
                container.clear()
                container.update(content)

    def _stand_in(self, value: Any) -> Any:
        """What the step is to see in the value's place: the value itself, once it is noted, or a copy of a tensor."""
        if isinstance(value, Tensor):
            return value if value.requires_grad else value.clone()
        if isinstance(value, np.ndarray):
            return value.copy()
        if isinstance(value, nn.Module) or id(value) in self._seen:
            return value
        if isinstance(value, _GENERATORS):
            self._seen.add(id(value))
            return copy.deepcopy(value) if not isinstance(value, torch.Generator) else value.clone_state()
        if type(value) in _CONTAINERS:
            self._seen.add(id(value))
            self._noted.append((value, copy.copy(value)))
            if len(value) <= _LONG:
                self._replace_entries(value)
        elif isinstance(value, tuple):
            entries = [self._stand_in(entry) for entry in value]
            if any(new is not old for new, old in zip(entries, value, strict=True)):
                return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)
        elif _is_users(value):
            self._seen.add(id(value))
            self.take(vars(value))
        return value

    def _replace_entries(self, container: Any) -> None:
        if isinstance(container, dict):
            for key, entry in list(container.items()):
                stand_in = self._stand_in(entry)
                if stand_in is not entry:
                    container[key] = stand_in
        elif isinstance(container, (list, deque)):
            for index, entry in enumerate(list(container)):
                stand_in = self._stand_in(entry)
                if stand_in is not entry:
                    container[index] = stand_in


def _is_users(value: Any) -> bool:
    """Whether a value is an object of the user's own, with attributes to note: a meter, a queue, a buffer."""
    if isinstance(value, (type, Dataset, DataLoader)) or callable(value) or not hasattr(value, "__dict__"):
        return False
    return type(value).__module__.partition(".")[0] not in _LIBRARIES
