"""A learning rate follows estimates slowly, within bounds, and stays low after it was too high."""

import itertools
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lyapunov_lightning.curvature.acting.pace import Annealing, LRBounds, Pace, annealing


def pace_at(lr: float, **bounds: Any) -> Pace:
    pace = Pace(LRBounds(**bounds))
    pace.begin(lr)
    return pace


def followed(pace: Pace, length: float, *, is_falling: bool = False, may_grow: bool = True) -> float:
    pace.follow(length, length, is_falling=is_falling, may_grow=may_grow)
    assert pace.lr is not None
    return pace.lr


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"max_growth": 1.0}, "`max_growth` should be above 1, got 1.0."),
        ({"min_lr": -1.0}, "`min_lr` should be a finite non-negative float, got -1.0."),
        ({"min_lr": math.nan}, "`min_lr` should be a finite non-negative float, got nan."),
        ({"max_lr": math.nan}, "`min_lr` should be below `max_lr`, got 0.0 and nan."),
        ({"min_lr": 1.0, "max_lr": 0.5}, "`min_lr` should be below `max_lr`, got 1.0 and 0.5."),
        ({"window": 0}, "`window` should be a positive int, got 0."),
    ],
    ids=str,
)
def test_bad_bound_is_named_with_its_value(bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LRBounds(**bounds)


# Lengths.


def test_short_steps_grow_and_long_ones_shrink() -> None:
    assert 1 < followed(pace_at(1.0), 0.5) <= 1.07
    assert 0.8 <= followed(pace_at(1.0), 3.0) < 1
    assert followed(pace_at(1.0), 1.7) == 1


def test_in_between_the_loss_decides() -> None:
    assert followed(pace_at(1.0), 1.7, is_falling=True) > 1
    assert followed(pace_at(1.0), 3.0, is_falling=True) == 1
    assert followed(pace_at(1.0), 5.0, is_falling=True) < 1


def test_steps_do_not_grow_where_something_speaks_against_it() -> None:
    assert followed(pace_at(1.0), 0.5, may_grow=False) == 1
    assert followed(pace_at(1.0), 3.0, may_grow=False) < 1


def test_steps_that_may_be_shorter_than_they_look_do_not_shrink() -> None:
    pace = pace_at(1.0)
    pace.follow(10.0, 1.9, is_falling=False, may_grow=True)
    assert pace.lr == 1
    pace.follow(10.0, 2.1, is_falling=False, may_grow=True)
    assert pace.lr is not None
    assert 0.99 < pace.lr < 1


def test_a_length_that_changes_slowly_is_followed_slowly() -> None:
    fast, slow = pace_at(1.0), pace_at(1.0)
    for pace, memory in ((fast, 33.0), (slow, 330.0)):
        pace.follow(3.0, 3.0, is_falling=False, may_grow=True, memory=memory)
    assert fast.lr is not None
    assert slow.lr is not None
    assert math.log(slow.lr) == pytest.approx(math.log(fast.lr) * (5 / 330) / 0.15)


def test_what_shows_late_grows_slowly() -> None:
    for inertia, growth in ((1.0, 1.07), (10.0, 1.07), (100.0, 1.07**0.1)):
        pace = pace_at(1.0)
        pace.follow(1e-9, 1e-9, is_falling=False, may_grow=True, inertia=inertia)
        assert pace.lr == pytest.approx(growth)


def test_noise_brings_the_learning_rate_down_to_a_floor_and_not_to_none() -> None:
    pace = pace_at(1.0)
    for _ in range(30):
        followed(pace, 0.1)
    assert pace.lr is not None
    highest = pace.lr
    for _ in range(1000):
        followed(pace, 10.0)
    assert pace.lr == pytest.approx(0.5 * highest)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.floats(1e-9, 10), st.booleans(), st.booleans()), max_size=30),
    bounds=st.tuples(st.floats(0, 0.5), st.floats(0.6, 2), st.floats(1.01, 2)),
)
def test_no_length_leads_out_of_the_bounds_or_beyond_the_growth(
    lengths: list[tuple[float, bool, bool]], bounds: tuple[float, float, float]
) -> None:
    low, high, growth = bounds
    pace = pace_at(0.55, min_lr=low, max_lr=high, max_growth=growth)
    last = 0.55
    for length, is_falling, may_grow in lengths:
        lr = followed(pace, length, is_falling=is_falling, may_grow=may_grow)
        assert low <= lr <= high
        assert last / 1.25 * (1 - 1e-12) <= lr <= last * growth * (1 + 1e-12)
        last = lr


def test_before_the_first_learning_rate_there_is_nothing_to_follow() -> None:
    pace = Pace()
    pace.follow(0.5, 0.5, is_falling=True, may_grow=True)
    pace.halve()
    pace.stop()
    assert pace.lr is None
    assert not pace.is_stopped


# Proposals.


def test_proposals_are_followed_down_at_once_and_up_by_a_bounded_factor() -> None:
    pace, lrs = Pace(LRBounds(max_growth=1.5)), []
    for proposal in (0.1, 10.0, 10.0, 0.01, 1.0):
        pace.approach(proposal)
        lrs.append(pace.lr)
    assert lrs == pytest.approx([0.1, 0.15, 0.225, 0.01, 0.015])


@pytest.mark.parametrize("proposal", [math.nan, math.inf, 0.0, -1.0])
def test_what_is_no_learning_rate_changes_nothing(proposal: float) -> None:
    pace = Pace()
    pace.approach(proposal)
    assert pace.lr is None
    pace.begin(0.3)
    pace.approach(proposal)
    assert pace.lr == 0.3


# After it was too high.


def test_a_halved_learning_rate_doubles_again_over_a_window_at_the_earliest() -> None:
    pace = pace_at(1.0, window=10, max_growth=2.0)
    pace.halve()
    assert pace.lr == 0.5
    for step in range(1, 21):
        pace.pass_step()
        assert followed(pace, 0.01) <= 0.5 * 2 ** (step / 10) * (1 + 1e-12)
    assert pace.lr == pytest.approx(2.0)


def test_a_stopped_one_stays_small() -> None:
    pace = pace_at(1.0)
    pace.stop()
    followed(pace, 0.01, is_falling=True)
    pace.approach(5.0)
    assert pace.lr == pytest.approx(0.01)


def test_it_goes_on_where_it_was() -> None:
    one, other = pace_at(1.0), Pace()
    followed(one, 0.5)
    one.halve()
    other.load_state_dict(one.state_dict())
    assert followed(one, 3.0) == followed(other, 3.0)
    assert one.state_dict() == other.state_dict()


# The end of the training.


@settings(max_examples=50, deadline=None)
@given(share=st.floats(0.01, 1), num_steps=st.integers(1, 1000))
def test_annealing_is_linear_and_ends_above_zero(share: float, num_steps: int) -> None:
    factors = [annealing(share, step, num_steps) for step in range(num_steps)]
    assert all(0 < later <= earlier <= 1 for earlier, later in itertools.pairwise(factors))
    assert factors[-1] == pytest.approx(min(1, 1 / (share * num_steps)))
    assert all(factor == 1 for step, factor in enumerate(factors) if step <= (1 - share) * num_steps - 1e-9)
    assert annealing(share, num_steps + 5, num_steps) == factors[-1]


def test_there_is_no_annealing_without_an_end() -> None:
    assert annealing(0.4, 10**9, math.inf) == 1
    assert annealing(0.0, 99, 100) == 1


def test_a_training_that_becomes_longer_takes_its_annealing_back_slowly() -> None:
    falling = Annealing(0.5)
    assert not falling.has_no_end or falling.at(0) == 1.0
    falling.start(100)
    assert [falling.at(step) for step in range(100)] == [annealing(0.5, step, 100) for step in range(100)]
    resumed = Annealing(0.5)
    resumed.load_state_dict(falling.state_dict())
    resumed.start(1000)
    factors = [resumed.at(step) for step in range(100, 200)]
    assert factors[0] == pytest.approx(1.1 * 0.02)
    assert all(after == min(1.0, 1.1 * before) for before, after in itertools.pairwise(factors))
    assert factors[-1] == 1.0
    resumed.start(math.inf)
    assert resumed.has_no_end


RATIO = {"step": 100, "is_exact": False, "is_falling": False, "may_grow": True}


def moved(ratio: float, at_least: float | None = None, **options: Any) -> float:
    """By which factor a learning rate moves in one step."""
    pace = Pace()
    pace.begin(0.1)
    pace.keep_off_the_edge(ratio, ratio if at_least is None else at_least, **{**RATIO, **options})
    assert pace.lr is not None
    return pace.lr / 0.1


def test_steps_far_from_the_edge_grow_and_those_beyond_shrink() -> None:
    assert moved(0.1) > 1
    assert moved(0.6) == 1
    assert moved(0.9) < 1
    assert moved(0.9, at_least=0.7) == 1  # which may be noise
    assert moved(0.9, is_falling=True) > 1
    assert moved(1.5, is_falling=True) == 1
    assert moved(3.0, is_falling=True) < 1
    assert moved(0.1, may_grow=False) == 1
    assert moved(math.nan) == 1


def test_where_the_edge_is_known_steps_go_back_behind_it_at_once() -> None:
    assert moved(1.9, is_exact=True) == pytest.approx(0.5)
    assert moved(1.2, is_exact=True, is_falling=True) == pytest.approx(0.95 / 1.2)
    assert moved(0.9, is_exact=True) == 1
    assert moved(0.5, is_exact=True) > 1
    assert moved(100.0, is_exact=True) == 0.5  # of the highest rate so far


@given(steps=st.integers(1, 400))
@settings(max_examples=30)
def test_on_a_plateau_rates_grow_like_the_square_of_the_steps(steps: int) -> None:
    pace = Pace(LRBounds(max_growth=100.0))
    pace.begin(1.0)
    for step in range(steps):
        pace.keep_off_the_edge(0.0, 0.0, **{**RATIO, "step": step})
    assert pace.lr is not None
    assert pace.lr <= 1.5 * ((steps + 10) / 10) ** 2
