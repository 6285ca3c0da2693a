"""Batches of a measurement that is made once: held in memory, or read anew for every product where they are too large.

Every evaluation of a measurement has to see the same batches in the same order. The first reading counts them and keeps
a digest of each. Every later one draws the same random numbers, those of shuffling and of augmentation among them, and
is held against the digests: data that are not the same a second time are refused, and never measured as if they were.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import _pop_mode_temporarily
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.curvature.loss.fixed_batches import ReadBatches, as_tensor, members, num_bytes
from lyapunov_lightning.curvature.loss.freshness import numbers_of
from lyapunov_lightning.curvature.loss.randomness import RandomState, preserved_randomness
from lyapunov_lightning.training.config import HessianConfig
from lyapunov_lightning.training.data.loaders import seeded
from lyapunov_lightning.training.lightning_names import LightningModule, Trainer, either
from lyapunov_lightning.training.replica.objective import ProbeBatch
from lyapunov_lightning.training.reporting.telling import warn

HELD_BYTES = 2**30
"""Bytes of batches that are held by default: 1 GiB, of which a laptop has some and which MNIST and CIFAR-10 fit into,
as float32 and with all their labels. Held or read anew, a measurement gives the same numbers."""

_BATCH_SIZE = 128
"""Samples in a batch where the data are a dataset."""

_PLAIN = (str, bytes, int, float)
"""What else than tensors and arrays tells batches apart."""

_END: Any = object()
"""Stands where there is no further batch."""


class MeasuredBatches(ReadBatches):
    """This rank's batches of a measurement.

    Args:
        source: What gives the batches.
        start: The random state in which every reading begins.
        max_batches: How many to read at most; all if None.
        max_bytes: How many bytes of them may be held. With more, one batch is held at a time, and the whole of `source`
            is read for every product.
        on_batch: See below; also called for each batch of the first reading.
        rank: Which of the batches are this rank's: of every `num_ranks` one.
        num_ranks: How many ranks share the batches.

    Attributes:
        num_batches: How many batches were read, all ranks together.
        num_bytes: The bytes of this rank's.
        is_held: Whether they are held in memory.
        digest: Tells these data from any other, in their order.
        max_batches: How many were to be read at most.
        on_batch: Called with the place of each batch before it is handed out. What it raises leaves all as it was.

    Raises:
        ValueError: If there is no batch, or the batches can be read only once and are too large to be held.

    """

    def __init__(
        self,
        source: Iterable[Any],
        start: RandomState,
        *,
        max_batches: int | None = None,
        max_bytes: int = HELD_BYTES,
        on_batch: Callable[[int], None] | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self._source = source
        self.max_batches = max_batches
        self._rank, self._num_ranks = rank, num_ranks
        self._start = start
        self._generators = [(generator, generator.get_state()) for generator in _generators_of(source)]
        self._reading: _Reading | None = None
        self._present: tuple[int, Any] | None = None
        self._held: list[Any] | None = None
        self._digests: list[bytes] = []
        self.num_batches = 0
        self.num_bytes = 0
        self.on_batch = on_batch
        try:
            # A list holds its batches anyway.
            self._held = self._read_first(None if isinstance(source, (list, tuple)) else max_bytes)
        finally:
            self.close()
        self.is_held = self._held is not None
        self.digest = hashlib.sha256(b"".join(self._digests)).hexdigest()

    def __len__(self) -> int:
        return len(self._digests)

    def __getitem__(self, index: Any) -> Any:
        # The solvers ask for one index after the other; a sequence of the standard library counts from its end too.
        place = range(len(self))[index]
        if self.on_batch is not None:
            self.on_batch(place)
        if self._held is not None:
            batch = self._held[place]
        else:
            with _as_outside():
                batch = self._read_again(place)
        return ProbeBatch(batch, self._rank + place * self._num_ranks, False)

    def close(self) -> None:
        """Let go of the batch that is held, end the processes that read, and put the loader's generators back."""
        self._present = self._reading = None
        for generator, state in self._generators:
            generator.set_state(state)

    def _read_first(self, max_bytes: int | None) -> list[Any] | None:
        """Count the batches and note their digests; returns them if they are few enough bytes."""
        held: list[Any] | None = []
        reading = _Reading(self._source, self._start)
        while self.max_batches is None or self.num_batches < self.max_batches:
            batch = reading.next()
            if batch is _END:
                break
            if self.on_batch is not None:
                self.on_batch(self.num_batches)
            if self.num_batches % self._num_ranks == self._rank:
                self.num_bytes += num_bytes(batch)
                self._digests.append(_digest(batch))
                if held is not None:
                    held.append(batch)
                if max_bytes is not None and self.num_bytes > max_bytes:
                    held = None
                    if isinstance(self._source, Iterator):
                        raise ValueError(
                            f"`data` should be something that can be read more than once, such as a dataloader: this"
                            f" {type(self._source).__name__} gives its batches once, and they take more than"
                            f" `max_batch_bytes` = {max_bytes:,}. Raise that if there is the memory, or measure on the"
                            " first batches by `max_batches`."
                        )
            del batch  # or the next one is read while this one is still there
            self.num_batches += 1
        return held

    def _read_again(self, place: int) -> Any:
        """A batch in a further reading."""
        if self._present is not None and self._present[0] == place:
            return self._present[1]
        self._present = None  # before the next one is read: one at a time is held
        number = self._rank + place * self._num_ranks
        if self._reading is None or number < self._reading.num_read:
            self.close()
            self._reading = _Reading(self._source, self._start)
        reading, batch = self._reading, None
        self._reading = None  # unless it goes well, the next one begins anew
        # Those in between, whose graphs are kept or which are other ranks', are read and passed by: a loader knows no
        # other way.
        while reading.num_read <= number:
            del batch
            try:
                batch = reading.next()
            except Exception:
                # Ctrl-C reaches the processes of a loader too, and what is raised then is that they are gone.
                if self.on_batch is not None:
                    self.on_batch(place)
                raise
            if batch is _END:
                raise MeasurementError(
                    f"`data` give fewer batches when they are read again: {self.num_batches} at first. {_NOT_TWICE}"
                )
        self._reading = reading
        if _digest(batch) != self._digests[place]:
            raise MeasurementError(f"Batch {place} of `data` is another one when it is read again. {_NOT_TWICE}")
        self._present = place, batch
        return batch


_NOT_TWICE = (
    "Data of more bytes than `max_batch_bytes` are read anew for every product, and have to be the same then. Random"
    " numbers are, where they come from PyTorch's, NumPy's or Python's global generators or from the dataloader's: not"
    " those of a generator that the dataset holds, of workers that persist (`persistent_workers=True`), or of a stream."
    " Let the data draw from the global generators, hold them by a larger `max_batch_bytes`, or measure on fewer by"
    " `max_batches`."
)


class _Reading:
    """One reading of a source, with random numbers of its own that go on from batch to batch.

    Args:
        source: What gives the batches.
        start: The random state in which it begins.

    Attributes:
        num_read: How many batches it has given.

    """

    def __init__(self, source: Iterable[Any], start: RandomState) -> None:
        self.num_read = 0
        self._source = source
        self._state = start
        self._iterator: Iterator[Any] | None = None

    def next(self) -> Any:
        """The next batch, or `_END` where there is none."""
        with preserved_randomness(self._state):
            if self._iterator is None:
                self._iterator = iter(self._source)
            batch = next(self._iterator, _END)
            self._state = RandomState.capture()
        self.num_read += 1
        return batch


@contextmanager
def _as_outside() -> Iterator[None]:
    """Read as if nothing were measured: the modes of a product are for the operations of the loss."""
    with ExitStack() as stack:
        for _ in range(torch._C._len_torch_function_stack()):
            stack.enter_context(_pop_mode_temporarily())
        stack.enter_context(torch.enable_grad())
        yield


def _generators_of(source: Any) -> list[torch.Generator]:
    """The generators of a dataloader: from one reading to the next they go on, and would shuffle differently."""
    sampler, batch_sampler = getattr(source, "sampler", None), getattr(source, "batch_sampler", None)
    owners = (source, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = {id(generator): generator for owner in owners if (generator := getattr(owner, "generator", None))}
    return [generator for generator in found.values() if isinstance(generator, torch.Generator)]


def _digest(batch: Any) -> bytes:
    """Tells a batch from any other."""
    digest = hashlib.blake2b(digest_size=16)
    for member in members(batch, plain=_PLAIN):
        tensor = as_tensor(member) if isinstance(member, (Tensor, np.ndarray)) else None
        if tensor is None:
            digest.update(repr(member).encode())
            continue
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(numbers_of(tensor.detach()).numpy().tobytes())
    return digest.digest()


def batches_of(
    trainer: Trainer,
    pl_module: LightningModule,
    data: Any,
    config: HessianConfig,
    max_bytes: int = HELD_BYTES,
    on_batch: Callable[[int], None] | None = None,
) -> MeasuredBatches:
    """The batches to measure on; every rank calls it.

    Args:
        trainer: The trainer.
        pl_module: The module.
        data: A dataloader or any other iterable of batches, a dataset, or a LightningDataModule.
        config: How many of the batches, and the seed of the order in which they come.
        max_bytes: How many bytes of them may be held.
        on_batch: Called for each batch that is read.

    Raises:
        TypeError: If `data` are nothing that batches come from.
        ValueError: If they give no batch, or cannot be read as often as is needed.

    """
    with seeded(config.seed):  # all ranks draw the same order of batches, of which each takes every n-th
        loader = _loader(trainer, pl_module, data)
        start = RandomState.capture()
    count = config.num_batches
    if count is None and config.fraction is not None and config.fraction < 1:
        if not isinstance(loader, Sized):
            raise ValueError(
                f"`hessian.fraction` is of no use with data without a length, a {type(loader).__name__}. Pass"
                " `num_batches`."
            )
        count = max(1, round(config.fraction * len(loader)))
    # Such a loader gives each rank other batches already. Of any other loader all ranks have read the same ones, and
    # each takes every n-th: unequal shares are weighted by their samples.
    is_shared_out = isinstance(getattr(loader, "sampler", None), DistributedSampler)
    shares = {} if is_shared_out else {"rank": trainer.global_rank, "num_ranks": trainer.world_size}
    batches = MeasuredBatches(loader, start, max_batches=count, max_bytes=max_bytes, on_batch=on_batch, **shares)
    if not batches.num_batches:
        raise ValueError(f"`data` should give at least one batch, got a {type(data).__name__} that gives none.")
    batches.on_batch = None
    if not batches.is_held and trainer.is_global_zero:
        warn(
            f"the data of `measure` take more than `max_batch_bytes` = {max_bytes:,}, so they are read anew for every"
            " product. Raise it where there is the memory, or the first ones will do: `max_batches`."
        )
    if is_shared_out:
        batches.num_batches *= trainer.world_size
    return batches


def _loader(trainer: Trainer, pl_module: LightningModule, data: Any) -> Iterable[Any]:
    """The iterable that gives the batches."""
    if isinstance(data, either("LightningDataModule")):
        # As `fit` does: without it Lightning would not find the hooks of the data that move batches to the device.
        connector: Any = trainer._data_connector
        connector.attach_datamodule(pl_module, data)
        # As Lightning does with `prepare_data_per_node`: one process of a machine downloads, and the others wait.
        if trainer.local_rank == 0:
            data.prepare_data()
        trainer.strategy.barrier("prepare_data")
        data.setup("fit")
        loader: Iterable[Any] = data.train_dataloader()
        return loader
    if isinstance(data, Dataset):
        # With the last, smaller batch, so that every sample counts, and once. Batches are weighted by their samples:
        # how large they are does not matter in evaluation mode.
        return DataLoader(data, _BATCH_SIZE)
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise TypeError(
            f"`data` should be a dataloader, a dataset or a LightningDataModule, got {type(data).__name__}."
        )
    batches: Iterable[Any] = data
    return batches
