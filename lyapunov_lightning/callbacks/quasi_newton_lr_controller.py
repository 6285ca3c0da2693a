"""A learning rate from the curvature of the loss, in place of one that somebody tuned."""

import math
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lyapunov_lightning.callbacks.results.learning_rate import LearningRateResult
from lyapunov_lightning.curvature.acting.loss_watch import Verdict
from lyapunov_lightning.curvature.acting.pace import LRBounds, Pace, annealing
from lyapunov_lightning.curvature.acting.step_length import CheckedSharpness, StepLength, longest_descent
from lyapunov_lightning.curvature.arguments import check_choice
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.curvature.solvers.lyapunov import H0_CONVENTION
from lyapunov_lightning.figures import learning_rate_figure
from lyapunov_lightning.training.callback import CurvatureCallback, Figures, Stateful, non_default
from lyapunov_lightning.training.config import HessianConfig
from lyapunov_lightning.training.distributed import failing_together, mean_over_ranks
from lyapunov_lightning.training.lightning_names import MisconfigurationException
from lyapunov_lightning.training.optimizers.learning_rates import LearningRates
from lyapunov_lightning.training.optimizers.requirements import check_steerable, gain_of_momentum
from lyapunov_lightning.training.optimizers.safeguard import Safeguard
from lyapunov_lightning.training.optimizers.updates import LastUpdate, ObservedUpdate, slope_and_curvature
from lyapunov_lightning.training.replica.replica import trainable_parameters
from lyapunov_lightning.training.reporting.losses import LossSeries, loss_in
from lyapunov_lightning.training.reporting.progress import progress
from lyapunov_lightning.training.reporting.recording import Record
from lyapunov_lightning.training.schedule import Schedule
from lyapunov_lightning.training.sharing import Step

Rule = Literal["along_update", "inverse_sharpness"]

_ANNEALING = 0.4
"""Share of the training over which the learning rate falls to zero, where it is known how long that is."""

_FIRST_STEPS, _INTERVAL = 20, 10
"""Steps that are all measured, since most changes in them; and the interval from then on."""

_START = 0.3
"""The first learning rate, as a share of that at which the loss of the first batch falls."""

_FAR = 0.05
"""Change of the parameters in one step, as a share of themselves, from which on steps do not become longer."""

_OBSERVABLE = 1e-3
"""Learning rate below which a first step would be lost in the rounding of the parameters, and is observed at 1."""

_DELTA_Q = 5e-2
"""Length of the perturbation of Algorithm 1, in parameter space."""

_MAX_WARMUP = 50
"""The most iterations of Algorithm 1 at the initial point."""


class QuasiNewtonLRController(CurvatureCallback):
    """Sets the learning rate at every step from the curvature of the loss, for SGD, momentum and Adam.

    Two rules:

    - ``"along_update"`` (default): with ``u`` the optimizer's own update at learning rate 1, after momentum,
      preconditioning, decay and clipping, (−gᵀu) / |uᵀHu| is the learning rate that goes to the
      bottom of the parabola along it. Slope and curvature are seen by the *next* batch, since the batch that made the
      update sees it steeper than it is. The learning rate follows slowly: steps shorter than 1.4 times that way grow,
      up to 1.8 times while the loss falls, and those beyond 2 times, where nothing is gained, shrink, beyond 4 while
      the loss falls.
    - ``"inverse_sharpness"``: the chaos-theory paper's method, for SGD. Algorithm 1 follows the largest eigenvalue, at
      the initial point until it has settled and then by one iteration a measurement, and the learning rate is its
      1/h₀ = (e − 1)/λ_max after a running average; with momentum, times ``1 - momentum``. One tracked
      vector can hang on a wrong eigenvector, and then asks for a learning rate that is many times too large: so every
      estimate is held against the curvature along the gradient.

    Where it is known how long the training is (``max_steps``, or ``max_epochs`` and a sized dataloader), the learning
    rate falls linearly to zero over its last 40 % under ``"along_update"``: seen from one step, noise asks for smaller
    steps at all times, and this is when they pay.

    First, do no harm. The loss of every step is held against the noise of those before: after a window of rising losses
    the learning rate is halved; after NaN, a spike, or losses that go on rising, the training is brought back to where
    it was well, and goes on at half the learning rate, which doubles again over a window at the earliest.

    The optimizer's own learning rates matter only by their ratios between parameter groups, which are kept; a group
    that is added in mid-run joins with the ratio that it has then. Clipping is part of the update, and so is what
    `NudgedSGDHook` does to the gradient.

    Logged, at measured steps:

    - ``quasi_newton/learning_rate``: the learning rate of the step, the highest of the parameter groups.
    - ``quasi_newton/step_length``: how long the steps are, with the way to the bottom of the parabola as unit; and
      ``slope_along_update`` and ``curvature_along_update``: ``-gᵀu`` and ``uᵀHu`` of the last update, seen by this
      batch (``along_update``).

    and in the group ``quasi_newton_details``:

    - ``proposed``: the learning rate that goes to the bottom; the paper's ``1/h0``, times ``1 - momentum``.
      ``annealing``: the factor that the end of the training puts on the learning rate. ``restored``: how often the
      parameters were brought back so far. ``trials``: how often the very first step was halved (``along_update``).
    - ``lambda_max``: the averaged largest eigenvalue; ``inverse_h0``: the same as the paper's ``1/h0``;
      ``lyapunov_exponent``, 1 once settled; ``curvature_along_gradient``, the second estimate; ``refuted``: 1 where the
      tracked vector was wrong and began anew (``inverse_sharpness``).
    - ``seconds``: wall-clock time spent. ``converged`` is 0 where a measurement failed or found nothing to go by.

    The same is in ``controller.results`` as `LearningRateResult`, and drawn as ``quasi_newton/learning_rate``.

    Cost in gradients of its batch beyond the step's own: about 2.5 for a measured step of ``along_update``, by default
    the first 20 and every tenth, 3.3 for ``inverse_sharpness``, by default every one. Memory: two vectors of the
    model's size for ``along_update``; the safeguard one copy of parameters, buffers and optimizer state, and a second
    one during every tenth step.

    Args:
        every_n_steps: Measure at the first opportunity after every n optimizer steps, and before each of the first 20
            (``along_update``); 10 by default, 1 under ``"inverse_sharpness"``.
        rule: Where the learning rate comes from, see above.
        schedule: Any other schedule.
        hessian: Which Hessian; by default that of the step's own batch. ``"inverse_sharpness"`` takes differences of
            gradients, whatever the method there.
        annealing: Share of the training over which the learning rate falls to zero, 0 for none; by default 0.4 under
            ``"along_update"`` and 0 under ``"inverse_sharpness"``, as in the paper.
        safeguard: Whether to keep a copy of the training, and to go back to it.
        bounds: What the learning rate may do, whatever the rule asks for.
        force: Whether to steer optimizers other than SGD by ``"inverse_sharpness"``.
        log_prefix: Put in front of every tag.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: With an LR scheduler, manual optimization, StochasticWeightAveraging, an optimizer
            whose steps are not learning rate times update (LBFGS, Rprop, ASGD, SAM, schedule-free, Prodigy), another
            controller, or a module that cannot be measured.

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
        annealing: float | None = None,
        safeguard: bool = True,
        bounds: LRBounds = LRBounds(),
        force: bool = False,
        log_prefix: str | None = None,
    ) -> None:
        arguments = non_default(QuasiNewtonLRController.__init__, locals())
        check_choice("rule", rule, Rule)
        is_papers = rule == "inverse_sharpness"
        if not isinstance(bounds, LRBounds):
            raise ValueError(f"`bounds` should be LRBounds, got {bounds!r}.")
        if annealing is not None and not 0 <= annealing <= 1:
            raise ValueError(f"`annealing` should be in [0, 1], got {annealing}.")
        if schedule is None and not is_papers:
            schedule = Schedule(_INTERVAL if every_n_steps is None else every_n_steps, first_n_steps=_FIRST_STEPS)
            every_n_steps = None
        super().__init__(
            every_n_steps,
            schedule,
            hessian,
            log_prefix,
            data="batch",
            method="finite_difference" if is_papers else None,
            default=Schedule(every_n_steps=1),
            arguments=arguments,
        )
        self._rule: Rule = rule
        self._annealing = annealing if annealing is not None else 0.0 if is_papers else _ANNEALING
        self._force = force
        self._length = StepLength()
        self._sharpness = CheckedSharpness(_DELTA_Q, self.config.seed)
        self._pace = Pace(bounds)
        self._safeguard = Safeguard(safeguard)
        self._rates = LearningRates()
        self._update = LastUpdate()
        self._losses = LossSeries()
        self._num_steps = math.inf
        self._seen: tuple[Tensor, float] | None = None
        self._own_lr = 0.0
        self._has_stepped = False
        self._waiting: tuple[LossHessian, Step] | None = None
        self._first: ObservedUpdate | None = None
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
        if self._rule == "inverse_sharpness" and not (self._force or isinstance(optimizer, torch.optim.SGD)):
            raise MisconfigurationException(
                "`QuasiNewtonLRController(rule='inverse_sharpness')` is the paper's rule for SGD: the largest"
                f" eigenvalue of the Hessian says nothing of the steps of {type(optimizer).__name__}. Use"
                " `rule='along_update'`, or `force=True` to see what comes of it."
            )
        self._rates.start(optimizer)
        self._losses.start(trainer)
        self._release()
        self._num_steps = trainer.estimated_stepping_batches
        self._update.to(trainer.strategy.root_device)
        if self._rule == "along_update":
            self._hook = optimizer.register_step_post_hook(lambda *_: self._after_step(trainer, optimizer))

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._safeguard.before_batch(trainer, pl_module)

    @override
    def figures(self) -> Figures:
        results: list[LearningRateResult] = self.results
        restored = [result.step for before, result in pairwise(results) if result.restored > before.restored]
        return {
            "learning_rate": partial(
                learning_rate_figure,
                [result.step for result in results],
                [result.learning_rate for result in results],
                [result.step_length for result in results],
                losses=self._losses.series,
                restored_at=restored,
            )
        }

    @override
    def measure(self, hessian: LossHessian, step: Step) -> LearningRateResult | None:
        if self._rule == "inverse_sharpness":
            return self._from_sharpness(hessian, step)
        if self._pace.lr is None:
            self._waiting = (hessian, step)  # for the first update, which the optimizer is about to make
            return None
        update = self._update.vector
        self._length.lose_curvature()  # until it has been measured
        if update is None or len(update) != hessian.space.length or not float(hessian.space.norm(update)) > 0:
            return self._result(step, converged=False)
        slope_at_end, curvature = slope_and_curvature(hessian, update, step.trainer.optimizers[0])
        self._length.see_curvature(curvature / float(hessian.space.inner(update, update)))
        return self._result(
            step,
            proposed=self._length.best_lr,
            step_length=self._length.of(self._update.lr),
            slope_along_update=slope_at_end + self._update.lr * abs(curvature),
            curvature_along_update=curvature,
        )

    @override
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        # Here, and not before the step, where others may have changed the gradient.
        seen = self._update.seen(list(trainable_parameters(pl_module).values()), trainer.optimizers[0])
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if seen is not None and scaler is not None:
            seen[0] /= scaler.get_scale()
        self._seen = None if seen is None else (seen, self._update.lr)

    @override
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self._has_stepped = True
        lr = self._lr(trainer)
        if lr is not None:
            self._rates.set(lr)
        if self._waiting is not None:
            self._first = ObservedUpdate(self._waiting[0])
            self._own_lr = self._rates.highest
            if self._own_lr < _OBSERVABLE:
                self._rates.set(1.0)
        elif self._rule == "along_update":
            self._update.begin(list(trainable_parameters(pl_module).values()))

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._losses.see(trainer, outputs)
        loss = loss_in(outputs)
        seen, self._seen, has_stepped, self._has_stepped = self._seen, None, self._has_stepped, False
        if self._first is not None:  # the step was not taken, as a loss scaler decides at times
            self._rates.set(self._own_lr)
            self._waiting, self._first = None, None
        if loss is None:
            return
        numbers = loss.reshape(1)
        if seen is not None and has_stepped:
            numbers = torch.cat([numbers.to(seen[0]), seen[0]])
        value, *along = mean_over_ranks(trainer, numbers).tolist()
        verdict, restored = self._safeguard.after_batch(value, trainer.optimizers[0])
        if verdict is Verdict.LOST:
            self._start_again(trainer, value, restored)
            return
        if verdict is Verdict.WELL:
            self._pace.pass_step()
        if verdict is Verdict.RISING:
            self._pace.halve()
        if seen is not None and along:
            self._follow(trainer, seen[1], *along)

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._losses.collect(trainer)
        super().on_train_end(trainer, pl_module)
        self._release()

    @override
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._release()

    @override
    def _stateful(self) -> dict[str, Stateful]:
        rule: Stateful = self._length if self._rule == "along_update" else self._sharpness
        return {
            **super()._stateful(),
            "rule": rule,
            "pace": self._pace,
            "safeguard": self._safeguard,
            "rates": self._rates,
            "update": self._update,
            "losses": self._losses,
        }

    @override
    def _keep(self, trainer: Any, record: Record) -> None:
        super()._keep(trainer, record)
        self._losses.collect(trainer)

    def _release(self) -> None:
        """Drop what an interrupted step has left, the hook on its optimizer, and the copy of the training."""
        self._waiting, self._first, self._seen, self._has_stepped = None, None, None, False
        self._safeguard.start()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _factor(self, trainer: Any) -> float:
        """What the end of the training makes of the learning rate."""
        return annealing(self._annealing, trainer.global_step, self._num_steps)

    def _lr(self, trainer: Any) -> float | None:
        """The learning rate of the present step; None while it is the optimizer's own."""
        bounds = self._pace.bounds
        return None if self._pace.lr is None else max(self._pace.lr * self._factor(trainer), bounds.min_lr)

    def _result(self, step: Step, **found: Any) -> LearningRateResult:
        lr = self._lr(step.trainer)
        return LearningRateResult(
            step=step.index,
            epoch=step.epoch,
            learning_rate=self._rates.highest if lr is None else lr,
            annealing=self._factor(step.trainer),
            restored=self._safeguard.num_restored,
            **found,
        )

    def _after_step(self, trainer: Any, optimizer: torch.optim.Optimizer) -> None:
        """Keep the update for the next batch, right after the optimizer has taken its step."""
        if self._first is None:
            self._update.end(self._rates.highest)
            return
        assert self._waiting is not None
        (waiting, self._waiting), (first, self._first) = (self._waiting, None), (self._first, None)
        taken = self._rates.highest
        displacement, lr = first.rewind(), self._own_lr
        try:
            with self._recorder.measurement(trainer) as record, failing_together(trainer):
                result = record.result = self._begin(*waiting, optimizer, displacement / taken)
                lr = result.learning_rate
        finally:
            first.replay(displacement, lr / taken)
        self._rates.set(lr)
        self._update.take(displacement / taken, lr, waiting[0].parameters)
        self._keep(trainer, record)

    def _begin(
        self, hessian: LossHessian, step: Step, optimizer: torch.optim.Optimizer, update: Tensor
    ) -> LearningRateResult:
        """The first learning rate, from slope and curvature along the first update, and from the loss.

        Args:
            hessian: The Hessian before the step.
            step: The step.
            optimizer: The optimizer.
            update: The update at learning rate 1.

        """
        slope, curvature = slope_and_curvature(hessian, update, optimizer)
        longest, trials = longest_descent(
            lambda lr: hessian.value(update * lr), hessian.value(), slope=slope, curvature=curvature
        )
        if longest is None:
            return self._result(step, converged=False, trials=trials)
        self._pace.begin(_START * longest / gain_of_momentum(optimizer))
        return self._result(
            step, proposed=longest, slope_along_update=slope, curvature_along_update=curvature, trials=trials
        )

    def _from_sharpness(self, hessian: LossHessian, step: Step) -> LearningRateResult:
        """The learning rate from the largest eigenvalue."""
        with progress(step.trainer, type(self).__name__) as report:

            def gradient(displacement: Tensor) -> Tensor:
                there = hessian.gradient(displacement)
                report()
                return there

            max_iterations = _MAX_WARMUP if self._pace.lr is None else 0
            sharpness = self._sharpness.settle(gradient, hessian.gradient(), max_iterations, hessian.space)
        if sharpness is None:
            return self._result(step, converged=self._pace.lr is not None)
        inverse_h0 = H0_CONVENTION / sharpness.value
        proposal = inverse_h0 / gain_of_momentum(step.trainer.optimizers[0])
        self._pace.approach(proposal)
        return self._result(
            step,
            proposed=proposal,
            lambda_max=sharpness.value,
            inverse_h0=inverse_h0,
            exponent=sharpness.exponent,
            curvature_along_gradient=sharpness.along_gradient,
            refuted=sharpness.was_refuted,
        )

    def _follow(self, trainer: Any, lr: float, slope: float, squared_norm: float, change: float, size: float) -> None:
        """Make the next steps longer or shorter, by how the last one looks from this batch.

        Args:
            trainer: The trainer.
            lr: Its learning rate.
            slope: ``-gᵀu`` where it ended.
            squared_norm: ``uᵀu``.
            change: The sum of the moduli of ``u``.
            size: That of the parameters.

        """
        if not self._length.see_slope(slope, squared_norm=squared_norm, lr=lr):
            return
        length, at_least = self._length.of(lr), self._length.at_least(lr)
        assert length is not None  # with slope and curvature
        assert at_least is not None
        may_grow = lr * change <= _FAR * size and self._factor(trainer) == 1
        self._pace.follow(
            length,
            at_least,
            is_falling=self._safeguard.watch.is_falling,
            may_grow=may_grow,
            memory=self._length.memory,
            inertia=gain_of_momentum(trainer.optimizers[0]),
        )

    def _start_again(self, trainer: Any, loss: float, restored: int | None) -> None:
        """Go on at a smaller learning rate.

        Args:
            trainer: The trainer.
            loss: The loss that was too high.
            restored: The step to whose state the training was brought back, if it was.

        """
        self._update.forget()
        if self._pace.is_stopped:
            return
        if self._pace.lr is None:
            self._pace.begin(self._rates.highest)
        self._pace.halve()
        where = f"at step {trainer.global_step} the loss was {loss:.3g}, far above what it was before"
        if self._safeguard.is_hopeless(loss, restored):
            self._pace.stop()
            why = "there was no copy to go back to" if restored is None else "going back again and again did not help"
            self._recorder.warn_once(
                "stopped",
                f"{where}, and {why}. The learning rate stays at {self._pace.lr:.3g} from now on. Look for what else is"
                " wrong, such as numbers in the data that are not finite.",
            )
        else:
            how = "" if restored is None else f" the training was brought back to step {restored}, and"
            self._recorder.warn_once("went back", f"{where}:{how} the learning rate was halved. This is said once.")
        self._rates.set(self._lr(trainer) or self._rates.highest)
