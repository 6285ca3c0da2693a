"""What one process finds that has the data of all ranks."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lyapunov_lightning.curvature import HessianOperator
from tests.distributed.models import Smooth


def same(first: Any, second: Any) -> bool:
    """Equality of nested structures, bit by bit in their tensors and with NaN equal to itself."""
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second or (first != first and second != second)


def union_of(batches: Sequence[Any]) -> tuple[Tensor, ...]:
    """One batch with the samples of several."""
    return tuple(map(torch.cat, zip(*batches, strict=True)))


def smooth_at(parameters: Tensor) -> Smooth:
    """The module with these parameters, in double precision."""
    module = Smooth().double()
    nn.utils.vector_to_parameters(parameters.double(), module.parameters())
    return module


def doubled(batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.double() for tensor in batch)


def gradient_at(parameters: Tensor, batch: Sequence[Tensor]) -> Tensor:
    """The gradient of the mean loss over the samples of a batch."""
    module = smooth_at(parameters)
    return nn.utils.parameters_to_vector(torch.autograd.grad(module.loss(doubled(batch)), list(module.parameters())))


def loss_at(parameters: Tensor, batch: Sequence[Tensor]) -> float:
    with torch.no_grad():
        return float(smooth_at(parameters).loss(doubled(batch)))


def dense_hessian(parameters: Tensor, batch: Sequence[Tensor]) -> Tensor:
    """The Hessian of the mean loss over the samples of a batch."""
    module = Smooth().double()
    shapes = {name: p.shape for name, p in module.named_parameters()}
    inputs, targets = doubled(batch)

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([math.prod(shape) for shape in shapes.values()])
        values = {name.removeprefix("net."): p.view(s) for (name, s), p in zip(shapes.items(), pieces, strict=True)}
        return nn.functional.mse_loss(torch.func.functional_call(module.net, values, (inputs,)), targets)

    return torch.func.hessian(loss)(parameters.double())


def on_the_step(outcomes: Sequence[dict[str, Any]]) -> Iterator[tuple[Any, Tensor, list[Any]]]:
    """For each result of the first rank the parameters before its step, and the batches of all ranks there."""
    first = outcomes[0]
    for result in first["results"]:
        yield result, first["parameters"][result.step], [outcome["batches"][result.step] for outcome in outcomes]


def single_process(outcomes: Sequence[dict[str, Any]], **options: Any) -> Iterator[tuple[Any, HessianOperator]]:
    """Each result of the first rank beside the operator of one process that has the batches of all ranks."""
    for result, parameters, batches in on_the_step(outcomes):
        module = smooth_at(parameters)
        yield result, HessianOperator(module.loss, module.net.parameters(), [union_of(batches)], **options)
