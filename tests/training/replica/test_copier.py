"""What a step does to its module, and wherever else it keeps its state, stays in the replica."""

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric, MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassCohenKappa, MulticlassPrecision, MulticlassRecall

from lyapunov_lightning.curvature.loss.randomness import RandomState, preserved_randomness
from lyapunov_lightning.training.replica.objective import ProbeBatch, TrainingObjective
from tests.training.live import (
    Task,
    hessian_of,
    loss_at,
    mlp,
    noisy,
    replay,
    same,
    twin_of,
    twin_product,
)

# No trace.


class Habit(NamedTuple):
    """What a user's module does in its training step beside computing a loss."""

    prepare: Callable[[pl.LightningModule], Any]
    step: Callable[[pl.LightningModule, Any], Any]
    read: Callable[[pl.LightningModule], Any]


def metric_state(metric: Any) -> dict[str, Any]:
    """What a metric has accumulated, and what it knows of its own state."""
    return {name: getattr(metric, name) for name in (*metric._defaults, "_update_count", "_computed", "_is_synced")}


def collection_state(collection: MetricCollection) -> list[Any]:
    members = [metric_state(metric) for metric in collection.values(copy_state=False)]
    return [collection._groups, collection._groups_checked, members]


def frozen(value: Any) -> Any:
    """A copy that shares nothing with the original; tensors may be part of a graph."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        twin = copy.copy(value)
        dict.update(twin, {key: frozen(item) for key, item in value.items()})  # a Counter's own would add
        return twin
    if isinstance(value, deque):
        return deque(map(frozen, value), value.maxlen)
    return type(value)(map(frozen, value)) if isinstance(value, (list, tuple)) else copy.deepcopy(value)


def set_attribute(name: str, build: Callable[[], Any]) -> Callable[[Any], None]:
    return lambda module: setattr(module, name, build())


class Meter:
    """A running mean, as users write them."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: float) -> None:
        self.total += value
        self.count += 1


def ones() -> Tensor:
    return torch.ones(3)


def in_place(module: Any, batch: Any) -> None:
    module.kept.mul_(0.5)


def collection() -> MetricCollection:
    return MetricCollection([MulticlassPrecision(3), MulticlassRecall(3), MulticlassCohenKappa(3)])


def classify(module: Any, batch: Any) -> None:
    module.kept(module.net(batch[0]).softmax(1), batch[1].softmax(1).argmax(1))


HABITS = {
    "list": Habit(set_attribute("kept", lambda: [0]), lambda m, b: m.kept.append(1), lambda m: m.kept),
    "dict": Habit(set_attribute("kept", lambda: {"a": 0}), lambda m, b: m.kept.update(a=1, b=2), lambda m: m.kept),
    "dict-order": Habit(
        set_attribute("kept", lambda: {"a": 0, "b": 1}), lambda m, b: m.kept.update(a=m.kept.pop("a")), lambda m: m.kept
    ),
    "set": Habit(set_attribute("kept", lambda: {0}), lambda m, b: m.kept.add(1), lambda m: m.kept),
    "deque": Habit(
        set_attribute("kept", lambda: deque([0, 1], maxlen=2)), lambda m, b: m.kept.append(2), lambda m: m.kept
    ),
    "counter": Habit(
        set_attribute("kept", lambda: Counter("aab")), lambda m, b: m.kept.update("abc"), lambda m: m.kept
    ),
    "ordered-dict": Habit(
        set_attribute("kept", lambda: OrderedDict(a=0, b=1)), lambda m, b: m.kept.move_to_end("a"), lambda m: m.kept
    ),
    "defaultdict": Habit(set_attribute("kept", lambda: defaultdict(int)), lambda m, b: m.kept["a"], lambda m: m.kept),
    "list-in-defaultdict": Habit(
        set_attribute("kept", lambda: defaultdict(list, a=[0])), lambda m, b: m.kept["a"].append(1), lambda m: m.kept
    ),
    "dict-in-list": Habit(
        set_attribute("kept", lambda: [{"a": 0}]), lambda m, b: m.kept[0].update(a=1), lambda m: m.kept
    ),
    "plain-tensor-in-place": Habit(set_attribute("kept", ones), in_place, lambda m: m.kept),
    "plain-tensor-rebound": Habit(
        set_attribute("kept", ones), lambda m, b: setattr(m, "kept", m.kept * 0.5), lambda m: m.kept
    ),
    "tensor-in-dict-in-place": Habit(
        set_attribute("kept", lambda: {"a": torch.ones(3)}), lambda m, b: m.kept["a"].mul_(0.5), lambda m: m.kept
    ),
    "tensor-in-list-in-place": Habit(
        set_attribute("kept", lambda: [torch.ones(3)]), lambda m, b: m.kept[0].mul_(0.5), lambda m: m.kept
    ),
    "number": Habit(set_attribute("kept", lambda: 0), lambda m, b: setattr(m, "kept", m.kept + 1), lambda m: m.kept),
    "attribute-added": Habit(
        lambda m: None, lambda m, b: setattr(m, "kept", 1), lambda m: sorted(k for k in vars(m) if k == "kept")
    ),
    "attribute-deleted": Habit(
        set_attribute("kept", lambda: 1), lambda m, b: vars(m).pop("kept", None), lambda m: vars(m).get("kept")
    ),
    "attribute-of-submodule": Habit(
        lambda m: setattr(m.net, "kept", [0]), lambda m, b: m.net.kept.append(1), lambda m: m.net.kept
    ),
    "own-object": Habit(set_attribute("kept", Meter), lambda m, b: m.kept.update(1.0), lambda m: dict(vars(m.kept))),
    "buffer-in-place": Habit(lambda m: m.register_buffer("kept", torch.ones(3)), in_place, lambda m: m.kept),
    "buffer-rebound": Habit(
        lambda m: m.register_buffer("kept", torch.ones(3)),
        lambda m, b: setattr(m, "kept", m.kept * 0.5),
        lambda m: m.kept,
    ),
    "buffer-that-was-none": Habit(
        lambda m: m.register_buffer("kept", None), lambda m, b: setattr(m, "kept", torch.ones(3)), lambda m: m.kept
    ),
    "buffer-added": Habit(
        lambda m: None, lambda m, b: m.register_buffer("kept", torch.ones(3)), lambda m: sorted(dict(m.named_buffers()))
    ),
    "batchnorm": Habit(
        set_attribute("norm", lambda: nn.BatchNorm1d(4)),
        lambda m, b: m.norm(b[0]),
        lambda m: dict(m.norm.named_buffers()),
    ),
    "frozen-parameter-in-place": Habit(
        set_attribute("kept", lambda: nn.Parameter(torch.ones(3), requires_grad=False)),
        in_place,
        lambda m: m.kept.detach(),
    ),
    "trainable-parameter-in-place": Habit(
        lambda m: None,
        lambda m, b: m.net[0].weight.data.clamp_(-0.1, 0.1),
        lambda m: m.net[0].weight.detach(),
    ),
    "metric": Habit(
        set_attribute("kept", MeanSquaredError), lambda m, b: m.kept(m.net(b[0]), b[1]), lambda m: metric_state(m.kept)
    ),
    "metric-synced-on-step": Habit(
        set_attribute("kept", lambda: MeanMetric(dist_sync_on_step=True)),
        lambda m, b: m.kept(b[0]),
        lambda m: metric_state(m.kept),
    ),
    "metric-of-lists": Habit(
        set_attribute("kept", CatMetric), lambda m, b: m.kept.update(b[0]), lambda m: metric_state(m.kept)
    ),
    "metric-computed-and-reset": Habit(
        set_attribute("kept", MeanMetric),
        lambda m, b: (m.kept.update(b[0]), m.kept.compute(), m.kept.reset()),
        lambda m: metric_state(m.kept),
    ),
    "metric-in-dict": Habit(
        set_attribute("kept", lambda: {"a": MeanMetric()}),
        lambda m, b: m.kept["a"].update(b[0]),
        lambda m: metric_state(m.kept["a"]),
    ),
    "metric-in-nested-list": Habit(
        set_attribute("kept", lambda: {"a": [MeanMetric()]}),
        lambda m, b: m.kept["a"][0].update(b[0]),
        lambda m: metric_state(m.kept["a"][0]),
    ),
    "metric-collection": Habit(set_attribute("kept", collection), classify, lambda m: collection_state(m.kept)),
    "mode": Habit(lambda m: None, lambda m, b: m.net.eval(), lambda m: [inner.training for inner in m.modules()]),
    "hook": Habit(
        lambda m: None,
        lambda m, b: m.net.register_forward_hook(lambda *args: None),
        lambda m: list(m.net._forward_hooks),
    ),
    "batch": Habit(lambda m: None, lambda m, b: b[0].data.add_(1), lambda m: m.trainer.present_batch),
    "batch-list": Habit(lambda m: None, lambda m, b: b.append(0), lambda m: m.trainer.present_batch),
}


class Untidy(Task):
    def __init__(self, habit: Habit, fails: bool) -> None:
        super().__init__(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)))
        habit.prepare(self)
        self._habit = habit
        self._fails = fails

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self._habit.step(self, batch)
        if self._fails and self.trainer.is_being_checked:
            raise ValueError("planned")
        return loss


@pytest.mark.parametrize("name", HABITS)
@pytest.mark.parametrize("fails", [False, True], ids=["", "and-raises"])
def test_what_a_step_does_to_its_module_is_taken_back(fit, loader, name, fails):
    habit = HABITS[name]

    def check(trainer: pl.Trainer, module: Untidy, batch: Any, batch_idx: int) -> None:
        trainer.present_batch = batch
        objective = TrainingObjective(trainer, module)
        original = habit.read(module)
        before = frozen(original)
        values = [p.detach() + 0.1 for p in objective.parameters]
        probe = ProbeBatch(batch, batch_idx, True)
        trainer.is_being_checked = True
        with preserved_randomness():
            for evaluate in (lambda: loss_at(objective, probe), lambda: loss_at(objective, probe, values)):
                if fails:
                    with pytest.raises(ValueError, match="planned"):
                        evaluate()
                else:
                    evaluate()
                after = habit.read(module)
                assert same(before, after), f"{before} became {after}"
                if habit.read(module) is original:  # not one that `read` builds anew
                    assert same(before, original)
        trainer.is_being_checked = False

    _, results = fit(Untidy(habit, fails), loader(num_samples=8), check)
    assert len(results) == 2


@pytest.mark.parametrize("name", ["list", "dict", "set", "deque", "plain-tensor-in-place", "buffer-in-place"])
def test_objects_that_others_hold_as_well_are_put_back_and_not_replaced(fit, loader, name):
    habit = HABITS[name]

    def check(trainer: pl.Trainer, module: Untidy, batch: Any, batch_idx: int) -> None:
        trainer.is_being_checked = True
        held = module.kept
        before = frozen(held)
        replay(trainer, module, batch, batch_idx)
        assert module.kept is held
        assert same(held, before)

    fit(Untidy(habit, fails=False), loader(num_samples=8), check)


def test_parameters_are_neither_written_nor_given_gradients(fit, loader):
    def check(trainer: pl.Trainer, module: Task, batch: Any, batch_idx: int) -> None:
        TrainingObjective(trainer, module)
        operator = hessian_of(trainer, module, batch, batch_idx)
        tensors = [*module.parameters(), *module.buffers()]
        grads = [None if t.grad is None else t.grad.clone() for t in tensors]
        state = [(t.data_ptr(), t._version) for t in tensors]
        operator.matvec(torch.ones(operator.size))
        operator.gradient(torch.full((operator.size,), 0.01))
        operator.value()
        assert state == [(t.data_ptr(), t._version) for t in tensors]
        assert same(grads, [t.grad for t in tensors])

    _, results = fit(Task(noisy()), loader(num_samples=16), check, accumulate_grad_batches=2)
    assert len(results) == 4


@pytest.mark.parametrize("method", ["double_backward", "finite_difference"])
@pytest.mark.parametrize("place", ["parameter", "module"])
def test_gradient_hooks_of_the_user_do_not_see_the_measurement(fit, loader, method, place):
    seen = []

    def check(trainer: pl.Trainer, module: Task, batch: Any, batch_idx: int) -> int:
        before = len(seen)
        TrainingObjective(trainer, module)
        operator = hessian_of(trainer, module, batch, batch_idx, method=method)
        state = RandomState.capture()
        vector = torch.ones(operator.size, dtype=operator.dtype)
        product = operator.matvec(vector)
        assert torch.allclose(product, twin_product(twin_of(module.net, mlp, torch.float64), batch, state, vector))
        return len(seen) - before

    module = Task(mlp())
    if place == "parameter":  # such as clipping by value, or what `wandb.watch` does

        def hook(gradient: Tensor) -> Tensor:
            seen.append(1)
            return 3 * gradient

        module.net[0].weight.register_hook(hook)
    else:
        module.net[1].register_full_backward_hook(lambda *args: seen.append(1))
    _, counts = fit(module, loader(num_samples=8), check, precision="64-true")
    assert counts == [0, 0]
    assert len(seen) == 2  # of the two steps


def test_random_numbers_of_the_training_are_left_alone(fit, loader):
    def check(trainer: pl.Trainer, module: Task, batch: Any, batch_idx: int) -> None:
        before = torch.get_rng_state()
        TrainingObjective(trainer, module)
        operator = hessian_of(trainer, module, batch, batch_idx)
        first = operator.matvec(torch.ones(operator.size))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first, operator.matvec(torch.ones(operator.size)))

    _, results = fit(Task(noisy()), loader(num_samples=8), check)
    assert len(results) == 2
