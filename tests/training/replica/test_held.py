"""A replica that ends is emptied, but for what somebody else holds and all that can be reached from there."""

import io
from typing import Any

import torch
from torch import nn

from lyapunov_lightning.training.replica.copier import Copier
from lyapunov_lightning.training.replica.held import discard, held_from_outside, surviving
from lyapunov_lightning.training.replica.memo import Memo


class Node:
    def __init__(self, **content: Any) -> None:
        vars(self).update(content)


def ring() -> Node:
    """An object that leads back to itself by way of others."""
    first = Node(entries=[], child=Node(number=1))
    first.entries.append(first)
    first.child.parent = first
    return first


def test_what_nobody_else_holds_is_emptied():
    copier = Copier()
    copier(ring())
    attributes = [vars(one) for one in copier.memo.owned]
    assert all(attributes)
    assert discard(copier.memo).pairs == []
    assert attributes == [{}, {}]
    assert not copier.memo.copies


def test_what_is_held_stays_whole_with_all_that_it_leads_to():
    copier, original = Copier(), Node(held=Node(child=Node(number=1)), other=Node(number=2))
    copied = copier(original)
    held, child, other = copied.held, copied.held.child, vars(copied.other)
    del copied
    ended = discard(copier.memo)
    assert ended.pairs[0] == (original.held, held)
    assert held.child is child
    assert child.number == 1
    assert other == {}


def test_containers_that_the_step_has_made_hold_nothing_by_themselves():
    copier = Copier()
    copied = copier(ring())
    copied.made = {"me": copied, "parts": (copied.child, [copied.entries.append])}
    del copied
    assert discard(copier.memo).pairs == []


def test_the_cells_of_a_closure_are_held_by_its_function():
    entries = ring().entries
    copier = Copier()
    copier([lambda: entries.append(1)])
    assert discard(copier.memo).pairs == []


def test_a_list_that_is_held_is_found_without_a_weak_reference():
    copier, original = Copier(), Node(history=[1], other=[2])
    cache = [copier(original).history]
    (survivor,) = surviving([discard(copier.memo)])
    assert survivor.original is original.history
    assert survivor.copied is cache[0]
    cache.clear()
    assert survivor.copied is None


class Equal:
    """Of which there is one for all that are equal, whoever else has made another."""

    only: Any = None

    def __init__(self) -> None:
        self.name = "equal"

    def __reduce__(self) -> Any:
        return Equal.the_only, ()

    @staticmethod
    def the_only() -> "Equal":
        return Equal.only


def test_what_a_class_keeps_of_its_own_accord_is_left_to_it():
    Equal.only = Equal()
    copier = Copier()
    assert copier([Equal()])[0] is Equal.only
    assert discard(copier.memo).pairs == []
    assert Equal.only.name == "equal"


def test_tensors_that_a_graph_holds_are_found():
    copier, original = Copier(), nn.Linear(2, 1)
    value = copier(original)(torch.ones(2)).sum()  # whose graph holds the parameters
    survivors = surviving([discard(copier.memo)])
    assert {id(survivor.original) for survivor in survivors} == set(map(id, original.parameters()))
    del value
    assert {survivor.copied for survivor in survivors} == {None}


def test_references_from_among_the_objects_do_not_count():
    first, second = Node(), Node()
    first.other, second.other = second, first
    objects = [first, second, vars(first), vars(second)]
    del first, second
    assert held_from_outside(objects) == []
    kept = objects[1]
    assert held_from_outside(objects) == [kept]


def test_files_are_closed():
    memo, file = Memo(), io.StringIO()
    memo.files.append(file)
    discard(memo)
    assert file.closed
