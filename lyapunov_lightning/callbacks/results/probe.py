"""What `CurvatureProbe` found."""

from dataclasses import dataclass

from typing_extensions import override

from lyapunov_lightning.training.results import Result, known

_DECISIVE = ("critical_sharpness", "preconditioned_lambda_max", "lambda_max")
"""The fields that `ProbeResult.stability_limit` may be a limit on: the first one that was measured is the one."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult(Result):
    """What `CurvatureProbe` found; None for what was not measured or is not known.

    Attributes:
        lambda_max: The largest eigenvalue, the sharpness, in the unit of the loss's second derivative.
        lambda_min: The smallest eigenvalue.
        residual: ``‖Hv − λv‖`` of the eigenvalue asked for, of the largest one where both are.
        residual_min: The same of the smallest one, where both are asked for.
        value_error: How far that eigenvalue is estimated to be from the true one.
        value_error_min: The same of the smallest one, where both are asked for.
        converged: Whether the tolerance was met by all.
        matvecs: Hessian-vector products spent, or differences of gradients.
        learning_rate: The optimizer's, the highest of its groups.
        stability_limit: The eigenvalue at which that learning rate turns unstable; for the critical sharpness
            ``2 / learning_rate``, whatever the optimizer.
        preconditioned_lambda_max: The largest eigenvalue of the preconditioned Hessian with the weight decay that is
            part of the gradient, where the limit is one on it; of the negative one where the loss is maximized.
        preconditioned_residual: The residual of that.
        preconditioned_value_error: Its estimated error.
        inverse_h0: The paper's quasi-Newton learning rate, in its own convention.
        exponent: The finite-size Lyapunov exponent of the map that was followed.
        exponent_sgd: That of the training map, where both ends are followed.
        paper_lambda_min: The smallest eigenvalue in the paper's convention.
        critical_sharpness: ``2/η_c``, where a step along the optimizer's own update with learning rate ``η_c`` brings
            the loss back to where it began.
        forward_passes: Evaluations of the loss that it took, each a forward pass for every batch of the measured data.

    """

    lambda_max: float | None = None
    lambda_min: float | None = None
    residual: float | None = None
    residual_min: float | None = None
    value_error: float | None = None
    value_error_min: float | None = None
    converged: bool = False
    matvecs: int = 0
    learning_rate: float | None = None
    stability_limit: float | None = None
    preconditioned_lambda_max: float | None = None
    preconditioned_residual: float | None = None
    preconditioned_value_error: float | None = None
    inverse_h0: float | None = None
    exponent: float | None = None
    exponent_sgd: float | None = None
    paper_lambda_min: float | None = None
    critical_sharpness: float | None = None
    forward_passes: int | None = None

    @property
    def stability_ratio(self) -> float | None:
        """The eigenvalue that counts for the optimizer over its limit; 1 is the edge of stability, whatever it is.

        With the critical sharpness it is the learning rate over the critical one: above 1 the step raised the loss.

        """
        measured: list[float | None] = [getattr(self, name) for name in _DECISIVE]
        decisive = next((value for value in measured if value is not None), None)
        return None if decisive is None or self.stability_limit is None else decisive / self.stability_limit

    @override
    def scalars(self) -> dict[str, float]:
        is_lyapunov = self.exponent is not None
        lr_times_lambda_max = (
            None if self.learning_rate is None or self.lambda_max is None else self.learning_rate * self.lambda_max
        )
        found: dict[str, float | None] = {
            "curvature/lambda_max": self.lambda_max,
            "curvature/lambda_min": self.lambda_min,
            "curvature/preconditioned_lambda_max": self.preconditioned_lambda_max,
            "curvature/critical_sharpness": self.critical_sharpness,
            "curvature/stability_limit": self.stability_limit,
            "curvature/stability_ratio": self.stability_ratio,
            "curvature/lyapunov_exponent": self.exponent,
            f"curvature{'' if is_lyapunov else '_details'}/inverse_h0": self.inverse_h0,
            "curvature_details/lyapunov_exponent_sgd": self.exponent_sgd,
            "curvature_details/paper_lambda_min": self.paper_lambda_min,
            "curvature_details/residual": self.residual,
            "curvature_details/residual_min": self.residual_min,
            "curvature_details/preconditioned_residual": self.preconditioned_residual,
            "curvature_details/value_error": self.value_error,
            "curvature_details/value_error_min": self.value_error_min,
            "curvature_details/preconditioned_value_error": self.preconditioned_value_error,
            "curvature_details/lr_times_lambda_max": lr_times_lambda_max,
            "curvature_details/converged": float(self.converged),
            "curvature_details/matvecs": float(self.matvecs),
            "curvature_details/forward_passes": self.forward_passes,
        }
        return known(found)
