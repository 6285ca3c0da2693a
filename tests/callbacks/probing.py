"""What the tests of the probe share: a dense reference that goes before it."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lyapunov_lightning import HessianConfig
from tests.modules import Watcher, dense_hessian

Fit = Callable[..., pl.Trainer]


def name_of(value: object) -> str:
    """The name of a parameter in a test's id: the same in every process, which a set's or a function's repr is not."""
    if isinstance(value, dict):
        return ",".join(f"{key}={name_of(entry)}" for key, entry in value.items()) or "default"
    if isinstance(value, HessianConfig):
        chosen = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return name_of({name: entry for name, entry in chosen.items() if entry != getattr(HessianConfig(), name)})
    if isinstance(value, (set, frozenset)):
        return "+".join(sorted(map(str, value)))
    return getattr(value, "__name__", str(value))


class Reference(Watcher):
    """Goes before the probe and computes what it should find from a dense Hessian, by step."""

    def __init__(self, loss: Any = None, eval_mode: bool = False) -> None:
        self.eigenvalues: dict[int, Tensor] = {}
        self.preconditioned: dict[int, float] = {}
        self.losses: dict[int, float] = {}
        self.learning_rates: dict[int, float] = {}
        self.loss = loss
        self.eval_mode = eval_mode
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        # With gradient accumulation all batches of a step count, together.
        self.batches = [*(self.batches if step in self.eigenvalues else []), batch]
        whole = [torch.cat(parts) for parts in zip(*self.batches, strict=True)]
        pl_module.train(not self.eval_mode)
        self.losses[step], hessian = dense_hessian(pl_module, whole, self.loss)
        pl_module.train()
        self.eigenvalues[step] = torch.linalg.eigvalsh(hessian)
        optimizer = trainer.optimizers[0]
        self.learning_rates[step] = optimizer.param_groups[0]["lr"]
        own = set(optimizer.param_groups[0]["params"])
        if own.isdisjoint(pl_module.parameters()):  # a twin of the module that is trained
            return
        if len(hessian) == sum(p.numel() for group in optimizer.param_groups for p in group["params"]):
            scale = inverse_preconditioner(pl_module, optimizer, whole).sqrt()
            self.preconditioned[step] = float(torch.linalg.eigvalsh(scale[:, None] * hessian * scale)[-1])

    @property
    def largest(self) -> dict[int, float]:
        return {step: float(values[-1]) for step, values in self.eigenvalues.items()}

    @property
    def smallest(self) -> dict[int, float]:
        return {step: float(values[0]) for step, values in self.eigenvalues.items()}


def inverse_preconditioner(module: pl.LightningModule, optimizer: torch.optim.Optimizer, batch: Any) -> Tensor:
    """The factor of each coordinate of the gradient in the update, over the highest learning rate.

    An adaptive optimizer divides by moments in which the gradient of the step is counted.

    Args:
        module: The module, in the order of whose parameters the factors are.
        optimizer: Its optimizer, before the step.
        batch: The data of the step.

    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        loss = nn.functional.mse_loss(module(batch[0]), batch[1])
        gradients = torch.autograd.grad(loss, list(module.parameters()))
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    highest = max(group["lr"] for group in optimizer.param_groups)
    factors: list[Tensor] = []
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        group, state = groups[parameter], optimizer.state.get(parameter, {})
        square = gradient.square()
        if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            beta = group["betas"][1]
            moment = beta * state.get("exp_avg_sq", 0) + (1 - beta) * square
            if group["amsgrad"]:
                moment = torch.maximum(moment, torch.as_tensor(state.get("max_exp_avg_sq", 0.0)))
            divisor = (moment / (1 - beta ** (float(state.get("step", 0)) + 1))).sqrt() + group["eps"]
        elif isinstance(optimizer, torch.optim.RMSprop):
            alpha = group["alpha"]
            moment = alpha * state.get("square_avg", 0) + (1 - alpha) * square
            if group["centered"]:
                moment = moment - (alpha * state.get("grad_avg", 0) + (1 - alpha) * gradient) ** 2
            divisor = moment.sqrt() + group["eps"]
        else:
            divisor = torch.ones_like(parameter)
        factors.append((group["lr"] / highest / divisor).detach().reshape(-1))
    return torch.cat(factors)


def all_near(values: Iterable[float], expected: float, **tolerance: float) -> bool:
    return all(value == pytest.approx(expected, **tolerance) for value in values)


def sgd(**options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, **{"lr": 0.1, **options})


def two_groups(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    first, *others = parameters
    return torch.optim.SGD([{"params": [first], "lr": 0.02}, {"params": others}], lr=0.1, momentum=0.5)
