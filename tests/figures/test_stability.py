import math

import numpy as np
import pytest
import torch

from lyapunov_lightning.figures import curvature_fit_figure, sharpness_figure, stability_ratio_figure
from lyapunov_lightning.figures.style import sized_for_cards
from tests.figures.looking import check_picture

STEPS = list(range(0, 200, 10))
RISING = [min(2 + step / 30, 5.2) for step in STEPS]
LOSS = (list(range(200)), [2.3 * math.exp(-step / 60) for step in range(200)])


def labels(panel):
    return [text.get_text() for text in panel.get_legend().get_texts()]


def dots(panel):
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in panel.lines if len(line.get_xdata()) == 1]


def test_all_of_a_run():
    picture = sharpness_figure(
        STEPS, RISING, [5.0] * 20, losses=LOSS, met_at=90, crossings=[120, 150], label="top curvature", title="A run"
    )
    check_picture(picture)
    upper, lower = picture.axes
    assert labels(upper) == ["top curvature", "stability limit", "above it again", "meets it at step 90"]
    assert not upper.texts  # which would lie on the curves
    assert dots(upper) == [(90, 5.0)]
    assert upper.get_ylim()[0] == 0
    assert (upper.get_yscale(), lower.get_yscale()) == ("linear", "log")
    assert picture.get_suptitle() == "A run"


def test_the_point_where_the_limit_is_met_lies_on_the_curve_between_measurements():
    picture = sharpness_figure([0, 10, 20], [1.0, None, 3.0], [2.0] * 3, met_at=10)
    assert dots(picture.axes[0]) == [(10, 2.0)]
    check_picture(picture)


@pytest.mark.parametrize("met_at", [0, 100, 190])
def test_the_label_stays_inside_wherever_the_limit_is_met(met_at):
    check_picture(sharpness_figure(STEPS, RISING, [5.0] * 20, met_at=met_at))


@pytest.mark.parametrize(
    ("sharpness", "limit", "losses"),
    [
        ([3.0], [5.0], ([0], [2.3])),
        ([3.0], [None], None),
        ([math.nan], [math.nan], ([0], [math.nan])),
        ([-1.0, 2.0, -30.0], [5.0, 4.0, 3.0], ([0, 1, 2], [0.0, -1.0, 2.0])),
        ([1e-3, math.inf, 1e9], [5.0, None, 1e-3], ([0, 1, 2], [1e-9, math.inf, 1e9])),
    ],
)
def test_one_point_gaps_and_any_range(sharpness, limit, losses):
    check_picture(sharpness_figure(range(len(sharpness)), sharpness, limit, losses=losses, met_at=0, crossings=[0]))


def test_the_axis_is_logarithmic_where_the_values_span_far():
    assert sharpness_figure([0, 1], [0.1, 2.0], [2.0, 2.0]).axes[0].get_yscale() == "linear"
    assert sharpness_figure([0, 1], [0.1, 2.0], [20.0, 20.0]).axes[0].get_yscale() == "log"
    assert sharpness_figure([0, 1], [-0.1, 2.0], [20.0, 20.0]).axes[0].get_yscale() == "linear"


def shade(panel):
    """The corners of what is shaded."""
    return np.concatenate([path.vertices for shaded in panel.collections for path in shaded.get_paths()])


@pytest.mark.parametrize("spread", [1.0, 30.0], ids=["linear", "logarithmic"])
def test_the_shade_stays_between_the_curve_and_its_limit_on_any_axis(spread):
    steps = np.arange(0.0, 200, 10)
    values = 5 * np.exp(np.log(2 * spread) * np.sin(steps / 25))
    # A ratio of eigenvalues that were measured some steps before lies beside the curve.
    picture = sharpness_figure(
        steps, values, [5.0] * 20, stability_ratio=np.roll(values, 2) / 5, learning_rate=[0.1] * 20,
        learning_rate_limit=0.5 / values,
    )  # fmt: skip
    upper, lower = picture.axes
    assert upper.get_yscale() == ("linear" if spread == 1 else "log")
    scaled = np.log if spread > 1 else np.asarray
    corners = shade(upper)
    assert (
        scaled(corners[:, 1]) <= np.maximum(np.interp(corners[:, 0], steps, scaled(values)), scaled(5)) + 1e-9
    ).all()
    assert (corners[:, 1] >= 5 - 1e-9).all()
    assert corners[:, 1].max() > 6
    scaled = np.log if lower.get_yscale() == "log" else np.asarray
    corners = shade(lower)
    assert (corners[:, 1] <= 0.1 + 1e-9).all()
    assert (
        scaled(corners[:, 1]) >= np.minimum(np.interp(corners[:, 0], steps, scaled(0.5 / values)), scaled(0.1)) - 1e-9
    ).all()


def test_on_a_card_texts_are_large_enough_to_be_read():
    limits = [0.5 / value for value in RISING]
    with sized_for_cards():
        picture = sharpness_figure(
            STEPS, RISING, [5.0] * 20, batch_sharpness=[value / 2 for value in RISING], losses=LOSS, met_at=90,
            crossings=[120], learning_rate=[0.1] * 20, learning_rate_limit=limits, title="A run",
        )  # fmt: skip
        of_two_columns = curvature_fit_figure(torch.ones(2, 2), {"0.1": torch.ones(2, 2), "1": torch.ones(2, 2)})
    dots_of_a_text = 9 / 72 * picture.get_dpi()
    assert dots_of_a_text * 350 / (picture.get_figwidth() * picture.get_dpi()) >= 9.9  # pixels in TensorBoard's card
    check_picture(picture)
    check_picture(of_two_columns)
    assert of_two_columns.get_figwidth() > 7
    assert sharpness_figure([0], [1.0], [2.0]).get_figwidth() == 7


def test_without_a_limit_nothing_is_drawn_of_it():
    upper = sharpness_figure([0, 1], [1.0, 2.0], [None, math.nan]).axes[0]
    assert labels(upper) == ["sharpness"]
    assert not upper.collections


def test_a_limit_that_changes_is_drawn_as_it_was():
    limit = [2 / rate for rate in (0.4, 0.2, 0.1)]
    (_, line) = sharpness_figure([0, 1, 2], [1.0, 2.0, 3.0], limit).axes[0].lines
    assert line.get_ydata().tolist() == limit


@pytest.mark.parametrize("scale", [3e-12, 1.0, -4e7])
@pytest.mark.parametrize("title", ["", "limited by the learning rate"])
def test_fixed_margins_have_room_for_the_labels(scale, title):
    values = [scale * step for step in STEPS]
    limits = [1.234567e-5 / (1 + step) for step in STEPS]
    loss = (STEPS, [-12345.6 - 10 * step for step in STEPS])
    rates = {"learning_rate": [1e-7] * len(STEPS), "learning_rate_limit": limits}
    picture = sharpness_figure(STEPS, values, [abs(scale)] * len(STEPS), losses=loss, title=title, **rates)
    check_picture(picture)
    width, height = picture.bbox.width, picture.bbox.height
    for panel in picture.axes:
        box = panel.get_tightbbox()
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
        label = panel.yaxis.label.get_window_extent()
        assert all(tick.get_window_extent().x0 > label.x1 for tick in panel.get_yticklabels() if tick.get_text())


def test_what_is_shaded_follows_the_line_between_rare_eigenvalues():
    """And not only at the steps at which they were measured, as triangles."""
    eigenvalues = [8.0, None, None, None, 8.0]
    picture = sharpness_figure([0, 1, 2, 3, 4], eigenvalues, [4.0] * 5, batch_sharpness=[1.0] * 5)
    [shade] = picture.axes[0].collections
    [path] = shade.get_paths()
    assert all(path.contains_point((step, 7.9)) for step in (0.5, 1.5, 2.0, 2.5, 3.5))


def test_the_rate_and_its_limit_have_a_panel_between():
    rates, limits = [0.0, 0.01, 0.1], [None, 0.2, 0.05]
    picture = sharpness_figure(
        [0, 10, 20],
        [1.0, None, 3.0],
        [4.0, 4.0, 2.0],
        batch_sharpness=[None, 2.0, 2.5],
        learning_rate=rates,
        learning_rate_limit=limits,
        losses=([0, 10, 20], [3.0, 2.0, 1.0]),
    )
    check_picture(picture)
    sharpness, middle, loss = picture.axes
    assert [line.get_label() for line in sharpness.lines[:3]] == ["sharpness", "batch sharpness", "stability limit"]
    assert sharpness.lines[0].get_xdata().tolist() == [0, 20]  # from one known value to the next
    rate, limit = middle.lines
    assert rate.get_ydata().tolist() == rates
    assert limit.get_ydata().tolist() == limits[1:]
    assert (middle.get_yscale(), middle.get_ylabel(), loss.get_ylabel()) == ("linear", "learning rate", "training loss")
    # Shaded where the rate is above its limit, which begins between the two last steps and needs no known first one.
    [shade] = middle.collections
    assert 10 < shade.get_paths()[0].get_extents().x0 < 20


def test_rates_that_span_far_have_a_logarithmic_axis_though_one_is_zero():
    options = {"learning_rate": [0.0, 1e-4, 1e-2], "learning_rate_limit": [0.1, 0.1, 0.1]}
    assert sharpness_figure([0, 1, 2], [1.0] * 3, [2.0] * 3, **options).axes[1].get_yscale() == "log"


def test_five_optimizers_and_one_edge():
    names = ("SGD", "momentum", "Nesterov", "Adam", "RMSprop")
    curves = {
        name: (STEPS, [min(1.0, 0.1 + step / 100 / place) for step in STEPS]) for place, name in enumerate(names, 1)
    }
    picture = stability_ratio_figure(curves, losses=dict.fromkeys(names, LOSS), title="One edge, five optimizers")
    check_picture(picture)
    upper, lower = picture.axes
    assert labels(upper) == [*names]
    assert [text.get_text() for text in upper.texts] == ["edge of\nstability"]
    edge = next(line for line in upper.lines if list(line.get_ydata()) == [1.0, 1.0])
    assert edge.get_linestyle() == "--"
    colours = [line.get_color() for line in upper.lines[:5]]
    assert len({*colours}) == 5
    assert [line.get_color() for line in lower.lines] == colours


@pytest.mark.parametrize("ratios", [[0.2], [math.nan], [-0.5, 2.0], [1e-4, 1e3], [None, 3.0]])
def test_a_ratio_of_any_kind_shows_the_edge(ratios):
    picture = stability_ratio_figure({"SGD": (range(len(ratios)), ratios)})
    check_picture(picture)
    low, high = picture.axes[0].get_ylim()
    assert low < 1 < high
    known = np.array([ratio for ratio in ratios if ratio is not None and math.isfinite(ratio)])
    assert ((known >= low) & (known <= high)).all()
