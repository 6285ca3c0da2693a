"""Figures of what the callbacks measured, all in one style: each function takes numbers and returns a `Picture`.

Nothing here knows a callback, a run or a logger, and nothing touches the state of pyplot.
"""

from lyapunov_lightning.figures.blocks import blocks_figure
from lyapunov_lightning.figures.landscape import (
    curvature_fit_figure,
    expected_change_figure,
    improvement_figure,
    loss_profiles_figure,
    loss_surface_figure,
    optimal_step_figure,
)
from lyapunov_lightning.figures.learning_rate import learning_rate_figure
from lyapunov_lightning.figures.negative import frozen_figure, negative_figure
from lyapunov_lightning.figures.plane import plane_contour_figure, plane_surface_figure
from lyapunov_lightning.figures.spectrum import (
    alignment_figure,
    density_figure,
    eigenvalues_figure,
    spectrum_overview_figure,
    subspace_figure,
)
from lyapunov_lightning.figures.stability import sharpness_figure, stability_ratio_figure
from lyapunov_lightning.figures.style import Picture, drawn_on

__all__ = [
    "Picture",
    "alignment_figure",
    "blocks_figure",
    "curvature_fit_figure",
    "density_figure",
    "drawn_on",
    "eigenvalues_figure",
    "expected_change_figure",
    "frozen_figure",
    "improvement_figure",
    "learning_rate_figure",
    "loss_profiles_figure",
    "loss_surface_figure",
    "negative_figure",
    "optimal_step_figure",
    "plane_contour_figure",
    "plane_surface_figure",
    "sharpness_figure",
    "spectrum_overview_figure",
    "stability_ratio_figure",
    "subspace_figure",
]
