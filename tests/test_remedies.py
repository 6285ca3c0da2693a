"""What a message says to do, done on the case that brings it up: `measure` and the command line.

At the end every message of the package has either such a row, here or in the files of this name for the numerical core
and for the callbacks, or a reason why there is none.
"""

import ast
import functools
import io
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lyapunov_lightning import HessianConfig, SpectrumResult, kept_search, measure, search_under_way
from lyapunov_lightning.cli import main
from lyapunov_lightning.curvature.directions.plane import Plane
from tests.callbacks import test_remedies as of_callbacks
from tests.callbacks.test_remedies import Module, argument, bowl, loader, narrow
from tests.curvature import test_remedies as of_the_core
from tests.remedies import Row, check, heard, plain

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", ["lyapunov-lightning"])


def measured(data: Any = None, module: Any = None, **options: Any) -> SpectrumResult:
    """The largest eigenvalue is the one that is expected."""
    result = measure(Module() if module is None else module, loader() if data is None else data, **options)
    if result.num_largest and not result.is_interrupted:
        np.testing.assert_allclose(result.values[0], 3, rtol=1e-2)
    return result


# Data that are read again


class Numbers(Dataset):
    """Samples with noise: of the global generator, or of one of the dataset's own."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(1, generator=self.generator, dtype=torch.float64)


class Dwindling(IterableDataset):
    """A stream that has less each time."""

    def __init__(self) -> None:
        self.left = 9

    def __iter__(self) -> Iterator[Tensor]:
        self.left -= 1
        return iter(torch.zeros(self.left, 1))


def own_numbers() -> DataLoader:
    return DataLoader(Numbers(torch.Generator().manual_seed(0)), 4)


def once(count: int = 4) -> Iterator[Tensor]:
    return (torch.ones(4, 1, dtype=torch.float64) for _ in range(count))


def less_each_time() -> DataLoader:
    return DataLoader(Dwindling(), None)


ANEW = ("so they are read anew for every product",)

READINGS = [
    Row(
        "Batch 0 of data is another one when it is read again.",
        lambda: measured(own_numbers(), max_batch_bytes=0),
        {
            "Let the data draw from the global generators": lambda: measured(
                DataLoader(Numbers(None), 4), max_batch_bytes=0
            ),
            "hold them by a larger max_batch_bytes": lambda: measured(own_numbers(), max_batch_bytes=10**6),
            "or measure on fewer by max_batches": lambda: measured(own_numbers(), max_batch_bytes=40, max_batches=1),
        },
        also=ANEW,
    ),
    Row(
        "data give fewer batches when they are read again: 8 at first.",
        lambda: measured(less_each_time(), max_batch_bytes=0),
        {
            "hold them by a larger max_batch_bytes": lambda: measured(less_each_time(), max_batch_bytes=10**6),
            "or measure on fewer by max_batches": lambda: measured(less_each_time(), max_batch_bytes=4, max_batches=1),
        },
        also=ANEW,
    ),
    Row(
        "data should be something that can be read more than once, such as a dataloader: this generator gives",
        lambda: measured(once(), max_batch_bytes=100),
        {
            "such as a dataloader": lambda: measured(max_batch_bytes=10),
            "Raise that if there is the memory": lambda: measured(once(), max_batch_bytes=1000),
            "or measure on the first batches by max_batches": lambda: measured(
                once(), max_batch_bytes=100, max_batches=2
            ),
        },
        also=ANEW,
    ),
    Row(
        "the data of measure take more than max_batch_bytes = 40",
        lambda: measured(max_batch_bytes=40),
        {
            "Raise it where there is the memory": lambda: measured(max_batch_bytes=1000),
            "or the first ones will do: max_batches": lambda: measured(max_batch_bytes=40, max_batches=1),
        },
    ),
    Row(
        "hessian.fraction is of no use with data without a length, a generator.",
        lambda: measured(once(), hessian={"fraction": 0.5}),
        {"Pass num_batches": lambda: measured(once(), hessian={"num_batches": 2})},
    ),
    argument("data should give at least one batch", measured, once(0), {"at least one batch": once(1)}),
    argument(
        "data should be a dataloader, a dataset or a LightningDataModule, got int.",
        measured,
        3,
        {
            "a dataloader": loader(),
            "a dataset": loader().dataset,
            "a LightningDataModule": LightningDataModule.from_datasets(loader().dataset),
        },
    ),
]

# Arguments of `measure`


def drawn(**options: Any) -> None:
    plt.close(measured(largest=2, **options).plot_plane())


class Matrix(Module):
    """The same with a parameter that has filters."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1, 3, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return bowl(self.w[0])


def half(**options: Any) -> SpectrumResult:
    """Of a module in half precision."""
    return measured(module=narrow(), **options)


HALF = "measure evaluates the loss or its gradient at nearby parameters"

MEASURE = [
    argument(
        "largest and smallest should not both be 0 where no density or plane is asked for.",
        lambda options: measured(largest=0, **options),
        {},
        {"density": {"density": True}, "smallest": {"smallest": 1}},
    ),
    argument(
        "module should be a LightningModule, got Linear.",
        lambda module: measured(module=module),
        torch.nn.Linear(1, 1),
        {"LightningModule": Module()},
    ),
    argument(
        "hessian should not have data='batch': there is no step whose batch it could be.",
        lambda hessian: measured(hessian=hessian),
        {"data": "batch"},
        {"not have data='batch'": {}},
    ),
    Row(
        "hessian should not have data of its own: give them as data.",
        lambda: measured([], hessian=HessianConfig(data=loader())),
        {"give them as data": lambda: measured(loader())},
    ),
    Row(
        "max_batches and hessian.num_batches are two sizes of the same data, got 1 and 2.",
        lambda: measured(max_batches=1, hessian={"num_batches": 2}),
        {
            "leave one out": lambda: (measured(max_batches=1), measured(hessian={"num_batches": 2})),
        },
    ),
    Row(
        "measure(resume=...) keeps the search of one process, and the trainer has 2.",
        lambda: measured(resume="search.pt", trainer=SimpleNamespace(world_size=2)),
        {"or measure on one device": lambda: measured(resume="search.pt")},
    ),
    *(
        Row(
            HALF,
            lambda wrong=wrong: half(**wrong),
            {
                "Keep the parameters in float32": lambda wrong=wrong: measured(**wrong),
                remedy: lambda right=right: half(**right),
            },
        )
        for remedy, wrong, right in [
            ("leave lines out", {"lines": 1}, {}),
            ("leave plane out", {"plane": Plane(points=3), "largest": 2}, {"largest": 2}),
            ("leave lines out and leave plane out", {"lines": 1, "plane": Plane(points=3), "largest": 2}, {}),
            ("method='auto'", {"hessian": {"method": "finite_difference"}}, {"hessian": {"method": "auto"}}),
        ]
    ),
    Row(
        "No plane was measured. Ask for one, such as measure(..., plane=",
        drawn,
        {"measure(..., plane='random')": lambda: drawn(module=Matrix(), plane=Plane("random", points=3))},
    ),
]


# Searches that are kept, and results in files


def interrupted(**options: Any) -> None:
    """A measurement that is interrupted after its second product."""
    products = iter(range(1000))
    begin = search_under_way.Clock.begin_product

    def stopped(clock: Any) -> None:
        if next(products) == 1:
            os.kill(os.getpid(), 2)
        begin(clock)

    with (
        mock.patch.object(search_under_way.Clock, "begin_product", stopped),
        mock.patch.object(kept_search, "_EVERY_SECONDS", 0.0),
        redirect_stderr(io.StringIO()),
    ):
        measured(**options)


def on_other_weights(file: str = "search.pt", again: bool = False) -> None:
    """A search is kept, and a measurement of other weights, or of the same ones, is to go on with it."""
    heard(lambda: interrupted(resume="search.pt"))
    module = Module()
    if not again:
        with torch.no_grad():
            module.w.add_(1.0)
    measured(module=module, resume=file)


def another_file(name: str) -> None:
    Path("notes.txt").write_text("mine")
    measured(resume=name)


def saved(change: bool) -> None:
    """A result that goes through a file, which somebody may have changed."""
    measured().save("result.pt")
    if change:
        torch.save({"version": 0}, "result.pt")
    np.testing.assert_allclose(SpectrumResult.load("result.pt").values, [3.0], rtol=1e-2)


FILES = [
    Row(
        "measure was interrupted after 2 products of its search. Give a file to resume",
        interrupted,
        {"the same call goes on where it was interrupted": lambda: _goes_on()},
    ),
    argument(
        "resume should be a file in a folder that is there",
        lambda name: measured(resume=name),
        "nowhere/search.pt",
        {"in a folder that is there": "search.pt"},
    ),
    argument(
        "resume should be a file that measure keeps a search in, or the name of one to be.",
        another_file,
        "notes.txt",
        {"or the name of one to be": "search.pt"},
    ),
    Row(
        "keeps the search of another measurement, which differs in the weights.",
        on_other_weights,
        {
            "Measure what it was begun with": lambda: on_other_weights(again=True),
            "name another file": lambda: on_other_weights("other.pt"),
            "or remove this one": lambda: (Path("search.pt").unlink(missing_ok=True), measured(resume="search.pt")),
        },
    ),
    Row(
        "is no file that SpectrumResult.save of this version wrote",
        lambda: saved(change=True),
        {"Measure again": lambda: saved(change=False)},
    ),
]


def _goes_on() -> None:
    said, _ = heard(lambda: interrupted(resume="search.pt"))
    assert any("The same call goes on from search.pt" in text for text in said)
    assert Path("search.pt").exists()
    assert measured(resume="search.pt").converged.all()
    assert not Path("search.pt").exists()


# The command line


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader()


def command(*arguments: str) -> str:
    """Run a command; returns what it printed. What it refuses is raised as an error with its one line."""
    errors, output = io.StringIO(), io.StringIO()
    with redirect_stderr(errors), redirect_stdout(output), mock.patch("matplotlib.figure.Figure.savefig"):
        try:
            main(list(arguments))
        except SystemExit as exit:
            if exit.code:
                raise ValueError(errors.getvalue().strip().splitlines()[-1]) from None
    told = [line for line in errors.getvalue().splitlines() if "no --ckpt_path is given" in line]
    if told:
        raise ValueError(told[0])
    return output.getvalue()


MODEL = ("measure", "--model=tests.test_remedies.Module", "--largest=1", "--smallest=0")
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu")


def trained() -> str:
    """A checkpoint of the module."""
    of_callbacks.train(Module(), loader=loader(), max_steps=1).save_checkpoint("run.ckpt")
    return "--ckpt_path=run.ckpt"


def prints_three(*arguments: str) -> None:
    assert "\n1 " in command(*MODEL, *QUIET, *arguments)


DATA = "--data=tests.test_remedies.Data"


@functools.cache
def with_data_and_checkpoint() -> None:
    """What three of these messages lead to; once, since a command takes half a second."""
    prints_three(DATA, trained())


def examples(folder: str) -> None:
    Path("there/examples").mkdir(parents=True, exist_ok=True)
    for path in ("there/examples/data.py", "there/examples/models.py"):
        Path(path).write_text("mine")
    command("examples", folder)


def examples_where_mine_are_removed() -> None:
    for path in Path("there/examples").rglob("*.py"):
        path.unlink()
    command("examples", "there")


COMMANDS = [
    Row(
        "measure does not know on which data to measure.",
        lambda: prints_three(trained()),
        {"with --data": with_data_and_checkpoint},
    ),
    Row(
        "There is no checkpoint nowhere.ckpt.",
        lambda: prints_three(DATA, "--ckpt_path=nowhere.ckpt"),
        {"checkpoint": with_data_and_checkpoint},
    ),
    Row(
        "no --ckpt_path is given, so the weights are those that the configuration makes",
        lambda: prints_three(DATA),
        {"Name the checkpoint that is to be measured": with_data_and_checkpoint},
    ),
    Row(
        "is there already, and differs.",
        lambda: examples("there"),
        {"Remove it": examples_where_mine_are_removed, "or name another folder": lambda: examples("elsewhere")},
    ),
]

ROWS = [*READINGS, *MEASURE, *FILES, *COMMANDS]


@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_what_the_message_says_to_do_helps(row: Row) -> None:
    check(row)


# Every message has a row, or a reason why there is none


def template(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    """A message of the source as it is written, with … for what it fills in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return template(node.value, constants)
    if isinstance(node, ast.BinOp):
        return template(node.left, constants) + template(node.right, constants)
    if isinstance(node, ast.Name) and node.id in constants:
        return template(constants[node.id], constants)
    return "…"


TOLD = {"warn_once": 1, "guarded": 1, "warn": 0, "say": 0}
"""Which argument of a call is the message; of an error it is the first one."""


def messages() -> dict[str, str]:
    """All messages of the package, by place: errors, warnings and notes, and what is filled into them."""
    found = {}
    for path in sorted((ROOT / "lyapunov_lightning").rglob("*.py")):
        tree = ast.parse(path.read_text())
        assignments = [node for node in tree.body if isinstance(node, ast.Assign)]
        constants = {getattr(target, "id", ""): node.value for node in assignments for target in node.targets}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            is_error = name.endswith("Error") or name == "MisconfigurationException"
            place = TOLD.get(name, 0 if is_error else None)
            told = [keyword.value for keyword in node.keywords if keyword.arg == "refusal"]
            if place is not None and len(node.args) > place:
                told.append(node.args[place])
            for each in told:
                text = plain(template(each, constants))
                if sum(map(str.isalpha, text)) > 3:  # else it hands on what another one says
                    found[f"{path.relative_to(ROOT)}:{each.lineno}"] = text
    return found


def runs(text: str) -> set[tuple[str, ...]]:
    """All three words in a row of a message, and the words between two gaps that are fewer."""
    pieces = [[word.strip(".,:;()'") for word in piece.split()] for piece in text.split("…")]
    return {
        tuple(words[place : place + 3]) for words in pieces if any(words) for place in range(max(1, len(words) - 2))
    }


def is_about(part: set[tuple[str, ...]], message: set[tuple[str, ...]]) -> bool:
    """Whether a part of a message as it was said is of a message of the source, by the words that they share."""
    return len(part & message) >= 0.5 * min(len(part), len(message))


IT_IS_SO = """
module … has no attribute
The step returned None for the probed batch, so there was no backward pass.
The step returned None for the probed batch, so there is no loss to differentiate.
The module's on_train_batch_start skips the rest of the epoch, and so the step.
The optimizer did not move the parameters, as where a loss scaler skips a step or the training step returned None
The step was made with a learning rate of …: its update at 1 is not known.
The step, of length …, is lost in the rounding of the parameters, of norm ….
The parameters are not finite after the step.
The loss or its slope along the step is not finite.
The gradient at the present parameters is not finite.
The loss is …, which is not finite, where the update begins.
The loss or its gradient is not finite at the present parameters.
The curvature along a random direction is not finite.
The loss is …, which is not finite.
The gradient at or near the present parameters (distance …) is not finite.
The slope or the curvature of a batch along its own step is not finite.
The product of the followed vector is not finite.
The slope (…) or the curvature (…) along the update is not finite.
the stability limit of … is not known.
the trainable parameters are not those whose eigenvectors were measured, so the gradient is left alone
the learning rate was halved. This is said once.
The measurement that is shared with another callback failed
drawn in
"""
"""What says how things are, and names nothing to do."""

PART_OF_ANOTHER = """
cannot measure …: ….
… The reason: …
it is of another version
num_largest is …, of … eigenvalues
… has the shape …, of … eigenvalues
a plane has other numbers of coordinates and losses
a line has unequal numbers of distances and losses
a tensor of the shape … is not in it
it is compressed
there are unequal numbers of steps and losses
… is no count.
… should be a step, got …
… should not be a …
a … cannot be copied: …
a … acts when it is deleted, and so would its copy
a … is shared by processes
it draws from a …, which would take items away from the training
the dataset writes to a tensor that is too large to be copied
a … of … bytes is too large to be copied
more than … objects would have to be copied
a … continues from where it is, and exists only once
there is no name to open it by
it is not written in Python
The parameters are spread otherwise (over several device meshes).
The parameters are spread otherwise (…).
measure: the search for eigenvalues has not converged.
"""
"""What is only said within a message that has a row, or that is listed here: the cause, and no remedy of its own."""

OF_SEVERAL_RANKS = """
the move after step … was not made, since another rank could not measure.
The ranks have different callbacks of lyapunov_lightning, and would wait for each other forever
No rank has a batch to measure the curvature on.
No way to a product of this sharded model is right (…).
the model is sharded, and products are computed
The training step writes to its parameters, which sharded ones do not allow for in a replay.
This rank has no batch, without which no rank can evaluate a sharded model.
The ranks have different numbers of batches, or none.
method=… has no room on this rank: …. Raise HessianConfig(max_gather_bytes=...), or use method='auto'.
"""
"""What one process cannot bring up: see `tests/distributed`."""

OF_THE_MACHINE = """
The command line needs jsonargparse. Install it with pip install
to_scipy needs SciPy, which this package does without: pip install scipy.
…(save_vectors=True) writes safetensors files. Install the package with pip install
… needs pandas. Install it with pip install pandas.
Products could not be compiled, and are computed as they are without compile, right and slower.
the compiled product is off by … of its size
the graphs of this loss are of more than … kinds, such as lengths of batches
measure is finished and cannot remove
measure cannot keep its search in …, and goes on without
… does not take what was measured, and training goes on. It waits and is logged later, where that is possible.
what was measured cannot be written to save_dir, and training goes on. It waits and is written later
a figure could not be shown.
a text could not be logged.
… entries could not be logged or written until the end of the run.
The progress bar of a measurement cannot be drawn
A measurement failed, and training goes on without it. There was no memory to say why.
"""
"""A package that is missing, no compiler, a disk that is full, a logger out of reach: here all is there. That training
goes on, and that what waited is written, is tried in `tests/training/reporting` and in
`tests/curvature/loss/test_compiled.py`."""

A_FAULT_OF_THE_PACKAGE = """
the measurement could not be judged, and training goes on.
what was measured cannot be logged, and training goes on.
the layout of charts could not be logged, and training goes on.
A training batch cannot be copied, and so not be kept
The model has … trainable parameters, fewer than the … + … eigenvalues asked for.
Neither … has ….
… does not have ….
"""
"""What nothing is known to bring up: the copier hands through what it cannot copy, and sizes are checked before. The
tests of these modules replace a part of the package to see them."""

WITHOUT_A_ROW = [
    line
    for reason in (IT_IS_SO, PART_OF_ANOTHER, OF_SEVERAL_RANKS, OF_THE_MACHINE, A_FAULT_OF_THE_PACKAGE)
    for line in reason.strip().splitlines()
]


def about(told: Mapping[str, str]) -> dict[str, list[str]]:
    """For each message of the source what is tried of it, and the reasons why nothing is."""
    parts = [*(row.says for row in (*ROWS, *of_callbacks.ROWS, *of_the_core.ROWS)), *WITHOUT_A_ROW]
    known = {part: runs(part) for part in parts}
    return {
        place: [part for part, words in known.items() if is_about(words, runs(text))] for place, text in told.items()
    }


def test_every_message_has_a_row_or_a_reason() -> None:
    told = messages()
    assert len(told) > 200
    found = about(told)
    assert [(place, told[place]) for place, parts in found.items() if not parts] == []
    assert set(WITHOUT_A_ROW) <= {part for parts in found.values() for part in parts}, "No message says that any more."


def test_a_message_without_a_row_is_noticed() -> None:
    new = "… cannot measure on a Tuesday. Wait until Wednesday, or pass weekday='any'."
    assert about({"here": new}) == {"here": []}
