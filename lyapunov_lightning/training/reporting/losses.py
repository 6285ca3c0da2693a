"""The training losses of a run, kept for figures and for the summary of the run."""

import math
from typing import Any

import torch
from torch import Tensor

from lyapunov_lightning.training.distributed import mean_over_ranks
from lyapunov_lightning.training.lightning_names import Trainer

_MOST_KEPT = 10_000
"""How many losses are kept. Longer runs keep every second step's, still longer ones every fourth's, and so on."""

_PENDING = 100
"""Number of batches after which their losses are fetched from the device, in one transfer."""


def loss_in(outputs: Any) -> Tensor | None:
    """The loss in the `outputs` of the hook ``on_train_batch_end``; None if the step returned no scalar loss."""
    # Lightning passes a dictionary on, with what else the step returned in it.
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    return loss.detach() if isinstance(loss, Tensor) and loss.numel() == 1 else None


class LossSeries:
    """The training loss of every optimizer step: the mean over its micro-batches and over the ranks.

    The losses of the latest batches stay on their device until `collect` is called: reading a number from a GPU waits
    for all that was asked of it.

    Attributes:
        steps: The optimizer steps, ascending.
        values: The losses at these steps, NaN and infinite ones included.
        learning_rates: Those at these steps as far as `stepping` was told them, else NaN.

    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[float] = []
        self.learning_rates: list[float] = []
        self._stride, self._count = 1, 0
        self._pending: list[tuple[int, float, Tensor | None]] = []
        self._begun = 0
        self._learning_rate = math.nan
        self._is_alone = True

    @property
    def series(self) -> tuple[list[int], list[float]]:
        """Steps and values."""
        return self.steps, self.values

    def start(self, trainer: Trainer) -> None:
        """Begin a run, or resume it."""
        self._pending = []
        self._learning_rate = math.nan
        self._begun = trainer.global_step
        self._is_alone = trainer.world_size == 1

    def stepping(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the learning rate of the step of this batch, in the hook ``on_before_optimizer_step``."""
        # Here: by the end of the batch a scheduler has set the next one. One that is a tensor on a device is left
        # alone, since reading it would wait for the device at every step.
        rates = [group.get("lr", math.nan) for group in optimizer.param_groups]
        known = [float(rate) for rate in rates if not (isinstance(rate, Tensor) and rate.is_cuda)]
        self._learning_rate = max(known, default=math.nan)

    def see(self, trainer: Trainer, outputs: Any) -> None:
        """Keep the loss of a batch, in the hook ``on_train_batch_end``; all ranks together.

        Args:
            trainer: The trainer.
            outputs: The hook's argument of this name.

        """
        loss = loss_in(outputs)
        if loss is not None:
            loss = loss.reshape(()).to(torch.float32, copy=True)  # the next line would write into the user's tensor
            # Under automatic optimization Lightning has divided it by the number of micro-batches.
            loss *= trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else 1
        # The step that the batch began in: `global_step` has moved on if this batch completed it.
        self._pending.append((self._begun, self._learning_rate, loss))
        self._learning_rate = math.nan
        self._begun = trainer.global_step
        # The same on all ranks, since every batch adds one entry, with or without a loss: they collect together.
        if len(self._pending) >= _PENDING:
            self.collect(trainer)

    def collect(self, trainer: Trainer) -> None:
        """Fetch the losses that are still on the device; all ranks together."""
        if self._pending:
            device = trainer.strategy.root_device
            self._keep(mean_over_ranks(trainer, self._stacked(device)).tolist())

    def collect_own(self) -> None:
        """The same for this rank's losses alone, for where the other ranks may not be there any more."""
        if self._pending:
            self._keep(self._stacked(torch.device("cpu")).tolist())

    def state_dict(self) -> dict[str, Any]:
        """The losses so far; with several ranks, those up to the last time that all ranks collected together."""
        # A checkpoint may be written by the first rank alone, which would wait for the others forever.
        if self._is_alone:
            self.collect_own()
        counts = [self._stride, self._count]
        state = {"steps": list(self.steps), "values": list(self.values), "counts": counts}
        is_told = not all(map(math.isnan, self.learning_rates))
        return {**state, "learning_rates": list(self.learning_rates)} if is_told else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        steps, values = [*map(int, state["steps"])], [*map(float, state["values"])]
        # An earlier version did not keep them.
        rates = [*map(float, state.get("learning_rates", [math.nan] * len(steps)))]
        if not len(steps) == len(values) == len(rates):
            raise ValueError("there are unequal numbers of steps and losses")
        self.steps, self.values, self.learning_rates = steps, values, rates
        self._stride, self._count = map(int, state["counts"])

    def _stacked(self, device: torch.device) -> Tensor:
        nothing = torch.tensor(math.nan, device=device)  # all ranks have to reduce equally many numbers
        return torch.stack([nothing if loss is None else loss.to(device) for _, _, loss in self._pending])

    def _keep(self, values: list[float]) -> None:
        for (step, rate, loss), value in zip(self._pending, values, strict=True):
            if loss is None or step % self._stride:
                continue
            if self.steps and self.steps[-1] == step:
                self._count += 1  # a further micro-batch of the same step
                self.values[-1] += (value - self.values[-1]) / self._count
                self.learning_rates[-1] = rate
            else:
                self.steps.append(step)
                self.values.append(value)
                self.learning_rates.append(rate)
                self._count = 1
        self._pending = []
        # By the step itself and not by place: a resumed run keeps the same steps as one without a break.
        while len(self.steps) > _MOST_KEPT:
            self._stride *= 2
            kept = [place for place, step in enumerate(self.steps) if step % self._stride == 0]
            self.steps = [self.steps[place] for place in kept]
            self.values = [self.values[place] for place in kept]
            self.learning_rates = [self.learning_rates[place] for place in kept]
