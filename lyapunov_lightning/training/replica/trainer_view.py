"""What a replayed training step sees of the trainer: all of it to read, copies of what it may write to.

The trainer is far too large to be copied: it leads to the data, the loops, the processes and their groups. A training
step uses little of it. It logs through the trainer, sets learning rates, steps schedulers, asks for a sum over ranks,
keeps a number in an attribute. So a view shares everything with the trainer except its own attributes, the loggers, the
optimizers with their parameter groups, the schedulers, the logged metrics and the user's callbacks.
"""

from typing import Any

import torch

from lyapunov_lightning.training.lightning_names import Trainer, callbacks_of, either, in_library_of
from lyapunov_lightning.training.replica.copier import Copier
from lyapunov_lightning.training.replica.walk import by_attributes

_NOT_USERS = frozenset({"lightning", "lightning_fabric", "lyapunov_lightning", "pytorch_lightning", "torch"})
"""Packages whose objects the view shares with the trainer: its connectors and loops, Lightning's callbacks, ours."""

_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")

_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
"""Attributes in which Lightning keeps the values behind ``trainer.callback_metrics`` and its two relatives."""


def view_of(trainer: Trainer, copier: Copier) -> Any:
    """A view of the trainer, which from then on stands for the trainer wherever `copier` meets it.

    Args:
        trainer: The trainer.
        copier: Copies what a step may write to.

    """
    view = _shallow(trainer)
    # First of all: optimizers, schedulers and callbacks lead back to the trainer, and are to find the view.
    copier.memo.own(trainer, view)
    dummy = in_library_of(trainer, "loggers.logger.DummyLogger")
    for logger in trainer.loggers:
        stand_in = copier.memo.note(logger, dummy())
        experiment = getattr(logger, "_experiment", None)
        # Looked up without the property, which would start a run with the tracker where none has been started yet.
        if experiment is not None:
            copier.memo.note(experiment, stand_in.experiment)
    # `trainer.optimizers` and `trainer.lr_scheduler_configs` are read from the strategy, `trainer.strategy` and the
    # logged metrics from connectors. The view has its own of each, so that what a step sets there stays there.
    strategy = copier.memo.own(trainer.strategy, _shallow(trainer.strategy))
    accelerator_connector = copier.memo.own(trainer._accelerator_connector, _shallow(trainer._accelerator_connector))
    accelerator_connector.strategy = strategy
    optimizers, wrappers = trainer.strategy._optimizers, trainer.strategy._lightning_optimizers
    strategy._optimizers = copier.memo.note(optimizers, [_inert(optimizer, copier) for optimizer in optimizers])
    strategy._lightning_optimizers = copier.memo.note(wrappers, [_inert_wrapper(w, strategy, copier) for w in wrappers])
    strategy.lr_scheduler_configs = copier(trainer.strategy.lr_scheduler_configs)
    data_connector = copier.memo.own(trainer._data_connector, _shallow(trainer._data_connector))
    hooks = trainer._data_connector._datahook_selector
    selector = data_connector._datahook_selector = copier.memo.own(hooks, _shallow(hooks))
    selector.datamodule = datamodule = _datamodule(trainer, copier)
    logger_connector = copier.memo.own(trainer._logger_connector, _shallow(trainer._logger_connector))
    for name in _METRICS:
        setattr(logger_connector, name, dict(getattr(trainer._logger_connector, name)))
    own: dict[str, Any] = {
        "_loggers": [copier(logger) for logger in trainer.loggers],
        "_accelerator_connector": accelerator_connector,
        "_logger_connector": logger_connector,
        "_data_connector": data_connector,
        "datamodule": datamodule,
        "callbacks": list(callbacks_of(trainer)),
    }
    # For `self.trainer.my_counter += 1`, and for steps that look up one of the user's callbacks to write to it.
    users = {name: value for name, value in vars(trainer).items() if name not in own and _is_users(value)}
    callbacks = {place: callback for place, callback in enumerate(callbacks_of(trainer)) if _is_users(callback)}
    for place, callback in copier(callbacks).items():
        own["callbacks"][place] = callback
    vars(view).update(copier(users), **own)
    return view


def _datamodule(trainer: Trainer, copier: Copier) -> Any:
    """The data module: itself, or a copy of one whose own hooks move batches to the device, and may count them."""
    datamodule = getattr(trainer, "datamodule", None)
    kinds = either("LightningDataModule")
    if not isinstance(datamodule, kinds):
        return datamodule
    own = [
        name
        for name in _TRANSFER_HOOKS
        if all(getattr(type(datamodule), name) is not getattr(kind, name) for kind in kinds)
    ]
    # As a rule a data module stands for itself, since it holds the data; the datasets in it still do.
    return by_attributes(datamodule, copier, copier.memo) if own else datamodule


def _shallow(value: Any) -> Any:
    """Another object of the same class with the same attributes, made without a call of ``__init__``."""
    copied = object.__new__(type(value))
    vars(copied).update(vars(value))
    return copied


def _inert(optimizer: torch.optim.Optimizer, copier: Copier) -> Any:
    """An optimizer with parameter groups of its own, in which are the copy's parameters, and whose steps do nothing.

    Its state is shared: the moments of Adam are twice as large as the parameters, and `step` alone writes to them.

    """
    copied = copier.memo.own(optimizer, _shallow(optimizer))
    vars(copied).update(param_groups=copier(optimizer.param_groups), step=_ignore)
    return copied


def _inert_wrapper(wrapper: Any, strategy: Any, copier: Copier) -> Any:
    """The same for Lightning's wrapper of an optimizer, which is what ``self.optimizers()`` returns."""
    copied = copier.memo.own(wrapper, _shallow(wrapper))
    vars(copied).update(_optimizer=copier(wrapper._optimizer), _strategy=strategy, step=_ignore)
    return copied


def _is_users(value: Any) -> bool:
    """Whether the class of something is neither Lightning's, PyTorch's nor this package's."""
    return type(value).__module__.partition(".")[0] not in _NOT_USERS


def _ignore(*_: Any, **__: Any) -> None:
    pass
