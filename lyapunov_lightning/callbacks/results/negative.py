"""The result of a measurement of `NegativeCurvatureTracker`."""

from dataclasses import dataclass, field

from typing_extensions import override

from lyapunov_lightning.training.results import Result, known, ranked


@dataclass(frozen=True, kw_only=True)
class NegativeResult(Result):
    """The result of a measurement of `NegativeCurvatureTracker`; None or empty where nothing was measured.

    Attributes:
        lambda_min: The smallest eigenvalues, the most negative first, in the unit of the loss's second derivative.
        lambda_max: The largest eigenvalue.
        negative_mass: Share of the negative eigenvalues in the sum of the moduli of all measured ones.
        gradient_components: Modulus of the component of the gradient on the measured data along each of the smallest
            eigenvectors.
        gradient_norm: The norm of that gradient, to compare the components with.
        residual: The largest ``‖Hv − λv‖`` of all pairs.
        converged: The share of the pairs whose residual met the tolerance.
        frozen: For each step at which directions were frozen, the curvature along its top and its bottom eigenvector.
        online_lambda_min: The running estimate of the smallest eigenvalue.
        online_residual: Its residual.
        online_age: How many steps ago the estimate and its residual were measured.
        descent_step: The length of the move that is to follow the optimizer's step, with the sign along the vector.
        matvecs: Hessian-vector products spent.

    """

    lambda_min: tuple[float, ...] = ()
    lambda_max: float | None = None
    negative_mass: float | None = None
    gradient_components: tuple[float, ...] = ()
    gradient_norm: float | None = None
    residual: float | None = None
    converged: float | None = None
    frozen: dict[int, tuple[float, float]] = field(default_factory=dict)
    online_lambda_min: float | None = None
    online_residual: float | None = None
    online_age: int | None = None
    descent_step: float | None = None
    matvecs: int = 0

    @property
    def lambda_ratio(self) -> float | None:
        """``|lambda_min[0]| / lambda_max`` if `lambda_max` is positive, else None."""
        return (
            abs(self.lambda_min[0]) / self.lambda_max if self.lambda_max is not None and self.lambda_max > 0 else None
        )

    @property
    def online_error(self) -> float | None:
        """The relative error of the running estimate, if the eigenvalue itself was measured too."""
        if self.online_lambda_min is None or not self.lambda_min or not self.lambda_min[0]:
            return None
        return abs(self.online_lambda_min - self.lambda_min[0]) / abs(self.lambda_min[0])

    @property
    @override
    def has_converged(self) -> bool:
        return self.converged is None or self.converged == 1.0

    @override
    def scalars(self) -> dict[str, float]:
        found: dict[str, float | None] = {
            **ranked("negative/lambda_min", self.lambda_min),
            "negative/lambda_ratio": self.lambda_ratio,
            **{f"negative/frozen_{step}_top": top for step, (top, _) in self.frozen.items()},
            **{f"negative/frozen_{step}_bottom": bottom for step, (_, bottom) in self.frozen.items()},
            "negative/online_lambda_min": self.online_lambda_min,
            "negative_details/lambda_max": self.lambda_max,
            "negative_details/negative_mass": self.negative_mass,
            **ranked("negative_details/gradient_component", self.gradient_components),
            "negative_details/gradient_norm": self.gradient_norm,
            "negative_details/residual": self.residual,
            "negative_details/converged": self.converged,
            "negative_details/online_residual": self.online_residual,
            "negative_details/online_age": self.online_age,
            "negative_details/online_error": self.online_error,
            "negative_details/descended": None if self.descent_step is None else float(self.descent_step != 0),
            "negative_details/descent_step": self.descent_step,
            "negative_details/matvecs": self.matvecs,
        }
        return known(found)
