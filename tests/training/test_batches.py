"""The data of a measurement are the right ones, the same in every run, and the training does not notice."""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from lyapunov_lightning.curvature.randomness import RandomState
from lyapunov_lightning.training.batches import ProbeData
from lyapunov_lightning.training.objective import ProbeBatch, TrainingObjective


class Numbered(Dataset):
    """Samples that tell their own position, augmented with every kind of random number."""

    def __init__(self, size: int, augmented: bool = False) -> None:
        self.size = size
        self.augmented = augmented

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        noise = [float(torch.rand(())), np.random.rand(), random.random()] if self.augmented else [0.0, 0.0, 0.0]
        return torch.tensor([float(index), *noise])


class Stream(IterableDataset):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor([float(index), 0.0, 0.0, 0.0]) for index in range(self.size))


class Learner(pl.LightningModule):
    """Learns from batches of any structure; keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.order: list[Any] = []

    @staticmethod
    def samples(batch: Any) -> Tensor:
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        samples = self.samples(batch)
        self.order.append(samples.clone())
        return self.layer(samples / 100).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def process(loader: Any, rank: int = 0, world_size: int = 1) -> Any:
    """As much of a Trainer as the choice of data looks at."""
    return SimpleNamespace(train_dataloader=loader, global_rank=rank, world_size=world_size)


def drawn(loader: Any, rank: int = 0, world_size: int = 1, **settings: Any) -> list[Tensor]:
    probes = ProbeData("fixed", **settings).batches(process(loader, rank, world_size), None, 0)
    assert all(isinstance(probe, ProbeBatch) and not probe.is_transferred for probe in probes)
    assert [probe.batch_idx for probe in probes] == list(range(len(probes)))
    return [probe.batch for probe in probes]


def positions(batches: list[Tensor]) -> list[int]:
    return [int(sample[0]) for batch in batches for sample in batch]


# Which samples.


def test_the_batch_of_the_step_is_what_training_step_gets(fit):
    def check(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        [probe] = ProbeData("batch").batches(trainer, batch, batch_idx)
        assert torch.equal(probe.batch, batch)
        assert probe.batch.data_ptr() != batch.data_ptr()  # the step may write to its batch before the measurement
        assert probe.batch_idx == batch_idx
        assert probe.is_transferred

    _, results = fit(Learner(), DataLoader(Numbered(8), 4), check)
    assert len(results) == 2


@pytest.mark.parametrize(
    ("size", "batch_size", "settings", "sizes"),
    [
        (100, 4, {}, [5]),
        (100, 4, {"fraction": 0.09}, [4, 5]),
        (101, 10, {"fraction": 0.1}, [11]),
        (10, 4, {"fraction": 1.0}, [4, 4, 2]),
        (10, 4, {"fraction": 1e-6}, [1]),
        (100, 4, {"num_batches": 3}, [4, 4, 4]),
        (10, 4, {"num_batches": 3}, [4, 4, 2]),
        (10, 4, {"num_batches": 99}, [4, 4, 2]),
        (100, 4, {"num_batches": 1, "fraction": 0.5}, [4]),
    ],
)
def test_fixed_set_has_the_size_asked_for_without_repeats(size, batch_size, settings, sizes):
    batches = drawn(DataLoader(Numbered(size), batch_size), **settings)
    assert [len(batch) for batch in batches] == sizes
    chosen = positions(batches)
    assert len(set(chosen)) == len(chosen) == sum(sizes)
    assert set(chosen) <= set(range(size))


def test_every_sample_is_as_likely_as_every_other():
    loader = DataLoader(Numbered(20), 4)
    counts = torch.zeros(20)
    for seed in range(400):
        counts[positions(drawn(loader, fraction=0.25, seed=seed))] += 1
    chi_squared = ((counts - 100) ** 2 / (100 * 0.75)).sum() * 19 / 20
    assert chi_squared < 43.8  # the 99.9 % point for 19 degrees of freedom


@pytest.mark.parametrize(
    "loader",
    [
        lambda dataset: DataLoader(dataset, 4),
        lambda dataset: DataLoader(dataset, 4, shuffle=True),
        lambda dataset: DataLoader(dataset, 4, sampler=RandomSampler(dataset, replacement=True)),
        lambda dataset: DataLoader(dataset, batch_sampler=BatchSampler(RandomSampler(dataset), 4, drop_last=True)),
        lambda dataset: DataLoader(dataset, 4, drop_last=True),
        lambda dataset: DataLoader(dataset, 4, num_workers=2, persistent_workers=True),
    ],
    ids=["plain", "shuffled", "sampler", "batch-sampler", "drop-last", "workers"],
)
def test_fixed_set_depends_on_the_seed_and_not_on_the_order_of_training(loader):
    reference = drawn(DataLoader(Numbered(40), 4), fraction=0.3)
    batches = drawn(loader(Numbered(40)), fraction=0.3)
    assert len(batches) == 3
    assert all(map(torch.equal, reference, batches))
    assert positions(drawn(loader(Numbered(40)), fraction=0.3, seed=1)) != positions(reference)


def test_fixed_set_is_drawn_once_and_kept():
    data = ProbeData("fixed", fraction=0.5)
    trainer = process(DataLoader(Numbered(20, augmented=True), 4))
    first = data.batches(trainer, None, 0)
    torch.manual_seed(5)
    assert data.batches(trainer, None, 7) is first


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_processes_share_the_set_of_a_single_one(world_size):
    loader = DataLoader(Numbered(50), 4)
    alone = positions(drawn(loader, fraction=0.21))
    shares = [positions(drawn(loader, rank, world_size, fraction=0.21)) for rank in range(world_size)]
    assert sorted(itertools.chain(*shares)) == sorted(alone)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_num_batches_counts_for_each_process_and_some_may_have_none():
    loader = DataLoader(Numbered(50), 4)
    shares = [drawn(loader, rank, 2, num_batches=3) for rank in range(2)]
    assert [[len(batch) for batch in share] for share in shares] == [[4, 4, 4], [4, 4, 4]]
    assert not set(positions(shares[0])) & set(positions(shares[1]))
    assert [len(drawn(loader, rank, 2, fraction=0.01)) for rank in range(2)] == [1, 0]


@pytest.mark.parametrize("arguments", [{"num_batches": n} for n in (0, -1, True, 1.5, "2")], ids=str)
def test_num_batches_out_of_range_is_named(arguments):
    with pytest.raises(ValueError, match=r"`num_batches` should be a positive int, got"):
        ProbeData("fixed", **arguments)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_fraction_out_of_range_is_named(fraction):
    with pytest.raises(ValueError, match=r"`fraction` should be in \(0, 1\], got"):
        ProbeData("fixed", fraction=fraction)


@pytest.mark.parametrize("data", ["all", "", None, 1])
def test_unknown_data_is_named(data):
    with pytest.raises(ValueError, match=r"`data` should be 'batch' or 'fixed', got"):
        ProbeData(data)


# The training does not notice.


def test_drawing_leaves_every_global_generator_as_it_was():
    loader = DataLoader(Numbered(40, augmented=True), 4, shuffle=True)
    before = RandomState.capture()
    drawn(loader, fraction=0.5)
    after = RandomState.capture()
    assert torch.equal(before.cpu, after.cpu)
    assert before.python == after.python
    np.testing.assert_equal(before.numpy, after.numpy)


def test_augmentation_of_the_fixed_set_is_that_of_its_seed():
    def fresh(global_seed: int, **settings: Any) -> list[Tensor]:
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        random.seed(global_seed)
        return drawn(DataLoader(Numbered(40, augmented=True), 4, shuffle=True), fraction=0.5, **settings)

    first, second, other = fresh(1), fresh(2), fresh(1, seed=9)
    assert all(map(torch.equal, first, second))
    noise, other_noise = (torch.cat(batches)[:, 1:] for batches in (first, other))
    assert all(len(column.unique()) == len(column) for column in noise.T)
    assert not set(noise.reshape(-1).tolist()) & set(other_noise.reshape(-1).tolist())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_order_and_augmentation_of_the_training_are_unchanged(fit, num_workers):
    def run(check: Callable[..., Any]) -> list[Tensor]:
        pl.seed_everything(3, verbose=False)
        module = Learner()
        loader = DataLoader(Numbered(12, augmented=True), 4, shuffle=True, num_workers=num_workers)
        fit(module, loader, check, max_epochs=2)
        return [*module.order, torch.rand(3), torch.tensor([np.random.rand(), random.random()])]

    def check(trainer: pl.Trainer, module: Learner, batch: Any, batch_idx: int) -> None:
        assert ProbeData("fixed", fraction=0.5).batches(trainer, batch, batch_idx)

    assert all(map(torch.equal, run(lambda *args: None), run(check)))


# Structures and hooks.


@dataclass
class Labelled:
    samples: Tensor
    name: str


class LearnsDicts(Learner):
    @staticmethod
    def samples(batch: Any) -> Tensor:
        return batch["samples"]


class LearnsDataclasses(Learner):
    @staticmethod
    def samples(batch: Any) -> Tensor:
        return batch.samples


def as_dict(items: list[Tensor]) -> dict[str, Any]:
    return {"samples": torch.stack(items), "name": "dict"}


def as_dataclass(items: list[Tensor]) -> Labelled:
    return Labelled(torch.stack(items), "dataclass")


@pytest.mark.parametrize(
    ("module", "collate"), [(LearnsDicts, as_dict), (LearnsDataclasses, as_dataclass)], ids=["dict", "dataclass"]
)
@pytest.mark.parametrize("settings", [{"fraction": 0.5}, {"num_batches": 1}], ids=["sampled", "passing"])
def test_batches_have_the_structure_of_the_dataloader(fit, module, collate, settings):
    data = ProbeData("fixed", **settings)

    def check(trainer: pl.Trainer, module: Learner, batch: Any, batch_idx: int) -> Tensor:
        data.observe(trainer, batch, batch_idx)
        probe = data.batches(trainer, batch, batch_idx)[0]
        assert type(probe.batch) is type(batch)
        return TrainingObjective(trainer, module)(probe).detach()

    dataset = Numbered(8) if "fraction" in settings else Stream(8)
    learner = module()
    _, losses = fit(learner, DataLoader(dataset, 4, collate_fn=collate), check)
    assert len(losses) == len(learner.order) == 2
    assert all(torch.isfinite(loss) for loss in losses)


class WithHooks(LearnsDicts):
    """Transforms its batches on the way, as the documentation of Lightning shows it: in place in the dictionary."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch["samples"] = batch["samples"] + 1
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch["samples"] = batch["samples"] * 2
        return batch


class WithHooksInPlace(WithHooks):
    """The same, in place in the tensors."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch["samples"].add_(1)
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch["samples"].mul_(2)
        return batch


@pytest.mark.parametrize("kind", [WithHooks, WithHooksInPlace])
@pytest.mark.parametrize("data", ["batch", "fixed"])
def test_transfer_hooks_are_applied_once_to_every_batch(fit, kind, data):
    probe_data = ProbeData(data, fraction=1.0)

    def check(trainer: pl.Trainer, module: Learner, batch: Any, batch_idx: int) -> None:
        probes = probe_data.batches(trainer, batch, batch_idx)
        objective = TrainingObjective(trainer, module)
        raw = torch.stack([Numbered(4)[index] for index in range(4)])
        expected = module.layer((raw + 1) * 2 / 100).square().mean()
        for _ in range(3):  # also when it is evaluated again and again
            losses = torch.stack([objective(probe).detach() for probe in probes])
            assert torch.allclose(losses.mean(), expected, rtol=1e-5)

    module = kind()
    fit(module, DataLoader(Numbered(4), 4 if data == "batch" else 2, collate_fn=as_dict), check, max_epochs=2)
    seen = torch.cat(module.order)
    assert torch.equal(seen[:4], (torch.stack([Numbered(4)[index] for index in range(4)]) + 1) * 2)


class InPlace(Learner):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.order.append(batch.clone())
        return self.layer(batch.div_(100)).square().mean()


def test_a_step_that_works_in_place_gets_the_batch_as_it_was(fit):
    def check(trainer: pl.Trainer, module: Learner, batch: Any, batch_idx: int) -> None:
        [probe] = ProbeData("batch").batches(trainer, batch, batch_idx)
        objective = TrainingObjective(trainer, module)
        assert torch.equal(objective(probe), objective(probe))

    module = InPlace()
    fit(module, DataLoader(Numbered(8), 4), check)
    assert positions(module.order) == list(range(8))


# Data that cannot be sampled.


def unsampled(kind: str) -> Any:
    if kind == "iterable":
        return DataLoader(Stream(24), 4)
    if kind == "own-batches":
        return DataLoader([torch.tensor([[float(i), 0, 0, 0]]) for i in range(6)], batch_size=None)
    loaders = {"a": DataLoader(Numbered(24), 4), "b": DataLoader(Numbered(12), 2)}
    return {"several": loaders, "combined": CombinedLoader(loaders, "min_size")}[kind]


class LearnsPairs(Learner):
    @staticmethod
    def samples(batch: Any) -> Tensor:
        return torch.cat(list(batch.values())) if isinstance(batch, dict) else batch


@pytest.mark.parametrize("kind", ["iterable", "own-batches", "several", "combined"])
def test_first_batches_are_kept_as_they_pass(fit, kind):
    data = ProbeData("fixed", num_batches=3)
    kept = []

    def check(trainer: pl.Trainer, module: Learner, batch: Any, batch_idx: int) -> Any:
        data.check("Owner", trainer)
        data.observe(trainer, batch, batch_idx)
        probes = data.batches(trainer, batch, batch_idx)
        if probes is not None:
            assert all(probe.is_transferred for probe in probes)
            kept.append([module.samples(probe.batch).clone() for probe in probes])
        return None if probes is None else [probe.batch_idx for probe in probes]

    module = LearnsPairs()
    _, indices = fit(module, unsampled(kind), check)
    assert indices == [None, None, [0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    for batches in kept:
        assert all(map(torch.equal, batches, module.order[:3]))


@pytest.mark.parametrize("kind", ["iterable", "own-batches", "several", "combined"])
def test_a_fraction_of_what_cannot_be_sampled_is_refused(fit, kind):
    def check(trainer: pl.Trainer, *args: Any) -> None:
        ProbeData("batch").check("Owner", trainer)
        with pytest.raises(MisconfigurationException, match=r"`Owner\(data='fixed'\)`.*Pass `num_batches`"):
            ProbeData("fixed").check("Owner", trainer)

    fit(LearnsPairs(), unsampled(kind), check)


def test_what_is_kept_does_not_change_with_the_batch(fit):
    data = ProbeData("fixed", num_batches=1)

    def check(trainer: pl.Trainer, module: Learner, batch: Any, batch_idx: int) -> Tensor:
        data.observe(trainer, batch, batch_idx)
        [probe] = data.batches(trainer, batch, batch_idx)
        return probe.batch.clone()

    _, batches = fit(InPlace(), DataLoader(Stream(12), 4), check)
    assert positions(batches) == [0, 1, 2, 3] * 3


def test_nothing_is_kept_where_samples_can_be_drawn(fit):
    data = ProbeData("fixed", num_batches=1)

    def check(trainer: pl.Trainer, module: Learner, batch: Any, batch_idx: int) -> bool:
        data.observe(trainer, batch, batch_idx)
        [probe] = data.batches(trainer, batch, batch_idx)
        return probe.is_transferred

    _, transferred = fit(Learner(), DataLoader(Numbered(40), 4, shuffle=True), check)
    assert not any(transferred)


def test_a_dataset_in_a_tuple_is_collated_as_in_training(fit, loader):
    train = loader(num_samples=10)
    assert isinstance(train.dataset, TensorDataset)
    inputs, targets = drawn(train, fraction=0.3)[0]
    assert inputs.shape == (3, 4)
    assert targets.shape == (3, 3)
