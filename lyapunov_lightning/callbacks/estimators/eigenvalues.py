"""Extreme eigenvalues from Hessian-vector products, by Lanczos's method and by power iteration."""

from abc import abstractmethod
from typing import ClassVar, TypedDict

from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.callbacks.estimators.base import Estimator, EstimatorSettings, MeasuredStep
from lyapunov_lightning.callbacks.results.probe import ProbeResult
from lyapunov_lightning.curvature.solvers.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.solvers.lyapunov import H0_CONVENTION
from lyapunov_lightning.curvature.stability import Stability
from lyapunov_lightning.curvature.tracking.extremes import ExtremeTracker, Solver
from lyapunov_lightning.training.callback import Stateful
from lyapunov_lightning.training.sharing import EigenRequest, SearchStart


class Eigenvalues(Estimator):
    """What both solvers have in common: two spectra may be asked for, and a result is made of their eigenpairs."""

    solver: ClassVar[Solver]
    """The one for the preconditioned Hessian."""

    def __init__(self, settings: EstimatorSettings) -> None:
        super().__init__(settings)
        self._preconditioned = ExtremeTracker(self.solver, "largest", settings.tol, settings.seed)

    @abstractmethod
    def _pairs(self, at: MeasuredStep) -> Eigenpairs:
        """The eigenpairs of the Hessian at the ends asked for, the largest one first."""

    @override
    def measure(self, at: MeasuredStep) -> ProbeResult:
        # The limit of an adaptive optimizer is one on P⁻¹H (J. Cohen et al., 2022). The largest eigenvalue of H is
        # measured beside it, now and then: it is what other optimizers, other runs and the literature are compared by.
        may_do_without = self._settings.end == "largest" and not at.is_plain
        stability = at.stability() if may_do_without else None
        is_alone = stability is not None and not stability.is_on_hessian
        pairs = None if is_alone else self._pairs(at)
        if stability is None:
            stability = at.stability()  # now that the gradient, which it may ask for, has been computed
        top = None
        if self._settings.end != "smallest" and stability is not None and not stability.is_on_hessian:
            with at.watched() as operator:
                top = self._preconditioned.measure(stability.matrix(operator))
        found = [one for one in (pairs, top) if one is not None]
        fields = _plain(pairs, is_both=self._settings.end == "both") if pairs is not None else {}
        lambda_max = fields.get("lambda_max")
        return ProbeResult(
            step=at.step.index,
            epoch=at.step.epoch,
            converged=all(bool(one.converged.all()) for one in found),
            matvecs=sum(one.num_matvecs for one in found),
            # The paper's learning rate h0 is no learning rate where the loss curves down in every direction.
            inverse_h0=H0_CONVENTION / lambda_max if lambda_max is not None and lambda_max > 0 else None,
            decisive_eigenvalue=_decisive(lambda_max, top, stability),
            preconditioned_lambda_max=None if top is None else float(top.largest),
            preconditioned_residual=None if top is None else float(top.residuals[0]),
            preconditioned_value_error=None if top is None else float(top.value_errors[0]),
            **fields,
            **at.limits(stability),
        )

    @override
    def parts(self) -> dict[str, Stateful]:
        return {"preconditioned": self._preconditioned}


class _Plain(TypedDict, total=False):
    """The fields of `ProbeResult` that come from the eigenpairs of the Hessian itself."""

    lambda_max: float | None
    lambda_min: float | None
    residual: float
    residual_min: float | None
    value_error: float
    value_error_min: float | None


def _plain(pairs: Eigenpairs, *, is_both: bool) -> _Plain:
    """What is told of the ends that were asked for."""
    residuals, errors = pairs.residuals.tolist(), pairs.value_errors.tolist()
    return {
        "lambda_max": float(pairs.largest) if pairs.num_largest else None,
        "lambda_min": float(pairs.smallest) if len(pairs.smallest) else None,
        "residual": residuals[0],
        "residual_min": residuals[1] if is_both else None,
        "value_error": errors[0],
        "value_error_min": errors[1] if is_both else None,
    }


def _decisive(lambda_max: float | None, top: Eigenpairs | None, stability: Stability | None) -> float | None:
    """The eigenvalue that the optimizer's limit is one on, if it was measured."""
    if top is not None:
        return float(top.largest)
    return lambda_max if stability is not None and stability.is_on_hessian else None


class LanczosEigenvalues(Eigenvalues):
    """``estimator="lanczos"``: exact Hessian-vector products in a Krylov space.

    The space starts from the last probe's eigenvectors and a little noise, and grows until the eigenvalue is known to
    `tol` by its own error estimate: the squared residual over the distance to the next eigenvalue seen, and no less
    than what the start may hide (`lyapunov_lightning.curvature.solvers.hidden`). 4 to 10 products of about 2 gradients
    each, 8 to 20 for the first probe of a run. Both ends come from one space. Other callbacks that want eigenpairs of
    the same Hessian share the search.

    Where the optimizer's limit is one on the preconditioned Hessian (Adam and its kin, RMSprop, Adagrad, parameter
    groups of different settings, ``maximize``), that one's largest eigenvalue is searched for; with the largest end
    that of the Hessian itself then comes with every fifth search, and with each where `CurvatureProbe` is told its
    `eigenvalue_every`.

    """

    solver = "lanczos"

    def __init__(self, settings: EstimatorSettings) -> None:
        super().__init__(settings)
        largest, smallest = int(settings.end != "smallest"), int(settings.end != "largest")
        # By values: the probe logs no vector, and an eigenvalue's error is about the square of its residual. It is
        # known to 2 % at a residual of 14 % where no other eigenvalue is near.
        self.request = EigenRequest(largest, smallest, settings.tol, values_only=True)
        self._start = SearchStart()

    @property
    @override
    def search_start(self) -> Tensor | None:
        return self._start.vector

    @override
    def _pairs(self, at: MeasuredStep) -> Eigenpairs:
        pairs = at.eigenpairs()
        self._start.vector = pairs.start
        return pairs

    @override
    def parts(self) -> dict[str, Stateful]:
        return {**super().parts(), "start": self._start}


class PowerEigenvalues(Eigenvalues):
    """``estimator="power"``: power iteration, the classical baseline.

    Stops when the residual is below `tol` times the eigenvalue, after tens of products. Each end is an iteration of its
    own, started from the last probe's vector.

    """

    solver = "power"

    def __init__(self, settings: EstimatorSettings) -> None:
        super().__init__(settings)
        self._power = ExtremeTracker("power", settings.end, settings.tol, settings.seed)

    @override
    def _pairs(self, at: MeasuredStep) -> Eigenpairs:
        with at.watched() as operator:
            return self._power.measure(operator)

    @override
    def parts(self) -> dict[str, Stateful]:
        return {**super().parts(), "power": self._power}
