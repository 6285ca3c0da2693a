"""Batches of a DataLoader that are drawn beside the training, which does not notice.

A copy of the loader is iterated in the loader's own way, with copies of all that it may write to: its samplers, its
generators of random numbers, and its dataset, if that is read in this process. A loader with worker processes reads its
dataset there, and so does the copy, in a worker process of its own. Where something cannot be copied, nothing is drawn.
"""

import copyreg
import hashlib
import inspect
import math
import multiprocessing.context
import pickle
import random
import sys
import types
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from itertools import islice
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.curvature.loss.randomness import preserved_randomness
from lyapunov_lightning.training.lightning_names import either
from lyapunov_lightning.training.replica.copier import Copier
from lyapunov_lightning.training.replica.handlers import Exhausted
from lyapunov_lightning.training.replica.namespaces import replaced_namespaces

COPIED_BYTES = 2**28
"""Bytes of tensors and arrays that are copied with a dataset; what is beyond is shared and may not be written to."""

COPIED_OBJECTS = 2**18
"""Objects that are copied with a dataset, which takes about a second; one with more is not copied at all."""

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)

_SHARED_BY_PROCESSES = frozenset({"_ctypes", "ctypes", "multiprocessing"})
"""Packages whose objects are the same in every process, and so cannot be had twice."""


class LoaderCopy:
    """A copy of a DataLoader over a dataset with indices, from which batches can be drawn once.

    Args:
        loader: The original. Nothing of it is touched, and nothing of what hangs on it.

    Raises:
        MeasurementError: If something of it cannot be copied.

    """

    def __init__(self, loader: "DataLoader[Any]") -> None:
        self._copier = _LoaderCopier(loader)
        self._loader = self._copier(loader)
        has_workers = loader.num_workers > 0
        settings: dict[str, Any] = {"_iterator": None, "persistent_workers": False, "pin_memory": False}
        vars(self._loader).update(settings, **({"num_workers": 1, "prefetch_factor": 1} if has_workers else {}))

    def position(self) -> Any:
        """Where in its data the copy is, for a loader that can be resumed; None for one that cannot.

        One with worker processes would have to start them to tell.

        """
        resumes = hasattr(self._loader, "state_dict") and hasattr(self._loader, "load_state_dict")
        return self._loader.state_dict() if resumes and self._loader.num_workers == 0 else None

    def move_to(self, position: Any) -> None:
        """Let the copy go on from another position, as `position` gave it."""
        self._loader.load_state_dict(position)

    def fingerprints(self) -> list[str]:
        """What the global seed and the states of all generators of the loader can be recognised by."""
        return [_digest(torch.initial_seed()), *map(_fingerprint, self._copier.generators)]

    def draw(self, num_batches: int, seed: int, offset_of: Callable[[int], int] = lambda _: 0) -> list[Any]:
        """The first batches of an epoch, which are the same for equal seeds.

        Args:
            num_batches: How many; fewer if the epoch is shorter.
            seed: Seed of all generators, global ones and the loader's.
            offset_of: Maps the position of a generator in `fingerprints` to what is added to its seed.

        Raises:
            MeasurementError: If something would be drawn or written that the training shares.

        """
        with ExitStack() as stack:
            stack.callback(self._copier.forget)
            stack.enter_context(replaced_namespaces(self._copier))
            for index, generator in enumerate(self._copier.generators, start=1):
                _reseed(generator, np.random.SeedSequence([(seed + offset_of(index)) % 2**64, index]))
            stack.enter_context(seeded(seed + offset_of(0)))
            if self._copier.shared:
                stack.enter_context(_ReadOnly(self._copier.shared))
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", ".*NumPy array is not writable.*")
            self._rewind()
            copied = Copier()  # out of the memory that workers share, and of that of the dataset
            return [copied(batch) for batch in stack.enter_context(self._iterated(num_batches))]

    def _rewind(self) -> None:
        """Let the samplers give their first epoch."""
        batch_sampler = self._loader.batch_sampler
        for sampler in (self._loader.sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
            set_epoch = getattr(sampler, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(0)

    @contextmanager
    def _iterated(self, num_batches: int) -> Iterator[Iterator[Any]]:
        """Iterate over some batches in the loader's own way, and end the worker process afterwards."""
        made: list[Any] = []

        def get_iterator() -> Any:
            made.append(type(self._loader)._get_iterator(self._loader))
            return made[-1]

        vars(self._loader)["_get_iterator"] = get_iterator
        iterator = iter(self._loader)
        try:
            yield islice(iterator, num_batches)
        finally:
            del vars(self._loader)["_get_iterator"]
            try:
                if isinstance(iterator, types.GeneratorType):
                    iterator.close()
            finally:
                for inner in made:
                    getattr(inner, "_shutdown_workers", lambda: None)()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with global generators that are seeded, and leave them as they were before."""
    with preserved_randomness():
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # else PyTorch would keep the seed for when it is
            torch.cuda.manual_seed_all(seed)
        if torch.backends.mps.is_available():
            torch.mps.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


class _Empty:
    """An instance has no more memory than any of a class that is written in Python."""


class _NotCopiedError(MeasurementError):
    """Something of a loader cannot be copied."""


class _OneTime(Exhausted):
    """Stands in the place of an iterator of the loader."""

    def __next__(self, *_: Any) -> NoReturn:
        raise _NotCopiedError(f"it draws from a {self._kind}, which would take items away from the training")

    send = throw = __next__


class _LoaderCopier(Copier):
    """Copies a loader, or says why it cannot.

    Args:
        loader: What is going to be copied.

    Attributes:
        generators: The copied generators of random numbers.
        shared: Where memory begins and ends that is not copied.

    """

    def __init__(self, loader: "DataLoader[Any]") -> None:
        has_workers = loader.num_workers > 0
        super().__init__(keep=(*either("Trainer"), *((Dataset,) if has_workers else ())))
        in_worker = (loader.dataset, loader.collate_fn, loader.worker_init_fn) if has_workers else ()
        self._as_they_are = {id(value) for value in in_worker}
        self._bytes_left = COPIED_BYTES
        self.generators: list[Any] = []
        self.shared: list[tuple[int, int]] = []
        if getattr(loader, "_iterator", None) is not None:
            self.note(loader._iterator, None)  # that of the training, with its worker processes

    def __call__(self, value: Any) -> Any:
        """The copy of a value, the same one every time."""
        return value if id(value) in self._as_they_are else super().__call__(value)

    def note(self, original: Any, copied: Any) -> Any:
        """Let `copied` stand for `original` wherever that is met from now on; returns it."""
        if len(self._copies) >= COPIED_OBJECTS:
            raise _NotCopiedError(f"more than {COPIED_OBJECTS:,} objects would have to be copied")
        return super().note(original, copied)

    def _copy(self, value: Any, cls: type) -> Any:
        if _has_finalizer(cls) and not isinstance(value, Iterator):
            raise _NotCopiedError(f"a {cls.__qualname__} acts when it is deleted, and so would its copy")
        package = (cls.__module__ or "").partition(".")[0]
        if package in _SHARED_BY_PROCESSES and not isinstance(value, multiprocessing.context.BaseContext):
            raise _NotCopiedError(f"a {cls.__qualname__} is shared by processes")
        copied = super()._copy(value, cls)
        if type(copied) is Exhausted:
            return _OneTime(cls.__name__)
        if isinstance(copied, _GENERATORS):
            self.generators.append(copied)
        return copied

    def _instance(self, value: Any) -> Any:
        cls, size = type(value), sys.getsizeof(value)
        if not self._affords(size):
            raise _NotCopiedError(f"a {cls.__qualname__} of {size:,} bytes is too large to be copied")
        copied = super()._instance(value)
        if copied is value and cls.__basicsize__ > _Empty.__basicsize__ and cls not in copyreg.dispatch_table:
            return self._uncopied(value, TypeError("it is not written in Python"))
        return copied

    def _uncopied(self, value: Any, error: Exception) -> NoReturn:
        raise _NotCopiedError(f"a {type(value).__qualname__} cannot be copied: {error}") from error

    def _shared_memory(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._storages or self._affords(storage.nbytes()):
            return super()._shared_memory(tensor)
        self.shared.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        return tensor.detach()

    def _array(self, array: "np.ndarray[Any, Any]") -> Any:
        if not array.flags.writeable or array.dtype.hasobject or self._affords(array.nbytes):
            return super()._array(array)
        view = array.view()
        view.flags.writeable = False
        reaches = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
        first = array.ctypes.data + sum(reach for reach in reaches if reach < 0)
        last = array.ctypes.data + sum(reach for reach in reaches if reach > 0)
        self.shared.append((first, last + array.itemsize))
        return view

    def _affords(self, num_bytes: int) -> bool:
        """Whether something is to be copied, so that the bound on all that is copied holds."""
        if num_bytes > self._bytes_left:
            return False
        self._bytes_left -= num_bytes
        return True


class _ReadOnly(TorchDispatchMode):
    """Refuses to let PyTorch write to some memory.

    Args:
        ranges: Where it begins and ends.

    """

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ranges = sorted(ranges)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[position] if position < len(args) else kwargs.get(argument.name)
                for tensor in written if isinstance(written, (list, tuple)) else (written,):
                    if isinstance(tensor, Tensor) and self._holds(tensor):
                        raise _NotCopiedError("the dataset writes to a tensor that is too large to be copied")
        return func(*args, **kwargs)

    def _holds(self, tensor: Tensor) -> bool:
        with suppress(RuntimeError, NotImplementedError):  # some tensors have no memory of their own
            start = tensor.untyped_storage().data_ptr()
            index = bisect_right(self._ranges, (start, math.inf)) - 1
            return index >= 0 and start < self._ranges[index][1]
        return False


@cache
def _has_finalizer(cls: type) -> bool:
    """Whether a class written in Python does something when an instance is deleted."""
    return isinstance(inspect.getattr_static(cls, "__del__", None), types.FunctionType)


def _reseed(generator: Any, seeds: np.random.SeedSequence) -> None:
    seed = int(seeds.generate_state(1)[0])
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        bits.state = type(bits)(seed).state
    else:
        generator.seed(seed)


def _fingerprint(generator: Any) -> str:
    if isinstance(generator, torch.Generator):
        return _digest(generator.get_state().tolist())
    if isinstance(generator, np.random.Generator):
        return _digest(generator.bit_generator.state)
    return _digest(generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate())


def _digest(state: Any) -> str:
    return hashlib.sha256(pickle.dumps(state)).hexdigest()
