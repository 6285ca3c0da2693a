import copy
import inspect
import sys

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from lyapunov_lightning import figures
from lyapunov_lightning.figures import Picture, drawn_on, eigenvalues_figure, loss_surface_figure, sharpness_figure
from lyapunov_lightning.figures.style import COLOURS, _apart, curve, floats, house_style, key, new_picture, rank_names
from tests.figures.looking import check_picture, draw


def small() -> Picture:
    return sharpness_figure([0, 10, 20], [1.0, 3.0, 4.1], [4.0, 4.0, 4.0], title="A run")


def test_a_picture_is_a_figure_that_a_notebook_shows():
    picture = small()
    assert isinstance(picture, Figure)
    assert picture._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["run", "run.png", "run.svg", "run.SVG", "lr0.4", "v1.2.png"])
def test_a_picture_is_saved_for_paper_and_screen(tmp_path, name):
    png, svg = small().save(tmp_path / "new" / name)
    stem = name if name == "lr0.4" else name.rsplit(".", 1)[0]
    assert (png.name, svg.name) == (f"{stem}.png", f"{stem}.svg")
    with Image.open(png) as image:
        assert image.size == (1400, 660)  # 7 by 3.3 inches
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
        assert image.convert("RGB").getpixel((1399, 0)) == (255, 255, 255)
    assert "stability limit</text>" in svg.read_text()


@pytest.mark.parametrize("name", [name for name in figures.__all__ if name.endswith("_figure")])
def test_every_figure_takes_a_title_and_promises_a_picture(name):
    signature = inspect.signature(getattr(figures, name))
    assert signature.parameters["title"].kind is inspect.Parameter.KEYWORD_ONLY
    assert signature.return_annotation is Picture


def test_a_format_that_was_asked_for_is_written_too(tmp_path):
    written = small().save(str(tmp_path / "run.pdf"))
    assert [path.name for path in written] == ["run.png", "run.svg", "run.pdf"]
    assert written[-1].read_bytes().startswith(b"%PDF")


def test_equal_figures_are_equal_files(tmp_path):
    first, second = (small().save(tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_users_settings_neither_show_nor_change(tmp_path):
    (plain, _) = small().save(tmp_path / "plain")
    with matplotlib.rc_context(
        {"figure.facecolor": "black", "font.size": 30, "text.color": "white", "lines.marker": "x"}
    ):
        before = copy.copy(matplotlib.rcParams)
        (dark, _) = small().save(tmp_path / "dark")
        assert matplotlib.rcParams == before
    assert dark.read_bytes() == plain.read_bytes()


def test_no_window_is_opened():
    def windows():
        pyplot = sys.modules.get("matplotlib.pyplot")
        return None if pyplot is None else pyplot.get_fignums()

    before = windows()  # an earlier test in this process may have left some
    small()._repr_png_()
    assert windows() == before


DEUTERANOPIA = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
PROTANOPIA = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
TRITANOPIA = [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]


@pytest.mark.parametrize("seen_by", [np.eye(3), DEUTERANOPIA, PROTANOPIA, TRITANOPIA], ids=["all", "d", "p", "t"])
def test_the_colours_are_told_apart_with_any_colour_vision(seen_by):
    """Distances in CIELAB, where 2.3 is just noticeable, of what Machado et al. (2009) simulate."""
    rgb = np.array([matplotlib.colors.to_rgb(colour) for colour in COLOURS])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0177, 0.1095, 0.8728]]
    )  # white is 1, 1, 1
    x, y, z = np.cbrt(to_xyz @ np.clip(np.asarray(seen_by) @ linear.T, 1e-4, 1))
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=2) + 1e3 * np.eye(len(COLOURS))
    assert distances.min() > 10


def test_what_cannot_be_drawn_is_nan():
    assert floats([1, None, float("inf"), "nan"]).tolist() == pytest.approx([1, np.nan, np.nan, np.nan], nan_ok=True)
    assert floats(torch.tensor([[1.0, torch.inf]], requires_grad=True)).shape == (1, 2)


def test_single_points_are_dots():
    with house_style():
        panel = new_picture(3, 2).subplots()
        line = curve(panel, range(10), [1, None, 2, 3, None, 4, 5, 6, 7, 8])
        whole = curve(panel, range(10), range(10))
    assert line.get_marker() == "o"
    assert line.get_markevery() == [0]
    assert whole.get_marker() == "None"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.3))
def test_labels_are_moved_apart_and_keep_their_order_and_centre(places, room):
    places = np.sort(places)
    moved = _apart(places, room)
    assert (np.diff(moved) >= room * (1 - 1e-9)).all()
    assert moved.mean() == pytest.approx(places.mean(), abs=1e-9)
    if (np.diff(places) >= room * (1 + 1e-9)).all():
        assert moved == pytest.approx(places)


def test_ranks_have_the_names_of_the_field():
    assert rank_names(2, 3) == ["λ₁", "λ₂", "λₙ", "λₙ₋₁", "λₙ₋₂"]
    assert rank_names(12, 0)[-1] == "λ₁₂"


def test_the_key_takes_as_many_rows_as_it_needs():
    values = torch.ones(3, 2)
    picture = eigenvalues_figure([0, 1, 2], values, -values)
    with house_style():
        panel = new_picture(4, 3).subplots()
        panel.set(xlabel="x", ylabel="y")
        for name in ("a curve with a name", "another curve with a name", "a third curve with a name"):
            panel.plot([0, 1], [0, 1], label=name)
        key(panel)
    check_picture(panel.get_figure())
    check_picture(picture)


def test_axes_of_ones_own_get_the_first_panel_and_nothing_else_changes():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    place, minor = right.get_position().bounds, type(right.xaxis.get_minor_locator())
    with drawn_on(right):
        sharpness_figure([0, 10, 20], [1.0, 3.0, 4.1], [4.0, 4.0, 4.0], losses=([0, 1, 2], [2.0, 1.0, 0.5]), title="T")
    alone = sharpness_figure([0, 10, 20], [1.0, 3.0, 4.1], [4.0, 4.0, 4.0]).axes[0]
    assert [line.get_label() for line in right.lines] == [line.get_label() for line in alone.lines]
    assert (right.get_xlabel(), right.get_ylabel()) == ("step", "curvature")
    assert (right.get_position().bounds, type(right.xaxis.get_minor_locator())) == (place, minor)
    assert figure.axes == [left, right]
    assert not left.lines
    draw(figure)
    assert sharpness_figure([0, 10], [1.0, 3.0], [4.0, 4.0]).axes[0] is not right  # once the block is over


def test_axes_that_are_none_are_refused():
    surface = ([float(t) for t in range(6)], [-1, 0, 1], torch.ones(6, 3), torch.arange(6.0))
    with pytest.raises(ValueError, match="`ax` should have three dimensions"), drawn_on(Figure().subplots()):
        loss_surface_figure(*surface)
    space = Figure().add_subplot(projection="3d")
    with drawn_on(space):
        loss_surface_figure(*surface)
    assert len(space.lines) == 6
    with pytest.raises(ValueError, match="`ax` should be Axes of Matplotlib, got 3"), drawn_on(3):
        pass


def test_there_is_no_key_without_names():
    with house_style():
        panel = new_picture(3, 2).subplots()
        key(panel)
    draw(panel.get_figure())
    assert panel.get_legend() is None
