"""What the package takes for granted of Lightning's training loop, without its being promised.

When a new version breaks one of these, the message says which part of the package depends on it.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tests.contracts.live import Curves, Hooks, Module, needed_by

BASE = needed_by("training/callback")
SCHEDULE = needed_by("training/config")


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
        "own on_train_batch_start",
        "training_step",
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
    ], (
        needed_by("training/callback", "training/replica/replica", "training/updates")
        + "a measurement in `on_train_batch_start` must come before the step draws random numbers, with the batch"
        " already transferred and the module's own hook still to come, which a replay calls; and one in"
        " `on_after_backward` before the gradient is clipped and the step taken"
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_begins_with_setup_then_the_state_then_the_first_batch(fit, tmp_path):
    order = []

    class Samples(Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Tensor:
            order.append("data")
            return torch.ones(2)

    class Begins(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            order.append("setup")
            assert stage == "fit", BASE + "modules are checked before a fit, and not before a test"

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            order.append("on_train_start")
            assert trainer.num_training_batches == 4, BASE + "the fixed data are a share of these"
            assert isinstance(trainer.train_dataloader, DataLoader), BASE + "the fixed data are drawn from it"
            assert trainer.optimizers, BASE + "optimizers are checked in this hook"

        def state_dict(self) -> dict[str, Any]:
            return {"some": "state"}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            order.append("load_state_dict")

    loader = DataLoader(Samples(), 2)
    keeper = ModelCheckpoint(tmp_path, save_last=True)
    fit(Module(), Begins(), keeper, data=loader, enable_checkpointing=True)
    message = BASE + "schedules and vectors of a checkpoint are there when a run begins; the first batch is not"
    assert [*dict.fromkeys(order)] == ["setup", "on_train_start", "data"], message
    order.clear()
    fit(Module(), Begins(), data=loader, ckpt_path=keeper.last_model_path, max_epochs=2)
    assert [*dict.fromkeys(order)] == ["setup", "load_state_dict", "on_train_start", "data"], message


def test_all_callbacks_get_the_batch_itself_in_the_order_in_which_they_are_listed(fit):
    seen = []
    hooks = [
        Hooks(on_train_batch_start=lambda t, m, batch, i, n=n: seen.append((n, id(batch)))) for n in ("first", "second")
    ]
    trainer = fit(Module(), *hooks, limit_train_batches=1)
    (first, one), (second, other) = seen
    message = needed_by("training/callback", "training/sharing")
    assert trainer.callbacks[:2] == hooks, message + "callbacks that share a measurement find each other there"
    assert (first, second) == ("first", "second"), message + "the first one makes what is shared"
    assert one == other, message + "a step is told from the next one by its batch"


def test_the_last_hooks_of_a_run_are_these(fit):
    ended = []

    def stop(*_: Any) -> None:
        raise ZeroDivisionError

    def note(name: str) -> Callable[..., None]:
        return lambda *_, **__: ended.append(name)

    ends = {name: note(name) for name in ("on_train_epoch_end", "on_train_end", "on_exception", "teardown")}
    message = needed_by("training/callback", "callbacks/quasi_newton_lr_controller") + "they let go of what they hold"
    fit(Module(), Hooks(**ends))
    assert ended == ["on_train_epoch_end", "on_train_end", "teardown"], message
    ended.clear()
    with pytest.raises(ZeroDivisionError):
        fit(Module(), Hooks(**ends, on_before_zero_grad=stop))
    assert ended == ["on_exception"], message


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
    message = needed_by("training/updates", "callbacks/nudged_sgd_hook")
    assert norms["backward"] == norms["before"] > 1e-5, message + "the step's own gradient is reused as it is there"
    assert norms["end"] <= 1e-6


def test_an_optimizers_hook_after_its_step_sees_the_gradient_that_it_has_used(fit):
    norms, steps = {}, []

    def attach(trainer: pl.Trainer, module: Module) -> None:
        def note(*_: Any) -> None:
            norms["used"] = float(module.layer.weight.grad.norm())
            steps.append((trainer.global_step, tuple(ended)))

        trainer.optimizers[0].register_step_post_hook(note)

    ended: list[int] = []
    hooks = Hooks(
        on_train_start=attach,
        on_before_optimizer_step=lambda t, module, _: norms.setdefault(
            "before", float(module.layer.weight.grad.norm())
        ),
        on_train_batch_end=lambda trainer, module, outputs, batch, index: ended.append(index),
    )
    fit(Module(), hooks, gradient_clip_val=1e-6, accumulate_grad_batches=2, limit_train_batches=2)
    message = needed_by("callbacks/curvature_probe", "training/optimizers/step_hook")
    assert norms["used"] <= 1e-6 < 1e-5 < norms["before"], message + "clipping is what is between the two"
    assert steps == [(0, (0,))], message + "once for each step, before the batch ends and the step counts"


@pytest.mark.parametrize("hook", ["configure_gradient_clipping", "on_before_optimizer_step", "optimizer_step"])
def test_a_module_that_changes_its_gradients_does_so_in_hooks_that_it_overrides(fit, hook):
    message = needed_by("training/lightning_names") + "`may_clip` compares these with those of the base class"
    assert getattr(Module, hook) is getattr(pl.LightningModule, hook), message
    seen = {}

    def note(name: str) -> Callable[..., None]:
        return lambda trainer, module, *args: seen.setdefault(name, module.layer.weight.grad.clone())

    class Changes(Module):
        pass

    def changed(self: Module, *args: Any, **kwargs: Any) -> None:
        if hook == "optimizer_step":  # after the backward pass, which is in the closure
            closure = kwargs.get("optimizer_closure", args[-1])
            args = (*args[:-1], lambda: (closure(), self.layer.weight.grad.mul_(0.5))[0])
        else:
            self.layer.weight.grad.mul_(0.5)
        getattr(super(Changes, self), hook)(*args, **kwargs)

    setattr(Changes, hook, changed)
    hooks = Hooks(on_after_backward=note("backward"), on_train_batch_end=note("end"))
    fit(Changes(), hooks, limit_train_batches=1)
    assert torch.equal(seen["end"], 0.5 * seen["backward"]), message
    assert getattr(Changes, hook) is not getattr(pl.LightningModule, hook)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 99])
@pytest.mark.parametrize("streamed", [False, True])
def test_whether_the_optimizer_steps_after_a_batch_is_known_before_it(fit, accumulate, streamed):
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(torch.randn(14, 2))

    said, moved, steps = [], [], [0]

    def end(trainer: pl.Trainer, *_: Any) -> None:
        moved.append(trainer.global_step > steps[-1])
        steps.append(trainer.global_step)

    hooks = Hooks(
        on_train_batch_start=lambda trainer, *_: said.append(trainer.fit_loop.epoch_loop._should_accumulate()),
        on_train_batch_end=end,
    )
    data = DataLoader(Stream() if streamed else torch.randn(14, 2), 2)
    fit(Module(), hooks, data=data, accumulate_grad_batches=accumulate, max_epochs=2)
    assert said == [not made for made in moved], (
        needed_by("training/lightning_names", "training/sharing")
        + "the batches of a step are measured together, before the last of them"
    )
    assert len(moved) == 14


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
        needed_by("training/reporting/losses", "training/optimizers/own_gradient")
        + "the loss of a batch is multiplied by `trainer.accumulate_grad_batches`, and `.grad` is the mean over the"
        " batches of a step"
    )


def test_before_the_backward_pass_the_loss_of_the_step_is_passed_on(fit):
    class Losing(Module):
        def training_step(self, batch, batch_idx):
            self.last = super().training_step(batch, batch_idx)
            return self.last

    seen: list[tuple[Tensor, Tensor]] = []
    hooks = Hooks(on_before_backward=lambda trainer, module, loss: seen.append((loss.detach(), module.last.detach())))
    fit(Losing(), hooks)
    assert seen
    assert all(torch.equal(loss, own) for loss, own in seen), (
        needed_by("callbacks/curvature_probe", "training/optimizers/own_gradient")
        + "without accumulation `on_before_backward` gets what the step returned"
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
    message = needed_by("training/recording")
    assert found == list(range(8)), message + "Recorder.log takes the step from it"
    assert logger.steps["loss"] == logger.steps["lr-SGD"] == found, (
        message + "the curves of the module and those of the package share an axis"
    )


def test_a_trainer_that_logs_nothing_says_so(fit):
    assert fit(Module(), log_every_n_steps=0).log_every_n_steps == 0, BASE + "the user is told that nothing is measured"


def test_hooks_run_with_gradients_enabled(fit):
    enabled = []

    def note(*args: Any) -> None:
        enabled.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    fit(Module(), Hooks(on_train_batch_start=note, on_after_backward=note), limit_train_batches=1)
    assert enabled == [(True, False)] * 2, BASE + "measurements differentiate in these hooks"


def test_the_loss_of_a_step_is_an_output_of_it(fit):
    found = []
    fit(Module(), Hooks(on_train_batch_end=lambda trainer, module, outputs, *_: found.append(outputs["loss"])))
    message = needed_by("callbacks/quasi_newton_lr_controller") + "it halves the learning rate when this has risen"
    assert all(isinstance(loss, Tensor) and loss.ndim == 0 for loss in found), message


def test_generated_state_keys_tell_instances_apart():
    first, second = (Callback()._generate_state_key(end=end) for end in ("largest", "smallest"))
    message = needed_by("callbacks/curvature_probe", "callbacks/spectrum_tracker")
    assert first != second, message + "two instances keep their state side by side in a checkpoint"
    assert "largest" in first
    assert Callback()._generate_state_key(end="largest") == first, message + "a resumed run finds its state by the key"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_step_that_takes_the_iterator_is_told_by_the_name_of_its_argument(fit):
    class Takes(Module):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            batch, _, _ = next(dataloader_iter)
            return self.layer(batch).sum()

    message = needed_by("training/checks") + "such a step is refused, since a replay would take batches away"
    assert fit(Takes(), max_steps=2).global_step == 2, message
