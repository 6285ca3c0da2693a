"""What is copied how, in one list, with the reason for each entry.

The first rule that fits a class says how its instances are copied. Before these come the rules of the copier's policy.
What no rule is about is copied by its attributes: that is the rule, and all else here are its exceptions.

Three reasons come up again and again. *Identity*: a step compares the object with ``is``, or looks it up. *Elsewhere*:
the object is a handle of something that Python cannot copy, and that a step only uses. *Left behind*: the class's own
way to be copied, made for pickling, loses or shares something that a step writes to.
"""

import enum
import functools
import io
import logging
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lyapunov_lightning.training.lightning_names import either
from lyapunov_lightning.training.replica import handlers
from lyapunov_lightning.training.replica.handlers import keep, refuse
from lyapunov_lightning.training.replica.memo import PLAIN
from lyapunov_lightning.training.replica.tensors import copy_array, copy_tensor
from lyapunov_lightning.training.replica.walk import (
    Way,
    by_attributes,
    by_own_method,
    by_protocol,
    copy_dict,
    copy_instance,
    copy_list,
    copy_module,
    copy_set,
    copy_tuple,
)


@dataclass(frozen=True, eq=False)  # compared by identity, since the tuple of a policy's rules is looked up every time
class Rule:
    """How the instances of some classes are copied.

    Attributes:
        fits: Whether it is about a class.
        way: Makes the copy.
        why: The reason. Where somebody reports a leak or a failed copy, it says what a change would break.

    """

    fits: Callable[[type], bool]
    way: Way
    why: str


def exactly(*kinds: type) -> Callable[[type], bool]:
    """Fits these classes, and not what inherits from them and may keep more."""
    return frozenset(kinds).__contains__


def derived(*kinds: type) -> Callable[[type], bool]:
    """Fits these classes and what inherits from them."""
    return lambda cls: issubclass(cls, kinds)


def in_packages(*names: str) -> Callable[[type], bool]:
    """Fits the classes that are defined in packages, given by their first names."""
    return lambda cls: (cls.__module__ or "").partition(".")[0] in names


def in_modules(*prefixes: str) -> Callable[[type], bool]:
    """Fits the classes that are defined in modules whose names begin so."""
    return lambda cls: (cls.__module__ or "").startswith(prefixes)


def descended_from_modules(*prefixes: str) -> Callable[[type], bool]:
    """Fits these, and the classes of anybody that inherit from one of them."""
    return lambda cls: any(kind.__module__.startswith(prefixes) for kind in cls.__mro__)


def _is_cython_function(cls: type) -> bool:
    """Each compiled package has such a class of its own, so only the name is known."""
    return cls.__name__ in ("cython_function_or_method", "fused_cython_function")


def _ends_with_a_finalizer(cls: type) -> bool:
    """An iterator that has something to put away when it goes."""
    return issubclass(cls, Iterator) and hasattr(cls, "__del__")


def _has_own_protocol(cls: Any) -> bool:
    """Whether the class says how it is pickled; what every class inherits from `object` knows attributes only."""
    return bool(cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__)


# Whatever is not known by its class fails in ways of its own, so these are ways to try first, see `copy_instance`.
_instance_by_protocol: Way = functools.partial(copy_instance, by_protocol)
_instance_by_attributes: Way = functools.partial(copy_instance, by_attributes)

RULES: tuple[Rule, ...] = (
    Rule(PLAIN.__contains__, keep, "Nothing can be written to these, and a bare `object()` is a sentinel (identity)."),
    # Containers.
    Rule(exactly(list), copy_list, "A step appends to lists."),
    Rule(exactly(dict, OrderedDict), copy_dict, "A step counts in dictionaries, and modules keep everything in them."),
    Rule(exactly(set), copy_set, "A step adds to sets."),
    Rule(exactly(tuple, frozenset), copy_tuple, "Nothing is written to these, but to what is in them."),
    # Functions.
    Rule(exactly(types.FunctionType), handlers.copy_function, "`copy.deepcopy` shares functions, and their closures."),
    Rule(exactly(types.CellType), handlers.copy_cell, "`nonlocal count; count += 1` writes to the cell."),
    Rule(exactly(types.MethodType), handlers.copy_method, "A bound method leads to the module that it is bound to."),
    Rule(exactly(types.BuiltinMethodType), handlers.copy_builtin, "So does `self.record = self.history.append`."),
    Rule(exactly(staticmethod, classmethod), handlers.copy_wrapped_method, "Met in class bodies, see `namespaces`."),
    Rule(
        exactly(functools._lru_cache_wrapper),
        handlers.copy_cached_function,
        "What a replay computes must not be found in the training's cache.",
    ),
    # References, views, locks.
    Rule(exactly(weakref.ref), handlers.copy_weak_reference, "Hooks and schedulers find their module through these."),
    Rule(exactly(weakref.KeyedRef), handlers.copy_keyed_reference, "The entries of a `WeakValueDictionary`."),
    Rule(
        exactly(*map(type, ({}.keys(), {}.values(), {}.items()))),
        handlers.copy_dict_view,
        "A view follows its dictionary.",
    ),
    Rule(exactly(memoryview), handlers.copy_memory_view, "A step writes through it; there is no protocol."),
    Rule(exactly(threading.local), handlers.copy_thread_local, "State like any attribute's; there is no protocol."),
    Rule(exactly(type(threading.Lock())), handlers.fresh_lock, "A single lock makes `copy.deepcopy` fail as a whole."),
    Rule(exactly(type(threading.RLock())), handlers.fresh_reentrant_lock, "Likewise."),
    # Random numbers, and what can be drawn once.
    Rule(exactly(torch.Generator), handlers.copy_generator, "The training's next numbers would be another's."),
    Rule(exactly(types.GeneratorType), refuse, "Python copies no generator, and to draw is to take from the training."),
    # Tensors.
    Rule(derived(Tensor), copy_tensor, "`copy.deepcopy` fails on one with a graph, and parts those that share memory."),
    # Parts of the program.
    Rule(
        derived(type, types.ModuleType, types.CodeType, types.GenericAlias, types.UnionType, property),
        keep,
        "Written by programmers and not by steps; what a class or module holds is a matter of `namespaces`.",
    ),
    Rule(
        derived(
            types.GetSetDescriptorType,
            types.MemberDescriptorType,
            types.WrapperDescriptorType,
            types.MethodDescriptorType,
            types.MappingProxyType,
        ),
        keep,
        "Parts of classes.",
    ),
    Rule(_is_cython_function, keep, "Functions of compiled packages, of which there is only one (elsewhere)."),
    # Values that are what they are.
    Rule(derived(enum.Enum), keep, "Compared by identity: `if self.phase is Phase.WARMUP`."),
    Rule(
        derived(np.generic, np.dtype, np.ufunc, torch.dtype, torch.device, torch.Size, torch.layout),
        keep,
        "Nothing can be written to these, and `tensor.dtype is torch.float32` is by identity.",
    ),
    Rule(derived(torch.memory_format), keep, "Likewise."),
    # What runs outside of the training step.
    Rule(derived(logging.Logger), keep, "Python's loggers are global, with streams and locks behind them (elsewhere)."),
    Rule(derived(threading.Thread), keep, "A running thread cannot be copied, and continues with its own objects."),
    Rule(
        derived(nn.parallel.DistributedDataParallel),
        keep,
        "The wrapper of the training has hooks in the gradients' buffers and in a group of processes (elsewhere).",
    ),
    # Modules, and what a step reports to others.
    Rule(derived(nn.Module), copy_module, "Hooks too, which a module may leave out for `pickle` (left behind)."),
    Rule(
        derived(*either("loggers.logger.Logger")),
        handlers.silent_logger,
        "A replay's values would appear in the user's curves, next to the step's own.",
    ),
    Rule(derived(np.ndarray), copy_array, "`copy.deepcopy` parts views of one array."),
    # Files.
    Rule(derived(io.StringIO, io.BytesIO), _instance_by_protocol, "Files in memory, to be copied like any object."),
    Rule(derived(io.IOBase), handlers.copy_file, "A copy of the handle would move the training's place in the file."),
    # Packages.
    Rule(
        descended_from_modules("jsonargparse.", "lightning.pytorch.cli", "pytorch_lightning.cli"),
        keep,
        "A LightningCLI that the module was made by holds the trainer, the data and the callbacks.",
    ),
    Rule(
        descended_from_modules("lyapunov_lightning."),
        keep,
        "What measures, and the user's subclasses of it. Their results are of earlier replicas, which would be copied"
        " again: each measurement would take longer than the last.",
    ),
    Rule(
        in_packages("datetime", "decimal", "fractions", "pathlib", "re", "typing", "uuid", "zoneinfo"),
        keep,
        "Values that nothing is written to; copies of some would not be found by identity.",
    ),
    Rule(
        in_packages("asyncio", "concurrent", "ctypes", "inspect", "multiprocessing"),
        keep,
        "Handles of threads, processes, foreign memory, or the running program (elsewhere).",
    ),
    Rule(
        in_packages("pyarrow", "sentencepiece", "tokenizers"),
        keep,
        "Tables, models and vocabularies in other languages' memory: large, and only read (elsewhere).",
    ),
    Rule(
        in_modules(*handlers.COMPILERS, "torch.distributed", "torch.cuda"),
        keep,
        "Compiled code, groups of processes, streams of a device: one for the whole process (elsewhere).",
    ),
    Rule(
        in_packages(
            *("aim", "clearml", "comet_ml", "mlflow", "neptune", "swanlab", "tensorboard", "tensorboardX", "wandb")
        ),
        handlers.silent_experiment,
        "What a step reports to a tracker, the training has reported or will.",
    ),
    Rule(in_modules("torch.utils.tensorboard"), handlers.silent_experiment, "Likewise: it is TensorBoard's writer."),
    # Objects whose class says itself how it is copied, or that cannot be left to that.
    Rule(
        _ends_with_a_finalizer,
        refuse,
        "When the copy of a DataLoader's iterator goes, it ends the worker processes, which are the original's.",
    ),
    Rule(
        derived(torch.optim.Optimizer),
        _instance_by_attributes,
        "Its state for `pickle` is without hooks and the attributes of subclasses (left behind).",
    ),
    Rule(
        derived(weakref.WeakKeyDictionary, weakref.WeakSet, weakref.WeakValueDictionary),
        _instance_by_attributes,
        "Their `__deepcopy__` shares the keys or the values that they refer to (left behind).",
    ),
    Rule(
        lambda cls: hasattr(cls, "__deepcopy__"),
        functools.partial(copy_instance, by_own_method),
        "Its author knows what has to stay shared, as of a handle.",
    ),
    Rule(_has_own_protocol, _instance_by_protocol, "Deques, iterators and classes in C keep what no attribute has."),
    Rule(lambda cls: True, _instance_by_attributes, "The rule: whatever it is, a step may write to its attributes."),
)
"""The rules, of which the first that fits counts."""


@functools.lru_cache(maxsize=4096)
def way_of(first: tuple[Rule, ...], cls: type) -> Way:
    """How the instances of a class are copied.

    Args:
        first: Rules that come before `RULES`.
        cls: The class.

    """
    return next(rule.way for rule in (*first, *RULES) if rule.fits(cls))
