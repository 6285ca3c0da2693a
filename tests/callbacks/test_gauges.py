"""How near a training is to its edge, against dense Hessians of its batches in float64."""

import inspect
import itertools
import math
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lyapunov_lightning import CurvatureProbe, HessianConfig, Schedule
from lyapunov_lightning.callbacks import cadence, curvature_probe
from lyapunov_lightning.callbacks.estimators import LyapunovExponents
from lyapunov_lightning.callbacks.gauges import DecreaseGauge, SharpnessGauge
from lyapunov_lightning.callbacks.results.probe import WHOLE_AGREEMENT, ProbeResult
from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.diagnosis import diagnose
from lyapunov_lightning.curvature.errors import CurvatureWarning
from lyapunov_lightning.curvature.loss.kept_graphs import GradientGraph
from lyapunov_lightning.curvature.stability import stability_of
from lyapunov_lightning.training.replica.copier import Copier
from lyapunov_lightning.training.reporting import recording
from tests.callbacks.probing import Fit, inverse_preconditioner, name_of, sgd, two_groups
from tests.modules import SmallRegressor, Watcher, dense_hessian, regression_data, regression_loader

AVERAGED = 8
"""Measurements, comparisons and steps that are averaged over."""

ETA = 0.05


class Dense(Watcher):
    """Goes before the probe, and has for each step its batch, the one before it, and what both see there.

    Args:
        fixed: The data that batches are compared with; the batch of the step before if None.

    """

    def __init__(self, fixed: Any = None) -> None:
        self._fixed = fixed
        self._batches: list[Any] = []
        self._step = -1
        self.own: dict[int, Any] = {}
        self.scales: dict[int, Tensor] = {}
        self.is_settled: dict[int, bool] = {}
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.other: dict[int, tuple[Tensor, Tensor]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step, optimizer = trainer.global_step, trainer.optimizers[0]
        self._batches = [*(self._batches if step == self._step else []), batch]
        self._step = step
        self.own[step] = [torch.cat(parts) for parts in zip(*self._batches, strict=True)]
        self.scales[step] = inverse_preconditioner(pl_module, optimizer, self.own[step])
        self.is_settled[step] = step >= 20 or isinstance(optimizer, torch.optim.SGD)
        self.seen[step] = looked_at(pl_module, self.own[step])
        other = self.own.get(step - 1) if self._fixed is None else self._fixed
        if other is not None:
            self.other[step] = looked_at(pl_module, other)


def looked_at(module: pl.LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of the loss of a batch, by nothing of the package's."""
    with torch.enable_grad():
        loss = nn.functional.mse_loss(module(batch[0]), batch[1])
        gradients = torch.autograd.grad(loss, list(module.parameters()))
    return torch.cat([part.reshape(-1) for part in gradients]), dense_hessian(module, batch)[1]


class Expected:
    """What a probe of every step should find, from what `Dense` has seen.

    Args:
        dense: What it has seen.
        limit: The limit at an agreement.
        pace: How far a lasting gradient moves the parameters.

    """

    def __init__(self, dense: Dense, limit: Callable[[float], float], pace: float) -> None:
        steps: deque[tuple[float, float]] = deque(maxlen=AVERAGED)
        compared: deque[tuple[float, ...]] = deque(maxlen=AVERAGED)
        self.results: dict[int, dict[str, float | None]] = {}
        for step, (gradient, hessian) in dense.seen.items():
            scale = dense.scales[step]
            if dense.is_settled[step] and not dense.is_settled.get(step - 1, True):
                steps.clear()
                compared.clear()
            along = scale * gradient
            slope, curvature = float(gradient @ along), float(along @ hessian @ along)
            steps.append((slope, curvature))
            # The first comparisons are made at once, later ones at every eighth measurement.
            if step in dense.other and (len(compared) < 3 or len(self.results) % 8 == 0):
                other, its_hessian = dense.other[step]
                crossed, shared = float(scale * other @ hessian @ along), float(along @ its_hessian @ along)
                compared.append((slope, curvature, float(other @ along), shared, crossed))
            slopes, curvatures = (sum(numbers) for numbers in zip(*steps, strict=True))
            sharpness, count = curvatures / slopes, len(steps)
            left = sum((one[1] - sharpness * one[0]) ** 2 for one in steps)
            found: dict[str, float | None] = {
                "batch_sharpness": sharpness,
                "step_sharpness": curvature / slope,
                "batch_sharpness_error": math.sqrt(count / (count - 1) * left) / slopes if count > 1 else None,
                "batch_agreement": None,
                "stability_limit": None if limit(0.5) != limit(1.0) else limit(1.0),
                "noise_ratio": None,
            }
            if compared:
                own_slope, own, progress, shared, crossed = (sum(numbers) for numbers in zip(*compared, strict=True))
                agreement = min(1.0, math.sqrt(max(1e-3, crossed / own) * max(1e-3, shared / own)))
                found |= {"batch_agreement": agreement, "stability_limit": limit(agreement)}
                if progress > 0:
                    found["noise_ratio"] = pace * shared / own * sharpness / (2 * progress / own_slope)
            self.results[step] = found


def momentum_limit(momentum: float, lr: float = ETA) -> Callable[[float], float]:
    return lambda p: 2 * (1 - momentum**2) / (lr * (1 + momentum - 2 * momentum * p))


def adam_limit(beta: float, lr: float) -> Callable[[float], float]:
    return lambda p: 2 * (1 + beta) / (lr * (1 + beta - 2 * beta * p))


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01, betas=(0.8, 0.99))


KNOWN: dict[str, tuple[Any, Callable[[float], float], float]] = {
    "sgd": (sgd(lr=ETA), lambda p: 2 / ETA, ETA),
    "momentum": (sgd(lr=ETA, momentum=0.9), momentum_limit(0.9), ETA / 0.1),
    "adam": (adam, adam_limit(0.8, 0.01), 0.01),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=0.005), lambda p: 2 / 0.005, 0.005),
    "groups": (two_groups, momentum_limit(0.5, 0.1), 0.1 / 0.5),
}


def agree(results: list[ProbeResult], expected: dict[int, dict[str, float | None]], rel: float = 1e-8) -> None:
    found = {result.step: result for result in results if result.batch_sharpness is not None}
    assert list(found) == list(expected)
    for step, numbers in expected.items():
        for name, value in numbers.items():
            assert getattr(found[step], name) == (None if value is None else pytest.approx(value, rel=rel)), (
                name,
                step,
            )


# The batch sharpness, and the limit at the agreement.


@pytest.mark.parametrize(
    ("name", "accumulate"), [*((name, 1) for name in KNOWN), *((name, 4) for name in ("momentum", "adam"))]
)
def test_all_numbers_are_those_of_dense_hessians_of_the_batches(fit: Fit, name: str, accumulate: int) -> None:
    # In an epoch of six batches the last step is made with two of them.
    optimizer, limit, pace = KNOWN[name]
    dense, probe = Dense(), CurvatureProbe(1, eigenvalue_every=1, tol=0.5)
    fit(SmallRegressor(optimizer), dense, probe, accumulate_grad_batches=accumulate, max_steps=24)
    agree(probe.results, Expected(dense, limit, pace).results)
    known = [result.batch_agreement for result in probe.results if result.batch_agreement is not None]
    assert len(known) >= 10
    assert min(known) < 0.9 < 1.05 < max(known) / min(known)


@pytest.mark.parametrize("name", ["lyapunov", "power"])
def test_it_is_the_same_beside_every_estimator(fit: Fit, name: Any) -> None:
    optimizer, limit, pace = KNOWN["momentum"]
    dense, probe = Dense(), CurvatureProbe(1, name, eigenvalue_every=1)
    fit(SmallRegressor(optimizer), dense, probe)
    # An estimator that takes no products of the Hessian leaves no graph: then losses tell, but for the first ones.
    expected = Expected(dense, limit, pace).results
    agree(probe.results[:4], {step: expected[step] for step in range(4)})
    agree(probe.results, expected, rel=0.05 if name == "lyapunov" else 1e-8)


@pytest.mark.parametrize("name", KNOWN)
def test_the_limit_is_that_of_the_optimizer_at_the_measured_agreement(fit: Fit, name: str) -> None:
    limits: dict[int, Callable[[float], float]] = {}

    class Asked(Watcher):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            stability = stability_of(trainer.optimizers[0], list(pl_module.parameters()))
            if stability is not None:
                limits[trainer.global_step] = stability.limit_at

    probe = CurvatureProbe(1, eigenvalue_every=1)
    fit(SmallRegressor(KNOWN[name][0]), Asked(), probe)
    known = [result for result in probe.results if result.batch_agreement is not None]
    assert len(known) >= 10
    for result in known:
        assert result.stability_limit == pytest.approx(limits[result.step](result.batch_agreement), rel=1e-12)
        binding = result.batch_sharpness
        if result.batch_agreement >= WHOLE_AGREEMENT:
            binding = max(binding, result.decisive_eigenvalue)
        assert result.stability_ratio == pytest.approx(binding / result.stability_limit, rel=1e-12)
        assert result.learning_rate_limit == pytest.approx(result.learning_rate / result.stability_ratio, rel=1e-12)
        assert result.step_ratio == pytest.approx(result.step_sharpness / result.stability_limit, rel=1e-12)


@pytest.mark.parametrize("name", KNOWN)
def test_full_batch_training_has_batches_that_agree_wholly(fit: Fit, name: str) -> None:
    optimizer, limit, _ = KNOWN[name]
    probe = CurvatureProbe(1, eigenvalue_every=1)
    fit(SmallRegressor(optimizer), probe, loader=regression_loader(batch_size=48))
    known = [result for result in probe.results if result.batch_agreement is not None]
    assert len(known) >= 10
    assert [result.batch_agreement for result in known] == pytest.approx([1.0] * len(known), abs=1e-12)
    assert [result.stability_limit for result in known] == pytest.approx([limit(1.0)] * len(known), rel=1e-9)


@pytest.mark.parametrize(
    ("optimizer", "data", "first"),
    [(sgd(lr=ETA), None, 0), (sgd(lr=ETA, momentum=0.9), None, 1), (sgd(lr=ETA, momentum=0.9), "fixed", 0)],
    ids=["no momentum", "momentum", "fixed data"],
)
def test_with_momentum_there_is_no_ratio_before_batches_were_compared(
    fit: Fit, optimizer: Any, data: Any, first: int
) -> None:
    probe = CurvatureProbe(1, eigenvalue_every=1, hessian=HessianConfig(data))
    fit(SmallRegressor(optimizer), probe, max_steps=4)
    assert [result.step for result in probe.results if result.stability_ratio is not None] == list(range(first, 4))
    assert [result.step for result in probe.results if result.batch_sharpness is not None] == list(range(4))


def test_on_fixed_data_the_batch_of_the_step_is_compared_with_these(fit: Fit) -> None:
    optimizer, limit, pace = KNOWN["momentum"]
    whole = regression_data().tensors
    config = HessianConfig("fixed", fraction=1.0)
    dense, probe = Dense(fixed=whole), CurvatureProbe(1, eigenvalue_every=1, hessian=config, tol=1e-6)
    fit(SmallRegressor(optimizer), dense, probe, loader=regression_loader(shuffle=True))
    agree(probe.results, Expected(dense, limit, pace).results)
    tops = [float(torch.linalg.eigvalsh(hessian)[-1]) for _, hessian in dense.other.values()]
    assert [result.lambda_max for result in probe.results] == pytest.approx(tops, rel=1e-4)  # of the fixed data


@pytest.mark.parametrize("name", ["momentum", "adam", "groups"])
def test_batches_that_are_accumulated_are_one_batch(fit: Fit, name: str) -> None:
    found: list[list[dict[str, float]]] = []
    for batch_size, accumulate in ((12, 1), (4, 3)):
        pl.seed_everything(5, verbose=False)
        probe = CurvatureProbe(1, eigenvalue_every=1, tol=1e-12)
        loader = regression_loader(batch_size=batch_size)
        fit(SmallRegressor(KNOWN[name][0]), probe, loader=loader, accumulate_grad_batches=accumulate, max_steps=6)
        found.append([result.scalars() for result in probe.results])
    not_compared = ("residual", "value_error", "matvecs")
    one, several = (
        [{tag: value for tag, value in numbers.items() if not tag.endswith(not_compared)} for numbers in results]
        for results in found
    )
    assert len(several) == 6
    assert {"curvature/batch_sharpness", "curvature/stability_ratio", "curvature/lambda_max"} <= several[-1].keys()
    for mine, theirs in zip(several, one, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9)


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def loss(self, batch: Any) -> Tensor:
        return self.x.square().sum()


def test_a_batch_without_a_gradient_says_nothing_and_does_no_harm() -> None:
    module, gauge = Constant(), SharpnessGauge()
    stability = stability_of(torch.optim.SGD(module.parameters(), lr=0.1), [module.x])
    assert stability is not None

    def measured() -> Any:
        own = HessianOperator(module.loss, module.parameters(), [torch.zeros(1)])
        return gauge.measure(own, own.gradient(), [], stability, lambda batches: own)

    assert measured() == {"stability_limit": pytest.approx(20.0), "is_settled": True}
    with torch.no_grad():
        module.x.add_(1.0)
    assert measured()["batch_sharpness"] == pytest.approx(2.0)
    with torch.no_grad():
        module.x.zero_()
    assert measured()["batch_sharpness"] == pytest.approx(2.0)  # that of the measurement before


def test_an_adaptive_optimizer_is_judged_once_it_has_settled(fit: Fit) -> None:
    probe, plain = CurvatureProbe(1, eigenvalue_every=1), CurvatureProbe(1, eigenvalue_every=1)
    fit(SmallRegressor(adam), probe, max_steps=24)
    fit(SmallRegressor(), plain, max_steps=4)
    assert [result.is_settled for result in probe.results if result.step] == [step >= 20 for step in range(1, 24)]
    assert all(result.is_settled for result in plain.results)


def test_the_graphs_of_two_batches_are_never_held_together(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    operators: weakref.WeakSet[HessianOperator] = weakref.WeakSet()
    gradient = HessianOperator.gradient

    def asked(operator: HessianOperator, *args: Any, **options: Any) -> Tensor:
        held.append(sum(other.graph_bytes > 0 for other in operators if other is not operator))
        operators.add(operator)
        return gradient(operator, *args, **options)

    monkeypatch.setattr(HessianOperator, "gradient", asked)
    probe = CurvatureProbe(1, "lyapunov", eigenvalue_every=1)
    fit(SmallRegressor(), probe, max_steps=6)
    assert sum(result.batch_agreement is not None for result in probe.results) == 5
    assert set(held) == {0}


# By values of the loss.


class Glances:
    """Which steps were measured by values of the loss, and which of them by a product in the end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        self.products: list[int] = []
        trainers: list[pl.Trainer] = []
        start, values, matvec = CurvatureProbe.on_train_start, HessianOperator.values_along, HessianOperator.matvec

        def started(probe: CurvatureProbe, trainer: pl.Trainer, pl_module: Any) -> None:
            trainers.append(trainer)
            start(probe, trainer, pl_module)

        def looked(*args: Any) -> Any:
            self.steps.append(trainers[-1].global_step)
            return values(*args)

        def multiplied(*args: Any) -> Any:
            self.products.append(trainers[-1].global_step)
            return matvec(*args)

        monkeypatch.setattr(CurvatureProbe, "on_train_start", started)
        monkeypatch.setattr(HessianOperator, "values_along", looked)
        monkeypatch.setattr(HessianOperator, "matvec", multiplied)

    @property
    def by_losses(self) -> set[int]:
        """The steps at which losses were enough."""
        return set(self.steps) - set(self.products)


class ScaledLater(SmallRegressor):
    """Another gradient than that of its loss, from the 14th batch on."""

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            parameter.grad.mul_(1.0 if self.global_step < 14 else 0.5)


class Scaled(SmallRegressor):
    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            parameter.grad.mul_(0.5)


@pytest.mark.parametrize(
    ("name", "module", "options"),
    [
        *((name, SmallRegressor, {}) for name in KNOWN),
        *((name, SmallRegressor, {"accumulate_grad_batches": 4}) for name in ("momentum", "adam")),
        *((name, module, {}) for name in ("momentum", "groups") for module in (Scaled, ScaledLater)),
    ],
    ids=name_of,
)
def test_between_eigenvalues_losses_give_the_sharpness_of_the_step(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, name: str, module: Any, options: dict[str, Any]
) -> None:
    optimizer, *_ = KNOWN[name]
    dense, probe, glances = Dense(), CurvatureProbe(1, eigenvalue_every=100), Glances(monkeypatch)
    fit(module(optimizer), dense, probe, max_steps=24, **options)
    compared = {0, 1, 2, 3, 8, 16}  # by products, as is what losses do not tell of a gradient that was changed
    assert glances.by_losses.isdisjoint(compared)
    assert len(glances.by_losses) >= (7 if module is ScaledLater else 14)
    for result in probe.results:
        if result.step_sharpness is None:
            continue
        gradient, hessian = dense.seen[result.step]
        along = dense.scales[result.step] * gradient
        sharpness = float(along @ hessian @ along / (gradient @ along))
        # The distance is a fifth of that over which the slope changes by its own size: fourth derivatives are left.
        rel = 0.1 if result.step in glances.by_losses else 1e-8
        assert result.step_sharpness == pytest.approx(sharpness, rel=rel, abs=rel * result.batch_sharpness)


class Counted(SmallRegressor):
    """Adds to its loss what depends on how many steps it has made itself: not the same in a replay of the step."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.count = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.count += 1
        return super().training_step(batch, batch_idx) + 0.01 * self.count


@pytest.mark.parametrize(
    ("module", "options", "is_known"),
    [(SmallRegressor, {}, True), (Counted, {}, False), (SmallRegressor, {"accumulate_grad_batches": 2}, False)],
    ids=name_of,
)
def test_the_loss_of_the_step_is_used_where_a_replay_has_the_same(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, module: Any, options: dict[str, Any], is_known: bool
) -> None:
    asked: list[list[float]] = []
    values = HessianOperator.values_along
    monkeypatch.setattr(
        HessianOperator,
        "values_along",
        lambda operator, direction, distances: (asked.append(distances), values(operator, direction, distances))[1],
    )
    evaluations: list[int] = []
    one = HessianOperator.value
    monkeypatch.setattr(HessianOperator, "value", lambda *args: (evaluations.append(1), one(*args))[1])
    dense, probe = Dense(), CurvatureProbe(1, eigenvalue_every=100)
    fit(module(KNOWN["momentum"][0]), dense, probe, max_steps=24, **options)
    # The middle one is measured where the step's own loss is not that of the replay.
    assert ([0.0] not in asked) == is_known
    assert len(evaluations) == (0 if options else 1)  # the comparison
    for result in probe.results:
        gradient, hessian = dense.seen[result.step]
        assert result.step_sharpness == pytest.approx(
            float(gradient @ hessian @ gradient / gradient.dot(gradient)), rel=0.1
        )


def test_after_three_that_do_not_tell_losses_are_not_asked_any_more(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    class Noisy(SmallRegressor):
        """Its loss is another one at each evaluation, by more than its slope says, and its gradient is not."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            with torch.no_grad():
                offset = sum(parameter.sum() for parameter in self.parameters())
            return loss + (1e3 * offset).sin()

    glances, probe = Glances(monkeypatch), CurvatureProbe(1, eigenvalue_every=100)
    fit(Noisy(), probe, max_steps=24)
    assert len(set(glances.steps)) == 3
    assert glances.by_losses == set()
    assert all(result.step_sharpness is not None for result in probe.results)


# Optimizers whose limit nobody knows.


class Own(torch.optim.SGD):
    """A user's own optimizer, which happens to be SGD."""


class SignDescent(torch.optim.Optimizer):
    """A user's own optimizer that is none of ours."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad.sign())
        return loss


pytestmark = pytest.mark.filterwarnings("ignore:.*is then the share of a step's promised decrease.*")


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}], ids=name_of)
def test_on_a_quadratic_the_lost_decrease_is_half_of_rate_times_batch_sharpness(
    fit: Fit, options: dict[str, Any]
) -> None:
    found: list[list[ProbeResult]] = []
    for optimizer in (Own, torch.optim.SGD):
        pl.seed_everything(5, verbose=False)
        probe = CurvatureProbe(1, eigenvalue_every=1)
        fit(SmallRegressor(lambda p, kind=optimizer: kind(p, lr=ETA), linear=True), probe, **options)
        found.append(probe.results)
    unknown, known = found
    assert [result.batch_sharpness for result in unknown] == [None] * 12
    expected = [ETA * result.batch_sharpness / 2 for result in known]
    assert [result.lost_decrease for result in unknown] == pytest.approx(expected, rel=1e-9)
    assert [result.stability_ratio for result in unknown] == pytest.approx(expected, rel=1e-9)
    assert [result.learning_rate_limit for result in unknown] == pytest.approx([ETA / ratio for ratio in expected])
    assert [result.lambda_max for result in unknown] == pytest.approx([result.lambda_max for result in known])


@pytest.mark.parametrize("estimator", ["lanczos", "lyapunov"])
@pytest.mark.parametrize("data", [None, "fixed"])
def test_the_lost_decrease_is_that_of_the_step_which_the_users_optimizer_takes(
    fit: Fit, data: Any, estimator: Any
) -> None:
    steps: list[tuple[float, float]] = []

    class Looking(Watcher):
        """What the step's own batch loses of its promised decrease, before and after the step."""

        def at(self, module: Any, batch: Any) -> tuple[Tensor, float]:
            with torch.enable_grad():
                loss = nn.functional.mse_loss(module(batch[0]), batch[1])
            gradients = torch.autograd.grad(loss, list(module.parameters()))
            return torch.cat([part.reshape(-1) for part in gradients]), float(loss.detach())

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.before = flat(pl_module)
            self.gradient, self.loss = self.at(pl_module, batch)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            slope = float(self.gradient @ (flat(pl_module) - self.before))
            steps.append((slope, self.at(pl_module, batch)[1] - self.loss))

    probe = CurvatureProbe(1, estimator, eigenvalue_every=1, hessian=HessianConfig(data))
    fit(SmallRegressor(lambda p: SignDescent(p, 0.01)), Looking(), probe)
    assert len(probe.results) == 12
    for count, result in enumerate(probe.results, start=1):
        slopes, changes = (sum(numbers) for numbers in zip(*steps[max(0, count - AVERAGED) : count], strict=True))
        assert result.lost_decrease == pytest.approx(1 - changes / slopes, rel=1e-9)
        assert result.converged or estimator == "lyapunov"


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


def test_steps_that_go_uphill_promise_nothing_and_cost_no_eigenvalue(fit: Fit) -> None:
    probe = CurvatureProbe(1, eigenvalue_every=1)
    fit(SmallRegressor(lambda p: Own(p, lr=1e-3, maximize=True)), probe)
    assert len(probe.results) == 12
    assert {result.lost_decrease for result in probe.results} == {None}
    assert {result.stability_ratio for result in probe.results} == {None}
    assert all(result.converged and result.lambda_max for result in probe.results)


# Clipping.


class Norms(Watcher):
    """The length of the gradient before clipping and of the one that the optimizer uses, by step."""

    def __init__(self) -> None:
        self.before: dict[int, float] = {}
        self.after: dict[int, float] = {}

    @staticmethod
    def of(module: nn.Module) -> float:
        return math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.before[trainer.global_step] = self.of(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > len(self.after):
            self.after[trainer.global_step - 1] = self.of(pl_module)


class ClipsByItself(SmallRegressor):
    """Clips adaptively, as some do in the hook that is there for it."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        for parameter in self.parameters():
            parameter.grad.mul_(0.5 if self.global_step % 3 else 1.0).clamp_(-0.1, 0.1)


class ScalesInHook(SmallRegressor):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            parameter.grad.mul_(0.25)


@pytest.mark.parametrize(
    ("module", "options", "estimator"),
    [
        (SmallRegressor, {"gradient_clip_val": 0.3}, "lanczos"),
        (SmallRegressor, {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}, "lyapunov"),
        (SmallRegressor, {"gradient_clip_val": 0.3, "accumulate_grad_batches": 3}, "lyapunov"),
        (ClipsByItself, {}, "lanczos"),
        (ScalesInHook, {}, "lanczos"),
    ],
    ids=name_of,
)
def test_clipping_is_what_was_left_of_the_gradient(
    fit: Fit, module: Any, options: dict[str, Any], estimator: Any
) -> None:
    norms, probe = Norms(), CurvatureProbe(1, estimator, eigenvalue_every=1)
    fit(module(sgd(lr=0.2, momentum=0.5)), norms, probe, **options)
    left = {step: norms.after[step] / norms.before[step] for step in norms.after}
    assert {result.step: result.clipping for result in probe.results} == pytest.approx(left, rel=1e-12)
    assert len(left) == 12
    assert min(left.values()) < 0.9
    for result in probe.results[1:]:
        counts = result.batch_agreement is not None and result.batch_agreement >= WHOLE_AGREEMENT
        binding = max(result.batch_sharpness, result.decisive_eigenvalue if counts else 0) / result.stability_limit
        assert result.stability_ratio == pytest.approx(result.clipping * binding, rel=1e-12)
        assert result.learning_rate_limit == pytest.approx(0.2 / result.stability_ratio, rel=1e-12)


def test_a_clipped_step_is_less_noisy(fit: Fit) -> None:
    optimizer, limit, pace = KNOWN["sgd"]
    dense, probe = Dense(), CurvatureProbe(1, eigenvalue_every=1)
    fit(SmallRegressor(optimizer), dense, probe, loader=regression_loader(batch_size=48), gradient_clip_val=0.2)
    expected = Expected(dense, limit, pace).results
    assert probe.results[0].noise_ratio is None  # not known before batches were compared
    for result in probe.results[1:]:
        assert result.noise_ratio == pytest.approx(result.clipping * expected[result.step]["noise_ratio"], rel=1e-8)


def test_without_clipping_there_is_none(fit: Fit) -> None:
    probe = CurvatureProbe(1, eigenvalue_every=1)
    logger = fit(SmallRegressor(), probe).logger
    assert {result.clipping for result in probe.results} == {None}
    assert "curvature_details/clipping" not in logger.tags


def test_the_critical_sharpness_is_along_the_clipped_step_already(fit: Fit) -> None:
    probe = CurvatureProbe(1, "critical")
    loader = regression_loader(batch_size=48)
    fit(SmallRegressor(sgd(lr=1.5), linear=True), probe, loader=loader, gradient_clip_val=0.1)
    assert {result.clipping for result in probe.results} == {None}
    assert [result.stability_ratio for result in probe.results] == pytest.approx(
        [result.critical_sharpness * 1.5 / 2 for result in probe.results]
    )


# Steps that are not made, and measurements that fail.


def mean_square(module: Any, batch: Any) -> Tensor:
    return nn.functional.mse_loss(module(batch[0]), batch[1])


class Sometimes(SmallRegressor):
    """Skips every other batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if batch_idx % 2 == 0 else None


class Overflowing(pl.plugins.precision.Precision):
    """Takes no third step, as a loss scaler does that finds an overflow."""

    def __init__(self) -> None:
        self.count = 0

    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        self.count += 1
        if self.count != 3:
            return super().optimizer_step(optimizer, model, closure, **kwargs)
        result = closure()
        self._after_closure(model, optimizer)
        return result


@pytest.mark.parametrize("optimizer", [sgd(), lambda p: Own(p, lr=0.1)], ids=["known", "unknown"])
@pytest.mark.parametrize(
    ("module", "options"), [(Sometimes, {}), (SmallRegressor, {"plugins": [Overflowing]})], ids=["None", "overflow"]
)
def test_a_step_that_is_skipped_loses_nothing_that_was_measured(
    fit: Fit, module: Any, options: dict[str, Any], optimizer: Any
) -> None:
    probe = CurvatureProbe(1, eigenvalue_every=1, hessian=HessianConfig(loss_fn=mean_square))
    made = {name: [kind() for kind in kinds] for name, kinds in options.items()}
    trainer = fit(module(optimizer), probe, gradient_clip_val=0.3, max_steps=8, **made)
    tried = trainer.logger.curve("curvature_details/converged")
    assert list(tried) == list(range(len(tried)))
    assert set(tried.values()) == {1.0}
    assert len(trainer.logger.curve("curvature/lambda_max")) == len(tried) >= 8
    is_lost = (
        isinstance(trainer.optimizers[0], Own) and "plugins" in options
    )  # the decrease of a step that was not made
    assert len(trainer.logger.curve("curvature/stability_ratio")) == len(tried) - is_lost
    assert sum(result.clipping is None for result in probe.results) >= 1  # of the steps that were not made
    assert sum(result.clipping is not None for result in probe.results) >= 4


def failures_of(fit: Fit, probe: CurvatureProbe, module: Any = None, **options: Any) -> Any:
    """The values of ``converged`` of a run whose measurements fail, with one warning."""
    with pytest.warns(CurvatureWarning, match="failed, and training goes on without it") as caught:
        trainer = fit(module or SmallRegressor(), probe, **options)
    assert len([w for w in caught if "failed" in str(w.message)]) == 1
    assert trainer.global_step == 12
    assert probe._pending is None
    return [
        value for _, numbers in trainer.logger.history for tag, value in numbers.items() if tag.endswith("converged")
    ]


def fails(*_: Any) -> Any:
    raise RuntimeError("of the gauge")


@pytest.mark.parametrize("estimator", ["lanczos", "lyapunov"])
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 1.0}], ids=name_of)
def test_a_gauge_that_fails_is_one_failure(
    fit: Fit, estimator: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SharpnessGauge, "measure", fails)
    probe = CurvatureProbe(1, estimator, eigenvalue_every=1)
    assert failures_of(fit, probe, **options) == [0.0] * 12
    assert not probe.results


def test_an_estimator_that_fails_in_mid_step_is_one_failure(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LyapunovExponents, "measure", fails)
    probe = CurvatureProbe(1, "lyapunov", eigenvalue_every=1)
    assert failures_of(fit, probe, gradient_clip_val=1.0) == [0.0] * 12
    assert not probe.results


def test_a_look_at_the_gradient_that_fails_is_one_failure(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lyapunov_lightning.callbacks.pending.PendingResult.norm_of_gradient", fails)
    assert failures_of(fit, CurvatureProbe(1, eigenvalue_every=1), gradient_clip_val=1.0) == [0.0] * 12


def test_a_step_that_cannot_be_observed_is_one_failure_and_leaves_nothing(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DecreaseGauge, "measure", fails)
    probe = CurvatureProbe(1, eigenvalue_every=1)
    assert failures_of(fit, probe, SmallRegressor(lambda p: Own(p, lr=0.1))) == [0.0] * 12
    assert not probe._gauge._decrease.is_observing


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_batch_that_cannot_be_copied_among_others_ends_the_measurement_and_not_the_run(
    fit: Fit, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, batches = Copier.__call__, regression_loader(batch_size=4)
    [lost] = [batch[2].tolist() for index, batch in enumerate(batches) if index == 3 + place]

    def copied(copier: Any, value: Any) -> Any:
        is_batch = isinstance(value, list) and len(value) == 3 and isinstance(value[2], Tensor)
        if is_batch and value[2].tolist() == lost:
            raise RuntimeError("no copy")
        return copy(copier, value)

    monkeypatch.setattr(Copier, "__call__", copied)
    probe = CurvatureProbe(1, eigenvalue_every=1)
    with pytest.warns(CurvatureWarning, match="no copy"):
        trainer = fit(SmallRegressor(), probe, loader=batches, accumulate_grad_batches=3, max_steps=7)
    assert trainer.global_step == 7
    converged = trainer.logger.curve("curvature_details/converged")
    assert converged == {step: float(step not in (1, 5)) for step in range(7)}
    assert [result.step for result in probe.results] == [0, 2, 3, 4, 6]


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(sgd(), {"gradient_clip_val": 1.0}), (lambda p: Own(p, lr=0.1), {})],
    ids=["clipped", "unknown"],
)
def test_no_graph_is_kept_while_the_step_is_made(
    fit: Fit, optimizer: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[GradientGraph]] = []
    kept: list[int] = []
    make = GradientGraph.__init__

    def noted(graph: GradientGraph, *arguments: Any, **settings: Any) -> None:
        made.append(weakref.ref(graph))
        make(graph, *arguments, **settings)

    monkeypatch.setattr(GradientGraph, "__init__", noted)

    class Counting(SmallRegressor):
        def on_before_backward(self, loss: Tensor) -> None:
            kept.append(sum(graph() is not None for graph in made))

    class Holding(Watcher):
        """Holds an operator with its graph for a step, to see that one would be counted."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.hessian = None
            if trainer.global_step == 4:
                self.hessian = HessianOperator(
                    lambda pair: mean_square(pl_module, pair), pl_module.parameters(), [batch[:2]]
                )
                self.hessian.matvec(torch.ones(26, dtype=torch.float64))

    fit(Counting(optimizer), Holding(), CurvatureProbe(1), max_steps=6, **options)
    assert kept == [0, 0, 0, 0, 1, 0]


# When.


def is_whole(result: ProbeResult) -> bool:
    """Whether the eigenvalue counts: where the batches agree, or nobody knows yet whether they do."""
    return result.batch_agreement is None or result.batch_agreement >= WHOLE_AGREEMENT


def measured_at(probe: CurvatureProbe) -> tuple[list[int], list[int]]:
    """The steps that were measured, and those at which the eigenvalue was."""
    steps = [result.step for result in probe.results]
    return steps, [result.step for result in probe.results if result.lambda_max is not None]


BY_DEFAULT = [0, 5, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200]


@pytest.mark.parametrize(
    ("probe", "options", "steps", "with_eigenvalue"),
    [
        ({"eigenvalue_every": 5}, {}, BY_DEFAULT, [0, 5, 80, 180]),
        ({"eigenvalue_every": 1}, {}, BY_DEFAULT, BY_DEFAULT),
        ({"eigenvalue_every": 3}, {}, BY_DEFAULT, [0, 5, 40, 100, 160]),
        ({"eigenvalue_every": 5}, {"log_every_n_steps": 100}, [0, 5, 40, 80, 120, 160, 200], [0, 5, 160]),
        ({"every_n_steps": 50}, {}, [0, 50, 100, 150, 200], [0, 50, 100, 150, 200]),
        ({"every_n_steps": 50, "eigenvalue_every": 4}, {}, [0, 50, 100, 150, 200], [0, 50, 200]),
        (
            {"schedule": Schedule(at_steps=(3, 9, 12, 90, 91)), "eigenvalue_every": 2},
            {},
            [3, 9, 12, 90, 91],
            [3, 9, 12, 91],
        ),
    ],
    ids=name_of,
)
def test_the_eigenvalue_is_measured_at_some_of_the_measurements(
    fit: Fit, probe: dict[str, Any], options: dict[str, Any], steps: list[int], with_eigenvalue: list[int]
) -> None:
    probing = CurvatureProbe(**probe)
    logger = fit(SmallRegressor(), probing, max_steps=201, **{"log_every_n_steps": 50, **options}).logger
    assert measured_at(probing) == (steps, with_eigenvalue)
    assert list(logger.curve("curvature/lambda_max")) == with_eigenvalue
    assert list(logger.curve("curvature/stability_ratio")) == steps
    # In between the ratio counts the eigenvalue that was measured last.
    last = {result.step: result.decisive_eigenvalue for result in probing.results}
    assert [last[step] for step in steps] == [
        max((at, value) for at, value in last.items() if at in with_eigenvalue and at <= step)[1] for step in steps
    ]
    ratios = [
        max(result.batch_sharpness, result.decisive_eigenvalue if is_whole(result) else 0) * 0.1 / 2
        for result in probing.results
    ]
    assert [result.stability_ratio for result in probing.results] == pytest.approx(ratios)


def test_where_eigenvalues_are_asked_for_at_every_step_the_batch_sharpness_comes_at_every_tenth(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, probe = Dense(), CurvatureProbe(1)
    fit(SmallRegressor(KNOWN["momentum"][0]), dense, probe, max_steps=56)
    results = probe.results
    assert [result.step for result in results if result.lambda_max is not None] == list(range(56))
    # The first ones follow each other until three are compared, and so does what every eighth is compared with.
    measured = [result.step for result in results if result.step_sharpness is not None]
    assert measured == [0, 1, 2, 3, 13, 23, 33, 43, 44, 54]
    for result in results:
        last = results[max(step for step in measured if step <= result.step)]
        assert (result.batch_sharpness, result.batch_agreement) == (last.batch_sharpness, last.batch_agreement)
        assert result.stability_limit == last.stability_limit
        assert result.is_fresh == (result.step in measured)
        if result is last:
            gradient, hessian = dense.seen[result.step]
            sharpness = float(gradient @ hessian @ gradient / (gradient @ gradient))
            assert result.step_sharpness == pytest.approx(sharpness, rel=1e-8)
    assert results[-1].stability_ratio == pytest.approx(results[-1].batch_sharpness / results[-1].stability_limit)
    # One that stands for ten steps is no ten measurements.
    judged: list[int] = []
    monkeypatch.setattr(
        curvature_probe,
        "diagnose",
        lambda readings, *others: (judged.extend(reading.step for reading in readings), diagnose(readings, *others))[1],
    )
    assert probe.diagnosis().kind != "unknown"
    assert judged == measured


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, [0, 10, 20, 30]),
        ({"eigenvalue_every": 1}, list(range(0, 40, 2))),
        ({"end": "both"}, list(range(0, 40, 2))),
        ({"estimator": "power"}, [0, 10, 20, 30]),
    ],
    ids=name_of,
)
def test_the_hessian_beside_the_one_that_an_adam_sees_is_measured_now_and_then(
    fit: Fit, options: dict[str, Any], plain: list[int]
) -> None:
    probe = CurvatureProbe(2, **options)
    fit(SmallRegressor(adam), probe, max_steps=40)
    of_adam = [result.step for result in probe.results if result.preconditioned_lambda_max is not None]
    assert of_adam == list(range(0, 40, 2))
    assert [result.step for result in probe.results if result.lambda_max is not None] == plain
    assert all(result.decisive_eigenvalue == result.preconditioned_lambda_max for result in probe.results)


def test_by_default_the_first_eigenvalue_of_an_adam_is_the_one_that_counts(fit: Fit) -> None:
    probe = CurvatureProbe()
    fit(SmallRegressor(adam), probe, max_steps=41, log_every_n_steps=50)
    found = {result.step: result for result in probe.results if result.has_eigenvalue}
    assert list(found) == [20]
    assert (found[20].lambda_max, found[20].residual, found[20].inverse_h0) == (None, None, None)
    assert found[20].preconditioned_lambda_max is not None
    assert found[20].matvecs > 0


@pytest.mark.parametrize("estimator", ["lanczos", "lyapunov"])
def test_by_default_eigenvalues_come_as_their_share_of_the_steps_allows(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, estimator: Any
) -> None:
    share = 0.3  # and not 0.03: a tenth of the steps shows the same
    monkeypatch.setattr(cadence, "EIGENVALUE_SHARE", share)
    probe = CurvatureProbe(estimator=estimator)
    fit(SmallRegressor(), probe, max_steps=170, log_every_n_steps=10)
    measured, with_eigenvalue = measured_at(probe)
    assert with_eigenvalue[0] == measured[2]
    cost = {result.step: 2.3 * result.matvecs / share for result in probe.results if result.lambda_max is not None}
    assert len(cost) >= 2
    for step, later in itertools.pairwise(with_eigenvalue):
        assert later == min(at for at in measured if at >= step + cost[step])
    # It stands for four measurements more.
    held = {result.step for result in probe.results if result.decisive_eigenvalue is not None}
    assert held == {at for place, at in enumerate(measured) if set(measured[max(0, place - 4) : place + 1]) & set(cost)}


@pytest.mark.parametrize(
    ("options", "settings", "is_said"),
    [
        ({}, {"max_steps": 30}, True),
        ({}, {"max_steps": 30, "log_every_n_steps": 1}, True),
        ({"eigenvalue_every": 3}, {"max_steps": 30}, False),
        ({"every_n_steps": 5}, {"max_steps": 30}, False),
        ({}, {"max_steps": 2000}, False),  # which has room for further ones
        ({}, {"max_steps": -1}, False),  # and may have
    ],
)
def test_an_eigenvalue_that_stays_the_only_one_is_told_of(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, options: Any, settings: Any, is_said: bool
) -> None:
    said: list[str] = []
    monkeypatch.setattr(recording, "rank_zero_info", said.append)

    class Stop(Watcher):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 30

    probe = CurvatureProbe(**options)
    fit(SmallRegressor(), probe, Stop(), **{"log_every_n_steps": 5, **settings})
    assert any(result.lambda_max is not None for result in probe.results)
    assert sum("is measured this once" in text for text in said) == is_said


def test_by_default_measurements_thin_out_as_the_run_goes_on(fit: Fit) -> None:
    probe = CurvatureProbe(estimator="power", tol=0.5, log_prefix="thin")
    fit(SmallRegressor(), probe, max_steps=301, log_every_n_steps=5)
    steps = [result.step for result in probe.results]
    assert steps == sorted(
        {5, *range(0, 80, 2), *range(80, 120, 4), *range(120, 160, 6), *range(160, 200, 8)} | {*range(200, 301, 10)}
    )


def test_the_critical_sharpness_follows_the_logging(fit: Fit) -> None:
    probe = CurvatureProbe(estimator="critical")
    fit(SmallRegressor(), probe, max_steps=101, log_every_n_steps=50)
    assert [result.step for result in probe.results] == [0, 50, 100]
    assert all(result.critical_sharpness for result in probe.results)


def test_no_eigenvalue_counts_from_before_an_adaptive_optimizer_had_settled(fit: Fit) -> None:
    probe = CurvatureProbe(eigenvalue_every=5)
    fit(SmallRegressor(adam), probe, max_steps=121, log_every_n_steps=50)
    assert measured_at(probe)[1] == [0, 5, 80]
    found = {result.step: result.decisive_eigenvalue for result in probe.results}
    assert found[5] is not None
    assert (found[20], found[40], found[60]) == (None, None, None)
    assert found[80] == found[100] == found[120] is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eigenvalue_every": 0}, "`eigenvalue_every` should be a positive int, got 0"),
        ({"eigenvalue_every": 2.5}, "`eigenvalue_every` should be a positive int, got 2.5"),
        ({"eigenvalue_every": 2, "estimator": "critical"}, "should be None with `estimator='critical'`.*got 2"),
    ],
    ids=name_of,
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CurvatureProbe(**arguments)


# One run after another, and a run that goes on.


def test_a_later_run_begins_anew(fit: Fit) -> None:
    probe = CurvatureProbe(3, eigenvalue_every=4)
    unknown = CurvatureProbe(3, eigenvalue_every=4, log_prefix="unknown")
    fit(SmallRegressor(), probe, max_steps=24)
    fit(SmallRegressor(lambda p: Own(p, lr=0.1)), unknown, max_steps=24)
    pl.seed_everything(8, verbose=False)
    state = SmallRegressor().state_dict()
    for used, optimizer in ((probe, sgd()), (unknown, lambda p: Own(p, lr=0.1))):
        fresh = CurvatureProbe(3, eigenvalue_every=4)
        found = []
        for probing in (used, fresh):
            module = SmallRegressor(optimizer)
            module.load_state_dict(state)
            before = len(probing.results)
            fit(module, probing, max_steps=24)
            results = probing.results[before:]
            found.append(
                [
                    (result.step, result.batch_sharpness, result.stability_ratio, result.batch_agreement)
                    for result in results
                ]
            )
            assert [result.lambda_max is not None for result in results] == [
                True,
                True,
                *[False, False, True, False] * 2,
            ][:8]
        # Not the bits of the eigenvalue, whose search starts where the last one ended.
        for mine, theirs in zip(*found, strict=True):
            assert [value is None for value in mine] == [value is None for value in theirs]
            assert [value or 0.0 for value in mine] == pytest.approx([value or 0.0 for value in theirs], rel=2e-2)
        assert len(found[0]) == 8


SAFELY = {"weights_only": True} if "weights_only" in inspect.signature(pl.Trainer.fit).parameters else {}


@pytest.mark.parametrize(
    ("optimizer", "options", "estimator"),
    [
        (sgd(lr=ETA, momentum=0.9), {}, "lanczos"),
        (sgd(lr=ETA, momentum=0.9), {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}, "lyapunov"),
        (adam, {}, "lyapunov"),
        (lambda p: Own(p, lr=0.1), {}, "lanczos"),
    ],
    ids=["momentum", "clipped and accumulated", "adam", "unknown"],
)
def test_a_run_that_goes_on_measures_at_the_same_steps_what_it_would_have(
    fit: Fit, optimizer: Any, options: dict[str, Any], estimator: Any, tmp_path: Any
) -> None:
    def probes() -> CurvatureProbe:
        return CurvatureProbe(estimator=estimator)

    # After an epoch, and with the next measurement one that compares no batches.
    options = {"log_every_n_steps": 5, "max_steps": 42, **options}
    whole, keeper = probes(), ModelCheckpoint(tmp_path, every_n_train_steps=18, save_top_k=-1, filename="{step}")
    fit(SmallRegressor(optimizer), whole, keeper, **options)
    resumed = probes()
    fit(SmallRegressor(optimizer), resumed, ckpt_path=tmp_path / "step=18.ckpt", **SAFELY, **options)
    assert [result.step for result in whole.results] == sorted({5, *range(0, 42, 2)})
    assert resumed.results == whole.results
    assert resumed.state_dict()["cadence"] == whole.state_dict()["cadence"]


def test_a_run_that_goes_on_where_batches_were_to_be_compared_compares_the_next_ones(fit: Fit, tmp_path: Any) -> None:
    # The batch before the checkpoint is not kept in it.
    optimizer, limit, pace = KNOWN["momentum"]
    dense, whole = Dense(), CurvatureProbe(1, eigenvalue_every=1)
    keeper = ModelCheckpoint(tmp_path, every_n_train_steps=24, save_top_k=-1, filename="{step}")
    fit(SmallRegressor(optimizer), dense, whole, keeper, max_steps=30)
    resumed = CurvatureProbe(1, eigenvalue_every=1)
    fit(SmallRegressor(optimizer), resumed, ckpt_path=tmp_path / "step=24.ckpt", max_steps=30, **SAFELY)
    mine, theirs = ({result.step: result for result in probe.results} for probe in (resumed, whole))
    agree(whole.results, Expected(dense, limit, pace).results)
    assert [mine[step].batch_sharpness for step in range(30)] == [theirs[step].batch_sharpness for step in range(30)]
    assert mine[24].batch_agreement == mine[23].batch_agreement
    assert mine[24].batch_agreement != theirs[24].batch_agreement
