import math

import pytest
import torch

from lyapunov_lightning.figures import (
    alignment_figure,
    density_figure,
    eigenvalues_figure,
    spectrum_overview_figure,
    subspace_figure,
)
from tests.figures.looking import check_picture

STEPS = [0, 30, 60, 90]


def falling(count, times=4):
    """Eigenvalues of `times` measurements, descending."""
    growth = 1 + torch.arange(times, dtype=torch.float64)[:, None]
    return growth * torch.exp(-0.4 * torch.arange(count, dtype=torch.float64))


def texts(panel):
    return [text.get_text() for text in panel.texts]


@pytest.mark.parametrize(
    ("largest", "smallest", "names"),
    [
        (1, 0, ["λ₁"]),
        (3, 2, ["λ₁", "λ₂", "λ₃", "|λₙ|", "|λₙ₋₁|"]),
        (14, 14, ["λ₁", "λ₁₄", "|λₙ|", "|λₙ₋₁₃|"]),
    ],
)
@pytest.mark.parametrize("times", [1, 4])
def test_the_ranks_are_named(largest, smallest, names, times):
    picture = eigenvalues_figure(STEPS[:times], falling(largest, times), -falling(smallest, times) / 10, title="A run")
    check_picture(picture)
    (panel,) = picture.axes
    assert sorted(texts(panel)) == sorted(names)
    assert len(panel.lines) == largest + smallest
    assert panel.get_yscale() == "log"


def test_what_is_of_the_other_sign_or_missing_is_left_out():
    largest = torch.tensor([[2.0, -1.0], [math.nan, 1.0], [1e9, 1e-9]])
    picture = eigenvalues_figure([0, 1, 2], largest)
    check_picture(picture)
    lines = {line.get_label(): line.get_ydata().tolist() for line in picture.axes[0].lines}
    assert lines["λ₁"] == pytest.approx([2.0, math.nan, 1e9], nan_ok=True)
    assert lines["λ₂"] == pytest.approx([math.nan, 1.0, 1e-9], nan_ok=True)
    nothing = eigenvalues_figure([0], torch.tensor([[-1.0]]), torch.tensor([[1.0]]))
    check_picture(nothing)
    assert texts(nothing.axes[0]) == ["no eigenvalue above zero"]


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e7])
def test_density_with_the_eigenvalues_that_are_known(scale):
    grid = torch.linspace(-2, 20, 100, dtype=torch.float64)
    known = torch.tensor([20.0, 5.0, -1.0]) * scale
    picture = density_figure(grid * scale, torch.exp(-grid.square()) / scale, known, title="step 300")
    check_picture(picture)
    (panel,) = picture.axes
    assert panel.lines[1].get_xdata().tolist() == pytest.approx(known.tolist())
    low, high = panel.get_ylim()
    assert low == pytest.approx(high * 1e-8, rel=0.9)


def test_density_of_nothing():
    check_picture(density_figure(torch.linspace(0, 1, 5), torch.zeros(5)))
    check_picture(density_figure(torch.zeros(1), torch.full((1,), math.nan), torch.zeros(0)))


@pytest.mark.parametrize(("times", "count"), [(1, 1), (4, 14)])
def test_alignment_by_rank(times, count):
    inside = [0.3, None, math.nan, 0.6][:times]
    picture = alignment_figure(STEPS[:times], falling(count, times) / 10, inside, 1e-4, title="A run")
    check_picture(picture)
    upper, lower = picture.axes
    assert {*texts(upper)} == {"v₁", f"v{'₁₄' if count == 14 else '₁'}"}
    assert lower.get_yscale() == "log"


@pytest.mark.parametrize("removed", [None, (range(100), [0.3] * 100)])
def test_the_subspace_of_an_update(removed):
    picture = subspace_figure(STEPS, falling(5), [None, 0.5, 0.7, 0.9], removed=removed)
    check_picture(picture)
    assert len(picture.axes) == (2 if removed is None else 3)
    first = subspace_figure([0], falling(5, 1), [None], removed=removed)
    check_picture(first)
    assert texts(first.axes[1]) == ["nothing to compare with yet"]


def line(eigenvalue):
    distances = torch.linspace(-0.5, 0.5, 11, dtype=torch.float64)
    model = 2.278 + 0.1 * distances + eigenvalue / 2 * distances**2
    return distances, model + distances**4, model, eigenvalue


@pytest.mark.parametrize(("num_lines", "with_density"), [(0, False), (1, True), (2, False), (5, True)])
def test_an_overview_has_a_panel_for_what_is_known(num_lines, with_density):
    grid = torch.linspace(-2, 20, 50)
    lines = {f"λ{place}": line(4.0 - place) for place in range(num_lines)}
    picture = spectrum_overview_figure(
        torch.tensor([4.0, 3.0, -1.0]),
        torch.tensor([0.1, math.nan, 0.2]),
        num_largest=2,
        density=(grid, torch.exp(-grid.square())) if with_density else None,
        lines=lines or None,
        title="A network",
    )
    check_picture(picture)
    assert len(picture.axes) == 1 + with_density + num_lines
    labels = [label.get_text() for label in picture.axes[0].get_xticklabels()]
    assert labels == ["λ₁", "λ₂", "λₙ"]
    if num_lines:
        assert picture.axes[-1].get_ylabel() == "loss − L₀ (L₀ = 2.278)"
        assert picture.axes[-num_lines].get_title(loc="left") == "λ0: curvature 4"


@pytest.mark.parametrize(("largest", "smallest"), [(1, 0), (0, 1), (14, 6), (0, 0)])
def test_an_overview_of_any_number_of_eigenvalues_and_any_range(largest, smallest):
    values = torch.cat([torch.logspace(6, 0, largest), -torch.logspace(2, -3, smallest)])
    check_picture(spectrum_overview_figure(values, torch.full_like(values, 0.01), largest))
