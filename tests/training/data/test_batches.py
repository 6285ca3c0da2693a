"""The data of a measurement are the right ones, the same in every run, and the training does not notice."""

import random
from collections import UserDict
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
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.curvature.loss.randomness import RandomState
from lyapunov_lightning.training.config import HessianConfig
from lyapunov_lightning.training.data import batches
from lyapunov_lightning.training.data.batches import ProbeData
from lyapunov_lightning.training.replica.copier import Copier
from lyapunov_lightning.training.replica.objective import TrainingObjective
from lyapunov_lightning.training.sharing import Step
from tests.training.probe_data import Numbered, Restless, cause, drawn, positions, reset, started, trainer_of


class Stream(IterableDataset):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor([float(index), 0.0, 0.0, 0.0]) for index in range(self.size))


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.size


class Learner(pl.LightningModule):
    """Keeps what it has seen, and writes to its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.order: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        samples = torch.cat(list(batch.values())) if isinstance(batch, dict) else batch
        samples = samples[0] if isinstance(samples, list) else samples
        self.order.append(samples.clone())
        return self.layer(samples[:, :4].div_(100)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Measured(pl.Callback):
    """Has fixed data, as a callback of the package does; keeps what was offered at every step."""

    def __init__(self, **settings: Any) -> None:
        self.data = ProbeData(HessianConfig("fixed", **settings).filled(data="fixed", fraction=0.05, mode="train"))
        self.note: str | None = None
        self.offered: list[Any] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.note = self.data.start("Owner", trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.data.observe(batch, batch_idx)
        self.offered.append(self.data.batches())

    @property
    def positions(self) -> list[int]:
        return positions(probe.batch for probe in self.offered[-1])


# The batch of the step.


def test_the_batch_of_the_step_is_what_training_step_gets():
    data, batch = ProbeData(HessianConfig("batch")), torch.ones(2)
    before = RandomState.capture()
    assert data.start("Owner", SimpleNamespace()) is None
    data.observe(batch, 3)
    [probe] = Step(SimpleNamespace(global_step=0), None, batch, 3).own_batches
    batch.zero_()  # by the step, before the measurement ends
    assert probe.batch.tolist() == [1, 1]
    assert (probe.batch_idx, probe.is_transferred) == (3, True)
    with data.randomness(1):
        assert torch.equal(torch.get_rng_state(), before.cpu)


# How many fixed batches.


@pytest.mark.parametrize(
    ("size", "settings", "count"),
    [
        (100, {}, 2),
        (100, {"fraction": 0.09}, 3),
        (280, {"fraction": 0.1}, 7),
        (400, {"fraction": 0.07}, 7),
        (100, {"fraction": 1.0}, 25),
        (10, {"fraction": 1.0}, 3),
        (10, {"fraction": 1e-6}, 1),
        (10, {"num_batches": 2}, 2),
        (10, {"num_batches": 99}, 3),
    ],
)
def test_fixed_data_have_the_size_asked_for(size, settings, count):
    assert len(drawn(DataLoader(Numbered(size), 4), **settings)) == count


@pytest.mark.parametrize(
    ("limits", "settings", "chosen"),
    [
        ({"overfit_batches": 1}, {"num_batches": 3}, [0, 1, 2, 3]),
        ({"overfit_batches": 0.5}, {"fraction": 1.0}, list(range(12))),
        ({"limit_train_batches": 2}, {"num_batches": 3}, list(range(8))),
        ({"limit_train_batches": 4}, {"fraction": 0.5}, list(range(8))),
        ({"fast_dev_run": 1}, {"fraction": 1.0}, [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_no_batch_is_drawn_beyond_the_limits_of_the_trainer(fit, limits, settings, chosen):
    measured, module = Measured(**settings), Learner()
    shuffles = "overfit_batches" in limits  # which Lightning turns off
    loader = DataLoader(Numbered(24), 4, shuffle=shuffles)
    fit(module, loader, callbacks=(measured,), **limits)
    assert measured.note is None
    assert measured.positions == chosen
    assert set(chosen) <= set(positions(module.order))


# The training does not notice.


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_training_is_the_same_with_and_without(fit, accumulated):
    def run(*callbacks: Measured) -> list[Tensor]:
        reset()
        pl.seed_everything(3, verbose=False)
        module = Learner()
        loader = DataLoader(Restless(12), 4, shuffle=True)
        fit(module, loader, callbacks=callbacks, max_epochs=2, accumulate_grad_batches=accumulated)
        rest = [torch.rand(3), torch.tensor([np.random.rand(), random.random()])]
        return [*module.order, *(p.detach() for p in module.parameters()), *rest]

    assert all(map(torch.equal, run(), run(Measured(num_batches=2), Measured(fraction=0.5, seed=1))))


def test_a_resumed_run_has_the_same_fixed_data(fit, tmp_path):
    def loader() -> DataLoader:
        return DataLoader(Restless(24), 4, shuffle=True, generator=torch.Generator().manual_seed(1))

    def run(seed: int, measured: Measured, **settings: Any) -> pl.Trainer:
        reset()
        pl.seed_everything(seed, verbose=False)
        return fit(Learner(), loader(), callbacks=(measured,), **settings)[0]

    first, second = Measured(num_batches=3), Measured(num_batches=3)
    run(1, first, max_steps=4).save_checkpoint(tmp_path / "amidst.ckpt")
    pl.seed_everything(2, verbose=False)
    trainer = pl.Trainer(
        **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
        **{"max_steps": 8, "callbacks": [second], "default_root_dir": tmp_path, "enable_model_summary": False},
    )
    trainer.fit(Learner(), loader(), ckpt_path=tmp_path / "amidst.ckpt", weights_only=False)
    assert trainer.global_step == 8
    for one, other in zip(first.offered[-1], second.offered[-1], strict=True):
        assert torch.equal(one.batch[:, :10], other.batch[:, :10])


def test_fixed_data_stay(fit):
    measured = Measured(num_batches=2)
    fit(Learner(), DataLoader(Numbered(24), 4, shuffle=True), callbacks=(measured,), max_epochs=2)
    assert len(measured.offered) == 12
    assert all(offered is measured.offered[0] for offered in measured.offered)
    assert not any(probe.is_transferred for probe in measured.offered[0])


def test_a_second_fit_begins_anew(fit):
    measured = Measured(num_batches=1)
    fit(Learner(), DataLoader(Stream(12), 4), callbacks=(measured,))
    fit(Learner(), DataLoader(Numbered(8), 2), callbacks=(measured,))
    assert measured.note is None
    assert measured.positions == [0, 1]


def test_random_numbers_of_a_measurement_are_those_of_the_seed_and_the_rank():
    def numbers(seed: int, rank: int) -> list[float]:
        with ProbeData(HessianConfig("fixed", seed=seed)).randomness(rank):
            return [float(torch.rand(())), random.random(), float(np.random.rand())]

    before = RandomState.capture()
    reference = numbers(5, 0)
    assert numbers(5, 0) == numbers(4, 1) == reference
    assert not set(reference) & set(numbers(5, 1))
    after = RandomState.capture()
    assert torch.equal(before.cpu, after.cpu)
    assert before.python == after.python
    np.testing.assert_equal(before.numpy, after.numpy)


# Data that cannot be read beside the training.


class Plain:
    """Batches of the user's own making."""

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.full((4, 4), float(index)) for index in range(6))


UNREAD = {
    "iterable": (lambda: DataLoader(Stream(24), 4), "an IterableDataset, Stream, "),
    "several": (lambda: {"a": DataLoader(Numbered(24), 4), "b": DataLoader(Numbered(12), 2)}, "are a dict"),
    "combined": (lambda: CombinedLoader({"a": DataLoader(Numbered(24), 4)}, "min_size"), "are a dict"),
    "list": (lambda: [DataLoader(Numbered(24), 4)], "are a list"),
    "own": (Plain, "are a Plain"),
    "draws-away": (
        lambda: DataLoader(Numbered(24), 4, sampler=OneTime(24)),
        "(it draws from a generator, which would take items away from the training)",
    ),
}


class OneTime:
    """A sampler that can be gone through once."""

    def __init__(self, size: int) -> None:
        self.items = (index for index in range(size))

    def __iter__(self) -> Iterator[int]:
        return self.items


@pytest.mark.parametrize("kind", UNREAD)
def test_first_batches_are_kept_as_they_pass(fit, kind):
    build, said = UNREAD[kind]
    measured, module, alone = Measured(num_batches=3), Learner(), Learner()
    alone.load_state_dict(module.state_dict())
    fit(module, build(), callbacks=(measured,))
    fit(alone, build())
    assert measured.note.startswith("The fixed data of `Owner` are the first 3 batches of this training, kept")
    assert said in measured.note
    assert measured.offered[:2] == [None, None]
    assert all(offered is measured.offered[2] for offered in measured.offered[2:])
    assert [(probe.batch_idx, probe.is_transferred) for probe in measured.offered[2]] == [(i, True) for i in range(3)]
    for probe, seen in zip(measured.offered[2], module.order, strict=False):
        unwrapped = list(probe.batch.values()) if isinstance(probe.batch, dict) else [probe.batch]
        unwrapped = unwrapped[0] if isinstance(unwrapped[0], list) else unwrapped
        assert torch.equal(torch.cat(unwrapped), seen)  # though the step has written to it since
    assert len(module.order) == len(alone.order) == 6
    assert all(map(torch.equal, module.order, alone.order))


@pytest.mark.parametrize("kind", ["iterable", "own", "draws-away"])
def test_a_fraction_of_data_without_a_length_is_refused(fit, kind):
    with pytest.raises(MisconfigurationException, match=r"`Owner` cannot take a fraction.*HessianConfig\(num_batches="):
        fit(Learner(), UNREAD[kind][0](), callbacks=(Measured(),))


def test_a_fraction_of_a_stream_with_a_length_is_kept(fit):
    measured = Measured(fraction=0.3)
    fit(Learner(), DataLoader(SizedStream(24), 4), callbacks=(measured,))
    assert "the first 2 batches" in measured.note
    assert measured.positions == list(range(8))


def test_a_loader_that_gives_nothing_is_said_to():
    class Empty(DataLoader):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    assert "gives no batch" in cause(Empty(Numbered(4), 2))


class Raises(Dataset):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        raise self.error


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("one\ntwo"), MemoryError(), MeasurementError("Full.")])
def test_whatever_a_loader_raises_is_told_in_one_line(error):
    note = cause(DataLoader(Raises(error), 2), num_batches=1)
    said = {KeyError: "KeyError: 'x'", RuntimeError: "RuntimeError: one", MeasurementError: "Full"}
    assert note.endswith(f"({said.get(type(error), 'MemoryError: without a message')}).")


def test_an_interrupt_is_the_users():
    class Interrupted(Numbered):
        def __getitem__(self, index: int) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drawn(DataLoader(Interrupted(4), 2))


@pytest.mark.parametrize("failing_call", [0, 1])
def test_all_ranks_keep_as_many_batches_if_one_has_to(monkeypatch, failing_call):
    flags: list[bool] = []
    monkeypatch.setattr(batches, "any_rank", lambda trainer, flag: flags.append(flag) or len(flags) - 1 == failing_call)
    trainer = trainer_of(DataLoader(Numbered(24), 4))
    trainer.world_size = 2
    trainer.strategy = SimpleNamespace(broadcast=lambda sending: 2 if isinstance(sending, int) else sending)
    data, note = started(trainer, num_batches=3)
    assert flags == [False] * (failing_call + 1)
    assert "the first 2 batches" in note
    assert "another rank" in note
    data.observe(torch.ones(1), 0)
    assert data.batches() is None
    data.observe(torch.ones(1), 1)
    assert len(data.batches()) == 2


# Batches of any class.


class OwnClass:
    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.meta = {"sizes": [len(x)]}


@dataclass(frozen=True)
class Frozen:
    x: Tensor


class Slots:
    __slots__ = ("x",)

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Encoding(UserDict):
    """As of a tokenizer: attributes are entries."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__(data)
        self._encodings = [object()]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


class Graphs:
    """As of torch_geometric: attributes in a store that knows its parent."""

    def __init__(self, **values: Any) -> None:
        self.__dict__["_store"] = SimpleNamespace(parent=self, mapping=values)

    def __getattr__(self, name: str) -> Any:
        if name == "_store":
            raise RuntimeError("not initialised")
        return self._store.mapping[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self._store.mapping[name] = value


def nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(x.split(1)), layout=torch.jagged)


KINDS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Any]]] = {
    "own": (OwnClass, lambda b: b.x),
    "frozen": (Frozen, lambda b: b.x),
    "slots": (Slots, lambda b: b.x),
    "mapping": (lambda x: Encoding({"x": x}), lambda b: b.x),
    "graphs": (lambda x: Graphs(x=x), lambda b: b.x),
    "array": (lambda x: x.numpy().copy(), lambda b: b),
    "arrays": (lambda x: {"x": [x.numpy().copy()]}, lambda b: b["x"][0]),
    "packed": (lambda x: pack_sequence([x]), lambda b: b.data),
    "nested": (nested, lambda b: b.values()),
    "strided-nested": (lambda x: torch.nested.nested_tensor(list(x.split(1))), lambda b: b.to_padded_tensor(0)),
    "sparse": (lambda x: x.to_sparse(), lambda b: b.to_dense()),
    "nothing": (lambda x: [None, x, "text", 3], lambda b: b[1]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_class_are_drawn(kind):
    build, read = KINDS[kind]
    num_workers = int(kind in ("own", "array", "packed"))  # the others are seldom sent from there, or never

    def collate(samples: list[Tensor]) -> Any:
        return build(torch.stack(samples))

    batches = drawn(DataLoader(Numbered(8), 4, collate_fn=collate, num_workers=num_workers), num_batches=2)
    for index, batch in enumerate(batches):
        assert type(batch) is type(build(torch.ones(4, 4)))
        values = torch.as_tensor(read(batch)).reshape(4, 4)
        assert values[:, 0].tolist() == [4.0 * index + place for place in range(4)]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_class_are_kept_as_they_were(kind):
    build, read = KINDS[kind]
    batch = build(torch.arange(16.0).reshape(4, 4))
    data, _ = started(trainer_of(Plain()), num_batches=1)
    data.observe(batch, 0)
    [probe] = data.batches()
    assert type(probe.batch) is type(batch)
    if kind in ("strided-nested", "sparse"):
        batch.mul_(-1.0)
    else:
        read(batch)[:] = -1.0  # by the step
    values = torch.as_tensor(read(probe.batch)).flatten()
    assert values.tolist() == list(range(16))


def test_a_graph_that_knows_itself_keeps_to_its_copy():
    batch = Graphs(x=torch.ones(2))
    twin = Copier()(batch)
    assert twin._store.parent is twin
    twin.x = torch.zeros(2)
    assert batch.x.sum() == 2


def test_a_batch_that_can_be_gone_through_once_is_refused():
    source = iter([torch.ones(1)])
    once = (entry for entry in source)
    data, _ = started(trainer_of(Plain()), num_batches=1)
    data.observe(once, 0)
    [probe] = data.batches()
    with pytest.raises(MeasurementError, match="generator, which cannot be copied"):
        next(probe.batch)
    assert len(list(once)) == 1


def test_samples_of_a_dataset_in_a_tuple_are_collated(loader):
    train = loader(num_samples=12)
    assert isinstance(train.dataset, TensorDataset)
    [(inputs, targets)] = drawn(train, fraction=0.3)
    assert inputs.shape == (4, 4)
    assert targets.shape == (4, 3)


# Hooks.


class WithHooks(Learner):
    """Transforms its batches on the way, in place in the dictionary and in its tensors."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch["samples"] = batch["samples"] + 1
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch["samples"].mul_(2)
        return batch


@pytest.mark.parametrize("data", ["batch", "fixed"])
def test_transfer_hooks_are_applied_once_to_every_batch(fit, data):
    probe_data = ProbeData(HessianConfig(data, fraction=1.0 if data == "fixed" else None))
    raw = torch.stack([Numbered(4)[index] for index in range(4)])

    def check(trainer: pl.Trainer, module: Learner, batch: Any, batch_idx: int) -> None:
        probe_data.start("Owner", trainer)
        probes = Step(trainer, module, batch, batch_idx).own_batches if data == "batch" else probe_data.batches()
        objective = TrainingObjective(trainer, module)
        expected = module.layer((raw + 1) * 2 / 100).square().mean()
        for _ in range(3):  # also when it is evaluated again and again
            losses = []
            for probe in probes:
                with objective.evaluated(probe) as evaluation:
                    losses.append(evaluation.loss.detach())
            assert torch.allclose(torch.stack(losses).mean(), expected, rtol=1e-5)

    module = WithHooks()
    loader = DataLoader(
        Numbered(4), 4 if data == "batch" else 2, collate_fn=lambda samples: {"samples": torch.stack(samples)}
    )
    fit(module, loader, check, max_epochs=2)
    assert torch.equal(torch.cat(module.order)[:4], (raw + 1) * 2)
