"""One object has one copy, whatever else is made and goes meanwhile; and what was copied can be undone and counted."""

import pytest

from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.training.replica.memo import Limits, Memo


class Thing:
    def __init__(self, number: int = 0) -> None:
        self.number = number


def test_a_copy_is_found_by_its_original():
    memo, original, copied = Memo(), Thing(), Thing()
    assert not memo.has(original)
    assert memo.note(original, copied) is copied
    assert memo.has(original)
    assert memo.copy_of(original) is copied
    with pytest.raises(KeyError):
        memo.copy_of(copied)


def test_an_object_made_on_the_way_is_not_taken_for_another_at_its_address():
    memo = Memo()
    for number in range(100):  # without a reference the next one would be made at the same address
        memo.note(Thing(number), Thing(number))
    assert not memo.has(Thing())
    assert len(memo.copies) == 100


def test_what_was_written_to_stateless_objects_is_forgotten():
    memo, thing = Memo(), Thing(1)
    memo.stateless.append(thing)
    memo.forget()
    assert vars(thing) == {}


def test_bytes_are_counted_until_they_are_used_up():
    limits = Limits(objects=5, num_bytes=100)
    assert limits.affords(60)
    assert not limits.affords(41)
    assert limits.affords(40)
    assert not limits.affords(1)


def test_as_many_objects_as_may_be_are_copied_and_no_more():
    limits = Limits(objects=1000, num_bytes=0)
    limits.check_number(999)
    with pytest.raises(MeasurementError, match="more than 1,000 objects would have to be copied"):
        limits.check_number(1000)
