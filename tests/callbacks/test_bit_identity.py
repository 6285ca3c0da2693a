"""A run with the probe is the run without it, bit for bit."""

import functools
import random
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, fields
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch._inductor
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.aggregation import CatMetric

from lyapunov_lightning import CurvatureProbe, HessianConfig, Schedule
from lyapunov_lightning.curvature.errors import CurvatureWarning
from tests.callbacks.identity import Outcome, assert_identical, few_clusters, train
from tests.modules import BusyModule, BusyModuleWithOwnLoss


@functools.cache
def run_without(**options: Any) -> Outcome:
    """The run that a probe must not change; the same for many probes."""
    return train(**options)


def early_stopping_and_checkpoints() -> list[Callback]:
    return [
        EarlyStopping("val_loss", patience=4, min_delta=0.05),
        ModelCheckpoint(monitor="val_accuracy", mode="max", save_top_k=2),
    ]


def module_loss(module: BusyModule, batch: Any) -> Tensor:
    module.count += 1
    return module.loss(batch)


def name_of(options: dict[str, Any]) -> str:
    words = {
        name: type(value).__name__ if isinstance(value, DataLoader) else getattr(value, "__name__", value)
        for name, value in options.items()
        if name != "module"
    }
    names = [f"{name}={word}" for name, word in words.items()]
    module = options.get("module")
    if module is not None:
        names += [getattr(module, "__name__", "") or module.keywords.get("optimizer", module.func.__name__)]
    return ",".join(names) or "default"


def probe_of(options: dict[str, Any]) -> CurvatureProbe:
    """A probe from one flat mapping of all that can be chosen."""
    hessian = {field.name: options[field.name] for field in fields(HessianConfig) if field.name in options}
    own = {name: value for name, value in options.items() if name not in hessian}
    if "max_overhead" in own:
        own |= {"every_n_steps": None, "schedule": Schedule(max_overhead=own.pop("max_overhead"))}
    return CurvatureProbe(**own, hessian=HessianConfig(**hessian))


class OfNoRule(BusyModule):
    """Trained by an optimizer whose limit nobody knows, so that its steps are observed."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adadelta(self.parameters(), lr=0.5)


class ClipsByItself(BusyModule):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, 0.1 * self.count, "value")


BY_DEFAULT = {"every_n_steps": None}
BF16 = {"precision": "bf16-mixed"}
ACCUMULATED = {"accumulate": 4, "steps": 6}
WITHOUT_METRICS = {"module": functools.partial(BusyModule, use_metrics=False)}
"""They take most of a run's time, and are put back in one place: a run with them for each estimator is enough."""
METRICS = {"module": BusyModule}
ADAM = {"module": functools.partial(BusyModule, optimizer="adam", use_metrics=False)}
OWN_LOSS = {"module": functools.partial(BusyModuleWithOwnLoss, use_metrics=False)}
OF_NO_RULE = {"module": functools.partial(OfNoRule, use_metrics=False)}
UNCLIPPED, CLIPPED_BY_VALUE = {"clip": None}, {"clip": 0.02, "clip_by": "value"}
VALIDATED = METRICS | {"validate": True, "user_callbacks": early_stopping_and_checkpoints, "steps": 80}


@pytest.mark.filterwarnings("ignore:.*the stability limit of Adadelta is not known")
@pytest.mark.parametrize(
    ("probe", "options"),
    [
        ({"every_n_steps": 1}, METRICS),
        ({"every_n_steps": 4, "prog_bar": True}, {}),
        ({"end": "smallest"}, {}),
        ({"estimator": "lyapunov", "end": "smallest"}, {}),
        ({"estimator": "lyapunov", "end": "both", "iterations": 2}, METRICS),
        ({"estimator": "power"}, METRICS),
        ({"estimator": "power", "end": "both", "every_n_steps": 13}, {}),
        ({"estimator": "critical", "every_n_steps": 1}, METRICS),
        ({"estimator": "critical", "mode": "eval"}, {}),
        ({"estimator": "critical", "data": "fixed", "num_batches": 2}, {}),
        ({"estimator": "critical", "loss_fn": module_loss}, {}),
        ({"estimator": "critical", "data": DataLoader(few_clusters(), 9, shuffle=True), "num_batches": 2}, {}),
        ({"method": "forward_over_reverse", "every_n_steps": 8}, {}),
        ({"method": "finite_difference", "every_n_steps": 8}, {}),
        ({"compile": True, "data": "fixed", "num_batches": 1, "every_n_steps": 10}, {}),
        ({"mode": "eval", "estimator": "lyapunov"}, {}),
        ({"data": "fixed", "every_n_steps": 3}, {}),
        ({"data": "fixed", "num_batches": 2, "estimator": "lyapunov"}, {}),
        ({"data": "fixed", "fraction": 0.2, "mode": "eval", "end": "both"}, {}),
        ({"max_overhead": 0.3}, {}),
        ({"batch_size_fn": lambda batch: len(batch[1]), "data": "fixed", "num_batches": 2}, {}),
        ({"loss_fn": module_loss, "end": "both", "log_prefix": "mine"}, {}),
        ({"loss_fn": module_loss, "estimator": "lyapunov"}, {}),
        ({"end": "both"}, BF16),
        ({"estimator": "lyapunov", "end": "both"}, BF16),
        ({"method": "finite_difference", "data": "fixed", "every_n_steps": 8}, BF16),
        ({"method": "forward_over_reverse", "every_n_steps": 8}, BF16),
        ({"mode": "eval", "estimator": "power", "every_n_steps": 4}, BF16),
        ({"end": "both"}, ACCUMULATED),
        ({"estimator": "lyapunov", "end": "both"}, ACCUMULATED),
        ({"data": "fixed", "max_overhead": 0.3}, ACCUMULATED),
        ({"estimator": "lyapunov"}, BF16 | ACCUMULATED),
        ({"estimator": "critical"}, BF16 | ACCUMULATED),
        ({"estimator": "critical"}, ADAM),
        ({"estimator": "critical", "every_n_steps": 5}, VALIDATED),
        ({"end": "both"}, ADAM),
        ({"estimator": "power", "every_n_steps": 4}, ADAM | BF16),
        ({"estimator": "lyapunov"}, ADAM | ACCUMULATED),
        ({"end": "both"}, OWN_LOSS),
        ({"estimator": "lyapunov"}, OWN_LOSS),
        ({"end": "both", "every_n_steps": 5}, VALIDATED),
        ({"estimator": "lyapunov", "every_n_steps": 5}, VALIDATED | BF16),
        ({"data": "fixed", "every_n_steps": 5}, {"validate": True} | ACCUMULATED | ADAM),
        (BY_DEFAULT, METRICS),
        (BY_DEFAULT | {"end": "both"}, ADAM | UNCLIPPED),
        (BY_DEFAULT | {"data": "fixed"}, ACCUMULATED),
        (BY_DEFAULT | {"estimator": "lyapunov"}, BF16),
        (BY_DEFAULT | {"estimator": "critical"}, {}),
        ({"eigenvalue_every": 3, "every_n_steps": 1}, {}),
        ({"eigenvalue_every": 2, "estimator": "power"}, ADAM | ACCUMULATED | BF16),
        ({"every_n_steps": 1}, UNCLIPPED),
        ({"every_n_steps": 1}, CLIPPED_BY_VALUE),
        ({"every_n_steps": 1, "estimator": "lyapunov"}, CLIPPED_BY_VALUE | ACCUMULATED),
        ({"every_n_steps": 1}, {"module": functools.partial(ClipsByItself, use_metrics=False)} | UNCLIPPED),
        ({"every_n_steps": 1}, OF_NO_RULE),
        ({"every_n_steps": 1, "eigenvalue_every": 4}, OF_NO_RULE | ACCUMULATED),
        ({"data": "fixed", "num_batches": 2, "estimator": "lyapunov"}, OF_NO_RULE | UNCLIPPED),
        ({"method": "finite_difference", "every_n_steps": 8}, OF_NO_RULE),
        ({"loss_fn": module_loss, "mode": "eval"}, OF_NO_RULE | BF16),
    ],
    ids=name_of,
)
def test_probe_leaves_the_run_bit_identical(
    probe: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if probe.get("compile"):  # tests/curvature/loss/test_compiled.py has Inductor itself, which takes half a minute
        monkeypatch.setattr(torch._inductor, "compile", lambda traced, inputs: traced)
    options = WITHOUT_METRICS | options
    # At every fourth step, which the last and smaller batch of an epoch is one of, or every other of the fewer ones.
    probe = {"every_n_steps": 2 if "accumulate" in options else 4, "tol": 0.3, **probe}
    with_probe = train(probe_of(probe), **options)
    assert_identical(run_without(**options), with_probe)
    prefix = f"{probe['log_prefix']}/" if "log_prefix" in probe else ""
    is_critical = probe.get("estimator") == "critical"
    # By default at every step here, since the trainer logs at every third; the eigenvalue at one of them, and a glance
    # at the losses has to do at most others.
    every = probe["every_n_steps"] or (3 if is_critical else 1)
    at_least = 2 if "max_overhead" in probe else with_probe.progress["step"] // every
    eigenvalue_every = 1 if is_critical else probe.get("eigenvalue_every", 1 if probe["every_n_steps"] else at_least)
    # With an Adam that of the Hessian itself is measured now and then.
    of = ("forward_passes",) if is_critical else ("residual", "preconditioned_residual")
    estimated = {step for name in of for step in with_probe.curve(f"{prefix}curvature_details/{name}")}
    measured = with_probe.curve(f"{prefix}curvature_details/converged")
    assert len(with_probe.data_seen) >= 14
    assert len(measured) >= at_least
    assert len(estimated) >= at_least // eigenvalue_every
    assert all(value == 1.0 for step, value in measured.items() if step not in estimated)
    assert is_critical or len(with_probe.curve(f"{prefix}curvature/stability_ratio")) >= (at_least - 1) // 2


@pytest.mark.pictures
def test_several_probes_leave_the_run_bit_identical() -> None:
    probes = [
        CurvatureProbe(1, log_prefix="a"),
        CurvatureProbe(2, "lyapunov", "both", log_prefix="b"),
        CurvatureProbe(2, end="both", log_prefix="c"),
        CurvatureProbe(2, "critical", log_prefix="d"),
    ]
    with_probes = train(probes)
    assert_identical(run_without(), with_probes)
    assert len(with_probes.curve("d/curvature_details/forward_passes")) == 7
    assert [len(with_probes.curve(f"{prefix}/curvature_details/residual")) for prefix in "abc"] == [14, 7, 7]


def fails_halfway(module: BusyModule, batch: Any) -> Tensor:
    module.eval()
    module.losses.clear()
    module.accuracy.update(torch.tensor([1]), torch.tensor([1]))
    module.log("train_loss", 1e6)
    module(batch[0])
    torch.rand(())
    random.random()
    np.random.rand()
    raise RuntimeError("halfway")


@pytest.mark.parametrize("estimator", ["lanczos", "lyapunov", "power", "critical"])
def test_failing_probe_leaves_the_run_bit_identical(estimator: str) -> None:
    with pytest.warns(CurvatureWarning, match="halfway"):
        with_probe = train(CurvatureProbe(1, estimator, hessian=HessianConfig(loss_fn=fails_halfway)))
    assert_identical(run_without(), with_probe)
    assert set(with_probe.curve("curvature_details/converged").values()) == {0.0}


# What a training step may do beside computing a loss. Each of these keeps state in a place of its own, and adds what it
# finds there to the loss: a replay that leaves a trace changes the training.


class WithState(BusyModule):
    """A busy module whose training step does one thing more."""

    def __init__(self) -> None:
        super().__init__(use_metrics=False)
        self.prepare()

    def prepare(self) -> None:
        pass

    def act(self, loss: Tensor, batch: Any) -> Any:
        """Act on the state and return a number that depends on it."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + 1e-3 * float(self.act(loss.detach(), batch)) * self.net[0].weight.square().sum()


class FlatContainers(WithState):
    def prepare(self) -> None:
        self.a_set: set[int] = set()
        self.a_deque: deque[Tensor] = deque(maxlen=3)
        self.a_dict: dict[str, Tensor] = {}
        self.an_ordered_dict: OrderedDict[str, int] = OrderedDict()
        self.a_default_dict: defaultdict[str, int] = defaultdict(int)
        self.a_counter: Counter[int] = Counter()

    def act(self, loss: Tensor, batch: Any) -> Any:
        self.a_set.add(len(self.a_set))
        self.a_deque.append(loss)
        self.a_dict["sum"] = self.a_dict.get("sum", 0) + loss
        self.an_ordered_dict[str(self.count)] = 1
        self.a_default_dict["n"] += 1
        self.a_counter.update(batch[2].tolist())
        return len(self.a_set) + len(self.an_ordered_dict) + self.a_default_dict["n"] + self.a_dict["sum"]


class NestedContainers(WithState):
    def prepare(self) -> None:
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)
        self.table = [[0, 0], [0, 0]]

    def act(self, loss: Tensor, batch: Any) -> Any:
        self.outputs["loss"].append(loss)
        self.table[0][1] += 1
        return len(self.outputs["loss"]) + self.table[0][1]


class TensorInDict(WithState):
    def prepare(self) -> None:
        self.averages = {"loss": torch.zeros(())}

    def act(self, loss: Tensor, batch: Any) -> Any:
        self.averages["loss"].mul_(0.9).add_(loss.cpu(), alpha=0.1)
        return self.averages["loss"]


class TensorInTuple(WithState):
    def prepare(self) -> None:
        self.sums = (torch.zeros(()), torch.zeros(()))

    def act(self, loss: Tensor, batch: Any) -> Any:
        self.sums[1].add_(1)
        return self.sums[1]


@dataclass
class AverageMeter:
    """As it is found in many code bases."""

    total: float = 0.0
    count: int = 0

    def update(self, value: float) -> None:
        self.total += value
        self.count += 1


class PlainObject(WithState):
    def prepare(self) -> None:
        self.meter = AverageMeter()

    def act(self, loss: Tensor, batch: Any) -> Any:
        self.meter.update(float(loss))
        return self.meter.total


class NumpyArray(WithState):
    def prepare(self) -> None:
        self.histogram = np.zeros(3)

    def act(self, loss: Tensor, batch: Any) -> Any:
        self.histogram += np.bincount(batch[1].numpy(), minlength=3)
        return self.histogram[0]


class OwnTorchGenerator(WithState):
    def prepare(self) -> None:
        self.torch_generator = torch.Generator().manual_seed(3)

    def act(self, loss: Tensor, batch: Any) -> Any:
        return torch.rand((), generator=self.torch_generator)


class OwnNumpyGenerator(WithState):
    def prepare(self) -> None:
        self.numpy_generator = np.random.default_rng(3)

    def act(self, loss: Tensor, batch: Any) -> Any:
        return self.numpy_generator.random()


class OwnPythonGenerator(WithState):
    def prepare(self) -> None:
        self.python_generator = random.Random(3)

    def act(self, loss: Tensor, batch: Any) -> Any:
        return self.python_generator.random()


class BufferMadeInStep(WithState):
    def prepare(self) -> None:
        self.register_buffer("first_loss", None)

    def act(self, loss: Tensor, batch: Any) -> Any:
        if self.first_loss is None:
            self.first_loss = loss.clone()
        else:
            self.first_loss += 1
        return self.first_loss


class BufferWrittenInPlace(WithState):
    def prepare(self) -> None:
        self.register_buffer("history", torch.zeros(4))
        self.register_buffer("hidden_from_checkpoints", torch.zeros(()), persistent=False)

    def act(self, loss: Tensor, batch: Any) -> Any:
        self.history.copy_(self.history.roll(1))
        self.history[0] = loss
        self.hidden_from_checkpoints.add_(1)
        return self.history.sum() + self.hidden_from_checkpoints


class ModuleOutsideOfTheRegistry(WithState):
    """A list hides a module from ``parameters()``: the usual way to keep a teacher."""

    def prepare(self) -> None:
        self.teacher = [nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.1))]

    def act(self, loss: Tensor, batch: Any) -> Any:
        with torch.no_grad():
            self.teacher[0](batch[0])
        return self.teacher[0][0].running_mean.sum() + self.teacher[0][0].num_batches_tracked


class ModeSwitchedInStep(WithState):
    def prepare(self) -> None:
        self.net.append(nn.Dropout(0.1))

    def act(self, loss: Tensor, batch: Any) -> Any:
        if self.count == 5:
            self.net[-1].eval()
        return self.count


class ListMetric(WithState):
    def prepare(self) -> None:
        self.all_losses = CatMetric()
        self.by_name = {"mean": MeanMetric()}

    def act(self, loss: Tensor, batch: Any) -> Any:
        self.all_losses.update(loss)
        return self.all_losses.compute().sum() + self.by_name["mean"](loss)


class BatchWrittenInPlace(WithState):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch[0].sub_(batch[0].mean()).tanh_()
        return BusyModule.training_step(self, batch, batch_idx)


class BatchPopped(WithState):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return dict(zip(("inputs", "labels", "index"), batch, strict=True)) if isinstance(batch, list) else batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        labels = batch.pop("labels")
        return BusyModule.training_step(self, [batch["inputs"], labels, batch["index"]], batch_idx)


class OwnLoggers(WithState):
    """Holds on to the logger's experiment, and logs through every way there is."""

    def act(self, loss: Tensor, batch: Any) -> Any:
        self.logger.experiment.add_scalar("act", float(loss))
        self.trainer.logger.log_metrics({"act": float(loss)}, step=1)
        self.trainer.loggers[0].experiment.add_scalar("act", 1.0)
        self.log_dict({"in_a_dict": loss, "sum": self.running}, on_epoch=True, reduce_fx="sum")
        self.print("printed", end="")
        return 0.0


class CountedSine(torch.autograd.Function):
    """A function that the package has to call by itself to know its derivatives, and that counts its calls."""

    calls: list[int] = []  # noqa: RUF012  (it is about state of a class)

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        CountedSine.calls.append(len(CountedSine.calls))
        ctx.save_for_backward(inputs)
        return inputs.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()


class CountedReversal(CountedSine):
    """One whose derivatives are not to be trusted, so that it is called even more often."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient * ctx.saved_tensors[0].cos()


class OwnFunction(WithState):
    function: Any = CountedSine

    def prepare(self) -> None:
        CountedSine.calls.clear()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.01 * self.function.apply(self.net[0].weight).sum()

    def act(self, loss: Tensor, batch: Any) -> Any:
        return len(CountedSine.calls)


class OwnReversal(OwnFunction):
    function = CountedReversal


def together(*kinds: type[WithState]) -> type[WithState]:
    """A module that keeps all of their states, each in the place of its own, and adds what it finds in all of them."""

    class Together(WithState):
        def prepare(self) -> None:
            for kind in kinds:
                kind.prepare(self)

        def act(self, loss: Tensor, batch: Any) -> Any:
            return sum(float(kind.act(self, loss, batch)) for kind in kinds)

    return Together


@pytest.mark.filterwarnings("ignore:.*CountedReversal")
@pytest.mark.parametrize(
    "module",
    [
        together(FlatContainers, NestedContainers, TensorInDict, TensorInTuple, PlainObject, NumpyArray, ListMetric),
        together(
            OwnTorchGenerator,
            OwnNumpyGenerator,
            OwnPythonGenerator,
            BufferMadeInStep,
            BufferWrittenInPlace,
            ModuleOutsideOfTheRegistry,
            ModeSwitchedInStep,
        ),
        BatchWrittenInPlace,
        BatchPopped,
        OwnLoggers,
        OwnFunction,
        OwnReversal,
    ],
    ids=["attributes", "generators, buffers, modules", "batch", "popped", "loggers", "function", "reversal"],
)
def test_whatever_the_training_step_does_is_taken_back(module: type[WithState]) -> None:
    # At steps of their own too, where none of them uses what another one has evaluated.
    probes = [
        CurvatureProbe(n, kind, log_prefix=kind) for n, kind in ((2, "lanczos"), (3, "lyapunov"), (5, "critical"))
    ]
    with_probes = train(probes, module=module, steps=12)
    assert_identical(train(module=module, steps=12), with_probes)
    assert len(with_probes.curve("lanczos/curvature_details/residual")) == 6
    assert len(with_probes.curve("lyapunov/curvature_details/residual")) == 4
    assert len(with_probes.curve("critical/curvature_details/forward_passes")) == 3


def test_printing_in_the_training_step_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    train(CurvatureProbe(1), module=OwnLoggers, steps=5)
    assert capsys.readouterr().out.count("printed") == 5


# The comparison itself can fail.


class Mischief(Callback):
    """Does one thing that a reading callback must not do, once, at the fifth step."""

    def __init__(self, deed: str) -> None:
        self.deed = deed

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 4:
            getattr(self, self.deed)(trainer, pl_module, batch)

    def draw_from_torch(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        torch.rand(())

    def draw_from_numpy(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        np.random.rand()

    def draw_from_python(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        random.random()

    def touch_a_buffer(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        pl_module.centre.add_(0)

    def move_a_parameter_and_back(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        weight = pl_module.net[0].weight
        with torch.no_grad():
            weight.copy_(weight.clone())

    def update_a_metric(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        pl_module.forward_called.update(0.5)

    def append_to_a_list(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        pl_module.losses.append(torch.zeros(()))

    def replay_the_step(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        with torch.random.fork_rng():
            pl_module.net(batch[0])

    def log_of_the_user(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        trainer.logger.log_metrics({"by_hand": 0.0}, step=0)

    def switch_a_mode(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        pl_module.val_accuracy.eval()

    def write_to_a_momentum(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        next(iter(trainer.optimizers[0].state.values()))["momentum_buffer"].mul_(1 + 1e-6)

    def write_to_the_batch(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        batch[0][0, 0] += 1e-3


@pytest.mark.parametrize(
    ("deed", "noticed"),
    [
        ("draw_from_torch", "generators"),
        ("draw_from_numpy", "generators"),
        ("draw_from_python", "generators"),
        ("touch_a_buffer", "versions"),
        ("move_a_parameter_and_back", "versions"),
        ("update_a_metric", "forward_called"),
        ("append_to_a_list", "losses"),
        ("replay_the_step", "running_mean|net.1|buffers"),
        ("log_of_the_user", "logged"),
        ("switch_a_mode", "val_accuracy.*training"),
        ("write_to_a_momentum", "optimizers"),
        ("write_to_the_batch", "data_seen"),
    ],
)
def test_comparison_notices_a_callback_that_interferes(deed: str, noticed: str) -> None:
    with pytest.raises(AssertionError, match=f"The callback changed the run(.|\n)*({noticed})"):
        assert_identical(run_without(steps=8), train(Mischief(deed), steps=8))


def test_comparison_finds_two_equal_runs_identical() -> None:
    assert_identical(run_without(), train(pl.Callback()))
