"""The learning rate of a run that a rule steers: bounds, annealing, and what happens when the loss goes up."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from lyapunov_lightning.curvature.acting.loss_watch import Verdict
from lyapunov_lightning.curvature.acting.pace import Annealing, LRBounds, Pace
from lyapunov_lightning.training.lightning_names import Trainer
from lyapunov_lightning.training.optimizers.learning_rates import LearningRates
from lyapunov_lightning.training.optimizers.requirements import gain_of_momentum
from lyapunov_lightning.training.optimizers.safeguard import Safeguard


class StepLengths(NamedTuple):
    """How long an optimizer's steps are, in units of the step to the bottom of the parabola along them.

    Attributes:
        length: The length.
        at_least: The least that it may be, in view of the noise.
        memory: Over how many steps both were averaged.
        may_grow: Whether longer steps are safe.

    """

    length: float
    at_least: float
    memory: float
    may_grow: bool


class EdgeRatio(NamedTuple):
    """The curvature that decides on stability over the optimizer's limit, at a learning rate of 1.

    Attributes:
        value: The ratio.
        at_least: The least that it may be, in view of the noise.
        is_exact: Whether it has no noise, as with full batches.

    """

    value: float
    at_least: float
    is_exact: bool


class Steering:
    """Sets the learning rate of an optimizer at every step, and takes back what went wrong.

    A rule proposes a learning rate (`begin`, `approach`) or says how long the steps are (`follow`). What the optimizer
    gets of it is the same for all rules: the learning rate stays within the bounds, falls to zero at the end of the
    training, and is halved when the losses rise. Until the first proposal the optimizer keeps its own learning rate.

    Args:
        bounds: The bounds.
        annealing: Share of the training over which the learning rate falls to zero.
        keeps_copies: Whether to keep copies of the training to go back to.

    Attributes:
        rates: The learning rates of the optimizer's parameter groups.
        pace: What was proposed, within the bounds, before annealing.
        safeguard: The judgement of the losses, and the copies.
        end: How the learning rate falls towards the end of the training.

    """

    def __init__(self, bounds: LRBounds, annealing: float, keeps_copies: bool) -> None:
        self.rates = LearningRates()
        self.pace = Pace(bounds)
        self.safeguard = Safeguard(keeps_copies)
        self.end = Annealing(annealing)

    def start(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Begin a run."""
        self.rates.start(optimizer)
        self.release()
        # Read once, here: Lightning's property may load the training dataloader. It is infinite for `max_epochs=-1`,
        # and -1 for epochs of data without a length. Nobody knows the end of such a run, so it is never annealed; with
        # -1 steps all of it would be after the end, at a learning rate of 0.
        num_steps = trainer.estimated_stepping_batches
        self.end.start(num_steps if num_steps >= 0 else math.inf)

    def release(self) -> None:
        """Drop the copies of the training: at the end of a run, or where it breaks off."""
        self.safeguard.start()

    def parts(self) -> dict[str, Pace | Safeguard | LearningRates | Annealing]:
        """What a checkpoint keeps, by the names that it has there."""
        return {"pace": self.pace, "safeguard": self.safeguard, "rates": self.rates, "annealing": self.end}

    @property
    def has_begun(self) -> bool:
        """Whether a learning rate was proposed yet; before that the optimizer's own is in use."""
        return self.pace.lr is not None

    def annealing(self, trainer: Trainer) -> float:
        """The factor on the learning rate of the present step; it is 1 until the end of the training comes near."""
        return self.end.at(trainer.global_step)

    def lr(self, trainer: Trainer) -> float:
        """The learning rate of the present step, the highest of the parameter groups."""
        if self.pace.lr is None:
            return self.rates.highest
        # Annealed, it may fall below the floor that `pace` keeps.
        return max(self.pace.lr * self.annealing(trainer), self.pace.bounds.min_lr)

    def set(self, trainer: Trainer) -> None:
        """Give the optimizer the learning rate of the present step, right before it takes the step."""
        if self.has_begun:
            self.rates.set(self.lr(trainer))

    def begin(self, lr: float) -> None:
        """Take a first learning rate, whatever was there before."""
        self.pace.begin(lr)

    def approach(self, lr: float) -> None:
        """Fall to a proposed learning rate at once, or rise towards it slowly."""
        self.pace.approach(lr)

    def follow(self, trainer: Trainer, lengths: StepLengths) -> None:
        """Make the next steps longer or shorter, by how long the last ones were."""
        self.pace.follow(
            lengths.length,
            lengths.at_least,
            is_falling=self.safeguard.watch.is_falling,
            # While the end of the training shortens the steps, short steps are no reason to make them longer.
            may_grow=lengths.may_grow and self.annealing(trainer) == 1,
            memory=lengths.memory,
            inertia=gain_of_momentum(trainer.optimizers[0]),
        )

    def keep_off_the_edge(self, trainer: Trainer, ratio: EdgeRatio) -> None:
        """Make the next steps longer or shorter, by how near they are to the edge of stability."""
        if self.pace.lr is not None:
            self.pace.keep_off_the_edge(
                ratio.value * self.pace.lr,
                ratio.at_least * self.pace.lr,
                step=trainer.global_step,
                is_exact=ratio.is_exact,
                is_falling=self.safeguard.watch.is_falling,
                # While the end of the training shortens the steps, short steps are no reason to make them longer.
                may_grow=self.annealing(trainer) == 1,
            )

    def see_loss(self, trainer: Trainer, loss: float, warn_once: Callable[[str, str], None]) -> Verdict:
        """Judge the loss of a batch, after its step, and act on the verdict.

        Args:
            trainer: The trainer.
            loss: The loss, the mean over the ranks.
            warn_once: Warns the user, once for each kind (the first argument) of message (the second one).

        Returns:
            The verdict. After `Verdict.LOST` the parameters may be those of an earlier step.

        """
        verdict, restored = self.safeguard.after_batch(loss, trainer.optimizers[0])
        if verdict is Verdict.WELL:
            self.pace.pass_step()
        elif verdict is Verdict.RISING:
            self.pace.halve()
        elif verdict is Verdict.LOST:
            if not self.pace.is_stopped:
                self._slow_down(trainer, loss, restored, warn_once)
            # At once: the copy that was restored held the learning rates of its own step.
            self.rates.set(self.lr(trainer))
        return verdict

    def _slow_down(
        self, trainer: Trainer, loss: float, restored: int | None, warn_once: Callable[[str, str], None]
    ) -> None:
        """Continue at half the learning rate, or give up at a hundredth of it.

        Args:
            trainer: The trainer.
            loss: The loss that was too high.
            restored: The step whose state the training was brought back to, if it was.
            warn_once: As for `see_loss`.

        """
        if self.pace.lr is None:
            # The optimizer's own learning rate was too high: there is none of a rule yet that could be halved.
            self.pace.begin(self.rates.highest)
        self.pace.halve()
        where = f"at step {trainer.global_step} the loss was {loss:.3g}, far above what it was before"
        if self.safeguard.is_hopeless(loss, restored):
            self.pace.stop()
            why = "there was no copy to go back to" if restored is None else "going back again and again did not help"
            warn_once(
                "stopped",
                f"{where}, and {why}. The learning rate stays at {self.pace.lr:.3g} from now on. Look for what else is"
                " wrong, such as numbers in the data that are not finite.",
            )
        else:
            how = "" if restored is None else f" the training was brought back to step {restored}, and"
            warn_once("went back", f"{where}:{how} the learning rate was halved. This is said once.")
