"""What a step hands to a library is the training's own again after a measurement, and is measured as the replica's."""

import sys
import sysconfig
import types
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lyapunov_lightning import CurvatureProbe
from lyapunov_lightning.training.replica import elsewhere
from tests.training.live import RememberingLogger

LIBRARY = """
import functools, numpy, threading, weakref
STORE, REGISTRY, SLOT = {}, [], numpy.empty(1, object)
STATES, NAMED = weakref.WeakKeyDictionary(), weakref.WeakValueDictionary()
LOCAL = threading.local()
current = None

class Session:
    active = None

class ParameterStore:  # as Pyro has one
    def __init__(self):
        self.parameters, self.names = {}, {}

    def shared(self, name, owner, attribute):
        mine = getattr(owner, attribute)
        if name not in self.parameters:
            self.parameters[name], self.names[mine] = mine, name
        elif self.parameters[name] is not mine:
            setattr(owner, attribute, self.parameters[name])
        return getattr(owner, attribute)

store = ParameterStore()

@functools.lru_cache(maxsize=4)
def weight_of(thing):
    return thing.weight

def forever(thing):
    while True:
        yield thing
"""


others: Any = types.ModuleType("a_library_of_others")
others.__file__ = f"{sysconfig.get_path('purelib')}/{others.__name__}.py"  # so it looks installed


class Thing:
    """Something of the module's own that a step hands to the library."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self.calls = 0

    def called(self) -> Tensor:
        self.calls += 1
        return self.weight.cos() * self.calls


def in_a_dictionary(module: Any) -> Tensor:
    return others.STORE.setdefault("thing", module.thing).called()


def in_a_list(module: Any) -> Tensor:
    others.REGISTRY.append(module.thing)
    return others.REGISTRY[0].called() * len(others.REGISTRY)


def in_a_list_that_the_step_makes(module: Any) -> Tensor:
    others.STORE.setdefault("things", []).append(module.thing)
    return others.STORE["things"][0].called() * len(others.STORE["things"])


def in_a_tuple_in_a_list(module: Any) -> Tensor:
    others.REGISTRY[:] = [(module.thing.called, [module])]
    return others.REGISTRY[0][0]()


def in_a_global_variable(module: Any) -> Tensor:
    others.current = others.current or module.thing
    return others.current.called()


def in_a_class(module: Any) -> Tensor:
    others.Session.active = others.Session.active or module.thing
    return others.Session.active.called()


def in_a_closure(module: Any) -> Tensor:
    return others.STORE.setdefault("call", lambda: module.thing.called())()


def in_a_parameter_store(module: Any) -> Tensor:
    return others.store.shared("weight", module.thing, "weight").cos()


def in_a_thread_local(module: Any) -> Tensor:
    others.LOCAL.thing = getattr(others.LOCAL, "thing", module.thing)
    return others.LOCAL.thing.called()


def by_a_weak_key(module: Any) -> Tensor:
    others.STATES[module.thing] = others.STATES.get(module.thing, 0) + 1
    return module.thing.called() * others.STATES[module.thing]


def by_a_weak_value(module: Any) -> Tensor:
    return others.NAMED.setdefault("thing", module.thing).called()


def by_a_weak_reference(module: Any) -> Tensor:
    others.current = others.current or weakref.ref(module.thing)
    return others.current().called()


def in_a_cached_function(module: Any) -> Tensor:
    return others.weight_of(module.thing).cos()


def by_a_hook_of_all_modules(module: Any) -> Tensor:
    if not hasattr(module, "handle"):
        module.handle = nn.modules.module.register_module_forward_hook(lambda *_: module.thing.called())
    return module.thing.weight.cos() * (1 + module.thing.calls)


def in_an_array(module: Any) -> Tensor:
    others.SLOT[0] = others.SLOT[0] or module.thing
    return others.SLOT[0].called() * module.thing.calls


def in_a_generator(module: Any) -> Tensor:
    others.STORE.setdefault("generator", others.forever(module.thing))
    return next(others.STORE["generator"]).called() * module.thing.calls


class Using(pl.LightningModule):
    def __init__(self, use: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1, dtype=torch.float64)
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.thing = Thing(self.weight)
        self.use = use

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.layer(batch[0]).square().mean()
        return loss * self.use(self)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.02)


@pytest.fixture(autouse=True)
def installed(monkeypatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, others.__name__, others)
    yield
    exec(LIBRARY, vars(others))
    nn.modules.module._global_forward_hooks.clear()


def trained(use: Any, callbacks: list[Any], steps: int = 5) -> tuple[Using, list[Tensor], list[str]]:
    exec(LIBRARY, vars(others))
    vars(others).pop("late", None)
    nn.modules.module._global_forward_hooks.clear()
    torch.manual_seed(0)
    module = Using(use)
    inputs = torch.randn(18, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=RememberingLogger(),
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(TensorDataset(inputs), 6))
    said = [str(warning.message) for warning in caught if "lyapunov" in warning.category.__module__]
    return module, [parameter.detach() for parameter in module.parameters()], said


MENDED = [
    in_a_dictionary,
    in_a_list,
    in_a_list_that_the_step_makes,
    in_a_tuple_in_a_list,
    in_a_global_variable,
    in_a_class,
    in_a_closure,
    in_a_parameter_store,
    in_a_thread_local,
    by_a_weak_key,
    by_a_weak_value,
    by_a_weak_reference,
    in_a_cached_function,
    by_a_hook_of_all_modules,
]


@pytest.mark.parametrize("use", MENDED)
def test_training_goes_on_with_its_own_objects_and_all_is_measured(use):
    plain, expected, _ = trained(use, [])
    probe = CurvatureProbe(2)
    module, parameters, said = trained(use, [probe])
    assert said == []
    assert all(torch.equal(one, other) for one, other in zip(expected, parameters, strict=True))
    assert module.thing.calls == plain.thing.calls
    assert [result.step for result in probe.results] == [0, 2, 4]
    assert all(result.converged and result.lambda_max > 0.1 for result in probe.results)


@pytest.mark.parametrize("use", [in_an_array, in_a_generator])
def test_what_cannot_be_taken_back_is_as_good_as_the_original_and_nothing_more_is_measured(use):
    plain, expected, _ = trained(use, [])
    probe = CurvatureProbe(2)
    module, parameters, said = trained(use, [probe])
    assert all(torch.equal(one, other) for one, other in zip(expected, parameters, strict=True))
    assert module.thing.calls == plain.thing.calls
    assert probe.results == []
    assert len(said) == 1
    assert "The training step hands a Thing of the module to" in said[0]


def late_in_a_list(module: Any) -> Tensor:
    if module.global_step >= 4:
        others.REGISTRY.append(module.thing)
    return module.thing.called() * (1 + len(others.REGISTRY))


def late_by_a_key(module: Any) -> Tensor:
    if module.global_step >= 4:
        others.STORE[len(others.STORE)] = module.thing
    return module.thing.called() * (1 + len(others.STORE))


def late_by_a_name(module: Any) -> Tensor:
    was_there = "late" in vars(others)
    if module.global_step >= 4:
        others.late = module.thing
    return module.thing.called() * (1 + was_there)


def late_in_a_slot(module: Any) -> Tensor:
    if module.global_step >= 4:
        others.current = others.current or module.thing
    return (others.current or module.thing).called()


def late_by_a_hook_of_all_modules(module: Any) -> Tensor:
    if module.global_step == 4:
        nn.modules.module.register_module_forward_hook(lambda *_: module.thing.called())
    return module.thing.weight.cos() * (1 + module.thing.calls)


def between_measurements(module: Any) -> Tensor:
    if module.global_step == 5:
        others.STORE["thing"] = module.thing
    return others.STORE.get("thing", module.thing).called() * module.thing.calls


def weakly_between_measurements(module: Any) -> Tensor:
    module.reference = weakref.ref(module.thing)  # of these there is one for all who refer so
    if module.global_step == 5:
        others.current = weakref.ref(module.thing)
    return (others.current or module.reference)().called() * module.thing.calls


LATE = [
    late_in_a_list,
    late_by_a_key,
    late_by_a_name,
    late_in_a_slot,
    late_by_a_hook_of_all_modules,
    between_measurements,
    weakly_between_measurements,
]


@pytest.mark.parametrize("use", LATE)
def test_what_is_handed_on_for_the_first_time_in_a_later_step_is_found(use, monkeypatch):
    def steps_only(self, memo):  # the looks that are due anyway would hide what is not noticed
        self._looks = max(self._looks, 2)
        return looked_at(self, memo)

    looked_at = elsewhere.Elsewhere._looked_at
    plain, expected, _ = trained(use, [], 8)
    monkeypatch.setattr(elsewhere.Elsewhere, "_looked_at", steps_only)
    probe = CurvatureProbe(2)
    module, parameters, said = trained(use, [probe], 8)
    assert said == []
    assert all(torch.equal(one, other) for one, other in zip(expected, parameters, strict=True))
    assert module.thing.calls == plain.thing.calls
    assert [result.step for result in probe.results] == [0, 2, 4, 6]


def test_a_library_is_looked_through_only_where_something_may_have_been_handed_to_it(monkeypatch):
    looks = []
    among_globals = elsewhere._among_globals
    monkeypatch.setattr(elsewhere, "_among_globals", lambda memo: looks.append(1) or among_globals(memo))
    probe = CurvatureProbe(1)
    trained(in_a_list, [probe], 16)
    assert len(probe.results) == 16
    assert len(looks) <= 8
