"""Contours and surfaces of planes: what they show, with losses of any range and where there are none."""

import math

import pytest
import torch

from lyapunov_lightning.figures import plane_contour_figure, plane_surface_figure
from tests.figures.looking import check_picture

WHERE = torch.linspace(-1, 1, 7, dtype=torch.float64)
BOWL = 1 + WHERE[:, None] ** 2 + 3 * WHERE**2
STEEP = 1e-3 + 50 * BOWL**4
BROKEN = BOWL.clone()
BROKEN[0, 0], BROKEN[-1, 2] = math.nan, math.inf


@pytest.mark.parametrize("losses", [BOWL, STEEP, BROKEN, -BOWL], ids=["even", "steep", "broken", "negative"])
def test_planes_are_drawn_readably(losses):
    names = ("min_1", "gradient")
    contours = plane_contour_figure(WHERE, losses, names, [(0.5, -0.5), (0.2, 0.1), (0.0, 0.0)])
    check_picture(contours)
    panel = contours.axes[0]
    assert panel.get_xlabel() == "along eigenvector min_1, share of ‖θ‖"
    assert panel.get_ylabel() == "along the gradient, share of ‖θ‖"
    path, here = panel.lines
    assert path.get_xydata().tolist() == [[0.5, -0.5], [0.2, 0.1], [0.0, 0.0]]
    assert here.get_xydata().tolist() == [[0.0, 0.0]]
    check_picture(plane_surface_figure(WHERE, losses, names))


def test_the_first_axis_is_the_horizontal_one():
    losses = WHERE[:, None] ** 2 + 0 * WHERE  # changes along the first axis alone
    levels = plane_contour_figure(WHERE, losses).axes[0].collections[-1]
    for path in levels.get_paths():
        for line in path.to_polygons(closed_only=False):
            assert max(line[:, 0]) - min(line[:, 0]) < 1e-9


@pytest.mark.parametrize("losses", [torch.ones(7, 7), torch.full((7, 7), math.nan)])
def test_without_two_different_losses_there_are_no_contours(losses):
    picture = plane_contour_figure(WHERE, losses)
    assert [text.get_text() for text in picture.axes[0].texts] == ["the loss is the same everywhere, or not finite"]
    check_picture(plane_surface_figure(WHERE, losses))
