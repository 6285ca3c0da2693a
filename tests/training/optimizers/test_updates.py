"""An optimizer's update is what it did to the parameters, and can be taken back, lengthened, steered and projected."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lyapunov_lightning.curvature.errors import NonFiniteCurvatureError
from lyapunov_lightning.curvature.operators.hessian import HessianOperator
from lyapunov_lightning.curvature.vectors.layout import FlatLayout
from lyapunov_lightning.training.optimizers.learning_rates import LearningRates
from lyapunov_lightning.training.optimizers.moves import move_parameters, scale_gradients
from lyapunov_lightning.training.optimizers.own_gradient import OwnGradient, OwnLoss
from lyapunov_lightning.training.optimizers.updates import (
    LastUpdate,
    ObservedUpdate,
    coupled_decay,
    slope_and_curvature,
)

OPTIMIZERS: dict[str, Any] = {
    "SGD": (torch.optim.SGD, {}),
    "decay": (torch.optim.SGD, {"weight_decay": 0.2}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.2}),
    "Adam": (torch.optim.Adam, {"weight_decay": 0.2}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.2}),
    "RMSprop": (torch.optim.RMSprop, {}),
}


class Bowl(nn.Module):
    """A quadratic over two tensors, with its Hessian at hand."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        factor = torch.randn(6, 6, generator=generator, dtype=dtype)
        self.hessian = factor @ factor.T
        self.first = nn.Parameter(torch.randn(2, 2, generator=generator, dtype=dtype))
        self.second = nn.Parameter(torch.randn(2, generator=generator, dtype=dtype))

    @property
    def flat(self) -> Tensor:
        return torch.cat([self.first.reshape(-1), self.second])

    def loss(self, batch: Any = None) -> Tensor:
        return self.flat @ self.hessian @ self.flat / 2

    def operator(self) -> HessianOperator:
        return HessianOperator(self.loss, self.parameters(), [torch.zeros(1)])


def step(module: Bowl, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    module.loss().backward()
    optimizer.step()


# The update that is observed.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_taken_back_and_taken_again(name: str, dtype: torch.dtype) -> None:
    module = Bowl(dtype)
    kind, options = OPTIMIZERS[name]
    optimizer = kind(module.parameters(), lr=0.01, **options)
    for _ in range(3):
        observed, before = ObservedUpdate(module.operator()), module.flat.detach()
        step(module, optimizer)
        after = module.flat.detach()
        displacement = observed.rewind()
        assert torch.equal(module.flat, before)
        torch.testing.assert_close(displacement, after - before)
        observed.replay(displacement, 0.5)
        torch.testing.assert_close(module.flat, before + (after - before) / 2)
        observed.replay(displacement, 1.0)
        assert torch.equal(module.flat, after)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_slope_and_curvature_are_those_of_the_objective_with_its_weight_decay(name: str) -> None:
    module = Bowl()
    kind, options = OPTIMIZERS[name]
    optimizer = kind(module.parameters(), lr=0.01, **options)
    coupled = 0.0 if kind is torch.optim.AdamW else options.get("weight_decay", 0.0)
    hessian = module.hessian + coupled * torch.eye(6, dtype=torch.float64)
    update = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = slope_and_curvature(module.operator(), update, optimizer)
    expected = (-float(update @ hessian @ module.flat.detach()), float(update @ hessian @ update))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_slope_and_curvature_that_are_not_finite_are_refused(value: float) -> None:
    module = Bowl()
    module.hessian[0, 0] = value
    with pytest.raises(NonFiniteCurvatureError, match=r"The slope .* or the curvature .* is not finite"):
        slope_and_curvature(
            module.operator(), torch.ones(6, dtype=torch.float64), torch.optim.SGD(module.parameters(), lr=0.1)
        )


def test_coupled_decay_is_that_of_each_group() -> None:
    module = Bowl()
    groups = [{"params": [module.second], "weight_decay": 0.3}, {"params": [module.first], "weight_decay": 0.0}]
    expected = torch.tensor([0.0] * 4 + [0.3] * 2, dtype=torch.float64)
    parameters = list(module.parameters())
    layout = FlatLayout(parameters)
    decay = coupled_decay(torch.optim.SGD(groups, lr=0.1), parameters, layout)
    assert decay is not None
    assert torch.equal(decay, expected)
    assert coupled_decay(torch.optim.AdamW(groups, lr=0.1), parameters, layout) is None
    assert coupled_decay(torch.optim.SGD(module.parameters(), lr=0.1), parameters, layout) is None
    only_one = torch.optim.SGD([module.second], lr=0.1, weight_decay=0.3)
    decay = coupled_decay(only_one, parameters, layout)
    assert decay is not None
    assert torch.equal(decay, expected)


# The last update.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_last_update_is_seen_by_the_gradients_that_come_next(name: str) -> None:
    module = Bowl()
    kind, options = OPTIMIZERS[name]
    optimizer = kind(module.parameters(), lr=0.01, **options)
    coupled = 0.0 if kind is torch.optim.AdamW else options.get("weight_decay", 0.0)
    last, parameters = LastUpdate(), list(module.parameters())
    for _ in range(3):
        before = module.flat.detach()
        last.begin(parameters)
        assert last.seen(parameters, optimizer) is None
        step(module, optimizer)
        last.end(0.01)
        update = (module.flat.detach() - before) / 0.01
        torch.testing.assert_close(last.known.vector, update)
        optimizer.zero_grad()
        module.loss().backward()
        gradient = module.hessian @ module.flat.detach() + coupled * module.flat.detach()
        seen = last.seen(parameters, optimizer)
        assert seen is not None
        expected = [-(gradient @ update), update @ update, update.abs().sum(), module.flat.detach().abs().sum()]
        torch.testing.assert_close(torch.stack(seen), torch.stack(expected))


@pytest.mark.parametrize("name", ["SGD", "decay", "AdamW"])
def test_a_loss_scale_does_not_change_what_is_seen(name: str) -> None:
    module = Bowl()
    kind, options = OPTIMIZERS[name]
    optimizer = kind(module.parameters(), lr=0.01, **options)
    last, parameters = LastUpdate(), list(module.parameters())
    last.take(torch.arange(6, dtype=torch.float64), 0.01, parameters)
    seen = []
    for scale in (1.0, 2.0**16):
        optimizer.zero_grad()
        (scale * module.loss()).backward()
        found = last.seen(parameters, optimizer, scale)
        assert found is not None
        seen.append(torch.stack(found))
    assert torch.equal(seen[0], seen[1])


def test_an_update_of_other_parameters_is_not_seen() -> None:
    module = Bowl()
    last = LastUpdate()
    last.take(torch.ones(3, dtype=torch.float64), 0.1, [torch.ones(3)])
    assert last.seen(list(module.parameters()), torch.optim.SGD(module.parameters())) is None
    last.take(torch.ones(6, dtype=torch.float64), 0.1, [torch.ones(6)])
    last.forget()
    assert last.seen(list(module.parameters()), torch.optim.SGD(module.parameters())) is None


# The learning rates.


def optimizer_at(*rates: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], lr=1.0)


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def steered(optimizer: torch.optim.Optimizer) -> LearningRates:
    rates = LearningRates()
    rates.start(optimizer)
    return rates


def test_the_highest_is_steered_and_the_others_follow() -> None:
    optimizer = optimizer_at(0.1, 0.4, 0.2)
    rates = steered(optimizer)
    assert rates.highest == 0.4
    rates.set(2.0)
    assert rates_of(optimizer) == [0.5, 2.0, 1.0]


def test_a_tensor_is_changed_in_place() -> None:
    tensor = torch.tensor(0.5)
    optimizer = torch.optim.Adam([{"params": [nn.Parameter(torch.zeros(1))], "lr": tensor}], foreach=False)
    tensor = optimizer.param_groups[0]["lr"]
    steered(optimizer).set(0.25)
    assert optimizer.param_groups[0]["lr"] is tensor
    assert float(tensor) == 0.25


@pytest.mark.parametrize(
    ("added", "expected"),
    [([0.5], [0.5, 1.0, 0.25]), ([0.5, 0.0], [0.5, 1.0, 0.25, 0.0]), ([4.0, 1.0], [0.25, 0.5, 1.0, 0.25])],
)
def test_groups_that_are_added_join_with_the_ratio_they_have_then(added: list[float], expected: list[float]) -> None:
    optimizer = optimizer_at(0.1, 0.2)
    rates = steered(optimizer)
    rates.set(2.0)
    for rate in added:
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": rate})
    assert rates.highest == max(2.0, *added)
    rates.set(8.0)
    assert rates_of(optimizer) == [8.0 * ratio for ratio in expected]
    for group in optimizer.param_groups:
        group["lr"] = 7.0  # what somebody else does to the learning rates later does not count
    rates.set(1.0)
    assert rates_of(optimizer) == expected


@settings(max_examples=50, deadline=None)
@given(start=st.lists(st.floats(1e-3, 1), min_size=1, max_size=3), added=st.lists(st.floats(1e-3, 10), max_size=3))
def test_ratios_go_on_to_the_last_digit(start: list[float], added: list[float]) -> None:
    optimizer = optimizer_at(*start)
    rates = steered(optimizer)
    rates.set(0.3)
    for rate in added:
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": rate})
    rates.set(0.3)
    resumed, copy = LearningRates(), optimizer_at(*rates_of(optimizer))
    resumed.load_state_dict(rates.state_dict())
    resumed.start(copy)
    for highest in (0.3, 0.7, 1e-3):
        rates.set(highest)
        resumed.set(highest)
        assert rates_of(optimizer) == rates_of(copy)
        assert rates.highest == resumed.highest == highest


def test_a_second_run_has_the_ratios_of_its_own_optimizer() -> None:
    rates = steered(optimizer_at(0.1, 0.2))
    other = optimizer_at(0.3, 0.1, 0.6)
    rates.start(other)
    rates.set(1.0)
    assert rates_of(other) == pytest.approx([0.5, 1 / 6, 1.0])


# The step's own gradient.


TRAINER = SimpleNamespace(world_size=1, accumulate_grad_batches=1)


def test_the_steps_own_gradient_is_used_once_it_was_right() -> None:
    module, own = Bowl(), OwnGradient()
    operator = module.operator()
    calls = itertools.count()
    compute = operator.gradient
    operator.gradient = lambda *args: (next(calls), compute(*args))[1]  # type: ignore[method-assign]
    module.loss().backward()
    assert own.may_fit(TRAINER)
    for _ in range(3):
        torch.testing.assert_close(own.take(operator), module.hessian @ module.flat.detach())
        assert own.may_fit(TRAINER)
    assert next(calls) == 1
    other = OwnGradient()
    other.load_state_dict(own.state_dict())
    other.take(operator)
    assert next(calls) == 2


def test_a_gradient_of_something_else_is_not_used() -> None:
    module, own = Bowl(), OwnGradient()
    (2 * module.loss()).backward()
    torch.testing.assert_close(own.take(module.operator()), module.hessian @ module.flat.detach())
    assert not own.may_fit(TRAINER)
    assert not OwnGradient().may_fit(SimpleNamespace(world_size=2, accumulate_grad_batches=1))
    assert not OwnGradient().may_fit(SimpleNamespace(world_size=1, accumulate_grad_batches=2))


def test_the_steps_own_loss_is_used_once_it_was_right() -> None:
    module, own = Bowl(), OwnLoss()
    operator = module.operator()
    calls = itertools.count()
    compute = operator.value
    operator.value = lambda *args: (next(calls), compute(*args))[1]  # type: ignore[method-assign]
    assert own.take(operator) is None  # none was seen
    for _ in range(3):
        own.see(module.loss())
        assert own.take(operator) == float(module.loss().detach())
        assert own.take(operator) is None
    assert next(calls) == 1
    other = OwnLoss()
    other.load_state_dict(own.state_dict())
    other.see(module.loss())
    assert other.take(operator) == float(module.loss().detach())
    assert next(calls) == 2


@pytest.mark.parametrize(("factor", "fits"), [(1 + 4e-16, True), (1 + 4e-15, False), (float("nan"), None)])
def test_a_loss_of_something_else_is_not_used(factor: float, fits: bool | None) -> None:
    module, own = Bowl(), OwnLoss()
    operator = module.operator()
    own.see(module.loss() * factor)
    assert own.take(operator) == float(module.loss().detach())  # the computed one
    assert own.state_dict() == {"fits": fits}
    own.see(module.loss())
    assert (own.take(operator) is None) == (fits is False)


def test_a_gradient_that_is_not_finite_settles_nothing() -> None:
    module, own = Bowl(), OwnGradient()
    operator = module.operator()
    (module.loss() * float("nan")).backward()
    own.take(operator)
    assert own.may_fit(TRAINER)
    assert own.state_dict() == {"fits": None}
    for parameter in operator.parameters:
        parameter.grad = None
    module.loss().backward()
    own.take(operator)
    assert own.state_dict() == {"fits": True}


# Gradients that are projected.


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    inside=st.floats(0, 5),
    outside=st.sampled_from([0.0, 1.0]),
    decay=st.floats(0, 1),
    data=st.data(),
)
def test_change_is_linear_along_any_orthonormal_vectors(
    sizes: list[int], seed: int, inside: float, outside: float, decay: float, data: Any
) -> None:
    """For any vectors: one factor along them and one across, seen in what the optimizer makes of it."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64)) for n in sizes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    k = data.draw(st.integers(1, sum(sizes)))
    rows = torch.linalg.qr(torch.randn(sum(sizes), k, generator=generator, dtype=torch.float64)).Q.T
    flat = FlatLayout(parameters)
    before = flat.flatten(parameters)
    whole = flat.flatten([parameter.grad for parameter in parameters]) + decay * before
    optimizer = torch.optim.SGD(parameters, lr=0.5, weight_decay=decay)
    removed = scale_gradients(
        optimizer, parameters, rows, FlatLayout(parameters).space(), inside=inside, outside=outside
    )
    optimizer.step()
    update = (flat.flatten(parameters) - before) / -0.5
    torch.testing.assert_close(rows @ update, inside * (rows @ whole), rtol=1e-9, atol=1e-9)
    across = outside * (whole - rows.T @ (rows @ whole))
    torch.testing.assert_close(update - rows.T @ (rows @ update), across, rtol=1e-9, atol=1e-9)
    share = float((rows @ whole).square().sum() / whole.square().sum())
    expected = (1 - inside) ** 2 * share + (1 - outside) ** 2 * (1 - share)
    assert float(removed) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_parameters_without_gradient_keep_none_and_do_not_decay() -> None:
    module = Bowl()
    module.first.grad = torch.ones_like(module.first)
    rows = torch.ones(1, 6, dtype=torch.float64) / math.sqrt(6)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, weight_decay=0.5)
    whole = torch.cat([1 + 0.5 * module.first.detach().reshape(-1), torch.zeros(2, dtype=torch.float64)])
    space = FlatLayout(list(module.parameters())).space()
    scale_gradients(optimizer, list(module.parameters()), rows, space, inside=0.0, outside=1.0)
    assert module.second.grad is None
    expected = (whole - rows[0] * (rows[0] @ whole))[:4] - 0.5 * module.first.detach().reshape(-1)
    torch.testing.assert_close(module.first.grad.reshape(-1), expected)


# Moves beside the optimizer.


def test_a_move_is_made_exactly_and_none_is_none() -> None:
    module, trainer = Bowl(), SimpleNamespace(world_size=1)
    before = module.flat.detach()
    assert not move_parameters(trainer, module, None)
    versions = [parameter._version for parameter in module.parameters()]
    assert move_parameters(trainer, module, torch.zeros(6, dtype=torch.float64))
    assert versions == [parameter._version for parameter in module.parameters()]
    displacement = torch.arange(6, dtype=torch.float64)
    assert move_parameters(trainer, module, displacement)
    assert torch.equal(module.flat, before + displacement)
