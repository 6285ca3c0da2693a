"""How near a step is to its edge of stability: what `CurvatureProbe` measures of it beside the eigenvalue, and when.

The gauges themselves are in `gauges`. Here is which of them a step takes, on what data, and at which of its moments:
before the step by products, after the backward pass by values of the loss, after the update by what came of it.
"""

from dataclasses import replace
from functools import partial

from torch import Tensor

from lyapunov_lightning.callbacks.cadence import Cadence
from lyapunov_lightning.callbacks.estimators import MeasuredStep
from lyapunov_lightning.callbacks.gauges import DecreaseGauge, SharpnessGauge
from lyapunov_lightning.callbacks.pending import PendingResult
from lyapunov_lightning.curvature.loss.products import Method
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.curvature.stability import is_known
from lyapunov_lightning.curvature.vectors.layout import is_narrow
from lyapunov_lightning.training.callback import Stateful
from lyapunov_lightning.training.config import HessianConfig
from lyapunov_lightning.training.fsdp import is_sharded
from lyapunov_lightning.training.optimizers.own_gradient import OwnGradient, OwnLoss


class StepGauge:
    """The gauges of a training's steps.

    In the order of a step: `begin` or `hold` before it, `see_loss` and `after_backward`, `after_update`; or `forget`
    where it does not come to these.

    Args:
        config: Which Hessian the eigenvalue is one of.
        method: How its products are computed as the user said it. Finite differences are chosen for their price by an
            estimator that takes differences of its own; a single product by them has its step to find, and costs five
            times as much as an exact one.
        cadence: What is due.

    Attributes:
        awaits_clipping: Whether what clipping leaves of the gradient is to be seen, after the update.
        sees_updates: Whether `after_update` comes.

    """

    def __init__(self, config: HessianConfig, method: Method, cadence: Cadence) -> None:
        self._config, self._own_config = config, replace(config, method=method)
        self._cadence = cadence
        self.awaits_clipping = self.sees_updates = False
        self.forget_all()

    def forget_all(self) -> None:
        """Begin anew, for a training of other parameters."""
        self._sharpness, self._decrease = SharpnessGauge(), DecreaseGauge()
        self._own_gradient, self._own_loss = OwnGradient(), OwnLoss()

    def release(self) -> None:
        """Drop what is of this run and in no state."""
        self.forget()
        self._sharpness.start()

    def forget(self) -> None:
        """Drop what was noted of a step that was not made."""
        self._decrease.forget()

    @property
    def awaits_another(self) -> bool:
        """Whether a batch is kept for the next measurement to be compared with."""
        return self._sharpness.awaits_another

    def begin(self, at: MeasuredStep, pending: PendingResult) -> None:
        """Measure the step, by values of its loss where they are enough and come cheaper, or note what is to come."""
        own = self._own_hessian(at)
        # Beside a search one product more costs about what the replays for two losses do, and is exact.
        is_searched = self._cadence.is_full and pending.later is None
        if is_searched or not self._may_glance(at):
            if not self._cadence.is_full:
                pending.result = at.unmeasured(at.stability())
            self._measure(at, pending, own)
            return
        glanced = replace(at, hessian=own, moment="gradient")
        if self._own_gradient.may_fit(at.step.trainer):  # the step is about to compute it
            pending.glanced = glanced
            pending.await_moment("gradient")
        else:
            self._glance(glanced, pending, own.gradient())
        self._await_clipping(pending)

    def hold(self, at: MeasuredStep, pending: PendingResult) -> None:
        """Let the last batch sharpness stand at this step, whose limit may be another one."""
        stability = at.stability(counts_gradient=False)
        if stability is None:  # seen from outside, which is cheap
            self.begin(at, pending)
            return
        pending.gauged = self._sharpness.standing(stability)
        self._await_clipping(pending)

    def see_loss(self, loss: Tensor) -> None:
        """Note the loss of the step, right before its backward pass."""
        self._own_loss.see(loss)

    def after_backward(self, pending: PendingResult) -> None:
        """Take the values of the loss, if they were left to this moment."""
        if pending.glanced is not None:
            at, pending.glanced = pending.glanced, None
            self._glance(at, pending, self._own_gradient.take(at.hessian), self._own_loss.take(at.hessian))

    def after_update(self, pending: PendingResult) -> None:
        """Observe what came of the step."""
        if self._decrease.is_observing:
            pending.gauged = self._decrease.measure()
        pending.see_clipping()

    def parts(self) -> dict[str, Stateful]:
        """What is kept from one measurement to the next, under the names that it has in a checkpoint."""
        gauges: dict[str, Stateful] = {"sharpness": self._sharpness, "decrease": self._decrease}
        return {**gauges, "step_gradient": self._own_gradient, "step_loss": self._own_loss}

    def _own_hessian(self, at: MeasuredStep) -> LossHessian:
        """The Hessian on the step's own data, whatever data the eigenvalue is measured on."""
        is_it = self._own_config == self._config and self._config.data == "batch"
        return at.hessian if is_it else at.hessian_on(self._own_config, None)

    def _may_glance(self, at: MeasuredStep) -> bool:
        """Whether values of the loss are enough for this step."""
        # On sharded models a rank that failed alone in the first values of the loss would be missing in collectives
        # that no measurement has shown before, and the others would wait for it.
        parameters = list(at.step.pl_module.parameters())
        if not self._sharpness.may_glance or is_sharded(parameters):
            return False
        if is_narrow(parameters):  # whose neighbours are lost in their rounding
            return False
        return at.stability(counts_gradient=False) is not None

    def _measure(self, at: MeasuredStep, pending: PendingResult, own: LossHessian) -> None:
        """Measure the step by products, or begin to observe it where its limit is not known."""
        stability = at.stability()
        if stability is not None:
            config, batches = self._own_config, at.step.own_batches
            fixed = at.hessian if config == self._config and self._config.data == "fixed" else None
            gradient = at.gradient if own is at.hessian else own.gradient(keep_graph=True)
            others = partial(at.hessian_on, config)
            pending.gauged = self._sharpness.measure(own, gradient, batches, stability, others, fixed)
            self._cadence.note_gauge()
            self._await_clipping(pending)
        elif self.sees_updates and not is_known(at.step.trainer.optimizers[0]):
            self._decrease.begin(own)
            pending.await_moment("update")

    def _glance(self, at: MeasuredStep, pending: PendingResult, gradient: Tensor, loss: float | None = None) -> None:
        """Measure the step by values of its loss, and by a product where they do not tell."""
        own, batches = at.hessian, at.step.own_batches
        stability = at.stability(gradient)
        assert stability is not None  # or `_may_glance` would not have said so
        gauged = self._sharpness.glance(own, gradient, batches, stability, loss)
        if gauged is None:
            gradient = own.gradient(keep_graph=True)
            gauged = self._sharpness.measure(own, gradient, batches, stability)
        pending.gauged = gauged
        self._cadence.note_gauge()
        if not self._cadence.is_full:
            pending.result = at.unmeasured(stability)

    def _await_clipping(self, pending: PendingResult) -> None:
        if self.awaits_clipping:
            pending.await_moment("update")
