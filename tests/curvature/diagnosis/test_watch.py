"""The warning while a run goes on."""

import random
from dataclasses import replace

import pytest

from lyapunov_lightning.curvature.diagnosis import EdgeWatch, Reading
from tests.curvature.diagnosis.made_up import falling


def warned_at(ratios: list[float | None], losses: list[float], every: int = 10) -> list[int]:
    watch, warned = EdgeWatch(), []
    for index, ratio in enumerate(ratios):
        step = every * index
        if watch.see(Reading(step, ratio), (range(step), losses[:step])) is not None:
            warned.append(step)
    return warned


def test_warns_where_the_ratio_stays_above_one_and_the_loss_rises():
    losses = [*falling(200), *(falling(200)[-1] * 1.05**step for step in range(200))]
    [first, *_] = warned_at([0.5] * 19 + [1.3] * 21, losses)
    assert 210 <= first <= 250


@pytest.mark.parametrize(
    ("ratios", "losses"),
    [
        ([1.3] * 40, falling(400)),
        ([0.9] * 40, [0.1 * 1.01**step for step in range(400)]),
        ([1.3, 0.9] * 20, [0.1 * 1.01**step for step in range(400)]),
        ([1.3, None] * 20, [0.1 * 1.01**step for step in range(400)]),
        ([1.3] * 40, [1.0 + 0.3 * random.Random(step).random() for step in range(400)]),
    ],
    ids=["the loss falls", "below the limit", "above now and then", "not sure", "noise"],
)
def test_does_not_warn_without_both(ratios, losses):
    assert warned_at(ratios, losses) == []


def test_does_not_warn_of_a_fault_in_the_data():
    """It throws the loss up at once, and the average over the last ratios with it."""
    losses = [*falling(200), 300.0, 300.0, 300.0, *[3.0 * 0.98**step for step in range(197)]]
    assert warned_at([0.3] * 20 + [130.0] * 8 + [0.3] * 12, losses) == []
    # The same loss after a ratio that had been rising is another matter.
    assert warned_at([0.3] * 17 + [2.0, 4.0, 8.0] + [130.0] * 8 + [0.3] * 12, losses) != []


def test_does_not_warn_where_no_loss_has_been_seen_since() -> None:
    watch = EdgeWatch()
    readings = [Reading(step, 1.5) for step in range(0, 200, 10)]
    assert [watch.see(reading, (range(30), [1.0] * 30)) for reading in readings] == [None] * 20


def test_the_warning_tells_the_figures():
    watch = EdgeWatch()
    losses = [1.0] * 100 + [1.4] * 20 + [2.0] * 40
    readings = [Reading(step, 1.5, learning_rate=0.3) for step in range(0, 160, 10)]
    texts = [watch.see(reading, (range(reading.step), losses[: reading.step])) for reading in readings]
    [text] = [text for text in texts if text is not None][:1]
    assert "above the stability limit since step 0, 1.50 times it at step" in text
    assert "risen from 1 to 1.4" in text
    assert text.endswith("The learning rate is too large: at that sharpness the limit is met at 0.2.")


def test_the_watch_goes_on_in_a_resumed_run():
    losses = [1.0] * 100 + [1.6] * 60
    one, other = EdgeWatch(), EdgeWatch()
    for step in range(0, 120, 10):
        one.see(Reading(step, 1.5), (range(step), losses[:step]))
    other.load_state_dict(one.state_dict())
    text, again = (watch.see(Reading(120, 1.5), (range(120), losses[:120])) for watch in (one, other))
    assert text == again is not None


@pytest.mark.parametrize("excuse", ["converged", "judged"])
def test_does_not_warn_of_ratios_that_do_not_count(excuse):
    losses, watch = [1.0] * 100 + [2.0] * 60, EdgeWatch()
    readings = [replace(Reading(step, 1.5), **{excuse: False}) for step in range(0, 160, 10)]
    assert [watch.see(reading, (range(reading.step), losses[: reading.step])) for reading in readings] == [None] * 16
