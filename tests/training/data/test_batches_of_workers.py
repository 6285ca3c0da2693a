"""A loader with worker processes is read in a worker of its own, and those of the training go on."""

import gc
import multiprocessing
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.training.replica.copier import Copier
from tests.training import probe_data
from tests.training.probe_data import ItsOwnIterator, Numbered, Restless, Scaled, cause, drawn, positions

SIZE = 24


class InWorker(Restless):
    def __getitem__(self, index: int) -> Tensor:
        info = get_worker_info()
        next(self.uncopied)
        place = [float(info.num_workers), float(info.id), float(self.told), float(os.getpid())] if info else [0.0] * 4
        return torch.cat([torch.tensor([float(index), *place]), super().__getitem__(index)])

    told = 0.0
    uncopied: Iterator[int] = iter(range(SIZE))


def tell_worker(worker_id: int) -> None:
    get_worker_info().dataset.told = 7.0


def loader_with_workers(dataset: Any, **settings: Any) -> DataLoader:
    return DataLoader(dataset, 4, num_workers=2, worker_init_fn=tell_worker, **settings)


def test_a_loader_with_workers_reads_in_a_worker_that_ends():
    probe_data.reset()
    dataset = InWorker(SIZE)
    dataset.uncopied = (index for index in range(SIZE))  # no obstacle to a worker
    children = multiprocessing.active_children()
    samples = torch.cat(drawn(loader_with_workers(dataset, shuffle=True), num_batches=3))
    assert samples[:, 1:4].unique(dim=0).tolist() == [[1.0, 0.0, 7.0]]
    assert set(samples[:, 4].tolist()).isdisjoint({float(os.getpid())})
    assert len(samples[:, 0].unique()) == 12
    assert not samples.is_shared()
    assert dataset.count == Restless.total == next(dataset.uncopied) == 0
    assert multiprocessing.active_children() == children


def test_workers_of_the_training_go_on():
    loader = loader_with_workers(Numbered(SIZE, augmented=True), persistent_workers=True)
    iterator = iter(loader)
    seen = [next(iterator)]
    pids = [worker.pid for worker in iterator._workers]
    first, second = drawn(loader, num_batches=2), drawn(loader, num_batches=2)
    assert all(map(torch.equal, first, second))
    gc.collect()
    seen += [*iterator]
    assert positions(seen) == list(range(SIZE))
    assert loader._iterator is iterator
    assert [worker.pid for worker in iterator._workers if worker.is_alive()] == pids


def test_workers_of_an_iterator_that_a_loader_keeps_go_on():
    loader = iter(ItsOwnIterator(Numbered(SIZE), 4, num_workers=1))
    seen = [next(loader)]
    assert positions(drawn(loader, num_batches=2)) == list(range(8))
    gc.collect()
    seen += [*iter(lambda: next(loader, None), None)]
    assert positions(seen) == list(range(SIZE))


def test_workers_of_an_iterator_go_on_when_what_holds_it_is_copied():
    holder = SimpleNamespace(iterator=iter(DataLoader(Numbered(SIZE), 4, num_workers=1)))
    twin = Copier()(holder)
    with pytest.raises(MeasurementError, match="_MultiProcessingDataLoaderIter, which cannot be copied"):
        next(twin.iterator)
    del twin
    gc.collect()
    assert positions(holder.iterator) == list(range(SIZE))


class Keeping(DataLoader):
    """Holds on to its iterators."""

    def __iter__(self) -> Any:
        self.inner = super().__iter__()
        return self.inner


@pytest.mark.parametrize("cls", [DataLoader, Scaled, Keeping, ItsOwnIterator])
@pytest.mark.parametrize("fails", [False, True])
def test_no_worker_is_left_behind(cls, fails):
    class Fails(Numbered):
        def __getitem__(self, index: int) -> Tensor:
            if fails and index == 6:
                raise KeyError("sample six")
            return super().__getitem__(index)

    children = multiprocessing.active_children()
    loader = cls(Fails(SIZE), 4, num_workers=1)
    if fails:
        assert "KeyError: 'sample six')" in cause(loader, num_batches=2)
    else:
        assert len(drawn(loader, num_batches=2)) == 2
    assert multiprocessing.active_children() == children
