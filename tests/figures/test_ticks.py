import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from matplotlib.scale import SymmetricalLogTransform

from lyapunov_lightning.figures.style import house_style, new_picture
from lyapunov_lightning.figures.ticks import (
    fitting_axis,
    is_wide,
    linear_axis,
    log_axis,
    number_labels,
    symlog_axis,
)
from tests.figures.looking import check_axis, draw, written

SIZES = st.sampled_from([(2.2, 1.2), (3.0, 1.4), (7.0, 4.0)])
FEW = settings(max_examples=10, deadline=None)


def panel_with(values, size, dress):
    """A panel of a size in inches whose two axes are dressed alike, drawn."""
    with house_style():
        panel = new_picture(*size).subplots()
        panel.plot(values, values)
        for which in ("x", "y"):
            dress(panel, which)
    return panel, draw(panel.get_figure())


def check(panel, renderer, least=1):
    for axis in (panel.xaxis, panel.yaxis):
        check_axis(axis, renderer)
        assert len(written(axis)) >= least


@given(start=st.floats(-12, 6), decades=st.floats(0.5, 12), size=SIZES)
@FEW
def test_labels_of_a_logarithmic_axis_do_not_overlap(start, decades, size):
    panel, renderer = panel_with([10**start, 10 ** (start + decades)], size, log_axis)
    check(panel, renderer)
    assert len(written(panel.yaxis)) >= 2


@given(
    threshold=st.floats(-9, 3),
    upper=st.one_of(st.none(), st.floats(-1, 8)),
    lower=st.one_of(st.none(), st.floats(-1, 8)),
    size=SIZES,
)
@FEW
def test_labels_of_an_axis_of_both_signs_do_not_overlap(threshold, upper, lower, size):
    ends = [0.0 if end is None else 10 ** (threshold + end) for end in (lower, upper)]
    panel, renderer = panel_with([-ends[0], ends[1]], size, lambda *axis: symlog_axis(*axis, 10**threshold))
    check(panel, renderer)
    assert "0" in written(panel.yaxis) or len(written(panel.yaxis)) >= 2


@given(
    size=SIZES,
    magnitude=st.floats(-12, 9),
    spread=st.floats(-6, 1),
    sign=st.sampled_from([-1, 1]),
)
@FEW
def test_labels_of_a_linear_axis_do_not_overlap_and_hide_no_offset(size, magnitude, spread, sign):
    base = sign * 10**magnitude
    panel, renderer = panel_with([base, base + 10 ** (magnitude + spread)], size, linear_axis)
    check(panel, renderer)


def test_the_threshold_is_a_power_of_ten():
    panel, _ = panel_with([-30.0, 30.0], (4, 3), lambda *axis: symlog_axis(*axis, 0.7))
    transform = panel.xaxis.get_transform()
    assert isinstance(transform, SymmetricalLogTransform)
    assert transform.linthresh == pytest.approx(0.1)
    assert written(panel.xaxis) == ["−10", "−1", "−0.1", "0", "0.1", "1", "10"]


def test_steps_are_marked_at_whole_numbers():
    panel, _ = panel_with([0, 1], (7, 3), lambda panel, which: linear_axis(panel, which, whole=True))
    assert written(panel.xaxis) == ["0", "1"]


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1.0, 20.0], "linear"),
        ([1.0, 40.0], "log"),
        ([-1.0, 20.0], "linear"),
        ([-1.0, 40.0], "symlog"),
        ([1.0, 1e6, np.nan, np.inf], "log"),
        ([np.nan], "linear"),
        ([0.0], "linear"),
        ([], "linear"),
    ],
)
def test_an_axis_fits_what_is_drawn(values, scale):
    panel, _ = panel_with([1.0, 2.0], (3, 2), lambda panel, which: fitting_axis(panel, which, values))
    assert panel.get_xscale() == panel.get_yscale() == scale


def test_an_axis_of_both_signs_leaves_out_what_is_zero_to_the_eye():
    panel, _ = panel_with([-1.0, 1.0], (3, 2), lambda panel, which: fitting_axis(panel, which, [-1e-20, 1.0]))
    assert panel.xaxis.get_transform().linthresh == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 200, 400], ["0", "200", "400"]),
        ([0, 20000, 40000], ["0", "20\u202f000", "40\u202f000"]),
        ([-0.5, 0, 0.5], ["−0.5", "0.0", "0.5"]),
        ([2.278, 2.27801], ["2.27800", "2.27801"]),
        ([1e-5, 2e-5, 3e-5], ["10⁻⁵", "2×10⁻⁵", "3×10⁻⁵"]),
        ([0.1, 1, 10, 100], ["0.1", "1", "10", "100"]),
        ([-1e5, -1, 0, 1, 1e5], ["−10⁵", "−1", "0", "1", "10⁵"]),
        ([1e-12], ["10⁻¹²"]),
        ([0], ["0"]),
        ([], []),
    ],
)
def test_how_numbers_are_written(values, labels):
    assert number_labels(values) == labels


@given(st.floats(-1e6, 1e6), st.floats(-9, 3), st.integers(2, 8))
def test_evenly_spaced_ticks_are_told_apart(start, spacing, count):
    assume(10**spacing > 1e-12 * abs(start))  # else they are hardly told apart in float64
    ticks = start + 10**spacing * np.arange(count)
    assert len(set(number_labels(ticks))) == count


def test_wide_is_positive_and_far():
    assert is_wide(np.array([1.0, 31.0, np.nan]))
    assert not is_wide(np.array([1.0, 29.0]))
    assert not is_wide(np.array([-1.0, 100.0]))
    assert not is_wide(np.array([np.nan]))
