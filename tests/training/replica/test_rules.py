"""Each exception has a reason and is met, and which way a class goes is decided in one place."""

import array
import datetime
import enum
import functools
import io
import logging
import random
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lyapunov_lightning import CurvatureProbe
from lyapunov_lightning.training.replica.copier import REPLICA
from lyapunov_lightning.training.replica.handlers import keep, refuse
from lyapunov_lightning.training.replica.rules import RULES, Rule, derived, way_of


class Phase(enum.Enum):
    WARMUP = 1


class Plain:
    """A class of the user's."""


class WithSlots:
    __slots__ = ("count",)


class Copies:
    def __deepcopy__(self, memo: Any) -> "Copies":
        return Copies()


class Closes(Iterator):
    def __next__(self) -> int:
        return 0

    def __del__(self) -> None:
        pass


class Mine(CurvatureProbe):
    """A callback of the user's, made of one of ours."""


def of_package(name: str) -> type:
    """As a class of a package that need not be installed."""
    return type("Handle", (), {"__module__": name})


def cython_function() -> type:
    return type("cython_function_or_method", (), {"__module__": "somebodys"})


SAMPLES: tuple[type, ...] = (
    *(int, object, list, dict, OrderedDict, set, tuple, frozenset),
    *(types.FunctionType, types.CellType, types.MethodType, types.BuiltinMethodType, staticmethod, classmethod),
    *(functools._lru_cache_wrapper, weakref.ref, weakref.KeyedRef, type({}.keys()), memoryview, threading.local),
    *(type(threading.Lock()), type(threading.RLock()), torch.Generator, types.GeneratorType, nn.Parameter),
    *(type(Iterator), types.ModuleType, types.MappingProxyType, cython_function(), Phase, np.float32, torch.Size),
    *(torch.memory_format, logging.Logger, threading.Thread, nn.parallel.DistributedDataParallel, nn.Linear),
    *(CSVLogger, np.ndarray, io.StringIO, io.TextIOWrapper, ArgumentParser, Mine, datetime.date),
    *(of_package("multiprocessing.pool"), of_package("tokenizers"), of_package("torch._dynamo.guards")),
    *(of_package("wandb.sdk"), of_package("torch.utils.tensorboard.writer")),
    *(Closes, torch.optim.Adam, weakref.WeakSet, Copies, deque, Plain),
)
"""Classes of all kinds that training steps have been seen to reach."""


def rule_of(cls: type) -> Rule:
    return next(rule for rule in RULES if rule.fits(cls))


def test_every_rule_has_a_reason():
    assert all(rule.why.strip().endswith(".") for rule in RULES)


def test_no_rule_is_behind_others_that_leave_it_nothing():
    reached = {rule_of(cls) for cls in SAMPLES}
    assert [rule.why for rule in RULES if rule not in reached] == []


@pytest.mark.parametrize("cls", [Plain, WithSlots, random.Random, array.array, nn.Linear, CSVLogger, CurvatureProbe])
def test_the_way_is_that_of_the_first_rule_that_fits(cls):
    assert way_of((), cls) is rule_of(cls).way


def test_rules_of_a_policy_come_first():
    first = (Rule(derived(list), refuse, "Nobody may have it."),)
    assert way_of(first, list) is refuse
    assert way_of((), list) is not refuse
    assert way_of(REPLICA.rules, torch.utils.data.TensorDataset) is keep
    assert way_of((), torch.utils.data.TensorDataset) is not keep


@pytest.mark.parametrize("kind", [Mine, CurvatureProbe, type(Phase.WARMUP), type, np.dtype("f4").type, torch.dtype])
def test_what_has_to_stay_the_same_object_does(kind):
    assert way_of(REPLICA.rules, kind) is keep
