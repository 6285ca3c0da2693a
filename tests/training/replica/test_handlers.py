"""Functions, references, views and files are copied with what they keep, and without a trace in the original."""

import functools
import gzip
import math
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.training.replica.copier import Copier, Exhausted
from lyapunov_lightning.training.replica.held import discard


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def increase(self) -> int:
        self.count += 1
        return self.count


def stateless(number: int) -> int:
    return number


def test_a_function_without_state_is_itself_and_what_is_written_to_it_goes():
    copier = Copier()
    assert copier(stateless) is stateless
    stateless.calls = 3
    copier.memo.forget()
    assert not hasattr(stateless, "calls")


def test_a_closure_counts_on_its_own_and_keeps_names_that_are_not_bound_yet():
    count = 0

    def counting() -> int:
        nonlocal count
        count += 1
        return later() if count > 5 else count

    copied = Copier()(counting)
    assert [copied(), copied()] == [1, 2]
    assert count == 0
    assert copied.__qualname__ == counting.__qualname__

    def later() -> int:
        return 0


def test_a_bound_method_is_the_copys():
    counter = Counter()
    increase, append = Copier()([counter.increase, [].append])
    assert increase() == 1
    assert counter.count == 0
    append(1)
    assert append.__self__ == [1]
    assert Copier()(math.sqrt) is math.sqrt


def test_a_cache_begins_empty_and_keeps_no_copy_alive():
    @functools.lru_cache(maxsize=3)
    def remembered(counter: Counter) -> int:
        return counter.increase()

    remembered(Counter())
    copied = Copier()(remembered)
    copied(Counter())
    assert copied.cache_parameters() == remembered.cache_parameters()
    assert remembered.cache_info().misses == 1


def test_references_lead_to_the_copy():
    counter = Counter()
    values = weakref.WeakValueDictionary(a=counter)
    copied, reference, entries = Copier()([counter, weakref.ref(counter), values])
    assert reference() is copied
    assert entries["a"] is copied
    gone = weakref.ref(Counter())
    assert Copier()(gone)() is None


def test_views_show_the_copy():
    mapping, memory = {"a": 1}, bytearray(b"abc")
    copied, items, view, part = Copier()([mapping, mapping.items(), memoryview(memory), memoryview(memory)[1:]])
    copied["b"] = 2
    assert list(items) == [("a", 1), ("b", 2)]
    view[0] = part[0] = 0
    assert memory == b"abc"


def test_a_lock_that_is_held_is_free_in_the_copy():
    for make in (threading.Lock, threading.RLock):
        lock = make()
        with lock:
            assert Copier()(lock).acquire(timeout=1)


def test_a_file_is_read_on_from_its_place_and_written_to_nowhere(tmp_path: Path):
    path = tmp_path / "lines.txt"
    path.write_text("one\ntwo\nthree\n")
    copier = Copier()
    with path.open() as file, (tmp_path / "out.txt").open("w") as out:
        file.readline()
        read, written = copier([file, out])
        assert read.readline() == "two\n"
        written.write("anything")
        assert file.readline() == "two\n"
    discard(copier.memo)
    assert read.closed
    assert (tmp_path / "out.txt").read_text() == ""


def compressed(path: Path) -> Any:
    with gzip.open(path, "wb") as file:
        file.write(b"text")
    return gzip.open(path)


def piped(path: Path) -> Any:
    incoming, outgoing = os.pipe()
    with os.fdopen(outgoing, "w") as file:
        file.write("text")
    return os.fdopen(incoming, "rb")


def by_its_descriptor(path: Path) -> Any:
    path.write_text("text")
    return os.fdopen(os.open(path, os.O_RDONLY), "rb")


@pytest.mark.parametrize("opened", [compressed, piped, by_its_descriptor])
def test_a_file_without_a_name_of_its_own_refuses_to_be_read_and_stays_open(tmp_path, opened):
    with opened(tmp_path / "file") as file:
        copier = Copier()
        copied: Any = copier(file)
        assert isinstance(copied, Exhausted)
        with pytest.raises(MeasurementError, match=f"draws from a {type(file).__name__}"):
            next(copied)
        discard(copier.memo)
        del copied
        assert file.read() == b"text"
