"""Batches of a DataLoader, drawn without a trace in the training.

A copy of the loader is iterated in the loader's own way, with copies of all that it may write to: its samplers, its
generators of random numbers, and its dataset, if that is read in this process. A loader with worker processes has its
dataset read there, and so has the copy, in a worker process of its own. Where something cannot be copied, nothing is
drawn at all: unlike a replica, which runs a step that the training has run before, a half-copied loader could move a
file or a database cursor that the training is about to read.
"""

import hashlib
import inspect
import math
import multiprocessing.context
import pickle
import random
import types
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
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
from lyapunov_lightning.training.replica.copier import Copier, Exhausted, Policy
from lyapunov_lightning.training.replica.handlers import keep
from lyapunov_lightning.training.replica.memo import Limits, Memo, UncopiedError
from lyapunov_lightning.training.replica.namespaces import replaced_namespaces
from lyapunov_lightning.training.replica.rules import Rule, derived, in_packages
from lyapunov_lightning.training.replica.walk import Copy

COPIED_BYTES = 2**28
"""Bytes of tensors and arrays that are copied with a dataset; what is beyond is shared and may not be written to."""

COPIED_OBJECTS = 2**18
"""Objects that are copied with a dataset, which takes about a second; one with more is not copied at all."""

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


class LoaderCopy:
    """A copy of a DataLoader over a dataset with indices, from which batches can be drawn once.

    Args:
        loader: The original. Neither it nor anything that it refers to is touched.

    Raises:
        MeasurementError: If something of it cannot be copied.

    """

    def __init__(self, loader: "DataLoader[Any]") -> None:
        self._limits = Limits(COPIED_OBJECTS, COPIED_BYTES)
        has_workers = loader.num_workers > 0
        self._copier = Copier(Policy(_RULES_WITH_WORKERS if has_workers else _RULES, _refuse, self._limits))
        memo = self._copier.memo
        if has_workers:
            # These run in the worker process, which gets copies of them as it starts. Here they are only passed on.
            for value in (loader.dataset, loader.collate_fn, loader.worker_init_fn):
                memo.note(value, value)
        if getattr(loader, "_iterator", None) is not None:
            memo.note(loader._iterator, None)  # the training's own, with its worker processes
        self._loader = self._copier(loader)
        # Set by `vars`, since a loader refuses attributes once it is made. One worker is enough for a few batches, and
        # pinned memory would start a thread.
        settings: dict[str, Any] = {"_iterator": None, "persistent_workers": False, "pin_memory": False}
        vars(self._loader).update(settings, **({"num_workers": 1, "prefetch_factor": 1} if has_workers else {}))

    def position(self) -> Any:
        """Where in its data the copy is, for a loader that can be resumed; None for one that cannot.

        None for one with worker processes as well: these keep the position, and would have to be started to be asked.

        """
        resumes = hasattr(self._loader, "state_dict") and hasattr(self._loader, "load_state_dict")
        return self._loader.state_dict() if resumes and self._loader.num_workers == 0 else None

    def move_to(self, position: Any) -> None:
        """Set the copy to a position that `position` has returned."""
        self._loader.load_state_dict(position)

    def fingerprints(self) -> list[str]:
        """Digests of the global seed and of the states of the loader's generators, to be compared between ranks."""
        return [_digest(torch.initial_seed()), *map(_fingerprint, self._generators())]

    def draw(self, num_batches: int, seed: int, offset_of: Callable[[int], int] = lambda _: 0) -> list[Any]:
        """The first batches of an epoch, which are the same for equal seeds.

        Args:
            num_batches: How many; fewer if the epoch is shorter.
            seed: Seed of all generators, global ones and the loader's.
            offset_of: Maps the position of a generator in `fingerprints` to what is added to its seed.

        Raises:
            MeasurementError: If something would be drawn from or written to that the training uses as well.

        """
        with ExitStack() as stack:
            stack.callback(self._copier.memo.forget)
            stack.enter_context(replaced_namespaces(self._copier))
            # Each from the seed and its place among them, so that no two generators give the same numbers.
            for index, generator in enumerate(self._generators(), start=1):
                _reseed(generator, np.random.SeedSequence([(seed + offset_of(index)) % 2**64, index]))
            stack.enter_context(seeded(seed + offset_of(0)))
            if self._limits.shared:
                stack.enter_context(_ReadOnly(self._limits.shared))
                # `torch.from_numpy` warns of arrays that are not writable. These are the user's, and his are.
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", ".*NumPy array is not writable.*")
            self._rewind()
            # A batch of a worker lies in shared memory, which is scarce, and one without workers may be a view of the
            # dataset: both are copied before the iterator goes on.
            copied = Copier()
            return [copied(batch) for batch in stack.enter_context(self._iterated(num_batches))]

    def _generators(self) -> list[Any]:
        """The generators of random numbers among the copies, in the order in which they were met."""
        return [copied for copied in self._copier.memo.copies.values() if isinstance(copied, _GENERATORS)]

    def _rewind(self) -> None:
        """Set the samplers to their first epoch, so that a run that is resumed in its tenth draws the same batches."""
        batch_sampler = self._loader.batch_sampler
        # A DistributedSampler may be the sampler, or within a batch sampler of the user's or of Lightning's.
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

        # A subclass's `__iter__` may wrap the iterator, which then cannot be reached from outside, and whose worker
        # process would live until the garbage collector comes by. So it is caught where the loader makes it.
        vars(self._loader)["_get_iterator"] = get_iterator
        iterator = iter(self._loader)
        try:
            yield islice(iterator, num_batches)
        finally:
            del vars(self._loader)["_get_iterator"]
            try:
                if isinstance(iterator, types.GeneratorType):
                    iterator.close()  # first, since the user's `finally` may still need the workers
            finally:
                for inner in made:
                    getattr(inner, "_shutdown_workers", lambda: None)()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with global generators that are seeded, and leave them as they were before."""
    with preserved_randomness():
        # Not by `torch.manual_seed`, which seeds CUDA as well.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # else PyTorch would keep the seed and use it in the training, once it is
            torch.cuda.manual_seed_all(seed)
        if torch.backends.mps.is_available():
            torch.mps.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # NumPy takes no more bits, and no negative numbers
        yield


class _OneTime(Exhausted):
    """Stands in the place of an iterator of the loader."""

    def __next__(self, *_: Any) -> NoReturn:
        raise MeasurementError(f"it draws from a {self._kind}, which would take items away from the training")

    send = throw = __next__


def _refuse(value: Any, error: UncopiedError) -> Any:
    """What a loader's copy has in the place of what cannot be copied: nothing, so that no batch is drawn.

    A replica hands a handle through, on the word of the step that it has used it all along. A sampler with a database
    cursor would move the training's.

    """
    cls = type(value)
    if isinstance(value, Iterator) and not error.is_its_own_copy:
        return _OneTime(cls.__name__)
    raise MeasurementError(f"a {cls.__qualname__} cannot be copied: {error}") from error


def _refuse_finalizer(value: Any, copy: Copy, memo: Memo) -> NoReturn:
    raise MeasurementError(f"a {type(value).__qualname__} acts when it is deleted, and so would its copy")


def _refuse_shared(value: Any, copy: Copy, memo: Memo) -> NoReturn:
    raise MeasurementError(f"a {type(value).__qualname__} is shared by processes")


def _has_finalizer(cls: type) -> bool:
    """Whether a class written in Python does something when an instance is deleted."""
    return isinstance(inspect.getattr_static(cls, "__del__", None), types.FunctionType)


_RULES = (
    Rule(
        lambda cls: _has_finalizer(cls) and not issubclass(cls, Iterator),
        _refuse_finalizer,
        "Replicas are copied without their finalizers, but a dataset's or a sampler's code runs in the copy for as long"
        " as an epoch, and may count on them: a lock file that is removed, a row that is written.",
    ),
    Rule(
        derived(multiprocessing.context.BaseContext),
        keep,
        "It only makes what processes share, and keeps nothing itself.",
    ),
    Rule(
        in_packages("_ctypes", "ctypes", "multiprocessing"),
        _refuse_shared,
        "A counter in shared memory, or a queue, is the same one in every process, whatever is copied.",
    ),
    Rule(derived(*either("Trainer")), keep, "A sampler asks it for the rank and the epoch, and writes nothing to it."),
)
_RULES_WITH_WORKERS = (
    *_RULES,
    Rule(derived(Dataset), keep, "A worker process has its own copy, which starting the process makes."),
)


class _ReadOnly(TorchDispatchMode):
    """Refuses to let PyTorch write to some memory, that of tensors too large to be copied.

    Args:
        ranges: Where each piece of it begins and ends.

    """

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ranges = sorted(ranges)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # An operation says in its schema which arguments it writes to: `a!` of `add_(Tensor(a!) self, ...)`.
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                # The arguments of `foreach` operations are lists.
                written = args[position] if position < len(args) else kwargs.get(argument.name)
                for tensor in written if isinstance(written, (list, tuple)) else (written,):
                    if isinstance(tensor, Tensor) and self._holds(tensor):
                        raise MeasurementError("the dataset writes to a tensor that is too large to be copied")
        return func(*args, **kwargs)

    def _holds(self, tensor: Tensor) -> bool:
        with suppress(RuntimeError, NotImplementedError):  # sparse tensors and subclasses have no memory of their own
            start = tensor.untyped_storage().data_ptr()
            index = bisect_right(self._ranges, (start, math.inf)) - 1
            return index >= 0 and start < self._ranges[index][1]
        return False


def _reseed(generator: Any, seeds: np.random.SeedSequence) -> None:
    """Seed a generator of any of the kinds in `_GENERATORS`."""
    seed = int(seeds.generate_state(1)[0])
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        bits = generator.bit_generator  # cannot be seeded, but be given the state of another of its kind
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
