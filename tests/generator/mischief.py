"""Callbacks that do what a reading callback must not do, each in one way, to prove that the comparison notices."""

import random
from collections.abc import Callable, Container
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback


class Mischief(Callback):
    """Does one thing in every step that is not for a reading callback to do.

    Args:
        act: What, given the trainer, the module, the batch and its index.
        only_at: In which batches of an epoch; by default in all.

    """

    def __init__(self, act: Callable[..., Any], only_at: Container[int] = range(1000)) -> None:
        self._act = act
        self._only_at = only_at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in self._only_at:
            self._act(trainer, pl_module, batch, batch_idx)


def replay_in_place(trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
    """Run the step on the module that trains, and put back only what is trained, and the generators."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    before = {p: p.detach().clone() for p in module.parameters() if p.requires_grad}
    module.training_step(batch, batch_idx)
    with torch.no_grad():
        for parameter, value in before.items():
            parameter.copy_(value)
    torch.set_rng_state(states[0]), np.random.set_state(states[1]), random.setstate(states[2])


def _writes_zero(trainer: Any, module: Any, *args: Any) -> None:
    with torch.no_grad():
        module.net.first.weight.add_(0.0)


def _freezes(trainer: Any, module: Any, *args: Any) -> None:
    module.net.first.weight.requires_grad_(False)


MISCHIEF: dict[str, Callable[..., Any]] = {
    "replays in place": replay_in_place,
    "draws from torch": lambda *args: torch.rand(()),
    "draws from NumPy": lambda *args: np.random.rand(),
    "draws from Python": lambda *args: random.random(),
    "writes zero to a parameter": _writes_zero,
    "freezes a parameter": _freezes,
    "drops gradients": lambda trainer, module, *args: module.zero_grad(),
    "switches a layer to eval": lambda trainer, module, *args: module.net.last.eval(),
    "leaves a hook": lambda trainer, module, *args: module.net.register_forward_hook(lambda *args: None),
    "leaves an attribute": lambda trainer, module, *args: vars(module).update(left=1),
    "logs under the user's name": lambda trainer, module, *args: module.log("loss", 0.0, on_epoch=True),
    "changes the learning rate": lambda trainer, *args: trainer.optimizers[0].param_groups[0].update(lr=0.09),
    "writes to the batch": lambda trainer, module, batch, batch_idx: batch[0].mul_(2),
    "takes a sample of the dataset": lambda trainer, *args: trainer.train_dataloader.dataset[0],
}
