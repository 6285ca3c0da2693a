"""The sharpness of the training loss, step by step."""

import math
from collections.abc import Callable
from typing import Any, Literal, Optional

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.callbacks.arguments import check_choice, check_int, check_positive
from lyapunov_lightning.callbacks.base import CurvatureCallback, Stateful
from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.curvature.linear import ScaledOperator
from lyapunov_lightning.curvature.lyapunov import H0_CONVENTION, LyapunovEstimate, LyapunovIteration
from lyapunov_lightning.curvature.operator import HessianOperator, Method
from lyapunov_lightning.curvature.stability import Stability, is_known, learning_rate, stability_of
from lyapunov_lightning.curvature.tracking import End, ExtremeTracker
from lyapunov_lightning.training.batches import Data, ProbeData
from lyapunov_lightning.training.gradients import OwnGradient
from lyapunov_lightning.training.optimizers import check_training_map
from lyapunov_lightning.training.problem import CurvatureProblem
from lyapunov_lightning.training.recording import WatchedOperator, progress
from lyapunov_lightning.training.sandbox import Mode
from lyapunov_lightning.training.schedule import Schedule, Timetable
from lyapunov_lightning.training.sharing import EigenRequest, Measurement, Subscription

Estimator = Literal["lanczos", "lyapunov", "power"]


class CurvatureProbe(CurvatureCallback):
    r"""Logs the extreme eigenvalue of the training loss's Hessian while a module trains.

    The largest eigenvalue, the *sharpness*, decides on the stability of the training: gradient descent with learning
    rate :math:`\eta` diverges along directions of curvature above :math:`2/\eta`, and networks tend to train right at
    that edge. The probe measures it every few steps on the batch of the step, or on fixed data, at the parameters
    before the step, and changes nothing: the run is bit-identical to one without the probe.

    Three estimators:

    - ``"lanczos"`` (default): exact Hessian-vector products in a Krylov space that starts from the last probe's
      eigenvector; stops at the residual `tol`. 2 to 10 products of about 2 gradients each.
    - ``"lyapunov"``: one iteration a probe of the finite-size Lyapunov exponent, which follows a perturbation of the
      parameters from probe to probe. Costs one gradient where the step's own gradient can be used, else two. The
      largest end is Algorithm 1 of the paper; the smallest end follows the training map itself, with the learning rate
      and the momentum of the optimizer (SGD only).
    - ``"power"``: power iteration, the classical baseline.

    Logged, all but the last three in the unit of the loss's second derivative:

    - ``curvature/lambda_max``, ``curvature/lambda_min``: the eigenvalues of the ends asked for.
    - ``curvature/residual`` (``residual_min`` for the smallest of both ends): ``‖Hv − λv‖``; an eigenvalue of the
      Hessian lies within it. ``curvature/converged`` is 1 where it met `tol`, and 0 where it did not or the
      measurement failed.
    - ``curvature/stability_limit``: the eigenvalue at which the optimizer's present learning rate turns unstable. To be
      read against ``lambda_max`` for SGD, and for Adam, AdamW, RMSprop, and parameter groups of different learning
      rates against ``curvature/preconditioned_lambda_max``, which is then measured as well (not by ``"lyapunov"``).
    - ``curvature/preconditioned_residual``: the residual of the latter.
    - ``curvature/lr_times_lambda_max``: learning rate times ``lambda_max``; 2 is the edge of stability of plain SGD.
    - ``curvature/inverse_h0``: the paper's quasi-Newton learning rate, in its own convention, in which it is
      ``(e − 1)/λ_max`` once settled, not ``1/λ_max``.
    - ``curvature/lyapunov_exponent``: the exponent of the map that was followed (``lyapunov`` only). When both ends are
      followed, ``curvature/lyapunov_exponent_sgd`` is that of the training map. ``curvature/paper_lambda_min`` is the
      smallest eigenvalue in the paper's convention. Beyond the edge of stability the sharpest direction is the one that
      grows under the training map; its eigenvalue is then logged as ``lambda_max``. A negative eigenvalue beyond about
      twice the largest one grows under gradient ascent, and is then logged as ``lambda_min``.
    - ``curvature/matvecs``: Hessian-vector products spent (for ``"lyapunov"`` differences of gradients).
    - ``curvature/seconds``: wall-clock time spent.

    The values are in ``trainer.callback_metrics`` too, so that EarlyStopping and ModelCheckpoint can monitor, say,
    ``curvature/lambda_max``. A measurement that fails is warned of once and leaves the training alone.

    Args:
        every_n_steps: Probe before every n-th optimizer step. Not used if `max_overhead` or `schedule` is given.
        estimator: How the eigenvalue is estimated, see above.
        end: Which end of the spectrum: ``"largest"``, ``"smallest"`` or ``"both"``.
        data: ``"batch"`` for the step's own batch (with gradient accumulation the first of it), ``"fixed"`` for the
            same samples of the training set throughout.
        method: How products are computed: ``"double_backward"`` and ``"forward_over_reverse"`` are exact,
            ``"finite_difference"`` works with any model, ``"auto"`` is double backward, and finite differences with a
            warning where PyTorch cannot differentiate twice.
        tol: Relative residual at which an eigenvalue counts as converged.
        max_overhead: Share of the training time that probing may take, such as 0.05, in place of a fixed interval.
        schedule: Any other schedule, in place of `every_n_steps` and `max_overhead`.
        num_batches: Size of the fixed data in batches for each process.
        fraction: Size of the fixed data as a share of the training set, if `num_batches` is not given.
        mode: ``"train"`` or ``"eval"``: how dropout and BatchNorm act in the measured loss.
        loss_fn: Maps the module and a batch to the scalar loss to measure, in place of what ``training_step`` returns.
            A module can define a method ``curvature_loss(batch)`` to the same end.
        iterations: Iterations of ``"lyapunov"`` for each probe.
        delta_q: Length of the perturbation that ``"lyapunov"`` follows, in parameter space.
        log_prefix: Put in front of every tag, so that several probes live side by side.
        seed: Seed of the first direction, and of the choice of fixed data.

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

    def __init__(
        self,
        every_n_steps: int = 10,
        estimator: Estimator = "lanczos",
        end: End = "largest",
        data: Data = "batch",
        method: Method = "auto",
        tol: float = 1e-2,
        *,
        max_overhead: Optional[float] = None,
        schedule: Optional[Schedule] = None,
        num_batches: Optional[int] = None,
        fraction: float = 0.05,
        mode: Mode = "train",
        loss_fn: Optional[Callable[[pl.LightningModule, Any], Any]] = None,
        iterations: int = 1,
        delta_q: float = 5e-2,
        log_prefix: Optional[str] = None,
        seed: int = 0,
    ) -> None:
        check_choice("estimator", estimator, Estimator)
        check_choice("end", end, End)
        check_choice("method", method, Method)
        check_positive("tol", tol)
        check_int("iterations", iterations, least=1)
        if schedule is None:  # both are checked, also the one that is not used
            schedule = Schedule(every_n_steps=every_n_steps, max_overhead=max_overhead)
            if max_overhead is not None:
                schedule = Schedule(max_overhead=max_overhead)
        problem = CurvatureProblem(
            type(self).__name__,
            ProbeData(data, num_batches=num_batches, fraction=fraction, seed=seed),
            mode=mode,
            method="finite_difference" if estimator == "lyapunov" else method,
            loss_fn=loss_fn,
        )
        request = EigenRequest(int(end != "smallest"), int(end != "largest"), tol, seed)
        super().__init__(
            Subscription(problem, Timetable(schedule), request if estimator == "lanczos" else None), log_prefix
        )
        self._estimator = estimator
        self._end = end
        self._tol = tol
        self._iterations = iterations
        self._power = ExtremeTracker("power", end, tol, seed)
        self._preconditioned = ExtremeTracker("power" if estimator == "power" else "lanczos", "largest", tol, seed)
        self._ascent = LyapunovIteration(map="ascent", delta_q=delta_q, seed=seed) if end != "smallest" else None
        self._descent = LyapunovIteration(map="sgd", delta_q=delta_q, seed=seed) if end != "largest" else None
        self._own_gradient = OwnGradient()
        self._uses_own_gradient = estimator == "lyapunov" and data == "batch"
        self._waiting: Optional[Measurement] = None

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(estimator=self._estimator, end=self._end, log_prefix=self._log_prefix)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().on_train_start(trainer, pl_module)
        if self._estimator == "lyapunov" and self._descent is not None:
            check_training_map(type(self).__name__, trainer.optimizers)

    @override
    def charts(self) -> dict[str, dict[str, list[str]]]:
        sharpness = ["curvature/lambda_max$", "curvature/preconditioned_lambda_max$", "curvature/stability_limit$"]
        return {"curvature": {"sharpness and stability limit": self._recorder.patterns(sharpness)}}

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        self._waiting = None
        self.subscription.problem.observe(trainer, batch, batch_idx)
        if self.subscription.timetable.is_due(trainer, batch_idx):
            with self._recorder.measurement(trainer, "curvature") as scalars:
                measurement = self.subscription.take(trainer, pl_module, batch, batch_idx)
                if measurement is not None and self._uses_own_gradient and self._own_gradient.may_fit(trainer):
                    self._waiting = measurement
                elif measurement is not None:
                    scalars.update(self._measure(trainer, measurement, after_backward=False))
            self.subscription.timetable.record(scalars.get("curvature/seconds", 0.0))

    @override
    def on_after_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        measurement, self._waiting = self._waiting, None
        if measurement is not None:
            with self._recorder.measurement(trainer, "curvature") as scalars:
                scalars.update(self._measure(trainer, measurement, after_backward=True))
            self.subscription.timetable.record(scalars.get("curvature/seconds", 0.0))

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._waiting is not None:
            self._waiting = None
            with self._recorder.measurement(trainer, "curvature"):
                raise MeasurementError("The step returned None for the probed batch, so there was no backward pass.")

    @override
    def _stateful(self) -> dict[str, Stateful]:
        parts: dict[str, Optional[Stateful]]
        if self._estimator == "lyapunov":
            parts = {"ascent": self._ascent, "descent": self._descent, "own_gradient": self._own_gradient}
        else:
            parts = {"power": self._power, "preconditioned": self._preconditioned, "vectors": self.subscription}
        parts["timetable"] = self.subscription.timetable
        return {name: part for name, part in parts.items() if part is not None}

    def _measure(self, trainer: "pl.Trainer", measurement: Measurement, after_backward: bool) -> dict[str, float]:
        """All scalars of one probe, but for the time."""
        operator = measurement.operator
        optimizer = trainer.optimizers[0] if trainer.optimizers else None
        stability = None if optimizer is None else self._stability(optimizer, operator)
        with progress(trainer, type(self).__name__) as report:
            if self._estimator == "lyapunov":
                scalars = self._exponents(trainer, operator, after_backward, report)
            else:
                scalars = self._eigenvalues(measurement, stability, report)
        if stability is not None and stability.limit < math.inf:
            scalars["curvature/stability_limit"] = stability.limit
        if optimizer is not None and "curvature/lambda_max" in scalars:
            lr = learning_rate(optimizer)
            if not math.isnan(lr):
                scalars["curvature/lr_times_lambda_max"] = lr * scalars["curvature/lambda_max"]
        return scalars

    def _eigenvalues(
        self, measurement: Measurement, stability: Optional[Stability], report: Callable[[], None]
    ) -> dict[str, float]:
        watched = WatchedOperator(measurement.operator, report)
        request = self.subscription.request
        if request is None:
            pairs = self._power.measure(watched)
        else:
            pairs = measurement.eigenpairs(request, type(self).__name__)
            self.subscription.vectors = pairs.vectors
        scalars: dict[str, float] = {}
        converged, matvecs = bool(pairs.converged.all()), pairs.num_matvecs
        if pairs.num_largest:
            scalars["curvature/lambda_max"] = lambda_max = float(pairs.largest)
            scalars["curvature/residual"] = float(pairs.residuals[0])
            if lambda_max > 0:
                scalars["curvature/inverse_h0"] = H0_CONVENTION / lambda_max
        if len(pairs.smallest):
            scalars["curvature/lambda_min"] = float(pairs.smallest)
            scalars[f"curvature/residual{'_min' if pairs.num_largest else ''}"] = float(pairs.residuals[-1])
        if pairs.num_largest and stability is not None and stability.scale is not None:
            top = self._preconditioned.measure(ScaledOperator(watched, stability.scale))
            scalars["curvature/preconditioned_lambda_max"] = float(top.largest)
            scalars["curvature/preconditioned_residual"] = float(top.residuals[0])
            converged, matvecs = converged and bool(top.converged), matvecs + top.num_matvecs
        return {**scalars, "curvature/converged": float(converged), "curvature/matvecs": float(matvecs)}

    def _exponents(
        self, trainer: "pl.Trainer", operator: HessianOperator, after_backward: bool, report: Callable[[], None]
    ) -> dict[str, float]:
        here = self._own_gradient.take(trainer, operator) if after_backward else operator.gradient()

        def gradient(displacement: Tensor) -> Tensor:
            there = operator.gradient(displacement)
            report()
            return there

        scalars: dict[str, float] = {}
        estimates: list[LyapunovEstimate] = []
        if self._ascent is not None:
            for _ in range(self._iterations):
                estimate = self._ascent.step(gradient, here)
            estimates.append(estimate)
            scalars["curvature/lyapunov_exponent"] = estimate.exponent
            if estimate.end == "largest":
                scalars["curvature/lambda_max"] = estimate.eigenvalue
            elif self._descent is None:  # a negative eigenvalue so large that it grows faster, turning round
                scalars["curvature/lambda_min"] = estimate.eigenvalue
            scalars["curvature/inverse_h0"] = 1 / estimate.paper_eigenvalue
            scalars["curvature/residual"] = estimate.residual
        group = trainer.optimizers[0].param_groups[0] if self._descent is not None else {"lr": 0.0}
        if self._descent is not None and group["lr"] > 0:  # at a learning rate of 0 nothing moves
            for _ in range(self._iterations):
                estimate = self._descent.step(gradient, here, lr=group["lr"], momentum=group["momentum"])
            estimates.append(estimate)
            alone = self._ascent is None
            scalars[f"curvature/lyapunov_exponent{'' if alone else '_sgd'}"] = estimate.exponent
            scalars[f"curvature/residual{'' if alone else '_min'}"] = estimate.residual
            if estimate.end == "smallest":
                scalars["curvature/lambda_min"] = estimate.eigenvalue
                scalars["curvature/paper_lambda_min"] = estimate.paper_eigenvalue
            elif alone:  # beyond the edge of stability the sharpest direction grows fastest
                scalars["curvature/lambda_max"] = estimate.eigenvalue
        converged = all(e.residual <= self._tol * abs(e.eigenvalue) for e in estimates)
        if not estimates:
            return {}
        matvecs = self._iterations * len(estimates)
        return {**scalars, "curvature/converged": float(converged), "curvature/matvecs": float(matvecs)}

    def _stability(self, optimizer: torch.optim.Optimizer, operator: HessianOperator) -> Optional[Stability]:
        if not is_known(optimizer):
            self._recorder.warn_once(
                "unknown optimizer",
                f"the stability limit of {type(optimizer).__name__} is not known, so `curvature/stability_limit` is"
                " left out.",
            )
        return stability_of(optimizer, operator.parameters)
