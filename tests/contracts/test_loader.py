"""What the package takes for granted of PyTorch's DataLoader, private names among it.

When a new version breaks one of these, the message says which part of the package depends on it.
"""

import copyreg
import inspect
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from tests.contracts.live import needed_by

LOADERS = needed_by("training/data/loaders")


def numbers() -> torch.Tensor:
    return torch.arange(6.0)


def test_a_loader_is_its_attributes(monkeypatch):
    loader = DataLoader(numbers(), 2, shuffle=True)
    copied = object.__new__(DataLoader)
    vars(copied).update(vars(loader))
    assert not copyreg._slotnames(DataLoader), LOADERS + "a loader is copied by `vars`"
    assert loader._iterator is None, LOADERS + "the iterator of persistent workers is kept there, and not copied"
    settings = {"persistent_workers", "pin_memory", "num_workers", "prefetch_factor"}
    assert settings <= vars(loader).keys(), LOADERS + "the copy has settings of its own"
    vars(copied).update(num_workers=1, prefetch_factor=1, persistent_workers=False)
    assert type(copied._get_iterator()).__name__ == "_MultiProcessingDataLoaderIter", LOADERS + "it reads in a worker"
    with pytest.raises(ValueError, match="batch_size"):
        copied.batch_size = 3  # so attributes are written by `vars`


def test_iterating_over_a_loader_asks_its_own_method_for_the_iterator():
    loader, made = DataLoader(numbers(), 2), []

    def get_iterator() -> Any:
        made.append(DataLoader._get_iterator(loader))
        return made[-1]

    vars(loader)["_get_iterator"] = get_iterator
    assert next(iter(loader)).tolist() == [0, 1]
    assert len(made) == 1, LOADERS + "so the iterator that is under the loader's own `__iter__` is known"


def test_workers_of_an_iterator_can_be_ended():
    iterator = iter(DataLoader(numbers(), 2, num_workers=1))
    next(iterator)
    iterator._shutdown_workers()
    assert not any(worker.is_alive() for worker in iterator._workers), LOADERS + "no worker is left behind"


def test_a_loader_draws_from_the_global_generator_or_its_own():
    before = torch.get_rng_state()
    next(iter(DataLoader(numbers(), 2)))
    assert not torch.equal(before, torch.get_rng_state()), LOADERS + "so a loader is never iterated over beside a run"
    before = torch.get_rng_state()
    own = torch.Generator()
    next(iter(DataLoader(numbers(), 2, shuffle=True, generator=own)))
    assert torch.equal(before, torch.get_rng_state()), LOADERS + "generators are found and seeded one by one"


def test_samplers_with_epochs_are_told_them_by_one_method():
    assert callable(DistributedSampler.set_epoch), LOADERS + "the fixed data are those of the first epoch"
    assert not hasattr(RandomSampler, "set_epoch")


def test_a_dispatch_mode_is_told_what_an_operation_writes_to():
    written = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written.append(value)
            return func(*args, **(kwargs or {}))

    x = torch.zeros(3)
    with Watching():
        x[1:].add_(1)
        x + 1
    message = LOADERS + "a dataset that is too large to be copied may not be written to"
    assert [part.untyped_storage().data_ptr() for part in written] == [x.untyped_storage().data_ptr()], message


def test_the_generator_of_everything_is_one_object():
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(5)
    first = torch.rand(1)
    assert inspect.isbuiltin(torch.default_generator.manual_seed)
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(1)), LOADERS + "it is seeded alone, and CUDA is left as it is"
    torch.set_rng_state(before)
