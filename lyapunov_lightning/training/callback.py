"""What all callbacks of this package have in common: they measure when it is due, log, share and resume."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, overload

from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.curvature.arguments import made_of
from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.curvature.loss.products import Method
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian, fault_of
from lyapunov_lightning.curvature.vectors.space import VectorSpace
from lyapunov_lightning.training.agreement import Description, announce, check_agreement, described, withdraw
from lyapunov_lightning.training.checks import (
    check_files,
    check_objective,
    check_parameters,
    check_precision,
    check_size,
)
from lyapunov_lightning.training.config import Data, HessianConfig, HessianLike, ScheduleLike
from lyapunov_lightning.training.data.batches import StartPosition
from lyapunov_lightning.training.distributed import failing_together, ranks_of
from lyapunov_lightning.training.fsdp import put_away
from lyapunov_lightning.training.lightning_names import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    callbacks_of,
    log_interval,
)
from lyapunov_lightning.training.reporting.files import RunFiles
from lyapunov_lightning.training.reporting.recording import Charts, Record, Recorder
from lyapunov_lightning.training.reporting.series import SeriesFile
from lyapunov_lightning.training.results import Result, ResultList, Results
from lyapunov_lightning.training.schedule import Schedule, ScheduleState
from lyapunov_lightning.training.sharded.vector_states import (
    VERSION,
    cut_states,
    fitting_space,
    gathered_state,
    restore,
)
from lyapunov_lightning.training.sharded.vector_states import Stateful as Stateful
from lyapunov_lightning.training.sharing import EigenRequest, SearchStart, SharedMeasurements, Step

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lyapunov_lightning.figures import Picture

Figures = dict[str, "Callable[[], Picture]"]
"""Functions that draw a callback's figures, by the name of the figure."""

_FIXED_FRACTION = 0.05
"""Share of an epoch's batches that make the fixed data, where the user does not say how many."""


class CurvatureCallback(Callback):
    """A callback that measures the curvature of the training loss.

    A subclass measures in `measure`, and acts on the training in further hooks.

    Args:
        every_n_steps: Measure at the first opportunity after every n optimizer steps.
        schedule: Any other schedule, or a mapping of its fields.
        hessian: Which Hessian, or a mapping of its fields.
        log_prefix: Put in front of every tag.
        data: On which data the callback measures, where `hessian` leaves this open.
        method: How products are computed, for a callback that leaves no choice.
        default: The schedule if none is given; None follows ``trainer.log_every_n_steps``.
        request: The eigenpairs that the callback wants.
        save_dir: The folder of a table, ``{group}.csv``, that gets everything that is logged, if given.
        files: Further files that the callback writes.
        arguments: The arguments that the callback was made with, for its `repr`, see `non_default`.

    Raises:
        ValueError: If both `every_n_steps` and `schedule` are given, or one of the values is of another type.

    """

    group: ClassVar[str]
    """The group of the callback's tags."""

    result_class: ClassVar[type[Result]]
    """What `measure` returns."""

    measures_whole_step: bool = False
    """Whether a step that accumulates the gradients of several batches is measured before the last of them, when all
    are known, and not before the first."""

    moves_in_measurement: bool = False
    """Whether a measurement needs the loss at nearby parameters, however products are computed."""

    def __init__(
        self,
        every_n_steps: int | None,
        schedule: ScheduleLike | None,
        hessian: HessianLike,
        log_prefix: str | None,
        *,
        data: Data = "fixed",
        method: Method | None = None,
        default: Schedule | None = None,
        request: EigenRequest | None = None,
        save_dir: str | Path | None = None,
        files: Sequence[RunFiles] = (),
        arguments: Mapping[str, Any],
    ) -> None:
        super().__init__()
        hessian = made_of(HessianConfig, "hessian", hessian)
        if schedule is not None:
            schedule = made_of(Schedule, "schedule", schedule)
        if every_n_steps is not None:
            if schedule is not None:
                raise ValueError("`every_n_steps` is itself a schedule, so `schedule` should be None.")
            schedule = Schedule(every_n_steps=every_n_steps)
        # Filled in once, here: callbacks share an operator where their configurations are equal, and one that left
        # `data` open would not be equal to one that names its default.
        self.config = hessian.filled(data=data, fraction=_FIXED_FRACTION, mode="train", method=method)
        self._to_exact_products: str | None = None
        if not self.moves_in_measurement:
            chosen = ["`estimator='lanczos'`"] if method is not None else []
            asked = ["`method='auto'`"] if hessian.method == "finite_difference" else []
            self._to_exact_products = f"measure with exact products: {' and '.join(chosen + asked)}"
        self._arguments = dict(arguments)
        self.request = request
        self.data_position = StartPosition()
        self._start = SearchStart()
        table = None if save_dir is None else SeriesFile(Path(save_dir) / f"{self.group}.csv")
        self._recorder = Recorder(type(self).__name__, self.group, log_prefix, table, files)
        self.schedule = schedule if schedule is not None else default
        self.schedule_state = ScheduleState(self.schedule, self._recorder.say)
        self._results = Results(self.result_class)
        self._has_new_results = False
        self._log_prefix = log_prefix
        # Made in `on_train_start`, where parameters, optimizers and shards are what is trained. A checkpoint is
        # restored earlier: before `on_fit_start`, under a sharded strategy after it.
        self._shared: SharedMeasurements | None = None
        self._space: VectorSpace | None = None
        self._is_restored = False
        self._is_examined = False
        self._is_set_up = False
        self._wrong: list[str] = []

    @property
    @override
    def state_key(self) -> str:
        # Lightning refuses equal keys when the Trainer is made, with an error that does not know the remedy. Until
        # `setup`, which does, and before which no state is saved or restored, no two are equal.
        return self._key if self._is_set_up else f"{self._key} {id(self)}"

    @property
    def _key(self) -> str:
        return self._generate_state_key(**self.identity, log_prefix=self._log_prefix)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells the callback from others of its class in a checkpoint, besides its prefix."""
        return {}

    @property
    def results(self) -> ResultList[Any]:
        """What was measured so far: one frozen result for each measurement, in very long runs for every second one.

        ``results.to_pandas()`` is a table of them.

        """
        return self._results.items

    @property
    def shared(self) -> SharedMeasurements:
        """What all callbacks of the trainer share, from ``on_train_start`` on."""
        assert self._shared is not None
        return self._shared

    @property
    def search_start(self) -> Tensor | None:
        """Where the search for the eigenpairs starts."""
        return self._start.vector

    def measure(self, hessian: LossHessian, step: Step) -> Result | None:
        """Measure before a step.

        Args:
            hessian: The Hessian at the parameters before the step.
            step: The step.

        Returns:
            The result; None if there is nothing to log at this step.

        """
        raise NotImplementedError

    @overload
    def plot(self, name: str | None = None, *, ax: None = None) -> "Picture": ...

    @overload
    def plot(self, name: str | None = None, *, ax: "Axes") -> "Axes": ...

    def plot(self, name: str | None = None, *, ax: "Axes | None" = None) -> "Picture | Axes":
        """Draw what was measured so far.

        Args:
            name: Which of the callback's figures, for a callback that has several; the first one if None.
            ax: Axes of Matplotlib on which to draw the first panel of the figure alone; a new figure if None.

        Returns:
            A matplotlib Figure. ``.save("picture")`` writes it as PNG and SVG; a notebook shows it. With `ax` these.

        Raises:
            MeasurementError: If nothing that could be drawn was measured yet.
            ValueError: If there is no such figure.

        """
        owner = type(self).__name__
        figures = self.figures() if self.results else {}
        if not figures:
            raise MeasurementError(
                f"`{owner}` has measured nothing yet that could be drawn. Fit a module with it first."
            )
        name = next(iter(figures)) if name is None else name
        if name not in figures:
            raise ValueError(f"`name` should be one of {', '.join(figures)}, got {name!r}.")
        if ax is None:
            return figures[name]()
        from lyapunov_lightning.figures import drawn_on

        with drawn_on(ax):
            figures[name]()
        return ax

    def charts(self) -> Charts:
        """The curves that belong on one chart, for TensorBoard's custom scalars."""
        return {}

    def figures(self) -> "Figures":
        """The functions that draw the results so far, by name, the most informative figure first.

        The figures are shown at the end of the training, and at the end of each epoch in which something was measured,
        as long as drawing takes little of the time.

        """
        return {}

    def advance(self, trainer: Trainer, batch_idx: int) -> bool:
        """Move on to the present batch, once for each batch; returns whether to measure before it."""
        return self.schedule_state.advance(trainer, batch_idx)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Here as well as in `on_train_start`: what is wrong with the strategy is then said before it moves, wraps or
        # shards the model.
        self._is_set_up = True
        peers = _peers(trainer)
        twin = next((peer for peer in peers if peer is not self and peer._key == self._key), None)
        if twin is not None:
            name = type(self).__name__
            raise MisconfigurationException(
                f"Two `{name}` of this Trainer would log under the same tags and share one state in checkpoints. Give"
                f" one of them a `log_prefix` of its own, such as `{name}(log_prefix='second')`."
            )
        if stage == "fit":
            check_objective(type(self).__name__, trainer, pl_module, self.config)
            check_files({id(peer): (type(peer).__name__, peer._recorder.files) for peer in peers}.values())
            if peers[0] is self:
                announce(trainer, [peer._description(trainer) for peer in peers])
        elif not self.results:  # no warning for a test that follows a training
            running = trainer.state.fn
            assert running is not None  # within `setup`
            self._recorder.warn_once(
                "not fit",
                f"it measures while `trainer.fit` trains, and nothing during `trainer.{running.value}`. The"
                " curvature of a module as it is, or of a checkpoint, is measured by"
                " `lyapunov_lightning.measure(module, data)`.",
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _peers(trainer)[0] is self:
            check_agreement(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        owner = type(self).__name__
        put_away(pl_module)
        # A second time after `setup`: since then the strategy has set the module up, and `sync_batchnorm=True` has put
        # layers into it that cannot be differentiated twice.
        check_objective(owner, trainer, pl_module, self.config)
        check_parameters(owner, pl_module)
        if self.moves_in_measurement or self.config.method == "finite_difference":
            check_precision(owner, pl_module, self._to_exact_products)
        self._space = fitting_space(pl_module, ranks_of(trainer), None, ())
        if self._is_restored:
            untyped: Any = trainer
            # Not in `load_state_dict`, which Lightning may call before the strategy has cut the parameters: how a whole
            # vector is to be cut is not known until then.
            cut_states(self._stateful().values(), self._space)
            if self._wrong:  # said here, where the name of the file is known
                self._recorder.warn_once(
                    "broken state",
                    f"its state in the checkpoint {untyped.ckpt_path or ''} is not whole: {'; '.join(self._wrong)}."
                    " What is broken begins anew, and training goes on. Resume with the version of the package that"
                    " wrote it, or from another checkpoint, if what was measured before is to be continued.",
                )
        self._is_restored, self._wrong = False, []
        self._is_examined = False
        if self.request is not None:
            check_size(owner, pl_module, self.request.largest + self.request.smallest)
        # The first callback of the trainer makes what all share; the others find it there, since hooks run in their
        # order.
        peers = _peers(trainer)
        self._shared = SharedMeasurements(peers) if peers[0] is self else peers[0].shared
        note = self.shared.start(trainer, self, owner)
        if note is not None:
            self._recorder.warn_once("data", note)
        if self.schedule is None:
            self._follow_the_logging(trainer)
        self.schedule_state.start()
        self._recorder.start(trainer, is_first=peers[0] is self)
        if peers[0] is self:
            self._recorder.show_charts(trainer, [(peer.group, peer._recorder.charts(peer.charts())) for peer in peers])

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # At every batch, due or not: schedules count batches, and the fixed data may be those that pass.
        step = self.shared.step(trainer, pl_module, batch, batch_idx)
        if self not in step.due:
            return
        # A failure ends the measurement, on all ranks, and not the run.
        with self._recorder.measurement(trainer, step.index) as record, failing_together(trainer):
            # Before anything else: the vectors that searches start from may be of other parameters.
            self._space = fitting_space(pl_module, ranks_of(trainer), self._space, self._stateful().values())
            record.result = self._measured(step)
        self.shared.release(self)  # after a failure too, or its graphs would stay through the step
        self._keep(trainer, record)

    def _measured(self, step: Step) -> Any:
        """The result; by itself, since the operator has to be gone when the measurement is released."""
        hessian = self.shared.hessian(step, self.config, self._recorder.say)
        if hessian is None:
            return self.on_missing_data(step)
        result = self.measure(hessian, step)
        self._examine(hessian, result)
        return result

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not after each measurement: a figure takes half a second, most of it the layout, where a probe of a small
        # network takes milliseconds.
        if self._has_new_results and self._recorder.may_draw(trainer):
            self._draw(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.conclude(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # After an exception, Ctrl+C included, Lightning calls neither `on_train_end` nor `teardown`: what these do is
        # done here.
        if self._shared is not None:  # the training broke off, and its last measurements may show why
            self.conclude(trainer)
        self._withdraw(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._withdraw(trainer)

    def conclude(self, trainer: Trainer) -> None:
        """Show what was measured, at the end of a run or where it breaks off.

        Each rank is by itself here: where a run breaks off, the others may not be there any more.

        """
        if self._has_new_results:
            self._draw(trainer)
        self._recorder.conclude(trainer)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self._arguments.items())
        count = len(self.results)
        measured = (
            f"{count} measurement{'s' * (count > 1)} up to step {self.results[-1].step}"
            if count
            else "nothing measured yet"
        )
        return f"{type(self).__name__}({arguments}): {measured}"

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows."""
        return self.plot()._repr_png_() if self.results and self.figures() else None

    @override
    def state_dict(self) -> dict[str, Any]:
        # Lightning asks every rank for its state, although the first alone writes it: so the parts of vectors can be
        # gathered here.
        parts = {name: part.state_dict() for name, part in self._stateful().items()}
        return {"version": VERSION, **gathered_state(parts, self._space)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._wrong = restore(self._stateful(), state_dict)
        # The vectors are on the CPU, and whole, until `on_train_start` knows the device and the parts.
        self._is_restored = True

    def _examine(self, hessian: LossHessian, result: Result | None) -> None:
        """Name what is wrong with the products, where a measurement that takes them has not converged; once a run."""
        if result is None or result.has_converged or self._is_examined:
            return
        self._is_examined = True
        fault = fault_of(hessian, seed=self.config.seed)
        if fault is not None:
            self._recorder.warn_once("products", f"the measurement at step {result.step} has not converged. {fault}")

    def on_missing_data(self, step: Step) -> None:
        """Called in place of `measure` while the fixed data are not complete yet."""

    def _stateful(self) -> dict[str, Stateful]:
        """The parts that continue where they were in a resumed run, by their names in the checkpoint."""
        return {"schedule": self.schedule_state, "results": self._results, "data": self.data_position}

    def _withdraw(self, trainer: Trainer) -> None:
        self._shared = None  # frees the fixed data
        if _peers(trainer)[0] is self:
            withdraw(trainer)

    def _description(self, trainer: Trainer) -> Description:
        """What has to be the same on all ranks."""
        told = described(self, self._arguments)
        return told if self.schedule is not None else {**told, "log_every_n_steps": str(log_interval(trainer))}

    def _keep(self, trainer: Trainer, record: Record) -> None:
        """Keep the result of a measurement, and count its time; on all ranks together."""
        if record.has_failed:
            self._start.vector = None  # where the search began may be what let it fail
        if record.result is not None:
            self._results.add(record.result)
            self._has_new_results = True
        self._spend(record.seconds)

    def _spend(self, seconds: float) -> None:
        """Count the time of a measurement."""
        self.schedule_state.record(seconds)

    def _draw(self, trainer: Trainer) -> None:
        """Show the figures of the results so far."""
        self._has_new_results = not self._recorder.draw(trainer, self.figures)

    def _follow_the_logging(self, trainer: Trainer) -> None:
        """Measure when Lightning logs, if the user did not say when to measure."""
        every = log_interval(trainer)
        if every:
            self.schedule_state.follow(Schedule(every_n_steps=every))
        else:
            self._recorder.warn_once(
                "no interval",
                "the Trainer logs nothing (`log_every_n_steps=0`), so nothing is measured either. Pass `every_n_steps`"
                " to measure all the same.",
            )

    def _check_alone(self, trainer: Trainer, reason: str) -> None:
        """Refuse a second callback of the same class, for the hook ``setup`` of a callback that acts.

        Raises:
            MisconfigurationException: With the reason.

        """
        count = sum(isinstance(callback, type(self)) for callback in callbacks_of(trainer))
        if count > 1:
            raise MisconfigurationException(
                f"A Trainer can have one `{type(self).__name__}`, got {count}: {reason}. Remove all but one."
            )


def _peers(trainer: Trainer) -> list[CurvatureCallback]:
    """The callbacks of this package, in the order of their hooks."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, CurvatureCallback)]


def non_default(function: Callable[..., None], values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that differ from the function's defaults.

    Args:
        function: The function.
        values: Its local variables at its beginning.

    Example::

        >>> def measure(every: int = 10, end: str = "largest") -> None:
        ...     print(non_default(measure, locals()))
        >>> measure(end="both")
        {'end': 'both'}

    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    return {name: values[name] for name, default in defaults.items() if name != "self" and values[name] != default}
