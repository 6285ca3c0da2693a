"""Measurements come at the steps that were asked for."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lyapunov_lightning.training.schedule import Schedule, ScheduleState


class Learner(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def at(step: int) -> Any:
    return SimpleNamespace(global_step=step, current_epoch=0, world_size=1)


def batches(num: int) -> DataLoader:
    return DataLoader(torch.randn(num, 2), 1)


def asking(schedule: Schedule) -> Callable[..., tuple[bool, int, int, int]]:
    """A check that asks before every batch whether to measure."""
    state = ScheduleState(schedule)

    def check(trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> tuple[bool, int, int, int]:
        if trainer.fit_loop.epoch_loop.total_batch_idx == 0:
            state.start()
        return state.advance(trainer, batch_idx), trainer.current_epoch, trainer.global_step, batch_idx

    return check


# Steps and epochs.


@pytest.mark.parametrize("every_n_steps", [1, 2, 3, 5])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_optimizer_steps_are_counted_and_each_at_most_once(fit, every_n_steps, accumulate):
    _, answers = fit(Learner(), batches(24), asking(Schedule(every_n_steps)), accumulate_grad_batches=accumulate)
    due = [(step, batch_idx) for is_due, _, step, batch_idx in answers if is_due]
    assert due == [(step, step * accumulate) for step in range(0, 24 // accumulate, every_n_steps)]


@pytest.mark.parametrize("every_n_epochs", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_epochs_are_measured_before_their_first_step(fit, every_n_epochs, accumulate):
    schedule = Schedule(every_n_epochs=every_n_epochs)
    _, answers = fit(Learner(), batches(4), asking(schedule), max_epochs=5, accumulate_grad_batches=accumulate)
    due = [(epoch, batch_idx) for is_due, epoch, _, batch_idx in answers if is_due]
    assert due == [(epoch, 0) for epoch in range(0, 5, every_n_epochs)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(first_n_steps=3), [0, 1, 2]),
        (Schedule(first_n_steps=3, every_n_epochs=1), [0, 1, 2, 4, 8]),
        (Schedule(first_n_steps=2, every_n_steps=5), [0, 1, 5, 10]),
        (Schedule(every_n_steps=3, every_n_epochs=1), [0, 3, 4, 6, 8, 9]),
        (Schedule(every_n_steps=3, thin_to=6), [0, 3, 6, 9]),
    ],
    ids=str,
)
def test_every_rule_adds_its_steps(fit, schedule, expected):
    _, answers = fit(Learner(), batches(4), asking(schedule), max_epochs=3)
    assert [step for is_due, _, step, _ in answers if is_due] == expected


@pytest.mark.parametrize("num_steps", [1, 3])
def test_every_training_is_measured_from_its_first_step(fit, num_steps):
    check = asking(Schedule(10))
    for _ in range(2):  # two Trainers, one callback
        _, answers = fit(Learner(), batches(num_steps), check)
        assert [is_due for is_due, *_ in answers] == [True, False, False][:num_steps]


@pytest.mark.parametrize("name", ["every_n_steps", "every_n_epochs", "thin_to"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_interval_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` should be a positive int, got {value!r}"):
        Schedule(**{name: value})


@pytest.mark.parametrize("value", [-1, 1.5, True, "3"])
def test_number_of_first_steps_out_of_range_is_named(value):
    with pytest.raises(ValueError, match=f"`first_n_steps` should be a non-negative int, got {value!r}"):
        Schedule(first_n_steps=value)


@pytest.mark.parametrize("max_overhead", [0, 1, -0.1, 2, float("nan")])
def test_share_out_of_range_is_named(max_overhead):
    with pytest.raises(ValueError, match=r"`max_overhead` should be in \(0, 1\), got"):
        Schedule(1, max_overhead=max_overhead)


def test_measurements_thin_out_with_the_run_and_not_beyond_what_was_asked():
    state, trainer = ScheduleState(Schedule(every_n_steps=2, thin_to=7)), SimpleNamespace(current_epoch=0)
    steps = []
    for trainer.global_step in range(400):
        if state.advance(trainer, 1 if trainer.global_step else 0):
            steps.append(trainer.global_step)
    # A twentieth of the steps so far, in multiples of 2 and at most 7: so 6.
    assert steps == [*range(0, 80, 2), *range(80, 120, 4), *range(120, 400, 6)]


@pytest.mark.parametrize("rules", [{}, {"every_n_steps": 10}, {"first_n_steps": 3}])
def test_a_distance_that_could_not_grow_is_refused(rules):
    with pytest.raises(ValueError, match=r"`thin_to` should be at least `every_n_steps`.*thin_to=5"):
        Schedule(**rules, thin_to=5)


def test_a_schedule_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="at least one of `every_n_steps`"):
        Schedule()


def test_state_goes_on_where_it_was_and_holds_only_what_a_checkpoint_may():
    state = ScheduleState(Schedule(2))
    assert state.advance(at(4), 4)
    kept = state.state_dict()
    assert all(value is None or type(value) in (int, float, bool, str) for value in kept.values())
    resumed = ScheduleState(Schedule(2))
    resumed.load_state_dict(kept)
    resumed.start()
    assert not resumed.advance(at(4), 0)  # the measurement of this step was made before the checkpoint
    assert not resumed.advance(at(5), 5)
    assert resumed.advance(at(6), 6)
    assert resumed.state_dict() == {"passed": 6, "measured": 6}


def test_state_of_a_schedule_that_was_never_asked_can_be_loaded():
    resumed = ScheduleState(Schedule(2))
    resumed.load_state_dict(ScheduleState(Schedule(2)).state_dict())
    assert resumed.advance(at(0), 0)


# Several optimizer steps in a batch, as manual optimization makes them.


@given(st.integers(1, 12), st.lists(st.integers(0, 7), max_size=60))
def test_every_interval_is_measured_at_its_first_opportunity(every_n_steps, steps_of_batches):
    """Reference: a multiple of the interval lies behind the last opportunity and not behind this one."""
    state = ScheduleState(Schedule(every_n_steps))
    step, seen = 0, -1
    for batch_idx, steps in enumerate(steps_of_batches):
        multiples = [multiple for multiple in range(seen + 1, step + 1) if multiple % every_n_steps == 0]
        assert state.advance(at(step), batch_idx) == bool(multiples)
        seen, step = step, step + steps


@given(st.lists(st.integers(0, 50), unique=True, min_size=1), st.lists(st.integers(1, 7), min_size=1, max_size=40))
def test_single_steps_are_measured_at_the_first_opportunity(at_steps, steps_of_batches):
    state = ScheduleState(Schedule(at_steps=at_steps))
    step, seen = 0, -1
    for batch_idx, steps in enumerate(steps_of_batches):
        assert state.advance(at(step), batch_idx) == any(seen < fixed <= step for fixed in at_steps)
        seen, step = step, step + steps


def test_a_schedule_that_nobody_gave_never_measures_until_it_follows_one():
    state = ScheduleState(None)
    assert not state.advance(at(0), 0)
    state.follow(Schedule(3))
    assert not state.advance(at(2), 2)
    assert state.advance(at(3), 3)


@pytest.mark.parametrize("at_steps", [[-1], [1.5], [True], ["3"], [2, 2]])
def test_single_steps_out_of_range_are_named(at_steps):
    with pytest.raises(ValueError, match="`at_steps` should hold"):
        Schedule(at_steps=at_steps)
