"""Measurements that may take a share of the time are spread evenly and take it."""

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lyapunov_lightning.training import spacing
from lyapunov_lightning.training.schedule import Schedule, ScheduleState

Cost = Callable[[int], float]


class Clock:
    """A clock that only simulated work moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(spacing, "time", clock)
    return clock


def at(step: int) -> Any:
    return SimpleNamespace(global_step=step, current_epoch=0, world_size=1)


def sharing(share: float, say: Callable[[str], None] = lambda _: None, **rules: Any) -> ScheduleState:
    return ScheduleState(Schedule(max_overhead=share, **rules), say)


def simulated(clock: Clock, state: ScheduleState, num_steps: int, step_cost: Cost, cost: Cost) -> tuple[list[int], Any]:
    """The steps at which was measured, and the share that the measurements but the first took in the end."""
    measured, spent = [], 0.0
    state.start()
    started = clock.now
    for step in range(num_steps):
        if state.advance(at(step), step):
            clock.now += cost(step)
            if measured:
                spent += cost(step)
            else:
                started = clock.now
            state.record(cost(step))
            measured.append(step)
        clock.now += step_cost(step)
    return measured, spent / (clock.now - started)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.5, 0.9])
def test_share_holds_and_is_used(clock, share):
    measured, taken = simulated(clock, sharing(share), 20_000, lambda step: 1e-3, lambda step: 20e-3)
    assert measured[0] == 0
    assert 0.9 * share <= taken <= 1.1 * share


@pytest.mark.parametrize("factor", [0.1, 10])
@pytest.mark.parametrize("which", ["steps", "probes"])
def test_share_holds_when_steps_or_probes_change_their_cost(clock, factor, which):
    def changing(cost: float, changes: bool) -> Cost:
        return lambda step: cost * (factor if changes and step > 20_000 else 1)

    costs = changing(1e-3, which == "steps"), changing(20e-3, which == "probes")
    _, taken = simulated(clock, sharing(0.05), 100_000, *costs)
    assert 0.9 * 0.05 <= taken <= 1.1 * 0.05


def test_a_first_probe_that_is_slow_delays_nothing(clock):
    """With all of it paid back, the second measurement would come after 2,000 steps."""
    measured, _ = simulated(clock, sharing(0.1), 2_000, lambda step: 1e-3, lambda step: 5e-3 if step else 0.2)
    assert len(measured) >= 40
    assert len([step for step in measured if step < 1_000]) >= 20


@settings(max_examples=30, deadline=None)
@given(
    share=st.floats(0.01, 0.9),
    ratio=st.floats(0.1, 100),
    noise=st.lists(st.floats(0.5, 2.0), min_size=20, max_size=20),
)
def test_measurements_are_spread_evenly(share, ratio, noise):
    """No bursts: with costs that vary by a factor of four, distances vary by one not much larger."""
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(spacing, "time", clock)
        measured, _ = simulated(
            clock, sharing(share), 3_000, lambda step: 1e-3, lambda step: 1e-3 * ratio * noise[step % 20]
        )
    distances = [after - before for before, after in pairwise(measured[2:])]
    assert all(distance <= 4 * min(distances) + 2 for distance in distances)


def test_probes_that_cost_nothing_come_at_every_step_once_that_is_known(clock):
    measured, _ = simulated(clock, sharing(0.05), 100, lambda step: 1e-3, lambda step: 0.0)
    assert measured == [0, *range(5, 100)]


def test_share_holds_over_optimizer_steps_of_several_batches(clock):
    state = sharing(0.05)
    spent, started, measured = 0.0, clock.now, []
    for batch in range(40_000):
        if state.advance(at(batch // 4), batch):
            assert batch % 4 == 0
            clock.now += 20e-3
            spent += 20e-3
            state.record(20e-3)
            measured.append(batch // 4)
        clock.now += 1e-3
    assert spent / (clock.now - started) == pytest.approx(0.05, rel=0.1)
    assert measured == sorted(set(measured))


def test_other_rules_of_the_schedule_add_their_steps_and_count_as_measurements(clock):
    state = sharing(0.05, at_steps=[100, 101, 102])
    measured, _ = simulated(clock, state, 1_000, lambda step: 1e-3, lambda step: 20e-3)
    assert {100, 101, 102} < set(measured)
    assert min(step for step in measured if step > 102) > 400


def test_another_training_with_a_share_begins_with_a_measurement(clock):
    state = sharing(0.05)
    for _ in range(2):
        measured, _ = simulated(clock, state, 1_000, lambda step: 1e-3, lambda step: 20e-3)
        assert measured[:2] == [0, 5]


def test_how_often_that_comes_out_is_said_once(clock):
    said: list[str] = []
    state = sharing(0.05, said.append)
    for step in range(5_000):
        if state.advance(at(step), step):
            clock.now += 20e-3
            state.record(20e-3)
        clock.now += 1e-3
    assert said == [
        "`max_overhead=0.05` comes out at one measurement in about 380 steps: 0.02 seconds each, where a step takes"
        " 0.001."
    ]
