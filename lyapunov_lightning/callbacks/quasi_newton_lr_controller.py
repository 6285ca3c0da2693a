"""A learning rate from the curvature of the loss, in place of one that somebody tuned."""

import math
from collections.abc import Callable
from typing import Any, Literal, Optional

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lyapunov_lightning.callbacks.arguments import check_choice, check_int, check_positive
from lyapunov_lightning.callbacks.base import CurvatureCallback, Stateful
from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.lyapunov import H0_CONVENTION
from lyapunov_lightning.curvature.operator import HessianOperator, Method
from lyapunov_lightning.curvature.quasi_newton import CheckedSharpness, CurvatureAlongUpdate, Governor
from lyapunov_lightning.curvature.vectors import FlatLayout
from lyapunov_lightning.training.batches import Data, ProbeData
from lyapunov_lightning.training.problem import CurvatureProblem
from lyapunov_lightning.training.sandbox import Mode
from lyapunov_lightning.training.schedule import Schedule, Timetable
from lyapunov_lightning.training.sharing import Measurement, Subscription
from lyapunov_lightning.training.updates import LearningRates, ObservedUpdate, check_steerable, coupled_decay

Rule = Literal["along_update", "inverse_sharpness"]

_SETTLED = 0.01
"""How near to 1 the Lyapunov exponent of Algorithm 1 comes before the training begins."""

_MAX_TRIALS = 4
"""How often a growing learning rate is halved because the loss says that it is too long."""


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

    What an estimate may do is bounded. The learning rate falls at once and grows by at most `max_growth` a step; before
    it grows under ``"along_update"`` the longer step is tried on the loss, and halved while that rises; NaN, no or
    negative slope, and a measurement that fails, hold the last learning rate; after the loss has risen from one window
    of steps to the next, the learning rate is halved and comes back over another window.

    The optimizer's own learning rates matter only by their ratios between parameter groups, which are kept, and for the
    steps before the first measurement. Under ``"along_update"`` the optimizer takes its step, which is then made longer
    or shorter, inside of ``optimizer.step``: what else happens in a step sees one step, at the learning rate of the
    controller. Clipping is part of the update, and so is what `NudgedSGDHook` does to the gradient.

    Logged:

    - ``lr/curvature``: the learning rate of the step, the highest of the parameter groups.
    - ``lr/proposed``: what the rule asked for. ``lr/caution``: the factor on it, below 1 after the loss has risen.
    - ``lr/slope`` and ``lr/curvature_along_update``: ``-gᵀu`` and ``uᵀHu`` of this step (``along_update``).
    - ``lr/trials``: how often a growing step was halved (``along_update``).
    - ``lr/lambda_max``: the averaged largest eigenvalue; ``lr/inverse_h0``: the same as the paper's ``1/h0``;
      ``lr/lyapunov_exponent``, 1 once settled; ``lr/curvature_along_gradient``, the second estimate; ``lr/refuted``: 1
      where the tracked vector was wrong and began anew (``inverse_sharpness``).
    - ``lr/seconds``: wall-clock time spent. ``lr/converged`` is 0 where a measurement failed.

    Cost of a measured step, in gradients of its batch beyond the step's own: about 2.5 for ``along_update`` (gradient
    and product; a growing step two forward passes more), 3.3 for ``inverse_sharpness``. Memory: three vectors of the
    model's size for ``along_update``, two for ``inverse_sharpness``, and the gradient's graph while it lasts.

    Args:
        rule: Where the learning rate comes from, see above.
        every_n_steps: Measure at every n-th optimizer step, and keep the learning rate in between.
        data: ``"batch"`` for the step's own batch (with gradient accumulation the first of it), ``"fixed"`` for the
            same samples throughout.
        sigma: The factor on the step to the bottom of the parabola: 1 goes there, 2 goes to its other side, where
            plain gradient descent stops gaining.
        averaging: Weight of the past in the running averages; 0 for none.
        max_growth: The most by which the learning rate grows from one measurement to the next.
        min_lr: Floor of the learning rate.
        max_lr: Ceiling of the learning rate.
        window: Steps over which the loss is averaged to see whether it rises; 0 not to look at it.
        max_warmup: The most iterations of Algorithm 1 at the initial point (``inverse_sharpness``).
        method: How products are computed, as for `CurvatureProbe` (``along_update``).
        num_batches: Size of the fixed data in batches for each process.
        fraction: Size of the fixed data as a share of the training set, if `num_batches` is not given.
        mode: ``"train"`` or ``"eval"``: how dropout and BatchNorm act in the measured loss.
        loss_fn: Maps the module and a batch to the scalar loss to measure, in place of what ``training_step`` returns.
        delta_q: Length of the perturbation of Algorithm 1, in parameter space.
        log_prefix: Put in front of every tag.
        seed: Seed of Algorithm 1's first perturbation, and of the choice of fixed data.

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

    def __init__(
        self,
        rule: Rule = "along_update",
        every_n_steps: int = 1,
        data: Data = "batch",
        *,
        sigma: float = 1.5,
        averaging: float = 0.9,
        max_growth: float = 1.25,
        min_lr: float = 1e-6,
        max_lr: float = 10.0,
        window: int = 50,
        max_warmup: int = 50,
        method: Method = "auto",
        num_batches: Optional[int] = None,
        fraction: float = 0.05,
        mode: Mode = "train",
        loss_fn: Optional[Callable[[pl.LightningModule, Any], Any]] = None,
        delta_q: float = 5e-2,
        log_prefix: Optional[str] = None,
        seed: int = 0,
    ) -> None:
        check_choice("rule", rule, Rule)
        check_choice("method", method, Method)
        for name, value in {"sigma": sigma, "min_lr": min_lr, "max_lr": max_lr, "delta_q": delta_q}.items():
            check_positive(name, value)
        if not 0 <= averaging < 1:
            raise ValueError(f"`averaging` should be in [0, 1), got {averaging}.")
        if not max_growth > 1:
            raise ValueError(f"`max_growth` should be above 1, got {max_growth}.")
        if not min_lr < max_lr:
            raise ValueError(f"`min_lr` should be below `max_lr`, got {min_lr} and {max_lr}.")
        check_int("window", window, least=0)
        check_int("max_warmup", max_warmup, least=0)
        problem = CurvatureProblem(
            type(self).__name__,
            ProbeData(data, num_batches=num_batches, fraction=fraction, seed=seed),
            mode=mode,
            method="finite_difference" if rule == "inverse_sharpness" else method,
            loss_fn=loss_fn,
        )
        super().__init__(Subscription(problem, Timetable(Schedule(every_n_steps=every_n_steps)), None), log_prefix)
        self._rule: Rule = rule
        self._max_warmup = max_warmup
        self._along_update = CurvatureAlongUpdate(sigma, averaging)
        self._sharpness = CheckedSharpness(averaging, delta_q, seed)
        self._governor = Governor(max_growth, min_lr, max_lr, window)
        self._ratios: Optional[list[float]] = None
        self._rates: Optional[LearningRates] = None
        self._measurement: Optional[Measurement] = None
        self._update: Optional[ObservedUpdate] = None
        self._hook: Optional[RemovableHandle] = None

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(rule=self._rule, log_prefix=self._log_prefix)

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._check_alone(trainer, "the learning rate is one")

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().on_train_start(trainer, pl_module)
        optimizer = check_steerable(type(self).__name__, trainer, pl_module)
        self._rates = LearningRates(optimizer, self._ratios)
        self._ratios = self._rates.ratios
        self._release()
        if self._rule == "along_update":
            self._hook = optimizer.register_step_post_hook(lambda *_: self._after_step(trainer, optimizer))

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        self.subscription.problem.observe(trainer, batch, batch_idx)
        if not self.subscription.timetable.is_due(trainer, batch_idx):
            return
        with self._recorder.measurement(trainer, "lr") as scalars:
            measurement = self.subscription.take(trainer, pl_module, batch, batch_idx)
            if measurement is not None and self._rule == "inverse_sharpness":
                scalars.update(self._from_sharpness(measurement.operator))
            else:
                self._measurement = measurement
        self.subscription.timetable.record(scalars.get("lr/seconds", 0.0))

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: torch.optim.Optimizer
    ) -> None:
        assert self._rates is not None  # by `on_train_start`
        if self._governor.lr is not None:
            self._rates.set(self._governor.lr)
        if self._measurement is not None:
            self._update = ObservedUpdate(self._measurement.operator.parameters)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            mean = trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
            self._governor.observe(float(mean))

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._release()

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        self._release()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ratios": self._ratios}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._ratios = state_dict["ratios"]

    @override
    def _stateful(self) -> dict[str, Stateful]:
        rule: Stateful = self._along_update if self._rule == "along_update" else self._sharpness
        return {"timetable": self.subscription.timetable, "rule": rule, "governor": self._governor}

    def _release(self) -> None:
        """Drop what an interrupted step has left, and the hook on its optimizer."""
        self._measurement, self._update = None, None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _after_step(self, trainer: "pl.Trainer", optimizer: torch.optim.Optimizer) -> None:
        """Make the step that the optimizer just took as long as the curvature along it says."""
        (measurement, self._measurement), (update, self._update) = (self._measurement, None), (self._update, None)
        if measurement is None or update is None:
            return
        assert self._rates is not None  # by `on_train_start`
        taken = self._rates.highest
        displacement, lr = update.rewind(), taken
        try:
            with self._recorder.measurement(trainer, "lr") as scalars:
                scalars.update(self._along(measurement.operator, optimizer, displacement, taken))
                lr = scalars["lr/curvature"]
        finally:
            update.replay(displacement, lr / taken)
        self._rates.set(lr)
        self.subscription.timetable.record(scalars.get("lr/seconds", 0.0))

    def _along(
        self, operator: HessianOperator, optimizer: torch.optim.Optimizer, displacement: Tensor, taken: float
    ) -> dict[str, float]:
        """The learning rate from slope and curvature along the update, and these."""
        update = displacement / taken
        product = operator.matvec(update)
        gradient = operator.gradient()  # free where the product has kept its graph
        decay = coupled_decay(optimizer, operator.parameters)
        if decay is not None:
            here = FlatLayout(operator.parameters).flatten(operator.parameters)
            gradient = gradient + decay * here
            product = product + decay * update
        slope, curvature = -float(gradient @ update), float(update @ product)
        if not (math.isfinite(slope) and math.isfinite(curvature)):
            raise NonFiniteCurvatureError(
                f"The slope ({slope}) or the curvature ({curvature}) along the update is not finite, so the learning"
                " rate stays as it was."
            )
        proposal = self._along_update.propose(slope, curvature)
        lr = self._governor.admitted(proposal)
        trials = 0
        if lr is not None and lr > (self._governor.lr or 0.0):
            lr, trials = self._tried(operator, update, lr)
        if lr is not None:
            self._governor.use(lr)
        scalars = {"lr/slope": slope, "lr/curvature_along_update": curvature, "lr/trials": float(trials)}
        return scalars | self._steered(proposal, taken if lr is None else lr)

    def _tried(self, operator: HessianOperator, update: Tensor, lr: float) -> tuple[float, int]:
        """A growing learning rate, halved while the loss of the batch rises along the step, and how often."""
        least = self._governor.lr or 0.0
        before = operator.value()
        for trials in range(_MAX_TRIALS):
            if operator.value(update * lr) <= before:
                return lr, trials
            lr = max(lr / 2, least)
            if lr == least:
                return lr, trials + 1
        return lr, _MAX_TRIALS

    def _from_sharpness(self, operator: HessianOperator) -> dict[str, float]:
        """The learning rate from the largest eigenvalue, and what that comes from."""
        here = operator.gradient()
        sharpness = self._sharpness.step(operator.gradient, here)
        if self._governor.lr is None:  # at the initial point, until the estimate has settled
            for _ in range(self._max_warmup):
                if sharpness is not None and abs(sharpness.exponent - 1) < _SETTLED and not sharpness.was_refuted:
                    break
                sharpness = self._sharpness.step(operator.gradient, here)
        proposal = None if sharpness is None else H0_CONVENTION / sharpness.value
        lr = self._governor.admitted(proposal)
        if lr is None:
            return {"lr/converged": 0.0}
        self._governor.use(lr)
        scalars = self._steered(proposal, lr)
        if sharpness is not None:
            scalars["lr/lambda_max"] = sharpness.value
            scalars["lr/inverse_h0"] = H0_CONVENTION / sharpness.value
            scalars["lr/lyapunov_exponent"] = sharpness.exponent
            scalars["lr/curvature_along_gradient"] = sharpness.along_gradient
            scalars["lr/refuted"] = float(sharpness.was_refuted)
        return scalars

    def _steered(self, proposal: Optional[float], lr: float) -> dict[str, float]:
        scalars = {"lr/curvature": lr, "lr/caution": self._governor.caution, "lr/converged": 1.0}
        return scalars if proposal is None else {**scalars, "lr/proposed": proposal}
