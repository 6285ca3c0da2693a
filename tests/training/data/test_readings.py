"""Batches that are read anew for every product: the same ones each time, one at a time, or none at all."""

import random
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lyapunov_lightning import measure
from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.errors import CurvatureWarning, MeasurementError
from lyapunov_lightning.curvature.loss.randomness import RandomState
from lyapunov_lightning.training.data.loaders import seeded
from lyapunov_lightning.training.data.readings import MeasuredBatches
from tests.modules import AugmentedClusters, SmallRegressor, regression_data


def read(source: Any, max_bytes: int = 0, **options: Any) -> MeasuredBatches:
    with seeded(3):
        start = RandomState.capture()
    return MeasuredBatches(source, start, max_bytes=max_bytes, **options)


def numbers(batch: Any) -> list[Tensor]:
    return [member for member in batch.batch if isinstance(member, Tensor)]


def same(one: MeasuredBatches, other: MeasuredBatches) -> bool:
    return one.digest == other.digest and all(
        torch.equal(a, b)
        for first, second in zip(one, other, strict=True)
        for a, b in zip(numbers(first), numbers(second), strict=True)
    )


class Counted:
    """Makes its batches one by one, and counts how many of them there are at once."""

    def __init__(self, size: int) -> None:
        self.size, self.most, self.made = size, 0, 0
        self._alive: list[weakref.ref[Tensor]] = []

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(self.size):
            yield self._batch(index)

    def _batch(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets, _ = (column[8 * index : 8 * index + 8].clone() for column in regression_data().tensors)
        self._alive = [*(found for found in self._alive if found() is not None), weakref.ref(inputs)]
        self.most, self.made = max(self.most, len(self._alive)), self.made + 1
        return inputs, targets


@pytest.mark.parametrize("max_graph_bytes", [0, 2**29])
def test_two_batches_are_there_at_a_time_and_the_values_are_those_of_held_ones(max_graph_bytes, monkeypatch):
    """To the bit. The second one is that of the evaluation before; a graph that is kept has its own batch as well."""
    monkeypatch.setitem(HessianOperator.__init__.__kwdefaults__, "max_graph_bytes", max_graph_bytes)
    torch.manual_seed(0)
    module = SmallRegressor()
    held, streamed = Counted(6), Counted(6)
    expected = measure(module, held, largest=2, smallest=1)
    assert (held.most, held.made) == (6, 6)
    with pytest.warns(CurvatureWarning, match="more than `max_batch_bytes` = 100, so they are read anew"):
        found = measure(module, streamed, largest=2, smallest=1, max_batch_bytes=100)
    if max_graph_bytes == 0:
        assert streamed.most == 2
        assert streamed.made >= 6 * found.matvecs
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.vectors, expected.vectors)
    assert (found.loss, found.num_batches) == (expected.loss, 6)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_shuffling_and_augmentation_are_those_of_the_first_reading(num_workers):
    options = {"batch_size": 10, "shuffle": True, "num_workers": num_workers}
    loader = DataLoader(AugmentedClusters(30), **options, generator=torch.Generator().manual_seed(5))
    before = loader.generator.get_state()
    held, streamed = read(loader, 10**9), read(loader)
    assert (held.is_held, streamed.is_held) == (True, False)
    present = RandomState.capture()
    assert same(held, streamed)
    assert same(held, streamed)
    streamed.close()
    assert torch.equal(loader.generator.get_state(), before)
    assert present.unless_changed() is present
    assert not same(held, read(DataLoader(AugmentedClusters(30), batch_size=10)))


def test_batches_may_be_asked_for_twice_and_from_the_first_one_again():
    batches = read(Counted(4))
    first = numbers(batches[0])[0]
    assert numbers(batches[0])[0] is first
    assert [torch.equal(numbers(batches[place])[0], first) for place in (2, 0, 3, 0)] == [False, True, False, True]
    assert [batches[place].batch_idx for place in (-1, 1)] == [3, 1]
    with pytest.raises(IndexError):
        batches[4]


def test_ranks_share_the_batches_and_a_bound_is_kept_to():
    alone = [numbers(batch)[0] for batch in read(Counted(5))]
    of_second = read(Counted(5), rank=1, num_ranks=2)
    assert (len(of_second), of_second.num_batches) == (2, 5)
    assert all(torch.equal(numbers(of_second[place])[0], alone[1 + 2 * place]) for place in (0, 1, 0))
    assert [batch.batch_idx for batch in of_second] == [1, 3]
    first = read(Counted(5), max_batches=2)
    assert (len(first), first.num_batches) == (2, 2)
    assert first.num_bytes == 2 * sum(tensor.nbytes for tensor in numbers(first[0]))
    assert not first.is_held
    assert read(list(Counted(5))).is_held  # which the caller holds anyway


class OwnNumbers(Dataset):
    """Augments with a generator of its own, as nobody can know."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets, _ = regression_data()[index]
        return inputs + self.generator.normal(), targets


class Dwindling(IterableDataset):
    """A stream that has less each time."""

    def __init__(self) -> None:
        self.left = 9

    def __iter__(self) -> Iterator[Tensor]:
        self.left -= 1
        return iter(torch.zeros(self.left, 2))


def test_data_that_are_not_the_same_again_are_refused_by_measure():
    refused = pytest.raises(MeasurementError, match=r"Batch 0 of `data` is another one .* `max_batches`")
    with refused, pytest.warns(CurvatureWarning):
        measure(SmallRegressor(), DataLoader(OwnNumbers(), 4), max_batch_bytes=0)
    assert measure(SmallRegressor(), DataLoader(OwnNumbers(), 4)).converged.all()
    batches = read(DataLoader(Dwindling(), None))
    with pytest.raises(MeasurementError, match="fewer batches when they are read again: 8 at first"):
        list(batches)


def test_what_gives_its_batches_once_is_held_or_refused():
    def once() -> Iterator[Any]:
        return (batch for batch in Counted(3))

    assert len(read(once(), 10**9)) == 3
    with pytest.raises(ValueError, match=r"this generator gives its batches once, .*`max_batch_bytes` = 10"):
        read(once(), 10)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["a", "b"], ["b", "a"]),
        ([1, 1, 2], [1, 2, 2]),
        ({"x": torch.zeros(2), "text": ["one"]}, {"x": torch.zeros(2), "text": ["two"]}),
        (torch.zeros(2), torch.zeros(2, 1)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (np.array(["a"]), np.array(["b"])),
        (np.arange(3), np.arange(3)[::-1]),
        (torch.arange(40000), torch.arange(40000).flip(0)),
        (torch.eye(3).to_sparse(), 2 * torch.eye(3).to_sparse()),
    ],
)
def test_a_digest_tells_batches_apart(one, other):
    assert read([one]).digest == read([one]).digest
    assert read([one]).digest != read([other]).digest


def test_reading_is_no_part_of_what_is_measured():
    class Noting(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Noting.calls += 1
            return func(*args, **(kwargs or {}))

    class WithGraph(Counted):
        def _batch(self, index: int) -> tuple[Tensor, Tensor]:
            assert torch.is_grad_enabled()
            return super()._batch(index)

    batches = read(WithGraph(3))
    with torch.no_grad(), Noting():
        batch = batches[1]
    assert len(batch.batch) == 2
    assert Noting.calls == 0


def test_the_place_of_each_batch_is_told_before_it_is_read():
    source = Counted(3)
    places: list[int] = []
    batches = read(source, on_batch=places.append)
    assert places == [0, 1, 2]

    def stop(place: int) -> None:
        raise KeyboardInterrupt

    batches.on_batch = stop
    made = source.made
    with pytest.raises(KeyboardInterrupt):
        batches[0]
    assert source.made == made
    batches.on_batch = None
    assert len(list(batches)) == 3


def test_workers_that_ended_are_told_as_the_interruption_that_ended_them():
    class Broken(Counted):
        is_broken = False

        def _batch(self, index: int) -> tuple[Tensor, Tensor]:
            if self.is_broken:
                raise RuntimeError("DataLoader worker exited unexpectedly")
            return super()._batch(index)

    source = Broken(3)
    batches = read(source)
    source.is_broken = True
    with pytest.raises(RuntimeError, match="exited"):
        batches[0]
    calls = iter([None, KeyboardInterrupt()])

    def asked(place: int) -> None:
        if (error := next(calls)) is not None:
            raise error

    batches.on_batch = asked
    with pytest.raises(KeyboardInterrupt):
        batches[0]


def test_seeds_decide_the_order():
    loader = DataLoader(AugmentedClusters(30), 10, shuffle=True)
    random.seed(9)
    torch.manual_seed(9)
    assert same(read(loader), read(loader))
