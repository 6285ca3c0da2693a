"""What `CurvatureProbe` found."""

from dataclasses import dataclass

from typing_extensions import override

from lyapunov_lightning.training.results import Result, known

WHOLE_AGREEMENT = 0.95
"""The agreement of the batches from which on the eigenvalue counts as on all of the data. Of the runs that the verdict
was tried on, full batches had 1.00, seven of ten of 256 samples between 0.2 and 0.94, and nine of ten of 32 below 0.8.
"""


# Thousands are kept, and the dictionary of so many fields would be four times as large as what they hold.
@dataclass(frozen=True, kw_only=True, slots=True)
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
        learning_rate: The optimizer's at this step, the highest of its groups.
        stability_limit: The curvature at which that learning rate turns unstable: of the batch sharpness at the
            agreement that was measured, and of the eigenvalue that counts; for the critical sharpness
            ``2 / learning_rate``, whatever the optimizer.
        batch_sharpness: The curvature of a mini-batch along its own step, in the metric of the optimizer; the mean over
            the last measurements.
        batch_sharpness_error: Its standard error.
        step_sharpness: The batch sharpness of this step alone; None where that of earlier steps stands.
        batch_agreement: How far batches agree in their curvature, from 0 to 1.
        noise_ratio: What the second order of the steps takes from the decrease of fresh data, as a share of it: a step
            gains most at 0.5, and nothing at 1.
        lost_decrease: The share of a step's promised decrease that the curvature along it eats, for an optimizer whose
            limit is not known.
        decisive_eigenvalue: The eigenvalue that the limit is one on; that of an earlier step where it was not measured
            at this one.
        clipping: What clipping left of the gradient's length; None where nothing can be clipped.
        is_settled: Whether an adaptive optimizer has made enough steps to be judged.
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
    batch_sharpness: float | None = None
    batch_sharpness_error: float | None = None
    step_sharpness: float | None = None
    batch_agreement: float | None = None
    noise_ratio: float | None = None
    lost_decrease: float | None = None
    decisive_eigenvalue: float | None = None
    clipping: float | None = None
    is_settled: bool = True
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
        """What binds, over its limit; 1 is the edge of stability, whatever the optimizer and the batch.

        Under mini-batches that is the batch sharpness: the largest eigenvalue of a batch is above it by what the steps
        of other batches do not meet. Where the batches agree wholly, as on all of the data, it is the eigenvalue, which
        rises to the limit before the steps turn into its direction. With the critical sharpness it is the learning rate
        over the critical one: above 1 the step raised the loss. For an optimizer whose limit is not known it is the
        share of the promised decrease that is lost, see `lost_decrease`.

        """
        found = [self._ratio(self.critical_sharpness), self._ratio(self.batch_sharpness)]
        if self._is_whole:
            found.append(self.eigenvalue_ratio)
        known = [ratio for ratio in found if ratio is not None]
        return max(known) if known else self.lost_decrease

    @property
    def is_fresh(self) -> bool:
        """Whether the ratio is one of this very step, and not of a batch sharpness that was measured before it."""
        return self._is_whole or self.step_sharpness is not None

    @property
    def _is_whole(self) -> bool:
        """Whether the eigenvalue counts: where the batches agree, or nobody knows yet whether they do."""
        return self.batch_sharpness is None or self.batch_agreement is None or self.batch_agreement >= WHOLE_AGREEMENT

    @property
    def has_eigenvalue(self) -> bool:
        """Whether an eigenvalue was measured at this very step."""
        return any(value is not None for value in (self.lambda_max, self.lambda_min, self.preconditioned_lambda_max))

    @property
    def eigenvalue_ratio(self) -> float | None:
        """The eigenvalue that counts for the optimizer over the limit."""
        return self._ratio(self.decisive_eigenvalue)

    @property
    def step_ratio(self) -> float | None:
        """The batch sharpness of this step alone over the limit: it shows at once what the mean shows later."""
        return self._ratio(self.step_sharpness)

    @property
    def learning_rate_limit(self) -> float | None:
        """The learning rate at which the ratio of this step would be 1."""
        ratio = self.stability_ratio
        return (
            self.learning_rate / ratio if self.learning_rate is not None and ratio is not None and ratio > 0 else None
        )

    def _ratio(self, curvature: float | None) -> float | None:
        """A curvature over the limit, of the step that is really made."""
        if curvature is None or self.stability_limit is None:
            return None
        # A gradient that is clipped to a tenth moves the parameters as a tenth of the learning rate would.
        return curvature / self.stability_limit * (1.0 if self.clipping is None else self.clipping)

    @property
    @override
    def has_converged(self) -> bool:
        # Exponents look at the symmetry of their own products.
        is_measured = self.residual is not None or self.preconditioned_residual is not None
        return self.converged or not is_measured or self.exponent is not None

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
            "curvature/batch_sharpness": self.batch_sharpness,
            "curvature/stability_ratio": self.stability_ratio,
            "curvature/learning_rate": self.learning_rate,
            "curvature/learning_rate_limit": self.learning_rate_limit,
            "curvature_details/stability_limit": self.stability_limit,
            "curvature_details/batch_agreement": self.batch_agreement,
            "curvature_details/batch_sharpness_error": self.batch_sharpness_error,
            "curvature_details/eigenvalue_ratio": self.eigenvalue_ratio,
            "curvature_details/noise_ratio": self.noise_ratio,
            "curvature_details/clipping": self.clipping,
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
