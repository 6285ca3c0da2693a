"""The sharpness of the training loss, step by step."""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.callbacks.cadence import EIGENVALUE_SHARE, Cadence
from lyapunov_lightning.callbacks.estimators import ESTIMATORS, EstimatorName, EstimatorSettings, MeasuredStep, Moment
from lyapunov_lightning.callbacks.estimators.base import missed
from lyapunov_lightning.callbacks.pending import PendingResult
from lyapunov_lightning.callbacks.results.probe import ProbeResult
from lyapunov_lightning.callbacks.step_gauge import StepGauge
from lyapunov_lightning.curvature.arguments import check_choice, check_int, check_positive, made_of
from lyapunov_lightning.curvature.diagnosis import Diagnosis, EdgeWatch, Reading, diagnose
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.curvature.stability import is_known
from lyapunov_lightning.curvature.tracking.extremes import End
from lyapunov_lightning.figures import sharpness_figure
from lyapunov_lightning.training.callback import CurvatureCallback, Figures, Stateful, non_default
from lyapunov_lightning.training.config import HessianConfig, HessianLike, ScheduleLike
from lyapunov_lightning.training.distributed import failing_together
from lyapunov_lightning.training.lightning_names import LightningModule, Trainer, log_interval, may_clip
from lyapunov_lightning.training.optimizers.step_hook import StepHook
from lyapunov_lightning.training.reporting.losses import LossSeries
from lyapunov_lightning.training.reporting.recording import Charts, Record
from lyapunov_lightning.training.schedule import Schedule
from lyapunov_lightning.training.sharing import Step

if TYPE_CHECKING:
    from lyapunov_lightning.figures import Picture


_READINGS_PER_LOG, _RAREST_PER_LOG = 0.4, 2.0
"""Steps from one measurement to the next in those between which the trainer logs, by default: 20 of its 50, and rarer
as the run goes on, up to 100."""

_EARLY_STEP = 5
"""A step that is measured besides, by default: how far a rate may go is decided early, where the sharpness has not met
the limit yet, and before the second measurement there is nothing to compare batches with."""


class CurvatureProbe(CurvatureCallback):
    """Logs how far the learning rate is from where the training turns unstable, and the curvature that decides on it.

    Gradient descent with learning rate η diverges along directions of curvature above 2/η, and networks tend to train
    right at that *edge of stability*. On all of the data it is the largest eigenvalue of the Hessian, the *sharpness*,
    that meets the edge. Under mini-batches it is the *batch sharpness*, the curvature of a batch along the step that
    its own gradient asks for, and with momentum the limit falls with how little the batches agree. The probe measures
    all three at the parameters before the step and changes nothing: the run is bit-identical to one without it.

    The batch sharpness takes two evaluations of the loss along the gradient that the step has computed, three where the
    step's loss is not that of its replay, or the gradient and one Hessian-vector product: where the eigenvalue is
    measured before the step too, where the losses do not tell
    (`lyapunov_lightning.curvature.directions.second_difference`), and at the first measurements and every eighth, which
    take as much again to compare with another batch. All batches that the step accumulates count. The eigenvalue is
    measured on the same data, or on fixed data, by one of four estimators (`lyapunov_lightning.callbacks.estimators`
    says more of each):

    - ``"lanczos"`` (default): exact Hessian-vector products in a Krylov space that starts from the last probe's
      eigenvectors; stops when the eigenvalue is known to `tol`. 4 to 10 products of about 2 gradients each.
    - ``"lyapunov"``: follows a perturbation of the parameters from probe to probe, by the finite-size Lyapunov exponent
      of gradient ascent (largest end) or of SGD's own map (smallest end). 1 or 2 gradients.
    - ``"power"``: power iteration, the classical baseline. Tens of products.
    - ``"critical"``: the critical sharpness ``2/η_c`` along the step that the optimizer takes, with ``η_c`` the
      learning rate at which that step would bring the loss back to where it began. 5 to 10 evaluations of the loss and
      no derivative, so it works with every kernel and every optimizer. No eigenvalue, and no batch sharpness.

    Logged:

    - ``curvature/lambda_max``, ``curvature/lambda_min``: the eigenvalues of the ends asked for, in the unit of the
      loss's second derivative.
    - ``curvature/preconditioned_lambda_max``: the largest eigenvalue of the Hessian as the optimizer sees it, where the
      limit is one on it: with the Adams, RMSprop, Adagrad, parameter groups of different settings and an optimizer that
      maximizes. ``lambda_max`` then comes with every fifth of them, unless `eigenvalue_every` or the lower end is
      asked for. With ``"lyapunov"``, which cannot, it is left out.
    - ``curvature/batch_sharpness``: the mean over the last eight measurements, in the metric of the optimizer.
    - ``curvature/stability_ratio``: what binds, over its limit: under mini-batches the batch sharpness, and where the
      batches agree wholly, as on all of the data, the eigenvalue that counts for this optimizer. The edge of stability
      is 1, whatever optimizer and batch. For an optimizer whose limit is not known it is the share of a step's promised
      decrease that the curvature along it eats.
    - ``curvature/learning_rate`` and ``curvature/learning_rate_limit``: the rate of the step, and the one at which the
      ratio would be 1.
    - ``curvature/critical_sharpness`` (``"critical"`` only). Its limit is ``2/η``, its ratio ``η/η_c``: above 1 the
      step has raised the measured loss. It is left out where no ``η_c`` is found.
    - ``curvature/lyapunov_exponent`` and ``curvature/inverse_h0`` (``"lyapunov"`` only): the exponent of the map that
      was followed, and the paper's quasi-Newton learning rate, which is ``(e − 1)/λ_max`` once settled, not
      ``1/λ_max``.

    and in the group ``curvature_details``, how good and how expensive that is:

    - ``stability_limit``: the curvature at which the learning rate of the step turns unstable, at the measured
      ``batch_agreement``, which is 1 where all batches see the same curvature. ``batch_sharpness_error``: a standard
      error. ``eigenvalue_ratio``: the last eigenvalue that counts over the limit.
    - ``noise_ratio``: how much of the expected decrease of fresh data the second order of the steps takes away: a step
      gains most at 0.5, nothing at 1. ``clipping``: what clipping left of the gradient's length, which the ratios
      count.
    - ``value_error``: how far the eigenvalue is estimated to be from the true one: squared residual over the distance
      to the next eigenvalue seen, or how much further out one may lie that the search cannot have seen.
      ``residual``: ``‖Hv − λv‖``; an eigenvalue of the Hessian lies within it. Both with ``_min`` for the smallest of
      both ends and with ``preconditioned_`` in front. ``converged`` is 1 where `tol` was met, and 0 where it was not or
      the measurement failed.
    - ``matvecs`` and ``seconds``: Hessian-vector products (differences of gradients) and wall-clock time spent; with
      ``"critical"`` also ``forward_passes``, evaluations of the loss on the measured data.
    - ``lr_times_lambda_max``: learning rate times ``lambda_max``; 2 is the edge of stability of plain SGD.
    - ``inverse_h0`` for the other estimators; ``lyapunov_exponent_sgd`` and ``paper_lambda_min``: exponent of the
      training map and smallest eigenvalue in the paper's convention.

    The figure ``curvature/at_a_glance`` has sharpness and stability limit, the learning rate and its limit, and the
    training loss. It is drawn at the end of epochs with a new value, as far as that takes 2 % of the time, and at the
    end of the training or where it breaks off, for all loggers that take figures (TensorBoard, Weights & Biases,
    MLflow, Comet), else as a file in the log folder. Two sentences, ``curvature/summary``, then say what was seen and
    whether the learning rate is to blame: on the console and in loggers that take texts. While the training goes on,
    there is one warning if the ratio stays above 1 for a while and the loss rises. `diagnosis` and ``plot`` give both
    at any time.

    The values are in ``trainer.callback_metrics`` too, so that EarlyStopping and ModelCheckpoint can monitor, say,
    ``curvature/lambda_max``, and as `ProbeResult` in ``probe.results``. A measurement that fails is warned of once and
    leaves the training alone.

    Args:
        every_n_steps: Probe at the first opportunity after every n optimizer steps. Without it and `schedule` the probe
            measures at step 5 and at 0.4 times the interval at which the trainer logs, which is every 20 steps, and
            from step 800 on more rarely, down to every 100.
        estimator: How the eigenvalue is estimated, see above.
        end: Which end of the spectrum: ``"largest"``, ``"smallest"`` or ``"both"``; ``"critical"`` has none but the
            largest.
        tol: Relative accuracy of the eigenvalues, by their own estimate, and of the critical sharpness; of ``"power"``
            and ``"lyapunov"`` the relative residual.
        eigenvalue_every: At which of these measurements the eigenvalue is measured too: at the first two, and at every
            so many; the batch sharpness is then measured at all. By default the eigenvalue is, and the batch sharpness
            at every tenth step at most; where the probe follows the trainer's logging it is the other way round, and
            the eigenvalue is measured at the third one, and again whenever 3 % of the steps since are worth one.
        schedule: Any other schedule, such as ``Schedule(max_overhead=0.05)`` for about 5 % of the time.
        hessian: Which Hessian; by default that of the step's own batch. ``HessianConfig(data=other)`` with a DataLoader
            of other data makes the critical sharpness the *relative* one: how far the training's step could go on them.
        iterations: Iterations of ``"lyapunov"`` for each probe.
        delta_q: Length of the perturbation that ``"lyapunov"`` follows, in parameter space.
        prog_bar: Whether the progress bar shows the last stability ratio, as ``sharpness/limit``.
        log_prefix: Put in front of every tag, so that several probes live side by side.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: If the module or the strategy cannot be measured, such as manual optimization without
            a loss of its own, tensor parallelism, or nothing to train; with ``"critical"`` several optimizers or none;
            with ``"lyapunov"`` and the lower end any optimizer but SGD.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lyapunov_lightning import CurvatureProbe
        >>> probe = CurvatureProbe(every_n_steps=50, end="both")
        >>> trainer = Trainer(callbacks=[probe], max_epochs=1, logger=False)

    Reference:
        "A chaos theory approach to understand neural network optimization", Algorithm 1, secs. 2 and 3, appendix B;
        the batch sharpness: A. Andreyev, P. Beneventano, "Edge of stochastic stability" (2024, with momentum 2026);
        the critical sharpness: "A scalable measure of loss landscape curvature for analyzing the training dynamics of
        LLMs" (2026).

    """

    group = "curvature"
    result_class = ProbeResult
    measures_whole_step = True

    def __init__(
        self,
        every_n_steps: int | None = None,
        estimator: EstimatorName = "lanczos",
        end: End = "largest",
        tol: float = 2e-2,
        *,
        eigenvalue_every: int | None = None,
        schedule: ScheduleLike | None = None,
        hessian: HessianLike = HessianConfig(),
        iterations: int = 1,
        delta_q: float = 5e-2,
        prog_bar: bool = False,
        log_prefix: str | None = None,
    ) -> None:
        arguments = non_default(CurvatureProbe.__init__, locals())
        check_choice("estimator", estimator, EstimatorName)
        check_choice("end", end, End)
        check_positive("tol", tol)
        check_int("iterations", iterations, least=1)
        if eigenvalue_every is not None:
            check_int("eigenvalue_every", eigenvalue_every, least=1)
        check_positive("delta_q", delta_q)
        kind = ESTIMATORS[estimator]
        if eigenvalue_every is not None and not kind.is_gauged:
            raise ValueError(
                f"`eigenvalue_every` should be None with `estimator={estimator!r}`, which measures nothing beside,"
                f" got {eigenvalue_every!r}."
            )
        super().__init__(
            every_n_steps, schedule, hessian, log_prefix, data="batch", method=kind.method, arguments=arguments
        )
        self._estimator_name, self._end = estimator, end
        self._estimator = kind(
            EstimatorSettings(
                end=end,
                tol=tol,
                iterations=iterations,
                delta_q=delta_q,
                own_batch=self.config.data == "batch",
                seed=self.config.seed,
            )
        )
        self.request = self._estimator.request
        self._cadence = Cadence(eigenvalue_every)
        self._gauge = StepGauge(self.config, made_of(HessianConfig, "hessian", hessian).method, self._cadence)
        self._step_hook = StepHook()
        self._pending: PendingResult | None = None
        self._is_stepping = False
        self._seconds = 0.0
        self._prog_bar = prog_bar
        self._has_news = False
        self._is_rarity_told = False
        self._losses = LossSeries()
        self._edge = EdgeWatch()

    @property
    @override
    def identity(self) -> dict[str, Any]:
        return {"estimator": self._estimator_name, "end": self._end}

    @property
    @override
    def search_start(self) -> Tensor | None:
        return self._estimator.search_start

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_restored:  # a probe may serve one run after another, of other parameters
            self._cadence.start()
            self._gauge.forget_all()
        self._is_rarity_told = False
        self.request = self._estimator.request
        super().on_train_start(trainer, pl_module)
        self._release()
        self._losses.start(trainer)
        optimizer = self._estimator.start(trainer, type(self).__name__)
        # Where there are several, which of them takes the step that is clipped nobody knows.
        is_one = len(trainer.optimizers) == 1
        is_clipped = self._gauge.awaits_clipping = self._estimator.is_gauged and is_one and may_clip(trainer, pl_module)
        if optimizer is None and is_one:
            [only] = trainer.optimizers
            optimizer = only if only.param_groups and (is_clipped or not is_known(only)) else None
        if optimizer is not None:
            # Not by `on_train_batch_end`: there a scheduler has already set the next learning rate, and another
            # callback may have moved the parameters, so that neither the update nor its rate could be seen.
            self._step_hook.attach(optimizer, partial(self._reach, trainer, "update"))
        self._gauge.sees_updates = optimizer is not None

    @override
    def charts(self) -> Charts:
        rates = ["curvature/learning_rate$", "curvature/learning_rate_limit$"]
        limits = [*self._estimator.tags, "curvature/batch_sharpness$", "curvature_details/stability_limit$"]
        ratio = ["curvature/stability_ratio$"]
        return {"learning rate and its limit": rates, "stability ratio": ratio, "sharpness and stability limit": limits}

    @override
    def figures(self) -> Figures:
        return {"at_a_glance": self._at_a_glance}

    def diagnosis(self) -> Diagnosis:
        """What the run says about its learning rate so far, by the rules of `lyapunov_lightning.curvature.diagnosis`.

        With ``"critical"`` it does not say whether a larger one would be stable, which takes an eigenvalue.

        Example::

            >>> from lyapunov_lightning import CurvatureProbe
            >>> CurvatureProbe().diagnosis().kind  # nothing was measured yet
            'unknown'

        """
        readings = [_reading(result) for result in self.results if result.is_fresh]
        return self._estimator.reworded(diagnose(readings, self._losses.series, self._losses.learning_rates))

    def suggestion(self) -> float | None:
        """The learning rate at the stability limit, as far as it is known: `Diagnosis.learning_rate_limit`."""
        return self.diagnosis().learning_rate_limit

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
    def conclude(self, trainer: Trainer) -> None:
        self._losses.collect_own()  # of a run that breaks off: the other ranks may not be there any more
        super().conclude(trainer)
        if self._has_news:
            self._has_news = False
            self._recorder.tell(trainer, "summary", self._summary)

    @override
    def advance(self, trainer: Trainer, batch_idx: int) -> bool:
        is_due = super().advance(trainer, batch_idx)
        if is_due:
            # Here, before any callback asks for its operator: the search that all share is for what all of them want.
            self._cadence.begin(trainer.global_step, self._gauge.awaits_another)
            self.request = self._estimator.request if self._cadence.is_full else None
        return is_due

    @override
    def measure(self, hessian: LossHessian, step: Step) -> ProbeResult | None:
        at = MeasuredStep(
            hessian=hessian,
            step=step,
            eigenpairs=partial(self.shared.eigenpairs, step, self),
            hessian_on=partial(self.shared.on_batches, step),
            warn_once=self._recorder.warn_once,
            owner=type(self).__name__,
            is_plain=self._cadence.is_plain,
        )
        pending = PendingResult(at)
        if self._cadence.is_full:
            self._begin_eigenvalue(at, pending)
        if self._estimator.is_gauged:
            measure = self._gauge.begin if self._cadence.is_gauged else self._gauge.hold
            measure(at, pending)
        if pending.awaited:
            self._pending = pending
            return None
        return pending.complete(self.results, self._cadence.held)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._pending is not None and self._pending.glanced is not None and pl_module.automatic_optimization:
            self._gauge.see_loss(loss)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The first backward pass after `measure` is that of the step's last batch.
        self._reach(trainer, "gradient")

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._is_stepping = True
        self._losses.stepping(trainer.optimizers[0])
        pending = self._pending
        if pending is not None and self._gauge.awaits_clipping:
            with self._recorder.measurement(trainer, pending.step) as record, failing_together(trainer):
                pending.gradient_norm = pending.norm_of_gradient()
            self._keep(trainer, record)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Before anything can return from here: every rank has to see every batch, or they would collect at different
        # times.
        self._losses.see(trainer, outputs)
        is_stepping, self._is_stepping = self._is_stepping, False
        pending = self._pending
        if pending is None:
            return
        # Under manual optimization the optimizer may step in a later batch. A step that a loss scaler skips does come
        # by ``on_before_optimizer_step``, and leaves the measurement waiting here.
        if "update" in pending.awaited and not is_stepping:
            return
        self._forget()
        with self._recorder.measurement(trainer, pending.step) as record:
            waiting = pending.glanced if pending.later is None else pending.later
            if pending.result is None and waiting is not None:
                missed(waiting.moment)
            # What was measured before the step stands, though the step was not made.
            record.result = pending.complete(self.results, self._cadence.held)
        self._keep(trainer, record)

    @override
    def _stateful(self) -> dict[str, Stateful]:
        own: dict[str, Stateful] = {"losses": self._losses, "edge": self._edge, "cadence": self._cadence}
        return {**super()._stateful(), **own, **self._gauge.parts(), **self._estimator.parts()}

    @override
    def _follow_the_logging(self, trainer: Trainer) -> None:
        super()._follow_the_logging(trainer)
        every = log_interval(trainer)
        if every and self._estimator.is_gauged:
            # More often than Lightning logs, and the eigenvalue less often: the ratio comes from what is cheap.
            interval = max(1, round(_READINGS_PER_LOG * every))
            rarest = max(interval, round(_RAREST_PER_LOG * every))
            self.schedule_state.follow(Schedule(every_n_steps=interval, thin_to=rarest, at_steps=(_EARLY_STEP,)))
            self._cadence.follow_the_cost()

    @override
    def _keep(self, trainer: Trainer, record: Record) -> None:
        if record.has_failed:  # on all ranks, so that none of them waits for what others do not
            self._forget()
        super()._keep(trainer, record)
        self._losses.collect(trainer)
        result = record.result
        if not isinstance(result, ProbeResult):
            return
        self._has_news = True
        ratio = result.stability_ratio
        with self._recorder.guarded("verdict", "the measurement could not be judged, and training goes on."):
            if self._prog_bar and ratio is not None:
                self._recorder.show_in_progress_bar(trainer, "sharpness/limit", ratio)
            warning = self._edge.see(_reading(result), self._losses.series) if result.is_fresh else None
            if warning is not None:
                self._recorder.warn_once("too fast", warning)

    def _spend_steps(self, trainer: Trainer, found: ProbeResult | None) -> None:
        """Count what an eigenvalue has cost, and say where there will be no other one for that."""
        if found is None:
            return
        self._cadence.spend(found)
        # Infinite or -1 where nobody knows the end.
        if not self._is_rarity_told and self._cadence.is_over(trainer.estimated_stepping_batches):
            self._is_rarity_told = True
            self._recorder.say(
                f"an eigenvalue takes {found.matvecs} products, which is more than {100 * EIGENVALUE_SHARE:.0f} % of"
                " the rest of this training, so it is measured this once, and the batch sharpness at all measurements."
                " `eigenvalue_every=1` asks for both each time."
            )

    @override
    def _spend(self, seconds: float) -> None:
        self._seconds += seconds
        if self._pending is None:  # else a part of the measurement is still to come
            seconds, self._seconds = self._seconds, 0.0
            super()._spend(seconds)

    def _summary(self) -> str | None:
        """What is said at the end of a run."""
        diagnosis = self.diagnosis()
        return None if diagnosis.kind == "unknown" else str(diagnosis)

    def _at_a_glance(self) -> "Picture":
        """Sharpness and stability limit, the learning rate and its limit, and the loss below."""
        results: list[ProbeResult] = self.results
        diagnosis = self.diagnosis()
        label, values = self._estimator.plotted(results)
        return sharpness_figure(
            [result.step for result in results],
            values,
            [result.stability_limit for result in results],
            batch_sharpness=[result.batch_sharpness for result in results],
            learning_rate=[result.learning_rate for result in results],
            learning_rate_limit=[result.learning_rate_limit for result in results],
            stability_ratio=[result.stability_ratio for result in results],
            losses=self._losses.series,
            met_at=diagnosis.met_at,
            crossings=diagnosis.crossings[1:],
            label=label,
            title="" if diagnosis.kind == "unknown" else diagnosis.title,
        )

    def _begin_eigenvalue(self, at: MeasuredStep, pending: PendingResult) -> None:
        """Let the estimator measure, or note what it measures at."""
        moment: Moment = self._estimator.begin(at)
        if moment == "start":
            pending.result = self._estimator.measure(at)
            self._spend_steps(at.step.trainer, pending.result)
        else:
            pending.later = replace(at, moment=moment)
            pending.await_moment(moment)

    def _reach(self, trainer: Trainer, moment: Moment) -> None:
        """Go on with the measurement that waits for a moment of the step."""
        pending = self._pending
        if pending is None or moment not in pending.awaited:
            return
        pending.awaited.remove(moment)
        if not pending.awaited:
            self._pending = None  # before `_keep`, which counts the time once nothing is to come
        with self._recorder.measurement(trainer, pending.step) as record, failing_together(trainer):
            if pending.later is not None and pending.later.moment == moment:
                later, pending.later = pending.later, None
                pending.result = self._estimator.measure(later)
                self._spend_steps(trainer, pending.result)
            if moment == "gradient":
                self._gauge.after_backward(pending)
            if moment == "update":
                self._gauge.after_update(pending)
            if not pending.awaited:
                record.result = pending.complete(self.results, self._cadence.held)
        self._keep(trainer, record)

    def _forget(self) -> None:
        """Wait for no later moment of the step."""
        self._pending = None
        self._estimator.forget()
        self._gauge.forget()

    def _release(self) -> None:
        """Drop what an interrupted step has left, and the hook on its optimizer."""
        self._forget()
        self._is_stepping, self._seconds = False, 0.0
        self._gauge.release()
        self._step_hook.release()


def _reading(result: ProbeResult) -> Reading:
    """A measurement as the diagnosis sees it."""
    return Reading(
        result.step,
        result.stability_ratio,
        learning_rate=result.learning_rate,
        converged=result.converged,
        step_ratio=result.step_ratio,
        eigenvalue_ratio=result.eigenvalue_ratio,
        noise_ratio=result.noise_ratio,
        clipping=result.clipping,
        judged=result.is_settled,
    )
