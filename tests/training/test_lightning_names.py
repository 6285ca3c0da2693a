"""Classes of `lightning.pytorch` and of `pytorch_lightning` are recognised alike, and ours belong to both."""

import importlib

import lightning.fabric.utilities.exceptions
import lightning.pytorch
import pytest
import torch
from lightning_utilities.core import rank_zero
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lyapunov_lightning.training import lightning_names
from lyapunov_lightning.training.lightning_names import Callback, MisconfigurationException, either, in_library_of
from tests.processes import outputs

pytorch_lightning = pytest.importorskip("pytorch_lightning", reason="the second name is not installed")

LIBRARIES = [lightning.pytorch, pytorch_lightning]

both_names = pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.__name__)

NAMES = [
    "Callback",
    "LightningDataModule",
    "LightningModule",
    "Trainer",
    "callbacks.ModelCheckpoint",
    "callbacks.RichProgressBar",
    "callbacks.TQDMProgressBar",
    "callbacks.progress.tqdm_progress.Tqdm",
    "loggers.TensorBoardLogger",
    "loggers.WandbLogger",
    "loggers.logger.DummyLogger",
    "strategies.DDPStrategy",
    "strategies.DeepSpeedStrategy",
    "strategies.FSDPStrategy",
    "strategies.ModelParallelStrategy",
    "strategies.SingleDeviceStrategy",
    "utilities.CombinedLoader",
]


def quiet_trainer(library, **settings):
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return library.Trainer(accelerator="cpu", max_epochs=1, **{**off, **settings})


def module_of(library):
    class Learner(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Learner()


# Recognised.


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stands_for_the_class_of_either_library(name):
    place, _, attribute = name.rpartition(".")
    classes = tuple(
        getattr(importlib.import_module(f"{library.__name__}.{place}".rstrip(".")), attribute) for library in LIBRARIES
    )
    assert either(name) == classes
    assert classes[0] is not classes[1]


@both_names
def test_live_objects_are_recognised(library):
    trainer = quiet_trainer(library)
    assert isinstance(trainer, either("Trainer"))
    assert isinstance(module_of(library), either("LightningModule"))
    assert isinstance(trainer.strategy, either("strategies.SingleDeviceStrategy"))
    assert not isinstance(trainer.strategy, either("strategies.DDPStrategy"))


def test_a_class_that_one_library_lacks_is_that_of_the_other(monkeypatch):
    class New:
        pass

    monkeypatch.setattr(lightning.pytorch.callbacks, "OfANewVersion", New, raising=False)
    assert either("callbacks.OfANewVersion") == (New,)
    either.cache_clear()


@pytest.mark.parametrize("name", ["callbacks.NoSuchThing", "no_such_module.Trainer", "callbacks.nothing.here.Callback"])
def test_a_class_that_neither_library_has_is_an_error(name):
    with pytest.raises(AttributeError, match=rf"lightning\.pytorch nor pytorch_lightning has `{name}`"):
        either(name)


def test_a_module_whose_own_imports_fail_is_not_taken_for_a_missing_one(monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text("import package_that_is_not_installed\n")
    monkeypatch.setattr(lightning.pytorch.callbacks, "__path__", [str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match="package_that_is_not_installed"):
        either("callbacks.broken.Thing")


@both_names
@pytest.mark.parametrize("kind", ["trainer", "module", "logger"])
def test_a_part_is_given_what_is_of_its_own_library(library, kind):
    class OfAUser(library.loggers.logger.DummyLogger):
        pass

    part = {"trainer": quiet_trainer, "module": module_of, "logger": lambda library: OfAUser()}[kind](library)
    assert in_library_of(part, "loggers.logger.DummyLogger") is library.loggers.logger.DummyLogger
    assert in_library_of(part, "LightningModule") is library.LightningModule
    assert in_library_of(part, "utilities.data.extract_batch_size") is library.utilities.data.extract_batch_size
    with pytest.raises(AttributeError, match=rf"{library.__name__} does not have `loggers\.NoSuchLogger`"):
        in_library_of(part, "loggers.NoSuchLogger")


def test_what_is_of_neither_library_is_given_what_is_of_the_first():
    assert in_library_of(object(), "Trainer") is lightning.pytorch.Trainer


# Ours.


class Counting(Callback):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def setup(self, trainer, pl_module, stage) -> None:
        super().setup(trainer, pl_module, stage)
        self.calls.append("setup")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.calls.append("on_train_batch_start")

    def state_dict(self) -> dict[str, int]:
        return {"calls": len(self.calls)}


@both_names
def test_a_trainer_takes_our_callback_without_a_list_and_calls_each_hook_once(library):
    callback = Counting()
    trainer = quiet_trainer(library, callbacks=callback)
    trainer.fit(module_of(library), DataLoader(torch.randn(3, 2)))
    assert trainer.callbacks == [callback]
    assert callback.calls == ["setup"] + 3 * ["on_train_batch_start"]


@both_names
def test_the_state_of_our_callback_is_in_the_checkpoint(library, tmp_path):
    callback = Counting()
    trainer = quiet_trainer(library, callbacks=callback)
    trainer.fit(module_of(library), DataLoader(torch.randn(3, 2)))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert saved["callbacks"] == {callback.state_key: {"calls": 4}}


@both_names
def test_our_callback_adds_nothing_to_its_bases(library):
    ours, theirs = Callback(), library.Callback()
    public = [name for name in dir(theirs) if not name.startswith("_")]
    assert [name for name in dir(ours) if not name.startswith("_")] == public
    assert ours.state_dict() == theirs.state_dict() == {}


@pytest.mark.parametrize(
    "kind",
    [
        lightning.fabric.utilities.exceptions.MisconfigurationException,
        lightning.pytorch.utilities.exceptions.MisconfigurationException,
        importlib.import_module("lightning_fabric.utilities.exceptions").MisconfigurationException,
        pytorch_lightning.utilities.exceptions.MisconfigurationException,
    ],
    ids=lambda kind: kind.__module__,
)
def test_our_refusals_are_caught_by_the_exception_of_either_name(kind):
    with pytest.raises(kind, match="cause and remedy"):
        raise MisconfigurationException("cause and remedy")


# The import.


IN_USE = """
import {name}
import lyapunov_lightning.training.lightning_names
import {name}
from {name}.utilities.rank_zero import LightningDeprecationWarning
from lightning_utilities.core import rank_zero
assert rank_zero.log.name == "{name}.utilities.rank_zero", rank_zero.log
assert rank_zero.rank_zero_deprecation_category is LightningDeprecationWarning
"""


def test_messages_are_logged_under_the_name_that_was_in_use(tmp_path):
    """Else `logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)` has no effect beside this package."""
    outputs(tmp_path, *(IN_USE.format(name=name) for name in ("lightning.pytorch", "pytorch_lightning")))


def test_messages_are_claimed_where_no_name_is_in_use(monkeypatch):
    monkeypatch.setattr(lightning_names, "_NAMES", ("not_imported",))
    monkeypatch.setattr(rank_zero, "log", rank_zero.log)
    with lightning_names._messages_stay_where_they_are():
        rank_zero.log = "claimed"
    assert rank_zero.log == "claimed"


# What is asked of a trainer.


@both_names
def test_the_batches_before_the_last_one_of_a_step_are_those_that_accumulate(library):
    said = []

    class Asking(library.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            said.append(lightning_names.is_accumulating(trainer))

    data = DataLoader(torch.randn(10, 2), 2)
    quiet_trainer(library, callbacks=[Asking()], accumulate_grad_batches=3).fit(module_of(library), data)
    assert said == [True, True, False, True, False]
    said.clear()
    quiet_trainer(library, callbacks=[Asking()]).fit(module_of(library), data)
    assert said == [False] * 5


@both_names
@pytest.mark.parametrize("hook", ["configure_gradient_clipping", "on_before_optimizer_step", "optimizer_step"])
def test_gradients_may_be_clipped_by_the_trainer_or_in_a_hook_of_the_module(library, hook):
    module, trainer = module_of(library), quiet_trainer(library)
    assert not lightning_names.may_clip(trainer, module)
    assert lightning_names.may_clip(quiet_trainer(library, gradient_clip_val=0.0), module)
    assert lightning_names.may_clip(quiet_trainer(library, gradient_clip_val=1.0), module)
    clipping = type("Clipping", (type(module),), {hook: lambda self, *args, **kwargs: None})
    assert lightning_names.may_clip(trainer, clipping())
    assert lightning_names.may_clip(trainer, type("Below", (clipping,), {})())
