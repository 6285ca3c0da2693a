"""Batches that go into a checkpoint and come back, and those of which nothing is kept."""

from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from lyapunov_lightning.training.data.kept_batches import batches_of, kept_batches
from lyapunov_lightning.training.replica.objective import ProbeBatch

Pair = namedtuple("Pair", "inputs targets")


def test_what_a_checkpoint_takes_comes_back_as_it_was(tmp_path: Path) -> None:
    image, label = torch.randn(2, 3), torch.tensor([1, 0])
    batch = {"images": [image, (label, None)], 3: ("a text", 2.5, b"bytes", True), "empty": []}
    torch.save(kept_batches([ProbeBatch(batch, 7, True), ProbeBatch(label, 8, False)]), tmp_path / "state.pt")
    first, second = batches_of(torch.load(tmp_path / "state.pt", weights_only=True)) or []
    assert (first.batch_idx, first.is_transferred, second.batch_idx, second.is_transferred) == (7, True, 8, False)
    assert list(first.batch) == list(batch)
    assert (first.batch[3], first.batch["empty"]) == (batch[3], [])
    [back, [label_back, nothing]] = first.batch["images"]
    assert (type(first.batch["images"][1]), nothing) == (tuple, None)
    assert torch.equal(back, image)
    assert torch.equal(label_back, label)
    assert torch.equal(second.batch, label)


@pytest.mark.parametrize(
    "batch",
    [
        Pair(torch.ones(2), torch.ones(2)),
        OrderedDict(inputs=torch.ones(2)),
        {("a", "tuple"): torch.ones(2)},
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(2).to_sparse(),
        [torch.ones(2), object()],
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_of_other_batches_nothing_is_kept(batch: Any) -> None:
    assert kept_batches([ProbeBatch(torch.ones(2), 0, True), ProbeBatch(batch, 1, True)]) is None


def test_nothing_comes_back_of_nothing() -> None:
    assert kept_batches(None) is None
    assert batches_of(None) is None


def test_nothing_comes_back_on_a_machine_without_the_devices() -> None:
    state = kept_batches([ProbeBatch(torch.ones(2), 0, True)])
    assert state is not None
    plain, devices = state
    assert devices == ["cpu"]
    assert batches_of([plain, ["xpu:63"]]) is None
