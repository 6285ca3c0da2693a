"""One measurement for all callbacks that ask for the same.

Each callback of this package that wants the curvature has a `Subscription`: to which problem, when, and to which
eigenpairs. At a step the first one in the trainer's list to be called looks at the subscriptions of all callbacks of
the trainer, builds the operator once for those that are due with the same problem, and hands it to each of them; the
eigenpairs are computed once, for the largest request. There is no registry: the trainer's list of callbacks is one. A
measurement is dropped when the last of its subscribers has taken what it wanted, before the step itself begins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from torch import Tensor

from lyapunov_lightning.curvature.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.curvature.lanczos import lanczos
from lyapunov_lightning.curvature.operator import HessianOperator
from lyapunov_lightning.training.problem import CurvatureProblem
from lyapunov_lightning.training.recording import WatchedOperator, progress
from lyapunov_lightning.training.schedule import Timetable


@dataclass(frozen=True)
class EigenRequest:
    """The eigenpairs that a callback wants of the Hessian.

    Attributes:
        largest: How many of the upper end.
        smallest: How many of the lower end.
        tol: Relative tolerance of the residuals.
        seed: Seed of the solver.
        max_basis_vectors: Bound on the Krylov basis, as for `lanczos`.
        acts: Whether the training depends on them. They are then computed apart from those of other requests, so that a
            callback that reads beside one that acts does not change the training by the last digits.

    """

    largest: int
    smallest: int
    tol: float
    seed: int = 0
    max_basis_vectors: Optional[int] = None
    acts: bool = False


class Measurement:
    """The operator of one step, and its eigenpairs once somebody asks for them.

    Args:
        trainer: The trainer, beside whose progress bar a long computation shows its own.
        operator: The Hessian at the present parameters.
        subscriptions: Who shares the measurement.

    """

    def __init__(self, trainer: "pl.Trainer", operator: HessianOperator, subscriptions: "list[Subscription]") -> None:
        self._trainer = trainer
        self._asked = [(s.request, s.vectors) for s in subscriptions if s.request is not None and not s.request.acts]
        self._pairs: Optional[Eigenpairs] = None
        self._failure: Optional[str] = None
        self.operator = operator

    def eigenpairs(self, request: EigenRequest, owner: str) -> Eigenpairs:
        """The eigenpairs of a request, computed with those of all other subscribers at the first call.

        Args:
            request: What is wanted; one of the subscribers' requests.
            owner: The class that the progress bar names.

        Raises:
            MeasurementError: If the computation failed at an earlier call.
            ValueError: If more eigenvalues are wanted than there are parameters.

        """
        if request.largest + request.smallest > self.operator.size:
            raise ValueError(
                f"The model has {self.operator.size} trainable parameters, fewer than the"
                f" {request.largest} + {request.smallest} eigenvalues asked for."
            )
        if request.acts:
            return self._solve(owner, [(request, None)])
        if self._failure is not None:
            raise MeasurementError(f"The measurement that is shared with another callback failed: {self._failure}")
        if self._pairs is None:
            try:
                self._pairs = self._solve(owner, self._asked)
            except Exception as error:
                self._failure = str(error)
                raise
        return _restricted(self._pairs, request)

    def _solve(self, owner: str, asked: Sequence[tuple[EigenRequest, Optional[Tensor]]]) -> Eigenpairs:
        fitting = [(r, v) for r, v in asked if r.largest + r.smallest <= self.operator.size]
        leading, vectors = max(fitting, key=lambda asked: asked[0].largest + asked[0].smallest)
        largest = max(request.largest for request, _ in fitting)
        smallest = max(request.smallest for request, _ in fitting)
        if largest + smallest > self.operator.size:
            largest, smallest = self.operator.size, 0  # all of them, which serves everyone
        bounds = [request.max_basis_vectors for request, _ in fitting if request.max_basis_vectors is not None]
        if vectors is not None and vectors.shape[1] != self.operator.size:
            vectors = None  # parameters were frozen or unfrozen since
        with progress(self._trainer, owner) as report:
            return lanczos(
                WatchedOperator(self.operator, report),
                largest=largest,
                smallest=smallest,
                tol=min(request.tol for request, _ in fitting),
                start=vectors,
                seed=leading.seed,
                max_basis_vectors=max(max(bounds), largest + smallest + 2) if bounds else None,
            )


class Subscription:
    """What one callback wants to be measured, and when.

    Args:
        problem: Which Hessian.
        timetable: When.
        request: Which of its eigenpairs; None if it is the operator that is wanted.

    """

    def __init__(self, problem: CurvatureProblem, timetable: Timetable, request: Optional[EigenRequest]) -> None:
        self._measurement: Optional[Measurement] = None
        self.problem = problem
        self.timetable = timetable
        self.request = request
        self.vectors: Optional[Tensor] = None

    def start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Check the problem, and drop what an interrupted run has left; for the hook ``on_train_start``."""
        self._measurement = None
        self.timetable.start()
        self.problem.check_start(trainer, pl_module)

    def take(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> Optional[Measurement]:
        """The measurement of the present step; None if the data of the problem are not complete.

        To be called once in a step, when the timetable says that it is due.

        """
        measurement, self._measurement = self._measurement, None
        if measurement is not None:
            return measurement
        operator = self.problem.operator(trainer, pl_module, batch, batch_idx)
        if operator is None:
            return None
        sharing = [
            subscription
            for subscription in _subscriptions(trainer)
            if subscription.problem.key == self.problem.key and subscription.timetable.is_due(trainer, batch_idx)
        ]
        measurement = Measurement(trainer, operator, sharing)
        for subscription in sharing:
            if subscription is not self:
                subscription._measurement = measurement
        return measurement

    def state_dict(self) -> dict[str, Any]:
        """The vectors of the last measurement, on the CPU, from which the next one starts."""
        return {"vectors": None if self.vectors is None else self.vectors.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.vectors = state["vectors"]


def _subscriptions(trainer: "pl.Trainer") -> list[Subscription]:
    """The subscriptions of the trainer's callbacks, in their order."""
    found = (getattr(callback, "subscription", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return [subscription for subscription in found if isinstance(subscription, Subscription)]


def _restricted(pairs: Eigenpairs, request: EigenRequest) -> Eigenpairs:
    """The part of the eigenpairs that a request asked for."""
    if (len(pairs.largest), len(pairs.smallest)) == (request.largest, request.smallest):
        chosen = torch.arange(len(pairs.values))
        vectors = pairs.vectors  # not copied, since they may be most of the memory
    else:
        if len(pairs.smallest) >= request.smallest:
            bottom = torch.arange(pairs.num_largest, pairs.num_largest + request.smallest)
        else:  # all eigenpairs are there, as the largest ones
            bottom = torch.arange(len(pairs.values) - 1, len(pairs.values) - 1 - request.smallest, -1)
        chosen = torch.cat([torch.arange(request.largest), bottom])
        vectors = pairs.vectors[chosen.to(pairs.vectors.device)]
    values, residuals = pairs.values[chosen], pairs.residuals[chosen]
    return Eigenpairs(
        values=values,
        vectors=vectors,
        residuals=residuals,
        converged=pairs.converged[chosen] | (residuals <= request.tol * values.abs()),
        num_matvecs=pairs.num_matvecs,
        num_largest=request.largest,
    )
