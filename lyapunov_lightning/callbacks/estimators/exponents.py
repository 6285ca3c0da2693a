"""Extreme eigenvalues from finite-size Lyapunov exponents: Algorithm 1 of the chaos-theory paper."""

from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.callbacks.estimators.base import Estimator, EstimatorSettings, MeasuredStep, Moment
from lyapunov_lightning.callbacks.results.probe import ProbeResult
from lyapunov_lightning.curvature.tracking.exponents import ExponentTracker
from lyapunov_lightning.training.callback import Stateful
from lyapunov_lightning.training.lightning_names import Trainer
from lyapunov_lightning.training.optimizers.own_gradient import OwnGradient
from lyapunov_lightning.training.optimizers.requirements import check_training_map


class LyapunovExponents(Estimator):
    """``estimator="lyapunov"``: follows a perturbation of the parameters from probe to probe.

    A probe makes one iteration, or as many as `iterations` says, of one gradient each. It takes one gradient more where
    the step's own gradient cannot be used: on fixed data, in several processes, with accumulated batches, and where
    that is not the gradient of the measured loss. The largest end is Algorithm 1 of the paper; the smallest end follows
    the training map itself, with the learning rate and the momentum of the optimizer, which has to be plain or
    heavy-ball SGD with one parameter group.

    ``lyapunov_exponent`` is the exponent of the map that was followed, 1 for Algorithm 1 once it has settled. Beyond
    the edge of stability the sharpest direction is the one that grows under the training map; its eigenvalue is then
    logged as ``lambda_max``. A negative eigenvalue beyond about twice the largest one grows under gradient ascent, and
    is then logged as ``lambda_min``. With both ends, ``lyapunov_exponent_sgd`` is the exponent of the training map, and
    ``paper_lambda_min`` the smallest eigenvalue in the paper's convention.

    Where gradients are stopped, the differences of gradients are those of no symmetric matrix, and what is followed
    comes to rest at no curvature. So at the first probe that would count as converged, and at every 64th of those,
    eight gradients more show whether it is one; it counts as converged only then.

    The preconditioned Hessian is not measured: limit and ratio are left out with an optimizer whose limit is one on it.

    """

    # Differences of gradients are all that is asked for: no graph is to be kept for products that nobody computes, and
    # parameters in half precision, in which a displacement of length `delta_q` is lost, are refused.
    method = "finite_difference"

    def __init__(self, settings: EstimatorSettings) -> None:
        super().__init__(settings)
        self._followed = ExponentTracker(
            settings.end,
            iterations=settings.iterations,
            delta_q=settings.delta_q,
            seed=settings.seed,
            tol=settings.tol,
        )
        self._own_gradient = OwnGradient()

    @override
    def start(self, trainer: Trainer, owner: str) -> None:
        if self._settings.end != "largest":
            check_training_map(owner, trainer.optimizers)

    @override
    def begin(self, at: MeasuredStep) -> Moment:
        may_use = self._settings.own_batch and self._own_gradient.may_fit(at.step.trainer)
        # The step is about to compute the gradient at the present parameters itself: half the price of an iteration.
        return "gradient" if may_use else "start"

    @override
    def measure(self, at: MeasuredStep) -> ProbeResult | None:
        hessian, trainer = at.hessian, at.step.trainer
        here = self._own_gradient.take(hessian) if at.moment == "gradient" else hessian.gradient()
        with at.progress() as report:

            def gradient(displacement: Tensor) -> Tensor:
                there = hessian.gradient(displacement)
                report()
                return there

            # The settings of the training map. Of the other end they are not asked, and any optimizer will do.
            group = trainer.optimizers[0].param_groups[0] if self._settings.end != "largest" else {"lr": 0.0}
            found = self._followed.measure(
                gradient,
                here,
                lr=float(group["lr"]),
                momentum=float(group.get("momentum", 0.0)),
                space=hessian.space,
            )
        if found is None:
            return None
        if found.asymmetry > self._settings.tol:
            at.warn_once(
                "asymmetric",
                "what `estimator='lyapunov'` follows has come to rest, and not at an eigenvalue of a symmetric matrix:"
                f" along it and next to the gradient, uᵀHw and wᵀHu differ by {found.asymmetry:.0%} of the value. What"
                " the training follows is not the gradient of one loss, as where gradients are stopped (SimSiam, BYOL,"
                " DINO), and the value is logged as not converged. `estimator='lanczos'` measures the Hessian of the"
                " loss that is computed.",
            )
        stability = at.stability(counts_gradient=False)
        if stability is not None and not stability.is_on_hessian:
            stability = None  # the eigenvalue that it is a limit on is not measured
        return ProbeResult(
            step=at.step.index,
            epoch=at.step.epoch,
            lambda_max=found.lambda_max,
            decisive_eigenvalue=None if stability is None else found.lambda_max,
            lambda_min=found.lambda_min,
            residual=found.estimates[0].residual,
            residual_min=found.estimates[1].residual if len(found.estimates) > 1 else None,
            converged=found.is_within(self._settings.tol),
            matvecs=found.num_gradients,
            inverse_h0=found.inverse_h0,
            exponent=found.exponent,
            exponent_sgd=found.exponent_sgd,
            paper_lambda_min=found.paper_lambda_min,
            **at.limits(stability),
        )

    @override
    def parts(self) -> dict[str, Stateful]:
        return {"followed": self._followed, "own_gradient": self._own_gradient}
