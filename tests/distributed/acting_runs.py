"""Trainings that callbacks act upon; in some of them one rank once cannot measure."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from lyapunov_lightning import HessianConfig, NegativeCurvatureTracker, NudgedSGDHook, QuasiNewtonLRController
from lyapunov_lightning.callbacks import nudged_sgd_hook
from lyapunov_lightning.callbacks.negative_curvature_tracker import Descent
from tests.distributed.models import PlannedError, Smooth, observed, regression, unequal_shards
from tests.distributed.ranks import check

LR = 0.05
"""That of the module's own optimizer."""

CLIP = 0.5

FAILING_STEP = 2


def failing_loss(rank: int, step: int = FAILING_STEP) -> Callable[[Any, Any], Tensor]:
    """A loss that fails on the last rank at one step."""

    def loss_fn(module: Any, batch: Any) -> Tensor:
        if rank == 1 and module.trainer.global_step == step:
            raise PlannedError("planned")
        return module.loss(batch)

    return loss_fn


def acted_upon(callback: Any, rank: int, max_epochs: int = 1) -> dict[str, Any]:
    settings = {"use_distributed_sampler": False, "gradient_clip_val": CLIP}
    return observed(callback, unequal_shards(rank), max_epochs=max_epochs, **settings)


DESCENT = Descent(lr=0.1, max_step=0.1)


@check
def descent(rank: int) -> dict[str, Any]:
    """Trainings that move along the most negative direction."""
    on_the_step = HessianConfig("batch")
    trackers: dict[str, dict[str, Any]] = {
        "lanczos": {"hessian": on_the_step},
        "online": {"hessian": HessianConfig("fixed", fraction=1.0), "estimator": "online"},
        "failing": {"hessian": HessianConfig("batch", loss_fn=failing_loss(rank))},
    }
    epochs = {"online": 3}  # its first estimates are too rough to move by
    return {
        name: acted_upon(
            NegativeCurvatureTracker(1, 1, descent=DESCENT, tol=1e-8, **options), rank, epochs.get(name, 1)
        )
        for name, options in trackers.items()
    }


@check
def controlled(rank: int) -> dict[str, Any]:
    """Trainings at learning rates from curvature."""
    controllers: dict[str, dict[str, Any]] = {
        "along_update": {"rule": "along_update", "every_n_steps": 1},
        "inverse_sharpness": {"rule": "inverse_sharpness"},
        "failing": {"hessian": HessianConfig(loss_fn=failing_loss(rank))},
    }
    return {name: acted_upon(QuasiNewtonLRController(**options), rank) for name, options in controllers.items()}


class LostOnOneRank(Smooth):
    """Whose loss is NaN at one batch of the last rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        is_lost = self.trainer.global_rank == 1 and self.trainer.global_step == FAILING_STEP
        return super().training_step(batch, batch_idx) * (math.nan if is_lost else 1.0)


@check
def brought_back(rank: int) -> dict[str, Any]:
    """A training that one rank alone sees lost."""
    settings = {"use_distributed_sampler": False, "gradient_clip_val": CLIP}
    controller = QuasiNewtonLRController(1, hessian=HessianConfig(loss_fn=lambda module, batch: module.loss(batch)))
    return observed(controller, unequal_shards(rank), LostOnOneRank(), **settings)


NUM_SAMPLES, BATCH, EPOCHS = 21, 3, 2

NUDGED: dict[str, dict[str, Any]] = {
    "nudge": {"gamma": 0.1},
    "no_top": {"variant": "no_top"},
    "top_only": {"variant": "top_only"},
}


def nudged(loss_fn: Any = None, **options: Any) -> dict[str, Any]:
    """A training with another learning rate along the sharpest directions of the samples of all ranks."""
    hook = NudgedSGDHook(k=3, tol=1e-8, hessian=HessianConfig(fraction=1.0, loss_fn=loss_fn, seed=5), **options)
    loader = DataLoader(regression(NUM_SAMPLES), BATCH, shuffle=True)
    return observed(hook, loader, max_epochs=EPOCHS, gradient_clip_val=1.0, accumulate_grad_batches=2)


@check
def nudged_training(rank: int) -> dict[str, Any]:
    return {name: nudged(**options) for name, options in NUDGED.items()}


@check
def failing_nudge(rank: int) -> dict[str, Any]:
    """Trainings in which the last rank alone fails in the second epoch: in its loss, or after all products."""
    epochs = iter(range(EPOCHS))
    plain = nudged_sgd_hook.lanczos

    def lanczos_without_memory(*args: Any, **options: Any) -> Any:
        pairs = plain(*args, **options)
        if next(epochs) == 1 and rank == 1:
            raise PlannedError("planned")
        return pairs

    found = {"loss": nudged(failing_loss(rank, step=2), gamma=0.1)}
    nudged_sgd_hook.lanczos = lanczos_without_memory
    try:
        found["memory"] = nudged(gamma=0.1)
    finally:
        nudged_sgd_hook.lanczos = plain
    return found
