import math

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lyapunov_lightning.curvature.directions.landscape import QuadraticFit, Window
from lyapunov_lightning.figures import (
    curvature_fit_figure,
    expected_change_figure,
    improvement_figure,
    loss_profiles_figure,
    loss_surface_figure,
    optimal_step_figure,
)
from tests.figures.looking import check_picture

EIGENVALUES = torch.tensor([[20.0, -1.0], [30.0, -0.5], [0.3, math.nan]], dtype=torch.float64)


def window(scale, curvature, points=11, loss=2.278):
    distances = torch.linspace(-scale, scale, points, dtype=torch.float64)
    model = loss - 0.1 * distances + curvature / 2 * distances**2
    return Window(scale, distances, model + distances**4, model, QuadraticFit(curvature, 0.1))


@pytest.mark.parametrize("points", [10, 11])
def test_profiles_show_how_far_the_loss_is_from_that_at_zero(points):
    profiles = {
        "1: λ = 20": [window(0.1, 20.0, points), window(1.0, 20.0, points)],
        "min_1: λ = -1": [window(1e-6, -1)],
    }
    picture = loss_profiles_figure(profiles, title="A run")
    check_picture(picture)
    (first, second, third, empty) = picture.axes
    assert not empty.axison
    loss, model = first.lines
    expected = profiles["1: λ = 20"][0].losses - 2.278
    assert loss.get_ydata() == pytest.approx(expected.numpy(), abs=1e-12)
    assert model.get_linestyle() == "--"
    assert first.get_ylabel() == "loss − L₀ (L₀ = 2.278)"
    assert [panel.get_title(loc="left") for panel in (first, third)] == [*profiles]
    assert [panel.get_title(loc="right") for panel in (first, second, third)] == ["scale 0.1", "scale 1", "scale 10⁻⁶"]


def test_profiles_of_nothing_say_so():
    picture = loss_profiles_figure({"1: λ = 20": [window(0.1, 20.0)], "min_1: λ = 0": []})
    check_picture(picture)
    assert [text.get_text() for text in picture.axes[1].texts] == ["no slope along this direction, nothing to scan"]
    check_picture(loss_profiles_figure({}))


def test_profile_of_a_loss_that_overflows():
    wide = window(1.0, 20.0)
    wide.losses[0], wide.model[-1] = math.inf, math.nan
    check_picture(loss_profiles_figure({"1": [wide]}))


def test_fits_against_eigenvalues_share_the_scale_of_the_diagonal():
    fits = {"0.1": EIGENVALUES, "1": EIGENVALUES.abs() + 0.1}
    picture = curvature_fit_figure(EIGENVALUES, fits, steps=[0, 50, 100], title="A run")
    check_picture(picture)
    *panels, bar = picture.axes
    for panel, fitted in zip(panels, fits.values(), strict=True):
        assert panel.get_xscale() == panel.get_yscale() == "symlog"
        assert panel.xaxis.get_transform().linthresh == panel.yaxis.get_transform().linthresh
        points = panel.collections[0].get_offsets().data
        known = ~EIGENVALUES.isnan()
        assert points.tolist() == torch.stack([EIGENVALUES[known], fitted[known]], dim=1).tolist()
        (diagonal,) = panel.lines
        assert diagonal.get_label() == "quadratic loss"
        assert np.array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    assert bar.get_ylabel() == "step"
    assert bar.get_ylim() == (0, 100)


def test_measurements_are_counted_without_their_steps_and_one_needs_no_key():
    assert improvement_figure(EIGENVALUES, EIGENVALUES.abs()).axes[1].get_ylabel() == "measurement"
    assert len(improvement_figure(EIGENVALUES[:1], EIGENVALUES[:1].abs()).axes) == 1


def test_optimal_steps_are_inverted():
    picture = optimal_step_figure(EIGENVALUES, 1 / EIGENVALUES)
    check_picture(picture)
    points = picture.axes[0].collections[0].get_offsets().data
    assert points[:, 0] == pytest.approx(points[:, 1])


@pytest.mark.parametrize(
    ("eigenvalues", "values"),
    [
        ([[1.0]], [[2.0]]),
        ([[1.0]], [[math.nan]]),
        ([[-1.0]], [[0.0]]),
        ([[1e-9, -1e9]], [[-1e12, 1e-12]]),
    ],
)
def test_points_of_any_range(eigenvalues, values):
    eigenvalues, values = torch.tensor(eigenvalues), torch.tensor(values)
    check_picture(optimal_step_figure(eigenvalues, values))
    check_picture(improvement_figure(eigenvalues, values))
    check_picture(curvature_fit_figure(eigenvalues, {"1": values}))


def test_expected_changes_are_named_by_their_steps():
    changes = {"0.5": torch.tensor([-0.1, 0.1, math.nan]), "1": torch.tensor([0.2, 0.3, 0.1])}
    picture = expected_change_figure([0.0, 0.5, 1.0], changes, title="A run")
    check_picture(picture)
    texts = [text.get_text() for text in picture.axes[0].get_legend().get_texts()]
    assert texts == ["0.5 SGD steps", "1 SGD step"]
    check_picture(expected_change_figure([0], {"1": torch.tensor([1e-6])}))
    check_picture(expected_change_figure([], {}))


def scans(count):
    steps = torch.arange(-5.0, 6.0)
    losses = 1 + 0.1 * torch.arange(1.0, count + 1)[:, None] * steps.square()
    return [place / 2 for place in range(count)], range(-5, 6), losses, torch.arange(1.0, count + 1)


@pytest.mark.parametrize("count", [1, 4])
def test_few_scans_are_curves_in_one_plane(count):
    picture = loss_surface_figure(*scans(count))
    check_picture(picture)
    (panel,) = picture.axes
    assert panel.name == "rectilinear"
    assert [line.get_label() for line in panel.lines] == ["epoch 0", "epoch 0.5", "epoch 1", "epoch 1.5"][:count]


@pytest.mark.parametrize(("count", "drawn"), [(5, 5), (130, 44)])
def test_five_scans_are_a_surface(count, drawn):
    epochs, multiples, losses, sharpness = scans(count)
    losses[0, 0], sharpness[1] = math.inf, math.nan
    picture = loss_surface_figure(epochs, multiples, losses, sharpness, title="A run")
    FigureCanvasAgg(picture).draw()
    surface, bar = picture.axes
    assert surface.name == "3d"
    assert len(surface.lines) == drawn
    assert [surface.get_xlabel(), surface.get_ylabel(), surface.get_zlabel()] == ["SGD steps", "epoch", "loss"]
    assert bar.get_ylabel() == "curvature along the direction"
    assert len(loss_surface_figure(epochs, multiples, losses, torch.ones(count)).axes) == 1
