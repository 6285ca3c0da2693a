"""A learning rate from the curvature of the loss, in place of one that somebody tuned."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lyapunov_lightning.callbacks.results import LearningRateResult
from lyapunov_lightning.curvature.arguments import check_choice, check_int, check_positive
from lyapunov_lightning.curvature.hessian import HessianOperator
from lyapunov_lightning.curvature.lyapunov import H0_CONVENTION
from lyapunov_lightning.curvature.quasi_newton import CheckedSharpness, CurvatureAlongUpdate, Governor, LRBounds, tried
from lyapunov_lightning.training.callback import CurvatureCallback, Stateful
from lyapunov_lightning.training.config import HessianConfig, Schedule
from lyapunov_lightning.training.optimizers import check_steerable
from lyapunov_lightning.training.progress import progress
from lyapunov_lightning.training.sharing import Step
from lyapunov_lightning.training.updates import LearningRates, ObservedUpdate, slope_and_curvature

Rule = Literal["along_update", "inverse_sharpness"]


class QuasiNewtonLRController(CurvatureCallback):
    r"""Sets the learning rate at every step from the curvature of the loss, for any optimizer that has one.

    Two rules:

    - ``"along_update"`` (default): :math:`\eta = \sigma (-g^\top u) / |u^\top H u|` with ``u`` the optimizer's own
      update at learning rate 1, after momentum, preconditioning, decay and clipping, and running averages of slope and
      curvature. The product is exact and the curvature that of the very direction in which the step goes.
    - ``"inverse_sharpness"``: the chaos-theory paper's method. Algorithm 1 follows the largest eigenvalue, at the
      initial point until it has settled and then by one iteration a step, and the learning rate is its
      :math:`1/h_0 = (e - 1)/\lambda_{max}` after a running average. One tracked vector can hang on a wrong eigenvector,
      and then asks for a learning rate that is many times too large: so every estimate is held against the curvature
      along the gradient.

    What an estimate may do is bounded. The learning rate falls at once and grows by at most ``max_growth`` a step;
    before it grows under ``"along_update"`` the longer step is tried on the loss, and halved while that rises; NaN, no
    or negative slope, and a measurement that fails, hold the last learning rate; after the loss has risen from one
    window of steps to the next, the learning rate is halved and comes back over another window.

    The optimizer's own learning rates matter only by their ratios between parameter groups, which are kept, and for the
    steps before the first measurement; a group that is added in mid-run joins with the ratio that it has then. Under
    ``"along_update"`` the optimizer takes its step, which is then made longer or shorter, inside of
    ``optimizer.step``: what else happens in a step sees one step, at the learning rate of the controller. Clipping is
    part of the update, and so is what `NudgedSGDHook` does to the gradient.

    Logged:

    - ``quasi_newton/learning_rate``: the learning rate of the step, the highest of the parameter groups.
    - ``quasi_newton/slope_along_update`` and ``quasi_newton/curvature_along_update``: ``-gᵀu`` and ``uᵀHu`` of this
      step (``along_update``).

    and in the group ``quasi_newton_details``:

    - ``proposed``: what the rule asked for. ``back_off``: the factor on it, below 1 after the loss has risen.
    - ``trials``: how often a growing step was halved (``along_update``).
    - ``lambda_max``: the averaged largest eigenvalue; ``inverse_h0``: the same as the paper's ``1/h0``;
      ``lyapunov_exponent``, 1 once settled; ``curvature_along_gradient``, the second estimate; ``refuted``: 1 where the
      tracked vector was wrong and began anew (``inverse_sharpness``).
    - ``seconds``: wall-clock time spent. ``converged`` is 0 where a measurement failed or found nothing to go by.

    The same is in ``controller.results`` as `LearningRateResult`.

    Cost of a measured step, in gradients of its batch beyond the step's own: about 2.5 for ``along_update`` (gradient
    and product; a growing step two forward passes more), 3.3 for ``inverse_sharpness``. Memory: three vectors of the
    model's size for ``along_update``, two for ``inverse_sharpness``, and the gradient's graph while it lasts.

    Args:
        every_n_steps: Measure at the first opportunity after every n optimizer steps, and keep the learning rate in
            between; at every step without it and `schedule`.
        rule: Where the learning rate comes from, see above.
        schedule: Any other schedule.
        hessian: Which Hessian; by default that of the step's own batch. ``"inverse_sharpness"`` takes differences of
            gradients, whatever the method there.
        sigma: The factor on the step to the bottom of the parabola: 1 goes there, 2 goes to its other side, where
            plain gradient descent stops gaining (``along_update``).
        averaging: Weight of the past in the running averages; 0 for none.
        bounds: What the learning rate may do, whatever the rule asks for.
        max_warmup: The most iterations of Algorithm 1 at the initial point (``inverse_sharpness``).
        delta_q: Length of the perturbation of Algorithm 1, in parameter space.
        log_prefix: Put in front of every tag.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: With an LR scheduler, LBFGS, manual optimization, an optimizer without positive
            learning rates, another controller, or a module that cannot be measured.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lyapunov_lightning import QuasiNewtonLRController
        >>> trainer = Trainer(callbacks=[QuasiNewtonLRController()], max_epochs=1, logger=False)

    Reference:
        "A chaos theory approach to understand neural network optimization", sec. 3.1 and Algorithm 1; for
        ``along_update`` "Stepping on the edge: curvature aware learning rate tuners" (V. Roulet et al., 2024).

    """

    group = "quasi_newton"
    result_class = LearningRateResult

    def __init__(
        self,
        every_n_steps: int | None = None,
        rule: Rule = "along_update",
        *,
        schedule: Schedule | None = None,
        hessian: HessianConfig = HessianConfig(),
        sigma: float = 1.5,
        averaging: float = 0.9,
        bounds: LRBounds = LRBounds(),
        max_warmup: int = 50,
        delta_q: float = 5e-2,
        log_prefix: str | None = None,
    ) -> None:
        check_choice("rule", rule, Rule)
        if not isinstance(bounds, LRBounds):
            raise ValueError(f"`bounds` should be LRBounds, got {bounds!r}.")
        check_int("max_warmup", max_warmup, least=0)
        check_positive("delta_q", delta_q)
        super().__init__(
            every_n_steps,
            schedule,
            hessian,
            log_prefix,
            data="batch",
            method="finite_difference" if rule == "inverse_sharpness" else None,
            default=Schedule(every_n_steps=1),
        )
        self._rule: Rule = rule
        self._max_warmup = max_warmup
        self._along_update = CurvatureAlongUpdate(sigma, averaging)
        self._sharpness = CheckedSharpness(averaging, delta_q, self.config.seed)
        self._governor = Governor(bounds)
        self._rates = LearningRates()
        self._waiting: tuple[HessianOperator, Step] | None = None
        self._update: ObservedUpdate | None = None
        self._hook: RemovableHandle | None = None

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(rule=self._rule, log_prefix=self._log_prefix)

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._check_alone(trainer, "the learning rate is one")

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        optimizer = check_steerable(type(self).__name__, trainer, pl_module)
        self._rates.start(optimizer)
        self._release()
        if self._rule == "along_update":
            self._hook = optimizer.register_step_post_hook(lambda *_: self._after_step(trainer, optimizer))

    @override
    def measure(self, hessian: HessianOperator, step: Step) -> LearningRateResult | None:
        if self._rule == "inverse_sharpness":
            return self._from_sharpness(hessian, step)
        self._waiting = (hessian, step)  # for the update, which the optimizer is about to make
        return None

    @override
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        if self._governor.lr is not None:
            self._rates.set(self._governor.lr)
        if self._waiting is not None:
            self._update = ObservedUpdate(self._waiting[0])

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            mean = trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
            self._governor.observe(float(mean))

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._release()

    @override
    def _stateful(self) -> dict[str, Stateful]:
        rule: Stateful = self._along_update if self._rule == "along_update" else self._sharpness
        return {**super()._stateful(), "rule": rule, "governor": self._governor, "rates": self._rates}

    def _release(self) -> None:
        """Drop what an interrupted step has left, and the hook on its optimizer."""
        self._waiting, self._update = None, None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _after_step(self, trainer: Any, optimizer: torch.optim.Optimizer) -> None:
        """Make the step that the optimizer just took as long as the curvature along it says."""
        (waiting, self._waiting), (update, self._update) = (self._waiting, None), (self._update, None)
        if waiting is None or update is None:
            return
        taken = self._rates.highest
        displacement, lr = update.rewind(), taken
        try:
            with self._recorder.measurement(trainer) as record:
                result = record.result = self._along(*waiting, optimizer, displacement / taken, taken)
                lr = result.learning_rate
        finally:
            update.replay(displacement, lr / taken)
        self._rates.set(lr)
        self._keep(record.result, record.seconds)

    def _along(
        self, hessian: HessianOperator, step: Step, optimizer: torch.optim.Optimizer, update: Tensor, taken: float
    ) -> LearningRateResult:
        """The learning rate from slope and curvature along the update.

        Args:
            hessian: The Hessian before the step.
            step: The step.
            optimizer: The optimizer.
            update: The update at learning rate 1.
            taken: The learning rate that the optimizer took.

        """
        slope, curvature = slope_and_curvature(hessian, update, optimizer)
        proposal = self._along_update.propose(slope, curvature)
        lr, trials, last = self._governor.limit(proposal), 0, self._governor.lr or 0.0
        if lr is not None and lr > last:
            lr, trials = tried(lambda longer: hessian.value(update * longer), hessian.value(), lr, last)
        if lr is not None:
            self._governor.use(lr)
        return LearningRateResult(
            step=step.index,
            epoch=step.epoch,
            learning_rate=taken if lr is None else lr,
            proposed=proposal,
            back_off=self._governor.back_off,
            slope_along_update=slope,
            curvature_along_update=curvature,
            trials=trials,
        )

    def _from_sharpness(self, hessian: HessianOperator, step: Step) -> LearningRateResult:
        """The learning rate from the largest eigenvalue."""
        with progress(step.trainer, type(self).__name__) as report:

            def gradient(displacement: Tensor) -> Tensor:
                there = hessian.gradient(displacement)
                report()
                return there

            at_the_initial_point = self._governor.lr is None
            sharpness = self._sharpness.settle(
                gradient, hessian.gradient(), self._max_warmup if at_the_initial_point else 0
            )
        proposal = None if sharpness is None else H0_CONVENTION / sharpness.value
        lr = self._governor.limit(proposal)
        if lr is not None:
            self._governor.use(lr)
        return LearningRateResult(
            step=step.index,
            epoch=step.epoch,
            learning_rate=self._rates.highest if lr is None else lr,
            proposed=proposal,
            back_off=self._governor.back_off,
            converged=lr is not None,
            lambda_max=None if sharpness is None else sharpness.value,
            inverse_h0=proposal,
            exponent=None if sharpness is None else sharpness.exponent,
            curvature_along_gradient=None if sharpness is None else sharpness.along_gradient,
            refuted=None if sharpness is None else sharpness.was_refuted,
        )
