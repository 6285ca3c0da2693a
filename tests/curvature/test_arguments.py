"""A bad argument is an error that names argument and value."""

from typing import Literal

import pytest

from lyapunov_lightning.curvature.arguments import check_choice, check_int, check_positive, made_of
from lyapunov_lightning.training.schedule import Schedule


def test_a_choice_is_one_of_a_literals_values():
    check_choice("end", "both", Literal["largest", "both"])
    with pytest.raises(ValueError, match="`end` should be one of largest, both, got 'Both'"):
        check_choice("end", "Both", Literal["largest", "both"])


@pytest.mark.parametrize(("value", "least"), [(-1, 0), (0, 1), (2.0, 1), (True, 1), ("3", 1), (None, 0)])
def test_a_count_is_an_int_that_is_large_enough(value, least):
    check_int("k", least, least)
    with pytest.raises(
        ValueError, match=f"`k` should be a {'positive' if least else 'non-negative'} int, got {value!r}."
    ):
        check_int("k", value, least)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "1e-3", None])
def test_what_is_positive_is_a_number_above_zero(value):
    check_positive("tol", 1e-3)
    with pytest.raises(ValueError, match=f"`tol` should be a positive float, got {value!r}"):
        check_positive("tol", value)


def test_a_mapping_of_its_fields_stands_for_a_value():
    assert made_of(Schedule, "schedule", {"every_n_epochs": 2}) == Schedule(every_n_epochs=2)
    assert made_of(Schedule, "schedule", Schedule(every_n_epochs=2)) == Schedule(every_n_epochs=2)
    with pytest.raises(ValueError, match="`schedule` should be a Schedule, or a mapping of its fields, got 'daily'"):
        made_of(Schedule, "schedule", "daily")
    with pytest.raises(ValueError, match=r"`schedule` should have no other fields than every_n_steps, .* got 'every'"):
        made_of(Schedule, "schedule", {"every": 2})
