"""Products that are not those of one symmetric matrix are seen."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lyapunov_lightning.curvature import HessianOperator
from lyapunov_lightning.curvature.operators.checks import check_operator
from tests.curvature.helpers import METHODS, DenseOperator, random_vectors, rounded, symmetric_matrix
from tests.problems import PROBLEMS, cnn, mlp, relu_cnn


@pytest.mark.parametrize("how", ["kept", "rebuilt", "forward_over_reverse"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_exact_products_pass(name: str, how: str) -> None:
    check = PROBLEMS[name]().operator(**METHODS[how]).check(finite_difference=True)
    assert check.asymmetry <= 1e-13
    assert check.nondeterminism == 0
    assert check.is_symmetric
    assert check.is_deterministic
    if name not in ("relu_cnn", "cnn"):
        assert check.inexactness is not None
        assert check.inexactness <= 1e-6


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm", "transformer"])
def test_exact_products_in_float32_pass(name: str) -> None:
    narrow, _ = rounded(PROBLEMS[name], torch.float32)
    check = narrow.operator().check()
    assert check.asymmetry <= 1e-5
    assert check.nondeterminism == 0


def test_finite_differences_pass_for_smooth_networks_and_not_for_those_with_kinks() -> None:
    smooth, _ = rounded(mlp, torch.float32)
    assert smooth.operator(method="finite_difference").check().asymmetry <= 1e-2
    kinked, _ = rounded(relu_cnn, torch.float32)
    check = kinked.operator(method="finite_difference", step=0.3).check()
    assert not check.is_symmetric
    assert check.is_deterministic


def test_half_precision_shows_in_the_asymmetry() -> None:
    narrow, _ = rounded(cnn, torch.bfloat16)
    check = narrow.operator().check()
    assert 1e-4 <= check.asymmetry <= 0.1


def test_a_loss_with_a_generator_of_its_own_is_not_deterministic() -> None:
    problem = mlp()
    generator = torch.Generator().manual_seed(0)

    def loss(batch: Any) -> Tensor:
        noise = torch.randn(batch[0].shape, generator=generator, dtype=torch.float64)
        return problem.loss((batch[0] + noise, batch[1]))

    for options in METHODS.values():
        check = HessianOperator(loss, problem.parameters, problem.batches, **options).check()
        assert check.nondeterminism > 0.01
        assert not check.is_deterministic


def test_a_wrong_third_derivative_of_pytorch_shows() -> None:
    """Of a LayerNorm in a loss that is differentiated by `torch.func` itself, as meta-learning does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).double()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    names = [name for name, _ in model.named_parameters()]
    inputs, labels = torch.randn(6, 3).double(), torch.tensor([0, 1, 1, 0, 1, 0])

    def loss_at(values: dict[str, Tensor]) -> Tensor:
        return functional.cross_entropy(torch.func.functional_call(model, values, (inputs,)), labels)

    def adapted(_: Any) -> Tensor:
        values = dict(model.named_parameters())
        slopes = torch.func.grad(loss_at)(values)
        return loss_at({name: values[name] - 0.5 * slopes[name] for name in names})

    check = HessianOperator(adapted, model.parameters(), [torch.ones(1)]).check(finite_difference=False)
    assert not check.is_symmetric
    assert check.is_deterministic


def test_a_check_costs_four_products_and_counts_them() -> None:
    operator = mlp().operator()
    operator.check()
    assert operator.num_matvecs == 4


def test_the_asymmetry_of_any_operator_is_measured() -> None:
    symmetric = symmetric_matrix([5.0, 1.0, *[0.1] * 198])
    assert check_operator(DenseOperator(symmetric)).asymmetry <= 1e-13
    noise = random_vectors(200, 200)
    for share in (1e-6, 1e-2, 1.0):
        antisymmetric = noise - noise.T
        antisymmetric *= share * symmetric.norm() / antisymmetric.norm()
        check = check_operator(DenseOperator(symmetric + antisymmetric))
        assert 0.02 * share <= check.asymmetry <= 5 * share
        assert check.is_symmetric == (share < 1e-3)


def test_an_asymmetry_that_only_the_leading_eigenvectors_have_is_seen() -> None:
    """Hidden from random vectors by a large rest."""
    size = 4000
    matrix = torch.eye(size, dtype=torch.float64)
    matrix[0, 1], matrix[1, 0] = 300.0, 250.0
    assert not check_operator(DenseOperator(matrix)).is_symmetric


def test_what_is_not_finite_is_neither_symmetric_nor_deterministic() -> None:
    check = check_operator(DenseOperator(torch.full((3, 3), torch.nan, dtype=torch.float64)))
    assert math.isnan(check.asymmetry)
    assert not check.is_symmetric
    assert not check.is_deterministic


def test_a_matrix_of_zeros_passes() -> None:
    check = check_operator(DenseOperator(torch.zeros(3, 3, dtype=torch.float64)))
    assert check.asymmetry == check.nondeterminism == 0
