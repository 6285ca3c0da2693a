"""The directions of negative curvature of the training loss, and moves along them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.callbacks.results.negative import NegativeResult
from lyapunov_lightning.curvature.acting.descent import negative_curvature_step
from lyapunov_lightning.curvature.arguments import check_choice, check_int, check_positive, made_of
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.curvature.tracking.frozen import FrozenDirections
from lyapunov_lightning.curvature.tracking.online import OnlineEigenpair, OnlineEstimate
from lyapunov_lightning.figures import frozen_figure, negative_figure
from lyapunov_lightning.training.callback import CurvatureCallback, Figures, Stateful, non_default
from lyapunov_lightning.training.config import HessianConfig, HessianLike, ScheduleLike
from lyapunov_lightning.training.lightning_names import LightningModule, Trainer
from lyapunov_lightning.training.optimizers.moves import move_parameters
from lyapunov_lightning.training.optimizers.requirements import check_movable
from lyapunov_lightning.training.reporting.progress import watched
from lyapunov_lightning.training.reporting.recording import Charts
from lyapunov_lightning.training.schedule import Schedule, ScheduleState, checked_steps
from lyapunov_lightning.training.sharing import EigenRequest, Step

Estimator = Literal["lanczos", "online"]


@dataclass(frozen=True)
class Descent:
    """Moves of the parameters along the most negative direction.

    Args:
        lr: The learning rate of the moves.
        max_step: The largest length of a move, in parameter space.

    Raises:
        ValueError: If an argument is out of its range.

    """

    lr: float = 1.0
    max_step: float = 0.1

    def __post_init__(self) -> None:
        check_positive("lr", self.lr)
        check_positive("max_step", self.max_step)


class NegativeCurvatureTracker(CurvatureCallback):
    """Logs the most negative eigenvalues of the training loss's Hessian, and can descend along their directions.

    The `smallest` eigenpairs and the largest one are computed from one Krylov space, by default on fixed training data,
    at the parameters before a step. Without `descent` the run is bit-identical to one without the tracker.

    *Frozen directions*: at each step of `freeze_at` the top and the bottom eigenvector are stored, and the curvature
    vᵀH(t)v along them is logged from then on. It shows how soon an eigenvector is out of date.

    *The running estimate* (``estimator="online"``): a smallest eigenpair that is carried along from step to step for
    one Hessian-vector product each, see `OnlineEigenpair`. It needs a Hessian that changes slowly, so use it on fixed
    data: the most negative direction of one mini-batch is as a rule not one of the next mini-batch.

    *The descent* changes the training, as the paper's appendix C proposes: after the optimizer's step the parameters
    move by

        −min(η |c|, s) sign(c) v   with   c = gᵀv

    with η = ``Descent.lr`` and s = ``Descent.max_step``, to the side on which the loss falls. They move only while λ <
    −r for the residual r of the estimate, so that the Hessian certainly has a negative eigenvalue there. The eigenpair
    is that of `estimator`. Eigenpair, residual and gradient g are all taken before the optimizer's step, on the
    measured data, so that they belong to one point and the gradient costs nothing more. A move follows each step with a
    measurement, and leaves the optimizer's state and its clipping alone.

    Logged:

    - ``negative/lambda_min_1`` ... ``k``, the most negative first, and ``negative/lambda_ratio``: ``|lambda_min_1|``
      over the largest eigenvalue, where that is positive.
    - ``negative/frozen_{step}_top`` and ``frozen_{step}_bottom``: the curvature along the directions frozen at a step.
    - ``negative/online_lambda_min``: the running estimate, at the steps of `online_schedule`.

    and in the group ``negative_details``, each explained at `NegativeResult`, accuracy and cost:
    ``lambda_max``, ``negative_mass``, ``gradient_component_1`` ... ``k``, ``gradient_norm``, ``residual``,
    ``converged`` (0 where the measurement failed), ``online_residual``, ``online_age``, ``online_error``,
    ``descent_step`` and ``descended`` (1 if it is not 0), ``matvecs`` and ``seconds``.

    The figures ``negative/eigenvalues`` and, once directions are frozen, ``negative/frozen`` go to all loggers that
    take figures, and to files in the log folder if none does: at the end of the training, and at the end of epochs as
    long as drawing takes little time. The results are in ``tracker.results``.

    Memory and checkpoints hold two vectors of the model's size for each frozen step, and five for the running estimate.

    Args:
        every_n_steps: Measure at the first opportunity after every n optimizer steps. Without it and `schedule` the
            tracker follows the trainer's ``log_every_n_steps``.
        smallest: How many eigenvalues of the lower end. 0 for the running estimate only, with ``estimator="online"``.
        schedule: Any other schedule, such as ``Schedule(every_n_epochs=1)``.
        hessian: Which Hessian; by default that of fixed training data. Finite differences see too little of the
            negative end of networks with ReLU or max-pooling to be of use here.
        freeze_at: The optimizer steps whose eigenvectors are frozen. They are measured there whatever the schedule.
        estimator: ``"lanczos"``, or ``"online"`` for the running estimate in addition.
        online_schedule: When to update the running estimate; by default at every step.
        descent: How to move the parameters along the most negative direction; by default they are not moved.
        tol: Relative residual at which an eigenvalue counts as converged.
        save_dir: Where to write ``negative.csv``, a table of all that is logged, if given.
        log_prefix: Put in front of every tag, so that several trackers live side by side.

    Raises:
        ValueError: If an argument is out of its range, or given where it has no effect.
        MisconfigurationException: If the module or the strategy cannot be measured, if the model has fewer parameters
            than eigenvalues are wanted, or if LBFGS is to be combined with the descent.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lyapunov_lightning import NegativeCurvatureTracker
        >>> tracker = NegativeCurvatureTracker(every_n_steps=50, smallest=3, freeze_at=[100, 400])
        >>> trainer = Trainer(callbacks=[tracker], max_epochs=1, logger=False)

    Reference:
        "Negative eigenvalues of the Hessian in deep neural networks", sec. 2.2, figs. 1 and 2, and appendix C.

    """

    group = "negative"
    result_class = NegativeResult

    def __init__(
        self,
        every_n_steps: int | None = None,
        smallest: int = 3,
        *,
        schedule: ScheduleLike | None = None,
        hessian: HessianLike = HessianConfig(),
        freeze_at: Sequence[int] | None = None,
        estimator: Estimator = "lanczos",
        online_schedule: ScheduleLike | None = None,
        descent: Descent | None = None,
        tol: float = 1e-2,
        save_dir: str | None = None,
        log_prefix: str | None = None,
    ) -> None:
        arguments = non_default(NegativeCurvatureTracker.__init__, locals())
        check_choice("estimator", estimator, Estimator)
        check_positive("tol", tol)
        check_int("smallest", smallest, least=int(estimator == "lanczos"))
        frozen_steps = checked_steps("freeze_at", [] if freeze_at is None else freeze_at)
        if frozen_steps and not smallest:
            raise ValueError("`smallest` should be a positive int where `freeze_at` is given, got 0.")
        if online_schedule is not None and estimator != "online":
            raise ValueError(f"`online_schedule` is of no use with `estimator={estimator!r}`. Use 'online'.")
        if (schedule is not None or every_n_steps is not None) and not smallest:
            raise ValueError("`every_n_steps` and `schedule` are of no use with `smallest=0`. Use `online_schedule`.")
        online = Schedule(every_n_steps=1)
        if online_schedule is not None:
            online = made_of(Schedule, "online_schedule", online_schedule)
        if descent is not None:
            descent = made_of(Descent, "descent", descent)
        # The moves of "online" come from its own products, so that the shared eigenpairs act on nothing.
        acts = descent is not None and estimator == "lanczos"
        super().__init__(
            every_n_steps,
            schedule,
            hessian,
            log_prefix,
            default=None if smallest else online,
            request=EigenRequest(1, smallest, tol, acts=acts) if smallest else None,
            save_dir=save_dir,
            arguments=arguments,
        )
        self._estimator = estimator
        self._smallest = smallest
        self._descent = descent
        self._freezing = ScheduleState(Schedule(at_steps=frozen_steps) if frozen_steps else None)
        self._running = self.schedule_state  # of the running estimate; without eigenpairs it is the only schedule
        if smallest:
            self._running = ScheduleState(online if estimator == "online" else None, self._recorder.say)
        # Which of three schedules asked for the present measurement, from `advance` to `measure`.
        self._solves = self._freezes = self._updates = False
        self._frozen = FrozenDirections()
        self._online = OnlineEigenpair(seed=self.config.seed)
        self._move: _Move | None = None

    @property
    @override
    def identity(self) -> dict[str, Any]:
        return {"estimator": self._estimator, "smallest": self._smallest, "descends": self._descent is not None}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._move = None
        self._freezing.start()
        # With `smallest=0` the two are one object, which the base class has started: a second start would forget the
        # checkpoint's steps.
        if self._running is not self.schedule_state:
            self._running.start()
        if self._descent is not None:
            check_movable(type(self).__name__, trainer.optimizers)

    @override
    def charts(self) -> Charts:
        return {
            "smallest eigenvalues": [r"negative/lambda_min_\d+$", "negative/online_lambda_min$"],
            "frozen directions": [r"negative/frozen_\d+_(top|bottom)$", "negative_details/lambda_max$"],
        }

    @override
    def figures(self) -> Figures:
        results: list[NegativeResult] = [result for result in self.results if result.lambda_min]
        if not results:
            return {}
        at = [result.step for result in results]
        lambda_min = torch.tensor([result.lambda_min for result in results], dtype=torch.float64)
        lambda_max = [result.lambda_max for result in results]
        figures: Figures = {"eigenvalues": partial(negative_figure, at, lambda_min, lambda_max)}
        steps = sorted({step for result in results for step in result.frozen})
        if not steps:
            return figures
        ends = torch.tensor([[result.lambda_max, result.lambda_min[0]] for result in results])
        top, bottom = (
            {step: torch.tensor([(r.step, r.frozen[step][end]) for r in results if step in r.frozen]) for step in steps}
            for end in (0, 1)
        )
        figures["frozen"] = partial(frozen_figure, at, ends, top, bottom)
        return figures

    @override
    def advance(self, trainer: Trainer, batch_idx: int) -> bool:
        # One after the other and not in one `or`, since each schedule has to see every batch.
        self._freezes = self._freezing.advance(trainer, batch_idx)
        self._updates = self._running.advance(trainer, batch_idx)
        self._solves = bool(self._smallest) and (super().advance(trainer, batch_idx) or self._freezes)
        return self._solves or self._updates

    @override
    def measure(self, hessian: LossHessian, step: Step) -> NegativeResult:
        moves = self._descent is not None and (self._updates or self._estimator == "lanczos")
        if moves:
            # Planned before measuring: the ranks make the move together, even if this one fails to measure.
            self._move = _Move(step.index)
        result = NegativeResult(step=step.index, epoch=step.epoch)
        if self._solves:
            result, pair = self._eigenpairs(hessian, step)
        if self._updates:
            pair = self._online.step(hessian)
            result = replace(
                result,
                online_lambda_min=pair.value,
                online_residual=pair.residual,
                online_age=pair.age,
                matvecs=result.matvecs + 1,
            )
        if self._descent is not None and moves:
            length = negative_curvature_step(
                # Only evaluated if the eigenvalue is negative beyond its residual.
                lambda: float(hessian.space.inner(hessian.gradient(), pair.vector)),
                pair.value,
                pair.residual,
                lr=self._descent.lr,
                max_step=self._descent.max_step,
            )
            self._move = _Move(step.index, length * pair.vector)
            result = replace(result, descent_step=length)
        return result

    @override
    def on_missing_data(self, step: Step) -> None:
        if self._freezes:
            self._recorder.warn_once(
                "not frozen",
                f"no directions are frozen at step {step.index}, since the fixed data are not complete yet.",
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._move is None or trainer.global_step == self._move.step:
            return  # the batch is one of several of a step
        move, self._move = self._move, None
        # After the optimizer's step, and in Lightning's first hook after it, so that a validation at the end of this
        # batch sees the parameters that the training continues with.
        moved = move_parameters(trainer, pl_module, move.displacement)
        if move.displacement is not None and not moved:
            self._recorder.warn_once(
                "not moved", f"the move after step {move.step} was not made, since another rank could not measure."
            )

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._move = None  # planned for a step that was not made, and out of date at the next one

    @override
    def _spend(self, seconds: float) -> None:
        # To the schedule that asked, since each bounds a share of the time of its own: an update of the running
        # estimate takes one product, a search tens.
        (self.schedule_state if self._solves else self._running).record(seconds)

    @override
    def _stateful(self) -> dict[str, Stateful]:
        own: dict[str, Stateful] = {"freezing": self._freezing, "frozen": self._frozen}
        if self._estimator == "online":
            own |= {"running": self._running, "online": self._online}
        return {**super()._stateful(), **own}

    def _eigenpairs(self, hessian: LossHessian, step: Step) -> tuple[NegativeResult, OnlineEstimate]:
        """Both ends of the spectrum, the frozen directions, and the smallest eigenpair."""
        pairs = self.shared.eigenpairs(step, self)
        gradient = hessian.gradient()
        if self._freezes:
            self._frozen.freeze(step.index, pairs)
        with watched(hessian, step.trainer, type(self).__name__) as operator:
            frozen = self._frozen.curvatures(operator)
        result = NegativeResult(
            step=step.index,
            epoch=step.epoch,
            lambda_min=tuple(pairs.smallest.tolist()),
            lambda_max=float(pairs.largest),
            negative_mass=pairs.negative_mass,
            # The first pair is the one of the upper end. Signs of eigenvectors are arbitrary.
            gradient_components=tuple(hessian.space.inner(pairs.vectors[1:], gradient).abs().tolist()),
            gradient_norm=float(hessian.space.norm(gradient)),
            residual=float(pairs.residuals.max()),
            converged=float(pairs.converged.double().mean()),
            frozen=frozen,
            matvecs=pairs.num_matvecs + 2 * len(frozen),
        )
        # Row 0 is the largest pair, row 1 the most negative one. Its own residual decides on a move, and not the
        # largest of all pairs.
        return result, OnlineEstimate(result.lambda_min[0], float(pairs.residuals[1]), pairs.vectors[1], age=0)


@dataclass(frozen=True)
class _Move:
    """A move of the parameters that is to follow an optimizer step; without a displacement if measuring it failed."""

    step: int
    displacement: Tensor | None = None
