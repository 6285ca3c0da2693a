"""What the package takes for granted of Lightning and PyTorch without their promising it.

Names with an underscore, and behaviour that no documentation fixes. When a new version breaks one of these, the message
says which part of the package depends on it.
"""

import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

OBJECTIVE = "lyapunov_lightning/training/objective.py depends on it: "
BATCHES = "lyapunov_lightning/training/batches.py depends on it: "
RECORDING = "lyapunov_lightning/training/recording.py depends on it: "
SCHEDULE = "lyapunov_lightning/training/schedule.py depends on it: "
CALLBACKS = "lyapunov_lightning/callbacks depend on it: "
OPERATOR = "lyapunov_lightning/curvature/operator.py depends on it: "
STABILITY = "lyapunov_lightning/curvature/stability.py depends on it: "


class Curves(Logger):
    """Keeps the steps at which a tag was logged."""

    name, version = "curves", 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[str, list[int]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for tag in metrics:
            self.steps.setdefault(tag, []).append(step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Module(pl.LightningModule):
    """Notes the order in which its hooks are called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.calls: list[str] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.calls.append("training_step")
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        self.calls.append("on_before_batch_transfer")
        return batch

    def transfer_batch_to_device(self, batch: Tensor, device: torch.device, dataloader_idx: int) -> Tensor:
        self.calls.append("transfer_batch_to_device")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        self.calls.append("on_after_batch_transfer")
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Hooks(Callback):
    """Calls the given functions in the hooks of their names."""

    def __init__(self, **functions: Callable[..., Any]) -> None:
        for name, function in functions.items():
            setattr(self, name, function)


@pytest.fixture
def fit(tmp_path):
    def run(module: pl.LightningModule, *callbacks: Callback, data: Any = None, **settings: Any) -> pl.Trainer:
        settings = {
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": tmp_path,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "logger": False,
            "max_epochs": 1,
            "log_every_n_steps": 1,
            **settings,
        }
        trainer = pl.Trainer(callbacks=list(callbacks), **settings)
        trainer.fit(module, DataLoader(torch.randn(8, 2), 2) if data is None else data)
        return trainer

    return run


# The loop.


def test_hooks_of_a_step_come_in_this_order(fit):
    module = Module()

    def note(name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: module.calls.append(name)

    hooks = (
        "on_train_batch_start",
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
    )
    fit(module, Hooks(**{name: note(name) for name in hooks}), limit_train_batches=1)
    assert module.calls == [
        "on_before_batch_transfer",
        "transfer_batch_to_device",
        "on_after_batch_transfer",
        "on_train_batch_start",
        "training_step",
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
    ], (
        CALLBACKS + "a measurement in `on_train_batch_start` must come before the step draws random numbers, with the"
        " batch already transferred, and one in `on_after_backward` before the gradient is clipped and the step taken"
    )


def test_gradient_is_there_after_backward_and_clipped_only_afterwards(fit):
    norms = {}

    def note(name: str) -> Callable[..., None]:
        return lambda trainer, module, *args: norms.setdefault(name, float(module.layer.weight.grad.norm()))

    hooks = Hooks(
        on_after_backward=note("backward"),
        on_before_optimizer_step=note("before"),
        on_train_batch_end=note("end"),
    )
    fit(Module(), hooks, gradient_clip_val=1e-6, limit_train_batches=1)
    assert norms["backward"] == norms["before"] > 1e-5, CALLBACKS + "the step's own gradient is reused as it is there"
    assert norms["end"] <= 1e-6


def test_gradients_are_divided_by_the_number_of_accumulated_batches(fit):
    found = []

    def compare(trainer: pl.Trainer, module: Module) -> None:
        if not found:
            found.append(module.layer.weight.grad.clone())
            loss = module.layer(batches[0]).square().mean()
            found.append(torch.autograd.grad(loss, module.layer.weight)[0])

    batches = [torch.randn(2, 2) for _ in range(4)]
    fit(
        Module(), Hooks(on_after_backward=compare), data=DataLoader(batches, batch_size=None), accumulate_grad_batches=4
    )
    assert torch.allclose(4 * found[0], found[1], rtol=1e-5), (
        "lyapunov_lightning/training/gradients.py depends on it: the own gradient is multiplied by"
        " `trainer.accumulate_grad_batches`"
    )


def test_global_step_stands_still_over_accumulated_batches(fit):
    steps = []
    hooks = Hooks(
        on_train_batch_start=lambda trainer, *args: steps.append((trainer.global_step, trainer.current_epoch))
    )
    fit(Module(), hooks, accumulate_grad_batches=2, max_epochs=2)
    assert steps == [(0, 0), (0, 0), (1, 0), (1, 0), (2, 1), (2, 1), (3, 1), (3, 1)], (
        SCHEDULE + "a measurement is made once for each `global_step`"
    )


def test_batches_that_stepped_is_the_step_axis_of_lightning(fit):
    found, logger = [], Curves()
    hooks = Hooks(
        on_train_batch_start=lambda trainer, *args: found.append(trainer.fit_loop.epoch_loop._batches_that_stepped)
    )
    fit(Module(), LearningRateMonitor("step"), hooks, logger=logger, max_epochs=2)
    assert found == list(range(8)), RECORDING + "Recorder.log takes the step from it"
    assert logger.steps["loss"] == logger.steps["lr-SGD"] == found, (
        RECORDING + "the curves of the module and those of the package share an axis"
    )


def test_hooks_run_with_gradients_enabled(fit):
    enabled = []

    def note(*args: Any) -> None:
        enabled.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    fit(Module(), Hooks(on_train_batch_start=note, on_after_backward=note), limit_train_batches=1)
    assert enabled == [(True, False)] * 2, CALLBACKS + "measurements differentiate in these hooks"


# The trainer.


def test_callback_metrics_is_a_live_dictionary(fit):
    def write(trainer: pl.Trainer, *args: Any) -> None:
        trainer.callback_metrics.update({"mine": torch.tensor(3.0)})
        assert trainer.callback_metrics["mine"] == 3, RECORDING + "Recorder.log writes into it"

    trainer = fit(Module(), Hooks(on_train_batch_start=write), max_epochs=2)
    assert trainer.callback_metrics["mine"] == 3, RECORDING + "EarlyStopping finds the values at the end of an epoch"


def test_loggers_can_be_set_and_are_what_modules_see(fit):
    own = Curves()

    def swap(trainer: pl.Trainer, module: Module, *args: Any) -> None:
        before = trainer.loggers
        trainer.loggers = [DummyLogger()]
        try:
            message = OBJECTIVE + "the sandbox hides the loggers from a replayed step"
            assert isinstance(trainer.logger, DummyLogger), message
            assert isinstance(module.logger, DummyLogger), message
            assert all(isinstance(logger, DummyLogger) for logger in module.loggers), message
        finally:
            trainer.loggers = before
        assert trainer.loggers is before
        assert module.logger is own

    fit(Module(), Hooks(on_train_batch_start=swap), logger=own)


def test_a_dummy_logger_takes_every_call():
    logger = DummyLogger()
    message = OBJECTIVE + "what a replayed step does with its logger goes to one of these"
    logger.log_metrics({"a": 1.0}, step=1)
    logger.log_hyperparams({"a": 1})
    logger.experiment.add_histogram("a", torch.ones(2), global_step=3)
    logger.experiment["a"] = 1
    assert logger.log_image("a", []) is None, message
    assert logger.save() is None, message


def test_optimizers_are_those_of_the_module_and_not_wrappers(fit):
    types = []
    hooks = Hooks(on_train_batch_start=lambda trainer, *args: types.append(type(trainer.optimizers[0])))
    fit(Module(), hooks, limit_train_batches=1)
    assert types == [torch.optim.SGD], STABILITY + "the stability limit is looked up by the optimizer's exact type"


def test_logging_methods_can_be_shadowed_on_the_instance(fit):
    logger, module = Curves(), Module()
    vars(module).update(log=lambda *args, **kwargs: None)
    fit(module, logger=logger)
    assert "loss" not in logger.steps, OBJECTIVE + "the sandbox shadows `log`, `log_dict` and `print` this way"


def test_callbacks_are_listed_by_the_trainer(fit):
    callback = Callback()
    assert callback in fit(Module(), callback).callbacks, (
        "lyapunov_lightning/training/sharing.py depends on it: callbacks that share a measurement find each other there"
    )


def test_generated_state_keys_tell_instances_apart():
    first, second = (Callback()._generate_state_key(end=end) for end in ("largest", "smallest"))
    assert first != second, CALLBACKS + "two instances keep their state side by side in a checkpoint"
    assert "largest" in first
    assert Callback()._generate_state_key(end="largest") == first, (
        CALLBACKS + "a resumed run finds its state by the key"
    )


def test_train_dataloader_is_what_the_user_passed(fit):
    single, several, found = DataLoader(torch.randn(4, 2), 2), CombinedLoader([DataLoader(torch.randn(4, 2))]), []

    class AnyBatch(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.layer.weight.square().sum()

    hooks = Hooks(on_train_batch_start=lambda trainer, *args: found.append(trainer.train_dataloader))
    for data in (single, several):
        fit(AnyBatch(), hooks, data=data, limit_train_batches=1)
    assert isinstance(found[0], DataLoader), BATCHES + "samples are drawn from the dataset of a plain DataLoader"
    assert found[0].dataset is single.dataset, BATCHES + "samples are drawn from this dataset"
    assert not isinstance(found[1], DataLoader), BATCHES + "several loaders are told from a single one by this type"


# A batch on its way.


def test_transfer_of_a_batch_can_be_repeated(fit):
    message = OBJECTIVE + "a batch of the fixed set goes this way again: the precision, the hooks, the device"

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
        assert not torch.is_autocast_enabled("cpu"), OBJECTIVE + "hooks run outside of the context, so it is entered"
        with trainer.precision_plugin.train_step_context():
            entered = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
            cached = torch.is_autocast_cache_enabled()
        assert entered == dtype, OBJECTIVE + "the replayed step runs in the precision of the training"
        assert dtype is None or not cached, OBJECTIVE + "cached casts would outlive a replay with other parameters"

    fit(Module(), Hooks(on_train_batch_start=enter), precision=precision, limit_train_batches=1)


def test_precision_without_a_context_of_its_own_has_one_as_well():
    with Precision().train_step_context() as entered:
        assert entered is None or isinstance(entered, nullcontext)


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
    assert answers == [False, True, True, True], OBJECTIVE + "a replayed step gets `batch_idx` only if it takes it"


def test_collections_keep_their_structure_when_their_tensors_are_cloned():
    batch = {"a": [torch.ones(2)], "b": (1, "text"), "c": None}
    twin = apply_to_collection(batch, Tensor, torch.clone)
    assert twin["b"] == (1, "text"), BATCHES + "batches that pass are kept as clones"
    assert twin["c"] is None
    twin["a"][0].zero_()
    assert batch["a"][0].all(), BATCHES + "batches that pass are kept as clones"


def test_strategies_that_shard_are_not_kinds_of_those_that_do_not():
    for sharded in (FSDPStrategy, ModelParallelStrategy):
        assert not issubclass(sharded, (DDPStrategy, SingleDeviceStrategy)), (
            OBJECTIVE + "check_objective tells strategies by their class"
        )
    assert issubclass(DeepSpeedStrategy, DDPStrategy), OBJECTIVE + "check_objective refuses it in spite of that"


def test_rank_zero_functions_are_told_by_a_rank_attribute():
    assert rank_zero_only.rank == 0, RECORDING + "warnings come from the first process only"


# Progress bars.


def test_rich_bar_has_one_display_that_takes_tasks_of_unknown_length(fit):
    terminal = io.StringIO()
    bar = RichProgressBar(console_kwargs={"file": terminal, "force_terminal": True, "width": 160})

    def add(trainer: pl.Trainer, *args: Any) -> None:
        message = RECORDING + "_RichBar adds a task to the display of the trainer"
        assert trainer.progress_bar_callback is bar, message
        assert bar.is_enabled, message
        before = list(bar.progress.task_ids)
        task = bar.progress.add_task("mine", total=float("inf"))
        bar.progress.update(task, completed=3)
        bar.progress.refresh()
        bar.progress.remove_task(task)
        assert bar.progress.task_ids == before, message

    fit(Module(), bar, Hooks(on_train_batch_start=add), enable_progress_bar=True, limit_train_batches=2)
    assert "mine" in terminal.getvalue()


def test_tqdm_bar_is_drawn_at_twice_its_process_position(fit, capsys):
    bar = TQDMProgressBar(process_position=3)

    def look(trainer: pl.Trainer, *args: Any) -> None:
        assert trainer.progress_bar_callback is bar
        assert bar.process_position == 3, RECORDING + "_TqdmBar takes the line below that of the trainer"
        assert abs(bar.train_progress_bar.pos) == 6, RECORDING + "_TqdmBar takes the line below that of the trainer"
        assert isinstance(bar.train_progress_bar, Tqdm), RECORDING + "_TqdmBar is of the same kind"

    fit(Module(), bar, Hooks(on_train_batch_start=look), enable_progress_bar=True, limit_train_batches=1)
    capsys.readouterr()


def test_a_trainer_without_bar_has_no_bar_callback(fit):
    assert fit(Module()).progress_bar_callback is None, RECORDING + "_open_bar then shows nothing"


# Metrics.


def test_states_of_a_metric_are_attributes_and_not_buffers():
    metric = MeanMetric()
    assert not dict(metric.named_buffers()), OBJECTIVE + "the sandbox keeps metrics by their attributes"
    assert {"mean_value", "weight", "_update_count", "_computed"} <= vars(metric).keys(), (
        OBJECTIVE + "the sandbox keeps metrics by their attributes"
    )


def test_synchronisation_of_a_metric_in_every_step_is_an_attribute():
    def never(*args: Any, **kwargs: Any) -> None:
        pytest.fail(OBJECTIVE + "the sandbox switches it off, or processes with fewer batches keep the others waiting")

    metric = MeanMetric(dist_sync_on_step=True, dist_sync_fn=never, distributed_available_fn=lambda: True)
    vars(metric)["dist_sync_on_step"] = False
    assert metric(torch.ones(2)) == 1


# PyTorch.


def test_functional_call_writes_to_the_substitutes_only():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    tensors = [*module.parameters(), *module.buffers()]
    before = [(tensor.clone(), tensor._version, tensor.data_ptr()) for tensor in tensors]
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    torch.func.functional_call(module, buffers, (torch.randn(4, 2),))
    for tensor, (value, version, pointer) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value), OBJECTIVE + "BatchNorm statistics are those of the clones"
        assert (tensor._version, tensor.data_ptr()) == (version, pointer), OBJECTIVE + "nothing is written back"
    assert buffers["1.num_batches_tracked"] == 1


def test_functional_call_substitutes_a_tied_parameter_in_all_its_places():
    module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    module["b"].weight = module["a"].weight

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["b"](self.inner["a"](x))

    doubled = torch.func.functional_call(Both(), {"inner.a.weight": 2 * torch.eye(2)}, (torch.ones(1, 2),))
    assert torch.equal(doubled, torch.full((1, 2), 4.0)), OBJECTIVE + "`named_parameters` names a tied parameter once"


def test_autograd_grad_neither_accumulates_nor_calls_accumulation_hooks():
    x, called = torch.ones(2, requires_grad=True), []
    x.register_post_accumulate_grad_hook(called.append)
    torch.autograd.grad((x**3).sum(), x, create_graph=True)
    assert x.grad is None, OPERATOR + "`.grad` is the optimizer's"
    assert not called, OPERATOR + "the hooks by which DDP reduces gradients must not fire"


def test_attention_of_plain_mathematics_is_differentiable_twice():
    q = torch.randn(1, 1, 4, 2, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        out = nn.functional.scaled_dot_product_attention(q, q, q)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), q)
    assert second.isfinite().all(), OPERATOR + "fused attention is switched off for the forward pass only"


def test_hooks_on_saved_tensors_see_the_graph_of_a_gradient():
    sizes, x = [], torch.randn(5, requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        (gradient,) = torch.autograd.grad(x.exp().sin().sum(), x, create_graph=True)
    assert sizes, OPERATOR + "the memory of a kept graph is counted by them"
    (second,) = torch.autograd.grad(gradient.sum(), x)
    expected = x.exp() * x.exp().cos() - x.exp() ** 2 * x.exp().sin()
    assert torch.allclose(second, expected.detach(), rtol=1e-4), OPERATOR + "detached copies serve for the second pass"


def test_compiled_code_can_be_run_eagerly_for_a_while():
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            calls.append(1)
            return graph.forward(*args)

        return run

    torch._dynamo.reset()
    layer = torch.compile(nn.Linear(2, 2), backend=backend)
    layer(torch.ones(1, 2))
    before = len(calls)
    with torch.compiler.set_stance("force_eager"):
        layer(torch.ones(1, 2))
    assert len(calls) == before == 1, OBJECTIVE + "compiled code has one derivative only"
    layer(torch.ones(1, 2))
    assert len(calls) == 2, OBJECTIVE + "and the training goes on with it afterwards"


@pytest.mark.parametrize(
    ("kind", "settings", "names"),
    [
        (torch.optim.Adam, {}, {"exp_avg_sq", "step"}),
        (torch.optim.Adam, {"amsgrad": True}, {"exp_avg_sq", "max_exp_avg_sq", "step"}),
        (torch.optim.AdamW, {}, {"exp_avg_sq", "step"}),
        (torch.optim.RMSprop, {}, {"square_avg"}),
        (torch.optim.RMSprop, {"centered": True}, {"square_avg", "grad_avg"}),
    ],
)
def test_second_moments_are_found_in_the_state_of_the_optimizer(kind, settings, names):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = kind([parameter], lr=0.1, **settings)
    parameter.grad = torch.tensor([1.0, 2.0])
    optimizer.step()
    assert names <= optimizer.state[parameter].keys(), STABILITY + "the preconditioner is read from them"


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (torch.optim.SGD, {"lr", "momentum", "nesterov", "dampening", "weight_decay", "maximize"}),
        (torch.optim.Adam, {"lr", "betas", "eps", "amsgrad", "maximize"}),
        (torch.optim.AdamW, {"lr", "betas", "eps", "amsgrad", "maximize"}),
        (torch.optim.RMSprop, {"lr", "momentum", "eps", "centered", "maximize"}),
    ],
)
def test_parameter_groups_hold_what_decides_on_stability(kind, names):
    assert names <= kind([nn.Parameter(torch.ones(2))], lr=0.1).param_groups[0].keys(), STABILITY + "it reads them"
