"""Each stability limit against the real optimizer: just below it a quadratic is minimised, just above it blows up.

Under mini-batches, too: the map that the optimizer's step is with each batch is read off the real optimizer, and the
second moments grow by the spectral radius of the mean of its Kronecker squares: exact, without a random number.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.stability import Stability, is_adaptive, is_known, learning_rate, stability_of
from lyapunov_lightning.curvature.vectors.layout import FlatLayout
from tests.curvature.helpers import DenseOperator

LR = 0.05
STEPS = 600

Make = Callable[[list[Tensor]], torch.optim.Optimizer]


def sgd(**options: Any) -> Make:
    return lambda parameters: torch.optim.SGD(parameters, **{"lr": LR, **options})


def descend(optimizer: torch.optim.Optimizer, parameter: Tensor, hessian: Tensor, steps: int = STEPS) -> float:
    """The distance from the minimum of ``½ xᵀHx`` after some steps from a random point at distance 1."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    with torch.no_grad():
        parameter.copy_(start / torch.linalg.vector_norm(start))
    for _ in range(steps):
        parameter.grad = hessian @ parameter.detach()
        optimizer.step()
        if torch.linalg.vector_norm(parameter.detach()) > 100:
            break  # before the gradients get so large that an adaptive optimizer reacts
    return float(torch.linalg.vector_norm(parameter.detach()))


def point(size: int = 1) -> Tensor:
    return torch.zeros(size, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        (sgd(), 2 / LR),
        (sgd(momentum=0.9), 3.8 / LR),
        (sgd(momentum=0.3), 2.6 / LR),
        (sgd(momentum=0.9, dampening=0.5), 7.6 / LR),
        (sgd(momentum=0.6, dampening=0.9), 32 / LR),
        (sgd(dampening=0.5), 2 / LR),  # without momentum torch does not dampen
        (sgd(momentum=0.9, nesterov=True), 3.8 / (2.8 * LR)),
        (sgd(momentum=0.5, nesterov=True), 3 / (2 * LR)),
        (sgd(weight_decay=3.0), 2 / LR - 3),
        (sgd(momentum=0.9, weight_decay=3.0), 3.8 / LR - 3),
        (sgd(momentum=0.9, nesterov=True, weight_decay=3.0), 3.8 / (2.8 * LR) - 3),
        (sgd(lr=torch.tensor(LR, dtype=torch.float64)), 2 / LR),
    ],
)
def test_limit_of_sgd_is_where_it_diverges(make: Make, limit: float) -> None:
    for factor, converges in ((0.99, True), (1.01, False)):
        x = point()
        optimizer = make([x])
        found = stability_of(optimizer, [x])
        assert found is not None
        assert found.limit == pytest.approx(limit)
        assert found.lr == LR
        assert found.scale is None
        distance = descend(optimizer, x, torch.tensor([[factor * found.limit]], dtype=torch.float64))
        assert (distance < 0.1) if converges else (distance > 100)


# An adaptive optimizer's limit is that of a fixed preconditioner. With a decay of its averages next to 1 they stay at
# what the state holds, and the corrections of their bias are 1 after so many steps.

NEVER = 1 - 1e-15
LONG_AGO = 1e18
SECOND_MOMENTS = torch.tensor([4.0, 0.25, 1e-4], dtype=torch.float64)


def adaptive(optimizer: torch.optim.Optimizer, parameter: Tensor, state: dict[str, Tensor]) -> torch.optim.Optimizer:
    optimizer.state[parameter].update(
        {"step": torch.tensor(LONG_AGO), **{name: value.clone() for name, value in state.items()}}
    )
    return optimizer


def adam(parameter: Tensor, kind: type = torch.optim.Adam, beta1: float = 0.9, **options: Any) -> Any:
    optimizer = kind([parameter], lr=LR, betas=(beta1, NEVER), **{"weight_decay": 0.0, **options})
    state = {"exp_avg": torch.zeros_like(SECOND_MOMENTS), "exp_avg_sq": SECOND_MOMENTS}
    if options.get("amsgrad"):
        state = {**state, "exp_avg_sq": SECOND_MOMENTS / 2, "max_exp_avg_sq": SECOND_MOMENTS}
    return adaptive(optimizer, parameter, state)


def rmsprop(parameter: Tensor, **options: Any) -> Any:
    optimizer = torch.optim.RMSprop([parameter], lr=LR, alpha=NEVER, **options)
    centre = torch.tensor([0.5, -0.1, 2e-3], dtype=torch.float64)
    if options.get("centered"):
        state = {"square_avg": SECOND_MOMENTS + centre**2, "grad_avg": centre}
    else:
        state = {"square_avg": SECOND_MOMENTS}
    return adaptive(optimizer, parameter, {**state, "momentum_buffer": torch.zeros_like(SECOND_MOMENTS)})


@pytest.mark.parametrize(
    ("make", "limit", "eps"),
    [
        (lambda p: adam(p), 38 / LR, 1e-8),
        (lambda p: adam(p, beta1=0.0), 2 / LR, 1e-8),
        (lambda p: adam(p, beta1=0.5, eps=0.1), 6 / LR, 0.1),
        (lambda p: adam(p, amsgrad=True), 38 / LR, 1e-8),
        (lambda p: adam(p, torch.optim.AdamW), 38 / LR, 1e-8),
        (lambda p: adam(p, torch.optim.AdamW, beta1=0.8, eps=0.1, amsgrad=True), 18 / LR, 0.1),
        (lambda p: rmsprop(p), 2 / LR, 1e-8),
        (lambda p: rmsprop(p, momentum=0.9), 3.8 / LR, 1e-8),
        (lambda p: rmsprop(p, momentum=0.5, centered=True, eps=0.1), 3 / LR, 0.1),
    ],
)
def test_limit_of_an_adaptive_optimizer_is_one_on_the_preconditioned_hessian(
    make: Any, limit: float, eps: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    preconditioner = SECOND_MOMENTS.sqrt() + eps
    for factor, converges in ((0.98, True), (1.02, False)):
        x = point(3)
        optimizer = make(x)
        found = stability_of(optimizer, [x])
        assert found is not None
        assert found.limit == pytest.approx(limit)
        torch.testing.assert_close(found.scale, preconditioner**-0.5)
        hessian = root @ root.T + torch.eye(3, dtype=torch.float64)
        largest = torch.linalg.eigvals(hessian / preconditioner[:, None]).real.max()
        distance = descend(optimizer, x, hessian * (factor * found.limit / largest), steps=2000)
        assert (distance < 0.1) if converges else (distance > 100)


def test_bias_of_a_young_average_is_corrected() -> None:
    x = point(3)
    optimizer = torch.optim.AdamW([x], lr=LR, betas=(0.9, 0.99), eps=0.01)
    gradients = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.1, 0.2]], dtype=torch.float64)
    for gradient in gradients:
        x.grad = gradient.clone()
        optimizer.step()
    average = (0.01 * gradients[1] ** 2 + 0.99 * 0.01 * gradients[0] ** 2) / (1 - 0.99**2)
    found = stability_of(optimizer, [x])
    assert found is not None
    torch.testing.assert_close(found.scale, (average.sqrt() + 0.01) ** -0.5)


def test_limit_of_groups_with_several_rates_is_one_on_the_scaled_hessian() -> None:
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    hessian = root @ root.T + torch.eye(3, dtype=torch.float64)
    rates = torch.tensor([0.01, LR, LR], dtype=torch.float64)
    largest = torch.linalg.eigvals(hessian * (rates / LR)[:, None]).real.max()
    for factor, converges in ((0.98, True), (1.02, False)):
        pair = [point(1), point(2)]
        groups = [{"params": [pair[0]], "lr": 0.01}, {"params": [pair[1]]}]
        optimizer = torch.optim.SGD(groups, lr=LR, momentum=0.5)
        found = stability_of(optimizer, pair)
        assert found is not None
        assert found.lr == LR
        assert found.limit == pytest.approx(3 / LR)
        torch.testing.assert_close(found.scale, (rates / LR).sqrt(), rtol=1e-6, atol=0)
        with torch.no_grad():
            for x in pair:
                x.fill_(0.5)
        for _ in range(STEPS):
            gradient = hessian @ torch.cat(pair).detach() * (factor * found.limit / largest)
            pair[0].grad, pair[1].grad = gradient[:1], gradient[1:]
            optimizer.step()
        distance = float(torch.linalg.vector_norm(torch.cat(pair).detach()))
        assert (distance < 0.1) if converges else (distance > 100)


def test_parameter_of_another_optimizer_does_not_move() -> None:
    trained, other = point(1), point(2)
    found = stability_of(torch.optim.SGD([trained], lr=LR), [other, trained])
    assert found is not None
    assert found.limit == pytest.approx(2 / LR)
    torch.testing.assert_close(found.scale, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))


def test_parameters_keep_the_order_of_the_hessian_not_of_the_optimizer() -> None:
    pair = [point(1), point(2)]
    groups = [{"params": [pair[1]], "lr": LR / 4}, {"params": [pair[0]]}]
    found = stability_of(torch.optim.SGD(groups, lr=LR), pair)
    assert found is not None
    torch.testing.assert_close(found.scale, torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64))


class OwnSgd(torch.optim.SGD):
    """Could do anything in its step."""


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adadelta(p, lr=LR),
        lambda p: torch.optim.Rprop(p, lr=LR),
        lambda p: torch.optim.ASGD(p, lr=LR),
        lambda p: torch.optim.LBFGS(p, lr=LR),
        lambda p: OwnSgd(p, lr=LR),
    ],
    ids=["adadelta", "rprop", "asgd", "lbfgs", "subclass"],
)
def test_other_optimizers_are_not_known(make: Make) -> None:
    x = point()
    optimizer = make([x])
    assert not is_known(optimizer)
    assert stability_of(optimizer, [x]) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.0),
        lambda p: torch.optim.SGD([{"params": [x], "maximize": i > 0} for i, x in enumerate(p)], lr=LR),
        lambda p: torch.optim.SGD(p, lr=LR, momentum=1.5),
        lambda p: torch.optim.Adam(p, lr=LR),
        lambda p: torch.optim.RMSprop(p, lr=LR),
        lambda p: torch.optim.Adagrad(p, lr=LR),
        lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=2 / LR),
    ],
    ids=["no-rate", "game", "growing-momentum", "adam", "rmsprop", "adagrad", "decay-too-strong"],
)
def test_limit_that_is_not_known_now_is_none(make: Make) -> None:
    pair = [point(), point()]
    optimizer = make(pair)
    assert is_known(optimizer)
    assert stability_of(optimizer, pair) is None


# Anything that can be set, against the spectral radius of the map that the real optimizer's step is.


def quadratic(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)


MOMENTA = ("momentum_buffer", "exp_avg")
"""What of the state is part of the map; the rest is held."""


def step_matrix(optimizer: torch.optim.Optimizer, parameters: list[Tensor], hessian: Tensor) -> Tensor:
    """The map of parameters and momenta that a step of the optimizer is, column by column."""
    held = [{name: torch.as_tensor(value).clone() for name, value in optimizer.state[p].items()} for p in parameters]
    names = [name for name in MOMENTA if any(name in state for state in held)]
    size = len(hessian)
    columns = []
    for column in 1e-6 * torch.eye((1 + len(names)) * size, dtype=torch.float64):
        parts = column.split(size)
        position = 0
        for p, state in zip(parameters, held, strict=True):
            piece = slice(position, position + p.numel())
            position += p.numel()
            with torch.no_grad():
                p.copy_(parts[0][piece])
            p.grad = (hessian @ parts[0])[piece].clone()
            for name, value in state.items():
                optimizer.state[p][name].copy_(value)
            for name, part in zip(names, parts[1:], strict=True):
                if name in state:
                    optimizer.state[p][name].copy_(part[piece])
        optimizer.step()
        after = [torch.cat([p.detach() for p in parameters])]
        for name in names:
            momenta = [optimizer.state[p][name] if name in optimizer.state[p] else 0 * p for p in parameters]
            after.append(torch.cat(momenta).detach())
        columns.append(torch.cat(after) / 1e-6)
    for p, state in zip(parameters, held, strict=True):
        for name, value in state.items():
            optimizer.state[p][name].copy_(value)
    return torch.stack(columns, dim=1)


def edge(optimizer: torch.optim.Optimizer, parameters: list[Tensor], hessian: Tensor) -> float:
    """The factor on the Hessian at which the spectral radius of the step passes 1."""

    def is_stable(factor: float) -> bool:
        map = step_matrix(optimizer, parameters, factor * hessian)
        return float(torch.linalg.eigvals(map).abs().max()) <= 1 + 1e-11

    low, high = 1e-8, 1e8
    assume(is_stable(low) and not is_stable(high))
    for _ in range(20):  # to 4e-5
        middle = (low * high) ** 0.5
        low, high = (middle, high) if is_stable(middle) else (low, middle)
    return low


def largest(stability: Stability, hessian: Tensor) -> float:
    operator = stability.matrix(DenseOperator(hessian))
    columns = [operator.matvec(unit) for unit in torch.eye(len(hessian), dtype=torch.float64)]
    return float(torch.linalg.eigvalsh(torch.stack(columns, dim=1))[-1])


def with_states(optimizer: torch.optim.Optimizer, parameters: list[Tensor], seed: int) -> None:
    """The state of an optimizer that has gone many steps, with random second moments that then stay."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.ones_like(p)
    for group in optimizer.param_groups:  # without a step of the momentum that would be lost to a dampening of 1
        group["lr"], lr = 0.0, group["lr"]
        group["real"] = lr
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = group.pop("real")
    for p in parameters:
        state = optimizer.state[p]
        for name, value in state.items():
            if name in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf"):
                value.copy_(10 ** (4 * torch.rand(p.shape, generator=generator, dtype=p.dtype) - 3))
                if name == "exp_inf":
                    value.clamp_min_(0.5)  # the divisor is never below `eps`
                if name == "max_exp_avg_sq":
                    state["exp_avg_sq"].copy_(value / 2)
            elif name == "grad_avg":
                value.copy_(state["square_avg"].sqrt() * torch.rand(p.shape, generator=generator, dtype=p.dtype))
            elif name == "step":
                state[name] = torch.tensor(1e5 if isinstance(optimizer, OLD) else LONG_AGO, dtype=torch.float64)
            elif name == "mu_product":
                value.zero_()


OLD = (torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adagrad)
"""Whose rate depends on their age."""

RATES = st.floats(1e-3, 2.0)
DECAYS = st.sampled_from([0.0, 0.0, 0.01, 0.5, 3.0])
MOMENTUM = st.sampled_from([0.0, 0.3, 0.9, 0.99])


@st.composite
def sgd_settings(draw: Any, maximize: bool) -> dict[str, Any]:
    momentum = draw(MOMENTUM)
    nesterov = momentum > 0 and draw(st.booleans())
    dampening = 0.0 if nesterov else draw(st.sampled_from([0.0, 0.0, 0.5, 0.95, 1.0, -0.5]))
    return {"momentum": momentum, "nesterov": nesterov, "dampening": dampening}


@st.composite
def adam_settings(draw: Any, maximize: bool) -> dict[str, Any]:
    return {"betas": (draw(st.sampled_from([0.0, 0.5, 0.9, 0.95])), NEVER), "eps": draw(st.sampled_from([1e-8, 0.1]))}


@st.composite
def rmsprop_settings(draw: Any, maximize: bool) -> dict[str, Any]:
    eps = draw(st.sampled_from([1e-8, 0.1]))
    return {"alpha": NEVER, "momentum": draw(MOMENTUM), "centered": draw(st.booleans()), "eps": eps}


@st.composite
def nadam_settings(draw: Any, maximize: bool) -> dict[str, Any]:
    return {**draw(adam_settings(maximize)), "momentum_decay": draw(st.sampled_from([4e-3, 1e-5, 1.0]))}


@st.composite
def adagrad_settings(draw: Any, maximize: bool) -> dict[str, Any]:
    return {"lr_decay": draw(st.sampled_from([0.0, 1e-5]))}


KINDS: dict[str, tuple[Any, Any, list[dict[str, Any]]]] = {
    "sgd": (torch.optim.SGD, sgd_settings, [{}]),
    "adam": (torch.optim.Adam, adam_settings, [{}, {"amsgrad": True}, {"foreach": False}]),
    "adamw": (torch.optim.AdamW, adam_settings, [{}, {"amsgrad": True}]),
    "rmsprop": (torch.optim.RMSprop, rmsprop_settings, [{}]),
    "nadam": (torch.optim.NAdam, nadam_settings, [{}, {"decoupled_weight_decay": True}]),
    "adamax": (torch.optim.Adamax, adam_settings, [{}]),
    "adagrad": (torch.optim.Adagrad, adagrad_settings, [{}]),
}
if "decoupled_weight_decay" in torch.optim.Adam([torch.zeros(1)]).defaults:
    KINDS["adam"][2].append({"decoupled_weight_decay": True})


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(data=st.data())
def test_limit_is_where_the_spectral_radius_of_the_step_passes_one(kind: str, data: Any) -> None:
    make, options, variants = KINDS[kind]
    maximize = data.draw(st.booleans(), "maximize")
    parameters = [point(2), point(1), point(2)]
    same = data.draw(st.booleans(), "same")
    groups: list[dict[str, Any]] = []
    for members in [parameters] if same else [parameters[:1], parameters[1:]]:
        lr, decay = data.draw(RATES), data.draw(DECAYS)
        groups.append({"params": members, "lr": lr, "weight_decay": decay, **data.draw(options(maximize))})
    if kind == "rmsprop":
        groups[-1]["centered"] = groups[0]["centered"]
    optimizer = make(groups, maximize=maximize, **data.draw(st.sampled_from(variants), "variant"))
    with_states(optimizer, parameters, data.draw(st.integers(0, 100), "seed"))
    found = stability_of(optimizer, parameters, FlatLayout(parameters))
    if found is None:
        assert any(group["lr"] * group["weight_decay"] >= 2 for group in groups)
        return
    hessian = quadratic(5, data.draw(st.integers(0, 100), "hessian")) * (-1 if maximize else 1)
    if found.limit == float("inf"):
        assert torch.linalg.eigvals(step_matrix(optimizer, parameters, 1e9 * hessian)).abs().max() <= 1 + 1e-9
        return
    factor = edge(optimizer, parameters, hessian)
    assert largest(found, factor * hessian) == pytest.approx(found.limit, rel=1e-4)
    assert found.limit > 0


# Mini-batches: a quadratic in one direction whose curvature differs from batch to batch.


def random_maps(optimizer: torch.optim.Optimizer, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """What the step is without curvature, and what a curvature of 1 adds to it: the map is affine in the curvature."""
    flat, one, two = (
        step_matrix(optimizer, [parameter], torch.tensor([[h]], dtype=torch.float64)) for h in (0.0, 1.0, 2.0)
    )
    torch.testing.assert_close(two - one, one - flat, rtol=1e-6, atol=1e-9)
    return flat, one - flat


def mean_square_radius(maps: tuple[Tensor, Tensor], curvatures: Tensor) -> float:
    """By how much the second moments grow in a step with one of the curvatures, each as likely as the others."""
    steps = [maps[0] + h * maps[1] for h in curvatures]
    mean = torch.stack([torch.kron(step, step) for step in steps]).mean(dim=0)
    return float(torch.linalg.eigvals(mean).abs().max())


def mean_square_edge(maps: tuple[Tensor, Tensor], curvatures: Tensor) -> float:
    """The factor on the curvatures at which the second moments begin to grow."""
    low, high = 1e-8, 1e8
    assume(mean_square_radius(maps, low * curvatures) <= 1 + 1e-11)
    assume(mean_square_radius(maps, high * curvatures) > 1)
    for _ in range(30):  # to 1e-7
        middle = (low * high) ** 0.5
        stable = mean_square_radius(maps, middle * curvatures) <= 1 + 1e-11
        low, high = (middle, high) if stable else (low, middle)
    return low


@st.composite
def batch_curvatures(draw: Any) -> Tensor:
    """Curvatures of a few batches, from all alike to most of them blind."""
    spread = draw(st.sampled_from([0.0, 0.1, 1.0, 3.0]))
    seed, count = draw(st.integers(0, 100)), draw(st.integers(2, 6))
    normal = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (spread * normal).exp()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(data=st.data())
def test_limit_under_noise_is_where_the_second_moments_of_the_step_grow(kind: str, data: Any) -> None:
    make, options, variants = KINDS[kind]
    maximize = data.draw(st.booleans(), "maximize")
    parameter = point(1)
    group = {"lr": data.draw(RATES), "weight_decay": data.draw(DECAYS), **data.draw(options(maximize))}
    optimizer = make([parameter], maximize=maximize, **group, **data.draw(st.sampled_from(variants), "variant"))
    with_states(optimizer, [parameter], data.draw(st.integers(0, 100), "seed"))
    found = stability_of(optimizer, [parameter])
    assume(found is not None and found.limit != float("inf"))
    assert found is not None
    curvatures = data.draw(batch_curvatures(), "curvatures") * (-1 if maximize else 1)
    if group.get("dampening", 0) > 1:
        curvatures = -curvatures
    factor = mean_square_edge(random_maps(optimizer, parameter), curvatures)
    seen = torch.tensor([largest(found, factor * h.reshape(1, 1)) for h in curvatures], dtype=torch.float64)
    mean, square = float(seen.mean()), float((seen**2).mean())
    assume(mean > 1e-6 * found.limit)  # else it is the decay that is unstable, whatever the curvature
    assert square / mean == pytest.approx(found.limit_at(min(mean**2 / square, 1.0)), rel=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([0.0, 0.3, 0.9, 0.99]), st.floats(1e-3, 1.0), RATES)
def test_limit_under_noise_of_momentum_and_adam_has_a_closed_form(momentum: float, agreement: float, lr: float) -> None:
    """``2(1 - m²) / (η(1 + m - 2mp))``, and the same over ``1 - m`` for Adam's momentum."""
    x = point()
    closed = 2 * (1 - momentum**2) / (lr * (1 + momentum - 2 * momentum * agreement))
    heavy_ball = stability_of(torch.optim.SGD([x], lr=lr, momentum=momentum), [x])
    assert heavy_ball is not None
    assert heavy_ball.limit_at(agreement) == pytest.approx(closed, rel=1e-6)
    optimizer = torch.optim.Adam([x], lr=lr, betas=(momentum, NEVER))
    with_states(optimizer, [x], 0)
    averaged = stability_of(optimizer, [x])
    assert averaged is not None
    assert averaged.limit_at(agreement) == pytest.approx(closed / (1 - momentum), rel=1e-6)


@pytest.mark.parametrize("make", [sgd(), sgd(momentum=0.9), sgd(momentum=0.9, nesterov=True), sgd(weight_decay=3.0)])
def test_limit_of_batches_that_agree_is_that_of_all_data(make: Make) -> None:
    x = point()
    found = stability_of(make([x]), [x])
    assert found is not None
    assert found.limit_at(1.0) == pytest.approx(found.limit, rel=1e-12)
    assert found.limit_at(1 - 1e-9) == pytest.approx(found.limit, rel=1e-6)


def test_plain_sgd_has_one_limit_whatever_the_agreement() -> None:
    x = point()
    found = stability_of(torch.optim.SGD([x], lr=LR), [x])
    assert found is not None
    assert [found.limit_at(p) for p in (1e-3, 0.1, 0.5, 1.0)] == pytest.approx([2 / LR] * 4)


def test_a_momentum_of_one_is_stable_on_equal_batches_only() -> None:
    x = point()
    found = stability_of(torch.optim.SGD([x], lr=LR, momentum=1.0), [x])
    assert found is not None
    assert found.limit_at(1.0) == pytest.approx(4 / LR)
    assert found.limit_at(0.99) == 0


def test_groups_of_different_momenta_have_the_limit_of_the_first_to_turn_unstable() -> None:
    pair = [point(), point()]
    found = stability_of(torch.optim.SGD([{"params": pair[:1], "momentum": 0.9}, {"params": pair[1:]}], lr=LR), pair)
    assert found is not None
    # Without momentum the pace is the higher one: the metric is that of the second group, in which the first one's
    # curvature counts 1 / 1.9.
    assert found.limit_at(1.0) == pytest.approx(2 / LR)
    assert found.limit_at(1e-6) == pytest.approx(2 * (1 - 0.9) / LR / 1.9, rel=1e-4)


@pytest.mark.parametrize("agreement", [0.0, -1.0, 1.5, float("nan")])
def test_agreement_is_a_share(agreement: float) -> None:
    x = point()
    found = stability_of(torch.optim.SGD([x], lr=LR), [x])
    assert found is not None
    with pytest.raises(ValueError, match="`agreement` should be in"):
        found.limit_at(agreement)


@pytest.mark.parametrize("steps", [1, 3, 7, 50])
def test_limit_of_radam_is_that_of_its_age(steps: int) -> None:
    x = point(2)
    optimizer = torch.optim.RAdam([x], lr=LR, betas=(0.0, 0.9), eps=0.5)
    for _ in range(steps):
        x.grad = torch.zeros_like(x)
        optimizer.step()
    found = stability_of(optimizer, [x])
    assert found is not None
    hessian = quadratic(2, 0)
    # With second moments of zero the divisor is `eps` over the root of a correction that is that of the step to come.
    correction = (1 - 0.9**steps) / (1 - 0.9 ** (steps + 1)) if steps > 5 else 1
    factor = edge(optimizer, [x], hessian)
    assert largest(found, factor * hessian) == pytest.approx(found.limit * correction**0.5, rel=1e-4)


@pytest.mark.parametrize("decay", [0.1, 50.0])
def test_decay_of_sgd_that_is_stronger_than_the_rate_allows_is_unstable_by_itself(decay: float) -> None:
    x = point(2)
    found = stability_of(torch.optim.SGD([x], lr=LR, weight_decay=decay), [x])
    assert found is not None
    assert (largest(found, torch.zeros(2, 2, dtype=torch.float64)) > found.limit) == (decay > 2 / LR)
    assert found.is_on_hessian == (decay < 2 / LR)


def test_momentum_that_is_dampened_away_never_moves() -> None:
    pair = [point(), point()]
    found = stability_of(torch.optim.SGD(pair, lr=LR, momentum=0.9, dampening=1), pair)
    assert found == Stability(LR, float("inf"), None)
    groups = [{"params": pair[:1], "dampening": 1}, {"params": pair[1:]}]
    found = stability_of(torch.optim.SGD(groups, lr=LR, momentum=0.9), pair)
    assert found is not None
    assert found.limit == pytest.approx(3.8 / LR)
    torch.testing.assert_close(found.scale, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_parameter_that_never_had_a_gradient_does_not_move() -> None:
    pair = [point(1), point(2)]
    optimizer = torch.optim.Adam(pair, lr=LR)
    pair[1].grad = torch.ones_like(pair[1])
    optimizer.step()
    found = stability_of(optimizer, pair)
    assert found is not None
    assert found.scale is not None
    assert found.scale.tolist() == pytest.approx([0, 1, 1])


def test_learning_rates_betas_and_decays_may_be_tensors() -> None:
    def stepped(**options: Any) -> Stability | None:
        x = point(3)
        optimizer = torch.optim.Adam([x], **options)
        x.grad = torch.arange(1.0, 4.0, dtype=torch.float64)
        optimizer.step()
        return stability_of(optimizer, [x])

    numbers = stepped(lr=0.5, betas=(0.75, 0.875), weight_decay=0.25)
    tensors = stepped(
        lr=torch.tensor(0.5), betas=(torch.tensor(0.75), torch.tensor(0.875)), weight_decay=0.25, foreach=False
    )
    assert numbers is not None
    assert tensors is not None
    assert (numbers.lr, numbers.limit) == (tensors.lr, tensors.limit)
    for one, other in ((numbers.scale, tensors.scale), (numbers.shift, tensors.shift)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_no_tensor_is_read_once_for_each_parameter(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [point() for _ in range(50)]
    groups = [{"params": parameters[:20], "lr": 0.1}, {"params": parameters[20:], "lr": torch.tensor(0.2)}]
    optimizer = kind(groups, foreach=False)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    reads = 0

    def counted(read: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            nonlocal reads
            reads += 1
            return read(*args)

        return wrapped

    for name in ("tolist", "item", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, counted(getattr(Tensor, name)))
    found = stability_of(optimizer, parameters)
    monkeypatch.undo()
    assert found is not None
    assert reads <= 2


def test_operator_of_a_hessian_counts_as_one_in_its_space() -> None:
    x = point(3)
    curvatures = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    hessian = HessianOperator(lambda batch: (batch * x**2).sum() / 2, [x], [curvatures])
    groups = [{"params": [x], "weight_decay": 0.5}]
    found = stability_of(torch.optim.SGD(groups, lr=LR, maximize=True), hessian.parameters, hessian.layout)
    assert found is not None
    operator = found.matrix(hessian)
    assert operator.size == 3
    assert operator.matvec(torch.ones_like(curvatures)).tolist() == [-4, -2, -1]
    assert found.limit == pytest.approx(2 / LR - 0.5)


def test_learning_rate_is_the_highest_of_the_groups() -> None:
    pair = [point(), point()]
    optimizer = torch.optim.SGD([{"params": [pair[0]], "lr": 0.3}, {"params": [pair[1]]}], lr=0.1)
    assert learning_rate(optimizer) == 0.3
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    assert learning_rate(optimizer) == 0.5
    for group in optimizer.param_groups:
        del group["lr"]
    assert learning_rate(optimizer) != learning_rate(optimizer)


COUNTED: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, LR, betas=(0.9, 0.8)),
    "adam, decay in the gradient": lambda p: torch.optim.Adam(p, LR, betas=(0.9, 0.8), weight_decay=0.3),
    "amsgrad": lambda p: torch.optim.AdamW(p, LR, betas=(0.9, 0.8), amsgrad=True),
    "maximizing": lambda p: torch.optim.Adam(p, LR, betas=(0.9, 0.8), weight_decay=0.3, maximize=True),
    "nadam": lambda p: torch.optim.NAdam(p, LR, betas=(0.9, 0.8)),
    "radam": lambda p: torch.optim.RAdam(p, LR, betas=(0.9, 0.8)),
    "adamax": lambda p: torch.optim.Adamax(p, LR, betas=(0.9, 0.8)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, LR, alpha=0.8),
    "centered": lambda p: torch.optim.RMSprop(p, LR, alpha=0.8, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, LR),
}


@pytest.mark.parametrize("num_steps", [0, 1, 9])
@pytest.mark.parametrize("kind", COUNTED)
def test_divisor_with_the_gradient_counted_in_is_the_one_that_the_step_divides_by(kind, num_steps):
    """By what the real step answers to a little more gradient, through its momentum alone: its divisor held fixed."""
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    optimizer = COUNTED[kind]([x])
    generator = torch.Generator().manual_seed(3)
    gradients = torch.randn(num_steps + 1, 3, generator=generator, dtype=torch.float64)
    for gradient in gradients[:-1]:
        x.grad = gradient.clone()
        optimizer.step()
    before, last = x.detach().clone(), gradients[-1]
    found = stability_of(optimizer, [x], gradient=last)
    assert found is not None
    assert found.is_settled == (num_steps >= 20)
    x.grad = last.clone()
    optimizer.step()
    x.data = before  # a decay in the gradient is that of the parameters before the step
    after = stability_of(optimizer, [x])
    assert after is not None
    if kind == "radam":  # rectified by the age of the coming step: the state after the step is one step older
        scale = torch.ones(3, dtype=torch.float64)
        length = 2 / 0.2 - 1 - 2 * (num_steps + 1) * 0.8 ** (num_steps + 1) / (1 - 0.8 ** (num_steps + 1))
        if length > 5:
            rectified = ((length - 4) * (length - 2) * 9 / ((9 - 4) * (9 - 2) * length)) ** 0.5
            corrected = (1 - 0.8 ** (num_steps + 1)) ** 0.5
            scale = (corrected * rectified / (optimizer.state[x]["exp_avg_sq"].sqrt() + 1e-8)).sqrt()
        torch.testing.assert_close(found.scale, scale)
        return
    torch.testing.assert_close(found.scale, after.scale)


def test_parameter_without_a_gradient_so_far_and_now_does_not_move():
    x, unused = point(2), point(3)
    found = stability_of(torch.optim.AdamW([x, unused], LR), [x, unused], gradient=torch.tensor([1.0, -2.0, 0, 0, 0]))
    assert found is not None
    assert found.scale.tolist()[2:] == [0, 0, 0]
    assert found.scale.tolist()[:2] == pytest.approx([1.0, 0.5**0.5], rel=1e-6)


def test_optimizers_without_a_divisor_ask_for_no_gradient():
    x = point(3)
    plain = torch.optim.SGD([x], LR, momentum=0.9)
    assert not is_adaptive(plain)
    assert is_adaptive(torch.optim.Adagrad([x]))
    assert stability_of(plain, [x], gradient=torch.ones(3)) == stability_of(plain, [x])
