import pickle

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from matplotlib.scale import SymmetricalLogTransform

from lyapunov_lightning.figures.style import house_style, new_picture
from lyapunov_lightning.figures.ticks import fitting_axis, is_wide, linear_axis, log_axis, number_label, symlog_axis
from tests.figures.looking import check_axis, draw, written

SIZES = st.sampled_from([(4.2, 1.5), (4.2, 3.0), (7.0, 1.2), (7.0, 4.0)])
"""In inches, as small as the panels of our figures and larger."""

FEW = settings(max_examples=15, deadline=None)


def panel_with(values, size, dress):
    """A panel of a size in inches whose two axes are dressed alike, drawn."""
    with house_style():
        panel = new_picture(*size).subplots()
        panel.plot(values, values)
        for which in ("x", "y"):
            dress(panel, which)
    return panel, draw(panel.get_figure())


def check_is_readable(panel, renderer):
    """Two labels at least within the view of each axis, different ones, none of which overlap."""
    for axis in (panel.xaxis, panel.yaxis):
        check_axis(axis, renderer)
        low, high = axis.get_view_interval()
        ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
        assert sum(low <= place <= high and label.get_text() != "" for place, label in ticks) >= 2, written(axis)


@given(start=st.floats(-12, 6), decades=st.one_of(st.floats(0.01, 1), st.floats(1, 18)), size=SIZES)
@FEW
def test_a_logarithmic_axis_is_readable(start, decades, size):
    check_is_readable(*panel_with([10**start, 10 ** (start + decades)], size, log_axis))


@given(
    threshold=st.floats(-9, 3),
    upper=st.one_of(st.none(), st.floats(-1, 8)),
    lower=st.one_of(st.none(), st.floats(-1, 8)),
    size=SIZES,
)
@FEW
def test_an_axis_of_both_signs_is_readable(threshold, upper, lower, size):
    ends = [0.0 if end is None else 10 ** (threshold + end) for end in (lower, upper)]
    assume(max(ends) > 30 * 10**threshold)  # with less a linear axis is chosen
    check_is_readable(*panel_with([-ends[0], ends[1]], size, lambda *axis: symlog_axis(*axis, 10**threshold)))


@given(size=SIZES, magnitude=st.floats(-12, 9), spread=st.floats(-4, 1), sign=st.sampled_from([-1, 1]))
@FEW
def test_a_linear_axis_is_readable_and_hides_no_offset(size, magnitude, spread, sign):
    """The horizontal one where two digits tell the labels apart: what we draw there are steps and eigenvalues."""
    base = sign * 10**magnitude
    with house_style():
        panel = new_picture(*size).subplots()
        panel.plot([base, base + 10 ** (magnitude + max(spread, -1))], [base, base + 10 ** (magnitude + spread)])
        for which in ("x", "y"):
            linear_axis(panel, which)
    check_is_readable(panel, draw(panel.get_figure()))


@pytest.mark.parametrize("end", [1e-3, 1e3])
def test_an_axis_of_both_signs_is_labelled_over_all_of_its_length(end):
    panel, _ = panel_with([-end, end], (4, 3), lambda *axis: symlog_axis(*axis, 1e-6 * end))
    ticks = panel.xaxis.get_majorticklocs()
    assert max(ticks) > end / 100
    assert min(ticks) < -end / 100
    assert 0 in ticks


def test_the_threshold_is_a_power_of_ten():
    panel, _ = panel_with([-30.0, 30.0], (4, 3), lambda *axis: symlog_axis(*axis, 0.7))
    transform = panel.xaxis.get_transform()
    assert isinstance(transform, SymmetricalLogTransform)
    assert transform.linthresh == pytest.approx(0.1)


def test_steps_are_marked_at_whole_numbers():
    for values in ([0, 1], [0, 3], [0, 1234]):
        panel, _ = panel_with(values, (7, 3), lambda panel, which: linear_axis(panel, which, whole=True))
        assert all(float(tick).is_integer() for tick in panel.xaxis.get_majorticklocs())


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
    ("value", "label"),
    [
        (0, "0"),
        (200, "200"),
        (20_000, "20000"),
        (-0.5, "−0.5"),
        (0.1 + 0.2, "0.3"),
        (2.27801, "2.27801"),
        (1e-5, "10⁻⁵"),
        (2e-5, "2×10⁻⁵"),
        (1e5, "10⁵"),
        (-1e6, "−10⁶"),
        (-2.5e9, "−2.5×10⁹"),
        (1e-12, "10⁻¹²"),
        (1.2345678901e-10, "1.23456789×10⁻¹⁰"),
    ],
)
def test_how_numbers_are_written(value, label):
    assert number_label(value) == label


@given(st.floats(-1e6, 1e6), st.floats(-9, 3), st.integers(2, 8))
def test_evenly_spaced_ticks_have_different_labels(start, spacing, count):
    assume(10**spacing > 1e-9 * abs(start))  # the labels have ten digits
    ticks = start + 10**spacing * np.arange(count)
    assert len({number_label(tick) for tick in ticks}) == count


def test_a_picture_can_be_pickled():
    panel, _ = panel_with([1.0, 100.0], (3, 2), log_axis)
    assert pickle.loads(pickle.dumps(panel.get_figure())).axes[0].get_xscale() == "log"


def test_wide_is_positive_and_far():
    assert is_wide(np.array([1.0, 31.0, np.nan]))
    assert not is_wide(np.array([1.0, 29.0]))
    assert not is_wide(np.array([-1.0, 100.0]))
    assert not is_wide(np.array([np.nan]))
