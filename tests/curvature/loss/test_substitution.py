"""A loss at other values of its parameters, while these stay what they are."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lyapunov_lightning.curvature.loss.fixed_batches import Objective
from lyapunov_lightning.curvature.loss.substitution import SubstitutedLoss
from tests.problems import PROBLEMS

W = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64)
V = torch.tensor([[-2.0, 0.5], [0.25, 4.0]], dtype=torch.float64)

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "function": lambda w: torch.sin(w).sum(),
    "method": lambda w: w.sin().sum(),
    "operator": lambda w: (w @ w + w * 2).sum(),
    "reflected_operator": lambda w: (2 * w - torch.ones_like(w) @ w).sum(),
    "keyword": lambda w: torch.nn.functional.linear(input=torch.ones(1, 2, dtype=w.dtype), weight=w).sum(),
    "list_argument": lambda w: torch.cat([w, 2 * w, w]).square().sum(),
    "tuple_argument": lambda w: torch.stack((w, w)).square().sum(),
    "list_keyword": lambda w: torch.cat(tensors=[w, w]).square().sum(),
    "nested_list": lambda w: torch.block_diag(*[w, w]).square().sum(),
    "index": lambda w: w[0, 1] * w[1].sum(),
    "attribute": lambda w: w.T.cos().sum() + w.mT[0].sum() + w.shape[0],
    "detached": lambda w: w.detach().sum() * w.sum(),
    "data": lambda w: w.data.sum() * w.sum(),
    "einsum": lambda w: torch.einsum("ij,jk,kl->il", w, w, w).sum(),
    "vector_norm": lambda w: torch.linalg.vector_norm(w),
}


def value(loss: SubstitutedLoss, batch: Any, values: Sequence[Tensor] | None = None) -> Tensor:
    with loss.evaluated(batch, values) as evaluation:
        return evaluation.loss


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_operation_sees_the_substitute(name: str) -> None:
    function = FUNCTIONS[name]
    parameter = nn.Parameter(W.clone())
    loss = SubstitutedLoss(lambda batch: batch * function(parameter), [parameter])
    substitute = V.clone().requires_grad_()
    expected_at = V.clone().requires_grad_()
    expected = 3.0 * function(expected_at)
    with loss.evaluated(3.0, [substitute]) as evaluation:
        assert evaluation.loss.item() == expected.item()
        assert evaluation.leaves[0] is substitute
        (gradient,) = torch.autograd.grad(evaluation.loss, evaluation.leaves)
    assert torch.equal(gradient, torch.autograd.grad(expected, expected_at)[0])
    assert value(loss, 3.0).item() == 3.0 * function(W).item()
    assert torch.equal(parameter, W)
    assert parameter._version == 0


@pytest.mark.parametrize("name", PROBLEMS)
def test_models_are_evaluated_at_the_substitutes(name: str) -> None:
    """An independent substitution: `functional_call`, which swaps the modules' attributes."""
    problem = PROBLEMS[name]()
    generator = torch.Generator().manual_seed(3)
    values = [p.detach() + 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in problem.parameters]
    inputs, labels = problem.batches[0]
    by_name = dict(zip((n for n, _ in problem.model.named_parameters()), values, strict=True))
    expected = nn.functional.cross_entropy(functional_call(problem.model, by_name, (inputs,)), labels)
    actual = value(SubstitutedLoss(problem.loss, problem.parameters), problem.batches[0], values)
    assert actual.item() == expected.item()
    assert actual.item() != problem.loss(problem.batches[0]).item()


def test_only_the_parameters_are_substituted() -> None:
    parameter, other = nn.Parameter(W.clone()), nn.Parameter(W.clone())
    loss = SubstitutedLoss(lambda batch: parameter.sum() + 10 * other.sum(), [parameter])
    assert value(loss, None, [V]).item() == V.sum().item() + 10 * W.sum().item()


def test_several_parameters_are_substituted_in_their_order() -> None:
    first, second = nn.Parameter(W.clone()), nn.Parameter(W.clone())
    loss = SubstitutedLoss(lambda batch: first.sum() + 10 * second.sum(), [first, second])
    assert value(loss, None, [V, 2 * V]).item() == 21 * V.sum().item()


@pytest.mark.parametrize("count", [0, 2])
def test_as_many_values_as_parameters_are_needed(count: int) -> None:
    parameter = nn.Parameter(W.clone())
    with pytest.raises(ValueError, match="argument 2"):
        value(SubstitutedLoss(lambda batch: parameter.sum(), [parameter]), None, [V] * count)


def test_the_substitution_ends_with_the_evaluation_also_on_an_exception() -> None:
    parameter = nn.Parameter(W.clone())

    def loss(batch: Any) -> Tensor:
        if batch is None:
            raise KeyError
        return parameter.sum()

    substituted = SubstitutedLoss(loss, [parameter])
    with pytest.raises(KeyError):
        value(substituted, None, [V])
    assert parameter.sum().item() == W.sum().item()
    assert value(substituted, 1, [V]).item() == V.sum().item()
    assert parameter.sum().item() == W.sum().item()


def test_the_substitution_lasts_as_long_as_the_evaluation() -> None:
    """Since checkpointed layers are evaluated again while their loss is differentiated."""
    parameter = nn.Parameter(W.clone())
    with SubstitutedLoss(lambda batch: parameter.sum(), [parameter]).evaluated(None, [V]):
        assert parameter.sum().item() == V.sum().item()
    assert parameter.sum().item() == W.sum().item()


def test_the_leaves_are_the_parameters_themselves_where_nothing_is_substituted() -> None:
    parameter = nn.Parameter(W.clone())
    with SubstitutedLoss(lambda batch: (parameter * batch).sum(), [parameter]).evaluated(W) as evaluation:
        assert list(evaluation.leaves) == [parameter]
        assert evaluation.num_samples() == 2


def test_a_substituted_loss_is_an_objective_and_a_plain_function_is_none() -> None:
    assert isinstance(SubstitutedLoss(lambda batch: W.sum(), [W]), Objective)
    assert not isinstance(lambda batch: W.sum(), Objective)
