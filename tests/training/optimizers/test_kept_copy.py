"""A training goes back to a copy as if nothing had happened since."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lyapunov_lightning.training.optimizers.kept_copy import KeptCopy

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    layers[0].bias.requires_grad_(False)
    return layers


def train(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(6, 3, generator=generator)).square().sum().backward()
        optimizer.step()
    return torch.cat([value.reshape(-1).float() for value in module.state_dict().values()])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_training_goes_on_from_the_copy_bit_by_bit(name: str) -> None:
    module = network()
    optimizer = OPTIMIZERS[name]([p for p in module.parameters() if p.requires_grad])
    kept = KeptCopy()
    train(module, optimizer, 1)
    kept.take(5, module, optimizer)
    kept.confirm()
    expected = train(module, optimizer, 2)
    for _ in range(2):  # the copy is as good the second time
        train(module, optimizer, 3)
        for parameter in module.parameters():
            parameter.data.fill_(float("nan")) if parameter.requires_grad else None
        assert kept.restore(optimizer) == 5
        assert all(parameter.grad is None for parameter in module.parameters())
        assert torch.equal(train(module, optimizer, 2), expected)


def test_only_what_was_confirmed_counts() -> None:
    module = network()
    optimizer = OPTIMIZERS["SGD"](module.parameters())
    kept = KeptCopy()
    assert kept.restore(optimizer) is None
    kept.take(0, module, optimizer)
    assert kept.restore(optimizer) is None
    kept.take(0, module, optimizer)
    kept.confirm()
    kept.take(10, module, optimizer)
    assert kept.restore(optimizer) == 0
    kept.reject()
    kept.confirm()
    assert kept.restore(optimizer) == 0
    kept.clear()
    assert kept.restore(optimizer) is None


def test_a_copy_without_parameters_that_came_since_is_of_no_use() -> None:
    module = network()
    optimizer = OPTIMIZERS["momentum"]([module[0].weight])
    kept = KeptCopy()
    kept.take(0, module, optimizer)
    kept.confirm()
    optimizer.add_param_group({"params": [module[2].weight]})
    before = copy.deepcopy(module.state_dict())
    assert kept.restore(optimizer) is None
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
