"""State in places that modules do not register is the replica's own, and what cannot be copied is refused."""

import functools
import hashlib
import io
import logging
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lyapunov_lightning import CurvatureProbe, HessianConfig
from lyapunov_lightning.curvature.errors import CurvatureWarning, MeasurementError
from lyapunov_lightning.training.replica.copier import Copier, Exhausted
from lyapunov_lightning.training.replica.held import discard
from lyapunov_lightning.training.replica.replica import replica
from tests.training.live import RememberingLogger, Task, mlp, replay, same
from tests.training.replica.test_copier import Habit, Untidy, frozen

COUNT = 0
SEEN: list[int] = []


class Box:
    """An object of the user's."""

    def __init__(self, content: Any) -> None:
        self.content = content


class WithSlots:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


@dataclass(slots=True)
class SlottedData:
    count: int = 0


class CalledToCount:
    count = 0

    def __call__(self) -> None:
        self.count += 1


class OnTheClass:
    count = 0
    seen: list[int] = []  # noqa: RUF012

    @classmethod
    def note(cls) -> None:
        cls.count += 1
        cls.seen.append(cls.count)


class MyDict(dict):
    pass


class Closed(MyDict):
    def __getattr__(self, name: str) -> Any:
        return self[name]


def norm() -> nn.Module:
    return nn.BatchNorm1d(4)


def counting() -> Callable[[], int]:
    count = 0

    def increase() -> int:
        nonlocal count
        count += 1
        return count

    return increase


def with_default(seen: list[int] = []) -> int:  # noqa: B006
    seen.append(1)
    return len(seen)


def count_globally() -> None:
    global COUNT
    COUNT += 1
    SEEN.append(COUNT)


@functools.lru_cache(maxsize=4)
def cached(number: int) -> int:
    return number


def kept(build: Callable[[], Any]) -> Callable[[Any], None]:
    return lambda module: setattr(module, "kept", build())


def statistics(module: nn.Module) -> int:
    return int(module.num_batches_tracked)


def peek(function: Callable[..., Any], name: str) -> Any:
    return dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))[name].cell_contents


def own_optimizer(module: Any) -> None:
    module.weight_kept = [torch.zeros(1, requires_grad=True)]
    module.kept = torch.optim.SGD(module.weight_kept, 1.0, momentum=0.9)


def use_own_optimizer(module: Any, batch: Any) -> None:
    module.kept.zero_grad()
    (-module.weight_kept[0].sum()).backward()
    module.kept.step()


def shared_memory(module: Any) -> None:
    module.whole = torch.zeros(6)
    module.kept = module.whole[2:4]


PLACES = {
    "module-in-object": Habit(
        kept(lambda: Box(norm())), lambda m, b: m.kept.content(b[0]), lambda m: statistics(m.kept.content)
    ),
    "module-in-tuple": Habit(kept(lambda: (norm(),)), lambda m, b: m.kept[0](b[0]), lambda m: statistics(m.kept[0])),
    "module-in-dict-of-attributes": Habit(
        lambda m: m.__dict__.update(kept=norm()), lambda m, b: m.kept(b[0]), lambda m: statistics(m.kept)
    ),
    "module-in-dict-subclass": Habit(
        kept(lambda: MyDict(a=norm())), lambda m, b: m.kept["a"](b[0]), lambda m: statistics(m.kept["a"])
    ),
    "hparams": Habit(
        lambda m: m.save_hyperparameters({"n": 0}), lambda m, b: m.hparams.update(n=1), lambda m: m.hparams.n
    ),
    "dict-subclass": Habit(kept(lambda: Closed(n=0)), lambda m, b: m.kept.update(n=1), lambda m: m.kept.n),
    "namespace": Habit(kept(lambda: SimpleNamespace(n=0)), lambda m, b: setattr(m.kept, "n", 1), lambda m: m.kept.n),
    "slots": Habit(kept(WithSlots), lambda m, b: setattr(m.kept, "count", 1), lambda m: m.kept.count),
    "slotted-dataclass": Habit(kept(SlottedData), lambda m, b: setattr(m.kept, "count", 1), lambda m: m.kept.count),
    "callable-object": Habit(kept(CalledToCount), lambda m, b: m.kept(), lambda m: dict(vars(m.kept))),
    "long-dict-of-lists": Habit(
        kept(lambda: {i: [] for i in range(1500)}), lambda m, b: m.kept[7].append(1), lambda m: m.kept[7]
    ),
    "range-iterator": Habit(kept(lambda: iter(range(99))), lambda m, b: next(m.kept), lambda m: m.kept.__reduce__()[2]),
    "list-iterator": Habit(kept(lambda: iter([5, 6, 7])), lambda m, b: next(m.kept), lambda m: m.kept.__reduce__()[2]),
    "class-attribute": Habit(lambda m: None, lambda m, b: OnTheClass.note(), lambda m: OnTheClass.count),
    "class-attribute-of-the-module": Habit(
        lambda m: setattr(type(m), "count", 0), lambda m, b: setattr(type(m), "count", 1), lambda m: type(m).count
    ),
    "list-on-a-class": Habit(kept(OnTheClass), lambda m, b: m.kept.note(), lambda m: OnTheClass.seen),
    "global-number": Habit(lambda m: None, lambda m, b: count_globally(), lambda m: COUNT),
    "global-list": Habit(lambda m: None, lambda m, b: count_globally(), lambda m: SEEN),
    "closure": Habit(kept(counting), lambda m, b: m.kept(), lambda m: peek(m.kept, "count")),
    "default-argument": Habit(
        kept(lambda: with_default), lambda m, b: m.kept(), lambda m: with_default.__defaults__[0]
    ),
    "partial": Habit(
        kept(lambda: functools.partial(list.append, [0])), lambda m, b: m.kept(1), lambda m: m.kept.args[0]
    ),
    "bound-builtin": Habit(kept(lambda: [0].append), lambda m, b: m.kept(1), lambda m: m.kept.__self__),
    "cached-function": Habit(
        kept(lambda: cached), lambda m, b: m.kept(len(b[0])), lambda m: cached.cache_info().currsize
    ),
    "tensor-that-requires-grad": Habit(
        kept(lambda: torch.zeros(1, requires_grad=True)), lambda m, b: m.kept.data.add_(1), lambda m: m.kept.detach()
    ),
    "tensor-of-a-graph": Habit(
        kept(lambda: torch.ones(2, requires_grad=True) * 2),
        lambda m, b: m.kept.detach().add_(1),
        lambda m: m.kept.detach(),
    ),
    "view-of-a-tensor": Habit(shared_memory, lambda m, b: m.kept.add_(1), lambda m: m.whole),
    "own-optimizer": Habit(own_optimizer, use_own_optimizer, lambda m: m.weight_kept[0].detach()),
    "state-of-own-optimizer": Habit(own_optimizer, use_own_optimizer, lambda m: len(m.kept.state)),
    "numpy-array": Habit(kept(lambda: np.zeros(3)), lambda m, b: m.kept.__setitem__(0, 1), lambda m: m.kept.tolist()),
    "numpy-objects": Habit(
        kept(lambda: np.array([[1], None], dtype=object)), lambda m, b: m.kept[0].append(2), lambda m: m.kept[0]
    ),
    "torch-generator": Habit(
        kept(lambda: torch.Generator().manual_seed(1)),
        lambda m, b: torch.rand(1, generator=m.kept),
        lambda m: m.kept.get_state(),
    ),
    "numpy-generator": Habit(
        kept(lambda: np.random.default_rng(1)), lambda m, b: m.kept.random(), lambda m: str(m.kept.bit_generator.state)
    ),
    "python-generator": Habit(
        kept(lambda: random.Random(1)), lambda m, b: m.kept.random(), lambda m: m.kept.getstate()
    ),
    "nested-function-state": Habit(
        kept(lambda: defaultdict(lambda: defaultdict(int))), lambda m, b: m.kept["a"]["b"], lambda m: sorted(m.kept)
    ),
    "string-buffer": Habit(kept(io.StringIO), lambda m, b: m.kept.write("x"), lambda m: m.kept.getvalue()),
    "thread-local": Habit(kept(threading.local), lambda m, b: setattr(m.kept, "a", 1), lambda m: sorted(vars(m.kept))),
    "learning-rate": Habit(
        lambda m: None,
        lambda m, b: m.optimizers().param_groups[0].update(lr=7.0),
        lambda m: m.trainer.optimizers[0].param_groups[0]["lr"],
    ),
    "trainer-attribute": Habit(
        lambda m: None, lambda m, b: setattr(m.trainer, "mine", 1), lambda m: getattr(m.trainer, "mine", 0)
    ),
    "logged-metrics-of-the-trainer": Habit(
        lambda m: None,
        lambda m, b: m.trainer.callback_metrics.update(mine=torch.ones(())),
        lambda m: sorted(m.trainer.callback_metrics),
    ),
    "gradient-of-the-last-step": Habit(
        lambda m: None,
        lambda m, b: [p.grad.zero_() for p in m.net.parameters() if p.grad is not None],
        lambda m: [None if p.grad is None else p.grad.clone() for p in m.net.parameters()],
    ),
    "backward-of-its-own": Habit(
        lambda m: None,
        lambda m, b: m.loss(b).backward(),
        lambda m: [None if p.grad is None else p.grad.clone() for p in m.net.parameters()],
    ),
    "hook-on-a-parameter": Habit(
        lambda m: None,
        lambda m, b: m.net[0].weight.register_hook(lambda gradient: None),
        lambda m: len(m.net[0].weight._backward_hooks or ()),
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_a_step_writes_in_hidden_places_is_not_seen_in_the_training(fit, loader, name):
    habit = PLACES[name]

    def check(trainer: pl.Trainer, module: Untidy, batch: Any, batch_idx: int) -> None:
        before = frozen(habit.read(module))
        trainer.is_being_checked = True
        for _ in range(2):
            replay(trainer, module, batch, batch_idx)
            assert same(before, frozen(habit.read(module)))
        trainer.is_being_checked = False

    _, results = fit(Untidy(habit, fails=False), loader(num_samples=8), check)
    assert len(results) == 2


@pytest.mark.parametrize("name", PLACES)
def test_a_replica_sees_what_the_module_sees(fit, loader, name):
    """A replay after a step of the user's own finds the state that the step has left."""
    habit = PLACES[name]

    def check(trainer: pl.Trainer, module: Untidy, batch: Any, batch_idx: int) -> None:
        with replica(trainer, module) as twin:
            if name not in ("hook-on-a-parameter", "gradient-of-the-last-step", "backward-of-its-own"):
                assert same(frozen(habit.read(module)), frozen(habit.read(twin.module)))

    fit(Untidy(habit, fails=False), loader(num_samples=8), check)


class Sentinel:
    pass


MISSING = Sentinel()


def test_identity_of_objects_is_kept():
    box = Box(MISSING)
    box.again = [box, {"me": box}]
    tied = nn.Linear(2, 2)
    box.tied = (tied, [tied.weight])
    copied = Copier()(box)
    assert copied is not box
    assert copied.content is MISSING
    assert copied.again[0] is copied
    assert copied.again[1]["me"] is copied
    assert copied.tied[0].weight is copied.tied[1][0]
    assert copied.tied[0].weight is not tied.weight


def test_tensors_that_share_memory_go_on_sharing_it():
    whole = torch.arange(6.0)
    first, second = Copier()([whole[:4], whole[2:]])
    first[3] = 7
    assert second[1] == 7
    assert whole[3] == 3


def test_what_was_written_to_an_object_without_attributes_goes():
    copier, sentinel = Copier(), Sentinel()
    copied = copier([sentinel])[0]
    assert copied is sentinel
    copied.written = 1
    copier.memo.forget()
    assert not vars(sentinel)


class Handle:
    """Closes what it was given when it goes."""

    closed = 0

    def __init__(self, resource: list[int]) -> None:
        self.resource = resource

    def __del__(self) -> None:
        Handle.closed += 1


def test_a_copy_that_goes_does_not_release_what_is_the_originals():
    handle = Handle([1])
    copier = Copier()
    copied = copier(handle)
    assert isinstance(copied, Handle)
    assert copied.resource == [1]
    discard(copier.memo)
    del copied
    assert Handle.closed == 0
    del handle
    assert Handle.closed == 1


class Cached:
    """Its class keeps one instance for equal arguments, as file systems of fsspec do."""

    kept: dict[str, Any] = {}  # noqa: RUF012

    def __new__(cls, name: str) -> "Cached":
        if name not in cls.kept:
            cls.kept[name] = object.__new__(cls)
            cls.kept[name].name = name
        return cls.kept[name]

    def __reduce__(self) -> Any:
        return Cached, (self.name,), {"name": self.name}


def test_an_instance_that_its_class_keeps_is_left_as_it_is():
    cached, copier = Cached("a"), Copier()
    assert copier([cached])[0] is cached
    discard(copier.memo)
    assert vars(cached) == {"name": "a"}


def numbers() -> Iterator[int]:
    yield from range(100)


def test_an_iterator_that_cannot_be_copied_refuses_to_be_drawn_from():
    stream = numbers()
    copied = Copier()([stream, zip(stream, stream, strict=False)])
    assert isinstance(copied[0], Exhausted)
    with pytest.raises(MeasurementError, match=r"draws from a generator, which cannot be copied.*curvature_loss"):
        next(copied[0])
    assert next(stream) == 0


def test_what_cannot_be_copied_is_handed_through_and_listed(caplog):
    handle = hashlib.sha256()
    with caplog.at_level(logging.INFO, "lyapunov_lightning"):
        assert Copier()([handle])[0] is handle
    assert "_hashlib.HASH is not copied for replays" in caplog.text


# Refusals in a training.


class Draws(Task):
    def __init__(self) -> None:
        super().__init__(mlp())
        self.stream = numbers()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) * (1 + self.scale())

    def scale(self) -> float:
        return next(self.stream) / 100


class DrawsFromHidden(Draws):
    def __init__(self) -> None:
        super().__init__()
        self.box = Box(self.stream)
        del self.stream

    def scale(self) -> float:
        return next(self.box.content) / 100


class DrawsFromItsOwnLoader(Task):
    def on_train_start(self) -> None:
        self.others = iter(DataLoader(torch.ones(50, 1), 5, shuffle=True))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) * next(self.others).mean()


def test_a_generator_that_the_step_names_is_refused_before_training(fit, loader):
    with pytest.raises(MisconfigurationException, match=r"draws from `self.stream`: a generator.*curvature_loss"):
        fit(Draws(), loader(), callbacks=(CurvatureProbe(1),))


@pytest.mark.parametrize("module", [DrawsFromHidden, lambda: DrawsFromItsOwnLoader(mlp())])
def test_one_that_cannot_be_seen_is_warned_of_once_and_training_is_the_same(fit, loader, module):
    def weights(*callbacks: Any) -> list[Tensor]:
        torch.manual_seed(0)
        fresh = module()
        fit(fresh, loader(num_samples=24), callbacks=callbacks, logger=RememberingLogger())
        return [parameter.detach().clone() for parameter in fresh.parameters()]

    with pytest.warns(CurvatureWarning, match="cannot be copied") as warned:
        probed = weights(CurvatureProbe(1))
    assert same(weights(), probed)
    assert sum("cannot be copied" in str(warning.message) for warning in warned) == 1


def test_a_batch_that_cannot_be_kept_ends_the_measurements_and_not_the_training(fit, loader, monkeypatch):
    def broken(_: Any) -> Callable[[Any], Any]:
        raise RuntimeError("no copy")

    monkeypatch.setattr("lyapunov_lightning.training.data.batches.Copier.__call__", lambda *_: broken(None))
    probe = CurvatureProbe(1, hessian=HessianConfig("fixed", 1))
    several = {"a": loader(num_samples=8), "b": loader(num_samples=8)}

    class OfSeveral(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch["a"])

    with (
        pytest.warns(CurvatureWarning, match="kept on the way"),
        pytest.warns(CurvatureWarning, match="A training batch cannot be copied, and so not be kept: no copy"),
    ):
        trainer, _ = fit(OfSeveral(mlp()), several, callbacks=(probe,), logger=RememberingLogger())
    assert trainer.global_step == 2
    assert not probe.results
