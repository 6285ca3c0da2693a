"""Cases: what a seed puts together, as a description for people and as a file of Python.

>>> print(case_of(0))  # doctest: +SKIP
>>> print(case_of(0).source())  # doctest: +SKIP
"""

import random
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from tests.generator import data, habits, layers, objects, readers, state, training
from tests.generator.ingredients import Batch, Ingredient, Layer, Loader, Optimizer, Option, State
from tests.generator.readers import Reader

STATES = [
    *state.ATTRIBUTES,
    *state.TENSORS,
    *state.CODE,
    *objects.OBJECTS,
    *objects.REFERENCES,
    *objects.LIBRARIES,
    *habits.GENERATORS,
    *habits.ITERATORS,
    *habits.METRICS_AND_LOGS,
    *habits.DERIVATIVES,
    *habits.WRITES,
    *habits.TRAINER,
]

FIRST_SLOW_SEED = 100
"""Ingredients that take long are drawn for seeds from here on."""

_T = TypeVar("_T", bound=Ingredient)


@dataclass(frozen=True)
class Case:
    """One module with its data, its optimizer, its trainer and the callbacks that must not show."""

    seed: int
    dtype: str = "float64"
    layers: tuple[Layer, ...] = ()
    states: tuple[State, ...] = ()
    batch: Batch = data.BATCHES[0]
    loader: Loader = data.LOADERS[0]
    optimizer: Optimizer = training.OPTIMIZERS[0]
    options: tuple[Option, ...] = ()
    callbacks: tuple[Option, ...] = ()
    readers: tuple[Reader, ...] = field(default=(), hash=False)

    def __str__(self) -> str:
        parts = [
            self.layers,
            self.states,
            (self.batch,),
            (self.loader,),
            (self.optimizer,),
            self.options,
            self.callbacks,
        ]
        written = [" + ".join(map(str, part)) or "-" for part in (*parts, self.readers)]
        return f"seed {self.seed}: {self.dtype} | " + " | ".join(written)

    def ingredients(self) -> Iterator[Ingredient]:
        """All of them but the callbacks under test."""
        yield from (*self.layers, *self.states, self.batch, self.loader, self.optimizer, *self.options, *self.callbacks)

    @property
    def measurable(self) -> bool:
        """Whether every measurement must succeed."""
        return all(ingredient.measurable for ingredient in self.ingredients())

    @property
    def exact(self) -> bool:
        """Whether eigenvalues are compared with a dense Hessian."""
        return all(ingredient.exact for ingredient in self.ingredients())

    @property
    def always_a_loss(self) -> bool:
        """Whether each batch brings a loss to measure."""
        return not any("every batch has a loss" in state.excludes for state in self.states)

    def settings(self) -> dict[str, Any]:
        """Arguments of the Trainer."""
        chosen = {
            "max_steps": 4,
            "max_epochs": -1,
            "log_every_n_steps": 2,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
        }
        for option in self.options:
            chosen.update(option.settings)
        return chosen

    def smaller(self) -> Iterator["Case"]:
        """The cases with one ingredient less, or with a plainer one."""
        for name in ("callbacks", "options", "readers", "layers", "states"):
            members = getattr(self, name)
            for left_out in range(len(members)):
                yield replace(self, **{name: members[:left_out] + members[left_out + 1 :]})
        plain = {"batch": data.BATCHES[0], "loader": data.LOADERS[0], "optimizer": training.OPTIMIZERS[0]}
        for name, plainest in plain.items():
            if getattr(self, name) is not plainest:
                yield replace(self, **{name: plainest})

    def source(self, reference: bool = False) -> str:
        """The user's file.

        Args:
            reference: With the replacements that make every derivative available to plain autograd.

        """
        text = _TEMPLATE
        named_layers = [(f"layer{i}", layer) for i, layer in enumerate(self.layers)]
        named_states = [(f"state{i}", state) for i, state in enumerate(sorted(self.states, key=_returns_result))]
        others = [self.batch, self.loader, self.optimizer, *self.callbacks]
        above = [(name, one.above) for name, one in (*named_layers, *named_states)] + [
            ("", one.above) for one in others
        ]
        after_init = [(name, layer.after) for name, layer in named_layers]
        scheduled = self.optimizer.scheduler
        pieces = {
            "DESCRIPTION": str(self),
            "DTYPE": self.dtype,
            "UNPACK_BATCH": _lines([("", self.batch.unpack)]),
            "PACK": self.batch.pack or "x, y",
            "ABOVE": "\n\n".join(text.strip().replace("$", name) + "\n" for name, text in above if text),
            "NET_INIT": _lines([(name, layer.init) for name, layer in named_layers]),
            "NET_FORWARD": _lines([(name, layer.forward) for name, layer in named_layers]),
            "INIT": _lines(after_init + [(name, state.init) for name, state in named_states]),
            "UNPACK": _lines([("", self.loader.unpack)]),
            "BEFORE": _lines([(name, state.before) for name, state in named_states]),
            "STEP": _lines([(name, state.step) for name, state in named_states]),
            "METHODS": _lines([(name, state.methods + "\n") for name, state in named_states if state.methods]),
            "RESULT": "result" if any(map(_returns_result, self.states)) else "loss",
            "OPTIMIZER": self.optimizer.build,
            "OPTIMIZERS": "optimizer" if not scheduled else "[optimizer], [scheduler]",
            "SCHEDULER": f"scheduler = {scheduled}" if scheduled else "",
            "LOADER": self.loader.build.replace("POINTS", self.loader.dataset),
            "CALLBACKS": ", ".join(option.callback for option in self.callbacks),
            "TRAINER": repr(self.settings()),
        }
        pieces["COLLATE"] = collate = ", collate_fn=collate" if self.batch.pack else ""
        pieces["LOADER"] = pieces["LOADER"].replace(", COLLATE", collate)
        for name, piece in pieces.items():
            text = _put(text, f"<{name}>", piece)
        if reference:
            for ingredient in self.ingredients():
                if ingredient.reference[0]:
                    text = text.replace(*ingredient.reference)
        return text


def case_of(seed: int) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    taken: list[Ingredient] = []

    def pick(candidates: list[_T]) -> _T:
        chosen = rng.choice([one for one in candidates if _fits(one, taken, seed)])
        taken.append(chosen)
        return chosen

    def some(candidates: list[_T], counts: list[int]) -> tuple[_T, ...]:
        return tuple(pick(candidates) for _ in range(rng.choice(counts)))

    optimizer, loader, batch = pick(training.OPTIMIZERS), pick(data.LOADERS), pick(data.BATCHES)
    options, callbacks = some(training.OPTIONS, [0, 1, 1, 2]), some(training.CALLBACKS, [0, 0, 1])
    parts, states = some(layers.LAYERS, [1, 1, 2]), some(STATES, [1, 2, 2])
    dtype = _dtype(rng, options)
    return Case(
        seed, dtype, parts, states, batch, loader, optimizer, options, callbacks, readers.readers_of(rng, dtype)
    )


def covering_cases() -> list[Case]:
    """Few cases that together hold every ingredient that is not slow, each of them many.

    What cannot be measured, or is not compared with a dense Hessian, is in cases of its own and costs no other
    ingredient its comparison. Where a case does not train by itself, two of its ingredients do not go together and need
    a tag that excludes them.

    """
    rng = random.Random(5)
    cases: list[Case] = []
    for is_plain in (True, False):
        waiting = [
            _waiting([one for one in kind if not one.slow and (one.exact and one.measurable) is is_plain], rng)
            for kind in KINDS
        ]
        while any(waiting):
            left = sum(map(len, waiting))
            cases.append(_crowded(len(cases), rng, waiting))
            if sum(map(len, waiting)) == left:
                raise ValueError(f"nothing provides what they need: {waiting}")
    return cases


KINDS: list[list[Any]] = [
    training.OPTIMIZERS,
    data.LOADERS,
    data.BATCHES,
    training.OPTIONS,
    training.CALLBACKS,
    layers.LAYERS,
    STATES,
]
_MOST = (1, 1, 1, 1, 1, 3, 7)
"""Of each kind in a crowded case: with these the ingredients of all kinds run out after about as many cases."""


def _waiting(candidates: list[_T], rng: random.Random) -> list[_T]:
    """In random order, but first of all what needs another ingredient that is itself in few cases."""
    return sorted(rng.sample(candidates, len(candidates)), key=lambda one: not one.needs)


def _crowded(seed: int, rng: random.Random, waiting: list[list[Any]]) -> Case:
    """The case of the next ingredients that go together, which wait no longer."""
    taken: list[Ingredient] = []
    parts: list[tuple[Any, ...]] = []
    for candidates, most in zip(waiting, _MOST, strict=True):
        chosen: list[Any] = []
        for one in [*candidates]:
            if len(chosen) < most and _fits(one, taken, 0):
                candidates.remove(one)
                chosen.append(one)
                taken.append(one)
        parts.append(tuple(chosen))
    first = [chosen[0] if chosen else kind[0] for chosen, kind in zip(parts[:3], KINDS, strict=False)]
    optimizer, loader, batch = first
    _, _, _, options, callbacks, chosen_layers, states = parts
    dtype = _dtype(rng, options)
    turn = readers.readers_in_turn(seed, dtype)
    return Case(seed, dtype, chosen_layers, states, batch, loader, optimizer, options, callbacks, turn)


def _dtype(rng: random.Random, options: tuple[Option, ...]) -> str:
    precision = next((option.settings["precision"] for option in options if "precision" in option.settings), None)
    return {"64-true": "float64", "bf16-mixed": "float32"}.get(precision, rng.choice(["float64"] * 3 + ["float32"]))


def _fits(one: Ingredient, taken: list[Ingredient], seed: int) -> bool:
    if one.slow and seed < FIRST_SLOW_SEED:
        return False
    if one in taken and not isinstance(one, (Layer, State)):
        return False
    provided = frozenset().union(*(other.provides for other in taken))
    return one.needs <= provided and not any(one.excludes & other.excludes for other in taken)


def _returns_result(state: State) -> bool:
    return "result" in state.excludes


def _lines(pieces: list[tuple[str, str]]) -> str:
    return "\n".join(text.replace("$", name) for name, text in pieces if text)


def _put(text: str, mark: str, piece: str) -> str:
    """Put lines in the place of a mark, as deep as the mark is; a mark with nothing to put there leaves no line."""
    lines = []
    for line in text.splitlines():
        if line.strip() == mark:
            indent = line[: len(line) - len(line.lstrip())]
            lines += textwrap.indent(piece, indent).splitlines()
        else:
            lines.append(line.replace(mark, piece))
    return "\n".join(lines) + "\n"


_TEMPLATE = '''"""<DESCRIPTION>"""
import array, collections, contextvars, copy, dataclasses, functools, io, itertools, logging, random, threading
import types, weakref

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import torchmetrics
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

torch.set_default_dtype(torch.<DTYPE>)


def pack(x, y):
    return <PACK>


def unpack(batch):
    <UNPACK_BATCH>
    return x, y


def collate(samples):
    return pack(*default_collate(samples))


class Points(torch.utils.data.Dataset):
    def __init__(self):
        rng = np.random.RandomState(0)
        self.x = torch.as_tensor(rng.normal(size=(18, 4))).to(torch.<DTYPE>)
        self.y = torch.stack([self.x.prod(dim=1), (2 * self.x[:, 0]).sin()], dim=1)

    def __len__(self):
        return 18

    def __getitem__(self, i):
        return self.x[i].clone(), self.y[i].clone()


<ABOVE>


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        <NET_INIT>
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        <NET_FORWARD>
        return self.last(h)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()
        <INIT>

    def training_step(self, batch, batch_idx, backward=True):
        <UNPACK>
        <BEFORE>
        out = self.net(x)
        loss = F.mse_loss(out, y)
        <STEP>
        self.log("loss", loss.detach(), batch_size=len(x))
        return <RESULT>

    def validation_step(self, batch, batch_idx):
        x, y = unpack(batch)
        self.log("val_loss", F.mse_loss(self.net(x), y), batch_size=len(x))

    def configure_optimizers(self):
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = <OPTIMIZER>
        <SCHEDULER>
        return <OPTIMIZERS>

    <METHODS>


def loader():
    <LOADER>


def val_loader():
    return DataLoader(Points(), 6<COLLATE>)


def callbacks():
    return [<CALLBACKS>]


TRAINER = <TRAINER>
'''
