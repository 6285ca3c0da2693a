"""What an estimator is, and what it sees of a step."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, TypedDict

import torch
from torch import Tensor

from lyapunov_lightning.callbacks.results.probe import ProbeResult
from lyapunov_lightning.curvature.diagnosis import Diagnosis
from lyapunov_lightning.curvature.errors import MeasurementError
from lyapunov_lightning.curvature.linear import LinearOperator
from lyapunov_lightning.curvature.loss.products import Method
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.curvature.solvers.eigenpairs import Eigenpairs
from lyapunov_lightning.curvature.stability import Stability, is_adaptive, is_known, learning_rate, stability_of
from lyapunov_lightning.curvature.tracking.extremes import End
from lyapunov_lightning.training.callback import Stateful
from lyapunov_lightning.training.config import HessianConfig
from lyapunov_lightning.training.lightning_names import Trainer, optimizers_of
from lyapunov_lightning.training.replica.objective import ProbeBatch
from lyapunov_lightning.training.reporting.progress import progress, watched
from lyapunov_lightning.training.sharing import EigenRequest, Step

Moment = Literal["start", "gradient", "update"]
"""When in a step an estimator measures.

- ``"start"``: before the step.
- ``"gradient"``: after the backward pass of the step's batch, whose gradient is in ``.grad``.
- ``"update"``: after the optimizer has moved the parameters, before anything else does.
"""


@dataclass(frozen=True, kw_only=True)
class EstimatorSettings:
    """What the user asked for.

    Attributes:
        end: Which end of the spectrum.
        tol: Relative accuracy.
        iterations: Iterations for each measurement, of estimators that follow something by iterations.
        delta_q: Length of the perturbation of the parameters that is followed.
        own_batch: Whether the measured loss is that of the step's own batch, and not of fixed data.
        seed: Seed of all random vectors.

    """

    end: End = "largest"
    tol: float = 2e-2
    iterations: int = 1
    delta_q: float = 5e-2
    own_batch: bool = True
    seed: int = 0


class Limits(TypedDict):
    """The fields of `ProbeResult` that come from the optimizer's settings."""

    learning_rate: float | None
    stability_limit: float | None


@dataclass(frozen=True, eq=False, kw_only=True)
class MeasuredStep:
    """A step that is measured, and what an estimator may use.

    Attributes:
        hessian: The Hessian of the loss on the measured data. Whenever it is asked, it takes the parameters as they are
            then, and the random numbers (dropout masks) of the step.
        step: The step.
        eigenpairs: Computes the pairs of the estimator's `Estimator.request`, together with those that other callbacks
            want of the same Hessian. At the moment ``"start"`` only: the shared operator is dropped before the step.
        hessian_on: Makes the Hessian on batches that a callback has kept, or on the step's own if None, at the present
            parameters.
        warn_once: Warns the user, once for each kind (the first argument) of message (the second one).
        owner: The name of the callback, for progress bars.
        is_plain: Whether the largest eigenvalue of the Hessian itself is asked for also where the optimizer's limit is
            one on that of another matrix.
        moment: When in the step it is measured.

    """

    hessian: LossHessian
    step: Step
    eigenpairs: Callable[[], Eigenpairs]
    hessian_on: Callable[[HessianConfig, Sequence[ProbeBatch] | None], LossHessian]
    warn_once: Callable[[str, str], None]
    owner: str
    is_plain: bool = True
    moment: Moment = "start"

    @cached_property
    def gradient(self) -> Tensor:
        """The gradient of the measured loss, of shape ``(n,)``, before the step; products follow it."""
        return self.hessian.gradient(keep_graph=True)

    def progress(self) -> AbstractContextManager[Callable[[], None]]:
        """A progress bar, of a measurement that takes long: a function to call after each product or evaluation."""
        return progress(self.step.trainer, self.owner)

    def watched(self) -> AbstractContextManager[LinearOperator]:
        """The Hessian, with its products shown in a progress bar."""
        return watched(self.hessian, self.step.trainer, self.owner)

    def stability(self, gradient: Tensor | None = None, *, counts_gradient: bool = True) -> Stability | None:
        """The stability limit of the first optimizer as it is set now; None if it is not known.

        Args:
            gradient: The gradient of the coming step, where it is known.
            counts_gradient: Whether an adaptive optimizer's divisor is that of the coming step, for which the gradient
                is computed where it is not known, or that of the last one.

        """
        optimizers = optimizers_of(self.step.trainer)
        if not optimizers:
            return None
        # There are several under manual optimization only, as for a GAN: which of them descends the measured loss
        # nobody knows, and the first is taken.
        optimizer = optimizers[0]
        if not is_known(optimizer):
            self.warn_once(
                "unknown optimizer",
                f"the stability limit of {type(optimizer).__name__} is not known. `curvature/stability_ratio` is then"
                " the share of a step's promised decrease that the curvature along it eats. Its edge is known less"
                " well: 1 without momentum, down to half of that with it.",
            )
        # In the order of the measured parameters, and as the optimizer is set now: Adam's preconditioner and the
        # learning rate change with every step.
        if not (counts_gradient and is_adaptive(optimizer)):
            gradient = None
        elif gradient is None:
            gradient = self.gradient
        return stability_of(optimizer, self.hessian.parameters, self.hessian.layout, gradient)

    def unmeasured(self, stability: Stability | None) -> ProbeResult:
        """The result where the estimator measures nothing."""
        return ProbeResult(step=self.step.index, epoch=self.step.epoch, converged=True, **self.limits(stability))

    def limits(self, stability: Stability | None) -> Limits:
        """Learning rate and stability limit for a result, as far as they are known."""
        optimizers = optimizers_of(self.step.trainer)
        lr = learning_rate(optimizers[0]) if optimizers else math.nan
        return {
            "learning_rate": None if math.isnan(lr) else lr,
            # Where nothing moves the limit is infinite: no curve could show it, and every ratio would be 0.
            "stability_limit": None if stability is None or stability.limit == math.inf else stability.limit,
        }


class Estimator(ABC):
    """A way to the numbers that `CurvatureProbe` logs.

    In the order of a run: `start` once, then for each measured step `begin` before it and `measure` at the moment that
    `begin` asked for, or `forget` if the step passed without that moment.

    Args:
        settings: What the user asked for.

    Raises:
        ValueError: If the estimator cannot do that.

    """

    method: ClassVar[Method | None] = None
    """How products are computed where the user leaves the choice; None where that makes no difference."""

    tags: ClassVar[Sequence[str]] = ("curvature/lambda_max$", "curvature/preconditioned_lambda_max$")
    """Regular expressions of the tags that belong on one chart with the stability limit."""

    is_gauged: ClassVar[bool] = True
    """Whether the probe measures the batch sharpness of the same step as well."""

    request: EigenRequest | None = None
    """The eigenpairs of the Hessian that it takes from a search shared by all callbacks; None if it needs none."""

    def __init__(self, settings: EstimatorSettings) -> None:
        self._settings = settings

    def start(self, trainer: Trainer, owner: str) -> torch.optim.Optimizer | None:
        """Refuse a run that cannot be measured, when its optimizers are known.

        Args:
            trainer: The trainer.
            owner: The name of the callback, for the message.

        Returns:
            The optimizer whose update is waited for; None for an estimator that never asks for ``"update"``.

        Raises:
            MisconfigurationException: With the cause and the remedy.

        """
        return None

    def begin(self, at: MeasuredStep) -> Moment:
        """Note before a step what is gone after it, and say at which moment to measure."""
        return "start"

    @abstractmethod
    def measure(self, at: MeasuredStep) -> ProbeResult | None:
        """Measure, at the moment that `begin` asked for.

        Returns:
            What was found; None if there is nothing to log.

        Raises:
            MeasurementError: If nothing can be said of this step.

        """

    def forget(self) -> None:  # noqa: B027  (most estimators note nothing in `begin`)
        """Drop what `begin` has noted for a step that did not come to its moment."""

    @abstractmethod
    def parts(self) -> dict[str, Stateful]:
        """What is kept from one measurement to the next, under the names that it has in a checkpoint."""

    @property
    def search_start(self) -> Tensor | None:
        """Where the shared search for the eigenpairs of `request` starts."""
        return None

    def plotted(self, results: Sequence[ProbeResult]) -> tuple[str, list[float | None]]:
        """What is drawn against the stability limit, and its name: the eigenvalue that the limit is one on."""
        # One curve for the whole run: a run of Adam has its first value of H alone, since there are no second moments
        # before step 1, and a curve that changes its meaning there would begin with a jump.
        if any(result.preconditioned_lambda_max is not None for result in results):  # there is none before step 1
            return "preconditioned sharpness", [result.preconditioned_lambda_max for result in results]
        largest = [result.lambda_max for result in results]
        if all(value is None for value in largest):
            return "smallest eigenvalue", [result.lambda_min for result in results]
        return "sharpness", largest

    def reworded(self, diagnosis: Diagnosis) -> Diagnosis:
        """The diagnosis, in the words that fit what was measured."""
        return diagnosis


def missed(moment: Moment) -> ProbeResult:
    """What is found in a step that did not come to the moment that was waited for.

    Raises:
        MeasurementError: Always, with the reason.

    """
    if moment == "update":
        raise MeasurementError(
            "The optimizer did not move the parameters, as where a loss scaler skips a step or the training step"
            " returned None, so there is no update to measure along."
        )
    raise MeasurementError("The step returned None for the probed batch, so there was no backward pass.")
