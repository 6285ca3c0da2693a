"""What the callbacks find, as frozen values, and the tags under which it is logged."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from typing_extensions import override

from lyapunov_lightning.curvature.scanning import SURFACE
from lyapunov_lightning.training.results import Result, ranked

Row = tuple[float | None, ...]
"""Numbers, and None where there is none or it is not finite."""


def finite(value: float) -> float | None:
    """A number, or None if it is not finite."""
    return value if math.isfinite(value) else None


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    return {tag: float(value) for tag, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ProbeResult(Result):
    """What `CurvatureProbe` found; None where it did not look, or nothing is known.

    Attributes:
        lambda_max: The largest eigenvalue, the sharpness, in the unit of the loss's second derivative.
        lambda_min: The smallest eigenvalue.
        residual: ``‖Hv − λv‖`` of the eigenvalue asked for, of the largest one where both are.
        residual_min: The same of the smallest one, where both are asked for.
        value_error: How far that eigenvalue is estimated to be from the true one.
        value_error_min: The same of the smallest one, where both are asked for.
        converged: Whether the tolerance was met by all.
        matvecs: Hessian-vector products spent, or differences of gradients.
        learning_rate: Of the optimizer, the highest of its groups.
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
        counts = self.lambda_max if self.preconditioned_lambda_max is None else self.preconditioned_lambda_max
        counts = counts if self.critical_sharpness is None else self.critical_sharpness
        return None if counts is None or self.stability_limit is None else counts / self.stability_limit

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
        return _known(found)


@dataclass(frozen=True, kw_only=True)
class TrackedSpectrum(Result):
    """What `SpectrumTracker` found; None or empty where it did not look.

    Attributes:
        largest, smallest: The eigenvalues of both ends, the outermost first, in the unit of the loss's second
            derivative.
        residual: The largest residual ``‖Hv − λv‖`` among them; an eigenvalue of the Hessian lies within it.
        converged: The share of them that met the tolerance.
        matvecs: Hessian-vector products spent on the Hessian as a whole, or differences of gradients.
        negative_mass: Share of the negative ones in the sum of the moduli of the tracked eigenvalues, or of all
            eigenvalues where the density is measured.
        cosines_largest, cosines_smallest: Absolute cosine of the mini-batch gradients with each eigenvector, averaged
            over ten mini-batches of the data.
        gradient_in_top_subspace: Share of these gradients' squared norm in the span of the upper end's eigenvectors.
        gradient_in_random_subspace: What a random vector has there.
        subspace_overlap, subspace_overlap_first: Of that span with the one of the last and of the first measurement,
            ``‖V_old V_newᵀ‖²_F / k``; 1 for the same.
        trace, frobenius_norm: Stochastic estimates for the whole Hessian.
        trace_error, frobenius_norm_error: Their standard errors.
        lambda_max_of: The largest eigenvalue of each diagonal block, by name.
        block_matvecs: Products spent on the blocks.
        exponents_largest, exponents_smallest: The Lyapunov exponents of gradient ascent and of the training map.
        paper_largest, paper_smallest: The eigenvalues in the paper's convention.
        from_other_end: How many eigenvalues grow faster under these maps than what is left of their end, although they
            are from the other one.

    """

    largest: tuple[float, ...] = ()
    smallest: tuple[float, ...] = ()
    residual: float | None = None
    converged: float | None = None
    matvecs: int = 0
    negative_mass: float | None = None
    cosines_largest: tuple[float, ...] = ()
    cosines_smallest: tuple[float, ...] = ()
    gradient_in_top_subspace: float | None = None
    gradient_in_random_subspace: float | None = None
    subspace_overlap: float | None = None
    subspace_overlap_first: float | None = None
    trace: float | None = None
    trace_error: float | None = None
    frobenius_norm: float | None = None
    frobenius_norm_error: float | None = None
    lambda_max_of: Mapping[str, float] = field(default_factory=dict)
    block_matvecs: int | None = None
    exponents_largest: tuple[float, ...] = ()
    exponents_smallest: tuple[float, ...] = ()
    paper_largest: tuple[float, ...] = ()
    paper_smallest: tuple[float, ...] = ()
    from_other_end: int | None = None

    @property
    def tracked_norm(self) -> float:
        """The Frobenius norm of the tracked eigenvalues alone, as in the sharpest-directions paper."""
        return math.hypot(*self.largest, *self.smallest)

    @override
    def scalars(self) -> dict[str, float]:
        shown = ("trace", "frobenius_norm", "gradient_in_top_subspace", "subspace_overlap")
        quality = ("residual", "converged", "matvecs", "block_matvecs", "trace_error", "frobenius_norm_error")
        further = (
            "tracked_norm",
            "negative_mass",
            "gradient_in_random_subspace",
            "subspace_overlap_first",
            "from_other_end",
        )
        found: dict[str, float | None] = {
            **ranked("spectrum/lambda", self.largest),
            **ranked("spectrum/lambda_min", self.smallest),
            **{f"spectrum/lambda_max_{block}": value for block, value in self.lambda_max_of.items()},
            **{f"spectrum/{name}": getattr(self, name) for name in shown},
            **ranked("spectrum_details/gradient_cosine", self.cosines_largest),
            **ranked("spectrum_details/gradient_cosine_min", self.cosines_smallest),
            **ranked("spectrum_details/lyapunov_exponent", self.exponents_largest),
            **ranked("spectrum_details/lyapunov_exponent_min", self.exponents_smallest),
            **ranked("spectrum_details/paper_lambda", self.paper_largest),
            **ranked("spectrum_details/paper_lambda_min", self.paper_smallest),
            **{f"spectrum_details/{name}": getattr(self, name) for name in (*further, *quality)},
        }
        return {tag: float(value) for tag, value in found.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class NegativeResult(Result):
    """What `NegativeCurvatureTracker` found; None or empty where it did not look.

    Attributes:
        lambda_min: The smallest eigenvalues, the most negative first, in the unit of the loss's second derivative.
        lambda_max: The largest one.
        negative_mass: Share of the negative ones in the sum of the moduli of these eigenvalues.
        gradient_components: Modulus of the component of the gradient on the measured data along each of the smallest
            eigenvectors.
        gradient_norm: The norm of that gradient, to compare them with.
        residual: The largest ``‖Hv − λv‖`` of all pairs.
        converged: The share of the pairs whose residual met the tolerance.
        frozen: For each step at which directions were frozen, the curvature along its top and its bottom eigenvector.
        online_lambda_min: The running estimate of the smallest eigenvalue.
        online_residual: Its residual.
        online_age: How many steps ago these two were measured.
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
        """``|lambda_min[0]| / lambda_max``, where the latter is positive."""
        return (
            abs(self.lambda_min[0]) / self.lambda_max if self.lambda_max is not None and self.lambda_max > 0 else None
        )

    @property
    def online_error(self) -> float | None:
        """The relative error of the running estimate, where the eigenvalue itself is measured too."""
        if self.online_lambda_min is None or not self.lambda_min or not self.lambda_min[0]:
            return None
        return abs(self.online_lambda_min - self.lambda_min[0]) / abs(self.lambda_min[0])

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
        return {tag: float(value) for tag, value in found.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ScanResult(Result):
    """What `LossAlongEigvecScanner` found; None or empty where it did not look, or found nothing finite.

    Attributes:
        directions: The names of the directions: ``1`` ... for the eigenvectors of the upper end, ``min_1`` ... for
            those of the lower end, ``random_1`` ... for random ones. What is one for each direction is in their order.
        curvatures: The curvature along each direction, that of an eigenvector being its eigenvalue.
        gradient_components: The modulus ``|gᵀv|`` of the gradient's component along each.
        unit_steps: The distance to the first minimum that was seen along the direction of descent; None where none was.
        best_improvements: How far the loss falls on the way there.
        scales: Half widths of the windows over which loss and model are compared.
        curvature_fits: For each direction and each scale the second derivative of a quadratic fitted to the loss, in
            the unit of the eigenvalue.
        curvature_fit_errors: The standard errors of these due to rounding: where the gradient's component is tiny the
            window is so, too, and in float32 the fit then says nothing.
        model_gaps: The largest distances between the loss and its quadratic model.
        sgd_steps: Multiples of an SGD step along the first direction.
        expected_changes: The mean change of the loss at each of these.
        sgd_step: The mean length of an SGD step along the first direction.
        surface: The loss at -5 ... 5 of these steps.
        loss: The loss at the parameters before the step.
        noise: The standard deviation of its rounding errors; the search takes losses within four of these for equal.
        residual: The largest ``‖Hv − λv‖`` of the eigenpairs.
        converged: The share of the eigenpairs whose residual met the tolerance. An eigenvalue is the second derivative
            along its vector whether or not that has converged.
        forward_passes: Evaluations of the loss on the measured data, each a forward pass for every batch of them. A
            direction takes ``points`` for each scale, and 5 to 30 for the line search, at most 100; each of
            ``sgd_steps`` takes up to 10, and the surface 11.
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

    @override
    def scalars(self) -> dict[str, float]:
        found: dict[str, float | None] = {}
        for name, step, improvement in zip(self.directions, self.optimal_steps, self.best_improvements, strict=True):
            found[f"scan/optimal_step_{name}"] = step
            found[f"scan/best_improvement_{name}"] = improvement
        for alpha, change in zip(self.sgd_steps, self.expected_changes, strict=False):
            found[f"scan/expected_change_{alpha:g}"] = change
        found |= {
            "scan_details/loss": self.loss,
            "scan_details/noise": self.noise,
            "scan_details/residual": self.residual,
            "scan_details/converged": self.converged,
            "scan_details/forward_passes": self.forward_passes,
            "scan_details/matvecs": self.matvecs,
            "scan_details/sgd_step": self.sgd_step,
        }
        return _known(found)

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
        found |= {f"scan/surface_{k}": loss for k, loss in zip(SURFACE, self.surface, strict=False)}
        return _known(found)


@dataclass(frozen=True, kw_only=True)
class LearningRateResult(Result):
    """What `QuasiNewtonLRController` did in one step and why; None where its rule does not look, or found nothing.

    Attributes:
        learning_rate: The learning rate of the step, the highest of the parameter groups.
        proposed: The learning rate that goes to the bottom of the parabola, in the running average; the paper's
            ``1/h0`` where the sharpness is the rule, times ``1 - momentum``.
        step_length: How long the steps are with the way to that bottom as unit.
        annealing: The factor by which the end of the training makes the learning rate smaller.
        restored: How often the parameters were brought back so far.
        converged: Whether there was something to go by.
        slope_along_update: ``-gᵀu`` where the last update ``u`` began, at learning rate 1, seen by this batch.
        curvature_along_update: ``uᵀHu``.
        trials: How often the very first step was halved.
        lambda_max: The running average of the largest eigenvalue.
        inverse_h0: The same as the paper's ``1/h0``.
        exponent: The Lyapunov exponent of Algorithm 1; 1 once settled.
        curvature_along_gradient: What the eigenvalue was held against.
        refuted: Whether the tracked vector was wrong and began anew.

    """

    learning_rate: float
    proposed: float | None = None
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
        return {tag: float(value) for tag, value in found.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class NudgeResult(Result):
    """What one measurement of `NudgedSGDHook` found.

    Attributes:
        eigenvalues: The largest ones, in descending order.
        residual: The largest residual ``‖Hv − λv‖`` among them.
        num_converged: How many of them met the tolerance, and are acted upon.
        matvecs: Hessian-vector products spent.
        subspace_overlap: ``‖V_old V_newᵀ‖²_F / k`` with the eigenvectors acted upon before; None if there were none, or
            those of other parameters, or if there are no new ones.

    """

    eigenvalues: tuple[float, ...]
    residual: float
    num_converged: int
    matvecs: int
    subspace_overlap: float | None = None

    @override
    def scalars(self) -> dict[str, float]:
        found = {
            **ranked("nudge/lambda", self.eigenvalues),
            "nudge_details/residual": self.residual,
            "nudge_details/converged": self.num_converged / len(self.eigenvalues),
            "nudge_details/matvecs": float(self.matvecs),
        }
        if self.subspace_overlap is not None:
            found["nudge_details/subspace_overlap"] = self.subspace_overlap
        return found
