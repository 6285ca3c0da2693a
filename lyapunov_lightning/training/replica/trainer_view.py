"""What a replayed training step sees of the trainer: all of it to read, copies of what it may write to.

The trainer is far too large to be copied, and most of it is no business of a training step. Steps do log through it,
set learning rates, step schedulers, ask for the sum over ranks, keep numbers in it. So a view shares everything with
the trainer but its own attributes, the loggers, the optimizers with their parameter groups, the schedulers, the logged
metrics and the user's callbacks.
"""

from typing import Any

import torch

from lyapunov_lightning.training.lightning_names import in_library_of
from lyapunov_lightning.training.replica.copier import Copier

_NOT_USERS = frozenset({"lightning", "lightning_fabric", "lyapunov_lightning", "pytorch_lightning", "torch"})

_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


def view_of(trainer: Any, copier: Copier) -> Any:
    """A view of the trainer, which `copier` puts in the trainer's place.

    Args:
        trainer: The trainer.
        copier: Copies what a step may write to.

    """
    view = _shallow(trainer)
    copier.own(trainer, view)
    dummy = in_library_of(trainer, "loggers.logger.DummyLogger")
    for logger in trainer.loggers:
        stand_in = copier.note(logger, dummy())
        experiment = getattr(logger, "_experiment", None)
        if experiment is not None:
            copier.note(experiment, stand_in.experiment)
    strategy = copier.own(trainer.strategy, _shallow(trainer.strategy))
    accelerator_connector = _shallow(trainer._accelerator_connector)
    accelerator_connector.strategy = strategy
    strategy._optimizers = [_inert(optimizer, copier) for optimizer in trainer.strategy._optimizers]
    strategy._lightning_optimizers = [
        _inert_wrapper(o, strategy, copier) for o in trainer.strategy._lightning_optimizers
    ]
    strategy.lr_scheduler_configs = copier(trainer.strategy.lr_scheduler_configs)
    logger_connector = _shallow(trainer._logger_connector)
    for name in _METRICS:
        setattr(logger_connector, name, dict(getattr(trainer._logger_connector, name)))
    own: dict[str, Any] = {
        "_loggers": [copier(logger) for logger in trainer.loggers],
        "_accelerator_connector": accelerator_connector,
        "_logger_connector": logger_connector,
        "callbacks": list(trainer.callbacks),
    }
    users = {name: value for name, value in vars(trainer).items() if name not in own and _is_users(value)}
    callbacks = {place: callback for place, callback in enumerate(trainer.callbacks) if _is_users(callback)}
    for place, callback in copier(callbacks).items():
        own["callbacks"][place] = callback
    vars(view).update(copier(users), **own)
    return view


def _shallow(value: Any) -> Any:
    """Another object with the same attributes."""
    copied = object.__new__(type(value))
    vars(copied).update(vars(value))
    return copied


def _inert(optimizer: torch.optim.Optimizer, copier: Copier) -> Any:
    """An optimizer with parameter groups of its own, the copies' parameters in them, whose steps do nothing."""
    copied = copier.own(optimizer, _shallow(optimizer))
    vars(copied).update(param_groups=copier(optimizer.param_groups), step=_ignore)
    return copied


def _inert_wrapper(wrapper: Any, strategy: Any, copier: Copier) -> Any:
    """The same of Lightning's wrapper of an optimizer, which ``self.optimizers()`` returns."""
    copied = copier.own(wrapper, _shallow(wrapper))
    vars(copied).update(_optimizer=copier(wrapper._optimizer), _strategy=strategy, step=_ignore)
    return copied


def _is_users(value: Any) -> bool:
    """Whether something is neither Lightning's, PyTorch's nor this package's."""
    return type(value).__module__.partition(".")[0] not in _NOT_USERS


def _ignore(*_: Any, **__: Any) -> None:
    pass
