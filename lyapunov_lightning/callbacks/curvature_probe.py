"""The sharpness of the training loss, step by step."""

import math
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.callbacks.results import ProbeResult
from lyapunov_lightning.curvature.arguments import check_choice, check_int, check_positive
from lyapunov_lightning.curvature.diagnosis import Diagnosis, EdgeWatch, diagnose
from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.curvature.hessian import HessianOperator
from lyapunov_lightning.curvature.lyapunov import H0_CONVENTION
from lyapunov_lightning.curvature.stability import Stability, is_known, learning_rate, stability_of
from lyapunov_lightning.curvature.tracking import End, ExponentTracker, ExtremeTracker
from lyapunov_lightning.figures import sharpness_figure
from lyapunov_lightning.training.callback import CurvatureCallback, Figures, Stateful, non_default
from lyapunov_lightning.training.config import HessianConfig, Schedule
from lyapunov_lightning.training.distributed import failing_together
from lyapunov_lightning.training.losses import LossSeries
from lyapunov_lightning.training.optimizers import check_training_map
from lyapunov_lightning.training.progress import progress, watched
from lyapunov_lightning.training.recording import Charts, Record
from lyapunov_lightning.training.sharing import EigenRequest, Step
from lyapunov_lightning.training.updates import OwnGradient

if TYPE_CHECKING:
    from lyapunov_lightning.figures import Picture

Estimator = Literal["lanczos", "lyapunov", "power"]


class CurvatureProbe(CurvatureCallback):
    r"""Logs the extreme eigenvalue of the training loss's Hessian while a module trains.

    The largest eigenvalue, the *sharpness*, decides on the stability of the training: gradient descent with learning
    rate :math:`\eta` diverges along directions of curvature above :math:`2/\eta`, and networks tend to train right at
    that edge of stability. The probe measures it every few steps on the batch of the step, or on fixed data, at the
    parameters before the step, and changes nothing: the run is bit-identical to one without the probe.

    Three estimators:

    - ``"lanczos"`` (default): exact Hessian-vector products in a Krylov space that starts from the last probe's
      eigenvectors and a little noise; stops when the eigenvalue is known to `tol`. 4 to 10 products of about 2
      gradients each.
    - ``"lyapunov"``: one iteration a probe of the finite-size Lyapunov exponent, which follows a perturbation of the
      parameters from probe to probe. Costs one gradient where the step's own gradient can be used, else two. The
      largest end is Algorithm 1 of the paper; the smallest end follows the training map itself, with the learning rate
      and the momentum of the optimizer (SGD only).
    - ``"power"``: power iteration, the classical baseline.

    Logged:

    - ``curvature/lambda_max``, ``curvature/lambda_min``: the eigenvalues of the ends asked for, in the unit of the
      loss's second derivative.
    - ``curvature/stability_limit``: the eigenvalue at which the optimizer's present learning rate turns unstable. It is
      one on ``lambda_max`` for SGD, and for the Adams, RMSprop, Adagrad, parameter groups of different settings and an
      optimizer that maximizes one on ``curvature/preconditioned_lambda_max``, which is then measured as well; with
      ``"lyapunov"``, which cannot, both are left out.
    - ``curvature/stability_ratio``: the eigenvalue that counts for this optimizer over its limit. The edge of stability
      is 1, whatever the optimizer.
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
    - ``matvecs`` and ``seconds``: Hessian-vector products (differences of gradients) and wall-clock time spent.
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
        end: Which end of the spectrum: ``"largest"``, ``"smallest"`` or ``"both"``.
        tol: Relative accuracy of the eigenvalues, by their own estimate; of ``"power"`` and ``"lyapunov"`` the relative
            residual.
        schedule: Any other schedule, such as ``Schedule(max_overhead=0.05)`` for about 5 % of the time.
        hessian: Which Hessian; by default that of the step's own batch.
        iterations: Iterations of ``"lyapunov"`` for each probe.
        delta_q: Length of the perturbation that ``"lyapunov"`` follows, in parameter space.
        prog_bar: Whether the progress bar shows the last stability ratio, as ``sharpness/limit``.
        log_prefix: Put in front of every tag, so that several probes live side by side.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: If the module or the strategy cannot be measured: manual optimization without a
            loss of its own, sharded parameters, nothing to train.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lyapunov_lightning import CurvatureProbe
        >>> probe = CurvatureProbe(every_n_steps=50, end="both")
        >>> trainer = Trainer(callbacks=[probe], max_epochs=1, logger=False)

    Reference:
        "A chaos theory approach to understand neural network optimization", Algorithm 1, secs. 2 and 3, appendix B.

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
        is_lyapunov = estimator == "lyapunov"
        super().__init__(
            every_n_steps,
            schedule,
            hessian,
            log_prefix,
            data="batch",
            method="finite_difference" if is_lyapunov else None,
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
        self._waiting: tuple[HessianOperator, Step] | None = None
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
        self._waiting = None
        self._losses.start(trainer)
        if self._estimator == "lyapunov" and self._end != "largest":
            check_training_map(type(self).__name__, trainer.optimizers)

    @override
    def charts(self) -> Charts:
        limits = ["curvature/lambda_max$", "curvature/preconditioned_lambda_max$", "curvature/stability_limit$"]
        return {"sharpness and stability limit": limits, "stability ratio": ["curvature/stability_ratio$"]}

    @override
    def figures(self) -> Figures:
        return {"at_a_glance": self._at_a_glance}

    def diagnosis(self) -> Diagnosis:
        """What the run tells of its learning rate so far, by the rules of `lyapunov_lightning.curvature.diagnosis`.

        Example::

            >>> from lyapunov_lightning import CurvatureProbe
            >>> CurvatureProbe().diagnosis().kind  # nothing was measured yet
            'unknown'

        """
        results: list[ProbeResult] = self.results
        return diagnose(
            [result.step for result in results],
            [result.stability_ratio for result in results],
            self._losses.series,
            converged=[result.converged for result in results],
            learning_rate=results[-1].learning_rate if results else None,
        )

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._losses.collect(trainer)
        super().on_train_end(trainer, pl_module)

    @override
    def conclude(self, trainer: Any) -> None:
        self._losses.collect_own()  # of a run that breaks off: the other ranks may not be there any more
        super().conclude(trainer)
        if self._has_news:
            self._has_news = False
            self._recorder.tell(trainer, "summary", self._summary)

    @override
    def measure(self, hessian: HessianOperator, step: Step) -> ProbeResult | None:
        if self._estimator != "lyapunov":
            return self._eigenvalues(hessian, step)
        if self.config.data == "batch" and self._own_gradient.may_fit(step.trainer):
            self._waiting = (hessian, step)  # the step is about to compute this gradient itself
            return None
        return self._exponents(hessian, step, hessian.gradient())

    @override
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self._waiting is not None:
            (hessian, step), self._waiting = self._waiting, None
            with self._recorder.measurement(trainer) as record, failing_together(trainer):
                record.result = self._exponents(hessian, step, self._own_gradient.take(trainer, hessian))
            self._keep(trainer, record)

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._losses.see(trainer, outputs)
        if self._waiting is not None:
            self._waiting = None
            with self._recorder.measurement(trainer):
                raise MeasurementError("The step returned None for the probed batch, so there was no backward pass.")

    @override
    def _stateful(self) -> dict[str, Stateful]:
        parts = {**super()._stateful(), "losses": self._losses, "edge": self._edge}
        if self._estimator == "lyapunov":
            return {**parts, "followed": self._followed, "own_gradient": self._own_gradient}
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
        if any(result.preconditioned_lambda_max is not None for result in results):  # there is none before step 1
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

    def _eigenvalues(self, hessian: HessianOperator, step: Step) -> ProbeResult:
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

    def _exponents(self, hessian: HessianOperator, step: Step, here: Tensor) -> ProbeResult | None:
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
                gradient, here, lr=float(group["lr"]), momentum=float(group.get("momentum", 0.0))
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

    def _stability(self, step: Step, hessian: HessianOperator) -> Stability | None:
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


def _limits(step: Step, stability: Stability | None) -> dict[str, float | None]:
    """Learning rate and stability limit of the optimizer, as far as they are known."""
    lr = learning_rate(step.trainer.optimizers[0]) if step.trainer.optimizers else math.nan
    return {
        "learning_rate": None if math.isnan(lr) else lr,
        "stability_limit": None if stability is None or stability.limit == math.inf else stability.limit,
    }
