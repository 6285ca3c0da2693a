"""What the package takes for granted of the objects that hang on a Trainer, private names among it.

When a new version breaks one of these, the message says which part of the package depends on it.
"""

import inspect
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from tests.contracts.live import Curves, Hooks, Module, needed_by

VIEW = needed_by("training/replica/trainer_view")
REPLAY = needed_by("training/replica/replica")


def shallow(value: Any) -> Any:
    copied = object.__new__(type(value))
    vars(copied).update(vars(value))
    return copied


# A second trainer that shares everything with the first one.


def test_a_trainer_is_its_attributes_and_finds_its_strategy_and_metrics_through_these(fit):
    def look(trainer: pl.Trainer, *args: Any) -> None:
        for part in (trainer, trainer.strategy, trainer._accelerator_connector, trainer._logger_connector):
            assert not any(vars(kind).get("__slots__") for kind in type(part).__mro__), VIEW + "it is copied by `vars`"
        view, strategy = shallow(trainer), shallow(trainer.strategy)
        connector, metrics = shallow(trainer._accelerator_connector), shallow(trainer._logger_connector)
        connector.strategy = strategy
        view._accelerator_connector, view._logger_connector = connector, metrics
        assert view.strategy is strategy, VIEW + "the view's strategy is its own"
        assert trainer.strategy is not strategy, VIEW + "and the trainer's is the trainer's"
        for name in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
            setattr(metrics, f"_{name}", {"mine": torch.tensor(3.0)})
            assert "mine" in getattr(view, name), VIEW + "what a replay writes there is seen by it"
            assert "mine" not in getattr(trainer, name), VIEW + "and by nobody else"

    fit(Module(), Hooks(on_train_batch_start=look), limit_train_batches=1)


def test_loggers_are_a_list_of_the_trainer_and_what_modules_see(fit):
    own = Curves()

    def look(trainer: pl.Trainer, module: Module, *args: Any) -> None:
        view = shallow(trainer)
        view._loggers = [DummyLogger()]
        assert isinstance(view.logger, DummyLogger), VIEW + "a replay logs to loggers that drop it"
        assert trainer.logger is own
        module._trainer = view
        try:
            assert isinstance(module.logger, DummyLogger), VIEW + "the module finds its loggers there"
            assert all(isinstance(logger, DummyLogger) for logger in module.loggers)
        finally:
            module._trainer = trainer

    fit(Module(), Hooks(on_train_batch_start=look), logger=own)


def test_loggers_keep_what_they_write_to_as_their_experiment(tmp_path):
    for logger in (TensorBoardLogger(tmp_path), CSVLogger(tmp_path)):
        assert logger.experiment is logger._experiment, VIEW + "a step may hold it, and gets another one in a replay"


def test_a_dummy_logger_takes_every_call():
    logger = DummyLogger()
    message = VIEW + "what a replayed step does with its logger goes to one of these"
    logger.log_metrics({"a": 1.0}, step=1)
    logger.log_hyperparams({"a": 1})
    logger.experiment.add_histogram("a", torch.ones(2), global_step=3)
    logger.experiment["a"] = 1
    assert logger.log_image("a", []) is None, message
    assert logger.save() is None, message


class Scheduled(Module):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def test_optimizers_and_schedulers_are_those_of_the_strategy(fit):
    def look(trainer: pl.Trainer, module: Module, *args: Any) -> None:
        strategy = trainer.strategy
        [optimizer], [wrapper] = strategy._optimizers, strategy._lightning_optimizers
        assert trainer.optimizers == [optimizer], VIEW + "the view has optimizers of its own"
        assert type(optimizer) is torch.optim.SGD, (
            needed_by("curvature/stability/optimizers", "training/optimizers")
            + "optimizers are told by their exact type"
        )
        assert module.optimizers() is wrapper, VIEW + "the module gets the wrapper"
        assert wrapper._optimizer is wrapper.optimizer is optimizer, VIEW + "the wrapper of a copy is one of the copy"
        assert wrapper._strategy.root_device == strategy.root_device, VIEW + "a wrapper steps through its strategy"
        copied = shallow(wrapper)
        assert isinstance(copied, torch.optim.SGD), VIEW + "the copy of a wrapper is of its class"
        vars(copied)["step"] = lambda *_: None
        assert copied.step() is None, VIEW + "its step can be made to do nothing"
        [config] = strategy.lr_scheduler_configs
        assert trainer.lr_scheduler_configs == [config], (
            needed_by("training/replica/trainer_view", "training/optimizers") + "schedulers are copied, or refused"
        )
        assert module.lr_schedulers() is config.scheduler, VIEW + "the module gets the scheduler itself"

    fit(Scheduled(), Hooks(on_train_batch_start=look), limit_train_batches=1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_in_the_place_of_no_optimizer_is_one_without_groups(fit):
    class Without(Module):
        def configure_optimizers(self) -> None:
            return None

    trainer = fit(Without(), limit_train_batches=1)
    assert not any(optimizer.param_groups for optimizer in trainer.optimizers), (
        needed_by("training/optimizers", "curvature/stability/optimizers") + "there is no learning rate then"
    )


def test_a_precision_that_scales_says_so_by_a_scaler():
    for precision in ("16-mixed", "bf16-mixed"):
        plugin = MixedPrecision(precision, "cpu")
        assert (plugin.scaler is not None) == (precision == "16-mixed"), (
            needed_by("training/optimizers") + "gradients that carry a scale until the step are refused"
        )


# A second module in the place of the first one.


def test_a_module_finds_its_trainer_and_a_trainer_its_module_through_these(fit):
    def look(trainer: pl.Trainer, module: Module, *args: Any) -> None:
        assert module._trainer is module.trainer is trainer, REPLAY + "a replica gets the view as its trainer"
        view, strategy, twin = shallow(trainer), shallow(trainer.strategy), shallow(module)
        view._accelerator_connector = shallow(trainer._accelerator_connector)
        view._accelerator_connector.strategy = strategy
        strategy._lightning_module = strategy.model = twin
        twin._trainer = view
        assert view.lightning_module is view.model is twin, REPLAY + "the view gives the replica as the trained module"
        assert trainer.lightning_module is trainer.model is module
        assert twin.trainer.lightning_module is twin

    fit(Module(), Hooks(on_train_batch_start=look), limit_train_batches=1)


@pytest.mark.parametrize("name", ["log", "log_dict", "print"])
def test_what_a_module_tells_is_a_function_of_its_base_class(name):
    message = REPLAY + "it is replaced there, where a method of a subclass that calls it finds it"
    assert inspect.isfunction(vars(pl.LightningModule)[name]), message


def test_log_takes_the_batch_size_by_name():
    for name in ("log", "log_dict"):
        assert "batch_size" in inspect.signature(getattr(pl.LightningModule, name)).parameters, (
            REPLAY + "batches are weighted by it"
        )


def test_transfer_of_a_batch_can_be_repeated(fit):
    message = REPLAY + "a batch of the fixed set goes this way again: the precision, the hooks, the device"

    def repeat(trainer: pl.Trainer, module: Module, batch: Tensor, batch_idx: int) -> None:
        del module.calls[:]
        converted = trainer.precision_plugin.convert_input(torch.ones(2, 2))
        assert converted.dtype == torch.float64, message
        hooked = module._on_before_batch_transfer(converted, dataloader_idx=0)
        assert module.calls == ["on_before_batch_transfer"], message
        moved = trainer.strategy.batch_to_device(hooked, dataloader_idx=0)
        assert module.calls[1:] == ["transfer_batch_to_device", "on_after_batch_transfer"], message
        assert torch.equal(moved, converted), message
        assert moved.device == trainer.strategy.root_device == module.device, message

    fit(Module(), Hooks(on_train_batch_start=repeat), precision="64-true", limit_train_batches=1)


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", None), ("bf16-mixed", torch.bfloat16)])
def test_train_step_context_is_that_of_the_precision(fit, precision, dtype):
    def enter(trainer: pl.Trainer, *args: Any) -> None:
        assert not torch.is_autocast_enabled("cpu"), REPLAY + "hooks run outside of the context, so it is entered"
        with trainer.precision_plugin.train_step_context():
            entered = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
            cached = torch.is_autocast_cache_enabled()
        assert entered == dtype, REPLAY + "the replayed step runs in the precision of the training"
        assert dtype is None or not cached, REPLAY + "cached casts would outlive a replay with other parameters"

    fit(Module(), Hooks(on_train_batch_start=enter), precision=precision, limit_train_batches=1)


def test_precision_without_a_context_of_its_own_has_one_as_well():
    with Precision().train_step_context() as entered:
        assert entered is None or isinstance(entered, nullcontext), REPLAY + "it is entered whatever the precision"


def test_arguments_of_training_step_are_told_by_lightning():
    class One(pl.LightningModule):
        def training_step(self, batch: Any) -> None: ...

    class Two(pl.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

    class Renamed(pl.LightningModule):
        def training_step(self, batch: Any, position: int) -> None: ...

    class Star(pl.LightningModule):
        def training_step(self, *args: Any) -> None: ...

    answers = [
        is_param_in_hook_signature(kind().training_step, "batch_idx", min_args=2) for kind in (One, Two, Renamed, Star)
    ]
    assert answers == [False, True, True, True], REPLAY + "a replayed step gets `batch_idx` only if it takes it"


def test_the_size_of_a_batch_is_read_by_lightning():
    message = REPLAY + "batches are weighted by it where nothing else is said"
    assert extract_batch_size({"x": torch.ones(3, 2), "y": [torch.ones(3)]}) == 3, message
    with pytest.raises(MisconfigurationException):
        extract_batch_size(SimpleNamespace(x=torch.ones(3)))
    with pytest.warns(UserWarning, match="ambiguous"):
        assert extract_batch_size([torch.ones(5, 2), torch.ones(3)]) == 5, message


# Data and strategies.


def test_train_dataloader_is_what_the_user_passed(fit):
    single, several, found = DataLoader(torch.randn(4, 2), 2), CombinedLoader([DataLoader(torch.randn(4, 2))]), []

    class AnyBatch(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.layer.weight.square().sum()

    hooks = Hooks(on_train_batch_start=lambda trainer, *args: found.append(trainer.train_dataloader))
    for data in (single, several):
        fit(AnyBatch(), hooks, data=data, limit_train_batches=1)
    message = needed_by("training/data/batches")
    assert found[0] is single, message + "the fixed data are drawn from a copy of it"
    assert not isinstance(found[1], DataLoader), message + "several loaders are told from a single one by this type"


def test_a_strategy_reduces_and_broadcasts_also_where_it_is_alone(fit):
    def look(trainer: pl.Trainer, *args: Any) -> None:
        strategy, value = trainer.strategy, torch.tensor(2.0)
        message = needed_by("callbacks/quasi_newton_lr_controller", "training/config", "training/data/batches")
        assert strategy.reduce(value, reduce_op="mean") == 2, message + "the loss of a step is that of all ranks"
        assert strategy.broadcast([1, 2]) == [1, 2], message + "the first rank decides"

    fit(Module(), Hooks(on_train_batch_start=look), limit_train_batches=1)


def test_strategies_that_shard_are_not_kinds_of_those_that_do_not():
    message = needed_by("training/checks")
    for sharded in (FSDPStrategy, ModelParallelStrategy):
        assert not issubclass(sharded, (DDPStrategy, SingleDeviceStrategy)), message + "strategies are told by class"
    assert issubclass(DeepSpeedStrategy, DDPStrategy), message + "it is refused in spite of that"


# Metrics.


def test_states_of_a_metric_are_attributes_and_not_buffers():
    metric, message = MeanMetric(), needed_by("training/replica/rules")
    assert not dict(metric.named_buffers()), message + "metrics are copied by their attributes"
    names = {"mean_value", "weight", "_update_count", "_computed"}
    assert names <= vars(metric).keys(), message + "metrics are copied by their attributes"


def test_synchronisation_of_a_metric_in_every_step_is_an_attribute():
    def never(*args: Any, **kwargs: Any) -> None:
        pytest.fail(REPLAY + "it is switched off, or ranks with fewer batches keep the others waiting")

    metric = MeanMetric(dist_sync_on_step=True, dist_sync_fn=never, distributed_available_fn=lambda: True)
    vars(metric)["dist_sync_on_step"] = False
    assert metric(torch.ones(2)) == 1
