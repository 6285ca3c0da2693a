import math

import numpy as np
import pytest

from lyapunov_lightning.figures import learning_rate_figure
from tests.figures.looking import check_picture


def test_all_of_a_run():
    rng = np.random.default_rng(0)
    steps = np.arange(100)
    lengths = [None, *(1 + 0.4 * rng.standard_normal(99))]
    picture = learning_rate_figure(
        steps,
        0.1 * np.exp(-steps / 20),
        lengths,
        measure="step length",
        losses=(steps, np.exp(-steps / 50)),
        restored_at=[30],
        title="A run",
    )
    check_picture(picture)
    rates, below, loss = picture.axes
    assert [panel.get_yscale() for panel in picture.axes] == ["log", "linear", "log"]
    assert [text.get_text() for text in rates.get_legend().get_texts()] == ["learning rate", "parameters restored"]
    assert [text.get_text() for text in below.get_legend().get_texts()] == [
        "1: bottom of the parabola",
        "2: nothing gained",
    ]
    assert below.get_ylim()[1] >= 2
    assert loss.get_ylabel() == "training loss"


def test_one_wild_step_does_not_hide_the_others():
    lengths = [1.0] * 999 + [1e6]
    (_, below) = learning_rate_figure(range(1000), [0.1] * 1000, lengths).axes
    assert below.get_ylim()[1] < 10


@pytest.mark.parametrize(
    ("rates", "lengths"),
    [
        ([0.1], [None]),
        ([math.nan], [math.nan]),
        ([1e-9, 1e3], [1e-3, 1e6]),
        ([0.0, 0.1], [-1.0, math.inf]),
    ],
)
def test_one_point_gaps_and_any_range(rates, lengths):
    check_picture(learning_rate_figure(range(len(rates)), rates, lengths))
