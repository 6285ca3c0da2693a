"""The sharpness of the training loss, step by step."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.callbacks.results.probe import ProbeResult
from lyapunov_lightning.curvature.arguments import check_choice, check_int, check_positive
from lyapunov_lightning.curvature.diagnosis import Diagnosis, EdgeWatch, diagnose
from lyapunov_lightning.curvature.directions.critical import CriticalSharpness
from lyapunov_lightning.curvature.errors import MeasurementError, NonFiniteCurvatureError
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.curvature.solvers.lyapunov import H0_CONVENTION
from lyapunov_lightning.curvature.stability import Stability, is_known, learning_rate, stability_of
from lyapunov_lightning.curvature.tracking.exponents import ExponentTracker
from lyapunov_lightning.curvature.tracking.extremes import End, ExtremeTracker
from lyapunov_lightning.figures import sharpness_figure
from lyapunov_lightning.training.callback import CurvatureCallback, Figures, Stateful, non_default
from lyapunov_lightning.training.config import HessianConfig
from lyapunov_lightning.training.distributed import failing_together
from lyapunov_lightning.training.lightning_names import MisconfigurationException
from lyapunov_lightning.training.optimizers.own_gradient import OwnGradient
from lyapunov_lightning.training.optimizers.requirements import check_training_map
from lyapunov_lightning.training.reporting.losses import LossSeries
from lyapunov_lightning.training.reporting.progress import progress, watched
from lyapunov_lightning.training.reporting.recording import Charts, Record
from lyapunov_lightning.training.schedule import Schedule
from lyapunov_lightning.training.sharing import EigenRequest, Step

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from lyapunov_lightning.figures import Picture

Estimator = Literal["lanczos", "lyapunov", "power", "critical"]

_LOST = 2.0
"""Length of a step, in last places of the parameters, up to which its direction is rather that of their rounding."""


class CurvatureProbe(CurvatureCallback):
    """Logs the extreme eigenvalue of the training loss's Hessian while a module trains.

    The largest eigenvalue, the *sharpness*, decides on the stability of the training: gradient descent with learning
    rate η diverges along directions of curvature above 2/η, and networks tend to train right at
    that edge of stability. The probe measures it every few steps on the batch of the step, or on fixed data, at the
    parameters before the step, and changes nothing: the run is bit-identical to one without the probe.

    Four estimators:

    - ``"lanczos"`` (default): exact Hessian-vector products in a Krylov space that starts from the last probe's
      eigenvectors and a little noise; stops when the eigenvalue is known to `tol`. 4 to 10 products of about 2
      gradients each.
    - ``"lyapunov"``: one iteration a probe of the finite-size Lyapunov exponent, which follows a perturbation of the
      parameters from probe to probe. Costs one gradient where the step's own gradient can be used, else two. The
      largest end is Algorithm 1 of the paper; the smallest end follows the training map itself, with the learning rate
      and the momentum of the optimizer (SGD only).
    - ``"power"``: power iteration, the classical baseline.
    - ``"critical"``: the critical sharpness ``2/η_c`` along the step that the optimizer takes, with ``η_c`` the
      learning rate at which that step would bring the loss back to where it began. 5 to 10 evaluations of the loss and
      no derivative, so it works with every kernel and every optimizer. It is measured once the step is made, for the
      parameters before it. No eigenvalue: for gradient descent on a quadratic it is the curvature along the gradient,
      which comes near the largest one at the edge of stability, and does not show how that is on its way there.

    Logged:

    - ``curvature/lambda_max``, ``curvature/lambda_min``: the eigenvalues of the ends asked for, in the unit of the
      loss's second derivative.
    - ``curvature/stability_limit``: the eigenvalue at which the optimizer's present learning rate turns unstable. It is
      one on ``lambda_max`` for SGD, and for the Adams, RMSprop, Adagrad, parameter groups of different settings and an
      optimizer that maximizes one on ``curvature/preconditioned_lambda_max``, which is then measured as well; with
      ``"lyapunov"``, which cannot, both are left out.
    - ``curvature/stability_ratio``: the eigenvalue that counts for this optimizer over its limit. The edge of stability
      is 1, whatever the optimizer.
    - ``curvature/critical_sharpness`` (``"critical"`` only). Its limit is ``2/η``, its ratio ``η/η_c``: above 1 the
      step has raised the measured loss. It is left out where the loss does not rise however far the step is drawn out,
      where it rises from the very beginning, as with momentum it may, and where its fall is lost in rounding.
    - ``curvature/lyapunov_exponent`` and ``curvature/inverse_h0`` (``"lyapunov"`` only): the exponent of the map that
      was followed, and the paper's quasi-Newton learning rate, which is ``(e − 1)/λ_max`` once settled, not
      ``1/λ_max``. Beyond the edge of stability the sharpest direction is the one that grows under the training map; its
      eigenvalue is then logged as ``lambda_max``. A negative eigenvalue beyond about twice the largest one grows under
      gradient ascent, and is then logged as ``lambda_min``.

    and in the group ``curvature_details``, how good and how expensive that is:

    - ``value_error``: how far the eigenvalue is estimated to be from the true one: squared residual over the distance
      to the next eigenvalue seen. ``residual``: ``‖Hv − λv‖``; an eigenvalue of the Hessian lies within it. Both with
      ``_min`` for the smallest of both ends and with ``preconditioned_`` in front. ``converged`` is 1 where `tol` was
      met, and 0 where it was not or the measurement failed.
    - ``matvecs`` and ``seconds``: Hessian-vector products (differences of gradients) and wall-clock time spent; with
      ``"critical"`` also ``forward_passes``, evaluations of the loss on the measured data.
    - ``lr_times_lambda_max``: learning rate times ``lambda_max``; 2 is the edge of stability of plain SGD.
    - ``inverse_h0`` for the other estimators; ``lyapunov_exponent_sgd`` and ``paper_lambda_min``: exponent of the
      training map and smallest eigenvalue in the paper's convention.

    The figure ``curvature/at_a_glance`` has sharpness and stability limit, and the training loss below. It is drawn at
    the end of epochs with a new value, as far as that takes 2 % of the time, and at the end of the training or where it
    breaks off, for all loggers that take figures (TensorBoard, Weights & Biases, MLflow, Comet), else as a file beside
    the log. Two sentences, ``curvature/summary``, then say what was seen and whether the learning rate is to blame: on
    the console and in loggers that take texts. While the training goes on, there is one warning if the ratio stays
    above 1 for a while and the loss rises. `diagnosis` and ``plot`` give both at any time.

    The values are in ``trainer.callback_metrics`` too, so that EarlyStopping and ModelCheckpoint can monitor, say,
    ``curvature/lambda_max``, and as `ProbeResult` in ``probe.results``. A measurement that fails is warned of once and
    leaves the training alone.

    Args:
        every_n_steps: Probe at the first opportunity after every n optimizer steps. Without it and `schedule` the probe
            follows the trainer's ``log_every_n_steps``.
        estimator: How the eigenvalue is estimated, see above.
        end: Which end of the spectrum: ``"largest"``, ``"smallest"`` or ``"both"``; ``"critical"`` has none but the
            largest.
        tol: Relative accuracy of the eigenvalues, by their own estimate, and of the critical sharpness; of ``"power"``
            and ``"lyapunov"`` the relative residual.
        schedule: Any other schedule, such as ``Schedule(max_overhead=0.05)`` for about 5 % of the time.
        hessian: Which Hessian; by default that of the step's own batch.
        iterations: Iterations of ``"lyapunov"`` for each probe.
        delta_q: Length of the perturbation that ``"lyapunov"`` follows, in parameter space.
        prog_bar: Whether the progress bar shows the last stability ratio, as ``sharpness/limit``.
        log_prefix: Put in front of every tag, so that several probes live side by side.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: If the module or the strategy cannot be measured: manual optimization without a
            loss of its own, sharded parameters, nothing to train; with ``"critical"`` several optimizers or none.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lyapunov_lightning import CurvatureProbe
        >>> probe = CurvatureProbe(every_n_steps=50, end="both")
        >>> trainer = Trainer(callbacks=[probe], max_epochs=1, logger=False)

    Reference:
        "A chaos theory approach to understand neural network optimization", Algorithm 1, secs. 2 and 3, appendix B;
        the critical sharpness: "A scalable measure of loss landscape curvature for analyzing the training dynamics of
        LLMs" (2026).

    """

    group = "curvature"
    result_class = ProbeResult

    def __init__(
        self,
        every_n_steps: int | None = None,
        estimator: Estimator = "lanczos",
        end: End = "largest",
        tol: float = 2e-2,
        *,
        schedule: Schedule | None = None,
        hessian: HessianConfig = HessianConfig(),
        iterations: int = 1,
        delta_q: float = 5e-2,
        prog_bar: bool = False,
        log_prefix: str | None = None,
    ) -> None:
        arguments = non_default(CurvatureProbe.__init__, locals())
        check_choice("estimator", estimator, Estimator)
        check_choice("end", end, End)
        check_positive("tol", tol)
        check_int("iterations", iterations, least=1)
        if estimator == "critical" and end != "largest":
            raise ValueError(
                f"`end` should be 'largest' with `estimator='critical'`, which is one number along the optimizer's step"
                f" and no end of the spectrum, got {end!r}. Use `estimator='lanczos'`."
            )
        super().__init__(
            every_n_steps,
            schedule,
            hessian,
            log_prefix,
            data="batch",
            # For the other two no product is computed, so no graph is to be kept, and parameters in half precision,
            # which cannot be moved a little, are refused.
            method="finite_difference" if estimator in ("lyapunov", "critical") else None,
            request=EigenRequest(int(end != "smallest"), int(end != "largest"), tol, values_only=True)
            if estimator == "lanczos"
            else None,
            arguments=arguments,
        )
        seed = self.config.seed
        self._estimator = estimator
        self._end = end
        self._tol = tol
        self._power = ExtremeTracker("power", end, tol, seed)
        self._preconditioned = ExtremeTracker("power" if estimator == "power" else "lanczos", "largest", tol, seed)
        self._followed = ExponentTracker(end, iterations=iterations, delta_q=delta_q, seed=seed)
        self._own_gradient = OwnGradient()
        self._critical = CriticalSharpness(tol)
        self._waiting: tuple[LossHessian, Step] | None = None
        self._before: Tensor | None = None
        self._is_stepping = False
        self._seconds = 0.0
        self._hook: RemovableHandle | None = None
        self._prog_bar = prog_bar
        self._has_news = False
        self._losses = LossSeries()
        self._edge = EdgeWatch()

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(estimator=self._estimator, end=self._end, log_prefix=self._log_prefix)

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._release()
        self._losses.start(trainer)
        if self._estimator == "lyapunov" and self._end != "largest":
            check_training_map(type(self).__name__, trainer.optimizers)
        if self._estimator == "critical":
            self._watch(trainer)

    @override
    def charts(self) -> Charts:
        limits = ["curvature/lambda_max$", "curvature/preconditioned_lambda_max$", "curvature/stability_limit$"]
        if self._estimator == "critical":
            limits = ["curvature/critical_sharpness$", "curvature/stability_limit$"]
        return {"sharpness and stability limit": limits, "stability ratio": ["curvature/stability_ratio$"]}

    @override
    def figures(self) -> Figures:
        return {"at_a_glance": self._at_a_glance}

    def diagnosis(self) -> Diagnosis:
        """What the run tells of its learning rate so far, by the rules of `lyapunov_lightning.curvature.diagnosis`.

        With ``"critical"`` it says nothing of the room for a larger one, which takes an eigenvalue.

        Example::

            >>> from lyapunov_lightning import CurvatureProbe
            >>> CurvatureProbe().diagnosis().kind  # nothing was measured yet
            'unknown'

        """
        results: list[ProbeResult] = self.results
        found = diagnose(
            [result.step for result in results],
            [result.stability_ratio for result in results],
            self._losses.series,
            converged=[result.converged for result in results],
            learning_rate=results[-1].learning_rate if results else None,
        )
        return _of_critical_sharpness(found) if self._estimator == "critical" else found

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
    def conclude(self, trainer: Any) -> None:
        self._losses.collect_own()  # of a run that breaks off: the other ranks may not be there any more
        super().conclude(trainer)
        if self._has_news:
            self._has_news = False
            self._recorder.tell(trainer, "summary", self._summary)

    @override
    def measure(self, hessian: LossHessian, step: Step) -> ProbeResult | None:
        if self._estimator == "critical":
            # For the step that the optimizer is about to make, be it some batches later.
            self._waiting, self._before = (hessian, step), hessian.layout.flatten(hessian.parameters)
            return None
        if self._estimator != "lyapunov":
            return self._eigenvalues(hessian, step)
        if self.config.data == "batch" and self._own_gradient.may_fit(step.trainer):
            self._waiting = (hessian, step)  # the step is about to compute this gradient itself
            return None
        return self._exponents(hessian, step, hessian.gradient())

    @override
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self._waiting is not None and self._estimator == "lyapunov":
            (hessian, step), self._waiting = self._waiting, None
            with self._recorder.measurement(trainer) as record, failing_together(trainer):
                record.result = self._exponents(hessian, step, self._own_gradient.take(trainer, hessian))
            self._keep(trainer, record)

    @override
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self._is_stepping = True

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._losses.see(trainer, outputs)
        is_stepping, self._is_stepping = self._is_stepping, False
        if self._waiting is None:
            return
        if self._estimator == "critical" and not is_stepping:
            return  # the batch was one of several of a step
        self._waiting, self._before = None, None
        with self._recorder.measurement(trainer) as record:
            record.result = self._without_step()
        self._keep(trainer, record)

    @override
    def _stateful(self) -> dict[str, Stateful]:
        parts = {**super()._stateful(), "losses": self._losses, "edge": self._edge}
        if self._estimator == "lyapunov":
            return {**parts, "followed": self._followed, "own_gradient": self._own_gradient}
        if self._estimator == "critical":
            return {**parts, "critical": self._critical}
        return {
            **parts,
            "power": self._power,
            "preconditioned": self._preconditioned,
            "start": self._start,
        }

    @override
    def _keep(self, trainer: Any, record: Record) -> None:
        super()._keep(trainer, record)
        self._losses.collect(trainer)
        result = record.result
        if not isinstance(result, ProbeResult):
            return
        self._has_news = True
        ratio = result.stability_ratio
        if self._prog_bar and ratio is not None:
            self._recorder.show_in_progress_bar(trainer, "sharpness/limit", ratio)
        warning = self._edge.see(
            result.step,
            ratio if result.converged else None,
            self._losses.series,
            learning_rate=result.learning_rate,
        )
        if warning is not None:
            self._recorder.warn_once("too fast", warning)

    @override
    def _spend(self, seconds: float) -> None:
        self._seconds += seconds
        if self._waiting is None:  # else a part of the measurement is still to come
            seconds, self._seconds = self._seconds, 0.0
            super()._spend(seconds)

    def _summary(self) -> str | None:
        """What is said at the end of a run."""
        diagnosis = self.diagnosis()
        return None if diagnosis.kind == "unknown" else str(diagnosis)

    def _at_a_glance(self) -> "Picture":
        """Sharpness and stability limit, and the loss below."""
        results: list[ProbeResult] = self.results
        diagnosis = self.diagnosis()
        kind = "sharpness"
        shown = [result.lambda_max for result in results]
        if self._estimator == "critical":
            kind, shown = "critical sharpness", [result.critical_sharpness for result in results]
        elif any(result.preconditioned_lambda_max is not None for result in results):  # there is none before step 1
            kind, shown = "preconditioned sharpness", [result.preconditioned_lambda_max for result in results]
        elif all(value is None for value in shown):
            kind, shown = "smallest eigenvalue", [result.lambda_min for result in results]
        return sharpness_figure(
            [result.step for result in results],
            shown,
            [result.stability_limit for result in results],
            losses=self._losses.series,
            met_at=diagnosis.met_at,
            crossings=diagnosis.crossings[1:],
            label=kind,
            title="" if diagnosis.kind == "unknown" else diagnosis.title,
        )

    def _eigenvalues(self, hessian: LossHessian, step: Step) -> ProbeResult:
        """The ends of the spectrum from eigenpairs."""
        stability = self._stability(step, hessian)
        if self.request is not None:
            pairs = self.shared.eigenpairs(step, self)
            self._start.vector = pairs.start
        else:
            with watched(hessian, step.trainer, type(self).__name__) as operator:
                pairs = self._power.measure(operator)
        top = None
        if pairs.num_largest and stability is not None and not stability.is_on_hessian:
            with watched(hessian, step.trainer, type(self).__name__) as operator:
                top = self._preconditioned.measure(stability.matrix(operator))
        lambda_max = float(pairs.largest) if pairs.num_largest else None
        residuals, errors = pairs.residuals.tolist(), pairs.value_errors.tolist()
        return ProbeResult(
            step=step.index,
            epoch=step.epoch,
            lambda_max=lambda_max,
            lambda_min=float(pairs.smallest) if len(pairs.smallest) else None,
            residual=residuals[0],
            residual_min=residuals[1] if self._end == "both" else None,
            value_error=errors[0],
            value_error_min=errors[1] if self._end == "both" else None,
            converged=bool(pairs.converged.all()) and (top is None or bool(top.converged)),
            matvecs=pairs.num_matvecs + (0 if top is None else top.num_matvecs),
            inverse_h0=H0_CONVENTION / lambda_max if lambda_max is not None and lambda_max > 0 else None,
            preconditioned_lambda_max=None if top is None else float(top.largest),
            preconditioned_residual=None if top is None else float(top.residuals[0]),
            preconditioned_value_error=None if top is None else float(top.value_errors[0]),
            **_limits(step, stability),
        )

    def _exponents(self, hessian: LossHessian, step: Step, here: Tensor) -> ProbeResult | None:
        """The ends of the spectrum from Lyapunov exponents.

        Args:
            hessian: The Hessian.
            step: The present step.
            here: The gradient at the present parameters.

        """
        with progress(step.trainer, type(self).__name__) as report:

            def gradient(displacement: Tensor) -> Tensor:
                there = hessian.gradient(displacement)
                report()
                return there

            group = step.trainer.optimizers[0].param_groups[0] if self._end != "largest" else {"lr": 0.0}
            found = self._followed.measure(
                gradient,
                here,
                lr=float(group["lr"]),
                momentum=float(group.get("momentum", 0.0)),
                space=hessian.space,
            )
        if found is None:
            return None
        stability = self._stability(step, hessian)
        if stability is not None and not stability.is_on_hessian:
            stability = None  # the eigenvalue that it is a limit on is not measured
        return ProbeResult(
            step=step.index,
            epoch=step.epoch,
            lambda_max=found.lambda_max,
            lambda_min=found.lambda_min,
            residual=found.estimates[0].residual,
            residual_min=found.estimates[1].residual if len(found.estimates) > 1 else None,
            converged=found.is_within(self._tol),
            matvecs=found.num_gradients,
            inverse_h0=found.inverse_h0,
            exponent=found.exponent,
            exponent_sgd=found.exponent_sgd,
            paper_lambda_min=found.paper_lambda_min,
            **_limits(step, stability),
        )

    def _watch(self, trainer: Any) -> None:
        """Let the optimizer tell of its steps, to see them before anything else moves parameters or learning rate.

        Raises:
            MisconfigurationException: If there is not one optimizer.

        """
        optimizers = [optimizer for optimizer in trainer.optimizers if optimizer.param_groups]
        if len(optimizers) != 1:
            raise MisconfigurationException(
                f"`CurvatureProbe(estimator='critical')` measures along the update of the one optimizer, and here are"
                f" {len(optimizers)}. Use `estimator='lanczos'`, which does not depend on the optimizer."
            )
        self._hook = optimizers[0].register_step_post_hook(lambda optimizer, *_: self._after_step(trainer, optimizer))

    def _release(self) -> None:
        """Drop what an interrupted step has left, and the hook on its optimizer."""
        self._waiting, self._before, self._is_stepping, self._seconds = None, None, False, 0.0
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _after_step(self, trainer: Any, optimizer: torch.optim.Optimizer) -> None:
        """Measure along the step that the optimizer has just taken."""
        if self._waiting is None:
            return
        (hessian, step), self._waiting = self._waiting, None
        with self._recorder.measurement(trainer) as record, failing_together(trainer):
            record.result = self._along_step(hessian, step, learning_rate(optimizer))
        self._before = None
        self._keep(trainer, record)

    def _along_step(self, hessian: LossHessian, step: Step, lr: float) -> ProbeResult:
        """The critical sharpness along the step that ended at the present parameters.

        Args:
            hessian: The operator whose random numbers are those of before the step.
            step: The step.
            lr: The highest learning rate with which it was made.

        Raises:
            MeasurementError: If there was no step.

        """
        before, self._before = self._before, None
        assert before is not None  # with what waits
        if not 0 < lr < math.inf:
            raise MeasurementError(f"The step was made with a learning rate of {lr}: its update at 1 is not known.")
        size = float(hessian.space.norm(before))
        displacement = hessian.layout.flatten(hessian.parameters).sub_(before)
        del before
        length = float(hessian.space.norm(displacement))
        if not math.isfinite(length):
            raise NonFiniteCurvatureError("The parameters are not finite after the step.")
        if not length:
            return self._without_step()
        precision = torch.finfo(hessian.dtype).eps
        if length <= _LOST * precision * size:
            raise MeasurementError(
                f"The step, of length {length:.1e}, is lost in the rounding of the parameters, of norm {size:.1e}."
            )
        with progress(step.trainer, type(self).__name__) as report:

            def losses_along(learning_rates: Sequence[float]) -> Tensor:
                """Relative to the parameters as they are, at the end of the step."""
                losses = hessian.values_along(displacement, [rate / lr - 1 for rate in learning_rates])
                report()
                return losses

            found = self._critical.measure(losses_along, lr, precision=precision)
        return ProbeResult(
            step=step.index,
            epoch=step.epoch,
            critical_sharpness=found.sharpness,
            value_error=None if found.sharpness is None else found.sharpness * found.error,
            converged=found.converged,
            forward_passes=found.num_evaluations,
            learning_rate=lr,
            stability_limit=2 / lr,
        )

    def _without_step(self) -> ProbeResult:
        """What is found where the step was not made that the measurement has waited for.

        Raises:
            MeasurementError: Always, with the reason.

        """
        if self._estimator == "critical":
            raise MeasurementError(
                "The optimizer did not move the parameters, as where a loss scaler skips a step or the training step"
                " returned None, so there is no update to measure along."
            )
        raise MeasurementError("The step returned None for the probed batch, so there was no backward pass.")

    def _stability(self, step: Step, hessian: LossHessian) -> Stability | None:
        if not step.trainer.optimizers:
            return None
        optimizer = step.trainer.optimizers[0]
        if not is_known(optimizer):
            self._recorder.warn_once(
                "unknown optimizer",
                f"the stability limit of {type(optimizer).__name__} is not known, so `curvature/stability_limit` and"
                " `curvature/stability_ratio` are left out.",
            )
        return stability_of(optimizer, hessian.parameters, hessian.layout)


def _of_critical_sharpness(found: Diagnosis) -> Diagnosis:
    """A diagnosis in other words: a critical sharpness below its limit clears the steps that were measured, no more."""
    is_blamed = found.kind == "left" and 2 * found.num_near >= len(found.spikes) > 0
    clears = found.kind in ("below", "left", "diverged_below") and not is_blamed
    return replace(
        found,
        sharpness=found.sharpness.replace("he sharpness", "he critical sharpness"),
        consequence="That clears the steps that were measured and no others: the critical sharpness rises once a step"
        " is about to raise the loss, and the largest eigenvalue long before. Use `estimator='lanczos'` to see how much"
        " room there is."
        if clears
        else found.consequence,
    )


class _Limits(TypedDict):
    learning_rate: float | None
    stability_limit: float | None


def _limits(step: Step, stability: Stability | None) -> _Limits:
    """Learning rate and stability limit of the optimizer, as far as they are known."""
    lr = learning_rate(step.trainer.optimizers[0]) if step.trainer.optimizers else math.nan
    return {
        "learning_rate": None if math.isnan(lr) else lr,
        "stability_limit": None if stability is None or stability.limit == math.inf else stability.limit,
    }
