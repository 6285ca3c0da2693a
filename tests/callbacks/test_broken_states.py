"""A state that is broken, or of another version, is read as far as it is whole; the training goes on in any case."""

import copy
import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from lyapunov_lightning import (
    CurvatureProbe,
    HessianConfig,
    LossAlongEigvecScanner,
    NegativeCurvatureTracker,
    NudgedSGDHook,
    QuasiNewtonLRController,
    SpectrumTracker,
)
from lyapunov_lightning.callbacks.negative_curvature_tracker import Descent
from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.training.sharded.vector_states import VECTORS
from tests.modules import SmallRegressor
from tests.training_runs import train

HALF = HessianConfig(fraction=0.5)

CALLBACKS: dict[str, Callable[[], Any]] = {
    "lanczos": lambda: CurvatureProbe(1, end="both"),
    "power": lambda: CurvatureProbe(1, "power"),
    "lyapunov": lambda: CurvatureProbe(1, "lyapunov"),
    "critical": lambda: CurvatureProbe(1, "critical"),
    "spectrum": lambda: SpectrumTracker(1, 2, 1, hessian=HALF, groups="modules"),
    "benettin": lambda: SpectrumTracker(1, 2, estimator="benettin"),
    "negative": lambda: NegativeCurvatureTracker(1, 1, hessian=HALF, freeze_at=[0, 2]),
    "online": lambda: NegativeCurvatureTracker(2, 1, estimator="online", descent=Descent(), hessian=HALF),
    "scan": lambda: LossAlongEigvecScanner(2, 1, hessian=HALF, points=3),
    "along_update": lambda: QuasiNewtonLRController(),
    "inverse_sharpness": lambda: QuasiNewtonLRController(1, rule="inverse_sharpness"),
    "nudge": lambda: NudgedSGDHook(1, 2, hessian=HALF),
    "nudge, frozen": lambda: NudgedSGDHook(1, 2, frozen=True, hessian=HALF),
}


def fit(callback: Any, steps: int = 3) -> list[str]:
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = train(SmallRegressor(), callback, max_steps=steps)
    assert trainer.global_step == steps
    return [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning) and "no logger" not in str(w)]


@cache
def written(name: str) -> dict[str, Any]:
    callback = CALLBACKS[name]()
    fit(callback, 4)
    state = callback.state_dict()
    assert isinstance(state, dict)
    return state


def changed(state: Any, change: Callable[[Any], Any], where: tuple[str, ...] = ()) -> Any:
    """A state with all of its leaves changed; vectors are leaves, and lists of numbers."""
    if isinstance(state, dict):
        return {key: changed(value, change, (*where, str(key))) for key, value in state.items()}
    return change(state)


def of_vectors(change: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    def walk(state: Any, inside: bool = False) -> Any:
        if isinstance(state, dict):
            return {key: walk(value, inside or key in VECTORS) for key, value in state.items()}
        return change(state) if inside and isinstance(state, Tensor) else state

    return walk


def numbers_as(state: Any, other: Any) -> Any:
    """A state with something else in place of each number, those in lists too."""
    if isinstance(state, dict):
        return {key: numbers_as(value, other) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [numbers_as(value, other) for value in state]
    return other if isinstance(state, (int, float)) and not isinstance(state, bool) else state


def without_one_key(state: dict[str, Any]) -> dict[str, Any]:
    parts = {name: dict(part) for name, part in state.items() if isinstance(part, dict)}
    for part in parts.values():
        if part:
            del part[next(iter(part))]
    return {**state, **parts}


def with_more(state: dict[str, Any]) -> dict[str, Any]:
    later = copy.deepcopy(state)
    later["version"], later["another part"] = 99, {"a": 1}
    for part in later.values():
        if isinstance(part, dict):
            part["another field"] = [1.0]
    for item in later["results"]["items"]:
        item["another_field"] = 1.0
    return later


FAULTS: dict[str, Callable[[Any], Any]] = {
    "vectors are NaN": of_vectors(lambda vector: torch.full_like(vector, math.nan)),
    "vectors are cut": of_vectors(lambda vector: vector[..., : vector.shape[-1] // 2]),
    "vectors are scalars": of_vectors(lambda vector: vector.sum()),
    "numbers are words": lambda state: numbers_as(state, "a word"),
    "numbers are dictionaries": lambda state: numbers_as(state, {"a": 1}),
    "vectors are words": of_vectors(lambda vector: "a word"),
    "all is None": lambda state: changed(state, lambda leaf: None),
    "all is a word": lambda state: changed(state, lambda leaf: "a word"),
    "all is a number": lambda state: changed(state, lambda leaf: -7.5),
    "all is an empty list": lambda state: changed(state, lambda leaf: []),
    "a key is missing in each part": without_one_key,
    "a later version": with_more,
    "parts are lists": lambda state: {name: [part] for name, part in state.items()},
    "no dictionary": lambda state: [1, 2, 3],
}


RICH = ("spectrum", "online", "along_update", "nudge")
"""Callbacks on which every fault is tried: together they keep vectors, matrices, lists and counts."""

ON_ALL = ("vectors are cut", "all is None", "all is a word")


@pytest.mark.parametrize(
    ("name", "fault"), [(name, fault) for name in CALLBACKS for fault in FAULTS if name in RICH or fault in ON_ALL]
)
def test_a_training_goes_on_from_a_broken_state_and_measures(name, fault):
    callback = CALLBACKS[name]()
    callback.load_state_dict(FAULTS[fault](copy.deepcopy(written(name))))
    told = fit(callback)
    measured = [result for result in callback.results if result.step < 3]
    assert measured or name == "nudge, frozen"  # which has its vectors, where these are whole
    assert not [message for message in told if "failed" in message]
    assert len([message for message in told if "its state in the checkpoint" in message]) <= 1


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_whole_state_is_not_complained_of_and_comes_back(name):
    callback = CALLBACKS[name]()
    before = copy.deepcopy(written(name))
    callback.load_state_dict(before)
    assert repr(callback.state_dict()) == repr(before)
    assert not callback._wrong
    assert before["version"] == 1


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_part_that_cannot_be_read_is_as_new(name):
    fresh, callback = CALLBACKS[name](), CALLBACKS[name]()
    state = {key: {"nothing": "known"} for key in fresh.state_dict()}
    callback.load_state_dict(state)
    assert repr(callback.state_dict()) == repr(fresh.state_dict())


def test_the_user_is_told_what_is_wrong_and_what_to_do():
    callback = CurvatureProbe(1)
    callback.load_state_dict({**written("lanczos"), "cadence": {}})
    [message] = fit(callback)
    assert message.startswith("`CurvatureProbe`: its state in the checkpoint")
    assert "`cadence` cannot be read, KeyError: 'count'" in message
    assert "Resume with the version" in message
