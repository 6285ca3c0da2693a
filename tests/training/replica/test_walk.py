"""Everything that a value refers to is copied once, whatever it refers back to and however its class is copied."""

import threading
from typing import Any

import pytest
import torch
from torch import nn

from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.training.replica.copier import Copier, Policy
from lyapunov_lightning.training.replica.memo import Limits


class Node:
    def __init__(self, content: Any = None) -> None:
        self.content = content


def test_what_refers_back_is_one_copy():
    entries: list[Any] = []
    pair = (entries, 1)
    entries.append(pair)
    mapping: dict[Any, Any] = {"me": None, "pair": pair}
    mapping["me"] = mapping
    copied = Copier()(mapping)
    assert copied is not mapping
    assert copied["me"] is copied
    assert copied["pair"] is not pair
    assert copied["pair"][0][0] is copied["pair"]


def test_tuples_of_what_nothing_is_written_to_are_themselves():
    fixed, loose = (1, "a", (2.0, None)), ([],)
    assert Copier()(fixed) is fixed
    assert Copier()(loose) is not loose


def test_keys_are_copied_like_entries():
    key = Node(1)
    copied = Copier()([key, {key: 2}])
    assert copied[1][copied[0]] == 2
    assert copied[0] is not key


def test_a_long_chain_is_no_deeper_than_its_links():
    first = last = Node()
    for _ in range(200):
        last.content = Node()
        last = last.content
    copied, length = Copier()(first), 0
    while copied is not None:
        copied, length = copied.content, length + 1
    assert length == 201


class Reluctant:
    """Refuses to be pickled, as objects do that hold a lock."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.lock = threading.Lock()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("not to be pickled")


class OwnCopy:
    """Copies itself, with what others refer to as well."""

    def __init__(self, shared: Any) -> None:
        self.shared = shared

    def __deepcopy__(self, memo: dict[int, Any]) -> "OwnCopy":
        return OwnCopy(memo[id(self.shared)])


def test_what_cannot_be_pickled_is_copied_by_its_attributes():
    original = Reluctant()
    copied = Copier()(original)
    copied.seen.append(1)
    assert original.seen == []
    assert copied.lock is not original.lock


def test_a_copy_of_its_own_making_is_told_of_the_others():
    shared: list[int] = []
    copied = Copier()([shared, OwnCopy(shared)])
    assert copied[1].shared is copied[0]
    assert copied[0] is not shared


class Opinionated(nn.Module):
    """Leaves its hooks out when it is pickled, and sets only what it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def __getstate__(self) -> Any:
        return {**vars(self), "_forward_hooks": {}}

    def __deepcopy__(self, memo: Any) -> "Opinionated":
        raise NotImplementedError


def test_modules_are_copied_with_all_that_they_have():
    module = Opinionated()
    calls: list[int] = []
    module.layer.register_forward_hook(lambda *_: calls.append(1))
    copier = Copier()
    copied = copier(module)
    copied.layer(torch.ones(1, 1))
    assert calls == []
    assert len(copied.layer._forward_hooks) == 1
    assert copier.memo.modules == [copied.layer, copied]


def test_compiled_modules_have_parameters_of_their_own():
    linear = nn.Linear(2, 2)
    module = torch.jit.script(nn.Sequential(linear))
    copied = next(Copier()([linear, module])[1].parameters())
    assert torch.equal(copied, linear.weight)
    assert copied.data_ptr() != linear.weight.data_ptr()
    assert copied.requires_grad


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Limits(objects=10, num_bytes=10**6), "more than 10 objects"),
        (Limits(objects=10**6, num_bytes=500), r"a Node of \d+ bytes is too large"),
    ],
    ids=["objects", "bytes"],
)
def test_a_copy_within_limits_is_complete_or_refused(limits, said):
    copier = Copier(Policy(limits=limits))
    assert len(copier([Node(), Node()])) == 2
    with pytest.raises(MeasurementError, match=said):
        copier([Node() for _ in range(20)])


def test_a_policy_says_what_stands_for_what_cannot_be_copied():
    handle = torch._C.Graph()  # made in C++, and without a protocol
    reasons: list[str] = []

    def replaced(value: Any, error: Exception) -> Any:
        reasons.append(str(error))
        return "instead"

    assert Copier(Policy(uncopied=replaced))([handle]) == ["instead"]
    assert len(reasons) == 1
