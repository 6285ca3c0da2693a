"""Copies of everything that a training step may write to.

A step may keep its state anywhere that it can reach: in modules, containers, objects of the user's own, closures,
iterators, generators of random numbers. `Copier` follows all of these references and copies what it finds, with
identity kept: two names of one object are two names of one copy. ``copy.deepcopy`` falls short of that in four ways. It
shares functions, and with them the closures of hooks; a single lock or a tensor with a graph lets it fail as a whole;
what an object hides from pickling is lost; and tensors that share memory no longer do.

What cannot be copied is told apart by what a step could do to it. An iterator would give the training's items away, so
in its place stands one that refuses. Anything else, a handle of a C library for example, is handed through as it is.
"""

import copyreg
import enum
import functools
import io
import logging
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.training.lightning_names import either, in_library_of
from lyapunov_lightning.training.replica.handlers import COMPILERS, HANDLERS, Exhausted, Handler, copy_file

_log = logging.getLogger(__name__)

_IMMUTABLE = frozenset({type(None), bool, int, float, complex, str, bytes, type, range, slice, object})
"""Types whose instances are kept, looked up first since most values are of these."""

_KEPT: tuple[type, ...] = (
    *(type, enum.Enum, types.ModuleType, types.CodeType, types.GetSetDescriptorType, types.GenericAlias, property),
    *(types.UnionType, types.MemberDescriptorType, types.WrapperDescriptorType, types.MethodDescriptorType),
    *(types.MappingProxyType, np.generic, np.dtype, np.ufunc, torch.dtype, torch.device, torch.Size, torch.layout),
    *(torch.memory_format, logging.Logger, threading.Thread, nn.parallel.DistributedDataParallel),
)
"""Further types whose instances are kept: immutable ones, and those that live beside the training step."""

_KEPT_PACKAGES = frozenset(
    {
        *(
            "asyncio",
            "concurrent",
            "ctypes",
            "datetime",
            "decimal",
            "fractions",
            "inspect",
            "multiprocessing",
            "pathlib",
        ),
        *("pyarrow", "re", "sentencepiece", "tokenizers", "typing", "uuid", "zoneinfo"),
    }
)
"""Packages with immutable values, or with handles of threads, processes and libraries in other languages."""

_CYTHON_FUNCTIONS = ("cython_function_or_method", "fused_cython_function")
"""Names of classes that each package has its own of."""

_KEPT_MODULES = (*COMPILERS, "torch.distributed", "torch.cuda")

_KEPT_FAMILIES = ("jsonargparse.", "lightning.pytorch.cli", "lyapunov_lightning.", "pytorch_lightning.cli")
"""Modules of classes that are kept with all that inherit from them: what a command line has made everything with, and
what measures. Both hold trainer, data and callbacks, and with these what earlier replays have left."""

_TRACKERS = frozenset(
    ["aim", "clearml", "comet_ml", "mlflow", "neptune", "swanlab", "tensorboard", "tensorboardX", "wandb"]
)
"""Packages of experiment trackers: what a step tells these was told by the training, or will be."""

_WHOLE_STORAGE = 2**24
"""Bytes up to which the memory behind a small view is copied as a whole, so that other views of it still share it."""

_BY_ATTRIBUTES = (torch.optim.Optimizer, weakref.WeakKeyDictionary, weakref.WeakSet, weakref.WeakValueDictionary)
"""Classes whose own way to be copied would leave something behind."""


class Copier:
    """Copies objects with everything that can be reached from them.

    Args:
        keep: Types whose instances are handed through besides those that always are.
        replaced: Functions, as they stand in a class, with what stands in for methods bound to them.

    Attributes:
        modules: The modules that were copied, copies of them.
        classes: The classes of what was copied, and
        functions: the functions, in which a step may keep state as well.
        stateless: Objects without attributes, which were kept.
        files: Files that were opened for the copies.

    """

    def __init__(
        self,
        keep: tuple[type, ...] = (Dataset, DataLoader, *either("LightningDataModule"), *either("Trainer")),
        replaced: dict[Any, Callable[..., Any]] | None = None,
    ) -> None:
        self._keep = (*_KEPT, *keep)
        self.replaced = replaced or {}
        self._copies: dict[int, Any] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._originals: list[Any] = []  # an id is good for as long as its object lives
        self._made: list[Any] = []
        self.stateless: list[Any] = []
        self.files: list[Any] = []
        self.modules: list[nn.Module] = []
        self.classes: dict[type, None] = {}
        self.functions: dict[types.FunctionType, None] = {}

    def note(self, original: Any, copied: Any) -> Any:
        """Let `copied` stand for `original` wherever that is met from now on; returns it."""
        self._copies[id(original)] = copied
        self._originals.append(original)
        return copied

    def own(self, original: Any, copied: Any) -> Any:
        """The same for a copy that nobody else can hold, whose attributes are dropped in the end."""
        self._made.append(copied)
        return self.note(original, copied)

    def has(self, original: Any) -> bool:
        """Whether a copy of an object was made."""
        return id(original) in self._copies

    def copy_of(self, original: Any) -> Any:
        """The copy that was made of an object.

        Raises:
            KeyError: If none was made.

        """
        return self._copies[id(original)]

    def __call__(self, value: Any) -> Any:
        """The copy of a value, the same one every time; the value itself where nothing can write to it."""
        cls = type(value)
        if cls in _IMMUTABLE:
            return value
        key = id(value)
        if key in self._copies:
            return self._copies[key]
        copied = self._copy(value, cls)
        if copied is not value and key not in self._copies:
            self.note(value, copied)
        return copied

    def forget(self) -> None:
        """Take back what was written to objects without attributes.

        These are kept, since an instance may be a sentinel that is compared by identity, and a function has hardly ever
        any.

        """
        for stateless in self.stateless:
            stateless.__dict__.clear()

    def discard(self) -> None:
        """Empty the copies, which hold each other in cycles, so that their memory is free at once."""
        for made in self._made:
            made.__dict__.clear()
        for file in self.files:
            file.close()
        self._copies.clear()
        self._originals.clear()
        self._storages.clear()

    def _copy(self, value: Any, cls: type) -> Any:
        return _handler_of(cls, self._keep)(self, value)

    def _kept(self, value: Any) -> Any:
        return value

    def _silent_logger(self, logger: Any) -> Any:
        return in_library_of(logger, "loggers.logger.DummyLogger")()

    def _silent_experiment(self, experiment: Any) -> Any:
        return in_library_of(experiment, "loggers.logger.DummyLogger")().experiment

    # Tensors and modules.

    def _tensor(self, tensor: Tensor) -> Tensor:
        """A leaf with memory of its own, shared with the copies of those that share the original's."""
        base = tensor._base
        if tensor.requires_grad and not tensor.is_leaf and base is not None and base.is_leaf and _is_plain(tensor):
            with torch.enable_grad():  # a view of a parameter, through which a gradient reaches the parameter
                place = tensor.size(), tensor.stride(), tensor.storage_offset()
                return self.note(tensor, self(base).as_strided(*place))  # type: ignore[no-any-return]
        requires_grad = tensor.requires_grad and tensor.is_leaf
        cls = type(tensor)
        with torch.no_grad():
            data = self._shared_memory(tensor) if _is_plain(tensor) else tensor.detach().clone()
        if isinstance(tensor, nn.Parameter) and not isinstance(data, nn.Parameter):
            is_standard = cls.__torch_dispatch__ is Tensor.__torch_dispatch__
            copied = (
                Tensor._make_subclass(cls, data, requires_grad) if is_standard else nn.Parameter(data, requires_grad)
            )
        else:
            copied = data if type(data) is cls else data.as_subclass(cls)
            if requires_grad:
                copied.requires_grad_()
        self.note(tensor, copied)
        if tensor.__dict__:
            copied.__dict__.update((name, self(value)) for name, value in tensor.__dict__.items())
        if requires_grad:
            self._hooks(tensor, copied)
        return copied

    def _hooks(self, tensor: Tensor, copied: Tensor) -> None:
        """Hooks on a leaf are called where the step runs a backward pass of its own."""
        hooks: Any = tensor._backward_hooks
        for hook in list((hooks or {}).values()):
            copied.register_hook(self(hook))
        hooks = tensor._post_accumulate_grad_hooks
        for hook in list((hooks or {}).values()):
            copied.register_post_accumulate_grad_hook(self(hook))

    def _shared_memory(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._storages or not key:
            if storage.nbytes() > max(_WHOLE_STORAGE, 2 * tensor.nbytes):
                return tensor.detach().clone()
            self._storages[key] = storage.clone()
            self._originals.append(storage)
        data = tensor.detach().new_empty(0)
        return data.set_(self._storages[key], tensor.storage_offset(), tensor.size(), tensor.stride())

    def _module(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return self._script_module(module)
        cls: Any = type(module)
        copied: nn.Module = self._with_attributes(module, object.__new__(_without_finalizer(cls)))
        self.modules.append(copied)
        return copied

    def _script_module(self, module: torch.jit.ScriptModule) -> nn.Module:
        """A compiled module knows how to copy itself; its tensors are those that were noted for the original's."""
        with torch.no_grad():  # else the copy's tensors are functions of the original's
            copied: nn.Module = module.__deepcopy__({})
            pairs = zip(
                (*module.parameters(), *module.buffers()), (*copied.parameters(), *copied.buffers()), strict=True
            )
            for tensor, twin in pairs:
                if id(tensor) in self._copies:
                    twin.copy_(self._copies[id(tensor)])
                twin.requires_grad_(tensor.requires_grad)
                self.note(tensor, twin)
        self.modules.append(copied)
        self.note(module, copied)
        return copied

    def _array(self, array: "np.ndarray[Any, Any]") -> Any:
        if not array.flags.writeable:
            return array
        base = array.base
        if (
            isinstance(base, np.ndarray)
            and base.flags.c_contiguous
            and base.flags.writeable
            and not array.dtype.hasobject
        ):
            place = array.ctypes.data - base.ctypes.data  # in the memory that it shares with other views
            return np.ndarray(array.shape, array.dtype, self(base), place, array.strides).view(type(array))
        key = array.ctypes.data
        if key in self._storages and array.flags.c_contiguous:  # the memory of a tensor that was copied
            whole = torch.empty(0, dtype=torch.uint8).set_(self._storages[key]).numpy()
            return whole[: array.nbytes].view(array.dtype).reshape(array.shape).view(type(array))
        copied = self.note(array, array.copy())
        if array.dtype.hasobject:
            copied.reshape(-1)[:] = [self(entry) for entry in array.reshape(-1)]
        elif array.nbytes and array.flags.c_contiguous:
            self._storages[key] = torch.from_numpy(copied.reshape(-1).view(np.uint8)).untyped_storage()
        return copied

    # Everything else, by its attributes or by the protocol that ``copy`` and ``pickle`` share.

    def _instance(self, value: Any) -> Any:
        cls: Any = type(value)
        if isinstance(value, Iterator) and hasattr(cls, "__del__") and not isinstance(value, io.IOBase):
            return Exhausted(cls.__name__)  # the end of a copied DataLoader iterator would end the original's workers
        try:
            if isinstance(value, _BY_ATTRIBUTES) or not _has_own_protocol(cls):
                return self._by_attributes(value, cls)
            if hasattr(cls, "__deepcopy__"):
                return value.__deepcopy__(self._copies)
            return self._reconstructed(value, cls)
        except MeasurementError:
            raise
        except Exception as error:
            # Third-party classes fail in their own ways, and no such failure is a reason to measure nothing.
            self._copies.pop(id(value), None)
            if isinstance(value, Iterator):
                return Exhausted(cls.__name__)
            try:
                return self._by_attributes(value, cls)
            except Exception:  # it keeps state in C, or its attributes are entries
                return self._entries(value, cls) if isinstance(value, dict) else self._uncopied(value, error)

    def _by_attributes(self, value: Any, cls: Any) -> Any:
        """A copy with the same attributes, or, for a class that keeps state in C, by the protocol."""
        try:
            empty: Any = object.__new__(_without_finalizer(cls))
        except TypeError:
            return self._reconstructed(value, cls)
        return self._with_attributes(value, empty)

    def _entries(self, value: dict[Any, Any], cls: Any) -> Any:
        """A dictionary of the user's own, whatever its class makes of the usual ways to look into one."""
        copied = self.note(value, dict.__new__(cls))
        if cls.__dictoffset__:
            vars(copied).update({name: self(attribute) for name, attribute in vars(value).items()})
        dict.update(copied, {self(key): self(entry) for key, entry in dict.items(value)})
        return copied

    def _uncopied(self, value: Any, error: Exception) -> Any:
        """What stands for an instance that cannot be copied."""
        cls = type(value)
        _list_as_uncopied(f"{cls.__module__}.{cls.__qualname__}", str(error))
        return value

    def _with_attributes(self, value: Any, copied: Any) -> Any:
        """Fill an empty instance with copies of the attributes of another one."""
        self.classes.update(dict.fromkeys(type(value).__mro__))
        slots = copyreg._slotnames(type(value))  # type: ignore[attr-defined]
        attributes = getattr(value, "__dict__", None)
        if not attributes and not slots:
            if attributes is not None:
                self.stateless.append(value)
            return value
        if attributes is None:
            self.note(value, copied)
        else:
            self.own(value, copied)
            target = copied.__dict__
            for name, attribute in attributes.items():
                target[name] = self(attribute)
        for name in slots:
            if hasattr(value, name):
                object.__setattr__(copied, name, self(getattr(value, name)))
        return copied

    def _reconstructed(self, value: Any, cls: type) -> Any:
        self.classes.update(dict.fromkeys(cls.__mro__))
        reduced = value.__reduce_ex__(4)
        if isinstance(reduced, str):  # a singleton
            return value
        make, arguments, state, items, pairs, setter = (*reduced, *[None] * 6)[:6]
        copied = make(*map(self, arguments))
        if copied is value:  # its class keeps one instance for equal arguments
            return value
        self.note(value, copied)
        if state is not None:
            state = self(state)
            if setter is not None:
                setter(copied, state)
            elif hasattr(copied, "__setstate__"):
                copied.__setstate__(state)
            else:
                attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
                copied.__dict__.update(attributes or {})
                for name, attribute in (slots or {}).items():
                    setattr(copied, name, attribute)
        for item in items or ():
            copied.append(self(item))
        for key, entry in pairs or ():
            copied[self(key)] = self(entry)
        return copied


@functools.lru_cache(maxsize=1024)
def _list_as_uncopied(name: str, reason: str) -> None:
    """Log it, once: a replay of every step would say the same."""
    _log.info("A %s is not copied for replays: %s", name, reason)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a view of a block of memory, and nothing else."""
    return (
        tensor.layout is torch.strided
        and tensor.device.type != "meta"
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.is_nested)
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    )


def _has_own_protocol(cls: type) -> bool:
    """Whether a class says itself how it is copied."""
    kind: Any = cls
    own_reduce = kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__
    return own_reduce or hasattr(cls, "__deepcopy__")


@functools.lru_cache(maxsize=4096)
def _without_finalizer(cls: Any) -> Any:
    """The class, or one like it whose instances do nothing when they go: what they would release is the original's."""
    if not hasattr(cls, "__del__"):
        return cls
    namespace = {"__del__": lambda self: None, "__module__": cls.__module__, "__slots__": ()}
    return type(cls)(cls.__name__, (cls,), namespace)


@functools.lru_cache(maxsize=4096)
def _handler_of(cls: type, keep: tuple[type, ...]) -> Handler:
    """How an instance of a class is copied."""
    if cls in HANDLERS:
        return HANDLERS[cls]
    for kinds, handler in (
        ((Tensor,), Copier._tensor),
        (keep, Copier._kept),
        ((nn.Module,), Copier._module),
        (either("loggers.logger.Logger"), Copier._silent_logger),
        ((np.ndarray,), lambda copier, value: copier._array(value)),  # late, for what a subclass makes of it
        ((io.StringIO, io.BytesIO), _copied_instance),
        ((io.IOBase,), copy_file),
    ):
        if issubclass(cls, kinds):
            return handler
    module = cls.__module__ or ""
    package = module.partition(".")[0]
    if any(kind.__module__.startswith(_KEPT_FAMILIES) for kind in cls.__mro__):
        return Copier._kept
    if package in _KEPT_PACKAGES or module.startswith(_KEPT_MODULES) or cls.__name__ in _CYTHON_FUNCTIONS:
        return Copier._kept
    if package in _TRACKERS or module.startswith("torch.utils.tensorboard"):
        return Copier._silent_experiment
    return _copied_instance


def _copied_instance(copier: Copier, value: Any) -> Any:
    return copier._instance(value)
