"""The result of a measurement of `LossAlongEigvecScanner`."""

from dataclasses import dataclass

from typing_extensions import override

from lyapunov_lightning.curvature.directions.scanning import SURFACE
from lyapunov_lightning.training.results import Result, Row, finite, known


@dataclass(frozen=True, kw_only=True)
class ScanResult(Result):
    """The result of a measurement of `LossAlongEigvecScanner`.

    Values are None or empty where nothing was measured, or nothing finite.

    Attributes:
        directions: The names of the directions: ``1`` ... for the eigenvectors of the upper end, ``min_1`` ... for
            those of the lower end, ``random_1`` ... for random ones. All values of directions are in this order.
        curvatures: The curvature along each direction, which for an eigenvector is its eigenvalue.
        gradient_components: The modulus ``|gᵀv|`` of the gradient's component along each.
        unit_steps: The distance to the first minimum in the direction of descent; None if none was found.
        best_improvements: How far the loss falls up to there.
        scales: Half widths of the windows over which loss and model are compared.
        curvature_fits: For each direction and each scale the second derivative of a quadratic fitted to the loss, in
            the unit of the eigenvalue.
        curvature_fit_errors: Their standard errors due to rounding. Where the gradient's component is tiny, so is the
            window, and in float32 the fit then has no meaning.
        model_gaps: The largest distances between the loss and its quadratic model.
        sgd_steps: Multiples of an SGD step along the first direction.
        expected_changes: The mean change of the loss at each of these multiples.
        sgd_step: The mean length of an SGD step along the first direction.
        surface: The loss at -5 ... 5 of these steps.
        plane_axes: The names of the two axes of the plane, as of directions; ``gradient`` for what of the gradient is
            orthogonal to the first axis.
        plane_coordinates: The coordinates on each axis at which the loss was evaluated, as shares of the norm that the
            parameters had at `plane_step`; 0 is where they are now.
        plane_losses: The loss there, one row for each coordinate on the first axis.
        plane_step: The step at which the axes were taken.
        plane_position: The coordinates of the parameters themselves, projected on the plane through the origin. Their
            differences are the path of the training on it, as long as `plane_step` is the same.
        loss: The loss at the parameters before the step.
        noise: The standard deviation of its rounding errors. The search treats losses as equal that differ by less than
            four of these.
        residual: The largest ``‖Hv − λv‖`` of the eigenpairs.
        converged: The share of the eigenpairs whose residual met the tolerance. An eigenvalue is the second derivative
            along its vector whether or not that has converged.
        forward_passes: Evaluations of the loss on the measured data, each with a forward pass for every batch. A
            direction takes ``points`` for each scale, and 5 to 30 for the line search, at most 100; each of
            ``sgd_steps`` takes up to 10, and the surface 11; a plane takes the square of its points.
        matvecs: Hessian-vector products spent.

    """

    directions: tuple[str, ...]
    curvatures: tuple[float, ...]
    gradient_components: tuple[float, ...]
    unit_steps: Row
    best_improvements: Row
    scales: tuple[float, ...] = ()
    curvature_fits: tuple[Row, ...] = ()
    curvature_fit_errors: tuple[Row, ...] = ()
    model_gaps: tuple[Row, ...] = ()
    sgd_steps: tuple[float, ...] = ()
    expected_changes: Row = ()
    sgd_step: float | None = None
    surface: Row = ()
    plane_axes: tuple[str, ...] = ()
    plane_coordinates: tuple[float, ...] = ()
    plane_losses: tuple[Row, ...] = ()
    plane_step: int | None = None
    plane_position: tuple[float, ...] = ()
    loss: float
    noise: float
    residual: float | None = None
    converged: float | None = None
    forward_passes: int = 0
    matvecs: int = 0

    @property
    def optimal_steps(self) -> Row:
        """The first minimum along each direction as a multiple of the gradient's component; ``1/λ`` of a quadratic."""
        steps = zip(self.unit_steps, self.gradient_components, strict=True)
        return tuple(None if step is None else finite(step / slope) for step, slope in steps)

    @property
    def plane_improvement(self) -> float | None:
        """How far the lowest loss on the plane lies below that in its middle, where the parameters are."""
        middle = len(self.plane_coordinates) // 2
        here = self.plane_losses[middle][middle] if self.plane_losses else None
        return (
            None if here is None else here - min(loss for row in self.plane_losses for loss in row if loss is not None)
        )

    @property
    @override
    def has_converged(self) -> bool:
        return self.converged is None or self.converged == 1.0

    @override
    def scalars(self) -> dict[str, float]:
        found: dict[str, float | None] = {}
        for name, step, improvement in zip(self.directions, self.optimal_steps, self.best_improvements, strict=True):
            found[f"scan/optimal_step_{name}"] = step
            found[f"scan/best_improvement_{name}"] = improvement
        for alpha, change in zip(self.sgd_steps, self.expected_changes, strict=False):
            found[f"scan/expected_change_{alpha:g}"] = change
        found |= {
            "scan/plane_improvement": self.plane_improvement,
            "scan_details/loss": self.loss,
            "scan_details/noise": self.noise,
            "scan_details/residual": self.residual,
            "scan_details/converged": self.converged,
            "scan_details/forward_passes": self.forward_passes,
            "scan_details/matvecs": self.matvecs,
            "scan_details/sgd_step": self.sgd_step,
        }
        return known(found)

    @override
    def table(self) -> dict[str, float]:
        found: dict[str, float | None] = {}
        for index, name in enumerate(self.directions):
            found[f"scan/lambda_{name}"] = self.curvatures[index]
            found[f"scan/gradient_component_{name}"] = self.gradient_components[index]
            for place, scale in enumerate(self.scales):
                found[f"scan/curvature_fit_{scale:g}_{name}"] = self.curvature_fits[index][place]
                found[f"scan/curvature_fit_error_{scale:g}_{name}"] = self.curvature_fit_errors[index][place]
                found[f"scan/model_gap_{scale:g}_{name}"] = self.model_gaps[index][place]
            found[f"scan/bracketed_{name}"] = float(self.unit_steps[index] is not None)
            found[f"scan/unit_step_{name}"] = self.unit_steps[index]
        found |= {f"scan/path_{axis}": place for axis, place in enumerate(self.plane_position, 1)}
        found |= {f"scan/surface_{k}": loss for k, loss in zip(SURFACE, self.surface, strict=False)}
        return known(found)
