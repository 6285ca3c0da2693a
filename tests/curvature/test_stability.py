"""Each stability limit against the real optimizer: just below it a quadratic is minimised, just above it blows up."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lyapunov_lightning.curvature.stability import is_known, learning_rate, stability_of

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
        lambda p: torch.optim.NAdam(p, lr=LR),
        lambda p: torch.optim.Rprop(p, lr=LR),
        lambda p: torch.optim.Adagrad(p, lr=LR),
        lambda p: torch.optim.LBFGS(p, lr=LR),
        lambda p: OwnSgd(p, lr=LR),
    ],
    ids=["nadam", "rprop", "adagrad", "lbfgs", "subclass"],
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
        lambda p: torch.optim.SGD(p, lr=LR, maximize=True),
        lambda p: torch.optim.SGD([{"params": [x], "momentum": i / 2} for i, x in enumerate(p)], lr=LR),
        lambda p: torch.optim.Adam(p, lr=LR),
        lambda p: torch.optim.AdamW([{"params": [x], "betas": (i / 2, 0.9)} for i, x in enumerate(p)], lr=LR),
        lambda p: torch.optim.RMSprop(p, lr=LR),
    ],
    ids=["no-rate", "ascent", "momenta", "adam-before-a-step", "several-betas", "rmsprop-before-a-step"],
)
def test_limit_that_is_not_known_now_is_none(make: Make) -> None:
    pair = [point(), point()]
    optimizer = make(pair)
    assert is_known(optimizer)
    assert stability_of(optimizer, pair) is None


def test_learning_rate_is_the_highest_of_the_groups() -> None:
    pair = [point(), point()]
    optimizer = torch.optim.SGD([{"params": [pair[0]], "lr": 0.3}, {"params": [pair[1]]}], lr=0.1)
    assert learning_rate(optimizer) == 0.3
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    assert learning_rate(optimizer) == 0.5
    for group in optimizer.param_groups:
        del group["lr"]
    assert learning_rate(optimizer) != learning_rate(optimizer)
