"""The critical sharpness along the step that the optimizer takes."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.callbacks.estimators.base import Estimator, EstimatorSettings, MeasuredStep, Moment, missed
from lyapunov_lightning.callbacks.results.probe import ProbeResult
from lyapunov_lightning.curvature.diagnosis import Diagnosis
from lyapunov_lightning.curvature.directions.critical import CriticalSharpness
from lyapunov_lightning.curvature.errors import MeasurementError, NonFiniteCurvatureError
from lyapunov_lightning.curvature.stability import learning_rate
from lyapunov_lightning.training.callback import Stateful
from lyapunov_lightning.training.lightning_names import MisconfigurationException, Trainer, optimizers_of

_ROUNDED = 2.0
"""Length of a step, in units in the last place of the parameters, up to which it is mostly their rounding errors."""


class CriticalLearningRate(Estimator):
    """``estimator="critical"``: the critical sharpness ``2/η_c`` along the step that the optimizer takes.

    ``η_c`` is the learning rate at which that step would bring the loss back to where it began. 5 to 10 evaluations of
    the loss and no derivative, so it works with every kernel and every optimizer. The update is not computed but
    observed: the parameters are noted before the step, and the loss is evaluated along the way to where they are after
    it. It is measured once the step is made, for the parameters before it.

    It is not an eigenvalue: for gradient descent on a quadratic it is the curvature along the gradient, which
    approaches the largest eigenvalue at the edge of stability and does not show how that rises before.

    Its limit is ``2/η`` whatever the optimizer, its ratio ``η/η_c``: above 1 the step has raised the measured loss. It
    is left out where the loss does not rise however far the step is extended, where it rises from the very beginning,
    as with momentum it may, and where its fall is lost in rounding.

    Raises:
        ValueError: If another end than the largest is asked for.

    """

    # As with exponents: no products, and parameters in half precision, which cannot be moved a little, are refused.
    method = "finite_difference"
    tags = ("curvature/critical_sharpness$",)
    is_gauged = False  # a product is what it is there to do without

    def __init__(self, settings: EstimatorSettings) -> None:
        super().__init__(settings)
        if settings.end != "largest":
            raise ValueError(
                f"`end` should be 'largest' with `estimator='critical'`, which is one number along the optimizer's step"
                f" and no end of the spectrum, got {settings.end!r}. Use `estimator='lanczos'`."
            )
        self._critical = CriticalSharpness(settings.tol)
        self._before: Tensor | None = None

    @override
    def start(self, trainer: Trainer, owner: str) -> torch.optim.Optimizer:
        optimizers: list[torch.optim.Optimizer] = optimizers_of(trainer)
        if len(optimizers) != 1:
            raise MisconfigurationException(
                f"`CurvatureProbe(estimator='critical')` measures along the update of the one optimizer, and here are"
                f" {len(optimizers)}. Use `estimator='lanczos'`, which does not depend on the optimizer."
            )
        return optimizers[0]

    @override
    def begin(self, at: MeasuredStep) -> Moment:
        # Here and not right before the optimizer's step: the loss is that of this batch with its random numbers, and
        # what other callbacks do to the parameters until then is part of the way that it takes.
        self._before = at.hessian.layout.flatten(at.hessian.parameters)
        return "update"

    @override
    def measure(self, at: MeasuredStep) -> ProbeResult:
        before, self._before = self._before, None
        assert before is not None  # noted by `begin`
        hessian = at.hessian
        [optimizer] = optimizers_of(at.step.trainer)
        lr = learning_rate(optimizer)
        if not 0 < lr < math.inf:
            raise MeasurementError(f"The step was made with a learning rate of {lr}: its update at 1 is not known.")
        size = float(hessian.space.norm(before))
        displacement = hessian.layout.flatten(hessian.parameters).sub_(before)
        del before  # a vector of the model's size, for the time of the search
        length = float(hessian.space.norm(displacement))
        if not math.isfinite(length):
            raise NonFiniteCurvatureError("The parameters are not finite after the step.")
        if not length:
            return missed("update")
        precision = torch.finfo(hessian.dtype).eps
        # Every parameter is rounded once by the step, by up to half a last place: of a step that is no longer than that
        # the difference of the parameters is noise, and the loss along it would be that of a random direction.
        if length <= _ROUNDED * precision * size:
            raise MeasurementError(
                f"The step, of length {length:.1e}, is lost in the rounding of the parameters, of norm {size:.1e}."
            )
        with at.progress() as report:

            def losses_along(learning_rates: Sequence[float]) -> Tensor:
                # The parameters are where the step at `lr` ended and are not moved back, since the training goes on
                # from there bit by bit: learning rate 0 lies at -1 times the step from here, 2·lr at +1.
                losses = hessian.values_along(displacement, [rate / lr - 1 for rate in learning_rates])
                report()
                return losses

            found = self._critical.measure(losses_along, lr, precision=precision)
        return ProbeResult(
            step=at.step.index,
            epoch=at.step.epoch,
            critical_sharpness=found.sharpness,
            value_error=None if found.sharpness is None else found.sharpness * found.error,
            converged=found.converged,
            forward_passes=found.num_evaluations,
            learning_rate=lr,
            stability_limit=2 / lr,
        )

    @override
    def forget(self) -> None:
        self._before = None

    @override
    def parts(self) -> dict[str, Stateful]:
        return {"critical": self._critical}

    @override
    def plotted(self, results: Sequence[ProbeResult]) -> tuple[str, list[float | None]]:
        return "critical sharpness", [result.critical_sharpness for result in results]

    @override
    def reworded(self, diagnosis: Diagnosis) -> Diagnosis:
        """A critical sharpness below its limit clears the steps that were measured, and no more."""
        found = diagnosis
        is_blamed = found.kind == "left" and 2 * found.num_near >= len(found.spikes) > 0
        clears = found.kind in ("room", "noise_limited", "left", "lost_otherwise") and not is_blamed
        told = replace(found, sharpness=found.sharpness.replace("he sharpness", "he critical sharpness"))
        if not clears:
            return told
        return replace(
            told,
            consequence="That clears the steps that were measured and no others: the critical sharpness rises once a"
            " step is about to raise the loss, and the largest eigenvalue long before. Use `estimator='lanczos'` to see"
            " how much room there is.",
            learning_rate_limit=None,
            confidence="none",
        )
