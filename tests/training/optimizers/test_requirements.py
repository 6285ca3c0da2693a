"""Optimizers with which a callback would not do what it says are refused, with the reason."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lyapunov_lightning.training.lightning_names import MisconfigurationException
from lyapunov_lightning.training.optimizers.requirements import (
    check_movable,
    check_steerable,
    check_training_map,
    check_uniform_sgd,
    check_unscaled,
    gain_of_momentum,
)
from tests.modules import SmallRegressor


def refused(message: str) -> Any:
    return pytest.raises(MisconfigurationException, match=f"^`Owner`.*{message}")


def sgd(**options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), **{"lr": 0.1, **options})


def two_groups(**options: Any) -> torch.optim.Optimizer:
    layer = nn.Linear(2, 2)
    return torch.optim.SGD([{"params": [layer.weight], **options}, {"params": [layer.bias]}], lr=0.1)


class OwnSGD(torch.optim.SGD):
    """Whatever it does in its step."""


# Following the training map.


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}], ids=str)
def test_map_of_plain_and_heavy_ball_sgd_is_followed(options: dict[str, float]) -> None:
    check_training_map("Owner", [sgd(**options)])


@pytest.mark.parametrize(
    "optimizers",
    [
        [],
        [two_groups()],
        [sgd(), sgd(momentum=0.9, nesterov=True)],
        [sgd(momentum=0.9, dampening=0.1)],
        [torch.optim.Adam(nn.Linear(2, 2).parameters())],
        [OwnSGD(nn.Linear(2, 2).parameters(), lr=0.1)],
    ],
    ids=["none", "groups", "nesterov", "dampening", "Adam", "subclass"],
)
def test_map_of_any_other_optimizer_is_refused(optimizers: list[torch.optim.Optimizer]) -> None:
    with refused("one parameter group and plain or heavy-ball momentum.*Use `estimator='lanczos'`"):
        check_training_map("Owner", optimizers)


def test_momentum_is_refused_where_it_cannot_be_followed() -> None:
    check_training_map("Owner", [sgd()], momentum=False)
    with refused("no momentum"):
        check_training_map("Owner", [sgd(momentum=0.9)], momentum=False)


# A learning rate for each direction.


def test_no_optimizer_and_several_are_refused() -> None:
    module = SmallRegressor()
    for optimizers in ([], [module.configure_optimizers(), module.configure_optimizers()]):
        with refused(f"but there are {len(optimizers)} optimizers"):
            check_uniform_sgd("Owner", optimizers, dict(module.named_parameters()))


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (torch.optim.Adam, "the optimizer is Adam"),
        (lambda p: OwnSGD(p, lr=0.1), "the optimizer is OwnSGD"),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "`maximize` is set"),
        (lambda p: torch.optim.SGD(list(p)[:3], lr=0.1), "it does not train net.3.bias"),
    ],
    ids=["Adam", "subclass", "maximize", "part"],
)
def test_optimizer_that_is_not_one_sgd_is_refused(make: Callable[..., torch.optim.Optimizer], cause: str) -> None:
    module = SmallRegressor()
    with refused(re.escape(cause)):
        check_uniform_sgd("Owner", [make(module.parameters())], dict(module.named_parameters()))


@pytest.mark.parametrize(
    ("options", "is_fine"),
    [
        ({"weight_decay": 0.3}, True),
        ({"lr": 0.2}, False),
        ({"momentum": 0.9}, False),
        ({"dampening": 0.1}, False),
        ({"momentum": 0.9, "nesterov": True}, False),
    ],
    ids=str,
)
def test_groups_may_differ_in_their_weight_decay_alone(options: dict[str, float], is_fine: bool) -> None:
    optimizer = two_groups(**options)
    parameters = {str(i): p for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    if is_fine:
        check_uniform_sgd("Owner", [optimizer], parameters)
        return
    with refused(f"the parameter groups have different `{next(iter(options))}`: 0"):
        check_uniform_sgd("Owner", [optimizer], parameters)


# Gradients and parameters that are changed.


@pytest.mark.parametrize(("fused", "scaler", "is_fine"), [(True, None, True), (False, 1, True), (True, 1, False)])
def test_fused_step_that_unscales_is_refused(fused: bool, scaler: Any, is_fine: bool) -> None:
    trainer = SimpleNamespace(optimizers=[sgd(fused=fused)], precision_plugin=SimpleNamespace(scaler=scaler))
    if is_fine:
        check_unscaled("Owner", trainer)
        return
    with refused("needs the gradients unscaled.*Use `fused=False`"):
        check_unscaled("Owner", trainer)


def test_lbfgs_is_not_to_be_moved() -> None:
    check_movable("Owner", [sgd()])
    with refused("LBFGS"):
        check_movable("Owner", [torch.optim.LBFGS(nn.Linear(2, 2).parameters())])


# A learning rate that is steered.


def steered(optimizer: Any, module: Any = None, schedulers: Any = ()) -> torch.optim.Optimizer:
    trainer = SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=list(schedulers), callbacks=[])
    return check_steerable("Owner", trainer, SmallRegressor() if module is None else module)


def test_optimizers_with_learning_rates_are_steered() -> None:
    for optimizer in (sgd(), two_groups(lr=1e-9), torch.optim.AdamW(nn.Linear(2, 2).parameters())):
        assert steered(optimizer) is optimizer


def test_what_cannot_be_steered_is_refused() -> None:
    scheduler = SimpleNamespace(scheduler=torch.optim.lr_scheduler.StepLR(sgd(), 1))
    with refused("sets the learning rate, and so does StepLR"):
        steered(sgd(), schedulers=[scheduler])
    manual = SmallRegressor()
    manual.automatic_optimization = False
    with refused("manual optimization"):
        steered(sgd(), manual)
    with refused("lost in the rounding of torch.bfloat16"):
        steered(sgd(), SmallRegressor().bfloat16())
    with refused("returned none"):
        steered(SimpleNamespace(param_groups=[]))
    with refused("cannot steer LBFGS"):
        steered(torch.optim.LBFGS(nn.Linear(2, 2).parameters()))
    for optimizer in (sgd(lr=0.0), two_groups(lr=0.0)):
        with refused(r"positive learning rate.*SGD has \[0.0"):
            steered(optimizer)


STEERED: dict[str, Any] = {
    name: getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "Adafactor")
}


@pytest.mark.parametrize("name", STEERED)
def test_pytorchs_optimizers_of_learning_rate_times_update_are_steered(name: str) -> None:
    optimizer = STEERED[name](nn.Linear(2, 2).parameters(), lr=0.1, weight_decay=0.01)
    assert steered(optimizer) is optimizer


@pytest.mark.parametrize("kind", [torch.optim.Rprop, torch.optim.ASGD])
def test_steps_that_are_not_in_proportion_to_the_learning_rate_are_refused(kind: Any) -> None:
    options = {"lambd": 0.1} if kind is torch.optim.ASGD else {}
    with refused(f"cannot steer {kind.__name__}, which takes steps that are not in proportion"):
        steered(kind(nn.Linear(2, 2).parameters(), lr=0.1, **options))


class TwoPlaces(OwnSGD):
    """Sharpness-aware minimisation, as it is usually written."""

    def first_step(self) -> None:
        """Up the hill."""

    def second_step(self) -> None:
        """And from there."""


class ScheduleFree(OwnSGD):
    """As such optimizers have it."""

    def train(self) -> None:
        """The parameters to train on."""

    def eval(self) -> None:
        """The averaged ones."""


def test_optimizers_of_other_packages_that_cannot_be_steered_are_refused() -> None:
    parameters = list(nn.Linear(2, 2).parameters())
    with refused("evaluates the loss at two places"):
        steered(TwoPlaces(parameters, lr=0.1))
    with refused("other parameters for the evaluation"):
        steered(ScheduleFree(parameters, lr=0.1))
    adapting = sgd()
    adapting.param_groups[0] |= {"d": 1e-6, "k": 0}
    with refused("finds its learning rate itself"):
        steered(adapting)
    with refused("goes uphill"):
        steered(sgd(maximize=True))


def test_an_optimizer_that_cannot_be_tried_is_taken_at_its_word() -> None:
    class Picky(torch.optim.SGD):
        def __init__(self, parameters: Any, *, secret: str, **options: Any) -> None:
            super().__init__(parameters, **options)

    picky = Picky(nn.Linear(2, 2).parameters(), secret="sesame", lr=0.1)
    assert steered(picky) is picky


@pytest.mark.parametrize(
    ("options", "gain"),
    [
        ({}, 1.0),
        ({"momentum": 0.9}, 10.0),
        ({"momentum": 0.9, "dampening": 0.9}, 1.0),
        ({"momentum": 0.5, "nesterov": True}, 2.0),
    ],
    ids=str,
)
def test_gain_of_momentum_is_what_a_lasting_gradient_comes_to(options: dict[str, Any], gain: float) -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=1.0, **options)
    assert gain_of_momentum(optimizer) == pytest.approx(gain)
    for _ in range(200):
        before = parameter.detach().clone()
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert float((before - parameter).detach()) == pytest.approx(gain)


def test_frozen_layers_in_half_precision_do_not_matter() -> None:
    module = SmallRegressor()
    module.net[0].half().requires_grad_(False)
    assert steered(optimizer := sgd(), module) is optimizer
