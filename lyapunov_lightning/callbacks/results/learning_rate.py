"""What `QuasiNewtonLRController` set."""

from dataclasses import dataclass

from typing_extensions import override

from lyapunov_lightning.training.results import Result, known


@dataclass(frozen=True, kw_only=True)
class LearningRateResult(Result):
    """What `QuasiNewtonLRController` did in one step and why; None where its rule does not measure, or found nothing.

    Attributes:
        learning_rate: The learning rate of the step, the highest of the parameter groups.
        proposed: The learning rate that goes to the bottom of the parabola, in the running average; the paper's
            ``1/h0`` where the sharpness is the rule, times ``1 - momentum``.
        stability_ratio: The curvature that decides on stability over the optimizer's limit, at this learning rate.
        batch_sharpness: The curvature of batches along their own steps, in the metric of the optimizer.
        batch_agreement: How far batches agree in their curvature.
        step_length: How long the steps are, in units of the step to that bottom.
        annealing: The factor by which the end of the training makes the learning rate smaller.
        restored: How often the parameters were brought back so far.
        converged: Whether the measurement led to an estimate.
        slope_along_update: ``-gᵀu`` where the last update ``u`` began, at learning rate 1, seen by this batch.
        curvature_along_update: ``uᵀHu``.
        trials: How often the very first step was halved.
        lambda_max: The largest eigenvalue, in the metric of the optimizer where all batches agree; the running average
            under ``inverse_sharpness``.
        inverse_h0: The same as the paper's ``1/h0``.
        exponent: The Lyapunov exponent of Algorithm 1; 1 once settled.
        curvature_along_gradient: The second estimate, with which the eigenvalue was compared.
        refuted: Whether the tracked vector was wrong and was replaced by the gradient.

    """

    learning_rate: float
    proposed: float | None = None
    stability_ratio: float | None = None
    batch_sharpness: float | None = None
    batch_agreement: float | None = None
    step_length: float | None = None
    annealing: float = 1.0
    restored: int = 0
    converged: bool = True
    slope_along_update: float | None = None
    curvature_along_update: float | None = None
    trials: int | None = None
    lambda_max: float | None = None
    inverse_h0: float | None = None
    exponent: float | None = None
    curvature_along_gradient: float | None = None
    refuted: bool | None = None

    @override
    def scalars(self) -> dict[str, float]:
        found: dict[str, float | None] = {
            "quasi_newton/learning_rate": self.learning_rate,
            "quasi_newton/stability_ratio": self.stability_ratio,
            "quasi_newton_details/batch_sharpness": self.batch_sharpness,
            "quasi_newton_details/batch_agreement": self.batch_agreement,
            "quasi_newton/curvature_along_update": self.curvature_along_update,
            "quasi_newton/slope_along_update": self.slope_along_update,
            "quasi_newton/step_length": self.step_length,
            "quasi_newton_details/proposed": self.proposed,
            "quasi_newton_details/annealing": self.annealing,
            "quasi_newton_details/restored": self.restored,
            "quasi_newton_details/trials": self.trials,
            "quasi_newton_details/lambda_max": self.lambda_max,
            "quasi_newton_details/inverse_h0": self.inverse_h0,
            "quasi_newton_details/lyapunov_exponent": self.exponent,
            "quasi_newton_details/curvature_along_gradient": self.curvature_along_gradient,
            "quasi_newton_details/refuted": self.refuted,
            "quasi_newton_details/converged": self.converged,
        }
        return known(found)
