"""What tells of a failure cannot fail itself."""

import sys
import warnings

import pytest

from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.training.reporting import telling


class BrokenError(Exception):
    def __str__(self) -> str:
        raise ValueError("broken on purpose")


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_an_exception_is_described_with_its_place():
    line = raised.__code__.co_firstlineno + 2
    told = telling.described(raised(ValueError("a word")), with_place=True)
    assert told == f"ValueError at {__file__}:{line}: a word"
    assert telling.described(KeyError("a")) == "KeyError: 'a'"


def test_an_exception_whose_message_is_broken_is_described_all_the_same():
    assert telling.described(raised(BrokenError())) == "BrokenError: its message cannot be shown"


def test_an_exception_that_was_never_raised_has_no_place():
    assert telling.described(ValueError("a word"), with_place=True) == "ValueError: a word"


def test_no_file_is_read_for_a_description(monkeypatch):
    def no_memory(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("linecache.getlines", no_memory)
    monkeypatch.setattr("traceback.extract_tb", no_memory)
    assert "a word" in telling.described(raised(ValueError("a word")), with_place=True)


def test_a_warning_that_is_an_error_is_said_on_the_console(said_in_place_of_warnings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        telling.warn("in words")
    assert said_in_place_of_warnings == ["in words"]
    said_in_place_of_warnings.clear()
    with pytest.warns(CurvatureWarning, match="in words"):
        telling.warn("in words")


def test_a_console_that_is_closed_is_no_matter(monkeypatch):
    monkeypatch.undo()  # of what collects the messages
    monkeypatch.setattr(sys, "stderr", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        telling.warn("in words")
