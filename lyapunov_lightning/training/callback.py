"""What every callback of this package does alike: measure when it is due, log, share, resume."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor
from typing_extensions import override

from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.curvature.loss.products import Method
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.curvature.sharded.sharding import ShardedSpace
from lyapunov_lightning.curvature.vectors.space import VectorSpace
from lyapunov_lightning.training.checks import check_objective, check_parameters, check_size
from lyapunov_lightning.training.config import Data, HessianConfig
from lyapunov_lightning.training.data.batches import StartPosition
from lyapunov_lightning.training.distributed import failing_together, ranks_of
from lyapunov_lightning.training.fsdp import put_away, space_of_parameters
from lyapunov_lightning.training.lightning_names import Callback, MisconfigurationException
from lyapunov_lightning.training.replica.replica import trainable_parameters
from lyapunov_lightning.training.reporting.recording import Charts, Record, Recorder, show_charts
from lyapunov_lightning.training.reporting.series import SeriesFile
from lyapunov_lightning.training.results import Result, Results
from lyapunov_lightning.training.schedule import Schedule, ScheduleState
from lyapunov_lightning.training.sharded.vector_states import (
    converted_vectors,
    cut_vectors,
    gathered_vectors,
    without_vectors,
)
from lyapunov_lightning.training.sharing import EigenRequest, SearchStart, SharedMeasurements, Step

if TYPE_CHECKING:
    from lyapunov_lightning.figures import Picture

Figures = dict[str, "Callable[[], Picture]"]
"""What draws each of a callback's figures, by name."""

_FRACTION = 0.05
"""Share of an epoch's batches that fixed data are, where nobody says how many."""


class Stateful(Protocol):
    """A part of a callback that goes on where it was in a resumed run.

    Vectors of the model's size stand in its state under one of the names `VECTORS`: they are gathered for a checkpoint
    where the model is sharded.
    """

    def state_dict(self) -> dict[str, Any]:
        """What is kept: tensors, numbers, strings, None, and lists and dictionaries of these."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a `state_dict`."""


class CurvatureCallback(Callback):
    """A callback that measures the curvature.

    A subclass says what it measures in `measure`, and what it acts on in further hooks.

    Args:
        every_n_steps: Measure at the first opportunity after every n optimizer steps.
        schedule: Any other schedule.
        hessian: Which Hessian.
        log_prefix: Put in front of every tag.
        data: On which data the callback measures if `hessian` does not say so.
        method: How products are computed where the callback leaves no choice.
        default: The schedule where none is given; that of ``trainer.log_every_n_steps`` if None.
        request: The eigenpairs that it wants.
        table: The file that keeps all that is logged, if there is to be one.
        arguments: What the callback was made with, for its `repr`, see `non_default`.

    Raises:
        ValueError: If both `every_n_steps` and `schedule` are given, or one of the values is of another type.

    """

    group: ClassVar[str]
    """The group of the callback's tags."""

    result_class: ClassVar[type[Result]]
    """What `measure` returns."""

    def __init__(
        self,
        every_n_steps: int | None,
        schedule: Schedule | None,
        hessian: HessianConfig,
        log_prefix: str | None,
        *,
        data: Data = "fixed",
        method: Method | None = None,
        default: Schedule | None = None,
        request: EigenRequest | None = None,
        table: str | Path | None = None,
        arguments: Mapping[str, Any],
    ) -> None:
        super().__init__()
        if not isinstance(hessian, HessianConfig):
            raise ValueError(f"`hessian` should be a HessianConfig, got {hessian!r}.")
        if schedule is not None and not isinstance(schedule, Schedule):
            raise ValueError(f"`schedule` should be a Schedule, got {schedule!r}.")
        if every_n_steps is not None:
            if schedule is not None:
                raise ValueError("`every_n_steps` is a schedule of its own, so `schedule` should be None beside it.")
            schedule = Schedule(every_n_steps=every_n_steps)
        self.config = hessian.filled(data=data, fraction=_FRACTION, mode="train", method=method)
        self._arguments = dict(arguments)
        self.request = request
        self.data_position = StartPosition()
        self._start = SearchStart()
        self.schedule = schedule if schedule is not None else default
        self.schedule_state = ScheduleState(self.schedule)
        self._results = Results(self.result_class)
        self._is_to_be_drawn = False
        self._log_prefix = log_prefix
        self._recorder = Recorder(
            type(self).__name__, self.group, log_prefix, None if table is None else SeriesFile(table)
        )
        self._shared: SharedMeasurements | None = None
        self._space: VectorSpace | None = None
        self._is_restored = False

    @property
    def results(self) -> list[Any]:
        """What was measured so far, a frozen result for each measurement; of a very long run for every second one."""
        return self._results.items

    @property
    def shared(self) -> SharedMeasurements:
        """What the callbacks of the trainer share, from ``on_train_start`` on."""
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
            What was found; None if there is nothing to log now.

        """
        raise NotImplementedError

    def plot(self, name: str | None = None) -> "Picture":
        """Draw what was measured so far.

        Args:
            name: Which of the callback's figures, for a callback that has several; the first one if None.

        Returns:
            A matplotlib Figure. ``.save("picture")`` writes it as PNG and SVG; a notebook shows it.

        Raises:
            MeasurementError: If nothing was measured yet that could be drawn.
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
        return figures[name]()

    def charts(self) -> Charts:
        """The curves that belong on one chart, for TensorBoard's custom scalars."""
        return {}

    def figures(self) -> "Figures":
        """What draws the figures of the results so far, by name, the most telling one first.

        They are shown at the end of an epoch in which something was measured, as far as that takes little of the time,
        and at the end of the training.

        """
        return {}

    def advance(self, trainer: Any, batch_idx: int) -> bool:
        """Pass on to the present batch; returns whether to measure before it. Called once a batch."""
        return self.schedule_state.advance(trainer, batch_idx)

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            check_objective(type(self).__name__, trainer, pl_module, self.config)
        elif not self.results:  # after a training there is nothing to wonder about
            self._recorder.warn_once(
                "not fit",
                f"it measures while `trainer.fit` trains, and nothing during `trainer.{trainer.state.fn.value}`. The"
                " curvature of a module as it is, or of a checkpoint, is measured by"
                " `lyapunov_lightning.measure(module, data)`.",
            )

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        owner = type(self).__name__
        put_away(pl_module)
        check_objective(owner, trainer, pl_module, self.config)  # again: Lightning may have converted layers since
        check_parameters(owner, pl_module, self.config)
        self._space = space_of_parameters(list(trainable_parameters(pl_module).values()), ranks_of(trainer))
        if self._is_restored and isinstance(self._space, ShardedSpace):
            self._convert(
                partial(converted_vectors, length=self._space.size, convert=partial(cut_vectors, self._space))
            )
        self._is_restored = False
        if self.request is not None:
            check_size(owner, pl_module, self.request.largest + self.request.smallest)
        peers = [callback for callback in trainer.callbacks if isinstance(callback, CurvatureCallback)]
        self._shared = SharedMeasurements(peers) if peers[0] is self else peers[0].shared
        note = self.shared.start(trainer, self, owner)
        if note is not None:
            self._recorder.warn_once("data", note)
        if self.schedule is None:
            self._follow_the_logging(trainer)
        self.schedule_state.start()
        self._recorder.start(trainer, is_first=peers[0] is self)
        if peers[0] is self:
            show_charts(trainer, [(peer.group, peer._recorder.charts(peer.charts())) for peer in peers])

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = self.shared.step(trainer, pl_module, batch, batch_idx)
        if self not in step.due:
            return
        # A failure ends the measurement, on all ranks, and not the run.
        with self._recorder.measurement(trainer) as record, failing_together(trainer):
            self._fit_vectors(trainer, pl_module)
            hessian = self.shared.hessian(step, self.config)
            self._say(self.shared.take_note())
            if hessian is None:
                self.on_missing_data(step)
            else:
                record.result = self.measure(hessian, step)
        self.shared.release(self)
        self._keep(trainer, record)

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._is_to_be_drawn and self._recorder.may_draw(trainer):
            self._draw(trainer)

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.conclude(trainer)

    @override
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._shared is not None:  # a run was under way, and what it has measured is all the more of interest
            self.conclude(trainer)
        self._shared = None

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._shared = None  # it holds the fixed data and the other callbacks

    def conclude(self, trainer: Any) -> None:
        """Show what was measured, at the end of a run or where it breaks off; without the other ranks."""
        if self._is_to_be_drawn:
            self._draw(trainer)
        self._recorder.tell_where()

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
        state: dict[str, Any] = {name: part.state_dict() for name, part in self._stateful().items()}
        if isinstance(self._space, ShardedSpace):
            state = converted_vectors(state, self._space.length, partial(gathered_vectors, self._space))
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, part in self._stateful().items():
            part.load_state_dict(state_dict[name])
        self._is_restored = True

    def _convert(self, converted: Callable[[Any], Any]) -> None:
        """Let the parts go on with other vectors."""
        for part in self._stateful().values():
            state = part.state_dict()
            own = converted(state)
            if own is not state:
                part.load_state_dict(own)

    def _fit_vectors(self, trainer: Any, pl_module: Any) -> None:
        """Give up all vectors of a sharded model whose parameters are others than before: all ranks together."""
        if isinstance(self._space, ShardedSpace):
            put_away(pl_module)
            space = space_of_parameters(list(trainable_parameters(pl_module).values()), ranks_of(trainer))
            if not space.is_like(self._space):
                self._convert(without_vectors)
            self._space = space

    def on_missing_data(self, step: Step) -> None:
        """A measurement was due, and the fixed data are not complete yet."""

    def _stateful(self) -> dict[str, Stateful]:
        """The parts that go on where they were in a resumed run."""
        return {"schedule": self.schedule_state, "results": self._results, "data": self.data_position}

    def _keep(self, trainer: Any, record: Record) -> None:
        """Keep what became of a measurement, and count what it cost; on all ranks together."""
        if record.result is not None:
            self._results.add(record.result)
            self._is_to_be_drawn = True
        self._spend(record.seconds)

    def _spend(self, seconds: float) -> None:
        """Take note of what a measurement took."""
        self._say(self.schedule_state.record(seconds))

    def _say(self, note: str | None) -> None:
        if note is not None:
            self._recorder.say(note)

    def _draw(self, trainer: Any) -> None:
        """Show the figures of the results so far."""
        self._is_to_be_drawn = False
        self._recorder.draw(trainer, self.figures)

    def _follow_the_logging(self, trainer: Any) -> None:
        """Measure when Lightning logs, where the user did not say when."""
        every = trainer.log_every_n_steps
        if every:
            self.schedule_state.follow(Schedule(every_n_steps=every))
        else:
            self._recorder.warn_once(
                "no interval",
                "the Trainer logs nothing (`log_every_n_steps=0`), so nothing is measured either. Pass `every_n_steps`"
                " to measure all the same.",
            )

    def _check_alone(self, trainer: Any, reason: str) -> None:
        """Refuse a second callback of the same class, for the hook ``setup`` of one that acts.

        Raises:
            MisconfigurationException: With the reason.

        """
        count = sum(isinstance(callback, type(self)) for callback in trainer.callbacks)
        if count > 1:
            raise MisconfigurationException(
                f"A Trainer can have one `{type(self).__name__}`, got {count}: {reason}. Remove all but one."
            )


def non_default(function: Callable[..., None], values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that are not the function's defaults.

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
