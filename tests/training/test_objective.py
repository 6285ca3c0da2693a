"""The replayed training loss is the loss of the step, is a function of the parameters, and leaves no trace."""

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchmetrics import CatMetric, MeanMetric, MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassCohenKappa, MulticlassPrecision, MulticlassRecall

from lyapunov_lightning.curvature import HessianOperator, MeasurementError
from lyapunov_lightning.curvature.randomness import RandomState, preserved_randomness
from lyapunov_lightning.training.objective import ProbeBatch, TrainingObjective, check_objective, check_parameters
from tests.training.live import RememberingLogger


class Task(pl.LightningModule):
    """Regression with any network; remembers the loss of the last step."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.seen = torch.tensor(torch.nan)

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.seen = loss.detach()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class WithoutIndex(Task):
    def training_step(self, batch: Any) -> Tensor:
        return super().training_step(batch, 0)


class WithIndex(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen = self.loss(batch) * (1 + batch_idx)
        return self.seen


class RenamedIndex(Task):
    def training_step(self, batch: Any, position: int) -> Tensor:
        self.seen = self.loss(batch) * (1 + position)
        return self.seen


class DictOutput(Task):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"predictions": self.net(batch[0]), "loss": super().training_step(batch, batch_idx)}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))


def replay(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int, **kwargs: Any) -> Tensor:
    with preserved_randomness():
        return TrainingObjective(trainer, module, **kwargs)(ProbeBatch(batch, batch_idx, True)).detach()


class SeenLosses(Callback):
    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(pl_module.seen.detach())


# The loss of the step.


@pytest.mark.parametrize("kind", [Task, WithoutIndex, WithIndex, RenamedIndex, DictOutput])
@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 4}], ids=str)
def test_replayed_loss_is_the_loss_of_the_step_bit_by_bit(fit, loader, kind, settings):
    seen = SeenLosses()
    _, replayed = fit(kind(noisy()), loader(num_samples=24), replay, callbacks=(seen,), **settings)
    assert len(replayed) == 6
    assert torch.equal(torch.stack(replayed), torch.stack(seen.losses))


def test_precision_context_of_the_training_is_entered(fit, loader):
    contexts = []

    class Watching(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            contexts.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return super().training_step(batch, batch_idx)

    fit(Watching(mlp()), loader(num_samples=4), replay, precision="bf16-mixed")
    assert contexts == [(True, torch.bfloat16)] * 2  # the replay and the step


def test_loss_fn_goes_before_curvature_loss_and_that_before_training_step(fit, loader):
    class Own(Task):
        def curvature_loss(self, batch: Any) -> Tensor:
            return 3 * self.loss(batch)

    def check(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> list[float]:
        of_the_step = float(module.loss(batch).detach())
        own = float(replay(trainer, module, batch, batch_idx))
        given = float(replay(trainer, module, batch, batch_idx, loss_fn=lambda m, b: 5 * m.loss(b)))
        return [own / of_the_step, given / of_the_step]

    _, [ratios] = fit(Own(mlp()), loader(num_samples=4), check)
    assert ratios == pytest.approx([3, 5])


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, "returned None"),
        ({"predictions": 1}, "without the key 'loss', with 'predictions'"),
        ({}, "without the key 'loss', with nothing"),
        ({"loss": None}, "returned None"),
        (0.5, "scalar tensor, got float"),
    ],
)
def test_a_step_without_a_loss_is_said_to_be_one(fit, loader, output, message):
    class Odd(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return output if self.trainer.is_being_checked else super().training_step(batch, batch_idx)

    def check(trainer: pl.Trainer, *args: Any) -> None:
        trainer.is_being_checked = True
        with pytest.raises(MeasurementError, match=message):
            replay(trainer, *args)
        trainer.is_being_checked = False

    _, results = fit(Odd(mlp()), loader(num_samples=4), check)
    assert results == [None]


# A function of the parameters.


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))[:, :3]


class Normalised(nn.Module):
    """A linear layer under weight normalisation, in plain operations."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.length = nn.Parameter(torch.ones(outputs, 1))
        self.direction = nn.Parameter(torch.ones(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.length * self.direction / self.direction.norm(dim=1, keepdim=True)
        return nn.functional.linear(x, weight, self.bias)


def normalised() -> nn.Module:
    return nn.Sequential(Normalised(4, 6), nn.Tanh(), Normalised(6, 3))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Custom(nn.Module):
    """The parameter itself is the argument of a custom autograd function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ Cube.apply(self.weight))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def reparametrised(transform: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(transform(nn.Linear(4, 6)), nn.Tanh(), transform(nn.Linear(6, 3)))


VECTORS, SEQUENCES = (4,), (5, 4)
ZOO = {  # the network, what its inputs look like, and how to build the reference
    "mlp": (mlp, VECTORS, mlp),
    "batchnorm-dropout": (noisy, VECTORS, noisy),
    "lstm": (Recurrent, SEQUENCES, Recurrent),
    "tied": (Tied, VECTORS, Tied),
    "custom-function": (Custom, VECTORS, Custom),
    "spectral-norm": (spectral := reparametrised(nn.utils.parametrizations.spectral_norm), VECTORS, spectral),
    "old-spectral-norm": (old_spectral := reparametrised(nn.utils.spectral_norm), VECTORS, old_spectral),
    "weight-norm": (reparametrised(nn.utils.parametrizations.weight_norm), VECTORS, normalised),
    "old-weight-norm": (reparametrised(nn.utils.weight_norm), VECTORS, normalised),
    "attention": (Attention, SEQUENCES, Attention),
    "encoder": (Encoder, SEQUENCES, Encoder),
}


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def pieces(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    return [piece.view_as(t) for piece, t in zip(vector.split([t.numel() for t in like]), like, strict=True)]


def twin_of(net: nn.Module, build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A network of its own with the same parameters and buffers, which no Trainer and no replay has touched."""
    with preserved_randomness():
        twin = build().to(dtype)
    with torch.no_grad():
        for mine, other in zip([*twin.parameters(), *twin.buffers()], [*net.parameters(), *net.buffers()], strict=True):
            mine.copy_(other)
    return twin


def twin_loss(twin: nn.Module, batch: Any, state: RandomState) -> Tensor:
    inputs, targets = batch
    dtype = next(twin.parameters()).dtype
    with preserved_randomness(state):
        return nn.functional.mse_loss(twin(inputs.to(dtype)), targets.to(dtype))


def twin_product(twin: nn.Module, batch: Any, state: RandomState, vector: Tensor) -> Tensor:
    parameters = list(twin.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        loss = twin_loss(twin, batch, state)
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    directions = pieces(vector, parameters)
    return flat(torch.autograd.grad(gradient, parameters, directions, materialize_grads=True))


@pytest.mark.parametrize("name", ZOO)
def test_objective_at_other_values_is_the_loss_of_a_network_with_those_parameters(fit, loader, name):
    build, shape, reference = ZOO[name]

    def check(trainer: pl.Trainer, module: Task, batch: Any, batch_idx: int) -> None:
        objective = TrainingObjective(trainer, module)
        state = RandomState.capture()
        twin = twin_of(module.net, reference, torch.float64)
        values = [p.detach() + 0.1 * torch.randn_like(p) for p in objective.parameters]
        state.restore()
        before = [p.detach().clone() for p in module.parameters()]
        with preserved_randomness(state):
            there = objective.at(values, ProbeBatch(batch, batch_idx, True))
        with torch.no_grad():
            for parameter, value in zip(twin.parameters(), values, strict=True):
                parameter.copy_(value)
        assert torch.allclose(there, twin_loss(twin, batch, state), rtol=1e-12)
        assert all(map(torch.equal, before, module.parameters()))

    _, results = fit(Task(build()), loader(num_samples=8, inputs=shape), check, precision="64-true")
    assert len(results) == 2


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize(("method", "rtol"), [("double_backward", 1e-10), ("finite_difference", 1e-5)])
def test_products_through_the_objective_are_those_of_the_network_alone(fit, loader, name, method, rtol):
    build, shape, reference = ZOO[name]
    if "spectral" in name and method == "finite_difference":
        pytest.skip("its power iteration, which autograd takes for a constant, moves with the parameters")

    def check(trainer: pl.Trainer, module: Task, batch: Any, batch_idx: int) -> None:
        twin = twin_of(module.net, reference, torch.float64)
        objective = TrainingObjective(trainer, module)
        state = RandomState.capture()
        operator = HessianOperator(objective, objective.parameters, [ProbeBatch(batch, batch_idx, True)], method=method)
        vector = torch.randn(operator.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        vector /= vector.norm()
        expected = twin_product(twin, batch, state, vector)
        for _ in range(2):  # the first builds the graph, the second uses it
            assert (operator.matvec(vector) - expected).norm() <= rtol * expected.norm()

    _, results = fit(Task(build()), loader(num_samples=8, inputs=shape), check, precision="64-true")
    assert len(results) == 2


@pytest.mark.parametrize("name", ["attention", "encoder"])
def test_fused_attention_in_float32_is_differentiated_twice(fit, loader, name):
    build, shape, reference = ZOO[name]

    def check(trainer: pl.Trainer, module: Task, batch: Any, batch_idx: int) -> None:
        for inner in module.modules():
            if isinstance(inner, nn.Dropout):  # whose masks would differ in float64
                inner.p = 0.0
        objective = TrainingObjective(trainer, module)
        operator = HessianOperator(objective, objective.parameters, [ProbeBatch(batch, batch_idx, True)])
        vector = torch.randn(operator.size, generator=torch.Generator().manual_seed(2))
        product = operator.matvec(vector)
        assert operator.method == "double_backward"
        twin = twin_of(module.net, reference, torch.float64)
        for inner in twin.modules():
            if isinstance(inner, nn.Dropout):
                inner.p = 0.0
        expected = twin_product(twin, batch, RandomState.capture(), vector.double())
        assert (product - expected).norm() <= 1e-4 * expected.norm()

    _, results = fit(Task(build()), loader(num_samples=8, inputs=shape), check)
    assert len(results) == 2


def test_compiled_submodule_is_run_eagerly(fit, loader):
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            calls.append(1)
            return graph.forward(*args)

        return run

    def check(trainer: pl.Trainer, module: Task, batch: Any, batch_idx: int) -> int:
        objective = TrainingObjective(trainer, module)
        operator = HessianOperator(objective, objective.parameters, [ProbeBatch(batch, batch_idx, True)])
        vector = torch.randn(operator.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        before = len(calls)
        product = operator.matvec(vector)
        ahead = objective.at([p.detach() for p in objective.parameters], ProbeBatch(batch, batch_idx, True))
        assert len(calls) == before
        twin = twin_of(module.net, mlp, torch.float64)
        state = RandomState.capture()
        assert torch.allclose(product, twin_product(twin, batch, state, vector), rtol=1e-10)
        assert torch.allclose(ahead, twin_loss(twin, batch, state), rtol=1e-12)
        return before

    torch._dynamo.reset()
    module = Task(torch.compile(mlp(), backend=backend))
    _, counts = fit(module, loader(num_samples=12), check, precision="64-true")
    assert counts == sorted(set(counts))  # the training itself ran the compiled code at every step
    assert counts[-1] > 0


# No trace.


def same(first: Any, second: Any) -> bool:
    """Equality of nested structures, bit by bit in their tensors and exact in their types."""
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple, deque)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


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
            for evaluate in (lambda: objective(probe), lambda: objective.at(values, probe)):
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
        objective = TrainingObjective(trainer, module)
        operator = HessianOperator(objective, objective.parameters, [ProbeBatch(batch, batch_idx, True)])
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
        objective = TrainingObjective(trainer, module)
        operator = HessianOperator(objective, objective.parameters, [ProbeBatch(batch, batch_idx, True)], method=method)
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
        objective = TrainingObjective(trainer, module)
        operator = HessianOperator(objective, objective.parameters, [ProbeBatch(batch, batch_idx, True)])
        first = operator.matvec(torch.ones(operator.size))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first, operator.matvec(torch.ones(operator.size)))

    _, results = fit(Task(noisy()), loader(num_samples=8), check)
    assert len(results) == 2


# Logging.


class Child(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        output = self.net(x)
        self.trainer.lightning_module.log("child", output.mean(), on_step=True, on_epoch=True)
        return output


class Talkative(Task):
    """Logs in every way that a step can."""

    def __init__(self) -> None:
        super().__init__(Child())
        self.metric = MeanSquaredError()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        predictions = self.net(inputs)
        loss = nn.functional.mse_loss(predictions, targets)
        self.metric(predictions, targets)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("metric", self.metric, on_step=True, on_epoch=True)
        self.log_dict({"a": loss + 1, "b": loss + 2}, on_step=False, on_epoch=True)
        self.logger.log_metrics({"direct": float(loss.detach())}, step=self.global_step)
        self.logger.experiment.add_text("tag", "text")
        self.loggers[1].experiment.add_image("tag", inputs)
        self.trainer.logger.experiment.add_scalar("tag", 1.0)
        self.print("said", batch_idx)
        return loss


def test_what_a_replay_logs_reaches_nobody(fit, loader, capsys):
    def run(check: Callable[..., Any]) -> tuple[Any, ...]:
        torch.manual_seed(0)
        loggers = [RememberingLogger(), RememberingLogger()]
        trainer, _ = fit(Talkative(), loader(), check, logger=loggers, log_every_n_steps=1, max_epochs=2)
        return (
            [logger.entries for logger in loggers],
            [logger.experiment.calls for logger in loggers],
            dict(trainer.callback_metrics),
            dict(trainer.logged_metrics),
            capsys.readouterr().out,
        )

    def check(trainer: pl.Trainer, module: Task, batch: Any, batch_idx: int) -> None:
        loggers, items = trainer.loggers, list(trainer.loggers)
        replay(trainer, module, batch, batch_idx)
        assert trainer.loggers is loggers
        assert loggers == items
        assert not {"log", "log_dict", "print"} & {*vars(module), *vars(module.net)}

    with_replay, without = run(check), run(lambda *args: None)
    assert with_replay[1] == [["add_text", "add_scalar"] * 6, ["add_image"] * 6]
    assert with_replay[-1].count("said") == 6
    assert same(with_replay, without)


def test_a_step_that_fails_leaves_the_loggers(fit, loader, remembering_logger):
    class Failing(Talkative):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("loss", 1.0)
            if self.trainer.is_being_checked:
                raise ValueError("planned")
            return self.loss(batch)

    def check(trainer: pl.Trainer, module: Task, batch: Any, batch_idx: int) -> None:
        loggers = trainer.loggers
        trainer.is_being_checked = True
        with pytest.raises(ValueError, match="planned"):
            replay(trainer, module, batch, batch_idx)
        trainer.is_being_checked = False
        assert trainer.loggers is loggers
        assert not {"log", "log_dict", "print"} & {*vars(module), *vars(module.net)}

    fit(Failing(), loader(num_samples=8), check, logger=remembering_logger, log_every_n_steps=1)
    assert remembering_logger.values_of("loss") == [1.0, 1.0]


def test_a_module_may_have_its_own_log_method_on_the_instance(fit, loader):
    said = []

    class Own(Task):
        def __init__(self) -> None:
            super().__init__(mlp())
            self.print = said.append

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.print("step")
            return self.loss(batch)

    fit(Own(), loader(num_samples=8), replay)
    assert said == ["step", "step"]


# Evaluation mode.


def test_eval_mode_measures_without_dropout_and_with_running_statistics(fit, loader):
    def check(trainer: pl.Trainer, module: Task, batch: Any, batch_idx: int) -> None:
        module.net[0].eval()  # part of a module that is frozen by its user
        flags = [inner.training for inner in module.modules()]
        first, second = (TrainingObjective(trainer, module, mode="eval")(ProbeBatch(batch, 0, True)) for _ in range(2))
        assert torch.equal(first, second)
        assert [inner.training for inner in module.modules()] == flags
        twin = twin_of(module.net, noisy, torch.float32).eval()
        assert torch.equal(first, twin_loss(twin, batch, RandomState.capture()))
        assert not torch.equal(first, replay(trainer, module, batch, batch_idx))
        with pytest.raises(ZeroDivisionError):
            replay(trainer, module, batch, batch_idx, mode="eval", loss_fn=lambda m, b: 1 / 0)
        assert [inner.training for inner in module.modules()] == flags

    _, results = fit(Task(noisy()), loader(num_samples=8), check)
    assert len(results) == 2


# Refusals.


class Manual(Task):
    def __init__(self) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False


class ManualWithLoss(Manual):
    def curvature_loss(self, batch: Any) -> Tensor:
        return self.loss(batch)


class TakesTheIterator(Task):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        return self.loss(next(dataloader_iter)[0])


def trainer_with(strategy: Any, world_size: int = 1) -> Any:
    return SimpleNamespace(strategy=strategy, world_size=world_size)


ONE_DEVICE = trainer_with(SingleDeviceStrategy())


@pytest.mark.parametrize(
    ("trainer", "module", "mode", "message"),
    [
        (trainer_with(FSDPStrategy()), Task(mlp()), "train", "FSDPStrategy does not.*single device"),
        (ONE_DEVICE, Manual(), "train", "manual optimization.*curvature_loss"),
        (ONE_DEVICE, TakesTheIterator(mlp()), "train", "dataloader_iter.*take `batch`"),
        (trainer_with(DDPStrategy(), 2), Task(nn.SyncBatchNorm(4)), "train", "SyncBatchNorm.*mode='eval'"),
    ],
    ids=["sharded", "manual", "dataloader-iter", "sync-batchnorm"],
)
def test_what_cannot_be_measured_is_refused_with_class_and_remedy(trainer, module, mode, message):
    with pytest.raises(MisconfigurationException, match=f"`Owner`.*{message}"):
        check_objective("Owner", trainer, module, mode=mode, loss_fn=None)


@pytest.mark.parametrize(
    ("trainer", "module", "mode", "loss_fn"),
    [
        (ONE_DEVICE, Task(mlp()), "train", None),
        (ONE_DEVICE, Manual(), "train", lambda module, batch: module.loss(batch)),
        (ONE_DEVICE, ManualWithLoss(), "train", None),
        (ONE_DEVICE, TakesTheIterator(mlp()), "train", lambda module, batch: module.loss(batch)),
        (trainer_with(DDPStrategy(), 2), Task(mlp()), "train", None),
        (trainer_with(DDPStrategy(), 2), Task(nn.SyncBatchNorm(4)), "eval", None),
        (trainer_with(SingleDeviceStrategy()), Task(nn.SyncBatchNorm(4)), "train", None),
    ],
    ids=["plain", "manual-loss-fn", "manual-own", "iterator-loss-fn", "ddp", "sync-batchnorm-eval", "one-process"],
)
def test_what_can_be_measured_is_let_pass(trainer, module, mode, loss_fn):
    check_objective("Owner", trainer, module, mode=mode, loss_fn=loss_fn)


def test_a_module_without_trainable_parameters_is_refused():
    check_parameters("Owner", Task(mlp()))
    with pytest.raises(MisconfigurationException, match=r"`Owner`.*Task has none"):
        check_parameters("Owner", Task(mlp().requires_grad_(False)))


def test_frozen_and_unused_parameters_have_no_curvature(fit, loader):
    class Partly(Task):
        def __init__(self) -> None:
            super().__init__(mlp())
            self.unused = nn.Parameter(torch.ones(2))
            self.net[0].requires_grad_(False)

    def check(trainer: pl.Trainer, module: Task, batch: Any, batch_idx: int) -> None:
        objective = TrainingObjective(trainer, module)
        assert [tuple(p.shape) for p in objective.parameters] == [(2,), (3, 6), (3,)]
        operator = HessianOperator(objective, objective.parameters, [ProbeBatch(batch, batch_idx, True)])
        product = operator.matvec(torch.ones(operator.size))
        assert not product[:2].any()
        assert product[2:].any()

    _, results = fit(Partly(), loader(num_samples=4), check)
    assert len(results) == 1
