"""One measurement for all callbacks that ask for the same one.

The callbacks of a trainer share one `SharedMeasurements`. At each batch it asks all of them whether they are due. Those
that are due and have equal configurations get one operator, and its eigenpairs are computed once, for the largest
request. An operator is dropped when the last of them is done, before the step itself begins: its kept graphs would
otherwise take their memory from the training.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.curvature.solvers.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.solvers.lanczos import BASIS_BYTES, lanczos, least_basis_vectors
from lyapunov_lightning.curvature.vectors.space import VectorSpace
from lyapunov_lightning.training.config import HessianConfig
from lyapunov_lightning.training.data.batches import ProbeData, StartPosition
from lyapunov_lightning.training.distributed import failing_together
from lyapunov_lightning.training.lightning_names import LightningModule, Trainer, is_accumulating
from lyapunov_lightning.training.operators import Operators
from lyapunov_lightning.training.replica.copier import Copier
from lyapunov_lightning.training.replica.elsewhere import Elsewhere
from lyapunov_lightning.training.replica.objective import ProbeBatch, Problem
from lyapunov_lightning.training.reporting.progress import watched
from lyapunov_lightning.training.reporting.telling import described

_OFFLOADED_BASIS_BYTES = 2**34
"""Bound on a Krylov basis of the default size in the CPU's memory: 33 float32 vectors of a model of 130 million
parameters."""

_ONE_VALUE_BASIS = 8
"""The Krylov basis for one largest eigenvalue beside a training. In 300 steps of an MLP and 100 of a transformer with
AdamW, measured at every tenth, it took 2 and 3 % more products than one of 32, and on 17 made-up spectra 3 % in the
geometric mean and 10 % at worst."""

_SMALL_VECTOR_BYTES = 2**20
"""Vectors up to this size are no burden: 33 of them are 33 MiB."""


@dataclass(frozen=True)
class EigenRequest:
    """The eigenpairs that a callback wants of the Hessian.

    Attributes:
        largest: How many of the upper end.
        smallest: How many of the lower end.
        tol: Relative tolerance of the residuals, or of the errors of the eigenvalues.
        max_basis_vectors: Bound on the Krylov basis, as for `lanczos`.
        acts: Whether the training depends on them. They are then computed on their own and not together with other
            requests: a larger request changes the last digits of all eigenpairs, so that a second callback that only
            reads would change the training.
        values_only: Whether the tolerance is that of the eigenvalues, for which `lanczos` takes fewer products.

    """

    largest: int
    smallest: int
    tol: float
    max_basis_vectors: int | None = None
    acts: bool = False
    values_only: bool = False


class SearchStart:
    """Where the next search for eigenpairs starts.

    Attributes:
        vector: Shape ``(n,)``, such as `Eigenpairs.start`; None before the first measurement.

    """

    def __init__(self) -> None:
        self.vector: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """The vector, on the CPU."""
        return {"vector": None if self.vector is None else self.vector.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.vector = state["vector"]


class Participant(Protocol):
    """A callback that takes part in shared measurements."""

    config: HessianConfig
    request: EigenRequest | None
    data_position: StartPosition
    measures_whole_step: bool

    @property
    def search_start(self) -> Tensor | None:
        """Where the search for the eigenpairs starts."""

    def advance(self, trainer: Trainer, batch_idx: int) -> bool:
        """Move on to the present batch, once for each batch; returns whether to measure before it."""


@dataclass(frozen=True, eq=False)
class Step:
    """A batch that is about to be trained on.

    Attributes:
        trainer: The trainer.
        pl_module: The module.
        batch: The batch, on the device.
        batch_idx: Its index in the epoch.
        due: The callbacks that measure before it.
        earlier: The batches before it whose gradients are accumulated for the same optimizer step, if a callback that
            is due measures them too.
        lost: Why one of these could not be kept.
        index: The number of optimizer steps before it. At the end of the batch `trainer.global_step` is one higher.

    """

    trainer: Trainer
    pl_module: LightningModule
    batch: Any
    batch_idx: int
    due: Sequence[Participant] = ()
    earlier: Sequence[ProbeBatch] = ()
    lost: Exception | None = None
    index: int = field(init=False)

    def __post_init__(self) -> None:
        # Kept, and not read from the trainer later: a measurement that ends after the optimizer's step would be logged
        # one step late.
        object.__setattr__(self, "index", int(self.trainer.global_step))

    @cached_property
    def own_batches(self) -> list[ProbeBatch]:
        """The step's own data: its batch, and the accumulated ones before it.

        Raises:
            MeasurementError: If one of those could not be copied.

        """
        if self.lost is not None:
            raise MeasurementError(f"A training batch cannot be copied, and so not be kept: {self.lost}")
        # Copied, since some measurements end after the step (the slope along the update that was taken), and the step
        # may write to its batch: `batch[0].sub_(mean)`.
        return [*self.earlier, ProbeBatch(Copier()(self.batch), self.batch_idx, True)]

    @property
    def epoch(self) -> float:
        """The number of epochs so far, with the fraction of the present one that has passed."""
        return float(self.trainer.current_epoch + self.batch_idx / self.trainer.num_training_batches)


@dataclass(eq=False)
class _Shared:
    """The operator of one configuration at one step, and its eigenpairs once a callback has asked for them."""

    operator: LossHessian
    waiting: list[Participant]
    wanted: list[tuple[EigenRequest, Tensor | None]]
    pairs: Eigenpairs | None = None
    failure: str | None = field(default=None)


class SharedMeasurements:
    """What the callbacks of one trainer share.

    Args:
        callbacks: The callbacks of this package, in the trainer's order.

    """

    def __init__(self, callbacks: Sequence[Participant]) -> None:
        self.callbacks = callbacks
        self._data: dict[HessianConfig, ProbeData] = {}
        self._operators = Operators()
        self._elsewhere = Elsewhere()
        self._shared: dict[HessianConfig, _Shared] = {}
        self._step: Step | None = None
        self._key: Any = None
        self._accumulated = _AccumulatedStep()

    def start(self, trainer: Trainer, callback: Participant, owner: str) -> str | None:
        """Prepare the data of a callback, for the hook ``on_train_start``.

        Returns:
            A sentence for the user on which data are measured, if these are not what was asked for.

        Raises:
            MisconfigurationException: If there is no way to the data.

        """
        if callback.config in self._data:
            return None
        data = ProbeData(callback.config)
        note = data.start(owner, trainer, callback.data_position)
        self._data[callback.config] = data
        return note

    def step(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> Step:
        """The step that begins; the same object for all callbacks."""
        # The identity of the batch alone would not do: one that was freed gives its address to a later one.
        key = (id(batch), trainer.current_epoch, batch_idx, trainer.global_step)
        if self._step is None or key != self._key:
            # A callback that failed before it asked for its operator has not released it and still counts as waiting:
            # without this, the next step would be measured with the operator of this one, at parameters of before the
            # update.
            self._shared.clear()
            # Here, where only the first callback of a batch comes by: with two equal configurations every batch would
            # be kept twice.
            for data in self._data.values():
                data.observe(batch, batch_idx)
            due = [callback for callback in self.callbacks if callback.advance(trainer, batch_idx)]
            due = self._accumulated.begin(trainer, due)
            accumulated = self._accumulated
            self._step = Step(trainer, pl_module, batch, batch_idx, due, accumulated.batches, accumulated.failure)
            self._key = key
            accumulated.keep(self._step)
        return self._step

    def hessian(
        self, step: Step, config: HessianConfig, say: Callable[[str], None] | None = None
    ) -> LossHessian | None:
        """The Hessian at the present parameters; None while the fixed data are not complete.

        Args:
            step: The present step.
            config: Which Hessian.
            say: Gets a sentence for the user on how products are computed, the first time that there is one.

        """
        shared = self._shared.get(config)
        if shared is None:
            operator = self.block(step, config, say=say)
            if operator is None:
                return None
            # All requests of the step, before the first one is served: the search has to be for the largest of them, or
            # the next callback would pay for one of its own.
            sharing = [callback for callback in step.due if callback.config == config]
            wanted = [(c.request, c.search_start) for c in sharing if c.request is not None and not c.request.acts]
            shared = self._shared[config] = _Shared(operator, sharing, wanted)
        return shared.operator

    def block(
        self,
        step: Step,
        config: HessianConfig,
        names: Collection[str] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> LossHessian | None:
        """A diagonal block of the Hessian; None while the fixed data are not complete.

        Args:
            step: The present step.
            config: Which Hessian.
            names: The parameters of the block; all trainable ones if None.
            say: As for `hessian`.

        Raises:
            PeerFailureError: If another rank cannot build its part.

        """
        data, trainer = self._data[config], step.trainer
        with failing_together(trainer):
            batches = step.own_batches if config.data == "batch" else data.batches()
            if batches is None:
                return None
            # The operator remembers the state of the generators from when it is made, and all its products see the same
            # dropout masks and augmentation. Each rank has masks of its own, as in training.
            with data.randomness(trainer.global_rank):
                return self._operators.make(
                    Problem(trainer, step.pl_module, config, batches, names, self._elsewhere), say
                )

    def on_batches(self, step: Step, config: HessianConfig, batches: Sequence[ProbeBatch] | None = None) -> LossHessian:
        """The Hessian of the step's own data, or of others that a callback has kept, whatever the configuration says.

        Args:
            step: The present step.
            config: Which Hessian, but for the data.
            batches: The data; the step's own if None.

        Raises:
            PeerFailureError: If another rank cannot build its part.

        """
        config = replace(config, data="batch", num_batches=None, fraction=None)
        if batches is None and config in self._shared:
            return self._shared[config].operator
        with failing_together(step.trainer):
            own = step.own_batches if batches is None else batches
            return self._operators.make(Problem(step.trainer, step.pl_module, config, own, None, self._elsewhere))

    def eigenpairs(self, step: Step, callback: Participant) -> Eigenpairs:
        """The eigenpairs that a callback requests, computed together with those of all that share its operator.

        Raises:
            MeasurementError: If the computation has failed for another callback at this step.

        """
        shared, request = self._shared[callback.config], callback.request
        assert request is not None  # or there is nothing to ask for
        if request.largest + request.smallest > shared.operator.size:
            raise ValueError(
                f"The model has {shared.operator.size} trainable parameters, fewer than the"
                f" {request.largest} + {request.smallest} eigenvalues asked for."
            )
        wanted = [(request, callback.search_start)] if request.acts else shared.wanted
        if shared.failure is not None and not request.acts:
            raise MeasurementError(f"The measurement that is shared with another callback failed: {shared.failure}")
        pairs = None if request.acts else shared.pairs
        if pairs is None:
            arguments = _joined(wanted, shared.operator.space)
            if callback.config.offload:
                arguments["max_basis_bytes"] = _OFFLOADED_BASIS_BYTES
            if arguments["max_basis_vectors"] is None:
                arguments["max_basis_vectors"] = _basis_for(request, arguments, shared.operator.space)
            try:
                with watched(shared.operator, step.trainer, type(callback).__name__) as operator:
                    # A start without a component along an eigenvector never finds it, however long it searches. With
                    # another seed at each step, what one search overlooks the next one sees.
                    pairs = lanczos(operator, **arguments, seed=callback.config.seed + step.index)
            except Exception as error:
                if not request.acts:
                    # Or each of the other callbacks would spend the same time on failing in the same way.
                    shared.failure = described(error)
                raise
            if not request.acts:
                shared.pairs = pairs
        return _restricted(pairs, request)

    def release(self, callback: Participant) -> None:
        """End a callback's use of the operator at the present step, and drop it after the last one."""
        if callback.config in self._shared:
            waiting = [other for other in self._shared[callback.config].waiting if other is not callback]
            self._shared[callback.config].waiting = waiting
            if not waiting:
                del self._shared[callback.config]
        # Before the step, which would find copies where it looks for its own objects.
        self._elsewhere.settle()


class _AccumulatedStep:
    """A step whose gradient comes from several batches, for the callbacks that measure all of them.

    They are due before the last of these batches and not before the first: until then the parameters stay where they
    are.
    """

    def __init__(self) -> None:
        self.batches: list[ProbeBatch] = []
        self.failure: Exception | None = None
        self._waiting: list[Participant] = []
        self._index = -1

    def begin(self, trainer: Trainer, due: Sequence[Participant]) -> list[Participant]:
        """Before a batch: which callbacks measure now, of those that are due and those that wait."""
        if trainer.global_step != self._index:  # a step that was broken off leaves callbacks waiting
            self.batches, self.failure, self._waiting, self._index = [], None, [], trainer.global_step
        self._waiting += [callback for callback in due if callback.measures_whole_step]
        now = [callback for callback in due if not callback.measures_whole_step]
        if self._waiting and not is_accumulating(trainer):
            now, self._waiting = [*now, *self._waiting], []
        return now

    def keep(self, step: Step) -> None:
        """Keep the batch for those that wait."""
        if not self._waiting or self.failure is not None:
            return
        try:
            self.batches = step.own_batches
        except Exception as error:  # raised again by `own_batches`, where it ends a measurement and not the training
            self.failure = error


def _joined(wanted: Sequence[tuple[EigenRequest, Tensor | None]], space: VectorSpace) -> dict[str, Any]:
    """The arguments for `lanczos` that serve all requests."""
    size = space.size
    fitting = [(request, vectors) for request, vectors in wanted if request.largest + request.smallest <= size]
    # Of several starts only one can be used. That of the largest request holds the most eigenvectors.
    _, start = max(fitting, key=lambda item: item[0].largest + item[0].smallest)
    largest = max(request.largest for request, _ in fitting)
    smallest = max(request.smallest for request, _ in fitting)
    if largest + smallest > size:
        largest, smallest = size, 0  # all eigenpairs, of which each request takes its own
    # The larger of two bounds, and at least what Lanczos's method needs for the joint number of pairs: a bound is on
    # memory, and one basis for both callbacks takes less than two.
    bounds = [request.max_basis_vectors for request, _ in fitting if request.max_basis_vectors is not None]
    if start is not None and len(start) != space.length:
        start = None  # parameters were frozen or unfrozen since
    # An eigenvalue's error falls with the square of the residual, so a search that is for eigenvalues alone ends
    # sooner. A single request for accurate vectors is enough to need the longer one.
    values_only = all(request.values_only for request, _ in fitting)
    return {
        "largest": largest,
        "smallest": smallest,
        "value_tol" if values_only else "tol": min(request.tol for request, _ in fitting),
        "start": start,
        "max_basis_vectors": max(max(bounds), largest + smallest + 2) if bounds else None,
    }


def _basis_for(request: EigenRequest, arguments: Mapping[str, Any], space: VectorSpace) -> int | None:
    """How large the basis of a search may be where nobody has said it; None for what `lanczos` makes of it."""
    largest, smallest = arguments["largest"], arguments["smallest"]
    least = least_basis_vectors(space, largest, smallest, arguments.get("max_basis_bytes", BASIS_BYTES))
    if request.acts:
        # Not by the memory that happens to be free: a training that depends on it would not be repeated.
        return least
    is_one = (largest, smallest) == (1, 0) and "value_tol" in arguments
    return min(least, _ONE_VALUE_BASIS) if is_one and space.vector_bytes > _SMALL_VECTOR_BYTES else None


def _restricted(pairs: Eigenpairs, request: EigenRequest) -> Eigenpairs:
    """The part of the eigenpairs that a request asked for."""
    if (len(pairs.largest), len(pairs.smallest)) == (request.largest, request.smallest):
        chosen = torch.arange(len(pairs.values))
        vectors = pairs.vectors  # indexing would copy what may take most of the memory
    else:
        if len(pairs.smallest) >= request.smallest:
            bottom = torch.arange(pairs.num_largest, pairs.num_largest + request.smallest)
        else:  # `_joined` asked for all eigenpairs as the largest ones, so the smallest one is the last
            bottom = torch.arange(len(pairs.values) - 1, len(pairs.values) - 1 - request.smallest, -1)
        chosen = torch.cat([torch.arange(request.largest), bottom])
        vectors = pairs.vectors[chosen.to(pairs.vectors.device)]
    values, residuals, errors = (each[chosen] for each in (pairs.values, pairs.residuals, pairs.value_errors))
    # The joint search had the strictest tolerance. A pair that missed it may still meet that of this request.
    accuracy = errors if request.values_only else residuals
    return Eigenpairs(
        values=values,
        vectors=vectors,
        residuals=residuals,
        value_errors=errors,
        missed_probability=pairs.missed_probability[chosen],
        converged=pairs.converged[chosen] | (accuracy <= request.tol * values.abs()),
        num_matvecs=pairs.num_matvecs,
        num_largest=request.largest,
        start=pairs.start,
    )
