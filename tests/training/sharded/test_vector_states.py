"""Vectors in the states of callbacks are found by their names, and nothing else is taken for one."""

from typing import Any

import torch

from lyapunov_lightning.training.sharded.vector_states import converted_vectors, without_vectors

STATE: dict[str, Any] = {
    "start": {"vector": torch.arange(4.0)},
    "frozen": {"vectors": {3: torch.ones(2, 4), 7: torch.zeros(2, 4)}},
    "blocks": {"head": {"start": torch.ones(3), "count": 2}},
    "losses": {"values": torch.ones(4)},
    "lr": 0.1,
}


def test_each_row_is_converted_in_its_place() -> None:
    found = converted_vectors(STATE, 4, lambda rows: torch.cat([rows, -rows], dim=1))
    assert torch.equal(found["start"]["vector"], torch.tensor([0.0, 1, 2, 3, 0, -1, -2, -3]))
    assert {step: tuple(rows.shape) for step, rows in found["frozen"]["vectors"].items()} == {3: (2, 8), 7: (2, 8)}


def test_what_is_no_vector_stays_and_vectors_of_another_length_are_left_out() -> None:
    found = converted_vectors(STATE, 4, lambda rows: rows)
    assert found["losses"] is STATE["losses"]
    assert found["lr"] == 0.1
    assert found["blocks"] == {"head": {"start": None, "count": 2}}


def test_without_vectors_none_is_left() -> None:
    found = without_vectors(STATE)
    assert found["start"] == {"vector": None}
    assert found["frozen"] == {"vectors": {3: None, 7: None}}
    assert found["losses"] is STATE["losses"]


def test_a_state_without_vectors_is_the_same_object() -> None:
    state = {"schedule": {"passed": 3}, "start": {"vector": None}}
    assert without_vectors(state) is state
