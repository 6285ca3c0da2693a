"""The directions of negative curvature of the training loss, and moves along them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.callbacks.arguments import check_choice, check_int, check_positive
from lyapunov_lightning.callbacks.base import CurvatureCallback, Stateful
from lyapunov_lightning.curvature.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.linear import LinearOperator
from lyapunov_lightning.curvature.online import OnlineEigenpair
from lyapunov_lightning.curvature.operator import HessianOperator, Method
from lyapunov_lightning.figures import frozen_figure
from lyapunov_lightning.training.batches import Data, ProbeData
from lyapunov_lightning.training.descent import check_optimizer, move_parameters
from lyapunov_lightning.training.problem import CurvatureProblem
from lyapunov_lightning.training.recording import WatchedOperator, progress
from lyapunov_lightning.training.sandbox import Mode
from lyapunov_lightning.training.schedule import Schedule, Timetable
from lyapunov_lightning.training.series import SeriesFile
from lyapunov_lightning.training.sharing import EigenRequest, Measurement, Subscription

Estimator = Literal["lanczos", "online"]


class NegativeCurvatureTracker(CurvatureCallback):
    r"""Logs the most negative eigenvalues of the training loss's Hessian, and can descend along their directions.

    At every step of the schedule the `smallest` eigenpairs and the largest one are computed from one Krylov space, on
    fixed training data. Without `descend` the run is bit-identical to one without the tracker. Callbacks of this
    package that ask for the same Hessian at the same step share one computation.

    *Frozen directions*: at each step of `freeze_at` the top and the bottom eigenvector are stored, and the curvature
    :math:`v^\top H(t) v` along them is logged from then on: it tells how soon an eigenvector is out of date.

    *The running estimate* (``estimator="online"``): a smallest eigenpair that is carried along from step to step for
    one product each, see `OnlineEigenpair`. It needs a Hessian that changes slowly, so use it on fixed data: the most
    negative direction of one mini-batch is as a rule no such direction of the next one.

    *The descent* (``descend=True``) changes the training, as the paper's appendix C proposes: after the optimizer's
    step the parameters move by

    .. math:: -\min(\eta |c|, s)\, \mathrm{sign}(c)\, \tilde v, \qquad c = g^\top \tilde v

    with :math:`\eta` = `descend_lr` and :math:`s` = `descend_max_step`, to the side on which the loss falls. It does so
    only while :math:`\tilde\lambda < -r` for the residual :math:`r` of the estimate, so that the Hessian certainly has
    a negative eigenvalue there. The pair is that of `estimator`; pair, residual and the gradient :math:`g` are all
    taken before the optimizer's step, on the measured data: they belong to one point, and the gradient costs nothing
    more. It is made after each step with a measurement, beside the optimizer, whose state and clipping it leaves alone.

    Logged, where not said otherwise at the steps of `schedule`:

    - ``negative/lambda_min_1`` ... ``k``, the most negative first; ``negative/lambda_max``.
    - ``negative/lambda_ratio``: ``|lambda_min_1| / lambda_max``, where the latter is positive.
    - ``negative/negative_mass``: share of the negative ones in the sum of the moduli of these eigenvalues.
    - ``negative/gradient_component_1`` ... ``k``: ``|gᵀv|`` of the gradient on the measured data along each of the
      smallest eigenvectors; ``negative/gradient_norm`` to compare them with.
    - ``negative/residual``: the largest residual ``‖Hv − λv‖`` among the pairs; ``negative/converged``: the share of
      them that met `tol`, and 0 where the measurement failed.
    - ``negative/frozen_{step}_top`` and ``frozen_{step}_bottom``: the curvature along the directions frozen at a step.
    - ``negative/online_lambda_min``, ``online_residual`` and ``online_age``: the running estimate, its residual, and
      how many steps ago these were measured (``online`` only, at the steps of `online_schedule`).
    - ``negative/online_error``: ``|online_lambda_min − lambda_min_1| / |lambda_min_1|``, where both are measured.
    - ``negative/descended`` and ``negative/descent_step``: whether the parameters moved (1 or 0), and the length of the
      move with the sign along the estimate's vector (``descend`` only), at the step that they follow.
    - ``negative/matvecs`` and ``negative/seconds``: products and wall-clock time spent.

    At the end of every epoch in which frozen directions were measured the loggers that can show figures (TensorBoard,
    Weights & Biases) get ``negative/frozen``.

    In memory and in checkpoints two vectors of the model's size are kept for each frozen step, and five for the running
    estimate.

    Args:
        smallest: How many eigenvalues of the lower end. 0 leaves the running estimate alone (``online`` only).
        schedule: When to compute them; before the first step of every epoch if not given.
        data: ``"fixed"`` for the same samples of the training set throughout, ``"batch"`` for the step's own batch.
        freeze_at: The optimizer steps whose eigenvectors are frozen; measured there whatever the schedule.
        estimator: ``"lanczos"``, or ``"online"`` for the running estimate beside it.
        online_schedule: When to go on with the running estimate; at every step if not given.
        descend: Whether to move the parameters along the most negative direction.
        descend_lr: Learning rate of these moves.
        descend_max_step: Their greatest length, in parameter space.
        num_batches: Size of the fixed data in batches for each process.
        fraction: Size of the fixed data as a share of the training set, if `num_batches` is not given.
        method: How products are computed, as for `CurvatureProbe`. Finite differences see too little of the negative
            end of networks with ReLU or max-pooling to be of use here.
        tol: Relative residual at which an eigenvalue counts as converged.
        mode: ``"train"`` or ``"eval"``: how dropout and BatchNorm act in the measured loss.
        loss_fn: Maps the module and a batch to the scalar loss to measure, in place of what ``training_step`` returns.
        save_dir: Where to write ``negative.csv``, a table of all that is logged, if given.
        log_prefix: Put in front of every tag, so that several trackers live side by side.
        seed: Seed of everything random in the measurement.

    Raises:
        ValueError: If an argument is out of its range, or given where it has no effect.
        MisconfigurationException: If the module or the strategy cannot be measured, if the model has fewer parameters
            than eigenvalues are wanted, or if LBFGS is to be combined with the descent.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lyapunov_lightning import NegativeCurvatureTracker, Schedule
        >>> tracker = NegativeCurvatureTracker(smallest=3, schedule=Schedule(every_n_steps=50), freeze_at=[100, 400])
        >>> trainer = Trainer(callbacks=[tracker], max_epochs=1, logger=False)

    Reference:
        "Negative eigenvalues of the Hessian in deep neural networks", sec. 2.2, figs. 1 and 2, and appendix C.

    """

    def __init__(
        self,
        smallest: int = 3,
        schedule: Optional[Schedule] = None,
        data: Data = "fixed",
        *,
        freeze_at: Optional[list[int]] = None,
        estimator: Estimator = "lanczos",
        online_schedule: Optional[Schedule] = None,
        descend: bool = False,
        descend_lr: float = 1.0,
        descend_max_step: float = 0.1,
        num_batches: Optional[int] = None,
        fraction: float = 0.05,
        method: Method = "auto",
        tol: float = 1e-2,
        mode: Mode = "train",
        loss_fn: Optional[Callable[[pl.LightningModule, Any], Any]] = None,
        save_dir: Optional[str] = None,
        log_prefix: Optional[str] = None,
        seed: int = 0,
    ) -> None:
        check_choice("estimator", estimator, Estimator)
        check_choice("method", method, Method)
        check_positive("tol", tol)
        check_positive("descend_lr", descend_lr)
        check_positive("descend_max_step", descend_max_step)
        check_int("smallest", smallest, least=int(estimator == "lanczos"))
        frozen_steps = _checked_steps(freeze_at)
        if frozen_steps and not smallest:
            raise ValueError("`smallest` should be a positive int where `freeze_at` is given, got 0.")
        if online_schedule is not None and estimator != "online":
            raise ValueError(f"`online_schedule` is of no use with `estimator={estimator!r}`. Use 'online'.")
        if schedule is not None and not smallest:
            raise ValueError("`schedule` is of no use with `smallest=0`. Use `online_schedule`.")
        problem = CurvatureProblem(
            type(self).__name__,
            ProbeData(data, num_batches=num_batches, fraction=fraction, seed=seed),
            mode=mode,
            method=method,
            loss_fn=loss_fn,
        )
        own = _EigenpairTimetable(schedule if schedule is not None else Schedule(every_n_epochs=1), frozen_steps)
        running = Timetable(online_schedule if online_schedule is not None else Schedule(every_n_steps=1))
        acts = descend and estimator == "lanczos"
        request = EigenRequest(1, smallest, tol, seed, acts=acts) if smallest else None
        super().__init__(
            Subscription(problem, own if smallest else running, request),
            log_prefix,
            None if save_dir is None else SeriesFile(Path(save_dir) / "negative.csv"),
        )
        self._smallest = smallest
        self._estimator = estimator
        self._descend = descend
        self._descend_lr, self._descend_max_step = descend_lr, descend_max_step
        self._running = running
        self._online = OnlineEigenpair(seed=seed)
        self._frozen = _FrozenDirections(frozen_steps)
        self._history = _History()
        self._move: Optional[_Move] = None

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            estimator=self._estimator, smallest=self._smallest, descend=self._descend, log_prefix=self._log_prefix
        )

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().on_train_start(trainer, pl_module)
        self._move = None
        if self._estimator == "online" and self._smallest:
            self._running.start()  # else it is the subscription's, which has started it
        if self._smallest:
            self._check_size(pl_module, 1 + self._smallest)
        if self._descend:
            check_optimizer(type(self).__name__, trainer)

    @override
    def charts(self) -> dict[str, dict[str, list[str]]]:
        charts = {
            "smallest eigenvalues": [r"negative/lambda_min_\d+$", "negative/online_lambda_min$"],
            "frozen directions": [r"negative/frozen_\d+_(top|bottom)$", "negative/lambda_max$"],
        }
        return {"negative": {name: self._recorder.patterns(tags) for name, tags in charts.items()}}

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        self.subscription.problem.observe(trainer, batch, batch_idx)
        is_due = bool(self._smallest) and self.subscription.timetable.is_due(trainer, batch_idx)
        goes_on = self._estimator == "online" and self._running.is_due(trainer, batch_idx)
        if not (is_due or goes_on):
            return
        moves = self._descend and (goes_on or self._estimator == "lanczos")
        if moves:
            self._move = _Move(trainer.global_step)  # made together, also where this process fails to measure
        with self._recorder.measurement(trainer, "negative") as scalars:
            measurement = self.subscription.take(trainer, pl_module, batch, batch_idx)
            if measurement is None:
                self._tell_what_cannot_be_frozen(trainer)
                return
            if is_due:
                pair = self._eigenpairs(trainer, measurement, scalars)
            if goes_on:
                pair = self._go_on(trainer, measurement.operator, scalars)
            if moves:
                displacement = self._planned(measurement.operator, pair, scalars)
                self._move = _Move(trainer.global_step, displacement)
        (self.subscription.timetable if is_due else self._running).record(scalars.get("negative/seconds", 0.0))

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._move is None or trainer.global_step == self._move.step:
            return  # no step yet: gradients are accumulated
        move, self._move = self._move, None
        moved = move_parameters(trainer, pl_module, move.displacement)
        if move.displacement is not None and not moved:
            self._recorder.warn_once(
                "not moved",
                f"the move after step {move.step} was not made, since another process could not measure.",
            )

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._move = None  # of a batch that led to no step
        figure = self._history.new_figure()
        if figure is not None:
            self._recorder.figure(trainer, "negative/frozen", figure)

    @override
    def _stateful(self) -> dict[str, Stateful]:
        parts: dict[str, Stateful] = {
            "timetable": self.subscription.timetable,
            "frozen": self._frozen,
            "history": self._history,
        }
        if self._estimator == "online":
            parts.update(online=self._online, running=self._running)
        return parts

    def _eigenpairs(
        self, trainer: "pl.Trainer", measurement: Measurement, scalars: dict[str, float]
    ) -> "_SmallestPair":
        """Both ends by Lanczos, and the frozen directions."""
        request = self.subscription.request
        assert request is not None
        pairs = measurement.eigenpairs(request, type(self).__name__)
        largest, smallest = float(pairs.largest), float(pairs.smallest[0])
        scalars |= {f"negative/lambda_min_{i}": float(value) for i, value in enumerate(pairs.smallest, 1)}
        scalars["negative/lambda_max"] = largest
        if largest > 0:
            scalars["negative/lambda_ratio"] = abs(smallest) / largest
        scalars["negative/negative_mass"] = pairs.negative_mass
        scalars["negative/residual"] = float(pairs.residuals.max())
        scalars["negative/converged"] = float(pairs.converged.double().mean())
        gradient = measurement.operator.gradient()
        components = (pairs.vectors[1:] @ gradient).abs()
        scalars |= {f"negative/gradient_component_{i}": c for i, c in enumerate(components.tolist(), 1)}
        scalars["negative/gradient_norm"] = float(torch.linalg.vector_norm(gradient))
        self._frozen.freeze(trainer.global_step, pairs)
        with progress(trainer, type(self).__name__) as report:
            curvatures = self._frozen.curvatures(WatchedOperator(measurement.operator, report))
        scalars |= {f"negative/frozen_{name}": value for name, value in curvatures.items()}
        scalars["negative/matvecs"] = float(pairs.num_matvecs + len(curvatures))
        self._history.add(trainer.global_step, largest, smallest, curvatures)
        return _SmallestPair(smallest, float(pairs.residuals[1]), pairs.vectors[1])

    def _go_on(self, trainer: "pl.Trainer", operator: HessianOperator, scalars: dict[str, float]) -> "_SmallestPair":
        """One step of the running estimate, and its error where the eigenvalue is known."""
        estimate = self._online.step(operator)
        scalars["negative/online_lambda_min"] = estimate.value
        scalars["negative/online_residual"] = estimate.residual
        scalars["negative/online_age"] = float(estimate.age)
        exact = scalars.get("negative/lambda_min_1", 0.0)
        if exact:
            scalars["negative/online_error"] = abs(estimate.value - exact) / abs(exact)
        scalars["negative/matvecs"] = scalars.get("negative/matvecs", 0.0) + 1
        return _SmallestPair(estimate.value, estimate.residual, estimate.vector)

    def _planned(self, operator: HessianOperator, pair: "_SmallestPair", scalars: dict[str, float]) -> Tensor:
        """The move along the most negative direction, zero where the curvature is not certainly negative."""
        length = 0.0
        if pair.value < -pair.residual:
            component = float(operator.gradient() @ pair.vector)
            if not math.isfinite(component):
                raise NonFiniteCurvatureError("The gradient at the present parameters is not finite.")
            length = -math.copysign(min(self._descend_lr * abs(component), self._descend_max_step), component)
        scalars["negative/descended"] = float(length != 0)
        scalars["negative/descent_step"] = length
        return length * pair.vector

    def _tell_what_cannot_be_frozen(self, trainer: "pl.Trainer") -> None:
        if self._frozen.is_wanted(trainer.global_step):
            self._recorder.warn_once(
                "not frozen",
                f"no directions are frozen at step {trainer.global_step}, since the fixed data are not complete yet.",
            )


class _EigenpairTimetable(Timetable):
    """A schedule with single steps beside it."""

    def __init__(self, schedule: Schedule, steps: Sequence[int]) -> None:
        super().__init__(schedule)
        self._steps = frozenset(steps)

    @override
    def _fits(self, trainer: "pl.Trainer", batch_idx: int) -> bool:
        return super()._fits(trainer, batch_idx) or trainer.global_step in self._steps


@dataclass(frozen=True)
class _SmallestPair:
    """The smallest eigenpair, whoever found it."""

    value: float
    residual: float
    vector: Tensor


@dataclass(frozen=True)
class _Move:
    """A move of the parameters that is to follow an optimizer step; without displacement if none could be planned."""

    step: int
    displacement: Optional[Tensor] = None


class _FrozenDirections:
    """The top and the bottom eigenvectors of some steps, and the curvature along them later on."""

    def __init__(self, steps: Sequence[int]) -> None:
        self._steps = steps
        self._vectors: dict[str, Tensor] = {}

    def is_wanted(self, step: int) -> bool:
        """Whether the directions of this step are to be frozen."""
        return step in self._steps

    def freeze(self, step: int, pairs: Eigenpairs) -> None:
        """Store the outermost eigenvectors if this is one of the steps."""
        if self.is_wanted(step):
            self._vectors[f"{step}_top"] = pairs.vectors[0].clone()
            self._vectors[f"{step}_bottom"] = pairs.vectors[pairs.num_largest].clone()

    def curvatures(self, operator: LinearOperator) -> dict[str, float]:
        """``vᵀHv`` for each stored vector of the operator's size; others are of a model that was frozen or unfrozen."""
        fitting = {name: vector for name, vector in self._vectors.items() if len(vector) == operator.size}
        return {
            name: float(vector.to(product) @ product)
            for name, vector in fitting.items()
            for product in [operator.matvec(vector)]
        }

    def state_dict(self) -> dict[str, Any]:
        return {"vectors": {name: vector.cpu() for name, vector in self._vectors.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._vectors = dict(state["vectors"])


class _History:
    """What the figure shows: the series of a run so far."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._ends: list[list[float]] = []
        self._frozen: dict[str, list[list[float]]] = {}
        self._is_new = False

    def add(self, step: int, largest: float, smallest: float, frozen: dict[str, float]) -> None:
        self._steps.append(step)
        self._ends.append([largest, smallest])
        for name, value in frozen.items():
            self._frozen.setdefault(name, []).append([float(step), value])
        self._is_new = self._is_new or bool(frozen)

    def new_figure(self) -> Optional[Figure]:
        """The figure, if frozen directions were measured since it was last drawn."""
        if not self._is_new:
            return None
        self._is_new = False
        curves: dict[str, dict[int, Tensor]] = {"top": {}, "bottom": {}}
        for name, series in self._frozen.items():
            step, end = name.split("_")
            curves[end][int(step)] = torch.tensor(series, dtype=torch.float64)
        return frozen_figure(self._steps, torch.tensor(self._ends), curves["top"], curves["bottom"])

    def state_dict(self) -> dict[str, Any]:
        series = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in self._frozen.items()}
        return {"steps": list(self._steps), "ends": torch.tensor(self._ends, dtype=torch.float64), "frozen": series}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps, self._ends = list(state["steps"]), state["ends"].tolist()
        self._frozen = {name: series.tolist() for name, series in state["frozen"].items()}


def _checked_steps(freeze_at: Optional[list[int]]) -> tuple[int, ...]:
    """The steps in their order.

    Raises:
        ValueError: If they are not distinct non-negative ints.

    """
    steps = [] if freeze_at is None else freeze_at
    if not isinstance(steps, (list, tuple)):
        raise ValueError(f"`freeze_at` should be a list of steps, got {freeze_at!r}.")
    if any(isinstance(step, bool) or not isinstance(step, int) or step < 0 for step in steps):
        raise ValueError(f"`freeze_at` should hold non-negative ints, got {freeze_at}.")
    if len(set(steps)) < len(steps):
        raise ValueError(f"`freeze_at` should hold each step once, got {freeze_at}.")
    return tuple(sorted(steps))
