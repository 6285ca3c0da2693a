"""What a rule for the learning rate is, what it is given, and what it returns."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lyapunov_lightning.curvature.loss.products import Method
from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.training.optimizers.steering import EdgeRatio, StepLengths
from lyapunov_lightning.training.optimizers.updates import SeenUpdate, Update
from lyapunov_lightning.training.replica.objective import ProbeBatch


@dataclass(frozen=True, eq=False)
class Situation:
    """What a rule is given for one measurement.

    Attributes:
        hessian: The Hessian of the loss on the measured data, before the step.
        optimizer: The optimizer.
        update: The last update, which ended at these parameters; None if it is not known. Where `is_first` and the rule
            follows updates, it is the one that the optimizer makes in this step, beginning at these parameters.
        is_first: Whether no learning rate was proposed yet.
        progress: A progress bar, for a measurement that takes long: a function to call after each gradient.
        own: The Hessian of the loss on the step's own batches, whatever data are measured.
        batches: These batches.
        hessian_on: Makes the Hessian on other batches, at the same parameters.

    """

    hessian: LossHessian
    optimizer: torch.optim.Optimizer
    update: Update | None
    is_first: bool
    progress: Callable[[], AbstractContextManager[Callable[[], None]]]
    own: LossHessian
    batches: Sequence[ProbeBatch]
    hessian_on: Callable[[Sequence[ProbeBatch]], LossHessian]


@dataclass(frozen=True)
class Proposal:
    """What a rule has found in one measurement.

    Attributes:
        lr: The learning rate that it proposes; None to leave the learning rate as it is.
        found: Fields of `LearningRateResult` by name.

    """

    lr: float | None
    found: Mapping[str, Any]


class Rule(ABC):
    """A way to a learning rate. It is the state that a checkpoint keeps under the name ``"rule"``.

    Args:
        seed: Seed of all random vectors.

    """

    every_n_steps: ClassVar[int] = 1
    """The default interval between two measurements."""

    first_n_steps: ClassVar[int] = 0
    """How many of the first steps are measured in addition, by default."""

    annealing: ClassVar[float] = 0.0
    """The default share of the training over which the learning rate falls to zero."""

    method: ClassVar[Method | None] = None
    """How products are computed, for a rule that leaves no choice."""

    begins_with_update: ClassVar[bool] = False
    """Whether it needs the optimizer's first update to propose a first learning rate."""

    follows_updates: ClassVar[bool] = False
    """Whether it needs each later update too, in `follow`."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def check(self, owner: str, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027  (most rules suit all)
        """Refuse an optimizer that the rule is not made for, unless the user insists.

        Args:
            owner: The name of the callback, for the message.
            optimizer: The optimizer.

        Raises:
            MisconfigurationException: With the cause and the remedy.

        """

    @abstractmethod
    def measure(self, given: Situation) -> Proposal:
        """Measure before a step.

        Raises:
            NonFiniteCurvatureError: If the curvature is not finite.

        """

    def follow(self, seen: SeenUpdate, lr: float) -> StepLengths | None:
        """Judge the last update after the gradient of the next batch, once a step, if the rule follows updates.

        Args:
            seen: Slope and size of the update, by that gradient.
            lr: The learning rate of the update.

        Returns:
            How long the steps are; None to leave the learning rate as it is.

        """
        return None

    def edge_ratio(self) -> EdgeRatio | None:
        """How near the steps are to the edge of stability, if the rule goes by that; None if it is not known."""
        return None

    def forget(self) -> None:  # noqa: B027  (the paper's rule averages what it has seen)
        """Forget what was measured since the training went astray: it has been brought back."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What is kept from one measurement to the next."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Continue from a `state_dict`."""
