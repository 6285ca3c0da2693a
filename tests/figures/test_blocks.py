"""The map of the blocks: every cell at its block and its step, and readable however many blocks there are."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from lyapunov_lightning.figures import blocks_figure, drawn_on
from tests.figures.looking import check_picture, written

SHARP = [{"net.0": 2.0, "net.2": 50.0, "head": 0.0}, {"net.0": 4.0, "head": 3.0, "late": 1.0}]
TRACES = [{"net.0": 5.0, "net.2": 90.0, "head": -1.0}, {"net.0": 0.5, "head": math.nan, "late": 7.0}]
ERRORS = [{"net.0": 1.0, "net.2": 1.0, "head": 1.0}, {"net.0": 0.6, "head": 1.0, "late": 1.0}]


def cells(panel):
    """Grey cells, and the numbers that have a colour."""
    grey, coloured = (mesh.get_array() for mesh in panel.collections)
    return (~np.ma.getmaskarray(grey)).tolist(), coloured.filled(np.nan).tolist()


def test_each_cell_is_at_its_block_and_step():
    picture = blocks_figure([0, 10], SHARP, TRACES, ERRORS)
    check_picture(picture)
    sharpness, traces = picture.axes[:2]
    assert written(sharpness.yaxis) == ["net.0", "net.2", "head", "late"]
    assert sharpness.get_ylim() == (3.5, -0.5)  # the first one at the top
    grey, coloured = cells(sharpness)
    assert grey == [[False, False], [False, False], [True, False], [False, False]]
    nan = math.nan
    np.testing.assert_equal(coloured, [[2.0, 4.0], [50.0, nan], [nan, 3.0], [nan, 1.0]])
    grey, coloured = cells(traces)
    assert grey == [[False, True], [False, False], [True, False], [False, False]]  # within its error, or negative
    np.testing.assert_equal(coloured, [[5.0, nan], [90.0, nan], [nan, nan], [nan, 7.0]])
    edges = sharpness.collections[1].get_coordinates()[0, :, 0]
    assert edges.tolist() == [-5.0, 5.0, 15.0]


@pytest.mark.parametrize(("count", "steps"), [(1, [7]), (6, [0, 1, 2, 100, 1000]), (150, [7, 9])])
def test_many_blocks_and_few_steps_are_readable(count, steps):
    names = [f"model.encoder.layers.{place}.self_attention.output_projection" for place in range(count)]
    values = [{name: 10.0 ** (place % 7 - 3) for place, name in enumerate(names)} for _ in steps]
    picture = blocks_figure(steps, values)
    check_picture(picture)
    shown = written(picture.axes[0].yaxis)
    assert len(shown) == -(-count // -(-count // 40))
    assert all(len(name) <= 32 and name.endswith("put_projection") for name in shown)
    assert picture.axes[0].get_ylabel() == ("block" if count == 1 else "block of model.encoder.layers")
    assert shown[0].startswith("model.encoder" if count == 1 else "0.self_attent")


@pytest.mark.filterwarnings("error")
def test_the_first_map_can_be_drawn_on_axes_of_ones_own():
    left, right = Figure().subplots(1, 2)
    with drawn_on(right):
        blocks_figure([0, 10], SHARP, TRACES, ERRORS)
    assert right.get_ylabel() == "block"
    assert len(right.collections) == 2
    assert not left.collections


def test_alike_blocks_and_nothing_positive():
    check_picture(blocks_figure([0, 5], [{"a": 2.0, "b": 2.0}] * 2))
    picture = blocks_figure([0, 5], [{"a": 0.0, "b": -1.0}] * 2)
    assert [text.get_text() for text in picture.axes[0].texts] == ["no positive largest eigenvalue"]
    check_picture(picture)
