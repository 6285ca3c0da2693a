"""Fixed data are what the user's own dataloader gives, and neither that nor anything behind it is touched."""

import contextlib
import gc
import itertools
import multiprocessing
import random
import sqlite3
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lyapunov_lightning.curvature.loss.randomness import RandomState
from lyapunov_lightning.training.data import batches, loaders
from tests.training import probe_data
from tests.training.probe_data import (
    ItsOwnIterator,
    Numbered,
    Restless,
    Scaled,
    cause,
    drawn,
    first_batches,
    positions,
    trainer_of,
)

SIZE = 24


class OwnOrder(Sampler):
    """A sampler with a generator and a counter of its own."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rng = np.random.default_rng(5)
        self.epochs = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        self.epochs += 1
        return iter(self.rng.permutation(self.size).tolist())


class CountingCollate:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, samples: list[Tensor]) -> Tensor:
        self.count += 1
        return torch.cat([torch.stack(samples), torch.full((len(samples), 1), float(self.count))], 1)


def collate_of(dataset: Any) -> Any:
    counts: list[int] = []

    def collate(samples: list[Tensor]) -> Tensor:
        counts.append(dataset.count)
        return torch.cat([torch.stack(samples), torch.full((len(samples), 1), float(len(counts)))], 1)

    return collate


def distributed(dataset: Any, rank: int = 1, epoch: int = 5) -> DistributedSampler:
    sampler = DistributedSampler(dataset, num_replicas=3, rank=rank)
    sampler.set_epoch(epoch)
    return sampler


LOADERS = {
    "plain": lambda d: DataLoader(d, 4),
    "shuffled": lambda d: DataLoader(d, 4, shuffle=True),
    "generator": lambda d: DataLoader(d, 4, shuffle=True, generator=torch.Generator().manual_seed(8)),
    "replacement": lambda d: DataLoader(d, 4, sampler=RandomSampler(d, replacement=True, num_samples=16)),
    "subset": lambda d: DataLoader(d, 4, sampler=SubsetRandomSampler(range(12))),
    "weighted": lambda d: DataLoader(d, 4, sampler=WeightedRandomSampler([1.0] * 12 + [0.0] * 12, 20)),
    "distributed": lambda d: DataLoader(d, 4, sampler=distributed(d)),
    "own-sampler": lambda d: DataLoader(d, 4, sampler=OwnOrder(SIZE)),
    "batch-sampler": lambda d: DataLoader(d, batch_sampler=BatchSampler(OwnOrder(SIZE), 4, True)),
    "list-of-batches": lambda d: DataLoader(d, batch_sampler=[[3, 1], [7], [2, 5, 11], [0, 4]]),
    "no-batches": lambda d: DataLoader(d, None, sampler=OwnOrder(SIZE)),
    "subclass": lambda d: Scaled(d, 4, shuffle=True),
    "its-own-iterator": lambda d: ItsOwnIterator(d, 4, shuffle=True),
    "collate-object": lambda d: DataLoader(d, 4, shuffle=True, collate_fn=CountingCollate()),
    "collate-closure": lambda d: DataLoader(d, 4, shuffle=True, collate_fn=collate_of(d)),
}
"""Loaders of datasets with 24 samples."""


def state_of(loader: Any) -> list[Any]:
    collate = loader.collate_fn
    own = [getattr(collate, "count", None), getattr(loader, "passed", None), getattr(loader, "_iterator", None)]
    closed_over = [list(c.cell_contents) for c in getattr(collate, "__closure__", None) or [] if type(c) is list]
    return [*own, closed_over, getattr(loader.sampler, "epochs", None), getattr(loader.sampler, "epoch", None)]


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("running", [False, True], ids=["before", "amidst"])
def test_the_training_is_the_same_with_and_without(kind, running):
    def run(draws: bool) -> list[Any]:
        probe_data.reset()
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        dataset = Restless(SIZE)
        loader = LOADERS[kind](dataset)
        iterator = iter(loader)
        seen = [next(iterator)] if running else []
        before, attributes = RandomState.capture(), vars(loader).copy()
        if draws:
            assert drawn(loader, num_batches=3)
        after = RandomState.capture()
        assert torch.equal(before.cpu, after.cpu)
        assert before.python == after.python
        np.testing.assert_equal(before.numpy, after.numpy)
        assert vars(loader) == attributes
        seen += [*iterator, *loader, *map(torch.tensor, (random.random(), np.random.rand())), torch.rand(1)]
        return [seen, state_of(loader), dataset.cache, dataset.count, Restless.total, list(probe_data.calls_of_all)]

    (seen, *state), (other_seen, *other_state) = run(False), run(True)
    assert state == other_state
    assert len(seen) == len(other_seen)
    assert all(map(torch.equal, seen, other_seen))


@pytest.mark.parametrize("kind", LOADERS)
def test_fixed_data_are_the_same_in_a_run_with_another_past(kind):
    def fresh(past: int) -> list[Tensor]:
        torch.manual_seed(past)
        np.random.seed(past)
        random.seed(past)
        loader = LOADERS[kind](Restless(SIZE))
        for _ in range(past):
            list(loader)
        return [batch[..., :10] for batch in drawn(loader, num_batches=3)]  # the rest counts the past

    reference, other = fresh(0), fresh(2)
    assert len(reference) >= 2
    assert all(map(torch.equal, reference, other))


@pytest.mark.parametrize("kind", ["shuffled", "generator", "subset", "weighted", "own-sampler", "no-batches"])
def test_another_seed_draws_others(kind):
    dataset = Numbered(SIZE)
    reference, other = (drawn(LOADERS[kind](dataset), num_batches=3, seed=seed) for seed in (0, 1))
    assert torch.cat([*reference]).tolist() != torch.cat([*other]).tolist()


def test_augmentation_is_that_of_the_seed():
    kinds = (Numbered(SIZE, augmented=True), Restless(SIZE))
    for dataset in kinds:
        columns = slice(1, 8 if isinstance(dataset, Restless) else 4)
        noise, other = (torch.cat(drawn(DataLoader(dataset, 4), seed=seed))[:, columns] for seed in (0, -1))
        assert all(len(column.unique()) == len(column) for column in noise.T)
        assert not set(noise.reshape(-1).tolist()) & set(other.reshape(-1).tolist())


# What is drawn.


@pytest.mark.parametrize("kind", ["plain", "list-of-batches"])
def test_a_fixed_order_is_followed(kind):
    reference = first_batches(LOADERS[kind](Numbered(SIZE)), 3)
    assert all(map(torch.equal, drawn(LOADERS[kind](Numbered(SIZE)), num_batches=3), reference))


@pytest.mark.parametrize("kind", ["subset", "weighted"])
def test_no_sample_that_the_sampler_leaves_out_is_drawn(kind):
    chosen = positions(drawn(LOADERS[kind](Numbered(SIZE)), num_batches=3))
    assert len(chosen) == 12
    assert set(chosen) <= set(range(12))


@pytest.mark.parametrize("kind", ["shuffled", "generator", "subset", "own-sampler", "batch-sampler"])
def test_no_sample_is_drawn_twice_and_their_order_is_random(kind):
    chosen = positions(drawn(LOADERS[kind](Numbered(SIZE)), num_batches=3))
    assert len(set(chosen)) == len(chosen) == 12
    assert chosen != sorted(chosen)


def test_every_sample_is_as_likely_as_every_other():
    counts = torch.zeros(20)
    for seed in range(400):
        counts[positions(drawn(DataLoader(Numbered(20), 5, shuffle=True), num_batches=1, seed=seed))] += 1
    chi_squared = ((counts - 100) ** 2 / (100 * 0.75)).sum() * 19 / 20
    assert chi_squared < 43.8  # the 99.9 % point for 19 degrees of freedom


def test_batches_pass_through_a_subclass():
    reference = torch.arange(12) * 100
    assert torch.equal(torch.cat(drawn(Scaled(Numbered(SIZE), 4), num_batches=3))[:, 0], reference)
    assert torch.equal(torch.cat(drawn(ItsOwnIterator(Numbered(SIZE), 4), num_batches=3))[:, 0] * 100, reference)


def test_batches_are_collated_as_in_training():
    batches = drawn(
        DataLoader(Numbered(SIZE), 4, collate_fn=lambda samples: {"x": torch.stack(samples)}), num_batches=2
    )
    assert positions(batch["x"] for batch in batches) == list(range(8))


@pytest.mark.parametrize("keys", [["a", "b", "c"], [(0, "a"), (1, "b"), (2, "c")]], ids=["strings", "tuples"])
def test_datasets_need_not_be_indexed_by_numbers(keys):
    class Keyed(Dataset):
        def __getitem__(self, key: Any) -> Tensor:
            return torch.tensor([float(keys.index(key))])

    assert positions(drawn(DataLoader(Keyed(), 1, sampler=keys[::-1]), num_batches=2)) == [2, 1]


def test_datasets_that_fetch_many_samples_at_once_do_so():
    class AtOnce(Numbered):
        def __getitems__(self, indices: list[int]) -> list[Tensor]:
            return [torch.tensor([float(index), float(len(indices))]) for index in indices]

    assert torch.equal(drawn(DataLoader(AtOnce(SIZE), 2), num_batches=1)[0], torch.tensor([[0.0, 2.0], [1.0, 2.0]]))


def test_infinite_samplers_have_a_beginning():
    class Infinite(Sampler):
        def __iter__(self) -> Iterator[int]:
            while True:
                yield from torch.randperm(SIZE).tolist()

    assert len(set(positions(drawn(DataLoader(Numbered(SIZE), 4, sampler=Infinite()), num_batches=6)))) == SIZE


# Ranks.


@pytest.mark.parametrize("size", [10, 24])
def test_ranks_draw_their_own_shares(size):
    dataset = Numbered(size)
    shares = []
    for rank in range(3):
        indices = range(rank, size, 3)  # of unequal lengths
        reference = positions(DataLoader(dataset, 1, sampler=distributed(dataset, rank, epoch=0)))
        assert positions(drawn(DataLoader(dataset, 1, sampler=distributed(dataset, rank)), rank=rank, fraction=1.0))
        assert positions(drawn(DataLoader(dataset, 1, sampler=distributed(dataset, rank)), fraction=1.0)) == reference
        shares.append(positions(drawn(DataLoader(dataset, 1, sampler=list(indices)), rank=rank, fraction=1.0)))
    assert sorted(itertools.chain(*shares)) == list(range(size))
    assert [len(share) for share in shares] == [len(range(rank, size, 3)) for rank in range(3)]


@pytest.mark.parametrize("seeds", [(3, 3), (3, 4)], ids=["same-seed", "own-seeds"])
@pytest.mark.parametrize("own_generator", [False, True])
def test_ranks_agree_on_an_order_where_their_training_does(monkeypatch, seeds, own_generator):
    """Lightning gives each rank its share of what the sampler says on that rank, which so has to be the same."""
    monkeypatch.setattr(batches, "any_rank", lambda trainer, flag: flag)
    sent: list[Any] = []

    def share(rank: int) -> list[int]:
        torch.manual_seed(0 if own_generator else seeds[rank])
        generator = torch.Generator().manual_seed(seeds[rank]) if own_generator else None
        sampler = DistributedSamplerWrapper(
            SubsetRandomSampler(range(12), generator), num_replicas=2, rank=rank, shuffle=False
        )
        trainer = trainer_of(DataLoader(Numbered(SIZE), 2, sampler=sampler), rank=rank)
        trainer.world_size = 2
        trainer.strategy = SimpleNamespace(broadcast=lambda sending: sent.append(sending) or sent[0])
        data, note = probe_data.started(trainer, fraction=1.0)
        assert note is None
        return positions(probe.batch for probe in data.batches())

    first, second = share(0), share(1)
    assert len(first) == len(second) == 6
    assert (len({*first, *second}) == 12) == (seeds == (3, 3))


# What is too large, and what cannot be copied.


class Stored(Dataset):
    """Samples in memory, of which some are written to."""

    def __init__(self, writes: bool = False, kind: str = "tensor") -> None:
        values = torch.arange(float(SIZE)).reshape(SIZE, 1)
        self.values = values.numpy() if kind == "array" else values
        self.writes = writes

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        sample = self.values[index]
        if self.writes:
            sample += 1
        return torch.from_numpy(sample) if isinstance(sample, np.ndarray) else sample

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


@pytest.mark.parametrize("kind", ["tensor", "array"])
@pytest.mark.parametrize("batch_size", [4, None])
def test_large_data_are_read_without_a_copy(monkeypatch, recwarn, kind, batch_size):
    refused: list[int] = []
    affords = loaders.Limits.affords
    monkeypatch.setattr(
        loaders.Limits, "affords", lambda self, n: affords(self, n) if n != SIZE * 4 else refused.append(n)
    )
    dataset = Stored(kind=kind)
    batches = drawn(DataLoader(dataset, batch_size), num_batches=2)
    assert refused == [SIZE * 4]
    dataset.values[:] = -1  # what was drawn is not affected
    assert torch.cat(batches).flatten().tolist() == list(range(2 * (batch_size or 1)))
    assert not [warning for warning in recwarn if "not writable" in str(warning.message)]


@pytest.mark.parametrize("kind", ["tensor", "array"])
@pytest.mark.parametrize("num_bytes", [64, 2**20], ids=["large", "small"])
def test_a_dataset_that_writes_to_its_data_is_copied_or_refused(monkeypatch, kind, num_bytes):
    affords = loaders.Limits.affords
    monkeypatch.setattr(
        loaders.Limits, "affords", lambda self, n: affords(self, n) if num_bytes != 64 else n != SIZE * 4
    )
    dataset = Stored(writes=True, kind=kind)
    loader = DataLoader(dataset, 4)
    if num_bytes == 64:
        assert ("read-only" if kind == "array" else "writes to a tensor") in cause(loader, num_batches=2)
    else:
        assert positions(drawn(loader, num_batches=2)) == list(range(1, 9))
    assert dataset.values.flatten().tolist() == list(range(SIZE))


def test_a_dataset_of_too_many_objects_is_not_copied(monkeypatch):
    monkeypatch.setattr(loaders, "COPIED_OBJECTS", 100)
    dataset = Numbered(SIZE)
    dataset.paths = [f"{index}" for index in range(1000)]
    assert drawn(DataLoader(dataset, 4), num_batches=1)
    dataset.entries = [{"path": path} for path in dataset.paths]
    assert "more than 100 objects" in cause(DataLoader(dataset, 4), num_batches=1)
    assert drawn(DataLoader(dataset, 4, num_workers=1), num_batches=1)


class Closing:
    def __init__(self) -> None:
        self.closed: list[bool] = []

    def __deepcopy__(self, memo: Any) -> "Closing":
        twin = Closing()
        twin.closed = self.closed  # as of a handle that both have
        return twin

    def __del__(self) -> None:
        self.closed.append(True)


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        (lambda: (index for index in range(9)), "draws from a generator"),
        (lambda: Closing(), "a Closing acts when it is deleted"),
        (lambda: multiprocessing.Value("i", 0), "a Synchronized is shared by processes"),
        (lambda: multiprocessing.Queue(), "a Queue is shared by processes"),
        (lambda: sqlite3.connect(":memory:"), "a Connection cannot be copied: "),
    ],
    ids=["generator", "finalizer", "shared-value", "queue", "handle"],
)
@pytest.mark.parametrize("place", ["dataset", "sampler", "collate"])
def test_what_cannot_be_copied_is_left_alone(attribute, said, place):
    class Holding:
        def __init__(self) -> None:
            self.held = attribute()
            self.count = 0

        def __call__(self, value: Any) -> Any:
            self.count += 1
            if hasattr(self.held, "__next__"):
                next(self.held)
            return value

    holding = Holding()

    class Held(Numbered):
        holding = None

        def __getitem__(self, index: int) -> Tensor:
            return self.holding(super().__getitem__(index)) if self.holding else super().__getitem__(index)

    class HeldOrder(OwnOrder):
        def __iter__(self) -> Iterator[int]:
            return iter(holding(list(range(SIZE))))

    dataset = Held(SIZE)
    if place == "dataset":
        dataset.holding = holding
    sampler = HeldOrder(SIZE) if place == "sampler" else None
    collate = (lambda samples: holding(torch.stack(samples))) if place == "collate" else None
    loader = DataLoader(dataset, 4, sampler=sampler, collate_fn=collate)
    assert said in cause(loader, num_batches=2)
    assert holding.count == 0
    if isinstance(holding.held, Closing):
        gc.collect()
        assert not holding.held.closed
    if hasattr(holding.held, "__next__"):
        assert next(holding.held) == 0


def test_attributes_of_an_instance_without_any_go_again():
    class Bare:
        pass

    class Writes(Numbered):
        helper = Bare()

        def __getitem__(self, index: int) -> Tensor:
            self.helper.index = index
            return super().__getitem__(index)

    dataset = Writes(SIZE)
    assert drawn(DataLoader(dataset, 4), num_batches=1)
    assert vars(Writes.helper) == {}


@pytest.mark.parametrize("has_cuda", [False, True])
def test_seeding_leaves_an_unused_accelerator_alone(monkeypatch, has_cuda):
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [])
    with contextlib.suppress(ZeroDivisionError), loaders.seeded(-3):
        drawn_inside = torch.rand(2)
        raise ZeroDivisionError
    assert torch.equal(drawn_inside, torch.rand(2, generator=torch.Generator().manual_seed(-3)))
    assert seeds == ([-3] if has_cuda else [])
