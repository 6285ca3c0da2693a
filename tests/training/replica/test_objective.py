"""The replayed training loss is the loss of the step and a function of the parameters."""

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lyapunov_lightning.curvature import CurvatureWarning, HessianOperator, MeasurementError
from lyapunov_lightning.curvature.loss.randomness import RandomState, preserved_randomness
from lyapunov_lightning.training.replica.objective import ProbeBatch, TrainingObjective
from tests.curvature.zoo import Cube
from tests.modules import Watcher
from tests.training.live import Task, hessian_of, loss_at, mlp, noisy, replay, twin_loss, twin_of, twin_product


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


class SeenLosses(Watcher):
    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(pl_module.seen.detach())


# The loss of the step.


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, {}) for kind in (Task, WithoutIndex, WithIndex, RenamedIndex, DictOutput)),
        (Task, {"precision": "bf16-true"}),
        *((kind, {"accumulate_grad_batches": 4}) for kind in (WithIndex, RenamedIndex)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_replayed_loss_is_the_loss_of_the_step_bit_by_bit(fit, loader, kind, settings):
    seen = SeenLosses()
    _, replayed = fit(kind(noisy()), loader(num_samples=24), replay, callbacks=(seen,), **settings)
    assert len(replayed) == 6
    assert torch.equal(torch.stack(replayed), torch.stack(seen.losses))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_the_loss_of_a_training_in_mixed_precision_is_computed_in_float32(fit, loader, precision):
    class Watching(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.trained_in = self.net(batch[0]).dtype
            return super().training_step(batch, batch_idx)

    module = Watching(mlp())
    again = copy.deepcopy(module)
    scaler = torch.amp.GradScaler("cpu") if precision == "16-mixed" else None
    _, [replayed] = fit(module, loader(num_samples=4), replay, plugins=MixedPrecision(precision, "cpu", scaler))
    assert module.trained_in == (torch.float16 if scaler else torch.bfloat16)
    _, [wide] = fit(again, loader(num_samples=4), replay)
    assert torch.equal(replayed, wide)


def test_autocast_of_the_module_itself_is_left_to_it(fit, loader):
    class Rounding(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                self.seen = super().training_step(batch, batch_idx)
            return self.seen

    seen = SeenLosses()
    _, replayed = fit(Rounding(mlp()), loader(num_samples=4), replay, callbacks=(seen,), precision="bf16-mixed")
    assert torch.equal(torch.stack(replayed), torch.stack(seen.losses))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("expected scalar type BFloat16 but found Float"),
        RuntimeError("FlashAttention only support fp16 and bf16 data type"),
        RuntimeError("No available kernel. Aborting execution."),
        NotImplementedError("\"fused_kernel\" not implemented for 'Float'"),
        AssertionError(),
    ],
    ids=str,
)
def test_a_step_that_fails_in_float32_is_replayed_as_it_is_trained(fit, loader, error):
    """With the random numbers of the training, although the first attempt has drawn some."""

    class Half(Task):
        def loss(self, batch: Any) -> Tensor:
            scale = torch.rand(())
            if self.net(batch[0]).dtype != torch.bfloat16:
                raise error
            return super().loss(batch) * scale

    seen = SeenLosses()
    with pytest.warns(CurvatureWarning, match="cannot be computed in float32"):
        _, replayed = fit(Half(noisy()), loader(num_samples=8), replay, callbacks=(seen,), precision="bf16-mixed")
    assert torch.equal(torch.stack(replayed), torch.stack(seen.losses))


def test_what_fails_in_float32_for_another_reason_is_raised(fit, loader):
    class Failing(Task):
        def loss(self, batch: Any) -> Tensor:
            if not torch.is_autocast_enabled("cpu"):
                raise RuntimeError("the disk is full")
            return super().loss(batch)

    with pytest.raises(RuntimeError, match="the disk is full"):
        fit(Failing(mlp()), loader(num_samples=8), replay, precision="bf16-mixed")


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


def global_loss(module: Any, batch: Any) -> Tensor:
    return TRAINED.loss(batch)


TRAINED: Any = None


@pytest.mark.parametrize("way", ["closure", "global", "method"])
def test_a_loss_fn_that_refers_to_the_module_itself_gets_the_replica(fit, loader, way, monkeypatch):
    module = Task(noisy())
    monkeypatch.setitem(globals(), "TRAINED", module)
    loss_fn = {
        "closure": lambda _, batch: module.loss(batch),
        "global": global_loss,
        "method": BoundLoss(noisy()).own,
    }[way]
    if way == "method":
        module = loss_fn.__self__

    def check(trainer: pl.Trainer, pl_module: Task, batch: Any, batch_idx: int) -> float:
        objective = TrainingObjective(trainer, pl_module, loss_fn=loss_fn)
        operator = HessianOperator(objective, objective.parameters, [ProbeBatch(batch, batch_idx, True)])
        own = hessian_of(trainer, pl_module, batch, batch_idx)
        vector = torch.ones(operator.size)
        assert torch.equal(operator.matvec(vector), own.matvec(vector))
        assert operator.value(0.1 * vector) == own.value(0.1 * vector)
        assert way != "global" or TRAINED is pl_module
        return int(pl_module.net[1].num_batches_tracked)

    _, counts = fit(module, loader(num_samples=12), check)
    assert counts == [0, 1, 2]  # batches of the training alone


class BoundLoss(Task):
    def own(self, _: Any, batch: Any) -> Tensor:
        return self.loss(batch)


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


class SwitchingGradients(Task):
    """Needs the gradient of its inputs, and leaves the recording of operations switched on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        torch.set_grad_enabled(True)
        inputs = batch[0].requires_grad_()
        (slopes,) = torch.autograd.grad(self.net(inputs).sum(), inputs, create_graph=True)
        return slopes.square().mean()


def test_a_step_that_switches_gradients_on_does_not_switch_them_on_for_the_measurement(fit, loader):
    def check(trainer: Any, module: Any, batch: Any, batch_idx: int) -> bool:
        with torch.no_grad(), TrainingObjective(trainer, module).evaluated(ProbeBatch(batch, batch_idx, True)):
            return torch.is_grad_enabled()

    _, results = fit(SwitchingGradients(mlp()), loader(num_samples=4), check)
    assert results == [False]


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
            there = loss_at(objective, ProbeBatch(batch, batch_idx, True), values)
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
        TrainingObjective(trainer, module)
        state = RandomState.capture()
        operator = hessian_of(trainer, module, batch, batch_idx, method=method)
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
        TrainingObjective(trainer, module)
        operator = hessian_of(trainer, module, batch, batch_idx)
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
        operator = hessian_of(trainer, module, batch, batch_idx)
        vector = torch.randn(operator.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        before = len(calls)
        product = operator.matvec(vector)
        ahead = operator.value(torch.zeros_like(vector))
        assert len(calls) == before
        twin = twin_of(module.net, mlp, torch.float64)
        state = RandomState.capture()
        assert torch.allclose(product, twin_product(twin, batch, state, vector), rtol=1e-10)
        assert ahead == pytest.approx(float(twin_loss(twin, batch, state)), rel=1e-12)
        return before

    torch._dynamo.reset()
    module = Task(torch.compile(mlp(), backend=backend))
    _, counts = fit(module, loader(num_samples=12), check, precision="64-true")
    assert counts == sorted(set(counts))  # the training itself ran the compiled code at every step
    assert counts[-1] > 0


# Evaluation mode.


def test_eval_mode_measures_without_dropout_and_with_running_statistics(fit, loader):
    def check(trainer: pl.Trainer, module: Task, batch: Any, batch_idx: int) -> None:
        module.net[0].eval()  # part of a module that is frozen by its user
        flags = [inner.training for inner in module.modules()]
        first, second = (
            loss_at(TrainingObjective(trainer, module, mode="eval"), ProbeBatch(batch, 0, True)) for _ in range(2)
        )
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


class Holder:
    """An object of the user's that holds a module."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net


@pytest.mark.parametrize("place", ["object", "scripted"])
def test_eval_mode_reaches_modules_in_any_place(fit, loader, place):
    class Hidden(Task):
        def __init__(self) -> None:
            super().__init__(mlp())
            dropout = nn.Sequential(nn.Dropout(0.5))
            self.hidden = Holder(dropout if place == "object" else torch.jit.script(dropout))

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.mse_loss(self.net(self.hidden.net(batch[0])), batch[1])

    def check(trainer: pl.Trainer, module: Hidden, batch: Any, batch_idx: int) -> None:
        measured = replay(trainer, module, batch, batch_idx, mode="eval")
        assert torch.equal(measured, nn.functional.mse_loss(module.net(batch[0]), batch[1]).detach())
        assert module.hidden.net.training

    fit(Hidden(), loader(num_samples=8), check)
