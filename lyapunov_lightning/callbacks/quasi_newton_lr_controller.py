"""A learning rate from the curvature of the loss, in place of one that is tuned by hand."""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from typing_extensions import override

from lyapunov_lightning.callbacks.phases import FirstStepDue, Idle, OnTrial, Phase, Seen, Stepping
from lyapunov_lightning.callbacks.results.learning_rate import LearningRateResult
from lyapunov_lightning.callbacks.rules import RULES, Proposal, RuleName, Situation
from lyapunov_lightning.curvature.acting.loss_watch import Verdict
from lyapunov_lightning.curvature.acting.pace import LRBounds
from lyapunov_lightning.curvature.arguments import check_choice, made_of
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.figures import learning_rate_figure
from lyapunov_lightning.figures.learning_rate import Measure
from lyapunov_lightning.training.callback import CurvatureCallback, Figures, Stateful, non_default
from lyapunov_lightning.training.config import HessianConfig, HessianLike, ScheduleLike
from lyapunov_lightning.training.distributed import failing_together, mean_over_ranks
from lyapunov_lightning.training.lightning_names import LightningModule, MisconfigurationException, Trainer
from lyapunov_lightning.training.optimizers.requirements import check_own_steps, check_steerable
from lyapunov_lightning.training.optimizers.steering import Steering
from lyapunov_lightning.training.optimizers.step_hook import StepHook
from lyapunov_lightning.training.optimizers.updates import LastUpdate, SeenUpdate, Update
from lyapunov_lightning.training.replica.replica import trainable_parameters
from lyapunov_lightning.training.reporting.losses import LossSeries, loss_in
from lyapunov_lightning.training.reporting.progress import progress
from lyapunov_lightning.training.reporting.recording import Record
from lyapunov_lightning.training.schedule import Schedule
from lyapunov_lightning.training.sharing import Step


class QuasiNewtonLRController(CurvatureCallback):
    """Sets the learning rate at every step from the curvature of the loss, for SGD, momentum and Adam.

    Three rules:

    - ``"batch_sharpness"`` (default): keeps the steps off their edge of stability. Under mini-batches that is the batch
      sharpness over the limit that the optimizer has at the measured agreement of its batches; where all batches agree,
      the largest eigenvalue over its own limit. Steps grow below 0.5 of it and shrink beyond 0.8 (1 and 2 while the
      loss falls); where there is no noise, below 0.8 and beyond 0.95.
    - ``"along_update"``: with ``u`` the optimizer's own update at learning rate 1, after momentum, preconditioning,
      decay and clipping, (−gᵀu) / |uᵀHu| is the learning rate that goes to the bottom of the parabola along it. Slope
      and curvature are measured on the *next* batch, since the slope along ``u`` is steeper on the batch that ``u`` was
      made of. Steps grow while they are shorter than 1.4 times the way to the bottom (1.8 times while the loss falls),
      and shrink beyond 2 times, where nothing is gained (4 times while the loss falls). It asks nothing of the
      optimizer, and holds two vectors more.
    - ``"inverse_sharpness"``: the chaos-theory paper's method, for SGD. Algorithm 1 follows the largest eigenvalue, at
      the initial point until it has settled and then by one iteration for each measurement. The learning rate is its
      1/h0 = (e − 1)/λ_max after a running average; with momentum, times ``1 - momentum``. The one vector that it
      follows can stay near a wrong eigenvector, and the learning rate is then many times too large: so every estimate
      is compared with the curvature along the gradient.

    Where the length of the training is known (``max_steps``, or ``max_epochs`` and a sized dataloader), the learning
    rate falls linearly to zero over its last 40 % (not under ``"inverse_sharpness"``): noise always makes smaller steps
    look better, and only at the end they are.

    First, do no harm. The loss of every step is compared with those before and their noise. After a window of rising
    losses the learning rate is halved. After NaN, a spike, or losses that keep rising, the training is brought back to
    a state in which its losses were good, and continues at half the learning rate, which may double over a window.

    Of the optimizer's own learning rates only the ratios between parameter groups matter, and they are kept; a group
    that is added in mid-run gets the ratio that it has then. Clipping is part of the update, and so is what
    `NudgedSGDHook` does to the gradient.

    Logged, at measured steps:

    - ``quasi_newton/learning_rate``: the learning rate of the step, the highest of the parameter groups.
    - ``quasi_newton/stability_ratio``: how near the steps are to their edge, which is at 1 (``batch_sharpness``).
    - ``quasi_newton/step_length``: how long the steps are, with the way to the bottom of the parabola as unit; and
      ``slope_along_update`` and ``curvature_along_update``: ``-gᵀu`` and ``uᵀHu`` of the last update, on this batch
      (``along_update``).

    and in the group ``quasi_newton_details``:

    - ``proposed``: the learning rate that goes to the bottom; the paper's ``1/h0``, times ``1 - momentum``.
      ``annealing``: the factor on the learning rate towards the end of the training. ``restored``: how often the
      training was brought back so far. ``trials``: how often the very first step was halved. ``batch_sharpness`` and
      ``batch_agreement``, and ``lambda_max`` where batches agree (``batch_sharpness``).
    - ``lambda_max``: the averaged largest eigenvalue; ``inverse_h0``: the same as the paper's ``1/h0``;
      ``lyapunov_exponent``, 1 once settled; ``curvature_along_gradient``, the second estimate; ``refuted``: 1 where the
      tracked vector was wrong and was replaced by the gradient (``inverse_sharpness``).
    - ``seconds``: wall-clock time. ``converged``: 0 where a measurement failed or did not lead to an estimate.

    The same is in ``controller.results`` as `LearningRateResult`, and drawn as ``quasi_newton/learning_rate``.

    Cost of a measured step, in gradients of its batch, on top of its own: about 3 (``batch_sharpness``; 5 where batches
    are compared), 2.5 (``along_update``) or 3.3 (``inverse_sharpness``). Memory: two vectors of the model's size for
    ``along_update``; for the safeguard two copies of parameters, buffers and optimizer state.

    Args:
        every_n_steps: Measure at the first opportunity after every n optimizer steps, and before each of the first 20;
            10 by default. Under ``"inverse_sharpness"`` 1, and no more at the start.
        rule: How the learning rate is found, see above.
        schedule: Any other schedule.
        hessian: Which Hessian; by default that of the step's own batch. ``"inverse_sharpness"`` takes differences of
            gradients, whatever the method there.
        annealing: Share of the training over which the learning rate falls to zero, 0 for none; by default 0.4, and 0
            under ``"inverse_sharpness"``, as in the paper.
        safeguard: Whether to keep copies of the training to go back to.
        bounds: The bounds of the learning rate and of its growth, whatever the rule proposes.
        force: Whether to use ``"inverse_sharpness"`` for other optimizers than SGD too.
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
        ``batch_sharpness`` "Edge of stochastic stability" (A. Andreyev, P. Beneventano, 2024); for ``along_update``
        "Stepping on the edge: curvature aware learning rate tuners" (V. Roulet et al., 2024).

    """

    group = "quasi_newton"
    result_class = LearningRateResult

    def __init__(
        self,
        every_n_steps: int | None = None,
        rule: RuleName = "batch_sharpness",
        *,
        schedule: ScheduleLike | None = None,
        hessian: HessianLike = HessianConfig(),
        annealing: float | None = None,
        safeguard: bool = True,
        bounds: LRBounds = LRBounds(),
        force: bool = False,
        log_prefix: str | None = None,
    ) -> None:
        arguments = non_default(QuasiNewtonLRController.__init__, locals())
        check_choice("rule", rule, RuleName)
        kind = RULES[rule]
        bounds = made_of(LRBounds, "bounds", bounds)
        if annealing is not None and not 0 <= annealing <= 1:
            raise ValueError(f"`annealing` should be in [0, 1], got {annealing!r}.")
        if schedule is None:
            # Into one schedule with the rule's first steps, and None for the base class, which refuses both arguments
            # at once.
            every = kind.every_n_steps if every_n_steps is None else every_n_steps
            schedule, every_n_steps = Schedule(every, first_n_steps=kind.first_n_steps), None
        super().__init__(
            every_n_steps, schedule, hessian, log_prefix, data="batch", method=kind.method, arguments=arguments
        )
        self._rule_name: RuleName = rule
        self._rule = kind(self.config.seed)
        self._force = force
        self._steering = Steering(bounds, kind.annealing if annealing is None else annealing, safeguard)
        self._update = LastUpdate()
        self._losses = LossSeries()
        self._phase: Phase = Idle()
        self._is_first_step = True
        self._is_stepping = False
        self._step_hook = StepHook()

    @property
    @override
    def identity(self) -> dict[str, Any]:
        return {"rule": self._rule_name}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._check_alone(trainer, "the learning rate is one")
        if stage == "fit":  # or the base class would name ways to measure what cannot be steered
            check_own_steps(type(self).__name__, pl_module)
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        owner = type(self).__name__
        optimizer = check_steerable(owner, trainer, pl_module)
        if not self._force:
            self._rule.check(owner, optimizer)
        self._release()
        self._steering.start(trainer, optimizer)
        self._is_first_step = True
        if self._steering.end.has_no_end:
            self._recorder.say(
                "the length of the training is not known, so the learning rate does not fall towards its end, with"
                " which goes much of what it gains on noisy data. Give the Trainer `max_steps`, or `max_epochs` and a"
                " dataloader with a length."
            )
        self._losses.start(trainer)
        # Vectors of a checkpoint are on the CPU, where a dot product with the first gradient would fail.
        self._update.to(trainer.strategy.root_device, list(trainable_parameters(pl_module).values()))
        if self._rule.begins_with_update:
            self._step_hook.attach(optimizer, partial(self._after_step, trainer, optimizer))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._steering.safeguard.before_batch(trainer, pl_module)

    @override
    def figures(self) -> Figures:
        results: list[LearningRateResult] = self.results
        measure: Measure = "step length" if self._rule.follows_updates else "stability ratio"
        restored = [result.step for before, result in pairwise(results) if result.restored > before.restored]
        return {
            "learning_rate": partial(
                learning_rate_figure,
                [result.step for result in results],
                [result.learning_rate for result in results],
                [r.step_length if self._rule.follows_updates else r.stability_ratio for r in results],
                measure=measure,
                losses=self._losses.series,
                restored_at=restored,
            )
        }

    @override
    def measure(self, hessian: LossHessian, step: Step) -> LearningRateResult | None:
        is_first = not self._steering.has_begun
        if is_first and self._rule.begins_with_update:
            self._phase = FirstStepDue(hessian, step)
            return None
        proposal = self._propose(hessian, step, self._update.known, is_first)
        if proposal.lr is not None:
            self._steering.approach(proposal.lr)
        return self._result(step, proposal)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here and not before the step: NudgedSGDHook may have changed the gradient by then, and the slope would be that
        # of another loss.
        last = self._update.known
        if last is None or isinstance(self._phase, FirstStepDue) or not self._rule.follows_updates:
            return
        # This hook comes before Lightning unscales: under fp16 ``.grad`` is 65,536 times the gradient at first.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss_scale = 1.0 if scaler is None else scaler.get_scale()
        seen = self._update.seen(list(trainable_parameters(pl_module).values()), trainer.optimizers[0], loss_scale)
        if seen is not None:
            self._phase = Seen(seen, last.lr)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._is_stepping = True
        self._notice_others(trainer)
        # In the last hook before the optimizer reads its groups: what is set here acts in this very step.
        self._steering.set(trainer)
        if isinstance(self._phase, FirstStepDue):
            self._phase = self._phase.step_on_trial(self._steering.rates)
            return
        if isinstance(self._phase, Seen):
            self._phase = self._phase.step()
        if self._rule.follows_updates:
            self._update.begin(list(trainable_parameters(pl_module).values()))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses.see(trainer, outputs)
        loss = loss_in(outputs)
        phase = self._phase
        is_stepping, self._is_stepping = self._is_stepping, False
        if not isinstance(phase, FirstStepDue):  # of an accumulated step, which ends in a later batch
            self._phase = Idle()
        if isinstance(phase, OnTrial):
            # The optimizer took no step, as with a loss scaler where gradients overflow: the next measurement tries
            # again.
            self._steering.rates.set(phase.own_lr)
        if loss is None:
            return
        numbers = [loss.reshape(())]
        if isinstance(phase, Stepping):
            numbers = [numbers[0].to(phase.update.slope), *phase.update]
        # One reduction and one transfer for all of them: this is done at every step.
        value, *seen = mean_over_ranks(trainer, torch.stack(numbers)).tolist()
        if self._steering.see_loss(trainer, value, self._recorder.warn_once) is Verdict.LOST:
            # The parameters are those of an earlier step now, so the next gradient says nothing of where this update
            # ended.
            self._update.forget()
            self._rule.forget()
            return
        if isinstance(phase, Stepping):
            lengths = self._rule.follow(SeenUpdate(*seen), phase.lr)
            if lengths is not None:
                self._steering.follow(trainer, lengths)
        ratio = self._rule.edge_ratio()
        if ratio is not None and is_stepping:
            self._steering.keep_off_the_edge(trainer, ratio)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # First the losses of all ranks, while all of them are here. `conclude` also serves a run that breaks off, and
        # takes those of this rank alone.
        self._losses.collect(trainer)
        super().on_train_end(trainer, pl_module)
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._release()

    @override
    def _stateful(self) -> dict[str, Stateful]:
        own: dict[str, Stateful] = {"rule": self._rule, "update": self._update, "losses": self._losses}
        return {**super()._stateful(), **self._steering.parts(), **own}

    @override
    def _keep(self, trainer: Trainer, record: Record) -> None:
        super()._keep(trainer, record)
        self._losses.collect(trainer)

    def _notice_others(self, trainer: Trainer) -> None:
        """Refuse a learning rate that is set by the user's code as well, or warn where that begins in mid-run.

        Raises:
            MisconfigurationException: At the first step.

        """
        changed = self._steering.rates.changed()
        is_first, self._is_first_step = self._is_first_step, False
        if changed is None:
            return
        cause = f"the learning rate was set to {changed:.3g} by other code, such as a warm-up in `optimizer_step`"
        if is_first:
            raise MisconfigurationException(
                f"`{type(self).__name__}` sets the learning rate, and {cause}. Leave one of the two out: the callback"
                " finds the first learning rate itself, and needs no warm-up."
            )
        self._recorder.warn_once(
            "other rate", f"at step {trainer.global_step} {cause}. It is set again here. This is said once."
        )

    def _release(self) -> None:
        """Drop what an interrupted step has left, the hook on its optimizer, and the copy of the training."""
        self._phase = Idle()
        self._steering.release()
        self._step_hook.release()

    def _propose(self, hessian: LossHessian, step: Step, update: Update | None, is_first: bool) -> Proposal:
        counter = partial(progress, step.trainer, type(self).__name__)
        optimizer = step.trainer.optimizers[0]
        given = Situation(
            hessian=hessian,
            optimizer=optimizer,
            update=update,
            is_first=is_first,
            progress=counter,
            own=hessian if self.config.data == "batch" else self.shared.on_batches(step, self.config),
            batches=step.own_batches,
            hessian_on=partial(self.shared.on_batches, step, self.config),
        )
        return self._rule.measure(given)

    def _result(self, step: Step, proposal: Proposal) -> LearningRateResult:
        return LearningRateResult(
            step=step.index,
            epoch=step.epoch,
            learning_rate=self._steering.lr(step.trainer),
            annealing=self._steering.annealing(step.trainer),
            restored=self._steering.safeguard.num_restored,
            **proposal.found,
        )

    def _after_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Keep the update for the next batch, right after the optimizer has taken its step."""
        if isinstance(self._phase, OnTrial):
            first, self._phase = self._phase, Idle()
            self._find_first_lr(trainer, first)
        elif self._rule.follows_updates:
            self._update.end(self._steering.rates.highest)

    def _find_first_lr(self, trainer: Trainer, first: OnTrial) -> None:
        """Take the first step back, find its learning rate, and take it again at this one."""
        rates, taken, lr = self._steering.rates, self._steering.rates.highest, first.own_lr
        displacement = first.observed.rewind()
        update = displacement / taken
        rates.set(first.own_lr)  # which stays if nothing is found: a step on trial may have been taken at 1
        try:
            with self._recorder.measurement(trainer) as record, failing_together(trainer):
                proposal = self._propose(first.hessian, first.step, Update(update, taken), is_first=True)
                if proposal.lr is not None:
                    self._steering.begin(proposal.lr)
                record.result = self._result(first.step, proposal)
                lr = record.result.learning_rate
        finally:
            # Even after an interrupt: the optimizer's momenta have taken part in this step already.
            first.observed.replay(displacement, lr / taken)
        rates.set(lr)
        if self._rule.follows_updates:
            self._update.take(update, lr, first.hessian.parameters)
        self._keep(trainer, record)
