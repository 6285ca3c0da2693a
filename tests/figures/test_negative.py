import math

import pytest
import torch

from lyapunov_lightning.figures import frozen_figure, negative_figure
from tests.figures.looking import check_picture

TIMES = torch.arange(0, 100, 10, dtype=torch.float64)
ENDS = torch.stack([5 + TIMES / 10, -1 - TIMES / 100], dim=1)


def followed(steps, start):
    """Curvature along directions of these steps, which fades."""
    curves = {}
    for step in steps:
        times = TIMES[step <= TIMES]
        curves[step] = torch.stack([times, start * torch.exp(-(times - step) / 30)], dim=1)
    return curves


@pytest.mark.parametrize("steps", [[0], [0, 30, 60], range(0, 100, 10)])
def test_frozen_directions(steps):
    picture = frozen_figure(TIMES.tolist(), ENDS, followed(steps, 5.0), followed(steps, -1.0), title="A run")
    check_picture(picture)
    for panel, name in zip(picture.axes, ("largest eigenvalue", "smallest eigenvalue"), strict=True):
        end, *curves = panel.lines
        assert end.get_label() == name
        assert [curve.get_label() for curve in curves] == [f"of step {step}" for step in steps]
        assert [curve.get_xdata()[0] for curve in curves] == [*steps]
        assert all(curve.get_marker() == "o" and curve.get_markevery() == [0] for curve in curves)
        assert len(panel.get_legend().get_texts()) == (1 + len(steps) if len(steps) < 7 else 3)


def test_frozen_directions_at_a_single_step_or_of_no_value():
    point = torch.tensor([[0.0, 5.0]])
    check_picture(frozen_figure([0], ENDS[:1], {0: point}, {0: -point}))
    check_picture(frozen_figure([0], ENDS[:1] * math.nan, {0: point * math.nan}, {0: point * math.inf}))
    check_picture(frozen_figure([0], ENDS[:1], {}, {}))


def test_negative_eigenvalues_and_their_ratio_to_the_largest():
    lambda_min = torch.tensor([[-2.0, -1.0], [-1.0, 0.5], [0.1, 0.2]])
    picture = negative_figure([0, 10, 20], lambda_min, [4.0, None, 5.0], title="A run")
    check_picture(picture)
    upper, lower = picture.axes
    moduli = {line.get_label(): line.get_ydata().tolist() for line in upper.lines}
    assert moduli["|λₙ|"] == pytest.approx([2.0, 1.0, math.nan], nan_ok=True)
    assert moduli["|λₙ₋₁|"] == pytest.approx([1.0, math.nan, math.nan], nan_ok=True)
    assert lower.lines[0].get_ydata().tolist() == pytest.approx([0.5, math.nan, math.nan], nan_ok=True)


@pytest.mark.parametrize("lambda_min", [torch.full((1, 1), 0.3), torch.full((1, 14), -1e-9), torch.zeros(1, 0)])
def test_negative_eigenvalues_of_any_kind(lambda_min):
    check_picture(negative_figure([0], lambda_min, [None]))


def test_a_ratio_that_spans_far_is_on_a_logarithmic_axis():
    picture = negative_figure([0, 1], torch.tensor([[-1e-6], [-1.0]]), [1.0, 1.0])
    check_picture(picture)
    assert picture.axes[1].get_yscale() == "log"
