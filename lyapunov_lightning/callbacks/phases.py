"""The phases of a step for a callback that steers the learning rate: one value, and the ways from one to the next.

Where the last update is known, a step goes from `Idle` through `Seen` and `Stepping` back to `Idle`. The first step
differs: a learning rate can be found only after the optimizer has made an update, so this step is taken on trial, at
the optimizer's own learning rate, and goes from `FirstStepDue` through `OnTrial` to `Idle`.
"""

from dataclasses import dataclass

from lyapunov_lightning.curvature.operators.loss_hessian import LossHessian
from lyapunov_lightning.training.optimizers.learning_rates import LearningRates
from lyapunov_lightning.training.optimizers.updates import ObservedUpdate, SeenOnDevice
from lyapunov_lightning.training.sharing import Step

_OBSERVABLE_LR = 1e-3
"""Learning rate below which a step on trial would be lost in the rounding of the parameters, and is made at 1."""


@dataclass(frozen=True)
class Idle:
    """There is nothing to wait for."""


@dataclass(frozen=True)
class Seen:
    """The gradient of this batch has been computed, where the last update ended, and gives the slope along it.

    Attributes:
        update: Its slope and size.
        lr: Its learning rate.

    """

    update: SeenOnDevice
    lr: float

    def step(self) -> "Stepping":
        """The optimizer is about to take its step, so that this gradient is the one that counts."""
        return Stepping(self.update, self.lr)


@dataclass(frozen=True)
class Stepping:
    """The optimizer takes its step, or has taken it, and the batch is not over.

    Attributes:
        update: Slope and size of the update before this one.
        lr: Its learning rate.

    """

    update: SeenOnDevice
    lr: float


@dataclass(frozen=True, eq=False)
class FirstStepDue:
    """A rule that follows updates waits for the first one.

    Attributes:
        hessian: The Hessian before the step.
        step: The step.

    """

    hessian: LossHessian
    step: Step

    def step_on_trial(self, rates: LearningRates) -> "OnTrial":
        """The optimizer is about to take the step: copy the parameters, and see to it that the step will be visible."""
        observed, own_lr = ObservedUpdate(self.hessian), rates.highest
        if own_lr < _OBSERVABLE_LR:
            # A float32 parameter near 1 is rounded by up to 6e-8: of a step of 1e-6 that is 6 %, of one of 1e-8
            # everything. The step is taken back in any case before the training continues.
            rates.set(1.0)
        return OnTrial(self.hessian, self.step, observed, own_lr)


@dataclass(frozen=True, eq=False)
class OnTrial:
    """The optimizer takes the first step, from which the first learning rate will be found.

    Attributes:
        hessian: The Hessian before the step.
        step: The step.
        observed: The parameters before it.
        own_lr: The optimizer's own learning rate, to go back to if nothing is found.

    """

    hessian: LossHessian
    step: Step
    observed: ObservedUpdate
    own_lr: float


Phase = Idle | Seen | Stepping | FirstStepDue | OnTrial
